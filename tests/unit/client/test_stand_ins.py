"""Who may stand in for a lost host of a generation: whom others of the plan can be shown."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from played_swarm import BLOCKS, Swarm, every_block, no_return, runner_of

from glasshive.client import known_records, left_out
from glasshive.client.demand import Demand
from glasshive.client.errors import NoRoute, PeerFailed, PeerLost
from glasshive.client.experiment import TraceOptions
from glasshive.client.left_out import LeftOut
from glasshive.dht.records import PeerRecord
from glasshive.graph.plan import Span

__all__ = ["every_block", "no_return"]  # fixtures of every test


def expired(record: PeerRecord, swarm: Swarm) -> PeerRecord:
    return replace(record, expires_at_seconds=swarm.transport.now() - 1.0)


async def stand_in(model: Any, hosts: list[PeerRecord], receivers: tuple[int, ...]) -> PeerRecord:
    """For the host of part 0, which was lost."""
    out = model.router.tries(TraceOptions()).left_out
    out.dialled(hosts)
    out.heed(PeerLost("gone", peer=hosts[0].peer_id))
    return await stand_in_of(model, hosts, out, receivers)


async def stand_in_of(
    model: Any, hosts: list[PeerRecord], out: LeftOut, receivers: tuple[int, ...] = ()
) -> PeerRecord:
    options, demand = TraceOptions(), Demand()
    found = await model.router.stand_in(hosts, options, demand, out, 0, lambda: receivers)
    return found  # type: ignore[no-any-return]


@pytest.mark.asyncio
@pytest.mark.parametrize("returns", [False, True])
async def test_nobody_is_shown_a_receiver_s_record_that_has_expired(
    returns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen to be shown it, to refuse it, and to be left out for good, with a directory that was
    back soon after."""
    monkeypatch.setattr(left_out, "RETURN_SECONDS", 20.0 if returns else 0.0)
    monkeypatch.setattr(known_records, "ASK_AGAIN_SECONDS", 0.01)
    swarm = Swarm()
    lost, other, last = (*(swarm._record(0, 2) for _ in range(2)), swarm._record(2, BLOCKS))
    swarm.known = [lost, other, expired(last, swarm)]
    model: Any = runner_of(swarm)
    model.router.records.get(fresh=True)
    records, asked = swarm.records, len(swarm.given_seconds)

    def answer(*args: Any) -> list[PeerRecord]:
        if len(swarm.given_seconds) > asked + 1:
            swarm.known = [other, last]
        return records(*args)

    monkeypatch.setattr(swarm, "records", answer)
    hosts = [lost, expired(last, swarm)]
    if returns:
        assert await stand_in(model, hosts, (1,)) == other
    else:
        with pytest.raises(NoRoute, match=f"nobody says where {last.peer_id} is now"):
            await stand_in(model, hosts, (1,))


@pytest.mark.asyncio
async def test_a_receiver_of_which_nobody_tells_any_more_is_where_its_valid_record_says() -> None:
    swarm = Swarm()
    lost, other, last = (*(swarm._record(0, 2) for _ in range(2)), swarm._record(2, BLOCKS))
    swarm.known = [lost, other]
    assert await stand_in(runner_of(swarm), [lost, last], (1,)) == other


@pytest.mark.asyncio
async def test_who_is_shown_to_others_needs_a_valid_record_itself() -> None:
    """Else those who send to it refuse its record, and a healthy peer ends the generation."""
    swarm = Swarm()
    lost, silent, other, last = (*(swarm._record(0, 2) for _ in range(3)), swarm._record(2, BLOCKS))
    swarm.known = [lost, expired(silent, swarm), replace(other, load=1.0), last]
    assert (await stand_in(runner_of(swarm), [lost, last], (1,))).peer_id == other.peer_id
    whole = [replace(one, end=BLOCKS) for one in swarm.known[:3]]
    swarm.known = whole
    assert await stand_in(runner_of(swarm), [whole[0]], ()) == whole[1]


