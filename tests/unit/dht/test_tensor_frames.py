"""Tensors on a stream: what goes out comes back; what is cut or too long is refused."""

from __future__ import annotations

import contextlib

import pytest
from hostile import Link, at_once, attack, fuzzed, like, no_deadlines
from hypothesis import given
from hypothesis import strategies as st

from glasshive.dht.errors import SwarmError
from glasshive.dht.messages import SLICE_BYTES, More, Saved, Value, decode, encode, spec_of
from glasshive.dht.tensor_frames import receive_tensor, send_tensor
from glasshive.security.plain import encode_plain

MOST_BYTES = 1 << 16  # what the plan of these tests has room for


class Written(Link):
    """A link that keeps what is sent on it."""

    def __init__(self) -> None:
        super().__init__(b"")
        self.data = b""

    def write(self, data: bytes, /) -> None:
        self.data += data


def sent(message: object, data: bytes) -> bytes:
    link = Written()
    with no_deadlines():
        at_once(send_tensor(link.stream(), message, data, 1))
    return link.data


def framed(header: bytes, body: bytes = b"") -> bytes:
    return len(header).to_bytes(4, "big") + len(body).to_bytes(4, "big") + header + body


def received(data: bytes) -> bytes:
    """The bytes of the tensor on a stream, if it is not larger than was planned."""
    stream = Link(data).stream()
    frame = at_once(stream.receive(1))
    message = decode(frame.header, Saved, Value)
    spec = spec_of(message.dtype, message.shape)
    if spec.nbytes > MOST_BYTES:
        raise SwarmError("not on the plan")
    taken = at_once(receive_tensor(stream, frame, spec, 1))
    assert len(taken) == spec.nbytes
    return bytes(taken)


SHORT = sent(Saved("s0", "float32", [2, 3]), bytes(range(24)))
MORE = bytes(encode_plain(encode(More())))
HEADER = bytes(encode_plain(encode(Value(3, 0, "int8", [5, 4], [1, 0]))))
SLICED = framed(HEADER, bytes(9)) + framed(MORE, bytes(9)) + framed(MORE, bytes(2))


def test_a_long_tensor_leaves_in_slices_and_comes_back() -> None:
    data = bytes(range(256)) * (2 * SLICE_BYTES // 256) + b"end"
    stream = Link(sent(Saved("s0", "int8", [len(data)]), data)).stream()
    with no_deadlines():
        frame = at_once(stream.receive(1))
        assert len(frame.body) == SLICE_BYTES
        spec = spec_of("int8", [len(data)])
        assert at_once(receive_tensor(stream, frame, spec, 1)) == data


def test_damaged_slices_are_a_tensor_or_refused() -> None:
    with no_deadlines():
        attack(received, [SHORT, SLICED], SwarmError, trees=False)


@fuzzed
@given(like(HEADER), st.lists(st.tuples(like(MORE), st.integers(0, 30)), max_size=3))
def test_any_frames_are_a_tensor_or_refused(header: bytes, slices: list[tuple[bytes, int]]) -> None:
    data = framed(header, bytes(9)) + b"".join(framed(one, bytes(size)) for one, size in slices)
    with no_deadlines(), contextlib.suppress(SwarmError):
        received(data)


@pytest.mark.parametrize("sizes", [(9, 12), (9, 0), (21,), (9, 9)])
def test_more_or_less_than_the_header_says_is_refused(sizes: tuple[int, ...]) -> None:
    headers = [HEADER, *[MORE] * len(sizes)]
    data = b"".join(
        framed(header, bytes(size)) for header, size in zip(headers, sizes, strict=False)
    )
    with no_deadlines(), pytest.raises(SwarmError):
        received(data)
