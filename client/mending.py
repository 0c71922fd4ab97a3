"""Edges between two peers of a job that break, though the client hears both: they are begun anew.

When that doesn't last, what goes between the two is relayed, and when that doesn't either, one of
them is taken for lost. What lasts until both have got further has been good, and the next break of
that edge is a first one again; but one that breaks again and again is relayed at some time, as a
peer is told of no more than so many changes.
"""

from __future__ import annotations

import asyncio
import math
from collections import defaultdict
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, final

from glasshive.client.hop import HopReport
from glasshive.client.peer_stream import PeerStream
from glasshive.client.relay import Relays
from glasshive.dht.messages import ALIVE_SECONDS

__all__ = ["Mending"]

MEND_AFTER_SECONDS: Final = 0.5
"""After which a peer that another has lost, and that is there, is tried again by that one."""
MENDS_BEFORE_RELAYING: Final = 1
"""So often a stream between two peers is opened anew, before what goes between them is relayed. A
dial into nowhere takes 12 s (peer/outgoing_edge.py)."""
MOST_MENDS: Final = 3
"""So often it is while that is relayed, before one of the two is taken for lost."""
MOST_BREAKS: Final = 8
"""So often an edge is opened anew in all, whatever was gained between, before it is relayed."""
MOVED_SECONDS: Final = 2 * ALIVE_SECONDS
"""A stage that is said to be done so long after a break was done after it."""


@dataclass(slots=True)
class _Breaks:
    """Of one edge: how many in all, and since both ends got further; when the last one was."""

    in_all: int = 0
    count: int = 0
    last_at: float = -math.inf


@final
class Mending:
    """Of one job. Belongs to the loop.

    `streams` are the trace streams, by the part, and `given` how often each part was given to a
    peer. `revise` has the peer of a part open its edges with another anew, and `start` runs work
    until the job ends.
    """

    def __init__(
        self,
        streams: Mapping[int, PeerStream],
        given: Sequence[int],
        relays: Relays,
        revise: Callable[[HopReport, int], Awaitable[None]],
        *,
        start: Callable[[Coroutine[None, None, None]], object],
        clock: Callable[[], float],
    ) -> None:
        self._streams = streams
        self._given = given
        self._relays = relays
        self._revise = revise
        self._start = start
        self._clock = clock
        # Edges, by the parts of both ends and how often these had been given.
        self._under_way: set[frozenset[tuple[int, int]]] = set()
        self._breaks: defaultdict[frozenset[int], _Breaks] = defaultdict(_Breaks)  # by both parts
        self._accused: set[tuple[int, int]] = set()

    def mend(self, hop: HopReport, other: HopReport) -> None:
        """The peer of a part says that its stream with another is gone."""
        ends = self._ends(hop, other)
        if ends not in self._under_way:
            self._under_way.add(ends)
            self._start(self._mend_soon(hop, other, ends))

    def mend_at_once(self, good: HopReport, bad: HopReport) -> None:
        """Two don't agree on what has come: relay, or else open their edge anew a last time.

        Their stream may hang.
        """
        breaks = self._breaks[frozenset((good.part.index, bad.part.index))]
        breaks.count = max(breaks.count, self._so_often(good, bad))
        breaks.last_at = self._clock()  # they have got no further
        self.mend(good, bad)

    def forget(self, part: int) -> None:
        """Another peer has that part now."""
        for edge in [one for one in self._breaks if part in one]:
            del self._breaks[edge]
        self._accused = {one for one in self._accused if one[0] != part}

    def carry(self, one: HopReport, other: HopReport) -> None:
        """Pass on what goes between two parts, if their peers can't reach each other."""
        self._relays.carry(self._streams[one.part.index], self._streams[other.part.index])

    def _so_often(self, one: HopReport, other: HopReport) -> int:
        """How often their edge is opened anew as it is, before something else is done."""
        return MOST_MENDS if self._relays.are_relayed(one, other) else MENDS_BEFORE_RELAYING

    def _ends(self, *hops: HopReport) -> frozenset[tuple[int, int]]:
        return frozenset((one.part.index, self._given[one.part.index]) for one in hops)

    async def _mend_soon(
        self, hop: HopReport, other: HopReport, ends: frozenset[tuple[int, int]]
    ) -> None:
        """Have both ends of an edge try again, if neither is seen to be gone by then."""
        await asyncio.sleep(MEND_AFTER_SECONDS)
        while "preparing" in (hop.state, other.state):  # noqa: ASYNC110 (of either, more than once)
            await asyncio.sleep(MEND_AFTER_SECONDS)
        self._under_way.discard(ends)
        if self._ends(hop, other) != ends or hop.state == "done":
            return
        breaks = self._breaks[frozenset((hop.part.index, other.part.index))]
        if min(hop.advanced_at, other.advanced_at) > breaks.last_at + MOVED_SECONDS:
            breaks.count = 0
        breaks.in_all += 1
        breaks.count += 1
        breaks.last_at = self._clock()
        is_relayed = self._relays.are_relayed(hop, other)
        is_enough = breaks.count > self._so_often(hop, other) or (
            breaks.in_all > MOST_BREAKS and not is_relayed
        )
        if is_enough and other.state != "done" and self._relays.add(hop, other):
            breaks.count = 0
        elif is_enough or other.state == "done":
            # One of them is lost. Whoever finds nobody in the same place is to blame itself.
            accused = hop.part.index, other.part.index
            to_blame, good = (hop, other) if accused in self._accused else (other, hop)
            if other.state == "done":
                to_blame, good = hop, other
            self._accused.add(accused)
            why = f"it and {good} lost each other {breaks.count} times"
            # What a peer that is done has got may be known to it alone.
            self._streams[to_blame.part.index].give_up(why, may_return=other.state == "done")
            return
        await self._revise(hop, other.part.index)
        if not self._streams[hop.part.index].given_up:
            await self._revise(other, hop.part.index)
        self.carry(hop, other)
