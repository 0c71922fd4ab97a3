"""A recorded trace, finished: simplified, put into passes, with the shape of every value."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from glasshive.client.errors import TraceError
from glasshive.client.job import PassInput
from glasshive.client.prompts import Tokens
from glasshive.client.sites import Sites
from glasshive.client.source_lines import Mark, SourceLine, here, resolve
from glasshive.client.traced import TracedTensor
from glasshive.graph.budget import Bill, Budget, admit
from glasshive.graph.calls import Calls, surroundings
from glasshive.graph.codec import graph_digest
from glasshive.graph.errors import GraphError, NoRoots, UnseenWrite
from glasshive.graph.graph import Graph, Node, NodeId, Ref, Save, Write
from glasshive.graph.order import DEFAULT_PASS_ROWS, Passes, assign_passes
from glasshive.graph.outline import Outline
from glasshive.graph.simplify import simplify
from glasshive.graph.tensors import TensorSpec
from glasshive.security.errors import BadPeerId
from glasshive.security.keys import PeerId, public_key_of

_UNBOUNDED = Budget(peak_bytes=1 << 62, flops=1 << 62, saved_bytes=1 << 62)


@dataclass(frozen=True, slots=True)
class TraceOptions:
    """How a trace is run. `pass_rows`: the most rows of one forward pass."""

    batching: Literal["shared", "alone"] = "shared"
    pass_rows: int = DEFAULT_PASS_ROWS
    deadline_seconds: float = 300.0
    retries: int = 2
    route: frozenset[PeerId] | None = None
    avoid: frozenset[PeerId] = field(default_factory=frozenset)
    show_progress: bool | None = None

    def __post_init__(self) -> None:
        """Raise TraceError for an option that means nothing."""
        wrong: list[str] = []
        if self.batching not in ("shared", "alone"):
            wrong.append(f"batching={self.batching!r:.40}; 'shared' or 'alone' is wanted")
        if type(self.pass_rows) is not int or self.pass_rows < 1:
            wrong.append(f"pass_rows={self.pass_rows!r:.40}; a whole number from 1 on is wanted")
        if not self.deadline_seconds > 0:
            wrong.append(f"deadline={self.deadline_seconds!r}; seconds above 0 are wanted")
        if type(self.retries) is not int or self.retries < 0:
            wrong.append(f"retries={self.retries!r:.40}; a whole number from 0 on is wanted")
        if wrong:
            raise TraceError("; ".join(wrong), line=here())


def peer_ids(given: object, option: str) -> frozenset[PeerId]:
    """The peers that an option names. Raises TraceError for what is no collection of peer ids."""
    wanted = f"{option}= takes whole peer ids, as in {option}=[tracer.result.hops[0].peer]"
    if isinstance(given, str | Mapping) or not isinstance(given, Iterable):
        raise TraceError(f"{wanted}; got {given!r:.40} ({type(given).__name__})", line=here())
    peers = list(given)
    for one in peers:
        try:
            public_key_of(one)
        except BadPeerId as error:
            got = repr(one) if isinstance(one, str) else f"of type {type(one).__name__}"
            raise TraceError(f"{wanted}; got one {got:.80}: {error}", line=here()) from None
    return frozenset(peers)


@dataclass(frozen=True, slots=True)
class Experiment:
    """What is run: a graph in passes, the inputs, and where in the user's code each node stands."""

    outline: Outline
    graph: Graph
    passes: Passes
    bill: Bill
    specs: Mapping[NodeId, TensorSpec]
    consts: Mapping[bytes, Tensor]
    inputs: tuple[PassInput, ...]
    saves: Mapping[str, TracedTensor]
    marks: Mapping[NodeId, Mark]

    @property
    def digest(self) -> bytes:
        """SHA-256 of the graph's bytes."""
        return graph_digest(self.graph)

    def line_of(self, node_id: int | None) -> SourceLine | None:
        """The user's line of a node."""
        return None if node_id is None else resolve(self.marks.get(NodeId(node_id)))

    def saved_specs(self) -> dict[str, TensorSpec]:
        """What every save will be, by name."""
        return {
            node.name: self.specs[node.value.node]
            for node in self.graph.nodes.values()
            if isinstance(node, Save)
        }


