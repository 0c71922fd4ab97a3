"""Whom one trace leaves out: for good, or until they have announced themselves anew.

A peer that is lost may come back: its process or its network daemon is started again, under the
same key. That is seen in its record, which it signs anew when it is there. A record of before the
loss says nothing, also where a directory still gives it.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Final, NamedTuple, final

from glasshive.client.errors import PeerBusy, PeerError, PeerLost
from glasshive.dht.records import PeerRecord
from glasshive.security.keys import PeerId

__all__ = ["RETURN_SECONDS", "LeftOut"]

RETURN_SECONDS: Final = 25.0
"""So long a trace waits for a lost peer to come back, or for another of its kind. Peers announce
themselves every 20 s, so that by then all who are there have been seen."""
MOST_LOSSES: Final = 3
"""So often in a row a peer is lost before it is left out for good, if nothing was gained between:
what it is given may be what ends it."""


class _Loss(NamedTuple):
    at: float  # swarm time; infinite: for good
    seen_at: float  # by the clock


@final
class LeftOut:
    """Of one trace, all of its tries. `now` gives swarm time.

    It may be used on two threads, one after the other.
    """

    def __init__(
        self,
        for_good: Iterable[PeerId] = (),
        *,
        now: Callable[[], float],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._now = now
        self._clock = clock
        self._losses = {peer: _Loss(math.inf, -math.inf) for peer in for_good}
        self._heeded: list[PeerError] = []
        self._in_a_row: Counter[PeerId] = Counter()

    def heed(self, error: PeerError, *, for_good: bool = False) -> None:
        """Leave out who is to blame, once for each error.

        Who was lost or busy is back when it has announced itself since; who broke the protocol, or
        refused, doesn't come back. Who is said to be there is not left out at all.
        """
        if any(error is one for one in self._heeded):
            return
        self._heeded.append(error)
        if isinstance(error, PeerLost) and error.is_there and not for_good:
            return
        self._in_a_row[error.peer] += isinstance(error, PeerLost)
        is_worn_out = self._in_a_row[error.peer] >= MOST_LOSSES
        may_return = isinstance(error, PeerLost | PeerBusy) and not for_good and not is_worn_out
        before = self._losses.get(error.peer)
        if before is None or before.at < math.inf:
            at = self._now() if may_return else math.inf
            self._losses[error.peer] = _Loss(at, self._clock())

    def forgive(self, peer: PeerId) -> None:
        """It was not lost: only another peer has lost it. Who is left out for good stays so."""
        loss = self._losses.get(peer)
        if loss is not None and loss.at < math.inf:
            del self._losses[peer]

    def gained(self) -> None:
        """What was given to peers that came back has got further than before."""
        self._in_a_row.clear()

    def among(self, records: Iterable[PeerRecord]) -> set[PeerId]:
        """Who is left out, but those of these that announced themselves since they were lost."""
        back = {
            one.peer_id
            for one in records
            if one.peer_id in self._losses
            and one.announced_at_seconds > self._losses[one.peer_id].at
        }
        return self._losses.keys() - back

    def left_seconds(self, peer: PeerId) -> float:
        """How much longer it is waited for; 0 or less if it is not."""
        return RETURN_SECONDS - self.gone_seconds(peer)

    def gone_seconds(self, peer: PeerId) -> float:
        """For how long it has been known to be lost; endless if it is not waited for."""
        loss = self._losses.get(peer)
        if loss is None or loss.at == math.inf:
            return math.inf
        return self._clock() - loss.seen_at
