"""Runs one model's experiments on a swarm: route, split, job; again elsewhere if a peer is lost."""

from __future__ import annotations

import contextlib
import math
import secrets
import shlex
import threading
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from glasshive.client.bans import BUSY_SECONDS, LOST_SECONDS, Bans
from glasshive.client.coverage import Kind, Wanted
from glasshive.client.demand import Demand, demand_of
from glasshive.client.errors import NoRoute, PeerBusy, PeerError, PeerFailed, TraceTimeout
from glasshive.client.experiment import Experiment, TraceOptions
from glasshive.client.job import Job
from glasshive.client.progress import JobDisplay
from glasshive.client.provenance import Hop, Provenance
from glasshive.client.relay import Pair
from glasshive.client.round_trips import PATIENCE_SECONDS
from glasshive.client.route import Route, Seconds, choose_route, choose_stand_in, rivals
from glasshive.dht.errors import DeadlineExceeded, ShutOut, SwarmError, UnknownModel
from glasshive.dht.records import PeerRecord
from glasshive.graph.errors import GraphError
from glasshive.graph.plan import HIDDEN, TOKENS, Plan
from glasshive.graph.split import needed_blocks, split
from glasshive.security.keys import PeerId

if TYPE_CHECKING:
    from glasshive.client.swarm import Swarm


_ASK_SECONDS: Final = 2.0  # for who serves a model, where those who are known would do
_APART_SECONDS: Final = 600.0  # for so long two peers that can't reach each other aren't tried
_FRESH_SECONDS: Final = 15.0  # for so long what is known of the peers is not asked for again
# What a host refuses for a limit of its own, which another may not have.
_OWN_LIMITS: Final = frozenset({"OverBudget", "QuotaExceeded"})


