"""The memory transport keeps the contract of a transport: streams, limits, records, losses."""

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from glasshive.dht.errors import (
    DeadlineExceeded,
    NoDht,
    PeerUnreachable,
    RecordRefused,
    StreamClosed,
    StreamRefused,
    TransportClosed,
    TransportError,
    TransportLost,
)
from glasshive.dht.memory_transport import MemoryNetwork, MemoryTransport
from glasshive.dht.records import ModelId, PeerRecord, block_key
from glasshive.dht.serving import StreamLimits
from glasshive.dht.transport import PeerAddress, Stream, Transport
from glasshive.security.keys import Identity

ALICE, BOB, EVE = (Identity(bytes([number]) * 32) for number in (1, 2, 3))
MODEL = ModelId(hashlib.sha256(b"manifest").hexdigest())


class Clock:
    def __init__(self) -> None:
        self.seconds = 1_700_000_000.0

    def __call__(self) -> float:
        return self.seconds


def address_of(transport: Transport) -> PeerAddress:
    return PeerAddress(transport.peer_id, transport.addresses)


async def echo(stream: Stream) -> None:
    while True:
        frame = await stream.receive(5)
        await stream.send([stream.peer_id, frame.header], frame.body)


def pair(**options: Any) -> tuple[MemoryNetwork, MemoryTransport, MemoryTransport]:
    network = MemoryNetwork(clock=Clock())
    return network, network.transport(ALICE), network.transport(BOB, **options)


async def open_echo(alice: MemoryTransport, bob: MemoryTransport) -> Stream:
    await bob.serve("echo/1", echo)
    return await alice.open_stream(address_of(bob), "echo/1", 5)


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0)


