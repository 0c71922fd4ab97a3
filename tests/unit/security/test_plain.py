"""The bounded decoder of plain data. The oracle is msgpack itself."""

import contextlib
import time

import msgpack
import pytest
from hostile import attack, fuzzed, like
from hypothesis import given
from hypothesis import strategies as st

from glasshive.security.errors import MalformedData
from glasshive.security.plain import decode_plain, encode_plain

plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=300)
    | st.binary(max_size=300),
    lambda inner: st.lists(inner, max_size=20) | st.dictionaries(st.text(), inner, max_size=20),
    max_leaves=40,
)


@given(plain)
def test_plain_data_comes_back(value: object) -> None:
    data = msgpack.packb(value)
    assert encode_plain(value) == data
    assert decode_plain(data, max_depth=50) == value


@pytest.mark.parametrize("count", [15, 16, 65_535, 65_536])
def test_every_length_form(count: int) -> None:
    for value in ("x" * count, b"x" * count, [7] * count):
        assert decode_plain(msgpack.packb(value), max_elements=70_000) == value
    table = {str(i): i for i in range(count)}
    assert decode_plain(msgpack.packb(table), max_elements=140_000) == table


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "truncated"),
        (b"\xc1", "0xc1"),
        (b"\xc7\x00\x40", "0xc7"),
        (b"\xd6\xff\x00\x00\x00\x00", "0xd6"),
        (b"\x01\x01", "1 bytes left over"),
        (b"\x92\x01", "truncated"),
        (b"\xa2a", "truncated"),
        (b"\xcb\x00", "truncated"),
        (b"\xdc\x00", "truncated"),
        (b"\xdd\xff\xff\xff\xff\xc0", "more than 65536 elements"),
        (b"\xdf\x00\x00\x00\x10\xc0", "truncated: 32 elements"),
        (b"\xdb\xff\xff\xff\xffa", "truncated"),
        (b"\x91" * 17 + b"\xc0", "nested deeper than 16"),
        (b"\xa1\xff", "not plain data"),
        (b"\x82\xa1a\x01\xa1a\x02", "'a' twice"),
        (b"\x81\x01\x01", "not plain data|map key"),
        (b"\x81\xc4\x01a\x01", "map key of type bytes"),
        (bytes(100), "left over"),
        (bytes(2**20 + 1), "at most 1048576"),
    ],
)
def test_anything_else_is_refused(data: bytes, text: str) -> None:
    with pytest.raises(MalformedData, match=text):
        decode_plain(data)


def test_bounds_hold_at_the_limit() -> None:
    exact = msgpack.packb([[1, 2], [3]])
    assert decode_plain(exact, max_bytes=len(exact), max_depth=2, max_elements=5)
    for limits in ({"max_bytes": len(exact) - 1}, {"max_depth": 1}, {"max_elements": 4}):
        with pytest.raises(MalformedData):
            decode_plain(exact, **limits)


def test_a_bomb_costs_nothing() -> None:
    bombs = [
        b"\xdd\x00\x10\x00\x00" + b"\x80" * 2**20,
        b"\xdd\x00\x00\xff\xff" * 1000 + b"\xc0" * 65_535,
        b"\x91" * 2**20,
    ]
    for bomb in bombs:
        start = time.process_time()
        with pytest.raises(MalformedData):
            decode_plain(bomb, max_bytes=2**22)
        assert time.process_time() - start < 0.5


GOOD = [
    msgpack.packb(["text", b"bytes", [1, [2, 2.5, [3, {}]]], None, 2**40, True]),
    msgpack.packb({"a": [1, 2.5, "text", b"bytes", None, True], "b": {"c": [[]] * 20}}),
]


def decoded(data: bytes) -> None:
    """Decodes; msgpack agrees about what the bytes say (repr: a damaged float may be NaN)."""
    assert repr(decode_plain(data)) == repr(msgpack.unpackb(data))


def test_damaged_data_raises_only_our_error() -> None:
    assert attack(decoded, GOOD, MalformedData) > 1000


@fuzzed
@given(like(*GOOD))
def test_any_bytes_are_plain_data_or_refused(data: bytes) -> None:
    with contextlib.suppress(MalformedData):
        decoded(data)


@pytest.mark.parametrize("value", [object(), {1, 2}, 2**64, [lambda: None], 1j])
def test_only_plain_data_is_written(value: object) -> None:
    with pytest.raises(MalformedData, match="use null, bool"):
        encode_plain(value)
