"""A host runs what this client signed for it, once: everything else is refused, and named."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from one_host import CLIENT, HOME, OTHER, THIRD, OneHost, news, one_host, until, waiting

from glasshive.dht.messages import Cancel, Done, Failed, Need, Prepare, Saved, Value, decode, encode
from glasshive.dht.tensor_frames import send_tensor
from glasshive.peer.host_limits import HostLimits
from glasshive.peer.seen_requests import SeenRequests
from glasshive.peer.served_model import ServedModel
from glasshive.security.envelope import payload_digest
from glasshive.security.keys import Identity
from glasshive.security.requests import PlannedPeer, TraceRequest
from glasshive.security.results import SavesDigest, TraceResult

DEFAULT = HostLimits()


@pytest_asyncio.fixture
async def swarm(served: ServedModel) -> AsyncIterator[OneHost]:
    async with one_host(served) as made:
        yield made


async def refused(swarm: OneHost, prepare: Prepare, data: bytes) -> Failed:
    """What the client is told; no slot is taken by it, and the host goes on."""
    failed = decode((await news(await swarm.send(prepare, data))).header, Failed)
    await until(lambda: swarm.host.load == 0.0)
    return failed


def signed(request: TraceRequest, key: Identity = CLIENT, *, ago_seconds: float = 0.0) -> Prepare:
    return Prepare(request.sign(key, time.time() - ago_seconds))


@pytest.mark.asyncio
async def test_what_the_client_did_not_sign_for_this_host_is_refused(swarm: OneHost) -> None:
    request, data = swarm.request(waiting())
    good = signed(request).request
    there = (*request.peers[:1], PlannedPeer(THIRD.peer_id))
    for prepare, code, text in (
        (Prepare(b"x" * 200), "BadEnvelope", "not an envelope: not plain data"),
        (Prepare(good[:-1] + bytes([good[-1] ^ 1])), "BadSignature", "the signature is not by"),
        (signed(request, ago_seconds=75.0), "EnvelopeExpired", "the trace expired 1"),
        (signed(request, ago_seconds=-75.0), "EnvelopeExpired", "the trace is valid for 1"),
        (signed(dataclasses.replace(request, swarm="lab")), "WrongSwarm",
         "got a message for swarm 'lab', this is 'public'"),
        (signed(dataclasses.replace(request, host=THIRD.peer_id, peers=there)), "WrongReceiver",
         f"got a message to {THIRD.peer_id}, wanted {HOME.peer_id}"),
        (signed(dataclasses.replace(request, client=OTHER.peer_id), OTHER), "WrongSender",
         f"{CLIENT.peer_id} shows a trace that was signed by {OTHER.peer_id}; sign with the key "
         "that the connection is made with"),
    ):  # fmt: skip
        failed = await refused(swarm, prepare, data)
        assert (failed.code, failed.node) == (code, -1)
        assert failed.text.startswith(text), failed.text
    decode((await news(await swarm.send(signed(request), data))).header, Need)


@pytest.mark.asyncio
async def test_another_part_than_the_signed_one_is_not_even_read(
    swarm: OneHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    request, data = swarm.request(waiting())
    read: list[object] = []
    monkeypatch.setattr("glasshive.peer.host.decode_part", lambda *args: read.append(args))
    assert await refused(swarm, signed(request), data + b"!") == Failed(
        "BadEnvelope",
        -1,
        f"a part of {len(data) + 1} bytes that is not the one whose hash the client signed; "
        "send both as they were made",
    )
    assert not read


@pytest.mark.asyncio
@pytest.mark.parametrize("restarted", [False, True])
async def test_a_request_runs_once(served: ServedModel, tmp_path: Path, restarted: bool) -> None:
    place = tmp_path / "seen"
    async with one_host(served, seen=SeenRequests(place, now=time.time())) as swarm:
        request, data = swarm.request(waiting())
        prepare = signed(request)
        stream = await swarm.send(prepare, data)
        decode((await news(stream)).header, Need)
        text = f"request {request.trace_id.hex()} of {CLIENT.peer_id} was seen before; send a new"
        failed = decode((await news(await swarm.send(prepare, data))).header, Failed)
        assert failed == Failed("BadGraph", -1, "a trace of this id is running here")
        await stream.send(encode(Cancel()))
        await until(lambda: swarm.host.load == 0.0)
        if not restarted:
            failed = await refused(swarm, prepare, data)
            assert (failed.code, failed.text[: len(text)]) == ("Replayed", text)
    if restarted:
        async with one_host(served, seen=SeenRequests(place, now=time.time())) as swarm:
            failed = await refused(swarm, prepare, data)
            assert (failed.code, failed.text[: len(text)]) == ("Replayed", text)
            again = signed(dataclasses.replace(request, trace_id=b"n" * 16))
            decode((await news(await swarm.send(again, data))).header, Need)


@pytest.mark.asyncio
async def test_without_its_file_a_host_that_was_restarted_runs_it_again(
    served: ServedModel,
) -> None:
    async with one_host(served) as swarm:
        request, data = swarm.request(waiting())
        prepare = signed(request)
        decode((await news(await swarm.send(prepare, data))).header, Need)
    async with one_host(served) as swarm:
        decode((await news(await swarm.send(prepare, data))).header, Need)


@pytest.mark.asyncio
async def test_what_found_no_slot_was_not_taken(served: ServedModel) -> None:
    async with one_host(served, limits=HostLimits(traces=1)) as swarm:
        running = await swarm.running(waiting())
        request, data = swarm.request(waiting())
        prepare = signed(request)
        failed = decode((await news(await swarm.send(prepare, data))).header, Failed)
        assert failed.code == "Busy"
        await running.send(encode(Cancel()))
        await until(lambda: swarm.host.load == 0.0)
        decode((await news(await swarm.send(prepare, data))).header, Need)


@pytest.mark.asyncio
async def test_the_result_names_the_request_and_what_was_sent(swarm: OneHost) -> None:
    request, data = swarm.request(waiting())
    prepare = signed(request)
    client = await swarm.run(await swarm.send(prepare, data), waiting())
    await send_tensor(await swarm.edge(), Value(0, -1, "float32", [4], [0]), bytes(16), 5)
    frame = await news(client)
    saved = decode(frame.header, Saved)
    came = SavesDigest()
    came.begin(saved.name, saved.dtype, saved.shape)
    came.update(frame.body)
    result = TraceResult.verify(
        decode((await news(client)).header, Done).result,
        request=request,
        request_sha256=payload_digest(prepare.request),
        saves_sha256=came.digest(),
        now=time.time(),
    )
    assert hashlib.sha256(b"\x93\xa1s\xa7float32\x91\x04" + bytes(16)).digest() == came.digest()
    assert (result.request.host, result.traffic, result.audited) == (HOME.peer_id, (), False)
    assert result.compute_seconds > 0
