"""The bill: above what torch really allocates, refused before anything runs, and by node."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest
import torch
from random_graphs import random_graph, run_graph
from soak import count
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from glasshive.graph.budget import Bill, Budget, Cost, Surroundings, admit, cost_of
from glasshive.graph.dtypes import DType
from glasshive.graph.errors import BadGraph, OverBudget, ShapeMismatch, UnknownModule
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
    Site,
    Skip,
    Write,
)
from glasshive.graph.kernels import infer
from glasshive.graph.ops import OPS
from glasshive.graph.tensors import TensorSpec

GRAPHS = count(600, 10_000)
F32 = DType.FLOAT32
WIDE = Budget(peak_bytes=2**50, flops=2**60, saved_bytes=2**50)
HIDDEN = TensorSpec(F32, (2, 64, 64))
GRAIN = 512  # what every op and every tensor is rounded up to


def ref(node_id: int) -> Ref:
    return Ref(NodeId(node_id))


def graph_of(*nodes: Node, imports: Iterable[int] = (), start: int = 0) -> Graph:
    return Graph(
        {NodeId(start + i): node for i, node in enumerate(nodes)}, frozenset(map(NodeId, imports))
    )


def read_spec(read: Read) -> TensorSpec:
    if read.site.module == "nowhere":
        raise UnknownModule("the model has no module 'nowhere'")
    return HIDDEN


MODEL = Surroundings(
    read=read_spec,
    call=lambda call, args: (TensorSpec(F32, (2, 64, 1000)), Cost(5000, 100_000)),
    param=lambda param: TensorSpec(F32, (1000, 64)),
    infer=infer,
)
READ = Read(Site("layers.0", "output"), 0)
HIDDEN_BYTES = 2 * 64 * 64 * 4


def bill_of(*nodes: Node, budget: Budget = WIDE, **kwargs: Any) -> Bill:
    return admit(graph_of(*nodes), MODEL, budget, **kwargs)


# What is charged -------------------------------------------------------------------------------


def test_a_read_and_a_save_cost_their_bytes_once() -> None:
    bill = bill_of(READ, Save(ref(0), "h"))
    assert (bill.peak_bytes, bill.saved_bytes) == (HIDDEN_BYTES, HIDDEN_BYTES)
    assert bill.specs[NodeId(0)] == HIDDEN


def test_values_are_let_go_after_their_last_use() -> None:
    chain: list[Node] = [READ]
    for i in range(50):
        chain.append(Op("neg", (ref(i),)))
    assert bill_of(*chain, Save(ref(50), "x")).peak_bytes == 2 * HIDDEN_BYTES + GRAIN


def test_values_with_later_uses_stay() -> None:
    nodes: list[Node] = [READ, *(Op("mul", (ref(0), float(i))) for i in range(10))]
    nodes.append(Op("cat", (tuple(ref(i) for i in range(1, 11)), 0)))
    assert bill_of(*nodes).peak_bytes == 40 * HIDDEN_BYTES + GRAIN


def test_a_view_keeps_what_it_looks_at() -> None:
    row: list[Node] = [
        READ,
        Op("mul", (ref(0), 2.0)),
        Op("select", (ref(1), 0, 0)),
        Op("select", (ref(2), 0, 0)),
        Op("neg", (ref(0),)),
        Op("add", (ref(4), ref(3), 1)),
    ]
    view_bytes = 64 * 4 // GRAIN * GRAIN or GRAIN
    half = HIDDEN_BYTES // 2
    # At the last node: nodes 1 to 4 and the sum. The read is gone, node 2 is kept by node 3.
    assert bill_of(*row).peak_bytes == 3 * HIDDEN_BYTES + half + view_bytes + GRAIN
    copied = [*row[:3], Op("clone", (ref(2),)), *row[4:]]
    assert bill_of(*copied).peak_bytes < 3 * HIDDEN_BYTES + half + view_bytes


def test_a_save_through_a_view_keeps_the_whole() -> None:
    def peak(*middle: Node) -> int:
        last = len(middle) + 2
        tail: tuple[Node, ...] = (READ, *(Op("neg", (ref(last + i),)) for i in range(4)))
        return bill_of(READ, Op("select", (ref(0), 1, 0)), *middle, *tail).peak_bytes

    row_bytes = 2 * 64 * 4
    assert peak(Save(ref(1), "x")) == 3 * HIDDEN_BYTES + row_bytes + GRAIN
    assert peak(Op("clone", (ref(1),)), Save(ref(2), "x")) == 2 * HIDDEN_BYTES + row_bytes + GRAIN


def test_an_expand_is_charged_its_logical_bytes() -> None:
    nodes: list[Node] = [READ, Op("expand", (ref(0), (2**20, 2, 64, 64)))]
    with pytest.raises(OverBudget, match=r"node 1 \(op expand\) brings the graph to \d+ bytes"):
        bill_of(*nodes, budget=Budget(2**30, 2**60, 2**30))


def test_parts_of_a_group_are_charged_once() -> None:
    nodes: list[Node] = [READ, Op("sort", (ref(0), -1, False, False)), Op("pick", (ref(1), 1))]
    with_pick = bill_of(*nodes)
    assert with_pick.specs[NodeId(2)] == TensorSpec(DType.INT64, (2, 64, 64))
    assert with_pick.peak_bytes == bill_of(*nodes[:2]).peak_bytes


def test_imports_are_there_from_the_start_and_kept_values_to_the_end() -> None:
    graph = graph_of(READ, Op("neg", (ref(0),)), Op("neg", (ref(2),)), imports=(0,), start=1)
    bill = admit(graph, MODEL, WIDE, imports={NodeId(0): HIDDEN})
    assert bill.peak_bytes == 2 * HIDDEN_BYTES + GRAIN
    kept = admit(graph, MODEL, WIDE, imports={NodeId(0): HIDDEN}, keep=(NodeId(0), NodeId(2)))
    assert kept.peak_bytes == 3 * HIDDEN_BYTES + GRAIN


def test_constants_are_there_from_the_start_to_the_end_each_once() -> None:
    shape = (2, 64, 64)
    nodes: list[Node] = []
    for i in range(0, 20, 2):
        nodes += [Const(bytes([i // 4] * 32), F32, shape), Op("sum", (ref(i), None, False, None))]
    small_bytes = 20 * GRAIN
    peak_bytes = bill_of(*nodes).peak_bytes
    assert 5 * HIDDEN_BYTES <= peak_bytes <= 7 * HIDDEN_BYTES + small_bytes  # one sum's workspace
    with pytest.raises(OverBudget, match=r"node 8 \(const\) brings the graph to") as caught:
        bill_of(*nodes, budget=Budget(3 * HIDDEN_BYTES - 1, 2**60, 2**30))
    assert caught.value.node == 8


def test_a_hash_is_of_one_shape() -> None:
    nodes = [Const(bytes(32), F32, (2,)), Const(bytes(32), F32, (1,))]
    with pytest.raises(BadGraph, match=r"node 1: .* with the hash of one of float32\[2\]"):
        bill_of(*nodes)


def test_what_is_there_besides_the_graph_counts() -> None:
    bill = admit(graph_of(READ), MODEL, WIDE, resident_bytes=1000)
    assert bill.peak_bytes == HIDDEN_BYTES + 1000


def test_the_order_of_execution_decides_who_lives_together() -> None:
    nodes: list[Node] = []
    for i in range(0, 20, 2):
        nodes += [READ, Op("sum", (ref(i), None, False, None))]
    early = [NodeId(i) for i in range(20)]
    late = [NodeId(i) for i in (*range(0, 20, 2), *range(1, 20, 2))]
    assert bill_of(*nodes, order=late).peak_bytes > 3 * bill_of(*nodes, order=early).peak_bytes


def test_calls_parameters_constants_and_writes_are_charged() -> None:
    bill = bill_of(READ, Call("lm_head", (ref(0),)))
    assert bill.flops == sum(bill.node_flops.values()) == 5000
    assert bill.peak_bytes == HIDDEN_BYTES + 2 * 64 * 1000 * 4 + 100_000
    assert bill_of(Param("lm_head", "weight")).peak_bytes == 1000 * 64 * 4
    assert bill_of(Const(bytes(32), F32, (1000,))).peak_bytes == 4096
    write = Write(Site("layers.1", "output"), 0, ref(0), "set")
    assert bill_of(READ, write).peak_bytes == 2 * HIDDEN_BYTES
    assert bill_of(READ, Skip("layers.1", 0, ref(0))).peak_bytes == 2 * HIDDEN_BYTES


@pytest.mark.parametrize(
    ("name", "args", "wanted"),
    [
        ("mm", ((100, 300), (300, 50)), 2 * 100 * 300 * 50),
        ("bmm", ((7, 100, 300), (7, 300, 50)), 7 * 2 * 100 * 300 * 50),
        ("mv", ((100, 300), (300,)), 2 * 100 * 300),
        ("dot", ((300,), (300,)), 2 * 300),
        ("addmm", ((100, 50), (100, 300), (300, 50), 1, 1), 2 * 100 * 300 * 50),
        ("add", ((100, 300), (300,), 1), 100 * 300),
        ("sum", ((100, 300), (1,), False, None), 100 * 300),
        ("convolution", ((2, 8, 100), (16, 8, 5), None, (1,), (2,), (1,), False, (), 1),
         2 * 2 * 16 * 100 * 8 * 5),
        ("sdpa", ((2, 4, 100, 64), (2, 4, 50, 64), (2, 4, 50, 64), None, False, None, False),
         2 * 2 * 2 * 4 * 100 * 50 * 64),
        ("cdist", ((100, 64), (50, 64), 2.0), 3 * 100 * 50 * 64),
        ("isin", ((100,), (50,), False), 100 * 50),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_flops_are_at_least_those_of_the_textbook(name: str, args: Any, wanted: int) -> None:
    """Tuples of the size of a shape stand for tensors where the signature takes one."""
    specs = tuple(
        TensorSpec(F32, arg)
        if param.kind in ("value", "operand") and isinstance(arg, tuple)
        else arg
        for param, arg in zip(OPS[name].params, args, strict=True)
    )
    cost = cost_of(name, specs, infer(name, specs))
    assert wanted <= cost.flops + cost.dense_flops <= 4 * wanted


# What is refused -------------------------------------------------------------------------------


def test_each_limit_holds_exactly() -> None:
    nodes: list[Node] = [READ, Op("bmm", (ref(0), ref(0))), Save(ref(1), "x")]
    bill = bill_of(*nodes)
    exact = Budget(bill.peak_bytes, bill.flops, bill.saved_bytes)
    assert bill_of(*nodes, budget=exact) == bill
    for tight, text in (
        (Budget(bill.peak_bytes - 1, bill.flops, bill.saved_bytes), r"node 1 \(op bmm\).*at once"),
        (Budget(bill.peak_bytes, bill.flops - 1, bill.saved_bytes), r"node 1 \(op bmm\).*FLOPs"),
        (Budget(bill.peak_bytes, bill.flops, bill.saved_bytes - 1), r"node 2 \(save\).*saves"),
    ):
        with pytest.raises(OverBudget, match=text) as caught:
            bill_of(*nodes, budget=tight)
        assert caught.value.node is not None


def test_a_value_must_fit_where_it_is_written() -> None:
    row = Op("select", (ref(0), 0, 0))
    with pytest.raises(
        ShapeMismatch, match=r"layers.1.output takes float32\[2, 64, 64\], but"
    ) as e:
        bill_of(READ, row, Write(Site("layers.1", "output"), 0, ref(1), "set"))
    assert e.value.node == 2
    half = Op("to", (ref(0), DType.FLOAT16))
    with pytest.raises(ShapeMismatch, match="float16"):
        bill_of(READ, half, Write(Site("layers.1", "output"), 0, ref(1), "inplace"))


def test_the_node_is_named_in_every_refusal() -> None:
    with pytest.raises(ShapeMismatch, match=r"node 1: mm\(") as caught:
        bill_of(READ, Op("mm", (ref(0), ref(0))))
    assert caught.value.node == 1
    with pytest.raises(UnknownModule, match="node 0") as unknown:
        bill_of(Read(Site("nowhere", "output"), 0))
    assert unknown.value.node == 0
    with pytest.raises(BadGraph, match="several outputs"):
        bill_of(READ, Op("aminmax", (ref(0), None, False)), Save(ref(1), "x"))


def test_specs_and_order_must_be_those_of_the_graph() -> None:
    graph = graph_of(Op("neg", (ref(0),)), imports=(0,), start=1)
    with pytest.raises(BadGraph, match="imports"):
        admit(graph, MODEL, WIDE)
    for order in ([], [NodeId(1), NodeId(1)], [NodeId(0)], [NodeId(0), NodeId(1)]):
        with pytest.raises(BadGraph, match="permutation"):
            admit(graph, MODEL, WIDE, imports={NodeId(0): HIDDEN}, order=order)


# The bill against torch ------------------------------------------------------------------------


def real_peak_bytes(work: Callable[[], object]) -> int:
    """The most bytes that torch held at once for `work`, as its own profiler counts them."""
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        result = work()
    held = peak = 0
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    del result
    return peak


def test_the_profiler_sees_what_it_should() -> None:
    x = torch.zeros(1000)
    assert real_peak_bytes(lambda: (x + 1) + (x + 2)) == 12_000


def bill_and_peak(graph: Graph, values: Mapping[NodeId, Tensor]) -> tuple[int, int]:
    bill = admit(graph, MODEL, WIDE)
    return bill.peak_bytes, real_peak_bytes(lambda: run_graph(graph, values))


def test_the_bill_is_above_the_real_peak_of_random_graphs() -> None:
    rng = random.Random(4)
    used: set[str] = set()
    for _ in range(GRAPHS):
        graph, values = random_graph(rng)
        # Here, as another test's thread may end the filters of a whole test.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's opinions on what the graphs do
            billed, peak = bill_and_peak(graph, values)
        assert billed >= peak, graph.nodes
        used |= {node.name for node in graph.nodes.values() if isinstance(node, Op)}
    assert len(used) > 150


_BIG = 1024
BIG_OPS: list[tuple[str, tuple[Any, ...]]] = [
    ("add", ((_BIG, _BIG), (_BIG, 1), 1)),
    ("softmax", ((_BIG, _BIG), -1)),
    ("logsumexp", ((_BIG, _BIG), (0, 1), False)),
    ("layer_norm", ((_BIG, _BIG), (_BIG,), (_BIG,), (_BIG,), 1e-5)),
    ("mm", ((_BIG, _BIG), (_BIG, _BIG))),
    ("sort", ((_BIG, _BIG), 0, True, True)),
    ("topk", ((_BIG, _BIG), 500, 0, True, True)),
    ("kthvalue", ((_BIG, _BIG), 5, 0, False)),
    ("median_dim", ((_BIG, _BIG), 0, False)),
    ("mode", ((_BIG, 64), 0, False)),
    ("cdist", ((_BIG, 64), (_BIG, 64), 2.0)),
    ("cdist", ((_BIG, 64), (_BIG, 64), 1.0)),
    ("isin", ((_BIG, 64), (_BIG, 16), False)),
    ("linalg_svd", ((256, 128), True)),
    ("linalg_svdvals", ((256, 128),)),
    ("linalg_eigvalsh", ((256, 256), "L")),
    ("linalg_qr", ((512, 64), "complete")),
    ("linalg_solve", ((1, 256, 256), (16, 256, 2), True)),
    ("linalg_solve_triangular", ((256, 256), (16, 256, 2), True, True, False)),
    ("mse_loss", ((_BIG, 1), (1, _BIG), "mean")),
    ("linalg_pinv", ((256, 128), None, None, False)),
    ("sdpa", ((2, 4, 256, 64), (2, 4, 256, 64), (2, 4, 256, 64), None, True, None, False)),
    ("sdpa", ((2, 4, 256, 64), (2, 2, 256, 64), (2, 2, 256, 64), (256, 256), False, 0.1, True)),
    ("convolution", ((4, 16, 4096), (32, 16, 9), None, (1,), (4,), (1,), False, (), 1)),
    ("convolution", ((4, 16, 4096), (16, 8, 9), None, (2,), (0,), (1,), True, (1,), 2)),
    ("fft_r2c", ((_BIG, _BIG), (0, 1), "none", False)),
    ("multinomial", ((64, _BIG), 100, True, 0)),
    ("dropout", ((_BIG, _BIG), 0.5, 0)),
    ("histc", ((_BIG, _BIG), 100, 0, 1)),
    ("var_mean", ((_BIG, _BIG), (0,), 1, False)),
    ("renorm", ((_BIG, _BIG), 2, 0, 1.0)),
    ("cumsum", ((_BIG, _BIG), 0, None)),
    ("log_sigmoid", ((_BIG, _BIG),)),
    ("isfinite", ((_BIG, _BIG),)),
    ("binary_cross_entropy_with_logits", ((_BIG, _BIG), (_BIG, _BIG), None, None, "mean")),
]


@pytest.mark.parametrize(("name", "args"), BIG_OPS, ids=[name for name, _ in BIG_OPS])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_bill_is_above_the_real_peak_of_large_ops(
    name: str, args: tuple[Any, ...], transposed: bool
) -> None:
    nodes: dict[NodeId, Node] = {}
    values: dict[NodeId, Tensor] = {}
    graph_args: list[Arg] = []
    for param, arg in zip(OPS[name].params, args, strict=True):
        if param.kind not in ("value", "operand") or not isinstance(arg, tuple):
            graph_args.append(arg)
            continue
        node_id = NodeId(len(nodes))
        tensor = torch.rand(arg)
        values[node_id] = tensor.mT.contiguous().mT if transposed and len(arg) > 1 else tensor
        nodes[node_id] = Const(node_id.to_bytes(32, "big"), F32, arg)
        graph_args.append(Ref(node_id))
    nodes[NodeId(len(nodes))] = Op(name, tuple(graph_args))
    billed, peak = bill_and_peak(Graph(nodes), values)
    assert billed >= peak
    # Some kernels unroll the image or repeat the matrix for each of a batch, others do not.
    if OPS[name].cost not in ("convolution", "cubic"):
        assert billed <= 12 * peak, "a bill that much above the truth would refuse honest work"
