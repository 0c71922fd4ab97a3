"""Manifests of folders that were hashed before, so that large weights are read once.

A remembered hash is used only while each file has the size and the time of change that it had when
it was hashed, to the nanosecond. Files that have just been written are not remembered: a change
within the clock's grain could not be told.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

from glasshive.models import cache_dir
from glasshive.peer.served_model import OnProgress, make_manifest, manifest_paths
from glasshive.security.manifest import Manifest, ManifestFile

_VERSION = 1
_SETTLED_SECONDS = 2.0
_LOCK_SECONDS = 900.0


def known_manifest(
    folder: Path, name: str, on_progress: OnProgress = lambda done, total: None
) -> Manifest:
    """The manifest of the model in `folder`, as `make_manifest` gives it.

    Of several processes that ask at once, one hashes and the others wait for it.
    """
    from filelock import FileLock, Timeout

    folder = folder.resolve()
    cache = cache_dir() / "manifests"
    cache.mkdir(parents=True, exist_ok=True)
    place = cache / (hashlib.sha256(str(folder).encode()).hexdigest()[:32] + ".json")
    lock = FileLock(place.with_suffix(".lock"))
    try:
        with lock.acquire(timeout=_LOCK_SECONDS):
            before = _states(folder)
            found = _read(place, before)
            if found is None:
                found = make_manifest(folder, name, on_progress).files
                settled = time.time_ns() - _SETTLED_SECONDS * 1e9
                if _states(folder) == before and all(one[2] < settled for one in before):
                    _write(place, before, found)
    except Timeout:
        return make_manifest(folder, name, on_progress)
    return Manifest(name, found)


def model_name(asked: str, folder: Path) -> str:
    """What a model found in `folder` is called, if it was asked for as `asked`."""
    return folder.resolve().name if Path(asked).expanduser().is_dir() else asked


def _states(folder: Path) -> list[list[Any]]:
    """Name, size and time of change of each file that a manifest names."""
    states: list[list[Any]] = []
    for path in manifest_paths(folder):
        status = path.stat()
        states.append([path.name, status.st_size, status.st_mtime_ns])
    return states


def _read(place: Path, states: list[list[Any]]) -> tuple[ManifestFile, ...] | None:
    try:
        kept = json.loads(place.read_text())
        if kept["version"] != _VERSION or kept["files"] != states:
            return None
        digests = [bytes.fromhex(one) for one in kept["sha256"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if len(digests) != len(states) or any(len(one) != 32 for one in digests):
        return None
    return tuple(
        ManifestFile(state[0], state[1], digest)
        for state, digest in zip(states, digests, strict=True)
    )


def _write(place: Path, states: list[list[Any]], files: tuple[ManifestFile, ...]) -> None:
    """Put there whole or not at all."""
    draft = place.with_suffix(f".{os.getpid()}")
    kept = {"version": _VERSION, "files": states, "sha256": [one.sha256.hex() for one in files]}
    draft.write_text(json.dumps(kept))
    draft.replace(place)
