"""The directory's request and answer as bytes: read, or refused with our error."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, cast

import msgpack
import pytest
from hostile import PEER, Link, at_once, attack, fuzzed, like, no_deadlines
from hypothesis import given
from hypothesis import strategies as st
from soak import count

from glasshive.dht.directory import DIRECTORY_PROTOCOL, ask_directory, serve_directory
from glasshive.dht.errors import SwarmError
from glasshive.dht.framing import Stream
from glasshive.dht.transport import PeerAddress, StreamHandler, Transport


class OneStream:
    """As much of a transport as a directory needs: every stream gives `data`; the DHT is empty."""

    swarm = "public"
    data = b""

    async def open_stream(self, *_: object) -> Stream:
        return Link(self.data).stream()

    async def serve(self, protocol: str, handler: StreamHandler) -> None:
        assert protocol == DIRECTORY_PROTOCOL
        self.handler = handler

    async def fetch(self, keys: Sequence[str]) -> dict[str, dict[str, bytes]]:
        return {key: {} for key in keys}

    def now(self) -> float:
        return 1_700_000_000.0


def framed(header: bytes, body: bytes = b"") -> bytes:
    return len(header).to_bytes(4, "big") + len(body).to_bytes(4, "big") + header + body


def ask(loop: asyncio.Runner, data: bytes) -> None:
    transport = OneStream()
    transport.data = data
    loop.run(ask_directory(cast(Transport, transport), [PeerAddress(PEER)]))


def answerer() -> Callable[[bytes], None]:
    """What a peer does with the bytes of a request."""
    transport = OneStream()
    at_once(serve_directory(cast(Transport, transport)))

    def handle(data: bytes) -> None:
        handled = cast("Coroutine[Any, Any, None]", transport.handler(Link(data).stream()))
        at_once(handled)

    return handle


TRIES = count(20_000, 1_000_000)  # what is read here has come through plain data
HEADER: bytes = msgpack.packb([1, True])
BODY: bytes = msgpack.packb([b"a record", b"another"])
REQUESTS: list[bytes] = [msgpack.packb([1, None]), msgpack.packb([1, "org/model-1B"])]


def test_damaged_records_of_an_answer_are_read_or_refused() -> None:
    with no_deadlines(), asyncio.Runner() as loop:
        attack(lambda body: ask(loop, framed(HEADER, body)), [BODY], SwarmError, tries=TRIES)


@pytest.mark.asyncio
async def test_a_damaged_request_is_answered_or_refused() -> None:
    handle = answerer()
    with no_deadlines():
        attack(lambda header: handle(framed(header)), REQUESTS, SwarmError, tries=TRIES)


def test_any_bytes_are_a_request_and_an_answer_or_refused() -> None:
    handle = answerer()

    @fuzzed
    @given(like(*REQUESTS), like(HEADER), like(BODY), st.binary(max_size=60))
    def try_all(request: bytes, header: bytes, body: bytes, other: bytes) -> None:
        for data in (framed(header, body), framed(HEADER, body), other):
            with contextlib.suppress(SwarmError):
                ask(loop, data)
        for data in (framed(request), other):
            with contextlib.suppress(SwarmError):
                handle(data)

    with no_deadlines(), asyncio.Runner() as loop:
        try_all()
