"""What is looked at before the network daemon dials, and what is left to it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator

import pytest

from glasshive.dht.listening import check_listening


@pytest.fixture
def closed() -> Iterator[int]:
    """A port of this machine at which nobody listens."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


@pytest.mark.asyncio
async def test_one_address_that_answers_will_do(closed: int) -> None:
    server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
    async with server, asyncio.timeout(10):
        port = server.sockets[0].getsockname()[1]
        await check_listening([f"/ip4/127.0.0.1/tcp/{closed}", f"/ip4/127.0.0.1/tcp/{port}"])
    with pytest.raises(OSError, match="Connection refused"):
        await check_listening([f"/ip4/127.0.0.1/tcp/{closed}"])


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
    await check_listening([f"/{kind}/localhost/tcp/{closed}"])
    await check_listening([f"/ip4/127.0.0.1/tcp/{closed}", f"/{kind}/localhost/tcp/{closed}"])
    await check_listening([f"/ip4/127.0.0.1/udp/{closed}/quic-v1"])
    assert asked == []
