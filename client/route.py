"""Choosing the peers of a trace: a chain of spans over the blocks that it needs.

One manifest, dtype, quantisation and attention backend from end to end: they are never mixed
silently. Among the chains of one kind the one with the fewest hops wins, then one of a single class
of hardware and torch (within which a trace run again gives the same bits), then the least loaded.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from glasshive.client.coverage import (
    Kind,
    Wanted,
    by_kind,
    kinds_text,
    serve_command,
    spans_to_add,
)
from glasshive.client.errors import NoRoute
from glasshive.dht.records import PeerRecord
from glasshive.dht.transport import PeerAddress
from glasshive.graph.plan import Span
from glasshive.security.keys import PeerId

_MOST_NAMED = 8
_ANYTHING = Wanted()


@dataclass(frozen=True, slots=True)
class Route:
    """Peers with ascending spans; `records[i]` hosts `spans[i]`."""

    records: tuple[PeerRecord, ...]

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
    avoid: Collection[PeerId] = (),
    only: Collection[PeerId] | None = None,
    wanted: Wanted = _ANYTHING,
) -> Route:
    """A route over the `needed` blocks.

    The blocks from 0 on without a gap are covered by a chain in which each span starts where the
    one before it ended; single blocks behind them (the home of a head or a parameter) by any peer
    behind the chain. With `only`, of these peers. Raises NoRoute, naming the missing blocks, who
    serves the rest, and the commands that would serve what is missing of what is `wanted`.
    """
    usable = [
        one
        for one in records
        if one.n_blocks == n_blocks
        and one.peer_id not in avoid
        and (only is None or one.peer_id in only)
    ]
    depth = next(i for i in range(n_blocks + 1) if i not in needed)
    extra = sorted(block for block in needed if block > depth)
    best: tuple[tuple[int, int, float], list[PeerRecord]] | None = None
    for kind in _grouped(usable, lambda one: (one.dtype, one.quantisation, one.attention)):
        for same in (*_grouped(kind, lambda one: one.backend), kind):
            found = _chain(same, depth, extra)
            if found is not None:
                (hops, load), chain = found
                cost = hops, len({one.backend for one in chain}), load
                if best is None or cost < best[0]:
                    best = cost, chain
    if best is None:
        raise NoRoute(_why_none(usable, sorted(needed), avoid, only, n_blocks, wanted))
    return Route(tuple(best[1]))


def _grouped(
    records: Iterable[PeerRecord], key: Callable[[PeerRecord], Hashable]
) -> list[list[PeerRecord]]:
    groups: dict[Hashable, list[PeerRecord]] = {}
    for one in records:
        groups.setdefault(key(one), []).append(one)
    return list(groups.values())


def _chain(
    records: Sequence[PeerRecord], depth: int, extra: Sequence[int]
) -> tuple[tuple[int, float], list[PeerRecord]] | None:
    """The best chain over `[0, depth)` and then the extra blocks, with its (hops, load)."""
    by_start: dict[int, list[PeerRecord]] = {}
    for one in records:
        by_start.setdefault(one.start, []).append(one)
    counter = 0  # breaks ties, so that records are never compared
    heap: list[tuple[int, float, int, int, list[PeerRecord]]] = [(0, 0.0, counter, 0, [])]
    done: set[int] = set()
    while heap:
        hops, load, _, at, chain = heapq.heappop(heap)
        if at >= depth:
            rest = _cover_extra(records, at, extra)
            if rest is not None:
                return (hops + len(rest), load), [*chain, *rest]
        if at in done:
            continue
        done.add(at)
        for one in by_start.get(at, ()):
            counter += 1
            heapq.heappush(heap, (hops + 1, load + one.load, counter, one.end, [*chain, one]))
    return None


def _cover_extra(
    records: Sequence[PeerRecord], at: int, extra: Sequence[int]
) -> list[PeerRecord] | None:
    chosen: list[PeerRecord] = []
    for block in extra:
        if block < at:
            continue
        here = [one for one in records if one.start >= at and one.start <= block < one.end]
        if not here:
            return None
        best = min(here, key=lambda one: one.load)
        chosen.append(best)
        at = best.end
    return chosen


def _why_none(
    records: Sequence[PeerRecord],
    needed: Sequence[int],
    avoid: Collection[PeerId],
    only: Collection[PeerId] | None,
    n_blocks: int,
    wanted: Wanted,
) -> str:
    served = {block for one in records for block in range(one.start, one.end)}
    missing = [block for block in needed if block not in served]
    if missing:
        who = "nobody" if only is None else "no peer of route="
        text = f"no route: {who} serves blocks {_ranges(missing)}"
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
    if len(served_now) > _MOST_NAMED:
        served_now[_MOST_NAMED:] = [f"and {len(served_now) - _MOST_NAMED} more"]
    lost = ""
    if avoid:
        many = "1 peer is" if len(avoid) == 1 else f"{len(avoid)} peers are"
        lost = f"; {many} left out, as lost, busy, revoked or named in avoid="
    text = f"{text} (served now: {', '.join(served_now) or 'nothing'}{lost})"
    if only is not None:
        return f"{text}; name peers that serve all of them, or leave route= out"
    return f"{text}; start the missing part with {_commands(kinds, needed, n_blocks, wanted)}"


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


def _ranges(blocks: Sequence[int]) -> str:
    """Blocks as `0:10, 20:30`, with ends that are not in."""
    parts: list[list[int]] = []
    for block in blocks:
        if parts and parts[-1][1] == block:
            parts[-1][1] = block + 1
        else:
            parts.append([block, block + 1])
    return ", ".join(f"{start}:{end}" for start, end in parts)
