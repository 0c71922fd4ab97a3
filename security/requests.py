"""A client's signed request to run one part of a plan at one host.

Rules:

1. A request is an envelope of kind ``trace`` from the client to one host of the plan; its request
   id is the trace's id, 16 bytes, the same at every host of the plan and new for each attempt. It
   lives at most `REQUEST_SECONDS`: it is shown at once or never.
2. It holds the whole plan's peers and the hash of the host's part, so that every edge of the part
   (sender, receiver, value, pass) is the client's word and nobody else's.
3. Who shows it on a stream must be who signed it, and a host takes it once.
4. While a host runs the part, the client may name other peers for other parts, and what it relays
   (`check_revises`): the same request under a higher revision.
5. Only what it says to be relayed comes by way of the client, and that comes by no other way.

The body, msgpack without extension types::

    [4, model id, dtype, [[peer id, record], ...], part index, deadline in seconds,
     sha256 of the part's bytes, revision, [relayed part's index, ...]]

Nothing here does IO: whether a request was seen before is the host's to remember.
"""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple

from glasshive.security.envelope import Envelope, open_envelope, seal
from glasshive.security.errors import BadEnvelope, BadPeerId, MalformedData, WrongSender
from glasshive.security.keys import Identity, PeerId, public_key_of
from glasshive.security.plain import decode_plain, encode_plain

__all__ = ["PlannedPeer", "TraceRequest"]

REQUEST_SECONDS: Final = 60.0
TRACE_ID_BYTES: Final = 16
MAX_PEERS: Final = 256
MAX_RECORD_BYTES: Final = 1536
"""A rule of dht/records.py, which this layer can't import; it is needed to bound a request."""
MAX_TEXT: Final = 128
MAX_DEADLINE_SECONDS: Final = 1e6
MAX_REQUEST_BYTES: Final = 1 << 19
MAX_REVISIONS: Final = 64

_REQUEST: Final = "trace"
_VERSION: Final = 4
_MAX_ELEMENTS: Final = MAX_PEERS * 4 + 16


