"""One trace on one peer: from `Prepare` to the last byte of its saves, and the end of it.

The loop's side of a trace. It parks what other peers send, hands each stage to the torch thread
when everything that the stage imports has arrived, and sends on what the stage makes: saves to the
client, values to the peers of the plan. The torch thread never waits on a socket: what it makes
goes into queues that hold no more than the bytes that were admitted. Whatever copies a tensor to or
from the device runs on it too: a copy waits for all that the device was given; the loop must not.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final

from torch import Tensor

from glasshive.dht.errors import MalformedMessage, StreamBusy, StreamClosed, SwarmError
from glasshive.dht.framing import Stream
from glasshive.dht.messages import (
    AT_WORK,
    ITS_TURN,
    Alive,
    Dropped,
    Lost,
    Opening,
    Received,
    Relay,
    Resume,
    Saved,
    Value,
    encode,
)
from glasshive.dht.tensor_frames import send_tensor
from glasshive.dht.transport import PeerAddress, Transport
from glasshive.graph.errors import GraphError, StepNeverRan
from glasshive.graph.graph import NodeId, Read, Skip, Write, refs
from glasshive.graph.kernels import spec_of as spec_of_tensor
from glasshive.graph.kernels import tensor_to_bytes
from glasshive.graph.order import Passes
from glasshive.graph.outline import Outline
from glasshive.graph.plan import HIDDEN, TOKENS, Part, Stage
from glasshive.peer.accounts import Account
from glasshive.peer.awaited_values import AwaitedValues, awaited_as, too_early
from glasshive.peer.client_stream import ClientStream
from glasshive.peer.errors import (
    BadNeighbour,
    HostError,
    NeighbourBusy,
    NeighbourLost,
)
from glasshive.peer.executor import Aside, Executor, GiveWay
from glasshive.peer.generation import PassInputs
from glasshive.peer.memory_order import memory_order
from glasshive.peer.outgoing_edge import OPEN_SECONDS, OutgoingEdge, Sendable
from glasshive.peer.pace import HostPace
from glasshive.peer.span_model import SpanModel
from glasshive.security.keys import PeerId
from glasshive.security.requests import TraceRequest
from glasshive.security.results import SavesDigest, TraceResult

log = logging.getLogger(__name__)

TELL_SECONDS: Final = 10.0  # in which the client is told of an end
REOPENED_SECONDS: Final = 0.25  # unasked; by a revision, OPEN_SECONDS

RunOnTorch = Callable[[Callable[[], None]], Awaitable[None]]


@dataclass
class HostedTrace:
    """One tenant's part of a trace while it runs here. Belongs to one task of the host."""

    request: TraceRequest
    request_sha256: bytes
    client: ClientStream
    account: Account
    peers: tuple[PeerAddress, ...]
    part: Part
    passes: Passes
    model: SpanModel
    pace: HostPace
    outline: Outline
    consts: Mapping[bytes, Tensor]
    transport: Transport
    run_on_torch: RunOnTorch
    on_step: Callable[[], None]
    overdue_seconds: Callable[[], float]  # of what the device does, for whomever
    give_way: GiveWay
    stage_seconds: float
    ends_at: float  # by `clock`
    clock: Callable[[], float] = time.monotonic
    inputs: dict[int, PassInputs] = field(default_factory=dict)
    known_saves: int = 0  # so many of the first ones are made, and not sent

    def __post_init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._awaited = AwaitedValues(self.part, self.passes, self.outline)
        self._never_made: set[NodeId] = set()
        self._is_done = False
        self._wait_seconds = 0.0  # for what stages import
        self._stages_done = 0
        self._waits_for = AT_WORK
        self._moves = 0
        self._steps = 0  # the torch thread's alone
        self._digest = SavesDigest()  # the torch thread's alone until the last stage has run
        self._saves: asyncio.Queue[tuple[Saved, memoryview] | None] = asyncio.Queue()
        sent_to = Counter(to for stage in self.part.stages for _, to in stage.exports)
        self._outgoing = {
            to: OutgoingEdge(
                *(self.transport, self.request, to, self._address(to)),
                n_values=n_values,
                left_seconds=lambda: self.left_seconds,
                on_lost=self._tell_lost if self.part.outlives_peers else None,
                clock=self.clock,
            )
            for to, n_values in sorted(sent_to.items())
        }
        self._incoming: dict[int, Stream] = {}  # by the sender's part
        self.revised = asyncio.Event()
        """Set by the next revision of the request, or the end of the trace."""
        self.renewed: Counter[int] = Counter()
        """By another part: the last revision by which the edges with it begin anew."""
        self._executor = Executor(
            *(self.model, self.outline, self.part, self.passes, self.consts, self),
            stage_seconds=self.stage_seconds,
            on_step=self._step,
            give_way=self._give_way,
            clock=self.clock,
        )

    @property
    def left_seconds(self) -> float:
        """How long this trace may still take; 0 at its deadline."""
        return max(self.ends_at - self.clock(), 0.0)

    def alive(self) -> Alive:
        """How far this part is, and for whom it waits. Of what others do here it says nothing.

        Whoever waits for its turn gets no further by itself: it is well as long as the device is.
        """
        if self._waits_for == ITS_TURN and self.overdue_seconds() <= 0:
            self._moves += 1
        return Alive(self._stages_done, self._moves + self._steps, self._waits_for)

    def cancel(self) -> None:
        """Make the torch thread leave this trace at the next module that it watches."""
        self._executor.cancel()

    def end(self) -> None:
        """`cancel`, and end the streams on which other peers push."""
        self.cancel()
        for stream in self._incoming.values():
            stream.reset()
        for edge in self._outgoing.values():
            edge.forget()
        self.revised.set()
        self._awaited.clear()

    def forget(self) -> None:
        """After the end, and when nothing of the trace runs: let go of what it held.

        It refers to itself, and Python would come upon its tensors much later.
        """
        self._executor.forget()
        self._saves = asyncio.Queue()
        self.inputs.clear()
        self.consts = {}
        for edge in self._outgoing.values():
            edge.forget()  # again: a stage may have run on to its end

    async def run(self) -> TraceResult:
        """Run every stage and send everything; returns what the client is told, to be signed.

        Whoever runs it bounds it by the trace's deadline. Raises GraphError for a node that failed,
        and a TransportError if a peer of the plan or the client is gone.
        """
        try:
            async with asyncio.TaskGroup() as tasks:
                saving = tasks.create_task(self._send_saves())
                edges = self._outgoing.values()
                sending = [tasks.create_task(self._send_values(edge)) for edge in edges]
                for stage in self.part.stages:
                    await self._run_stage(stage)
                    self._stages_done += 1
                    self._moves += 1
                self._saves.put_nowait(None)
                for edge in edges:
                    edge.finish()
                # What others send of steps that never ran here: they would take an end of their
                # streams before it for a loss.
                for sender, parked in self._awaited.left():
                    self._waits_for = sender
                    await parked
                self._waits_for = AT_WORK
                await saving
                while not all(edge.delivered.is_set() for edge in edges):
                    for edge in edges:
                        self._waits_for = edge.receiver
                        await edge.delivered.wait()
                self._is_done = True  # who is named now as a stand-in gets nothing from here
                for task in sending:
                    task.cancel()
        except BaseExceptionGroup as group:
            # One cause is enough: the others are its echo in the tasks beside it. A node that
            # failed says more than a peer that was lost meanwhile.
            causes: list[BaseException] = list(group.exceptions)
            raise min(causes, key=lambda e: not isinstance(e, GraphError)) from None
        return TraceResult(
            request=self.request,
            request_sha256=self.request_sha256,
            saves_sha256=self._digest.digest(),
            compute_seconds=self.account.compute_seconds,
            wait_seconds=self._wait_seconds,
            wire_seconds=sum((edge.wire_seconds for edge in self._outgoing.values()), 0.0),
            traffic=tuple(edge.traffic for edge in self._outgoing.values()),
        )

    def refusal(self, opening: Opening, peer_id: PeerId) -> str:
        """Why the plan has no use for a stream that `peer_id` opens so; empty if it has."""
        sender, here = opening.sender, self.part.index
        if sender >= len(self.peers) or self._opener(sender) != peer_id:
            return "the plan gives this edge to another peer"
        if opening.receiver != here:
            return f"this is part {here} of the plan, not part {opening.receiver}"
        if not self._awaited.count(sender):
            return f"the plan has no edge from part {sender} to part {here}"
        if opening.again and not self.part.outlives_peers:
            return "the plan has this edge once"
        if not opening.again and not self._awaited.has_from(sender):
            return f"nothing more is taken from part {sender}"
        return ""

    def relay_refusal(self, relay: Relay) -> str:
        """Why the client can't relay so, by the last revision of its request; empty if it can."""
        here = self.part.index
        if here not in (relay.sender, relay.receiver):
            return f"this is part {here} of the plan"
        if (relay.receiver if relay.sender == here else relay.sender) not in self.request.relayed:
            return "the request doesn't say that this edge is relayed"
        if relay.sender == here and relay.receiver not in self._outgoing:
            return f"the plan has no edge from part {here} to part {relay.receiver}"
        return ""

    async def send_by(self, receiver: int, stream: Stream) -> None:
        """Send that part's values on a stream that the client relays, until it is over."""
        await self._outgoing[receiver].send_by(stream)

    async def receive_from(self, opening: Opening, stream: Stream) -> None:
        """Park what the peer of a part pushes, and tell it when everything has arrived.

        For a stream without a `refusal`. Raises MalformedMessage for anything on it that is not on
        the plan.
        """
        sender = opening.sender
        if (old := self._incoming.get(sender)) is not None:
            if not opening.again:
                raise MalformedMessage(f"part {sender} pushes on two streams at a time")
            old.reset()  # its end was not seen here yet
        self._incoming[sender] = stream
        try:
            if opening.again:
                came = encode(Resume(self._awaited.came[sender]))
                await stream.send(came, b"", self.left_seconds)
            while self._awaited.came[sender] < self._awaited.count(sender):
                key, value = await self._awaited.receive(
                    sender, stream, self.left_seconds, self._has_come
                )
                if self._incoming.get(sender) is not stream:
                    raise StreamClosed(f"part {sender} comes by another stream now")
                self._awaited.park(sender, key, value)
        finally:
            # Its end may be the trace's, and this is still to arrive.
            if self._incoming.get(sender) is stream:
                del self._incoming[sender]
        await stream.send(encode(Received()), b"", self.left_seconds + TELL_SECONDS)

    def _opener(self, sender: int) -> PeerId:
        """On whose streams the values of a part come."""
        is_relayed = sender in self.request.relayed
        return self.client.peer_id if is_relayed else self.peers[sender].peer_id

    def _has_come(self, data: bytearray) -> None:
        self._moves += 1

    async def lose(self, sender: int, why: SwarmError, renewed: int) -> None:
        """The stream on which the peer of the part `sender` pushed has broken.

        It was opened when their edges had been `renewed` so. What waits for it fails, or goes on to
        wait where the part outlives its peers.
        """
        if self.part.outlives_peers and not isinstance(why, MalformedMessage):
            # A sender that opens another stream ends this one first. Where it was told to, it says
            # itself if it can't: here that is only waited for.
            ends_at = self.clock() + REOPENED_SECONDS
            while sender not in self._incoming and self._awaited.has_from(sender):
                if renewed < self.renewed[sender]:
                    renewed, ends_at = self.renewed[sender], self.clock() + OPEN_SECONDS
                if (left_seconds := ends_at - self.clock()) <= 0:
                    return await self._tell_lost(sender, why)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(left_seconds):
                        await self.revised.wait()
            return None
        self._awaited.fail(sender, self._lost(sender, why))

    async def _tell_lost(self, other: int, why: SwarmError) -> None:
        log.info("neighbour_lost", extra={"part": other, "error": repr(why)[:200]})
        deadline_seconds = self.left_seconds + TELL_SECONDS
        lost = Lost(other, self.request.revision)
        await self.client.send(encode(lost), deadline_seconds=deadline_seconds)

    def revise(
        self,
        request: TraceRequest,
        request_sha256: bytes,
        peers: tuple[PeerAddress, ...],
        part: int,
    ) -> None:
        """The plan's parts are with these peers now, and edges with `part` begin anew."""
        if self._is_done:
            return
        self.request, self.request_sha256 = request, request_sha256
        for other, (before, now) in enumerate(zip(self.peers, peers, strict=True)):
            if before.peer_id != now.peer_id and (stream := self._incoming.pop(other, None)):
                stream.reset()
        self.peers = peers
        self.renewed[part] = request.revision
        if (edge := self._outgoing.get(part)) is not None:
            edge.go_on_at(self._address(part))
        self.revised.set()
        self.revised = asyncio.Event()

    def _address(self, part: int) -> PeerAddress | None:
        """Where the peer of a part is; None if the client relays what goes to it."""
        return None if part in self.request.relayed else self.peers[part]

    async def _run_stage(self, stage: Stage) -> None:
        group = self.passes.passes[stage.pass_index].group if stage.forward else -1
        # First what says whether the stage runs at all.
        carried: dict[NodeId, Tensor] = {}
        for value, sender in sorted(stage.imports, key=lambda one: one[0] >= 0):
            if value < 0 and group in self._executor.ended:
                continue  # nobody waits for it; it is taken at the end
            began = self.clock()
            self._waits_for = sender
            key = awaited_as(value, stage)
            tensor = await self._awaited.parked(key)
            self._wait_seconds += self.clock() - began
            self._awaited.take(key)
            if tensor is not None:
                carried[value] = tensor
            elif value < 0:
                self._check_end(stage, value, group)
                self._executor.end(group)
            else:
                self._never_made.add(value)
        self._waits_for = ITS_TURN
        stage = self._what_runs(stage, has_ended=group in self._executor.ended)
        hidden, tokens = carried.pop(HIDDEN, None), carried.pop(TOKENS, None)
        if not (stage.forward or stage.nodes or stage.exports or carried):
            return
        inputs = self.inputs.get(group if group >= 0 else stage.pass_index, PassInputs())

        def work() -> None:
            self._waits_for = AT_WORK
            before_seconds = self.account.compute_seconds
            with self.account.computing():
                while carried:
                    self._executor.put(*carried.popitem())
                self._executor.run(stage, inputs, hidden, tokens)
            if self._is_whole(stage):
                one = self.passes.passes[stage.pass_index]
                seconds = self.account.compute_seconds - before_seconds
                self.pace.saw(one.batch * one.seq, seconds)

        await self.run_on_torch(work)
        if stage.forward and group in self._executor.ended:
            self._drop(stage, [(value, to) for value, to in stage.exports if value == TOKENS])

    def _check_end(self, stage: Stage, value: NodeId, group: int) -> None:
        """Raise BadNeighbour for the end of a generation from one who can't know of it."""
        if value == HIDDEN and self.part.sampling is not None and group not in self._executor.ended:
            sender = next(sender for made, sender in stage.imports if made == value)
            raise self._lost(sender, MalformedMessage(too_early(stage.pass_index)))

    def _what_runs(self, stage: Stage, *, has_ended: bool) -> Stage:
        """The stage without what needs a step that never comes, of which others are told.

        Of a stage whose generation has ended, what is left needs earlier steps only. Raises
        StepNeverRan if a value that never comes would be written somewhere.
        """
        never, nodes = self._never_made, self.part.graph.nodes
        if not has_ended and not never:
            return stage
        if has_ended:
            never.update(value for value, _ in stage.from_hidden)
        left_out = []
        for node_id in stage.nodes:
            node = nodes[node_id]
            lacks = not never.isdisjoint(refs(node))
            if has_ended and isinstance(node, Read | Write | Skip):
                left_out.append(node_id)
            elif lacks and isinstance(node, Write | Skip):
                raise StepNeverRan(
                    "this writes a value of a step that never ran: the generation that it is of "
                    "had ended before, with a stop token; take it from an earlier step, or "
                    "generate with eos_token_id=[]",
                    node=node_id,
                )
            elif lacks:
                left_out.append(node_id)
            else:
                continue
            never.add(node_id)
        dropped = [
            (value, to)
            for value, to in stage.exports
            if value in never or (has_ended and value < 0)
        ]
        self._executor.leave_out(left_out, dropped)
        self._drop(stage, dropped)
        return replace(
            stage,
            nodes=tuple(one for one in stage.nodes if one not in never),
            exports=tuple(one for one in stage.exports if one not in dropped),
            from_hidden=() if has_ended else stage.from_hidden,
            forward=stage.forward and not has_ended,
        )

    def _drop(self, stage: Stage, exports: Iterable[tuple[NodeId, int]]) -> None:
        """Tell those who wait for what a stage would have made that it never comes."""
        for value, receiver in exports:
            self._outgoing[receiver].put(
                Sendable(Dropped(value, stage.pass_index), memoryview(b""))
            )

    def _is_whole(self, stage: Stage) -> bool:
        """Whether the stage runs all that this span has of the model."""
        nodes = self.part.graph.nodes
        return (
            stage.forward
            and self.outline.has_run_all(stage.stop_event)
            and not any(isinstance(nodes[node_id], Skip) for node_id in stage.nodes)
        )

    # Called on the torch thread -------------------------------------------------------------

    def _step(self) -> None:
        self._steps += 1
        self.on_step()

    def _give_way(self, aside: Aside) -> None:
        self.give_way(partial(self._resting, aside))

    @contextlib.contextmanager
    def _resting(self, aside: Aside) -> Iterator[None]:
        """Inside it, the device works for other traces, not on this one's account."""
        self._waits_for = ITS_TURN
        with aside(), self.account.resting():
            yield
        self._waits_for = AT_WORK

    def saved(self, name: str, value: Tensor) -> None:
        """A value for the client (Outbox)."""
        if self.known_saves:
            self.known_saves -= 1
            return
        spec = spec_of_tensor(value)
        message = Saved(name, spec.dtype.value, list(spec.shape))
        data = tensor_to_bytes(value)
        self.account.saved(len(data))
        self._digest.begin(message.name, message.dtype, message.shape)
        self._digest.update(data)
        self._loop.call_soon_threadsafe(self._saves.put_nowait, (message, data))

    def exported(self, stage: Stage, value: NodeId, receiver: int, tensor: Tensor) -> None:
        """A value for another peer of the plan (Outbox)."""
        spec = spec_of_tensor(tensor)
        order = memory_order(tensor)
        shape = list(spec.shape)
        message = Value(value, stage.pass_index, spec.dtype.value, shape, list(order))
        lying = tensor if order == tuple(range(len(order))) else tensor.permute(order)
        out = Sendable(message, tensor_to_bytes(lying))
        self._loop.call_soon_threadsafe(self._outgoing[receiver].put, out)

    def _lost(self, other: int, why: SwarmError) -> HostError:
        who = f"peer {self.peers[other].peer_id} (part {other})"
        if isinstance(why, MalformedMessage):
            return BadNeighbour(f"{who} broke the protocol: {why}")
        if isinstance(why, StreamBusy):
            return NeighbourBusy(f"{who} is busy: {why}")
        return NeighbourLost(f"{who} was lost: {why}")

    # Sending --------------------------------------------------------------------------------

    async def _send_saves(self) -> None:
        while (item := await self._saves.get()) is not None:
            message, data = item
            # A frame ends its stream when its deadline passes, and the client is still to be told.
            deadline_seconds = self.left_seconds + TELL_SECONDS
            await send_tensor(self.client, message, data, deadline_seconds)

    async def _send_values(self, edge: OutgoingEdge) -> None:
        try:
            await edge.run()
        except SwarmError as error:
            raise self._lost(edge.receiver, error) from error
