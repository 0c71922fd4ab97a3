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
from glasshive.security.policy import Policy, why_floor
from glasshive.security.trust_root import MAX_DOCUMENT_BYTES, root_digest
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
    document = read_root(settings.root)
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
    """What is kept of the swarm whose first root is this document. Raises what TrustStore does.

    Copies of one root that other signers completed have one folder: a second would be a way back to
    older versions.
    """
    folder = (data or data_dir()) / "trust" / root_name(swarm, root_digest(root))
    return TrustStore(folder, swarm=swarm, root=root, clock=clock)


def root_name(swarm: str, digest: str) -> str:
    """The name of a folder for what is kept of a swarm whose first root has this digest."""
    return hashlib.sha256(f"{swarm}\0{digest}".encode()).hexdigest()[:32]


def own_rules(settings: Settings) -> HostRules | None:
    """The rules of the host's own file; None if none is configured. Raises BadPolicy."""
    return None if settings.policy is None else read_host_rules(settings.policy)


def host_rules(store: TrustStore | None, own: HostRules | None, now_seconds: float) -> Policy:
    """What others may run on this host now: the kept whitelist, narrowed by the host's own file.

    Without a store (no root is configured) this release allows all that it can, and own rules that
    are wider than that raise BadPolicy. With one, what is wider in them is left out; if it has no
    whitelist yet, the floor counts.
    """
    if store is None:
        return Policy.of_release(own)
    kept = store.kept
    return Policy.effective(
        None if kept is None else kept.whitelist,
        now_seconds,
        host=own,
        signers=() if store.whitelist is None else store.whitelist.signers,
        root_expires_seconds=store.root.expires_seconds,
        dropped=_why_dropped(store),
    )


def rules_state(store: TrustStore, now_seconds: float) -> tuple[int, int, str]:
    """What `host_rules` of this store depend on: while it is equal, so are they."""
    held = store.whitelist
    reason = (
        _why_dropped(store)
        if held is None
        else why_floor(held.whitelist, store.root.expires_seconds, now_seconds)
    )
    return store.root.version, store.highest_version, reason


def _why_dropped(store: TrustStore) -> str:
    """Why the kept whitelist counts no more; empty if it does, or there is none."""
    if store.kept is None or store.whitelist is not None:
        return ""
    return (
        f"too few keys of root {store.root.version} signed whitelist {store.highest_version}, "
        "the last that was taken here"
    )


def read_root(path: Path) -> bytes:
    """The document of the first root, not checked yet. Raises ConfigError."""
    try:
        with path.open("rb") as file:
            document = file.read(MAX_DOCUMENT_BYTES + 1)
    except OSError as error:
        raise ConfigError(
            f"the root {path} can't be read: {error.strerror or error}; check `root` in hive.toml "
            "or GLASSHIVE_ROOT; if hive.toml was handed to you, copy the folder trust beside "
            "hive.toml too"
        ) from None
    if len(document) > MAX_DOCUMENT_BYTES:
        raise ConfigError(
            f"the root {path} has more than {MAX_DOCUMENT_BYTES} bytes; is it another file?"
        )
    return document
