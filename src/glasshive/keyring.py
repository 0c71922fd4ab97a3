"""Which key a process of this machine uses: a process is the peer of its key, so none is shared."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from glasshive.graph.errors import GlasshiveError
from glasshive.security.errors import KeyFileError

if TYPE_CHECKING:
    from filelock import BaseFileLock

MOST_KEYS = 64


class KeyInUse(GlasshiveError):
    """Two processes of one machine would be the same peer."""


def take_key(key: Path) -> BaseFileLock:
    """The lock of this key, taken; it is free again when the process ends. Raises KeyInUse."""
    lock = _try(key)
    if lock is None:
        raise KeyInUse(
            f"another process on this machine is the peer of the key {key}; end it, or leave out "
            "--key and host_key, and a free key is taken"
        )
    return lock


def take_free_key(first: Path) -> tuple[Path, BaseFileLock]:
    """The first key that no process uses, of `host.key`, `host-2.key`, `host-3.key` ..., locked.

    Raises KeyInUse if there are too many.
    """
    names = (first.with_stem(f"{first.stem}-{number}") for number in range(2, MOST_KEYS + 1))
    for key in (first, *names):
        lock = _try(key)
        if lock is not None:
            return key, lock
    raise KeyInUse(
        f"{MOST_KEYS} processes on this machine use the keys {first.stem}*{first.suffix} in "
        f"{first.parent}; end one, or name a key with --key"
    )


def _try(key: Path) -> BaseFileLock | None:
    from filelock import FileLock, Timeout

    lock = FileLock(key.with_name(key.name + ".lock"))
    try:
        key.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock.acquire(timeout=0)
    except Timeout:
        return None
    except OSError as error:
        raise KeyFileError(
            f"can't use the key file {key}: {error.strerror or error}; "
            "check the path and the rights of its folder"
        ) from None
    return lock
