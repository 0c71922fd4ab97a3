"""T15: a peer of the plan, or one that isn't, pushes values where the client didn't sign an edge.

Or a client has a host dial somebody who never said to be a peer. One real host runs part 1 of a
plan of three, or part 0; the tests are its client and the other two. Each attack is refused and
named; the trace goes on, or ends with the name of who broke the protocol.

Seen failing, each alone: with the peer's id or the receiver's part left out of
`HostedTrace.refusal`, the first two tests; with the look at what is awaited, the hop that is
skipped, and at what is still to come, the one that is repeated; with traces that the host does not
forget, the edge of one that ended (and the run hung); with the sender left out of `_park_next`, the
value of another part; with `parked.done()`, the value that comes twice; with the order of passes,
or the spec, the values that break it, and with that of axes in `peer/memory_order.py`, theirs; with
the host left out of `TraceRequest`, the host that is not on the plan; with the index left out of
`Host._admitted`, the part of another; with each of four rules taken out of `check_part`, the
circles; with each comparison taken out of `planned_peers._where`, with `dialable` not asked, or
records verified as of 15 s ago, nobody who is dialled; with members dialled like the public, those
of a private swarm; with an address read as no record, the one that is no request.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import itertools
import time
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from askers import prepare_of, record_of
from one_host import (
    CARRIED,
    CLIENT,
    HOME,
    OTHER,
    PASSES,
    THIRD,
    OneHost,
    news,
    one_host,
    until,
    waiting,
)

from glasshive.dht.errors import StreamRefused
from glasshive.dht.framing import Stream
from glasshive.dht.memory_transport import MemoryTransport
from glasshive.dht.messages import (
    EDGE_PROTOCOL,
    Cancel,
    Done,
    Failed,
    Opening,
    Prepare,
    Received,
    Saved,
    Value,
    decode,
    encode,
    is_a,
)
from glasshive.dht.records import ModelId
from glasshive.dht.tensor_frames import send_tensor
from glasshive.dht.transport import PeerAddress
from glasshive.graph.dtypes import DType
from glasshive.graph.errors import BadGraph
from glasshive.graph.graph import Graph, Node, NodeId, Op, Ref, Save, Site
from glasshive.graph.plan import BEFORE_PASSES, HIDDEN, Part, Span, Stage, check_part
from glasshive.graph.plan_codec import encode_part
from glasshive.graph.tensors import TensorSpec
from glasshive.peer.served_model import ServedModel
from glasshive.security.envelope import seal
from glasshive.security.keys import Identity
from glasshive.security.plain import encode_plain
from glasshive.security.requests import PlannedPeer, TraceRequest

FIRST, LAST = NodeId(0), NodeId(2)
GIVEN = bytes(16)


def both(pass_index: int = BEFORE_PASSES) -> Part:
    """Part 1 saves, in that pass, what part 0 and part 2 send it, which are both needed first."""
    nodes: dict[NodeId, Node] = {
        NodeId(3): Save(Ref(FIRST), "first"),
        NodeId(4): Save(Ref(LAST), "last"),
    }
    stage = Stage(pass_index, tuple(nodes), imports=((FIRST, 0), (LAST, 2)))
    graph = Graph(nodes, frozenset([FIRST, LAST]))
    return Part(1, Span(0, 2), graph, (stage,), {FIRST: CARRIED, LAST: CARRIED})


@pytest_asyncio.fixture
async def swarm(served: ServedModel) -> AsyncIterator[OneHost]:
    async with one_host(served) as made:
        yield made


async def push(stream: object, value: Value, data: bytes = GIVEN) -> None:
    await send_tensor(stream, value, data, 5)  # type: ignore[arg-type]


async def refusal(swarm: OneHost, sender: MemoryTransport, opening: Opening) -> str:
    """With which words this is refused."""
    edge = await swarm.edge(sender, opening)
    with pytest.raises(StreamRefused) as caught:
        await edge.receive(5)
    return str(caught.value)


# Opening ----------------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_only_an_edge_of_the_plan_can_be_opened(swarm: OneHost) -> None:
    client = await swarm.running(both(0))
    trace = swarm.trace_id
    for sender, opening, text in (
        (swarm.client, Opening(trace, 0, 1, 0), "the plan gives this edge to another peer"),
        (swarm.third, Opening(trace, 0, 1, 0), "the plan gives this edge to another peer"),
        (swarm.other, Opening(trace, 2, 1, 0), "the plan gives this edge to another peer"),
        (swarm.other, Opening(trace, 3, 1, 0), "the plan gives this edge to another peer"),
        (swarm.other, Opening(trace, 0, 2, 0), "this is part 1 of the plan, not part 2"),
        (swarm.other, Opening(trace, 0, 0, 0), "this is part 1 of the plan, not part 0"),
        (swarm.other, Opening(bytes(16), 0, 1, 0), "no such trace here"),
    ):
        assert text in await refusal(swarm, sender, opening)
    # And nothing of it hurt the trace.
    for peer, opening, value in (
        (swarm.other, Opening(trace, 0, 1, 0), Value(FIRST, 0, "float32", [4], [0])),
        (swarm.third, Opening(trace, 2, 1, 0), Value(LAST, -1, "float32", [4], [0])),
    ):
        edge = await swarm.edge(peer, opening)
        await push(edge, value)
        assert decode((await edge.receive(5)).header, Received) == Received()
    assert [decode((await news(client)).header, Saved).name for _ in range(2)] == ["first", "last"]
    assert is_a((await news(client)).header, Done)


@pytest.mark.asyncio
async def test_of_all_openings_the_host_takes_the_edges_alone(swarm: OneHost) -> None:
    await swarm.running(both(0))
    (trace,) = swarm.host._traces.values()
    taken = [
        (sender, receiver, peer)
        for sender, receiver, peer in itertools.product(
            range(5), range(5), (HOME, CLIENT, OTHER, THIRD)
        )
        if not trace.refusal(Opening(swarm.trace_id, sender, receiver, 0), peer.peer_id)
    ]
    assert taken == [(0, 1, OTHER), (2, 1, THIRD)]


@pytest.mark.asyncio
async def test_who_has_nothing_to_send_here_skips_no_hop(swarm: OneHost) -> None:
    client = await swarm.running(waiting())  # which takes a value of part 0 alone
    text = await refusal(swarm, swarm.third, Opening(swarm.trace_id, 2, 1, 0))
    assert "the plan has no edge from part 2 to part 1" in text
    await push(await swarm.edge(), Value(0, -1, "float32", [4], [0]))
    assert decode((await news(client)).header, Saved).name == "s"


@pytest.mark.asyncio
async def test_a_hop_is_not_repeated(swarm: OneHost) -> None:
    await swarm.running(both(0))
    edge = await swarm.edge()
    await push(edge, Value(FIRST, 0, "float32", [4], [0]))
    assert decode((await edge.receive(5)).header, Received) == Received()
    await edge.close()
    (trace,) = swarm.host._traces.values()
    await until(lambda: not trace._incoming)
    text = await refusal(swarm, swarm.other, Opening(swarm.trace_id, 0, 1, 0))
    assert "nothing more is taken from part 0" in text


@pytest.mark.asyncio
async def test_an_edge_ends_with_its_trace(swarm: OneHost) -> None:
    client = await swarm.running(both(0))
    ended = swarm.trace_id
    await client.send(encode(Cancel()))
    await until(lambda: not swarm.host._traces)
    assert "no such trace here" in await refusal(swarm, swarm.other, Opening(ended, 0, 1, 0))
    await swarm.running(both(0))  # another's values are not this one's
    assert "no such trace here" in await refusal(swarm, swarm.other, Opening(ended, 0, 1, 0))


# Values -----------------------------------------------------------------------------------------


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("value", "text"),
    [
        (Value(7, 0, "float32", [4], [0]), "value 7 from part 0 is not expected"),
        (Value(LAST, -1, "float32", [4], [0]), "value 2 from part 0 is not expected"),
        (Value(HIDDEN, 0, "float32", [4], [0]), "value -1 from part 0 is not expected"),
        (Value(FIRST, 1, "float32", [4], [0]), "value 0 from part 0 in pass 1 comes after part 1 "
         "needs it, in pass 0"),
        (Value(FIRST, 0, "float32", [5], [0]), "value 0 from part 0 is float32[5]; float32[4] is "
         "on the plan"),
        (Value(FIRST, 0, "int32", [4], [0]), "value 0 from part 0 is int32[4]; float32[4] is on "
         "the plan"),
        (Value(FIRST, 0, "float32", [4], [1]), "[1] is no order of 1 axes"),
        (Value(FIRST, 0, "float32", [4], []), "[] is no order of 1 axes"),
    ],
)  # fmt: skip
async def test_a_value_is_what_the_plan_says(swarm: OneHost, value: Value, text: str) -> None:
    client = await swarm.running(both(0))
    await push(await swarm.edge(), value, bytes(4 * value.shape[0]))
    failed = decode((await news(client)).header, Failed)
    assert failed == Failed(
        "BadNeighbour", -1, f"peer {OTHER.peer_id} (part 0) broke the protocol: {text}"
    )


@pytest.mark.asyncio
async def test_bytes_that_are_no_value_break_the_protocol(swarm: OneHost) -> None:
    """Seen to be nobody's fault: the host waited on, and its log had a traceback."""
    flags = TensorSpec(DType.BOOL, (4,))
    client = await swarm.running(dataclasses.replace(both(0), specs={FIRST: flags, LAST: CARRIED}))
    await push(await swarm.edge(), Value(FIRST, 0, "bool", [4], [0]), bytes([0, 1, 2, 1]))
    failed = decode((await news(client)).header, Failed)
    assert failed == Failed(
        "BadNeighbour",
        -1,
        f"peer {OTHER.peer_id} (part 0) broke the protocol: value 0 from part 0: bool[4] holds "
        "bytes other than 0 and 1",
    )


