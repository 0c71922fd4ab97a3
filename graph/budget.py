"""What a graph will cost, found before anything runs: bytes at the worst moment, FLOPs, seconds.

A peer believes no shape that it is told. `admit` infers every value from what the model itself says
of the sites, and charges each value its *logical* bytes, elements times item size, for as long as
it lives: an `expand` to 164 TB owns next to no memory, but the `clone` after it does.

- A value lives from its node to its last use in the order of execution; a saved or kept one to the
  end. Whoever runs the graph must let values go as early.
- What may share memory with its argument (`view` and `cast` ops, `pick`) keeps the argument alive.
- Each op is charged the memory that its kernel may need besides arguments and result.
- A matrix product does many times the FLOPs a second of what moves each number once, and not in
  every number format; random numbers are drawn on the CPU. So a peer's pace has several figures.
- The bill is an upper bound; the graph runs whole or not at all.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from glasshive.graph.dtypes import DType
from glasshive.graph.errors import BadGraph, GraphError, OverBudget, ShapeMismatch
from glasshive.graph.graph import (
    Arg,
    Call,
    Const,
    Graph,
    Node,
    NodeId,
    Op,
    Param,
    Read,
    Ref,
    Save,
    Skip,
    Write,
    refs,
)
from glasshive.graph.ops import OPS, CostRule
from glasshive.graph.shape_keys import shape_key
from glasshive.graph.tensors import SpecArg as SpecArg
from glasshive.graph.tensors import Specs, TensorSpec

# What an allocator rounds a tensor up to.
_GRAIN_BYTES: Final = 512


@dataclass(frozen=True, slots=True)
class Cost:
    """What one node takes besides the bytes of its arguments and its result.

    `dense_flops` are those of matrix products of numbers of `dtype`, `flops` those of all else, and
    `drawn_numbers` come from a random generator.
    """

    flops: int
    workspace_bytes: int
    dense_flops: int = 0
    dtype: DType = DType.FLOAT32
    drawn_numbers: int = 0


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast a peer computes: of each kind of work in a Cost, so much a second."""

    dense_flops_per_second: Mapping[DType, float] = field(default_factory=dict)
    flops_per_second: float = math.inf
    drawn_numbers_per_second: float = math.inf

    def seconds(self, cost: Cost) -> float:
        """About how long a node of that cost takes.

        A number format that was not measured has the pace of the slowest that was.
        """
        seconds = cost.flops / self.flops_per_second
        if cost.dense_flops:
            paces = self.dense_flops_per_second
            slowest = min(paces.values(), default=math.inf)
            seconds += cost.dense_flops / paces.get(cost.dtype, slowest)
        return seconds + cost.drawn_numbers / self.drawn_numbers_per_second


@dataclass(frozen=True, slots=True)
class Budget:
    """What a peer allows one graph; seconds are those of its own pace.

    `allowed_by` has, for a limit that is not the peer's own, words to follow "allowed".
    """

    peak_bytes: int
    flops: int
    saved_bytes: int
    seconds: float = math.inf
    pace: Pace = field(default_factory=Pace)
    allowed_by: Mapping[str, str] = field(default_factory=dict)

    def by(self, name: str) -> str:
        """Whose limit that one is; empty for the peer's own."""
        return self.allowed_by.get(name, "")


