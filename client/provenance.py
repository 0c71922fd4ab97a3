"""Where a result came from: which peers, what each did, and how long it took."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from glasshive.client.profile import Profile
from glasshive.security.keys import PeerId

if TYPE_CHECKING:
    from glasshive.client.relay import Relayed


class Hop(NamedTuple):
    """One peer of a route: what it is, and what it did for the trace.

    `backend` is its hardware and torch, within which results are bit-equal. It waited for what
    others sent, and for the network to take what it sent itself (`wire_seconds`). The bytes are
    what it sent: hidden states and carried values to the next peers, saved values to the client.
    """

    peer: PeerId
    blocks: str
    backend: str
    compute_seconds: float
    wait_seconds: float
    wire_seconds: float
    hidden_bytes: int
    carried_bytes: int
    saved_bytes: int


class Replaced(NamedTuple):
    """A peer that was lost in the middle of a generation, and the one that went on in its place:
    another, or the same one, which had come back.

    `seconds` passed from when the loss was seen until that peer had accepted the part; then it ran
    the steps again that had been run. `backend` is its hardware and torch: of the lost one, too.
    """

    blocks: str
    lost: PeerId
    by: PeerId
    seconds: float
    backend: str

    def __str__(self) -> str:
        if self.lost == self.by:
            return f"{self.lost[-8:]} was lost and came back to {self.blocks}"
        return f"{self.lost[-8:]} was lost and {self.by[-8:]} took over {self.blocks}"


@dataclass(frozen=True, slots=True, repr=False)
class Provenance:
    """Where a result came from. Each peer signed that it sent these values for this trace.

    `retried` is how often all of it was run again, and `other_hardware` the blocks that then ran on
    other hardware, or another torch, than the first time, so that their bits may differ from those
    of before. `replaced` is which peers were lost and replaced while it ran, and `relayed` which
    peers spoke by way of the client, as they couldn't reach each other; what was passed on is in
    `sent_bytes` and `received_bytes`. `audited` is False: no peer's work was checked by another.
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
    other_hardware: tuple[str, ...]
    replaced: tuple[Replaced, ...]
    relayed: tuple[Relayed, ...]
    audited: bool

    @property
    def profile(self) -> Profile:
        """Where the time went, peer by peer."""
        return Profile.of(self.hops, self.seconds, self.relayed)

    def __repr__(self) -> str:
        route = " > ".join(f"{hop.blocks} {hop.peer[-8:]}" for hop in self.hops)
        retried = f", retried {self.retried}x" if self.retried else ""
        for went_on in self.replaced:
            retried += f", {went_on}"
        for blocks in self.other_hardware:
            retried += f", {blocks} ran again on other hardware"
        for one in self.relayed:
            retried += f", {one.first} and {one.second} relayed by this client"
        backends = list(dict.fromkeys(hop.backend for hop in self.hops))
        mixed = f" on {' and '.join(backends)}" if len(backends) > 1 else ""
        return (
            f"<{self.seconds:.2f} s over {route}{mixed}; {self.dtype}, {self.attention} attention"
            f"{retried}; {'audited' if self.audited else 'unaudited'}>"
        )
