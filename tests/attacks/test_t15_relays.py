"""T15: a client passes values on between peers, and what it can't reach or be made to take so.

One real host runs part 1 of a plan of three, or part 0; the tests are its client and the other two.

Seen failing, each alone: with the client left out of `EdgeStreams.answer_relay`, the strangers;
with `relay_refusal` that is empty, and with `_opener` that gives the client, what isn't relayed;
with `_opener` that gives the peer, who else opens what is; with the trace id left out of
`EdgeStreams._receive`, the other trace; with no wait for the revision, the one that comes later;
with `OutgoingEdge` that has an address, or `find_peers` that looks for one, who is dialled; with
`relayed` left out of `TraceRequest.check_revises`, the revision; with streams that
`OutgoingEdge.forget` leaves, the end; with the role of hosts in `member_gate`, the private swarm.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator, Callable

import pytest
import pytest_asyncio
from askers import prepare_of
from one_host import CARRIED, CLIENT, OneHost, news, one_host, until, waiting

from glasshive.dht.errors import StreamClosed, StreamRefused
from glasshive.dht.framing import Stream
from glasshive.dht.memory_transport import MemoryTransport
from glasshive.dht.messages import (
    EDGE_PROTOCOL,
    RELAY_PROTOCOL,
    Cancel,
    Done,
    Lost,
    Opening,
    Received,
    Relay,
    Resume,
    Revise,
    Saved,
    Value,
    decode,
    encode,
    is_a,
)
from glasshive.dht.tensor_frames import send_tensor
from glasshive.graph.graph import Graph, Node, NodeId, Op, Ref, Save
from glasshive.graph.order import Pass, Passes, steps_of
from glasshive.graph.plan import BEFORE_PASSES, Part, Span, Stage
from glasshive.graph.sampling import Sampling
from glasshive.peer.served_model import ServedModel
from glasshive.security.requests import PlannedPeer, TraceRequest

GENERATION = Passes(tuple(steps_of(Pass((0,), 4, False, ((0, 1),)), 2, 0)))
FIRST = NodeId(0)
GIVEN = bytes(16)


def sending(*, outlives_peers: bool = False) -> Part:
    """Part 0 makes a value for part 1."""
    nodes: dict[NodeId, Node] = {FIRST: Op("full", ((4,), 7.0, CARRIED.dtype))}
    stage = Stage(BEFORE_PASSES, (FIRST,), exports=((FIRST, 1),))
    sampling = Sampling() if outlives_peers else None
    return Part(0, Span(0, 2), Graph(nodes), (stage,), {}, sampling, outlives_peers=outlives_peers)


def receiving() -> Part:
    """Part 1 of a generation saves a value of part 0."""
    graph = Graph({NodeId(1): Save(Ref(FIRST), "s")}, frozenset([FIRST]))
    stage = Stage(BEFORE_PASSES, (NodeId(1),), imports=((FIRST, 0),))
    return Part(1, Span(0, 2), graph, (stage,), {FIRST: CARRIED}, Sampling(), outlives_peers=True)


@pytest_asyncio.fixture
async def swarm(served: ServedModel) -> AsyncIterator[OneHost]:
    async with one_host(served) as made:
        yield made


async def relayed(
    swarm: OneHost, part: Part, change: Callable[[TraceRequest], TraceRequest] | None = None
) -> Stream:
    """The client's stream of a new trace of this part, whose edges with the other are relayed."""
    request, data = swarm.request(part)
    request = dataclasses.replace(request, relayed=(1 - part.index,))
    request = request if change is None else change(request)
    return await swarm.run(await swarm.send(prepare_of(CLIENT, request), data), part)


async def relay(
    swarm: OneHost, message: Relay | None = None, sender: MemoryTransport | None = None
) -> Stream:
    """A relay stream of the client's, or of `sender`: for the edge from part 0 to part 1."""
    stream = await (sender or swarm.client).open_stream(swarm.address, RELAY_PROTOCOL, 5)
    await stream.send(encode(message or Relay(swarm.trace_id, 0, 1, 0)))
    return stream


async def push(stream: Stream) -> None:
    await send_tensor(stream, Value(FIRST, BEFORE_PASSES, "float32", [4], [0]), GIVEN, 5)


