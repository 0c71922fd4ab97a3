"""What a peer says of itself, for tests that store and find such."""

from __future__ import annotations

from typing import Any

from glasshive.dht.records import ModelId, PeerRecord
from glasshive.security.keys import Identity


def record_of(identity: Identity, usual_model: ModelId, **others: Any) -> PeerRecord:
    """A record of blocks 0:2 of a model of four, with the `others` of its fields.

    `expires_at_seconds` has to be among these.
    """
    fields: dict[str, Any] = {
        "model": usual_model,
        "model_name": "tiny",
        "start": 0,
        "end": 2,
        "n_blocks": 4,
        "dtype": "float32",
        "backend": "cpu",
        "attention": "eager",
        "throughput_tokens_per_second": 1.0,
        "addresses": (),
        "whitelist_version": 0,
        "load": 0.0,
        "software_version": "0",
        "peer_id": identity.peer_id,
    }
    return PeerRecord(**(fields | others))
