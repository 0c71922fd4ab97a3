"""A client's signed request, and a host's signed answer, for tests that speak the protocol."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from typing import Any

from glasshive.dht.messages import Done, Prepare
from glasshive.dht.records import MAX_LIFETIME_SECONDS, ModelId, PeerRecord
from glasshive.security.envelope import PUBLIC_SWARM, payload_digest
from glasshive.security.keys import Identity, PeerId
from glasshive.security.requests import PlannedPeer, TraceRequest
from glasshive.security.results import SavesDigest, TraceResult, Traffic

Sent = tuple[str, str, Sequence[int], bytes]
"""A save as it was sent: name, dtype, shape, bytes."""


def record_of(identity: Identity, addresses: Sequence[str], **changes: Any) -> bytes:
    """What a peer with this key announces of itself, signed."""
    fields: dict[str, Any] = {
        "model": ModelId("ab" * 32),
        "model_name": "tiny",
        "start": 0,
        "end": 2,
        "n_blocks": 2,
        "dtype": "float32",
        "backend": "cpu",
        "attention": "sdpa",
        "throughput_tokens_per_second": 1.0,
        "addresses": tuple(addresses),
        "whitelist_version": 0,
        "load": 0.0,
        "software_version": "0",
        "peer_id": identity.peer_id,
        "expires_at_seconds": time.time() + MAX_LIFETIME_SECONDS,
    }
    return PeerRecord(**(fields | changes)).sign(identity)


def request_of(
    client: PeerId,
    host: PeerId,
    part: bytes,
    *,
    model_id: str = "ab" * 32,
    trace_id: bytes = bytes(16),
    index: int = 0,
    peers: Sequence[PlannedPeer] = (),
    deadline_seconds: float = 30.0,
) -> TraceRequest:
    """What `client` asks of `host`: this part, of a plan without others if no peers are given."""
    return TraceRequest(
        client=client,
        host=host,
        swarm=PUBLIC_SWARM,
        trace_id=trace_id,
        model_id=model_id,
        dtype="float32",
        peers=tuple(peers) or (PlannedPeer(host),),
        part_index=index,
        deadline_seconds=deadline_seconds,
        part_sha256=hashlib.sha256(part).digest(),
    )


def prepare_of(client: Identity, request: TraceRequest) -> Prepare:
    """The message that begins the trace."""
    return Prepare(request.sign(client, time.time()))


def done_of(
    host: Identity,
    client: PeerId,
    prepare: Prepare,
    *sent: Sent,
    traffic: Sequence[Traffic] = (),
) -> Done:
    """The message that ends it, by a host that has sent these saves."""
    digest = SavesDigest()
    for name, dtype, shape, data in sent:
        digest.begin(name, dtype, shape)
        digest.update(data)
    now = time.time()
    request, _ = TraceRequest.verify(
        prepare.request, client=client, host=host.peer_id, swarm=PUBLIC_SWARM, now=now
    )
    result = TraceResult(
        request=request,
        request_sha256=payload_digest(prepare.request),
        saves_sha256=digest.digest(),
        compute_seconds=1.0,
        wait_seconds=0.5,
        wire_seconds=0.25,
        traffic=tuple(traffic),
    )
    return Done(result.sign(host, now))
