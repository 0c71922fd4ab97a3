"""The network of a simulation: how long bytes take, who is cut off, and what the DHT gets wrong.

What goes over a stream comes late, or the stream breaks, but no frame comes twice or before an
earlier one: libp2p's streams are ordered and reliable as TCP is, and so are those of every
transport here. Streams know nothing of each other: of two, the later may be the quicker. Records in
the DHT have no such order: they are found late, doubled behind newer ones, stale, or not at all.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from glasshive.dht.deadline import within
from glasshive.dht.framing import Stream
from glasshive.dht.memory_transport import MemoryNetwork, MemoryTransport
from glasshive.dht.transport import PeerAddress, StreamHandler
from glasshive.security.keys import Identity, PeerId

__all__ = ["EPOCH_SECONDS", "Air", "SkewedTransport", "Weather"]

EPOCH_SECONDS: Final = 1_800_000_000.0
DHT_SECONDS: Final = 10.0
_ROUNDING_SECONDS: Final = 1e-9


@dataclass(frozen=True)
class Weather:
    """How bad the network is. Probabilities are of each message, or of each record."""

    latency_seconds: float = 0.02  # the median of one way
    slow: float = 0.0  # a message that takes 50 times as long
    breaks: float = 0.0  # a message that breaks its stream, or all between the two peers
    skew_seconds: float = 0.0  # of a peer's clock, at most, either way
    stores_late: float = 0.0  # a record that is stored some seconds after it was announced
    stores_twice: float = 0.0  # and again, maybe behind newer ones
    stale: float = 0.0  # a record of which an older one is found
    unseen: float = 0.0  # a record that is not found


class Air:
    """What is between the peers. All that arrives is told to `hear`, to compare two runs."""

    def __init__(self, rng: random.Random, weather: Weather, hear: Callable[..., None]) -> None:
        self.weather = weather
        self.network = MemoryNetwork(
            clock=self.now, lanes=lambda sender, receiver: _Lane(self, sender, receiver).carry
        )
        self.hear = hear
        self._rng = rng
        self._loop = asyncio.get_running_loop()
        self._apart: list[tuple[frozenset[PeerId], frozenset[PeerId]]] = []
        self._held: dict[_Lane, None] = {}
        self._told: dict[tuple[str, PeerId], list[tuple[bytes, float]]] = {}

    def now(self) -> float:
        """The true time."""
        return EPOCH_SECONDS + self._loop.time()

    def transport(self, identity: Identity, *, dht: bool) -> SkewedTransport:
        """A transport of a peer whose clock is wrong, and stays so."""
        skew = random.Random(identity.peer_id).uniform(-1, 1) * self.weather.skew_seconds
        return SkewedTransport(self, self.network.transport(identity, dht=dht), skew)

    # Who reaches whom -----------------------------------------------------------------------

    def part(self, some: Sequence[PeerId], others: Sequence[PeerId]) -> Callable[[], None]:
        """Hold back all that these send each other, until what is returned is called."""
        apart = frozenset(some), frozenset(others)
        self._apart.append(apart)

        def heal() -> None:
            self._apart.remove(apart)
            held, self._held = self._held, {}
            for lane in held:
                lane.go_on()

        return heal

    def held_back(self, lane: _Lane) -> bool:
        """Whether its two peers are apart; if so, it goes on when somebody is healed."""
        one, other = lane.sender, lane.receiver
        apart = any(
            (one in some and other in others) or (other in some and one in others)
            for some, others in self._apart
        )
        if apart:
            self._held[lane] = None
        return apart

    def message_seconds(self) -> float:
        """How long one takes."""
        seconds = self.weather.latency_seconds * self._rng.lognormvariate(0, 0.5)
        return seconds * (50 if self._rng.random() < self.weather.slow else 1)

    def may_break(self, one: PeerId, other: PeerId) -> None:
        """At each message: in bad weather some stream breaks, mostly one between two hosts.

        One to a client costs it a try, and after some of these nothing more is seen.
        """
        transports = self.network._transports
        are_hosts = transports[one]._has_dht and transports[other]._has_dht
        if self._rng.random() < self.weather.breaks * (1 if are_hosts else 0.1):
            self.break_some(one, other)

    def break_some(self, one: PeerId, other: PeerId) -> None:
        """End a stream between the two, or all."""
        streams = self.network._transports[one]._streams
        between = [stream for stream in streams if stream.peer_id == other and not stream.closed]
        if between and self._rng.random() < 0.5:
            between = [self._rng.choice(between)]
        for stream in between:
            self.hear("broken", one, other)
            stream.reset()

    async def there_and_back(self, one: PeerId, other: PeerId) -> None:
        """Returns when a message has gone to the other one, and its answer has come."""
        came = asyncio.Event()
        back = _Lane(self, other, one)
        _Lane(self, one, other).carry(lambda: back.carry(came.set))
        await came.wait()

    async def reach_dht(self, peer: PeerId) -> None:
        """The same to one of those who keep the DHT."""
        others = [
            one.peer_id
            for one in self.network._transports.values()
            if one._has_dht and not one._ended()
        ]
        await within(DHT_SECONDS, self.there_and_back(peer, self._rng.choice(others)), "the DHT")

    # What the DHT gets wrong ----------------------------------------------------------------

    def store(self, key: str, peer: PeerId, value: bytes, expires_at_seconds: float) -> bool:
        """Store a record, now or later, once or twice."""
        told = self._told.setdefault((key, peer), [])
        told.append((value, expires_at_seconds))
        del told[:-3]
        late = self._rng.random() < self.weather.stores_late
        if late or self._rng.random() < self.weather.stores_twice:
            again = (self.network._store, key, peer, value, expires_at_seconds)
            self._loop.call_later(self._rng.uniform(0.1, 30), *again)
        return late or self.network._store(key, peer, value, expires_at_seconds)

    def fetch(self, key: str) -> dict[PeerId, bytes]:
        """What is found under a key: in any order, some of it not the newest, some not at all."""
        there = list(self.network._fetch(key).items())
        self._rng.shuffle(there)
        return {
            peer: self._perhaps_older(key, peer, value)
            for peer, value in there
            if self._rng.random() >= self.weather.unseen
        }

    def _perhaps_older(self, key: str, peer: PeerId, value: bytes) -> bytes:
        live = [one for one, end in self._told.get((key, peer), ()) if end > self.now()]
        return self._rng.choice(live) if live and self._rng.random() < self.weather.stale else value


class _Lane:
    """One direction of one stream: what it carries comes late, and in order."""

    def __init__(self, air: Air, sender: PeerId, receiver: PeerId) -> None:
        self._air = air
        self.sender = sender
        self.receiver = receiver
        self._carried: deque[tuple[float, Callable[[], None]]] = deque()
        self._last_at = 0.0

    def carry(self, arrive: Callable[[], None]) -> None:
        """See `memory_transport.Lane`."""
        loop = self._air._loop
        self._last_at = max(self._last_at, loop.time() + self._air.message_seconds())
        self._carried.append((self._last_at, arrive))
        loop.call_at(self._last_at, self.go_on)

    def go_on(self) -> None:
        """Have all arrive that is due, unless the two peers are apart."""
        if not self._carried or self._air.held_back(self):
            return
        now = self._air._loop.time() + _ROUNDING_SECONDS
        while self._carried and self._carried[0][0] <= now:
            _, arrive = self._carried.popleft()
            self._air.hear("arrived", self.sender, self.receiver)
            arrive()
        self._air.may_break(self.sender, self.receiver)


class SkewedTransport:
    """A MemoryTransport in the air, with a clock of its own. Implements Transport."""

    def __init__(self, air: Air, inner: MemoryTransport, skew_seconds: float) -> None:
        self.inner = inner
        self._air = air
        self._skew_seconds = skew_seconds

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def now(self) -> float:
        """The time that this peer takes it to be."""
        return self._air.now() + self._skew_seconds

    async def open_stream(
        self, peer: PeerAddress, protocol: str, deadline_seconds: float
    ) -> Stream:
        """See Transport: after a message there and back."""
        self.inner._check_alive()
        reached = self._air.there_and_back(self.peer_id, peer.peer_id)
        await within(deadline_seconds, reached, f"dialling {peer.peer_id}")
        return await self.inner.open_stream(peer, protocol, deadline_seconds)

    async def serve(self, protocol: str, handler: StreamHandler) -> None:
        """See Transport."""
        await self.inner.serve(protocol, handler)

    async def store_many(
        self, keys: Sequence[str], subkey: PeerId, value: bytes, expires_at_seconds: float
    ) -> Mapping[str, bool]:
        """See Transport."""
        self.inner._check_dht()
        await self._air.reach_dht(self.peer_id)
        return {key: self._air.store(key, subkey, value, expires_at_seconds) for key in keys}

    async def fetch(self, keys: Sequence[str]) -> dict[str, dict[PeerId, bytes]]:
        """See Transport."""
        self.inner._check_dht()
        await self._air.reach_dht(self.peer_id)
        return {key: self._air.fetch(key) for key in keys}
