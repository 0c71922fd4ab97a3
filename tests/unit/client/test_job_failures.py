"""What a peer's failure, or its silence, becomes at the client: whom it blames, in which words."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import pytest

from glasshive.client.errors import PeerBusy, PeerFailed, PeerLost, TraceTimeout
from glasshive.client.job import HopReport, Job, _failure
from glasshive.dht.framing import Stream
from glasshive.dht.memory_transport import MemoryNetwork
from glasshive.dht.messages import (
    TRACE_PROTOCOL,
    Accepted,
    Alive,
    Done,
    Failed,
    Need,
    Prepare,
    Run,
    decode,
    encode,
)
from glasshive.dht.transport import PeerAddress
from glasshive.graph.graph import Graph
from glasshive.graph.order import Passes
from glasshive.graph.plan import HIDDEN, Part, Plan, Span, Stage
from glasshive.security.keys import Identity

ONE, TWO, THREE = (PeerAddress(Identity.generate().peer_id) for _ in range(3))
STAGE = Stage(0, (), exports=((HIDDEN, 1),), forward=True)
HOP = HopReport(ONE, Part(0, Span(0, 2), Graph({}), (STAGE,), {}))


def test_a_lost_neighbour_is_the_one_to_avoid() -> None:
    said = Failed("NeighbourLost", -1, f"peer {TWO.peer_id} (part 1) was lost: gone")
    error = _failure(HOP, said, [ONE, TWO, THREE])
    assert isinstance(error, PeerLost)
    assert error.peer == TWO.peer_id


def test_nobody_speaks_of_a_peer_that_it_has_nothing_to_do_with() -> None:
    said = Failed("NeighbourLost", -1, f"peer {THREE.peer_id} (part 2) was lost: gone")
    error = _failure(HOP, said, [ONE, TWO, THREE])
    assert isinstance(error, PeerLost)
    assert error.peer == ONE.peer_id


def test_a_busy_peer_is_avoided_itself() -> None:
    error = _failure(HOP, Failed("Busy", -1, "16 traces are running here"), [ONE, TWO])
    assert isinstance(error, PeerBusy)
    assert error.peer == ONE.peer_id


def test_a_peer_s_text_cannot_steer_the_terminal() -> None:
    error = _failure(HOP, Failed("\x1b[2J", 7, "\x1b]0;owned\x07 no"), [ONE, TWO])
    assert isinstance(error, PeerFailed)
    assert error.node == 7
    assert (error.code + str(error)).isprintable()


# What a peer does, over the memory transport ---------------------------------------------------


async def ran(
    peer: Callable[[Stream], Awaitable[None]], *, silence_seconds: float, deadline_seconds: float
) -> Job:
    """A job of one part without nodes, on a peer that behaves so."""
    network = MemoryNetwork()
    home, client = network.transport(Identity.generate()), network.transport(Identity.generate())
    await home.serve(TRACE_PROTOCOL, peer)
    job = Job(
        transport=client,
        plan=Plan(Passes(()), (Part(0, Span(0, 2), Graph({}), (), {}),)),
        peers=[PeerAddress(home.peer_id, home.addresses)],
        model_id="ab",
        dtype="float32",
        inputs=(),
        consts={},
        expected={},
        trace_id=bytes(16),
        deadline_seconds=deadline_seconds,
        silence_seconds=silence_seconds,
    )
    try:
        await job.run()
    finally:
        for transport in (client, home):
            await transport.close()
    return job


async def prepared(stream: Stream) -> None:
    decode((await stream.receive(5)).header, Prepare)
    await stream.send(encode(Need([])))
    await stream.send(encode(Accepted(0, 0, 0)))
    decode((await stream.receive(5)).header, Run)


@pytest.mark.asyncio
async def test_a_silent_peer_is_lost() -> None:
    async def frozen(stream: Stream) -> None:
        await prepared(stream)
        await asyncio.Event().wait()

    text = (
        r"blocks 0:2\) has been silent for 0.2 s while it ran its part: it is frozen, or the netw"
    )
    with pytest.raises(PeerLost, match=text):
        await ran(frozen, silence_seconds=0.2, deadline_seconds=30)


@pytest.mark.asyncio
async def test_a_peer_that_never_answers_is_lost() -> None:
    async def mute(stream: Stream) -> None:
        await asyncio.Event().wait()

    with pytest.raises(PeerLost, match=r"silent for 0.2 s while it was asked to prepare"):
        await ran(mute, silence_seconds=0.2, deadline_seconds=30)


@pytest.mark.asyncio
async def test_a_slow_peer_that_is_heard_is_waited_for() -> None:
    async def slow(stream: Stream) -> None:
        await prepared(stream)
        for _ in range(20):  # longer than the silence that is allowed
            await stream.send(encode(Alive()))
            await asyncio.sleep(0.05)
        await stream.send(encode(Done(1.0, [])))
        await asyncio.Event().wait()

    job = await ran(slow, silence_seconds=0.5, deadline_seconds=30)
    assert job.state == "done"


@pytest.mark.asyncio
async def test_a_deadline_names_who_was_still_at_work() -> None:
    async def endless(stream: Stream) -> None:
        await prepared(stream)
        while True:
            await stream.send(encode(Alive()))
            await asyncio.sleep(0.05)

    with pytest.raises(TraceTimeout, match=r"still at work: 12D3KooW\w+ \(blocks 0:2, running\)"):
        await ran(endless, silence_seconds=5, deadline_seconds=2)


@pytest.mark.asyncio
async def test_a_client_that_stood_still_blames_nobody() -> None:
    async def heard(stream: Stream) -> None:
        await prepared(stream)
        # The client's own process is stopped, and the peer's words pile up meanwhile.
        asyncio.get_running_loop().call_later(0.05, time.sleep, 1.5)
        for _ in range(8):
            await asyncio.sleep(0.1)
            await stream.send(encode(Alive()))
        await stream.send(encode(Done(1.0, [])))
        await asyncio.Event().wait()

    job = await ran(heard, silence_seconds=0.5, deadline_seconds=30)
    assert job.state == "done"
