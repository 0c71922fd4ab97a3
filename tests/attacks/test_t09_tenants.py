"""T9: what one tenant gets depends on its own request only, whoever else is on the host.

A's bytes alone against A's bytes beside a hostile B, of random kinds; and neither what either has
saved nor what its kernels are given and give holds anything of the other's.

Seen failing, each alone: with hooks that stay on the modules after their stage, and with hooks that
stay only where the pass has failed (`Executor._forward`), both tests; with a
kernel that gives B a constant of A's which B never saves, the first. Not seen failing: with reads
that are never copied, which changes what A gets alone in the same way.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

import pytest
import torch
from random_graphs import LEAVES, random_args
from soak import SEED, count
from tenants import BLOCK, LAST, SEQ, Tenants, name_of

from glasshive.dht.errors import SwarmError
from glasshive.dht.memory_transport import MemoryTransport
from glasshive.dht.messages import Accepted, Cancel, Failed, encode
from glasshive.dht.serving import StreamLimits
from glasshive.graph import kernels
from glasshive.graph.dtypes import DType
from glasshive.graph.graph import Const, Node, NodeId, Op, Read, Ref, Save, Site, Write
from glasshive.graph.kernels import KERNELS
from glasshive.graph.kernels import spec_of as spec_of_tensor
from glasshive.graph.ops import OPS
from glasshive.peer import executor, torch_thread
from glasshive.peer.executor import Executor
from glasshive.peer.served_model import ServedModel
from glasshive.peer.torch_thread import TorchThread

PAIRS: Final = count(50, 1000)
HIDDEN: Final = 32
FLOOD: Final = 10

Saves = dict[str, torch.Tensor]
B = Callable[["Neighbour"], Awaitable[None]]


class Nodes:
    """A graph as it is written down, node by node."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.constants: list[torch.Tensor] = []

    def add(self, node: Node) -> Ref:
        self.nodes.append(node)
        return Ref(NodeId(len(self.nodes) - 1))

    def const(self, tensor: torch.Tensor) -> Ref:
        self.constants.append(tensor)
        dtype = DType.from_name(str(tensor.dtype).removeprefix("torch."))
        return self.add(Const(name_of(tensor), dtype, tuple(tensor.shape)))

    def read(self, site: Site) -> Ref:
        return self.add(Read(site, 0))

    def op(self, name: str, *args: object) -> Ref:
        return self.add(Op(name, args))  # type: ignore[arg-type]

    def write(self, site: Site, value: Ref, mode: str) -> None:
        self.add(Write(site, 0, value, mode))  # type: ignore[arg-type]

    def save(self, value: Ref, name: str) -> None:
        self.add(Save(value, name))


def of_a(draw: random.Random, sentinel: float) -> Nodes:
    """What A asks for: it reads, computes, edits both blocks or one, and saves what came of it."""
    graph = Nodes()
    mark = graph.const(torch.full((HIDDEN,), sentinel))
    first = graph.read(BLOCK)
    graph.save(graph.op(draw.choice(["tanh", "exp", "neg", "clone"]), first), "first")
    if draw.random() < 0.7:
        edited = graph.op("add", first, mark, 1)
        graph.write(BLOCK, edited, draw.choice(["set", "inplace"]))
    last = graph.read(LAST)
    graph.save(last, "last")
    graph.save(graph.op("mul", last, mark), "marked")
    graph.save(graph.op("bmm", last, graph.op("permute", last, (0, 2, 1))), "pairs")
    return graph


def of_b(draw: random.Random, sentinel: float, value: float) -> Nodes:
    """What B asks for: `value` in the model's own states, and all that there is to be seen."""
    graph = Nodes()
    bad = graph.const(torch.full((1, SEQ, HIDDEN), value))
    mark = graph.const(torch.full((HIDDEN,), sentinel))
    graph.save(graph.read(BLOCK), "first")
    graph.write(BLOCK, graph.op("mul", bad, mark), draw.choice(["set", "inplace"]))
    last = graph.read(LAST)
    graph.save(last, "last")
    for name in ("zeros_like", "clone"):
        graph.save(graph.op(name, last, *([None] if name == "zeros_like" else [])), name)
    return graph


class Neighbour:
    """B, once. What it has saved is kept."""

    def __init__(
        self, tenants: Tenants, client: MemoryTransport, draw: random.Random, sentinel: float
    ) -> None:
        self.tenants = tenants
        self.client = client
        self.draw = draw
        self.sentinel = sentinel
        self.saves: list[Saves] = []
        self.failures: list[str] = []
        self.said: list[str] = []

    async def run(self, graph: Nodes, ids: torch.Tensor) -> None:
        found = await self.tenants.run(self.client, graph.nodes, graph.constants, ids)
        if isinstance(found, Failed):
            self.failures.append(found.code)
            self.said.append(found.text)
        else:
            self.saves.append(found)

    def ids(self) -> torch.Tensor:
        return torch.tensor([[self.draw.randrange(64) for _ in range(SEQ)]])


