"""A peer that was away is reached as soon as it is back: no call waits for libp2p's 5 s of backoff.

No time is asserted: with the backoff the first call after the return fails.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket

import pytest

from glasshive.dht import daemon_control
from glasshive.dht.errors import PeerUnreachable
from glasshive.dht.framing import Stream
from glasshive.dht.hivemind_transport import HivemindTransport
from glasshive.dht.transport import PeerAddress
from glasshive.security.keys import Identity

# hivemind 1.1 itself: at import, and at the start of its daemon.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:path is deprecated:DeprecationWarning"),
]


def free_port() -> int:
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        return int(trial.getsockname()[1])


async def echo(stream: Stream) -> None:
    frame = await stream.receive(10)
    await stream.send(frame.header)
    await stream.receive(10)


@pytest.mark.asyncio
async def test_who_comes_back_is_reached_by_the_next_call() -> None:
    identity, listen = Identity.generate(), f"/ip4/127.0.0.1/tcp/{free_port()}"
    there = PeerAddress(identity.peer_id, (f"{listen}/p2p/{identity.peer_id}",))
    client = await HivemindTransport.create(Identity.generate(), listen=(), dht="none")

    async def asked() -> object:
        stream = await client.open_stream(there, "echo/1", 10)
        await stream.send(7)
        answer = (await stream.receive(10)).header
        await stream.close()
        return answer

    try:
        for _ in range(2):  # a second time with a connection that has ended
            with pytest.raises(PeerUnreachable, match="connection refused"):
                await asked()
            host = await HivemindTransport.create(identity, listen=[listen], dht="none")
            try:
                await host.serve("echo/1", echo)
                assert await asked() == 7
            finally:
                await host.close()
            # A stream that is opened in the moment in which the connection ends has p2pd dial.
            async with asyncio.timeout(20):
                while await daemon_control.is_connected(client._daemon.p2p, there.peer_id):  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
    finally:
        await client.close()


@pytest.mark.asyncio
async def test_who_comes_back_behind_what_listens_is_reached_by_the_next_call() -> None:
    """A forwarded port, say, at which who is away was asked again and again."""
    identity, port = Identity.generate(), free_port()

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            writer.close()
            return
        await asyncio.gather(pump(reader, inner_writer), pump(inner_reader, writer))

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while some := await reader.read(65536):
                writer.write(some)
                await writer.drain()
        writer.close()

    server = await asyncio.start_server(forward, "127.0.0.1", 0)
    place = f"/ip4/127.0.0.1/tcp/{server.sockets[0].getsockname()[1]}"
    there = PeerAddress(identity.peer_id, (f"{place}/p2p/{identity.peer_id}",))
    client = await HivemindTransport.create(Identity.generate(), listen=(), dht="none")
    try:
        for _ in range(5):
            with pytest.raises(PeerUnreachable, match="what listens there is no peer"):
                await client.open_stream(there, "echo/1", 20)
        host = await HivemindTransport.create(
            identity, listen=[f"/ip4/127.0.0.1/tcp/{port}"], dht="none"
        )
        try:
            await host.serve("echo/1", echo)
            stream = await client.open_stream(there, "echo/1", 20)
            await stream.send(7)
            assert (await stream.receive(10)).header == 7
            await stream.close()
        finally:
            await host.close()
    finally:
        await client.close()
        server.close()


@pytest.mark.asyncio
async def test_a_client_has_no_routing_that_dials_by_itself() -> None:
    """It would look each 2 minutes after peers that it knew, and leave alone who was away then.

    Two minutes are long for a test, so this one asks for what else routing does: by way of one
    peer it finds another by the id.
    """
    at = [f"/ip4/127.0.0.1/tcp/{free_port()}"]
    one = await HivemindTransport.create(Identity.generate(), listen=at)
    other = await HivemindTransport.create(Identity.generate(), bootstraps=one.addresses)
    member = await HivemindTransport.create(
        Identity.generate(), listen=(), dht="client", bootstraps=one.addresses
    )
    client = await HivemindTransport.create(Identity.generate(), listen=(), dht="none")

    async def reach(asking: HivemindTransport, peer: PeerAddress) -> None:
        stream = await asking.open_stream(peer, "echo/1", 10)
        await stream.send(7)
        assert (await stream.receive(10)).header == 7
        await stream.close()

    try:
        for host in (one, other):
            await host.serve("echo/1", echo)
        by_id = PeerAddress(other.peer_id)
        async with asyncio.timeout(30):
            while True:
                with contextlib.suppress(PeerUnreachable):
                    await reach(member, by_id)
                    break
        await reach(client, PeerAddress.parse(one.addresses[0]))
        with pytest.raises(PeerUnreachable, match=other.peer_id):
            await reach(client, by_id)
        await reach(client, PeerAddress.parse(other.addresses[0]))
    finally:
        for transport in (client, member, other, one):
            await transport.close()


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("/ip4/127.0.0.1/tcp/9", "connection refused"),
        ("/ip6/::1/tcp/9", "connection refused|no way to that address"),
        ("/dns4/nowhere.invalid/tcp/9", r"its address leads nowhere"),
    ],
)
async def test_why_nothing_answers_is_said(address: str, why: str) -> None:
    client = await HivemindTransport.create(Identity.generate(), listen=(), dht="none")
    try:
        with pytest.raises(PeerUnreachable, match=why):
            await client.open_stream(
                PeerAddress(Identity.generate().peer_id, (address,)), "echo/1", 20
            )
    finally:
        await client.close()
