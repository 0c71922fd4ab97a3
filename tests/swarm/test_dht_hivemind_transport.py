"""The transport over real p2pd daemons on loopback: streams, records, failures."""

import asyncio
import contextlib
import hashlib
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from glasshive.dht import network_daemon
from glasshive.dht.announcer import Announcer, announce, withdraw
from glasshive.dht.directory import ask_directory, find_records, serve_directory
from glasshive.dht.errors import (
    DaemonFailed,
    DeadlineExceeded,
    ListenRefused,
    NoDht,
    PeerUnreachable,
    RecordRefused,
    StreamClosed,
    StreamRefused,
    TransportClosed,
    TransportLost,
    UnknownModel,
)
from glasshive.dht.hivemind_transport import HivemindTransport
from glasshive.dht.loop_thread import LoopThread
from glasshive.dht.network_daemon import NetworkDaemon
from glasshive.dht.records import MODELS_KEY, ModelId, PeerRecord, block_key
from glasshive.dht.serving import StreamLimits
from glasshive.dht.transport import PeerAddress, Stream, Transport
from glasshive.security.keys import Identity

# hivemind 1.1 itself: at import, and at the start of its daemon.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:path is deprecated:DeprecationWarning"),
]

MODEL = ModelId(hashlib.sha256(b"manifest").hexdigest())
DEAD = "/ip4/127.0.0.1/tcp/9/p2p/" + Identity(bytes(32)).peer_id


@asynccontextmanager
async def transports(*options: dict[str, Any]) -> AsyncIterator[list[HivemindTransport]]:
    """One transport for each; those after the first bootstrap from it unless told otherwise."""
    made: list[HivemindTransport] = []
    try:
        for option in options:
            identity = option.pop("identity", None) or Identity.generate()
            if made:
                option.setdefault("bootstraps", [made[0].addresses[0]])
            made.append(await HivemindTransport.create(identity, **option))
        yield made
    finally:
        await asyncio.gather(*(transport.close() for transport in made))


def address_of(transport: Transport) -> PeerAddress:
    return PeerAddress(transport.peer_id, transport.addresses)


def record_of(identity: Identity, transport: Transport, **changes: Any) -> PeerRecord:
    fields: dict[str, Any] = {
        "model": MODEL,
        "model_name": "tiny",
        "start": 0,
        "end": 2,
        "n_blocks": 4,
        "dtype": "float32",
        "backend": "cpu",
        "attention": "eager",
        "throughput_tokens_per_second": 1.0,
        "addresses": transport.addresses,
        "whitelist_version": 0,
        "load": 0.0,
        "software_version": "0",
        "peer_id": identity.peer_id,
        "expires_at_seconds": round(transport.now()) + 45.5,
    }
    return PeerRecord(**(fields | changes))


async def echo(stream: Stream) -> None:
    while True:
        frame = await stream.receive(30)
        await stream.send([stream.peer_id, frame.header], frame.body)


@pytest.mark.asyncio
async def test_an_echo_comes_back_whole_under_the_proved_id() -> None:
    async with transports({"dht": "none"}, {"dht": "none", "listen": ()}) as (host, client):
        assert client.addresses == ()
        await host.serve("echo/1", echo)
        stream = await client.open_stream(address_of(host), "echo/1", 10)
        assert stream.peer_id == host.peer_id
        for size in (0, 1024, 8 * 1024 * 1024, 1):
            body = os.urandom(size)
            await stream.send([size, "step"], body)
            frame = await stream.receive(10)
            assert frame.header == [client.peer_id, [size, "step"]]
            assert frame.body == body
        await stream.close()
        with pytest.raises(StreamClosed):
            await stream.receive(1)
        with pytest.raises(PeerUnreachable, match="nothing/1"):
            await client.open_stream(address_of(host), "nothing/1", 10)
        with pytest.raises(PeerUnreachable):
            await client.open_stream(PeerAddress.parse(DEAD), "echo/1", 10)
        # The address of one under the id of another: the daemon asks for proof.
        imposter = PeerAddress(Identity.generate().peer_id, host.addresses)
        with pytest.raises(PeerUnreachable):
            await client.open_stream(imposter, "echo/1", 10)
        # The host opens a stream back to a client that listens nowhere.
        await client.serve("echo/1", echo)
        back = await host.open_stream(PeerAddress(client.peer_id), "echo/1", 10)
        await back.send(1)
        assert (await back.receive(10)).header == [host.peer_id, 1]