def finish(
    sites: Sites, tokens: Sequence[Tokens], calls: Calls, options: TraceOptions
) -> Experiment:
    """The experiment that `sites` recorded. The recording itself stays as it is.

    Raises NoRoots, UnequalLengths and what else the rules of a graph say, at the user's line;
    warns of every write that nothing saved can see.
    """
    if sites.broken is not None:
        raise sites.broken
    recorder = sites.recorder
    saved = {name: Ref(tensor._alias.value()) for name, tensor in recorder.saves.items()}
    effects: list[tuple[Node, Mark, bool]] = list(sites.writes())
    effects += [(Save(ref, name), recorder.mark_of(ref.node), True) for name, ref in saved.items()]
    nodes = dict(recorder.nodes)
    marks = {node_id: recorder.mark_of(node_id) for node_id in nodes}
    shown: set[NodeId] = set()
    for node_id, (node, mark, is_shown) in enumerate(effects, start=max(nodes, default=-1) + 1):
        nodes[NodeId(node_id)] = node
        marks[NodeId(node_id)] = mark
        if is_shown:
            shown.add(NodeId(node_id))
    try:
        graph, dropped = simplify(Graph(nodes), sites.outline)
        # An edit that the user saves as a value is not lost, even if the model never sees it.
        _warn_of(
            [i for i, is_value_live in dropped.items() if not (is_value_live and i in shown)],
            nodes,
            marks,
        )
        passes = assign_passes(
            graph,
            sites.outline,
            sites.invokes,
            pass_rows=options.pass_rows,
            alone=options.batching == "alone",
        )
        bill = admit(graph, surroundings(sites.outline, calls, passes), _UNBOUNDED)
    except NoRoots as error:
        raise NoRoots(f"{_prefix(here())}{error}") from None
    except GraphError as error:
        if error.node is not None:
            line = resolve(marks.get(NodeId(error.node)))
            error.args = (f"{_prefix(line)}{error}",)
        raise
    specs = {i: spec for i, spec in bill.specs.items() if isinstance(spec, TensorSpec)}
    digests = {node.digest for node in graph.nodes.values() if hasattr(node, "digest")}
    consts = {name: recorder.consts[name][1] for name in digests}
    inputs = tuple(_pass_input(one.invokes, tokens) for one in passes.passes)
    return Experiment(
        sites.outline, graph, passes, bill, specs, consts, inputs, dict(recorder.saves), marks
    )


def _pass_input(invokes: Sequence[int], tokens: Sequence[Tokens]) -> PassInput:
    mine = [tokens[i] for i in invokes]
    ids = torch.cat([one.input_ids for one in mine])
    if mine[0].attention_mask is None:
        return PassInput(ids)
    positions = [one.position_ids for one in mine]
    return PassInput(
        ids,
        torch.cat([one.mask for one in mine]),
        torch.cat([one for one in positions if one is not None]),
    )


def _warn_of(
    unseen: Sequence[NodeId], nodes: Mapping[NodeId, Node], marks: Mapping[NodeId, Mark]
) -> None:
    for node_id in unseen:
        node = nodes[node_id]
        where = node.site if isinstance(node, Write) else getattr(node, "module", "a module")
        text = (
            f"nothing that is saved can see this edit of {where}, so it is dropped; save a value "
            "from a later module of the same invoke"
        )
        line = resolve(marks.get(node_id))
        if line is None:
            warnings.warn(text, UnseenWrite, stacklevel=2)
        else:
            warnings.warn_explicit(f"{line}: {text}", UnseenWrite, line.file, line.line)


def _prefix(line: SourceLine | None) -> str:
    return f"{line}: " if line else ""
