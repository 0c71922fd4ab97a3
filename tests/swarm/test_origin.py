"""Where a stream comes from, as the network daemon says it."""

from __future__ import annotations

import asyncio

import pytest

from glasshive.dht import serving
from glasshive.dht.framing import Stream
from glasshive.dht.hivemind_transport import HivemindTransport
from glasshive.dht.transport import PeerAddress
from glasshive.security.keys import Identity


@pytest.mark.asyncio
async def test_a_stream_has_the_address_that_its_peer_called_from(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[str] = []

    def origin_of(address: str) -> str:
        told.append(address)
        return "from there"  # all of this runs on loopback, which is no origin

    monkeypatch.setattr(serving, "origin_of", origin_of)
    came: asyncio.Queue[str] = asyncio.Queue()

    async def note(stream: Stream) -> None:
        came.put_nowait(stream.origin)

    home = await HivemindTransport.create(Identity.generate(), dht="none")
    caller = await HivemindTransport.create(Identity.generate(), listen=(), dht="none")
    try:
        await home.serve("glasshive/test/1", note)
        address = PeerAddress(home.peer_id, home.addresses)
        stream = await caller.open_stream(address, "glasshive/test/1", 20)
        async with asyncio.timeout(20):
            assert await came.get() == "from there"
        stream.reset()
    finally:
        await caller.close()
        await home.close()
    assert [one.rpartition("/")[0] for one in told] == ["/ip4/127.0.0.1/tcp"]
