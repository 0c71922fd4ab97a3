"""A bootstrap that was away comes back to the swarm, though hivemind forgets peers for good."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib

import pytest

from glasshive.dht.announcer import Announcer, announce
from glasshive.dht.directory import find_records
from glasshive.dht.hivemind_transport import HivemindTransport
from glasshive.dht.records import ModelId, PeerRecord
from glasshive.dht.transport import PeerAddress
from glasshive.security.keys import Identity

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:path is deprecated:DeprecationWarning"),
]

MODEL = ModelId(hashlib.sha256(b"manifest").hexdigest())


def record(peer: HivemindTransport, identity: Identity) -> PeerRecord:
    return PeerRecord(
        model=MODEL,
        model_name="tiny",
        start=0,
        end=2,
        n_blocks=4,
        dtype="float32",
        backend="cpu",
        attention="eager",
        throughput_tokens_per_second=1.0,
        addresses=peer.addresses,
        whitelist_version=0,
        load=0.0,
        software_version="0",
        peer_id=identity.peer_id,
        expires_at_seconds=round(peer.now()) + 45.5,
    )


@pytest.mark.asyncio
async def test_a_bootstrap_that_was_forgotten_is_met_again() -> None:
    first, second = Identity.generate(), Identity.generate()
    bootstrap = await HivemindTransport.create(first)
    peer = await HivemindTransport.create(second, bootstraps=bootstrap.addresses[:1])
    try:
        assert all((await announce(peer, second, record(peer, second))).values())
        listen = bootstrap.addresses[0].rpartition("/p2p/")[0]
        await bootstrap.close()
        async with asyncio.timeout(30):
            # Calls that find nobody make hivemind forget it.
            while peer._node.protocol.routing_table.uid_to_peer_id:
                await announce(peer, second, record(peer, second))
        bootstrap = await HivemindTransport.create(first, listen=[listen])
        found = await find_records(bootstrap, None)
        assert found == []
        async with asyncio.timeout(30):
            # libp2p doesn't dial an address again within seconds of a failure.
            while not found:
                await announce(peer, second, record(peer, second))
                found = await find_records(bootstrap, None)
        assert [one.peer_id for one in found] == [second.peer_id]
    finally:
        await asyncio.gather(bootstrap.close(), peer.close())


@pytest.mark.asyncio
async def test_a_bootstrap_that_says_nothing_holds_up_no_withdrawal() -> None:
    """Seen failing: others took a host that had left for one that is there, for up to 60 s."""
    identity = Identity.generate()
    bootstrap = await HivemindTransport.create(Identity.generate())
    peer = await HivemindTransport.create(identity, bootstraps=bootstrap.addresses[:1])
    asked: list[bytes] = []

    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.read(20))
        with contextlib.suppress(ConnectionError):
            await reader.read()
        writer.close()

    try:
        announcer = Announcer(peer, identity, record(peer, identity))
        await announcer.start()
        assert len(await find_records(bootstrap, None)) == 1
        async with await asyncio.start_server(say_nothing, "127.0.0.1", 0) as silent:
            port = silent.sockets[0].getsockname()[1]
            place = f"/ip4/127.0.0.1/tcp/{port}/p2p/{Identity.generate().peer_id}"
            peer.bootstraps = (*peer.bootstraps, PeerAddress.parse(place))
            await announcer.close()
        assert asked
        assert await find_records(bootstrap, None) == []
    finally:
        await asyncio.gather(bootstrap.close(), peer.close())