@pytest.mark.asyncio
async def test_streams_beyond_the_limit_are_refused_with_a_reason() -> None:
    limits = StreamLimits(per_remote=1)
    async with transports(
        {"dht": "none", "stream_limits": limits}, {"dht": "none", "listen": ()}
    ) as (host, client):
        await host.serve("echo/1", echo)
        first = await client.open_stream(address_of(host), "echo/1", 10)
        await first.send(1)
        await first.receive(10)
        second = await client.open_stream(address_of(host), "echo/1", 10)
        await second.send(2, bytes(100_000))
        with pytest.raises(StreamRefused, match="1 streams of yours are open"):
            await second.receive(10)
        await first.send(3)
        await first.receive(10)


@pytest.mark.asyncio
async def test_records_travel_and_forgeries_do_not() -> None:
    alice, eve = Identity.generate(), Identity.generate()
    async with transports(
        {}, {"identity": alice}, {"identity": eve}, {"dht": "client", "listen": ()}
    ) as (boot, at_alice, at_eve, reader):
        record = record_of(alice, at_alice)
        assert all((await announce(at_alice, alice, record)).values())
        for transport in (boot, at_eve, reader):
            assert await find_records(transport, "tiny") == [record]
        assert await find_records(reader, MODEL) == [record]
        with pytest.raises(UnknownModel):
            await find_records(reader, "other")

        # What an honest transport refuses to store, a dishonest one sends all the same.
        key, expiry = block_key(MODEL, 0), record.expires_at_seconds + 5
        forged = record_of(eve, at_eve, expires_at_seconds=expiry).sign(eve)
        replayed = record.sign(alice)
        with pytest.raises(RecordRefused):
            await at_eve.store(key, alice.peer_id, forged, expiry)
        at_eve._node.protocol.record_validator = None
        for subkey, value, expires in (
            (alice.peer_id, forged, expiry),
            (alice.peer_id, b"nothing", expiry),
            (alice.peer_id, replayed, expiry),
            (None, b"nothing", expiry),
            (eve.peer_id, b"x" * 3000, expiry),
        ):
            accepted = await at_eve._node.store(
                key.encode(), value, expires, subkey=subkey, exclude_self=True
            )
            assert not accepted
        # Nor does a reader believe a peer that holds forgeries: Eve's own store has one now.
        await at_eve._node.store(key.encode(), forged, expiry, subkey=alice.peer_id)
        assert await reader.fetch([key]) == {key: {alice.peer_id: replayed}}

        # Nor does a replayed older record replace a newer one.
        newer = record.renewed(record.expires_at_seconds + 2)
        await announce(at_alice, alice, newer)
        old = await at_eve._node.store(
            key.encode(), replayed, record.expires_at_seconds, subkey=alice.peer_id
        )
        assert not old
        assert await find_records(reader, "tiny") == [newer]

        await withdraw(at_alice, alice, newer)
        with pytest.raises(UnknownModel):
            await find_records(reader, "tiny")


@pytest.mark.asyncio
async def test_a_client_without_a_dht_asks_for_the_directory() -> None:
    alice = Identity.generate()
    async with transports({}, {"identity": alice}, {"dht": "none", "listen": ()}) as (
        boot,
        host,
        client,
    ):
        await serve_directory(boot)
        peers = [PeerAddress.parse(DEAD), address_of(boot)]
        async with Announcer(host, alice, record_of(alice, host)):
            (found,) = await ask_directory(client, peers, "tiny", 10)
            assert found.peer_id == alice.peer_id
            assert found.addresses == host.addresses
            await host.serve("echo/1", echo)
            there = PeerAddress(found.peer_id, found.addresses)
            stream = await client.open_stream(there, "echo/1", 10)
            await stream.send(1)
            await stream.receive(10)
        with pytest.raises(NoDht):
            await client.fetch(["x"])


