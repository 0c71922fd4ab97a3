"""A recorded trace, finished: simplified, put into passes, with the shape of every value."""

from __future__ import annotations

import itertools
import operator
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Real
from typing import Any, Final, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from glasshive.client.cancellation import Cancellation
from glasshive.client.errors import TraceError
from glasshive.client.job import PassInput
from glasshive.client.prompts import Tokens
from glasshive.client.saved import SavedTensor, fill
from glasshive.client.sites import Sites
from glasshive.client.source_lines import Mark, SourceLine, here, resolve
from glasshive.client.structures import drop, save_parts
from glasshive.client.traced import TracedTensor
from glasshive.graph.budget import Bill, Budget, admit
from glasshive.graph.calls import Calls, surroundings
from glasshive.graph.codec import DEFAULT_LIMITS, graph_digest
from glasshive.graph.errors import GraphError, NoRoots, StepNeverRan, UnseenWrite
from glasshive.graph.graph import Graph, Node, NodeId, Read, Ref, Save, Site, Skip, Write
from glasshive.graph.order import DEFAULT_PASS_ROWS, Moment, Passes, assign_passes, step_of
from glasshive.graph.outline import GENERATOR, Outline
from glasshive.graph.sampling import Sampling
from glasshive.graph.simplify import simplify
from glasshive.graph.tensors import TensorSpec
from glasshive.security.errors import BadPeerId
from glasshive.security.keys import PeerId, public_key_of
from glasshive.security.requests import MAX_DEADLINE_SECONDS

_UNBOUNDED = Budget(peak_bytes=1 << 62, flops=1 << 62, saved_bytes=1 << 62)


TOKENS_PREFIX: Final = "t"
"""With which the names of saved tokens begin; those of other saves begin with `s`."""


ShowProgress: TypeAlias = bool | Literal["plain"] | None
"""Whether status lines show; None: on a terminal. "plain": there, but none that move."""


@dataclass(frozen=True, slots=True)
class TraceOptions:
    """How a trace is run. `pass_rows`: the most rows of one forward pass.

    `across_hardware`: whether it may be run again on other hardware, or another torch, than before.
    """

    batching: Literal["shared", "alone"] = "shared"
    pass_rows: int = DEFAULT_PASS_ROWS
    deadline_seconds: float = 300.0
    retries: int = 4
    route: frozenset[PeerId] | None = None
    avoid: frozenset[PeerId] = field(default_factory=frozenset)
    across_hardware: bool = False
    show_progress: ShowProgress = None

    def __post_init__(self) -> None:
        """Raise TraceError for an option that means nothing."""
        wrong: list[str] = []
        if self.batching not in ("shared", "alone"):
            wrong.append(f"batching={self.batching!r:.40}; 'shared' or 'alone' is wanted")
        if type(self.pass_rows) is not int or self.pass_rows < 1:
            wrong.append(f"pass_rows={self.pass_rows!r:.40}; a whole number from 1 on is wanted")
        if not _are_seconds(self.deadline_seconds):
            wrong.append(
                f"deadline={self.deadline_seconds!r:.40}; seconds above 0 are wanted, at most "
                f"{MAX_DEADLINE_SECONDS:.0f}"
            )
        if type(self.retries) is not int or self.retries < 0:
            wrong.append(f"retries={self.retries!r:.40}; a whole number from 0 on is wanted")
        if self.show_progress not in (None, True, False, "plain"):
            wrong.append(f"progress={self.show_progress!r:.40}; True, False or 'plain' is wanted")
        if self.across_hardware not in (True, False):
            wrong.append(f"across_hardware={self.across_hardware!r:.40}; True or False is wanted")
        if wrong:
            raise TraceError("; ".join(wrong), line=here())
        object.__setattr__(self, "deadline_seconds", float(self.deadline_seconds))


def _are_seconds(given: object) -> bool:
    """Whether it is a number of seconds that hosts take. True and nan are none."""
    is_number = isinstance(given, Real) and not isinstance(given, bool)
    return is_number and 0 < given <= MAX_DEADLINE_SECONDS  # type: ignore[operator]


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


class _Found(NamedTuple):
    steps: list[Tensor]  # int64 `[batch]` each
    goes_on: Tensor  # bool `[batch]`
    has_ended: bool


