"""A private swarm of real processes: members work in it, and strangers get nothing."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest
import torch
from structlog.testing import capture_logs
from tiny_llama import save_llama
from transformers import LlamaForCausalLM
from trust_documents import root_now, whitelist_now
from waits import wait_for

import glasshive
from glasshive.client.errors import NoRoute, PeerFailed, PeerLost
from glasshive.dht import messages
from glasshive.dht.directory import find_records
from glasshive.dht.errors import (
    PeerUnreachable,
    ShutOut,
    StreamRefused,
    SwarmError,
    TransportError,
)
from glasshive.dht.hivemind_transport import HivemindTransport
from glasshive.dht.member_gate import MemberGate
from glasshive.dht.messages import JOIN_PROTOCOL, Hello, encode
from glasshive.dht.records import MODELS_KEY, PeerRecord
from glasshive.dht.transport import PeerAddress
from glasshive.security.audit_trail import entries_in, log_files
from glasshive.security.errors import NotAMember
from glasshive.security.keys import Identity, PeerId
from glasshive.security.membership import Membership, Role
from glasshive.security.trust_root import first_root
from glasshive.settings import load_settings
from glasshive.swarm_members import member_files
from glasshive.testing import LocalSwarm, LocalTrust

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:path is deprecated:DeprecationWarning"),
]

SWARM = "lab"
PROMPT = torch.tensor([[3, 14, 15, 9, 26, 5, 35]])
FIRST = root_now()


class SocketWatch(threading.Thread):
    """Notes where the sockets of some processes lead, as often as it can.

    It can't see what ends between two looks, and no datagrams from a socket without a remote
    address (as of QUIC or mDNS), nor processes before `pids` names them.
    """

    def __init__(self, pids: Callable[[], Sequence[int]]) -> None:
        super().__init__(daemon=True)
        self.seen: set[str] = set()
        self.looks = 0
        self._pids = pids
        self._ends = threading.Event()

    def run(self) -> None:
        while not self._ends.wait(0.002):
            for pid in self._pids():
                try:
                    found = psutil.Process(pid).net_connections("inet")
                except (psutil.NoSuchProcess, psutil.AccessDenied):
                    continue
                self.seen |= {one.raddr.ip for one in found if one.raddr}
            self.looks += 1

    def stop(self) -> set[str]:
        """The addresses that were seen."""
        self._ends.set()
        self.join(30)
        return self.seen


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("models") / "tiny", 4)


@pytest.fixture(scope="module")
def watched(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Path
) -> Iterator[tuple[LocalSwarm, SocketWatch]]:
    """A private swarm of two hosts, watched from before its first process on."""
    whitelist = whitelist_now(1, first_root(FIRST), swarm=SWARM)
    trust = LocalTrust(SWARM, FIRST, whitelist, private=True)
    hive = LocalSwarm(model_folder, [(0, 2), (2, 4)], trust=trust, threads=1)

    def pids() -> list[int]:
        peers = [*hive.hosts, *([hive.bootstrap] if hasattr(hive, "bootstrap") else [])]
        return [os.getpid(), *(pid for peer in peers for pid in peer.pids())]

    watch = SocketWatch(pids)
    watch.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLASSHIVE_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("GLASSHIVE_DATA", str(tmp_path_factory.mktemp("data")))
        with hive:
            yield hive, watch
    watch.stop()


@pytest.fixture
def hive(watched: tuple[LocalSwarm, SocketWatch]) -> LocalSwarm:
    return watched[0]


def run(model: glasshive.Model) -> torch.Tensor:
    with model.trace(PROMPT):
        saved = (model.model.layers[3].output * 2).save()
    return saved


def config_of(hive: LocalSwarm, key: str) -> Path:
    """The config of another user of the swarm."""
    config = hive.config.with_name(f"{key}.toml")
    config.write_text(hive.config.read_text().replace("client.key", key))
    return config


def gate_of(hive: LocalSwarm, key: str, role: Role) -> tuple[Identity, MemberGate]:
    """A new member and its gate."""
    peer_id = hive.enrol(hive.config.with_name(key), role)
    settings = load_settings(hive.config)
    files = member_files(settings)
    assert files is not None
    membership = Membership(SWARM, settings.issuers)
    identity = Identity.load_or_create(hive.config.with_name(key))
    return identity, MemberGate(membership, time.time, files.certificate(peer_id))


def in_loop(work: Callable[[], Awaitable[None]]) -> None:
    async def timed() -> None:
        async with asyncio.timeout(90):
            await work()

    asyncio.run(timed())


def test_a_member_traces_as_on_one_machine(hive: LocalSwarm, model_folder: Path) -> None:
    plain = LlamaForCausalLM.from_pretrained(model_folder)
    kept: list[torch.Tensor] = []
    plain.model.layers[3].register_forward_hook(lambda module, args, out: kept.append(out * 2))
    with torch.no_grad():
        plain(PROMPT)
    with glasshive.connect(hive.config) as swarm:
        found = run(swarm.model(hive.model_name))
        assert found.shape == kept[0].shape
        assert torch.allclose(found, kept[0], atol=1e-6)
        assert {one.start for one in swarm.records(hive.model_name)} == {0, 2}


def test_a_user_without_an_invite_is_told_so(hive: LocalSwarm) -> None:
    with pytest.raises(NotAMember, match="is no member of the private swarm 'lab' yet; ask who"):
        glasshive.connect(config_of(hive, "nobody.key"))


def test_an_invite_is_all_that_it_takes(hive: LocalSwarm, tmp_path: Path) -> None:
    place = hive.config.parent
    desk = ["--folder", str(place), "--key", str(place / "bootstrap.key")]

    def output_of(*command: str) -> str:
        # Another person's machine: no config, no keys.
        own = {
            "GLASSHIVE_DATA": str(tmp_path / "data"),
            "GLASSHIVE_CONFIG": str(tmp_path / "c.toml"),
        }
        done = subprocess.run(
            [sys.executable, *command],
            env={**os.environ, **own},
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    glass = ("-m", "glasshive.cli")
    token = output_of(*glass, "invite", "client", *desk)
    assert "joined the private swarm 'lab' as a client" in output_of(*glass, "join", token)
    found = json.loads(output_of(*glass, "status", "--json"))
    assert [one["complete"] for one in found["models"]] == [True]
    code = (
        "import glasshive\n"
        "with glasshive.connect() as swarm:\n"
        f"    model = swarm.model({hive.model_name!r})\n"
        "    with model.trace([[3, 14, 15]]):\n"
        "        h = model.model.layers[3].output.save()\n"
        "print(tuple(h.shape))\n"
    )
    assert output_of("-c", code) == "(1, 3, 32)"


def test_a_stranger_opens_no_stream_at_any_peer(hive: LocalSwarm) -> None:
    protocols = {value for name, value in vars(messages).items() if name.endswith("_PROTOCOL")} - {
        JOIN_PROTOCOL
    }
    assert len(protocols) == 7

    async def knock() -> None:
        stranger = await HivemindTransport.create(
            Identity.generate(), listen=(), dht="none", swarm=SWARM
        )
        try:
            for peer in (hive.bootstrap, *hive.hosts):
                for protocol in sorted(protocols):
                    address = PeerAddress.parse(peer.address)
                    try:
                        stream = await stranger.open_stream(address, protocol, 10)
                    except PeerUnreachable:
                        continue  # the bootstrap runs no traces
                    await stream.send(encode(Hello(b"")))
                    with pytest.raises(StreamRefused, match="not let in"):
                        await stream.receive(20)
        finally:
            await stranger.close()

    in_loop(knock)


def test_a_stranger_reads_and_announces_nothing(hive: LocalSwarm) -> None:
    identity = Identity.generate()

    async def intrude() -> None:
        from hivemind.dht.routing import DHTID
        from hivemind.p2p import PeerID

        with pytest.raises(TransportError):  # its node is answered by nobody, so it joins nothing
            await HivemindTransport.create(
                identity, bootstraps=[hive.bootstrap.address], swarm=SWARM
            )
        alone = await HivemindTransport.create(identity, swarm=SWARM)
        try:
            record = await record_of(hive, identity, alone)
            value = record.sign(identity, swarm=SWARM)
            await alone.store(MODELS_KEY, identity.peer_id, value, record.expires_at_seconds)
            for peer in (hive.bootstrap, *hive.hosts):
                address = PeerAddress.parse(peer.address)
                await alone._connect(address)
                known = PeerID.from_base58(address.peer_id)
                protocol = alone._node.protocol
                key = DHTID.generate(source=MODELS_KEY.encode())
                assert await protocol.call_ping(known) is None
                assert await protocol.call_find(known, [key]) is None
                stored = await protocol.call_store(
                    known,
                    [key],
                    [protocol.serializer.dumps(value)],
                    record.expires_at_seconds,
                    subkeys=[identity.peer_id],
                )
                assert stored is None
                assert not alone._node.protocol.routing_table.uid_to_peer_id
        finally:
            await alone.close()

    in_loop(intrude)
    with glasshive.connect(hive.config) as swarm:
        assert identity.peer_id not in {one.peer_id for one in swarm.records()}


def test_a_client_reads_records_and_can_not_announce(hive: LocalSwarm) -> None:
    identity, gate = gate_of(hive, "reader.key", Role.CLIENT)

    async def announce() -> None:
        reader = await HivemindTransport.create(
            identity,
            listen=(),
            bootstraps=[hive.bootstrap.address],
            dht="client",
            swarm=SWARM,
            gate=gate,
        )
        try:
            assert {one.start for one in await find_records(reader, None)} == {0, 2}
            record = await record_of(hive, identity, reader)
            value = record.sign(identity, swarm=SWARM)
            # Its own node takes it, and nobody else's.
            await reader.store(MODELS_KEY, identity.peer_id, value, record.expires_at_seconds)
        finally:
            await reader.close()

    in_loop(announce)
    with glasshive.connect(hive.config) as swarm:
        assert identity.peer_id not in {one.peer_id for one in swarm.records()}


async def record_of(
    hive: LocalSwarm, identity: Identity, transport: HivemindTransport
) -> PeerRecord:
    """A record in the words of a host's own, of another peer."""
    from dataclasses import replace

    with_root = load_settings(hive.config)
    member, gate = Identity.load_or_create(with_root.client_key_path), None
    files = member_files(with_root)
    assert files is not None
    gate = MemberGate(
        Membership(SWARM, with_root.issuers), time.time, files.certificate(member.peer_id)
    )
    reader = await HivemindTransport.create(
        member, listen=(), bootstraps=[hive.bootstrap.address], dht="client", swarm=SWARM, gate=gate
    )
    try:
        (found, *_) = await find_records(reader, None)
    finally:
        await reader.close()
    return replace(
        found,
        peer_id=identity.peer_id,
        addresses=transport.addresses,
        expires_at_seconds=float(round(time.time()) + 30),
    )