@dataclass(frozen=True, slots=True)
class Bill:
    """What a graph costs at most, and the specs of all its values. `seconds` is an estimate.

    `node_flops` has the nodes that take any.
    """

    peak_bytes: int
    flops: int
    saved_bytes: int
    seconds: float
    specs: Mapping[NodeId, Specs]
    node_flops: Mapping[NodeId, int]


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What admission must be told of the model: each function raises a GraphError if it has none.

    `infer` gives the specs of an op's result from its name and arguments, as kernels.infer does.
    """

    read: Callable[[Read], TensorSpec]
    call: Callable[[Call, tuple[SpecArg, ...]], tuple[TensorSpec, Cost]]
    param: Callable[[Param], TensorSpec]
    infer: Callable[[str, tuple[SpecArg, ...]], Specs]


def admit(
    graph: Graph,
    model: Surroundings,
    budget: Budget,
    *,
    imports: Mapping[NodeId, TensorSpec] | None = None,
    order: Iterable[NodeId] | None = None,
    keep: Collection[NodeId] = (),
    resident_bytes: int = 0,
) -> Bill:
    """The bill of `graph`, if it keeps to `budget`.

    `imports` are the specs of the imported values; `order` is the order of execution, that of the
    ids if it is not given; `keep` are values that outlive the run, such as those that are sent on;
    `resident_bytes` are there all the time besides the graph's values, and constants are as well.
    Raises OverBudget, ShapeMismatch or what `model` raises, naming the node. Nothing is run.
    """
    given = dict(imports or {})
    if given.keys() != graph.imports:
        raise BadGraph(f"specs of {len(given)} imports, but the graph has {len(graph.imports)}")
    sequence = list(graph.nodes) if order is None else list(order)
    if len(sequence) != len(graph.nodes) or set(sequence) != graph.nodes.keys():
        raise BadGraph("the order of execution is not a permutation of the graph's nodes")
    return _Admission(graph, model, budget, given, keep, resident_bytes).run(sequence)


_FREE: Final = Cost(0, 0)


@dataclass(frozen=True, slots=True)
class _Entry:
    """What one node adds to the bill. `specs` is None for an effect."""

    specs: Specs | None
    held_bytes: int
    workspace_bytes: int
    flops: int
    seconds: float


class _Admission:
    """One walk over one graph."""

    def __init__(
        self,
        graph: Graph,
        model: Surroundings,
        budget: Budget,
        imports: dict[NodeId, TensorSpec],
        keep: Collection[NodeId],
        resident_bytes: int,
    ) -> None:
        self._graph = graph
        self._model = model
        self._budget = budget
        self._keep = keep
        self._specs: dict[NodeId, Specs] = dict(imports)
        self._live: dict[NodeId, int] = {}
        self._live_bytes = resident_bytes
        self._peak_bytes = 0
        self._flops = 0
        self._node_flops: dict[NodeId, int] = {}
        self._seconds = 0.0
        self._saved_bytes = 0
        self._ops: dict[Hashable, _Entry] = {}  # those that the graph had so far

    def run(self, sequence: list[NodeId]) -> Bill:
        dying = self._dying(sequence)
        for node_id in self._graph.imports:
            self._hold(node_id, _held_bytes(self._specs[node_id]))
        self._charge(sequence[0] if sequence else NodeId(0), "what comes in", 0)
        consts: dict[bytes, TensorSpec] = {}
        for node_id in sequence:
            node = self._graph.nodes[node_id]
            if not isinstance(node, Const):
                continue
            spec = TensorSpec(node.dtype, node.shape)
            known = consts.get(node.digest)
            if known is None:
                # They come before anything runs, and the run has all of them to its end.
                consts[node.digest] = spec
                self._live_bytes += _held_bytes(spec)
                self._charge(node_id, _in_words(node), 0)
            elif known != spec:
                raise BadGraph(
                    f"node {node_id}: a constant of {spec} with the hash of one of {known}",
                    node=node_id,
                )
        for position, node_id in enumerate(sequence):
            node = self._graph.nodes[node_id]
            try:
                entry = self._entry(node)
            except GraphError as error:
                if error.node is None:
                    raise type(error)(f"node {node_id}: {error}", node=node_id) from None
                raise
            if entry.specs is not None:
                self._specs[node_id] = entry.specs
                self._hold(node_id, entry.held_bytes)
            self._flops += entry.flops
            if entry.flops:
                self._node_flops[node_id] = entry.flops
            self._seconds += entry.seconds
            self._charge(node_id, _in_words(node), entry.workspace_bytes)
            for dead in dying.get(position, ()):
                self._live_bytes -= self._live.pop(dead, 0)
        return Bill(
            *(self._peak_bytes, self._flops, self._saved_bytes, self._seconds),
            *(self._specs, self._node_flops),
        )

    def _dying(self, sequence: list[NodeId]) -> dict[int, list[NodeId]]:
        """The values that nothing needs any more after each position."""
        end = len(sequence)
        last: dict[NodeId, int] = dict.fromkeys(self._keep, end)
        dying: dict[int, list[NodeId]] = {}
        for position in range(end - 1, -1, -1):
            node_id = sequence[position]
            node = self._graph.nodes[node_id]
            until = position
            if isinstance(node, Save):
                until = end
            elif _may_share(node):
                until = max(position, last.get(node_id, position))
            for ref in refs(node):
                last[ref] = max(last.get(ref, -1), until)
            last.setdefault(node_id, position)
        for node_id, position in last.items():
            dying.setdefault(position, []).append(node_id)
        return dying

    def _hold(self, node_id: NodeId, held_bytes: int) -> None:
        self._live[node_id] = held_bytes
        self._live_bytes += held_bytes

    def _charge(self, node_id: NodeId, what: str, workspace_bytes: int) -> None:
        budget = self._budget
        now_bytes = self._live_bytes + workspace_bytes
        self._peak_bytes = max(self._peak_bytes, now_bytes)
        if now_bytes > budget.peak_bytes:
            raise OverBudget(
                f"node {node_id} ({what}) brings the graph to {now_bytes} bytes at once, but "
                f"{budget.peak_bytes} are allowed{budget.by('peak_bytes')}; save or edit less in "
                "one trace",
                node=node_id,
            )
        if self._flops > budget.flops:
            raise OverBudget(
                f"node {node_id} ({what}) brings the graph to {self._flops} FLOPs, but "
                f"{budget.flops} are allowed{budget.by('flops')}; split the work over several "
                "traces",
                node=node_id,
            )
        if self._seconds > budget.seconds:
            raise OverBudget(
                f"node {node_id} ({what}) brings the graph to about {self._seconds:.3g} s of this "
                f"peer's time, but {budget.seconds:.3g} s are allowed"
                f"{budget.by('seconds')}; split the work over several traces",
                node=node_id,
            )
        if self._saved_bytes > budget.saved_bytes:
            raise OverBudget(
                f"node {node_id} ({what}) brings the saves to {self._saved_bytes} bytes, but "
                f"{budget.saved_bytes} are allowed{budget.by('saved_bytes')}; slice or reduce "
                "before saving",
                node=node_id,
            )

    def _entry(self, node: Node) -> _Entry:
        if isinstance(node, Op):
            args = self._spec_args(node.args)
            key = shape_key(node.name, args)
            known = self._ops.get(key)
            if known is None:
                specs = self._model.infer(node.name, args)
                cost = cost_of(node.name, args, specs)
                known = self._ops[key] = self._entered(cost, specs, shared=node.name == "pick")
            return known
        if isinstance(node, Call):
            spec, cost = self._model.call(node, self._spec_args(node.args))
            return self._entered(cost, spec)
        if isinstance(node, Read):
            return self._entered(_FREE, self._model.read(node))
        if isinstance(node, Param):
            return self._entered(_FREE, self._model.param(node))
        if isinstance(node, Const):  # charged before all else
            return self._entered(_FREE, TensorSpec(node.dtype, node.shape), shared=True)
        return self._entered(self._cost_of_effect(node))

    def _entered(self, cost: Cost, specs: Specs | None = None, *, shared: bool = False) -> _Entry:
        return _Entry(
            specs,
            0 if shared or specs is None else _held_bytes(specs),
            cost.workspace_bytes,
            cost.flops + cost.dense_flops,
            self._budget.pace.seconds(cost),
        )

    def _cost_of_effect(self, node: Write | Skip | Save) -> Cost:
        value = self._tensor(node.value)
        if isinstance(node, Save):
            self._saved_bytes += value.nbytes
            return _FREE
        if isinstance(node, Write):
            wanted = self._model.read(Read(node.site, node.invoke))
            if value != wanted:
                raise ShapeMismatch(
                    f"{node.site!s:.120} takes {wanted}, but the value written there is {value}"
                )
        return Cost(value.numel, _held_bytes(value))

    def _tensor(self, ref: Ref) -> TensorSpec:
        spec = self._specs[ref.node]
        if isinstance(spec, tuple):
            raise BadGraph(f"node {ref.node} has several outputs; pick takes one of them")
        return spec

    def _spec_args(self, args: tuple[Arg, ...]) -> tuple[SpecArg, ...]:
        return tuple([self._spec_arg(arg) for arg in args])  # a list, which is faster

    def _spec_arg(self, arg: Arg) -> SpecArg:
        if isinstance(arg, Ref):
            return self._specs[arg.node]
        return self._spec_args(arg) if isinstance(arg, tuple) else arg


_SHARING: Final = frozenset(name for name, op in OPS.items() if op.cost in ("view", "cast"))


def _may_share(node: Node) -> bool:
    return isinstance(node, Op) and node.name in _SHARING


def _held_bytes(specs: Specs) -> int:
    return sum(-(-spec.nbytes // _GRAIN_BYTES) * _GRAIN_BYTES for spec in _parts(specs))


def _parts(specs: Specs) -> tuple[TensorSpec, ...]:
    return specs if isinstance(specs, tuple) else (specs,)


def _in_words(node: Node) -> str:
    return f"op {node.name}" if isinstance(node, Op) else type(node).__name__.lower()


# What ops cost ---------------------------------------------------------------------------------


_REAL_OR_COMPLEX: Final = frozenset(
    {DType.FLOAT64, DType.FLOAT32, DType.FLOAT16, DType.BFLOAT16, DType.COMPLEX64}
)


@dataclass(frozen=True, slots=True)
class _Sizes:
    """The arguments and results of one op. `item_bytes` is that of the widest number format."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    args: tuple[SpecArg, ...]

    @property
    def taken(self) -> int:
        return sum(spec.numel for spec in self.inputs)

    @property
    def given(self) -> int:
        return sum(spec.numel for spec in self.outputs)

    @property
    def item_bytes(self) -> int:
        # Inside a kernel, half precision is often widened to four bytes, and a bool or an int,
        # next to a number, to eight.
        dtypes = [spec.dtype for spec in (*self.inputs, *self.outputs)]
        narrow = 4 if all(dtype in _REAL_OR_COMPLEX for dtype in dtypes) else 8
        return max(narrow, *(dtype.itemsize for dtype in dtypes))

    @property
    def uniform(self) -> bool:
        """Whether no number has to be widened, for which torch makes a copy first."""
        dtypes = {spec.dtype for spec in (*self.inputs, *self.outputs)}
        return len(dtypes) == 1 and dtypes <= _REAL_OR_COMPLEX


