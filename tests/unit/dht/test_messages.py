"""Messages of a trace: what goes out comes back, and nothing else gets in."""

from __future__ import annotations

import contextlib
from dataclasses import fields
from typing import Any

import pytest
from hostile import attack, fuzzed, like
from hypothesis import given

from glasshive.dht import messages
from glasshive.dht.errors import MalformedMessage
from glasshive.dht.messages import (
    Cancel,
    Done,
    Failed,
    Input,
    Lost,
    Need,
    Opening,
    Prepare,
    Received,
    Resume,
    Revise,
    Run,
    Saved,
    TrustEnd,
    TrustRoot,
    TrustVersions,
    TrustWhitelist,
    Value,
    decode,
    encode,
    spec_of,
)
from glasshive.security.errors import MalformedData
from glasshive.security.plain import decode_plain, encode_plain
from glasshive.security.requests import MAX_REQUEST_BYTES

SAMPLES: list[Any] = [
    Prepare(b"\1" * 300),
    Need([b"\2" * 32, b"\3" * 32]),
    Input(0, "input_ids", "int64", [2, 7]),
    Run(0),
    Saved("s0", "bfloat16", [1, 2, 3]),
    Done(b"\2" * 200),
    Failed("OverBudget", 7, "node 7 is too large"),
    Cancel(),
    Opening(b"\4" * 16, 0, 1, 0),
    Resume(7),
    Lost(2, 1),
    Revise(b"signed", 2),
    Received(),
    Value(-1, 0, "float32", [1, 4, 8], [0, 1, 2]),
    TrustVersions(3, 17),
    TrustRoot(2),
    TrustWhitelist(17, 667),
    TrustEnd(),
]


@pytest.mark.parametrize("message", SAMPLES, ids=lambda one: type(one).__name__)
def test_a_message_survives_the_wire(message: Any) -> None:
    assert decode(decode_plain(encode_plain(encode(message))), type(message)) == message


@pytest.mark.parametrize("message", SAMPLES, ids=lambda one: type(one).__name__)
def test_a_message_out_of_turn_is_named(message: Any) -> None:
    wanted = Cancel if isinstance(message, Run) else Run
    with pytest.raises(MalformedMessage, match=f"got {type(message).__name__}; {wanted.__name__}"):
        decode(encode(message), wanted)


@pytest.mark.parametrize("message", [one for one in SAMPLES if fields(one)])
def test_every_field_is_checked(message: Any) -> None:
    for place in range(1, len(fields(message)) + 1):
        header = encode(message)
        header[place] = {"no": "such thing"}
        with pytest.raises(MalformedMessage, match="is no"):
            decode(header, type(message))
    with pytest.raises(MalformedMessage, match="fields; "):
        decode([*encode(message), 1], type(message))


def test_true_is_no_count_and_what_is_signed_has_a_bound() -> None:
    with pytest.raises(MalformedMessage, match=r"Input\.pass_index is no Count"):
        decode([5, True, "input_ids", "int64", [1]], Input)
    for size in (0, MAX_REQUEST_BYTES + 1):
        with pytest.raises(MalformedMessage, match=r"Prepare\.request is no Signed"):
            decode([1, bytes(size)], Prepare)


def test_a_shape_that_no_tensor_has_is_refused() -> None:
    with pytest.raises(MalformedMessage, match="unknown dtype"):
        spec_of("object", [1])
    with pytest.raises(MalformedMessage):
        spec_of("float32", [1 << 40, 1 << 40])


def test_codes_are_unique_and_every_field_has_a_check() -> None:
    kinds = list(messages._CODES.values())
    assert len(set(kinds)) == len(kinds)
    for kind in kinds:
        for field in fields(kind):
            assert str(field.type) in messages._CHECKS, (kind, field)


PACKED = [bytes(encode_plain(encode(message))) for message in SAMPLES]
KINDS = list(messages._CODES.values())


def read(data: bytes) -> None:
    """What a receiver does with a header that may be of any kind, and with a tensor's spec."""
    message = decode(decode_plain(data), *KINDS)
    if hasattr(message, "shape"):
        spec_of(message.dtype, message.shape)


def test_damaged_headers_are_messages_or_refused() -> None:
    attack(read, PACKED, (MalformedData, MalformedMessage))


@fuzzed
@given(like(*PACKED))
def test_any_header_is_a_message_or_refused(data: bytes) -> None:
    with contextlib.suppress(MalformedData, MalformedMessage):
        read(data)
