"""Messages of a trace: what goes out comes back, and nothing else gets in."""

from __future__ import annotations

import os
import random
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glasshive.dht import messages
from glasshive.dht.errors import MalformedMessage
from glasshive.dht.messages import (
    Cancel,
    Done,
    Failed,
    Input,
    Need,
    Opening,
    Prepare,
    Run,
    Saved,
    Value,
    decode,
    encode,
    spec_of,
)
from glasshive.security.errors import MalformedData
from glasshive.security.plain import decode_plain, encode_plain

SAMPLES: list[Any] = [
    Prepare(b"\1" * 16, "ab" * 32, "float32", [["peer", ["/ip4/127.0.0.1/tcp/1"]]], 30.0),
    Need([b"\2" * 32, b"\3" * 32]),
    Input(0, "input_ids", "int64", [2, 7]),
    Run(),
    Saved("s0", "bfloat16", [1, 2, 3]),
    Done(0.25, [[1, 100, 0], [2, 0, 12]]),
    Failed("OverBudget", 7, "node 7 is too large"),
    Cancel(),
    Opening(b"\4" * 16, 0, 1),
    Value(-1, 0, "float32", [1, 4, 8], [0, 1, 2]),
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


def test_true_is_no_count_and_nan_no_duration() -> None:
    with pytest.raises(MalformedMessage, match=r"Input\.pass_index is no Count"):
        decode([5, True, "input_ids", "int64", [1]], Input)
    with pytest.raises(MalformedMessage, match=r"Done\.compute_seconds is no Seconds"):
        decode([8, float("nan"), []], Done)


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


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(2**63), 2**63)
        | st.floats()
        | st.text(max_size=9)
        | st.binary(max_size=40),
        lambda inner: st.lists(inner, max_size=6),
        max_leaves=30,
    )
)
@settings(max_examples=1000, deadline=None)
def test_any_header_decodes_or_is_refused(header: Any) -> None:
    for wanted in (Prepare, Need, Input, Saved, Done, Failed, Opening, Value):
        try:
            decode(header, wanted)
        except MalformedMessage:
            continue


def test_mutated_bytes_decode_or_are_refused() -> None:
    count = 2_000_000 if os.environ.get("GLASSHIVE_SOAK") else 50_000
    rng = random.Random(7)
    packed = [bytes(encode_plain(encode(message))) for message in SAMPLES]
    refused = 0
    for _ in range(count):
        data = bytearray(rng.choice(packed))
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            header = decode_plain(bytes(data))
            decode(header, Prepare, Saved, Value)
        except (MalformedData, MalformedMessage):
            refused += 1
    assert 0 < refused <= count
