"""What the peers of a model cover, by kind, and which spans would complete a kind.

A trace runs over peers of one kind (dtype, quantisation, attention) whose spans fit end to start.
So every block may be served and there still be no route; `spans_to_add` says what is missing then.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Final, NamedTuple

from glasshive.dht.records import PeerRecord
from glasshive.graph.plan import Span

NOT_QUANTISED: Final = "none"
"""The quantisation of whom a trace of this release runs on."""


class Kind(NamedTuple):
    """What a trace never mixes."""

    dtype: str
    quantisation: str
    attention: str

    def __str__(self) -> str:
        quantised = "" if self.quantisation == NOT_QUANTISED else f" {self.quantisation}"
        return f"{self.dtype}{quantised}, {self.attention} attention"


def kind_of(record: PeerRecord) -> Kind:
    """That of a peer."""
    return Kind(record.dtype, record.quantisation, record.attention)


def by_kind(records: Sequence[PeerRecord]) -> dict[Kind, list[PeerRecord]]:
    """The records of each kind, the kinds in order of their names."""
    kinds: dict[Kind, list[PeerRecord]] = {}
    for one in records:
        kinds.setdefault(kind_of(one), []).append(one)
    return dict(sorted(kinds.items()))


def spans_to_add(records: Sequence[PeerRecord], n_blocks: int) -> list[Span]:
    """What has to be served besides so that a chain covers the model: the fewest blocks.

    The records are of one kind. Empty if a chain covers it already.
    """
    by_start: dict[int, list[int]] = {}
    for one in records:
        if 0 <= one.start < one.end <= n_blocks:
            by_start.setdefault(one.start, []).append(one.end)
    points = sorted({0, n_blocks, *by_start, *(end for ends in by_start.values() for end in ends)})
    # For each point where a span begins or ends: (blocks to add, hops), and the last step to it.
    best: dict[int, tuple[int, int]] = {0: (0, 0)}
    step: dict[int, tuple[int, bool]] = {}
    for place, at in enumerate(points[:-1]):
        added, hops = best[at]
        following = points[place + 1]
        ways = [(end, (added, hops + 1), False) for end in by_start.get(at, ())]
        for end, cost, is_new in [*ways, (following, (added + following - at, hops + 1), True)]:
            if end not in best or cost < best[end]:
                best[end] = cost
                step[end] = at, is_new
    spans: list[Span] = []
    end = n_blocks
    while end > 0:
        start, is_new = step[end]
        if is_new and spans and spans[0].start == end:
            spans[0] = Span(start, spans[0].end)
        elif is_new:
            spans.insert(0, Span(start, end))
        end = start
    return spans


class Wanted(NamedTuple):
    """What a trace wants more of: what a command that serves it says besides the blocks.

    `where` are the arguments that say which swarm. What isn't known stands there as a word in
    capitals.
    """

    name: str = "MODEL"
    kind: Kind | None = None
    where: Sequence[str] = ("--bootstrap", "ADDRESS")


def serve_command(name: str, span: Span, kind: Kind | None, where: Sequence[str] = ()) -> str:
    """The command line that serves a span; `where` are its arguments that say which swarm."""
    how = ["--dtype", kind.dtype, "--attention", kind.attention] if kind else []
    return shlex.join(["glasshive", "serve", name, "--blocks", str(span), *how, *where])


def kinds_text(records: Sequence[PeerRecord], n_blocks: int) -> str:
    """Which kinds a model is served in, and which of them a trace can use."""
    return "; ".join(
        f"{kind} {_state(spans_to_add(mine, n_blocks))}" for kind, mine in by_kind(records).items()
    )


def _state(missing: Sequence[Span]) -> str:
    return f"lacks {', '.join(map(str, missing))}" if missing else "is complete"
