"""The loop thread: results, exceptions, deadlines, an orderly end."""

import asyncio
import concurrent.futures
import threading
from typing import Any

import pytest

from glasshive.dht import loop_thread
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


def test_whoever_has_the_future_cancels_the_coroutine_and_the_wait_ends_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not at the next tick, nor when the coroutine is over: seen failing with futures.wait."""
    monkeypatch.setattr(loop_thread, "TICK_SECONDS", 60.0)
    cancelled, is_awake, over = threading.Event(), threading.Event(), threading.Event()
    futures: list[concurrent.futures.Future[Any]] = []

    async def wait() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()
            if await asyncio.to_thread(is_awake.wait, 20):
                over.set()

    with LoopThread() as loop:
        caller = threading.Timer(0.05, lambda: futures[0].cancel())
        caller.start()
        with pytest.raises(TransportClosed, match="was cancelled"):
            loop.run(wait(), 300, lambda: None, futures.append)
        is_awake.set()
        assert cancelled.wait(5)
        assert over.wait(5)
        caller.join()


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


def test_it_may_be_closed_from_its_own_thread() -> None:
    """As by the garbage collector, which runs wherever something is made. It was an error."""
    loop = LoopThread()
    thread = loop._thread

    async def close() -> None:
        loop.close()

    loop.submit(close())
    thread.join(20)
    assert not thread.is_alive()
    loop.close()


def test_a_close_that_was_interrupted_may_be_done_again(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = LoopThread()
    thread, told = loop._thread, threading.Event()

    async def hold() -> None:
        told.set()
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.05)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    loop.submit(hold())
    assert told.wait(5)
    with monkeypatch.context() as patch:
        patch.setattr(thread, "join", interrupt)
        with pytest.raises(KeyboardInterrupt):
            loop.close()
    loop.close()
    assert not thread.is_alive()
