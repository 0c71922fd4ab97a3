"""What a peer's failure, or its silence, becomes at the client: whom it blames, in which words."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from askers import Sent, done_of, prepare_of

from glasshive.client import job as job_module
from glasshive.client.errors import (
    BadAnswer,
    ClientError,
    NoRoute,
    PeerBusy,
    PeerError,
    PeerFailed,
    PeerLost,
    TraceTimeout,
)
from glasshive.client.hop import HopReport
from glasshive.client.job import Job
from glasshive.client.peer_stream import blaming, failure_of
from glasshive.client.step_watch import STEP_LIMITS, StepLimits
from glasshive.dht.errors import StreamBusy
from glasshive.dht.framing import Stream
from glasshive.dht.memory_transport import MemoryNetwork, MemoryTransport
from glasshive.dht.messages import (
    AT_WORK,
    ITS_TURN,
    SLICE_BYTES,
    TRACE_PROTOCOL,
    Accepted,
    Alive,
    Done,
    Failed,
    Lost,
    More,
    Need,
    Prepare,
    Revise,
    Run,
    Saved,
    decode,
    encode,
)
from glasshive.dht.tensor_frames import send_tensor
from glasshive.dht.transport import PeerAddress
from glasshive.graph.dtypes import DType
from glasshive.graph.graph import Graph, NodeId, Ref, Save
from glasshive.graph.order import Passes
from glasshive.graph.plan import HIDDEN, Part, Plan, Span, Stage
from glasshive.graph.tensors import TensorSpec
from glasshive.security.errors import BadEnvelope
from glasshive.security.keys import Identity
from glasshive.security.requests import PlannedPeer, TraceRequest
from glasshive.security.results import Traffic

HOST, OTHER, CLIENT = (Identity.generate() for _ in range(3))
ONE, TWO, THREE = (PeerAddress(Identity.generate().peer_id) for _ in range(3))
STAGE = Stage(0, (), exports=((HIDDEN, 1),), forward=True)
HOPS = [
    HopReport(one, Part(i, Span(2 * i, 2 * i + 2), Graph({}), (STAGE,), {}))
    for i, one in enumerate((ONE, TWO, THREE))
]
HOP = HOPS[0]


def test_a_lost_neighbour_is_the_one_to_avoid() -> None:
    said = Failed("NeighbourLost", -1, f"peer {TWO.peer_id} (part 1) was lost: gone")
    error = failure_of(HOP, said, HOPS)
    assert isinstance(error, PeerLost)
    assert error.peer == TWO.peer_id
    assert str(error) == (  # the lost one first, with its blocks
        f"peer {TWO.peer_id} (blocks 2:4): peer {ONE.peer_id} (blocks 0:2) says: {said.text}"
    )


def test_nobody_speaks_of_a_peer_that_it_has_nothing_to_do_with() -> None:
    said = Failed("NeighbourLost", -1, f"peer {THREE.peer_id} (part 2) was lost: gone")
    error = failure_of(HOP, said, HOPS)
    assert isinstance(error, PeerLost)
    assert error.peer == ONE.peer_id


def test_a_busy_peer_is_avoided_itself() -> None:
    error = failure_of(HOP, Failed("Busy", -1, "16 traces are running here"), HOPS)
    assert isinstance(error, PeerBusy)
    assert error.peer == ONE.peer_id


def test_a_peer_that_takes_no_stream_now_is_busy_and_not_lost() -> None:
    with pytest.raises(PeerBusy) as caught, blaming(HOP, 12.0, "while it was asked to prepare"):
        raise StreamBusy("it refused the stream: busy: 64 streams of yours are open, close some")
    assert caught.value.peer == ONE.peer_id
    assert str(caught.value) == (
        f"peer {ONE.peer_id} (blocks 0:2) is busy: it refused the stream: busy: 64 streams of "
        "yours are open, close some"
    )
    error = failure_of(
        HOP, Failed("NeighbourBusy", -1, f"peer {TWO.peer_id} (part 1) is busy"), HOPS
    )
    assert isinstance(error, PeerBusy)
    assert error.peer == TWO.peer_id


def test_a_peer_s_text_cannot_steer_the_terminal() -> None:
    error = failure_of(HOP, Failed("\x1b[2J", 7, "\x1b]0;owned\x07 no"), HOPS)
    assert isinstance(error, PeerFailed)
    assert error.node == 7
    assert (error.code + str(error)).isprintable()


# What a peer does, over the memory transport ---------------------------------------------------


def job_of(
    client: MemoryTransport,
    peers: Sequence[PeerAddress],
    parts: tuple[Part, ...],
    *,
    silence_seconds: float,
    deadline_seconds: float,
    expected: Mapping[str, TensorSpec] | None = None,
    clock: Callable[[], float] = time.monotonic,
    step_limits: StepLimits = STEP_LIMITS,
    trace_id: bytes = bytes(16),
) -> Job:
    return Job(
        transport=client,
        identity=CLIENT,
        plan=Plan(Passes(()), parts),
        peers=list(peers),
        records=[b""] * len(peers),
        model_id="ab",
        dtype="float32",
        inputs=(),
        consts={},
        expected=expected or {},
        trace_id=trace_id,
        deadline_seconds=deadline_seconds,
        silence_seconds=silence_seconds,
        step_limits=step_limits,
        clock=clock,
    )


def part_of(index: int, saved: Iterable[str]) -> Part:
    """A part that saves values of these names, in no stage."""
    nodes = {NodeId(i): Save(Ref(NodeId(0)), name) for i, name in enumerate(saved, 1)}
    return Part(index, Span(2 * index, 2 * index + 2), Graph(nodes), (), {})


async def ran(
    peer: Callable[[Stream], Awaitable[None]],
    *,
    silence_seconds: float,
    deadline_seconds: float,
    expected: Mapping[str, TensorSpec] | None = None,
    clock: Callable[[], float] = time.monotonic,
    step_limits: StepLimits = STEP_LIMITS,
) -> Job:
    """A job of one part, whose saves are those expected, on a peer that behaves so."""
    network = MemoryNetwork()
    home, client = network.transport(HOST), network.transport(CLIENT)
    await home.serve(TRACE_PROTOCOL, peer)
    job = job_of(
        client,
        [PeerAddress(home.peer_id, home.addresses)],
        (part_of(0, expected or {}),),
        silence_seconds=silence_seconds,
        deadline_seconds=deadline_seconds,
        expected=expected,
        clock=clock,
        step_limits=step_limits,
    )
    try:
        await job.run()
    finally:
        for transport in (client, home):
            await transport.close()
    return job


async def prepared(stream: Stream) -> Prepare:
    prepare = decode((await stream.receive(5)).header, Prepare)
    await stream.send(encode(Need([])))
    await stream.send(encode(Accepted(0, 0, 0)))
    decode((await stream.receive(5)).header, Run)
    return prepare


async def say_done(stream: Stream, prepare: Prepare, *sent: Sent, host: Identity = HOST) -> None:
    await stream.send(encode(done_of(host, CLIENT.peer_id, prepare, *sent)))


@pytest.mark.asyncio
async def test_a_failure_in_place_of_a_tensor_s_next_slice_is_heard() -> None:
    async def failing(stream: Stream) -> None:
        await prepared(stream)
        await stream.send(encode(Saved("s", "int8", [3 * SLICE_BYTES])), bytes(SLICE_BYTES))
        await stream.send(encode(More()), bytes(SLICE_BYTES))
        await stream.send(encode(Alive()))
        await stream.send(encode(Failed("ShapeMismatch", 7, "index out of range")))
        await asyncio.Event().wait()

    with pytest.raises(PeerFailed, match="index out of range") as caught:
        await ran(
            failing,
            silence_seconds=5,
            deadline_seconds=30,
            expected={"s": TensorSpec(DType.INT8, (3 * SLICE_BYTES,))},
        )
    assert (caught.value.code, caught.value.node) == ("ShapeMismatch", 7)


@pytest.mark.asyncio
async def test_another_frame_in_place_of_a_slice_is_a_bad_answer() -> None:
    async def confused(stream: Stream) -> None:
        prepare = await prepared(stream)
        await stream.send(encode(Saved("s", "int8", [3 * SLICE_BYTES])), bytes(SLICE_BYTES))
        await say_done(stream, prepare)
        await asyncio.Event().wait()

    with pytest.raises(BadAnswer, match="got Done; More is wanted here"):
        await ran(
            confused,
            silence_seconds=5,
            deadline_seconds=30,
            expected={"s": TensorSpec(DType.INT8, (3 * SLICE_BYTES,))},
        )


@pytest.mark.asyncio
@pytest.mark.parametrize("code", ["NeighbourLost", "BadNeighbour"])
@pytest.mark.parametrize("speaks", [True, False])
async def test_a_peer_that_another_blames_is_heard_out(code: str, speaks: bool) -> None:
    """Its neighbour is quicker to say that it is gone than it is to say why."""
    network = MemoryNetwork()
    first, second, client = (network.transport(one) for one in (HOST, OTHER, CLIENT))
    blamed = asyncio.Event()

    async def failing(stream: Stream) -> None:
        await prepared(stream)
        await blamed.wait()
        for _ in range(10):  # it has something else to say before
            await stream.send(encode(Alive()))
            await asyncio.sleep(0.01)
        if speaks:
            await stream.send(encode(Failed("ShapeMismatch", 7, "index out of range")))
        while True:
            await stream.send(encode(Alive()))
            await asyncio.sleep(0.1)

    async def neighbour(stream: Stream) -> None:
        await prepared(stream)
        await stream.send(encode(Failed(code, -1, f"peer {first.peer_id} (part 0) was lost")))
        blamed.set()
        await asyncio.Event().wait()

    await first.serve(TRACE_PROTOCOL, failing)
    await second.serve(TRACE_PROTOCOL, neighbour)
    peers = [PeerAddress(one.peer_id, one.addresses) for one in (first, second)]
    one = Part(0, Span(0, 2), Graph({}), (Stage(0, (), exports=((HIDDEN, 1),)),), {})
    two = Part(1, Span(2, 4), Graph({}), (Stage(0, (), imports=((HIDDEN, 0),)),), {})
    job = job_of(client, peers, (one, two), silence_seconds=1.0, deadline_seconds=30)
    with pytest.raises(PeerError) as caught:
        await job.run()
    assert caught.value.peer == first.peer_id
    if speaks:
        assert isinstance(caught.value, PeerFailed)
        assert caught.value.node == 7
    else:
        assert isinstance(caught.value, PeerLost if code == "NeighbourLost" else BadAnswer)
    for transport in (client, first, second):
        await transport.close()


@pytest.mark.asyncio
@pytest.mark.parametrize("last", [False, True])
async def test_no_peer_answers_for_another(last: bool) -> None:
    """Whoever sends another's save is to blame, whether or not that one sends its own."""
    network = MemoryNetwork()
    liar, honest, client = (network.transport(one) for one in (HOST, OTHER, CLIENT))
    hers = asyncio.Event()

    async def lies(stream: Stream) -> None:
        await prepared(stream)
        if last:
            await hers.wait()
        await stream.send(encode(Saved("hers", "int8", [2])), bytes([6, 6]))
        await asyncio.Event().wait()

    async def answers(stream: Stream) -> None:
        prepare = await prepared(stream)
        await stream.send(encode(Saved("hers", "int8", [2])), bytes([1, 2]))
        await say_done(stream, prepare, ("hers", "int8", [2], bytes([1, 2])), host=OTHER)
        hers.set()

    await liar.serve(TRACE_PROTOCOL, lies)
    await honest.serve(TRACE_PROTOCOL, answers)
    job = job_of(
        client,
        [PeerAddress(one.peer_id, one.addresses) for one in (liar, honest)],
        (part_of(0, ["his"]), part_of(1, ["hers"])),
        silence_seconds=5,
        deadline_seconds=30,
        expected=dict.fromkeys(("his", "hers"), TensorSpec(DType.INT8, (2,))),
    )
    with pytest.raises(
        BadAnswer, match=r"blocks 0:2\): sent 'hers' as int8\[2\]; nothing"
    ) as caught:
        await job.run()
    assert caught.value.peer == liar.peer_id
    assert "his" not in job.saves
    assert job.saves.get("hers") is None or job.saves["hers"].tolist() == [1, 2]
    for transport in (client, liar, honest):
        await transport.close()


