"""The transport over hivemind: streams through the network daemon and, if wanted, a DHT node.

Rules:

1. The bounded serializer and the hardened storage are in place before any listener exists.
2. Where it listens is the rule of `addresses`. With a gate only members get in, by streams and
   calls.
3. One Ed25519 key serves the DHT, the streams and every signature.
4. Whatever is asked of hivemind goes through the daemon's `call`, with a deadline.
5. Before each store, bootstrap peers that dropped out of the routing table are met again.
6. None from hivemind's get is not "no peers": a node that knows nobody says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, final

from glasshive.dht import daemon_control, hardening, hivemind_setup, member_calls
from glasshive.dht.addresses import LOOPBACK, announced, check_places, listening_at
from glasshive.dht.errors import (
    DaemonFailed,
    ListenRefused,
    NoDht,
    NotLetIn,
    PeerUnreachable,
    RecordRefused,
    StreamBusy,
    StreamRefused,
    SwarmError,
    TransportClosed,
    TransportLost,
)
from glasshive.dht.framing import ByteReader, ByteWriter, FrameLimits, Stream
from glasshive.dht.listening import check_listening
from glasshive.dht.member_gate import MemberGate, reset_removed
from glasshive.dht.messages import MEMBERS_PROTOCOL, AskRevocations, encode
from glasshive.dht.network_daemon import CONTROL_DEADLINE_SECONDS, DhtMode, NetworkDaemon
from glasshive.dht.reasons import in_one_line, nobody_answered, why_unreachable
from glasshive.dht.records import RecordGate, key_id
from glasshive.dht.serving import HandlerTasks, StreamLimits
from glasshive.dht.transport import PeerAddress, StreamHandler, check_address
from glasshive.security.envelope import PUBLIC_SWARM
from glasshive.security.keys import Identity, PeerId

__all__ = ["HivemindTransport"]

DHT_DEADLINE_SECONDS: Final = 20.0
DHT_WAIT_SECONDS: Final = 3.0
REJOIN_DEADLINE_SECONDS: Final = 3.0
"""So long a store waits for bootstrap peers that were lost; the next one tries again, too."""
REOPEN_SECONDS: Final = 2.0


@final
class HivemindTransport:
    """Implements `glasshive.dht.transport.Transport`; made by `create`."""

    def __init__(
        self,
        identity: Identity,
        *,
        listen: tuple[str, ...],
        announce: tuple[str, ...],
        bootstraps: tuple[PeerAddress, ...],
        dht: DhtMode,
        swarm: str,
        gate: MemberGate | None,
        startup_timeout_seconds: float,
        frame_limits: FrameLimits,
        stream_limits: StreamLimits,
    ) -> None:
        """Use `create`."""
        self.peer_id = identity.peer_id
        self.swarm = swarm
        self.dht = dht
        self.bootstraps = bootstraps
        self.addresses: tuple[str, ...] = ()
        self.listening: tuple[str, ...] = ()  # where it listens, with the ports that were taken
        self._listen = listen
        self._announce = announce
        self._startup_timeout_seconds = startup_timeout_seconds
        self._frame_limits = frame_limits
        self._records = RecordGate(swarm)
        self._members = gate
        self.members_only = gate is not None
        self._tasks = HandlerTasks(stream_limits, gate)
        self._handlers: dict[str, StreamHandler] = {}
        self._streams: set[Stream] = set()
        self._daemon = NetworkDaemon(identity, startup_timeout_seconds, self._reset_streams)
        self._node: Any = None
        self._forget_gate: Callable[[], None] = lambda: None
        if gate is not None:
            self._forget_gate = gate.on_removals(lambda: reset_removed(gate, self._streams))

    @classmethod
    async def create(
        cls,
        identity: Identity,
        listen: Sequence[str] = (LOOPBACK,),
        bootstraps: Sequence[str] = (),
        dht: DhtMode = "server",
        startup_timeout_seconds: float = 60.0,
        *,
        announce: Sequence[str] = (),
        whitelisted: bool = False,
        swarm: str = PUBLIC_SWARM,
        gate: MemberGate | None = None,
        frame_limits: FrameLimits | None = None,
        stream_limits: StreamLimits | None = None,
    ) -> HivemindTransport:
        """A running transport.

        `dht` is "server" for a host or bootstrap peer, "client" to read and store without holding
        others' records, "none" for streams only, to peers whose addresses come with each. An
        empty `listen` listens nowhere; what isn't loopback takes `whitelisted` (see
        `addresses.check_places`). `announce` are the addresses under which others find it, where
        they aren't this machine's own. Bootstraps are multiaddrs that end in ``/p2p/ID``; one of
        them must answer, except with dht="none", which doesn't contact them. With a `gate` the
        swarm is private: who is no member of it opens no stream here and gets no answer of the
        DHT. Raises ListenRefused, BadAddress, DaemonFailed, PeerUnreachable, TransportLost,
        DeadlineExceeded, and StreamRefused or NotLetIn if the bootstrap peers answer and none
        lets this peer in.
        """
        check_places(listen, announce, whitelisted=whitelisted)
        self = cls(
            identity,
            listen=tuple(listen),
            announce=tuple(announce),
            bootstraps=tuple(PeerAddress.parse(address) for address in bootstraps),
            dht=dht,
            swarm=swarm,
            gate=gate,
            startup_timeout_seconds=startup_timeout_seconds,
            frame_limits=frame_limits or FrameLimits(),
            stream_limits=stream_limits or StreamLimits(),
        )
        try:
            await self._start()
        except BaseException:
            self._forget_gate()
            raise
        return self

    @property
    def lost(self) -> asyncio.Event:
        """See Transport."""
        return self._daemon.lost

    async def _start(self) -> None:
        hivemind_setup.prepare()
        from hivemind.p2p.p2p_daemon_bindings.utils import P2PDaemonError

        try:
            # With dht="none" the addresses that matter come with each stream.
            peers = self.bootstraps if self.dht != "none" else ()
            visible = await self._daemon.start(
                self._listen,
                [address for one in peers for address in one.addresses],
                announce=self._announce,
                routing=self.dht,
            )
            if self._announce:
                self.addresses, self.listening = visible, self._listen
            else:
                self.addresses = announced(visible)
                self.listening = listening_at(self._listen, visible)
            if self.dht != "none":
                if self._members is not None:
                    await self._knock()
                await self._start_node()
            for protocol, handler in self._handlers.items():
                await self._register(protocol, handler)
        except BaseException as error:
            await self._stop()
            if isinstance(error, (P2PDaemonError, RuntimeError, OSError)):
                raise self._why_not_started(error) from None
            raise

    def _why_not_started(self, error: Exception) -> SwarmError:
        """Whose fault it is: of the address, of the bootstrap peers, or of this machine."""
        said = in_one_line(error)
        if "address already in use" in said or "failed to listen" in said:
            return ListenRefused(
                f"can't listen at {', '.join(self._listen)}: {said}; end what "
                "listens there, or choose another port (0 takes a free one)"
            )
        if self.bootstraps and nobody_answered(said):
            tried = ", ".join(one.addresses[0] for one in self.bootstraps)
            return PeerUnreachable(
                f"the swarm could not be joined ({said}); bootstrap peers: {tried}; "
                "check that one of them runs"
            )
        cause = said.partition(". ")[0]  # what follows is advice to those who build hivemind
        return DaemonFailed(
            f"the network daemon (p2pd) can't be started on this machine: {cause}; it needs "
            "room in /tmp and in the folder for temporary files (TMPDIR), and hivemind installed "
            "whole (pip install --force-reinstall --no-deps hivemind)"
        )

    async def _knock(self) -> None:
        """Raise what bootstrap peers say if none lets this peer in: the DHT's calls don't tell."""
        refusals = await asyncio.gather(*map(self._refusal_of, self.bootstraps))
        for one in refusals:
            if None not in refusals and isinstance(one, StreamRefused | NotLetIn):
                raise one

    async def _refusal_of(self, bootstrap: PeerAddress) -> SwarmError | None:
        """Why `bootstrap` can't be used; None if it lets this peer in."""

        async def ask() -> None:
            stream = await self._open_stream(bootstrap, MEMBERS_PROTOCOL)
            try:
                await stream.send(encode(AskRevocations([])), b"", CONTROL_DEADLINE_SECONDS)
                await stream.receive(CONTROL_DEADLINE_SECONDS)
            finally:
                stream.reset()

        try:
            await self._daemon.call(
                ask(), CONTROL_DEADLINE_SECONDS, f"knocking at {bootstrap.peer_id}"
            )
        except StreamBusy:
            return None  # it says nothing of this peer
        except SwarmError as error:
            return error
        return None

    async def _start_node(self) -> None:
        from hivemind.dht.node import DHTNode
        from hivemind.dht.routing import DHTID

        self._node = await self._daemon.call(
            DHTNode.create(
                p2p=self._daemon.p2p,
                # From the key: a peer that comes back takes its own place in others' tables.
                node_id=DHTID.generate(self.peer_id.encode()),
                initial_peers=[one.addresses[0] for one in self.bootstraps],
                client_mode=self.dht == "client",
                record_validator=hardening.signed_record_validator(self._records, self.now),
                authorizer=member_calls.call_guard(self._members),
                wait_timeout=DHT_WAIT_SECONDS,
                # Caches would keep what a stranger claims; see glasshive.dht.hardening.
                cache_locally=False,
                cache_nearest=0,
                cache_on_store=False,
                cache_refresh_before_expiry=0,
                reuse_get_requests=False,
            ),
            self._startup_timeout_seconds,
            "joining the DHT",
        )
        hardening.harden_node(self._node)

    async def open_stream(
        self, peer: PeerAddress, protocol: str, deadline_seconds: float
    ) -> Stream:
        """See Transport."""
        self._check_alive()
        return await self._daemon.call(
            self._open_stream(peer, protocol),
            deadline_seconds,
            f"opening a {protocol} stream to {peer.peer_id}",
        )

    async def _open_stream(self, peer: PeerAddress, protocol: str) -> Stream:
        from hivemind.p2p.p2p_daemon_bindings.utils import P2PDaemonError

        for address in peer.addresses:
            check_address(address)
        try:
            p2p = self._daemon.p2p
            connected = bool(peer.addresses) and await daemon_control.is_connected(
                p2p, peer.peer_id
            )
            if peer.addresses and not connected:
                await self._connect(peer)
            try:
                # Without a connection a daemon with routing searches that for the peer, for long if
                # one of those that it asks is frozen.
                async with asyncio.timeout(REOPEN_SECONDS if connected else None):
                    reader, writer = await daemon_control.open_stream(p2p, peer.peer_id, protocol)
            except (P2PDaemonError, TimeoutError):
                if not connected:
                    raise
                # The connection may have ended just now: make it again, once.
                await self._connect(peer)
                reader, writer = await daemon_control.open_stream(p2p, peer.peer_id, protocol)
        except (P2PDaemonError, OSError, EOFError, ValueError) as error:
            raise PeerUnreachable(
                f"{peer.peer_id} can't be reached for {protocol}: {why_unreachable(str(error))}"
            ) from None
        stream = self._adopt(reader, writer, peer.peer_id)
        if self._members is not None:
            await self._members.enter(stream, protocol)
        return stream

    async def _connect(self, peer: PeerAddress) -> None:
        await check_listening(peer.addresses)
        await daemon_control.connect(self._daemon.p2p, peer.peer_id, peer.addresses)

    async def serve(self, protocol: str, handler: StreamHandler) -> None:
        """See Transport."""
        self._check_alive()
        known = protocol in self._handlers
        self._handlers[protocol] = handler
        if not known:
            await self._register(protocol, handler)

    async def _register(self, protocol: str, handler: StreamHandler) -> None:
        async def accept(info: Any, reader: Any, writer: Any) -> None:
            remote = PeerId(info.peer_id.to_base58())
            stream = self._adopt(reader, daemon_control.SocketWriter(writer), remote)
            current = self._handlers.get(protocol, handler)
            task = self._tasks.start(stream, current, protocol, str(info.addr))
            if task is not None:
                await asyncio.wait({task})

        await self._daemon.call(
            self._daemon.p2p.add_binary_stream_handler(protocol, accept),
            CONTROL_DEADLINE_SECONDS,
            f"serving {protocol}",
        )

    async def store(
        self, key: str, subkey: PeerId, value: bytes, expires_at_seconds: float
    ) -> bool:
        """See Transport."""
        return (await self.store_many([key], subkey, value, expires_at_seconds))[key]

    async def store_many(
        self, keys: Sequence[str], subkey: PeerId, value: bytes, expires_at_seconds: float
    ) -> Mapping[str, bool]:
        """See Transport."""
        node = self._dht_node()
        for key in keys:
            self._records.admit(key_id(key), subkey, value, expires_at_seconds, self.now())
        await self._rejoin(node)
        stored = await self._daemon.call(
            node.store_many(
                [key.encode() for key in keys],
                [value] * len(keys),
                [expires_at_seconds] * len(keys),
                subkeys=[subkey] * len(keys),
            ),
            DHT_DEADLINE_SECONDS,
            "storing a record",
        )
        return {key: bool(stored[key.encode(), subkey]) for key in keys}

    async def _rejoin(self, node: Any) -> None:
        """Makes itself known again to bootstrap peers that the DHT node has lost sight of.

        hivemind forgets a peer that doesn't answer and never asks it again: a swarm whose
        bootstrap was away for some minutes would stay in pieces.
        """
        known = {one.to_base58() for one in node.protocol.routing_table.uid_to_peer_id.values()}
        lost = [one for one in self.bootstraps if one.peer_id not in known]
        if not lost:
            return
        tries = [asyncio.ensure_future(self._meet(node, one)) for one in lost]
        try:
            await asyncio.wait(tries, timeout=REJOIN_DEADLINE_SECONDS)
        finally:
            for one in tries:
                self._daemon.abandon(one)

    async def _meet(self, node: Any, bootstrap: PeerAddress) -> None:
        from hivemind.p2p import PeerID

        peer_id = PeerID.from_base58(bootstrap.peer_id)
        await self._connect(bootstrap)
        dht_id = await node.protocol.call_ping(peer_id)
        if dht_id is not None:
            await node.protocol.update_routing_table(dht_id, peer_id, responded=True)

    async def fetch(self, keys: Sequence[str]) -> dict[str, dict[PeerId, bytes]]:
        """See Transport."""
        node = self._dht_node()
        found = await self._daemon.call(
            # get_many has no `latest`: an expiry that nothing reaches asks every replica.
            node.get_many([key.encode() for key in keys], sufficient_expiration_time=math.inf),
            DHT_DEADLINE_SECONDS,
            "reading records",
        )
        if self.bootstraps and not node.protocol.routing_table.uid_to_peer_id:
            raise PeerUnreachable(
                "no peer of the DHT answers any more; check the network, or rebuild the transport"
            )
        return {key: self._admitted(key, found.get(key.encode())) for key in keys}

    def _admitted(self, key: str, found: Any) -> dict[PeerId, bytes]:
        """What may be used of hivemind's answer for one key."""
        if found is None or not isinstance(found.value, dict):
            return {}
        now = self.now()
        records: dict[PeerId, bytes] = {}
        for subkey, (value, expires_at_seconds) in found.value.items():
            if expires_at_seconds < now or type(value) is not bytes:
                continue
            with contextlib.suppress(RecordRefused):
                self._records.admit(key_id(key), subkey, value, expires_at_seconds, now)
                records[subkey] = value
        return records

    def now(self) -> float:
        """See Transport: hivemind's DHT time, which is this machine's clock."""
        return time.time()

    async def rebuild(self) -> None:
        """See Transport."""
        if self._daemon.closed:
            raise TransportClosed("the transport was closed; make a new one")
        await self._tasks.cancel_all()
        await self._stop()
        self._daemon.lost = asyncio.Event()
        self._listen = self.listening or self._listen
        try:
            await self._start()
        except BaseException:
            self.lost.set()  # there is no daemon: calls say so, and the owner tries again
            raise

    async def close(self) -> None:
        """See Transport."""
        if self._daemon.closed:
            return
        self._daemon.closed = True
        self._forget_gate()
        await self._tasks.close()
        await self._stop()

    async def _stop(self) -> None:
        """Ends the node and the daemon, dead or alive; never raises."""
        self._reset_streams()
        p2p = self._daemon.release()
        node, self._node = self._node, None
        if node is not None:
            node.is_alive = False
            if not self.lost.is_set():
                await self._daemon.quietly(node.shutdown())
        await self._daemon.end(p2p)

    def _adopt(self, reader: ByteReader, writer: ByteWriter, peer_id: PeerId) -> Stream:
        stream = Stream(reader, writer, peer_id, self._frame_limits, self._daemon.end_error)
        self._streams = {one for one in self._streams if not one.closed}
        self._streams.add(stream)
        return stream

    def _reset_streams(self) -> None:
        for stream in self._streams:
            stream.reset()
        self._streams.clear()

    def _check_alive(self) -> None:
        error = self._daemon.end_error()
        if error is not None:
            raise error
        if self._daemon.p2p is None:
            raise TransportLost("the network daemon is being started again; try again in a moment")

    def _dht_node(self) -> Any:
        self._check_alive()
        if self._node is None:
            raise NoDht("this transport has no DHT node; ask a peer for its directory")
        return self._node
