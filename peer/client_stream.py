"""The trace stream to one client, as a host sends on it: a frame that has begun is sent whole.

A cancelled `Stream.send` cuts its frame short, which ends the stream, and then the client can't be
told why its trace has failed. Here a cancelled sender stops waiting, its frame goes on, and what is
sent next, such as `Failed`, follows at the frame's end, also between two slices of a tensor.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import final

from glasshive.dht.errors import DeadlineExceeded
from glasshive.dht.framing import SEND_DEADLINE_SECONDS, Frame, Stream
from glasshive.dht.messages import ALIVE_SECONDS, Alive, encode
from glasshive.dht.outcome import forget_outcome
from glasshive.security.keys import PeerId
from glasshive.security.plain import Plain


@final
class ClientStream:
    """Any number of tasks may send, and be cancelled while they do; one at a time may receive."""

    def __init__(self, stream: Stream) -> None:
        self.peer_id: PeerId = stream.peer_id
        self.origin = stream.origin
        self._stream = stream
        self._sending: set[asyncio.Task[None]] = set()

    async def receive(self, deadline_seconds: float) -> Frame:
        """The next frame, as `Stream.receive` gives it."""
        return await self._stream.receive(deadline_seconds)

    def reset(self) -> None:
        """End the stream at once; who receives from it is told."""
        self._stream.reset()

    async def send(
        self,
        header: Plain,
        body: bytes | bytearray | memoryview = b"",
        deadline_seconds: float = SEND_DEADLINE_SECONDS,
    ) -> None:
        """Sends one frame, after those whose sending began before. Raises as `Stream.send` does."""
        sending = asyncio.create_task(self._stream.send(header, body, deadline_seconds))
        self._sending.add(sending)
        sending.add_done_callback(self._sending.discard)
        sending.add_done_callback(forget_outcome)
        await asyncio.wait({sending})  # doesn't cancel it, as awaiting it would
        sending.result()

    @contextlib.asynccontextmanager
    async def heard(self, say: Callable[[], Alive]) -> AsyncIterator[None]:
        """Inside it, the client hears every `ALIVE_SECONDS` that this host is there, and how far.

        `say` is called each time.
        """

        async def tell() -> None:
            while True:
                await asyncio.sleep(ALIVE_SECONDS)
                with contextlib.suppress(DeadlineExceeded):  # a save goes on at one that slept
                    await self.send(encode(say()))

        telling = asyncio.create_task(tell())
        # A client that left: whoever else uses the stream is told.
        telling.add_done_callback(forget_outcome)
        try:
            yield
        finally:
            telling.cancel()
