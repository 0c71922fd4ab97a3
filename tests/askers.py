"""A client's signed request, and a host's signed answer, for tests that speak the protocol."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence

from glasshive.dht.messages import Done, Prepare
from glasshive.security.envelope import PUBLIC_SWARM, payload_digest
from glasshive.security.keys import Identity, PeerId
from glasshive.security.requests import PlannedPeer, TraceRequest
from glasshive.security.results import SavesDigest, TraceResult, Traffic

Sent = tuple[str, str, Sequence[int], bytes]
"""A save as it was sent: name, dtype, shape, bytes."""


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
        traffic=tuple(traffic),
    )
    return Done(result.sign(host, now))
