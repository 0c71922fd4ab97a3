"""Five people who sign, their root and their whitelist: what tests of trust begin with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from glasshive.graph.ops import OPS
from glasshive.security.keys import Identity
from glasshive.security.manifest import ModelId
from glasshive.security.signing_keys import SigningKey
from glasshive.security.trust_root import (
    TrustedRoot,
    add_root_signature,
    add_whitelist_signature,
    first_root,
    new_root,
    new_whitelist_document,
)
from glasshive.security.whitelist import Limits, Whitelist

NOW = 1_800_000_000
DAY = 86_400
SWARM = "public"

ANN, BEN, CAT, DAN, EVE = (SigningKey(bytes([number]) * 32) for number in range(1, 6))

LIMITS = Limits(
    graph_bytes=1 << 20,
    nodes=5_000,
    const_bytes=1 << 28,
    peak_bytes=4 << 30,
    flops=10**13,
    seconds=300,
    saved_bytes=2 << 30,
    steps=512,
    batch_rows=64,
    context_tokens=8192,
    traces_per_client=8,
    generations_per_client=2,
)
TINY = ModelId("ab" * 32)
BAD_PEER = Identity(b"\1" * 32).peer_id
BAD_CLIENT = Identity(b"\2" * 32).peer_id

WHITELIST = Whitelist(
    swarm=SWARM,
    version=7,
    issued_seconds=NOW - DAY,
    expires_seconds=NOW + 29 * DAY,
    min_protocol=1,
    ops={name: OPS[name].version for name in ("add", "mul", "softmax", "linalg_svd", "pick")},
    readable=("**",),
    writable=("model.layers.*.mlp", "model.layers.*.self_attn.**"),
    models={TINY: "tiny", ModelId("cd" * 32): "large é"},
    revoked_peers=frozenset([BAD_PEER]),
    revoked_clients=frozenset([BAD_CLIENT]),
    revoked_versions=frozenset([3, 9]),
    limits=LIMITS,
)


def root_document(
    *,
    version: int = 1,
    root_keys: Sequence[SigningKey] = (ANN, BEN, CAT),
    root_threshold: int = 2,
    whitelist_keys: Sequence[SigningKey] = (CAT, DAN, EVE),
    whitelist_threshold: int = 2,
    expires_seconds: int = NOW + 365 * DAY,
    signed_by: Sequence[SigningKey] = (ANN, BEN),
    before: TrustedRoot | None = None,
) -> bytes:
    """A root's document: as it is first made, but for what is given."""
    document = new_root(
        version=version,
        expires_seconds=expires_seconds,
        root_keys=[key.public_key for key in root_keys],
        root_threshold=root_threshold,
        whitelist_keys=[key.public_key for key in whitelist_keys],
        whitelist_threshold=whitelist_threshold,
    )
    for key in signed_by:
        document = add_root_signature(document, key, before)
    return document


FIRST = root_document()
ROOT = first_root(FIRST)


def signed_whitelist(
    version: int = 7,
    *,
    root: TrustedRoot = ROOT,
    signed_by: Sequence[SigningKey] = (CAT, DAN),
    **changes: Any,
) -> tuple[bytes, bytes]:
    """(document, body) of the whitelist with these changes, signed by these people."""
    whitelist = replace(WHITELIST, version=version, **changes)
    document, body = new_whitelist_document(whitelist)
    for key in signed_by:
        document = add_whitelist_signature(document, body, key, root)
    return document, body
