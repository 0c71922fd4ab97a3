"""What members of a private swarm have used of this host today, against their quotas.

Rules:

1. Each host counts for itself, by the quota in the certificate that the member has last shown.
2. A day is one of UTC. It is one number for each member, the same on every host, and anybody can
   say when more is free; the price is that around midnight a member may use two days' worth.
3. A trace takes what it was estimated at from its admission on, and what it really took from its
   end on, on the day of its end, whatever the end was. A trace that was ended while the device
   still ran it ends when the device has left it.
4. The file says both from the beginning, so that a process which is killed in the middle of a
   trace has charged the estimate. It is written by a thread of its own; what a disk refuses is
   logged, and still counted in memory.
5. Counted are members with a quota over a day, at most `MAX_MEMBERS` of them a day; further ones
   are refused until the next.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, final

from glasshive.peer.errors import QuotaExceeded
from glasshive.security.durable_file import read_durable, write_durable
from glasshive.security.errors import MembershipFileError, SecurityError
from glasshive.security.keys import PeerId, peer_id_of, public_key_of
from glasshive.security.plain import decode_plain, encode_plain
from glasshive.security.quota import Quota

log = logging.getLogger(__name__)

DAY_SECONDS: Final = 86_400
MAX_MEMBERS: Final = 4096
MAX_FILE_BYTES: Final = 1 << 20
CLOSE_SECONDS: Final = 5.0

_VERSION: Final = 1


@dataclass(slots=True)
class _Use:
    """Of one member: used today, and taken by traces that run."""

    seconds: float = 0.0
    saved_bytes: int = 0


@final
class Quotas:
    """The counts of one host, kept in `place`. `clock` gives seconds since 1970.

    All may be called from any thread. Raises MembershipFileError for a file that can't be read.
    """

    def __init__(self, place: Path, *, clock: Callable[[], float] = time.time) -> None:
        self._place = place
        self._clock = clock
        self._lock = threading.RLock()
        self._day, self._used = self._read()
        self._running: dict[PeerId, list[QuotaHold]] = {}
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="quotas")
        self._written: Future[None] | None = None  # or will be, by the last task of the writer
        self._waits = False  # that task has not begun to look
        self._closed = False

    def begin(self, client: PeerId, quota: Quota) -> QuotaHold:
        """A trace of this member, counted until it is settled.

        Raises QuotaExceeded if as many as it may have are running, or nothing is left of its day.
        """
        with self._lock:
            running = self._running.get(client, [])
            if quota.traces is not None and len(running) >= quota.traces:
                full = ", and as many are running; wait until one has ended, or"
                raise QuotaExceeded(
                    f"your quota of traces at a time on this host is {quota.traces}"
                    f"{full if quota.traces else ';'} ask who runs the swarm for a larger one"
                )
            taken = self._taken(client)
            for limit, n, unit in (
                (quota.seconds_a_day, taken.seconds, "s of computing"),
                (quota.saved_bytes_a_day, taken.saved_bytes, "saved bytes"),
            ):
                if limit is not None and n >= limit:
                    raise QuotaExceeded(
                        f"your quota is {limit} {unit} a day on this host, and {_said(n)} are used "
                        f"or taken by what runs; {self._when()}"
                    )
            if quota.by_day and client not in self._used and len(self._used) >= MAX_MEMBERS:
                raise QuotaExceeded(
                    f"{MAX_MEMBERS} members with quotas have used this host today, and it counts "
                    f"no more; {self._when()}"
                )
            if quota.by_day:
                self._used.setdefault(client, _Use())
            hold = QuotaHold(self, client, quota)
            self._running.setdefault(client, []).append(hold)
            return hold

    def close(self) -> None:
        """Write what is not written yet, within `CLOSE_SECONDS`.

        Of a trace that ends later the estimate stays.
        """
        with self._lock:
            self._closed = True
        self._writer.shutdown(wait=False)
        if self._written is not None:
            wait_for([self._written], CLOSE_SECONDS)

    def _reserve(self, hold: QuotaHold, seconds: float, saved_bytes: int) -> None:
        with self._lock:
            quota, taken = hold.quota, self._taken(hold.client)
            for limit, n, new, unit in (
                (quota.seconds_a_day, taken.seconds, seconds, "s of computing"),
                (quota.saved_bytes_a_day, taken.saved_bytes, saved_bytes, "saved bytes"),
            ):
                if limit is not None and n + new > limit:
                    raise QuotaExceeded(
                        f"this trace takes about {_said(new)} {unit} here, and of your quota of "
                        f"{limit} a day on this host {_said(n)} are used or taken by what runs; "
                        f"trace less at a time; {self._when()}"
                    )
            hold.seconds, hold.saved_bytes = seconds, saved_bytes
            self._write_soon(quota)

    def _settle(self, hold: QuotaHold, seconds: float, saved_bytes: int) -> None:
        with self._lock:
            running = self._running[hold.client]
            running.remove(hold)
            if not running:
                del self._running[hold.client]
            self._today()
            taken = seconds or saved_bytes or hold.seconds or hold.saved_bytes
            if hold.quota.by_day and taken:
                use = self._used.setdefault(hold.client, _Use())
                use.seconds += seconds
                use.saved_bytes += saved_bytes
                self._write_soon(hold.quota)

    def _taken(self, client: PeerId) -> _Use:
        self._today()
        used = self._used.get(client, _Use())
        running = self._running.get(client, ())
        return _Use(
            used.seconds + sum(one.seconds for one in running),
            used.saved_bytes + sum(one.saved_bytes for one in running),
        )

    def _today(self) -> None:
        day = int(self._clock() // DAY_SECONDS)
        if day != self._day:
            self._day, self._used = day, {}

    def _when(self) -> str:
        """When more is free, and what else helps."""
        free_at = (self._day + 1) * DAY_SECONDS
        left = max(round((free_at - self._clock()) / 60), 1)
        return (
            f"more is free at {datetime.fromtimestamp(free_at, UTC):%Y-%m-%d %H:%M} UTC, in "
            f"{left // 60} h {left % 60} min; ask who runs the swarm for a larger quota"
        )

    # The file -----------------------------------------------------------------------------------

    def _write_soon(self, quota: Quota) -> None:
        if quota.by_day and not self._waits and not self._closed:
            self._waits = True
            self._written = self._writer.submit(self._write)

    def _write(self) -> None:
        with self._lock:
            self._waits = False
            self._today()
            holds = [one for each in self._running.values() for one in each]
            rows = []
            for client in self._used.keys() | {one.client for one in holds if one.quota.by_day}:
                taken = self._taken(client)
                milliseconds = round(taken.seconds * 1000)
                rows.append([public_key_of(client), milliseconds, taken.saved_bytes])
            data = encode_plain([_VERSION, self._day, rows])
        try:
            write_durable(self._place, data)
        except OSError as error:
            log.exception("quotas_not_kept", extra={"error": str(error)})

    def _read(self) -> tuple[int, dict[PeerId, _Use]]:
        try:
            data = read_durable(self._place, MAX_FILE_BYTES)
            return _decoded(data) if data else (0, {})
        except (OSError, SecurityError, ValueError) as error:
            raise MembershipFileError(
                f"can't read what members have used of this host: {error}; correct that, or remove "
                f"{self._place}, and the counts of today begin at 0"
            ) from None


@final
class QuotaHold:
    """One running trace in the counts. Makes itself part of them at `Quotas.begin`."""

    def __init__(self, quotas: Quotas, client: PeerId, quota: Quota) -> None:
        self.client = client
        self.quota = quota
        self.seconds = 0.0
        self.saved_bytes = 0
        self._quotas = quotas

    def reserve(self, seconds: float, saved_bytes: int) -> None:
        """Take so much of the day, as estimated; raises QuotaExceeded if that isn't left."""
        self._quotas._reserve(self, seconds, saved_bytes)

    def settle(self, seconds: float, saved_bytes: int) -> None:
        """The trace has ended, and took so much. To be called once."""
        self._quotas._settle(self, seconds, saved_bytes)


def _decoded(data: bytes) -> tuple[int, dict[PeerId, _Use]]:
    fields = decode_plain(
        data, max_bytes=MAX_FILE_BYTES, max_depth=3, max_elements=8 * (MAX_MEMBERS + 8)
    )
    match fields:
        case [int(version), int(day), list(rows)] if version == _VERSION:
            return day, dict(map(_row, rows))
    raise ValueError("it is damaged, or of another release of glasshive")


def _row(row: object) -> tuple[PeerId, _Use]:
    match row:
        case [bytes(key), int(milliseconds), int(saved_bytes)]:
            return peer_id_of(key), _Use(milliseconds / 1000, saved_bytes)
    raise ValueError("a count in it is damaged")


def _said(n: float) -> str:
    return str(n) if isinstance(n, int) else f"{n:.3g}" if n < 100 else f"{n:.0f}"
