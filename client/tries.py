"""The tries of one trace: whom it leaves out by now, what it may still do, and what was tried."""

from __future__ import annotations

import shlex
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, final

from glasshive.client.bans import BUSY_SECONDS, LOST_SECONDS, Bans
from glasshive.client.errors import PeerBusy, PeerError, PeerFailed, PeerLost
from glasshive.client.left_out import BUSY, LOST, LeftOut, what_became
from glasshive.client.provenance import Replaced
from glasshive.client.relay import Pair
from glasshive.client.route import CHANCE, Chance, Route, block_ranges
from glasshive.dht.records import PeerRecord
from glasshive.security.keys import PeerId

__all__ = ["Tries"]

FIRST_PAUSE_SECONDS: Final = 0.25
MOST_PAUSE_SECONDS: Final = 5.0
"""So long a trace waits at most before it asks busy peers again; twice as long after each time."""
LEAST_PAUSE_SECONDS: Final = 0.05
MOST_ACCUSED: Final = 2
"""Who alone has lost so many others, which the client hears, is left out itself."""
_MOST_NAMED: Final = 8


@final
@dataclass
class Tries:
    """Of one trace. `retries` and `across_hardware` are its options.

    `count` is what is spent of `retries`: how often all or a part of it was run again. Only all of
    it is a rerun. Where a peer was busy, or lost, before anything ran, that counts as neither.
    """

    left_out: LeftOut
    retries: int
    across_hardware: bool = False
    chance: Chance = CHANCE
    count: int = 0
    reruns: int = 0
    has_run: bool = False  # the last one: its inputs had left
    has_ever_run: bool = False
    parted: set[Pair] = field(default_factory=set)  # of the last try: who didn't reach each other
    relay: set[Pair] = field(default_factory=set)  # and of all tries
    busy: dict[PeerId, PeerBusy] = field(default_factory=dict)  # and what each said last
    waited_seconds: float = 0.0  # for busy peers
    said: set[str] = field(default_factory=set)  # to the user, of what is waited for
    _pauses: int = 0
    _backends: dict[int, str] = field(default_factory=dict)  # by block: where it ran first
    _became: dict[tuple[str, str], None] = field(default_factory=dict)  # what, of whom; in order
    _accused: defaultdict[PeerId, set[PeerId]] = field(default_factory=lambda: defaultdict(set))

    @property
    def are_used_up(self) -> bool:
        """Whether nothing may be run again."""
        return self.count >= self.retries

    def run_again(self) -> None:
        """All of it is."""
        self.count += 1
        self.reruns += 1

    # Trouble with peers ---------------------------------------------------------------------

    def heed(self, error: PeerError) -> None:
        """Leave out who is to blame, and remember it."""
        self.left_out.heed(error)
        self._became[what_became(error), error.peer[-8:]] = None
        if isinstance(error, PeerBusy):
            self.busy[error.peer] = error
        else:
            self.busy.pop(error.peer, None)

    def heed_replaced(self, replaced: Iterable[Replaced]) -> None:
        """Remember who was lost in a generation that went on."""
        self._became |= dict.fromkeys(("lost and replaced", one.lost[-8:]) for one in replaced)

    def heed_own_loss(self) -> None:
        """Remember that this process' own network daemon was lost."""
        self._became[LOST, "this process' own network daemon"] = None

    def hold_against(self, error: PeerError, bans: Bans) -> None:
        """Leave out who is to blame, in this trace and, by `bans`, for a while in others.

        Whom only another peer has lost, while the client heard it, is left out by this trace alone:
        that other one may lie. One that has lost several others so is left out instead.
        """
        was_busy = error.peer in self.busy
        self.heed(error)
        accuser = self.accuser_of(error)
        if accuser is not None:
            accused = self._accused[accuser]
            accused.add(error.peer)
            if len(accused) >= MOST_ACCUSED:
                why = f"peer {accuser} alone lost several others"
                self.left_out.heed(PeerLost(why, peer=accuser))
                bans.trouble(accuser, LOST_SECONDS)
                for one in accused:
                    self.left_out.forgive(one)
        elif error.peer in self.left_out:
            if not isinstance(error, PeerBusy):
                bans.trouble(error.peer, LOST_SECONDS)
            elif not was_busy:  # it is asked again and again, and that is one trouble
                bans.trouble(error.peer, BUSY_SECONDS)

    def accuser_of(self, error: PeerError) -> PeerId | None:
        """Who alone has lost the peer to blame, which the client still heard; None if nobody."""
        if type(error) is PeerLost:
            for pair in self.parted:
                if error.peer in pair:
                    return next(iter(pair - {error.peer}))
        return None

    def pause_seconds(self, left_seconds: float) -> float:
        """How long to wait for busy peers now; 0 if too little is left. Longer each time.

        By chance up to half of it less, so that those who wait don't all come at once.
        """
        if left_seconds < 2 * LEAST_PAUSE_SECONDS:
            return 0.0
        longest = min(FIRST_PAUSE_SECONDS * 2 ** min(self._pauses, 16), MOST_PAUSE_SECONDS)
        # A last try needs some time, too.
        seconds: float = min(longest * (1 + self.chance()) / 2, left_seconds / 2)
        return seconds

    def waited(self, seconds: float) -> None:
        """It has waited: those who were busy may be asked again."""
        self._pauses += 1
        self.waited_seconds += seconds
        for peer in self.busy:
            self.left_out.forgive(peer)

    @property
    def has_waited(self) -> bool:
        """Whether it ever waited for busy peers."""
        return self._pauses > 0

    # Hardware -------------------------------------------------------------------------------

    def take(self, route: Route, needed: Collection[int]) -> None:
        """It is tried on this route; where a block has not been tried yet is its hardware."""
        self.left_out.dialled(route.records)
        for one in route.records:
            for block in range(one.start, one.end):
                if block in needed:
                    self._backends.setdefault(block, one.backend)

    def forget_hardware(self) -> None:
        """Nothing ran there."""
        self._backends.clear()

    def fits(self, record: PeerRecord) -> bool:
        """Whether each of its blocks that was tried before was so on hardware as its own."""
        blocks = range(record.start, record.end)
        return all(self._backends.get(one, record.backend) == record.backend for one in blocks)

    def narrowed(self, known: Sequence[PeerRecord]) -> list[PeerRecord]:
        """Those of these peers that may be taken by their hardware."""
        return [one for one in known if self.across_hardware or self.fits(one)]

    def moved(self, hosts: Iterable[PeerRecord]) -> tuple[str, ...]:
        """The spans of these peers that were tried on other hardware before."""
        return tuple(f"{one.start}:{one.end}" for one in hosts if not self.fits(one))

    def _hardware_text(self) -> str:
        """Where it was tried first: `cpu`, or which blocks on which."""
        by_backend: defaultdict[str, list[int]] = defaultdict(list)
        for block in sorted(self._backends):
            by_backend[self._backends[block]].append(block)
        if len(by_backend) == 1:
            return next(iter(by_backend))
        parts = (f"{name} for {block_ranges(blocks)}" for name, blocks in by_backend.items())
        return " and ".join(parts)

    def no_such_hardware(self, other: Route) -> str:
        """The text of a NoRoute where there is another route, of hardware that isn't allowed."""
        backends = sorted({one.backend for one in other.records if not self.fits(one)})
        return (
            f"no route on {self._hardware_text()}, as before, within which results are bit-equal; "
            f"there is one on {' and '.join(backends)}: allow it with across_hardware=True"
        )

    # What is said of it ---------------------------------------------------------------------

    def tried_text(self) -> str:
        """How much was tried, when `retries` are used up."""
        moves = self.count - self.reruns
        routes = _many(self.reruns + 1, "route")
        stand_ins = f" and {_many(moves, 'stand-in')}" if moves else ""
        verb = "were" if self.count else "was"
        return f"{routes}{stand_ins} {verb} tried, as retries={self.retries} says"

    def advise(self, error: PeerError, why: str, own: Sequence[str]) -> None:
        """Say behind what happened why the trace was not run elsewhere, and what to do.

        `own` are the arguments with which commands of this user come to the swarm.
        """
        status = shlex.join(["glasshive", "status", *own])
        what = f"run the trace again when `{status}` shows its blocks as served"
        if isinstance(error, PeerBusy):
            what = "run the trace again later, or allow more time with deadline="
        if isinstance(error, PeerFailed) and not error.is_outdated:
            what = "run the trace again when another peer serves its blocks, and tell its owner"
        error.args = (f"{error}; {why}{self.before_text(error)}; {what}",)

    def before_text(self, error: PeerError | None = None) -> str:
        """`; before that: ABCDEFGH lost; 12345678 busy`; empty if there was nothing.

        `error` speaks for itself; one of a busy peer is told with all who are (`busy_text`).
        """
        itself = None if error is None else (what_became(error), error.peer[-8:])
        by_what: defaultdict[str, list[str]] = defaultdict(list)
        for what, who in self._became:
            if (what, who) != itself and not (what == BUSY and isinstance(error, PeerBusy)):
                by_what[what].append(who)
        said = "; ".join(f"{_named(who)} {what}" for what, who in by_what.items())
        return f"; before that: {said}" if said else ""

    def busy_text(self, error: PeerBusy, deadline_seconds: float) -> str:
        """Who else is busy, with what it said, and how long it was waited for."""
        others = [str(one) for peer, one in self.busy.items() if peer != error.peer]
        text = "".join(f"; {one:.300}" for one in others[:_MOST_NAMED])
        if len(others) > _MOST_NAMED:
            text += f"; and {len(others) - _MOST_NAMED} more are busy"
        return (
            f"{text}; waited {self.waited_seconds:.3g} s for a place, until the deadline of "
            f"{deadline_seconds:g} s"
        )


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'s'[: count != 1]}"


def _named(who: Sequence[str]) -> str:
    more = f" and {len(who) - _MOST_NAMED} more" if len(who) > _MOST_NAMED else ""
    return ", ".join(who[:_MOST_NAMED]) + more
