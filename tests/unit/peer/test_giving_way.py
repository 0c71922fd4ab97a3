"""A stage that gives way between two blocks to another tenant's, on the same modules."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch

from glasshive.graph.dtypes import DType
from glasshive.graph.errors import GraphError
from glasshive.graph.graph import Call, Graph, Node, NodeId, Op, Read, Ref, Save, Site, Skip, Write
from glasshive.graph.order import Pass, Passes
from glasshive.graph.plan import Part, Span, Stage
from glasshive.peer import executor as executor_module
from glasshive.peer.errors import TraceEnded
from glasshive.peer.executor import Aside, Executor
from glasshive.peer.generation import PassInputs
from glasshive.peer.served_model import ServedModel
from glasshive.peer.torch_thread import TURN_SECONDS, TorchThread
from glasshive.security.keys import Identity, PeerId

FIRST = Site("model.layers.0", "output")
LAST = Site("model.layers.1", "output")
LOGITS = Site("lm_head", "output")
ALICE, BOB, CAROL = (Identity.generate().peer_id for _ in range(3))

Saves = dict[str, torch.Tensor]


def ref(number: int) -> Ref:
    return Ref(NodeId(number))


def edited(site: Site, mode: str) -> list[Node]:
    return [
        Read(site, 0),
        Op("mul", (ref(0), -2.0)),
        Write(site, 0, ref(1), mode),  # type: ignore[arg-type]
        Read(LOGITS, 0),
        Save(ref(3), "logits"),
    ]


def skipped(module: str, site: Site) -> list[Node]:
    return [
        Read(site, 0),
        Skip(module, 0, ref(0)),
        Read(LOGITS, 0),
        Save(ref(2), "logits"),
    ]


GRAPHS: dict[str, list[Node]] = {
    "reads": [Read(FIRST, 0), Save(ref(0), "first"), Read(LOGITS, 0), Save(ref(2), "logits")],
    "stops early": [Read(FIRST, 0), Save(ref(0), "first")],
    "sets a block's output": edited(FIRST, "set"),
    "edits a block's output in place": edited(FIRST, "inplace"),
    "sets what a block is given": edited(Site("model.layers.1", "input", (0,)), "set"),
    "edits inside of a block": edited(Site("model.layers.1.mlp", "output"), "inplace"),
    "skips a part of a block": skipped("model.layers.1.mlp", Site("model.layers.0.mlp", "output")),
    "skips a block": skipped("model.layers.1", FIRST),
    "calls a module": [
        Read(FIRST, 0),
        Call("model.norm", (ref(0),)),
        Call("model.layers.1.mlp", (ref(1),)),
        Save(ref(2), "called"),
        Read(LAST, 0),
        Save(ref(4), "last"),
    ],
    "fails": [
        Read(FIRST, 0),
        Op("mul", (ref(0), 1e6)),
        Op("to", (ref(1), DType.INT64)),
        Op("one_hot", (ref(2), 1)),  # there are other numbers than 0 in it
        Save(ref(3), "hot"),
        Read(LOGITS, 0),
        Save(ref(5), "logits"),
    ],
}


class Outbox(Saves):
    """What was saved."""

    def saved(self, name: str, value: torch.Tensor) -> None:
        self[name] = value.clone()

    def exported(self, stage: Stage, value: NodeId, receiver: int, tensor: torch.Tensor) -> None:
        raise AssertionError("one part has nobody to send to")


def stage_of(
    served: ServedModel, nodes: Sequence[Node], rows: int, seq: int, **how: object
) -> tuple[Executor, Callable[[], None], Outbox]:
    """An executor, what runs its only stage on `rows` of `seq` tokens, and what that has saved."""
    ids = tuple(map(NodeId, range(len(nodes))))
    only = "stops early" if nodes is GRAPHS["stops early"] else ""
    stop = served.outline.event(FIRST if only else LOGITS)
    stage = Stage(0, ids, forward=True, stop_event=stop)
    part = Part(0, Span(0, 2), Graph(dict(zip(ids, nodes, strict=True))), (stage,), {})
    passes = Passes((Pass((0,), seq, False, ((0, rows),)),))
    outbox = Outbox()
    executor = Executor(served.model, served.outline, part, passes, {}, outbox, **how)  # type: ignore[arg-type]
    tokens = torch.arange(rows * seq).view(rows, seq) * 7 % 64
    return executor, lambda: executor.run(stage, PassInputs(input_ids=tokens), None), outbox


def outcome(run: Callable[[], None], outbox: Outbox) -> tuple[str, dict[str, bytes]]:
    try:
        run()
    except GraphError as error:
        return str(error), {name: value.numpy().tobytes() for name, value in outbox.items()}
    return "", {name: value.numpy().tobytes() for name, value in outbox.items()}


@pytest.mark.parametrize(("a", "b"), list(itertools.product(GRAPHS, GRAPHS)))
def test_neither_of_two_stages_sees_the_other(served: ServedModel, a: str, b: str) -> None:
    alone = outcome(*stage_of(served, GRAPHS[a], 2, 5)[1:])
    other_alone = outcome(*stage_of(served, GRAPHS[b], 1, 9)[1:])
    assert (alone[0] != "", other_alone[0] != "") == (a == "fails", b == "fails")
    others = []

    def give_way(aside: Aside) -> None:
        with aside():
            others.append(outcome(*stage_of(served, GRAPHS[b], 1, 9)[1:]))

    assert outcome(*stage_of(served, GRAPHS[a], 2, 5, give_way=give_way)[1:]) == alone
    # Before the first node, each block and each node: before the second block at least, if it runs.
    assert len(others) >= (3 if a in ("stops early", "fails") else 5)
    assert all(one == other_alone for one in others)
    block = served.model.module.get_submodule("model.layers.1")
    assert "forward" not in vars(block), "a skip stayed on its module"


def test_what_others_took_is_not_a_stage_s_own_time(served: ServedModel) -> None:
    now = 0.0

    def give_way(aside: Aside) -> None:
        nonlocal now
        with aside():
            now += 100.0

    clocked = {"stage_seconds": 5.0, "clock": lambda: now}
    run = stage_of(served, GRAPHS["reads"], 1, 5, give_way=give_way, **clocked)
    assert outcome(*run[1:])[0] == ""
    assert now > 500.0


def test_a_stage_that_is_cancelled_while_others_run_ends(served: ServedModel) -> None:
    executor: Executor
    executor, run, _ = stage_of(
        served, GRAPHS["reads"], 1, 5, give_way=lambda aside: executor.cancel()
    )
    with pytest.raises(TraceEnded):
        run()
    # And it leaves nothing behind for the next one.
    assert outcome(*stage_of(served, GRAPHS["reads"], 1, 5)[1:])[0] == ""


def test_a_stage_that_was_cancelled_meanwhile_does_no_more(served: ServedModel) -> None:
    executor: Executor
    given = 0

    def give_way(aside: Aside) -> None:
        nonlocal given
        given += 1
        with aside():
            executor.cancel()

    executor, run, outbox = stage_of(served, GRAPHS["reads"], 1, 5, give_way=give_way)
    with pytest.raises(TraceEnded):
        run()
    assert (given, dict(outbox)) == (1, {})


def test_what_the_device_still_does_is_the_stage_s_own_time(
    served: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others begin when it has done it."""
    order: list[str] = []
    monkeypatch.setattr(executor_module, "wait_for", lambda device: order.append("waited"))

    def give_way(aside: Aside) -> None:
        with aside():
            order.append("others")

    stage_of(served, GRAPHS["stops early"], 1, 5, give_way=give_way)[1]()
    assert order == ["waited", "others"] * (len(order) // 2) + ["waited"]


def test_a_pass_whose_indices_are_looked_at_gives_way_to_nobody(
    served: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mode of torch that looks at them would look at others', too. Before it there is none."""
    monkeypatch.setattr(served.model, "guarded", True)
    monkeypatch.setattr(served.model, "_longest_tokens", 0)
    given: list[bool] = []
    run = stage_of(
        served, GRAPHS["reads"], 1, 5, give_way=lambda aside: given.append(served.model.is_looking)
    )[1]
    run()
    assert given == [False]


# Who gives way to whom ----------------------------------------------------------------------------


@dataclass
class Work:
    """A stage of so many blocks, which takes them `block_seconds` each by the clock."""

    client: PeerId
    name: str
    blocks: int = 1
    block_seconds: float = 0.5


class Turns:
    """A torch thread by a clock of its own, and the order in which its work came to an end."""

    def __init__(self) -> None:
        self.now = 0.0
        self.torch = TorchThread(8, lambda: self.now)
        self.order: list[str] = []
        self.go = threading.Event()

    def runs(self, stage: Work) -> Callable[[], None]:
        def run() -> None:
            assert self.go.wait(30)
            for _ in range(stage.blocks):
                self.torch.give_way()
                self.now += stage.block_seconds
            self.order.append(stage.name)

        return run

    async def order_of(self, *stages: Work) -> list[str]:
        """Give all in, in this order, before the first goes on."""
        await self.done(*((one, one.blocks * one.block_seconds, self.runs(one)) for one in stages))
        return self.order

    async def done(self, *works: tuple[Work, float, Callable[[], None]]) -> None:
        waiting = []
        async with asyncio.timeout(30):
            for number, (one, seconds, run) in enumerate(works):
                put = self.torch.run(
                    one.client, one.name.encode(), run, seconds=seconds, step_seconds=60.0
                )
                waiting.append(asyncio.create_task(put))
                while len(self.torch._queue) < number:  # noqa: ASYNC110
                    await asyncio.sleep(0)
            self.go.set()
            await asyncio.gather(*waiting)
        self.torch.close()


@pytest.mark.asyncio
async def test_who_had_less_goes_between_two_blocks() -> None:
    long, short = Work(ALICE, "long", 10), Work(BOB, "short")
    assert await Turns().order_of(long, short) == ["short", "long"]


@pytest.mark.asyncio
async def test_nobody_gives_way_to_work_of_the_same_client() -> None:
    long, short = Work(ALICE, "long", 10), Work(ALICE, "short")
    assert await Turns().order_of(long, short) == ["long", "short"]


@pytest.mark.asyncio
async def test_nobody_gives_way_to_who_has_just_given_way() -> None:
    """A client with many traces, beside one with one of the same length."""
    many = [Work(ALICE, f"a{i}", 6, 0.1) for i in range(3)]
    order = await Turns().order_of(many[0], Work(BOB, "b", 6, 0.1), *many[1:])
    assert order == ["b", "a0", "a1", "a2"]


@pytest.mark.asyncio
async def test_nobody_gives_way_to_what_takes_longer() -> None:
    """But to who comes after it and takes less."""
    long, longer, short = Work(ALICE, "long", 10), Work(BOB, "longer", 11), Work(CAROL, "short")
    assert await Turns().order_of(long, longer, short) == ["short", "long", "longer"]


@pytest.mark.asyncio
async def test_what_runs_in_between_gives_way_too_three_deep() -> None:
    dave = Identity.generate().peer_id
    stages = [
        Work(one, name, 4) for one, name in zip((ALICE, BOB, CAROL, dave), "abcd", strict=True)
    ]
    turns = Turns()
    assert await turns.order_of(*stages[:2], Work(CAROL, "c")) == ["c", "b", "a"]
    assert (await Turns().order_of(*stages))[:3] == ["c", "b", "a"]


@pytest.mark.asyncio
async def test_who_gave_way_goes_on_as_soon_as_it_had_no_more_than_others() -> None:
    """The other client's later traces wait: it has had as much by then."""
    others = [Work(BOB, f"b{i}", block_seconds=1.0) for i in range(6)]
    order = await Turns().order_of(Work(ALICE, "long", 4), *others)
    # After half a second of Alice's, one of Bob's; after 1.5 s of hers, the next.
    assert order == ["b0", "b1", "long", "b2", "b3", "b4", "b5"]


@pytest.mark.asyncio
async def test_ever_new_keys_take_no_more_than_half_of_the_time() -> None:
    others = [Work(Identity.generate().peer_id, f"{i}") for i in range(40)]
    order = await Turns().order_of(Work(ALICE, "long", 20), *others)
    assert 18 <= order.index("long") <= 23


@pytest.mark.asyncio
async def test_a_moment_is_not_given_way_for() -> None:
    moment = TURN_SECONDS / 4
    long, short = Work(ALICE, "long", 3, moment), Work(BOB, "short", 1, moment)
    assert await Turns().order_of(long, short) == ["long", "short"]


@pytest.mark.asyncio
async def test_much_is_done_in_between_only_for_who_has_done_as_much() -> None:
    """Two of minutes give way to somebody with little, not to each other."""
    much = [Work(one, name, 100, 3.0) for one, name in ((ALICE, "a"), (BOB, "b"))]
    assert await Turns().order_of(*much, Work(CAROL, "short")) == ["short", "a", "b"]


@pytest.mark.asyncio
async def test_what_the_device_still_did_is_charged_to_who_gave_way() -> None:
    turns = Turns()

    @contextmanager
    def aside() -> Iterator[None]:
        turns.now += 7.0
        yield

    def long() -> None:
        assert turns.go.wait(30)
        turns.now += 1.0
        turns.torch.give_way(aside)

    def short() -> None:
        turns.now += 1.0

    await turns.done((Work(ALICE, "long"), 9.0, long), (Work(BOB, "short"), 1.0, short))
    assert turns.torch._queue._had_seconds == {ALICE: 8.0, BOB: 1.0}


@pytest.mark.asyncio
async def test_work_that_gave_way_has_not_ended() -> None:
    """Neither has its memory, and its step is due anew when it goes on."""
    turns = Turns()
    loop = asyncio.get_running_loop()
    ended: list[str] = []
    seen: list[object] = []

    async def ask() -> None:
        turns.torch.after(b"long", lambda: ended.append("long"))

    def short() -> None:
        asyncio.run_coroutine_threadsafe(ask(), loop).result(30)
        seen.append(list(ended))
        seen.append(turns.torch.overdue_seconds)
        turns.now += 100.0
        seen.append(turns.torch.overdue_seconds)

    def long() -> None:
        assert turns.go.wait(30)
        turns.now += 1.0
        turns.torch.give_way()
        seen.append(turns.torch.overdue_seconds)

    await turns.done((Work(ALICE, "long"), 9.0, long), (Work(BOB, "short"), 1.0, short))
    assert seen == [[], -60.0, 40.0, -60.0]
    async with asyncio.timeout(30):
        while ended != ["long"]:  # noqa: ASYNC110
            await asyncio.sleep(0)
