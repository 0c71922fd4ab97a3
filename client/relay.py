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
from glasshive.dht.errors import StreamBusy, SwarmError
from glasshive.dht.framing import Frame, FrameLimits, Stream
from glasshive.dht.messages import RELAY_PROTOCOL, SLICE_BYTES, Relay, decode, encode
from glasshive.dht.transport import PeerAddress, Transport
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
        self._carriers: dict[asyncio.Task[None], frozenset[int]] = {}  # with both parts
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
        """It was lost; whom its part's next peer reaches, be it itself, is not known."""
        self._pairs = {pair for pair in self._pairs if peer not in pair}

    def carry(self, one: PeerStream, other: PeerStream) -> None:
        """Pass on what goes between two parts, on new streams, if their peers are such a pair.

        `one` and `other` are their trace streams, on which both have been told of it: that older
        streams end here is no other loss to them.
        """
        parts = frozenset((one.hop.part.index, other.hop.part.index))
        for carrier, carried in self._carriers.items():
            if carried == parts:
                carrier.cancel()
        if not self.are_relayed(one.hop, other.hop):
            return
        for sender, receiver in ((one, other), (other, one)):
            if receiver.hop.part.index in sender.hop.part.receivers:
                carrier = asyncio.create_task(self._carry(_Edge(sender, receiver)))
                self._carriers[carrier] = parts
                carrier.add_done_callback(self._carriers.pop)

    async def close(self) -> None:
        """End every stream. Never raises."""
        for task in self._carriers:
            task.cancel()
        await asyncio.gather(*self._carriers, return_exceptions=True)

    async def _carry(self, edge: _Edge) -> None:
        # What breaks one stream ends both, and each peer says by its trace stream what it lost.
        with contextlib.ExitStack() as ends, contextlib.suppress(SwarmError):
            near, first = await self._asked(edge.near, ends, edge.sender)
            far, said = await self._asked(edge.far, ends)
            decode(said.header, Relay)  # so it takes what comes; before, nothing is passed on
            await self._send(first, far, edge)
            both = [
                asyncio.create_task(self._pass_on(*way, edge)) for way in ((near, far), (far, near))
            ]
            try:
                await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in both:
                    task.cancel()
                await asyncio.gather(*both, return_exceptions=True)

    async def _asked(
        self, at: _Asked, ends: contextlib.ExitStack, blamed: PeerStream | None = None
    ) -> tuple[Stream, Frame]:
        """A stream at a peer, and what it says first: who sends, when it has something.

        One that is busy is asked again and again.
        """
        while True:
            with contextlib.suppress(StreamBusy):
                stream = await self._open(at, ends, blamed)
                return stream, await stream.receive(self._left_seconds())
            await asyncio.sleep(BUSY_SECONDS)

    async def _open(
        self, at: _Asked, ends: contextlib.ExitStack, blamed: PeerStream | None
    ) -> Stream:
        """A stream for an edge at one of its peers; one who takes none may be taken for lost."""
        try:
            stream = await self._transport.open_stream(
                at.peer, RELAY_PROTOCOL, self._silence_seconds
            )
            ends.callback(stream.reset)
            stream.limits = _LIMITS
            await stream.send(encode(at.relay), b"", self._silence_seconds)
        except SwarmError as error:
            # Who was to send would wait for it to the end; who was to receive is told on by that.
            if blamed is not None and not isinstance(error, StreamBusy):
                why = f"no stream to it could be opened on which to relay: {error}"
                blamed.give_up(why, may_return=True)  # its process may just have ended
            raise
        return stream

    async def _pass_on(self, source: Stream, sink: Stream, edge: _Edge) -> None:
        while True:
            await self._send(await source.receive(self._left_seconds()), sink, edge)

    async def _send(self, frame: Frame, sink: Stream, edge: _Edge) -> None:
        await sink.send(frame.header, frame.body, self._left_seconds())
        used, n_bytes = self.used.get(edge.pair, edge.relayed), len(frame.body)
        self.used[edge.pair] = used._replace(n_bytes=used.n_bytes + n_bytes)
        self._on_bytes(n_bytes)


class _Asked(NamedTuple):
    """At whom a stream is opened, and for what."""

    peer: PeerAddress
    relay: Relay


@final
class _Edge:
    """One direction between the peers that two parts have now."""

    def __init__(self, sender: PeerStream, receiver: PeerStream) -> None:
        parts = sender.hop.part.index, receiver.hop.part.index
        self.sender = sender
        self.near, self.far = (
            _Asked(end.hop.peer, Relay(end.request.trace_id, *parts, end.revision))
            for end in (sender, receiver)
        )
        self.pair = _pair(sender.hop, receiver.hop)
        first, second = sorted((sender.hop, receiver.hop), key=lambda hop: hop.part.index)
        self.relayed = Relayed(str(first.part.span), str(second.part.span), 0)


def _pair(one: HopReport, other: HopReport) -> Pair:
    return frozenset((one.peer.peer_id, other.peer.peer_id))