@pytest.mark.asyncio
async def test_a_value_comes_once(swarm: OneHost) -> None:
    two = both(0)
    stage = dataclasses.replace(two.stages[0], imports=((FIRST, 0), (LAST, 0)))
    client = await swarm.running(dataclasses.replace(two, stages=(stage,)))
    edge = await swarm.edge()
    for _ in range(2):
        await push(edge, Value(FIRST, 0, "float32", [4], [0]))
    failed = decode((await news(client)).header, Failed)
    assert (failed.code, failed.node) == ("BadNeighbour", -1)
    assert failed.text.endswith("value 0 from part 0 is not expected")


@pytest.mark.asyncio
async def test_nothing_comes_back_within_a_pass(swarm: OneHost) -> None:
    client = await swarm.running(both(0))
    await push(await swarm.edge(), Value(FIRST, 0, "float32", [4], [0]))
    edge = await swarm.edge(swarm.third, Opening(swarm.trace_id, 2, 1, 0))
    await push(edge, Value(LAST, 0, "float32", [4], [0]))  # part 2 comes after part 1 in a pass
    failed = decode((await news(client)).header, Failed)
    assert failed.text == (
        f"peer {THIRD.peer_id} (part 2) broke the protocol: value 2 from part 2 in pass 0 comes "
        "after part 1 needs it, in pass 0"
    )


