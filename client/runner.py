"""Runs one model's experiments on a swarm: route, split, job; again elsewhere if a peer is lost."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from glasshive.client.demand import demand_of
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
from glasshive.client.progress import JobDisplay
from glasshive.client.provenance import Provenance
from glasshive.client.relay import Pair
from glasshive.client.route import Route
from glasshive.client.router import Router
from glasshive.client.tries import Tries
from glasshive.dht.errors import DeadlineExceeded, ShutOut, SwarmError, TransportLost
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

        A trace is a pure function of its request, so after a lost peer, or one whose own limits
        are too narrow for it, all of it is run again on a route without that peer, `retries` times
        at most and within the one deadline. Where there is no other, it waits for that one to come
        back. And it is run again when this process' own network daemon was lost. Raises
        TraceCancelled as soon as the experiment's cancellation says so, whatever it waits for.
        """
        with self._swarm.warm.in_use(self.router.refresh):
            return self._run(experiment, options)

    def _run(self, experiment: Experiment, options: TraceOptions) -> Provenance:
        ends_at = time.monotonic() + options.deadline_seconds
        tries = self.router.tries(options)
        try:
            route = self.router.route(experiment, options, tries, ends_at)
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
                    route = self.router.route(experiment, options, tries, ends_at)
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
                tries.hold_against(error, self.router.bans)
                if is_retry and tries.are_used_up:
                    tries.advise(error, tries.tried_text(), own)
                    raise
                if isinstance(error, PeerBusy) and not tries.has_ever_run:
                    tries.forget_hardware()
                try:
                    route = self.router.another_route(
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
        route = self.router.route(experiment, options, self.router.tries(options))
        plan = self._plan(experiment, route, outlives_peers=False)
        return estimate_of(experiment, plan, route)

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
