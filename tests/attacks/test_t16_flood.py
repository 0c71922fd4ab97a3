"""T16: floods, slow senders and silent streams against a host, beside an honest client.

Everything is counted; time is a clock that the test moves.

Seen failing, each alone: with no rate of new streams, the first three tests; with refusals that
nobody counts, the first and that of refusals; with no charge for who was told busy, or a debt
without an end, that of who asks on; with no count of traces, or of streams, by address, that of
many keys; with this machine as an address like others, the class, and with members counted by
address, the members; with no floor under a frame, the one that drips; with no wait for the first
frame, or one that goes on for later frames, the silent streams; with memory for all that a frame
announces, or no count of what unfinished ones hold, the last.
"""

from __future__ import annotations

import asyncio
import tracemalloc
from collections import Counter

import pytest
from soak import count
from tenants import Tenants

from glasshive.dht.errors import StreamBusy, StreamClosed
from glasshive.dht.framing import FrameLimits, Stream
from glasshive.dht.memory_transport import MemoryTransport
from glasshive.dht.messages import TRACE_PROTOCOL, Failed, Need, decode
from glasshive.dht.serving import BUSY_TOKENS, REFUSALS_PER_REMOTE, StreamLimits
from glasshive.dht.unfinished_frames import UnfinishedLimits
from glasshive.peer.host_limits import HostLimits
from glasshive.peer.served_model import ServedModel
from glasshive.security.plain import encode_plain

SECONDS = count(10, 300)
HONEST = 2  # traces a second
PER_SECOND = 10
BURST = 20
FLOOD = 100 * HONEST


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.asyncio
async def test_a_flood_is_refused_and_an_honest_client_served(served: ServedModel) -> None:
    clock = Clock()
    limits = StreamLimits(new_per_second=PER_SECOND, burst=BURST)
    answers: Counter[str] = Counter()
    told: set[str] = set()

    async with Tenants(served, clock=clock, stream_limits=limits) as tenants:
        honest, attacker = tenants.client(), tenants.client()

        async def attack() -> None:
            """A trace that is asked for, and left when it was admitted."""
            stream = await tenants.open(attacker)
            try:
                await stream.send(*tenants.prepare(attacker))
                decode((await stream.receive(60)).header, Need, Failed)
                answers["served"] += 1
            except StreamBusy as error:
                told.add(str(error).partition("; try again in ")[0])
                answers["busy"] += 1
            except StreamClosed:
                answers["reset"] += 1
            await stream.close()

        for _ in range(SECONDS):
            flood = [asyncio.create_task(attack()) for _ in range(FLOOD)]
            for _ in range(HONEST):
                saved = await tenants.run(honest)
                assert isinstance(saved, dict), saved
            await asyncio.wait_for(asyncio.gather(*flood), 60)
            clock.now += 1.0
        await tenants.until(lambda: len(tenants.home._tasks) == 0)
        await tenants.until(lambda: tenants.host._memory.promised_bytes == 0)

    (text,) = told
    assert text.endswith(
        "refused the stream: busy: more than 10 new streams a second of yours, "
        f"of which one told busy counts as {BUSY_TOKENS}"
    )
    assert answers.total() == SECONDS * FLOOD
    # Its bucket is all that it got, less where the host said that it was busy, and it was told so;
    # beyond a few refusals not even that.
    assert BURST <= answers["served"] <= BURST + (SECONDS - 1) * PER_SECOND
    assert answers["busy"] >= SECONDS
    assert answers["reset"] > answers["busy"]


@pytest.mark.asyncio
async def test_who_asks_on_when_told_busy_is_soon_refused_before_it_is_read(
    served: ServedModel,
) -> None:
    """Failed without the charge: each of them was read, verified, answered and logged."""
    clock = Clock()
    limits = HostLimits(traces_per_client=1)
    streams = StreamLimits(new_per_second=1.0, burst=2 * BUSY_TOKENS + 2)
    async with Tenants(served, limits, clock=clock, stream_limits=streams) as tenants:
        attacker, honest = tenants.client(), tenants.client()
        first, _ = await tenants.ask(attacker)  # has the one place of its own
        read = 0
        with pytest.raises(StreamBusy, match=f"one told busy counts as {BUSY_TOKENS}; try again"):
            for _ in range(100):
                stream, answer = await tenants.ask(attacker)
                assert isinstance(answer, Failed)
                assert answer.code == "Busy"
                read += 1
                await stream.close()
                await tenants.until(lambda: len(tenants.home._tasks) == 1)
        assert read == 3  # its tokens were 1 for the first, 20 twice, and the one that was left
        assert isinstance(await tenants.run(honest), dict)
        # What it owes is bounded.
        clock.now += 2 * streams.burst
        _, answer = await tenants.ask(attacker)
        assert isinstance(answer, Failed)
        first.reset()


