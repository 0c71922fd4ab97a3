"""What this machine trusts of a swarm: the root that its owner configured, and what is kept of it.

Each root has a folder of its own under the data folder, whose versions only rise, whichever
process of this machine learns of newer ones.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from pathlib import Path

from glasshive.security.errors import TrustRefused
from glasshive.security.host_policy import HostRules, read_host_rules
from glasshive.security.policy import Policy
from glasshive.security.trust_root import MAX_DOCUMENT_BYTES
from glasshive.security.trust_store import TrustStore
from glasshive.settings import ConfigError, Settings, data_dir


def open_store(
    settings: Settings,
    *,
    data: Path | None = None,
    clock: Callable[[], float] = time.time,
) -> TrustStore | None:
    """What is kept of the configured root, under `data` (without it the data folder of this user).

    None if no root is configured. Raises ConfigError for a root that can't be read or is none, and
    BadTrustStore.
    """
    if settings.root is None:
        return None
    document = _read(settings.root)
    try:
        return store_of(settings.swarm, document, data=data, clock=clock)
    except TrustRefused as error:
        raise ConfigError(
            f"the root {settings.root}: {error}; get it from who runs the swarm"
        ) from None


def store_of(
    swarm: str,
    root: bytes,
    *,
    data: Path | None = None,
    clock: Callable[[], float] = time.time,
) -> TrustStore:
    """What is kept of the swarm whose first root is this document. Raises what TrustStore does."""
    name = hashlib.sha256(f"{swarm}\0".encode() + root).hexdigest()[:32]
    return TrustStore((data or data_dir()) / "trust" / name, swarm=swarm, root=root, clock=clock)


def own_rules(settings: Settings) -> HostRules | None:
    """The rules of the host's own file; None if none is configured. Raises BadPolicy."""
    return None if settings.policy is None else read_host_rules(settings.policy)


def host_rules(
    store: TrustStore | None, own: HostRules | None, now_seconds: float, *, strict: bool = False
) -> Policy:
    """What others may run on this host now: the kept whitelist, narrowed by the host's own file.

    Without a store (no root is configured) this release allows all that it can; with one that has
    no whitelist yet, the floor. Raises BadPolicy for own rules that are wider than this release,
    and with `strict` than the whitelist; without, what is wider is left out.
    """
    if store is None:
        return Policy.of_release(own)
    held = store.whitelist
    return Policy.effective(
        None if held is None else held.whitelist,
        now_seconds,
        host=own,
        signers=() if held is None else held.signers,
        root_expires_seconds=store.root.expires_seconds,
        # Against the floor, before any whitelist has come, every file would be too wide.
        strict=strict and held is not None,
    )


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            document = file.read(MAX_DOCUMENT_BYTES + 1)
    except OSError as error:
        raise ConfigError(
            f"the root {path} can't be read: {error.strerror or error}; check `root` in hive.toml "
            "or GLASSHIVE_ROOT"
        ) from None
    if len(document) > MAX_DOCUMENT_BYTES:
        raise ConfigError(
            f"the root {path} has more than {MAX_DOCUMENT_BYTES} bytes; is it another file?"
        )
    return document
