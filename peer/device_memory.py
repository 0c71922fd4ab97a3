"""How much memory is free where a host's values are, and how much this process has taken of it.

Values are on the device, and wait in the machine's own memory to be sent: whichever has less.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, final

import psutil  # type: ignore[import-untyped]
import torch

from glasshive.peer.free_memory import free_bytes

LOOK_SECONDS: Final = 0.25
"""For so long a look counts. What traces take or give back meanwhile changes nothing in its sum."""


@final
class DeviceMemory:
    """The memory that a host's values are in, from when this is made.

    Other hosts of the same process count as this one: what they take is thought to come back.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.monotonic) -> None:
        self._device = device
        self._clock = clock
        self._own_bytes = _own_bytes()
        self._own_on_device_bytes = _own_on_device_bytes(device)
        self._room_bytes = 0
        self._looked_at: float | None = None

    @property
    def room_bytes(self) -> int:
        """What there would be if all that was taken since the beginning were given back.

        Traces that begin or end don't change it, but other programs do, and a new limit of the
        container. A look at it that is a moment old is good enough.
        """
        now = self._clock()
        if self._looked_at is None or now - self._looked_at >= LOOK_SECONDS:
            self._looked_at, self._room_bytes = now, self._look()
        return self._room_bytes

    def _look(self) -> int:
        room = free_bytes() + max(_own_bytes() - self._own_bytes, 0)
        if (on_device := _free_on_device_bytes(self._device)) is not None:
            taken = _own_on_device_bytes(self._device) - self._own_on_device_bytes
            room = min(room, on_device + max(taken, 0))
        return room


def free_on(device: torch.device) -> int:
    """What this process may still take now."""
    on_device_bytes = _free_on_device_bytes(device)
    return free_bytes() if on_device_bytes is None else min(free_bytes(), on_device_bytes)


def _own_bytes() -> int:
    """What this process has of the machine's memory, files that are mapped not counted."""
    memory = psutil.Process().memory_info()
    own: int = memory.rss - getattr(memory, "shared", 0)  # where the system tells them apart
    return own


def _free_on_device_bytes(device: torch.device) -> int | None:
    """None if the device has no memory of its own. What torch keeps for later counts as free."""
    if device.type != "cuda":
        return None
    on_device_bytes, _ = torch.cuda.mem_get_info(device)
    kept_bytes = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return on_device_bytes + kept_bytes


def _own_on_device_bytes(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
