"""Whose turn it is on the thread that computes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator

import pytest

from glasshive.peer.errors import Busy
from glasshive.peer.fair_queue import MAX_REMEMBERED, FairQueue
from glasshive.peer.torch_thread import TorchThread
from glasshive.security.keys import Identity, PeerId

ALICE, BOB, CAROL = (Identity.generate().peer_id for _ in range(3))


def served(queue: FairQueue[str], seconds: Callable[[str], float]) -> Iterator[str]:
    """Take all that waits, each of which takes so long."""
    while (next_one := queue.take()) is not None:
        client, work = next_one
        queue.charge(client, seconds(work))
        yield work


def test_equals_take_turns_and_a_client_s_own_work_keeps_its_order() -> None:
    queue: FairQueue[str] = FairQueue(8)
    for work in ("a1", "a2", "a3"):
        queue.put(ALICE, work)
    for work in ("b1", "b2"):
        queue.put(BOB, work)
    assert list(served(queue, lambda _: 1.0)) == ["a1", "b1", "a2", "b2", "a3"]


def test_who_was_given_more_time_waits_not_who_had_more_turns() -> None:
    queue: FairQueue[str] = FairQueue(16)
    for number in range(4):
        queue.put(ALICE, f"long{number}")
    for number in range(12):
        queue.put(BOB, f"short{number}")
    order = list(served(queue, lambda work: 10.0 if work.startswith("long") else 1.0))
    assert order.index("long1") == 11  # after ten short ones of Bob's, which took as long


def test_a_client_that_was_away_has_neither_credit_nor_debt() -> None:
    queue: FairQueue[str] = FairQueue(64)
    for number in range(3):
        queue.put(ALICE, f"a{number}")
    assert len(list(served(queue, lambda _: 100.0))) == 3
    for number in range(4):  # Bob comes new, and does not have the worker for 300 seconds
        queue.put(BOB, f"b{number}")
        queue.put(ALICE, f"a{number}")
    order = list(served(queue, lambda _: 100.0))
    assert order == ["b0", "a0", "b1", "a1", "b2", "a2", "b3", "a3"]


def test_a_queue_is_bounded_for_each_client() -> None:
    queue: FairQueue[str] = FairQueue(2)
    queue.put(ALICE, "a1")
    queue.put(ALICE, "a2")
    with pytest.raises(Busy, match=r"^2 stages of yours wait here for their turn; "):
        queue.put(ALICE, "a3")
    queue.put(BOB, "b1")
    queue.discard(ALICE, "a1")
    queue.discard(ALICE, "a1")
    queue.put(ALICE, "a3")
    assert len(queue) == 3


def test_those_who_have_left_are_forgotten() -> None:
    queue: FairQueue[str] = FairQueue(2)
    for number in range(3 * MAX_REMEMBERED):
        client = PeerId(f"client{number}")
        queue.put(client, "work")
        assert list(served(queue, lambda _: 1.0)) == ["work"]
        assert len(queue._had_seconds) <= MAX_REMEMBERED


@pytest.mark.asyncio
async def test_one_client_s_eight_traces_take_no_more_than_another_s_one() -> None:
    now = 0.0
    torch = TorchThread(8, lambda: now)
    permits = threading.Semaphore(0)
    order: list[str] = []

    async def trace(client: PeerId, name: str, stages: int) -> None:
        def stage() -> None:
            nonlocal now
            assert permits.acquire(timeout=30)
            now += 1.0
            order.append(name)

        for _ in range(stages):
            await torch.run(client, name.encode(), stage, seconds=1.0, step_seconds=60.0)

    # All eight of Alice's stand in the queue before Bob's, and stand there again after each stage.
    traces = [asyncio.create_task(trace(ALICE, f"alice{number}", 4)) for number in range(8)]
    traces.append(asyncio.create_task(trace(BOB, "bob", 10)))
    async with asyncio.timeout(30):
        for number in range(20):
            # One runs, all others wait.
            while len(order) < number or len(torch._queue) < 8:  # noqa: ASYNC110
                await asyncio.sleep(0)
            permits.release()
        while len(order) < 20:  # noqa: ASYNC110
            await asyncio.sleep(0)
        # In order of arrival Bob would have had two.
        assert order.count("bob") >= 9
        permits.release(42 - 20)
        await asyncio.gather(*traces)
    assert (len(order), order.count("bob")) == (42, 10)
    torch.close()


@pytest.mark.asyncio
async def test_a_trace_that_is_cancelled_while_it_waits_leaves_the_queue() -> None:
    torch = TorchThread(2)
    begun, go = threading.Event(), threading.Event()
    ran: list[str] = []

    def first() -> None:
        begun.set()
        assert go.wait(30)

    holding = asyncio.create_task(torch.run(ALICE, b"first", first, seconds=1.0, step_seconds=60.0))
    assert await asyncio.to_thread(begun.wait, 30)
    waiting = asyncio.create_task(
        torch.run(BOB, b"second", lambda: ran.append("second"), seconds=1.0, step_seconds=60.0)
    )
    async with asyncio.timeout(30):
        while not len(torch._queue):  # noqa: ASYNC110
            await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait({waiting})
    assert len(torch._queue) == 0
    ended: list[str] = []
    torch.after(b"second", lambda: ended.append("second"))
    torch.after(b"first", lambda: ended.append("first"))
    assert ended == ["second"]  # what runs on has not ended, whoever waits for it
    holding.cancel()
    await asyncio.wait({holding})
    assert ended == ["second"]
    go.set()
    async with asyncio.timeout(30):
        while len(ended) < 2:  # noqa: ASYNC110
            await asyncio.sleep(0)
    assert ran == []
    torch.close()