@pytest.mark.asyncio
@pytest.mark.parametrize("size", [0, 1000, 3_000_000])
async def test_an_echo_comes_back_whole_under_the_proved_id(size: int) -> None:
    _, alice, bob = pair()
    stream = await open_echo(alice, bob)
    assert stream.peer_id == BOB.peer_id
    body = bytes(range(256)) * (size // 256) + bytes(size % 256)
    for turn in range(3):
        await stream.send(turn, body)
        frame = await stream.receive(5)
        assert frame.header == [ALICE.peer_id, turn]
        assert frame.body == body
    await stream.close()
    await alice.close()
    await bob.close()


@pytest.mark.asyncio
async def test_a_sender_waits_for_a_slow_reader() -> None:
    _, alice, bob = pair()
    stuck = asyncio.Event()

    async def never_reads(stream: Stream) -> None:
        await stuck.wait()

    await bob.serve("stuck/1", never_reads)
    stream = await alice.open_stream(address_of(bob), "stuck/1", 5)
    with pytest.raises(DeadlineExceeded):
        await stream.send([], bytes(2_000_000), deadline_seconds=0.05)
    await bob.close()


@pytest.mark.asyncio
async def test_who_is_not_there_is_unreachable() -> None:
    _, alice, bob = pair()
    with pytest.raises(PeerUnreachable, match="doesn't speak nothing/1"):
        await alice.open_stream(address_of(bob), "nothing/1", 5)
    with pytest.raises(PeerUnreachable):
        await alice.open_stream(PeerAddress(EVE.peer_id), "echo/1", 5)
    await bob.serve("echo/1", echo)
    await bob.close()
    with pytest.raises(PeerUnreachable):
        await alice.open_stream(address_of(bob), "echo/1", 5)


@pytest.mark.asyncio
async def test_whoever_sent_the_last_frame_waits_for_the_other_to_close() -> None:
    _, alice, bob = pair()

    async def answers_once(stream: Stream) -> None:
        await stream.receive(5)
        await stream.send(["done"], bytes(100_000))

    await bob.serve("once/1", answers_once)
    stream = await alice.open_stream(address_of(bob), "once/1", 5)
    await stream.send([])
    assert len((await stream.receive(5)).body) == 100_000
    with pytest.raises(DeadlineExceeded):
        await stream.receive(0.05)
    await stream.send(["nobody listens"])
    (handling,) = bob._tasks._tasks
    assert not handling.done()
    await stream.close()
    await asyncio.wait_for(handling, 5)


@pytest.mark.asyncio
async def test_a_handler_that_fails_resets_its_stream_only(
    caplog: pytest.LogCaptureFixture,
) -> None:
    _, alice, bob = pair()

    async def fails(stream: Stream) -> None:
        raise ZeroDivisionError

    await bob.serve("fails/1", fails)
    good = await open_echo(alice, bob)
    bad = await alice.open_stream(address_of(bob), "fails/1", 5)
    with pytest.raises(StreamClosed):
        await bad.receive(5)
    await good.send([1])
    await good.receive(5)
    assert "handler_failed" in caplog.text


@pytest.mark.asyncio
async def test_streams_beyond_the_limits_are_refused_with_a_reason() -> None:
    network, alice, bob = pair(stream_limits=StreamLimits(per_remote=2, in_all=3))
    eve = network.transport(EVE)
    streams = [await open_echo(alice, bob) for _ in range(2)]
    third = await open_echo(alice, bob)
    with pytest.raises(StreamRefused, match="2 streams of yours"):
        await third.receive(5)
    await eventually(lambda: len(bob._tasks) == 2)
    streams.append(await open_echo(eve, bob))
    fourth = await open_echo(eve, bob)
    with pytest.raises(StreamRefused, match="busy: 3 streams are open"):
        await fourth.receive(5)
    for stream in streams:
        await stream.send([])
        await stream.receive(5)
        await stream.close()
    await eventually(lambda: len(bob._tasks) == 0)
    again = await open_echo(alice, bob)
    await again.send([])
    await again.receive(5)


@pytest.mark.asyncio
async def test_closing_ends_handlers_and_later_calls() -> None:
    _, alice, bob = pair()
    ended = asyncio.Event()

    async def waits(stream: Stream) -> None:
        try:
            await stream.receive(100)
        finally:
            ended.set()

    await bob.serve("waits/1", waits)
    stream = await alice.open_stream(address_of(bob), "waits/1", 5)
    await asyncio.sleep(0)
    await bob.close()
    await bob.close()
    assert ended.is_set()
    with pytest.raises(StreamClosed):
        await stream.receive(5)
    with pytest.raises(TransportClosed):
        await bob.serve("waits/1", waits)
    with pytest.raises(TransportClosed):
        await bob.fetch(["x"])
    with pytest.raises(TransportClosed):
        await bob.rebuild()


@pytest.mark.asyncio
async def test_a_killed_transport_is_lost_and_can_be_rebuilt() -> None:
    network, alice, bob = pair()
    stream = await open_echo(alice, bob)
    mine = await open_echo(bob, alice)
    network.kill(BOB.peer_id)
    assert bob.lost.is_set()
    with pytest.raises(StreamClosed):
        await stream.receive(5)
    with pytest.raises(TransportLost):
        await mine.receive(5)
    for call in (bob.fetch(["x"]), bob.open_stream(address_of(alice), "echo/1", 5)):
        with pytest.raises(TransportLost):
            await call
    with pytest.raises(PeerUnreachable):
        await alice.open_stream(address_of(bob), "echo/1", 5)
    await bob.rebuild()
    assert not bob.lost.is_set()
    stream = await alice.open_stream(address_of(bob), "echo/1", 5)
    await stream.send([1])
    assert (await stream.receive(5)).header == [ALICE.peer_id, [1]]


@pytest.mark.asyncio
async def test_a_cut_ends_streams_between_the_two_only() -> None:
    network, alice, bob = pair()
    eve = network.transport(EVE)
    to_bob, to_eve = await open_echo(alice, bob), await open_echo(alice, eve)
    network.cut(ALICE.peer_id, BOB.peer_id)
    with pytest.raises(TransportError):
        await to_bob.receive(5)
    with pytest.raises(PeerUnreachable):
        await alice.open_stream(address_of(bob), "echo/1", 5)
    await to_eve.send([])
    await to_eve.receive(5)
    network.heal(ALICE.peer_id, BOB.peer_id)
    again = await open_echo(alice, bob)
    await again.send([])
    await again.receive(5)


def record_of(identity: Identity, expires_at_seconds: float, **changes: Any) -> PeerRecord:
    fields: dict[str, Any] = {
        "model": MODEL,
        "model_name": "tiny",
        "start": 0,
        "end": 2,
        "n_blocks": 2,
        "dtype": "float32",
        "backend": "cpu",
        "attention": "eager",
        "throughput_tokens_per_second": 1.0,
        "addresses": (),
        "whitelist_version": 0,
        "load": 0.0,
        "software_version": "0",
        "peer_id": identity.peer_id,
        "expires_at_seconds": expires_at_seconds,
    }
    return PeerRecord(**(fields | changes))


@pytest.mark.asyncio
async def test_records_are_found_until_they_expire_and_the_newest_wins() -> None:
    clock = Clock()
    network = MemoryNetwork(clock=clock)
    alice, bob = network.transport(ALICE), network.transport(BOB)
    key = block_key(MODEL, 1)

    async def store(expires_in: float, load: float) -> tuple[bool, bytes]:
        record = record_of(ALICE, clock() + expires_in, load=load)
        signed = record.sign(ALICE)
        return await alice.store(key, ALICE.peer_id, signed, clock() + expires_in), signed

    assert (await bob.fetch([key, "other"])) == {key: {}, "other": {}}
    stored, first = await store(30, 0.1)
    assert stored
    assert await bob.fetch([key]) == {key: {ALICE.peer_id: first}}
    assert not (await store(29, 0.2))[0]
    stored, second = await store(31, 0.3)
    assert stored
    assert await bob.fetch([key]) == {key: {ALICE.peer_id: second}}
    clock.seconds += 32
    assert await bob.fetch([key]) == {key: {}}
    assert not (await store(-1, 0.4))[0]


@pytest.mark.asyncio
async def test_a_record_of_another_is_refused() -> None:
    network = MemoryNetwork(clock=Clock())
    eve = network.transport(EVE)
    expiry = network.clock() + 30
    signed = record_of(ALICE, expiry).sign(ALICE)
    call: Callable[..., Awaitable[bool]] = eve.store
    for key, subkey, value in (
        (block_key(MODEL, 0), EVE.peer_id, signed),
        (block_key(MODEL, 9), ALICE.peer_id, signed),
        (block_key(MODEL, 0), ALICE.peer_id, signed[:-1]),
    ):
        with pytest.raises(RecordRefused):
            await call(key, subkey, value, expiry)


@pytest.mark.asyncio
async def test_a_transport_without_a_dht_says_so() -> None:
    network = MemoryNetwork()
    client = network.transport(ALICE, dht=False)
    with pytest.raises(NoDht):
        await client.fetch(["x"])
    with pytest.raises(NoDht):
        await client.store("x", ALICE.peer_id, b"", 1)
