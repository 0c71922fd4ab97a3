"""What a client holds and ends while it passes frames on, between peers that the tests play.

Seen failing, each alone: without the limits of a relay stream; without what ends the other stream;
with a `close` that does nothing; without `give_up`; with older streams that `carry` leaves; with a
receiver that is passed what comes before it has said that it takes it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
import pytest_asyncio

from glasshive.client import relay
from glasshive.client.hop import HopReport
from glasshive.client.relay import Relayed, Relays
from glasshive.dht.errors import StreamClosed
from glasshive.dht.framing import Stream
from glasshive.dht.memory_transport import MemoryNetwork
from glasshive.dht.messages import RELAY_PROTOCOL, SLICE_BYTES, Relay, decode, encode
from glasshive.dht.transport import PeerAddress
from glasshive.graph.graph import Graph
from glasshive.graph.plan import HIDDEN, Part, Span, Stage
from glasshive.security.keys import Identity

TRACE = bytes(range(16))


class Two:
    """A client that relays from part 0 to part 1, and the two peers, which take its streams."""

    def __init__(self) -> None:
        self.network = MemoryNetwork()
        self.transports = [self.network.transport(Identity.generate()) for _ in range(3)]
        self.came: list[asyncio.Queue[Stream]] = [asyncio.Queue(), asyncio.Queue()]
        self.given_up: list[tuple[str, bool]] = []
        self.passed_bytes: list[int] = []
        peers = [PeerAddress(one.peer_id, one.addresses) for one in self.transports[:2]]
        parts = (
            Part(0, Span(0, 2), Graph({}), (Stage(0, (), exports=((HIDDEN, 1),)),), {}),
            Part(1, Span(2, 4), Graph({}), (Stage(0, (), imports=((HIDDEN, 0),)),), {}),
        )
        self.ends: list[Any] = [
            SimpleNamespace(
                hop=HopReport(peer, part),
                request=SimpleNamespace(trace_id=TRACE),
                revision=3 + part.index,
                give_up=lambda why, *, may_return: self.given_up.append((why, may_return)),
            )
            for peer, part in zip(peers, parts, strict=True)
        ]
        self.relays = Relays(
            self.transports[2],
            [frozenset(one.peer_id for one in peers)],
            silence_seconds=5.0,
            left_seconds=lambda: 60.0,
            on_bytes=self.passed_bytes.append,
        )

    async def serve(self) -> None:
        for transport, queue in zip(self.transports, self.came, strict=False):

            async def take(stream: Stream, queue: asyncio.Queue[Stream] = queue) -> None:
                queue.put_nowait(stream)
                await asyncio.Event().wait()

            await transport.serve(RELAY_PROTOCOL, take)

    async def opened(self, part: int, *, is_busy: bool = False) -> Stream:
        """The client's stream at the peer of that part, which takes it unless it is busy."""
        stream = await asyncio.wait_for(self.came[part].get(), 5)
        said = decode((await stream.receive(5)).header, Relay)
        assert said == Relay(TRACE, 0, 1, 3 + part)
        if is_busy:
            await stream.refuse("busy: many streams are open here")
        elif part == 1:
            await stream.send(encode(said))
        return stream


@pytest_asyncio.fixture
async def two() -> AsyncIterator[Two]:
    made = Two()
    await made.serve()
    made.relays.carry(*made.ends)
    yield made
    await made.relays.close()
    for transport in made.transports:
        await transport.close()


async def ended(stream: Stream) -> None:
    with pytest.raises(StreamClosed):
        await stream.receive(5)


@pytest.mark.asyncio
async def test_frames_go_both_ways_and_an_end_ends_both(two: Two) -> None:
    near = await two.opened(0)
    assert two.came[1].empty()  # nobody is asked to take what isn't there
    assert two.relays.used == {}
    await near.send(["first"], b"")
    far = await two.opened(1)
    assert (await far.receive(5)).header == ["first"]
    body = bytes(range(256)) * (SLICE_BYTES // 256)
    await near.send(["value", 1.5, None], body)
    frame = await far.receive(5)
    assert (frame.header, bytes(frame.body)) == (["value", 1.5, None], body)
    await far.send(["answer"], b"12")
    frame = await near.receive(5)
    assert (frame.header, bytes(frame.body)) == (["answer"], b"12")
    assert list(two.relays.used.values()) == [Relayed("0:2", "2:4", SLICE_BYTES + 2)]
    assert sum(two.passed_bytes) == SLICE_BYTES + 2
    near.reset()
    await ended(far)


@pytest.mark.asyncio
@pytest.mark.parametrize("sender", [0, 1])
async def test_no_more_than_a_slice_is_held(sender: int, two: Two) -> None:
    streams = [await two.opened(0)]
    await streams[0].send(["first"])
    streams.append(await two.opened(1))
    await streams[1].receive(5)
    with contextlib.suppress(StreamClosed):  # it may end in the middle
        await streams[sender].send(["value"], bytes(SLICE_BYTES + 1))
    for stream in streams:
        await ended(stream)


@pytest.mark.asyncio
@pytest.mark.parametrize("is_asked", [False, True])
async def test_what_is_open_ends_with_the_job(is_asked: bool, two: Two) -> None:
    streams = [await two.opened(0)]
    if is_asked:
        await streams[0].send(["first"])
        streams.append(await two.opened(1))
        await streams[1].receive(5)
    await two.relays.close()
    for stream in streams:
        await ended(stream)


@pytest.mark.asyncio
@pytest.mark.parametrize("is_far_busy", [False, True])
async def test_older_streams_end_when_new_ones_begin(
    is_far_busy: bool, two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those for which a peer is still asked: they would come behind the new ones."""
    monkeypatch.setattr(relay, "BUSY_SECONDS", 0.01)
    streams: list[Stream] = []
    for _ in range(2):
        old, streams = streams, [await two.opened(0)]
        for stream in old:
            await ended(stream)
        await streams[0].send(["first"])
        streams.append(await two.opened(1, is_busy=is_far_busy))
        if is_far_busy:
            del streams[1]
        else:
            assert (await streams[1].receive(5)).header == ["first"]
        two.relays.carry(*two.ends)
    two.relays.forget(two.ends[1].hop.peer.peer_id)
    two.relays.carry(*two.ends)  # the two are no such pair any more
    await two.relays.close()
    assert two.relays._carriers == {}


@pytest.mark.asyncio
async def test_who_is_busy_is_asked_again_and_nothing_is_lost(
    two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay, "BUSY_SECONDS", 0.01)
    for _ in range(3):
        await two.opened(0, is_busy=True)
    near = await two.opened(0)
    for word in ("first", "second"):
        await near.send([word])
    for _ in range(3):
        await two.opened(1, is_busy=True)
    far = await two.opened(1)
    for word in ("first", "second"):
        assert (await far.receive(5)).header == [word]
    assert two.given_up == []


@pytest.mark.asyncio
async def test_who_can_not_be_asked_to_send_is_lost(two: Two) -> None:
    """It would wait for that to the end. Who can't be asked to take is lost to the sender."""
    near = await two.opened(0)
    two.network.cut(two.transports[2].peer_id, two.transports[1].peer_id)
    await near.send(["first"])
    await ended(near)
    assert two.given_up == []
    two.network.cut(two.transports[2].peer_id, two.transports[0].peer_id)
    two.relays.carry(*two.ends)
    async with asyncio.timeout(5):
        while not two.given_up:  # noqa: ASYNC110 (it comes in another task)
            await asyncio.sleep(0.005)
    why, may_return = two.given_up[0]
    assert why.startswith("no stream to it could be opened on which to relay: ")
    assert may_return
