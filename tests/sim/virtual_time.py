"""An asyncio loop whose time is virtual, and threads that take turns with it.

Nothing is ever waited for: when no task can go on, the time is that of the next timer. What happens
follows from the seed alone, so nothing here depends on addresses of objects or on how fast the
machine is: tasks and futures have numbers for hashes, and of all threads one runs at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError, Future
from typing import Any, Generic, TypeVar

from glasshive.dht.errors import DeadlineExceeded, TransportClosed

__all__ = ["Pool", "UserLoop", "VirtualLoop", "by_user"]

T = TypeVar("T")
TICK_SECONDS = 0.25  # a fifth as often as a real loop's, as each is work


class Stuck(AssertionError):
    """Nothing is to be done, now or later, and the simulation is not over."""


class _Task(asyncio.Task[Any]):
    """A task whose place in a set is the same in every run."""

    def __init__(self, *args: Any, number: int, **kwargs: Any) -> None:
        self._number = number
        super().__init__(*args, **kwargs)

    def __hash__(self) -> int:
        return self._number


class _Future(asyncio.Future[Any]):
    """The same of a future."""

    def __init__(self, *, loop: VirtualLoop, number: int) -> None:
        self._number = number
        super().__init__(loop=loop)

    def __hash__(self) -> int:
        return self._number


class VirtualLoop(asyncio.BaseEventLoop):
    """A loop without sockets. Its time begins at 0 and jumps to the next timer.

    `draw_seconds` says how long the next work of a Pool takes.
    """

    def __init__(self, draw_seconds: Callable[[], float] = lambda: 0.0) -> None:
        super().__init__()
        self.draw_seconds = draw_seconds
        self._seconds = 0.0
        self._selector = self
        self._numbers = itertools.count()
        self.set_task_factory(self._make_task)
        self._threads: Pool | None = None

    def time(self) -> float:
        return self._seconds

    def select(self, timeout: float | None) -> list[Any]:
        """In place of a selector's: nothing comes from outside, so the time passes at once."""
        if timeout is None:
            raise Stuck("no task can ever go on")
        self._seconds += timeout
        return []

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> Any:
        """On the loop's own pool where none is named, as for files that are read."""
        if executor is None:
            executor = self._threads = self._threads or Pool()
        return super().run_in_executor(executor, func, *args)

    def create_future(self) -> asyncio.Future[Any]:
        return _Future(loop=self, number=next(self._numbers))

    def _make_task(self, loop: Any, coroutine: Any, context: Any = None) -> asyncio.Task[Any]:
        return _Task(coroutine, loop=loop, context=context, number=next(self._numbers))

    def _process_events(self, events: list[Any]) -> None:
        """There are none."""

    def _write_to_self(self) -> None:
        """Nobody waits to be woken."""


class Pool:
    """In place of a ThreadPoolExecutor of one thread: work runs on the loop, one after the other.

    Each takes some virtual time, at whose end it is done at once.
    """

    def __init__(self, *_: object, **__: object) -> None:
        loop = asyncio.get_event_loop()
        assert isinstance(loop, VirtualLoop)
        self._loop = loop
        self._free_at = 0.0
        self._waiting: dict[int, asyncio.TimerHandle] = {}
        self._numbers = itertools.count()

    def submit(self, work: Callable[..., Any], *args: Any) -> Future[Any]:
        future: Future[Any] = Future()
        number = next(self._numbers)

        def run() -> None:
            del self._waiting[number]
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(work(*args))
            except BaseException as error:
                future.set_exception(error)

        self._free_at = max(self._free_at, self._loop.time()) + self._loop.draw_seconds()
        self._waiting[number] = self._loop.call_at(self._free_at, run)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        for handle in self._waiting.values():
            handle.cancel()
        self._waiting.clear()


class _Call:
    """What a user's thread waits for, and for how long."""

    def __init__(
        self, future: Future[Any], seconds: float, tick: Callable[[], None] | None
    ) -> None:
        self.future, self.seconds, self.tick = future, seconds, tick


class _User(threading.Thread, Generic[T]):
    """Runs one function, and stands still while the loop runs, which does so while this runs."""

    def __init__(self, work: Callable[[], T]) -> None:
        super().__init__(daemon=True)
        self._work = work
        self._turn, self._loops_turn = threading.Semaphore(0), threading.Semaphore(0)
        self._said: _Call | Callable[[], T] | None = None

    def go_on(self) -> _Call | Callable[[], T]:
        """Until it waits for something of the loop, or has ended: then what gives its outcome."""
        self._turn.release()
        self._loops_turn.acquire()
        assert self._said is not None
        return self._said

    def wait_for(self, call: _Call) -> None:
        """On the thread: returns when that is done, or its time is over."""
        self._said = call
        self._loops_turn.release()
        self._turn.acquire()

    def run(self) -> None:
        self._turn.acquire()
        self._said = _outcome_of(self._work)
        self._loops_turn.release()


async def by_user(work: Callable[[], T]) -> T:
    """What `work` gives, which is no coroutine: it may wait with the `run` of a UserLoop."""
    user = _User(work)
    user.start()
    while isinstance(said := user.go_on(), _Call):
        await _wait_for(said)
    user.join()
    return said()


async def _wait_for(call: _Call) -> None:
    loop, is_done = asyncio.get_running_loop(), asyncio.Event()
    call.future.add_done_callback(lambda _: is_done.set())
    ends_at = loop.time() + call.seconds
    while not is_done.is_set() and (left_seconds := ends_at - loop.time()) > 0:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(is_done.wait(), min(left_seconds, TICK_SECONDS))
        if call.tick is not None:
            call.tick()


def _outcome_of(work: Callable[[], T]) -> Callable[[], T]:
    try:
        result = work()
    except BaseException as error:
        raised = error

        def fail() -> T:
            raise raised

        return fail
    return lambda: result


class UserLoop:
    """In place of a LoopThread, whose `run` a Swarm calls on the thread of `by_user`.

    Made on the loop that it stands for.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def run(
        self,
        coroutine: Coroutine[Any, Any, T],
        deadline_seconds: float,
        on_tick: Callable[[], None] | None = None,
        on_start: Callable[[Future[T]], None] | None = None,
    ) -> T:
        """See `LoopThread.run`: whoever cancels the future ends the wait at once."""
        user = threading.current_thread()
        assert isinstance(user, _User)
        future = self.submit(coroutine)
        try:
            if on_start is not None:
                on_start(future)
            user.wait_for(_Call(future, deadline_seconds, on_tick))
            if not future.done():
                raise DeadlineExceeded(f"the call took longer than {deadline_seconds:g} s")
            return future.result()
        except CancelledError:
            raise TransportClosed("the call was cancelled") from None
        finally:
            future.cancel()

    def close(self) -> None:
        """The loop goes on."""