# The plan itself --------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_a_host_that_is_not_on_the_plan_runs_nothing(swarm: OneHost) -> None:
    request, data = swarm.request(waiting())
    peers = [list(one) for one in request.peers]
    peers[1] = [THIRD.peer_id, b""]  # which HOME is to run is another's
    body = [4, request.model_id, "float32", peers, 1, 60.0, request.part_sha256, 0, []]
    signed = seal(
        CLIENT,
        kind="trace",
        swarm=request.swarm,
        receiver=HOME.peer_id,
        request_id=request.trace_id,
        expires_at_seconds=time.time() + 30,
        body=encode_plain(body),
    )
    failed = decode((await news(await swarm.send(Prepare(signed), data))).header, Failed)
    assert failed == Failed(
        "BadEnvelope",
        -1,
        f"the plan gives part 1 to {THIRD.peer_id}, not to {HOME.peer_id}; ask the peer that the "
        "plan names",
    )


@pytest.mark.asyncio
async def test_a_part_of_another_index_is_not_run(swarm: OneHost) -> None:
    request, _ = swarm.request(waiting())
    data = encode_part(dataclasses.replace(waiting(), index=2), PASSES)
    other = dataclasses.replace(request, part_sha256=hashlib.sha256(data).digest())
    stream = await swarm.send(prepare_of(CLIENT, other), data)
    assert decode((await news(stream)).header, Failed) == Failed(
        "BadGraph", -1, "part 2, and the request is for part 1"
    )


