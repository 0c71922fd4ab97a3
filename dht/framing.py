"""Frames over a duplex byte stream.

A frame is ``struct('>II')`` (header length, body length), the header in msgpack, the raw body::

    +----------------+----------------+-----------------+-----------------+
    | header length  | body length    | header          | body            |
    | uint32, big    | uint32, big    | plain msgpack   | raw bytes       |
    +----------------+----------------+-----------------+-----------------+

Rules:

1. Both lengths are checked against the stream's limits before anything is read. Memory is taken as
   bytes come, whatever was announced, and what unfinished frames hold is bounded, of each remote
   and in all (`glasshive.dht.unfinished_frames`).
2. The header is plain data (`glasshive.security.plain`): no extension types, bounded in depth and
   in elements, the keys of a map differ. What it means is for the caller to check.
3. A header length of 0 marks a refusal: the body is one line of ASCII, at most 200 bytes, and
   nothing follows. The receiver raises StreamRefused.
4. Long bodies are written in slices, so that a short frame on another stream of the same
   connection doesn't wait for all of one.
5. There is no half-close: closing ends both directions, and what is still on its way may be lost in
   both. So a protocol says in a frame that it is done, and whoever received the last frame closes.
6. A frame that was cut short by an error, a deadline or a cancellation ends the stream.
7. A frame that has begun comes at no less than a floor of bytes a second, averaged over some
   seconds, or the stream ends: who sends a byte now and then holds nobody's memory for long.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final, Protocol, final

from glasshive.dht.deadline import within
from glasshive.dht.errors import (
    BadFrame,
    DeadlineExceeded,
    FrameTooLarge,
    ShutOut,
    StreamBusy,
    StreamClosed,
    StreamRefused,
    TransportError,
)
from glasshive.dht.unfinished_frames import UnfinishedFrames
from glasshive.security.errors import MalformedData
from glasshive.security.keys import PeerId
from glasshive.security.plain import Plain, decode_plain, encode_plain

__all__ = ["ByteReader", "ByteWriter", "Frame", "FrameLimits", "Stream"]

SEND_DEADLINE_SECONDS: Final = 60.0
CLOSE_DEADLINE_SECONDS: Final = 5.0
REFUSAL_DEADLINE_SECONDS: Final = 2.0
FINISH_DEADLINE_SECONDS: Final = 60.0
SLICE_BYTES: Final = 256 * 1024
MAX_REFUSAL_BYTES: Final = 200
BUSY: Final = "busy: "
"""How the text of a refusal begins that holds for now only."""
NOT_LET_IN: Final = "not let in: "
"""And that of one at the door of a private swarm."""

_LENGTHS: Final = struct.Struct(">II")
_MAX_LENGTH: Final = 0xFFFF_FFFF
_LINK_ERRORS: Final = (ConnectionError, OSError, EOFError)


class ByteReader(Protocol):
    """What framing needs of ``asyncio.StreamReader``."""

    async def readexactly(self, n: int, /) -> bytes: ...

    async def read(self, n: int = -1, /) -> bytes: ...


class ByteWriter(Protocol):
    """What framing needs of ``asyncio.StreamWriter``, and an abrupt end."""

    def write(self, data: bytes, /) -> None: ...

    async def drain(self) -> None: ...

    def close(self) -> None: ...

    async def wait_closed(self) -> None: ...

    def abort(self) -> None: ...


@dataclass(frozen=True, slots=True)
class FrameLimits:
    """What one stream accepts and sends."""

    header_bytes: int = 1024 * 1024
    body_bytes: int = 8 * 1024 * 1024
    header_depth: int = 16
    header_elements: int = 65_536
    # A client gives up a slice of 256 KiB after 12 s of silence, so that less than 22 kB/s
    # are of no use to it. The floor is a fifth of that: under it no honest sender is still there.
    least_bytes_per_second: int = 4096
    # TCP sends a lost packet again after about 1, 2, 4 and 8 s: a link may be away for so long.
    stall_seconds: float = 15.0


@dataclass(frozen=True, slots=True)
class Frame:
    """One message: a header of plain data, not yet checked for meaning, and a body of its own."""

    header: Plain
    body: bytearray


@final
class _Floor:
    """How slowly a frame may come: each byte that has come buys time, `stall_seconds` at most."""

    def __init__(self, limits: FrameLimits, clock: Callable[[], float]) -> None:
        self._limits = limits
        self._clock = clock
        self._ends_at = clock() + limits.stall_seconds

    async def keep(self, read: Awaitable[bytes], peer_id: PeerId) -> bytes:
        """What `read` gives. Raises DeadlineExceeded if the frame falls below the floor."""
        limits = self._limits
        try:
            what = f"reading a frame of {peer_id}"
            data = await within(max(self._ends_at - self._clock(), 0.0), read, what)
        except DeadlineExceeded:
            raise self._too_slow(peer_id) from None
        now = self._clock()
        if data and now > self._ends_at:
            raise self._too_slow(peer_id)
        bought_seconds = len(data) / limits.least_bytes_per_second
        self._ends_at = min(self._ends_at + bought_seconds, now + limits.stall_seconds)
        return data

    def _too_slow(self, peer_id: PeerId) -> DeadlineExceeded:
        limits = self._limits
        return DeadlineExceeded(
            f"a frame from {peer_id} came slower than {limits.least_bytes_per_second} bytes a "
            f"second, averaged over {limits.stall_seconds:g} s; the stream was ended"
        )


@final
class Stream:
    """A framed duplex stream to one peer, whose id the transport has proved.

    Any number of tasks may send; one at a time may receive.
    """

    def __init__(
        self,
        reader: ByteReader,
        writer: ByteWriter,
        peer_id: PeerId,
        limits: FrameLimits,
        why_lost: Callable[[], TransportError | None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`why_lost` tells a dead transport from a stream that only ended."""
        self.peer_id = peer_id
        self.limits = limits
        self.origin = ""
        """Where the other side comes from (`dht.addresses.origin_of`), where it was accepted."""
        self.told_busy = False
        """Set by a handler that had to say that this peer is busy."""
        self.unfinished: UnfinishedFrames | None = None
        """What counts the bytes of its frames that are still coming, where it was accepted."""
        self._reader = reader
        self._writer = writer
        self._why_lost = why_lost
        self._clock = clock
        self._soon_seconds: float | None = None
        self._first: tuple[FrameLimits, Callable[[Frame], None]] | None = None
        self._sending = asyncio.Lock()
        self._ended: str | None = None

    @property
    def closed(self) -> bool:
        """Whether this side has ended the stream, or has seen it end."""
        return self._ended is not None

    def expect_first(self, limits: FrameLimits, take: Callable[[Frame], None]) -> None:
        """Have `take` look at the first frame, of these limits, before `receive` gives the next.

        What `take` raises ends the stream, and `receive` raises it.
        """
        self._first = limits, take

    def expect_soon(self, seconds: float) -> None:
        """Have the next frame begin so soon after a `receive`, which else raises DeadlineExceeded.

        That ends the stream, however long the frame itself may take.
        """
        self._soon_seconds = seconds

    async def send(
        self,
        header: Plain,
        body: bytes | bytearray | memoryview = b"",
        deadline_seconds: float = SEND_DEADLINE_SECONDS,
    ) -> None:
        """Sends one frame. `body` is free to be changed as soon as this returns.

        Raises FrameTooLarge or BadFrame (nothing was sent and the stream goes on), or StreamClosed,
        TransportLost or DeadlineExceeded (the stream has ended).
        """
        try:
            packed = encode_plain(header)
            view = memoryview(body).cast("B")
        except (MalformedData, TypeError) as error:
            raise BadFrame(f"can't send this frame: {error}") from None
        limits = self.limits
        if len(packed) > limits.header_bytes or len(view) > limits.body_bytes:
            raise FrameTooLarge(
                f"frame with a header of {len(packed)} and a body of {len(view)} bytes, at most "
                f"{limits.header_bytes} and {limits.body_bytes} fit this stream; send it in parts"
            )
        await within(deadline_seconds, self._send(packed, view), f"sending to {self.peer_id}")

    async def _send(self, packed: bytes, body: memoryview) -> None:
        async with self._sending:
            self._check_open()
            done = False
            try:
                start = _LENGTHS.pack(len(packed), len(body)) + packed
                # The slices are copies: the writer may keep what it is given for later.
                if len(body) <= SLICE_BYTES:
                    self._writer.write(start + body if body else start)
                else:
                    self._writer.write(start)
                    for offset in range(0, len(body), SLICE_BYTES):
                        self._writer.write(bytes(body[offset : offset + SLICE_BYTES]))
                        await self._writer.drain()
                await self._writer.drain()
                done = True
            except _LINK_ERRORS as error:
                raise self._link_error(error, middle_of_frame=True) from None
            finally:
                if not done:
                    self._end("a frame was cut short while it was sent")

    async def receive(self, deadline_seconds: float) -> Frame:
        """The next frame.

        Raises StreamClosed or TransportLost at the end, StreamRefused if the other side said why;
        FrameTooLarge or BadFrame for what breaks the rules (the stream has ended); DeadlineExceeded
        (the stream goes on if no byte of the frame had come, else it has ended).
        """
        return await within(deadline_seconds, self._receive(), f"waiting for {self.peer_id}")

    async def _receive(self) -> Frame:
        if self._first is not None:
            limits, take = self._first
            frame = await self._receive_one(limits)
            self._first = None
            try:
                take(frame)
            except BaseException:
                self._end("its first frame was not acceptable")
                raise
        return await self._receive_one(self.limits)

    async def _receive_one(self, limits: FrameLimits) -> Frame:
        self._check_open()
        try:
            lengths = await self._receive_lengths()
        except asyncio.IncompleteReadError as error:
            raise self._link_error(error, middle_of_frame=bool(error.partial)) from None
        except _LINK_ERRORS as error:
            raise self._link_error(error, middle_of_frame=False) from None
        done = False
        try:
            header_bytes, body_bytes = _LENGTHS.unpack(lengths)
            frame = await self._receive_rest(header_bytes, body_bytes, limits)
            done = True
        except _LINK_ERRORS as error:
            raise self._link_error(error, middle_of_frame=True) from None
        finally:
            if not done:
                self._end("a frame was cut short or was not acceptable")
        return frame

    async def _receive_lengths(self) -> bytes:
        lengths = self._reader.readexactly(_LENGTHS.size)
        if self._soon_seconds is None:
            return await lengths
        began = False
        try:
            what = f"waiting for the first frame of {self.peer_id}"
            start = await within(self._soon_seconds, lengths, what)
            self._soon_seconds = None
            began = True
            return start
        finally:
            if not began:
                self._end("nothing came on it")

    async def _receive_rest(self, header_bytes: int, body_bytes: int, limits: FrameLimits) -> Frame:
        if header_bytes == 0:
            if body_bytes > MAX_REFUSAL_BYTES:
                raise BadFrame(f"a refusal of {body_bytes} bytes, at most {MAX_REFUSAL_BYTES}")
            text = (await self._reader.readexactly(body_bytes)).decode("ascii", "replace")
            kinds = {BUSY: StreamBusy, NOT_LET_IN: ShutOut}
            kind = next((kinds[one] for one in kinds if text.startswith(one)), StreamRefused)
            raise kind(f"{self.peer_id} refused the stream: {_printable(text)}")
        if header_bytes > limits.header_bytes or body_bytes > limits.body_bytes:
            raise FrameTooLarge(
                f"{self.peer_id} announced a frame with a header of {header_bytes} and a body of "
                f"{body_bytes} bytes, at most {limits.header_bytes} and {limits.body_bytes} are "
                "accepted; the stream was ended"
            )
        floor = _Floor(limits, self._clock)
        with self._one_more() as hold:
            packed = bytes(await self._receive_bytes(header_bytes, floor, hold))
            try:
                header = decode_plain(
                    packed,
                    max_bytes=limits.header_bytes,
                    max_depth=limits.header_depth,
                    max_elements=limits.header_elements,
                )
            except MalformedData as error:
                raise BadFrame(f"the header of a frame from {self.peer_id}: {error}") from None
            return Frame(header, await self._receive_bytes(body_bytes, floor, hold))

    def _one_more(self) -> contextlib.AbstractContextManager[Callable[[int], str | None]]:
        """See UnfinishedFrames.one_more; what this peer asked for itself is not counted."""
        if self.unfinished is None:
            return contextlib.nullcontext(lambda n_bytes: None)
        return self.unfinished.one_more(self.peer_id, self.origin)

    async def _receive_bytes(
        self, count: int, floor: _Floor, hold: Callable[[int], str | None]
    ) -> bytearray:
        data = bytearray()
        while len(data) < count:
            part = await floor.keep(
                self._reader.read(min(count - len(data), SLICE_BYTES)), self.peer_id
            )
            if not part:
                raise EOFError
            if (too_many := hold(len(part))) is not None:
                await self.refuse(f"{BUSY}{too_many}")
                raise BadFrame(f"{self.peer_id} was told that {too_many}; its stream was ended")
            data += part
        return data

    async def refuse(self, reason: str) -> None:
        """Ends the stream; the other side's receive raises StreamRefused with `reason`."""
        text = _printable(reason)[:MAX_REFUSAL_BYTES].encode("ascii", "replace")
        if not self.closed and not self._sending.locked():
            self._end_soft("it was refused here")
            self._writer.write(_LENGTHS.pack(0, len(text)) + text)
            with contextlib.suppress(TransportError, *_LINK_ERRORS):
                await within(REFUSAL_DEADLINE_SECONDS, self._linger(), "refusing a stream")
        await self.close()

    async def finish(self) -> None:
        """Ends the stream once the other side has, for whoever sent the last frame.

        Never raises. See `close`.
        """
        if not self.closed:
            with contextlib.suppress(TransportError, *_LINK_ERRORS):
                await within(FINISH_DEADLINE_SECONDS, self._linger(), "finishing a stream")
        await self.close()

    async def _linger(self) -> None:
        """Reads away what the other side sends until it has ended the stream."""
        await self._writer.drain()
        while await self._reader.read(SLICE_BYTES):
            pass

    async def close(self) -> None:
        """Ends the stream. Never raises; may be called again.

        What was sent before may be lost on its way: p2pd closes a stream for reading as well, takes
        that for a failure of its own, and sends a reset that may overtake the last frames.
        """
        self._end_soft("it was closed here")
        self._writer.close()
        try:
            await within(CLOSE_DEADLINE_SECONDS, self._writer.wait_closed(), "closing a stream")
        except (TransportError, *_LINK_ERRORS):
            self._writer.abort()

    def reset(self) -> None:
        """Ends the stream at once, also what is on its way. Never raises."""
        self._end("it was reset here")

    def _end(self, why: str) -> None:
        self._end_soft(why)
        self._writer.abort()

    def _end_soft(self, why: str) -> None:
        if self._ended is None:
            self._ended = why

    def _check_open(self) -> None:
        if self._ended is not None:
            lost = self._why_lost()
            if lost is not None:
                raise lost
            raise StreamClosed(
                f"the stream with {self.peer_id} has ended: {self._ended}; open a new one"
            )

    def _link_error(self, error: BaseException, *, middle_of_frame: bool) -> TransportError:
        self._end(f"the link failed ({type(error).__name__})")
        lost = self._why_lost()
        if lost is not None:
            return lost
        place = " in the middle of a frame" if middle_of_frame else ""
        return StreamClosed(f"{self.peer_id} ended the stream{place}, or the link failed")


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in text)
