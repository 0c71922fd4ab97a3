"""Choosing the peers of a trace: a chain of spans over the blocks that it needs.

One manifest, dtype, quantisation and attention backend from end to end: they are never mixed
silently. Among the chains of one kind the one that is expected to take the shortest time wins; of
those that are nearly as fast the one that this client likes best, as all clients see the same
records and would else take the same peers. One of a single class of hardware and torch, within
which a trace run again gives the same bits, is taken unless a mixed one is thought to be more than
ten times as fast.
"""

from __future__ import annotations

import hashlib
import heapq
import random
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from glasshive.client.coverage import (
    Kind,
    Wanted,
    by_kind,
    kinds_text,
    serve_command,
    spans_to_add,
)
from glasshive.client.demand import Demand
from glasshive.client.errors import NoRoute
from glasshive.client.left_out import BUSY, LOST
from glasshive.dht.records import PeerRecord
from glasshive.dht.transport import PeerAddress
from glasshive.graph.plan import Span
from glasshive.security.keys import PeerId

MIXED_FACTOR: Final = 10.0
"""A route over several classes of hardware counts as so many times as slow as it is."""

Seconds: TypeAlias = Callable[[PeerRecord, int], float]
"""How much longer a route takes for a peer of which so many blocks run forward; 0 or more."""

NEAR_TIE: Final = 0.05
"""A route that takes longer by no more than this share may be taken as well."""

Chance: TypeAlias = Callable[[], float]
"""A number of [0, 1), another one each time."""
CHANCE: Final[Chance] = random.SystemRandom().random
"""Not the module's own numbers, which the user may have seeded."""
Liking: TypeAlias = Callable[[PeerId], float]
"""A number of [0, 1) for a peer, always the same one: less for whom a client likes better."""

FEW: Final = 3
"""Of the peers that could run the same part, so many are kept in mind."""
MOST_KEPT: Final = 48
"""And so many of all spans together."""
MOST_TRIED: Final = 8
"""Of peers that aren't among those, so many are looked at at a time."""

_MOST_NAMED = 8
_ANYTHING = Wanted()
_NOBODY: Final[Mapping[PeerId, str]] = {}
_OF_A_TOKEN: Final[Seconds] = Demand().seconds


def liking_of(salt: str) -> Liking:
    """The liking of one client, whose `salt` nobody else has.

    Clients spread, and each stays with its peers, which hold its constants and know its parts.
    """

    def liking(peer: PeerId) -> float:
        digest = hashlib.sha256(f"{salt} {peer}".encode()).digest()
        return int.from_bytes(digest[:6], "big") / (1 << 48)

    return liking


def _no_liking(peer: PeerId) -> float:
    """The first of equal ones."""
    return 0.0


@dataclass(frozen=True, slots=True)
class Route:
    """Peers with ascending spans; `records[i]` hosts `spans[i]`.

    `expected_seconds` is how long it was thought to take when it was chosen.
    """

    records: tuple[PeerRecord, ...]
    expected_seconds: float = field(default=0.0, compare=False)

    @property
    def spans(self) -> tuple[Span, ...]:
        """The spans, in order."""
        return tuple(Span(one.start, one.end) for one in self.records)

    @property
    def peers(self) -> tuple[PeerAddress, ...]:
        """Who hosts them, and where."""
        return tuple(PeerAddress(one.peer_id, one.addresses) for one in self.records)

    @property
    def signed(self) -> tuple[bytes, ...]:
        """The record of each, as it signed it."""
        return tuple(one.signed for one in self.records)


def choose_route(
    records: Sequence[PeerRecord],
    needed: Collection[int],
    n_blocks: int,
    *,
    avoid: Mapping[PeerId, str] = _NOBODY,
    only: Collection[PeerId] | None = None,
    wanted: Wanted = _ANYTHING,
    seconds: Seconds = _OF_A_TOKEN,
    liking: Liking = _no_liking,
) -> Route:
    """The route over the `needed` blocks whose peers take the fewest `seconds` together.

    Of equal ones that with fewer hops, then the less loaded. By its `liking`, one that takes at
    most `NEAR_TIE` longer than that. The blocks from 0 on without a gap are
    covered by a chain in which each span starts where the one before it ended; single blocks behind
    them (the home of a head or a parameter) by any peer behind the chain. With `only`, of these
    peers, and of none to `avoid`, each with why in a word or two. Raises NoRoute, naming the
    missing blocks, who serves the rest, and the commands that would serve what is missing of what
    is `wanted`.
    """
    usable = [
        one
        for one in records
        if one.n_blocks == n_blocks
        and one.peer_id not in avoid
        and (only is None or one.peer_id in only)
    ]
    depth = _depth(needed, n_blocks)
    extra = sorted(block for block in needed if block > depth)
    prices = {id(one): seconds(one, _forward(one, depth)) for one in usable}
    compared = {id(one): _blurred(prices[id(one)], liking(one.peer_id)) for one in usable}
    best: tuple[_Cost, list[PeerRecord]] | None = None
    for kind in _grouped(usable, _mixed_never):
        for same in (*_grouped(kind, lambda one: one.backend), kind):
            found = _chain(same, depth, extra, compared)
            if found is not None:
                (expected, hops, load), chain = found
                if len({one.backend for one in chain}) > 1:
                    expected *= MIXED_FACTOR
                cost = expected, hops, load
                if best is None or cost < best[0]:
                    best = cost, chain
    if best is None:
        gone = [
            one
            for one in records
            if one.n_blocks == n_blocks
            and one.peer_id in avoid
            and (only is None or one.peer_id in only)
        ]
        raise NoRoute(_why_none(usable, gone, sorted(needed), avoid, only, n_blocks, wanted))
    chain = best[1]
    return Route(tuple(chain), sum(prices[id(one)] for one in chain))