def cost_of(name: str, args: tuple[SpecArg, ...], specs: Specs) -> Cost:
    """What op `name` takes at most, by its rule in the table."""
    spec = OPS[name]
    sizes = _Sizes(tuple(_tensors(args)), _parts(specs), args)
    if spec.cost == "view":
        return Cost(1, 0)
    flops, elements = _RULES[spec.cost](sizes)
    # A grain more, for scalars and flags that become tensors.
    workspace_bytes = elements * sizes.item_bytes + _GRAIN_BYTES
    moved = sizes.taken + sizes.given
    drawn = moved if spec.random else 0
    if spec.cost in _DENSE:
        return Cost(max(1, moved), workspace_bytes, flops, sizes.inputs[0].dtype, drawn)
    return Cost(max(1, flops), workspace_bytes, drawn_numbers=drawn)


def _tensors(args: tuple[SpecArg, ...]) -> Iterable[TensorSpec]:
    for arg in args:
        if isinstance(arg, TensorSpec):
            yield arg
        elif isinstance(arg, tuple):
            yield from _tensors(arg)


def _broadcast_numel(shapes: Iterable[tuple[int, ...]]) -> int:
    """The elements of all `shapes` together, as if each size of one went with those of the rest."""
    sizes = itertools.zip_longest(*(reversed(shape) for shape in shapes), fillvalue=1)
    return math.prod(max(column) for column in sizes)


