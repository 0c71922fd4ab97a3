"""Whom one trace leaves out: for good, or until they have announced themselves anew.

A peer that is lost may come back: its process or its network daemon is started again, under the
same key. That is seen in its record, which it signs anew when it is there, and every 20 s. A record
of before the loss says nothing, though a directory may still give it, or for the first time. When
it was signed says its peer's clock, which others let be up to 10 s ahead, or behind. So a record
counts if it is of after the loss by that clock, and newer than what was known of the peer after the
first look-up that followed the loss at once: nobody is back so soon. Hence

- a clock that is ahead brings nobody back by a record of before the loss, unless nobody looked for
  that within a second of it;
- who is back so soon, or has a clock that is behind, is seen to be by a later record.

A record that is newer than the one by which the peer was dialled counts at once where it names
other addresses, as the peer was started again there; and any newer one of who refused because
records were out of date, as it is there.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final, final

from glasshive.client.errors import (
    BadAnswer,
    PeerBusy,
    PeerError,
    PeerFailed,
    PeerLost,
)
from glasshive.dht.records import PeerRecord
from glasshive.security.keys import PeerId

__all__ = ["BUSY", "LOST", "RETURN_SECONDS", "LeftOut", "what_became"]

LOST: Final = "lost"
BUSY: Final = "busy"
"""What may become of a peer, and pass."""
RETURN_SECONDS: Final = 25.0
"""So long a trace waits for a lost peer to come back, or for another of its kind. Peers announce
themselves every 20 s, so that by then all who are there have been seen."""
SOON_SECONDS: Final = 1.0
"""So soon after a loss what a look-up gives of the peer is of before the loss."""
MOST_LOSSES: Final = 3
"""So often in a row a peer is lost before it is left out for good, if nothing was gained between:
what it is given may be what ends it."""


@dataclass(slots=True)
class _Loss:
    at: float  # swarm time; infinite: for good
    seen_at: float  # by the clock
    why: str
    dialled: PeerRecord | None = None  # by which record
    is_outdated: bool = False  # that, or what it was shown of others
    newest_at: float = -math.inf  # by its own clock: of its newest record that is of before
    is_newest: bool = False  # that was looked for after the loss

    def is_news(self, record: PeerRecord) -> bool:
        """Whether it says at once that the peer is there, or is now elsewhere."""
        return (
            self.at < math.inf
            and self.dialled is not None
            and self.dialled.announced_at_seconds < record.announced_at_seconds
            and (self.is_outdated or self.dialled.addresses != record.addresses)
        )


@final
class LeftOut:
    """Of one trace, all of its tries.

    `now` gives swarm time, and `tried_at` when, by the clock, the last look-up began of those that
    have ended, answered or not.

    It may be used on two threads, one after the other.
    """

    def __init__(
        self,
        for_good: Iterable[PeerId] = (),
        *,
        now: Callable[[], float],
        tried_at: Callable[[], float],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._now = now
        self._tried_at = tried_at
        self._clock = clock
        self._losses = {peer: _Loss(math.inf, -math.inf, "named in avoid=") for peer in for_good}
        self._heeded: list[PeerError] = []
        self._dialled: dict[PeerId, PeerRecord] = {}  # by which record, the last time
        self._in_a_row: Counter[PeerId] = Counter()

    def dialled(self, records: Iterable[PeerRecord]) -> None:
        """These are tried, by these records of them."""
        self._dialled |= {one.peer_id: one for one in records}

    def heed(self, error: PeerError, *, for_good: bool = False) -> None:
        """Leave out who is to blame, once for each error.

        Who was lost or busy is back when it has announced itself since, and so is who refused
        because a record was out of date; who broke the protocol, failed, or refused for another
        reason doesn't come back. Who is said to be there is not left out at all.
        """
        if any(error is one for one in self._heeded):
            return
        self._heeded.append(error)
        if isinstance(error, PeerLost) and error.is_there and not for_good:
            return
        is_outdated = isinstance(error, PeerFailed) and error.is_outdated
        is_lost = isinstance(error, PeerLost) or is_outdated
        self._in_a_row[error.peer] += is_lost
        is_worn_out = self._in_a_row[error.peer] >= MOST_LOSSES
        may_return = (is_lost or isinstance(error, PeerBusy)) and not for_good and not is_worn_out
        before = self._losses.get(error.peer)
        if before is None or before.at < math.inf:
            at = self._now() if may_return else math.inf
            loss = _Loss(at, self._clock(), what_became(error), is_outdated=is_outdated)
            if (dialled := self._dialled.get(error.peer)) is not None:
                loss.dialled, loss.newest_at = dialled, dialled.announced_at_seconds
            self._losses[error.peer] = loss

    def forgive(self, *peers: PeerId) -> None:
        """Only other peers have lost them. Who is left out for good stays so."""
        for peer in peers:
            loss = self._losses.get(peer)
            if loss is not None and loss.at < math.inf:
                del self._losses[peer]

    def gained(self) -> None:
        """What was given to peers that came back has got further than before."""
        self._in_a_row.clear()

    def __contains__(self, peer: PeerId) -> bool:
        """Whether it is left out unless it has announced itself since."""
        return peer in self._losses

    def why(self, peer: PeerId) -> str:
        """In a word or two, why it is left out; empty if it isn't."""
        loss = self._losses.get(peer)
        return "" if loss is None else loss.why

    def among(self, records: Iterable[PeerRecord]) -> set[PeerId]:
        """Who is left out, but those that announced themselves since they were lost.

        `records` are all that are known.
        """
        known = {one.peer_id: one for one in records}
        tried_at, out = self._tried_at(), set()
        for peer, loss in self._losses.items():
            record = known.get(peer)
            at = -math.inf if record is None else record.announced_at_seconds
            if record is not None and loss.is_news(record):
                continue
            if not loss.is_newest and tried_at < loss.seen_at + SOON_SECONDS:
                loss.newest_at = max(loss.newest_at, at)
            loss.is_newest |= tried_at >= loss.seen_at
            if at <= max(loss.at, loss.newest_at):
                out.add(peer)
        return out

    def may_return(self, records: Iterable[PeerRecord]) -> list[PeerRecord]:
        """Who of those left out may still come back, by the records by which they were dialled.

        The one that is waited for longest first; also who is not waited for any more. `records` are
        all that are known.
        """
        peers = [one for one in self.among(records) if self.gone_seconds(one) < math.inf]
        peers.sort(key=self.left_seconds, reverse=True)
        return [self._dialled[one] for one in peers if one in self._dialled]

    def left_seconds(self, peer: PeerId) -> float:
        """How much longer it is waited for; 0 or less if it is not."""
        return RETURN_SECONDS - self.gone_seconds(peer)

    def gone_seconds(self, peer: PeerId) -> float:
        """For how long it has been known to be lost; endless if it is not waited for."""
        loss = self._losses.get(peer)
        if loss is None or loss.at == math.inf:
            return math.inf
        return self._clock() - loss.seen_at


def what_became(error: PeerError) -> str:
    """Of the peer to blame, in a word or two."""
    if isinstance(error, PeerLost):
        return LOST
    if isinstance(error, PeerBusy):
        return BUSY
    if isinstance(error, BadAnswer):
        return "broke the protocol"
    is_failure = isinstance(error, PeerFailed) and error.is_own_fault and not error.is_outdated
    return "failed" if is_failure else "refused"
