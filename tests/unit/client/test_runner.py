"""Retrying a trace elsewhere: within one deadline, whatever has to be asked meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from played_swarm import BLOCKS, Experiment, Swarm, every_block, no_return, runner_of, set_clock

from glasshive.client import known_records, left_out, route, router
from glasshive.client import swarm as client_swarm
from glasshive.client.bans import Bans
from glasshive.client.demand import Demand
from glasshive.client.errors import (
    BadAnswer,
    NoRoute,
    PeerBusy,
    PeerError,
    PeerFailed,
    PeerLost,
    TraceCancelled,
    TraceTimeout,
)
from glasshive.client.experiment import TraceOptions
from glasshive.client.route import Route
from glasshive.dht.errors import DeadlineExceeded, DirectoryUnavailable, ShutOut
from glasshive.dht.loop_thread import LoopThread
from glasshive.dht.records import PeerRecord
from glasshive.graph.plan import Span
from glasshive.security.keys import Identity, PeerId

__all__ = ["every_block", "no_return"]  # fixtures of every test


def test_a_route_without_the_lost_peer_waits_for_no_directory_while_the_peers_are_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without `_is_fresh` it was asked before each of the three tries."""
    swarm = Swarm()
    model: Any = runner_of(swarm)
    tried: list[str] = []

    def lose(experiment: object, options: object, route: Route, left: float, tries: Any) -> None:
        tries.has_run = True
        tried.append(route.records[0].peer_id)
        raise PeerLost("gone", peer=route.records[0].peer_id)

    monkeypatch.setattr(model, "_run_once", lose)
    with pytest.raises(PeerLost):
        model.run(Experiment(), TraceOptions(deadline_seconds=7.0, retries=2))
    assert len(set(tried)) == 3
    assert len(swarm.given_seconds) == 1
    assert swarm.given_seconds[0] <= 7.0


def test_what_is_known_for_long_is_asked_for_again_within_the_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [0.0]
    set_clock(monkeypatch, clock)
    swarm = Swarm()
    model: Any = runner_of(swarm)

    def lose(experiment: object, options: object, route: Route, left: float, tries: Any) -> None:
        tries.has_run = True
        clock[0] += 16.0
        raise PeerLost("gone", peer=route.records[0].peer_id)

    monkeypatch.setattr(model, "_run_once", lose)
    with pytest.raises(PeerLost):
        model.run(Experiment(), TraceOptions(deadline_seconds=33.0, retries=2))
    assert swarm.given_seconds == [33.0, 2.0, 1.0]  # others that are known would do


def test_of_a_directory_that_is_gone_those_who_were_known_may_be_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [0.0]
    set_clock(monkeypatch, clock)
    swarm = Swarm()
    model: Any = runner_of(swarm)
    monkeypatch.setattr(model, "_run_once", lambda *rest: "done")
    assert model.run(Experiment(), TraceOptions()) == "done"

    def gone(*args: object) -> list[PeerRecord]:
        raise DirectoryUnavailable("the bootstrap peer gave no directory")

    monkeypatch.setattr(swarm, "records", gone)
    clock[0] += 16.0
    assert model.run(Experiment(), TraceOptions()) == "done"
    swarm.known = [swarm._record()]
    with pytest.raises(DirectoryUnavailable):
        runner_of(swarm).run(Experiment(), TraceOptions())  # type: ignore[arg-type]


def outcome_of(model: Any, monkeypatch: pytest.MonkeyPatch, error: type[PeerError] | None) -> str:
    """The peer on which a trace is run once, with this outcome."""
    tried: list[str] = []

    def run(experiment: object, options: object, route: Route, *rest: object) -> None:
        tried.append(route.records[0].peer_id)
        if error is not None and len(tried) == 1:
            raise error("gone", peer=route.records[0].peer_id)

    monkeypatch.setattr(model, "_run_once", run)
    with contextlib.suppress(PeerError):
        model.run(Experiment(), TraceOptions(retries=0))
    return tried[0]


