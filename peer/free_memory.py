"""How much memory is free for this process: on the machine, and within the limits of its container.

A container sees the whole machine's memory as its own, and is killed when it takes more than its
control groups allow. Each group on the way to the root may have a limit, in one of two forms:

    version 2   memory.max             memory.current          "max" for none
    version 1   memory.limit_in_bytes  memory.usage_in_bytes   a huge number for none

What the group has in the page cache and hasn't used lately is given up before anything is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import psutil  # type: ignore[import-untyped]

_OWN_GROUPS: Final = Path("/proc/self/cgroup")
_MOUNT: Final = Path("/sys/fs/cgroup")


def free_bytes(own_groups: Path = _OWN_GROUPS, mount: Path = _MOUNT) -> int:
    """What this process may still take of the machine's memory, its container's limit included.

    0 if it has taken more than that. Where there are no control groups, only the machine counts.
    """
    free: int = psutil.virtual_memory().available
    return max(min([free, *_left_in_groups(own_groups, mount)]), 0)


def _left_in_groups(own_groups: Path, mount: Path) -> Iterator[int]:
    """The bytes that each control group with a limit has left."""
    try:
        lines = own_groups.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            roots, files = (mount, mount / "unified"), ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            roots = (mount / "memory", mount / controllers)
            files = ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        for root in roots:
            # In a container the path may be that outside of it, and its own group is the root.
            group = root / path.lstrip("/")
            for place in (group, *group.parents):
                if (left := _left_in(place, *files)) is not None:
                    yield left
                if place == root:
                    break


def _left_in(group: Path, limit: str, usage: str) -> int | None:
    """None if there is no such group, or it has no limit."""
    try:
        text = (group / limit).read_text().strip()
        if text == "max":
            return None
        idle = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used = int((group / usage).read_text())
        idle_bytes = int(idle.get("total_inactive_file", idle.get("inactive_file", 0)))
        return int(text) - max(used - idle_bytes, 0)
    except (OSError, ValueError):
        return None