class Chosen:
    """The tokens of a generation, as far as they have come.

    A row ends with its first stop token, and an invoke with the last of its rows. What is chosen
    after that, because other invokes share its passes, is not its.
    """

    def __init__(
        self,
        names: Mapping[tuple[int, int], str],
        stop_tokens: Sequence[int],
        tell: Callable[[Chosen], None] | None,
    ) -> None:
        self.names = names  # of the saves, by invoke and step
        self._stops = torch.tensor(stop_tokens, dtype=torch.int64)
        self._tell = tell
        self._came: Mapping[str, Tensor] = {}
        self._found: dict[int, _Found] = {}  # by invoke; more is looked for when it is asked for

    @property
    def have_come(self) -> bool:
        """Whether some have."""
        return any(self.steps(invoke) for invoke in {invoke for invoke, _ in self.names})

    @property
    def came(self) -> Mapping[str, Tensor]:
        """All saves that have come with them, by name: of one run, where there were several."""
        return self._came

    def hear(self, saves: Mapping[str, Tensor]) -> None:
        """What has come until now. In the thread of whoever waits for the generation.

        Where it is run again, what had come before stays until as much has come anew.
        """
        if len(saves) >= len(self._came):
            self.hear_all(saves)

    def keep(self, saves: Mapping[str, Tensor]) -> None:
        """As `hear`, but nobody is told, whose own error could hide why the generation ended."""
        if len(saves) >= len(self._came):
            self._take(saves)

    def forget(self) -> None:
        """Nothing has come: what did may be wrong."""
        self._take({})

    def hear_all(self, saves: Mapping[str, Tensor]) -> None:
        """What has come in the end, be it less than a run before had come to."""
        self._take(saves)
        if self._tell is not None:
            self._tell(self)

    def _take(self, saves: Mapping[str, Tensor]) -> None:
        self._came = saves
        for invoke, found in list(self._found.items()):
            came = [saves.get(self.names[invoke, step]) for step in range(len(found.steps))]
            if any(map(operator.is_not, came, found.steps)):  # it was run again
                self._found.pop(invoke, None)

    def of(self, saves: Mapping[str, Tensor]) -> Chosen:
        """The same of what has come, which nobody is told of."""
        other = Chosen(self.names, (), None)
        other._stops, other._came = self._stops, saves
        return other

    def steps(self, invoke: int) -> list[Tensor]:
        """The tokens of each step that has come, int64 `[batch]`, up to the end of the invoke."""
        return self._find(invoke).steps

    def has_ended(self, invoke: int) -> bool:
        """Whether every row of the invoke has come to a stop token."""
        return self._find(invoke).has_ended

    def _find(self, invoke: int) -> _Found:
        """Goes on from what was found: it is asked for often, and there may be many steps."""
        steps, goes_on, has_ended = self._found.get(invoke, ([], torch.tensor(True), False))
        steps = list(steps)  # others have that list
        while not has_ended:
            tokens = self._came.get(self.names.get((invoke, len(steps)), ""))
            if tokens is None:
                break
            steps.append(tokens)
            goes_on = goes_on & ~torch.isin(tokens, self._stops)
            has_ended = not goes_on.any()
        found = self._found[invoke] = _Found(steps, goes_on, has_ended)
        return found

    def tokens(self, invoke: int) -> Tensor:
        """All of them, int64 `[batch, new]`."""
        return torch.stack(self.steps(invoke), 1)


