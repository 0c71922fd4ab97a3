"""Who was promised how much of this host's memory, so that all of it together is there.

A trace is admitted with the bytes that it takes at its worst moment; they are promised to it until
it has ended. What would go beyond the mark, or beyond what other programs leave at that moment, is
told to come again: nothing that another trace uses is ever taken away for it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Final, final

import torch

from glasshive.peer.device_memory import free_on
from glasshive.peer.errors import Busy, NotEnoughMemory
from glasshive.security.keys import PeerId

LENT_SHARE: Final = 0.75
LEAST_FREE_BYTES: Final = 64 << 20
"""Of the memory that is free when a host starts: the rest is for what its user does meanwhile, for
the allocator's own gaps, and for what torch takes in the middle of an op."""


CLIENT_SHARE: Final = 2
"""Several traces of one client have one in so many of all bytes; one alone may have all."""


@dataclass(frozen=True, slots=True)
class _Promise:
    client: PeerId
    peak_bytes: int
    ends_at: float


@final
class MemoryBook:
    """Promises of at most `mark_bytes` at a time, and of no more than there is.

    `room_bytes` says how much that is now, with what those who have promises have taken of theirs
    (None: always enough).
    """

    def __init__(
        self,
        mark_bytes: int,
        clock: Callable[[], float] = time.monotonic,
        room_bytes: Callable[[], int] | None = None,
    ) -> None:
        self._mark_bytes = mark_bytes
        self._clock = clock
        self._room_bytes = room_bytes
        self._promises: dict[Hashable, _Promise] = {}

    @property
    def promised_bytes(self) -> int:
        """What all traces together were promised."""
        return sum(one.peak_bytes for one in self._promises.values())

    def promise(self, holder: Hashable, client: PeerId, peak_bytes: int, ends_at: float) -> None:
        """Promise a trace its bytes until `release`, which comes by `ends_at` of the clock.

        `holder` is one thing for one trace only: ids may come again.

        Raises Busy, saying when there is room for it, if the others leave too little, or if the
        client's others have its share; and if other programs have taken what it needs.
        """
        own_bytes = sum(one.peak_bytes for one in self._promises.values() if one.client == client)
        if own_bytes and own_bytes + peak_bytes > self._mark_bytes // CLIENT_SHARE:
            raise Busy(
                f"traces of yours have {own_bytes} bytes of this peer, and with the {peak_bytes} "
                f"of this one it were more than your share of {self._mark_bytes // CLIENT_SHARE}; "
                "wait for one of them, or try another peer"
            )
        promised_bytes = self.promised_bytes
        if promised_bytes + peak_bytes > self._mark_bytes:
            raise Busy(
                f"this peer has {promised_bytes} of {self._mark_bytes} bytes promised to other "
                f"traces, and this one takes {peak_bytes}; try again soon (there is room in "
                f"{self._room_seconds(peak_bytes):.0f} s at the latest), or by way of another peer"
            )
        room_bytes = self._mark_bytes if self._room_bytes is None else self._room_bytes()
        if promised_bytes + peak_bytes > room_bytes:
            # What torch's own libraries take of a device after the host's start counts as theirs.
            here = (
                f"this peer has {max(room_bytes, 0)} bytes of memory for all traces now, since "
                f"other programs on its machine have taken the rest of {self._mark_bytes}; "
            )
            if not promised_bytes:
                raise Busy(
                    f"{here}no other trace has any of them, and this one takes {peak_bytes}; save "
                    "or edit less in one trace, go by way of another peer, or try again later"
                )
            raise Busy(
                f"{here}{promised_bytes} of them are promised to other traces, and this one takes "
                f"{peak_bytes}; try again later, or by way of another peer"
            )
        self._promises[holder] = _Promise(client, peak_bytes, ends_at)

    def release(self, holder: Hashable) -> None:
        """The trace has ended, or was never promised anything."""
        self._promises.pop(holder, None)

    def _room_seconds(self, peak_bytes: int) -> float:
        """In how long so many bytes are there, if every trace takes all of its time."""
        over_bytes = self.promised_bytes + peak_bytes - self._mark_bytes
        ends_at = -math.inf
        for one in sorted(self._promises.values(), key=lambda one: one.ends_at):
            if over_bytes <= 0:
                break
            over_bytes -= one.peak_bytes
            ends_at = one.ends_at
        return max(ends_at - self._clock(), 0.0)


def lent_bytes(device: torch.device, wanted_bytes: int | None = None) -> int:
    """How much a host on `device` may promise, its weights being loaded.

    What its owner wants it to lend, as far as that is free; without a wish most of what is free.
    Raises NotEnoughMemory where hardly any is free: each trace would be refused.
    """
    free = free_on(device)
    if free < LEAST_FREE_BYTES:
        raise NotEnoughMemory(
            f"{free / 2**20:.0f} MiB are free for traces on {device} beside the model (a "
            f"container's limit counts), and at least {LEAST_FREE_BYTES >> 20} are wanted; serve "
            "fewer blocks with --blocks, give the container more memory, or end what else takes it"
        )
    return int(LENT_SHARE * free) if wanted_bytes is None else min(wanted_bytes, free)