@pytest.mark.asyncio
async def test_refusals_have_no_place_of_their_own_to_fill(served: ServedModel) -> None:
    limits = StreamLimits(new_per_second=1, burst=1, in_all=20)
    async with Tenants(served, clock=Clock(), stream_limits=limits) as tenants:
        attacker, honest = tenants.client(), tenants.client()
        streams = [await tenants.open(attacker) for _ in range(200)]  # nobody reads or closes them
        assert len(tenants.home._tasks) == 1 + REFUSALS_PER_REMOTE
        assert isinstance(await tenants.run(honest), dict)
        for stream in streams:
            stream.reset()


@pytest.mark.asyncio
async def test_many_keys_at_one_address_leave_places_to_others(served: ServedModel) -> None:
    """Failed with places counted by key alone: the keys of one machine had all of them."""
    limits = HostLimits(traces=8, traces_per_client=2, traces_per_origin=6)
    streams = StreamLimits(per_origin=30, in_all=40)
    async with Tenants(served, limits, stream_limits=streams) as tenants:
        told: Counter[str] = Counter()
        held: list[Stream] = []
        for _ in range(20):
            stream, answer = await tenants.ask(tenants.client(ip="203.0.113.66"))
            told[answer.text if isinstance(answer, Failed) else "accepted"] += 1
            held.append(stream)
            if isinstance(answer, Failed):
                await stream.close()
        assert told == {
            "accepted": 6,
            "6 traces from your address are running here, under whatever keys; wait for one of "
            "them, or try another peer": 14,
        }
        # Who says nothing at all: streams, not traces. A refused one lingers until it is read.
        await tenants.until(lambda: len(tenants.home._tasks) == 6)
        held += [await tenants.open(tenants.client(ip="203.0.113.66")) for _ in range(60)]
        assert tenants.home._tasks._open.total() == 30
        for ip in ("198.51.100.7", "198.51.100.8", "127.0.0.1"):
            assert isinstance(await tenants.run(tenants.client(ip=ip)), dict)
        for stream in held:
            stream.reset()


@pytest.mark.asyncio
async def test_a_class_behind_one_address_is_served(served: ServedModel) -> None:
    """The stock limits. This machine is no origin: who comes by a tunnel has no other address."""
    async with Tenants(served) as tenants:
        pupils = [tenants.client(ip="198.51.100.7") for _ in range(12)]
        for saved in await asyncio.gather(*map(tenants.run, pupils)):
            assert isinstance(saved, dict)
        asked = [await tenants.ask(tenants.client()) for _ in range(16)]
        assert not any(isinstance(answer, Failed) for _, answer in asked)
        for stream, _ in asked:
            stream.reset()


@pytest.mark.asyncio
async def test_members_behind_one_address_have_all_places(served: ServedModel) -> None:
    """An institution's own router is no attacker, and a key of a private swarm costs an invite."""
    limits = HostLimits(traces=8, traces_per_client=2, traces_per_origin=6)
    async with Tenants(served, limits, private=True) as tenants:
        asked = [await tenants.ask(tenants.client(ip="203.0.113.66")) for _ in range(8)]
        assert not any(isinstance(answer, Failed) for _, answer in asked)
        for stream, _ in asked:
            stream.reset()


async def drip(stream: Stream, data: bytes, size: int, clock: Clock) -> int:
    """Send `data` in parts of so many bytes, each a second after the other; how many were sent."""
    sent = 0
    while sent < len(data):
        stream._writer.write(data[sent : sent + size])
        sent += size
        for _ in range(20):  # the host has read it
            await asyncio.sleep(0)
        clock.now += 1.0
        if stream._reader._broken or stream._reader._ended:  # type: ignore[attr-defined]
            break
    return sent


def frame_of(tenants: Tenants) -> bytes:
    """The bytes of a frame that asks for a trace, with a body that is too long to be one."""
    header, _ = tenants.prepare(tenants.client())
    packed = encode_plain(header)
    body_bytes = 256 * 1024
    lengths = len(packed).to_bytes(4, "big") + body_bytes.to_bytes(4, "big")
    return lengths + packed + bytes(body_bytes)