@dataclass
class _Tries:
    """Of one trace: whom it avoids by now, and how often it was run elsewhere, or a part of it."""

    avoid: set[PeerId]
    lost: dict[PeerId, float] = field(default_factory=dict)  # with the expiry of their records then
    count: int = 0
    reruns: int = 0
    parted: set[Pair] = field(default_factory=set)  # of the last try: who didn't reach each other
    relay: set[Pair] = field(default_factory=set)  # and of all tries
    backends: frozenset[str] | None = None  # on which it may run; None: on any


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
    ) -> None:
        self._swarm = swarm
        self._model_id = model_id
        self._name = name
        self._dtype = dtype
        self._attention = attention
        self._n_blocks = n_blocks
        self._lock = threading.Lock()
        # Of the last look-up: all routes that there are, so that a next one need not wait.
        self._known: list[PeerRecord] = []
        self._asked_at = -math.inf  # on the monotonic clock
        self._bans = Bans() if bans is None else bans
        self._apart: dict[Pair, float] = {}  # who can't reach each other, until then

    def run(self, experiment: Experiment, options: TraceOptions) -> Provenance:
        """Run it, fill what was saved, and say where it came from.

        A trace is a pure function of its request, so after a lost peer, or one whose own limits
        are too narrow for it, all of it is run again on a route without that peer, `retries` times
        at most and within the one deadline.
        """
        ends_at = time.monotonic() + options.deadline_seconds
        tries = _Tries(set(options.avoid))
        try:
            route = self._route(experiment, options, tries, ends_at)
        except DeadlineExceeded:
            if time.monotonic() < ends_at:
                raise
            raise TraceTimeout(
                f"the trace was not done in the {options.deadline_seconds:.3g} s that it had; the "
                "directory had not said yet who serves the model; allow more time with deadline="
            ) from None
        if not options.across_hardware:
            tries.backends = frozenset(one.backend for one in route.records)
        refused: PeerFailed | None = None
        while True:
            left_seconds = max(ends_at - time.monotonic(), 0.0)
            try:
                return self._run_once(experiment, options, route, left_seconds, tries)
            except PeerFailed as error:
                line = experiment.line_of(error.node)
                error.args = (f"{f'{line}: ' if line else ''}{_told(error)}",)
                if error.code not in _OWN_LIMITS or tries.count == options.retries:
                    raise
                refused = error
                tries.avoid.add(error.peer)  # another peer may allow more, or have more left
                try:
                    route = self._route(experiment, options, tries, ends_at)
                except (NoRoute, SwarmError):
                    raise error from None
            except PeerError as error:
                tries.avoid.add(error.peer)
                tries.lost |= {
                    p.peer_id: p.expires_at_seconds for p in self._known if p.peer_id == error.peer
                }
                is_busy = isinstance(error, PeerBusy)
                self._bans.trouble(error.peer, BUSY_SECONDS if is_busy else LOST_SECONDS)
                if tries.count == options.retries:
                    self._advise(
                        error,
                        f"{_routes(tries.count + 1)} tried, as retries={options.retries} says",
                    )
                    raise
                try:
                    route = self._other_route(experiment, options, tries, ends_at, error)
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
            tries.count += 1
            tries.reruns += 1

    def _other_route(
        self,
        experiment: Experiment,
        options: TraceOptions,
        tries: _Tries,
        ends_at: float,
        lost: PeerError,
    ) -> Route:
        """One without the peer that was lost.

        Where there is none, with it if only another peer has lost it: the client then relays.
        """
        try:
            return self._route(experiment, options, tries, ends_at)
        except NoRoute:
            if not any(lost.peer in pair for pair in tries.parted):
                raise
            tries.avoid.discard(lost.peer)
            return self._route(experiment, options, tries, ends_at)

    def estimate(self, experiment: Experiment, options: TraceOptions) -> Mapping[str, Any]:
        """What it would take on the route that it would get now."""
        route = self._route(experiment, options, _Tries(set(options.avoid)))
        plan = self._plan(experiment, route, outlives_peers=False)
        return {
            "route": [f"{one.start}:{one.end} {one.peer_id}" for one in route.records],
            "hops": len(plan.parts),
            "passes": len(plan.passes.passes),
            "rows": sum(one.batch for one in plan.passes.passes),
            "compute_seconds": _compute_seconds(plan, route),
            "expected_seconds": route.expected_seconds,
            "hop_bytes": sum(self._edge_bytes(experiment, plan)),
            "saved_bytes": experiment.bill.saved_bytes,
            "peak_bytes": experiment.bill.peak_bytes,
            "flops": experiment.bill.flops,
            "sent_bytes": sum(tensor.nbytes for tensor in experiment.consts.values()),
        }

    def describe(self) -> str:
        """Who serves which blocks, and the route that a trace of all of them would take now."""
        records = sorted(self._records(fresh=False), key=lambda one: (one.start, one.end))
        lines = [
            f"  blocks {one.start}:{one.end} of {one.n_blocks}  {one.dtype}  {one.attention}  "
            f"{one.peer_id}"
            for one in records
        ]
        text = "served by\n" + "\n".join(lines or ["  nobody"])
        revoked = self._swarm.revoked(records)
        self._measure([one for one in records if one.peer_id not in revoked])
        for also_banned in (False, True):
            with contextlib.suppress(NoRoute):
                route = self._choose(
                    *(records, range(self._n_blocks), Demand(), _Tries(set()), None),
                    also_banned=also_banned,
                )
                hops = "\n".join(map(self._hop_line, route.records))
                return f"{text}\nroute of a trace now\n{hops}"
        return f"{text}\nno route over all blocks now"

    def _hop_line(self, one: PeerRecord) -> str:
        way_seconds = self._swarm.round_trips.of(one.peer_id)
        way = "not measured" if way_seconds is None else f"{1000 * way_seconds:.1f} ms"
        return (
            f"  blocks {one.start}:{one.end}  {one.peer_id}  {one.backend}  round trip {way}  "
            f"{one.throughput_tokens_per_second:.0f} tokens/s  load {one.load:.0%}"
        )

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
        tries: _Tries,
    ) -> Provenance:
        outlives = experiment.passes.are_generation and tries.count < options.retries
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
            stand_in=partial(self._stand_in, hosts, options, demand_of(experiment)),
            on_answer=self._swarm.round_trips.saw,
            most_moves=options.retries - tries.count,
            avoid=frozenset(tries.avoid),
            relay=tries.relay | self._apart_now(),
        )
        with JobDisplay(options.show_progress) as display:

            def tick() -> None:
                display.update(job)
                if experiment.chosen is not None:
                    experiment.chosen.hear(dict(job.saves))

            try:
                self._swarm.run_job(job, tick)
            finally:
                tries.count += job.moves
                tries.parted = job.hearing.parted
                tries.relay |= tries.parted | job.relays.used.keys()
        for hop in job.hops:
            self._bans.served(hop.peer.peer_id)
        until = time.monotonic() + _APART_SECONDS
        self._apart = {**dict.fromkeys(job.relays.used, until), **self._apart}
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
                    backend=hosts[hop.part.index].backend,
                    compute_seconds=hop.compute_seconds,
                    wait_seconds=hop.wait_seconds,
                    wire_seconds=hop.wire_seconds,
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
            retried=tries.reruns,
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
        part: int,
        left_out: Collection[PeerId],
    ) -> tuple[PeerRecord, Mapping[PeerId, bytes]]:
        """Who may run a part in place of its host, which was lost; that is changed in `hosts`.

        And the signed records of all who serve the model. On the loop. Raises NoRoute. Who is known
        of late need not be asked for while all wait; of a swarm whose directory is gone, those who
        were known may still be there.
        """
        lost = hosts[part]
        self._bans.trouble(lost.peer_id, LOST_SECONDS)
        choose = partial(choose_stand_in, lost=lost, avoid=left_out, seconds=self._seconds(demand))
        if self._is_fresh():
            with contextlib.suppress(NoRoute):
                hosts[part] = choose(self._usable(self._known, options))
                return hosts[part], self._signed()
        with contextlib.suppress(SwarmError):
            self._learn(await self._swarm.ask_records(self._model_id, _ASK_SECONDS))
        try:
            hosts[part] = choose(self._usable(self._known, options))
        except NoRoute:  # but maybe one that has started again since it was left out
            hosts[part] = choose(self._usable(self._known, options, also_banned=True))
        return hosts[part], self._signed()

    def _signed(self) -> dict[PeerId, bytes]:
        return {one.peer_id: one.signed for one in self._known}

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
        """What a peer adds to a route of this demand, by the round trips that are known."""
        way = self._swarm.round_trips.of
        return lambda one, blocks: demand.seconds(one, blocks, way(one.peer_id))

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

    def _route(
        self,
        experiment: Experiment,
        options: TraceOptions,
        tries: _Tries,
        ends_at: float = math.inf,
    ) -> Route:
        """A route of the peers that are named, without those to avoid, and without those that are
        left out for a while if it can be had.

        `ends_at`, on the monotonic clock, is until when others may be asked.
        """
        needed = needed_blocks(experiment.graph, experiment.outline)
        demand = demand_of(experiment)
        known = self._records(fresh=False, ends_at=ends_at)
        left_out = self._left_out(known, tries)
        candidates = [
            one
            for one in known
            if one.peer_id not in left_out
            and (options.route is None or one.peer_id in options.route)
        ]
        self._measure(rivals(candidates, needed, self._n_blocks), ends_at)
        choose = partial(
            self._choose, needed=needed, demand=demand, tries=tries, only=options.route
        )
        with contextlib.suppress(NoRoute):  # what is known may be old
            return choose(known)
        known = self._records(fresh=True, ends_at=ends_at)
        with contextlib.suppress(NoRoute):
            return choose(known)
        return choose(known, also_banned=True)

    def _left_out(
        self, known: Sequence[PeerRecord], tries: _Tries, *, also_banned: bool = False
    ) -> set[PeerId]:
        """Those of these peers that are revoked, avoided by the trace, or left out for a while.

        With `also_banned` not those that were lost, and have announced themselves since.
        """
        avoid = set(tries.avoid)
        if also_banned:
            for one in known:
                if one.expires_at_seconds > tries.lost.get(one.peer_id, math.inf):
                    avoid.discard(one.peer_id)
        else:
            avoid |= {one.peer_id for one in known if one.peer_id in self._bans}
        return self._swarm.revoked(known) | avoid

    def _choose(
        self,
        known: list[PeerRecord],
        needed: Collection[int],
        demand: Demand,
        tries: _Tries,
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
        )
        if tries.backends is None:
            return choose(known)
        try:
            return choose([one for one in known if one.backend in tries.backends])
        except NoRoute as none:
            other = {one.backend for one in choose(known).records} - tries.backends
            raise NoRoute(
                f"no route on {' and '.join(sorted(tries.backends))}, as before, within which "
                f"results are bit-equal; there is one on {' and '.join(sorted(other))}: allow it "
                "with across_hardware=True"
            ) from none

    def _measure(self, records: Sequence[PeerRecord], ends_at: float = math.inf) -> None:
        """Learn how far away these peers are, unless that is known; takes a second at most."""
        patience_seconds = min(PATIENCE_SECONDS, ends_at - time.monotonic())
        to_ask = self._swarm.round_trips.to_ask(records)
        if to_ask and patience_seconds > 0:
            with contextlib.suppress(SwarmError):
                self._swarm.measure(to_ask, patience_seconds)

    def _is_fresh(self) -> bool:
        """Whether what is known of the peers was asked for of late, and is all still valid."""
        return (
            bool(self._known)
            and time.monotonic() < self._asked_at + _FRESH_SECONDS
            and self._are_valid()
        )

    def _are_valid(self) -> bool:
        now = self._swarm.transport.now()
        return all(one.expires_at_seconds >= now for one in self._known)

    def _learn(self, records: Iterable[PeerRecord]) -> None:
        """Keep what the directory has just said. In the loop's thread as well, without a lock."""
        kind = (self._dtype, self._attention)
        self._known = [one for one in records if (one.dtype, one.attention) == kind]
        self._asked_at = time.monotonic()

    def _records(self, *, fresh: bool, ends_at: float = math.inf) -> list[PeerRecord]:
        """The peers of this model and dtype: as known of late, or else asked for again.

        Those whose records are still valid do where the directory can't be asked, unless `fresh`.
        """
        with self._lock:
            if not fresh and self._is_fresh():
                return list(self._known)
            would_do = bool(self._known) and self._are_valid() and not fresh
            left_seconds = max(ends_at - time.monotonic(), 0.0)
            try:
                self._learn(
                    self._swarm.records(
                        self._model_id,
                        min(left_seconds, _ASK_SECONDS) if would_do else left_seconds,
                    )
                )
            except UnknownModel:  # its last peer withdrew: the route says what is missing
                self._learn([])
            except ShutOut:
                raise
            except SwarmError:
                if not would_do:
                    raise
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
