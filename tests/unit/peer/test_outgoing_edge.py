"""An edge that outlives its receivers, by itself: what it says of a stream that breaks.

Seen failing: with a word for each stream that breaks.
"""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from glasshive.dht.errors import PeerUnreachable, SwarmError
from glasshive.dht.messages import Value
from glasshive.dht.transport import PeerAddress
from glasshive.peer.outgoing_edge import OutgoingEdge, Sendable
from glasshive.security.keys import Identity

THERE = PeerAddress(Identity.generate().peer_id, ("/ip4/127.0.0.1/tcp/1",))


class Nowhere:
    """A transport that opens nothing, and says so when it is let."""

    def __init__(self) -> None:
        self.asked: asyncio.Queue[asyncio.Event] = asyncio.Queue()

    async def open_stream(self, *args: Any) -> Any:
        let = asyncio.Event()
        self.asked.put_nowait(let)
        await let.wait()
        raise PeerUnreachable("nowhere")


@pytest.mark.asyncio
@pytest.mark.parametrize("is_renewed", [False, True])
async def test_a_break_just_as_a_new_stream_is_asked_for_is_no_loss(is_renewed: bool) -> None:
    """Its word would count as one of the new stream, as the revision is in force by then."""
    lost: asyncio.Queue[int] = asyncio.Queue()

    async def on_lost(receiver: int, why: SwarmError) -> None:
        lost.put_nowait(receiver)

    transport: Any = Nowhere()
    request: Any = SimpleNamespace(revision=0, trace_id=bytes(16), part_index=0)
    edge = OutgoingEdge(
        *(transport, request, 1, THERE),
        n_values=1,
        left_seconds=lambda: 60.0,
        on_lost=on_lost,
    )
    edge.put(Sendable(Value(0, 0, "int8", [1], [0]), memoryview(b"1")))
    running = asyncio.create_task(edge.run())
    async with asyncio.timeout(5):
        (await transport.asked.get()).set()
        if is_renewed:
            edge.go_on_at(THERE)
            await transport.asked.get()
            assert lost.empty()
        else:
            assert await lost.get() == 1
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