@pytest.mark.asyncio
async def test_bytes_that_are_no_tensor_are_a_bad_answer() -> None:
    async def garbles(stream: Stream) -> None:
        await prepared(stream)
        await stream.send(encode(Saved("s", "bool", [2])), bytes([1, 2]))
        await asyncio.Event().wait()

    with pytest.raises(BadAnswer, match=r"blocks 0:2\): sent 's': bool\[2\] holds bytes other"):
        await ran(
            garbles,
            silence_seconds=5,
            deadline_seconds=30,
            expected={"s": TensorSpec(DType.BOOL, (2,))},
        )


@pytest.mark.asyncio
async def test_a_deadline_that_passes_right_after_a_loss_is_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Seen to end as a cancellation by nobody, while the client looked at its own daemon."""
    monkeypatch.setattr(job_module, "OWN_DAEMON_SECONDS", 60.0)

    async def leaves(stream: Stream) -> None:
        await prepared(stream)
        stream.reset()

    with pytest.raises(TraceTimeout, match=r"not done in the 0\.5 s that it had"):
        await ran(leaves, silence_seconds=5, deadline_seconds=0.5)


@pytest.mark.asyncio
async def test_a_host_that_ends_a_trace_by_a_limit_of_its_own_is_said_to() -> None:
    """Seen to tell the user, who had allowed an hour, to allow more."""

    async def ends(stream: Stream) -> None:
        await prepared(stream)
        text = "the trace's deadline passed; allow more time with deadline="
        await stream.send(encode(Failed("TraceEnded", -1, text)))
        await asyncio.Event().wait()

    wanted = (
        rf"peer {HOST.peer_id} \(blocks 0:2\) ended the trace after .* s by a limit of its own, "
        r"before the deadline of 3600 s was over"
    )
    with pytest.raises(TraceTimeout, match=wanted):
        await ran(ends, silence_seconds=5, deadline_seconds=3600)


@pytest.mark.asyncio
async def test_a_save_that_never_comes_is_its_own_peer_s_fault() -> None:
    async def forgets(stream: Stream) -> None:
        prepare = await prepared(stream)
        await say_done(stream, prepare)

    with pytest.raises(BadAnswer, match=r"said that it is done, but \['s'\] never came"):
        await ran(
            forgets,
            silence_seconds=5,
            deadline_seconds=30,
            expected={"s": TensorSpec(DType.INT8, (2,))},
        )


SAVES = {"s": TensorSpec(DType.INT8, (2 * SLICE_BYTES,)), "t": TensorSpec(DType.INT8, (2,))}
LARGE = bytes(range(256)) * (2 * SLICE_BYTES // 256)
SENT = [("s", "int8", [2 * SLICE_BYTES], LARGE), ("t", "int8", [2], b"tt")]


async def answered(done: Callable[[Stream, Prepare], bytes]) -> Job:
    """A job whose peer sends both saves, and then this as its result."""

    async def answers(stream: Stream) -> None:
        prepare = await prepared(stream)
        for name, dtype, shape, data in SENT:
            await send_tensor(stream, Saved(name, dtype, list(shape)), data, 5)
        await stream.send(encode(Done(done(stream, prepare))))
        await asyncio.Event().wait()

    return await ran(answers, silence_seconds=5, deadline_seconds=30, expected=SAVES)


@pytest.mark.asyncio
async def test_a_signed_result_of_what_came_is_taken() -> None:
    def done(stream: Stream, prepare: Prepare) -> bytes:
        traffic = [Traffic(1, 100, 8), Traffic(2, 0, 16)]
        return done_of(HOST, stream.peer_id, prepare, *SENT, traffic=traffic).result

    job = await answered(done)
    assert {name: bytes(one.numpy()) for name, one in job.saves.items()} == {
        "s": LARGE,
        "t": b"tt",
    }
    (hop,) = job.hops
    assert (hop.hidden_bytes, hop.carried_bytes, hop.compute_seconds) == (100, 24, 1.0)
    assert (hop.state, hop.audited) == ("done", False)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "sent",
    [
        [("s", "int8", [2 * SLICE_BYTES], LARGE[:-1] + b"!"), SENT[1]],
        [SENT[0], ("t", "int8", [2], b"t!")],
        [SENT[1], SENT[0]],
        [SENT[0]],
        [SENT[0], ("t", "int8", [2, 1], b"tt")],
    ],
    ids=["last slice", "second save", "order", "one fewer", "shape"],
)
async def test_other_values_than_the_peer_signed_are_a_bad_answer(sent: list[Sent]) -> None:
    def done(stream: Stream, prepare: Prepare) -> bytes:
        return done_of(HOST, stream.peer_id, prepare, *sent).result

    text = (
        r"blocks 0:2\): its result can't be taken: the saves that came are not those whose hash "
        "the result signs$"
    )
    with pytest.raises(BadAnswer, match=text) as caught:
        await answered(done)
    assert caught.value.peer == HOST.peer_id


@pytest.mark.asyncio
@pytest.mark.parametrize("lie", ["other host", "other request", "not signed", "nonsense"])
async def test_a_result_of_another_or_for_another_is_a_bad_answer(lie: str) -> None:
    def done(stream: Stream, prepare: Prepare) -> bytes:
        stock = done_of(HOST, stream.peer_id, prepare, *SENT).result
        if lie == "not signed":
            return stock[:-1] + bytes([stock[-1] ^ 1])
        if lie == "nonsense":
            return b"done"
        request, _ = TraceRequest.verify(
            prepare.request, client=CLIENT.peer_id, host=HOST.peer_id, swarm="public",
            now=time.time(),
        )  # fmt: skip
        if lie == "other request":  # which the same client has asked of it
            again = prepare_of(CLIENT, dataclasses.replace(request, deadline_seconds=7.0))
            return done_of(HOST, CLIENT.peer_id, again, *SENT).result
        hers = dataclasses.replace(request, host=OTHER.peer_id, peers=(PlannedPeer(OTHER.peer_id),))
        return done_of(OTHER, CLIENT.peer_id, prepare_of(CLIENT, hers), *SENT).result

    text = {
        "other host": f"a result by {OTHER.peer_id} of trace 0+; wanted {HOST.peer_id}'s",
        "other request": "the result is signed for another request than the one that was sent",
        "not signed": "the signature is not by",
        "nonsense": "not an envelope",
    }[lie]
    with pytest.raises(BadAnswer, match=f"its result can't be taken: {text}"):
        await answered(done)


@pytest.mark.asyncio
async def test_a_plan_of_too_many_peers_is_nobody_s_fault() -> None:
    network = MemoryNetwork()
    client = network.transport(CLIENT)
    peers = [PeerAddress(HOST.peer_id)] * 257
    job = job_of(client, peers, (part_of(0, []),), silence_seconds=1, deadline_seconds=5)
    with pytest.raises(BadEnvelope, match="a plan of 257 peers, wanted 1 to 256"):
        await job.run()
    await client.close()


@pytest.mark.asyncio
async def test_whom_nobody_listened_to_while_another_prepared_was_not_silent() -> None:
    network = MemoryNetwork()
    homes, client = [network.transport(one) for one in (HOST, OTHER)], network.transport(CLIENT)
    now, shown = [0.0], []

    async def until(condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(5):
            while not condition():  # noqa: ASYNC110 (the job tells nobody)
                await asyncio.sleep(0.001)

    async def first(stream: Stream) -> None:
        prepare = decode((await stream.receive(5)).header, Prepare)
        await stream.send(encode(Need([])))
        await stream.send(encode(Accepted(7, 0, 0)))
        decode((await stream.receive(5)).header, Run)
        await until(lambda: job.hops[0].state == "running")
        shown.append(job.hops[0].doing(job.hops, now[0] + 2.9))
        shown.append(job.hops[0].doing(job.hops, now[0] + 3))
        await say_done(stream, prepare)
        await asyncio.Event().wait()

    async def second(stream: Stream) -> None:
        await until(lambda: job.hops[0].peak_bytes == 7)
        now[0] += 10
        await say_done(stream, await prepared(stream), host=OTHER)
        await asyncio.Event().wait()

    for home, peer in zip(homes, (first, second), strict=True):
        await home.serve(TRACE_PROTOCOL, peer)
    job = job_of(
        client,
        [PeerAddress(one.peer_id, one.addresses) for one in homes],
        (part_of(0, ()), part_of(1, ())),
        silence_seconds=5,
        deadline_seconds=30,
        clock=lambda: now[0],
    )
    await job.run()
    assert shown == ["at work", "silent for 3 s"]
    for transport in (client, *homes):
        await transport.close()


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
        prepare = await prepared(stream)
        for _ in range(20):  # longer than the silence that is allowed
            await stream.send(encode(Alive()))
            await asyncio.sleep(0.05)
        await say_done(stream, prepare)
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

    with pytest.raises(TraceTimeout, match=r"not done: 12D3KooW\w+ \(blocks 0:2, at work\)"):
        await ran(endless, silence_seconds=5, deadline_seconds=2)
    with pytest.raises(TraceTimeout, match="not done"):  # by a timer that is quicker
        await ran(endless, silence_seconds=5, deadline_seconds=0.2, clock=lambda: 0.0)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("said", "kind", "text"),
    [
        (Lost(1, 0), BadAnswer, "lost part 1, and its part doesn't outlive that"),
        (Failed("NeighbourLost", -1, f"peer {OTHER.peer_id} (part 1) was lost"), PeerLost, "says"),
        (Failed("NeighbourBusy", -1, f"peer {OTHER.peer_id} is busy"), PeerBusy, "says"),
        (Failed("BadNeighbour", -1, f"peer {OTHER.peer_id} lies"), BadAnswer, "says"),
    ],
)
async def test_nobody_speaks_of_others_before_its_part_runs(
    said: object, kind: type[PeerError], text: str
) -> None:
    """Seen failing: with `Lost` heard, which had the client wait for itself to the deadline, and
    with others blamed, which left out a good peer and asked the liar again."""

    async def hasty(stream: Stream) -> None:
        await stream.receive(5)
        await stream.send(encode(said))
        await asyncio.Event().wait()

    async def mute(stream: Stream) -> None:
        await asyncio.Event().wait()

    network = MemoryNetwork()
    homes, client = [network.transport(one) for one in (HOST, OTHER)], network.transport(CLIENT)
    for home, peer in zip(homes, (hasty, mute), strict=True):
        await home.serve(TRACE_PROTOCOL, peer)
    first = Part(0, Span(0, 2), Graph({}), (STAGE,), {}, outlives_peers=True)
    job = job_of(
        client,
        [PeerAddress(home.peer_id, home.addresses) for home in homes],
        (first, part_of(1, ())),
        silence_seconds=5,
        deadline_seconds=30,
    )
    with pytest.raises(kind, match=text) as caught:
        await job.run()
    assert caught.value.peer == HOST.peer_id
    for transport in (client, *homes):
        await transport.close()


@pytest.mark.asyncio
async def test_a_client_that_stood_still_blames_nobody() -> None:
    async def heard(stream: Stream) -> None:
        prepare = await prepared(stream)
        # The client's own process is stopped, and the peer's words pile up meanwhile.
        asyncio.get_running_loop().call_later(0.05, time.sleep, 1.5)
        for _ in range(8):
            await asyncio.sleep(0.1)
            await stream.send(encode(Alive()))
        await say_done(stream, prepare)
        await asyncio.Event().wait()

    job = await ran(heard, silence_seconds=0.5, deadline_seconds=30)
    assert job.state == "done"


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("said", "text"),
    [
        (Lost(1, 1), "lost part 1 in revision 1 of its request, of which 0 is the last"),
        (Lost(2, 0), "lost part 2, with which it has nothing to do"),
    ],
)
async def test_a_loss_that_can_not_be_is_a_bad_answer(said: Lost, text: str) -> None:
    async def confused(stream: Stream) -> None:
        await prepared(stream)
        await stream.send(encode(said))
        await asyncio.Event().wait()

    async def mute(stream: Stream) -> None:
        await prepared(stream)
        await asyncio.Event().wait()

    network = MemoryNetwork()
    homes, client = [network.transport(one) for one in (HOST, OTHER)], network.transport(CLIENT)
    for home, peer in zip(homes, (confused, mute), strict=True):
        await home.serve(TRACE_PROTOCOL, peer)
    stage = Stage(0, (), exports=((HIDDEN, 1),))
    first = Part(0, Span(0, 2), Graph({}), (stage,), {}, outlives_peers=True)
    job = job_of(
        client,
        [PeerAddress(home.peer_id, home.addresses) for home in homes],
        (first, part_of(1, ())),
        silence_seconds=5,
        deadline_seconds=30,
    )
    with pytest.raises(BadAnswer, match=text) as caught:
        await job.run()
    assert caught.value.peer == HOST.peer_id
    for transport in (client, *homes):
        await transport.close()


@pytest.mark.asyncio
@pytest.mark.parametrize("may_return", [True, False])
async def test_who_was_only_not_reached_may_return(may_return: bool) -> None:
    """As by a relay that is first to see that it has died; not who is given up for what it did."""
    network = MemoryNetwork()
    home, client = network.transport(HOST), network.transport(CLIENT)

    async def waits(stream: Stream) -> None:
        await prepared(stream)
        job._streams[0].give_up("no stream to it could be opened", may_return=may_return)
        await asyncio.Event().wait()

    shown: list[str] = []

    async def nobody(part: int, receivers: object) -> Any:
        shown.append(job.hops[0].doing(job.hops, job.clock() + 12))
        raise NoRoute("nobody else")

    await home.serve(TRACE_PROTOCOL, waits)
    job = job_of(
        client,
        [PeerAddress(home.peer_id, home.addresses)],
        (dataclasses.replace(part_of(0, ()), outlives_peers=True),),
        silence_seconds=5,
        deadline_seconds=30,
    )
    job.stand_in, job.most_moves = nobody, 1
    with pytest.raises(PeerLost, match="no stream to it could be opened"):
        await job.run()
    assert (job._left_out.left_seconds(home.peer_id) > 0) == may_return
    waits_for = "waiting 12 of 25 s for it or another" if may_return else "looking for another"
    assert shown == [f"lost; {waits_for}"]
    for transport in (client, home):
        await transport.close()


@pytest.mark.asyncio
@pytest.mark.parametrize("is_busy", [True, False], ids=["busy", "lost"])
async def test_a_stand_in_that_ran_nothing_is_no_retry(is_busy: bool) -> None:
    """Seen to end as lost, with the one retry used up by a refusal, or by one that had died."""
    network = MemoryNetwork()
    homes, client = [network.transport(one) for one in (HOST, OTHER)], network.transport(CLIENT)
    asked: list[int] = []
    shown: list[str] = []

    async def dies(stream: Stream) -> None:
        await prepared(stream)
        stream.reset()

    async def busy_at_first(stream: Stream) -> None:
        shown.append(job.hops[0].doing(job.hops, job.clock()))
        asked.append(len(asked))
        if len(asked) <= 3:
            await stream.receive(5)
            if not is_busy:
                stream.reset()
                return
            await stream.send(encode(Failed("Busy", -1, "16 traces are running here")))
            await asyncio.Event().wait()
        await say_done(stream, await prepared(stream), host=OTHER)
        await asyncio.Event().wait()

    async def other(part: int, receivers: object) -> Any:
        home = homes[1]
        shown.append(job.hops[0].doing(job.hops, job.clock()))
        address = {"peer_id": home.peer_id, "addresses": home.addresses}
        return SimpleNamespace(**address, backend="cpu", signed=b"")

    for home, peer in zip(homes, (dies, busy_at_first), strict=True):
        await home.serve(TRACE_PROTOCOL, peer)
    job = job_of(
        client,
        [PeerAddress(homes[0].peer_id, homes[0].addresses)],
        (dataclasses.replace(part_of(0, ()), outlives_peers=True),),
        silence_seconds=5,
        deadline_seconds=30,
    )
    job.stand_in, job.most_moves = other, 1
    await job.run()
    assert len(asked) == 4
    assert job.moves == 1
    assert [(one.by, one.backend) for one in job.replaced] == [(homes[1].peer_id, "cpu")]
    assert shown == [
        *("lost; looking for another", "preparing"),
        *([f"{'busy' if is_busy else 'lost'}; looking for another", "preparing"] * 3),
    ]
    for transport in (client, *homes):
        await transport.close()


@pytest.mark.asyncio
async def test_peers_are_shown_the_records_of_now() -> None:
    """They live for a minute, and a stand-in may take longer to accept its part.

    Seen to show those of when it was chosen, which the others refuse then.
    """
    third = Identity.generate()
    network = MemoryNetwork()
    homes = [network.transport(one) for one in (HOST, OTHER, third)]
    client = network.transport(CLIENT)
    known = {OTHER.peer_id: b"of the second, later"}
    shown: list[bytes] = []

    def show(data: bytes) -> None:
        sides: Any = {"client": CLIENT.peer_id, "host": HOST.peer_id, "swarm": client.swarm}
        request, _ = TraceRequest.verify(data, **sides, now=time.time())
        shown.append(request.peers[1].record)

    async def first(stream: Stream) -> None:
        show((await prepared(stream)).request)
        show(decode((await stream.receive(5)).header, Revise).request)
        await stream.send(encode(Failed("ShapeMismatch", 7, "enough")))
        await asyncio.Event().wait()

    async def dies(stream: Stream) -> None:
        await prepared(stream)
        stream.reset()

    async def stands_in(stream: Stream) -> None:
        known[third.peer_id] = b"of the third, later"
        await prepared(stream)
        await asyncio.Event().wait()

    async def other(part: int, receivers: object) -> Any:
        address = {"peer_id": third.peer_id, "addresses": homes[2].addresses}
        return SimpleNamespace(**address, backend="cpu", signed=b"of the third")

    for home, peer in zip(homes, (first, dies, stands_in), strict=True):
        await home.serve(TRACE_PROTOCOL, peer)
    parts = tuple(dataclasses.replace(one, outlives_peers=True) for one in (FIRST, SECOND))
    addresses = [PeerAddress(one.peer_id, one.addresses) for one in homes[:2]]
    job = job_of(client, addresses, parts, silence_seconds=5, deadline_seconds=30)
    job.stand_in, job.most_moves, job.known = other, 1, lambda: known
    with pytest.raises(PeerFailed, match="enough"):
        await job.run()
    assert shown == [b"of the second, later", b"of the third, later"]
    for transport in (client, *homes):
        await transport.close()


# Peers that are there and do nothing -----------------------------------------------------------

BRIEF = StepLimits(least_seconds=0.4)
FIRST = Part(0, Span(0, 2), Graph({}), (Stage(0, (), exports=((HIDDEN, 1),)),), {})
SECOND = Part(1, Span(2, 4), Graph({}), (Stage(0, (), imports=((HIDDEN, 0),)),), {})


async def idle(first: Alive, second: Alive, **options: Any) -> Any:
    """What a job ends with whose two peers say this on and on, once they run."""
    network = MemoryNetwork()
    homes = [network.transport(one) for one in (HOST, OTHER)]
    client = network.transport(CLIENT)
    for home, word in zip(homes, (first, second), strict=True):

        async def says(stream: Stream, word: Alive = word) -> None:
            await prepared(stream)
            while True:
                await stream.send(encode(word))
                await asyncio.sleep(0.05)

        await home.serve(TRACE_PROTOCOL, says)
    peers = [PeerAddress(one.peer_id, one.addresses) for one in homes]
    options = {"silence_seconds": 5, "deadline_seconds": 60, "step_limits": BRIEF, **options}
    job = job_of(client, peers, (FIRST, SECOND), **options)
    with pytest.raises(ClientError) as caught:
        await job.run()
    for transport in (client, *homes):
        await transport.close()
    return caught.value


@pytest.mark.asyncio
async def test_a_peer_that_is_there_and_does_nothing_is_lost() -> None:
    """And not the one that waits for it. Seen failing without `on_idle`."""
    error = await idle(Alive(0, 3, AT_WORK), Alive(0, 0, 0))
    assert isinstance(error, PeerLost)
    assert error.peer == HOST.peer_id
    assert "(blocks 0:2) was lost while it ran its part: it has got no further in 0.4" in str(error)
    error = await idle(Alive(1, 3, 1), Alive(0, 0, AT_WORK))
    assert error.peer == OTHER.peer_id


@pytest.mark.asyncio
async def test_of_two_that_do_not_agree_chance_names_one() -> None:
    """A trace is run again without it, and then it may be the other."""
    blamed = set()
    for trace_id in (bytes(16), b"\1" * 16):
        error = await idle(Alive(1, 3, 1), Alive(0, 0, 0), trace_id=trace_id)
        assert isinstance(error, PeerLost)
        assert "have not agreed on what has come" in str(error)
        blamed.add(error.peer)
    assert blamed == {HOST.peer_id, OTHER.peer_id}


@pytest.mark.asyncio
async def test_a_deadline_says_who_waits_for_whom() -> None:
    patient = StepLimits(least_seconds=60)
    words = Alive(0, 3, ITS_TURN), Alive(0, 0, 0)
    error = await idle(*words, deadline_seconds=2, step_limits=patient)
    assert isinstance(error, TraceTimeout)
    assert (
        f"not done: {HOST.peer_id} (blocks 0:2, waits for its turn), "
        f"{OTHER.peer_id} (blocks 2:4, waits for blocks 0:2); allow" in str(error)
    )


@pytest.mark.asyncio
async def test_a_peer_that_gets_further_is_waited_for() -> None:
    async def slow(stream: Stream) -> None:
        prepare = await prepared(stream)
        for moves in range(10):  # longer than it may do nothing
            for _ in range(4):
                await stream.send(encode(Alive(0, moves)))
                await asyncio.sleep(0.05)
        await say_done(stream, prepare)
        await asyncio.Event().wait()

    job = await ran(slow, silence_seconds=5, deadline_seconds=30, step_limits=BRIEF)
    assert job.state == "done"


@pytest.mark.asyncio
async def test_a_peer_that_says_what_cannot_be_breaks_the_protocol() -> None:
    async def confused(stream: Stream) -> None:
        await prepared(stream)
        await stream.send(encode(Alive(7, 0, AT_WORK)))
        await asyncio.Event().wait()

    with pytest.raises(BadAnswer, match="says that it has done 7 of 0 stages"):
        await ran(confused, silence_seconds=5, deadline_seconds=30)
