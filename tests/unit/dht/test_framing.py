"""Frames over bytes: exact, bounded, and only our errors for what is damaged."""

import asyncio
import contextlib
import random
import struct
from typing import Any

import msgpack
import pytest
from hostile import Link, at_once, attack, fuzzed, no_deadlines
from hypothesis import given, settings
from hypothesis import strategies as st

from glasshive.dht.errors import (
    BadFrame,
    DeadlineExceeded,
    FrameTooLarge,
    StreamClosed,
    StreamRefused,
    SwarmError,
    TransportLost,
)
from glasshive.dht.framing import Frame, FrameLimits, Stream
from glasshive.security.keys import Identity

PEER = Identity(bytes(32)).peer_id
SMALL = FrameLimits(header_bytes=100, body_bytes=1000, header_depth=3, header_elements=10)


class Recorder:
    """A writer that keeps what it is given."""

    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.drains = 0
        self.ended = ""

    def write(self, data: bytes, /) -> None:
        self.written.append(data)

    async def drain(self) -> None:
        self.drains += 1
        await asyncio.sleep(0)

    def close(self) -> None:
        self.ended = self.ended or "closed"

    async def wait_closed(self) -> None:
        return

    def abort(self) -> None:
        self.ended = "aborted"


def stream_of(
    data: bytes = b"", *, ended: bool = True, limits: FrameLimits | None = None, lost: Any = None
) -> tuple[Stream, Recorder, asyncio.StreamReader]:
    reader = asyncio.StreamReader()
    reader.feed_data(data)
    if ended:
        reader.feed_eof()
    writer = Recorder()
    stream = Stream(reader, writer, PEER, limits or FrameLimits(), lambda: lost)
    return stream, writer, reader


def frame_bytes(header: object, body: bytes = b"") -> bytes:
    packed: bytes = msgpack.packb(header)
    return struct.pack(">II", len(packed), len(body)) + packed + body


headers = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(), inner, max_size=5),
    max_leaves=10,
)


@settings(max_examples=50)
@given(st.lists(st.tuples(headers, st.binary(max_size=2000)), max_size=4))
def test_frames_are_written_and_read_as_documented(frames: list[tuple[Any, bytes]]) -> None:
    async def main() -> None:
        stream, writer, _ = stream_of()
        for header, body in frames:
            await stream.send(header, body)
        sent = b"".join(writer.written)
        assert sent == b"".join(frame_bytes(header, body) for header, body in frames)
        stream, _, _ = stream_of(sent)
        for header, body in frames:
            assert await stream.receive(1) == Frame(header, bytearray(body))
        with pytest.raises(StreamClosed):
            await stream.receive(1)

    asyncio.run(main())


@pytest.mark.asyncio
async def test_a_long_body_leaves_in_slices_and_as_a_copy() -> None:
    body = bytearray(random.Random(1).randbytes(3 * 256 * 1024 + 5))
    expected = frame_bytes(["x"], bytes(body))
    stream, writer, _ = stream_of()
    await stream.send(["x"], memoryview(body))
    body[:] = bytes(len(body))
    assert b"".join(writer.written) == expected
    assert max(map(len, writer.written)) == 256 * 1024
    assert writer.drains >= 4


@pytest.mark.asyncio
@pytest.mark.parametrize("size", [0, 1, 1000])
async def test_the_limit_itself_is_allowed(size: int) -> None:
    stream, writer, _ = stream_of(limits=SMALL)
    await stream.send("h" * 98, bytes(size))
    received, _, _ = stream_of(b"".join(writer.written), limits=SMALL)
    assert len((await received.receive(1)).body) == size


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("error", "header", "body"),
    [
        (FrameTooLarge, "h" * 99, b""),
        (FrameTooLarge, [], bytes(1001)),
        (BadFrame, object(), b""),
        (BadFrame, [], "text"),
    ],
)
async def test_what_cannot_be_sent_leaves_the_stream_whole(
    error: type[Exception], header: Any, body: Any
) -> None:
    stream, writer, _ = stream_of(limits=SMALL)
    with pytest.raises(error):
        await stream.send(header, body)
    assert not writer.written
    await stream.send(["still good"])
    assert b"".join(writer.written) == frame_bytes(["still good"])


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("error", "data"),
    [
        (FrameTooLarge, struct.pack(">II", 101, 0)),
        (FrameTooLarge, struct.pack(">II", 1, 1001)),
        (FrameTooLarge, b"\xff" * 8),
        (BadFrame, struct.pack(">II", 0, 201)),
        (BadFrame, frame_bytes([[[[1]]]])),
        (BadFrame, frame_bytes(list(range(11)))),
        (BadFrame, frame_bytes(msgpack.ExtType(1, b"x"))),
        (BadFrame, frame_bytes({1: 2})),
        (BadFrame, struct.pack(">II", 2, 0) + b"\x01\x02"),
        (BadFrame, struct.pack(">II", 1, 0) + b"\xc1"),
        (StreamClosed, frame_bytes([1], b"body")[:-1]),
        (StreamClosed, frame_bytes([1])[:5]),
        (StreamClosed, b""),
    ],
)
async def test_a_bad_frame_ends_the_stream(error: type[Exception], data: bytes) -> None:
    stream, writer, _ = stream_of(data, limits=SMALL)
    with pytest.raises(error):
        await stream.receive(1)
    assert stream.closed
    assert writer.ended == "aborted"
    with pytest.raises(StreamClosed):
        await stream.receive(1)
    with pytest.raises(StreamClosed):
        await stream.send([])


