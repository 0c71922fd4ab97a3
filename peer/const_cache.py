"""The constants that a host keeps between traces, so that a client sends each of them once.

They are kept on a lease, which each use renews. Nobody's constant makes room for another client's:
a client has a share, in which its own go first, and where all is full nothing more is kept.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, final

from torch import Tensor

from glasshive.security.keys import PeerId

ENTRY_BYTES: Final = 1024
"""What an entry takes besides its numbers: the objects of tensor, storage, key and place."""
LEASE_SECONDS: Final = 600.0
"""How long a constant that no trace uses is kept: over a pause in somebody's work, and no more."""
CLIENT_SHARE: Final = 4
"""A client may have one in so many of all bytes."""


@dataclass(slots=True)
class _Entry:
    tensor: Tensor
    ends_at: float

    @property
    def taken_bytes(self) -> int:
        return self.tensor.nbytes + ENTRY_BYTES


@dataclass(slots=True)
class _Share:
    """One client's entries, those used longest ago first: so their leases end in this order."""

    entries: OrderedDict[bytes, _Entry] = field(default_factory=OrderedDict)
    taken_bytes: int = 0


@final
class ConstCache:
    """Tensors by digest, for each client alone: knowing a hash gives nobody another's tensor.

    Holds `limit_bytes` at most, entries of no numbers counted too. A trace that runs has its
    constants whether or not they are still held here.
    """

    def __init__(self, limit_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit_bytes = limit_bytes
        self._clock = clock
        self._shares: dict[PeerId, _Share] = {}
        self._held_bytes = 0

    @property
    def held_bytes(self) -> int:
        """What all entries take."""
        return self._held_bytes

    def __len__(self) -> int:
        return sum(len(share.entries) for share in self._shares.values())

    def get(self, client: PeerId, name: bytes) -> Tensor | None:
        """The client's tensor of that digest, if it is still held; its lease begins anew."""
        share = self._shares.get(client)
        found = None if share is None else share.entries.get(name)
        if share is None or found is None:
            return None
        share.entries.move_to_end(name)
        found.ends_at = self._clock() + LEASE_SECONDS
        return found.tensor

    def put(self, client: PeerId, name: bytes, tensor: Tensor) -> None:
        """Hold a tensor, in place of the client's own used longest ago if need be.

        It is not held if it is more than the client's share, or if others have the room.
        """
        share = self._shares.get(client, _Share())
        others_bytes = self._held_bytes - share.taken_bytes
        most_bytes = min(self._limit_bytes // CLIENT_SHARE, self._limit_bytes - others_bytes)
        entry = _Entry(tensor, self._clock() + LEASE_SECONDS)
        if name in share.entries or entry.taken_bytes > most_bytes:
            return
        while share.taken_bytes + entry.taken_bytes > most_bytes:
            self._drop_first(share)
        self._shares[client] = share
        share.entries[name] = entry
        share.taken_bytes += entry.taken_bytes
        self._held_bytes += entry.taken_bytes

    def drop_ended(self) -> None:
        """Forget those whose lease has ended."""
        now = self._clock()
        for client, share in list(self._shares.items()):
            while share.entries and next(iter(share.entries.values())).ends_at <= now:
                self._drop_first(share)
            if not share.entries:
                del self._shares[client]

    def _drop_first(self, share: _Share) -> None:
        _, entry = share.entries.popitem(last=False)
        share.taken_bytes -= entry.taken_bytes
        self._held_bytes -= entry.taken_bytes
