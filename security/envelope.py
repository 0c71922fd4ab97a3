"""Signed messages: one envelope for everything that is signed at run time.

Rules:

1. What is signed is DSSE's pre-authentication encoding of a fixed payload type and the payload;
   the signature is checked over those very bytes before they are parsed, and they are never
   encoded again.
2. The payload binds kind, swarm, sender, receiver, request id, expiry and body, so that nothing
   said in one place can be repeated in another.
3. The sender outside the payload only says which key to try; the payload's own must be the same.
4. Times are whole milliseconds of swarm time. A message lives at most as long as its reader allows.
5. The bytes around a payload can be written in several ways: never take an envelope's hash as an
   identity; `payload_digest` is one.

On the wire, all msgpack arrays without extension types::

    envelope = [1, sender, payload, signature]
    payload  = [kind, swarm, sender, receiver, request_id, expires_at_milliseconds, body]

`receiver` is the empty text for a message to everyone, such as a record.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from glasshive.security.errors import (
    BadEnvelope,
    BadPeerId,
    EnvelopeExpired,
    MalformedData,
    Replayed,
    WrongReceiver,
    WrongSwarm,
)
from glasshive.security.keys import SIGNATURE_BYTES, Identity, PeerId, verify
from glasshive.security.plain import decode_plain, encode_plain

__all__ = [
    "CLOCK_SKEW_SECONDS",
    "PUBLIC_SWARM",
    "Envelope",
    "ReplayCache",
    "open_envelope",
    "payload_digest",
    "seal",
]

PUBLIC_SWARM: Final = "public"
CLOCK_SKEW_SECONDS: Final = 10.0
MAX_ENVELOPE_BYTES: Final = 1024 * 1024
MAX_REQUEST_ID_BYTES: Final = 32
MAX_LIFETIME_SECONDS: Final = 3600.0

_VERSION: Final = 1
_PAYLOAD_TYPE: Final = b"application/vnd.glasshive.envelope.v1"
_MAX_TEXT: Final = 64
_MAX_MILLISECONDS: Final = 1 << 53


@dataclass(frozen=True, slots=True)
class Envelope:
    """What a verified envelope says. `receiver` is None for a message to everyone."""

    kind: str
    swarm: str
    sender: PeerId
    receiver: PeerId | None
    request_id: bytes
    expires_at_milliseconds: int
    body: bytes

    @property
    def expires_at_seconds(self) -> float:
        return self.expires_at_milliseconds / 1000


def seal(
    identity: Identity,
    *,
    kind: str,
    swarm: str,
    receiver: PeerId | None,
    request_id: bytes,
    expires_at_seconds: float,
    body: bytes,
) -> bytes:
    """The envelope's bytes, signed by `identity`; raises BadEnvelope for fields out of range."""
    fields: list[object] = [
        kind,
        swarm,
        identity.peer_id,
        receiver or "",
        request_id,
        round(expires_at_seconds * 1000),
        body,
    ]
    _check_fields(fields)
    payload = encode_plain(fields)
    signature = identity.sign(pre_authentication_encoding(_PAYLOAD_TYPE, payload))
    return encode_plain([_VERSION, identity.peer_id, payload, signature])


def open_envelope(
    data: bytes,
    *,
    kind: str,
    swarm: str,
    clock: Callable[[], float] | None,
    receiver: PeerId | None = None,
    max_bytes: int = MAX_ENVELOPE_BYTES,
    max_lifetime_seconds: float = MAX_LIFETIME_SECONDS,
) -> Envelope:
    """The verified content of `data`.

    Guarantees: signed by `.sender`, of this kind, for this swarm, to exactly this receiver (None:
    to everyone), and by `clock` neither expired nor valid for longer than `max_lifetime_seconds`,
    with `CLOCK_SKEW_SECONDS` of grace. With `clock=None` the caller judges the expiry.
    Raises BadEnvelope, BadSignature, WrongSwarm, WrongReceiver or EnvelopeExpired.
    """
    sender, payload, signature = _outer(data, max_bytes)
    try:
        verify(sender, pre_authentication_encoding(_PAYLOAD_TYPE, payload), signature)
    except BadPeerId as error:
        raise BadEnvelope(f"the sender of the envelope: {error}") from None
    try:
        fields = decode_plain(payload, max_bytes=max_bytes, max_depth=1, max_elements=7)
    except MalformedData as error:
        raise BadEnvelope(f"the payload of the envelope: {error}") from None
    envelope = _check_fields(fields)
    if envelope.sender != sender:
        raise BadEnvelope("the envelope names one sender outside and another inside")
    if envelope.kind != kind:
        raise BadEnvelope(f"got a signed {envelope.kind!r}, wanted {kind!r}")
    if envelope.swarm != swarm:
        raise WrongSwarm(f"got a message for swarm {envelope.swarm!r}, this is {swarm!r}")
    if envelope.receiver != receiver:
        raise WrongReceiver(
            f"got a message to {envelope.receiver or 'everyone'}, wanted {receiver or 'everyone'}"
        )
    if clock is not None:
        left_seconds = envelope.expires_at_seconds - clock()
        if left_seconds < -CLOCK_SKEW_SECONDS:
            raise EnvelopeExpired(
                f"the {kind} expired {-left_seconds:.1f} s ago; ask for a new one, "
                "and check the clocks of both machines if it is new"
            )
        if left_seconds > max_lifetime_seconds + CLOCK_SKEW_SECONDS:
            raise EnvelopeExpired(
                f"the {kind} is valid for {left_seconds:.1f} s more, at most "
                f"{max_lifetime_seconds:.0f} s are accepted; check the clocks of both machines"
            )
    return envelope


