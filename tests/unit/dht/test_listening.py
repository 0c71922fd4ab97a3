"""What is looked at before the network daemon dials, and what is left to it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest

from glasshive.dht.listening import check_listening
from glasshive.security.keys import Identity

GREETING = b"\x13/multistream/1.0.0\n"
PEER = Identity.generate().peer_id


@pytest.fixture
def closed() -> Iterator[int]:
    """A port of this machine at which nobody listens."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


@asynccontextmanager
async def listening(says: bytes, *, first: bool = True, ends: bool = True) -> AsyncIterator[int]:
    """The port of what `says` so much to whom comes, unasked if `first`, and then hangs up."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not first:
            assert await reader.readexactly(len(GREETING)) == GREETING
        writer.write(says)
        if not ends:
            await reader.read()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server, asyncio.timeout(20):
        yield server.sockets[0].getsockname()[1]


@pytest.mark.asyncio
@pytest.mark.parametrize("first", [True, False])
async def test_one_address_at_which_a_peer_greets_will_do(closed: int, first: bool) -> None:
    """Some libp2ps wait to be greeted before they do."""
    at = "/ip4/127.0.0.1/tcp/{}".format
    async with listening(GREETING, first=first) as port, listening(b"") as other:
        await check_listening([at(closed), at(other), f"{at(port)}/p2p/{PEER}"])
        with pytest.raises(OSError, match="what listens there is no peer of a swarm"):
            await check_listening([at(closed), at(other)])
    with pytest.raises(OSError, match="Connection refused"):
        await check_listening([at(closed)])


@pytest.mark.asyncio
async def test_what_is_no_peer_is_not_dialled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is a forwarded port whose peer is away: libp2p would not dial it when it returns."""
    for says in (b"", GREETING[:-1], b"SSH-2.0-OpenSSH_9.6 and much more\r\n"):
        async with listening(says) as port:
            with pytest.raises(OSError, match="what listens there is no peer of a swarm"):
                await check_listening([f"/ip4/127.0.0.1/tcp/{port}"])
    monkeypatch.setattr("glasshive.dht.listening.GREETING_SECONDS", 0.05)
    async with listening(GREETING[:-1], ends=False) as port:
        with pytest.raises(OSError, match="no answer in time"):
            await check_listening([f"/ip4/127.0.0.1/tcp/{port}"])


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", ["dns", "dns4", "dns6"])
async def test_a_name_is_left_to_the_daemon(
    kind: str, closed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It asks all addresses of a name at a time, of the family that is meant, and the first one may
    be a black hole.
    """
    asked: list[object] = []

    async def open_connection(host: str, port: int) -> object:
        asked.append(host)
        raise OSError("nobody is to be asked")

    monkeypatch.setattr(asyncio, "open_connection", open_connection)
    tcp = f"/ip4/127.0.0.1/tcp/{closed}"
    name = f"/{kind}/localhost/tcp/{closed}"
    greets_otherwise = [f"/ip4/127.0.0.1/udp/{closed}/quic-v1", f"{tcp}/ws"]
    for one in (name, *greets_otherwise):
        await check_listening([one])
        await check_listening([tcp, one])
    assert asked == []