async def refusal(stream: Stream) -> str:
    """With which words it is refused."""
    with pytest.raises(StreamRefused) as caught:
        await stream.receive(5)
    return str(caught.value)


async def check_saved(client: Stream) -> None:
    """The trace goes on to its end."""
    assert decode((await news(client)).header, Saved).name == "s"
    assert is_a((await news(client)).header, Done)


async def taken(stream: Stream) -> None:
    """Part 1 takes what comes by this stream."""
    assert is_a((await stream.receive(5)).header, Relay)


async def pass_on(swarm: OneHost, stream: Stream, again: int = 0) -> None:
    """What the client passes on to part 1."""
    await taken(stream)
    await stream.send(encode(Opening(swarm.trace_id, 0, 1, again)))
    if again:
        assert decode((await stream.receive(5)).header, Resume) == Resume(0)
    await push(stream)
    assert decode((await stream.receive(5)).header, Received) == Received()


@pytest.mark.asyncio
async def test_what_the_client_signed_to_be_relayed_is_taken_from_it(swarm: OneHost) -> None:
    client = await relayed(swarm, waiting())
    await pass_on(swarm, await relay(swarm))
    await check_saved(client)


@pytest.mark.asyncio
async def test_and_is_sent_by_its_stream_alone(swarm: OneHost) -> None:
    """Nobody is dialled: the request needs no record of who is reached so."""
    dialled: list[Stream] = []

    async def note(stream: Stream) -> None:
        dialled.append(stream)

    await swarm.other.serve(EDGE_PROTOCOL, note)
    client = await relayed(
        swarm,
        sending(),
        lambda one: dataclasses.replace(
            one, peers=(one.peers[0], PlannedPeer(one.peers[1].peer_id), *one.peers[2:])
        ),
    )
    stream = await relay(swarm)
    assert decode((await stream.receive(5)).header, Opening) == Opening(swarm.trace_id, 0, 1, 0)
    assert decode((await stream.receive(5)).header, Value).value == FIRST
    await stream.send(encode(Received()))
    assert is_a((await news(client)).header, Done)
    assert dialled == []


@pytest.mark.asyncio
@pytest.mark.parametrize("protocol", [EDGE_PROTOCOL, RELAY_PROTOCOL])
async def test_nobody_else_opens_what_is_relayed(swarm: OneHost, protocol: str) -> None:
    """Neither the planned peer nor another one, by any protocol; and the client's own is taken."""
    client = await relayed(swarm, waiting())
    for sender in (swarm.other, swarm.third):
        stream = await sender.open_stream(swarm.address, protocol, 5)
        is_relay = protocol == RELAY_PROTOCOL
        first = Relay if is_relay else Opening
        await stream.send(encode(first(swarm.trace_id, 0, 1, 0)))
        wanted = "no such trace of yours here" if is_relay else "gives this edge to another peer"
        assert wanted in await refusal(stream)
    await pass_on(swarm, await relay(swarm))
    await check_saved(client)


@pytest.mark.asyncio
async def test_nobody_takes_values_in_the_client_s_place(swarm: OneHost) -> None:
    client = await relayed(swarm, sending())
    for sender in (swarm.other, swarm.third):
        assert "no such trace of yours here" in await refusal(await relay(swarm, sender=sender))
    stream = await relay(swarm)
    assert is_a((await stream.receive(5)).header, Opening)
    await client.send(encode(Cancel()))


@pytest.mark.asyncio
async def test_what_is_not_relayed_is_not_the_client_s(swarm: OneHost) -> None:
    """To receive, by either protocol, or to send."""
    client = await swarm.running(waiting())
    no = "the request doesn't say that this edge is relayed"
    assert no in await refusal(await relay(swarm))
    edge = await swarm.edge(swarm.client)
    assert "the plan gives this edge to another peer" in await refusal(edge)
    edge = await swarm.edge()
    await push(edge)
    await check_saved(client)

    taken = asyncio.Event()

    async def take(stream: Stream) -> None:
        while not is_a((await stream.receive(5)).header, Value):
            pass
        await stream.send(encode(Received()))
        taken.set()

    await swarm.other.serve(EDGE_PROTOCOL, take)
    client = await swarm.running(sending())
    assert is_a((await news(client)).header, Done)
    assert taken.is_set()


