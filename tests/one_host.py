"""One real host over the memory transport, and tests in the place of its client and other peers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from askers import prepare_of, record_of, request_of
from lab import gate_now
from transformers import LlamaConfig, LlamaForCausalLM

from glasshive.dht.framing import Stream
from glasshive.dht.memory_transport import MemoryNetwork, MemoryTransport
from glasshive.dht.messages import (
    EDGE_PROTOCOL,
    TRACE_PROTOCOL,
    Accepted,
    Alive,
    Input,
    Need,
    Opening,
    Prepare,
    Run,
    decode,
    encode,
    is_a,
)
from glasshive.dht.records import ModelId
from glasshive.dht.tensor_frames import send_tensor
from glasshive.dht.transport import PeerAddress
from glasshive.graph.dtypes import DType
from glasshive.graph.graph import Graph, Node, NodeId, Ref, Save, Site
from glasshive.graph.kernels import tensor_to_bytes
from glasshive.graph.order import Pass, Passes
from glasshive.graph.plan import BEFORE_PASSES, Part, Span, Stage
from glasshive.graph.plan_codec import encode_part
from glasshive.graph.tensors import TensorSpec
from glasshive.peer.host import Host
from glasshive.peer.host_limits import HostLimits
from glasshive.peer.seen_requests import SeenRequests
from glasshive.peer.served_model import ServedModel, load_served_model
from glasshive.security.keys import Identity
from glasshive.security.membership import Role
from glasshive.security.requests import PlannedPeer, TraceRequest


def tiny_served(folder: Path, span: Span | None = None) -> ServedModel:
    """A Llama of 2 blocks (hidden size 32, vocabulary 64, rows of at most 24 tokens), or a span."""
    if not any(folder.iterdir()):
        config = LlamaConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            vocab_size=64,
            max_position_embeddings=24,
            bos_token_id=1,
            eos_token_id=2,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
    return load_served_model(folder, "tiny", span, dtype=torch.float32, device="cpu")


HOME, CLIENT, OTHER, THIRD = (Identity.generate() for _ in range(4))
_ROLES = {HOME: Role.HOST, CLIENT: Role.CLIENT, OTHER: Role.HOST, THIRD: Role.HOST}
ROWS, SEQ = 256, 24
PASSES = Passes((Pass((0,), SEQ, False, ((0, ROWS),)),))
SITE = Site("model.layers.0", "output")
CARRIED = TensorSpec(DType.FLOAT32, (4,))


def part_of(nodes: Sequence[Node], served: ServedModel) -> Part:
    graph = Graph({NodeId(i): node for i, node in enumerate(nodes)})
    stop = served.outline.event(SITE)
    stage = Stage(0, tuple(graph.nodes), forward=True, stop_event=stop)
    return Part(0, Span(0, 2), graph, (stage,), {})


def waiting() -> Part:
    """Part 1 saves what part 0 sends it."""
    value = NodeId(0)
    graph = Graph({NodeId(1): Save(Ref(value), "s")}, frozenset([value]))
    stage = Stage(BEFORE_PASSES, (NodeId(1),), imports=((value, 0),))
    return Part(1, Span(0, 2), graph, (stage,), {value: CARRIED})


@dataclass
class OneHost:
    """One host, its client, and the other peers of the plan: of part 0 (or 1), and of part 2."""

    served: ServedModel
    host: Host
    home: MemoryTransport
    client: MemoryTransport
    other: MemoryTransport
    third: MemoryTransport
    passes: Passes = PASSES
    traces: int = 0

    @property
    def address(self) -> PeerAddress:
        return PeerAddress(self.home.peer_id, self.home.addresses)

    def request(self, part: Part) -> tuple[TraceRequest, bytes]:
        """What the client asks for in a new trace of this part, and the part's bytes."""
        self.traces += 1
        first = [HOME, OTHER] if part.index == 0 else [OTHER, HOME]
        where = {one.peer_id: one.addresses for one in (self.home, self.other, self.third)}
        model = ModelId(self.served.manifest.model_id)
        peers = [
            PlannedPeer(
                one.peer_id,
                record_of(one, where[one.peer_id], model=model) if i in part.receivers else b"",
            )
            for i, one in enumerate((*first, THIRD))
        ]
        data = encode_part(part, self.passes)
        request = request_of(
            CLIENT.peer_id,
            HOME.peer_id,
            data,
            model_id=self.served.manifest.model_id,
            trace_id=self.trace_id,
            index=part.index,
            peers=peers,
            deadline_seconds=60.0,
        )
        return request, data

    async def send(
        self, prepare: Prepare, data: bytes, sender: MemoryTransport | None = None
    ) -> Stream:
        """The stream on which the client, or `sender`, has sent this."""
        stream = await (sender or self.client).open_stream(self.address, TRACE_PROTOCOL, 5)
        await stream.send(encode(prepare), data)
        return stream

    async def asked(self, part: Part) -> Stream:
        """The client's stream of a new trace of this part."""
        request, data = self.request(part)
        return await self.send(prepare_of(CLIENT, request), data)

    async def prepared(self, part: Part) -> Stream:
        """The same, when the host has accepted it."""
        return await self._accepted(await self.asked(part))

    async def running(self, part: Part) -> Stream:
        """The client's stream of a new trace, which runs."""
        return await self.run(await self.asked(part), part)

    async def run(self, stream: Stream, part: Part) -> Stream:
        """The same stream, of a trace that the client has asked for, when it runs."""
        await self._accepted(stream)
        if part.stages[0].forward:
            ids = torch.zeros((ROWS, SEQ), dtype=torch.int64)
            message = Input(0, "input_ids", "int64", [ROWS, SEQ])
            await send_tensor(stream, message, tensor_to_bytes(ids), 5)
        await stream.send(encode(Run(0)))
        return stream

    async def _accepted(self, stream: Stream) -> Stream:
        decode((await news(stream)).header, Need)
        decode((await news(stream)).header, Accepted)
        return stream

    async def edge(
        self, sender: MemoryTransport | None = None, opening: Opening | None = None
    ) -> Stream:
        """A stream of the other peer, or of `sender`, that opens the edge from part 0 to part 1."""
        stream = await (sender or self.other).open_stream(self.address, EDGE_PROTOCOL, 5)
        await stream.send(encode(opening or Opening(self.trace_id, 0, 1, 0)))
        return stream

    @property
    def trace_id(self) -> bytes:
        """Of the last trace."""
        return self.traces.to_bytes(16, "big")


@asynccontextmanager
async def one_host(
    served: ServedModel,
    *,
    limits: HostLimits | None = None,
    seen: SeenRequests | None = None,
    private: bool = False,
) -> AsyncIterator[OneHost]:
    """A host that serves this over the memory transport, and who deals with it."""
    network = MemoryNetwork()
    everyone = [
        network.transport(one, gate=gate_now(one, role) if private else None)
        for one, role in _ROLES.items()
    ]
    host = Host(everyone[0], HOME, served, limits=limits, seen=seen)
    await host.start()
    yield OneHost(served, host, *everyone)
    host.close()
    for transport in reversed(everyone):
        await transport.close()


async def news(stream: Stream) -> Any:
    """The next frame that is no sign of life."""
    while is_a((frame := await stream.receive(20)).header, Alive):
        pass
    return frame


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 (it comes true in another task)
            await asyncio.sleep(0.005)
