"""A transport within one process and one asyncio loop, for tests and simulation.

The same framing, the same limits and the same checks of records as over the network; streams of a
transport with a gate begin with certificates. The DHT is a dictionary that all may use. A network
can be cut between two peers, and a transport can be killed as by SIGKILL. Bytes are there at once,
unless `lanes` says otherwise.

    network = MemoryNetwork()
    alice = network.transport(Identity.generate())
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final, TypeAlias, final

from glasshive.dht.deadline import within
from glasshive.dht.errors import (
    NoDht,
    PeerUnreachable,
    TransportClosed,
    TransportError,
    TransportLost,
)
from glasshive.dht.framing import FrameLimits, Stream
from glasshive.dht.member_gate import MemberGate, reset_removed
from glasshive.dht.records import RecordGate, key_id
from glasshive.dht.serializer import MAX_DICTIONARY_ENTRIES
from glasshive.dht.serving import HandlerTasks, StreamLimits
from glasshive.dht.transport import PeerAddress, StreamHandler
from glasshive.security.envelope import PUBLIC_SWARM
from glasshive.security.keys import Identity, PeerId

__all__ = ["MemoryNetwork", "MemoryTransport"]

PIPE_BYTES: Final = 256 * 1024

Lane: TypeAlias = Callable[[Callable[[], None]], None]
"""One direction of a stream: it calls what it is given once that has come to the other side."""


def _at_once(arrive: Callable[[], None]) -> None:
    arrive()


@final
class MemoryNetwork:
    """Peers that can reach each other, and the DHT that they share.

    `lanes` gives the lane of each new stream from a peer to another; it must keep the order.
    """

    def __init__(
        self,
        *,
        swarm: str = PUBLIC_SWARM,
        clock: Callable[[], float] = time.time,
        lanes: Callable[[PeerId, PeerId], Lane] = lambda sender, receiver: _at_once,
    ) -> None:
        self.swarm = swarm
        self.clock = clock
        self._lanes = lanes
        self._gate = RecordGate(swarm)
        self._dht: dict[bytes, dict[PeerId, tuple[bytes, float]]] = {}
        self._transports: dict[PeerId, MemoryTransport] = {}
        self._cuts: set[frozenset[PeerId]] = set()
        self._made = 0

    def transport(
        self,
        identity: Identity,
        *,
        dht: bool = True,
        gate: MemberGate | None = None,
        frame_limits: FrameLimits | None = None,
        stream_limits: StreamLimits | None = None,
        ip: str = "127.0.0.1",
    ) -> MemoryTransport:
        """A transport of this network; one of the same identity is replaced."""
        self._made += 1
        address = f"/ip4/{ip}/tcp/{1024 + self._made}/p2p/{identity.peer_id}"
        made = MemoryTransport(
            self,
            identity,
            address,
            has_dht=dht,
            gate=gate,
            frame_limits=frame_limits or FrameLimits(),
            stream_limits=stream_limits or StreamLimits(),
        )
        self._transports[identity.peer_id] = made
        return made

    def cut(self, one: PeerId, other: PeerId) -> None:
        """Ends the streams between the two, and lets none be opened until `heal`."""
        self._cuts.add(frozenset((one, other)))
        for peer_id in (one, other):
            if peer_id in self._transports:
                self._transports[peer_id]._reset_streams(frozenset((one, other)) - {peer_id})

    def heal(self, one: PeerId, other: PeerId) -> None:
        """Undoes `cut`."""
        self._cuts.discard(frozenset((one, other)))

    def kill(self, peer_id: PeerId) -> None:
        """The transport is lost at once; what it stored stays until it expires."""
        self._transports[peer_id]._lose()

    def _reachable(self, caller: PeerId, target: PeerId) -> MemoryTransport | None:
        found = self._transports.get(target)
        if found is None or found._ended() or frozenset((caller, target)) in self._cuts:
            return None
        return found

    def _store(self, key: str, subkey: PeerId, value: bytes, expires_at_seconds: float) -> bool:
        now = self.clock()
        self._gate.admit(key_id(key), subkey, value, expires_at_seconds, now)
        entries = self._dht.setdefault(key_id(key), {})
        self._drop_expired(entries)
        older = entries.get(subkey)
        if expires_at_seconds < now or (older is not None and older[1] >= expires_at_seconds):
            return False
        if older is None and len(entries) >= MAX_DICTIONARY_ENTRIES:
            del entries[min(entries, key=lambda peer_id: entries[peer_id][1])]
        entries[subkey] = value, expires_at_seconds
        return True

    def _fetch(self, key: str) -> dict[PeerId, bytes]:
        entries = self._dht.get(key_id(key), {})
        self._drop_expired(entries)
        return {peer_id: value for peer_id, (value, _) in entries.items()}

    def _drop_expired(self, entries: dict[PeerId, tuple[bytes, float]]) -> None:
        now = self.clock()
        for peer_id in [one for one, (_, end) in entries.items() if end < now]:
            del entries[peer_id]


@final
class MemoryTransport:
    """One peer of a MemoryNetwork; implements `glasshive.dht.transport.Transport`."""

    def __init__(
        self,
        network: MemoryNetwork,
        identity: Identity,
        address: str,
        *,
        has_dht: bool,
        gate: MemberGate | None,
        frame_limits: FrameLimits,
        stream_limits: StreamLimits,
    ) -> None:
        """Use `MemoryNetwork.transport`."""
        self.peer_id = identity.peer_id
        self.addresses = (address,)
        self.listening = (address.rpartition("/p2p/")[0],)
        self.swarm = network.swarm
        self.lost = asyncio.Event()
        self._network = network
        self._has_dht = has_dht
        self._frame_limits = frame_limits
        self._handlers: dict[str, StreamHandler] = {}
        self._tasks = HandlerTasks(stream_limits, gate, network.clock)
        self._streams: dict[Stream, None] = {}  # in the order of their opening
        self._closed = False
        self._gate = gate
        self.members_only = gate is not None
        if gate is not None:
            gate.on_removals(lambda: reset_removed(gate, self._streams))

    async def open_stream(
        self, peer: PeerAddress, protocol: str, deadline_seconds: float
    ) -> Stream:
        """See Transport."""
        self._check_alive()
        target = self._network._reachable(self.peer_id, peer.peer_id)
        if target is None:
            raise PeerUnreachable(f"{peer.peer_id} can't be reached; try another peer")
        handler = target._handlers.get(protocol)
        if handler is None:
            raise PeerUnreachable(f"{peer.peer_id} doesn't speak {protocol}; try another peer")
        lanes = self._network._lanes
        here = _Pipe(lanes(peer.peer_id, self.peer_id))
        there = _Pipe(lanes(self.peer_id, peer.peer_id))
        mine = self._adopt(_End(here, there), peer.peer_id)
        theirs = target._adopt(_End(there, here), self.peer_id)
        target._tasks.start(theirs, handler, protocol, self.addresses[0])
        if self._gate is not None:
            what = f"opening a {protocol} stream to {peer.peer_id}"
            await within(deadline_seconds, self._gate.enter(mine, protocol), what)
        return mine

    async def serve(self, protocol: str, handler: StreamHandler) -> None:
        """See Transport."""
        self._check_alive()
        self._handlers[protocol] = handler

    async def store(
        self, key: str, subkey: PeerId, value: bytes, expires_at_seconds: float
    ) -> bool:
        """See Transport."""
        return (await self.store_many([key], subkey, value, expires_at_seconds))[key]

    async def store_many(
        self, keys: Sequence[str], subkey: PeerId, value: bytes, expires_at_seconds: float
    ) -> Mapping[str, bool]:
        """See Transport."""
        self._check_dht()
        return {key: self._network._store(key, subkey, value, expires_at_seconds) for key in keys}

    async def fetch(self, keys: Sequence[str]) -> dict[str, dict[PeerId, bytes]]:
        """See Transport."""
        self._check_dht()
        return {key: self._network._fetch(key) for key in keys}

    def now(self) -> float:
        """See Transport: the clock of the network."""
        return self._network.clock()

    async def rebuild(self) -> None:
        """After `lost`: alive again under the same identity, serving what it served."""
        if self._closed:
            raise TransportClosed("the transport was closed; make a new one")
        await self._tasks.cancel_all()
        self.lost = asyncio.Event()

    async def close(self) -> None:
        """See Transport."""
        self._closed = True
        await self._tasks.close()
        self._reset_streams(None)

    def _adopt(self, end: _End, peer_id: PeerId) -> Stream:
        stream = Stream(
            *(end.reader, end, peer_id, self._frame_limits, self._end_error),
            clock=self._network.clock,
        )
        self._streams = {one: None for one in self._streams if not one.closed}
        self._streams[stream] = None
        return stream

    def _reset_streams(self, peers: frozenset[PeerId] | None) -> None:
        for stream in self._streams:
            if peers is None or stream.peer_id in peers:
                stream.reset()

    def _lose(self) -> None:
        self.lost.set()
        self._reset_streams(None)

    def _ended(self) -> bool:
        return self._closed or self.lost.is_set()

    def _end_error(self) -> TransportError | None:
        if self._closed:
            return TransportClosed("the transport was closed; make a new one")
        if self.lost.is_set():
            return TransportLost("the transport was killed; close or rebuild it")
        return None

    def _check_alive(self) -> None:
        error = self._end_error()
        if error is not None:
            raise error

    def _check_dht(self) -> None:
        self._check_alive()
        if not self._has_dht:
            raise NoDht("this transport has no DHT node; ask a peer for its directory")


class _Pipe:
    """Bytes in one direction, bounded: one reader, one writer."""

    def __init__(self, lane: Lane) -> None:
        self._lane = lane
        self._buffer = bytearray()
        self._under_way_bytes = 0
        self._ended = False
        self._broken = False
        self._reading = False
        self._readable = asyncio.Event()
        self._writable = asyncio.Event()

    async def readexactly(self, n: int, /) -> bytes:
        while len(self._buffer) < n:
            if self._broken:
                raise ConnectionResetError
            if self._ended:
                raise asyncio.IncompleteReadError(bytes(self._buffer), n)
            await self._wait_for_more()
        return self._take(n)

    async def read(self, n: int = -1, /) -> bytes:
        while not self._buffer and not self._ended:
            if self._broken:
                raise ConnectionResetError
            await self._wait_for_more()
        return self._take(n if n >= 0 else len(self._buffer))

    async def _wait_for_more(self) -> None:
        self._readable.clear()
        self._reading = True
        self._writable.set()  # a reader that wants more than fits must not wait for ever
        try:
            await self._readable.wait()
        finally:
            self._reading = False

    def _take(self, n: int) -> bytes:
        taken = bytes(self._buffer[:n])
        del self._buffer[:n]
        self._writable.set()
        return taken

    def put(self, data: bytes) -> None:
        def arrive() -> None:
            self._under_way_bytes -= len(data)
            if not self._ended and not self._broken:
                self._buffer += data
                self._readable.set()
            self._writable.set()

        self._under_way_bytes += len(data)
        self._lane(arrive)

    def _is_full(self) -> bool:
        n_bytes = self._under_way_bytes + (0 if self._reading else len(self._buffer))
        return n_bytes > PIPE_BYTES

    async def room(self) -> None:
        while self._is_full() and not self._broken:
            self._writable.clear()
            await self._writable.wait()
        if self._broken:
            raise ConnectionResetError

    def end(self) -> None:
        """Nothing more will be written; what is there can still be read."""

        def arrive() -> None:
            self._ended = True
            self._readable.set()

        self._lane(arrive)

    def break_off_later(self) -> None:
        """`break_off`, as the reader sees it; nothing more is written."""
        self._lane(self.break_off)

    def break_off(self) -> None:
        """Nothing more can be read or written."""
        self._broken = True
        self._buffer.clear()
        self._readable.set()
        self._writable.set()


class _End:
    """One side of a link: what it reads from, and the writer of the other direction."""

    def __init__(self, reader: _Pipe, out: _Pipe) -> None:
        self.reader = reader
        self._out = out

    def write(self, data: bytes, /) -> None:
        self._out.put(data)

    async def drain(self) -> None:
        await self._out.room()

    def close(self) -> None:
        self._out.end()
        self.reader.break_off()

    async def wait_closed(self) -> None:
        return

    def abort(self) -> None:
        self._out.break_off_later()
        self.reader.break_off()