def test_a_member_is_kept_to_its_quota_and_all_is_written_down(hive: LocalSwarm) -> None:
    key = hive.config.with_name("limited.key")
    limited = hive.enrol(key, Role.CLIENT)
    book = hive._book
    assert book is not None
    book.change_quota(limited, {"saved_bytes_a_day": 7 * 32 * 4 + 1}, time.time())
    assert hive.enrol(key, Role.CLIENT) == limited  # the next certificate
    with glasshive.connect(config_of(hive, "limited.key")) as swarm:
        model = swarm.model(hive.model_name)
        run(model)
        with pytest.raises(
            PeerFailed, match="this trace takes about 896 saved bytes here"
        ) as caught:
            run(model)
        assert caught.value.code == "QuotaExceeded"
    with glasshive.connect(hive.config) as swarm:
        run(swarm.model(hive.model_name))
    host = PeerId(hive.hosts[1].peer_id)  # which has the last block
    (folder,) = hive.config.parent.glob(f"data-*/audit/swarm-{SWARM}/{host}")

    def outcomes() -> list[str]:
        found = entries_in(log_files(folder), host)
        return [one.entry.outcome for one in found if one.entry.client == limited]

    wait_for(lambda: outcomes() == ["done", "QuotaExceeded"], "both traces are written down")