@dataclass(frozen=True)
class Experiment:
    """What is run: a graph in passes, the inputs, and where in the user's code each node stands.

    `saves` are the traced tensors that are filled with what comes back, by name.
    """

    outline: Outline
    graph: Graph
    passes: Passes
    bill: Bill
    specs: Mapping[NodeId, TensorSpec]
    consts: Mapping[bytes, Tensor]
    inputs: tuple[PassInput, ...]
    saves: Mapping[str, TracedTensor]
    marks: Mapping[NodeId, Mark]
    until: Mapping[str, Mapping[int, Moment]]  # of each save: what it needs of which invokes
    # Of each write: what its value needs.
    writes: Mapping[NodeId, tuple[Write | Skip, Mapping[int, Moment]]]
    sampling: Sampling | None = None
    chosen: Chosen | None = None  # of a generation
    containers: Sequence[object] = ()  # that the user saved, with all that they hold
    cancellation: Cancellation = field(default_factory=Cancellation)

    @property
    def digest(self) -> bytes:
        """SHA-256 of the graph's bytes."""
        return graph_digest(self.graph)

    def line_of(self, node_id: int | None) -> SourceLine | None:
        """The user's line of a node."""
        return None if node_id is None else resolve(self.marks.get(NodeId(node_id)))

    def fill(self, came: Mapping[str, Tensor]) -> None:
        """Give every saved value its tensor, once all has come that comes.

        What needs a step that a generation did not come to, because it ended before, has none, and
        says so when it is used; saved lists and dictionaries are without it. Raises StepNeverRan if
        such a value was written somewhere, and ClientError if a tensor is not what was traced.
        """
        if self.chosen is not None:
            self.chosen.hear_all(came)
            self._check_writes(self.chosen)
        self._fill(came, lambda name: self._why_missing(name, self.chosen))

    def fill_done(self, ended_with: str) -> None:
        """As `fill`, for a generation that ended with this error: what has come of the steps that
        have their tokens.

        Raises StepNeverRan, and nothing has its tensor, where `fill` would raise it: some of what
        came is made of padding then.
        """
        chosen = self.chosen
        if chosen is not None and chosen.have_come:
            self._check_writes(chosen)
            self._fill(chosen.came, lambda name: self._why_late(name, chosen, ended_with))
            for name in self.saves.keys() - chosen.came.keys():
                why = f"it had not come when the generation ended with {ended_with}"
                self.saves[name]._alias.cell.recorder.never_came.setdefault(name, why)

    def _fill(self, came: Mapping[str, Tensor], why_late: Callable[[str], str | None]) -> None:
        gone: set[int] = set()
        for name, tensor in self.saves.items():
            held: Any = tensor  # whose class is another once it is filled
            if isinstance(held, SavedTensor):
                continue  # it was cancelled after that
            late = why_late(name)
            if late is not None:
                held._alias.cell.recorder.never_came[name] = late
                gone.add(id(held))
            elif name in came:
                fill(held, came[name])
        if gone:
            for one in self.containers:
                drop(one, gone)

    def never_come(self, came: Mapping[str, Tensor]) -> frozenset[str]:
        """The saves that don't come beside these, because the tokens among them say an end.

        From any thread.
        """
        if self.chosen is None:
            return frozenset()
        chosen = self.chosen.of(came)
        late = {name for name in self.saves if self._why_missing(name, chosen) is not None}
        for (invoke, step), name in chosen.names.items():
            if chosen.has_ended(invoke) and step >= len(chosen.steps(invoke)):
                late.add(name)
        return frozenset(late)

    def objection(self, name: str, tensor: Tensor) -> str:
        """What is wrong with a saved tensor that has come as announced; empty if nothing is."""
        is_token = self.chosen is not None and name in self._tokens_of_peers
        if is_token and not self.outline.are_tokens(tensor.tolist()):
            return f"{name} holds a token outside the vocabulary"
        return ""

    def _why_missing(self, name: str, chosen: Chosen | None) -> str | None:
        """Why a save never came; None if it comes."""
        if chosen is None:
            return None
        late = _late(self.until[name], chosen)
        if late is None:
            return None
        invoke, step = late
        return (
            f"it is of step {step}, and the generation ended at step "
            f"{len(chosen.steps(invoke)) - 1}, with a stop token; what was saved of the steps "
            "before is there"
        )

    def _why_late(self, name: str, chosen: Chosen, ended_with: str) -> str | None:
        """Why a save is of no step that was done when the generation ended; None if it is."""
        if (missing := self._why_missing(name, chosen)) is not None:
            return missing
        for invoke, (step, _) in self.until[name].items():
            if step >= (done := len(chosen.steps(invoke))):
                return (
                    f"it is of step {step}, and the generation ended with {ended_with} when "
                    f"{done} were done; what had come of those is there"
                )
        return None

    def _check_writes(self, chosen: Chosen) -> None:
        """Raise StepNeverRan for a write of a value of an invoke at a step after its end.

        Where invokes share passes there is such a value: what the model makes of padding.
        """
        for node_id, (node, behind) in self.writes.items():
            has_run = step_of(node) < len(chosen.steps(node.invoke))
            if has_run and (late := _late(behind, chosen)) is not None:
                line = self.line_of(node_id)
                raise StepNeverRan(
                    f"{_prefix(line)}this writes a value of step {late[1]} of invoke {late[0]}, "
                    f"which ended at step {len(chosen.steps(late[0])) - 1}, with a stop token; "
                    "take it from an earlier step, or generate with eos_token_id=[]",
                    node=node_id,
                )

    @cached_property
    def _tokens_of_peers(self) -> frozenset[str]:
        """The names of saved tokens that peers choose; what is written there, they refuse."""
        nodes = self.graph.nodes
        saves = (node for node in nodes.values() if isinstance(node, Save))
        return frozenset(
            one.name
            for one in saves
            if isinstance(read := nodes[one.value.node], Read) and read.site.module == GENERATOR
        )

    def saved_specs(self) -> dict[str, TensorSpec]:
        """What every save will be, by name."""
        return {
            node.name: self.specs[node.value.node]
            for node in self.graph.nodes.values()
            if isinstance(node, Save)
        }


