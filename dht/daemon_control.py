"""Requests to the p2pd daemon over its control socket.

hivemind has calls for these, but they leave the connection open when the daemon says no or when
the caller is cancelled.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any, ClassVar, Final

from glasshive.security.keys import PeerId

__all__ = [
    "SocketWriter",
    "connect",
    "detach_daemons",
    "forget_ended_calls",
    "is_connected",
    "open_stream",
    "remembering",
    "tasks_of",
]


_SPAWN_POLL_SECONDS: Final = 0.01
_spawning = threading.Lock()


async def _spawn(*command: Any, **options: Any) -> asyncio.subprocess.Process:
    """A process in a session of its own; one at a time, whichever loops of this process want one.

    uvloop refuses to start one while another loop does, which each connection's loop may.
    """
    while not _spawning.acquire(blocking=False):  # noqa: ASYNC110  (threads, not tasks, wait)
        await asyncio.sleep(_SPAWN_POLL_SECONDS)
    try:
        return await asyncio.subprocess.create_subprocess_exec(
            *command, start_new_session=True, **options
        )
    finally:
        _spawning.release()


class _Detached:
    """asyncio as hivemind's module sees it: the processes that it starts get their own session."""

    subprocess: Any

    def __init__(self) -> None:
        self.subprocess = SimpleNamespace(
            PIPE=asyncio.subprocess.PIPE,
            STDOUT=asyncio.subprocess.STDOUT,
            create_subprocess_exec=_spawn,
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name)


def detach_daemons() -> None:
    """From now on a terminal's Ctrl-C no longer ends the daemons that hivemind starts.

    A terminal sends it to every process of its foreground session, and p2pd would end before its
    owner could cancel a trace or withdraw a record. p2pd still ends by itself when its owner dies.
    """
    from hivemind.p2p import p2p_daemon

    if not isinstance(p2p_daemon.asyncio, _Detached):
        p2p_daemon.asyncio = _Detached()


class _Calls(dict[Any, Any]):
    """hivemind's calls by id. It asks whether one is there before it gives it its answer."""

    def __contains__(self, call_id: object) -> bool:
        call = self.get(call_id)
        return call is not None and not call.done()


def forget_ended_calls() -> None:
    """From now on an answer to a call that was cancelled is dropped. May be repeated.

    hivemind forgets such a call a moment after its end. An answer that comes within that moment
    would end the task which reads every answer, and all later calls would wait for ever.
    """
    from hivemind.p2p.p2p_daemon_bindings.control import ControlClient

    if "_glasshive" in ControlClient.__dict__:
        return
    stock_init = ControlClient.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        stock_init(self, *args, **kwargs)
        self._pending_calls = _Calls()

    ControlClient.__init__ = init
    ControlClient._glasshive = True


def remembering(made: list[Any]) -> Any:
    """hivemind's P2P, which adds to `made` what it makes, also when its `create` fails later.

    It has a `dht_mode` more, "none": without the daemon's own routing. That looks each 2 minutes
    after peers that it knew, and a dial of its own that fails keeps ours from who is back then
    (dht/listening.py).
    """
    from hivemind.p2p import P2P

    class Remembered(P2P):  # type: ignore[misc]
        DHT_MODE_MAPPING: ClassVar[Any] = {**P2P.DHT_MODE_MAPPING, "none": {}}

        def __init__(self) -> None:
            super().__init__()
            made.append(self)

    return Remembered


async def connect(p2p: Any, peer_id: PeerId, addresses: Iterable[str]) -> None:
    """The daemon has a connection to the peer; raises hivemind's P2PDaemonError or OSError."""
    from hivemind.p2p import PeerID
    from hivemind.proto import p2pd_pb2
    from hivemind.utils.multiaddr import Multiaddr

    bare = [one.partition("/p2p/" + peer_id)[0] for one in addresses]
    request = p2pd_pb2.Request(
        type=p2pd_pb2.Request.CONNECT,
        connect=p2pd_pb2.ConnectRequest(
            peer=PeerID.from_base58(peer_id).to_bytes(),
            addrs=[Multiaddr(one).to_bytes() for one in bare],
        ),
    )
    _, _, writer = await _ask(p2p, request)
    writer.close()


async def is_connected(p2p: Any, peer_id: PeerId) -> bool:
    """Whether the daemon has a connection to the peer; raises P2PDaemonError or OSError.

    Asked before each stream, as to open one to a peer that has gone would have the daemon dial it,
    and then leave its address alone for 5 s (dht/listening.py).
    """
    from hivemind.p2p import PeerID
    from hivemind.proto import p2pd_pb2

    request = p2pd_pb2.Request(type=p2pd_pb2.Request.LIST_PEERS)
    response, _, writer = await _ask(p2p, request)
    writer.close()
    # As bytes: to look at each of 1,000 peers takes 0.24 ms, and this 0.06.
    return PeerID.from_base58(peer_id).to_bytes() in response.SerializeToString()


async def open_stream(
    p2p: Any, peer_id: PeerId, protocol: str
) -> tuple[asyncio.StreamReader, SocketWriter]:
    """The two ends of a raw stream to a connected peer; raises P2PDaemonError or OSError."""
    from hivemind.p2p import PeerID
    from hivemind.proto import p2pd_pb2

    request = p2pd_pb2.Request(
        type=p2pd_pb2.Request.STREAM_OPEN,
        streamOpen=p2pd_pb2.StreamOpenRequest(
            peer=PeerID.from_base58(peer_id).to_bytes(), proto=[protocol]
        ),
    )
    _, reader, writer = await _ask(p2p, request)
    return reader, SocketWriter(writer)


class SocketWriter:
    """An asyncio StreamWriter with an abrupt end."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self.write = writer.write
        self.drain = writer.drain
        self.close = writer.close
        self.wait_closed = writer.wait_closed

    def abort(self) -> None:
        self._writer.transport.abort()


def tasks_of(p2p: Any) -> list[asyncio.Task[Any]]:
    """What hivemind runs beside a daemon."""
    control = p2p._client.control if p2p._client is not None else None
    tasks = [p2p._listen_task, p2p._reader_task]
    if control is not None:
        tasks += [control._read_task, control._write_task, *control._handler_tasks.values()]
    return [task for task in tasks if task is not None]


async def _ask(p2p: Any, request: Any) -> tuple[Any, asyncio.StreamReader, asyncio.StreamWriter]:
    """The answer with which the daemon granted the request, and the connection that it was on."""
    from hivemind.p2p.p2p_daemon_bindings.utils import (
        raise_if_failed,
        read_pbmsg_safe,
        write_pbmsg,
    )
    from hivemind.proto import p2pd_pb2

    reader, writer = await p2p._client.control.daemon_connector.open_connection()
    granted = False
    try:
        await write_pbmsg(writer, request)
        response = p2pd_pb2.Response()
        await read_pbmsg_safe(reader, response)
        raise_if_failed(response)
        granted = True
    finally:
        if not granted:
            writer.close()
    return response, reader, writer
