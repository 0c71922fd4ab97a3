"""What an experiment asks of a route: so much computing, so many rounds, so many bytes over a cut.

From this and from what a peer announces follows about how long its part will take. Nothing here is
a promise: it is there to choose among routes.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from glasshive.dht.records import PeerRecord
from glasshive.graph.graph import Call, Const, NodeId, Param, Read, Skip, Write, refs
from glasshive.graph.order import event_of

if TYPE_CHECKING:
    from glasshive.client.experiment import Experiment

__all__ = ["Alike", "Carried", "Demand", "demand_of", "forward_seconds"]

HOP_SECONDS: Final = 0.002
"""What a peer takes for a step besides computing: frames, and two wake-ups."""
BYTES_PER_SECOND: Final = 12.5e6
"""Assumed of every way between two peers, as nobody has measured it: 100 Mbit/s."""
UNKNOWN_SECONDS: Final = 0.1
"""Assumed of the round trip to a peer that was not measured."""
BUSY_FACTOR: Final = 8
"""A host with all its places taken is assumed to compute for so many others before."""
OWN_LOAD: Final = 1 / 16
"""What a trace of this client adds to the load of its peer: one place of as many as hosts have."""


def forward_seconds(record: PeerRecord, tokens: int) -> float:
    """About how long a peer takes for a pass of so many tokens through its whole span.

    Its pace is that of long passes. One of a token or few takes longer than that pace says, as all
    weights have to be read for it: no less than the peer says of a pass of one token.
    """
    return max(tokens / max(record.throughput_tokens_per_second, 1e-3), record.pass_seconds)


@dataclass(frozen=True, slots=True)
class Alike:
    """Forward passes of so many tokens each, and how many such there are."""

    tokens: int
    count: int = 1


@dataclass(frozen=True, slots=True)
class Carried:
    """Values that are made at one block and used at others: their bytes, all together."""

    made_at: int
    used_at: frozenset[int]
    n_bytes: int


@dataclass(frozen=True, slots=True)
class Demand:
    """What decides how long a span takes. As it stands without arguments: a pass of one token.

    `rounds` is how often all peers of a route have to wait for each other in turn: once in a trace,
    whose passes follow each other closely, and for every step of a generation, which begins with
    the token of the one before; chunks of a prompt before the last follow each other closely, too.
    `hidden_bytes` go over each cut, in all passes together. What spans are sent of `carried` is
    worked out once for each of them.
    """

    passes: tuple[Alike, ...] = (Alike(1),)
    rounds: int = 1
    hidden_bytes: int = 0
    carried: tuple[Carried, ...] = ()
    _came: dict[tuple[int, int], int] = field(
        default_factory=dict, init=False, compare=False, repr=False
    )

    def seconds(
        self,
        record: PeerRecord,
        blocks: int,
        round_trip_seconds: float | None = None,
        running: int = 0,
    ) -> float:
        """About how much longer a route takes for this peer, of which `blocks` run forward.

        Computing, as announced, each pass behind those who are there already; what it is sent; and
        the ways. The way from one peer to the next is known to nobody here. It is taken for half of
        the client's round trip to the one and half of that to the other: as if all went through the
        client, which is no less than a direct way should be. So each peer of a route adds its own
        round trip, in every round. A peer that runs no blocks answers once. `running` traces of
        this client are on that peer already, of which what it announced may not say yet.
        """
        way_seconds = UNKNOWN_SECONDS if round_trip_seconds is None else round_trip_seconds
        share = blocks / (record.end - record.start)
        compute_seconds = share * sum(
            one.count * forward_seconds(record, one.tokens) for one in self.passes
        )
        sent_bytes = self._carried_bytes(record.start, record.end)
        if record.start and blocks:
            sent_bytes += self.hidden_bytes
        return (
            compute_seconds * (1 + BUSY_FACTOR * (record.load + OWN_LOAD * running))
            + (self.rounds if blocks else 1) * (way_seconds + HOP_SECONDS)
            + sent_bytes / BYTES_PER_SECOND
        )

    def _carried_bytes(self, start: int, end: int) -> int:
        """What blocks `[start, end)` use of values that were made elsewhere; each comes once."""
        found = self._came.get((start, end))
        if found is None:
            here = frozenset(range(start, end))
            found = self._came[start, end] = sum(
                one.n_bytes
                for one in self.carried
                if one.made_at not in here and not here.isdisjoint(one.used_at)
            )
        return found


def demand_of(experiment: Experiment) -> Demand:
    """What an experiment asks of any route.

    Where an op runs depends on the route. It is taken to run where the last of its values comes
    from, as it mostly does, and a value that hidden states bring along for one that is sent.
    """
    passes = experiment.passes.passes
    outline = experiment.outline
    steps = sum(one.step >= 0 for one in passes)
    sizes = Counter(one.batch * one.seq for one in passes)
    return Demand(
        passes=tuple(Alike(tokens, count) for tokens, count in sorted(sizes.items())),
        rounds=steps if experiment.passes.are_generation else 1,
        hidden_bytes=sum(outline.hidden_spec(one.batch, one.seq).nbytes for one in passes),
        carried=_carried(experiment),
    )


def _carried(experiment: Experiment) -> tuple[Carried, ...]:
    outline, nodes, last = experiment.outline, experiment.graph.nodes, experiment.outline.n_blocks
    places: dict[NodeId, tuple[int, int]] = {}  # (pass, block); not of what every part has itself
    used_at: dict[NodeId, set[int]] = defaultdict(set)
    for node_id, node in nodes.items():
        behind = [places[ref] for ref in refs(node) if ref in places]
        if isinstance(node, Read | Write | Skip):
            block = outline.block(event_of(node, outline))
            place = experiment.passes.at(node), min(max(block, 0), last - 1)
        elif isinstance(node, Param | Call):
            block = min(max(outline.owner_block(node.module), 0), last - 1)
            place = max(behind, default=(-1, 0))[0], block
        elif isinstance(node, Const) or not behind:
            continue
        else:
            place = max(behind)
        places[node_id] = place
        for ref in refs(node):
            if ref in places and places[ref][1] != place[1]:
                used_at[ref].add(place[1])
    found: dict[tuple[int, frozenset[int]], int] = defaultdict(int)
    for value, blocks in used_at.items():
        if value in experiment.specs:
            made_at = places[value][1]
            found[made_at, frozenset(blocks)] += experiment.specs[value].nbytes
    return tuple(Carried(made, used, n_bytes) for (made, used), n_bytes in found.items())
