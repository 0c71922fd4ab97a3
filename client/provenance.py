"""Where a result came from: which peers, what each did, and how long it took."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from glasshive.security.keys import PeerId


class Hop(NamedTuple):
    """One peer of a route: what it is, and what it did for the trace.

    `backend` is its hardware and torch, within which results are bit-equal. The bytes are what it
    sent: hidden states and carried values to the next peers, saved values to the client.
    """

    peer: PeerId
    blocks: str
    backend: str
    compute_seconds: float
    hidden_bytes: int
    carried_bytes: int
    saved_bytes: int


@dataclass(frozen=True, slots=True, repr=False)
class Provenance:
    """Where a result came from. Each peer signed that it sent these values for this trace.

    `audited` is False: no peer's work was checked by another.
    """

    model_id: str
    dtype: str
    attention: str
    graph_digest: bytes
    hops: tuple[Hop, ...]
    seconds: float
    sent_bytes: int
    received_bytes: int
    passes: int
    retried: int
    audited: bool

    def __repr__(self) -> str:
        route = " > ".join(f"{hop.blocks} {hop.peer[-8:]}" for hop in self.hops)
        retried = f", retried {self.retried}x" if self.retried else ""
        return (
            f"<{self.seconds:.2f} s over {route}; {self.dtype}, {self.attention} attention"
            f"{retried}; {'audited' if self.audited else 'unaudited'}>"
        )