@pytest.mark.asyncio
async def test_one_dead_bootstrap_of_two_does_not_matter() -> None:
    async with transports({}) as (boot,):
        identity = Identity.generate()
        async with transports({"identity": identity, "bootstraps": [DEAD, boot.addresses[0]]}) as (
            host,
        ):
            assert all((await announce(host, identity, record_of(identity, host))).values())
            assert len(await find_records(boot, "tiny")) == 1
        with pytest.raises(PeerUnreachable, match=r"could not be joined.*tcp/9"):
            await HivemindTransport.create(Identity.generate(), bootstraps=[DEAD])


@pytest.mark.asyncio
async def test_the_death_of_the_own_daemon_is_noticed_and_repaired() -> None:
    identity = Identity.generate()
    async with transports({}, {"identity": identity}) as (boot, host):
        await boot.serve("echo/1", echo)
        await host.serve("echo/1", echo)
        addresses = host.addresses
        stream = await host.open_stream(address_of(boot), "echo/1", 10)
        host._daemon.p2p._child.send_signal(signal.SIGKILL)
        async with asyncio.timeout(5):
            await host.lost.wait()
            with pytest.raises(TransportLost):
                await stream.receive(5)
            record = record_of(identity, host)
            calls: list[Callable[[], Awaitable[object]]] = [
                lambda: host.fetch(["x"]),
                lambda: announce(host, identity, record),
                lambda: host.open_stream(address_of(boot), "echo/1", 5),
                lambda: host.serve("more/1", echo),
            ]
            for call in calls:
                with pytest.raises(TransportLost):
                    await call()
            await host.rebuild()
            assert host.addresses == addresses
            assert not host.lost.is_set()
            await announce(host, identity, record_of(identity, host))
            assert len(await find_records(boot, "tiny")) == 1
            stream = await boot.open_stream(address_of(host), "echo/1", 5)
            await stream.send(1)
            assert (await stream.receive(5)).header == [boot.peer_id, 1]


