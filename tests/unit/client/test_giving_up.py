"""What a trace does before it gives up, and what it says then: busy peers, hardware, who lies."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from played_swarm import BLOCKS, Experiment, Swarm, every_block, no_return, runner_of, set_clock

from glasshive.client import left_out, router
from glasshive.client import tries as tries_module
from glasshive.client.errors import (
    ClientError,
    PeerBusy,
    PeerLost,
    TraceTimeout,
)
from glasshive.client.experiment import TraceOptions
from glasshive.client.provenance import Hop, Provenance, Replaced
from glasshive.client.route import Route
from glasshive.client.tries import MOST_PAUSE_SECONDS, Tries
from glasshive.dht.errors import DirectoryUnavailable, TransportLost
from glasshive.security.keys import PeerId

__all__ = ["every_block", "no_return"]  # fixtures of every test

Outcome = Callable[[Route, Tries], "str | ClientError"]


@pytest.fixture
def swarm() -> Swarm:
    return Swarm()


@pytest.fixture
def tried() -> list[tuple[PeerId, ...]]:
    """The routes that were tried, by their peers."""
    return []


@pytest.fixture
def run(
    swarm: Swarm, tried: list[tuple[PeerId, ...]], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """Runs a trace whose every try ends with what an `outcome` says of its route."""
    monkeypatch.setattr(tries_module, "FIRST_PAUSE_SECONDS", 0.002)
    monkeypatch.setattr(tries_module, "MOST_PAUSE_SECONDS", 0.004)
    model: Any = runner_of(swarm)

    def run(outcome: Outcome, **options: Any) -> Any:
        def once(experiment: Any, options: Any, route: Route, left: float, tries: Tries) -> str:
            tried.append(tuple(one.peer_id for one in route.records))
            found = outcome(route, tries)
            if isinstance(found, str):
                return found
            raise found

        monkeypatch.setattr(model, "_run_once", once)
        return model.run(Experiment(), TraceOptions(**options))

    run.model = model  # type: ignore[attr-defined]
    return run


def busy(route: Route, *rest: object) -> PeerBusy:
    peer = route.records[0].peer_id
    return PeerBusy(f"peer {peer} is busy: 16 traces are running here", peer=peer)


def unreached(route: Route, *rest: object) -> PeerLost:
    return PeerLost("gone", peer=route.records[0].peer_id)


def lost(route: Route, tries: Tries) -> PeerLost:
    """While it ran."""
    tries.has_run = tries.has_ever_run = True
    return unreached(route)


def short(swarm: Swarm) -> list[str]:
    return [one.peer_id[-8:] for one in swarm.known]


# Busy peers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("retries", [0, 4])
def test_one_busy_peer_is_waited_for(
    retries: int, swarm: Swarm, run: Any, tried: list[Any]
) -> None:
    """Seen to fail at once, with 300 s left."""
    del swarm.known[1:]
    assert run(lambda *of: "done" if len(tried) == 9 else busy(*of), retries=retries) == "done"
    assert len(tried) == 9


def test_all_are_asked_before_any_is_waited_for(swarm: Swarm, run: Any, tried: list[Any]) -> None:
    """Seen to give up after five of seven, the last of which had a place."""
    swarm.known = [swarm._record() for _ in range(6)] + [replace(swarm._record(), load=1.0)]
    idle = swarm.known[-1].peer_id
    assert run(lambda route, _: "done" if route.records[0].peer_id == idle else busy(route))
    assert len(tried) == 7
    assert len(set(tried)) == 7


def test_who_waits_does_not_hold_its_waiting_against_a_peer(swarm: Swarm, run: Any) -> None:
    """Each refusal had doubled the time for which other traces leave it out."""
    del swarm.known[1:]
    noted = Counter[float]()
    run.model.router.bans.trouble = lambda peer, seconds: noted.update([seconds])
    with pytest.raises(PeerBusy):
        run(busy, deadline_seconds=0.2)
    assert noted == {1.0: 1}


def test_at_the_deadline_it_says_who_is_busy(
    swarm: Swarm, run: Any, tried: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    del swarm.known[2:]
    clock = [0.0]
    set_clock(monkeypatch, clock)

    def slowly_busy(route: Route, *rest: object) -> PeerBusy:
        clock[0] += 0.02
        return busy(route)

    with pytest.raises(PeerBusy) as caught:
        run(slowly_busy, deadline_seconds=0.2)
    text = str(caught.value)
    for one in swarm.known:
        assert f"peer {one.peer_id} is busy: 16 traces are running here" in text
        assert f"0:4 by {one.peer_id[-8:]} (busy)" in text
    assert "nobody else serves blocks 0:4" in text
    assert re.search(r"waited 0\.\d+ s for a place, until the deadline of 0\.2 s", text)
    assert "before that" not in text
    assert text.endswith("run the trace again later, or allow more time with deadline=")
    assert len(tried) > 4


@pytest.mark.parametrize(
    ("outcome", "text"),
    [(busy, "waiting for a place at {}"), (lost, "waiting for {} to come back (lost)")],
)
def test_who_waits_says_for_whom(
    outcome: Outcome, text: str, swarm: Swarm, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    del swarm.known[1:]
    said: set[str] = set()
    display = SimpleNamespace(say=lambda text, seconds: said.add(text))
    monkeypatch.setattr(router, "JobDisplay", lambda *wanted: contextlib.nullcontext(display))
    monkeypatch.setattr(left_out, "RETURN_SECONDS", 0.01)

    def ticking(
        coroutine: Coroutine[Any, Any, Any],
        seconds: float,
        cancellation: object,
        on_tick: Callable[[], None],
    ) -> Any:
        on_tick()
        return asyncio.run(coroutine)

    swarm.run = ticking  # type: ignore[method-assign, assignment]
    with pytest.raises(PeerLost if outcome is lost else PeerBusy):
        run(outcome, deadline_seconds=0.2)
    assert said == {text.format(swarm.known[0].peer_id[-8:])}


def test_a_last_try_that_comes_to_nothing_says_who_is_busy(
    swarm: Swarm, run: Any, tried: list[Any]
) -> None:
    """And a trace that ran until its deadline doesn't."""
    del swarm.known[1:]
    late = TraceTimeout("not done")

    def outcome(route: Route, tries: Tries) -> ClientError:
        tries.has_run = has_run
        return late if len(tried) > 1 else busy(route)

    has_run = False
    with pytest.raises(PeerBusy, match=r"is busy: .*; not done; waited .* of 300 s; run the trace"):
        run(outcome)
    tried.clear()
    has_run = True
    with pytest.raises(TraceTimeout, match=r"^not done; before that: \w{8} busy$"):
        run(outcome)


