"""What goes between two peers that can't reach each other goes by way of the client.

The client opens a stream to each of the two and passes every frame on as it is; nobody opens
anything towards a client. A host takes part in that only where its client has signed that the edge
is relayed (security/requests.py). No more than a frame is held, of each direction of each edge.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Collection
from typing import Final, NamedTuple, TypeAlias, final

from glasshive.client.hop import HopReport
from glasshive.client.peer_stream import PeerStream
from glasshive.dht.errors import StreamBusy, StreamClosed, SwarmError
from glasshive.dht.framing import Frame, FrameLimits, Stream
from glasshive.dht.messages import RELAY_PROTOCOL, SLICE_BYTES, Relay, encode
from glasshive.dht.transport import Transport
from glasshive.security.keys import PeerId

__all__ = ["Pair", "Relayed", "Relays"]

BUSY_SECONDS: Final = 1.0
_LIMITS: Final = FrameLimits(header_bytes=1 << 12, body_bytes=SLICE_BYTES, header_elements=256)

Pair: TypeAlias = frozenset[PeerId]
"""Two peers that can't reach each other, though the client reaches both."""


class Relayed(NamedTuple):
    """Blocks of two peers between which the client passed on what they sent each other.

    `n_bytes` is the size of the values.
    """

    first: str
    second: str
    n_bytes: int


@final
class Relays:
    """The pairs of peers of one job between which its client relays. Belongs to the loop.

    `pairs` are known to need it. `left_seconds` is how long the job may still take, and `on_bytes`
    is told of what was passed on.
    """

    def __init__(
        self,
        transport: Transport,
        pairs: Collection[Pair],
        silence_seconds: float,
        left_seconds: Callable[[], float],
        on_bytes: Callable[[int], None],
    ) -> None:
        self._transport = transport
        self._pairs = set(pairs)
        self._silence_seconds = silence_seconds
        self._left_seconds = left_seconds
        self._on_bytes = on_bytes
        self._carriers: dict[tuple[int, int], asyncio.Task[None]] = {}  # by the edges' parts
        self.used: dict[Pair, Relayed] = {}
        """Between whom something was passed on, also where it isn't any more."""

    def add(self, one: HopReport, other: HopReport) -> bool:
        """Relay between the peers of two parts from now on; False if that was so before."""
        pair = _pair(one, other)
        is_new = pair not in self._pairs
        self._pairs.add(pair)
        return is_new

    def are_relayed(self, one: HopReport, other: HopReport) -> bool:
        """Whether the peers that two parts have now are such a pair."""
        return _pair(one, other) in self._pairs

    def forget(self, peer: PeerId) -> None:
        """Another has taken the place of this peer; whom that one reaches is not known."""
        self._pairs = {pair for pair in self._pairs if peer not in pair}

    def carry(self, one: PeerStream, other: PeerStream) -> None:
        """Pass on what goes between two parts, on new streams, if their peers are such a pair.

        `one` and `other` are their trace streams, on which both have been told of it.
        """
        if not self.are_relayed(one.hop, other.hop):
            return
        for sender, receiver in ((one, other), (other, one)):
            edge = sender.hop.part.index, receiver.hop.part.index
            if (old := self._carriers.pop(edge, None)) is not None:
                old.cancel()
            if edge[1] in sender.hop.part.receivers:
                self._carriers[edge] = asyncio.create_task(self._carry(sender, receiver, edge))

    async def close(self) -> None:
        """End every stream. Never raises."""
        for task in self._carriers.values():
            task.cancel()
        await asyncio.gather(*self._carriers.values(), return_exceptions=True)

    async def _carry(self, sender: PeerStream, receiver: PeerStream, edge: tuple[int, int]) -> None:
        with contextlib.ExitStack() as ends:
            try:
                near, first = await self._asked(sender, edge, ends)
            except StreamClosed:
                return  # it has nothing more to send, and says so itself
            except SwarmError as error:
                sender.give_up(f"no stream to it could be opened on which to relay: {error}")
                return
            # What breaks one stream ends both, and each peer says by its trace stream what it lost.
            with contextlib.suppress(SwarmError):
                far = await self._open(receiver, edge, ends)
                await self._send(first, far, sender.hop, receiver.hop)
                both = [
                    asyncio.create_task(self._pass_on(*way, sender.hop, receiver.hop))
                    for way in ((near, far), (far, near))
                ]
                try:
                    await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for task in both:
                        task.cancel()
                    await asyncio.gather(*both, return_exceptions=True)

    async def _asked(
        self, sender: PeerStream, edge: tuple[int, int], ends: contextlib.ExitStack
    ) -> tuple[Stream, Frame]:
        """A stream on which a peer sends, and what it says first: when it has something."""
        while True:
            near = await self._open(sender, edge, ends)
            with contextlib.suppress(StreamBusy):
                return near, await near.receive(self._left_seconds())
            await asyncio.sleep(BUSY_SECONDS)

    async def _open(
        self, to: PeerStream, edge: tuple[int, int], ends: contextlib.ExitStack
    ) -> Stream:
        """A stream for this edge at one of its ends."""
        stream = await self._transport.open_stream(
            to.hop.peer, RELAY_PROTOCOL, self._silence_seconds
        )
        ends.callback(stream.reset)
        stream.limits = _LIMITS
        relay = Relay(to.request.trace_id, *edge, to.revision)
        await stream.send(encode(relay), b"", self._silence_seconds)
        return stream

    async def _pass_on(
        self, source: Stream, sink: Stream, sender: HopReport, receiver: HopReport
    ) -> None:
        while True:
            frame = await source.receive(self._left_seconds())
            await self._send(frame, sink, sender, receiver)

    async def _send(
        self, frame: Frame, sink: Stream, sender: HopReport, receiver: HopReport
    ) -> None:
        await sink.send(frame.header, frame.body, self._left_seconds())
        pair, n_bytes = _pair(sender, receiver), len(frame.body)
        if (used := self.used.get(pair)) is None:
            first, second = sorted((sender, receiver), key=lambda hop: hop.part.index)
            used = Relayed(str(first.part.span), str(second.part.span), 0)
        self.used[pair] = used._replace(n_bytes=used.n_bytes + n_bytes)
        self._on_bytes(n_bytes)


def _pair(one: HopReport, other: HopReport) -> Pair:
    return frozenset((one.peer.peer_id, other.peer.peer_id))
