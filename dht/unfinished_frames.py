"""What the frames that are still coming hold of a peer's memory.

A frame takes memory as its bytes come, before anybody has asked what it is for. Who sends many at
once, each nearly to its end, would otherwise hold as much as all streams together may take.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, TypeVar, final

from glasshive.security.keys import PeerId

__all__ = ["UnfinishedFrames", "UnfinishedLimits"]

T = TypeVar("T")

_MIB: Final = 1024 * 1024


@dataclass(frozen=True, slots=True)
class UnfinishedLimits:
    """How many bytes of unfinished frames are held.

    Tensors come in frames of 256 KiB: all of the streams that a peer may have open, or that may be
    open in all, find room for one each.
    """

    per_remote_bytes: int = 32 * _MIB
    per_origin_bytes: int = 192 * _MIB
    in_all_bytes: int = 256 * _MIB


@final
class UnfinishedFrames:
    """Counts the bytes of frames that have begun and not ended: of a key, an address, in all."""

    def __init__(self, limits: UnfinishedLimits | None = None) -> None:
        self.held_bytes = 0
        self._limits = limits or UnfinishedLimits()
        self._of_remote: Counter[PeerId] = Counter()
        self._from_origin: Counter[str] = Counter()

    @contextlib.contextmanager
    def one_more(self, remote: PeerId, origin: str) -> Iterator[Callable[[int], str | None]]:
        """While one frame comes: `hold(n)` counts n bytes more of it, until this ends.

        `hold` returns None, or which limit they are beyond; then they are not counted.
        """
        frame_bytes = 0

        def hold(n_bytes: int) -> str | None:
            nonlocal frame_bytes
            refusal = self._refusal(remote, origin, n_bytes)
            if refusal is None:
                frame_bytes += n_bytes
                self._add(remote, origin, n_bytes)
            return refusal

        try:
            yield hold
        finally:
            self._add(remote, origin, -frame_bytes)

    def _refusal(self, remote: PeerId, origin: str, n_bytes: int) -> str | None:
        limits = self._limits
        if self._of_remote[remote] + n_bytes > limits.per_remote_bytes:
            return f"unfinished frames of yours hold {limits.per_remote_bytes} bytes"
        if origin and self._from_origin[origin] + n_bytes > limits.per_origin_bytes:
            return f"unfinished frames from your address hold {limits.per_origin_bytes} bytes"
        if self.held_bytes + n_bytes > limits.in_all_bytes:
            return f"unfinished frames hold {limits.in_all_bytes} bytes, try another peer"
        return None

    def _add(self, remote: PeerId, origin: str, n_bytes: int) -> None:
        self.held_bytes += n_bytes
        _add_to(self._of_remote, remote, n_bytes)
        _add_to(self._from_origin, origin, n_bytes)


def _add_to(among: Counter[T], whose: T, n_bytes: int) -> None:
    """Who holds nothing is forgotten."""
    among[whose] += n_bytes
    if not among[whose]:
        del among[whose]
