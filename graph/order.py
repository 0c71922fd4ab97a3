"""When things happen: passes, slots, and the rule that makes a write legal.

- The run of a trace is a total order of slots (pass, event). A value's slot is the latest among
  its inputs; constants and parameters come before all of them.
- `write(site, v)` is legal iff `slot(v) <= slot(site)`: otherwise it would change its own past. So
  graph plus model is acyclic by one comparison for each write.
- Invokes of equal length share a pass, as rows of one batch. Where a value of invoke A goes into
  invoke B, A's pass comes before B's, or is the same if A's event comes first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from glasshive.graph.errors import BadGraph, ImpossibleOrder, UnequalLengths
from glasshive.graph.graph import Graph, NodeId, Read, Site, Skip, Write, refs
from glasshive.graph.outline import Outline
from glasshive.graph.tensors import TensorSpec

DEFAULT_PASS_ROWS = 32

Slot: TypeAlias = tuple[int, int]
BEFORE_ALL: Slot = (-1, -1)


@dataclass(frozen=True, slots=True)
class InvokeShape:
    """The size of one invoke's input: `batch` sequences of `seq` tokens, left-padded or not."""

    batch: int
    seq: int
    padded: bool = False


@dataclass(frozen=True, slots=True)
class Pass:
    """One forward pass: which invokes are its rows, in order. All have the same length."""

    invokes: tuple[int, ...]
    seq: int
    padded: bool
    rows: tuple[tuple[int, int], ...]  # [first, last) of each invoke

    @property
    def batch(self) -> int:
        """The number of rows of the pass."""
        return self.rows[-1][1]


@dataclass(frozen=True, slots=True)
class Passes:
    """The passes of a trace in the order in which they run, and where each invoke is."""

    passes: tuple[Pass, ...]

    def of(self, invoke: int) -> int:
        """The index of the pass in which `invoke` runs."""
        for index, one in enumerate(self.passes):
            if invoke in one.invokes:
                return index
        raise BadGraph(f"invoke {invoke} is in no pass; there are {len(self.passes)} passes")

    def rows(self, invoke: int) -> tuple[int, int]:
        """The rows `[first, last)` of `invoke` in its pass."""
        one = self.passes[self.of(invoke)]
        return one.rows[one.invokes.index(invoke)]


def event_of(node: Read | Write | Skip, outline: Outline) -> int:
    """The event at which `node` happens in its pass."""
    if isinstance(node, Skip):
        return outline.event(Site(node.module, "input", (), node.step))
    return outline.event(node.site)


def spec_of_read(node: Read, outline: Outline, passes: Passes) -> TensorSpec:
    """What the rows of an invoke are at a site. Raises UnknownModule or NotASite."""
    one = passes.passes[passes.of(node.invoke)]
    leaf = outline.leaf(node.site, one.padded)
    first, last = passes.rows(node.invoke)
    return TensorSpec(leaf.dtype, leaf.shape(last - first, one.seq))


def slots(graph: Graph, outline: Outline, passes: Passes) -> dict[NodeId, Slot]:
    """The slot of every node. Imported values count as before all: they are there at the start.

    Raises ImpossibleOrder, naming the node, for a write whose value exists only later.
    """
    found: dict[NodeId, Slot] = dict.fromkeys(graph.imports, BEFORE_ALL)
    for node_id, node in graph.nodes.items():
        latest = max((found[ref] for ref in refs(node)), default=BEFORE_ALL)
        if isinstance(node, Read):
            found[node_id] = (passes.of(node.invoke), event_of(node, outline))
        elif isinstance(node, Write | Skip):
            here = (passes.of(node.invoke), event_of(node, outline))
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


def reads_behind(graph: Graph, outline: Outline) -> dict[NodeId, dict[int, int]]:
    """For every value, the invokes that it was read from, each with its latest event."""
    found: dict[NodeId, dict[int, int]] = {ref: {} for ref in graph.imports}
    for node_id, node in graph.nodes.items():
        if isinstance(node, Read):
            found[node_id] = {node.invoke: event_of(node, outline)}
            continue
        found[node_id] = merge_reads(found[ref] for ref in refs(node))
    return found


def merge_reads(several: Iterable[Mapping[int, int]]) -> dict[int, int]:
    """The union of such maps: each invoke with its latest event."""
    merged: dict[int, int] = {}
    for one in several:
        for invoke, event in one.items():
            if event > merged.get(invoke, -1):
                merged[invoke] = event
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
    that nothing is read from is in no pass: it is not run.
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
    by_level: dict[tuple[int, tuple[int, bool]], list[list[int]]] = {}
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
                passes.append(_pass(chunk, invokes))
                chunk = []
            chunk.extend(group)
        passes.append(_pass(chunk, invokes))
    return Passes(tuple(passes))


def _key(shape: InvokeShape) -> tuple[int, bool]:
    # A padded batch brings a mask, which changes the attention kernel for every row beside it.
    return shape.seq, shape.padded


@dataclass(frozen=True, slots=True)
class _Need:
    """A value of one invoke goes into another at `write`; strictly, if it is of a later event."""

    is_strict: bool
    write: NodeId


def _needs(graph: Graph, outline: Outline) -> dict[int, dict[int, _Need]]:
    """For each invoke: the others whose values go into it, and whether they must run before."""
    behind = reads_behind(graph, outline)
    before: dict[int, dict[int, _Need]] = {}
    for node_id, node in graph.nodes.items():
        if not isinstance(node, Write | Skip):
            continue
        here = event_of(node, outline)
        for source, event in behind[node.value.node].items():
            if source != node.invoke:
                needs = before.setdefault(node.invoke, {})
                if source not in needs or (event > here and not needs[source].is_strict):
                    needs[source] = _Need(event > here, node_id)
    return before


def _lone(graph: Graph, outline: Outline, invokes: Sequence[InvokeShape]) -> set[int]:
    """The invokes that edit a tensor without rows, such as GPT-2's position embeddings."""
    return {
        node.invoke
        for node in graph.nodes.values()
        if isinstance(node, Write)
        and outline.leaf(node.site, invokes[node.invoke].padded).batch_axis is None
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
    return f"{shape.seq} tokens{', padded' if shape.padded else ''}"


def _pass(chunk: Sequence[int], invokes: Sequence[InvokeShape]) -> Pass:
    rows = []
    first = 0
    for invoke in chunk:
        rows.append((first, first + invokes[invoke].batch))
        first += invokes[invoke].batch
    shape = invokes[chunk[0]]
    return Pass(tuple(chunk), shape.seq, shape.padded, tuple(rows))
