"""Who serves a model, as a client knows it: from the directory, asked no more often than needed."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, TypeVar, final

from glasshive.client.cancellation import Cancellation
from glasshive.client.coverage import NOT_QUANTISED, Kind, kind_of
from glasshive.client.errors import NoRoute
from glasshive.dht.errors import DeadlineExceeded, ShutOut, SwarmError, UnknownModel
from glasshive.dht.records import PeerRecord
from glasshive.security.keys import PeerId

if TYPE_CHECKING:
    from glasshive.client.swarm import Swarm

__all__ = ["KnownRecords"]

T = TypeVar("T")

log = logging.getLogger(__name__)

ASK_SECONDS: Final = 2.0
"""For who serves a model, where those who are known would do."""
FRESH_SECONDS: Final = 15.0
"""For so long after it was asked for, what is known of the peers is not asked for again."""
ASK_AGAIN_SECONDS: Final = 1.0
"""Between two questions of who waits for somebody. A directory keeps an answer for as long."""
LOOK_SECONDS: Final = 0.05
"""After which who waits while another thread asks looks whether it was cancelled."""


@final
class KnownRecords:
    """The peers of one model, in one dtype and attention, unquantised, of the last look-up.

    All routes that there are, so that a next one need not wait.
    """

    def __init__(self, swarm: Swarm, model_id: str, dtype: str, attention: str) -> None:
        self._swarm = swarm
        self._model_id = model_id
        self._kind = Kind(dtype, NOT_QUANTISED, attention)
        self._lock = threading.Lock()  # held while a thread asks; the loop asks meanwhile
        self._kept = threading.Lock()  # and this for as long as it takes to keep an answer
        self.now: list[PeerRecord] = []
        self._asked_at = -math.inf  # the question whose answer is known, on the monotonic clock
        self._fresh_until = -math.inf
        self.tried_at = -math.inf
        """When the last look-up began that has ended by now, answered or not; on that clock."""

    @property
    def are_fresh(self) -> bool:
        """Whether they were asked for of late, and are all still valid."""
        return (
            bool(self.now)
            and time.monotonic() < self._fresh_until
            and all(map(self.is_valid, self.now))
        )

    def is_valid(self, record: PeerRecord) -> bool:
        """Whether others take it now."""
        return record.expires_at_seconds >= self._swarm.transport.now()

    @property
    def signed(self) -> Mapping[PeerId, bytes]:
        """The records of all, as they signed them."""
        return {one.peer_id: one.signed for one in self.now}

    def get(
        self,
        *,
        fresh: bool,
        ends_at: float = math.inf,
        cancellation: Cancellation | None = None,
    ) -> list[PeerRecord]:
        """The peers as known of late, or else asked for again, until `ends_at` (monotonic).

        Those whose records are still valid do where the directory can't be asked, unless `fresh`.
        Raises TraceCancelled, also while another thread asks.
        """
        if not fresh:
            if self.are_fresh:
                return list(self.now)
            if self._valid():  # neither the directory nor another thread is waited for for long
                ends_at = min(ends_at, time.monotonic() + ASK_SECONDS)
        try:
            with self._turn(ends_at, cancellation):
                if fresh or not self.are_fresh:  # another thread may have asked meanwhile
                    self._look_up(ends_at, cancellation)
                return list(self.now)
        except ShutOut:
            raise
        except SwarmError:
            if fresh or not (valid := self._valid()):
                raise
            return valid

    def _valid(self) -> list[PeerRecord]:
        return [one for one in self.now if self.is_valid(one)]

    def _look_up(self, ends_at: float, cancellation: Cancellation | None) -> None:
        began = time.monotonic()
        left_seconds = max(ends_at - began, 0.0)
        try:
            found = self._swarm.look_up(self._model_id, left_seconds, cancellation)
            self._learn(found, began)
        except UnknownModel:  # its last peer withdrew: the route says what is missing
            self._learn([], began)
        finally:
            self._tried(began)

    @contextmanager
    def _turn(self, ends_at: float, cancellation: Cancellation | None) -> Iterator[None]:
        """Inside it no other thread asks. Raises DeadlineExceeded if that takes too long."""
        while not self._lock.acquire(timeout=LOOK_SECONDS):
            if cancellation is not None:
                cancellation.check()
            if time.monotonic() > ends_at:
                raise DeadlineExceeded("another trace was still asking who serves the model")
        try:
            yield
        finally:
            self._lock.release()

    async def ask(self, within_seconds: float = ASK_SECONDS) -> None:
        """Ask the directory again, on the loop, and keep what is known if it doesn't answer.

        Raises ShutOut, which no later answer takes back. Then the next trace asks, and tells of it.
        """
        began = time.monotonic()
        try:
            self._learn(await self._swarm.ask_records(self._model_id, within_seconds), began)
        except UnknownModel:
            self._learn([], began)
        except ShutOut:
            with self._kept:
                self._fresh_until = -math.inf
            raise
        except SwarmError as error:
            log.debug("directory_silent", extra={"error": str(error)})
        finally:
            self._tried(began)

    async def until(
        self,
        choose: Callable[[], T],
        left_seconds: Callable[[], float],
        ends_at: float = math.inf,
    ) -> T:
        """What `choose` gives of what is known, asked for again and again while it raises NoRoute.

        On the loop. Raises that NoRoute when no time is left, and ShutOut. `left_seconds` says for
        how long it is waited, though it is asked once at least; at `ends_at` (monotonic) all ends.
        """
        while True:
            if (seconds := min(ends_at - time.monotonic(), ASK_SECONDS)) > 0:
                await self.ask(seconds)
            try:
                return choose()
            except NoRoute:
                seconds = min(left_seconds(), ends_at - time.monotonic(), ASK_AGAIN_SECONDS)
                if seconds <= 0:
                    raise
            await asyncio.sleep(seconds)

    def _learn(self, records: Iterable[PeerRecord], asked_at: float) -> None:
        """Keep what the directory has just said, unless a newer question was answered before.

        Of a peer whose older record it gives, the one that is known stays: not every bootstrap peer
        hears of all at once.
        """
        found = [one for one in records if kind_of(one) == self._kind]
        with self._kept:
            if asked_at >= self._asked_at:
                known = {one.peer_id: one for one in self._valid()}
                self.now = [_newer(one, known.get(one.peer_id)) for one in found]
                self._asked_at = asked_at
                self._fresh_until = asked_at + FRESH_SECONDS

    def _tried(self, began: float) -> None:
        """A look-up has ended. It never goes back: one that began before may end after."""
        with self._kept:
            self.tried_at = max(self.tried_at, began)


def _newer(record: PeerRecord, known: PeerRecord | None) -> PeerRecord:
    """The one of a peer's two records that it announced later."""
    return max((record, known or record), key=lambda one: one.announced_at_seconds)
