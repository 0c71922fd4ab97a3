"""Runs one model's experiments on a swarm: route, split, job; again elsewhere if a peer is lost."""

from __future__ import annotations

import asyncio
import contextlib
import math
import secrets
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from glasshive.client.bans import BUSY_SECONDS, LOST_SECONDS, Bans
from glasshive.client.cancellation import Cancellation
from glasshive.client.coverage import Kind, Wanted
from glasshive.client.demand import Demand, demand_of
from glasshive.client.errors import (
    NoRoute,
    PeerBusy,
    PeerError,
    PeerFailed,
    PeerLost,
    TraceTimeout,
)
from glasshive.client.estimate import estimate_of, stage_seconds
from glasshive.client.experiment import Experiment, TraceOptions
from glasshive.client.job import Job
from glasshive.client.known_records import KnownRecords
from glasshive.client.left_out import BUSY, LeftOut
from glasshive.client.progress import JobDisplay
from glasshive.client.provenance import Provenance
from glasshive.client.relay import Pair
from glasshive.client.round_trips import AHEAD_SECONDS, PATIENCE_SECONDS
from glasshive.client.route import (
    CHANCE,
    Chance,
    Liking,
    Route,
    Seconds,
    best_few,
    choose_route,
    choose_stand_in,
    liking_of,
    rivals,
    some_others,
)
from glasshive.client.tries import Tries
from glasshive.dht.errors import DeadlineExceeded, ShutOut, SwarmError, TransportLost
from glasshive.dht.records import PeerRecord
from glasshive.graph.errors import GraphError
from glasshive.graph.plan import Plan
from glasshive.graph.split import needed_blocks, split
from glasshive.security.keys import PeerId

if TYPE_CHECKING:
    from glasshive.client.swarm import Swarm


_APART_SECONDS: Final = 600.0  # for so long two peers that can't reach each other aren't tried
_OWN_LIMITS: Final = frozenset({"OverBudget", "QuotaExceeded"})  # which another host may not have