def test_one_that_was_busy_is_asked_again_when_another_is_lost(
    swarm: Swarm, run: Any, tried: list[Any]
) -> None:
    del swarm.known[2:]
    outcomes: list[Outcome] = [busy, lost, lambda *of: "done"]
    assert run(lambda *of: outcomes[len(tried) - 1](*of), retries=1) == "done"
    first, other = (one.peer_id for one in swarm.known)
    assert tried == [(first,), (other,), (first,)]


def test_what_ran_until_a_peer_was_busy_is_run_again_only_as_often_as_allowed(
    run: Any, tried: list[Any]
) -> None:
    def midway(route: Route, tries: Tries) -> PeerBusy:
        tries.has_run = True
        return busy(route)

    with pytest.raises(PeerBusy, match="1 route was tried, as retries=0 says"):
        run(midway, retries=0)
    assert len(tried) == 1


def test_pauses_grow_and_leave_time_for_a_last_try() -> None:
    tries = Tries(SimpleNamespace(forgive=lambda peer: None), 4)  # type: ignore[arg-type]
    found = []
    for _ in range(12):
        found.append(tries.pause_seconds(1000.0))
        tries.waited(found[-1])
    longest = [min(0.25 * 2**i, MOST_PAUSE_SECONDS) for i in range(12)]
    assert all(most / 2 <= one <= most for one, most in zip(found, longest, strict=True))
    assert len({one / most for one, most in zip(found, longest, strict=True)}) == 12
    assert tries.pause_seconds(1.0) == 0.5
    assert tries.pause_seconds(0.01) == 0.0


