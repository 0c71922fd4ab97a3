"""A trace that its client asks for anew, while what it had of it here is still there."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from askers import prepare_of
from one_host import CLIENT, THIRD, OneHost, news, one_host, until, waiting

from glasshive.dht.errors import StreamClosed
from glasshive.dht.framing import Stream
from glasshive.dht.messages import Accepted, Failed, Need, decode
from glasshive.peer import slots
from glasshive.peer.host import Host
from glasshive.peer.served_model import ServedModel
from glasshive.security.keys import Identity
from glasshive.security.requests import TraceRequest


@pytest_asyncio.fixture
async def swarm(served: ServedModel) -> AsyncIterator[OneHost]:
    async with one_host(served) as made:
        yield made


async def ask(
    swarm: OneHost, request: TraceRequest, data: bytes, revision: int, by: Identity = CLIENT
) -> Stream:
    """The stream on which that was asked for under this revision."""
    asked = dataclasses.replace(request, revision=revision, client=by.peer_id)
    sender = swarm.client if by is CLIENT else swarm.third
    return await swarm.send(prepare_of(by, asked), data, sender)


async def accepted(stream: Stream) -> None:
    decode((await news(stream)).header, Need)
    decode((await news(stream)).header, Accepted)


async def refusal(stream: Stream) -> Failed:
    return decode((await news(stream)).header, Failed)


@pytest.mark.asyncio
async def test_what_is_left_of_it_ends_first(swarm: OneHost) -> None:
    """Seen failing with the wait for the former's end left out: "a trace of this id is running"."""
    request, data = swarm.request(waiting())
    first = await ask(swarm, request, data, 0)
    await accepted(first)
    again = await ask(swarm, request, data, 3)
    await accepted(again)
    with pytest.raises(StreamClosed):
        await news(first)
    assert len(swarm.host._slots) == len(swarm.host._traces) == 1
    (trace,) = swarm.host._traces.values()
    assert trace.request.revision == 3
    again.reset()
    await until(lambda: not len(swarm.host._slots))
    assert swarm.host._memory.promised_bytes == 0


@pytest.mark.asyncio
async def test_nobody_ends_it_but_its_client_and_by_a_higher_revision(swarm: OneHost) -> None:
    request, data = swarm.request(waiting())
    first = await ask(swarm, request, data, 3)
    await accepted(first)
    for revision in (3, 2, 0):
        failed = await refusal(await ask(swarm, request, data, revision, CLIENT))
        assert (failed.code, failed.text) == ("BadGraph", "a trace of this id is running here")
    # Every peer of a plan knows its id: that one takes it is no fault of whoever is asked next.
    failed = await refusal(await ask(swarm, request, data, 4, THIRD))
    assert failed.code == "Busy"
    assert failed.text == "another client has a trace of this id here; try another peer"
    assert len(swarm.host._traces) == 1
    assert not first.closed


@pytest.mark.asyncio
async def test_a_revision_is_taken_once(swarm: OneHost) -> None:
    request, data = swarm.request(waiting())
    for revision in (0, 1, 2):
        stream = await ask(swarm, request, data, revision)
        await accepted(stream)
        stream.reset()
        await until(lambda: not len(swarm.host._slots))
    for revision in (0, 1, 2):
        failed = await refusal(await ask(swarm, request, data, revision))
        assert failed.code == "Replayed"


@pytest.mark.asyncio
async def test_what_does_not_end_is_busy(swarm: OneHost, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "FORMER_SECONDS", 0.05)
    serve, may_end = Host._serve_trace, asyncio.Event()

    async def lingers(host: Host, *args: object) -> object:
        try:
            return await serve(host, *args)  # type: ignore[arg-type]
        finally:
            await may_end.wait()

    monkeypatch.setattr(Host, "_serve_trace", lingers)
    request, data = swarm.request(waiting())
    await accepted(await ask(swarm, request, data, 0))
    failed = await refusal(await ask(swarm, request, data, 1))
    assert failed.code == "Busy"
    assert failed.text.startswith("what is left of this trace here has not ended yet; try again")
    may_end.set()
    await until(lambda: not len(swarm.host._slots))
    await accepted(await ask(swarm, request, data, 1))  # it was not taken before
