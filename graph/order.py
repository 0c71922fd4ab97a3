"""When things happen: passes, slots, and the rule that makes a write legal.

- The run of a trace is a total order of slots (pass, event). A value's slot is the latest among
  its inputs; constants and parameters come before all of them.
- `write(site, v)` is legal iff `slot(v) <= slot(site)`: otherwise it would change its own past. So
  graph plus model is acyclic by one comparison for each write.
- Invokes of equal length share a pass, as rows of one batch. Where a value of invoke A goes into
  invoke B, A's pass comes before B's, or is the same if A's event comes first.
- A step of a generation is a pass. The steps of what shares a prompt's pass follow each other. A
  prompt in chunks has passes before its step 0, which is the last chunk; nothing is read there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeAlias

from glasshive.graph.errors import BadGraph, ImpossibleOrder, UnequalLengths
from glasshive.graph.graph import Graph, NodeId, Read, Site, Skip, Write, refs
from glasshive.graph.outline import Leaf, Outline, PassKind
from glasshive.graph.tensors import TensorSpec

DEFAULT_PASS_ROWS = 32

Slot: TypeAlias = tuple[int, int]
BEFORE_ALL: Slot = (-1, -1)
# In an invoke: which of its passes, and the event in that.
Moment: TypeAlias = tuple[int, int]
NEVER: Moment = (-1, -1)


@dataclass(frozen=True, slots=True)
class InvokeShape:
    """The size of one invoke's input: `batch` sequences of `seq` tokens, left-padded or not.

    `new_tokens` is how many are generated for each at most: 0 in a trace, which is one pass. With
    `chunk_tokens` no pass of the prompt of a generation has more tokens than that.
    """

    batch: int
    seq: int
    padded: bool = False
    new_tokens: int = 0
    chunk_tokens: int = 0

    @property
    def n_steps(self) -> int:
        """The number of its passes: of the prompt, and of every new token but the last."""
        return max(self.new_tokens, 1)

    def kind(self, step: int) -> PassKind:
        """What decides which tensors one of its passes has."""
        if self.new_tokens:
            return PassKind.of_step(self.padded, *self._tokens(step))
        return PassKind.of_trace(self.padded)

    def spec(self, leaf: Leaf, step: int) -> TensorSpec:
        """What this invoke's rows of a tensor are in one of its passes."""
        return TensorSpec(leaf.dtype, leaf.shape(self.batch, *self._tokens(step)))

    def _tokens(self, step: int) -> tuple[int, int]:
        """How many tokens one of its passes has, and how many are before them."""
        if step > 0:
            return 1, self.seq + step - 1
        past = before_last_chunk(self.seq, self.chunk_tokens)
        return self.seq - past, past


@dataclass(frozen=True, slots=True)
class Pass:
    """One forward pass: which invokes are its rows, in order. All have the same length.

    In a generation `group` is the index of step 0, whose prompt it belongs to and whose cache it
    uses, and `past` the number of tokens in there before it runs; in a trace `group` is -1, and
    there is no cache. Chunks of the prompt before the last have the steps from -1 down.
    """

    invokes: tuple[int, ...]
    seq: int
    padded: bool
    rows: tuple[tuple[int, int], ...]  # [first, last) of each invoke
    step: int = 0
    past: int = 0
    group: int = -1

    @property
    def batch(self) -> int:
        """The number of rows of the pass."""
        return self.rows[-1][1]

    @property
    def kind(self) -> PassKind:
        """What decides which tensors it has."""
        if self.group < 0:
            return PassKind.of_trace(self.padded)
        return PassKind.of_step(self.padded, self.seq, self.past)

    def spec(self, leaf: Leaf, rows: int | None = None) -> TensorSpec:
        """What a tensor is in this pass, for all of its rows or for some of them."""
        batch = self.batch if rows is None else rows
        return TensorSpec(leaf.dtype, leaf.shape(batch, self.seq, self.past))