# Each rule gives FLOPs and the elements of workspace, both upper bounds.


def _elementwise(sizes: _Sizes) -> tuple[int, int]:
    return sizes.given, 0 if sizes.uniform else 2 * sizes.taken + sizes.given


def _move(sizes: _Sizes) -> tuple[int, int]:
    return sizes.given, sizes.taken + sizes.given


def _roll(sizes: _Sizes) -> tuple[int, int]:
    shifts = sizes.args[1]
    return sizes.given * max(1, len(shifts) if isinstance(shifts, tuple) else 1), 2 * sizes.given


def _pick(sizes: _Sizes) -> tuple[int, int]:
    return 8 * sizes.given, sizes.taken + sizes.given


def _divide(sizes: _Sizes) -> tuple[int, int]:
    return 1024 * sizes.given, 2 * sizes.taken + sizes.given


def _special(sizes: _Sizes) -> tuple[int, int]:
    return 16 * sizes.given, 2 * sizes.taken + sizes.given


def _reduce(sizes: _Sizes) -> tuple[int, int]:
    return sizes.taken, 2 * sizes.taken


def _normalise(sizes: _Sizes) -> tuple[int, int]:
    # A loss of a column and a row takes their whole product on the way to one number.
    steps = max(sizes.taken, _broadcast_numel(spec.shape for spec in sizes.inputs))
    return 8 * steps, 3 * steps


