"""Small files that a crash leaves either as they were or as they were to become.

What is kept here decides who is let in, so it is for its owner's eyes only (0600), read within a
bound, and on the disk before `write_durable` returns. `write_private` and `append_private` are for
what outlives a process, and need not outlive a loss of power.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from pathlib import Path
from typing import Final

__all__ = ["append_private", "read_durable", "read_private", "write_durable", "write_private"]

_NO_WAITING: Final[int] = getattr(os, "O_NONBLOCK", 0)


def read_private(place: Path, max_bytes: int) -> bytes:
    """The bytes of a file that is its owner's alone.

    Raises OSError, and ValueError whose text says what is wrong and what to do for a file that
    other users may read, that is no regular file, or that is longer than `max_bytes`.
    """
    with open(place, "rb", opener=_without_waiting) as file:
        status = os.fstat(file.fileno())
        mode = stat.S_IMODE(status.st_mode)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{place} is not a regular file; give the path of one")
        if os.name == "posix" and mode & 0o077:
            raise ValueError(
                f"{place} is open to other users (mode {mode:04o}), wanted 0600; "
                f"run `chmod 600 {place}`"
            )
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise ValueError(
            f"{place} has more than {max_bytes} bytes; restore it from a copy of your own"
        )
    return data


def read_durable(place: Path, max_bytes: int) -> bytes:
    """As `read_private`, but empty if there is no such file."""
    try:
        return read_private(place, max_bytes)
    except FileNotFoundError:
        return b""


def write_durable(place: Path, data: bytes) -> None:
    """Replaces the file, or makes it and its folder; raises OSError and then changed nothing."""
    _replace(place, data, sync=True)
    if os.name == "posix":  # the new name, too, has to outlive a loss of power
        folder = os.open(place.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_private(place: Path, data: bytes) -> None:
    """As `write_durable`, without waiting for the disk: a loss of power may undo or spoil it."""
    _replace(place, data, sync=False)


def append_private(place: Path, data: bytes) -> None:
    """Adds to the end of the file, or makes it; a loss of power may undo it. Raises OSError."""
    descriptor = os.open(place, os.O_WRONLY | os.O_APPEND | os.O_CREAT | _NO_WAITING, 0o600)
    try:
        written = os.write(descriptor, data)
    finally:
        os.close(descriptor)
    if written != len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _replace(place: Path, data: bytes, *, sync: bool) -> None:
    place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = place.with_name(f".{place.name}.{secrets.token_hex(8)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.replace(draft, place)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def _without_waiting(path: str, flags: int) -> int:
    # Opening a pipe would otherwise wait for whoever writes to it.
    return os.open(path, flags | _NO_WAITING)
