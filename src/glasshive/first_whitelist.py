"""The whitelist that a new swarm begins with, and how a list of models is asked for."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

from glasshive.graph.ops import OPS
from glasshive.peer.host_limits import HostLimits
from glasshive.security.manifest import ModelId
from glasshive.security.policy import PROTOCOL
from glasshive.security.whitelist import Whitelist
from glasshive.terminal import byte_bar

DAY_SECONDS: Final = 86_400
PUBLIC_DAYS: Final = 30
PRIVATE_DAYS: Final = 365

_MODEL_ID: Final = re.compile(r"([0-9a-f]{64})=(.+)")


def first_whitelist(
    swarm: str,
    *,
    public: bool,
    models: Mapping[ModelId, str] | None,
    now_seconds: int,
    days: int | None = None,
) -> Whitelist:
    """Whitelist 1: every op of this release, every module, and what a host allows by itself.

    In a public swarm a stranger gets less of a host than a colleague does. `models` of None are
    all; `days` of None are 30 for a public swarm and 365 for a private one.
    """
    limits = HostLimits().numbers()
    if public:
        limits = replace(
            limits, peak_bytes=1 << 30, const_bytes=256 << 20, saved_bytes=512 << 20,
            flops=10**12, seconds=60, batch_rows=64, context_tokens=4096, traces_per_client=2,
        ).narrowed(limits)  # fmt: skip
    if days is None:
        days = PUBLIC_DAYS if public else PRIVATE_DAYS
    return Whitelist(
        swarm=swarm,
        version=1,
        issued_seconds=now_seconds,
        expires_seconds=now_seconds + days * DAY_SECONDS,
        min_protocol=PROTOCOL,
        ops={name: spec.version for name, spec in OPS.items()},
        readable=("**",),
        writable=("**",),
        models=models,
        revoked_peers=frozenset(),
        revoked_clients=frozenset(),
        revoked_versions=frozenset(),
        limits=limits,
    )


def named_models(asked: Sequence[str]) -> dict[ModelId, str]:
    """The manifest ids and names of models: each a folder, a fetched model, or MANIFEST_ID=NAME.

    Raises ModelNotFoundError.
    """
    from glasshive.manifest_cache import known_manifest, model_name
    from glasshive.models import find_model

    found: dict[ModelId, str] = {}
    for one in asked:
        written = _MODEL_ID.fullmatch(one)
        if written is not None:
            found[ModelId(written[1])] = written[2]
            continue
        folder = find_model(one)
        with byte_bar(f"hashing {one}", show=True) as on_hashing:
            manifest = known_manifest(folder, model_name(one, folder), on_hashing)
        found[manifest.model_id] = manifest.name
    return found