def rivals(
    records: Sequence[PeerRecord], needed: Collection[int], n_blocks: int
) -> list[PeerRecord]:
    """The peers that serve a needed block which another one of their kind serves as well."""
    depth = _depth(needed, n_blocks)
    wanted = {*range(depth), *needed}
    found = []
    for kind in _grouped(records, _mixed_never):
        served = Counter(block for one in kind for block in range(one.start, one.end))
        for one in kind:
            if any(block in wanted and served[block] > 1 for block in range(one.start, one.end)):
                found.append(one)
    return found


def best_few(
    records: Iterable[PeerRecord], seconds: Seconds = _OF_A_TOKEN, liking: Liking = _no_liking
) -> list[PeerRecord]:
    """Of those that could stand in for each other the fastest `FEW`, `MOST_KEPT` in all.

    The fastest of each span come first, then the second ones; of near ties by `liking`.
    """
    ranked: list[tuple[int, PeerRecord]] = []
    for same in _grouped(records, _kind_of):
        ranked += enumerate(sorted(same, key=_by_price(seconds, liking))[:FEW])
    ranked.sort(key=lambda one: one[0])
    return [one for _, one in ranked[:MOST_KEPT]]


def some_others(
    records: Iterable[PeerRecord], among: Callable[[PeerRecord], bool], chance: Chance
) -> list[PeerRecord]:
    """One of each span by chance, of the peers that are `among` those to try; `MOST_TRIED` in all.

    So every peer is looked at some time, however many seem better than it.
    """
    found = []
    for same in _grouped(filter(among, records), _kind_of):
        found.append(same[int(chance() * len(same))])
    at = int(chance() * len(found))
    return [*found[at:], *found[:at]][:MOST_TRIED]


def choose_stand_in(
    records: Iterable[PeerRecord],
    lost: PeerRecord,
    avoid: Collection[PeerId],
    seconds: Seconds = _OF_A_TOKEN,
    liking: Liking = _no_liking,
) -> PeerRecord:
    """The fastest peer that serves the same blocks as a lost one, and gives the same bits.

    Of near ties by `liking`. Raises NoRoute.
    """
    same = [one for one in records if _kind_of(one) == _kind_of(lost) and one.peer_id not in avoid]
    if not same:
        raise NoRoute(f"no other peer serves blocks {lost.start}:{lost.end} on {lost.backend}")
    return min(same, key=_by_price(seconds, liking))


def _blurred(price: float, liking: float) -> float:
    """A price that is up to `NEAR_TIE` higher: then so are sums of them."""
    return price * (1 + NEAR_TIE * liking)


def _by_price(seconds: Seconds, liking: Liking) -> Callable[[PeerRecord], tuple[float, float]]:
    def price(one: PeerRecord) -> tuple[float, float]:
        return _blurred(seconds(one, one.end - one.start), liking(one.peer_id)), one.load

    return price


def _mixed_never(one: PeerRecord) -> tuple[Hashable, ...]:
    """What the peers of a route have in common."""
    return one.dtype, one.quantisation, one.attention


def _kind_of(one: PeerRecord) -> tuple[Hashable, ...]:
    return (
        *(one.model, one.start, one.end, one.n_blocks),
        *(*_mixed_never(one), one.backend),
    )


def _depth(needed: Collection[int], n_blocks: int) -> int:
    """How many blocks from 0 on are needed without a gap."""
    return next(i for i in range(n_blocks + 1) if i not in needed)


def _forward(one: PeerRecord, depth: int) -> int:
    """How many of a peer's blocks run forward, if those before `depth` do."""
    return max(min(one.end, depth) - one.start, 0)


def _grouped(
    records: Iterable[PeerRecord], key: Callable[[PeerRecord], Hashable]
) -> list[list[PeerRecord]]:
    groups: dict[Hashable, list[PeerRecord]] = {}
    for one in records:
        groups.setdefault(key(one), []).append(one)
    return list(groups.values())


_Cost: TypeAlias = tuple[float, int, float]  # seconds, hops, load