def pre_authentication_encoding(payload_type: bytes, payload: bytes) -> bytes:
    """DSSE's PAE: the bytes that are signed for `payload` of `payload_type`."""
    return b"DSSEv1 %d %b %d %b" % (len(payload_type), payload_type, len(payload), payload)


def _outer(data: bytes, max_bytes: int) -> tuple[str, bytes, bytes]:
    """(claimed sender, payload, signature); raises BadEnvelope."""
    try:
        parts = decode_plain(data, max_bytes=max_bytes, max_depth=1, max_elements=4)
    except MalformedData as error:
        raise BadEnvelope(f"not an envelope: {error}") from None
    if not isinstance(parts, list) or len(parts) != 4:
        raise BadEnvelope("not an envelope: wanted an array of version, sender, payload, signature")
    version, sender, payload, signature = parts
    if type(version) is not int or version != _VERSION:
        raise BadEnvelope(f"not an envelope of version {_VERSION}; one side needs another release")
    if type(sender) is not str or type(payload) is not bytes or type(signature) is not bytes:
        raise BadEnvelope("not an envelope: wanted text, bytes and bytes after the version")
    if len(signature) != SIGNATURE_BYTES:
        raise BadEnvelope(f"signature of {len(signature)} bytes, wanted {SIGNATURE_BYTES}")
    return sender, payload, signature


def _check_fields(fields: object) -> Envelope:
    """The payload's fields as an Envelope; raises BadEnvelope."""
    if not isinstance(fields, list) or len(fields) != 7:
        raise BadEnvelope("the payload of the envelope is not an array of seven")
    kind, swarm, sender, receiver, request_id, expires_at, body = fields
    for name, text in (
        ("kind", kind),
        ("swarm", swarm),
        ("sender", sender),
        ("receiver", receiver),
    ):
        if type(text) is not str or len(text) > _MAX_TEXT:
            raise BadEnvelope(f"the {name} is not text of at most {_MAX_TEXT} characters")
    if not kind or not swarm:
        raise BadEnvelope("kind and swarm can't be empty")
    if type(request_id) is not bytes or len(request_id) > MAX_REQUEST_ID_BYTES:
        raise BadEnvelope(f"the request id is not bytes, at most {MAX_REQUEST_ID_BYTES}")
    if type(expires_at) is not int or not 0 <= expires_at < _MAX_MILLISECONDS:
        raise BadEnvelope("the expiry is not a time in whole milliseconds")
    if type(body) is not bytes:
        raise BadEnvelope("the body is not bytes")
    return Envelope(
        kind=kind,
        swarm=swarm,
        sender=PeerId(sender),
        receiver=PeerId(receiver) if receiver else None,
        request_id=request_id,
        expires_at_milliseconds=expires_at,
        body=body,
    )


def payload_digest(data: bytes, *, max_bytes: int = MAX_ENVELOPE_BYTES) -> bytes:
    """sha256 of what is signed in an envelope, by which another message can name it.

    Unlike a hash of the envelope's own bytes it has one value for one message. Verifies nothing;
    raises BadEnvelope.
    """
    return hashlib.sha256(_outer(data, max_bytes)[1]).digest()


class ReplayCache:
    """Remembers the request ids of each sender until they expire, within bounds.

    A sender whose memory is full is refused until some of its requests expire; another sender is
    not affected, but by `max_senders` and `max_requests`, which bound the memory for all.
    """

    def __init__(
        self,
        *,
        max_senders: int = 4096,
        max_requests_per_sender: int = 1024,
        max_requests: int = 131_072,
    ) -> None:
        self._max_senders = max_senders
        self._max_per_sender = max_requests_per_sender
        self._max_requests = max_requests
        self._seen: dict[PeerId, set[tuple[str, bytes]]] = {}
        self._ends: list[tuple[float, PeerId, tuple[str, bytes]]] = []  # a heap, the next first

    def __len__(self) -> int:
        """How many requests are remembered."""
        return len(self._ends)

    def __iter__(self) -> Iterator[tuple[PeerId, str, bytes, float]]:
        """What is remembered, in no order: sender, kind, request id, and the signed expiry."""
        for until, sender, (kind, request_id) in self._ends:
            yield sender, kind, request_id, until - CLOCK_SKEW_SECONDS

    def admit(self, envelope: Envelope, now: float) -> None:
        """Remembers the envelope's request; raises Replayed if it can't be told to be new."""
        self._forget_expired(now)
        sender, key = envelope.sender, (envelope.kind, envelope.request_id)
        seen = self._seen.get(sender, set())
        if key in seen:
            raise Replayed(
                f"request {envelope.request_id.hex()} of {sender} was seen before; "
                "send a new one under a new id"
            )
        if len(seen) >= self._max_per_sender:
            raise Replayed(f"{sender} has {len(seen)} requests open; wait until some have expired")
        if not seen and len(self._seen) >= self._max_senders:
            raise Replayed(f"{self._max_senders} senders have requests open; try again later")
        if len(self._ends) >= self._max_requests:
            raise Replayed(f"{self._max_requests} requests are remembered; try again later")
        seen.add(key)
        self._seen[sender] = seen
        heapq.heappush(self._ends, (envelope.expires_at_seconds + CLOCK_SKEW_SECONDS, sender, key))

    def _forget_expired(self, now: float) -> None:
        while self._ends and self._ends[0][0] < now:
            _, sender, key = heapq.heappop(self._ends)
            seen = self._seen[sender]
            seen.remove(key)
            if not seen:
                del self._seen[sender]
