"""T5: parts that would take long are refused before, and ended when they take longer than thought.

That the process of a kernel which never ends is killed, and the next request served, is shown with
real processes in tests/swarm/test_runaway.py and test_supervisor.py. Seen failing, each alone: with
the comparison of seconds taken out of `graph/budget.py`, the catalogue and the host; with that of
FLOPs, the catalogue; with each rule of cost that these kinds have made to be one FLOP a number, its
kind; with the comparison of seconds taken out of `Admission._count`, the passes; with the look at
the clock taken out of `peer/executor.py`, the stage; with `step` and `_due_at` each left empty in
`peer/torch_thread.py`, the step; with stages that give way to nobody, the short trace.
"""

from __future__ import annotations

import asyncio
import math
import re
import threading
from typing import Any

import pytest
import torch
from tenants import IDS, LAST, SAVED, SEQ, Tenants
from waits import wait_for

from glasshive.dht.messages import Accepted, Failed
from glasshive.graph.budget import Bill, Budget, Cost, Pace, Surroundings, admit
from glasshive.graph.dtypes import DType
from glasshive.graph.errors import OverBudget
from glasshive.graph.graph import Arg, Graph, Node, NodeId, Op, Read, Ref, Save, Site
from glasshive.graph.kernels import infer
from glasshive.graph.order import Pass, Passes
from glasshive.graph.plan import Part, Span, Stage
from glasshive.graph.tensors import TensorSpec
from glasshive.peer import executor, host
from glasshive.peer.admission import Admission
from glasshive.peer.host_limits import HostLimits
from glasshive.peer.pace import HostPace
from glasshive.peer.served_model import ServedModel
from glasshive.peer.torch_thread import TorchThread
from glasshive.security.keys import Identity

N = 1024
F32 = DType.FLOAT32
PER_SECOND = 1e9
PACE = Pace({F32: PER_SECOND}, PER_SECOND, PER_SECOND)
READ = Read(Site("layers.0", "output"), 0)
MODEL = Surroundings(
    read=lambda read: TensorSpec(F32, (1,)),
    call=lambda call, args: (TensorSpec(F32, (1,)), Cost(1, 1)),
    param=lambda param: TensorSpec(F32, (1,)),
    infer=infer,
)


def ref(node_id: int) -> Ref:
    return Ref(NodeId(node_id))


def after(*shapes: tuple[int, ...], op: tuple[str, *tuple[Arg, ...]], times: int = 1) -> list[Node]:
    """Values of these shapes, as nodes 0 on, and the op on them."""
    return [
        *(Op("full", (shape, 0.5, F32)) for shape in shapes),
        *[Op(op[0], op[1:])] * times,
    ]


A, B, C = ref(0), ref(1), ref(2)
SQUARE = (N, N)
LOG = math.log2(N)

# What takes long, and the FLOPs that it takes however it is computed.
BOMBS: dict[str, tuple[list[Node], float]] = {
    "a product": (after(SQUARE, op=("mm", A, A)), 2 * N**3),
    "many products": (after(SQUARE, op=("mm", A, A), times=50), 100 * N**3),
    "a batch of products": (after((8, 256, 256), op=("bmm", A, A)), 16 * 256**3),
    "singular values": (after(SQUARE, op=("linalg_svd", A, True)), N**3),
    "eigenvectors": (after(SQUARE, op=("linalg_eigh", A, "L")), N**3),
    "a system of equations": (after(SQUARE, op=("linalg_solve", A, A, True)), N**3),
    "all distances": (after(SQUARE, op=("cdist", A, A, 1.0)), 2 * N**3),
    "attention": (
        after((1, 1, N, 64), op=("sdpa", A, A, A, None, False, None, False)),
        4 * N * N * 64,
    ),
    "a convolution": (
        after(
            (1, 1, 2**16),
            (1, 1, 2**12),
            op=("convolution", A, B, None, (1,), (0,), (1,), False, (), 1),
        ),
        2 * (2**16 - 2**12) * 2**12,
    ),
    "sorting": (after(SQUARE, op=("sort", A, 1, False, False)), N * N * LOG),
    "a transform": (after(SQUARE, op=("fft_r2c", A, (1,), "none", False)), N * N * LOG),
    "all pairs": (after((4 * N,), op=("isin", A, A, False)), 4 * N * math.log2(4 * N)),
    "many moves": (after(SQUARE, op=("roll", A, (1,) * 32, (0,) * 32)), 32 * N * N),
    "random numbers": (after(SQUARE, op=("randn_like", A, None, 0)), N * N),
    "a long chain": (after(SQUARE, op=("exp", A), times=500), 500 * N * N),
}