@dataclass(frozen=True)
class Passes:
    """The passes of a trace in the order in which they run, and where each invoke is."""

    passes: tuple[Pass, ...]

    @cached_property
    def _index(self) -> dict[tuple[int, int], int]:
        return {
            (invoke, one.step): index
            for index, one in enumerate(self.passes)
            for invoke in one.invokes
        }

    def of(self, invoke: int, step: int = 0) -> int:
        """The index of the pass in which a step of `invoke` runs."""
        index = self._index.get((invoke, step))
        if index is None:
            at = f"step {step} of invoke {invoke}" if step else f"invoke {invoke}"
            raise BadGraph(f"{at} is in no pass; there are {len(self.passes)} passes")
        return index

    def at(self, node: Read | Write | Skip) -> int:
        """The index of the pass in which `node` happens."""
        return self.of(node.invoke, step_of(node))

    def rows(self, invoke: int) -> tuple[int, int]:
        """The rows `[first, last)` of `invoke` in its passes."""
        one = self.passes[self.of(invoke)]
        return one.rows[one.invokes.index(invoke)]

    def new_tokens(self, index: int) -> int:
        """How many tokens are generated behind a prompt whose step 0 has this index."""
        return self._group_sizes[self.passes[index].group]

    @cached_property
    def _group_sizes(self) -> Counter[int]:
        return Counter(one.group for one in self.passes if one.group >= 0 and one.step >= 0)

    def chunk_tokens(self, index: int) -> int:
        """The size of the chunks before the last, of a prompt whose step 0 has this index.

        0 if it is whole.
        """
        return self.passes[index - 1].seq if self.passes[index].past else 0

    def goes_on(self, index: int) -> bool:
        """Whether the next pass is another step of the same generation."""
        if index + 1 >= len(self.passes):
            return False
        return self.passes[index + 1].group == self.passes[index].group >= 0

    def begins_next(self, index: int) -> bool:
        """Whether the tokens that are chosen in a pass are what the next one begins with."""
        return self.goes_on(index) and self.passes[index].step >= 0

    @property
    def are_generation(self) -> bool:
        """Whether tokens are generated."""
        return any(one.group >= 0 for one in self.passes)


def step_of(node: Read | Write | Skip) -> int:
    """The step at which `node` happens; 0 in a trace."""
    return node.step if isinstance(node, Skip) else node.site.step


def event_of(node: Read | Write | Skip, outline: Outline) -> int:
    """The event at which `node` happens in its pass."""
    if isinstance(node, Skip):
        return outline.event(Site(node.module, "input", (), node.step))
    return outline.event(node.site)


def moment_of(node: Read | Write | Skip, outline: Outline) -> Moment:
    """When `node` happens in its invoke."""
    return step_of(node), event_of(node, outline)


def spec_of_read(node: Read, outline: Outline, passes: Passes) -> TensorSpec:
    """What the rows of an invoke are at a site. Raises UnknownModule or NotASite."""
    one = passes.passes[passes.at(node)]
    first, last = passes.rows(node.invoke)
    return one.spec(outline.leaf(node.site, one.kind), last - first)


def slots(graph: Graph, outline: Outline, passes: Passes) -> dict[NodeId, Slot]:
    """The slot of every node. Imported values count as before all: they are there at the start.

    Raises ImpossibleOrder, naming the node, for a write whose value exists only later.
    """
    found: dict[NodeId, Slot] = dict.fromkeys(graph.imports, BEFORE_ALL)
    for node_id, node in graph.nodes.items():
        latest = max((found[ref] for ref in refs(node)), default=BEFORE_ALL)
        if isinstance(node, Read):
            found[node_id] = (passes.at(node), event_of(node, outline))
        elif isinstance(node, Write | Skip):
            here = (passes.at(node), event_of(node, outline))
            if latest > here:
                raise ImpossibleOrder(
                    f"{_place(node)} runs before the value that is written to it exists: "
                    f"the value is made in pass {latest[0]} at event {latest[1]}, the write is in "
                    f"pass {here[0]} at event {here[1]}",
                    node=node_id,
                )
            found[node_id] = here
        else:
            found[node_id] = latest
    return found


def _place(node: Write | Skip) -> str:
    return f"{node.module} (skipped)" if isinstance(node, Skip) else str(node.site)


def reads_behind(graph: Graph, outline: Outline) -> dict[NodeId, dict[int, Moment]]:
    """For every value, the invokes that it was read from, each with its latest moment."""
    found: dict[NodeId, dict[int, Moment]] = {ref: {} for ref in graph.imports}
    for node_id, node in graph.nodes.items():
        if isinstance(node, Read):
            found[node_id] = {node.invoke: moment_of(node, outline)}
            continue
        found[node_id] = merge_reads(found[ref] for ref in refs(node))
    return found


