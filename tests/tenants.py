"""Clients of one host, over the memory transport: as many as are wanted, honest or not."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch
from askers import request_of
from lab import gate_now

from glasshive.dht.framing import Stream
from glasshive.dht.member_gate import MemberGate
from glasshive.dht.memory_transport import MemoryNetwork, MemoryTransport
from glasshive.dht.messages import (
    TRACE_PROTOCOL,
    Accepted,
    Alive,
    Constant,
    Done,
    Failed,
    Input,
    Need,
    Prepare,
    Run,
    Saved,
    decode,
    encode,
    is_a,
    spec_of,
)
from glasshive.dht.serving import StreamLimits
from glasshive.dht.tensor_frames import receive_tensor, send_tensor
from glasshive.dht.transport import PeerAddress
from glasshive.graph.graph import Graph, Node, NodeId, Read, Ref, Save, Site
from glasshive.graph.kernels import spec_of as spec_of_tensor
from glasshive.graph.kernels import tensor_from_bytes, tensor_to_bytes
from glasshive.graph.order import Pass, Passes
from glasshive.graph.plan import Part, Span, Stage
from glasshive.graph.plan_codec import encode_part
from glasshive.graph.tensors import digest
from glasshive.peer.host import Host
from glasshive.peer.host_limits import HostLimits
from glasshive.peer.served_model import ServedModel
from glasshive.security.keys import Identity
from glasshive.security.membership import Role

SEQ = 3
BLOCK = Site("model.layers.0", "output")
LAST = Site("model.layers.1", "output")
SAVED = (Read(BLOCK, 0), Save(Ref(NodeId(0)), "s"))
IDS = torch.tensor([[1, 5, 9]])


class Tenants:
    """A host of a whole model, and its clients. An async context manager.

    Every part is one row of `SEQ` tokens through both blocks, whose outputs may be read and
    written.
    """

    def __init__(
        self,
        served: ServedModel,
        limits: HostLimits | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        stream_limits: StreamLimits | None = None,
        private: bool = False,
    ) -> None:
        self._network = MemoryNetwork(clock=clock)
        self._private = private
        identity = Identity.generate()
        self.home = self._network.transport(
            identity, stream_limits=stream_limits, gate=self._gate(identity, Role.HOST)
        )
        self._clients: dict[MemoryTransport, Identity] = {}
        self._served = served
        self._numbers = itertools.count(1)
        self.host = Host(self.home, identity, served, limits=limits, clock=clock)
        self.address = PeerAddress(self.home.peer_id, self.home.addresses)

    async def __aenter__(self) -> Tenants:
        await self.host.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.host.close()
        for transport in (*self._clients, self.home):
            await transport.close()

    def client(self, ip: str = "127.0.0.1") -> MemoryTransport:
        """One more client, with a key of its own."""
        identity = Identity.generate()
        gate = self._gate(identity, Role.CLIENT)
        made = self._network.transport(identity, dht=False, ip=ip, gate=gate)
        self._clients[made] = identity
        return made

    def _gate(self, identity: Identity, role: Role) -> MemberGate | None:
        return gate_now(identity, role) if self._private else None

    async def open(self, client: MemoryTransport) -> Stream:
        """A trace stream of that client's on which nothing was said."""
        return await client.open_stream(self.address, TRACE_PROTOCOL, 10)

    def prepare(self, client: MemoryTransport, nodes: Sequence[Node] = SAVED) -> tuple[Any, bytes]:
        """The frame by which that client asks for a trace of these nodes."""
        ids = tuple(map(NodeId, range(len(nodes))))
        read = (node.site for node in nodes if isinstance(node, Read))
        stop = max(map(self._served.outline.event, (LAST, *read)))
        stage = Stage(0, ids, forward=True, stop_event=stop)
        span = Span(0, self._served.model.n_blocks)
        part = Part(0, span, Graph(dict(zip(ids, nodes, strict=True))), (stage,), {})
        passes = Passes((Pass((0,), SEQ, False, ((0, 1),)),))
        data = encode_part(part, passes)
        request = request_of(
            client.peer_id,
            self.home.peer_id,
            data,
            model_id=self._served.manifest.model_id,
            trace_id=next(self._numbers).to_bytes(16, "big"),
        )
        return encode(Prepare(request.sign(self._clients[client], self.home.now()))), data

    async def ask(
        self,
        client: MemoryTransport,
        nodes: Sequence[Node] = SAVED,
        constants: Sequence[torch.Tensor] = (),
    ) -> tuple[Stream, Any]:
        """The stream of a trace of that client's, and the answer: Accepted or Failed."""
        stream = await self.open(client)
        await stream.send(*self.prepare(client, nodes))
        answer = decode((await heard(stream)).header, Need, Failed)
        if isinstance(answer, Need):
            by_name = {name_of(tensor): tensor for tensor in constants}
            for name in answer.digests:
                await send_constant(stream, by_name[name])
            answer = decode((await heard(stream)).header, Accepted, Failed)
        return stream, answer

    async def begin(self, stream: Stream, ids: torch.Tensor = IDS) -> None:
        """Give an accepted trace its input, and have it run."""
        message = Input(0, "input_ids", "int64", list(ids.shape))
        await send_tensor(stream, message, tensor_to_bytes(ids), 10)
        await stream.send(encode(Run(0)))

    async def saves(self, stream: Stream) -> dict[str, torch.Tensor] | Failed:
        """What a running trace saved, or how it failed. The stream has ended then."""
        found: dict[str, torch.Tensor] = {}
        while True:
            frame = await heard(stream)
            message = decode_one(frame.header)
            if not isinstance(message, Saved):
                await stream.close()
                return message if isinstance(message, Failed) else found
            spec = spec_of(message.dtype, message.shape)
            data = await receive_tensor(stream, frame, spec, 10)
            found[message.name] = tensor_from_bytes(spec, data)

    async def run(
        self,
        client: MemoryTransport,
        nodes: Sequence[Node] = SAVED,
        constants: Sequence[torch.Tensor] = (),
        ids: torch.Tensor = IDS,
    ) -> dict[str, torch.Tensor] | Failed:
        """A whole trace: what it saved, or how it failed."""
        stream, answer = await self.ask(client, nodes, constants)
        if isinstance(answer, Failed):
            await stream.close()
            return answer
        await self.begin(stream, ids)
        return await self.saves(stream)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Returns when the condition holds; raises TimeoutError when that takes long."""
        async with asyncio.timeout(30):
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0)


def name_of(tensor: torch.Tensor) -> bytes:
    """The digest by which a graph names a constant."""
    return digest(spec_of_tensor(tensor), tensor_to_bytes(tensor))


async def send_constant(stream: Stream, tensor: torch.Tensor) -> None:
    """Send a constant that a host needs."""
    spec = spec_of_tensor(tensor)
    message = Constant(spec.dtype.value, list(spec.shape))
    await send_tensor(stream, message, tensor_to_bytes(tensor), 10)


async def heard(stream: Stream) -> Any:
    """The next frame that is news."""
    frame = await stream.receive(30)
    while is_a(frame.header, Alive):
        frame = await stream.receive(30)
    return frame


def decode_one(header: Any) -> Saved | Done | Failed:
    """What a running trace says."""
    return decode(header, Saved, Done, Failed)