@pytest.mark.asyncio
async def test_a_transport_that_cannot_be_rebuilt_is_lost_still(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    identity = Identity.generate()
    async with transports({}, {"identity": identity}) as (boot, host):
        addresses = host.addresses
        host._daemon.p2p._child.send_signal(signal.SIGKILL)
        async with asyncio.timeout(30):
            await host.lost.wait()

            async def fail(*args: object, **how: object) -> None:
                raise PeerUnreachable("no bootstrap answers")

            for owner, step in ((NetworkDaemon, "start"), (HivemindTransport, "_start_node")):
                with monkeypatch.context() as patched:
                    patched.setattr(owner, step, fail)
                    with pytest.raises(PeerUnreachable):
                        await host.rebuild()
                assert host.lost.is_set()
                with pytest.raises(TransportLost):
                    await host.open_stream(address_of(boot), "echo/1", 5)
                with pytest.raises(TransportLost):
                    await host.fetch([MODELS_KEY])
            await host.rebuild()
            assert not host.lost.is_set()
            assert host.addresses == addresses
            await announce(host, identity, record_of(identity, host))
            assert len(await find_records(boot, "tiny")) == 1


@pytest.mark.asyncio
@pytest.mark.parametrize("task", ["_read_task", "_write_task"])
async def test_the_end_of_the_control_connection_is_the_loss_of_the_daemon(task: str) -> None:
    identity = Identity.generate()
    async with transports({}, {"identity": identity}) as (boot, host):
        child, addresses = host._daemon.p2p._child, host.addresses
        getattr(host._daemon.p2p._client.control, task).cancel()
        async with asyncio.timeout(15):
            await host.lost.wait()
            with pytest.raises(TransportLost, match="is lost"):
                await announce(host, identity, record_of(identity, host))
            await host.rebuild()
            assert child.returncode is not None
            assert host.addresses == addresses
            assert all((await announce(host, identity, record_of(identity, host))).values())
            assert len(await find_records(boot, "tiny")) == 1
        assert not host.lost.is_set()


async def freeze(child: asyncio.subprocess.Process) -> None:
    child.send_signal(signal.SIGSTOP)
    async with asyncio.timeout(5):
        while " T " not in Path(f"/proc/{child.pid}/stat").read_text():  # noqa: ASYNC110, ASYNC240
            await asyncio.sleep(0.001)


@pytest.mark.asyncio
async def test_a_call_under_way_fails_when_the_own_daemon_dies() -> None:
    identity = Identity.generate()
    async with transports({}, {"identity": identity}) as (_, host):
        record = record_of(identity, host)
        await freeze(host._daemon.p2p._child)
        call = asyncio.create_task(announce(host, identity, record))
        with pytest.raises(DeadlineExceeded):
            await host.open_stream(PeerAddress.parse(DEAD), "echo/1", 0.2)
        assert not call.done()
        host._daemon.p2p._child.send_signal(signal.SIGKILL)
        async with asyncio.timeout(5):
            with pytest.raises(TransportLost):
                await call
            await host.close()
            with pytest.raises(TransportClosed):
                await host.rebuild()


@pytest.mark.asyncio
async def test_a_frozen_daemon_is_ended_by_close(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network_daemon, "SHUTDOWN_DEADLINE_SECONDS", 0.2)
    async with transports({}) as (host,):
        child = host._daemon.p2p._child
        await freeze(child)
        async with asyncio.timeout(5):
            await host.close()
        assert child.returncode == -signal.SIGKILL


HOST = """
import asyncio, sys
from glasshive.dht.hivemind_transport import HivemindTransport
from glasshive.security.keys import Identity

async def echo(stream):
    while True:
        frame = await stream.receive(30)
        await stream.send(frame.header, frame.body)

async def main():
    transport = await HivemindTransport.create(Identity.generate(), dht="none")
    await transport.serve("echo/1", echo)
    print(transport.addresses[0], flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


async def try_until_unreachable(client: Transport, peer: PeerAddress) -> None:
    async with asyncio.timeout(5):
        while True:
            stream = await client.open_stream(peer, "echo/1", 5)
            with pytest.raises(StreamClosed):
                await stream.receive(5)


@pytest.mark.asyncio
async def test_the_death_of_the_other_process_ends_the_stream() -> None:
    host = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        textwrap.dedent(HOST),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        async with transports({"dht": "none", "listen": ()}) as (client,):
            assert host.stdout is not None
            address = (await asyncio.wait_for(host.stdout.readline(), 30)).decode().strip()
            stream = await client.open_stream(PeerAddress.parse(address), "echo/1", 10)
            await stream.send(1)
            await stream.receive(10)
            host.kill()
            with pytest.raises(StreamClosed):
                await stream.receive(5)
            # Its daemon ends a moment after it.
            with pytest.raises(PeerUnreachable):
                await try_until_unreachable(client, PeerAddress.parse(address))
    finally:
        if host.returncode is None:
            host.kill()
        await host.wait()


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "address",
    [
        "/ip4/0.0.0.0/tcp/0",
        "/ip4/192.168.1.5/tcp/4001",
        "/ip6/::/tcp/0",
        "/dns4/localhost/tcp/0",
        "/ip4/127.0.0.999/tcp/0",
    ],
)
async def test_without_a_whitelist_only_loopback_is_listened_on(address: str) -> None:
    with pytest.raises(ListenRefused, match=r"can't listen at .*/ip4/127\.0\.0\.1/tcp/0"):
        await HivemindTransport.create(
            Identity.generate(), listen=["/ip4/127.0.0.1/tcp/0", address]
        )


@pytest.mark.asyncio
async def test_a_taken_port_is_no_missing_bootstrap() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"/ip4/127.0.0.1/tcp/{taken.getsockname()[1]}"
        with pytest.raises(ListenRefused, match=rf"can't listen at {address}: .*another port"):
            await HivemindTransport.create(Identity.generate(), listen=[address])


@pytest.mark.asyncio
@pytest.mark.parametrize("bootstraps", [[], [DEAD]])
@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("missing", r"p2pd binary not found at \S+/p2pd; it needs"),
        ("not executable", r"Permission denied: '\S+/p2pd'; it needs"),
        ("no program", r"p2pd binary format incompatible .*; it needs"),
        ("no folder", r"No such file or directory: .*room in /tmp.*TMPDIR"),
        ("exits", r"Daemon failed to start: mkdir: no space left on device; it needs"),
    ],
)
async def test_a_daemon_that_cannot_start_is_no_missing_bootstrap(
    fault: str,
    says: str,
    bootstraps: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from hivemind.p2p import p2p_daemon

    program = tmp_path / "p2pd"
    if fault == "no folder":
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    else:
        monkeypatch.setattr(p2p_daemon, "path", lambda *_: contextlib.nullcontext(program))
    if fault == "exits":
        program.write_text("#!/bin/sh\necho mkdir: no space left on device\nexit 1\n")
    elif fault != "missing":
        program.write_bytes(b"\x7fELF")
    if fault in ("exits", "no program"):
        program.chmod(0o700)
    with pytest.raises(DaemonFailed, match=rf"\(p2pd\) can't be started on this machine: .*{says}"):
        await HivemindTransport.create(Identity.generate(), bootstraps=bootstraps)


@pytest.mark.asyncio
async def test_a_daemon_that_fails_its_start_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hivemind.p2p import p2p_daemon

    program, pid = tmp_path / "p2pd", tmp_path / "pid"
    program.write_text(f"#!/bin/sh\necho $$ > {pid}\necho Peer ID: none\nexec sleep 60\n")
    program.chmod(0o700)
    monkeypatch.setattr(p2p_daemon, "path", lambda *_: contextlib.nullcontext(program))
    with pytest.raises(DaemonFailed, match="No such file or directory"):  # its control socket
        await HivemindTransport.create(Identity.generate())
    with pytest.raises(ProcessLookupError):  # it has ended, and was waited for
        os.kill(int(pid.read_text()), 0)


@pytest.mark.asyncio
async def test_the_key_file_is_private_and_gone_when_the_daemon_is_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from hivemind.p2p import P2P

    seen: list[tuple[str, int, int]] = []
    create: Any = P2P.create.__func__

    async def watched(cls: type[P2P], **options: Any) -> Any:
        path = options["identity_path"]
        folder = os.path.dirname(path)
        seen.append(
            (path, stat.S_IMODE(os.stat(path).st_mode), stat.S_IMODE(os.stat(folder).st_mode))
        )
        return await create(cls, **options)

    monkeypatch.setattr(P2P, "create", classmethod(watched))
    async with transports({"dht": "none"}):
        ((path, file_mode, folder_mode),) = seen
        assert (file_mode, folder_mode) == (0o600, 0o700)
        assert not Path(path).parent.exists()


def test_it_works_from_synchronous_code() -> None:
    with LoopThread() as loop:
        host = loop.run(HivemindTransport.create(Identity.generate(), dht="none"), 30)
        client = loop.run(HivemindTransport.create(Identity.generate(), dht="none", listen=()), 30)
        loop.run(host.serve("echo/1", echo), 5)
        stream = loop.run(client.open_stream(address_of(host), "echo/1", 5), 5)
        loop.run(stream.send([1], b"body"), 5)
        assert loop.run(stream.receive(5), 5).body == b"body"
        loop.run(client.close(), 10)
        loop.run(host.close(), 10)
    assert not any(one.name == "glasshive-network" for one in threading.enumerate())


def test_threads_may_make_the_first_transports() -> None:
    """In a process of its own, where nothing has imported hivemind, whose packages form a circle.

    Without the lock one of the threads that begin near the end of the first one's import fails.
    """
    script = """
        import threading
        from glasshive.dht.hivemind_setup import prepare

        failed, prepared = [], threading.Event()

        def work():
            try:
                prepare()
            except ImportError as error:
                failed.append(error)
            prepared.set()

        threads = []
        while not prepared.wait(0.02):
            threads.append(threading.Thread(target=work))
            threads[-1].start()
        for one in threads:
            one.join()
        print(len(threads) > 2, failed)
    """
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.stdout == "True []\n", ended.stderr
