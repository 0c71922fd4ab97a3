"""The one thread of a peer that computes. Kernels release the interpreter's lock, loops don't wait.

Work of different tenants takes turns, fairly by client (glasshive.peer.fair_queue): stage by stage,
and within a long stage wherever that gives way to those who had less. A kernel can't be interrupted
from within, so the thread says when its work ought to have come a step further: the supervisor ends
a process whose work is overdue.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Final

from glasshive.dht.outcome import forget_outcome
from glasshive.peer.fair_queue import FairQueue
from glasshive.security.keys import PeerId

# By how much another client must have had less for a stage to give way to its work.
TURN_SECONDS: Final = 0.01
# How much of its time a stage gives, at most, beyond what it has had itself.
GRACE_SECONDS: Final = 1.0
# How many stages are there at most, of which one runs: each holds the memory of its pass.
MAX_DEEP: Final = 3


@dataclass(eq=False, slots=True)
class _Work:
    client: PeerId
    trace_id: bytes
    run: Callable[[], None]
    seconds: float  # about
    step_seconds: float
    done: Future[None] = field(default_factory=Future)
    ran_seconds: float = 0.0
    gave_seconds: float = 0.0
    charged_until: float = 0.0  # by the clock


class TorchThread:
    """Runs functions one after the other on a thread of its own.

    Of each client at most `waiting_per_client` of them wait for their turn.
    """

    def __init__(
        self, waiting_per_client: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="torch")
        self._lock = threading.Lock()  # of the queue
        self._queue: FairQueue[_Work] = FairQueue(waiting_per_client)
        self._running: list[_Work] = []  # the last one runs, the one before it has given way
        self._due_at: float | None = None

    @property
    def overdue_seconds(self) -> float:
        """How long ago the step that runs ought to have ended; 0 or less if it is in time."""
        due_at = self._due_at
        return 0.0 if due_at is None else self._clock() - due_at

    async def run(
        self,
        client: PeerId,
        trace_id: bytes,
        work: Callable[[], None],
        *,
        seconds: float,
        step_seconds: float,
    ) -> None:
        """Run `work`, which takes about `seconds`, when it is the client's turn, to its end.

        Its exception is raised here, and Busy if too much of the client's waits. Work that says
        nothing by `step` for longer than `step_seconds` is overdue. A cancelled caller stops
        waiting at once; work that has begun runs on to its end.
        """
        one = _Work(client, trace_id, work, seconds, step_seconds)
        with self._lock:
            self._queue.put(client, one)
        try:
            self._pool.submit(self._run_next)
        except RuntimeError:  # it is closed
            self._discard(one)
            raise
        try:
            await asyncio.wrap_future(one.done)
        except asyncio.CancelledError:
            self._discard(one)
            raise

    def _discard(self, one: _Work) -> None:
        with self._lock:
            self._queue.discard(one.client, one)

    def step(self) -> None:
        """Called by work, on the thread: it has come a step further, and the next has its time."""
        if self._running:
            self._due_at = self._clock() + self._running[-1].step_seconds

    def give_way(self, aside: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:
        """Called by work, on the thread, wherever other work may run to its end in between.

        That runs inside `aside()`, whose errors are this work's. It is of a client that had less,
        takes no longer than this one, and all that it gives way to takes no more of its time than
        it had itself and a moment: who comes under ever new keys can't hold it up for good.
        """
        if self._queue.is_empty or not 1 <= len(self._running) < MAX_DEEP:
            return
        work = self._running[-1]
        while self._ahead_of(work) is not None:
            try:
                with aside():
                    # Anew: the device may have worked on for this one meanwhile.
                    next_one = self._ahead_of(work, take=True)
                    if next_one is None:
                        return
                    self._run(next_one)
            finally:
                now = self._clock()
                work.gave_seconds += now - work.charged_until
                work.charged_until = now
                self.step()

    def _ahead_of(self, work: _Work, *, take: bool = False) -> _Work | None:
        """To what `work`, which runs, would give way."""
        self._charge(work)
        left_seconds = work.ran_seconds + GRACE_SECONDS - work.gave_seconds
        most_seconds = min(work.seconds, left_seconds)
        here = {one.client for one in self._running}  # whose stage has given way gets no other
        with self._lock:
            ahead = self._queue.ahead_of(
                work.client,
                TURN_SECONDS,
                lambda one: one.seconds <= most_seconds and one.client not in here,
            )
            if ahead is not None and take:
                self._queue.take_of(ahead[0])
        return None if ahead is None else ahead[1]

    def after(self, trace_id: bytes, then: Callable[[], None]) -> None:
        """Call `then` on the loop when no work of that trace runs: now, if none does."""
        running = next((one for one in list(self._running) if one.trace_id == trace_id), None)
        if running is None:
            then()
            return
        ended = asyncio.wrap_future(running.done)
        ended.add_done_callback(forget_outcome)
        ended.add_done_callback(lambda _: then())

    def close(self) -> None:
        """Take no more work, and forget what has not begun."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            while (next_one := self._queue.take()) is not None:
                next_one[1].done.cancel()

    def _run_next(self) -> None:
        """Run what is next in the queue: it was called once for each thing that was put there."""
        with self._lock:
            next_one = self._queue.take()
        if next_one is not None:
            self._run(next_one[1])

    def _run(self, work: _Work) -> None:
        if not work.done.set_running_or_notify_cancel():
            return
        self._running.append(work)
        work.charged_until = self._clock()
        self.step()
        error: BaseException | None = None
        try:
            work.run()
        except BaseException as raised:
            error = raised
        self._running.pop()
        self._due_at = None
        self._charge(work)
        if error is None:
            work.done.set_result(None)
        else:
            work.done.set_exception(error)

    def _charge(self, work: _Work) -> None:
        now = self._clock()
        took_seconds = max(now - work.charged_until, 0.0)
        with self._lock:
            self._queue.charge(work.client, took_seconds)
        work.ran_seconds += took_seconds
        work.charged_until = now
