"""Whom a failed job is to blame, by what its peers say of each other.

Seen failing, each alone: with the last of a circle taken for its cause; with the first of a chain;
with nobody heard out; with `_is_there` that is true of all.
"""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from glasshive.client import hearing
from glasshive.client.errors import BadAnswer, PeerError, PeerFailed, PeerLost
from glasshive.client.hearing import Hearing
from glasshive.client.relay import Relays
from glasshive.dht.transport import PeerAddress
from glasshive.graph.plan import Span
from glasshive.security.keys import PeerId

A, B, C = (PeerId(one) for one in "ABC")


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> dict[int, Any]:
    """Those of three peers that run their parts, and are not waited for."""
    monkeypatch.setattr(hearing, "ALIVE_SECONDS", 0.0)
    monkeypatch.setattr(hearing, "LISTEN_SECONDS", 0.01)
    return {
        part: SimpleNamespace(
            hop=SimpleNamespace(peer=PeerAddress(peer), state="running"), signs_of_life=0
        )
        for part, peer in enumerate((A, B, C))
    }


def lost(peer: PeerId) -> PeerLost:
    return PeerLost("gone", peer=peer)


def failed(peer: PeerId) -> PeerFailed:
    return PeerFailed("too large", code="OverBudget", node=None, peer=peer, span=Span(0, 2))


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("said", "cause", "parted"),
    [
        ([(A, lost(B))], 0, [(A, B)]),
        ([(A, lost(B)), (B, lost(A))], 0, [(A, B)]),
        ([(B, lost(A)), (A, lost(C))], 1, [(A, C)]),  # who says it first may be heard last
        ([(A, lost(C)), (B, lost(A)), (C, lost(B))], 0, [(A, C)]),
        ([(A, lost(B)), (B, lost(B))], 1, []),
        ([(A, lost(B)), (B, failed(B))], 1, []),
        ([(B, lost(A)), (A, lost(C)), (C, failed(C))], 2, []),
        ([(A, BadAnswer("nonsense", peer=B)), (B, lost(A))], 0, []),
    ],
)
@pytest.mark.parametrize("asked", [A, B])
async def test_who_led_the_others_to_it(
    said: list[tuple[PeerId, PeerError]],
    cause: int,
    parted: list[tuple[PeerId, PeerId]],
    asked: PeerId,
    streams: dict[int, Any],
) -> None:
    """By the word of whoever of those who said something is asked."""
    heard = Hearing(streams, silence_seconds=0.05)
    for peer, error in said:
        heard.ended(peer, error)
    errors = dict(said)
    if asked in errors:
        found = await heard.cause(asked, errors[asked], hear_others=True)
        assert found is said[cause][1]
        assert heard.parted == {frozenset(one) for one in parted}


@pytest.mark.asyncio
async def test_who_is_blamed_is_heard_out_until_it_only_says_that_it_is_there(
    streams: dict[int, Any],
) -> None:
    heard = Hearing(streams, silence_seconds=60.0)
    first, second = lost(B), failed(B)
    heard.ended(A, first)
    asking = asyncio.create_task(heard.cause(A, first, hear_others=True))
    await asyncio.sleep(0)
    streams[1].signs_of_life += 1  # may have been on its way
    await asyncio.sleep(0.05)
    assert not asking.done()
    heard.ended(B, second)
    assert await asking is second
    assert heard.parted == set()

    heard = Hearing(streams, silence_seconds=60.0)
    heard.ended(A, first)
    asking = asyncio.create_task(heard.cause(A, first, hear_others=True))
    await asyncio.sleep(0)
    streams[1].signs_of_life += 2
    assert await asking is first
    assert heard.parted == {frozenset((A, B))}


def test_who_takes_another_s_place_is_not_known_to_need_a_relay() -> None:
    """Seen failing with a `forget` that forgets nothing."""

    def hop(peer: PeerId) -> Any:
        return SimpleNamespace(peer=PeerAddress(peer))

    pairs = [frozenset((A, B)), frozenset((A, C))]
    relays = Relays(SimpleNamespace(), pairs, 1.0, lambda: 1.0, lambda n_bytes: None)  # type: ignore[arg-type]
    relays.forget(B)
    assert not relays.are_relayed(hop(A), hop(B))
    assert relays.are_relayed(hop(C), hop(A))
    assert not relays.add(hop(A), hop(C))
    assert relays.add(hop(B), hop(C))
