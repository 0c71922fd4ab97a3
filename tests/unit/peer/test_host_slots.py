"""What one client can hold of a host: slots, and the time of its checks and stages."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Callable
from typing import Any, cast

import pytest
from askers import prepare_of, request_of

from glasshive.dht.errors import DeadlineExceeded
from glasshive.dht.memory_transport import MemoryNetwork, MemoryTransport
from glasshive.dht.messages import (
    SILENCE_SECONDS,
    TRACE_PROTOCOL,
    Accepted,
    Alive,
    Cancel,
    Failed,
    Need,
    decode,
    encode,
)
from glasshive.dht.transport import PeerAddress, Stream
from glasshive.graph.graph import Graph, NodeId, Read, Ref, Save, Site
from glasshive.graph.order import Pass, Passes
from glasshive.graph.plan import Part, Span, Stage
from glasshive.graph.plan_codec import encode_part
from glasshive.peer import client_stream
from glasshive.peer import host as host_module
from glasshive.peer.client_stream import ClientStream
from glasshive.peer.host import Host
from glasshive.peer.host_limits import HostLimits
from glasshive.peer.served_model import ServedModel
from glasshive.security.keys import Identity

# Slots, over a real host on the memory transport ---------------------------------------------


ALICE, BOB, HOST = (Identity.generate() for _ in range(3))


def prepare(served: ServedModel, number: int, client: Identity = ALICE) -> tuple[Any, bytes]:
    """The frame that asks HOST for a trace which saves the output of block 0."""
    site = Site("model.layers.0", "output")
    nodes = {NodeId(0): Read(site, 0), NodeId(1): Save(Ref(NodeId(0)), "s")}
    stop = served.outline.event(site)
    stage = Stage(0, (NodeId(0), NodeId(1)), forward=True, stop_event=stop)
    part = Part(0, Span(0, 2), Graph(nodes), (stage,), {})
    passes = Passes((Pass((0,), 3, False, ((0, 1),)),))
    data = encode_part(part, passes)
    request = request_of(
        client.peer_id,
        HOST.peer_id,
        data,
        model_id=served.manifest.model_id,
        trace_id=number.to_bytes(16, "big"),
    )
    return encode(prepare_of(client, request)), data


@pytest.mark.asyncio
async def test_slots_are_taken_by_valid_traces_and_shared_among_clients(
    served: ServedModel,
) -> None:
    network = MemoryNetwork()
    home = network.transport(HOST)
    host = Host(home, HOST, served, limits=HostLimits(traces=3, traces_per_client=2))
    await host.start()
    address = PeerAddress(home.peer_id, home.addresses)
    alice, bob = (network.transport(one, dht=False) for one in (ALICE, BOB))

    async def ask(client: MemoryTransport, number: int) -> tuple[Stream, Any]:
        stream = await client.open_stream(address, TRACE_PROTOCOL, 5)
        await stream.send(*prepare(served, number, ALICE if client is alice else BOB))
        answer = decode((await stream.receive(5)).header, Need, Failed)
        if isinstance(answer, Need):
            answer = decode((await stream.receive(5)).header, Accepted, Failed)
        return stream, answer

    for _ in range(5):  # streams that say nothing take no slot
        await alice.open_stream(address, TRACE_PROTOCOL, 5)
    first, accepted = await ask(alice, 1)
    assert isinstance(accepted, Accepted)
    _, twice = await ask(bob, 1)
    assert twice == Failed(
        "Busy", -1, "another client has a trace of this id here; try another peer"
    )
    assert isinstance((await ask(alice, 2))[1], Accepted)
    _, third = await ask(alice, 3)
    assert third == Failed("Busy", -1, "2 traces of yours are running here")
    assert isinstance((await ask(bob, 4))[1], Accepted)
    _, full = await ask(bob, 5)
    assert full == Failed("Busy", -1, "3 traces are running here; try again soon")
    await first.send(encode(Cancel()))
    async with asyncio.timeout(5):
        while host.load >= 1.0:  # noqa: ASYNC110 (the slot comes back)
            await asyncio.sleep(0)
    assert isinstance((await ask(bob, 6))[1], Accepted)
    host.close()
    for transport in (alice, bob, home):
        await transport.close()


@pytest.mark.asyncio
async def test_one_late_word_does_not_end_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_stream, "ALIVE_SECONDS", 0.001)
    heard: asyncio.Queue[object] = asyncio.Queue()

    class Sent:
        peer_id = origin = ""
        tries = 0

        async def send(self, header: object, body: bytes, deadline_seconds: float) -> None:
            self.tries += 1
            if self.tries == 1:
                raise DeadlineExceeded("a slice of a save held the stream for long")
            heard.put_nowait(header)

    says = (Alive(stages) for stages in itertools.count())
    async with ClientStream(cast(Any, Sent())).heard(lambda: next(says)):
        for stages in (1, 2):
            assert await asyncio.wait_for(heard.get(), 5) == encode(Alive(stages))


@pytest.mark.asyncio
async def test_a_host_is_heard_while_it_has_nothing_to_say(served: ServedModel) -> None:
    network = MemoryNetwork()
    home = network.transport(HOST)
    client = network.transport(ALICE, dht=False)
    host = Host(home, HOST, served)
    await host.start()
    address = PeerAddress(home.peer_id, home.addresses)
    stream = await client.open_stream(address, TRACE_PROTOCOL, 5)
    await stream.send(*prepare(served, 1))
    decode((await stream.receive(5)).header, Need)
    decode((await stream.receive(5)).header, Accepted)
    for _ in range(2):  # it waits for the inputs
        decode((await stream.receive(SILENCE_SECONDS)).header, Alive)
    host.close()
    for transport in (client, home):
        await transport.close()


@pytest.mark.asyncio
async def test_a_slow_check_keeps_nobody_waiting(
    served: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = MemoryNetwork()
    home = network.transport(HOST)
    client = network.transport(ALICE, dht=False)
    host = Host(home, HOST, served)
    await host.start()
    checking, go_on = threading.Event(), threading.Event()
    admit = host._admission.admit

    def slow(*args: Any) -> Any:
        checking.set()
        assert go_on.wait(30)
        return admit(*args)

    monkeypatch.setattr(host._admission, "admit", slow)
    stream = await client.open_stream(PeerAddress(home.peer_id, home.addresses), TRACE_PROTOCOL, 5)
    await stream.send(*prepare(served, 1))
    assert await asyncio.to_thread(checking.wait, 30)
    decode((await stream.receive(SILENCE_SECONDS)).header, Alive)  # the loop is free meanwhile
    go_on.set()
    decode((await stream.receive(5)).header, Need)
    decode((await stream.receive(5)).header, Accepted)
    host.close()
    for transport in (client, home):
        await transport.close()


@pytest.mark.asyncio
async def test_a_check_that_takes_too_long_is_ended(
    served: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = MemoryNetwork()
    home = network.transport(HOST)
    client = network.transport(ALICE, dht=False)
    host = Host(home, HOST, served, limits=HostLimits(prepare_seconds=0.5))
    await host.start()
    address = PeerAddress(home.peer_id, home.addresses)
    ended = threading.Event()

    def admit(part: Part, passes: Passes, data: bytes, go_on: Callable[[], None]) -> Any:
        try:
            while not ended.wait(0.001):
                go_on()
        finally:
            ended.set()

    with monkeypatch.context() as patched:
        patched.setattr(host._admission, "admit", admit)
        stream = await client.open_stream(address, TRACE_PROTOCOL, 5)
        await stream.send(*prepare(served, 1))
        answer = decode((await stream.receive(30)).header, Failed)
        assert (answer.code, answer.text) == (
            "Busy",
            "checking took longer than 0.5 s here; try another peer, or send a smaller graph",
        )
        assert await asyncio.to_thread(ended.wait, 30)
    # The one thread for checks is free again.
    stream = await client.open_stream(address, TRACE_PROTOCOL, 5)
    await stream.send(*prepare(served, 2))
    decode((await stream.receive(5)).header, Need)
    host.close()
    for transport in (client, home):
        await transport.close()


@pytest.mark.asyncio
@pytest.mark.parametrize("slow", ["decode_part", "check_part", "slots"])
async def test_a_check_is_ended_between_its_steps(
    served: ServedModel, monkeypatch: pytest.MonkeyPatch, slow: str
) -> None:
    network = MemoryNetwork()
    home = network.transport(HOST)
    client = network.transport(ALICE, dht=False)
    host = Host(home, HOST, served, limits=HostLimits(prepare_seconds=0.5))
    await host.start()
    address = PeerAddress(home.peer_id, home.addresses)
    answered = threading.Event()
    done: list[str] = []

    def step(owner: object, name: str) -> Callable[..., Any]:
        stock = getattr(owner, name)

        def run(*args: Any) -> Any:
            if name == slow:
                assert answered.wait(30)
            done.append(name)
            return stock(*args)

        return run

    with monkeypatch.context() as patched:
        for name in ("decode_part", "check_part", "slots"):
            patched.setattr(host_module, name, step(host_module, name))
        patched.setattr(host._admission, "admit", step(host._admission, "admit"))
        stream = await client.open_stream(address, TRACE_PROTOCOL, 5)
        await stream.send(*prepare(served, 1))
        assert decode((await stream.receive(30)).header, Failed).code == "Busy"
        answered.set()
        async with host._checks._turn:  # the thread is free again
            assert done[-1] == slow
    host.close()
    for transport in (client, home):
        await transport.close()


@pytest.mark.asyncio
async def test_the_checks_of_one_client_stand_before_no_other_s(
    served: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = MemoryNetwork()
    home = network.transport(HOST)
    alice, bob = (network.transport(one, dht=False) for one in (ALICE, BOB))
    host = Host(home, HOST, served)
    await host.start()
    address = PeerAddress(home.peer_id, home.addresses)
    checking, permits = threading.Event(), threading.Semaphore(0)
    admit = host._admission.admit

    def slow(*args: Any) -> Any:
        checking.set()
        assert permits.acquire(timeout=30)
        return admit(*args)

    monkeypatch.setattr(host._admission, "admit", slow)
    for number in (1, 2, 3):
        stream = await alice.open_stream(address, TRACE_PROTOCOL, 5)
        await stream.send(*prepare(served, number))
    assert await asyncio.to_thread(checking.wait, 30)
    stream = await bob.open_stream(address, TRACE_PROTOCOL, 5)
    await stream.send(*prepare(served, 4, BOB))
    async with asyncio.timeout(30):
        while len(host._slots) < 4:  # noqa: ASYNC110
            await asyncio.sleep(0)
    permits.release(2)
    decode((await stream.receive(5)).header, Need)
    permits.release(2)
    host.close()
    for transport in (alice, bob, home):
        await transport.close()
