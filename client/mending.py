"""Edges between two peers of a job that break, though the client hears both: they are begun anew.

When that doesn't last, what goes between the two is relayed, and when that doesn't either, one of
them is taken for lost.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Final, final

from glasshive.client.hop import HopReport
from glasshive.client.peer_stream import PeerStream
from glasshive.client.relay import Relays

__all__ = ["Mending"]

MEND_AFTER_SECONDS: Final = 0.5
"""After which a peer that another has lost, and that is there, is tried again by that one."""
MENDS_BEFORE_RELAYING: Final = 1
"""So often a stream between two peers is opened anew, before what goes between them is relayed. A
dial into nowhere takes 12 s (peer/outgoing_edge.py)."""
MOST_MENDS: Final = 3
"""So often it is while that is relayed, before one of the two is taken for lost."""


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
    ) -> None:
        self._streams = streams
        self._given = given
        self._relays = relays
        self._revise = revise
        self._start = start
        # Edges, by the parts of both ends and how often these had been given.
        self._under_way: set[frozenset[tuple[int, int]]] = set()
        self._mended: Counter[frozenset[int]] = Counter()  # by the parts of both ends
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
        edge = frozenset((good.part.index, bad.part.index))
        self._mended[edge] = max(self._mended[edge], self._so_often(good, bad))
        self.mend(good, bad)

    def forget(self, part: int) -> None:
        """Another peer has that part now."""
        for edge in [one for one in self._mended if part in one]:
            del self._mended[edge]

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
        edge = frozenset((hop.part.index, other.part.index))
        await asyncio.sleep(MEND_AFTER_SECONDS)
        while "preparing" in (hop.state, other.state):  # noqa: ASYNC110 (of either, more than once)
            await asyncio.sleep(MEND_AFTER_SECONDS)
        self._under_way.discard(ends)
        if self._ends(hop, other) != ends or hop.state == "done":
            return
        self._mended[edge] += 1
        is_enough = self._mended[edge] > self._so_often(hop, other)
        if is_enough and other.state != "done" and self._relays.add(hop, other):
            self._mended[edge] = 0
        elif is_enough or other.state == "done":
            # One of them is lost. Whoever finds nobody in the same place is to blame itself.
            accused = hop.part.index, other.part.index
            to_blame, good = (hop, other) if accused in self._accused else (other, hop)
            if other.state == "done":
                to_blame, good = hop, other
            self._accused.add(accused)
            why = f"it and {good} lost each other {self._mended[edge]} times"
            self._streams[to_blame.part.index].give_up(why)
            return
        await self._revise(hop, other.part.index)
        await self._revise(other, hop.part.index)
        self.carry(hop, other)
