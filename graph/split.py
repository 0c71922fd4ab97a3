"""Cutting a graph along a route: which span computes what, and what travels.

- A read or write happens where its block is. A `call` or `param` goes to the peer that hosts the
  module. Any other node runs as soon as its inputs exist: on the latest of their places.
- A parameter that lies behind its consumer is sent there before the passes; but what is smaller
  goes to the parameter instead, unless an earlier write waits for the result.
- Nodes that depend on constants alone are repeated wherever they are used, and never travel.
- A value read off the last block of a span *is* the hidden states that cross the cut, as long as
  nothing was written there: the next span takes it from them, at no cost.
- A span after the last one that anything needs gets no part, and its peer is never contacted.

The law, tested over random graphs and every cut: the split run equals the uncut run.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from glasshive.graph.errors import BadRoute, NotYet
from glasshive.graph.graph import (
    Call,
    Const,
    Graph,
    Node,
    NodeId,
    Param,
    Read,
    Skip,
    Write,
    is_effect,
    refs,
)
from glasshive.graph.order import Passes, event_of, slots
from glasshive.graph.outline import Outline
from glasshive.graph.plan import BEFORE_PASSES, HIDDEN, TOKENS, Part, Plan, Span, Stage
from glasshive.graph.sampling import Sampling
from glasshive.graph.tensors import TensorSpec

# (pass, place on the route): the order in which stages can run.
Place: TypeAlias = tuple[int, int]


def needed_blocks(graph: Graph, outline: Outline) -> frozenset[int]:
    """The blocks whose peers a graph needs: all up to its last site, and the homes of its modules.

    Embeddings count as block 0, norm and head as the last block.
    """
    last = outline.n_blocks - 1
    found: set[int] = set()
    for node in graph.nodes.values():
        if isinstance(node, Read | Write | Skip):  # tokens that are all written are never read
            found.update(range(min(max(outline.block(event_of(node, outline)), 0), last) + 1))
        elif isinstance(node, Call | Param):
            found.add(min(max(outline.owner_block(node.module), 0), last))
    return frozenset(found or {0})


def split(
    graph: Graph,
    outline: Outline,
    passes: Passes,
    route: Sequence[Span],
    specs: Mapping[NodeId, TensorSpec],
    sampling: Sampling | None = None,
) -> Plan:
    """The plan of a simplified graph over a route of ascending spans.

    `specs` holds dtype and shape of every node that may travel; `sampling` is how the tokens of a
    generation are chosen.

    Raises ImpossibleOrder as `slots` does, BadRoute if a needed block is on no span, and NotYet if
    a value comes from a module whose peer lies behind the place where it is wanted.
    """
    slots(graph, outline, passes)
    _check_route(graph, outline, route)
    places = _place(graph, outline, passes, route, specs)
    depth = _forward_depth(graph, outline, passes, route)
    builders = [_PartBuilder(index, span) for index, span in enumerate(route)]
    exits = _untouched_exits(graph, outline, route)
    for pass_index, deepest in depth.items():
        for index in range(deepest + 1):
            builders[index].stage(pass_index).forward = True
            if index:
                builders[index].stage(pass_index).hidden_from = index - 1
                builders[index - 1].stage(pass_index).exports.append((HIDDEN, index))
        if deepest and passes.begins_next(pass_index):
            builders[deepest].stage(pass_index).exports.append((TOKENS, 0))
            builders[0].stage(pass_index + 1).imports.append((TOKENS, deepest))
    # In the order of the stages, so that the first use of a value is the earliest one.
    ordered = [
        (place or (BEFORE_PASSES, 0), node_id)
        for node_id, place in places.items()
        if place is not None or is_effect(graph.nodes[node_id])
    ]
    for (pass_index, index), node_id in sorted(ordered):
        builder = builders[index]
        for ref in refs(graph.nodes[node_id]):
            home = places[ref]
            if home is None:
                builder.copy_free(ref, graph, pass_index)
            elif home[1] != index and ref not in builder.imports:
                builder.imports.add(ref)
                exit_of, invoke = exits.get(ref, (None, 0))
                if exit_of == index - 1 and builder.takes_hidden(home[0]):
                    builder.stage(home[0]).from_hidden.append((ref, invoke))
                else:
                    builder.stage(pass_index).imports.append((ref, home[1]))
                    builders[home[1]].stage(home[0]).exports.append((ref, index))
        builder.add(node_id, graph.nodes[node_id], pass_index)
    parts = []
    for index, builder in enumerate(builders):
        if builder.stages:
            stop = {
                p: _stop_event(graph, outline, passes, p, route, index)
                for p in depth
                if depth[p] == index
            }
            is_last = builder.span.end >= outline.n_blocks
            parts.append(builder.build(stop, specs, sampling if is_last else None))
    return Plan(passes, tuple(parts))


def _check_route(graph: Graph, outline: Outline, route: Sequence[Span]) -> None:
    for one, two in itertools.pairwise(route):
        if two.start < one.end:
            raise BadRoute(f"spans {one} and {two} overlap or stand in the wrong order")
    missing = [
        block
        for block in sorted(needed_blocks(graph, outline))
        if not any(span.hosts(block, outline.n_blocks) for span in route)
    ]
    if missing:
        raise BadRoute(f"blocks {missing} are on no span of the route {[str(s) for s in route]}")


def _home(block: int, outline: Outline, route: Sequence[Span]) -> int:
    return next(i for i, span in enumerate(route) if span.hosts(block, outline.n_blocks))


def _place(
    graph: Graph,
    outline: Outline,
    passes: Passes,
    route: Sequence[Span],
    specs: Mapping[NodeId, TensorSpec],
) -> dict[NodeId, Place | None]:
    """Where every node runs; None for what depends on constants alone."""
    places: dict[NodeId, Place | None] = {}
    deadlines = _deadlines(graph, outline, passes, route)
    for node_id, node in graph.nodes.items():
        inputs = [place for ref in refs(node) if (place := places[ref]) is not None]
        latest = max(inputs, default=None)
        if isinstance(node, Const):
            places[node_id] = None
        elif isinstance(node, Read | Write | Skip):
            block = outline.block(event_of(node, outline))
            here = (passes.at(node), _home(block, outline, route))
            if latest is not None and latest > here:
                raise NotYet(
                    f"the value written at block {block} comes from a module whose peer lies "
                    f"behind it ({route[latest[1]]} after {route[here[1]]}); take it in "
                    "another trace first and give it in as a tensor",
                    node=node_id,
                )
            places[node_id] = here
        elif isinstance(node, Param | Call):
            home = _home(outline.owner_block(node.module), outline, route)
            if latest is None:
                places[node_id] = (BEFORE_PASSES, home)
            elif latest[1] <= home:
                places[node_id] = (latest[0], home)
            else:  # its peer has done this pass already: in the next one, or after the last
                places[node_id] = (latest[0] + 1, home)
        else:
            at_owner = _at_owner(node, latest, places, specs)
            in_time = at_owner is not None and at_owner <= deadlines.get(node_id, at_owner)
            places[node_id] = at_owner if in_time else latest
    return places


def _at_owner(
    node: Node,
    latest: Place | None,
    places: Mapping[NodeId, Place | None],
    specs: Mapping[NodeId, TensorSpec],
) -> Place | None:
    """Where the owner of a parameter behind `latest` runs `node`, if this moves fewer bytes."""
    if latest is None or latest[0] == BEFORE_PASSES:
        return None
    far: set[NodeId] = set()
    near: set[NodeId] = set()
    owner = latest[1]
    for ref in refs(node):
        place = places[ref]
        if place is not None:
            is_far = place[0] == BEFORE_PASSES and place[1] > latest[1]
            (far if is_far else near).add(ref)
            owner = max(owner, place[1]) if is_far else owner

    def count_bytes(values: set[NodeId]) -> int:
        return sum(specs[value].nbytes for value in values if value in specs)

    return (latest[0], owner) if count_bytes(far) > count_bytes(near) else None


def _deadlines(
    graph: Graph, outline: Outline, passes: Passes, route: Sequence[Span]
) -> dict[NodeId, Place]:
    """For every value that a write depends on, the place by which it must be there."""
    found: dict[NodeId, Place] = {}
    for node_id in reversed(list(graph.nodes)):
        node = graph.nodes[node_id]
        if isinstance(node, Write | Skip):
            block = outline.block(event_of(node, outline))
            until: Place | None = (passes.at(node), _home(block, outline, route))
        else:
            until = found.get(node_id)
        if until is None:
            continue
        if isinstance(node, Call):
            until = min(until, (until[0], _home(outline.owner_block(node.module), outline, route)))
        for ref in refs(node):
            found[ref] = min(found.get(ref, until), until)
    return found


def _forward_depth(
    graph: Graph, outline: Outline, passes: Passes, route: Sequence[Span]
) -> dict[int, int]:
    """For every pass, the last place on the route at which the blocks have to run.

    In a generation it is the last one of all, where the token is chosen.
    """
    if passes.are_generation:
        last = _home(outline.n_blocks - 1, outline, route)
        return dict.fromkeys(range(len(passes.passes)), last)
    depth: dict[int, int] = {}
    for node in graph.nodes.values():
        if isinstance(node, Read):
            here = _home(outline.block(event_of(node, outline)), outline, route)
            index = passes.at(node)
            depth[index] = max(depth.get(index, 0), here)
    return dict(sorted(depth.items()))


def _stop_event(
    graph: Graph, outline: Outline, passes: Passes, pass_index: int, route: Sequence[Span], at: int
) -> int | None:
    """The last event that a read of this pass needs on the span at `at`.

    The steps of a generation run to their end; chunks of a prompt before that need no logits.
    """
    if passes.are_generation:
        return outline.last_block_event if passes.passes[pass_index].step < 0 else None
    events = [
        event_of(node, outline)
        for node in graph.nodes.values()
        if isinstance(node, Read) and passes.at(node) == pass_index
    ]
    here = [e for e in events if route[at].hosts(outline.block(e), outline.n_blocks)]
    return max(here, default=None)


def _untouched_exits(
    graph: Graph, outline: Outline, route: Sequence[Span]
) -> dict[NodeId, tuple[int, int]]:
    """Reads that equal the hidden states leaving a span: the place of that span, and the invoke."""
    exits = {
        f"{outline.blocks_path}.{span.end - 1}": index for index, span in enumerate(route[:-1])
    }
    written = {
        (node.site.module, node.invoke, node.site.step)
        for node in graph.nodes.values()
        if isinstance(node, Write) and node.site.io == "output"
    } | {
        (node.module, node.invoke, node.step)
        for node in graph.nodes.values()
        if isinstance(node, Skip)
    }
    found: dict[NodeId, tuple[int, int]] = {}
    for node_id, node in graph.nodes.items():
        if isinstance(node, Read) and node.site.io == "output" and node.site.module in exits:
            first = outline.modules[node.site.module].outputs[0].path
            here = (node.site.module, node.invoke, node.site.step)
            if node.site.leaf == first and here not in written:
                found[node_id] = (exits[node.site.module], node.invoke)
    return found


@dataclass
class _StageBuilder:
    nodes: list[NodeId] = field(default_factory=list)
    imports: list[tuple[NodeId, int]] = field(default_factory=list)
    exports: list[tuple[NodeId, int]] = field(default_factory=list)
    from_hidden: list[tuple[NodeId, int]] = field(default_factory=list)
    hidden_from: int | None = None
    forward: bool = False


class _PartBuilder:
    """Gathers one span's nodes and stages."""

    def __init__(self, index: int, span: Span) -> None:
        self.index = index
        self.span = span
        self.stages: dict[int, _StageBuilder] = {}
        self.nodes: dict[NodeId, Node] = {}
        self.imports: set[NodeId] = set()

    def stage(self, pass_index: int) -> _StageBuilder:
        return self.stages.setdefault(pass_index, _StageBuilder())

    def add(self, node_id: NodeId, node: Node, pass_index: int) -> None:
        self.nodes[node_id] = node
        self.stage(pass_index).nodes.append(node_id)

    def copy_free(self, node_id: NodeId, graph: Graph, pass_index: int) -> None:
        """Repeat a node that depends on constants alone, in the first stage that uses it."""
        if node_id not in self.nodes:
            for ref in refs(graph.nodes[node_id]):
                self.copy_free(ref, graph, pass_index)
            self.add(node_id, graph.nodes[node_id], pass_index)

    def takes_hidden(self, pass_index: int) -> bool:
        """Whether hidden states arrive here in this pass."""
        stage = self.stages.get(pass_index)
        return stage is not None and stage.hidden_from is not None

    def build(
        self,
        stop: Mapping[int, int | None],
        specs: Mapping[NodeId, TensorSpec],
        sampling: Sampling | None,
    ) -> Part:
        stages = []
        for pass_index, one in sorted(self.stages.items()):
            imports = list(one.imports)
            if one.hidden_from is not None:
                imports.insert(0, (HIDDEN, one.hidden_from))
            stages.append(
                Stage(
                    pass_index=pass_index,
                    nodes=tuple(sorted(one.nodes)),
                    imports=tuple(imports),
                    exports=tuple(one.exports),
                    from_hidden=tuple(one.from_hidden),
                    forward=one.forward,
                    stop_event=stop.get(pass_index),
                )
            )
        ordered = dict(sorted(self.nodes.items()))
        graph = Graph(ordered, frozenset(self.imports))
        imported = {value: specs[value] for value in sorted(self.imports)}
        return Part(self.index, self.span, graph, tuple(stages), imported, sampling)
