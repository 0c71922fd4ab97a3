"""The constants that a host keeps between traces, so that a client sends each of them once."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final, final

from torch import Tensor

from glasshive.security.keys import PeerId

ENTRY_BYTES: Final = 1024
"""What an entry takes besides its numbers: the objects of tensor, storage, key and place."""


@final
class ConstCache:
    """Tensors by digest, for each client alone: knowing a hash gives nobody another's tensor.

    Holds `limit_bytes` at most, entries of no numbers counted too; those used longest ago go first.
    A trace that runs has its constants whether or not they are still held here.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._held: OrderedDict[tuple[PeerId, bytes], Tensor] = OrderedDict()
        self._held_bytes = 0

    @property
    def held_bytes(self) -> int:
        """What all entries take."""
        return self._held_bytes

    def __len__(self) -> int:
        return len(self._held)

    def get(self, client: PeerId, name: bytes) -> Tensor | None:
        """The client's tensor of that digest, if it is still held."""
        found = self._held.get((client, name))
        if found is not None:
            self._held.move_to_end((client, name))
        return found

    def put(self, client: PeerId, name: bytes, tensor: Tensor) -> None:
        """Hold a tensor, unless it alone is too large, and forget those used longest ago."""
        if _taken_bytes(tensor) > self._limit_bytes or (client, name) in self._held:
            return
        self._held[client, name] = tensor
        self._held_bytes += _taken_bytes(tensor)
        while self._held_bytes > self._limit_bytes:
            _, old = self._held.popitem(last=False)
            self._held_bytes -= _taken_bytes(old)


def _taken_bytes(tensor: Tensor) -> int:
    return tensor.nbytes + ENTRY_BYTES
