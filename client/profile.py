"""Where the time of a trace went, peer by peer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from glasshive.security.keys import PeerId

if TYPE_CHECKING:
    from glasshive.client.provenance import Hop
    from glasshive.client.relay import Relayed

__all__ = ["HopProfile", "Profile"]


class HopProfile(NamedTuple):
    """One row: a peer's own word of its seconds, and the bytes that it sent to other peers."""

    blocks: str
    peer: PeerId
    compute_seconds: float
    wait_seconds: float
    wire_seconds: float
    n_bytes: int


_TITLES = ("blocks", "peer", "compute s", "wait s", "wire s", "bytes")


@dataclass(frozen=True, slots=True, repr=False)
class Profile:
    """Seconds and bytes of each peer of a trace; `print` shows a table.

    `compute_seconds` are on the device; `wait_seconds` those in which the part waited for what
    other peers make; `wire_seconds` those in which it handed hidden states and carried values to
    the network, until that had taken them: how long they were on their way isn't known. Peers work
    beside each other, and one sends while it computes, so columns don't add up to `seconds`, which
    passed at the client. A replaced peer's are not in it. What two peers sent each other by way of
    the client is in their bytes, and `relayed` says which these are.
    """

    hops: tuple[HopProfile, ...]
    seconds: float
    relayed: tuple[Relayed, ...] = ()

    @classmethod
    def of(cls, hops: Sequence[Hop], seconds: float, relayed: tuple[Relayed, ...]) -> Profile:
        """From what the peers of a result have signed."""
        return cls(
            tuple(
                HopProfile(
                    hop.blocks,
                    hop.peer,
                    hop.compute_seconds,
                    hop.wait_seconds,
                    hop.wire_seconds,
                    hop.hidden_bytes + hop.carried_bytes,
                )
                for hop in hops
            ),
            seconds,
            relayed,
        )

    def __repr__(self) -> str:
        rows = [
            _TITLES,
            *(
                (
                    *(hop.blocks, hop.peer[-8:]),
                    *(f"{s:.4f}" for s in (hop.compute_seconds, hop.wait_seconds)),
                    *(f"{hop.wire_seconds:.4f}", f"{hop.n_bytes:,}"),
                )
                for hop in self.hops
            ),
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(
                cell.ljust(width) if place < 2 else cell.rjust(width)
                for place, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        lines += [
            f"{one.first} and {one.second} by way of this client: {one.n_bytes:,} bytes"
            for one in self.relayed
        ]
        return "\n".join([*lines, f"{self.seconds:.4f} s in all"])
