"""A host's signed word on what it answered to one request.

Rules:

1. A result is an envelope of kind ``result`` from the host to the client; its request id is the
   trace's. It names the request, or the last revision of it that the host had taken, by the hash of
   what the client signed, and what was sent as saves by theirs, so that it can stand for no other
   request and no other values.
2. It lives at most `RESULT_SECONDS`: it ends the stream of its trace.
3. It says who answered what. Whether the numbers are right is not in it: it is unaudited.

The body, msgpack without extension types::

    [2, part index, sha256 of the saves, sha256 of the request's payload, compute seconds,
     wait seconds, wire seconds,
     [[receiver's part index, hidden-state bytes, carried-value bytes], ...], audited: false]

The hash of the saves is over, for each in the order of sending, the msgpack of
``[name, dtype, [size, ...]]`` and then its bytes; what one says its length to be is in it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, final

from glasshive.security.envelope import open_envelope, seal
from glasshive.security.errors import BadEnvelope, MalformedData
from glasshive.security.keys import Identity
from glasshive.security.plain import decode_plain, encode_plain
from glasshive.security.requests import MAX_PEERS, TraceRequest

__all__ = ["SavesDigest", "TraceResult", "Traffic"]

RESULT_SECONDS: Final = 60.0
MAX_RESULT_BYTES: Final = 1 << 14

_RESULT: Final = "result"
_VERSION: Final = 2
_MAX_COUNT: Final = 1 << 48
_MAX_SECONDS: Final = 1e6


class Traffic(NamedTuple):
    """What a host sent to the peer of one other part: hidden states and carried values."""

    receiver: int
    hidden_bytes: int
    carried_bytes: int


@final
class SavesDigest:
    """The hash of saves as they are sent or arrive: `begin` each, then `update` by its bytes."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def begin(self, name: str, dtype: str, shape: Sequence[int]) -> None:
        """The next save."""
        self._hash.update(encode_plain([name, dtype, list(shape)]))

    def update(self, data: bytes | bytearray | memoryview) -> None:
        """The next of its bytes."""
        self._hash.update(data)

    def digest(self) -> bytes:
        """The 32 bytes so far."""
        return self._hash.digest()


@dataclass(frozen=True, slots=True)
class TraceResult:
    """A host's word that it ran a part of `request` and sent those saves.

    `wait_seconds` is how long the part waited for what it imports, `wire_seconds` how long its
    edges were sending; both go on beside computing elsewhere, and edges beside each other.
    Making one with a field out of range raises BadEnvelope.
    """

    request: TraceRequest
    request_sha256: bytes
    saves_sha256: bytes
    compute_seconds: float
    wait_seconds: float
    wire_seconds: float
    traffic: tuple[Traffic, ...]
    audited: bool = False

    def __post_init__(self) -> None:
        for digest in (self.request_sha256, self.saves_sha256):
            if type(digest) is not bytes or len(digest) != 32:
                raise BadEnvelope("a hash in the result is not 32 bytes")
        for what, seconds in (
            ("compute", self.compute_seconds),
            ("wait", self.wait_seconds),
            ("wire", self.wire_seconds),
        ):
            if type(seconds) is not float or not 0 <= seconds <= _MAX_SECONDS:  # nan is neither
                raise BadEnvelope(f"the {what} time is not 0 to {_MAX_SECONDS:.0f} seconds")
        if len(self.traffic) > MAX_PEERS or not all(
            type(one) is int and 0 <= one <= _MAX_COUNT for each in self.traffic for one in each
        ):
            raise BadEnvelope(f"the traffic is not that to at most {MAX_PEERS} parts, in bytes")
        if self.audited is not False:
            raise BadEnvelope("a result that says it is audited; nobody audits in this release")

    def sign(self, identity: Identity, now: float) -> bytes:
        """The result as its host sends it; raises BadEnvelope if `identity` isn't the host."""
        if identity.peer_id != self.request.host:
            raise BadEnvelope(
                f"the result is by {self.request.host}, the identity is {identity.peer_id}; "
                "a host signs its own only"
            )
        body = [
            _VERSION,
            self.request.part_index,
            self.saves_sha256,
            self.request_sha256,
            self.compute_seconds,
            self.wait_seconds,
            self.wire_seconds,
            self.traffic,
            self.audited,
        ]
        return seal(
            identity,
            kind=_RESULT,
            swarm=self.request.swarm,
            receiver=self.request.client,
            request_id=self.request.trace_id,
            expires_at_seconds=now + RESULT_SECONDS,
            body=encode_plain(body),
        )

    @classmethod
    def verify(
        cls,
        data: bytes,
        *,
        request: TraceRequest,
        request_sha256: bytes,
        saves_sha256: bytes,
        now: float,
        revisions: Mapping[bytes, TraceRequest] | None = None,
    ) -> TraceResult:
        """The result in `data`: signed by the request's host, of that request and those saves.

        Of its `revisions`, each by the hash of its payload, the last that the host had taken stands
        in its place.

        Raises BadEnvelope, BadSignature, WrongSwarm, WrongReceiver or EnvelopeExpired.
        """
        envelope = open_envelope(
            data,
            kind=_RESULT,
            swarm=request.swarm,
            receiver=request.client,
            clock=lambda: now,
            max_bytes=MAX_RESULT_BYTES,
            max_lifetime_seconds=RESULT_SECONDS,
        )
        if (envelope.sender, envelope.request_id) != (request.host, request.trace_id):
            raise BadEnvelope(
                f"a result by {envelope.sender} of trace {envelope.request_id.hex()}; wanted "
                f"{request.host}'s of trace {request.trace_id.hex()}"
            )
        try:
            fields: Any = decode_plain(
                envelope.body,
                max_bytes=MAX_RESULT_BYTES,
                max_depth=3,
                max_elements=4 * MAX_PEERS + 16,
            )
        except MalformedData as error:
            raise BadEnvelope(f"the result can't be read: {error}") from None
        match fields:
            case [version, index, saves, asked, compute, wait, wire, list(traffic), audited] if (
                type(version) is int and version == _VERSION
            ):
                pass
            case _:
                raise BadEnvelope(
                    f"not a result of version {_VERSION}; "
                    "one side needs another release of glasshive"
                )
        if type(index) is not int or index != request.part_index:
            raise BadEnvelope(f"a result of part {index!r:.20}; wanted part {request.part_index}")
        sent = {request_sha256: request, **(revisions or {})}
        result = cls(
            request=sent.get(asked, request) if type(asked) is bytes else request,
            request_sha256=asked,
            saves_sha256=saves,
            compute_seconds=compute,
            wait_seconds=wait,
            wire_seconds=wire,
            traffic=tuple(map(_traffic, traffic)),
            audited=audited,
        )
        if result.request_sha256 not in sent:
            raise BadEnvelope("the result is signed for another request than the one that was sent")
        if result.saves_sha256 != saves_sha256:
            raise BadEnvelope("the saves that came are not those whose hash the result signs")
        return result


def _traffic(row: Any) -> Traffic:
    match row:
        case [receiver, hidden, carried]:
            return Traffic(receiver, hidden, carried)
    raise BadEnvelope("traffic that is not an array of part, hidden and carried bytes")