@pytest.mark.asyncio
async def test_who_was_lost_first_is_waited_for_where_the_next_one_fails_for_good(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Seen to give up at once, with the first one back a few seconds later."""
    monkeypatch.setattr(left_out, "RETURN_SECONDS", 20.0)
    monkeypatch.setattr(known_records, "ASK_AGAIN_SECONDS", 0.01)
    swarm = Swarm()
    lost, other = (swarm._record(0, BLOCKS) for _ in range(2))
    model: Any = runner_of(swarm)
    out = model.router.tries(TraceOptions()).left_out
    out.dialled([lost, other])
    out.heed(PeerLost("gone", peer=lost.peer_id))
    out.heed(failed(other))
    swarm.known = [other]
    records, asked = swarm.records, len(swarm.given_seconds)

    def answer(*args: Any) -> list[PeerRecord]:
        if len(swarm.given_seconds) > asked + 1:
            swarm.known = [other, replace(lost, expires_at_seconds=lost.expires_at_seconds + 20)]
        return records(*args)

    monkeypatch.setattr(swarm, "records", answer)
    assert (await stand_in_of(model, [other], out)).peer_id == lost.peer_id


@pytest.mark.asyncio
async def test_nobody_waits_for_who_could_not_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of other blocks, on other hardware, or back by now. Seen to wait, up to the deadline."""
    monkeypatch.setattr(left_out, "RETURN_SECONDS", 1e9)
    monkeypatch.setattr(left_out, "SOON_SECONDS", 0.0)
    swarm = Swarm()
    fails, behind, faster = (
        *(swarm._record(0, 2), swarm._record(2, BLOCKS)),
        replace(swarm._record(0, 2), backend="cuda"),
    )
    swarm.known = [fails, behind, faster]
    model: Any = runner_of(swarm)
    model.router.records.get(fresh=True)
    out = model.router.tries(TraceOptions()).left_out
    out.dialled(swarm.known)
    for one in (behind, faster):
        out.heed(PeerLost("gone", peer=one.peer_id))
    out.heed(failed(fails))
    with pytest.raises(NoRoute, match="no other peer serves blocks 0:2"):
        await stand_in_of(model, [fails, behind], out)


@pytest.mark.asyncio
@pytest.mark.parametrize("is_last", [False, True])
async def test_of_several_that_are_lost_the_one_longest_is_waited_for(
    is_last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of those who could help: a route needs the first one too, whose own time is over."""
    monkeypatch.setattr(left_out, "RETURN_SECONDS", 25.0)
    swarm = Swarm()
    first, second, third = (*(swarm._record(0, 2) for _ in range(2)), swarm._record(2, BLOCKS))
    swarm.known = [first, second, third]
    model: Any = runner_of(swarm)
    clock = [100.0]
    out = LeftOut(now=lambda: clock[0], tried_at=lambda: -1.0, clock=lambda: clock[0])
    out.dialled(swarm.known)
    lost = [first, third] if is_last else [third, first]
    for one in lost:
        clock[0] += 20.0
        out.heed(PeerLost("gone", peer=one.peer_id))
    clock[0] += 10.0

    def choose(back: Any) -> Any:
        """Both are needed."""
        if not {first.peer_id, third.peer_id} <= {one.peer_id for one in back}:
            raise NoRoute("none")
        return swarm.known

    model.router.records.now = []
    awaited = model.router._awaited(out, choose, first.peer_id)
    assert awaited == lost[1].peer_id
    assert out.left_seconds(lost[0].peer_id) < 0 < out.left_seconds(awaited)


def failed(record: PeerRecord) -> PeerFailed:
    """By its own fault, so that it doesn't come back."""
    span = Span(record.start, record.end)
    return PeerFailed("7", code="HostFailed", node=None, peer=record.peer_id, span=span)
