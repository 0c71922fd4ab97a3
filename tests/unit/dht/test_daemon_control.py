"""What is mended in hivemind's control connection, against its own class, without a daemon."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import pytest

from glasshive.dht import daemon_control
from glasshive.security.keys import Identity

# hivemind 1.1 itself, at import.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


def answer(call_id: UUID, **fields: Any) -> bytes:
    """As the daemon sends it: a length below 128, and the message."""
    from hivemind.proto import p2pd_pb2

    message = p2pd_pb2.PersistentConnectionResponse(callId=call_id.bytes, **fields)
    data: bytes = message.SerializeToString()
    return bytes([len(data)]) + data


@pytest.mark.asyncio
async def test_whether_a_peer_is_connected_is_what_the_daemon_lists(tmp_path: Path) -> None:
    from hivemind.p2p import PeerID
    from hivemind.proto import p2pd_pb2

    here, other, gone = (Identity.generate().peer_id for _ in range(3))
    listed = p2pd_pb2.Response(type=p2pd_pb2.Response.OK)
    for one in (other, here):
        listed.peers.add(id=PeerID.from_base58(one).to_bytes(), addrs=[b"\x04\x7f\x00\x00\x01"])

    async def daemon(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked = p2pd_pb2.Request()
        asked.ParseFromString(await reader.readexactly((await reader.readexactly(1))[0]))
        assert asked.type == p2pd_pb2.Request.LIST_PEERS
        data = listed.SerializeToString()
        writer.write(bytes([len(data) & 127 | 128, len(data) >> 7]) + data)
        writer.close()

    place = str(tmp_path / "control")
    connector = SimpleNamespace(open_connection=lambda: asyncio.open_unix_connection(place))
    control = SimpleNamespace(daemon_connector=connector)
    p2p = SimpleNamespace(_client=SimpleNamespace(control=control))
    async with await asyncio.start_unix_server(daemon, place), asyncio.timeout(10):
        for peer_id, there in ((here, True), (other, True), (gone, False)):
            assert await daemon_control.is_connected(p2p, peer_id) is there


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", ["response", "error", "daemon", "nothing"])
async def test_the_answer_to_a_cancelled_call_is_dropped_and_the_next_read(kind: str) -> None:
    daemon_control.forget_ended_calls()
    daemon_control.forget_ended_calls()
    from hivemind.p2p.p2p_daemon_bindings.control import ControlClient, DaemonConnector
    from hivemind.proto import p2pd_pb2

    fields: dict[str, Any] = {
        "response": {"callUnaryResponse": p2pd_pb2.CallUnaryResponse(response=b"late")},
        "error": {"callUnaryResponse": p2pd_pb2.CallUnaryResponse(error=b"late")},
        "daemon": {"daemonError": p2pd_pb2.DaemonError(message="late")},
        "nothing": {},
    }[kind]
    control = ControlClient(DaemonConnector(), _initialized_with_create=True)
    cancelled, live = uuid4(), uuid4()
    calls = control._pending_calls
    calls[cancelled], calls[live] = asyncio.Future(), asyncio.Future()
    calls[cancelled].cancel()
    reader = asyncio.StreamReader()
    reader.feed_data(answer(cancelled, **fields))
    good = p2pd_pb2.CallUnaryResponse(response=b"good")
    reader.feed_data(answer(live, callUnaryResponse=good) * 2)  # the second is of a call that ended
    reader.feed_eof()
    await control._read_from_persistent_conn(reader)
    assert calls[live].result() == b"good"
    assert calls.pop(cancelled, None).cancelled()


def test_loops_of_several_threads_start_daemons_one_after_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As two connections of one process do. uvloop raises "Racing with another loop" else.

    Fails without the lock.
    """
    inside: list[str] = []
    most = 0

    async def spawned(*command: str, start_new_session: bool) -> str:
        nonlocal most
        assert start_new_session
        inside.append(command[0])
        for _ in range(20):
            most = max(most, len(inside))
            await asyncio.sleep(0.001)
        inside.remove(command[0])
        return command[0]

    monkeypatch.setattr(asyncio.subprocess, "create_subprocess_exec", spawned)
    start = daemon_control._Detached().subprocess.create_subprocess_exec
    with ThreadPoolExecutor(4) as threads:
        started = threads.map(lambda name: asyncio.run(start(name)), "abcd")
    assert (list(started), most) == (list("abcd"), 1)