@pytest.mark.asyncio
async def test_nothing_is_allocated_for_a_length_beyond_the_limit() -> None:
    # No byte of the body ever comes: a reader that waited for it would meet the deadline instead.
    stream, _, _ = stream_of(struct.pack(">II", 1, 2**32 - 1), ended=False)
    with pytest.raises(FrameTooLarge, match="4294967295"):
        await stream.receive(5)


@pytest.mark.asyncio
async def test_a_deadline_between_frames_leaves_the_stream_whole() -> None:
    stream, _, reader = stream_of(ended=False)
    with pytest.raises(DeadlineExceeded):
        await stream.receive(0.01)
    reader.feed_data(frame_bytes([1])[:3])
    with pytest.raises(DeadlineExceeded):
        await stream.receive(0.01)
    reader.feed_data(frame_bytes([1])[3:])
    assert (await stream.receive(1)).header == [1]


@pytest.mark.asyncio
async def test_a_deadline_within_a_frame_ends_the_stream() -> None:
    stream, _, reader = stream_of(frame_bytes([1], b"body")[:-1], ended=False)
    with pytest.raises(DeadlineExceeded):
        await stream.receive(0.01)
    reader.feed_data(b"y")
    with pytest.raises(StreamClosed, match="cut short"):
        await stream.receive(1)


@pytest.mark.asyncio
async def test_a_receiver_that_never_reads_meets_the_deadline_of_send() -> None:
    stream, writer, _ = stream_of(ended=False)

    async def stuck() -> None:
        await asyncio.Event().wait()

    writer.drain = stuck  # type: ignore[method-assign]
    with pytest.raises(DeadlineExceeded):
        await stream.send([1], bytes(10), deadline_seconds=0.01)
    assert stream.closed


@pytest.mark.asyncio
async def test_frames_of_several_senders_do_not_mix() -> None:
    stream, writer, _ = stream_of(ended=False)
    bodies = [bytes([number]) * 600_000 for number in range(4)]
    await asyncio.gather(*(stream.send([number], body) for number, body in enumerate(bodies)))
    received, _, _ = stream_of(b"".join(writer.written))
    for number, body in enumerate(bodies):
        assert await received.receive(5) == Frame([number], bytearray(body))


@pytest.mark.asyncio
async def test_a_refusal_arrives_as_its_own_error() -> None:
    stream, writer, _ = stream_of()
    await stream.refuse("busy: try\nanother " + "x" * 300)
    assert writer.ended == "closed"
    sent = b"".join(writer.written)
    assert len(sent) == 8 + 200
    received, _, _ = stream_of(sent)
    with pytest.raises(StreamRefused, match=r"busy: try\?another xxx"):
        await received.receive(1)


@pytest.mark.asyncio
async def test_a_dead_transport_is_told_from_a_stream_that_ended() -> None:
    stream, _, _ = stream_of(b"", lost=TransportLost("gone"))
    with pytest.raises(TransportLost):
        await stream.receive(1)
    with pytest.raises(TransportLost):
        await stream.send([])


GOOD = [
    frame_bytes({"a": [1, "b", b"c"]}, b"body") + frame_bytes([1, [2, [3]]], b"x" * 50),
    frame_bytes(["long"], b"y" * 900),
]


def received(data: bytes) -> None:
    """Reads all that a stream gives on which `data` comes."""
    link = Link(data)
    stream = link.stream()
    while link.has_more:
        assert type(at_once(stream.receive(1)).body) is bytearray


def test_damaged_bytes_raise_only_our_errors() -> None:
    with no_deadlines():
        taken = attack(received, GOOD, SwarmError, trees=False)
    assert taken > 1000


@fuzzed
@given(st.lists(st.one_of(st.binary(max_size=60), st.sampled_from(GOOD)), max_size=4).map(b"".join))
def test_any_bytes_are_frames_or_refused(data: bytes) -> None:
    with no_deadlines(), contextlib.suppress(SwarmError):
        received(data)