def test_values_of_a_plan_go_in_no_circle(served: ServedModel) -> None:
    """Hidden states go to one later part, and nothing is needed before it can be made."""
    stop = served.outline.event(Site("model.layers.0", "output"))
    span, nothing = Span(0, 1), Graph({})
    for exports, text in (
        (((HIDDEN, 0),), "hidden states from part 1 to part 0"),
        (((HIDDEN, 2), (HIDDEN, 3)), "the hidden states of pass 0 go to several parts"),
    ):
        stage = Stage(0, (), exports=exports, forward=True, stop_event=stop)
        with pytest.raises(BadGraph, match=text):
            check_part(Part(1, span, nothing, (stage,), {}), PASSES, served.outline)
    on = Stage(0, (), exports=((HIDDEN, 2),), forward=True, stop_event=stop)
    check_part(Part(1, span, nothing, (on,), {}), PASSES, served.outline)
    with pytest.raises(BadGraph, match="part 2 makes this only after it is needed") as late:
        check_part(both(BEFORE_PASSES), PASSES, served.outline)
    assert late.value.node == LAST
    check_part(both(0), PASSES, served.outline)
    made = Op("full", ((4,), 7.0, CARRIED.dtype))
    itself = Stage(0, (NodeId(0),), exports=((NodeId(0), 1),))
    with pytest.raises(BadGraph, match="a part that exports to itself"):
        check_part(Part(1, span, Graph({NodeId(0): made}), (itself,), {}), PASSES, served.outline)


# Whom a host dials ------------------------------------------------------------------------------

VICTIM = "/ip4/203.0.113.7/tcp/22"
LAN = "/ip4/192.168.1.1/tcp/80"


def pushing() -> Part:
    """Part 0 makes a value for part 1, of OTHER."""
    made = Op("full", ((4,), 7.0, CARRIED.dtype))
    stage = Stage(BEFORE_PASSES, (NodeId(0),), exports=((NodeId(0), 1),))
    return Part(0, Span(0, 2), Graph({NodeId(0): made}), (stage,), {})


def dialled(swarm: OneHost, monkeypatch: pytest.MonkeyPatch) -> list[PeerAddress]:
    """Whom the host dials from now on, and where."""
    found: list[PeerAddress] = []
    open_stream = swarm.home.open_stream

    async def opened(peer: PeerAddress, protocol: str, deadline_seconds: float) -> Stream:
        found.append(peer)
        return await open_stream(peer, protocol, deadline_seconds)

    monkeypatch.setattr(swarm.home, "open_stream", opened)
    return found


def with_peer(request: TraceRequest, peer: PlannedPeer) -> TraceRequest:
    """The same plan with this in place of part 1."""
    peers = list(request.peers)
    peers[1] = peer
    return dataclasses.replace(request, peers=tuple(peers))