def test_who_is_thrown_out_is_out_and_others_notice_nothing(hive: LocalSwarm) -> None:
    gone = hive.enrol(hive.config.with_name("gone.key"), Role.CLIENT)
    failures: list[BaseException] = []
    ends = threading.Event()
    traced = [0]

    def others() -> None:
        try:
            with glasshive.connect(hive.config) as swarm:
                model = swarm.model(hive.model_name)
                while not ends.is_set():
                    run(model)
                    traced[0] += 1
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=others)
    with glasshive.connect(config_of(hive, "gone.key")) as swarm:
        model = swarm.model(hive.model_name)
        run(model)
        thread.start()
        try:
            wait_for(lambda: traced[0] > 3 or failures, "the other user traces")
            hive.revoke(gone)

            def out() -> bool:
                try:
                    run(model)
                except (PeerLost, NoRoute, SwarmError) as error:
                    return "was revoked" in str(error)
                return False

            wait_for(out, "who was thrown out is refused")
            before = traced[0]
            wait_for(lambda: traced[0] > before + 3 or failures, "the other goes on")
        finally:
            ends.set()
            thread.join(60)
        with pytest.raises(ShutOut, match=r"doesn't let this key, .*, in: .* its key was revoked"):
            swarm.records()
    with capture_logs() as logs, glasshive.connect(config_of(hive, "gone.key")) as swarm:
        with pytest.raises(ShutOut):
            swarm.records()
    assert [one for one in logs if one["log_level"] == "warning"] == []  # the error says it all
    assert not failures