class ModelRunner:
    """Implements `glasshive.client.model.Runner` for one model, in one dtype and attention."""

    def __init__(
        self,
        swarm: Swarm,
        model_id: str,
        name: str,
        dtype: str,
        attention: str,
        n_blocks: int,
        bans: Bans | None = None,
        chance: Chance = CHANCE,
        liking: Liking | None = None,
    ) -> None:
        self._swarm = swarm
        self._model_id = model_id
        self._name = name
        self._dtype = dtype
        self._attention = attention
        self._n_blocks = n_blocks
        self._records = KnownRecords(swarm, model_id, dtype, attention)
        self._bans = Bans() if bans is None else bans
        self._chance = chance
        self._liking = liking or liking_of(str(chance()))
        self._apart: dict[Pair, float] = {}  # who can't reach each other, until then
        self._demand = Demand()  # of the last trace

    def run(self, experiment: Experiment, options: TraceOptions) -> Provenance:
        """Run it, fill what was saved, and say where it came from.

        A trace is a pure function of its request, so after a lost peer, or one whose own limits
        are too narrow for it, all of it is run again on a route without that peer, `retries` times
        at most and within the one deadline. Where there is no other, it waits for that one to come
        back. And it is run again when this process' own network daemon was lost. Raises
        TraceCancelled as soon as the experiment's cancellation says so, whatever it waits for.
        """
        with self._swarm.warm.in_use(self.refresh):
            return self._run(experiment, options)

    async def refresh(self) -> None:
        """Ask what the next trace will need, on the loop: who serves the model, and how far away
        the best few of each span are, and one more, which may be better than they.

        What isn't answered is left as it is. Raises ShutOut, and SwarmError for this process' own
        network daemon.
        """
        lost = self._swarm.transport.lost
        if lost.is_set():  # a trace that runs has to see that; the next one starts a new daemon
            return
        await self._records.ask()
        known = [one for one in self._records.now if self._records.is_valid(one)]
        usable, way = self._usable(known, TraceOptions()), self._swarm.round_trips.of
        others = some_others(usable, lambda one: way(one.peer_id) is None, self._chance)
        few = best_few(usable, self._seconds(self._demand), self._liking)
        to_ask = self._swarm.round_trips.to_ask([*others, *few], AHEAD_SECONDS)
        if to_ask and not lost.is_set():
            await self._swarm.ask_round_trips(to_ask, PATIENCE_SECONDS)

    def _run(self, experiment: Experiment, options: TraceOptions) -> Provenance:
        ends_at = time.monotonic() + options.deadline_seconds
        tries = self._tries(options)
        try:
            route = self._route(experiment, options, tries, ends_at)
        except DeadlineExceeded:
            if time.monotonic() < ends_at:
                raise
            raise TraceTimeout(
                f"the trace was not done in the {options.deadline_seconds:g} s that it had; the "
                "directory had not said yet who serves the model; allow more time with deadline="
            ) from None
        own = self._swarm.where.own
        refused: PeerFailed | None = None
        while True:
            experiment.cancellation.check()  # it may have been while a peer was lost
            left_seconds = max(ends_at - time.monotonic(), 0.0)
            tries.take(route, needed_blocks(experiment.graph, experiment.outline))
            tries.has_run = False
            try:
                return self._run_once(experiment, options, route, left_seconds, tries)
            except TraceTimeout as error:
                if tries.busy and not tries.has_run:  # a last try, for which no time was left
                    *_, busy = tries.busy.values()
                    text = f"{error}{tries.busy_text(busy, options.deadline_seconds)}"
                    tries.advise(busy, text, own)
                    raise busy from error
                error.args = (f"{error}{tries.before_text()}",)
                raise
            except PeerFailed as error:
                line = experiment.line_of(error.node)
                told = f"{error.code} at peer {error.peer} (blocks {error.span}): {error}"
                error.args = (f"{f'{line}: ' if line else ''}{told}{tries.before_text()}",)
                if error.code not in _OWN_LIMITS or tries.are_used_up:
                    raise
                refused = error
                tries.heed(error)  # another peer may allow more, or have more left
                try:
                    route = self._route(experiment, options, tries, ends_at)
                except (NoRoute, SwarmError):
                    raise error from None
            except TransportLost as error:  # nobody else's fault: the route stays
                if tries.are_used_up or time.monotonic() > ends_at:
                    raise TransportLost(
                        "the network daemon (p2pd) of this process ended while the trace ran; run "
                        f"the trace again: a new one is started for it{tries.before_text()}"
                    ) from error
                tries.heed_own_loss()
            except PeerError as error:
                # Who is busy has refused, mostly before anything ran.
                is_retry = not isinstance(error, PeerBusy) or tries.has_run
                tries.hold_against(error, self._bans)
                if is_retry and tries.are_used_up:
                    tries.advise(error, tries.tried_text(), own)
                    raise
                if isinstance(error, PeerBusy) and not tries.has_ever_run:
                    tries.forget_hardware()
                try:
                    route = self._another_route(
                        *(experiment, options, tries, ends_at, route),
                        lost=error if refused is None and isinstance(error, PeerLost) else None,
                    )
                except NoRoute as none:
                    if refused is not None:  # that says more than that others are gone
                        raise refused from error
                    text = str(none).replace("no route", "no other route", 1)
                    if isinstance(error, PeerBusy):
                        text += tries.busy_text(error, options.deadline_seconds)
                    tries.advise(error, text, own)
                    raise error from none
                except ShutOut as out:
                    # It isn't the peer, and no other trace does better.
                    raise out from error
                except SwarmError as none:
                    why = f"whether there is another route is not known: {none}"
                    tries.advise(error, why, own)
                    raise error from none
                if time.monotonic() > ends_at:
                    why = "the deadline left no time for another route (deadline=)"
                    tries.advise(error, why, own)
                    raise
                if not is_retry:
                    continue
            tries.count += 1
            tries.reruns += 1

    def estimate(self, experiment: Experiment, options: TraceOptions) -> Mapping[str, Any]:
        """What it would take on the route that it would get now."""
        route = self._route(experiment, options, self._tries(options))
        plan = self._plan(experiment, route, outlives_peers=False)
        return estimate_of(experiment, plan, route)

    def describe(self) -> str:
        """Who serves which blocks, and the route that a trace of all of them would take now."""
        records = sorted(self._records.get(fresh=False), key=lambda one: (one.start, one.end))
        lines = [
            f"  blocks {one.start}:{one.end} of {one.n_blocks}  {one.dtype}  {one.attention}  "
            f"{one.peer_id}"
            for one in records
        ]
        text = "served by\n" + "\n".join(lines or ["  nobody"])
        revoked = self._swarm.revoked(records)
        self._measure(
            best_few([one for one in records if one.peer_id not in revoked], liking=self._liking)
        )
        for also_banned in (False, True):
            with contextlib.suppress(NoRoute):
                route = self._choose(
                    *(records, range(self._n_blocks), Demand(), self._tries(TraceOptions()), None),
                    also_banned=also_banned,
                )
                hops = "\n".join(map(self._hop_line, route.records))
                about = f"about {1000 * route.expected_seconds:.1f} ms for a pass of one token"
                return f"{text}\nroute of a trace now, {about}\n{hops}"
        return f"{text}\nno route over all blocks now"

    def _hop_line(self, one: PeerRecord) -> str:
        way_seconds = self._swarm.round_trips.of(one.peer_id)
        way = "not measured" if way_seconds is None else f"{1000 * way_seconds:.1f} ms"
        return (
            f"  blocks {one.start}:{one.end}  {one.peer_id}  {one.backend}  round trip {way}  "
            f"{one.throughput_tokens_per_second:.0f} tokens/s  "
            f"{1000 * one.pass_seconds:.1f} ms a pass  load {one.load:.0%}"
        )

    def _run_once(
        self,
        experiment: Experiment,
        options: TraceOptions,
        route: Route,
        deadline_seconds: float,
        tries: Tries,
    ) -> Provenance:
        outlives = experiment.passes.are_generation and not tries.are_used_up
        plan = self._plan(experiment, route, outlives_peers=outlives)
        hosts = list(route.records)
        job = Job(
            transport=self._swarm.transport,
            identity=self._swarm.identity,
            plan=plan,
            peers=list(route.peers),
            records=list(route.signed),
            model_id=self._model_id,
            dtype=self._dtype,
            inputs=experiment.inputs,
            consts=experiment.consts,
            expected=experiment.saved_specs(),
            never_come=experiment.never_come,
            objection=experiment.objection,
            trace_id=secrets.token_bytes(16),
            deadline_seconds=deadline_seconds,
            stand_in=partial(self._stand_in, hosts, options, demand_of(experiment), tries.left_out),
            expected_seconds=partial(stage_seconds, hosts, plan.passes, experiment.bill.flops),
            on_answer=self._swarm.round_trips.saw,
            most_moves=options.retries - tries.count,
            allowed_seconds=options.deadline_seconds,
            left_out=tries.left_out,
            relay=tries.relay | self._apart_now(),
        )
        with self._swarm.in_flight.on(hosts), JobDisplay(options.show_progress) as display:

            def tick() -> None:
                display.update(job)
                if experiment.chosen is not None:
                    experiment.chosen.hear(dict(job.saves))

            try:
                self._swarm.run_job(job, tick, experiment.cancellation)
            finally:
                tries.count += job.moves
                tries.has_run = job.has_run
                tries.has_ever_run |= job.has_run
                tries.heed_replaced(job.replaced)
                tries.parted = job.hearing.parted
                tries.relay |= tries.parted | job.relays.used.keys()
                until = time.monotonic() + _APART_SECONDS
                self._apart = {**dict.fromkeys(tries.relay, until), **self._apart}
        for hop in job.hops:
            self._bans.served(hop.peer.peer_id)
        experiment.fill(job.saves)
        return Provenance(
            model_id=self._model_id,
            dtype=self._dtype,
            attention=self._attention,
            graph_digest=experiment.digest,
            hops=tuple(hop.summary(hosts[hop.part.index].backend) for hop in job.hops),
            seconds=job.clock() - job.began_at,
            sent_bytes=job.sent_bytes,
            received_bytes=job.received_bytes,
            passes=len(plan.passes.passes),
            retried=tries.reruns,
            other_hardware=tries.moved(hosts),
            replaced=tuple(job.replaced),
            relayed=job.relayed,
            audited=all(hop.audited for hop in job.hops),
        )

    def _apart_now(self) -> set[Pair]:
        """Who was seen of late not to reach each other; a route may still have both."""
        now = time.monotonic()
        self._apart = {pair: until for pair, until in self._apart.items() if until > now}
        return set(self._apart)

    async def _stand_in(
        self,
        hosts: list[PeerRecord],
        options: TraceOptions,
        demand: Demand,
        left_out: LeftOut,
        part: int,
        receivers: Collection[int],
    ) -> tuple[PeerRecord, Mapping[PeerId, bytes]]:
        """Who may run a part in place of its host, which was lost; that is changed in `hosts`.

        And the signed records of all who serve the model. On the loop. Raises NoRoute. Who is known
        of late need not be asked for while all wait; of a swarm whose directory is gone, those who
        were known may still be there. Where there is nobody else, that host itself may come back.
        """
        lost, records = hosts[part], self._records
        if lost.peer_id in left_out:
            is_busy = left_out.why(lost.peer_id) == BUSY
            self._bans.trouble(lost.peer_id, BUSY_SECONDS if is_busy else LOST_SECONDS)

        def choose(*, also_banned: bool = False) -> PeerRecord:
            for receiver in (hosts[one] for one in receivers):
                if receiver.peer_id not in records.signed and not records.is_valid(receiver):
                    raise NoRoute(f"nobody says where {receiver.peer_id} is now")
            known = self._usable(records.now, options, also_banned=also_banned)
            seconds, avoid = self._seconds(demand), left_out.among(records.now)
            return choose_stand_in(known, lost, avoid, seconds, self._liking)

        def choose_any() -> PeerRecord:
            with contextlib.suppress(NoRoute):
                return choose()
            return choose(also_banned=True)  # maybe one that has started again

        if records.are_fresh:
            with contextlib.suppress(NoRoute):
                hosts[part] = choose()
                return hosts[part], records.signed
        hosts[part] = await records.until(choose_any, lambda: left_out.left_seconds(lost.peer_id))
        return hosts[part], records.signed

    def _usable(
        self, known: Sequence[PeerRecord], options: TraceOptions, *, also_banned: bool = False
    ) -> list[PeerRecord]:
        """Those who are not revoked, not left out for a while, and may see the trace."""
        revoked, only = self._swarm.revoked(known), options.route
        return [
            one
            for one in known
            if one.peer_id not in revoked
            and (also_banned or one.peer_id not in self._bans)
            and (only is None or one.peer_id in only)
        ]

    def _seconds(self, demand: Demand) -> Seconds:
        """What a peer adds to a route of this demand, by what is known and runs now."""
        way, running = self._swarm.round_trips.of, self._swarm.in_flight.counts()
        return lambda one, blocks: demand.seconds(
            one, blocks, way(one.peer_id), running.get(one.peer_id, 0)
        )

    def _plan(self, experiment: Experiment, route: Route, *, outlives_peers: bool) -> Plan:
        """The plan, in which every part is what the swarm's policy allows."""
        outline, graph = experiment.outline, experiment.graph
        policy = self._swarm.policy
        try:
            plan = split(
                *(graph, outline, experiment.passes, route.spans, experiment.specs),
                experiment.sampling,
            )
            parts = (replace(one, outlives_peers=outlives_peers) for one in plan.parts)
            plan = replace(plan, parts=tuple(parts))
            if policy is not None and policy.version:  # before any whitelist, hosts have the word
                for part in plan.parts:
                    policy.check_graph(part.graph)
            return plan
        except GraphError as error:
            if (line := experiment.line_of(error.node)) is not None:
                error.args = (f"{line}: {error}",)
            raise

    def _tries(self, options: TraceOptions) -> Tries:
        left_out = LeftOut(
            options.avoid,
            now=self._swarm.transport.now,
            tried_at=lambda: self._records.tried_at,
            clock=time.monotonic,
        )
        return Tries(left_out, options.retries, options.across_hardware, self._chance)

    def _another_route(
        self,
        experiment: Experiment,
        options: TraceOptions,
        tries: Tries,
        ends_at: float,
        before: Route,
        *,
        lost: PeerLost | None,
    ) -> Route:
        """`_route` after one that failed, for which it waits if a peer was lost that may return, or
        was busy and may have a place.

        Where there is none without a peer that only another one has lost, or without that one, it
        is one with both: the client then relays.
        """
        left_out = tries.left_out
        try:
            return self._route(experiment, options, tries, ends_at)
        except ShutOut:
            raise
        except (NoRoute, SwarmError) as error:
            none = error
        if lost is not None and isinstance(none, NoRoute) and (by := tries.accuser_of(lost)):
            left_out.forgive(lost.peer, by)  # maybe it can reach nobody
            return self._route(experiment, options, tries, ends_at)
        if tries.busy and self._wait_for_a_place(experiment, options, tries, ends_at):
            try:
                return self._route(experiment, options, tries, ends_at)
            except ShutOut:
                raise
            except (NoRoute, SwarmError) as error:
                none = error
        if lost is None:
            raise none

        def left_seconds() -> float:
            return min(left_out.left_seconds(lost.peer), ends_at - time.monotonic())

        def choose() -> Route:
            # A directory that was lost as well may not know of the others yet.
            known = {one.peer_id: one for one in (*before.records, *self._records.now)}
            return self._choose(
                [one for one in known.values() if self._records.is_valid(one)],
                *(needed_blocks(experiment.graph, experiment.outline), demand_of(experiment)),
                *(tries, options.route),
                also_banned=True,
            )

        if (seconds := left_seconds()) > 0:
            try:
                return self._swarm.run(
                    *(self._records.until(choose, left_seconds), seconds + 10),
                    experiment.cancellation,
                )
            except NoRoute as error:
                none = error if isinstance(none, NoRoute) else none
        gone_seconds = left_out.gone_seconds(lost.peer)
        if 1 <= gone_seconds < math.inf:
            waited = f"waited {gone_seconds:.0f} s for {lost.peer} to come back; "
            none.args = (f"{waited}{none}",)
        raise none

    def _wait_for_a_place(
        self, experiment: Experiment, options: TraceOptions, tries: Tries, ends_at: float
    ) -> bool:
        """Wait a while for peers that are busy; False if the deadline leaves no time for it."""
        seconds = tries.pause_seconds(ends_at - time.monotonic())
        if seconds <= 0:
            return False
        peers = ", ".join(peer[-8:] for peer in tries.busy)
        with JobDisplay(options.show_progress) as display:
            self._swarm.run(
                *(asyncio.sleep(seconds), seconds + 10, experiment.cancellation),
                lambda: display.say(f"waiting for a place at {peers}", tries.waited_seconds),
            )
        tries.waited(seconds)
        return True

    def _route(
        self,
        experiment: Experiment,
        options: TraceOptions,
        tries: Tries,
        ends_at: float = math.inf,
    ) -> Route:
        """A route of the peers that are named, without those to avoid, and without those that are
        left out for a while if it can be had.

        `ends_at`, on the monotonic clock, is until when others may be asked.
        """
        needed = needed_blocks(experiment.graph, experiment.outline)
        demand = self._demand = demand_of(experiment)
        get = partial(self._records.get, ends_at=ends_at, cancellation=experiment.cancellation)
        known = get(fresh=False)
        left_out = self._left_out(known, tries)
        candidates = [
            one
            for one in known
            if one.peer_id not in left_out
            and (options.route is None or one.peer_id in options.route)
        ]
        rivalling = rivals(candidates, needed, self._n_blocks)
        self._measure(self._unknown(rivalling, demand), ends_at, experiment.cancellation)
        choose = partial(
            self._choose, needed=needed, demand=demand, tries=tries, only=options.route
        )
        with contextlib.suppress(NoRoute):  # what is known may be old
            return choose(known)
        if not (tries.has_waited and self._records.are_fresh):  # who waits doesn't ask each time
            try:
                known = get(fresh=True)
            except ShutOut:
                raise
            except SwarmError:  # they are valid, and may be there, whoever tells of them isn't
                with contextlib.suppress(NoRoute):
                    return choose(known, also_banned=True)
                raise
            with contextlib.suppress(NoRoute):
                return choose(known)
        return choose(known, also_banned=True)

    def _left_out(
        self, known: Sequence[PeerRecord], tries: Tries, *, also_banned: bool = False
    ) -> dict[PeerId, str]:
        """Those of these peers that are revoked, left out by the trace, or by all for a while.

        With why.
        """
        bans = () if also_banned else self._bans
        out = {one.peer_id: "lost or busy of late" for one in known if one.peer_id in bans}
        out |= {peer: tries.left_out.why(peer) for peer in tries.left_out.among(known)}
        return out | dict.fromkeys(self._swarm.revoked(known), "revoked")

    def _choose(
        self,
        known: list[PeerRecord],
        needed: Collection[int],
        demand: Demand,
        tries: Tries,
        only: Collection[PeerId] | None,
        *,
        also_banned: bool = False,
    ) -> Route:
        kind = Kind(self._dtype, "none", self._attention)
        choose = partial(
            choose_route,
            needed=needed,
            n_blocks=self._n_blocks,
            avoid=self._left_out(known, tries, also_banned=also_banned),
            only=only,
            wanted=Wanted(self._name, kind, self._swarm.where.hosts),
            seconds=self._seconds(demand),
            liking=self._liking,
        )
        try:
            return choose(tries.narrowed(known))
        except NoRoute as none:
            if tries.narrowed(known) == known:
                raise
            raise NoRoute(tries.no_such_hardware(choose(known))) from none

    def _unknown(self, records: Sequence[PeerRecord], demand: Demand) -> list[PeerRecord]:
        """The best few of the spans of which no peer's round trip is known.

        Where one is, a trace needn't wait: the others are measured ahead (`refresh`).
        """
        way = self._swarm.round_trips.of
        few = best_few(records, self._seconds(demand), self._liking)
        known = {(one.start, one.end) for one in few if way(one.peer_id) is not None}
        return [one for one in few if (one.start, one.end) not in known]

    def _measure(
        self,
        records: Sequence[PeerRecord],
        ends_at: float = math.inf,
        cancellation: Cancellation | None = None,
    ) -> None:
        """Learn how far away these peers are, unless that is known; takes a second at most."""
        patience_seconds = min(PATIENCE_SECONDS, ends_at - time.monotonic())
        to_ask = self._swarm.round_trips.to_ask(records)
        if to_ask and patience_seconds > 0:
            with contextlib.suppress(SwarmError):
                self._swarm.measure(to_ask, patience_seconds, cancellation)
