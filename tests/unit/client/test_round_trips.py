"""How far away peers are: what is remembered, who is asked, and that nobody waits for the silent.

Ways are as long as a test says: a host that answers reads a clock that the test moves.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from peer_records import record_of

from glasshive.client import round_trips
from glasshive.client.round_trips import (
    AHEAD_SECONDS,
    KNOWN_SECONDS,
    MISSED_SECONDS,
    MOST_ASKED,
    MOST_PEERS,
    RoundTrips,
)
from glasshive.dht.framing import Stream
from glasshive.dht.memory_transport import MemoryNetwork
from glasshive.dht.messages import FILES_PROTOCOL, File, encode
from glasshive.dht.records import ModelId, PeerRecord
from glasshive.security.keys import Identity, PeerId

MODEL = ModelId("ab" * 32)
ANN, BEN = PeerId("ann"), PeerId("ben")


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def record(identity: Identity, **others: Any) -> PeerRecord:
    return record_of(identity, MODEL, expires_at_seconds=60.0, **others)


def test_the_shortest_of_late_counts() -> None:
    clock = Clock()
    ways = RoundTrips(clock)
    assert ways.of(ANN) is None
    ways.saw(ANN, 0.2)
    ways.saw(ANN, 0.05)
    ways.saw(ANN, 0.3)
    assert ways.of(ANN) == 0.05
    assert ways.of(BEN) is None
    clock.now = KNOWN_SECONDS - 1
    ways.saw(ANN, 0.3)
    assert ways.of(ANN) == 0.05
    clock.now = KNOWN_SECONDS
    assert ways.of(ANN) is None
    ways.saw(ANN, 0.3)
    assert ways.of(ANN) == 0.3


def test_who_reads_while_it_is_written_misses_nobody() -> None:
    """An entry was taken out and put in again, and a trace in between thought its peer unknown."""
    ways = RoundTrips(Clock())
    read: list[float | None] = []

    class Read(str):
        """A key that is read by another name whenever the table looks at it."""

        __slots__ = ()

        def __hash__(self) -> int:
            read.append(ways.of(ANN))
            return super().__hash__()

    ways.saw(ANN, 0.2)
    ways.saw(PeerId(Read(ANN)), 0.1)
    assert len(read) > 1
    assert set(read) == {0.2, 0.1} or set(read) == {0.2}
    assert ways.of(ANN) == 0.1


def test_of_too_many_peers_the_oldest_is_forgotten() -> None:
    ways = RoundTrips(Clock())
    for i in range(MOST_PEERS + 1):
        ways.saw(PeerId(str(i)), 0.1)
    assert ways.of(PeerId("0")) is None
    assert ways.of(PeerId("1")) == 0.1


def test_the_first_are_asked_and_not_too_many() -> None:
    """Also those that are slow: who asks has an order of its own."""
    many = [
        record(Identity.generate(), throughput_tokens_per_second=float(i))
        for i in range(MOST_ASKED + 4)
    ]
    assert RoundTrips(Clock()).to_ask(many) == many[:MOST_ASKED]


Answer = Callable[[Stream], Any]


async def ask(ways: RoundTrips, answers: list[Answer], patience_seconds: float) -> list[PeerRecord]:
    """Ask a peer for each way of answering; None listens to nothing."""
    network = MemoryNetwork()
    records = []
    for answer in answers:
        identity = Identity.generate()
        transport = network.transport(identity)
        await transport.serve(FILES_PROTOCOL, answer)
        records.append(record(identity))
    client = network.transport(Identity.generate(), dht=False)
    await ways.ask(client, ways.to_ask(records), patience_seconds)
    assert ways.to_ask(records) == []
    return records


@pytest.mark.asyncio
async def test_the_second_answer_is_timed_and_silence_is_a_long_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first one has the connection's time in it. Nobody else ends the wait for the silent."""
    monkeypatch.setattr(round_trips, "PATIENCE_SECONDS", 1e6)
    clock = Clock()
    ways = RoundTrips(clock)
    was_quick = asyncio.Event()

    async def answers(stream: Stream) -> None:
        for seconds in (5.0, 0.25):
            await stream.receive(10)
            clock.now += seconds
            await stream.send(encode(File(0)), b"", 10)
        was_quick.set()
        await asyncio.Event().wait()

    async def is_silent(stream: Stream) -> None:
        await asyncio.Event().wait()

    async def refuses(stream: Stream) -> None:
        await stream.receive(10)
        await stream.refuse("no")

    async def talks_nonsense(stream: Stream) -> None:
        await stream.receive(10)
        await stream.send([99], b"", 10)

    near, *others = await ask(ways, [answers, is_silent, refuses, talks_nonsense], 0.5)
    assert was_quick.is_set()
    assert ways.of(near.peer_id) == 0.25
    assert [ways.of(one.peer_id) for one in others] == [0.5, 0.5, 0.5]
    clock.now += MISSED_SECONDS
    assert ways.of(near.peer_id) == 0.25
    assert [ways.of(one.peer_id) for one in others] == [None, None, None]
    assert set(ways.to_ask([near, *others])) == set(others)