@pytest.mark.asyncio
async def test_a_frame_that_drips_ends_its_stream_and_a_slow_one_is_read(
    served: ServedModel,
) -> None:
    clock = Clock()
    frames = FrameLimits()
    async with Tenants(served, clock=clock) as tenants:
        data = frame_of(tenants)

        async def send(client: MemoryTransport, size: int) -> int:
            stream = await client.open_stream(tenants.address, TRACE_PROTOCOL, 10)
            sent = await drip(stream, data, size, clock)
            if sent >= len(data):
                answer = decode((await stream.receive(30)).header, Failed)
                assert answer.code == "EnvelopeExpired"  # it was read, a minute after it was signed
            stream.reset()
            return sent

        # One byte a second, the eight of the lengths before the floor counts; half of the floor.
        slow = frames.least_bytes_per_second // 2
        assert await send(tenants.client(), 1) <= 8 + frames.stall_seconds + 2
        assert await send(tenants.client(), slow) <= slow * (2 * frames.stall_seconds + 2)
        # An honest link that is slow, but not that slow.
        assert await send(tenants.client(), frames.least_bytes_per_second) >= len(data)
        await tenants.until(lambda: len(tenants.home._tasks) == 0)


@pytest.mark.asyncio
async def test_a_stream_on_which_nothing_comes_ends_soon(served: ServedModel) -> None:
    limits = StreamLimits(first_frame_seconds=0.1)
    async with Tenants(served, stream_limits=limits) as tenants:
        silent = [await tenants.open(tenants.client()) for _ in range(50)]
        assert len(tenants.home._tasks) == 50
        await tenants.until(lambda: len(tenants.home._tasks) == 0)
        for stream in silent:
            with pytest.raises(StreamClosed):
                await stream.receive(10)
        # Whoever has said something may think.
        stream, _ = await tenants.ask(tenants.client())
        later = asyncio.get_running_loop().time() + 2 * limits.first_frame_seconds
        await tenants.until(lambda: asyncio.get_running_loop().time() > later)
        await tenants.begin(stream)
        assert isinstance(await tenants.saves(stream), dict)


def begun(announced: int, sent: int) -> bytes:
    """The bytes of a frame of which that much of its body has come, of what was announced."""
    packed = encode_plain([1])
    return len(packed).to_bytes(4, "big") + announced.to_bytes(4, "big") + packed + bytes(sent)


@pytest.mark.asyncio
async def test_what_a_frame_announces_takes_no_memory_and_what_comes_is_bounded(
    served: ServedModel,
) -> None:
    limits = UnfinishedLimits()
    body_bytes = FrameLimits().body_bytes
    async with Tenants(served) as tenants:
        unfinished = tenants.home._tasks.unfinished
        # All that one key may open, each with nearly nothing of the longest frame that there is.
        eve = tenants.client()
        idle = [await tenants.open(eve) for _ in range(StreamLimits().per_remote)]
        tracemalloc.start()
        for stream in idle:
            stream._writer.write(begun(body_bytes, 1))
        await tenants.until(lambda: unfinished.held_bytes >= 2 * len(idle))
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak_bytes < body_bytes / 2
        assert unfinished.held_bytes <= 4 * len(idle)
        for stream in idle:
            stream.reset()
        await tenants.until(lambda: unfinished.held_bytes == 0)

        # All of it but the last byte, on as many as find room, and one more.
        mallory = tenants.client()
        n_full = limits.per_remote_bytes // body_bytes
        full = [await tenants.open(mallory) for _ in range(n_full)]
        for stream in full:
            stream._writer.write(begun(body_bytes, body_bytes - 2))
        await tenants.until(lambda: unfinished.held_bytes >= n_full * (body_bytes - 2))
        more = await tenants.open(mallory)
        more._writer.write(begun(body_bytes, body_bytes - 2))
        with pytest.raises(StreamBusy, match=f"of yours hold {limits.per_remote_bytes} bytes"):
            await more.receive(10)
        assert unfinished.held_bytes <= limits.per_remote_bytes
        # The neighbour notices nothing, and of who has left nothing stays.
        assert isinstance(await tenants.run(tenants.client()), dict)
        for stream in full:
            stream.reset()
        await tenants.until(lambda: unfinished.held_bytes == 0)