def test_other_hardware_is_no_other_where_nothing_ran(
    swarm: Swarm, run: Any, tried: list[Any]
) -> None:
    del swarm.known[1:]
    swarm.known.append(replace(swarm._record(), backend="cuda", load=1.0))
    assert run(lambda *of: "done" if len(tried) == 2 else busy(*of)) == "done"
    assert len(set(tried)) == 2


# Other hardware ---------------------------------------------------------------------------------


def test_each_block_runs_again_on_the_hardware_that_it_ran_on(
    swarm: Swarm, run: Any, tried: list[Any]
) -> None:
    """Seen to take a route of the second class only, as that was in the first route, too."""
    first = replace(swarm._record(0, 2), backend="cpu")
    last = replace(swarm._record(2, BLOCKS), backend="cuda")
    other = replace(swarm._record(0, 2), backend="cuda", throughput_tokens_per_second=1e-3)
    swarm.known = [first, last]
    text = (
        "no other route on cpu for 0:2 and cuda for 2:4, as before, within which results are "
        "bit-equal; there is one on cuda: allow it with across_hardware=True"
    )

    def lose(route: Route, tries: Tries) -> PeerLost:
        if other not in swarm.known:
            swarm.known.append(other)
        return lost(route, tries)

    with pytest.raises(PeerLost, match=re.escape(text)):
        run(lose)
    assert len(tried) == 1
    swarm.known.pop()
    run.model.router.bans.served(first.peer_id)
    moved = []

    def move(route: Route, tries: Tries) -> Any:
        moved.append(tries.moved(route.records))
        return lose(route, tries) if len(tried) == 2 else "done"

    assert run(move, across_hardware=True) == "done"
    assert moved == [(), ("0:2",)]


def test_a_result_says_what_hardware_was_mixed_and_what_changed() -> None:
    hops = tuple(
        Hop(PeerId(f"peer-{i}"), f"{2 * i}:{2 * i + 2}", backend, 0, 0, 0, 0, 0, 0)
        for i, backend in enumerate(("cpu", "cuda", "cpu"))
    )
    result = Provenance(
        *("ab", "float32", "sdpa", b"", hops, 1.0, 0, 0, 1, 1, ("2:4",)),
        *(
            (Replaced("0:2", PeerId("12D3lost-one"), PeerId("12D3took-it-"), 1.0, "cpu"),),
            (),
            False,
        ),
    )
    assert repr(result) == (
        "<1.00 s over 0:2 peer-0 > 2:4 peer-1 > 4:6 peer-2 on cpu and cuda; float32, sdpa "
        "attention, retried 1x, lost-one was lost and took-it- took over 0:2, 2:4 ran again "
        "on other hardware; unaudited>"
    )
    same = replace(result, hops=hops[::2], other_hardware=())
    assert "cpu" not in repr(same)
    assert "hardware" not in repr(same)


def test_what_runs_again_does_so_without_quantised_peers(
    swarm: Swarm, run: Any, tried: list[Any]
) -> None:
    """Seen to take a peer of int8 for the second try, of which the result said nothing."""
    del swarm.known[2:]
    plain, other = swarm.known
    swarm.known = [plain, replace(other, quantisation="int8")]
    with pytest.raises(PeerLost, match="nobody else serves blocks 0:4"):
        run(lost)
    assert tried == [(plain.peer_id,)]


# What is said -----------------------------------------------------------------------------------


def test_a_timeout_says_what_was_tried_before(swarm: Swarm, run: Any, tried: list[Any]) -> None:
    def outcome(route: Route, tries: Tries) -> Any:
        if len(tried) == 1:
            return lost(route, tries)
        if len(tried) == 2:
            return TransportLost("the network daemon of this process is lost")
        tries.heed_replaced([Replaced("0:4", PeerId("x" * 20), PeerId("y"), 1.0, "cpu")])
        return TraceTimeout("not done")

    with pytest.raises(TraceTimeout) as caught:
        run(outcome)
    assert str(caught.value) == (
        f"not done; before that: {short(swarm)[0]}, this process' own network daemon lost; "
        "xxxxxxxx lost and replaced"
    )