@pytest.mark.asyncio
async def test_who_asks_ahead_never_has_it_forgotten() -> None:
    """A longer way than the one that is soon forgotten was not kept; and one that a trace had seen
    was forgotten before it was asked for again."""
    clock = Clock()
    ways = RoundTrips(clock)
    takes_seconds = 0.25

    async def answers(stream: Stream) -> None:
        for _ in range(2):
            await stream.receive(10)
            clock.now += takes_seconds
            await stream.send(encode(File(0)), b"", 10)

    network = MemoryNetwork()
    identity = Identity.generate()
    host, client = network.transport(identity), network.transport(Identity.generate(), dht=False)
    await host.serve(FILES_PROTOCOL, answers)
    peer = record(identity)
    asked = 0
    for second in range(5, 2000, 5):
        clock.now = float(second)
        if second == 210:
            ways.saw(peer.peer_id, 0.25)  # is known for longer than it was asked for
        takes_seconds = 0.25 if second < 250 else 0.75
        if due := ways.to_ask([peer], AHEAD_SECONDS):
            await ways.ask(client, due, 1e6)
            asked += 1
        assert ways.of(peer.peer_id) == (0.25 if clock.now < 290 else 0.75)
        assert ways.to_ask([peer]) == []
    assert asked == pytest.approx(2000 / KNOWN_SECONDS, abs=3)


class Host:
    """One peer that answers as late as a test says, or not at all."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.ways = clock, RoundTrips(clock)
        self.takes_seconds: float | None = 0.01
        self._identity, network = Identity.generate(), MemoryNetwork()
        self._transport = network.transport(self._identity)
        self._client = network.transport(Identity.generate(), dht=False)
        self.record = record(self._identity)

    async def start(self) -> None:
        async def answers(stream: Stream) -> None:
            for _ in range(2):
                await stream.receive(10)
                if self.takes_seconds is None:
                    await asyncio.Event().wait()
                else:
                    self.clock.now += self.takes_seconds
                    await stream.send(encode(File(0)), b"", 10)

        await self._transport.serve(FILES_PROTOCOL, answers)

    async def asked(self) -> float | None:
        """What is known of it once it was asked, if it is to be asked."""
        if due := self.ways.to_ask([self.record], AHEAD_SECONDS):
            await self.ways.ask(self._client, due, 1e6 if self.takes_seconds else 0.2)
        return self.ways.of(self.record.peer_id)


@pytest.mark.asyncio
async def test_a_peer_that_fell_silent_is_far_away_though_it_was_near() -> None:
    """Its old round trip was kept for 300 s after its last trace, and routes took it for near."""
    clock = Clock()
    host = Host(clock)
    await host.start()
    assert await host.asked() == 0.01
    clock.now = 250.0
    host.ways.saw(host.record.peer_id, 0.01)  # known until 550 by that
    clock.now = 290.0
    host.takes_seconds = None
    assert await host.asked() == 0.2
    clock.now += MISSED_SECONDS
    host.takes_seconds = 0.01
    assert await host.asked() == pytest.approx(0.01)


@pytest.mark.asyncio
async def test_a_peer_that_became_slow_is_asked_and_taken_for_slow() -> None:
    """A trace's own question is answered late for many reasons: a small one says what is so."""
    clock = Clock()
    host = Host(clock)
    await host.start()
    peer = host.record.peer_id
    assert await host.asked() == 0.01
    host.takes_seconds = 0.5
    assert await host.asked() == 0.01, "nobody asks so soon"
    host.ways.saw(peer, 0.03)
    assert await host.asked() == 0.01, "that is no long time for a trace's own question"
    host.ways.saw(peer, 0.6)
    assert host.ways.of(peer) == 0.01, "it may have had a graph to check"
    assert await host.asked() == 0.5
    clock.now += MISSED_SECONDS - AHEAD_SECONDS  # by then it is asked again: it may be over
    host.takes_seconds = 0.02
    assert await host.asked() == pytest.approx(0.02)


@pytest.mark.asyncio
async def test_a_peer_that_cant_be_reached_is_far_away() -> None:
    ways = RoundTrips(Clock())
    gone = record(Identity.generate())
    await ways.ask(MemoryNetwork().transport(Identity.generate()), [gone], 0.5)
    assert ways.of(gone.peer_id) == 0.5
    assert ways.to_ask([gone]) == []
    # 500 ms, as was shown, is no time that anybody measured.
    assert ways.text(gone.peer_id) == "no answer in 0.5 s"
    ways.saw(gone.peer_id, 0.0123)
    assert ways.text(gone.peer_id) == "12.3 ms"
    assert ways.text(BEN) == "not measured"
