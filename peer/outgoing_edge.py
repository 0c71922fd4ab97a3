"""What one part of a plan sends to another: in the order in which it was made, on one stream.

The edge of a generation that outlives its peers keeps all of it. When its stream breaks, or the
receiving part is given to another peer, it is opened anew; the receiver says how many values it
has, and the edge goes on behind them. What a part makes, and in which order, follows from the part
and from what it is given, so a number is enough, also where this peer stands in for one that was
lost (docs/adr/0016).

Where the two peers can't reach each other, the client passes their frames on: by a stream that it
opens here, in place of one to the other peer (docs/adr/0017).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final, TypeAlias, final

from glasshive.dht.errors import MalformedMessage, PeerUnreachable, SwarmError
from glasshive.dht.framing import Stream
from glasshive.dht.messages import (
    EDGE_PROTOCOL,
    Dropped,
    Opening,
    Received,
    Resume,
    Value,
    decode,
    encode,
)
from glasshive.dht.tensor_frames import send_tensor
from glasshive.dht.transport import PeerAddress, Transport
from glasshive.graph.plan import HIDDEN
from glasshive.security.requests import TraceRequest
from glasshive.security.results import Traffic

__all__ = ["OutgoingEdge", "Sendable"]

OPEN_SECONDS: Final = 12.0
"""In which a peer takes a stream, or is lost: a kernel goes on for two minutes."""


_Relays: TypeAlias = "asyncio.Queue[tuple[Stream, asyncio.Event]]"


@dataclass(frozen=True, slots=True)
class Sendable:
    """A value for another part with its bytes, or the word that it never comes."""

    message: Value | Dropped
    data: memoryview


@final
class OutgoingEdge:
    """The edge of a part to that of index `receiver`. Belongs to the loop.

    Without an `address` it sends by way of the client, on the streams that `send_by` is given.

    With `on_lost` it outlives the peers that receive: that is called with what broke a stream, and
    the edge then waits for `go_on_at`. Without, what breaks a stream ends it.
    """

    def __init__(
        self,
        transport: Transport,
        request: TraceRequest,
        receiver: int,
        address: PeerAddress | None,
        *,
        n_values: int,
        left_seconds: Callable[[], float],
        on_lost: Callable[[int, SwarmError], Awaitable[None]] | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._transport = transport
        self._request = request
        self.receiver = receiver
        self._address = address
        self._n_values = n_values
        self._left_seconds = left_seconds
        self._on_lost = on_lost
        self._clock = clock
        self.wire_seconds = 0.0  # in which a value was being sent, also one that was not sent whole
        self._values: list[Sendable | None] = []  # None: sent, and not kept
        self._is_finished = False
        self.delivered = asyncio.Event()
        """Set while the receiver has said that all has come, and nobody else needs it again."""
        self._news = asyncio.Event()
        self._moved = asyncio.Event()
        self._relays: _Relays = asyncio.Queue()  # that were not used yet
        # The peer that this one stands in for may have sent some.
        self._again = request.revision > 0
        self._hidden_bytes = 0
        self._carried_bytes = 0

    @property
    def traffic(self) -> Traffic:
        """What has been sent, more than once where it was."""
        return Traffic(self.receiver, self._hidden_bytes, self._carried_bytes)

    def put(self, value: Sendable) -> None:
        """Send this, after what was put before."""
        self._values.append(value)
        self._news.set()

    def finish(self) -> None:
        """Nothing more is put."""
        self._is_finished = True
        self._news.set()

    def go_on_at(self, address: PeerAddress | None) -> None:
        """Open a new stream to the peer that has the receiving part now, or wait for one."""
        self._address = address
        self._forget_relays()
        self.delivered.clear()
        self._moved.set()

    def forget(self) -> None:
        """Give up what is kept; nothing is sent any more."""
        self._values.clear()
        self._forget_relays()

    async def send_by(self, stream: Stream) -> None:
        """Send on this stream, which the client has opened; returns when it is over."""
        is_over = asyncio.Event()
        self._relays.put_nowait((stream, is_over))
        await is_over.wait()

    def _forget_relays(self) -> None:
        # Whoever waits at the old queue is about to be cancelled, and must get none of the new.
        old, self._relays = self._relays, asyncio.Queue()
        while not old.empty():
            stream, is_over = old.get_nowait()
            stream.reset()
            is_over.set()

    async def run(self) -> None:
        """Send everything, and again where it has to; `delivered` says when there is no more to do.

        Returns only from an edge that doesn't outlive its receiver.

        Raises SwarmError for a stream that broke, if the edge doesn't outlive that, and for a
        receiver that breaks the protocol.
        """
        while True:
            self._moved.clear()
            sending = asyncio.create_task(self._send_all())
            moved = asyncio.create_task(self._moved.wait())
            try:
                await asyncio.wait({sending, moved}, return_when=asyncio.FIRST_COMPLETED)
                if sending.done():
                    sending.result()
                    if not self._moved.is_set():
                        self.delivered.set()
                    if self._on_lost is None:
                        return
                    await moved
            except SwarmError as error:
                if self._on_lost is None or isinstance(error, MalformedMessage):
                    raise
                if not self._moved.is_set():  # else a new stream is to be opened anyway
                    await self._on_lost(self.receiver, error)
                    await moved
            finally:
                for task in (sending, moved):
                    task.cancel()
                await asyncio.gather(sending, moved, return_exceptions=True)
            self._again = True

    async def _send_all(self) -> None:
        if not self._again and await self._value(0) is None:
            return  # a part that ends before it has sent anything
        stream, is_over = await self._stream()
        try:
            at = await self._open(stream)
            while (value := await self._value(at)) is not None:
                await self._send(stream, value)
                if self._on_lost is None:
                    self._values[at] = None
                at += 1
            if at > len(self._values):
                raise MalformedMessage(f"has {at} values of which {len(self._values)} were made")
            # Only now nothing can be lost on its way, unseen here and waited for there.
            decode((await stream.receive(self._left_seconds())).header, Received)
        except BaseException:
            stream.reset()
            raise
        else:
            await stream.close()
        finally:
            is_over.set()

    async def _stream(self) -> tuple[Stream, asyncio.Event]:
        if self._address is None:
            return await self._relays.get()
        if not self._address.addresses:  # nor is the network asked where it may be
            raise PeerUnreachable(f"{self._address.peer_id} names no address that this peer dials")
        patience_seconds = min(self._left_seconds(), OPEN_SECONDS)
        stream = await self._transport.open_stream(self._address, EDGE_PROTOCOL, patience_seconds)
        return stream, asyncio.Event()

    async def _open(self, stream: Stream) -> int:
        """Say whose values come; how many of them have come before."""
        ours = self._request
        opening = Opening(ours.trace_id, ours.part_index, self.receiver, int(self._again))
        await stream.send(encode(opening), b"", self._left_seconds())
        if not self._again:
            return 0
        came = decode((await stream.receive(self._left_seconds())).header, Resume).values
        if came > self._n_values:
            raise MalformedMessage(f"has {came} values of an edge of {self._n_values}")
        return came

    async def _value(self, at: int) -> Sendable | None:
        """The value at that place, when it has been put; None if none will be."""
        while at >= len(self._values) and not self._is_finished:
            self._news.clear()
            await self._news.wait()
        return self._values[at] if at < len(self._values) else None

    async def _send(self, stream: Stream, value: Sendable) -> None:
        if isinstance(value.message, Dropped):
            await stream.send(encode(value.message), b"", self._left_seconds())
            return
        began = self._clock()
        try:
            await send_tensor(stream, value.message, value.data, self._left_seconds())
        finally:
            self.wire_seconds += self._clock() - began
        if value.message.value == HIDDEN:
            self._hidden_bytes += len(value.data)
        else:
            self._carried_bytes += len(value.data)
