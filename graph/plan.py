"""A plan: which peer runs which nodes, in which pass, and every value that travels between them.

- A *stage* is what one peer does in one pass. Stages are ordered by (pass, span); a stage imports
  only from stages before it, so that a run cannot deadlock. Pass -1 comes before the first forward.
- A peer runs its stages in order. A stage starts when everything that it imports has arrived.
- `HIDDEN` stands for the hidden states of a pass among the values that travel, `TOKENS` for the
  tokens that were chosen in it, which are what the next one begins with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from glasshive.graph.errors import BadGraph
from glasshive.graph.graph import (
    Call,
    Graph,
    NodeId,
    Param,
    Read,
    Skip,
    Write,
    is_effect,
    refs,
)
from glasshive.graph.order import Passes, event_of
from glasshive.graph.outline import Leaf, Outline
from glasshive.graph.sampling import Sampling
from glasshive.graph.tensors import TensorSpec

HIDDEN: Final = NodeId(-1)
TOKENS: Final = NodeId(-2)
BEFORE_PASSES: Final = -1


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """Contiguous blocks `[start, end)` on one peer."""

    start: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end:
            raise BadGraph(f"span {self} is empty or negative; wanted 0 <= start < end")

    def __str__(self) -> str:
        return f"{self.start}:{self.end}"

    def hosts(self, block: int, n_blocks: int) -> bool:
        """Whether `block` runs here; -1 (embeddings) goes with block 0, the head with the last."""
        return self.start <= min(max(block, 0), n_blocks - 1) < self.end


@dataclass(frozen=True, slots=True)
class Stage:
    """What one peer does in one pass.

    `forward`: whether the hosted blocks run. `imports`: (value, sender), complete before the stage
    starts. `exports`: (value, receiver). `from_hidden`: (value, invoke) for reads of the last block
    before this span: rows of the hidden states that arrive anyway. `stop_event`: nothing is needed
    after it.
    """

    pass_index: int
    nodes: tuple[NodeId, ...]
    imports: tuple[tuple[NodeId, int], ...] = ()
    exports: tuple[tuple[NodeId, int], ...] = ()
    from_hidden: tuple[tuple[NodeId, int], ...] = ()
    forward: bool = False
    stop_event: int | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """One peer's share of a trace: its nodes and its stages. `index` is its place on the route.

    `specs` says what the graph's imports will be; whoever receives them holds the sender to it.
    `sampling` is how the part with the last block chooses the tokens of a generation.
    `outlives_peers` is whether the part of a generation waits for another peer in place of one that
    is lost, and until its own end keeps what it sent, to send it again.
    """

    index: int
    span: Span
    graph: Graph
    stages: tuple[Stage, ...]
    specs: Mapping[NodeId, TensorSpec]
    sampling: Sampling | None = None
    outlives_peers: bool = False

    @property
    def receivers(self) -> frozenset[int]:
        """The parts to which values of this one go."""
        return frozenset(to for stage in self.stages for _, to in stage.exports)


@dataclass(frozen=True, slots=True)
class Edge:
    """One value on its way from one peer of the route to another, once."""

    sender: int
    receiver: int
    value: NodeId
    pass_index: int


@dataclass(frozen=True, slots=True)
class Plan:
    """The parts of a trace, one for each span of the route that has something to do."""

    passes: Passes
    parts: tuple[Part, ...]

    def edges(self) -> Iterator[Edge]:
        """Every value that travels, in the order of the stages that send it."""
        for part in self.parts:
            for stage in part.stages:
                for value, receiver in stage.exports:
                    yield Edge(part.index, receiver, value, stage.pass_index)


def check_part(part: Part, passes: Passes, outline: Outline) -> None:
    """Check that a part from outside is one that a plan can hold.

    Every node stands in exactly one stage, after what it names; every read and write lies in this
    span and pass; stages ascend. Raises BadGraph naming the node.
    """
    if set(part.specs) != set(part.graph.imports):
        raise BadGraph("the shapes of the imports are not those of the graph's imports")
    is_last = part.span.end >= outline.n_blocks
    generates = passes.are_generation
    if (part.sampling is not None) != (is_last and generates):
        raise BadGraph("how tokens are chosen is said to the part with the last block, if any are")
    if part.sampling is not None:
        part.sampling.check(outline.vocabulary_tokens)
    if part.outlives_peers and not generates:
        raise BadGraph("a trace without steps is run again; no part of it waits for another peer")
    placed: set[NodeId] = set()
    known: set[NodeId] = set()
    ran: set[int] = set()
    last_pass = BEFORE_PASSES - 1
    for stage in part.stages:
        if stage.pass_index <= last_pass:
            raise BadGraph(f"stage of pass {stage.pass_index} after pass {last_pass}")
        last_pass = stage.pass_index
        if stage.forward and not 0 <= stage.pass_index < len(passes.passes):
            raise BadGraph(f"a forward in pass {stage.pass_index} of {len(passes.passes)}")
        if stage.forward:
            _check_step(stage, part, passes, ran, is_last)
            ran.add(stage.pass_index)
        stop = stage.stop_event
        if stop is not None and generates and not _ends_behind_blocks(stage, passes, outline):
            raise BadGraph(
                "a step of a generation runs to its end, where its token is chosen, and a chunk of "
                "a prompt through all blocks"
            )
        if stop is not None and not (
            0 <= stop < outline.n_events and part.span.hosts(outline.block(stop), outline.n_blocks)
        ):
            raise BadGraph(f"stop at event {stop} of {outline.n_events} on span {part.span}")
        hidden = 0
        for value, sender in stage.imports:
            if value == HIDDEN:
                if not stage.forward or sender >= part.index or part.span.start == 0:
                    raise BadGraph(f"hidden states from part {sender} to part {part.index}")
                hidden += 1
                continue
            if value == TOKENS:
                if not stage.forward:
                    raise BadGraph("tokens come to a stage that runs no blocks")
                continue
            if value not in part.graph.imports or value in known:
                raise BadGraph("an import that the graph does not name, or twice", node=value)
            if sender == part.index:
                raise BadGraph("a part that imports from itself", node=value)
            if sender > part.index and stage.pass_index == BEFORE_PASSES:
                raise BadGraph(f"part {sender} makes this only after it is needed", node=value)
            known.add(value)
        if hidden != (stage.forward and part.span.start > 0):
            raise BadGraph(
                f"the hidden states of pass {stage.pass_index} come to span {part.span} "
                f"{hidden} times"
            )
        for value, invoke in stage.from_hidden:
            if (
                not 0 <= stage.pass_index < len(passes.passes)
                or invoke not in passes.passes[stage.pass_index].invokes
                or value not in part.graph.imports
                or value in known
            ):
                raise BadGraph("not a value of the hidden states", node=value)
            first, last = passes.rows(invoke)
            wanted = outline.hidden_spec(last - first, passes.passes[stage.pass_index].seq)
            if part.specs[value] != wanted or not hidden:
                raise BadGraph(f"not the invoke's {wanted} of the hidden states", node=value)
            known.add(value)
        for node_id in stage.nodes:
            node = part.graph.nodes.get(node_id)
            if node is None or node_id in placed:
                raise BadGraph("a stage names a node twice, or one that is not there", node=node_id)
            if any(ref not in known for ref in refs(node)):
                raise BadGraph("a node stands before a value that it needs", node=node_id)
            _check_place(node_id, part, stage, passes, outline)
            placed.add(node_id)
            if not is_effect(node):
                known.add(node_id)
        if len(set(stage.exports)) != len(stage.exports):
            raise BadGraph(f"an export of pass {stage.pass_index} goes to one part twice")
        for value, receiver in stage.exports:
            if receiver == part.index:
                raise BadGraph("a part that exports to itself", node=value)
            if value == HIDDEN:
                if not stage.forward or part.span.end >= outline.n_blocks:
                    raise BadGraph("hidden states leave a stage that has none")
                if receiver < part.index:
                    raise BadGraph(f"hidden states from part {part.index} to part {receiver}")
            elif value == TOKENS:
                if not (is_last and stage.forward and passes.begins_next(stage.pass_index)):
                    raise BadGraph("tokens leave a stage that chooses none for a next one")
            elif value not in known:
                raise BadGraph("an export of a value that is not there", node=value)
        for kind, words in ((HIDDEN, "the hidden states"), (TOKENS, "the tokens")):
            if sum(value == kind for value, _ in stage.exports) > 1:
                raise BadGraph(f"{words} of pass {stage.pass_index} go to several parts")
    if len(placed) != len(part.graph.nodes):
        raise BadGraph(f"{len(part.graph.nodes) - len(placed)} nodes stand in no stage")


def _check_step(stage: Stage, part: Part, passes: Passes, ran: set[int], is_last: bool) -> None:
    """Check what only generations have: the steps before, for the cache, and the tokens."""
    one = passes.passes[stage.pass_index]
    if one.past and stage.pass_index - 1 not in ran:
        raise BadGraph(f"step {one.step} of pass {one.group} without the one before it")
    senders = [sender for value, sender in stage.imports if value == TOKENS]
    wanted = one.step > 0 and part.span.start == 0 and not is_last
    if len(senders) != wanted or any(sender <= part.index for sender in senders):
        raise BadGraph(
            f"the tokens of pass {stage.pass_index} come to span {part.span} {len(senders)} times, "
            f"or from where none are chosen; {int(wanted)} is wanted"
        )


def _ends_behind_blocks(stage: Stage, passes: Passes, outline: Outline) -> bool:
    """Whether a stage ends where a chunk before the last may, of which nobody wants the logits."""
    return (
        stage.forward
        and passes.passes[stage.pass_index].step < 0
        and stage.stop_event == outline.last_block_event
    )


def _check_place(
    node_id: NodeId, part: Part, stage: Stage, passes: Passes, outline: Outline
) -> None:
    node = part.graph.nodes[node_id]
    if isinstance(node, Read | Write | Skip):
        event = event_of(node, outline)
        here = part.span.hosts(outline.block(event), outline.n_blocks)
        if not (here and stage.forward and passes.at(node) == stage.pass_index):
            raise BadGraph(
                f"event {event} of invoke {node.invoke} does not happen on span {part.span} in "
                f"pass {stage.pass_index}",
                node=node_id,
            )
        one = passes.passes[stage.pass_index]
        edited: tuple[Leaf, ...] = ()
        if isinstance(node, Write):
            edited = (outline.leaf(node.site, one.kind),)
        elif isinstance(node, Skip):
            edited = outline.leaves(node.module, "output", one.kind)
            if len(edited) != 1 or outline.holds_blocks(node.module):
                raise BadGraph(
                    f"{node.module} cannot be skipped: it gives {len(edited)} tensors, or holds "
                    "the blocks",
                    node=node_id,
                )
            if one.group >= 0 and outline.fills_cache(node.module):
                raise BadGraph(
                    f"{node.module} cannot be skipped: later steps need what it keeps in the cache",
                    node=node_id,
                )
        if any(leaf.bypasses for leaf in edited):
            raise BadGraph(
                f"{node.module if isinstance(node, Skip) else node.site} is computed by every peer "
                "for itself, so no part can edit it for all",
                node=node_id,
            )
    elif isinstance(node, Call | Param):
        block = outline.owner_block(node.module)
        if not part.span.hosts(block, outline.n_blocks):
            raise BadGraph(f"{node.module} is not hosted by span {part.span}", node=node_id)
