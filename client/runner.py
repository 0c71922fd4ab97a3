"""Runs one model's experiments on a swarm: route, split, job; again elsewhere if a peer is lost."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NoReturn, final

from glasshive.client.demand import demand_of
from glasshive.client.errors import (
    BadAnswer,
    NoRoute,
    PeerBusy,
    PeerError,
    PeerFailed,
    PeerLost,
    TraceTimeout,
)
from glasshive.client.estimate import estimate_of, stage_seconds
from glasshive.client.experiment import Experiment, TraceOptions
from glasshive.client.job import TIMERS_SECONDS, Job
from glasshive.client.progress import JobDisplay
from glasshive.client.provenance import Provenance
from glasshive.client.relay import Pair
from glasshive.client.route import Route
from glasshive.client.router import Router
from glasshive.client.status_text import waiting_for
from glasshive.client.tries import Tries
from glasshive.dht.errors import (
    DeadlineExceeded,
    DirectoryUnavailable,
    ShutOut,
    SwarmError,
    TransportLost,
)
from glasshive.graph.errors import GraphError
from glasshive.graph.plan import Plan
from glasshive.graph.split import needed_blocks, split

if TYPE_CHECKING:
    from glasshive.client.swarm import Swarm


_APART_SECONDS: Final = 600.0  # for so long two peers that can't reach each other aren't tried
_OWN_LIMITS: Final = frozenset({"OverBudget", "QuotaExceeded"})  # which another host may not have


class ModelRunner:
    """Implements `glasshive.client.model.Runner` for the model of its router."""

    def __init__(self, swarm: Swarm, router: Router) -> None:
        self.router = router
        self._swarm = swarm
        self._apart: dict[Pair, float] = {}  # who can't reach each other, until then

    def run(self, experiment: Experiment, options: TraceOptions) -> Provenance:
        """Run it, fill what was saved, and say where it came from.

        A trace is a pure function of its request, so after a lost peer, one that failed by its own
        fault, or one whose own limits are too narrow for it, all of it is run again on a route
        without that peer, `retries` times at most and within the one deadline. Nothing is run again
        where nothing had run yet, as the peer was busy, or was lost before. Where there is no
        other, it waits for one that was lost to come back. And it is run again when this process'
        own network daemon was lost. Raises TraceCancelled as soon as the experiment's cancellation
        says so, whatever it waits for.
        """
        with self._swarm.warm.in_use(self.router.refresh):
            return self._run(experiment, options)

    def _run(self, experiment: Experiment, options: TraceOptions) -> Provenance:
        retrying = _Retrying(self.router, experiment, options, self._swarm.where.own)
        tries, route = retrying.tries, retrying.first_route()
        while True:
            experiment.cancellation.check()  # it may have been while a peer was lost
            tries.take(route, needed_blocks(experiment.graph, experiment.outline))
            tries.has_run = False
            try:
                return self._run_once(experiment, options, route, retrying.left_seconds, tries)
            except TraceTimeout as error:
                retrying.end_at_deadline(error)
            except TransportLost as error:
                route = retrying.after_own_loss(error, route)
            except PeerError as error:
                if isinstance(error, BadAnswer) and tries.has_run and experiment.chosen:
                    experiment.chosen.forget()
                route = retrying.route_after(error, route)

    def estimate(self, experiment: Experiment, options: TraceOptions) -> Mapping[str, Any]:
        """What it would take on the route that it would get now."""
        route = self.router.route(experiment, options, self.router.tries(options))
        plan = self._plan(experiment, route, outlives_peers=False)
        return estimate_of(experiment, plan, route)

    @waiting_for("asking who serves the model")
    def describe(self) -> str:
        """Who serves which blocks, and the route that a trace of all of them would take now."""
        return self.router.describe()

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
            model_id=self.router.model_id,
            dtype=self.router.dtype,
            inputs=experiment.inputs,
            consts=experiment.consts,
            expected=experiment.saved_specs(),
            never_come=experiment.never_come,
            objection=experiment.objection,
            trace_id=secrets.token_bytes(16),
            deadline_seconds=deadline_seconds,
            stand_in=partial(
                self.router.stand_in, hosts, options, demand_of(experiment), tries.left_out
            ),
            expected_seconds=partial(stage_seconds, hosts, plan.passes, experiment.bill.node_flops),
            known=lambda: self.router.records.signed,
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
                if experiment.chosen is not None:  # what has come since the last tick
                    experiment.chosen.keep(dict(job.saves))
                tries.count += job.moves
                tries.has_run = job.has_run
                tries.has_ever_run |= job.has_run
                tries.heed_replaced(job.replaced)
                tries.parted = job.hearing.parted
                tries.relay |= tries.parted | job.relays.used.keys()
                until = time.monotonic() + _APART_SECONDS
                self._apart = {**dict.fromkeys(tries.relay, until), **self._apart}
        for hop in job.hops:
            self.router.bans.served(hop.peer.peer_id)
        experiment.fill(job.saves)
        return Provenance(
            model_id=self.router.model_id,
            dtype=self.router.dtype,
            attention=self.router.attention,
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


@final
class _Retrying:
    """Of one trace, all of its tries: what follows where one has failed.

    That is another route, which is then counted, or the error with which the trace ends; `own` are
    the arguments with which commands of this user come to the swarm.
    """

    def __init__(
        self, router: Router, experiment: Experiment, options: TraceOptions, own: Sequence[str]
    ) -> None:
        self._router = router
        self._experiment = experiment
        self._options = options
        self._own = own
        self._ends_at = time.monotonic() + options.deadline_seconds
        self._refused: PeerFailed | None = None  # by a host's own limits, the last one
        self.tries = router.tries(options)

    @property
    def left_seconds(self) -> float:
        """How long the trace may still take."""
        return max(self._ends_at - time.monotonic(), 0.0)

    def first_route(self) -> Route:
        """The first one. Raises TraceTimeout, and what `Router.route` raises."""
        try:
            return self._route()
        except (DeadlineExceeded, DirectoryUnavailable) as error:
            if time.monotonic() < self._ends_at - TIMERS_SECONDS:
                raise
            raise TraceTimeout(
                f"the trace was not done in the {self._options.deadline_seconds:g} s that it had; "
                f"the directory had not said yet who serves the model ({error}); allow more time "
                "with deadline="
            ) from None

    def end_at_deadline(self, error: TraceTimeout) -> NoReturn:
        """Raise what the trace ends with."""
        tries = self.tries
        if tries.busy and not tries.has_run:  # a last try, for which no time was left
            *_, busy = tries.busy.values()
            text = f"{error}{tries.busy_text(busy, self._options.deadline_seconds)}"
            tries.advise(busy, text, self._own)
            raise busy from error
        error.args = (f"{error}{tries.before_text()}",)
        raise error

    def after_own_loss(self, error: TransportLost, before: Route) -> Route:
        """The route after this process' own network daemon was lost, which is no peer's fault.

        By the records of now: peers refuse old ones. Where there is none now, the one before may
        still do. Raises TransportLost if nothing is run again.
        """
        if self.tries.are_used_up or time.monotonic() > self._ends_at:
            raise TransportLost(
                "the network daemon (p2pd) of this process ended while the trace ran; run the "
                f"trace again: a new one is started for it{self.tries.before_text()}"
            ) from error
        self.tries.heed_own_loss()
        try:
            route = self._route()
        except ShutOut:
            raise
        except (NoRoute, SwarmError):
            route = before
        self.tries.run_again()
        return route

    def route_after(self, error: PeerError, before: Route) -> Route:
        """The route after one on which a peer is to blame. Raises `error` where there is none.

        What is wrong with the graph is so everywhere, and ends the trace at once.
        """
        if isinstance(error, PeerFailed):
            line = self._experiment.line_of(error.node)
            told = f"{error.code} at peer {error.peer} (blocks {error.span}): {error}"
            error.args = (f"{f'{line}: ' if line else ''}{told}",)
            if not error.is_own_fault:
                return self._route_after_refusal(error)
            # A graph that has every host fail goes to no more of them than `retries` says, as one
            # that ends them, which looks like a loss, always did: each admits it within its own
            # limits, and its client could send it to all of them anyway.
        return self._route_after_loss(error, before)

    def _route_after_refusal(self, error: PeerFailed) -> Route:
        error.args = (f"{error}{self.tries.before_text()}",)
        if error.code not in _OWN_LIMITS or self.tries.are_used_up:
            raise error
        self._refused = error
        self.tries.heed(error)  # another peer may allow more, or have more left
        try:
            route = self._route()
        except (NoRoute, SwarmError):
            raise error from None
        self.tries.run_again()
        return route

    def _route_after_loss(self, error: PeerError, before: Route) -> Route:
        tries = self.tries
        # Who is busy, or not there any more, was mostly found to be before anything ran.
        is_retry = tries.has_run or not isinstance(error, PeerBusy | PeerLost)
        tries.hold_against(error, self._router.bans)
        ends = is_retry or (isinstance(error, PeerLost) and tries.retries == 0)
        if ends and tries.are_used_up:
            raise self._advised(error, tries.tried_text())
        if not is_retry and not tries.has_ever_run:
            tries.forget_hardware()
        may_return = self._refused is None and isinstance(error, PeerLost | PeerFailed)
        try:
            route = self._router.another_route(
                *(self._experiment, self._options, tries, self._ends_at, before),
                lost=error if may_return else None,
            )
        except NoRoute as none:
            if self._refused is not None:  # that says more than that others are gone
                raise self._refused from error
            text = str(none).replace("no route", "no other route", 1)
            if isinstance(error, PeerBusy):
                text += tries.busy_text(error, self._options.deadline_seconds)
            raise self._advised(error, text) from none
        except ShutOut as out:
            # It isn't the peer, and no other trace does better.
            raise out from error
        except SwarmError as none:
            why = f"whether there is another route is not known: {none}"
            raise self._advised(error, why) from none
        if time.monotonic() > self._ends_at:
            why = "the deadline left no time for another route (deadline=)"
            raise self._advised(error, why)
        if is_retry:
            tries.run_again()
        return route

    def _route(self) -> Route:
        return self._router.route(self._experiment, self._options, self.tries, self._ends_at)

    def _advised(self, error: PeerError, why: str) -> PeerError:
        self.tries.advise(error, why, self._own)
        return error
