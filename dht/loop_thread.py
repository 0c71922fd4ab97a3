"""One asyncio loop in one background thread, for callers that are not asynchronous."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar, final

from glasshive.dht.errors import DeadlineExceeded, TransportClosed

__all__ = ["LoopThread", "new_loop"]

T = TypeVar("T")

CLOSE_DEADLINE_SECONDS = 10.0
TICK_SECONDS = 0.05
"""Somebody may read tokens as they come."""


@final
class LoopThread:
    """Runs coroutines for other threads. Uses uvloop if it is installed. A context manager.

    The thread is a daemon: it never keeps the interpreter alive.
    """

    def __init__(self, name: str = "glasshive-network") -> None:
        self._loop = new_loop()
        self._closed = False
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._thread.start()

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        return self._loop

    def run(
        self,
        coroutine: Coroutine[Any, Any, T],
        deadline_seconds: float,
        on_tick: Callable[[], None] | None = None,
        on_start: Callable[[concurrent.futures.Future[T]], None] | None = None,
    ) -> T:
        """The coroutine's result, or its exception; cancels it after `deadline_seconds`.

        Also cancels it when the calling thread is interrupted. While it waits, the calling thread
        calls `on_tick` twenty times a second. `on_start` is given the future of the result: whoever
        cancels that, from any thread, cancels the coroutine, and the wait ends at once. Raises
        DeadlineExceeded, or TransportClosed after that or `close`. Not to be called from the loop's
        own thread.
        """
        if threading.current_thread() is self._thread:
            coroutine.close()
            raise RuntimeError("run() from the loop's own thread would wait for itself; await it")
        future = self.submit(coroutine)
        ends_at = time.monotonic() + deadline_seconds
        try:
            if on_start is not None:
                on_start(future)
            while on_tick is not None and time.monotonic() + TICK_SECONDS < ends_at:
                on_tick()
                # `concurrent.futures.wait` sees a cancelled future only when its coroutine is over.
                with contextlib.suppress(TimeoutError):
                    future.exception(TICK_SECONDS)
                    break
            return future.result(max(ends_at - time.monotonic(), 0.0))
        except concurrent.futures.CancelledError:
            raise TransportClosed("the call was cancelled, or its loop closed") from None
        except TimeoutError:
            if future.done() and not future.cancelled():
                raise  # the coroutine's own
            raise DeadlineExceeded(
                f"the call took longer than {deadline_seconds:g} s; try again, or allow more time"
            ) from None
        finally:
            future.cancel()

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """A future of the coroutine, which runs at once; cancelling the one cancels the other."""
        with self._lock:
            if self._closed:
                coroutine.close()
                raise TransportClosed("the loop thread was closed; make a new one")
            return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def close(self) -> None:
        """Cancels what runs, and ends the thread; waits for that, unless it is the thread's own.

        May be called again: a wait that was interrupted goes on.
        """
        with self._lock:
            is_first, self._closed = not self._closed, True
        if is_first:
            self._loop.call_soon_threadsafe(self._loop.stop)
        # Python's collector ends what nobody holds any more in whatever thread it runs.
        if threading.current_thread() is not self._thread:
            self._thread.join(CLOSE_DEADLINE_SECONDS)

    def __enter__(self) -> LoopThread:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _main(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
            tasks = asyncio.all_tasks(self._loop)
            for task in tasks:
                task.cancel()
            if tasks:
                ended = asyncio.wait(tasks, timeout=CLOSE_DEADLINE_SECONDS / 2)
                self._loop.run_until_complete(ended)
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.run_until_complete(_settle())
        finally:
            asyncio.set_event_loop(None)
            self._loop.close()


async def _settle() -> None:
    """Streams that were just closed give up what they hold of the loop in its next turns."""
    for _ in range(5):
        await asyncio.sleep(0)


def new_loop() -> asyncio.AbstractEventLoop:
    """An event loop that nobody runs yet: uvloop's, where it is installed."""
    try:
        import uvloop
    except ImportError:  # not on every platform
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()
