"""How often an edge that breaks is begun anew, before the client relays or blames one of its ends.

Peers are played here, and each break is said as soon as the last one is mended.

Seen failing, each alone: with breaks that are counted over the whole job; with a count that is
forgotten as soon as one end got further, or by what was said right behind a break; with
`mend_at_once` that sets no time.
"""

from __future__ import annotations

import asyncio
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from glasshive.client import mending
from glasshive.client.hop import HopReport
from glasshive.client.mending import (
    MENDS_BEFORE_RELAYING,
    MOST_BREAKS,
    MOST_MENDS,
    MOVED_SECONDS,
    Mending,
)
from glasshive.dht.transport import PeerAddress
from glasshive.graph.graph import Graph
from glasshive.graph.plan import Part, Span
from glasshive.security.keys import Identity


class Played:
    """Two parts that run, what is done about the edge between them, and the time."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.hops = [
            HopReport(
                PeerAddress(Identity.generate().peer_id),
                Part(i, Span(2 * i, 2 * i + 2), Graph({}), (), {}),
                "running",
            )
            for i in range(2)
        ]
        self.revised: list[tuple[int, int]] = []
        self.blamed: list[int] = []
        self.is_relayed = False
        self._tasks: list[asyncio.Task[None]] = []
        self.may_return = False
        self.streams: Any = {
            i: SimpleNamespace(give_up=partial(self._give_up, i), given_up="") for i in range(2)
        }
        relays: Any = SimpleNamespace(
            are_relayed=lambda one, other: self.is_relayed,
            add=self._add,
            carry=lambda one, other: None,
        )
        self.mending = Mending(
            *(self.streams, [1, 1], relays, self._revise),
            start=lambda work: self._tasks.append(asyncio.ensure_future(work)),
            clock=lambda: self.now,
        )

    def _add(self, one: HopReport, other: HopReport) -> bool:
        is_new, self.is_relayed = not self.is_relayed, True
        return is_new

    def _give_up(self, part: int, why: str, *, may_return: bool = False) -> None:
        self.blamed.append(part)
        self.may_return = may_return

    async def _revise(self, hop: HopReport, part: int) -> None:
        self.revised.append((hop.part.index, part))

    async def settled(self) -> None:
        await asyncio.gather(*self._tasks)
        self._tasks.clear()

    async def breaks(self, seconds: float = 1.0) -> None:
        """The edge breaks, so long after what was before, and that has been dealt with."""
        self.now += seconds
        self.mending.mend(*self.hops)
        await self.settled()

    def advance(self, *parts: int, after_seconds: float = MOVED_SECONDS + 0.1) -> None:
        """These say that they have done one more stage."""
        self.now += after_seconds
        for part in parts:
            self.hops[part].advanced_at = self.now


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Played:
    monkeypatch.setattr(mending, "MEND_AFTER_SECONDS", 0.0)
    return Played()


@pytest.mark.asyncio
@pytest.mark.parametrize("is_relayed", [False, True])
async def test_breaks_between_which_both_get_further_are_mended(
    is_relayed: bool, played: Played
) -> None:
    """So often that a peer would have been told of too many changes they are relayed."""
    played.is_relayed = is_relayed
    for _ in range(MOST_BREAKS):
        await played.breaks()
        played.advance(0, 1)
    assert played.is_relayed == is_relayed
    for _ in range(2 * MOST_BREAKS):
        await played.breaks()
        played.advance(0, 1)
    assert played.revised == [(0, 1), (1, 0)] * 3 * MOST_BREAKS
    assert played.is_relayed
    assert played.blamed == []


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("moving", "after_seconds"), [((), 60.0), ((0,), 60.0), ((1,), 60.0), ((0, 1), 1.0)], ids=str
)
async def test_breaks_without_that_are_counted_however_far_apart(
    moving: tuple[int, ...], after_seconds: float, played: Played
) -> None:
    """What is heard right behind a break may have been done before it."""
    for _ in range(MENDS_BEFORE_RELAYING):
        await played.breaks(60)
        assert not played.is_relayed
        played.advance(*moving, after_seconds=after_seconds)
    await played.breaks()
    assert played.is_relayed
    for _ in range(MOST_MENDS):
        await played.breaks(60)
        assert played.blamed == []
        played.advance(*moving, after_seconds=after_seconds)
    await played.breaks()
    assert played.blamed == [1]


@pytest.mark.asyncio
async def test_who_do_not_agree_are_relayed_at_once_and_then_one_is_lost(played: Played) -> None:
    """Though both have got further since their edge broke."""
    await played.breaks()
    played.advance(0, 1)
    played.now += 15
    played.mending.mend_at_once(*played.hops)
    await played.settled()
    assert played.is_relayed
    played.advance(0, 1)
    played.now += 15
    played.mending.mend_at_once(*played.hops)
    await played.settled()
    assert played.blamed == [1]


async def lost_for_good(played: Played) -> int:
    """Whom the first part's accusation leads to."""
    n_blamed = len(played.blamed)
    while len(played.blamed) == n_blamed:
        await played.breaks()
    return played.blamed[-1]


@pytest.mark.asyncio
async def test_who_takes_an_accuser_s_place_has_accused_nobody(played: Played) -> None:
    """Seen failing with accusations that outlive the peer that made them: [1, 0, 0]."""
    assert await lost_for_good(played) == 1
    played.mending.forget(1)
    assert await lost_for_good(played) == 0  # which finds nobody good in that place
    played.mending.forget(0)
    assert await lost_for_good(played) == 1


@pytest.mark.asyncio
async def test_who_has_lost_a_peer_that_is_done_may_come_back(played: Played) -> None:
    """That its values have come may have been lost on the way."""
    played.hops[1].state = "done"
    await played.breaks()
    assert played.blamed == [0]
    assert played.may_return


@pytest.mark.asyncio
async def test_one_of_two_is_given_up_when_no_more_changes_can_be_told(played: Played) -> None:
    async def wear_out(hop: HopReport, part: int) -> None:
        played.streams[hop.part.index].given_up = "64 times it was told of other peers"
        played.revised.append((hop.part.index, part))

    played.mending._revise = wear_out
    await played.breaks()
    assert played.revised == [(0, 1)]
