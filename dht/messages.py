"""What peers and clients say, and its exact shape on the wire (docs/protocol.md has the table).

A message is a msgpack array `[code, field, ...]` in a frame's header; a tensor's bytes follow in
the body, in slices of `SLICE_BYTES`: the first in the message's own frame, the others each in a
`More` frame. Every field is checked here, so a handler sees only values of the right type, sign
and size. `code` numbers are never used again for something else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Final, TypeAlias, TypeVar, overload

from glasshive.dht.errors import MalformedMessage
from glasshive.graph.errors import BadTensor
from glasshive.graph.tensors import TensorSpec, check_spec
from glasshive.security.membership import MAX_CERTIFICATE_BYTES, MAX_LISTS
from glasshive.security.requests import MAX_REQUEST_BYTES

DIRECTORY_PROTOCOL: Final = "glasshive/directory/1"  # its messages: dht/directory.py
TRACE_PROTOCOL: Final = "glasshive/trace/1"
EDGE_PROTOCOL: Final = "glasshive/edge/1"
RELAY_PROTOCOL: Final = "glasshive/relay/1"
FILES_PROTOCOL: Final = "glasshive/files/1"
TRUST_PROTOCOL: Final = "glasshive/trust/1"
MEMBERS_PROTOCOL: Final = "glasshive/members/1"
JOIN_PROTOCOL: Final = "glasshive/join/1"

SLICE_BYTES: Final = 1 << 18
ALIVE_SECONDS: Final = 2.0
"""A peer says this often that it is there, for as long as a trace is."""
SILENCE_SECONDS: Final = 12.0
"""A peer from which nothing came for so long is lost: frozen, or cut off."""
AT_WORK: Final = -1
ITS_TURN: Final = -2
"""Who waits for no other peer computes, or waits for the device, which is at other work."""

MAX_TEXT_CHARS: Final = 1000
MAX_COUNT: Final = 1 << 48

Header: TypeAlias = list[Any]
A = TypeVar("A")
B = TypeVar("B")
C = TypeVar("C")


def _text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= MAX_TEXT_CHARS


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_COUNT


def _integer(value: Any) -> bool:
    return type(value) is int and -2 <= value <= MAX_COUNT


def _trace_id(value: Any) -> bool:
    return type(value) is bytes and len(value) == 16


def _certificate(value: Any) -> bool:
    return type(value) is bytes and len(value) <= MAX_CERTIFICATE_BYTES


def _digests(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= 10_000
        and all(type(one) is bytes and len(one) == 32 for one in value)
    )


def _shape(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= 16 and all(_count(size) for size in value)


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= MAX_LISTS and all(map(_count, value))


def _signed(value: Any) -> bool:
    return type(value) is bytes and 0 < len(value) <= MAX_REQUEST_BYTES


_CHECKS: Final[dict[str, Callable[[Any], bool]]] = {
    "Text": _text,
    "Count": _count,
    "Integer": _integer,
    "TraceId": _trace_id,
    "Certificate": _certificate,
    "Digests": _digests,
    "Shape": _shape,
    "Sizes": _sizes,
    "Signed": _signed,
}

Text: TypeAlias = str
Count: TypeAlias = int
Integer: TypeAlias = int
TraceId: TypeAlias = bytes
Certificate: TypeAlias = bytes
Digests: TypeAlias = list[bytes]
Shape: TypeAlias = list[int]
Sizes: TypeAlias = list[int]
Signed: TypeAlias = bytes


@dataclass(frozen=True, slots=True)
class Prepare:
    """Client to peer, first on a trace stream. The body is the encoded part (graph/plan_codec.py).

    `request`: the client's signed request for it (security/requests.py).
    """

    request: Signed


@dataclass(frozen=True, slots=True)
class Need:
    """Peer to client: the constants that it does not have yet, by digest."""

    digests: Digests


@dataclass(frozen=True, slots=True)
class Constant:
    """Client to peer: one tensor that was needed. The body is its bytes."""

    dtype: Text
    shape: Shape


@dataclass(frozen=True, slots=True)
class Accepted:
    """Peer to client: the whole part was checked and will be run as it is."""

    peak_bytes: Count
    flops: Count
    saved_bytes: Count


@dataclass(frozen=True, slots=True)
class Input:
    """Client to peer, after all have accepted: `input_ids`, `attention_mask` or `position_ids`."""

    pass_index: Count
    name: Text
    dtype: Text
    shape: Shape


@dataclass(frozen=True, slots=True)
class Run:
    """Client to peer: every input is there; begin.

    `known_saves`: so many of the part's first saves came from a peer that was lost; they are made
    and not sent.
    """

    known_saves: Count


@dataclass(frozen=True, slots=True)
class Saved:
    """Peer to client: a value that was saved. The body is its bytes."""

    name: Text
    dtype: Text
    shape: Shape


@dataclass(frozen=True, slots=True)
class Done:
    """Peer to client: the part has run and everything was sent.

    `result`: the peer's signed word on that (security/results.py).
    """

    result: Signed


@dataclass(frozen=True, slots=True)
class Failed:
    """Peer to client: nothing more will come. `code` is an error's name, `node` is -1 or its id."""

    code: Text
    node: Integer
    text: Text


