"""Runs one model's experiments on a swarm: route, split, job; again elsewhere if a peer is lost."""

from __future__ import annotations

import contextlib
import math
import secrets
import shlex
import threading
import time
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, Final

from glasshive.client.coverage import Kind, Wanted
from glasshive.client.errors import NoRoute, PeerBusy, PeerError, PeerFailed, TraceTimeout
from glasshive.client.experiment import Experiment, TraceOptions
from glasshive.client.job import Job
from glasshive.client.progress import JobDisplay
from glasshive.client.provenance import Hop, Provenance
from glasshive.client.route import Route, choose_route
from glasshive.dht.errors import DeadlineExceeded, ShutOut, SwarmError, UnknownModel
from glasshive.dht.records import PeerRecord
from glasshive.graph.errors import GraphError
from glasshive.graph.plan import HIDDEN, TOKENS, Plan
from glasshive.graph.split import needed_blocks, split
from glasshive.security.keys import PeerId

if TYPE_CHECKING:
    from glasshive.client.swarm import Swarm


# What a host refuses for a limit of its own, which another may not have.
_OWN_LIMITS: Final = frozenset({"OverBudget", "QuotaExceeded"})


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
    ) -> None:
        self._swarm = swarm
        self._model_id = model_id
        self._name = name
        self._dtype = dtype
        self._attention = attention
        self._n_blocks = n_blocks
        self._lock = threading.Lock()
        self._known: list[PeerRecord] = []
        # Peers that were lost, with the expiry of the record that they had then: one that lives
        # announces itself anew within a third of a record's life.
        self._lost: dict[PeerId, float] = {}

    def run(self, experiment: Experiment, options: TraceOptions) -> Provenance:
        """Run it, fill what was saved, and say where it came from.

        A trace is a pure function of its request, so after a lost peer, or one whose own limits
        are too narrow for it, all of it is run again on a route without that peer, `retries` times
        at most and within the one deadline.
        """
        ends_at = time.monotonic() + options.deadline_seconds
        avoid, only = set(options.avoid), options.route
        try:
            route = self._route(experiment, avoid, only, fresh=False, ends_at=ends_at)
        except DeadlineExceeded:
            if time.monotonic() < ends_at:
                raise
            raise TraceTimeout(
                f"the trace was not done in the {options.deadline_seconds:.3g} s that it had; the "
                "directory had not said yet who serves the model; allow more time with deadline="
            ) from None
        attempt = 0
        refused: PeerFailed | None = None
        while True:
            left_seconds = max(ends_at - time.monotonic(), 0.0)
            try:
                return self._run_once(experiment, options, route, left_seconds, attempt)
            except PeerFailed as error:
                line = experiment.line_of(error.node)
                error.args = (f"{f'{line}: ' if line else ''}{_told(error)}",)
                if error.code not in _OWN_LIMITS or attempt == options.retries:
                    raise
                refused = error
                avoid.add(error.peer)  # another peer may allow more, or have more left
                try:
                    route = self._route(experiment, avoid, only, fresh=True, ends_at=ends_at)
                except (NoRoute, SwarmError):
                    raise error from None
            except PeerError as error:
                avoid.add(error.peer)
                if not isinstance(error, PeerBusy):  # which is there, and free again soon
                    self._remember_lost(error.peer, route)
                if attempt == options.retries:
                    self._advise(error, f"{_routes(attempt + 1)} tried, as retries={attempt} says")
                    raise
                try:
                    route = self._route(experiment, avoid, only, fresh=True, ends_at=ends_at)
                except NoRoute as none:
                    if refused is not None:  # that says more than that others are gone
                        raise refused from error
                    self._advise(error, str(none).replace("no route", "no other route", 1))
                    raise error from none
                except ShutOut as out:
                    # It isn't the peer, and no other trace does better.
                    raise out from error
                except SwarmError as none:
                    self._advise(error, f"whether there is another route is not known: {none}")
                    raise error from none
                if time.monotonic() > ends_at:
                    self._advise(error, "the deadline left no time for another route (deadline=)")
                    raise
            attempt += 1

    def estimate(self, experiment: Experiment, options: TraceOptions) -> Mapping[str, Any]:
        """What it would take on the route that it would get now."""
        route = self._route(experiment, options.avoid, options.route, fresh=False)
        plan = self._plan(experiment, route)
        return {
            "route": [f"{one.start}:{one.end} {one.peer_id}" for one in route.records],
            "hops": len(plan.parts),
            "passes": len(plan.passes.passes),
            "rows": sum(one.batch for one in plan.passes.passes),
            "compute_seconds": _compute_seconds(plan, route),
            "hop_bytes": sum(self._edge_bytes(experiment, plan)),
            "saved_bytes": experiment.bill.saved_bytes,
            "peak_bytes": experiment.bill.peak_bytes,
            "flops": experiment.bill.flops,
            "sent_bytes": sum(tensor.nbytes for tensor in experiment.consts.values()),
        }

    def describe(self) -> str:
        """Who serves which blocks, a line each."""
        records = sorted(self._records(fresh=False), key=lambda one: (one.start, one.end))
        lines = [
            f"  blocks {one.start}:{one.end} of {one.n_blocks}  {one.dtype}  {one.attention}  "
            f"{one.peer_id}"
            for one in records
        ]
        return "served by\n" + "\n".join(lines or ["  nobody"])

    def _advise(self, error: PeerError, why: str) -> None:
        """Say behind what happened why the trace was not run elsewhere, and what to do."""
        status = shlex.join(["glasshive", "status", *self._swarm.where.own])
        error.args = (
            f"{error}; {why}; run the trace again when `{status}` shows its blocks as served",
        )

    def _edge_bytes(self, experiment: Experiment, plan: Plan) -> list[int]:
        sizes = []
        for edge in plan.edges():
            one = plan.passes.passes[max(edge.pass_index, 0)]
            if edge.value == HIDDEN:
                sizes.append(experiment.outline.hidden_spec(one.batch, one.seq).nbytes)
            elif edge.value == TOKENS:
                sizes.append(8 * one.batch)
            else:
                sizes.append(experiment.specs[edge.value].nbytes)
        return sizes

    def _run_once(
        self,
        experiment: Experiment,
        options: TraceOptions,
        route: Route,
        deadline_seconds: float,
        attempt: int,
    ) -> Provenance:
        plan = self._plan(experiment, route)
        job = Job(
            transport=self._swarm.transport,
            identity=self._swarm.identity,
            plan=plan,
            peers=route.peers,
            records=route.signed,
            model_id=self._model_id,
            dtype=self._dtype,
            inputs=experiment.inputs,
            consts=experiment.consts,
            expected=experiment.saved_specs(),
            never_come=experiment.never_come,
            objection=experiment.objection,
            trace_id=secrets.token_bytes(16),
            deadline_seconds=deadline_seconds,
        )
        with JobDisplay(options.show_progress, route) as display:

            def tick() -> None:
                display.update(job)
                if experiment.chosen is not None:
                    experiment.chosen.hear(dict(job.saves))

            self._swarm.run_job(job, tick)
        experiment.fill(job.saves)
        return Provenance(
            model_id=self._model_id,
            dtype=self._dtype,
            attention=self._attention,
            graph_digest=experiment.digest,
            hops=tuple(
                Hop(
                    peer=hop.peer.peer_id,
                    blocks=str(hop.part.span),
                    backend=route.records[hop.part.index].backend,
                    compute_seconds=hop.compute_seconds,
                    hidden_bytes=hop.hidden_bytes,
                    carried_bytes=hop.carried_bytes,
                    saved_bytes=hop.saved_bytes,
                )
                for hop in job.hops
            ),
            seconds=job.clock() - job.began_at,
            sent_bytes=job.sent_bytes,
            received_bytes=job.received_bytes,
            passes=len(plan.passes.passes),
            retried=attempt,
            audited=all(hop.audited for hop in job.hops),
        )

    def _plan(self, experiment: Experiment, route: Route) -> Plan:
        """The plan, in which every part is what the swarm's policy allows."""
        outline, graph = experiment.outline, experiment.graph
        policy = self._swarm.policy
        try:
            plan = split(
                *(graph, outline, experiment.passes, route.spans, experiment.specs),
                experiment.sampling,
            )
            if policy is not None and policy.version:  # before any whitelist, hosts have the word
                for part in plan.parts:
                    policy.check_graph(part.graph)
            return plan
        except GraphError as error:
            if (line := experiment.line_of(error.node)) is not None:
                error.args = (f"{line}: {error}",)
            raise

    def _route(
        self,
        experiment: Experiment,
        avoid: Collection[PeerId],
        only: Collection[PeerId] | None,
        *,
        fresh: bool,
        ends_at: float = math.inf,
    ) -> Route:
        """A route of the peers of `only`, without those of `avoid`, and without lost ones if it can
        be had.

        `ends_at`, on the monotonic clock, is until when the directory may be asked.
        """
        needed = needed_blocks(experiment.graph, experiment.outline)
        if not fresh:
            with contextlib.suppress(NoRoute):  # what is known may be old
                known = self._records(fresh=False, ends_at=ends_at)
                return self._choose(known, needed, avoid, only)
        known = self._records(fresh=True, ends_at=ends_at)
        with contextlib.suppress(NoRoute):
            return self._choose(known, needed, avoid, only)
        return self._choose(known, needed, avoid, only, also_lost=True)

    def _choose(
        self,
        known: list[PeerRecord],
        needed: Collection[int],
        avoid: Collection[PeerId],
        only: Collection[PeerId] | None,
        *,
        also_lost: bool = False,
    ) -> Route:
        left_out = self._swarm.revoked(known).union(avoid)
        if not also_lost:
            left_out |= {
                one.peer_id
                for one in known
                if one.expires_at_seconds <= self._lost.get(one.peer_id, 0.0)
            }
        kind = Kind(self._dtype, "none", self._attention)
        wanted = Wanted(self._name, kind, self._swarm.where.hosts)
        return choose_route(known, needed, self._n_blocks, avoid=left_out, only=only, wanted=wanted)

    def _remember_lost(self, peer: PeerId, route: Route) -> None:
        now = self._swarm.transport.now()
        with self._lock:
            self._lost = {one: until for one, until in self._lost.items() if until > now}
            for one in route.records:
                if one.peer_id == peer:
                    self._lost[peer] = one.expires_at_seconds

    def _records(self, *, fresh: bool, ends_at: float = math.inf) -> list[PeerRecord]:
        """The peers of this model and dtype: as known, or asked again if any has expired."""
        with self._lock:
            now = self._swarm.transport.now()
            if fresh or not self._known or any(one.expires_at_seconds < now for one in self._known):
                left_seconds = max(ends_at - time.monotonic(), 0.0)
                try:
                    records = self._swarm.records(self._model_id, left_seconds)
                except UnknownModel:  # its last peer withdrew: the route says what is missing
                    records = []
                kind = (self._dtype, self._attention)
                self._known = [one for one in records if (one.dtype, one.attention) == kind]
            return list(self._known)


def _compute_seconds(plan: Plan, route: Route) -> float:
    """The peers' time for the forward passes, at the speeds that they announce."""
    seconds = 0.0
    for part in plan.parts:
        passes = [plan.passes.passes[one.pass_index] for one in part.stages if one.forward]
        tokens = sum(one.batch * one.seq for one in passes)
        seconds += tokens / max(route.records[part.index].throughput_tokens_per_second, 1e-3)
    return seconds


def _routes(count: int) -> str:
    return "1 route was" if count == 1 else f"{count} routes were"


def _told(error: PeerFailed) -> str:
    return f"{error.code} at peer {error.peer} (blocks {error.span}): {error}"
