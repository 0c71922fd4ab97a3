"""What clients send is checked on one thread, beside the loop, and clients take turns.

Of each client at most one check runs or stands in the common queue. Its others wait behind that
one, and so never before another client's.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar
from weakref import WeakValueDictionary

from glasshive.dht.outcome import forget_outcome
from glasshive.peer.errors import Busy, TraceEnded
from glasshive.security.keys import PeerId

T = TypeVar("T")


class Checks:
    """The thread. A check may wait for `seconds`, and then take as long."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="check")
        self._turn = asyncio.Lock()  # until the thread is free; locks are taken in turn
        self._own: WeakValueDictionary[PeerId, asyncio.Lock] = WeakValueDictionary()

    async def run(self, client: PeerId, work: Callable[[Callable[[], None]], T]) -> T:
        """What `work` gives, on the thread. Raises Busy, saying which of the two took too long.

        `work` is given what to call now and then: it ends a check that nobody waits for.
        """
        loop = asyncio.get_running_loop()
        unwanted = threading.Event()

        def go_on() -> None:
            if unwanted.is_set():
                raise TraceEnded("nobody waits for this check any more")

        begun = False
        own = self._own.setdefault(client, asyncio.Lock())
        try:
            async with asyncio.timeout(self._seconds) as patience, own:
                await self._turn.acquire()
                begun = True
                patience.reschedule(loop.time() + self._seconds)
                check = loop.run_in_executor(self._executor, work, go_on)
                check.add_done_callback(self._ended)
                await asyncio.wait({check})  # which leaves it alone when the time is over
                return check.result()
        except TimeoutError:
            raise Busy(
                f"checking took longer than {self._seconds:g} s here; try another peer, or send a "
                "smaller graph"
                if begun
                else f"this peer was checking other traces for {self._seconds:g} s, and it was not "
                "the turn of this one; try again, or by way of another peer"
            ) from None
        finally:
            unwanted.set()

    def close(self) -> None:
        """Take no more checks. One that runs ends as nobody waits for it."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _ended(self, check: asyncio.Future[Any]) -> None:
        self._turn.release()
        forget_outcome(check)
