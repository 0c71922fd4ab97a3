"""The loop thread: results, exceptions, deadlines, an orderly end."""

import asyncio
import threading

import pytest

from glasshive.dht.errors import DeadlineExceeded, TransportClosed
from glasshive.dht.loop_thread import LoopThread


def test_results_and_exceptions_come_back() -> None:
    async def add(one: int, other: int) -> int:
        await asyncio.sleep(0)
        return one + other

    async def fail() -> None:
        raise TimeoutError("the coroutine's own")

    with LoopThread() as loop:
        assert loop.run(add(1, 2), 5) == 3
        with pytest.raises(TimeoutError, match="own"):
            loop.run(fail(), 5)


def test_a_deadline_cancels_the_coroutine() -> None:
    cancelled = threading.Event()

    async def wait() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    with LoopThread() as loop:
        with pytest.raises(DeadlineExceeded):
            loop.run(wait(), 0.02)
        assert cancelled.wait(5)


def test_closing_cancels_what_runs_and_ends_the_thread() -> None:
    started, cancelled = threading.Event(), threading.Event()

    async def wait() -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    async def nothing() -> None:
        return

    loop = LoopThread("a name")
    future = loop.submit(wait())
    assert started.wait(5)
    loop.close()
    loop.close()
    assert cancelled.is_set()
    assert future.cancelled()
    assert not any(thread.name == "a name" for thread in threading.enumerate())
    with pytest.raises(TransportClosed):
        loop.run(nothing(), 1)


def test_its_own_thread_may_not_wait_for_itself() -> None:
    async def nothing() -> None:
        return

    with LoopThread() as loop:

        async def inner() -> None:
            loop.run(nothing(), 1)

        with pytest.raises(RuntimeError, match="await it"):
            loop.run(inner(), 5)