@dataclass(frozen=True, slots=True)
class Cancel:
    """Client to peer: stop and free everything. Closing the stream means the same."""


@dataclass(frozen=True, slots=True)
class Alive:
    """Peer to client, between any two frames: the peer is there, whether or not it has news.

    `stages`: so many of its part are done. `moves`: another number than the last time if the part
    has got further since. `waits_for`: the part for which it waits, AT_WORK or ITS_TURN.
    """

    stages: Count = 0
    moves: Count = 0
    waits_for: Integer = AT_WORK


@dataclass(frozen=True, slots=True)
class Lost:
    """Peer to client: the stream with that other part of the plan is gone, or could not be opened.

    The peer goes on, and waits for a `Revise`. That `revision` of the request is in force there: a
    `Revise` about the part that is still on its way is what it waits for.
    """

    part: Count
    revision: Count


@dataclass(frozen=True, slots=True)
class Revise:
    """Client to peer: its request, signed anew with the peers of the plan as they are now.

    Edges with `part` begin anew.
    """

    request: Signed
    part: Count


@dataclass(frozen=True, slots=True)
class Relay:
    """Client to peer, first on a relay stream: what follows is what goes from a part to another.

    To the sender's peer, which says on it what it would say on an edge stream of its own; and to
    the receiver's, which says the same back once it takes what comes, and to which the client then
    passes that on. Each waits until that `revision` of its request is in force, by which the two
    are relayed.
    """

    trace_id: TraceId
    sender: Count
    receiver: Count
    revision: Count


@dataclass(frozen=True, slots=True)
class Opening:
    """Peer to peer, first on an edge stream: whose values come here.

    `again`: 1 if values of this edge may have come before, by another stream; 0 if not.
    """

    trace_id: TraceId
    sender: Count
    receiver: Count
    again: Count


@dataclass(frozen=True, slots=True)
class Resume:
    """Peer to peer, the answer to an `Opening` again: so many of the edge's values have come."""

    values: Count


@dataclass(frozen=True, slots=True)
class Value:
    """Peer to peer: a carried value, or (-1) the hidden states of a pass, or (-2) the tokens chosen
    in it. The body is its bytes.

    `order`: its axes from the outermost in memory to the innermost; the bytes come in this order.
    """

    value: Integer
    pass_index: Integer
    dtype: Text
    shape: Shape
    order: Shape


@dataclass(frozen=True, slots=True)
class Dropped:
    """Peer to peer, in place of a value that is never made: the generation ended before."""

    value: Integer
    pass_index: Integer


@dataclass(frozen=True, slots=True)
class Received:
    """Peer to peer, last on an edge stream, from its receiver: every value has arrived."""


@dataclass(frozen=True, slots=True)
class More:
    """The next slice of the tensor before it."""


@dataclass(frozen=True, slots=True)
class AskFile:
    """Client to peer: send a file of the model's manifest, such as `config.json`."""

    model_id: Text
    name: Text


@dataclass(frozen=True, slots=True)
class File:
    """Peer to client: the file is `size_bytes` long; its bytes follow in the bodies."""

    size_bytes: Count


@dataclass(frozen=True, slots=True)
class TrustVersions:
    """Peer to peer, first in both directions: the versions of its root and whitelist (0: none)."""

    root: Count
    whitelist: Count


@dataclass(frozen=True, slots=True)
class TrustRoot:
    """Peer to peer: the next root that the other side lacks. The body is its document."""

    version: Count