@pytest.mark.asyncio
async def test_only_edges_of_the_part_are_relayed(swarm: OneHost) -> None:
    client = await relayed(swarm, waiting())
    trace = swarm.trace_id
    no = "the request doesn't say that this edge is relayed"
    for message, text in (
        (Relay(trace, 0, 2, 0), "this is part 1 of the plan"),
        (Relay(trace, 2, 1, 0), no),
        (Relay(trace, 1, 1, 0), no),
        (Relay(trace, 1, 0, 0), "the plan has no edge from part 1 to part 0"),
        (Relay(bytes(16), 0, 1, 0), "no such trace of yours here"),
    ):
        assert text in await refusal(await relay(swarm, message))
    await pass_on(swarm, await relay(swarm))
    await check_saved(client)


@pytest.mark.asyncio
async def test_a_relay_is_for_one_trace(swarm: OneHost) -> None:
    """Also of two of the same client, one of which isn't relayed."""
    direct = await swarm.running(waiting())
    other = swarm.trace_id
    client = await relayed(swarm, waiting())
    for trace in (other, bytes(16)):
        stream = await relay(swarm)
        await taken(stream)
        await stream.send(encode(Opening(trace, 0, 1, 0)))
        assert "no such trace here" in await refusal(stream)
    await pass_on(swarm, await relay(swarm))
    await check_saved(client)
    await push(await swarm.edge(opening=Opening(other, 0, 1, 0)))
    await check_saved(direct)


@pytest.mark.asyncio
@pytest.mark.parametrize("is_sender", [True, False])
async def test_a_revision_that_is_still_on_its_way_is_waited_for(
    swarm: OneHost, is_sender: bool
) -> None:
    swarm.passes = GENERATION
    part = sending(outlives_peers=True) if is_sender else receiving()
    client = await swarm.running(part)
    (trace,) = swarm.host._traces.values()
    request = trace.request
    if is_sender:  # nobody takes its values there
        assert decode((await news(client)).header, Lost) == Lost(1, 0)
    stream = await relay(swarm, Relay(swarm.trace_id, 0, 1, 1))
    later = await relay(swarm, Relay(swarm.trace_id, 0, 1, 2))
    changed = dataclasses.replace(request, revision=1, relayed=(1 - part.index,))
    await client.send(encode(Revise(changed.sign(CLIENT, time.time()), 1 - part.index)))
    if is_sender:
        assert decode((await stream.receive(5)).header, Opening).again == 1
        await stream.send(encode(Resume(0)))
        assert decode((await stream.receive(5)).header, Value).value == FIRST
        await stream.send(encode(Received()))
        assert is_a((await news(client)).header, Done)
    else:
        await pass_on(swarm, stream, again=1)
        await check_saved(client)
    with pytest.raises(StreamClosed):  # that one never came, and the trace is over
        await later.receive(5)
    await until(lambda: not swarm.host._traces)


@pytest.mark.asyncio
async def test_a_relay_ends_with_its_trace(swarm: OneHost) -> None:
    """Whether or not something was sent by it."""
    for part in (waiting(), sending()):
        client = await relayed(swarm, part)
        streams = [await relay(swarm)]
        if part.index == 0:
            streams.append(await relay(swarm))
        else:
            await streams[0].send(encode(Opening(swarm.trace_id, 0, 1, 0)))
        await until(lambda: swarm.home._tasks._open.total() == 1 + len(streams))  # noqa: B023
        await client.send(encode(Cancel()))
        for stream in streams:
            with pytest.raises(StreamClosed):
                while True:
                    await stream.receive(5)
        client.reset()
        await until(lambda: not swarm.home._tasks._open.total())


@pytest.mark.asyncio
async def test_in_a_private_swarm_a_client_relays_and_a_host_does_not(served: ServedModel) -> None:
    async with one_host(served, private=True) as swarm:
        client = await relayed(swarm, waiting())
        with pytest.raises(StreamRefused, match="not let in: this peer is a host of swarm"):
            await swarm.other.open_stream(swarm.address, RELAY_PROTOCOL, 5)
        await pass_on(swarm, await relay(swarm))
        await check_saved(client)
