"""One peer's part of a job, as its client sees it."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final, Literal

from glasshive.client.left_out import RETURN_SECONDS
from glasshive.client.provenance import Hop
from glasshive.dht.messages import ALIVE_SECONDS, AT_WORK, ITS_TURN, SILENCE_SECONDS
from glasshive.dht.transport import PeerAddress
from glasshive.graph.graph import Save
from glasshive.graph.plan import Part

__all__ = ["HopReport"]

SILENT_SECONDS: Final = 1.5 * ALIVE_SECONDS
"""After which one from whom nothing came is said to be silent: a sign of life is overdue."""
HELD_UP_SECONDS: Final = 3.0
"""Of waiting for a lost peer, after which a user without a display is told."""
_WAITED_SECONDS: Final = 1.0  # of waiting for a lost peer that are worth a word


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
    became: str = ""  # what, of its peer (`what_became`), while nobody has its part
    gone_at: float = math.inf  # by the job's clock: since when that peer is waited for
    heard_at: float = math.inf  # by the job's clock: when anything last came from its peer
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

    def doing(self, hops: Sequence[HopReport], now: float) -> str:
        """What its peer does, as it says, or what became of it.

        `hops` are all of the job, and `now` is by its clock.
        """
        if self.became:
            waited_seconds = min(now - self.gone_at, RETURN_SECONDS)
            if waited_seconds < _WAITED_SECONDS:
                return f"{self.became}; looking for another"
            how_long = f"{waited_seconds:.0f} of {RETURN_SECONDS:.0f} s"
            return f"{self.became}; waiting {how_long} for it or another"
        if self.state != "running":
            return self.state
        if (silent_seconds := now - self.heard_at) >= SILENT_SECONDS:
            return f"silent for {silent_seconds:.0f} s"
        if self.waits_for == ITS_TURN:
            return "waits for its turn"
        spans = [one.part.span for one in hops if one.part.index == self.waits_for]
        return f"waits for blocks {spans[0]}" if spans else "at work"

    def held_up(self, now: float) -> str:
        """Why it holds up the others, always in the same words; empty if it doesn't for long.

        `now` is by the job's clock.
        """
        became, gone_seconds = self.became, now - self.gone_at
        if became and gone_seconds >= HELD_UP_SECONDS:
            return f"{became}; waiting up to {RETURN_SECONDS:.0f} s for it or another"
        # A shorter silence mostly ends by itself.
        if not became and self.state == "running" and now - self.heard_at >= SILENCE_SECONDS / 2:
            return f"silent; after {SILENCE_SECONDS:.0f} s it counts as lost"
        return ""

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
