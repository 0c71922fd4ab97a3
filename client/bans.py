"""Peers that are left out for a while after trouble with them, for longer each time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final, NamedTuple, final

from glasshive.security.keys import PeerId

__all__ = ["BUSY_SECONDS", "LOST_SECONDS", "Bans"]

BUSY_SECONDS: Final = 1.0
"""The first ban of a peer that takes nothing more now: it is there, and free again soon."""
LOST_SECONDS: Final = 30.0
"""The first ban of a peer that was lost, or that broke the protocol."""
MOST_SECONDS: Final = 600.0
MOST_PEERS: Final = 1024


class _Ban(NamedTuple):
    troubles: int
    until: float


@final
class Bans:
    """Which peers are left out now, by a `clock` in seconds. Its methods may be called anywhere.

    A ban is over when its time is, or when the peer has served well. It lasts twice as long as the
    one before if there is trouble again within `MOST_SECONDS` of its end.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._bans: dict[PeerId, _Ban] = {}
        self._lock = threading.Lock()  # held for no longer than it takes to look something up

    def trouble(self, peer: PeerId, seconds: float) -> None:
        """Leave a peer out for that long, or longer if there was trouble with it before.

        What is told of while it is left out may be the same trouble, seen by another trace.
        """
        with self._lock:
            now = self._clock()
            before = self._bans.pop(peer, _Ban(0, now))
            if now < before.until:
                ban = _Ban(before.troubles, max(before.until, now + seconds))
            else:
                remembered = now < before.until + MOST_SECONDS
                troubles = before.troubles + 1 if remembered else 1
                # Far fewer doublings than these come to the longest ban.
                longer_seconds = seconds * 2 ** min(troubles - 1, 32)
                ban = _Ban(troubles, now + min(longer_seconds, MOST_SECONDS))
            self._bans[peer] = ban
            while len(self._bans) > MOST_PEERS:
                del self._bans[next(iter(self._bans))]  # that with which trouble is longest ago

    def served(self, peer: PeerId) -> None:
        """A peer has done its part to the end: nothing is held against it any more."""
        with self._lock:
            self._bans.pop(peer, None)

    def __contains__(self, peer: object) -> bool:
        with self._lock:
            ban = self._bans.get(peer)  # type: ignore[call-overload]
            return ban is not None and self._clock() < ban.until
