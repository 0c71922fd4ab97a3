"""Roots and whitelists that hold now, by the real clock: what real processes can start with."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from typing import Any

from signers import CAT, DAN, DAY, root_document, signed_whitelist

from glasshive.graph.ops import OPS
from glasshive.security.signing_keys import SigningKey
from glasshive.security.trust_root import TrustedRoot


def root_now(**changes: Any) -> bytes:
    """A root's document, as signers.root_document makes it, that expires in a year."""
    return root_document(**{"expires_seconds": int(time.time()) + 365 * DAY, **changes})


def whitelist_now(
    version: int,
    root: TrustedRoot,
    *,
    swarm: str,
    signed_by: Sequence[SigningKey] = (CAT, DAN),
    without: Collection[str] = (),
    **changes: Any,
) -> tuple[bytes, bytes]:
    """(document, body) of a whitelist of every op but those `without`, every module and model."""
    now = int(time.time())
    everything = {
        "issued_seconds": now - 60,
        "expires_seconds": now + DAY,
        "ops": {name: spec.version for name, spec in OPS.items() if name not in without},
        "readable": ("**",),
        "writable": ("**",),
        "models": None,
        "revoked_peers": frozenset(),
        "revoked_clients": frozenset(),
        "revoked_versions": frozenset(),
    }
    return signed_whitelist(
        version, root=root, signed_by=signed_by, swarm=swarm, **{**everything, **changes}
    )