@pytest.mark.asyncio
async def test_a_peer_is_dialled_where_its_own_record_says(
    swarm: OneHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = dialled(swarm, monkeypatch)
    arrived = asyncio.Event()

    async def take(stream: Stream) -> None:
        await stream.receive(5)
        arrived.set()

    await swarm.other.serve(EDGE_PROTOCOL, take)
    await swarm.running(pushing())
    async with asyncio.timeout(5):
        await arrived.wait()
    assert found == [PeerAddress(OTHER.peer_id, swarm.other.addresses)]


@pytest.mark.asyncio
async def test_nobody_is_dialled_where_somebody_else_says(
    swarm: OneHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = dialled(swarm, monkeypatch)
    model = ModelId(swarm.served.manifest.model_id)
    who = f"the record of {OTHER.peer_id} in the plan"
    for record, text in (
        (b"", f"this peer is to send to {OTHER.peer_id}, whose record is not in the request"),
        (b"nothing", "record refused: not an envelope"),
        # The client's own record, under the name of another; and what it signs in that name.
        (record_of(CLIENT, [VICTIM], model=model), f"{who} is of {CLIENT.peer_id}"),
        (forged(record_of(OTHER, [VICTIM], model=model)), "record refused: the signature is not"),
        (record_of(OTHER, [VICTIM], model=model, expires_at_seconds=time.time() - 20), "expired"),
        (record_of(OTHER, [VICTIM], model=model, expires_at_seconds=time.time() + 99), "is valid"),
        (record_of(OTHER, [VICTIM]), f"{who} is of another model"),
        # Its own record, and an address at which this host, on loopback, has nothing to look for.
        (record_of(OTHER, [], model=model), f"{who} names no address that this peer dials"),
        (record_of(OTHER, [LAN], model=model), f"{who} names no address that this peer dials"),
    ):
        request, data = swarm.request(pushing())
        asked = with_peer(request, PlannedPeer(OTHER.peer_id, record))
        stream = await swarm.send(prepare_of(CLIENT, asked), data)
        failed = decode((await news(stream)).header, Failed)
        assert (failed.code, failed.node) == ("RecordRefused", -1)
        assert text in failed.text
    assert found == []


def forged(record: bytes) -> bytes:
    return record[:-1] + bytes([record[-1] ^ 1])


@pytest.mark.asyncio
async def test_a_member_sends_hosts_of_a_private_swarm_to_no_public_address(
    served: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever signed the record: that its key is a member's is nothing that a host knows."""
    async with one_host(served, private=True) as swarm:
        swarm.home.addresses = (f"/ip4/10.0.0.1/tcp/31331/p2p/{HOME.peer_id}",)
        found = dialled(swarm, monkeypatch)
        model = ModelId(swarm.served.manifest.model_id)
        fresh = Identity.generate()
        for address in ("/ip4/8.8.8.8/tcp/53", "/ip6/2600::3/tcp/53", "/ip4/127.0.0.1/tcp/22"):
            request, data = swarm.request(pushing())
            record = record_of(fresh, [address], model=model)
            asked = with_peer(request, PlannedPeer(fresh.peer_id, record))
            stream = await swarm.send(prepare_of(CLIENT, asked), data)
            failed = decode((await news(stream)).header, Failed)
            assert (failed.code, failed.text) == (
                "RecordRefused",
                f"the record of {fresh.peer_id} in the plan names no address that this peer "
                "dials: public, private and loopback ones only where it is at such an address "
                "itself; announce both hosts alike",
            )
        assert found == []


@pytest.mark.asyncio
async def test_an_address_in_a_plan_is_no_request(swarm: OneHost) -> None:
    request, data = swarm.request(pushing())
    peers = [[HOME.peer_id, b""], [OTHER.peer_id, [VICTIM]], [THIRD.peer_id, b""]]
    signed = seal(
        CLIENT,
        kind="trace",
        swarm=request.swarm,
        receiver=HOME.peer_id,
        request_id=request.trace_id,
        expires_at_seconds=time.time() + 30,
        body=encode_plain(
            [4, request.model_id, "float32", peers, 0, 60.0, request.part_sha256, 0, []]
        ),
    )
    failed = decode((await news(await swarm.send(Prepare(signed), data))).header, Failed)
    assert failed == Failed(
        "BadEnvelope", -1, "a peer of the plan is not an array of id and record"
    )