def merge_reads(several: Iterable[Mapping[int, Moment]]) -> dict[int, Moment]:
    """The union of such maps: each invoke with its latest moment."""
    merged: dict[int, Moment] = {}
    for one in several:
        for invoke, moment in one.items():
            if moment > merged.get(invoke, NEVER):
                merged[invoke] = moment
    return merged


def assign_passes(
    graph: Graph,
    outline: Outline,
    invokes: Sequence[InvokeShape],
    *,
    pass_rows: int = DEFAULT_PASS_ROWS,
    alone: bool = False,
) -> Passes:
    """Put the invokes into as few passes as the graph allows.

    The rule: an invoke goes into the earliest pass that its needs allow; invokes of one level and
    equal length share passes of at most `pass_rows` rows, in the order in which they were written.
    With `alone` every invoke has its own pass. An invoke (or several that need each other) of more
    rows than that is one pass. One that edits a tensor which all rows share has its own, too. One
    that nothing is read from is in no pass: it is not run. In a generation invokes share all of
    their passes or none, and so have as many new tokens each.
    Raises UnequalLengths if invokes need each other and cannot share a pass, and ImpossibleOrder if
    they need each other's later values; both name the node of a write.
    """
    before = _needs(graph, outline)
    read = {node.invoke for node in graph.nodes.values() if isinstance(node, Read)}
    groups = [group for group in _mutual(len(invokes), before) if read.intersection(group)]
    lone = set(range(len(invokes))) if alone else _lone(graph, outline, invokes)
    for group in groups:
        _check_group(group, invokes, before, lone, alone)
    level_of: dict[int, int] = {}
    by_level: dict[tuple[int, _Key], list[list[int]]] = {}
    group_of = {invoke: index for index, group in enumerate(groups) for invoke in group}
    for group in groups:  # in topological order
        key = _key(invokes[group[0]])
        level = 0
        for target in group:
            for source, need in before.get(target, {}).items():
                if group_of[source] == group_of[target]:
                    continue
                apart = need.is_strict or bool({source, target} & lone)
                apart = apart or _key(invokes[source]) != key
                level = max(level, level_of[source] + int(apart))
        for target in group:
            level_of[target] = level
        by_level.setdefault((level, key), []).append(group)
    passes: list[Pass] = []
    for _, same in sorted(by_level.items(), key=lambda item: (item[0][0], min(map(min, item[1])))):
        chunk: list[int] = []
        for group in same:
            size = sum(invokes[i].batch for i in (*chunk, *group))
            if chunk and (size > pass_rows or lone & {chunk[0], group[0]}):
                passes += _passes(chunk, invokes, len(passes))
                chunk = []
            chunk.extend(group)
        passes += _passes(chunk, invokes, len(passes))
    return Passes(tuple(passes))


_Key: TypeAlias = tuple[int, bool, int, int]


def _key(shape: InvokeShape) -> _Key:
    # A padded batch brings a mask, which changes the attention kernel for every row beside it.
    return shape.seq, shape.padded, shape.new_tokens, shape.chunk_tokens


@dataclass(frozen=True, slots=True)
class _Need:
    """A value of one invoke goes into another at `write`; strictly, if it is of a later moment."""

    is_strict: bool
    write: NodeId


def _needs(graph: Graph, outline: Outline) -> dict[int, dict[int, _Need]]:
    """For each invoke: the others whose values go into it, and whether they must run before."""
    behind = reads_behind(graph, outline)
    before: dict[int, dict[int, _Need]] = {}
    for node_id, node in graph.nodes.items():
        if not isinstance(node, Write | Skip):
            continue
        here = moment_of(node, outline)
        for source, moment in behind[node.value.node].items():
            if source != node.invoke:
                needs = before.setdefault(node.invoke, {})
                if source not in needs or (moment > here and not needs[source].is_strict):
                    needs[source] = _Need(moment > here, node_id)
    return before


def _lone(graph: Graph, outline: Outline, invokes: Sequence[InvokeShape]) -> set[int]:
    """The invokes that edit a tensor without rows, such as GPT-2's position embeddings."""
    return {
        node.invoke
        for node in graph.nodes.values()
        if isinstance(node, Write)
        and outline.leaf(node.site, invokes[node.invoke].kind(node.site.step)).batch_axis is None
    }