async def numbers(b: Neighbour) -> None:
    """NaN, infinity and numbers at the edge of float32 in the model's states."""
    value = b.draw.choice([math.nan, math.inf, -math.inf, 1e30, 1e-38])
    await b.run(of_b(b.draw, b.sentinel, value), b.ids())
    assert not b.failures


async def errors(b: Neighbour) -> None:
    """An op that fails in the middle of the model's pass, behind a write."""
    graph = of_b(b.draw, b.sentinel, 1.0)
    first = graph.read(BLOCK)
    if b.draw.random() < 0.5:
        zeros = graph.op("zeros_like", first, None)
        fails = graph.op(
            "linalg_inv", graph.op("bmm", zeros, graph.op("permute", zeros, (0, 2, 1)))
        )
    else:
        fails = graph.op("index_select", first, 1, graph.const(torch.tensor([10**6])))
    graph.save(fails, "never")
    await b.run(graph, b.ids())
    assert b.failures == ["ShapeMismatch"], b.said


async def bombs(b: Neighbour) -> None:
    """More memory or time than there is."""
    graph = Nodes()
    huge = graph.op("full", (1 << 20, 1 << 20), 1.0, DType.FLOAT32)
    graph.save(graph.op("exp", huge), "huge")
    await b.run(graph, b.ids())
    assert b.failures == ["OverBudget"], b.said


async def cancels(b: Neighbour) -> None:
    """Traces that are cancelled or left, at some moment of their run."""
    for _ in range(3):
        graph = of_b(b.draw, b.sentinel, 1.0)
        stream, answer = await b.tenants.ask(b.client, graph.nodes, graph.constants)
        assert isinstance(answer, Accepted), answer
        await b.tenants.begin(stream, b.ids())
        for _ in range(b.draw.randrange(30)):
            await asyncio.sleep(0)
        if b.draw.random() < 0.5:
            stream.reset()
            continue
        with contextlib.suppress(SwarmError):
            await stream.send(encode(Cancel()))
            await b.tenants.saves(stream)


async def floods(b: Neighbour) -> None:
    """As many small traces at a time as the host takes, and more."""
    several = [of_b(b.draw, b.sentinel, float(number)) for number in range(FLOOD)]
    await asyncio.gather(*(b.run(graph, b.ids()) for graph in several))
    assert set(b.failures) <= {"Busy"}
    assert b.saves


KINDS: Final[tuple[B, ...]] = (numbers, errors, bombs, cancels, floods)


def bits(saves: Saves) -> dict[str, bytes]:
    """What was saved, to the bit: a NaN is equal to itself."""
    return {name: tensor.numpy().tobytes() for name, tensor in saves.items()}


def holds(saves: Saves, sentinel: float) -> bool:
    """Whether one of the numbers is that one."""
    return any(bool((tensor == torch.tensor(sentinel)).any()) for tensor in saves.values())


class Handed:
    """Searches the tensors that each tenant's kernels are given, and give, for the other's mark."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.mine = self.theirs = math.nan
        self.searched: Counter[bool] = Counter()  # whether A's
        self.found: list[tuple[bool, str]] = []
        self._of_a = False
        run, self._run_op = Executor.run, executor.run_op

        def run_stage(one: Executor, *args: Any) -> None:
            mark = name_of(torch.full((HIDDEN,), self.mine))
            nodes = one._part.graph.nodes.values()
            before = self._of_a  # of the stage that gave way to this one
            self._of_a = any(isinstance(node, Const) and node.digest == mark for node in nodes)
            try:
                run(one, *args)
            finally:
                self._of_a = before

        patch.setattr(Executor, "run", run_stage)
        patch.setattr(executor, "run_op", self._search)

    def _search(self, name: str, args: Sequence[Any], **keywords: Any) -> object:
        result = self._run_op(name, args, **keywords)
        foreign = self.theirs if self._of_a else self.mine
        for tensor in tensors_in([*args, result]):
            self.searched[self._of_a] += 1
            if holds({name: tensor}, foreign):
                self.found.append((self._of_a, name))
        return result


@pytest.mark.asyncio
async def test_a_gets_what_it_gets_alone_beside_any_b(
    served: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = random.Random(SEED)
    seen: set[str] = set()
    handed = Handed(monkeypatch)
    # A tiny stage takes less than what one is given way for; and they are of one length.
    monkeypatch.setattr(torch_thread, "TURN_SECONDS", -1.0)
    monkeypatch.setattr(torch_thread, "GRACE_SECONDS", 1e9)
    run, in_between = TorchThread._run, [0]
    both: list[asyncio.Task[Any]] = []

    def meeting(thread: TorchThread, work: Any) -> None:
        """Begin no stage before the other tenant's waits, or will not come any more."""
        in_between[0] += bool(thread._running)
        deadline = time.monotonic() + 30
        while not thread._running and thread._queue.is_empty and time.monotonic() < deadline:
            if not both or any(task.done() for task in both):
                break
            time.sleep(0.0005)
        run(thread, work)

    monkeypatch.setattr(TorchThread, "_run", meeting)
    # B's kinds come one after the other here, faster than one client may open streams.
    streams = StreamLimits(new_per_second=1e6, burst=10**6)
    async with Tenants(served, stream_limits=streams) as tenants:
        alice, eve = tenants.client(), tenants.client()
        for number in range(PAIRS):
            # Of no number that comes about by itself, and exact in float32.
            mine, theirs = 4096.5 + 2 * number, 8192.5 + 2 * number
            handed.mine, handed.theirs = mine, theirs
            graph = of_a(draw, mine)
            ids = torch.tensor([[draw.randrange(64) for _ in range(SEQ)]])

            async def run_a(
                graph: Nodes = graph, ids: torch.Tensor = ids
            ) -> dict[str, torch.Tensor]:
                saved = await tenants.run(alice, graph.nodes, graph.constants, ids)
                assert isinstance(saved, dict), saved
                return saved

            alone = bits(await run_a())
            kind = KINDS[number % len(KINDS)]
            b = Neighbour(tenants, eve, draw, theirs)
            both += [asyncio.create_task(kind(b)), asyncio.create_task(run_a())]
            first, second = await both[1], await run_a()
            await both[0]
            both.clear()
            after = await run_a()
            for saved in (first, second, after):
                assert bits(saved) == alone, (number, kind.__name__)
                assert not holds(saved, theirs)
            assert not any(holds(saved, mine) for saved in b.saves), (number, kind.__name__)
            assert not handed.found, (number, kind.__name__)
            seen |= {kind.__name__, *b.failures}
    assert {"ShapeMismatch", "OverBudget", "Busy"} <= seen
    assert min(handed.searched[True], handed.searched[False]) > PAIRS
    assert in_between[0] > PAIRS // 10, "few stages ran in the middle of others"


