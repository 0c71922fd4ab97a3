"""One peer's part of a job, as its client sees it."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from glasshive.client.provenance import Hop
from glasshive.dht.messages import AT_WORK, ITS_TURN
from glasshive.dht.transport import PeerAddress
from glasshive.graph.graph import Save
from glasshive.graph.plan import Part

__all__ = ["HopReport"]


@dataclass
class HopReport:
    """What one peer did: where its time went, and the bytes that it sent on or back.

    Where another peer has taken the place of one that was lost, it is the last one.
    """

    peer: PeerAddress
    part: Part
    state: Literal["preparing", "running", "done"] = "preparing"
    compute_seconds: float = 0.0
    wait_seconds: float = 0.0
    wire_seconds: float = 0.0
    hidden_bytes: int = 0
    carried_bytes: int = 0
    saved_bytes: int = 0
    peak_bytes: int = 0
    audited: bool = False
    stands_in: bool = False
    # As its peer says by `Alive`:
    stages_done: int = 0
    moves: int = 0
    waits_for: int = AT_WORK
    advanced_at: float = -math.inf  # by the job's clock: when it said that one more stage was done

    def __str__(self) -> str:
        return f"peer {self.peer.peer_id} (blocks {self.part.span})"

    @property
    def saves(self) -> frozenset[str]:
        """The names of what its peer saves."""
        nodes = self.part.graph.nodes.values()
        return frozenset(node.name for node in nodes if isinstance(node, Save))

    @cached_property
    def neighbours(self) -> Collection[int]:
        """The other parts with which it has an edge."""
        return {i for stage in self.part.stages for _, i in (*stage.imports, *stage.exports)}

    def doing(self, hops: Sequence[HopReport]) -> str:
        """What its peer does, as it says; `hops` are all of the job."""
        if self.state != "running":
            return self.state
        if self.waits_for == ITS_TURN:
            return "waits for its turn"
        spans = [one.part.span for one in hops if one.part.index == self.waits_for]
        return f"waits for blocks {spans[0]}" if spans else "at work"

    def summary(self, backend: str) -> Hop:
        """What its peer, of this hardware, did in the end."""
        return Hop(
            peer=self.peer.peer_id,
            blocks=str(self.part.span),
            backend=backend,
            compute_seconds=self.compute_seconds,
            wait_seconds=self.wait_seconds,
            wire_seconds=self.wire_seconds,
            hidden_bytes=self.hidden_bytes,
            carried_bytes=self.carried_bytes,
            saved_bytes=self.saved_bytes,
        )
