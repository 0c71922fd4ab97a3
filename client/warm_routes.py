"""Keeps models that are in use ready for their next trace, so that it begins at once.

A trace of a model that nobody has used for a while asks the directory who serves it, asks peers how
far away they are, and dials them. For a model in use that is done ahead, over and over: who serves
it, before what is known is too old (known_records.py); and of each span the best few peers, before
their round trips are forgotten (round_trips.py), which also keeps the connections to them. The next
trace, and whoever stands in for a lost peer, then find all of it. What is done for one model is the
runner's; here is when, and for which.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any, Final, TypeAlias, final

from glasshive.client.route import CHANCE, Chance
from glasshive.dht.errors import ShutOut, SwarmError

__all__ = ["LONGEST_WAIT_SECONDS", "WarmRoutes"]

log = logging.getLogger(__name__)

IN_USE_SECONDS: Final = 120.0
"""So long after a model was used last it is kept ready."""
WAIT_SECONDS: Final = 7.2
"""At least so long after one refresh comes the next."""
LONGEST_WAIT_SECONDS: Final = 9.8
"""And at most. Between the two by chance, so that clients don't come all at once."""
MOST_MODELS: Final = 4
CLOSE_SECONDS: Final = 5.0

Refresh: TypeAlias = Callable[[], Awaitable[None]]
"""Ask again what a model's next trace needs, within a few seconds. On the loop."""
Submit: TypeAlias = Callable[[Coroutine[Any, Any, None]], concurrent.futures.Future[None]]


@dataclass(eq=False)
class _Use:
    """How a model is used: by so many traces now, and until then it counts as used."""

    traces: int = 0
    until: float = 0.0
    kept: concurrent.futures.Future[None] | None = None


@final
class WarmRoutes:
    """The models in use of one connection, on whose loop `submit` runs coroutines.

    `clock` gives seconds, `sleep` waits, `chance` is of [0, 1). Nothing here makes a trace wait or
    fail. Nothing runs while no model is in use.
    """

    def __init__(
        self,
        submit: Submit,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        chance: Chance = CHANCE,
    ) -> None:
        self._submit = submit
        self._clock = clock
        self._sleep = sleep
        self._chance = chance
        self._lock = threading.Lock()  # held for no longer than it takes to look something up
        self._used: dict[Refresh, _Use] = {}  # that which was used last is the last one
        self._tasks: set[asyncio.Task[Any] | None] = set()
        self._closed = False

    @contextlib.contextmanager
    def in_use(self, refresh: Refresh, *, at_once: bool = False) -> Iterator[None]:
        """Inside, and for a while after, `refresh` is called again and again.

        For the first time after a while, unless `at_once`: a trace asks for itself what it needs.
        Called from any thread. Of too many models, that whose last trace ended longest ago is given
        up; only where all have traces that run, that whose last one began longest ago.
        """
        use = self._begin(refresh, at_once)
        try:
            yield
        finally:
            with self._lock:
                use.traces -= 1
                use.until = self._clock() + IN_USE_SECONDS
                if self._used.get(refresh) is use:  # now it is that which was used last
                    self._used[refresh] = self._used.pop(refresh)

    async def close(self) -> None:
        """End what runs, on the loop. Nothing is kept ready from then on."""
        with self._lock:
            self._closed = True
            self._used.clear()
        tasks = [one for one in self._tasks if one is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=CLOSE_SECONDS)

    def _begin(self, refresh: Refresh, at_once: bool) -> _Use:
        with self._lock:
            use = self._used.pop(refresh, None) or _Use()
            use.traces += 1
            if self._closed:
                return use
            self._used[refresh] = use
            if use.kept is None:
                with contextlib.suppress(SwarmError):  # closed meanwhile, as the trace will say
                    use.kept = self._submit(self._keep(refresh, use, at_once))
            if len(self._used) > MOST_MODELS:
                idle = (one for one, other in self._used.items() if not other.traces)
                given_up = self._used.pop(next(idle, next(iter(self._used))))
                if given_up.kept is not None:
                    given_up.kept.cancel()
        return use

    async def _keep(self, refresh: Refresh, use: _Use, at_once: bool) -> None:
        """Refresh one model while it is in use."""
        task = asyncio.current_task()
        self._tasks.add(task)
        try:
            if not at_once:
                await self._wait()
            while self._goes_on(refresh, use):
                try:
                    await refresh()
                except ShutOut as error:  # no later answer takes that back; a trace tells of it
                    log.debug("not_kept_warm", extra={"error": str(error)})
                    return
                except SwarmError as error:
                    log.debug("not_refreshed", extra={"error": str(error)})
                except Exception:
                    log.exception("refresh_failed")  # a bug of ours must not end the others
                await self._wait()
        finally:
            self._tasks.discard(task)
            self._give_up(refresh, use)

    async def _wait(self) -> None:
        spread_seconds = LONGEST_WAIT_SECONDS - WAIT_SECONDS
        await self._sleep(WAIT_SECONDS + spread_seconds * self._chance())

    def _goes_on(self, refresh: Refresh, use: _Use) -> bool:
        """Whether the model is still in use; if not, its next use begins anew."""
        with self._lock:
            if self._used.get(refresh) is not use:
                return False
            if use.traces or self._clock() < use.until:
                return True
            del self._used[refresh]
            return False

    def _give_up(self, refresh: Refresh, use: _Use) -> None:
        with self._lock:
            if self._used.get(refresh) is use:
                del self._used[refresh]