@pytest.mark.parametrize(
    ("error", "seconds"), [(PeerLost, 30.0), (BadAnswer, 30.0), (PeerBusy, 1.0)]
)
def test_trouble_leaves_a_peer_out_for_a_while(
    error: type[PeerError], seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    swarm = Swarm()
    swarm.known = [swarm._record(), replace(swarm._record(), load=0.5)]
    better, other = (one.peer_id for one in swarm.known)
    model = runner_of(swarm, Bans(lambda: clock[0]))
    assert outcome_of(model, monkeypatch, error) == better
    assert outcome_of(model, monkeypatch, None) == other
    clock[0] = seconds - 0.01
    assert outcome_of(model, monkeypatch, None) == other
    clock[0] = seconds
    assert outcome_of(model, monkeypatch, error) == better
    clock[0] += 2 * seconds - 0.01
    assert outcome_of(model, monkeypatch, None) == other
    clock[0] += 0.01
    assert outcome_of(model, monkeypatch, None) == better


def stand_in(model: Any, hosts: list[PeerRecord], tries: Any) -> Any:
    """For part 0, which sends to nobody."""
    return model.router.stand_in(hosts, TraceOptions(), Demand(), tries.left_out, 0, tuple)


@pytest.mark.asyncio
async def test_a_stand_in_that_is_known_of_late_needs_no_directory() -> None:
    swarm = Swarm()
    model: Any = runner_of(swarm)
    model.router.records.get(fresh=True)
    hosts, tries = [swarm.known[0]], model.router.tries(TraceOptions())
    swarm.given_seconds.clear()
    for wanted in swarm.known[1:]:
        tries.left_out.heed(PeerLost("gone", peer=hosts[0].peer_id))
        assert await stand_in(model, hosts, tries) is hosts[0] is wanted
    assert swarm.given_seconds == []
    tries.left_out.heed(PeerLost("gone", peer=hosts[0].peer_id))
    with pytest.raises(NoRoute):
        await stand_in(model, hosts, tries)
    assert swarm.given_seconds == [2.0]


@pytest.mark.asyncio
async def test_a_peer_that_was_left_out_stands_in_where_nobody_else_can() -> None:
    swarm = Swarm()
    model: Any = runner_of(swarm)
    lost, back, _ = swarm.known = swarm.known
    model.router.bans.trouble(back.peer_id, 30.0)
    swarm.known.pop()
    tries = model.router.tries(TraceOptions(avoid=frozenset([lost.peer_id])))
    assert await stand_in(model, [lost], tries) is back


def test_only_peers_that_compete_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    swarm = Swarm()
    swarm.known = [swarm._record(0, 2), swarm._record(2, BLOCKS)]
    outcome_of(runner_of(swarm), monkeypatch, None)
    assert swarm.measured == []
    swarm.known.append(swarm._record(2, BLOCKS))
    outcome_of(runner_of(swarm), monkeypatch, None)
    assert swarm.measured == [swarm.known[1:]]


def test_a_trace_waits_for_no_measuring_where_one_of_those_that_compete_is_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    swarm = Swarm()
    near, *_ = swarm.known
    swarm.round_trips.saw(near.peer_id, 0.01)
    assert outcome_of(runner_of(swarm), monkeypatch, None) == near.peer_id
    assert swarm.measured == []
    other = replace(swarm._record(0, 2), peer_id=near.peer_id)
    swarm.known = [other, *(swarm._record(2, BLOCKS) for _ in range(route.FEW + 1))]
    outcome_of(runner_of(swarm), monkeypatch, None)
    assert swarm.measured == [swarm.known[1:-1]]


def test_the_nearer_of_two_peers_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    swarm = Swarm()
    for seconds, one in zip((0.3, 0.02, 0.1), swarm.known, strict=True):
        swarm.round_trips.saw(one.peer_id, seconds)
    assert outcome_of(runner_of(swarm), monkeypatch, None) == swarm.known[1].peer_id


def test_own_traces_keep_away_from_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """What peers announce is up to 15 s old: traces that began together all went to one of them."""
    swarm = Swarm()
    first, second, third = swarm.known
    model = runner_of(swarm)
    assert outcome_of(model, monkeypatch, None) == first.peer_id
    with swarm.in_flight.on([first]):
        assert outcome_of(model, monkeypatch, None) == second.peer_id
        with swarm.in_flight.on([second]):
            assert outcome_of(model, monkeypatch, None) == third.peer_id
            with swarm.in_flight.on([third]), swarm.in_flight.on([first]):
                assert outcome_of(model, monkeypatch, None) == second.peer_id
    assert outcome_of(model, monkeypatch, None) == first.peer_id


def test_of_equal_peers_each_client_stays_with_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """All clients took the first of them; with chance, one client had its constants sent anew."""
    swarm, rng = Swarm(), random.Random(1)
    taken = set()
    for _ in range(50):
        model: Any = runner_of(swarm)
        model.router._liking = route.liking_of(str(rng.random()))
        peer = outcome_of(model, monkeypatch, None)
        assert {outcome_of(model, monkeypatch, None) for _ in range(5)} == {peer}
        taken.add(peer)
    assert taken == {one.peer_id for one in swarm.known}


def test_a_model_says_which_route_a_trace_would_take() -> None:
    swarm = Swarm()
    first, last = (
        swarm._record(0, 2),
        replace(swarm._record(2, BLOCKS), load=0.25, pass_seconds=2.5),
    )
    swarm.known = [last, replace(last, peer_id=Identity.generate().peer_id, load=1.0), first]
    swarm.round_trips.saw(first.peer_id, 0.0123)
    model = runner_of(swarm)
    assert model.describe().splitlines()[4:] == [
        "route of a trace now, about 8616.3 ms for a pass of one token",
        f"  blocks 0:2  {first.peer_id}  cpu  round trip 12.3 ms  1 tokens/s  "
        "0.0 ms a pass  load 0%",
        f"  blocks 2:4  {last.peer_id}  cpu  round trip not measured  1 tokens/s  "
        "2500.0 ms a pass  load 25%",
    ]
    swarm.known.pop()
    assert runner_of(swarm).describe().endswith("\nno route over all blocks now")


@pytest.mark.parametrize("kind", [DeadlineExceeded, DirectoryUnavailable])
def test_a_deadline_that_passes_while_the_directory_is_asked_is_the_trace_s_own(
    kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of several bootstrap peers is asked by then, and all of them may be silent."""
    swarm = Swarm()
    model: Any = runner_of(swarm)

    def late(*args: object) -> list[PeerRecord]:
        raise kind("none answered")

    monkeypatch.setattr(swarm, "records", late)
    with pytest.raises(TraceTimeout) as caught:
        model.run(Experiment(), TraceOptions(deadline_seconds=1e-6))
    assert str(caught.value) == (
        "the trace was not done in the 1e-06 s that it had; the directory had not said yet who "
        "serves the model (none answered); allow more time with deadline="
    )
    with pytest.raises(kind):  # a directory that is slow by itself
        model.run(Experiment(), TraceOptions(deadline_seconds=60.0))


def test_a_busy_peer_is_asked_again_by_the_next_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    swarm = Swarm()
    swarm.known = swarm.known[:1]
    model: Any = runner_of(swarm)

    def busy(experiment: object, options: object, route: Route, *rest: object) -> None:
        raise PeerBusy("16 traces are running here", peer=route.records[0].peer_id)

    monkeypatch.setattr(model, "_run_once", busy)
    for _ in range(2):
        with pytest.raises(PeerBusy):
            model.run(Experiment(), TraceOptions(retries=0, deadline_seconds=0.05))


@pytest.mark.parametrize("code", ["OverBudget", "QuotaExceeded", "ShapeMismatch"])
@pytest.mark.parametrize("hosts_that_refuse", [1, 2, 3])
def test_a_host_s_own_limits_are_no_reason_to_give_up(
    code: str, hosts_that_refuse: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that lends next to nothing had disabled a swarm in which others lend enough."""
    swarm = Swarm()
    model: Any = runner_of(swarm)
    tried: list[str] = []

    def run(experiment: object, options: object, route: Route, *rest: object) -> str:
        peer = route.records[0].peer_id
        tried.append(peer)
        if len(tried) <= hosts_that_refuse:
            raise PeerFailed("7 are allowed", code=code, node=None, peer=peer, span=Span(0, BLOCKS))
        return "done"

    monkeypatch.setattr(model, "_run_once", run)
    limited = code != "ShapeMismatch"
    if limited and hosts_that_refuse < 3:
        assert model.run(Experiment(), TraceOptions(retries=2)) == "done"
    else:
        with pytest.raises(PeerFailed, match="7 are allowed"):
            model.run(Experiment(), TraceOptions(retries=2))
    assert len(tried) == (min(hosts_that_refuse + 1, 3) if limited else 1)
    assert len(set(tried)) == len(tried)
    assert not any(one.peer_id in model.router.bans for one in swarm.known)
    tried.clear()
    with pytest.raises(PeerFailed):
        model.run(Experiment(), TraceOptions(retries=0))


def test_a_refusal_says_more_than_that_the_others_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    swarm = Swarm()
    swarm.known = [swarm._record(0, BLOCKS), swarm._record(0, BLOCKS)]
    model: Any = runner_of(swarm)
    tried: list[str] = []

    def run(experiment: object, options: object, route: Route, *rest: object) -> str:
        peer = route.records[0].peer_id
        tried.append(peer)
        if len(tried) > 1:
            raise PeerLost("peer X (blocks 0:2) was lost: gone", peer=peer)
        raise PeerFailed(
            "7 are allowed", code="QuotaExceeded", node=None, peer=peer, span=Span(0, BLOCKS)
        )

    monkeypatch.setattr(model, "_run_once", run)
    with pytest.raises(PeerFailed, match="7 are allowed"):
        model.run(Experiment(), TraceOptions(retries=5))
    assert len(tried) == 2


def test_a_lost_peer_that_came_back_is_asked_where_nobody_else_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(left_out, "SOON_SECONDS", 0.0)
    swarm = Swarm()
    swarm.known.pop()
    model: Any = runner_of(swarm)
    tried: list[str] = []

    def lose(experiment: object, options: object, route: Route, *rest: object) -> str:
        peer = route.records[0].peer_id
        tried.append(peer)
        if len(tried) == 3:
            return "done"
        if len(tried) == 2:  # the first one has started again meanwhile
            swarm.known = [
                replace(one, expires_at_seconds=one.expires_at_seconds + 1)
                if one.peer_id == tried[0]
                else one
                for one in swarm.known
            ]
        raise PeerLost("gone", peer=peer)

    monkeypatch.setattr(model, "_run_once", lose)
    assert model.run(Experiment(), TraceOptions(retries=4)) == "done"
    assert tried[2] == tried[0] != tried[1]


WHERE = " ".join(Swarm.where.hosts)
KIND = "--dtype float32 --attention sdpa"
OWN = " ".join(Swarm.where.own)
ADVICE = f"; run the trace again when `glasshive status {OWN}` shows its blocks as served"


def lost_text(
    swarm: Swarm, monkeypatch: pytest.MonkeyPatch, options: TraceOptions, *, then: Any = None
) -> str:
    """The text of the PeerLost of a trace whose every peer is lost; `then` is done after each."""
    model: Any = runner_of(swarm)

    def lose(experiment: object, options: object, route: Route, left: float, tries: Any) -> None:
        tries.has_run = True
        if then is not None:
            then()
        raise PeerLost("peer X (blocks 0:2) was lost: gone", peer=route.records[0].peer_id)

    monkeypatch.setattr(model, "_run_once", lose)
    with pytest.raises(PeerLost) as caught:
        model.run(Experiment(), options)
    return str(caught.value)


def test_a_lost_peer_that_nobody_replaces_says_what_to_serve(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    swarm = Swarm()
    swarm.known = [swarm._record(0, 2), swarm._record(2, BLOCKS)]
    first, last = (one.peer_id[-8:] for one in swarm.known)
    assert lost_text(swarm, monkeypatch, TraceOptions()) == (
        "peer X (blocks 0:2) was lost: gone; no other route: nobody else serves blocks 0:2 "
        f"(served now: 2:4 float32 sdpa by {last}; left out: 0:2 by {first} (lost)); start the "
        f"missing part with `glasshive serve tiny --blocks 0:2 {KIND} {WHERE}`, or wait until "
        f"one that was lost is back{ADVICE}"
    )


def test_a_last_host_that_withdrew_says_what_to_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    """Failed with "no peer announces abab...; serve it with `glasshive serve abab...`"."""
    swarm = Swarm()
    del swarm.known[1:]
    host = swarm.known[0].peer_id[-8:]
    whole = f"start the missing part with `glasshive serve tiny --blocks 0:4 {KIND} {WHERE}`"
    text = lost_text(swarm, monkeypatch, TraceOptions(), then=swarm.known.clear)
    assert text.endswith(
        "gone; no other route: nobody serves blocks 0:4 (served now: nothing; left out: "
        f"{host} (lost)); {whole}{ADVICE}"
    )
    with pytest.raises(NoRoute, match=re.escape(f"(served now: nothing); {whole}")):
        runner_of(swarm).run(Experiment(), TraceOptions())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("retries", "said"),
    [(0, "1 route was tried, as retries=0 says"), (1, "2 routes were tried, as retries=1 says")],
)
def test_a_lost_peer_after_the_last_try(
    monkeypatch: pytest.MonkeyPatch, retries: int, said: str
) -> None:
    swarm = Swarm()
    text = lost_text(swarm, monkeypatch, TraceOptions(retries=retries))
    before = f"; before that: {swarm.known[0].peer_id[-8:]} lost" if retries else ""
    assert text == f"peer X (blocks 0:2) was lost: gone; {said}{before}{ADVICE}"


def test_a_lost_peer_when_the_directory_is_gone_too(monkeypatch: pytest.MonkeyPatch) -> None:
    swarm = Swarm()

    def gone(*args: object) -> list[PeerRecord]:
        raise DirectoryUnavailable("the bootstrap peer gave no directory")

    text = lost_text(
        swarm, monkeypatch, TraceOptions(), then=lambda: setattr(swarm, "records", gone)
    )
    first, second, _ = (one.peer_id[-8:] for one in swarm.known)
    assert text.endswith(
        "gone; whether there is another route is not known: the bootstrap peer gave no directory; "
        f"before that: {first}, {second} lost{ADVICE}"
    )


def test_a_lost_peer_of_who_was_thrown_out(monkeypatch: pytest.MonkeyPatch) -> None:
    swarm = Swarm()

    def out(*args: object) -> list[PeerRecord]:
        raise ShutOut("the swarm 'lab' doesn't let this key in: its key was revoked")

    model: Any = runner_of(swarm)

    def lose(experiment: object, options: object, route: Route, *rest: object) -> None:
        monkeypatch.setattr(swarm, "records", out)
        raise PeerLost("peer X (blocks 0:2) was lost: gone", peer=route.records[0].peer_id)

    monkeypatch.setattr(model, "_run_once", lose)
    with pytest.raises(ShutOut) as caught:
        model.run(Experiment(), TraceOptions())
    assert str(caught.value) == "the swarm 'lab' doesn't let this key in: its key was revoked"
    assert isinstance(caught.value.__cause__, PeerLost)


def test_a_lost_peer_when_the_deadline_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    set_clock(monkeypatch, clock)
    text = lost_text(
        Swarm(),
        monkeypatch,
        TraceOptions(deadline_seconds=5),
        then=lambda: clock.append(clock.pop() + 6),
    )
    assert text.endswith(f"gone; the deadline left no time for another route (deadline=){ADVICE}")


# Cancelled from another thread, whatever it waits for --------------------------------------------


class RealCalls(Swarm):
    """One whose calls run on a loop, as a swarm's do; what `waits` has never comes to an end.

    `begun` is set when that is waited for.
    """

    run = client_swarm.Swarm.run
    look_up = client_swarm.Swarm.look_up
    measure = client_swarm.Swarm.measure
    ask_round_trips = client_swarm.Swarm.ask_round_trips
    _check_open = client_swarm.Swarm._check_open
    _closed = False

    def __init__(self, loop: LoopThread) -> None:
        super().__init__()
        self._loop, self._transport = loop, self.transport
        self.waits = ""
        self.begun = threading.Event()
        self.n_asked = 0

    async def ask_records(self, model: str, seconds: float) -> list[PeerRecord]:
        self.n_asked += 1
        await self._maybe_wait("directory")
        if self.n_asked > 2:
            self.begun.set()
        return self.known

    async def _alive(self, within_seconds: float) -> None:
        await self._maybe_wait("network daemon")

    async def _maybe_wait(self, what: str) -> None:
        if self.waits == what:
            self.begun.set()
            await asyncio.Event().wait()


@pytest.fixture
def swarm() -> Iterator[RealCalls]:
    with LoopThread() as loop:
        yield RealCalls(loop)


def check_is_cancelled_once_it_waits(swarm: RealCalls, model: Any, experiment: Any) -> None:
    """Without `running`, which would make TraceCancelled of any error that comes in the end."""

    def cancel() -> None:
        assert swarm.begun.wait(20)
        assert experiment.cancellation.cancel()

    other = threading.Thread(target=cancel)
    other.start()
    with pytest.raises(TraceCancelled):
        model.run(experiment, TraceOptions(deadline_seconds=120))
    other.join()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("waits", ["directory", "network daemon"])
def test_a_trace_is_cancelled_while_its_route_is_sought(
    waits: str, swarm: RealCalls, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one is when round trips are measured, for longer than this test may take."""
    monkeypatch.setattr(router, "PATIENCE_SECONDS", 200.0)
    swarm.waits = waits
    model: Any = runner_of(swarm)
    tried: list[object] = []
    monkeypatch.setattr(model, "_run_once", lambda *rest: tried.append(rest))
    check_is_cancelled_once_it_waits(swarm, model, Experiment())
    assert tried == []


def test_a_trace_is_cancelled_while_another_one_asks(swarm: RealCalls) -> None:
    swarm.waits = "directory"
    model: Any = runner_of(swarm)
    first = Experiment()

    def ask() -> None:
        with pytest.raises(TraceCancelled):
            model.run(first, TraceOptions(deadline_seconds=120))

    other = threading.Thread(target=ask)
    other.start()
    assert swarm.begun.wait(20)
    check_is_cancelled_once_it_waits(swarm, model, Experiment())
    assert swarm.n_asked == 1
    first.cancellation.cancel()
    other.join()


def test_a_trace_is_cancelled_while_it_waits_for_a_lost_peer(
    swarm: RealCalls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(left_out, "RETURN_SECONDS", 90.0)
    monkeypatch.setattr(known_records, "ASK_AGAIN_SECONDS", 0.01)
    del swarm.known[1:]
    model: Any = runner_of(swarm)
    tried: list[PeerId] = []

    def lose(experiment: object, options: object, route: Route, left: float, tries: Any) -> None:
        tries.has_run = True
        tried.append(route.records[0].peer_id)
        raise PeerLost("gone", peer=tried[-1])

    monkeypatch.setattr(model, "_run_once", lose)
    check_is_cancelled_once_it_waits(swarm, model, Experiment())
    assert tried == [swarm.known[0].peer_id]


def test_a_trace_that_was_cancelled_as_its_peer_was_lost_is_not_run_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model: Any = runner_of(Swarm())
    tried: list[PeerId] = []

    def lose(experiment: Any, options: object, route: Route, *rest: object) -> None:
        experiment.cancellation.cancel()
        tried.append(route.records[0].peer_id)
        raise PeerLost("gone", peer=tried[-1])

    monkeypatch.setattr(model, "_run_once", lose)
    with pytest.raises(TraceCancelled):
        model.run(Experiment(), TraceOptions())
    assert len(tried) == 1