def bill_of(nodes: list[Node], **limits: float) -> Bill:
    graph = Graph({NodeId(i): node for i, node in enumerate(nodes)})
    wanted = {"flops": 10**18, "seconds": math.inf, **limits}
    return admit(graph, MODEL, Budget(1 << 40, saved_bytes=1 << 40, pace=PACE, **wanted))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", list(BOMBS))
def test_a_hundred_times_what_is_allowed_is_refused(name: str) -> None:
    nodes, least_flops = BOMBS[name]
    bill = bill_of(nodes)
    assert bill.seconds >= least_flops / PER_SECOND, "billed as less than it takes"
    bill_of(nodes, seconds=bill.seconds, flops=bill.flops)
    with pytest.raises(OverBudget, match=r"s of this peer's time, but .* s are allowed") as slow:
        bill_of(nodes, seconds=bill.seconds / 100)
    with pytest.raises(OverBudget, match=r"FLOPs, but \d+ are allowed; split the work") as much:
        bill_of(nodes, flops=bill.flops // 100)
    assert slow.value.node is not None
    assert much.value.node is not None


def products(times: int) -> list[Node]:
    """So many products of two matrices, at a host."""
    return [
        Read(LAST, 0),
        Op("full", ((2048, 2048), 0.5, F32)),
        *[Op("mm", (B, B))] * times,
        Save(A, "s"),
    ]


@pytest.mark.asyncio
async def test_a_host_refuses_it_before_it_runs_and_serves_on(served: ServedModel) -> None:
    """By the pace that it has measured: the budget is what it thinks that twenty products take.

    So there is room for the matrix and the pass, whatever it has measured for those.
    """
    product = Cost(2048**2, 0, dense_flops=2 * 2048**3, dtype=F32)
    seconds = 20 * served.pace.graph.seconds(product) + 2 * served.pace.forward_seconds(1, SEQ)
    stock = HostLimits().budget
    budget = Budget(stock.peak_bytes, stock.flops, stock.saved_bytes, seconds=seconds)
    async with Tenants(served, HostLimits(budget=budget)) as tenants:
        client = tenants.client()
        _, accepted = await tenants.ask(client, products(1))
        assert isinstance(accepted, Accepted)
        _, told = await tenants.ask(client, products(200))
        assert isinstance(told, Failed)
        assert told.code == "OverBudget"
        assert "s of this peer's time, but" in told.text
        assert isinstance(await tenants.run(client, SAVED), dict)


def test_passes_that_take_too_long_are_refused_before_they_run(served: ServedModel) -> None:
    site = Site("model.layers.0", "output")
    nodes: dict[NodeId, Node] = {NodeId(0): Read(site, 0), NodeId(1): Save(A, "s")}
    stage = Stage(0, tuple(nodes), forward=True, stop_event=served.outline.event(site))
    part = Part(0, Span(0, 2), Graph(nodes), (stage,), {})
    passes = Passes((Pass((0,), 10, False, ((0, 20),)),))
    slow = HostPace(tokens_per_second=10.0, hidden_size=32, graph=Pace())

    def admitted(seconds: float) -> Bill:
        budget = Budget(1 << 40, 1 << 60, 1 << 40, seconds=seconds)
        return Admission(served.outline, served.twin, budget, slow).admit(part, passes, b"")

    assert admitted(60.0).seconds == pytest.approx(20 * (1 + 10 / 192))
    with pytest.raises(OverBudget) as caught:
        admitted(20.0)
    assert str(caught.value) == (
        "200 tokens in 1 passes take about 21 s of this peer's time, but 20 s are allowed; trace "
        "fewer or shorter prompts at a time"
    )


# What takes longer than thought -----------------------------------------------------------------


class Clock:
    """Leaps by `step_seconds` at each look that the torch thread takes at it."""

    def __init__(self) -> None:
        self.step_seconds = 0.0
        self._now = 0.0

    def __call__(self) -> float:
        if threading.current_thread().name.startswith("torch"):
            self._now += self.step_seconds
        return self._now


@pytest.mark.asyncio
async def test_a_stage_that_takes_too_long_is_ended_and_the_next_trace_served(
    served: ServedModel,
) -> None:
    slow = Clock()
    async with Tenants(served, clock=slow) as tenants:
        client = tenants.client()
        # Twice or more at the stage's begin, at block 0, and then at the graph's first node.
        slow.step_seconds = 7.0
        told = await tenants.run(client, SAVED, ids=IDS)
        assert isinstance(told, Failed)
        assert (told.code, told.node) == ("OverBudget", 0)
        seconds = HostLimits().stage_seconds(0.0)  # and what the pace of a busy moment adds
        assert re.fullmatch(
            rf"the part was ended before this was done: it has taken {seconds:.3g}(\.\d)? s, far "
            "more than this peer had reckoned with; split the work over several traces",
            told.text,
        )
        slow.step_seconds = 0.0
        assert isinstance(await tenants.run(client, SAVED), dict)


@pytest.mark.asyncio
async def test_a_short_trace_is_served_in_the_middle_of_a_long_one(
    served: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alice's op takes a second by the clock, and her next one waits until Bob has been served."""
    now = 0.0
    begun, bob_is_served = threading.Event(), threading.Event()
    stock = executor.run_op

    async with Tenants(served, clock=lambda: now) as tenants:
        alice, bob = tenants.client(), tenants.client()

        def run_op(name: str, *args: Any, **how: Any) -> Any:
            nonlocal now
            if name == "sinh":
                begun.set()
                wait_for(lambda: not tenants.host._torch._queue.is_empty, "Bob waits for his turn")
                now += 1.0
            if name == "cosh":
                assert bob_is_served.wait(30)
            return stock(name, *args, **how)

        monkeypatch.setattr(executor, "run_op", run_op)
        long = [Read(LAST, 0), Op("sinh", (A,)), Op("cosh", (B,)), Save(Ref(NodeId(2)), "s")]
        running = asyncio.create_task(tenants.run(alice, long))
        assert await asyncio.to_thread(begun.wait, 30)
        assert isinstance(await tenants.run(bob, SAVED), dict)
        bob_is_served.set()
        found = await running
        assert isinstance(found, dict)
        (plain,) = (await tenants.run(alice, [Read(LAST, 0), Save(A, "s")])).values()  # type: ignore[union-attr]
        assert torch.equal(found["s"], plain.sinh().cosh())


@pytest.mark.asyncio
async def test_a_pass_that_holds_much_memory_is_not_put_aside(
    served: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it holds is in nobody's bill, and so would several be at once."""
    given: list[object] = []
    monkeypatch.setattr(TorchThread, "give_way", lambda thread, aside: given.append(aside))
    held_bytes = served.model.pass_bytes(1, SEQ)
    for parts, gives_way in ((1, True), (2**40, False)):
        monkeypatch.setattr(host, "PUT_ASIDE_PARTS", parts)
        given.clear()
        async with Tenants(served) as tenants:
            assert tenants.host.memory_bytes > held_bytes
            assert isinstance(await tenants.run(tenants.client(), SAVED), dict)
        assert bool(given) is gives_way


@pytest.mark.asyncio
async def test_each_step_has_its_time_anew() -> None:
    """What the supervisor asks for: a process whose step is overdue is killed."""
    now = 0.0
    thread = TorchThread(2, lambda: now)
    stepped, go = threading.Event(), threading.Event()

    def work() -> None:
        nonlocal now
        now = 9.0
        assert thread.overdue_seconds == -1.0
        thread.step()
        assert thread.overdue_seconds == -10.0
        now = 25.0
        stepped.set()
        assert go.wait(30)

    alice = Identity.generate().peer_id
    running = asyncio.create_task(thread.run(alice, b"one", work, seconds=1.0, step_seconds=10.0))
    assert await asyncio.to_thread(stepped.wait, 30)
    assert thread.overdue_seconds == 6.0
    go.set()
    await asyncio.wait_for(running, 30)
    assert thread.overdue_seconds == 0.0
    thread.close()