def _scan(sizes: _Sizes) -> tuple[int, int]:
    return 4 * (sizes.taken + sizes.given), 2 * (sizes.taken + sizes.given)


def _sort(sizes: _Sizes) -> tuple[int, int]:
    steps = sizes.taken + sizes.given
    return 4 * steps * steps.bit_length(), 2 * steps


def _pairs(sizes: _Sizes) -> tuple[int, int]:
    counts = [spec.numel for spec in sizes.inputs]
    return math.prod(counts), 10 * sizes.taken


def _matmul(sizes: _Sizes) -> tuple[int, int]:
    left = sizes.inputs[-2]
    inner = left.shape[-1] if left.shape else 1
    return 2 * sizes.given * inner, sizes.taken + sizes.given


def _distances(sizes: _Sizes) -> tuple[int, int]:
    inner = sizes.inputs[0].shape[-1] if sizes.inputs[0].shape else 1
    # Only Euclid's may be found by a matrix product; a power is a transcendental function.
    steps = 3 if sizes.args[2] in (0.0, 1.0, 2.0, math.inf) else 16
    return steps * sizes.given * inner, 2 * (sizes.taken + sizes.given)


def _convolution(sizes: _Sizes) -> tuple[int, int]:
    image, weight = sizes.inputs[:2]
    output = sizes.outputs[0]
    columns = 0
    for spec, channels in ((output, weight.shape[0]), (image, weight.shape[0])):
        columns = max(columns, spec.numel * weight.numel // max(1, channels))
    return 2 * columns, columns + 2 * (sizes.taken + sizes.given)


def _attention(sizes: _Sizes) -> tuple[int, int]:
    queries, keys, values = sizes.inputs[:3]
    width = max(1, queries.shape[-1])
    scores = (queries.numel // width) * keys.shape[-2]
    flops = scores * (2 * width + 2 * values.shape[-1] + 8)
    return flops, 3 * scores + 2 * (sizes.taken + sizes.given)


def _cubic(sizes: _Sizes) -> tuple[int, int]:
    batch = _broadcast_numel(spec.shape[:-2] for spec in sizes.inputs)
    steps = sizes.given + sum(batch * math.prod(spec.shape[-2:]) for spec in sizes.inputs)
    side = max(min(spec.shape[-2:], default=1) for spec in sizes.inputs)
    return 32 * max(1, side) * steps, 4 * steps


def _fourier(sizes: _Sizes) -> tuple[int, int]:
    steps = sizes.taken + sizes.given
    return 8 * steps * steps.bit_length(), 2 * steps


_DENSE: Final = frozenset({"matmul", "convolution", "attention", "cubic"})

_RULES: Final[Mapping[CostRule, Callable[[_Sizes], tuple[int, int]]]] = {
    "cast": _elementwise,
    "elementwise": _elementwise,
    "move": _move,
    "roll": _roll,
    "pick": _pick,
    "divide": _divide,
    "special": _special,
    "reduce": _reduce,
    "normalise": _normalise,
    "scan": _scan,
    "sort": _sort,
    "pairs": _pairs,
    "matmul": _matmul,
    "distances": _distances,
    "convolution": _convolution,
    "attention": _attention,
    "cubic": _cubic,
    "fourier": _fourier,
}
