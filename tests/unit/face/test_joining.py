"""Waiting for bootstrap peers that are away at a host's start."""

from __future__ import annotations

import asyncio

import pytest

from glasshive.dht.errors import BadAddress, DaemonFailed, PeerUnreachable
from glasshive.dht.transport import PeerAddress
from glasshive.joining import LONGEST_PAUSE_SECONDS, PATIENCE_SECONDS, join
from glasshive.security.keys import Identity


class Time:
    def __init__(self) -> None:
        self.seconds = 0.0

    async def pause(self, seconds: float) -> None:
        self.seconds += seconds


async def joined(create, bootstraps, time):  # type: ignore[no-untyped-def]
    told: list[tuple[str, float]] = []
    try:
        found = await join(
            create,
            bootstraps,
            lambda why, seconds: told.append((why, seconds)),
            clock=lambda: time.seconds,
            pause=time.pause,
        )
    except Exception as error:
        return error, told
    return found, told


def nobody(port: int) -> PeerAddress:
    peer = Identity.generate().peer_id
    return PeerAddress(peer, (f"/ip4/127.0.0.1/tcp/{port}/p2p/{peer}",))


def failing(times: int, error: Exception) -> object:
    left = [times]

    async def create() -> str:
        if left[0]:
            left[0] -= 1
            raise error
        return "joined"

    return create


@pytest.mark.asyncio
async def test_it_is_tried_again_with_growing_pauses_and_said_why() -> None:
    found, told = await joined(failing(3, PeerUnreachable("no")), [nobody(1)], Time())
    assert found == "joined"
    assert [seconds for _, seconds in told] == [1.0, 2.0, 4.0]
    assert all("/tcp/1/" in why and why.endswith(": nothing listens there") for why, _ in told)


@pytest.mark.asyncio
async def test_it_is_not_tried_for_ever() -> None:
    time = Time()
    error, told = await joined(failing(10**6, PeerUnreachable("no")), [nobody(1)], time)
    assert isinstance(error, PeerUnreachable)
    assert "no bootstrap peer could be joined in 60 minutes: /ip4/127.0.0.1/tcp/1/" in str(error)
    assert max(seconds for _, seconds in told) == LONGEST_PAUSE_SECONDS
    assert PATIENCE_SECONDS <= time.seconds <= PATIENCE_SECONDS + LONGEST_PAUSE_SECONDS


@pytest.mark.asyncio
async def test_what_no_waiting_mends_is_raised_at_once() -> None:
    for error, bootstraps in (
        (BadAddress("bad"), [nobody(1)]),
        (DaemonFailed("the disk is full"), [nobody(1)]),
        (PeerUnreachable("the port is taken"), []),
    ):
        assert await joined(failing(1, error), bootstraps, Time()) == (error, [])


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("greeting", "words"),
    [
        (
            b"\x13/multistream/1.0.0\n",
            "a peer answers there, but can't be joined: is the id right?",
        ),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "what listens there is no peer of a swarm"),
        (b"", "what listens there is no peer of a swarm"),
    ],
)
async def test_who_answers_with_another_id_is_told_from_silence(
    greeting: bytes, words: str
) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(greeting)
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as other:
        port = other.sockets[0].getsockname()[1]
        _, told = await joined(failing(1, PeerUnreachable("no")), [nobody(port)], Time())
    assert told[0][0].endswith(words)