def _chain(
    records: Sequence[PeerRecord], depth: int, extra: Sequence[int], price: Mapping[int, float]
) -> tuple[_Cost, list[PeerRecord]] | None:
    """The best chain over `[0, depth)` and then the extra blocks, with what it costs.

    The shortest path from block 0 on, by Dijkstra: each peer is a step to the end of its span, at
    the `price` that its record's `id` has.
    """
    counter = 0  # breaks ties, so that records are never compared
    heap: list[tuple[_Cost, int, int, list[PeerRecord]]] = [((0.0, 0, 0.0), counter, 0, [])]
    done: set[int] = set()
    while heap:
        cost, _, at, chain = heapq.heappop(heap)
        if at in done:
            continue
        done.add(at)
        block = at if at < depth else next((one for one in extra if one >= at), None)
        if block is None:
            return cost, chain
        for one in records:
            # Hidden states come from one peer to the next; what is behind them stands alone.
            starts_well = one.start == at if at < depth else one.start >= at
            if starts_well and one.start <= block < one.end:
                counter += 1
                so_far = cost[0] + price[id(one)], cost[1] + 1, cost[2] + one.load
                heapq.heappush(heap, (so_far, counter, one.end, [*chain, one]))
    return None


def _why_none(
    records: Sequence[PeerRecord],
    gone: Sequence[PeerRecord],
    needed: Sequence[int],
    avoid: Mapping[PeerId, str],
    only: Collection[PeerId] | None,
    n_blocks: int,
    wanted: Wanted,
) -> str:
    """The text of a NoRoute; those who are `gone` serve something, and are to be avoided."""
    served = {block for one in records for block in range(one.start, one.end)}
    missing = {block for block in needed if block not in served}
    whys = {avoid[one.peer_id] for one in gone if missing & {*range(one.start, one.end)}}
    if missing:
        who = "nobody" if only is None else "no peer of route="
        if whys:
            who = "nobody else" if only is None else "no other peer of route="
        text = f"no route: {who} serves blocks {block_ranges(sorted(missing))}"
    else:
        text = (
            "no route: every needed block is served, but no chain of spans of one dtype and "
            "attention backend fits together end to start"
        )
    kinds = by_kind(records)
    if len(kinds) > 1:
        text += f"; {kinds_text(records, n_blocks)}"
    served_now = [
        f"{one.start}:{one.end} {one.dtype} {one.attention} by {one.peer_id[-8:]}"
        for one in sorted(records, key=lambda one: (one.start, one.end))
    ]
    text = f"{text} (served now: {_first(served_now) or 'nothing'}{_left_out_text(gone, avoid)})"
    if BUSY in whys:
        wait = "wait until one that is busy has a place"
    else:
        wait = "wait until one that was lost is back" if LOST in whys else ""
    if only is not None:
        announced = {one.peer_id for one in (*records, *gone)}
        if unknown := sorted({*only} - announced - {*avoid}):
            text += f"; not announced for this model, dtype and attention: {_first(unknown)}"
        if wait:
            text += f"; {wait}"
        return f"{text}; name peers that serve all of them, or leave route= out"
    commands = _commands(kinds, needed, n_blocks, wanted)
    return f"{text}; start the missing part with {commands}{f', or {wait}' if wait else ''}"


def _left_out_text(gone: Sequence[PeerRecord], avoid: Mapping[PeerId, str]) -> str:
    """`; left out: 0:4 by ABCDEFGH (busy)`; who serves nothing that is known comes last."""
    known = {one.peer_id for one in gone}
    out = [
        f"{one.start}:{one.end} by {one.peer_id[-8:]} ({avoid[one.peer_id]})"
        for one in sorted(gone, key=lambda one: (one.start, one.end))
    ]
    out += [f"{peer[-8:]} ({why})" for peer, why in sorted(avoid.items()) if peer not in known]
    return f"; left out: {_first(out)}" if out else ""


def _first(texts: Sequence[str]) -> str:
    more = [f"and {len(texts) - _MOST_NAMED} more"] if len(texts) > _MOST_NAMED else []
    return ", ".join([*texts[:_MOST_NAMED], *more])


def _commands(
    kinds: Mapping[Kind, Sequence[PeerRecord]],
    needed: Sequence[int],
    n_blocks: int,
    wanted: Wanted,
) -> str:
    """The commands that would complete the kind that lacks least, for what is needed."""
    if not kinds:
        command = serve_command(wanted.name, Span(0, n_blocks), wanted.kind, wanted.where)
        return f"`{command}`"
    kind, missing = min(
        ((kind, spans_to_add(records, n_blocks)) for kind, records in kinds.items()),
        key=lambda found: sum(span.end - span.start for span in found[1]),
    )
    name, *_ = (one.model_name for one in kinds[kind])
    spans = [span for span in missing if any(span.start <= one < span.end for one in needed)]
    return " and ".join(f"`{serve_command(name, span, kind, wanted.where)}`" for span in spans)


def block_ranges(blocks: Sequence[int]) -> str:
    """Blocks as `0:10, 20:30`, with ends that are not in."""
    parts: list[list[int]] = []
    for block in blocks:
        if parts and parts[-1][1] == block:
            parts[-1][1] = block + 1
        else:
            parts.append([block, block + 1])
    return ", ".join(f"{start}:{end}" for start, end in parts)