def test_who_was_lost_before_anything_ran_costs_no_retry(
    swarm: Swarm, run: Any, tried: list[Any]
) -> None:
    """Seen to end a trace that had never run: a directory tells of the dead for a minute."""
    swarm.known = [swarm._record() for _ in range(6)] + [replace(swarm._record(), load=1.0)]
    alive = swarm.known[-1].peer_id
    outcome = lambda route, tries: (  # noqa: E731
        "done" if route.records[0].peer_id == alive else unreached(route)
    )
    assert run(outcome, retries=1) == "done"
    assert len(tried) == len(set(tried)) == 7
    with pytest.raises(PeerLost, match="gone; 1 route was tried, as retries=0 says"):
        run(unreached, retries=0)
    tried.clear()
    with pytest.raises(PeerLost, match="gone; 2 routes were tried, as retries=1 says"):
        run(lost, retries=1)
    assert len(tried) == 2


def test_stand_ins_are_no_routes(swarm: Swarm, run: Any) -> None:
    """Seen to say that five routes were tried."""

    def outcome(route: Route, tries: Tries) -> PeerLost:
        tries.count += 3
        return lost(route, tries)

    with pytest.raises(PeerLost, match=r"1 route and 3 stand-ins were tried, as retries=3 says"):
        run(outcome, retries=3)


def test_many_that_were_lost_are_not_all_named() -> None:
    tries = Tries(SimpleNamespace(heed=lambda error: None), 4)  # type: ignore[arg-type]
    for i in range(12):
        tries.heed(PeerLost("gone", peer=PeerId(f"peer-{i:03}")))
    named = ", ".join(f"peer-{i:03}" for i in range(8))
    assert tries.before_text() == f"; before that: {named} and 4 more lost"


# Who lies of its neighbours ---------------------------------------------------------------------


def parting(swarm: Swarm, accuser: int) -> Outcome:
    """Each try ends with the first peer of its route lost by this one alone."""

    def outcome(route: Route, tries: Tries) -> PeerLost:
        accused = route.records[0].peer_id
        tries.parted = {frozenset((swarm.known[accuser].peer_id, accused))}
        return PeerLost("gone", peer=accused)

    return outcome


def test_who_only_a_neighbour_has_lost_is_not_left_out_by_other_traces(
    swarm: Swarm, run: Any
) -> None:
    """Seen to ban an honest peer for 30 s at each word of a liar."""
    swarm.known = [swarm._record(0, 2) for _ in range(2)] + [swarm._record(2, BLOCKS)]
    with pytest.raises(PeerLost):
        run(parting(swarm, 2), retries=0)
    assert not any(one.peer_id in run.model.router.bans for one in swarm.known)
    with pytest.raises(PeerLost):
        run(lost, retries=0)
    assert sum(one.peer_id in run.model.router.bans for one in swarm.known) == 1


def test_who_alone_has_lost_two_others_is_left_out_itself(
    swarm: Swarm, run: Any, tried: list[Any]
) -> None:
    swarm.known = [swarm._record(0, 2) for _ in range(2)]
    swarm.known += [swarm._record(2, BLOCKS), replace(swarm._record(2, BLOCKS), load=0.9)]
    liar, honest = (one.peer_id for one in swarm.known[2:])
    lies = parting(swarm, 2)

    def outcome(route: Route, tries: Tries) -> Any:
        return lies(route, tries) if liar in tried[-1] else "done"

    assert run(outcome) == "done"
    assert len(tried) == 3
    assert tried[2][1] == honest
    assert [one.peer_id for one in swarm.known if one.peer_id in run.model.router.bans] == [liar]


# Who is known, and may not be asked of ----------------------------------------------------------


def test_a_peer_with_which_there_was_trouble_is_asked_where_the_directory_is_gone(
    swarm: Swarm, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen to end with DirectoryUnavailable."""
    del swarm.known[1:]
    assert run(lambda *of: "done") == "done"
    run.model.router.bans.trouble(swarm.known[0].peer_id, 30.0)

    def gone(*args: object) -> Any:
        raise DirectoryUnavailable("the bootstrap peer gave no directory")

    monkeypatch.setattr(swarm, "records", gone)
    assert run(lambda *of: "done") == "done"
    monkeypatch.setattr(run.model.router.records, "is_valid", lambda record: False)
    with pytest.raises(DirectoryUnavailable):
        run(lambda *of: "done")
