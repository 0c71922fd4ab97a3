"""Tensors on a stream: a message that names dtype and shape, and the bytes in slices.

The receiver decides from the message whether it wants the tensor at all, before anything is
allocated; then it takes exactly as many bytes as the header says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from glasshive.dht.errors import MalformedMessage
from glasshive.dht.framing import SEND_DEADLINE_SECONDS, Frame
from glasshive.dht.messages import SLICE_BYTES, More, decode, encode
from glasshive.graph.tensors import TensorSpec
from glasshive.security.keys import PeerId
from glasshive.security.plain import Plain


class FrameSink(Protocol):
    """A stream, as far as one sends on it."""

    async def send(
        self,
        header: Plain,
        body: bytes | bytearray | memoryview = b"",
        deadline_seconds: float = SEND_DEADLINE_SECONDS,
    ) -> None: ...


class FrameSource(Protocol):
    """A stream, as far as one reads from it."""

    @property
    def peer_id(self) -> PeerId: ...

    async def receive(self, deadline_seconds: float) -> Frame: ...


async def send_tensor(
    stream: FrameSink,
    message: object,
    data: bytes | bytearray | memoryview,
    deadline_seconds: float,
) -> None:
    """Send `message` and the bytes of its tensor. One task at a time may do so on a stream.

    Raises what `Stream.send` raises; the deadline is for each slice.
    """
    view = memoryview(data).cast("B")
    await stream.send(encode(message), view[:SLICE_BYTES], deadline_seconds)
    more = encode(More())
    for offset in range(SLICE_BYTES, len(view), SLICE_BYTES):
        await stream.send(more, view[offset : offset + SLICE_BYTES], deadline_seconds)


async def receive_bytes(
    stream: FrameSource,
    first: Frame,
    size_bytes: int,
    deadline_seconds: float,
    on_slice: Callable[[bytearray], None] = lambda data: None,
) -> bytearray:
    """The `size_bytes` that begin in the body of `first`, each slice shown to `on_slice`.

    The caller has checked that it wants as many. Raises MalformedMessage and TransportError.
    """
    if len(first.body) == size_bytes:
        on_slice(first.body)
        return first.body
    whole = bytearray(size_bytes)
    filled = 0
    frame = first
    while True:
        end = filled + len(frame.body)
        if end > size_bytes or not frame.body:
            raise MalformedMessage(
                f"{stream.peer_id} sent {end} bytes of a tensor so far; {size_bytes} are wanted"
            )
        whole[filled:end] = frame.body
        on_slice(frame.body)
        filled = end
        if filled == size_bytes:
            return whole
        frame = await stream.receive(deadline_seconds)
        decode(frame.header, More)


async def receive_tensor(
    stream: FrameSource,
    first: Frame,
    spec: TensorSpec,
    deadline_seconds: float,
    on_slice: Callable[[bytearray], None] = lambda data: None,
) -> bytearray:
    """The bytes of a tensor of `spec` that begin in the body of `first`."""
    return await receive_bytes(stream, first, spec.nbytes, deadline_seconds, on_slice)