def broken(kernel: Callable[..., object], error: Exception) -> Callable[..., object]:
    """The kernel, which fails where it would compute; shapes are inferred on the meta device."""

    def fails(*args: object, **keywords: object) -> object:
        of_no_data = str(keywords.get("device")) == "meta"
        if of_no_data or any(tensor.is_meta for tensor in tensors_in(args)):
            return kernel(*args, **keywords)
        raise error

    return fails


def tensors_in(args: object) -> list[torch.Tensor]:
    """The tensors among an op's arguments, at any depth."""
    if isinstance(args, tuple | list):
        return [tensor for arg in args for tensor in tensors_in(arg)]
    return [args] if isinstance(args, torch.Tensor) else []


ERRORS: Final = (RuntimeError, KeyError, AssertionError, MemoryError, torch.OutOfMemoryError)


def of_op(name: str, rng: random.Random) -> Nodes:
    """What B asks for: this op, of the model's states and constants, behind a write."""
    halves = torch.zeros(4, 25, dtype=torch.complex64)  # of 48 numbers, for `fft_c2r`
    leaves = [torch.zeros(1, SEQ, HIDDEN), torch.zeros(4, 2), halves, *LEAVES]
    specs = {NodeId(i): spec_of_tensor(leaf) for i, leaf in enumerate(leaves)}
    tries = (random_args(OPS[name], specs, rng) for _ in range(20_000))
    found = next((one for one in tries if one is not None), None)
    assert found is not None, name
    graph = Nodes()
    states = graph.read(BLOCK)
    graph.write(BLOCK, graph.const(torch.full((1, SEQ, HIDDEN), 4.0)), "inplace")
    made: dict[NodeId, Ref] = {NodeId(0): states}

    def placed(arg: object) -> object:
        if isinstance(arg, tuple):
            return tuple(map(placed, arg))
        if not isinstance(arg, Ref):
            return arg
        if arg.node not in made:
            made[arg.node] = graph.const(leaves[arg.node])
        return made[arg.node]

    result = graph.op(name, *map(placed, found[0]))
    graph.save(graph.op("pick", result, 0) if OPS[name].outputs > 1 else result, "never")
    return graph


@pytest.mark.asyncio
async def test_a_gets_what_it_gets_alone_whichever_op_fails(
    served: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every op of the table fails in B's graph, as it never should; A's graph has none."""
    rng = random.Random(SEED)
    graph = Nodes()
    graph.save(graph.read(BLOCK), "first")
    graph.write(BLOCK, graph.const(torch.full((1, SEQ, HIDDEN), 0.25)), "set")
    graph.save(graph.read(LAST), "last")
    async with Tenants(served) as tenants:
        alice, eve = tenants.client(), tenants.client()

        async def run_a() -> dict[str, bytes]:
            saved = await tenants.run(alice, graph.nodes, graph.constants)
            assert isinstance(saved, dict), saved
            return bits(saved)

        alone = await run_a()
        for number, name in enumerate(sorted(set(OPS) - {"pick"})):
            error = ERRORS[number % len(ERRORS)]("a kernel's own words")
            monkeypatch.setattr(kernels, "KERNELS", KERNELS | {name: broken(KERNELS[name], error)})
            b = Neighbour(tenants, eve, rng, 0.0)
            beside = asyncio.create_task(b.run(of_op(name, rng), b.ids()))
            assert await run_a() == alone, name
            await beside
            assert b.failures, (name, b.saves)
            assert await run_a() == alone, name
