"""A host of a private swarm: members kept to their quotas, and who ran what written down."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import hashlib
import json
import shutil
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch
from askers import prepare_of, request_of

from glasshive.dht.framing import Stream
from glasshive.dht.member_gate import MemberGate
from glasshive.dht.memory_transport import MemoryNetwork, MemoryTransport
from glasshive.dht.messages import (
    TRACE_PROTOCOL,
    Accepted,
    Alive,
    Cancel,
    Constant,
    Done,
    Failed,
    Input,
    More,
    Need,
    Run,
    Saved,
    decode,
    encode,
    is_a,
)
from glasshive.dht.tensor_frames import send_tensor
from glasshive.dht.transport import PeerAddress
from glasshive.graph.dtypes import DType
from glasshive.graph.graph import Const, Graph, Node, NodeId, Op, Read, Ref, Save, Site
from glasshive.graph.kernels import tensor_to_bytes
from glasshive.graph.order import Pass, Passes
from glasshive.graph.plan import Part, Span, Stage
from glasshive.graph.plan_codec import encode_part
from glasshive.graph.tensors import TensorSpec, digest
from glasshive.peer import accounts
from glasshive.peer import executor as executor_module
from glasshive.peer.accounts import Account, Accounts
from glasshive.peer.errors import TraceEnded
from glasshive.peer.executor import Executor
from glasshive.peer.host import Host
from glasshive.peer.host_limits import HostLimits
from glasshive.peer.quotas import Quotas
from glasshive.peer.served_model import ServedModel
from glasshive.security.audit_entry import AuditEntry
from glasshive.security.audit_log import AuditLog
from glasshive.security.audit_trail import entries_in, log_files
from glasshive.security.keys import Identity
from glasshive.security.membership import Certificate, Membership, Role
from glasshive.security.quota import Quota

ISSUER, HOME, ALICE, BOB = (Identity(bytes([number]) * 32) for number in range(1, 5))
SITE = Site("model.layers.0", "output")
TOKENS = (61, 17, 43)
PASSES = Passes((Pass((0,), len(TOKENS), False, ((0, 1),)),))
SAVED_BYTES = len(TOKENS) * 32 * 4  # the output of a block
INVITE = b"of sixteen bytes"
NAME = "sentinel-of-a-save"
CONSTANT = torch.full((32,), 12345.678)
CONSTANT_NAME = digest(TensorSpec(DType.FLOAT32, (32,)), tensor_to_bytes(CONSTANT))


def part_of(served: ServedModel, *more: Node) -> tuple[Part, bytes]:
    """Saves what a block gives, and what `more` says after nodes 0 (the read) and 1 (the save)."""
    nodes = {NodeId(i): one for i, one in enumerate([Read(SITE, 0), Save(Ref(NodeId(0)), NAME)])}
    nodes |= {NodeId(2 + i): one for i, one in enumerate(more)}
    stop = served.outline.event(SITE)
    stage = Stage(0, tuple(nodes), forward=True, stop_event=stop)
    part = Part(0, Span(0, 2), Graph(nodes), (stage,), {})
    return part, encode_part(part, PASSES)


FAILING = (
    Op("full", ((1,), 99, DType.INT64)),
    Op("index_select", (Ref(NodeId(0)), 1, Ref(NodeId(2)))),
    Save(Ref(NodeId(3)), "never"),
)
WITH_CONSTANT = (
    Const(CONSTANT_NAME, DType.FLOAT32, (32,)),
    Op("add", (Ref(NodeId(0)), Ref(NodeId(2)), 1)),
    Save(Ref(NodeId(3)), "sum"),
)


@dataclass
class Swarm:
    """A host, with accounts in a folder, and the membership that all keep to."""

    network: MemoryNetwork
    served: ServedModel
    folder: Path
    private: bool = True
    traces: int = 0

    def __post_init__(self) -> None:
        quotas = Quotas(self.folder / "quotas") if self.private else None
        log = AuditLog(self.folder / "audit", HOME, "lab", retry_seconds=0.01)
        gate = self.gate(HOME, Role.HOST)
        self.accounts = Accounts(gate=gate, quotas=quotas, audit_log=log)
        self.home = self.network.transport(HOME, gate=gate)
        self.host = Host(
            self.home, HOME, self.served, limits=HostLimits(traces=4), accounts=self.accounts
        )

    def gate(self, who: Identity, role: Role, quota: Quota | None = None) -> MemberGate | None:
        if not self.private:
            return None
        certificate = Certificate(
            ISSUER.peer_id,
            who.peer_id,
            role,
            "lab",
            hashlib.sha256(repr(quota).encode()).digest()[:16],
            INVITE,
            time.time() + 3600,
            quota or Quota(),
        ).sign(ISSUER)
        return MemberGate(Membership("lab", [ISSUER.peer_id]), time.time, certificate)

    def member(self, who: Identity, quota: Quota | None = None) -> Client:
        gate = self.gate(who, Role.CLIENT, quota)
        return Client(self, who, self.network.transport(who, dht=False, gate=gate))

    async def close(self) -> None:
        self.host.close()
        await self.home.close()
        await asyncio.to_thread(self.accounts.close)

    def entries(self, folder: Path | None = None) -> list[AuditEntry]:
        """What is written down."""
        files = log_files((folder or self.folder) / "audit")
        return [one.entry for one in entries_in(files, HOME.peer_id)]


@dataclass
class Client:
    swarm: Swarm
    identity: Identity
    transport: MemoryTransport

    async def asked(self, *more: Node) -> Stream:
        """The stream of a new trace."""
        self.swarm.traces += 1
        home, served = self.swarm.home, self.swarm.served
        address = PeerAddress(home.peer_id, home.addresses)
        stream = await self.transport.open_stream(address, TRACE_PROTOCOL, 5)
        trace_id = self.swarm.traces.to_bytes(16, "big")
        data = part_of(served, *more)[1]
        request = request_of(
            *(self.identity.peer_id, home.peer_id, data),
            model_id=served.manifest.model_id,
            trace_id=trace_id,
        )
        await stream.send(encode(prepare_of(self.identity, request)), data)
        return stream

    async def running(self, *more: Node) -> Stream:
        """The stream of a trace that was accepted, and told to run."""
        stream = await self.asked(*more)
        wanted = decode((await stream.receive(5)).header, Need)
        for name in wanted.digests:
            assert name == CONSTANT_NAME
            await send_tensor(stream, Constant("float32", [32]), tensor_to_bytes(CONSTANT), 5)
        decode((await stream.receive(5)).header, Accepted)
        ids = torch.tensor([TOKENS])
        await send_tensor(stream, Input(0, "input_ids", "int64", [1, 3]), tensor_to_bytes(ids), 5)
        await stream.send(encode(Run(0)))
        return stream

    async def traced(self, *more: Node) -> Done | Failed:
        """How a trace ends."""
        return await end_of(await self.running(*more))

    async def refusal(self, *more: Node) -> Failed:
        """Why a trace is not run."""
        stream = await self.asked(*more)
        return decode((await stream.receive(5)).header, Failed)


async def end_of(stream: Stream) -> Done | Failed:
    while True:
        frame = await stream.receive(20)
        if is_a(frame.header, Done) or is_a(frame.header, Failed):
            return decode(frame.header, Done, Failed)
        assert any(is_a(frame.header, kind) for kind in (Alive, Saved, More))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 (it comes true in another task or thread)
            await asyncio.sleep(0.005)


@pytest_asyncio.fixture
async def swarms(served: ServedModel, tmp_path: Path) -> AsyncIterator[Callable[..., Any]]:
    """Makes swarms, each in a network of its own, and closes them."""
    made: list[Swarm] = []

    async def make(model: ServedModel = served, **changes: Any) -> Swarm:
        swarm = Swarm(MemoryNetwork(), model, tmp_path / f"data-{len(made)}", **changes)
        made.append(swarm)
        await swarm.host.start()
        return swarm

    yield make
    for swarm in made:
        await swarm.close()


def slow(served: ServedModel) -> ServedModel:
    """The same at a token a second, by its own account."""
    return dataclasses.replace(served, pace=dataclasses.replace(served.pace, tokens_per_second=1.0))


# Each quota, and another member -----------------------------------------------------------------


@pytest.mark.asyncio
async def test_traces_at_a_time(swarms: Any) -> None:
    swarm = await swarms()
    alice, bob = swarm.member(ALICE, Quota(traces=1)), swarm.member(BOB)
    held = await alice.asked()
    decode((await held.receive(5)).header, Need)
    refused = await alice.refusal()
    assert refused.code == "QuotaExceeded"
    assert refused.text == (
        "your quota of traces at a time on this host is 1, and as many are running; wait until one "
        "has ended, or ask who runs the swarm for a larger one"
    )
    assert isinstance(await bob.traced(), Done)
    await held.send(encode(Cancel()))
    await until(lambda: swarm.host.load == 0.0)
    # As soon as one has ended, the client's next may follow.
    for _ in range(3):
        assert isinstance(await alice.traced(), Done)


@pytest.mark.asyncio
async def test_seconds_of_a_day_are_estimated_first_and_counted_then(
    swarms: Any, served: ServedModel
) -> None:
    swarm = await swarms(slow(served))
    alice, bob = swarm.member(ALICE, Quota(seconds_a_day=2)), swarm.member(BOB)
    refused = await alice.refusal()
    assert refused.code == "QuotaExceeded"
    assert refused.text.startswith(
        "this trace takes about 3.05 s of computing here, and of your quota of 2 a day on this "
        "host 0 are used or taken by what runs; trace less at a time; more is free at "
    )
    alice = swarm.member(ALICE, Quota(seconds_a_day=4))  # as `glasshive quota` gives it
    for _ in range(2):  # in truth it takes much less, and so the second fits, too
        assert isinstance(await alice.traced(), Done)
    swarm.accounts._quotas._used[ALICE.peer_id].seconds = 4.0
    refused = await alice.refusal()
    assert refused.text.startswith("your quota is 4 s of computing a day on this host, and 4 are ")
    assert isinstance(await bob.traced(), Done)


@pytest.mark.asyncio
async def test_saved_bytes_of_a_day(swarms: Any) -> None:
    swarm = await swarms()
    quota = Quota(saved_bytes_a_day=2 * SAVED_BYTES + 1)
    alice, bob = swarm.member(ALICE, quota), swarm.member(BOB)
    for _ in range(2):
        assert isinstance(await alice.traced(), Done)
    refused = await alice.refusal()
    assert refused.code == "QuotaExceeded"
    assert refused.text.startswith(
        f"this trace takes about {SAVED_BYTES} saved bytes here, and of your quota of "
        f"{2 * SAVED_BYTES + 1} a day on this host {2 * SAVED_BYTES} are used"
    )
    assert isinstance(await bob.traced(), Done)
    await until(lambda: len(swarm.entries()) == 4)
    last = swarm.entries()[2]
    assert (last.client, last.outcome, last.saved_bytes) == (ALICE.peer_id, "QuotaExceeded", 0)


@pytest.mark.asyncio
async def test_failed_traces_count(swarms: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    awaited: list[torch.device] = []
    monkeypatch.setattr(executor_module, "wait_for", awaited.append)
    swarm = await swarms()
    alice = swarm.member(ALICE, Quota(saved_bytes_a_day=3 * SAVED_BYTES, seconds_a_day=1000))
    failed = await alice.traced(*FAILING)
    assert isinstance(failed, Failed)
    assert failed.code == "ShapeMismatch"
    assert len(awaited) == 1  # what the device was given before the failure counts
    await until(lambda: len(swarm.entries()) == 1)
    (entry,) = swarm.entries()
    assert (entry.outcome, entry.saved_bytes) == ("ShapeMismatch", SAVED_BYTES)
    used = swarm.accounts._quotas._used[ALICE.peer_id]
    assert used.saved_bytes == SAVED_BYTES
    assert 0 < used.seconds < 1000


@pytest.mark.asyncio
async def test_who_cancels_pays_for_the_kernel_that_still_runs(
    swarms: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    swarm = await swarms()
    alice = swarm.member(ALICE, Quota(traces=1, seconds_a_day=1000))
    begun, go_on = threading.Event(), threading.Event()
    run = Executor.run

    def endless(self: Executor, *args: Any) -> None:
        begun.set()
        assert go_on.wait(20)
        run(self, *args)

    monkeypatch.setattr(Executor, "run", endless)
    stream = await alice.running()
    await until(begun.is_set)
    # Should the process be killed now, the next knows of it.
    await until(lambda: (swarm.folder / "audit" / "running").exists())
    shutil.copytree(swarm.folder, tmp_path / "killed")
    AuditLog(tmp_path / "killed" / "audit", HOME, "lab").close()
    (killed,) = swarm.entries(tmp_path / "killed")
    assert (killed.client, killed.outcome) == (ALICE.peer_id, "killed")
    await stream.send(encode(Cancel()))
    assert (await end_of(stream)).code == "TraceEnded"  # type: ignore[union-attr]
    assert swarm.host.load == 0.0
    assert (await alice.refusal()).text.startswith("your quota of traces at a time")
    assert swarm.entries() == []
    time_before = swarm.accounts._quotas._used[ALICE.peer_id].seconds
    go_on.set()
    await until(lambda: len(swarm.entries()) == 1)
    (entry,) = swarm.entries()
    assert entry.outcome == "TraceEnded"
    assert swarm.accounts._quotas._used[ALICE.peer_id].seconds > time_before
    assert isinstance(await alice.traced(), Done)


@pytest.mark.asyncio
async def test_a_host_that_stops_writes_down_what_it_ends(
    swarms: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    swarm = await swarms()
    alice = swarm.member(ALICE, Quota(saved_bytes_a_day=SAVED_BYTES))
    begun, go_on = threading.Event(), threading.Event()
    run = Executor.run

    def endless(self: Executor, *args: Any) -> None:
        begun.set()
        assert go_on.wait(20)
        run(self, *args)

    monkeypatch.setattr(Executor, "run", endless)
    await alice.running()
    await until(begun.is_set)
    swarm.host.close()
    await swarm.home.close()
    closing = asyncio.create_task(asyncio.to_thread(swarm.accounts.close))
    await until(lambda: swarm.accounts.audit_log._ending)
    go_on.set()
    await closing
    (entry,) = swarm.entries()
    assert (entry.client, entry.outcome) == (ALICE.peer_id, "TraceEnded")
    assert entry.saved_bytes == 0  # it was cancelled before it could save


def test_what_has_ended_computes_no_more() -> None:
    account = Account(Accounts(), ALICE.peer_id, bytes(16), None, None)
    with account:
        pass
    with pytest.raises(TraceEnded), account.computing():
        pytest.fail("the device worked for a trace that has ended")


def test_time_in_which_others_computed_is_not_charged(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(accounts.time, "perf_counter", lambda: now)
    account = Account(Accounts(), ALICE.peer_id, bytes(16), None, None)
    with account.computing():
        now += 2.0
        with account.resting():
            now += 50.0
        now += 1.0
    assert account.compute_seconds == 3.0


@pytest.mark.asyncio
async def test_a_restart_of_the_host_forgets_nothing(swarms: Any, tmp_path: Path) -> None:
    swarm = await swarms()
    quota = Quota(saved_bytes_a_day=2 * SAVED_BYTES - 1)
    assert isinstance(await swarm.member(ALICE, quota).traced(), Done)
    await swarm.close()
    again = Swarm(MemoryNetwork(), swarm.served, swarm.folder)
    await again.host.start()
    assert (await again.member(ALICE, quota).refusal()).code == "QuotaExceeded"
    assert isinstance(await again.member(BOB).traced(), Done)
    await again.close()
    assert [one.outcome for one in again.entries()] == ["done", "QuotaExceeded", "done"]


# The audit log ----------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_the_log_says_who_ran_what_and_nothing_of_what_it_said(swarms: Any) -> None:
    swarm = await swarms()
    assert isinstance(await swarm.member(BOB).traced(*WITH_CONSTANT), Done)
    await until(lambda: len(swarm.entries()) == 1)
    (entry,) = swarm.entries()
    part, data = part_of(swarm.served, *WITH_CONSTANT)
    assert abs(entry.time_milliseconds - time.time() * 1000) < 60_000
    assert entry == AuditEntry(
        time_milliseconds=entry.time_milliseconds,
        client=BOB.peer_id,
        role="client",
        invite=INVITE,
        trace_id=(1).to_bytes(16, "big"),
        model_id=swarm.served.manifest.model_id,
        dtype="float32",
        blocks="0:2",
        graph_sha256=hashlib.sha256(data).digest(),
        nodes=len(part.graph),
        outcome="done",
        compute_milliseconds=entry.compute_milliseconds,
        saved_bytes=2 * SAVED_BYTES,
    )
    await swarm.close()
    files = [one for one in swarm.folder.rglob("*") if one.is_file()]
    written = b"".join(one.read_bytes() for one in files)
    (line,) = log_files(swarm.folder / "audit")[0].read_bytes().splitlines()
    written += base64.b64decode(json.loads(line)["signed"])
    ids, value = (bytes(tensor_to_bytes(one)) for one in (torch.tensor(TOKENS), CONSTANT))
    folder = str(swarm.served.folder).encode()
    for secret in (ids, value, CONSTANT_NAME, data, NAME.encode(), b"model.layers.0", folder):
        for form in (secret, secret[:12], secret[:9].hex().encode(), base64.b64encode(secret[:9])):
            assert form not in written
    for text in (b"61, 17, 43", b"61,17,43", b"61 17 43", b"12345.67"):
        assert text not in written


@pytest.mark.asyncio
async def test_what_was_never_checked_is_not_written_down(swarms: Any) -> None:
    swarm = await swarms()
    bob = swarm.member(BOB)
    failed = await bob.refusal(Op("full", ((1 << 40,), 1, DType.FLOAT32)))
    assert failed.code == "OverBudget"
    assert (await swarm.member(ALICE, Quota(traces=0)).refusal()).code == "QuotaExceeded"
    assert isinstance(await bob.traced(), Done)
    await until(lambda: len(swarm.entries()) == 1)
    assert swarm.accounts.audit_log._reserved == 0


@pytest.mark.asyncio
async def test_in_a_swarm_of_everyone_there_are_no_members_and_no_quotas(swarms: Any) -> None:
    swarm = await swarms(private=False)
    assert isinstance(await swarm.member(ALICE, Quota(traces=0)).traced(), Done)
    await until(lambda: len(swarm.entries()) == 1)
    (entry,) = swarm.entries()
    assert (entry.client, entry.role, entry.invite) == (ALICE.peer_id, "", b"")


@pytest.mark.asyncio
async def test_while_the_log_cant_be_written_no_trace_begins_and_none_is_lost(
    swarms: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    swarm = await swarms()
    alice, bob = swarm.member(ALICE, Quota(traces=1)), swarm.member(BOB)
    full = threading.Event()
    full.set()
    append = AuditLog._append

    def refusing(self: AuditLog, data: bytes) -> None:
        if full.is_set():
            raise OSError(28, "No space left on device")
        append(self, data)

    monkeypatch.setattr(AuditLog, "_append", refusing)
    assert isinstance(await bob.traced(), Done)  # nobody knew yet
    await until(lambda: bool(swarm.accounts.audit_log.trouble))
    for member in (alice, bob):
        refused = await member.refusal()
        assert refused.code == "Busy"  # a client takes another host
        assert refused.text == (
            "this host can't write its audit log, and runs nothing that it couldn't write down; "
            "try another peer, or tell its owner"
        )
    full.clear()
    await until(lambda: not swarm.accounts.audit_log.trouble)
    assert isinstance(await alice.traced(), Done)
    await until(lambda: len(swarm.entries()) == 2)
    assert [one.client for one in swarm.entries()] == [BOB.peer_id, ALICE.peer_id]


@pytest.mark.asyncio
async def test_an_error_that_nobody_expects_is_written_down(
    swarms: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("in the model's code")

    monkeypatch.setattr(Executor, "run", broken)
    swarm = await swarms()
    failed = await swarm.member(BOB).traced()
    assert isinstance(failed, Failed)
    await until(lambda: len(swarm.entries()) == 1)
    assert swarm.entries()[0].outcome == failed.code == "HostFailed"