def finish(
    sites: Sites,
    tokens: Sequence[Tokens],
    calls: Calls,
    options: TraceOptions,
    cancellation: Cancellation,
    *,
    sampling: Sampling | None = None,
    tell: Callable[[Chosen], None] | None = None,
    left_out: Sequence[TracedTensor] = (),
) -> Experiment:
    """The experiment that `sites` recorded. The recording itself stays as it is.

    With `sampling` it is a generation, of which all tokens are brought back, and told of to `tell`
    as they come. Saved values of `left_out` are filled by whoever asks.

    Raises NoRoots, UnequalLengths and what else the rules of a graph say, at the user's line;
    warns of every write that nothing saved can see.
    """
    if sites.broken is not None:
        raise sites.broken
    recorder = sites.recorder
    save_parts(recorder.containers)
    wanted = {
        name: one
        for name, one in recorder.saves.items()
        if not any(one is other for other in left_out)
    }
    saved = {name: Ref(tensor._alias.value()) for name, tensor in wanted.items()}
    until = {name: recorder.value_info[ref.node] for name, ref in saved.items()}
    effects: list[tuple[Node, Mark, bool]] = list(sites.writes())
    nodes = dict(recorder.nodes)  # now that every value has its node
    marks = {node_id: recorder.mark_of(node_id) for node_id in nodes}
    chosen = None
    if sampling is not None:
        names, tokens_saved = _save_tokens(sites, nodes)
        saved |= tokens_saved
        if len(saved) > DEFAULT_LIMITS.saves:
            raise TraceError(
                f"{len(wanted)} saved values, and {len(names)} tokens, which come back too; a "
                f"trace brings back at most {DEFAULT_LIMITS.saves}: stack the values of several "
                "steps with torch.stack(...) and save that, or generate fewer tokens at a time",
                line=here(),
            )
        chosen = Chosen(names, sampling.eos_token_id, tell)
    effects += [(Save(ref, name), recorder.mark_of(ref.node), True) for name, ref in saved.items()]
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
        if not passes.passes and sampling is not None:
            raise TraceError(
                "nothing of this generation is to be run: the tokens of all steps are written, and "
                "nothing else is read; save what the model makes of them, such as "
                "model.lm_head.output",
                line=here(),
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
    inputs: list[PassInput] = []
    for index, one in enumerate(passes.passes):
        # Those of a whole prompt, for whichever pass of its generation.
        is_first = not index or not passes.goes_on(index - 1)
        inputs.append(_pass_input(one.invokes, tokens) if is_first else inputs[-1])
    return Experiment(
        sites.outline,
        graph,
        passes,
        bill,
        specs,
        consts,
        tuple(inputs),
        wanted,
        marks,
        until,
        {
            node_id: (node, recorder.value_info[node.value.node])
            for node_id, node in graph.nodes.items()
            if isinstance(node, Write | Skip) and node.value.node in recorder.value_info
        },
        sampling,
        chosen,
        recorder.containers,
        cancellation,
    )


def _late(behind: Mapping[int, Moment], chosen: Chosen) -> tuple[int, int] | None:
    """The invoke and step, of those that a value needs, that came after the invoke's end."""
    for invoke, (step, _) in behind.items():
        if step >= len(chosen.steps(invoke)) and chosen.has_ended(invoke):
            return invoke, step
    return None


def _save_tokens(
    sites: Sites, nodes: dict[NodeId, Node]
) -> tuple[dict[tuple[int, int], str], dict[str, Ref]]:
    """The names of the saves of all tokens, by invoke and step, and the values to be saved.

    Where the body has not looked at the tokens of a step, a node that reads them is added.
    """
    names: dict[tuple[int, int], str] = {}
    values: dict[str, Ref] = {}
    free = itertools.count(max(nodes, default=-1) + 1)  # ids; a search a step would be quadratic
    for invoke, shape in enumerate(sites.invokes):
        for step in range(shape.n_steps):
            site = Site(GENERATOR, "output", (), step)
            node_id = sites.standing(site, invoke)
            if node_id is None:
                node_id = NodeId(next(free))
                nodes[node_id] = Read(site, invoke)
            names[invoke, step] = name = f"{TOKENS_PREFIX}{invoke}.{step}"
            values[name] = Ref(node_id)
    return names, values


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