class PlannedPeer(NamedTuple):
    """A peer of a plan, and where it is by its own word.

    `record` is what it signed and announced (dht/records.py), not verified here; empty where the
    receiver of the request has nothing to send to it, or sends it by way of the client.
    """

    peer_id: PeerId
    record: bytes = b""


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """A client's word that `host` is to run part `part_index` of this plan.

    `peers` are those of the whole plan by their part's index; `host` is the one of its own part.
    What goes between it and the parts `relayed`, in both directions, the client passes on.
    Making one with a field out of range raises BadEnvelope.
    """

    client: PeerId
    host: PeerId
    swarm: str
    trace_id: bytes
    model_id: str
    dtype: str
    peers: tuple[PlannedPeer, ...]
    part_index: int
    deadline_seconds: float
    part_sha256: bytes
    revision: int = 0
    relayed: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if type(self.trace_id) is not bytes or len(self.trace_id) != TRACE_ID_BYTES:
            raise BadEnvelope(f"the id of a trace is not {TRACE_ID_BYTES} bytes")
        for name, text in (("model id", self.model_id), ("dtype", self.dtype)):
            if type(text) is not str or not 0 < len(text) <= MAX_TEXT:
                raise BadEnvelope(
                    f"the {name} of a trace is not text of 1 to {MAX_TEXT} characters"
                )
        if not 0 < len(self.peers) <= MAX_PEERS:
            raise BadEnvelope(f"a plan of {len(self.peers)} peers, wanted 1 to {MAX_PEERS}")
        for peer in self.peers:
            _check_peer(peer)
        if type(self.part_index) is not int or not 0 <= self.part_index < len(self.peers):
            raise BadEnvelope(
                f"a plan of {len(self.peers)} peers has no part {self.part_index!r:.20}"
            )
        if (planned := self.peers[self.part_index].peer_id) != self.host:
            raise BadEnvelope(
                f"the plan gives part {self.part_index} to {planned}, not to {self.host}; "
                "ask the peer that the plan names"
            )
        seconds = self.deadline_seconds
        if type(seconds) is not float or not 0 <= seconds <= MAX_DEADLINE_SECONDS:  # nan is neither
            raise BadEnvelope(f"the deadline is not 0 to {MAX_DEADLINE_SECONDS:.0f} seconds")
        if type(self.part_sha256) is not bytes or len(self.part_sha256) != 32:
            raise BadEnvelope("the hash of the part is not 32 bytes")
        if type(self.revision) is not int or not 0 <= self.revision <= MAX_REVISIONS:
            raise BadEnvelope(f"the revision of a trace is not 0 to {MAX_REVISIONS}")
        others = [i for i in range(len(self.peers)) if i != self.part_index]
        if not _are_ascending(self.relayed) or not set(self.relayed) <= set(others):
            raise BadEnvelope("the relayed parts are not other parts of the plan, in their order")

    def sign(self, identity: Identity, now: float) -> bytes:
        """The request as its client shows it; raises BadEnvelope if `identity` isn't the client."""
        if identity.peer_id != self.client:
            raise BadEnvelope(
                f"the request is by {self.client}, the identity is {identity.peer_id}; "
                "a client signs its own only"
            )
        body = [
            _VERSION,
            self.model_id,
            self.dtype,
            self.peers,
            self.part_index,
            self.deadline_seconds,
            self.part_sha256,
            self.revision,
            self.relayed,
        ]
        return seal(
            identity,
            kind=_REQUEST,
            swarm=self.swarm,
            receiver=self.host,
            request_id=self.trace_id,
            expires_at_seconds=now + min(self.deadline_seconds, REQUEST_SECONDS),
            body=encode_plain(body),
        )

    @classmethod
    def verify(
        cls, data: bytes, *, client: PeerId, host: PeerId, swarm: str, now: float
    ) -> tuple[TraceRequest, Envelope]:
        """The request in `data`, and its envelope, by which to remember that it was seen.

        Guarantees: signed by `client`, to `host`, in `swarm`, and by `now` neither expired nor
        valid for longer than `REQUEST_SECONDS`. Not that it is new, nor which part comes with it
        (`check_part`). Raises BadEnvelope, BadSignature, WrongSender, WrongSwarm, WrongReceiver or
        EnvelopeExpired.
        """
        envelope = open_envelope(
            data,
            kind=_REQUEST,
            swarm=swarm,
            receiver=host,
            clock=lambda: now,
            max_bytes=MAX_REQUEST_BYTES,
            max_lifetime_seconds=REQUEST_SECONDS,
        )
        if envelope.sender != client:
            raise WrongSender(
                f"{client} shows a trace that was signed by {envelope.sender}; "
                "sign with the key that the connection is made with"
            )
        try:
            fields: Any = decode_plain(
                envelope.body, max_bytes=MAX_REQUEST_BYTES, max_depth=4, max_elements=_MAX_ELEMENTS
            )
        except MalformedData as error:
            raise BadEnvelope(f"the trace's request can't be read: {error}") from None
        match fields:
            case [version, model_id, dtype, list(peers), index, seconds, sha256, *rest] if (
                type(version) is int and version == _VERSION and len(rest) == 2
            ):
                revision, relayed = rest
                request = cls(
                    client=client,
                    host=host,
                    swarm=swarm,
                    trace_id=envelope.request_id,
                    model_id=model_id,
                    dtype=dtype,
                    peers=tuple(map(_peer, peers)),
                    part_index=index,
                    deadline_seconds=seconds,
                    part_sha256=sha256,
                    revision=revision,
                    relayed=tuple(relayed) if type(relayed) is list else relayed,
                )
                return request, envelope
        raise BadEnvelope(
            f"not a trace's request of version {_VERSION}; "
            "one side needs another release of glasshive"
        )

    def check_revises(self, before: TraceRequest) -> None:
        """Returns if this is `before` with other peers for other parts, or others relayed.

        Raises BadEnvelope.
        """
        if self.revision <= before.revision:
            raise BadEnvelope(
                f"revision {self.revision} of a trace whose revision {before.revision} is in force"
            )
        ours = replace(
            before,
            peers=self.peers,
            revision=self.revision,
            deadline_seconds=self.deadline_seconds,
            relayed=self.relayed,
        )
        if ours != self or len(self.peers) != len(before.peers):
            raise BadEnvelope(
                "a revision may name other peers for other parts, and what is relayed, and nothing "
                "else"
            )

    def check_part(self, part: bytes | bytearray | memoryview) -> None:
        """Returns if these are the bytes of the part that was signed; raises BadEnvelope."""
        if hashlib.sha256(part).digest() != self.part_sha256:
            raise BadEnvelope(
                f"a part of {len(part)} bytes that is not the one whose hash the client signed; "
                "send both as they were made"
            )


def _peer(row: object) -> PlannedPeer:
    match row:
        case [str(peer_id), bytes(record)]:
            return PlannedPeer(PeerId(peer_id), record)
    raise BadEnvelope("a peer of the plan is not an array of id and record")


def _are_ascending(indices: object) -> bool:
    if type(indices) is not tuple or not all(type(one) is int for one in indices):
        return False
    return all(one < other for one, other in itertools.pairwise(indices))


def _check_peer(peer: PlannedPeer) -> None:
    try:
        public_key_of(peer.peer_id)
    except BadPeerId as error:
        raise BadEnvelope(f"a peer of the plan: {error}") from None
    if type(peer.record) is not bytes or len(peer.record) > MAX_RECORD_BYTES:
        raise BadEnvelope(
            f"the record of {peer.peer_id} in the plan is not bytes, at most {MAX_RECORD_BYTES}"
        )