@dataclass(frozen=True, slots=True)
class TrustWhitelist:
    """Peer to peer, after the roots: a newer whitelist. The body is its document, then its body."""

    version: Count
    document_bytes: Count


@dataclass(frozen=True, slots=True)
class TrustEnd:
    """Peer to peer: the other side has everything that it lacked."""


@dataclass(frozen=True, slots=True)
class Hello:
    """Both ways, first on every stream of a private swarm: the sender's certificate."""

    certificate: Certificate


@dataclass(frozen=True, slots=True)
class AskRevocations:
    """Member to member: the other side's lists of revocations, but those of these digests."""

    known: Digests


@dataclass(frozen=True, slots=True)
class RevocationLists:
    """The answer: lists of these lengths, one after the other in the body."""

    sizes_bytes: Sizes


@dataclass(frozen=True, slots=True)
class AskToJoin:
    """Stranger to issuer. The body is the signed request (security/invites.py)."""


@dataclass(frozen=True, slots=True)
class AskToRenew:
    """Member to issuer. The body is the signed request (security/invites.py)."""


@dataclass(frozen=True, slots=True)
class Granted:
    """Issuer to member: its certificate. The body is the swarm's first root, for who joins."""

    certificate: Certificate


_CODES: Final[dict[int, type[Any]]] = {
    1: Prepare,
    2: Need,
    3: Constant,
    4: Accepted,
    5: Input,
    6: Run,
    7: Saved,
    8: Done,
    9: Failed,
    10: Cancel,
    11: Alive,
    12: Lost,
    13: Revise,
    20: Opening,
    21: Value,
    22: More,
    23: Received,
    24: Dropped,
    25: Resume,
    26: Relay,
    30: AskFile,
    31: File,
    40: TrustVersions,
    41: TrustRoot,
    42: TrustWhitelist,
    43: TrustEnd,
    50: Hello,
    51: AskRevocations,
    52: RevocationLists,
    53: AskToJoin,
    54: AskToRenew,
    55: Granted,
}
_CODE_OF: Final = {kind: code for code, kind in _CODES.items()}
_FIELDS: Final[dict[type[Any], tuple[tuple[str, str, Callable[[Any], bool]], ...]]] = {
    kind: tuple((one.name, str(one.type), _CHECKS[str(one.type)]) for one in fields(kind))
    for kind in _CODE_OF
}


def encode(message: Any) -> Header:
    """The frame header of a message."""
    kind = type(message)
    return [_CODE_OF[kind], *(getattr(message, name) for name, _, _ in _FIELDS[kind])]


def is_a(header: Any, kind: type[Any]) -> bool:
    """Whether a frame header claims to be a message of this kind; `decode` says if it is one."""
    return isinstance(header, list) and header[:1] == [_CODE_OF[kind]]


@overload
def decode(header: Any, first: type[A], /) -> A: ...
@overload
def decode(header: Any, first: type[A], second: type[B], /) -> A | B: ...
@overload
def decode(header: Any, first: type[A], second: type[B], third: type[C], /) -> A | B | C: ...
def decode(header: Any, *wanted: type[Any]) -> Any:
    """The message in a frame header, which must be of a wanted kind. Raises MalformedMessage."""
    if not isinstance(header, list) or not header or type(header[0]) is not int:
        raise MalformedMessage(f"no message; {_names(wanted)} is wanted")
    kind = _CODES.get(header[0])
    if kind is None or kind not in wanted:
        got = kind.__name__ if kind else f"code {header[0]:d}"
        raise MalformedMessage(f"got {got:.40}; {_names(wanted)} is wanted here")
    spec = _FIELDS[kind]
    if len(header) != len(spec) + 1:
        raise MalformedMessage(
            f"{kind.__name__} has {len(header) - 1} fields; {len(spec)} are wanted"
        )
    for (name, what, is_one), value in zip(spec, header[1:], strict=True):
        if not is_one(value):
            raise MalformedMessage(f"{kind.__name__}.{name} is no {what}")
    return kind(*header[1:])


def _names(kinds: tuple[type[Any], ...]) -> str:
    return " or ".join(kind.__name__ for kind in kinds)


def spec_of(dtype: str, shape: list[int]) -> TensorSpec:
    """The checked header of a tensor in a message. Raises MalformedMessage."""
    try:
        return check_spec(dtype, tuple(shape))
    except BadTensor as error:
        raise MalformedMessage(str(error)) from error