def test_a_host_that_is_thrown_out_is_in_no_route(hive: LocalSwarm) -> None:
    extra = hive.add_host((0, 4))
    extra.wait_ready()
    with glasshive.connect(hive.config) as swarm:
        model = swarm.model(hive.model_name)

        def is_used() -> bool:
            with model.trace(PROMPT) as tracer:
                model.model.layers[3].output.save()
            return extra.peer_id in {hop.peer for hop in tracer.result.hops}

        wait_for(is_used, "it is used: one hop is shorter than two")
        hive.revoke(PeerId(extra.peer_id))
        wait_for(lambda: "was revoked" in extra.log, "it is told")
        wait_for(lambda: not is_used(), "it is left out, and no trace fails")
    assert extra.stop() == 0
    hive.hosts.remove(extra)


def test_it_contacts_no_public_host(watched: tuple[LocalSwarm, SocketWatch]) -> None:
    hive, watch = watched
    with glasshive.connect(hive.config) as swarm:
        run(swarm.model(hive.model_name))
    looks = watch.looks
    wait_for(lambda: watch.looks > looks + 5, "the sockets are looked at")
    assert watch.seen, "the swarm's own connections are seen"
    assert {one for one in watch.seen if not ipaddress.ip_address(one).is_loopback} == set()


def test_the_watch_sees_a_connection_that_is_made() -> None:
    with socket.create_server(("127.0.0.2", 0)) as server:
        port = server.getsockname()[1]
        code = f"import socket; s = socket.create_connection(('127.0.0.2', {port})); s.recv(1)"
        with subprocess.Popen([sys.executable, "-c", code]) as child:
            watch = SocketWatch(lambda: [child.pid])
            watch.start()
            accepted, _ = server.accept()
            wait_for(lambda: "127.0.0.2" in watch.seen, "it is seen")
            accepted.close()
            watch.stop()
