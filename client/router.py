"""Which peers a trace of one model runs on: a route, another one after that failed, a stand-in."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import TYPE_CHECKING, final

from glasshive.client.bans import BUSY_SECONDS, LOST_SECONDS, Bans
from glasshive.client.cancellation import Cancellation
from glasshive.client.coverage import NOT_QUANTISED, Kind, Wanted
from glasshive.client.demand import Demand, demand_of
from glasshive.client.errors import NoRoute, PeerError
from glasshive.client.experiment import Experiment, TraceOptions
from glasshive.client.known_records import KnownRecords
from glasshive.client.left_out import BUSY, LeftOut
from glasshive.client.progress import JobDisplay
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
from glasshive.dht.errors import ShutOut, SwarmError
from glasshive.dht.records import PeerRecord
from glasshive.graph.split import needed_blocks
from glasshive.security.keys import PeerId

if TYPE_CHECKING:
    from glasshive.client.swarm import Swarm

__all__ = ["Router"]


@final
class Router:
    """Of one model, in one dtype and attention, for the traces of one connection.

    Three lists say whom it doesn't take: `bans` holds for all traces for a while, and is passed
    over where there is nobody else; what a trace leaves out (`Tries.left_out`) for that trace; and
    the swarm's policy revokes for good. `chance` and `liking` decide among peers that are alike.
    """

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
        self.records = KnownRecords(swarm, model_id, dtype, attention)
        self.bans = Bans() if bans is None else bans
        self.model_id = model_id
        self.dtype = dtype
        self.attention = attention
        self._swarm = swarm
        self._wanted = Wanted(name, Kind(dtype, NOT_QUANTISED, attention), swarm.where.hosts)
        self._n_blocks = n_blocks
        self._chance = chance
        self._liking = liking or liking_of(str(chance()))
        self._demand = Demand()  # of the last trace

    async def refresh(self) -> None:
        """Ask what the next trace will need, on the loop: who serves the model, and how far away
        the best few of each span are, and one more, which may be better than they.

        What isn't answered is left as it is. Raises ShutOut, and SwarmError for this process' own
        network daemon.
        """
        lost = self._swarm.transport.lost
        if lost.is_set():  # a trace that runs has to see that; the next one starts a new daemon
            return
        await self.records.ask()
        known = [one for one in self.records.now if self.records.is_valid(one)]
        usable, way = self._usable(known, TraceOptions()), self._swarm.round_trips.of
        others = some_others(usable, lambda one: way(one.peer_id) is None, self._chance)
        few = best_few(usable, self._seconds(self._demand), self._liking)
        to_ask = self._swarm.round_trips.to_ask([*others, *few], AHEAD_SECONDS)
        if to_ask and not lost.is_set():
            await self._swarm.ask_round_trips(to_ask, PATIENCE_SECONDS)

    def tries(self, options: TraceOptions) -> Tries:
        """Those of a new trace, of which there are none yet."""
        left_out = LeftOut(
            options.avoid,
            now=self._swarm.transport.now,
            tried_at=lambda: self.records.tried_at,
            clock=time.monotonic,
        )
        return Tries(left_out, options.retries, options.across_hardware, self._chance)

    def route(
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
        get = partial(self.records.get, ends_at=ends_at, cancellation=experiment.cancellation)
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
        if not (tries.has_waited and self.records.are_fresh):  # who waits doesn't ask each time
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

    def another_route(
        self,
        experiment: Experiment,
        options: TraceOptions,
        tries: Tries,
        ends_at: float,
        before: Route,
        *,
        lost: PeerError | None,
    ) -> Route:
        """`route` after one that failed, for which it waits if a peer was lost that may return, or
        was busy and may have a place.

        `lost` is the error of a peer that was lost, or has failed by its own fault.

        Where there is none without a peer that only another one has lost, or without that one, it
        is one with both: the client then relays.
        """
        left_out = tries.left_out
        none = self._route_or_why(experiment, options, tries, ends_at)
        if isinstance(none, Route):
            return none
        if lost is not None and isinstance(none, NoRoute) and (by := tries.accuser_of(lost)):
            left_out.forgive(lost.peer, by)  # maybe it can reach nobody
            return self.route(experiment, options, tries, ends_at)
        if tries.busy and self._wait_for_a_place(experiment, options, tries, ends_at):
            none = self._route_or_why(experiment, options, tries, ends_at)
            if isinstance(none, Route):
                return none
        if lost is None:
            raise none

        def choose(back: Sequence[PeerRecord] | None = None) -> Route:
            # A directory that was lost as well may not know of the others yet.
            known = {
                one.peer_id: one for one in (*(back or ()), *before.records, *self.records.now)
            }
            return self._choose(
                [one for one in known.values() if back is not None or self.records.is_valid(one)],
                *(needed_blocks(experiment.graph, experiment.outline), demand_of(experiment)),
                *(tries, options.route),
                also_banned=True,
                back=[one.peer_id for one in back or ()],
            )

        awaited = self._awaited(left_out, lambda back: choose(back).records, lost.peer)
        if awaited is None:
            raise none
        left_seconds = partial(left_out.left_seconds, awaited)
        if (seconds := min(left_seconds(), ends_at - time.monotonic())) > 0:
            until = self.records.until(choose, left_seconds, ends_at)
            text = f"waiting for {awaited[-8:]} to come back ({left_out.why(awaited)})"
            try:
                with JobDisplay(options.show_progress, tries.said) as display:
                    return self._swarm.run(
                        *(until, seconds + 10, experiment.cancellation),
                        lambda: display.say(text, left_out.gone_seconds(awaited)),
                    )
            except NoRoute as error:
                none = error if isinstance(none, NoRoute) else none
        gone_seconds = left_out.gone_seconds(awaited)
        if 1 <= gone_seconds < math.inf:
            waited = f"waited {gone_seconds:.0f} s for {awaited} to come back; "
            none.args = (f"{waited}{none}",)
        raise none

    def _awaited(
        self,
        left_out: LeftOut,
        choose: Callable[[Sequence[PeerRecord]], Sequence[PeerRecord]],
        lost: PeerId,
    ) -> PeerId | None:
        """Whom to wait for: of those whom `choose` takes if they are back, the one longest.

        It is given those who are waited for longest first, as few as will do. `lost` where it needs
        none of them, as only a valid record is missing; None where all of them are too few.
        """
        gone = left_out.may_return(self.records.now)
        for count in range(len(gone) + 1):
            with contextlib.suppress(NoRoute):
                taken = {one.peer_id for one in choose(gone[:count])}
                return next((one.peer_id for one in gone[:count] if one.peer_id in taken), lost)
        return None

    def _route_or_why(
        self, experiment: Experiment, options: TraceOptions, tries: Tries, ends_at: float
    ) -> Route | NoRoute | SwarmError:
        """`route`, or why there is none, but that the swarm has shut this client out."""
        try:
            return self.route(experiment, options, tries, ends_at)
        except ShutOut:
            raise
        except (NoRoute, SwarmError) as error:
            return error

    def _wait_for_a_place(
        self, experiment: Experiment, options: TraceOptions, tries: Tries, ends_at: float
    ) -> bool:
        """Wait a while for peers that are busy; False if the deadline leaves no time for it."""
        seconds = tries.pause_seconds(ends_at - time.monotonic())
        if seconds <= 0:
            return False
        peers = ", ".join(peer[-8:] for peer in tries.busy)
        with JobDisplay(options.show_progress, tries.said) as display:
            self._swarm.run(
                *(asyncio.sleep(seconds), seconds + 10, experiment.cancellation),
                lambda: display.say(f"waiting for a place at {peers}", tries.waited_seconds),
            )
        tries.waited(seconds)
        return True

    async def stand_in(
        self,
        hosts: list[PeerRecord],
        options: TraceOptions,
        demand: Demand,
        left_out: LeftOut,
        part: int,
        receivers: Callable[[], Collection[int]],
    ) -> PeerRecord:
        """Who may run a part in place of its host, which was lost; that is changed in `hosts`.

        On the loop. Raises NoRoute. Who is known of late need not be asked for while all wait; of a
        swarm whose directory is gone, those who were known may still be there. Where there is
        nobody else, that host itself may come back.

        Peers are dialled by the record that others of the plan are shown of them, and an expired
        one is refused. So those of the receivers, which may change meanwhile, and, where the plan
        has several parts, its own have to be valid. What isn't yet is waited for.
        """
        lost, records = hosts[part], self.records
        if lost.peer_id in left_out:
            is_busy = left_out.why(lost.peer_id) == BUSY
            self.bans.trouble(lost.peer_id, BUSY_SECONDS if is_busy else LOST_SECONDS)

        def choose(*, also_banned: bool = False) -> PeerRecord:
            newest = {one.peer_id: one for one in records.now}
            for receiver in (hosts[one] for one in receivers()):
                if not records.is_valid(newest.get(receiver.peer_id, receiver)):
                    raise NoRoute(f"nobody says where {receiver.peer_id} is now")
            known = [one for one in records.now if len(hosts) == 1 or records.is_valid(one)]
            return choose_among(known, left_out.among(records.now), also_banned=also_banned)

        def choose_among(
            known: Sequence[PeerRecord], avoid: Collection[PeerId], *, also_banned: bool
        ) -> PeerRecord:
            usable = self._usable(known, options, also_banned=also_banned)
            return choose_stand_in(usable, lost, avoid, self._seconds(demand), self._liking)

        def choose_any() -> PeerRecord:
            with contextlib.suppress(NoRoute):
                return choose()
            return choose(also_banned=True)  # maybe one that has started again

        def choose_with(back: Sequence[PeerRecord]) -> list[PeerRecord]:
            known = {one.peer_id: one for one in (*back, *records.now)}
            avoid = left_out.among(records.now) - {one.peer_id for one in back}
            return [choose_among([*known.values()], avoid, also_banned=True)]

        async def choose_back() -> PeerRecord:
            awaited = self._awaited(left_out, choose_with, lost.peer_id)
            return await records.until(
                choose_any, lambda: 0.0 if awaited is None else left_out.left_seconds(awaited)
            )

        found: PeerRecord | None = None
        if records.are_fresh:
            with contextlib.suppress(NoRoute):
                found = choose()
        hosts[part] = found or await choose_back()
        left_out.dialled([hosts[part]])
        return hosts[part]

    def describe(self) -> str:
        """Who serves which blocks, and the route that a trace of all of them would take now."""
        records = sorted(self.records.get(fresh=False), key=lambda one: (one.start, one.end))
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
                    *(records, range(self._n_blocks), Demand(), self.tries(TraceOptions()), None),
                    also_banned=also_banned,
                )
                hops = "\n".join(map(self._hop_line, route.records))
                about = f"about {1000 * route.expected_seconds:.1f} ms for a pass of one token"
                return f"{text}\nroute of a trace now, {about}\n{hops}"
        return f"{text}\nno route over all blocks now"

    def _hop_line(self, one: PeerRecord) -> str:
        way = self._swarm.round_trips.text(one.peer_id)
        return (
            f"  blocks {one.start}:{one.end}  {one.peer_id}  {one.backend}  round trip {way}  "
            f"{one.throughput_tokens_per_second:.0f} tokens/s  "
            f"{1000 * one.pass_seconds:.1f} ms a pass  load {one.load:.0%}"
        )

    def _left_out(
        self,
        known: Sequence[PeerRecord],
        tries: Tries,
        *,
        also_banned: bool = False,
        back: Collection[PeerId] = (),
    ) -> dict[PeerId, str]:
        """Those of these peers that are revoked, left out by the trace, or by all for a while.

        With why; but those that are thought to be `back`.
        """
        bans = () if also_banned else self.bans
        out = {one.peer_id: "lost or busy of late" for one in known if one.peer_id in bans}
        gone = tries.left_out.among(known).difference(back)
        out |= {peer: tries.left_out.why(peer) for peer in gone}
        return out | dict.fromkeys(self._swarm.revoked(known), "revoked")

    def _usable(
        self, known: Sequence[PeerRecord], options: TraceOptions, *, also_banned: bool = False
    ) -> list[PeerRecord]:
        """Those who are not revoked, not left out for a while, and may see the trace."""
        revoked, only = self._swarm.revoked(known), options.route
        return [
            one
            for one in known
            if one.peer_id not in revoked
            and (also_banned or one.peer_id not in self.bans)
            and (only is None or one.peer_id in only)
        ]

    def _choose(
        self,
        known: list[PeerRecord],
        needed: Collection[int],
        demand: Demand,
        tries: Tries,
        only: Collection[PeerId] | None,
        *,
        also_banned: bool = False,
        back: Collection[PeerId] = (),
    ) -> Route:
        choose = partial(
            choose_route,
            needed=needed,
            n_blocks=self._n_blocks,
            avoid=self._left_out(known, tries, also_banned=also_banned, back=back),
            only=only,
            wanted=self._wanted,
            seconds=self._seconds(demand),
            liking=self._liking,
        )
        try:
            return choose(tries.narrowed(known))
        except NoRoute as none:
            if tries.narrowed(known) == known:
                raise
            raise NoRoute(tries.no_such_hardware(choose(known))) from none

    def _seconds(self, demand: Demand) -> Seconds:
        """What a peer adds to a route of this demand, by what is known and runs now."""
        way, running = self._swarm.round_trips.of, self._swarm.in_flight.counts()
        return lambda one, blocks: demand.seconds(
            one, blocks, way(one.peer_id), running.get(one.peer_id, 0)
        )

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
