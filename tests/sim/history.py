"""What happened in a simulation, and whether it may have.

Every operation of a client ends, by its deadline and a second, in exactly one of two ways: ok, with
the very numbers of the oracle; or with an error of ours that says why, and no numbers, or of a
generation some of the oracle's. One that was cancelled while it ran ends at that moment, as that
and nothing else, and no other does. Peers here are honest, so nobody is ever said to break the
protocol, and no host fails by a bug: neither in what an operation comes to, nor in one of its
tries. And when the network has been well for a while, nobody waits for what never comes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from glasshive.client.errors import BadAnswer, PeerFailed, TraceCancelled
from glasshive.graph.errors import GlasshiveError

__all__ = ["History", "Operation"]

GRACE_SECONDS = 1.0
CANCELLED_SECONDS = 0.1
"""After so long nobody waits any more for what was cancelled."""
HANGING_SECONDS = 100.0
"""After so long in a calm network an operation that still waits is waiting for nothing."""
# What an honest and healthy host may say of a trace that is lost or late elsewhere.
_MAY_SAY = {"DeadlineExceeded", "NeighbourLost", "TraceEnded", "TransportClosed", "TransportLost"}


@dataclass
class Operation:
    """One experiment of one client."""

    client: int
    name: str
    began_at: float
    deadline_seconds: float
    must_be_ok: bool
    ended_at: float | None = None
    cancelled_at: float | None = None  # None also if it had ended when that was tried
    saves: dict[str, Tensor | None] = field(default_factory=dict)
    retried: int = 0
    replaced: int = 0
    relayed: int = 0  # between how many pairs of peers
    error: BaseException | None = None

    @property
    def outcome(self) -> str:
        """`ok`, or the error's name."""
        if self.ended_at is None:
            return "never ended"
        return "ok" if self.error is None else type(self.error).__name__

    def faults(self, oracle: Mapping[str, Tensor | None], calm_at: float) -> list[str]:
        """What may not be, with trouble until `calm_at`."""
        found = []
        if self.ended_at is None:
            return ["it never ended"]
        late = self.ended_at - self.began_at - self.deadline_seconds
        if late > GRACE_SECONDS:
            found.append(f"it ended {late:.3f} s after its deadline")
        was_cancelled = self.cancelled_at is not None
        if was_cancelled != isinstance(self.error, TraceCancelled):
            found.append("it was cancelled" if was_cancelled else "nobody cancelled it")
        elif was_cancelled and self.ended_at - self.cancelled_at > CANCELLED_SECONDS:
            found.append(f"it ended {self.ended_at - self.cancelled_at:.3f} s after its cancel()")
        if self.error is None:
            if self.saves.keys() != oracle.keys():
                found.append(f"it saved {sorted(self.saves)}, not {sorted(oracle)}")
            else:
                wrong = [one for one in oracle if not _same(self.saves[one], oracle[one])]
                found += [f"{', '.join(wrong)} are not the oracle's"] if wrong else []
            return found
        wrong = [one for one in self.saves if not _same(self.saves[one], oracle.get(one))]
        if wrong or (self.saves and self.name == "trace"):
            found.append(f"it failed, and saved {sorted(wrong or self.saves)}")
        if not isinstance(self.error, GlasshiveError) or not str(self.error):
            found.append("the error is none of ours")
        if self.ended_at - max(self.began_at, calm_at) > HANGING_SECONDS:
            found.append(f"it hung until its end in a network that is well: {self.error}")
        if self.must_be_ok:
            found.append("nothing was wrong with the network by then")
        return found

    def __str__(self) -> str:
        return f"client {self.client}: {self.name} at {self.began_at:.3f} s: {self.outcome}"


@dataclass
class History:
    """The operations, and all else that happened, of which little is kept as text."""

    operations: list[Operation] = field(default_factory=list)
    events: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    heard: int = 0
    calm_at: float = 0.0

    def __post_init__(self) -> None:
        self._sha256 = hashlib.sha256()

    def hear(self, now: float, *what: object) -> None:
        """Something small happened."""
        self.heard += 1
        self._sha256.update(repr((now, *what)).encode())

    def note(self, now: float, *what: object) -> None:
        """Something happened that explains others."""
        self.hear(now, *what)
        self.events.append(f"{now:9.3f} {' '.join(map(str, what))}")

    def host_says(self, error: str) -> None:
        """A trace failed at a host, which logs this."""
        if error.partition("(")[0] not in _MAY_SAY:
            self.faults.append(f"an honest peer failed: {error}")

    def job_ended(self, error: GlasshiveError) -> None:
        """A try of an operation failed."""
        is_bug = isinstance(error, PeerFailed) and error.code not in _MAY_SAY
        if isinstance(error, BadAnswer) or is_bug:
            self.faults.append(f"an honest peer is blamed: {error!r}")

    def digest(self) -> str:
        """Of all that happened, in its order."""
        return self._sha256.hexdigest()


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.dtype == other.dtype and torch.equal(one, other)
