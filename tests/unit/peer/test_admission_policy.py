"""A host runs what the policy in force allows, and says which rule refused the rest."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from askers import prepare_of, request_of
from signers import DAY, LIMITS, NOW, WHITELIST

from glasshive.dht.errors import StreamRefused
from glasshive.dht.memory_transport import MemoryNetwork, MemoryTransport
from glasshive.dht.messages import (
    FILES_PROTOCOL,
    TRACE_PROTOCOL,
    Accepted,
    AskFile,
    Constant,
    Failed,
    File,
    Need,
    decode,
    encode,
)
from glasshive.dht.tensor_frames import send_tensor
from glasshive.dht.transport import PeerAddress
from glasshive.graph.codec import encode_graph
from glasshive.graph.dtypes import DType
from glasshive.graph.graph import (
    Call,
    Const,
    Graph,
    Node,
    NodeId,
    Op,
    Param,
    Read,
    Ref,
    Save,
    Site,
    Write,
)
from glasshive.graph.kernels import spec_of, tensor_to_bytes
from glasshive.graph.ops import OPS
from glasshive.graph.order import Pass, Passes
from glasshive.graph.plan import Part, Span, Stage
from glasshive.graph.plan_codec import encode_part
from glasshive.graph.tensors import digest
from glasshive.peer.host import Host
from glasshive.peer.host_limits import HostLimits
from glasshive.peer.served_model import ServedModel
from glasshive.peer.serving import Serving
from glasshive.security.keys import Identity, PeerId
from glasshive.security.manifest import ModelId
from glasshive.security.policy import Policy
from glasshive.security.requests import PlannedPeer
from glasshive.security.whitelist import limits_by_name

BLOCK = Site("model.layers.0", "output")
READ = Read(BLOCK, 0)
R0 = Ref(NodeId(0))
WHO = "whitelist 7 of swarm 'public'"
ALL_OPS = {name: spec.version for name, spec in OPS.items()}
TENSOR = torch.arange(64, dtype=torch.float32)
CONST = Const(digest(spec_of(TENSOR), tensor_to_bytes(TENSOR)), DType.FLOAT32, (64,))


def policy(version: int = 7, **changes: Any) -> Policy:
    """A policy of every op, module and model, but for the changes."""
    wide = replace(
        WHITELIST, version=version, ops=ALL_OPS, readable=("**",), writable=("**",), models=None
    )
    return Policy.effective(replace(wide, **changes), NOW)


def limited(**changes: int) -> Policy:
    return policy(limits=replace(LIMITS, **changes))


class Client:
    """Asks one host for traces of one pass."""

    def __init__(self, host: Host, served: ServedModel, network: MemoryNetwork, home: Any) -> None:
        self.host = host
        self._served = served
        self._home = PeerAddress(home.peer_id, home.addresses)
        self.identity = Identity.generate()
        self._transport: MemoryTransport = network.transport(self.identity, dht=False)
        self._number = 0

    async def ask_file(self, name: str) -> int:
        """The bytes of a file of the model."""
        stream = await self._transport.open_stream(self._home, FILES_PROTOCOL, 5)
        await stream.send(encode(AskFile(self._served.manifest.model_id, name)))
        size_bytes = decode((await stream.receive(5)).header, File).size_bytes
        await stream.close()
        return size_bytes

    async def ask(
        self,
        *nodes: Node,
        rows: int = 1,
        seq: int = 3,
        peers: Sequence[PeerId] = (),
        meanwhile: Callable[[], None] = lambda: None,
    ) -> Accepted | Failed:
        """What the host says to a graph of these nodes and a save of the first.

        `meanwhile` is called when it has checked the graph and waits for constants.
        """
        self._number += 1
        graph = Graph({NodeId(i): one for i, one in enumerate([*nodes, Save(R0, "s")])})
        stop = self._served.outline.event(BLOCK)
        stage = Stage(0, tuple(graph.nodes), forward=True, stop_event=stop)
        part = Part(0, Span(0, 2), graph, (stage,), {})
        passes = Passes((Pass((0,), seq, False, ((0, rows),)),))
        data = encode_part(part, passes)
        request = request_of(
            self.identity.peer_id,
            self._home.peer_id,
            data,
            model_id=self._served.manifest.model_id,
            trace_id=self._number.to_bytes(16, "big"),
            peers=[PlannedPeer(one) for one in (self._home.peer_id, *peers)],
        )
        stream = await self._transport.open_stream(self._home, TRACE_PROTOCOL, 5)
        await stream.send(encode(prepare_of(self.identity, request)), data)
        answer = decode((await stream.receive(10)).header, Need, Failed)
        if isinstance(answer, Failed):
            return answer
        meanwhile()
        for _ in answer.digests:
            await send_tensor(stream, Constant("float32", [64]), tensor_to_bytes(TENSOR), 5)
        return decode((await stream.receive(10)).header, Accepted, Failed)


@asynccontextmanager
async def client_of(
    served: ServedModel,
    rules: Policy,
    limits: HostLimits | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> AsyncIterator[Client]:
    network = MemoryNetwork()
    identity = Identity.generate()
    home = network.transport(identity)
    host = Host(home, identity, served, limits=limits, policy=rules, clock=clock)
    await host.start()
    client = Client(host, served, network, home)
    try:
        yield client
    finally:
        host.close()
        await client._transport.close()
        await home.close()


async def refusal(served: ServedModel, rules: Policy, *nodes: Node, **how: Any) -> Failed:
    """What a host under these rules answers, which runs the same under the wide policy."""
    async with client_of(served, policy()) as client:
        assert isinstance(await client.ask(*nodes, **how), Accepted)
        client.host.apply(rules)
        answer = await client.ask(*nodes, **how)
    assert isinstance(answer, Failed), answer
    return answer


# What may run -----------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_an_op_outside_is_refused_with_its_node(served: ServedModel) -> None:
    some = {name: OPS[name].version for name in ("add", "mul")}
    said = await refusal(served, policy(ops=some), READ, Op("relu", (R0,)))
    assert (said.code, said.node) == ("NotAllowed", 1)
    assert said.text == (
        f"node 1: the op 'relu' is not allowed here by {WHO}; the nearest allowed: mul, add"
    )


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("nodes", "done"),
    [
        ((READ,), "node 0: reading 'model.layers.0'"),
        ((READ, Write(BLOCK, 0, R0, "set")), "node 1: writing 'model.layers.0'"),
        ((READ, Call("model.norm", (R0,))), "node 1: calling 'model.norm'"),
        (
            (Param("model.layers.0.mlp.up_proj", "weight"),),
            "node 0: reading a weight of 'model.layers.0.mlp.up_proj'",
        ),
    ],
    ids=["read", "write", "call", "param"],
)
async def test_a_module_outside_is_refused_with_its_node(
    served: ServedModel, nodes: tuple[Node, ...], done: str
) -> None:
    reads = done.startswith("node 0") or "calling" in done
    # Only what the last node needs is taken away.
    left = ("model.layers.0",) if "calling" in done else ("model.layers.1",)
    rules = policy(readable=left) if reads else policy(writable=left)
    said = await refusal(served, rules, *nodes)
    assert (said.code, said.node) == ("NotAllowed", int(done[5]))
    what = "read" if reads else "written"
    assert said.text == (
        f"{done} is not allowed here by {WHO}; the nearest that may be {what}: {left[0]}"
    )


@pytest.mark.asyncio
async def test_a_model_outside_is_refused(served: ServedModel) -> None:
    said = await refusal(served, policy(models={ModelId("ab" * 32): "other"}), READ)
    assert said.code == "NotAllowed"
    assert said.text == (
        f"the model 'tiny' with manifest {served.manifest.model_id[:16]}... is not allowed by "
        f"{WHO}; allowed: other"
    )
    async with client_of(served, policy(models={ModelId(served.manifest.model_id): "t"})) as client:
        assert isinstance(await client.ask(READ), Accepted)


@pytest.mark.asyncio
async def test_revoked_keys_are_refused(served: ServedModel) -> None:
    async with client_of(served, policy()) as client:
        me = client.identity.peer_id
        assert await client.ask_file("config.json") > 2
        client.host.apply(policy(revoked_clients=frozenset([me])))
        assert await client.ask(READ) == Failed(
            "NotAllowed",
            -1,
            f"the client {me} may not use this host by {WHO}; ask whoever signs that, or use "
            "another key",
        )
        with pytest.raises(StreamRefused, match="may not use this host by whitelist 7"):
            await client.ask_file("config.json")
        client.host.apply(policy(revoked_peers=frozenset([me])))  # as a host, and it is none
        assert isinstance(await client.ask(READ), Accepted)
        assert await client.ask(READ, peers=(me,)) == Failed(
            "NotAllowed",
            -1,
            f"the peer {me} may not work with this host by {WHO}; leave it out with avoid=",
        )


# Limits -----------------------------------------------------------------------------------------

ADD = Op("add", (R0, 1, 1))


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("name", "value", "nodes", "code", "node", "says"),
    [
        ("graph_bytes", 20, (READ,), "OverBudget", -1, "a graph of {} bytes, but 20 are"),
        ("nodes", 1, (READ,), "OverBudget", -1, "2 nodes, but 1 are allowed by"),
        ("const_bytes", 255, (READ, CONST), "OverBudget", -1, "of 256 bytes, but 255 are"),
        ("peak_bytes", 511, (READ,), "OverBudget", 0, "bytes at once, but 511 are allowed"),
        ("flops", 1, (READ, ADD), "OverBudget", 1, "FLOPs, but 1 are allowed by"),
        ("saved_bytes", 383, (READ,), "OverBudget", 1, "saves to 384 bytes, but 383 are"),
        ("steps", 0, (READ,), "OverBudget", 0, "step 0 of a generation, but 0 steps are"),
        ("batch_rows", 0, (READ,), "BadGraph", -1, "at most 0 rows by limits.batch_rows"),
        ("context_tokens", 2, (READ,), "BadGraph", -1, "2 tokens by limits.context_tokens"),
    ],
)
async def test_every_limit_is_kept_and_named(
    served: ServedModel,
    name: str,
    value: int,
    nodes: tuple[Node, ...],
    code: str,
    node: int,
    says: str,
) -> None:
    said = await refusal(served, limited(**{name: value}), *nodes)
    assert (said.code, said.node) == (code, node)
    graph = Graph({NodeId(0): READ, NodeId(1): Save(R0, "s")})
    assert says.format(len(encode_graph(graph))) in said.text
    assert WHO in said.text
    if name not in ("nodes", "const_bytes", "steps"):
        assert f"by limits.{name} of {WHO}" in said.text


@pytest.mark.asyncio
async def test_seconds_are_kept_and_named(served: ServedModel) -> None:
    slow = replace(served, pace=replace(served.pace, tokens_per_second=1.0))
    said = await refusal(slow, limited(seconds=2), READ)
    assert (said.code, said.node) == ("OverBudget", -1)
    assert f"but 2 s are allowed by limits.seconds of {WHO}; trace fewer" in said.text


@pytest.mark.asyncio
async def test_traces_at_a_time_are_kept_and_named(served: ServedModel) -> None:
    async with client_of(served, limited(traces_per_client=1)) as client:
        assert isinstance(await client.ask(READ), Accepted)
        assert await client.ask(READ) == Failed(
            "Busy",
            -1,
            "1 traces of yours are running here; no more are allowed by limits.traces_per_client "
            f"of {WHO}",
        )


@pytest.mark.asyncio
async def test_the_host_s_own_limits_stay_its_own(served: ServedModel) -> None:
    async with client_of(served, policy(), HostLimits(batch_rows=1)) as client:
        assert client.host.policy.limits.batch_rows == 1
        said = await client.ask(READ, rows=2)
    assert isinstance(said, Failed)
    assert said.text.endswith("this peer takes at most 1 rows of 8192 tokens")


def test_each_limit_is_the_smaller_one() -> None:
    """But constants, which the policy itself counts."""
    own = HostLimits()
    numbers = limits_by_name(own.numbers())
    assert limits_by_name(own.under(Policy.of_release()).numbers()) == numbers
    for name in numbers.keys() - {"const_bytes"}:
        less = Policy.of_release().capped(replace(own.numbers(), **{name: numbers[name] - 1}))
        told = limits_by_name(own.under(less).numbers())
        assert told.pop(name) == numbers[name] - 1, name
        if name != "peak_bytes":  # of which constants are a part
            assert told == {one: value for one, value in numbers.items() if one != name}


# In service -------------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_a_newer_policy_counts_from_the_next_admission_on(served: ServedModel) -> None:
    nodes = (READ, Op("relu", (R0,)))
    async with client_of(served, policy()) as client:
        assert isinstance(await client.ask(*nodes), Accepted)
        without = {name: version for name, version in ALL_OPS.items() if name != "relu"}
        client.host.apply(policy(8, ops=without))
        said = await client.ask(*nodes)  # the same bytes, whose bill was known
        assert isinstance(said, Failed)
        assert "not allowed here by whitelist 8 of swarm 'public'" in said.text
        assert client.host.load == 1 / 16  # the first goes on
        client.host.apply(policy(9))
        assert isinstance(await client.ask(*nodes), Accepted)


@pytest.mark.asyncio
@pytest.mark.parametrize("what", ["op", "client", "peer", "model"])
async def test_a_newer_policy_counts_for_whoever_still_sends(
    served: ServedModel, what: str
) -> None:
    async with client_of(served, policy()) as client:
        me = client.identity.peer_id
        changes: dict[str, Any] = {
            "op": {"ops": {name: one for name, one in ALL_OPS.items() if name != "relu"}},
            "client": {"revoked_clients": frozenset([me])},
            "peer": {"revoked_peers": frozenset([me])},
            "model": {"models": {ModelId("ab" * 32): "other"}},
        }[what]

        def change() -> None:
            client.host.apply(policy(8, **changes))

        nodes = (READ, CONST, Op("relu", (R0,)))
        said = await client.ask(*nodes, peers=(me,), meanwhile=change)
        assert isinstance(said, Failed)
        assert said.code == "NotAllowed"
        assert "by whitelist 8 of swarm 'public'" in said.text
        assert client.host.load == 0.0


@pytest.mark.asyncio
async def test_constants_have_the_time_of_the_trace(served: ServedModel) -> None:
    now = 100.0
    other = TENSOR + 1
    second = Const(digest(spec_of(other), tensor_to_bytes(other)), DType.FLOAT32, (64,))
    async with client_of(served, policy(), clock=lambda: now) as client:

        def wait() -> None:
            nonlocal now
            now += 31.0  # of 30

        said = await client.ask(READ, CONST, second, meanwhile=wait)
        assert isinstance(said, Failed)
        assert said.code == "TraceEnded"
        assert "before every constant had come" in said.text


@pytest.mark.asyncio
async def test_an_expired_whitelist_is_named_with_why(served: ServedModel) -> None:
    late = Policy.effective(
        replace(WHITELIST, ops=ALL_OPS, models=None), WHITELIST.expires_seconds + DAY
    )
    async with client_of(served, late) as client:
        said = await client.ask(READ, Op("relu", (R0,)))
        assert isinstance(said, Failed)
        assert f"by {WHO} (the whitelist expired at 2027-02-13 08:00 UTC); the nearest" in said.text


@pytest.mark.asyncio
async def test_the_record_tells_the_version_in_force(served: ServedModel) -> None:
    network = MemoryNetwork()
    identity = Identity.generate()
    home = network.transport(identity)
    async with Serving(home, identity, served, policy=policy()) as serving:
        assert serving.record.whitelist_version == 7
        serving.apply(policy(8))
        assert serving.record.whitelist_version == 8
    await home.close()
    identity = Identity.generate()
    home = network.transport(identity)
    async with Serving(home, identity, served) as serving:
        assert serving.record.whitelist_version == 0
    await home.close()