def _mutual(count: int, before: Mapping[int, Mapping[int, _Need]]) -> list[list[int]]:
    """Strongly connected invokes, in an order in which each comes after what it needs (Tarjan)."""
    index: dict[int, int] = {}
    low: dict[int, int] = {}
    stack: list[int] = []
    groups: list[list[int]] = []

    for start in range(count):
        if start in index:
            continue
        work = [(start, iter(sorted(before.get(start, ()))))]
        index[start] = low[start] = len(index)
        stack.append(start)
        while work:
            here, rest = work[-1]
            for other in rest:
                if other not in index:
                    index[other] = low[other] = len(index)
                    stack.append(other)
                    work.append((other, iter(sorted(before.get(other, ())))))
                    break
                if other in stack:
                    low[here] = min(low[here], index[other])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[here])
                if low[here] == index[here]:
                    cut = stack.index(here)
                    groups.append(sorted(stack[cut:]))
                    del stack[cut:]
    return groups


def _check_group(
    group: list[int],
    invokes: Sequence[InvokeShape],
    before: Mapping[int, Mapping[int, _Need]],
    lone: set[int],
    alone: bool,
) -> None:
    if len(group) == 1:
        return
    names = " and ".join(str(i) for i in group)
    inside = [
        (target, source, need)
        for target in group
        for source, need in before.get(target, {}).items()
        if source in group
    ]
    blamed = inside[-1][2].write
    if alone:
        raise UnequalLengths(
            f"invokes {names} need each other, so they must run in one pass, and "
            "batching='alone' forbids that; leave it out",
            node=blamed,
        )
    if lone & set(group):
        raise UnequalLengths(
            f"invokes {names} need each other, so they must be rows of one pass, but invoke "
            f"{min(lone & set(group))} edits a tensor that all rows of a pass share; split the "
            "experiment into two traces",
            node=blamed,
        )
    if len({_key(invokes[i]) for i in group}) > 1:
        lengths = ", ".join(f"{i}: {_length(invokes[i])}" for i in group)
        raise UnequalLengths(
            f"invokes {names} need each other, so they must be rows of one pass, which needs equal "
            f"lengths; got {lengths}; use prompts of one length, or two traces",
            node=blamed,
        )
    for target, source, need in inside:
        if need.is_strict:
            raise ImpossibleOrder(
                f"invoke {target} needs a later value of invoke {source}, which itself needs "
                f"invoke {target}; split the experiment into two traces",
                node=need.write,
            )


def _length(shape: InvokeShape) -> str:
    new = f" and {shape.new_tokens} new ones" if shape.new_tokens else ""
    return f"{shape.seq} tokens{new}{', padded' if shape.padded else ''}"


def _passes(chunk: Sequence[int], invokes: Sequence[InvokeShape], at: int) -> list[Pass]:
    """The passes of invokes that share all of theirs, the first of which has the index `at`."""
    rows = []
    first = 0
    for invoke in chunk:
        rows.append((first, first + invokes[invoke].batch))
        first += invokes[invoke].batch
    shape = invokes[chunk[0]]
    prompt = Pass(tuple(chunk), shape.seq, shape.padded, tuple(rows))
    return steps_of(prompt, shape.new_tokens, at, shape.chunk_tokens)


def before_last_chunk(seq: int, chunk_tokens: int) -> int:
    """How many tokens of a prompt come before its last chunk; 0 if it is not cut."""
    return (seq - 1) // chunk_tokens * chunk_tokens if chunk_tokens else 0


def steps_of(prompt: Pass, new_tokens: int, at: int, chunk_tokens: int = 0) -> list[Pass]:
    """The passes that generate so many tokens behind a prompt, the first having the index `at`.

    The prompt's alone for 0, which is a trace. With `chunk_tokens` the prompt is cut into passes of
    so many tokens, the last of which, step 0, has what is left.
    """
    if not new_tokens:
        return [prompt]
    past = before_last_chunk(prompt.seq, chunk_tokens)
    before = past // chunk_tokens if past else 0
    group = at + before
    return [
        *(
            replace(
                prompt, seq=chunk_tokens, step=step, past=past + step * chunk_tokens, group=group
            )
            for step in range(-before, 0)
        ),
        replace(prompt, seq=prompt.seq - past, past=past, group=group),
        *(
            replace(prompt, seq=1, step=step, past=prompt.seq + step - 1, group=group)
            for step in range(1, new_tokens)
        ),
    ]
