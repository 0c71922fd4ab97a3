"""A host: what it answers on its streams, and the traces that it runs.

- `glasshive/trace/1`: a client's trace. Verify, admit, take constants and inputs, run, tell, sign.
- `glasshive/edge/1`: values that other peers of a plan push.
- `glasshive/relay/1`: those that a client passes on between peers that can't reach each other.
- `glasshive/files/1`: manifest, configuration and tokenizer, for clients that have no files.

Every stream has a deadline; every end (done, error, cancel, deadline, client gone) frees all that
the trace held. Errors leave as a name, a node and one sentence; the full text stays in our log.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Final, NoReturn, TypeAlias

import torch
from torch import Tensor

from glasshive.dht.errors import (
    StreamClosed,
    SwarmError,
)
from glasshive.dht.framing import Stream
from glasshive.dht.messages import (
    EDGE_PROTOCOL,
    FILES_PROTOCOL,
    RELAY_PROTOCOL,
    TRACE_PROTOCOL,
    Accepted,
    Alive,
    Cancel,
    Constant,
    Done,
    Failed,
    Need,
    Prepare,
    Revise,
    decode,
    encode,
    spec_of,
)
from glasshive.dht.outcome import forget_outcome
from glasshive.dht.tensor_frames import receive_tensor
from glasshive.dht.transport import PeerAddress, Transport
from glasshive.graph.budget import Bill
from glasshive.graph.errors import BadGraph, GlasshiveError, GraphError, OverBudget
from glasshive.graph.graph import Const
from glasshive.graph.kernels import from_torch_dtype, tensor_from_bytes
from glasshive.graph.kernels import spec_of as spec_of_tensor
from glasshive.graph.order import Passes, slots
from glasshive.graph.plan import Part, check_part
from glasshive.graph.plan_codec import decode_part
from glasshive.graph.tensors import TensorSpec, digest
from glasshive.peer.accounts import Account, Accounts
from glasshive.peer.admission import Admission
from glasshive.peer.checks import Checks
from glasshive.peer.client_stream import ClientStream
from glasshive.peer.const_cache import ConstCache
from glasshive.peer.device_memory import DeviceMemory
from glasshive.peer.edge_streams import EdgeStreams
from glasshive.peer.errors import Busy, HostFailed, NotServed, TraceEnded
from glasshive.peer.executor import Aside
from glasshive.peer.file_server import FileServer
from glasshive.peer.host_limits import HostLimits
from glasshive.peer.hosted_trace import HostedTrace
from glasshive.peer.memory_book import MemoryBook, lent_bytes
from glasshive.peer.planned_peers import check_peers, find_peers
from glasshive.peer.seen_requests import SeenRequests
from glasshive.peer.served_model import ServedModel
from glasshive.peer.slots import Slots
from glasshive.peer.torch_thread import TorchThread
from glasshive.peer.trace_inputs import take_inputs
from glasshive.security.envelope import payload_digest
from glasshive.security.errors import NotAllowed
from glasshive.security.keys import Identity
from glasshive.security.manifest import ModelId
from glasshive.security.policy import Policy
from glasshive.security.requests import TraceRequest
from glasshive.security.results import TraceResult

log = logging.getLogger(__name__)

MAX_FAILURE_CHARS: Final = 500
CLOSE_SECONDS: Final = 5.0
SWEEP_SECONDS: Final = 10.0
# Of the memory promised to traces: what a pass that is put aside holds is in nobody's bill.
PUT_ASIDE_PARTS: Final = 16


def _constant(
    spec: TensorSpec, data: bytearray, name: bytes, device: torch.device, go_on: Callable[[], None]
) -> Tensor:
    """The tensor of those bytes on `device`; raises BadGraph unless `name` is their digest."""
    go_on()
    if digest(spec, data) != name:
        raise BadGraph("a constant whose bytes do not have the announced hash")
    tensor = tensor_from_bytes(spec, data)
    # A 0-dim tensor stays on the CPU, where it takes part in type promotion as a scalar.
    return tensor if tensor.dim() == 0 else tensor.to(device)


def _to_nobody(aside: Aside) -> None:
    """In place of giving way."""


_Checked: TypeAlias = tuple[Part, Passes, Bill, tuple[PeerAddress, ...]]
"""A part that may run, in which passes, what it takes, and where its plan's peers are."""


class Host:
    """One span of one model, served over a transport."""

    def __init__(
        self,
        transport: Transport,
        identity: Identity,
        served: ServedModel,
        *,
        limits: HostLimits | None = None,
        policy: Policy | None = None,
        accounts: Accounts | None = None,
        seen: SeenRequests | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Without a `policy` this release's own is in force, as where no root is configured.

        `identity` signs results; it is that of the transport. Without `seen` the requests that were
        taken are forgotten with the host. Without `accounts` there are no quotas, and nothing is
        written down.
        """
        self._transport = transport
        self._identity = identity
        self._seen = seen or SeenRequests()
        self._model = served.model
        self._outline = served.outline
        self._manifest = served.manifest
        own = limits or HostLimits()
        self.memory_bytes: Final = lent_bytes(served.model.device, own.memory_bytes)
        """What all traces and the constants kept take at most at a time."""
        self._device_memory = DeviceMemory(served.model.device)
        self._own_limits = own.within(self.memory_bytes)
        self._limits = self._own_limits  # under the policy
        self._accounts = accounts or Accounts()
        self._clock = clock
        self._torch = TorchThread(self._limits.traces_per_client, clock)
        self._checks = Checks(self._limits.prepare_seconds)
        self._files = FileServer(
            served.folder,
            served.manifest,
            check_client=lambda client: self._admission.policy.check_client(client),
            patience_seconds=self._limits.prepare_seconds,
        )
        self._consts = ConstCache(self._limits.const_cache_bytes, clock)
        self._sweeping: asyncio.Task[None] | None = None
        self._is_closing = False
        # What the constants kept leave of it.
        self._memory = MemoryBook(
            self.memory_bytes - self._limits.const_cache_bytes,
            clock,
            lambda: self._device_memory.room_bytes - self._consts.held_bytes,
        )
        self._traces: dict[bytes, HostedTrace] = {}
        self._edges = EdgeStreams(self._traces, self._limits.prepare_seconds)
        self._slots = Slots()
        self._pace = served.pace
        self._admission = Admission(served.outline, served.twin, self._limits.budget, self._pace)
        self.apply(policy or Policy.of_release())

    @property
    def policy(self) -> Policy:
        """What clients may run here now, the host's own limits included."""
        return self._admission.policy.capped(self._own_limits.numbers())

    def apply(self, policy: Policy) -> None:
        """Keep to `policy` from the next admission on; what was admitted goes on."""
        self._limits = self._own_limits.under(policy)
        self._admission = self._admission.under(policy, self._limits.budget)

    @property
    def load(self) -> float:
        """How much of its traces the host has running, from 0 to 1."""
        return min(len(self._slots) / self._limits.traces, 1.0)

    @property
    def overdue_seconds(self) -> float:
        """How far a running stage is past the deadline of its trace; 0 or less if none is."""
        return self._torch.overdue_seconds

    async def start(self) -> None:
        """Answer from now on."""
        await self._transport.serve(TRACE_PROTOCOL, self._on_trace)
        await self._transport.serve(EDGE_PROTOCOL, self._edges.answer)
        await self._transport.serve(RELAY_PROTOCOL, self._edges.answer_relay)
        await self._transport.serve(FILES_PROTOCOL, self._files.answer)
        self._sweeping = asyncio.create_task(self._sweep())

    def close(self) -> None:
        """Cancel what runs and take no more work. The transport ends the streams."""
        self._is_closing = True
        for trace in self._traces.values():
            trace.cancel()
        if self._sweeping is not None:
            self._sweeping.cancel()
        self._torch.close()
        self._checks.close()

    async def _sweep(self) -> None:
        """Give the memory of what nobody uses any more back, for as long as the host is there.

        And read off the twin what generations need, so that a peer that takes another's place in
        one doesn't let all wait for that.
        """
        is_ready = False
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            self._consts.drop_ended()
            if not is_ready:
                with contextlib.suppress(GlasshiveError):  # or it can't generate, or has no time
                    await self._checks.run(
                        self._transport.peer_id, lambda go_on: self._outline.steps()
                    )
                is_ready = True

    # A client's trace -----------------------------------------------------------------------

    async def _on_trace(self, stream: Stream) -> None:
        began = self._clock()
        client = ClientStream(stream)
        try:
            frame = await client.receive(self._limits.prepare_seconds)
            signed = decode(frame.header, Prepare).request
            request, envelope = TraceRequest.verify(
                signed,
                client=client.peer_id,
                host=self._transport.peer_id,
                swarm=self._transport.swarm,
                now=self._transport.now(),
            )
            self._admission.policy.check_client(client.peer_id)
            members_only = self._transport.members_only
            async with self._slots.hold(request, client, self._limits, members_only=members_only):
                with self._accounts.open(client.peer_id, request.trace_id) as account:
                    try:
                        self._seen.admit(envelope, self._transport.now(), request.revision)
                        async with client.heard(partial(self._alive, request.trace_id)):
                            result = await self._serve_trace(
                                client, account, request, payload_digest(signed), frame.body
                            )
                    finally:
                        # A stage that can't be interrupted still has its memory.
                        self._torch.after(request.trace_id, partial(self._release, client))
            # The slot is free before the client hears of it: its next trace may follow at once.
            await client.send(encode(Done(result.sign(self._identity, self._transport.now()))))
            log.info(
                "trace_done",
                extra={
                    "client": client.peer_id,
                    "compute_seconds": round(result.compute_seconds, 4),
                    "seconds": round(self._clock() - began, 4),
                },
            )
        except StreamClosed as error:
            log.info("client_left", extra={"client": client.peer_id, "why": str(error)})
        except GlasshiveError as error:
            stream.told_busy = isinstance(error, Busy)
            await self._fail(client, error)
        except Exception:
            # A bug of ours or of the model's code: the client is told that, and nothing more.
            log.exception("host_failed", extra={"client": client.peer_id})
            await self._fail(client, HostFailed("an error inside the host; its own log says what"))

    def _release(self, client: ClientStream) -> None:
        self._memory.release(client)
        if log.isEnabledFor(logging.DEBUG):
            asyncio.get_running_loop().call_soon(self._say_held)  # its place is free by then, too

    def _say_held(self) -> None:
        """Write down what this host holds now that one more trace has ended."""
        held = {"traces": len(self._slots), "promised_bytes": self._memory.promised_bytes}
        log.debug("trace_freed", extra={**held, "tasks": len(asyncio.all_tasks())})

    def _alive(self, trace_id: bytes) -> Alive:
        trace = self._traces.get(trace_id)
        return Alive() if trace is None else trace.alive()

    async def _serve_trace(
        self,
        client: ClientStream,
        account: Account,
        request: TraceRequest,
        request_sha256: bytes,
        body: bytearray,
    ) -> TraceResult:
        trace, bill = await self._prepare(client, account, request, request_sha256, body)
        if trace.passes.are_generation:
            self._check_generations(client)
        # Before the client is told: other peers may push as soon as it has heard of all.
        self._traces[request.trace_id] = trace
        try:
            await client.send(encode(_accepted(bill)))
            log.info(
                "trace_accepted",
                extra={"client": client.peer_id, "nodes": len(trace.part.graph)},
            )
            trace.inputs, trace.known_saves = await take_inputs(
                client, trace.passes, self._outline.vocabulary_tokens, lambda: trace.left_seconds
            )
            return await self._run(client, trace)
        finally:
            del self._traces[request.trace_id]
            trace.end()
            self._torch.after(request.trace_id, trace.forget)

    def _check_generations(self, client: ClientStream) -> None:
        """Raise Busy, or NotAllowed if there may be none, for one more generation of a client's."""
        limits = self._limits
        most, by = limits.generations_per_client, limits.by("generations_per_client")
        if not most:
            raise NotAllowed(f"generations are not allowed here{by}")
        running = sum(
            one.passes.are_generation and one.client.peer_id == client.peer_id
            for one in self._traces.values()
        )
        if running >= most:
            raise Busy(f"{most} generations of yours are running here; no more are allowed{by}")

    async def _prepare(
        self,
        client: ClientStream,
        account: Account,
        request: TraceRequest,
        request_sha256: bytes,
        body: bytearray,
    ) -> tuple[HostedTrace, Bill]:
        limits = self._limits
        if request.model_id != self._manifest.model_id:
            raise NotServed(
                f"model {request.model_id[:16]!r}... is not served here; this peer serves "
                f"{self._manifest.model_id[:16]}... ({self._manifest.name})"
            )
        ours = from_torch_dtype(self._model.dtype).value
        if request.dtype != ours:
            raise NotServed(f"dtype {request.dtype[:16]!r} is not served here; {ours} is")
        ends_at = self._clock() + min(request.deadline_seconds, limits.trace_seconds)
        shown_at = self._transport.now()
        admission, checked = await self._checked(request, shown_at, body)
        part, _, bill, _ = checked
        self._memory.promise(client, client.peer_id, bill.peak_bytes, ends_at)
        account.admit(part, bill, model_id=request.model_id, dtype=ours, sha256=request.part_sha256)
        consts = await self._take_consts(client, part, ends_at)
        if admission is not self._admission:  # a policy came meanwhile
            admission, checked = await self._checked(request, shown_at, body)
        part, passes, bill, peers = checked
        trace = HostedTrace(
            request=request,
            request_sha256=request_sha256,
            client=client,
            account=account,
            peers=peers,
            part=part,
            passes=passes,
            model=self._model,
            pace=self._pace,
            outline=self._outline,
            consts=consts,
            transport=self._transport,
            # Not the client's own deadline: that is no reason to end the process.
            run_on_torch=partial(
                self._torch.run,
                client.peer_id,
                request.trace_id,
                seconds=bill.seconds,
                step_seconds=limits.runaway_seconds(bill.seconds),
            ),
            on_step=self._torch.step,
            overdue_seconds=lambda: self._torch.overdue_seconds,
            give_way=self._torch.give_way if self._may_be_put_aside(passes) else _to_nobody,
            stage_seconds=limits.stage_seconds(bill.seconds),
            ends_at=ends_at,
            clock=self._clock,
        )
        return trace, bill

    def _may_be_put_aside(self, passes: Passes) -> bool:
        """Whether the reserve beside what is promised has room for what these passes hold."""
        most_bytes = self.memory_bytes // PUT_ASIDE_PARTS
        return all(
            self._model.pass_bytes(p.batch, p.seq, p.past) <= most_bytes for p in passes.passes
        )

    async def _checked(
        self, request: TraceRequest, shown_at: float, body: bytearray
    ) -> tuple[Admission, _Checked]:
        """What the part is and takes, by the admission that is in force when this returns."""
        while True:
            admission = self._admission
            policy = admission.policy
            policy.check_client(request.client)
            policy.check_model(ModelId(self._manifest.model_id), self._manifest.name)
            for peer in request.peers:
                policy.check_peer(peer.peer_id)
            work = partial(self._admitted, admission, request, shown_at, body)
            checked = await self._checks.run(request.client, work)
            if admission is self._admission:
                return admission, checked

    def _admitted(
        self,
        admission: Admission,
        request: TraceRequest,
        shown_at: float,
        body: bytearray,
        go_on: Callable[[], None],
    ) -> _Checked:
        model = self._model
        limits = self._own_limits.under(admission.policy)  # of one policy, if another comes now
        request.check_part(body)
        part, passes = decode_part(body, self._own_limits.graph)
        go_on()
        if part.index != request.part_index:
            raise BadGraph(f"part {part.index}, and the request is for part {request.part_index}")
        limits.check_graph_bytes(part, len(body))
        if (part.span.start, part.span.end) != (model.start, model.end):
            raise NotServed(
                f"span {part.span} is not hosted here; this peer hosts {model.start}:{model.end}"
            )
        for one in passes.passes:
            tokens = one.past + one.seq
            if one.group >= 0 and one.step >= limits.graph.steps:
                raise OverBudget(
                    f"step {one.step} of a generation; this peer takes at most "
                    f"{limits.graph.steps} steps{limits.by('steps')}"
                )
            if one.batch > limits.batch_rows or tokens > limits.context_tokens:
                raise BadGraph(
                    f"a pass of {one.batch} rows of {tokens} tokens; this peer takes at most "
                    f"{limits.batch_rows} rows{limits.by('batch_rows')} of "
                    f"{limits.context_tokens} tokens{limits.by('context_tokens')}"
                )
        check_peers(part, request.peers)
        check_part(part, passes, self._outline)
        go_on()
        slots(part.graph, self._outline, passes)
        go_on()
        peers = find_peers(part, request, shown_at, self._transport, go_on)
        return part, passes, admission.admit(part, passes, body, go_on), peers

    async def _take_consts(
        self, client: ClientStream, part: Part, ends_at: float
    ) -> Mapping[bytes, Tensor]:
        wanted: dict[bytes, TensorSpec] = {
            node.digest: TensorSpec(node.dtype, node.shape)
            for node in part.graph.nodes.values()
            if isinstance(node, Const)
        }
        held: dict[bytes, Tensor] = {}
        for name in wanted:
            tensor = self._consts.get(client.peer_id, name)
            if tensor is not None:
                if (found := spec_of_tensor(tensor)) != wanted[name]:
                    raise BadGraph(f"a constant of {wanted[name]} with the hash of one of {found}")
                held[name] = tensor
        missing = [name for name in wanted if name not in held]
        await client.send(encode(Need(missing)))
        for name in missing:
            # Each constant has its time, and all have that of the trace.
            if (left_seconds := ends_at - self._clock()) <= 0:
                raise TraceEnded("the trace's deadline passed before every constant had come")
            patience_seconds = min(self._limits.prepare_seconds, left_seconds)
            frame = await client.receive(patience_seconds)
            message = decode(frame.header, Constant)
            spec = spec_of(message.dtype, message.shape)
            if spec != wanted[name]:
                raise BadGraph(f"a constant of {spec}; {wanted[name]} was announced")
            data = await receive_tensor(client, frame, spec, patience_seconds)
            make = partial(_constant, spec, data, name, self._model.device)
            held[name] = await self._checks.run(client.peer_id, make)
            self._consts.put(client.peer_id, name, held[name])
        return held

    async def _run(self, client: ClientStream, trace: HostedTrace) -> TraceResult:
        run = asyncio.create_task(trace.run())
        watch = asyncio.create_task(self._obey(client, trace))
        for task in (run, watch):
            task.add_done_callback(forget_outcome)  # one of them is asked, and the other may fail
        try:
            await asyncio.wait(
                {run, watch}, timeout=trace.left_seconds, return_when=asyncio.FIRST_COMPLETED
            )
            if run.done():
                return run.result()
            if watch.done():
                watch.result()
            raise TraceEnded("the trace's deadline passed; allow more time with deadline=")
        finally:
            trace.cancel()
            run.cancel()
            watch.cancel()
            await asyncio.wait({run, watch}, timeout=CLOSE_SECONDS)

    async def _obey(self, client: ClientStream, trace: HostedTrace) -> NoReturn:
        """Do what the client says while its trace runs, until that ends it."""
        while True:
            frame = await client.receive(trace.left_seconds + 1)
            message = decode(frame.header, Cancel, Revise)
            if isinstance(message, Cancel):
                raise TraceEnded("the client cancelled the trace")
            shown_at = self._transport.now()
            request, _ = TraceRequest.verify(
                message.request,
                client=client.peer_id,
                host=self._transport.peer_id,
                swarm=self._transport.swarm,
                now=shown_at,
            )
            request.check_revises(trace.request)
            find = partial(self._revised, trace.part, request, shown_at, trace.peers)
            peers = await self._checks.run(client.peer_id, find)
            trace.revise(request, payload_digest(message.request), peers, message.part)

    def _revised(
        self,
        part: Part,
        request: TraceRequest,
        shown_at: float,
        known: tuple[PeerAddress, ...],
        go_on: Callable[[], None],
    ) -> tuple[PeerAddress, ...]:
        for peer in request.peers:
            self._admission.policy.check_peer(peer.peer_id)
        return find_peers(part, request, shown_at, self._transport, go_on, known)

    async def _fail(self, client: ClientStream, error: GlasshiveError) -> None:
        node, said = -1, repr(error)[:MAX_FAILURE_CHARS]
        if isinstance(error, GraphError):
            node = -1 if error.node is None else error.node
            # What a graph came upon may be said in the client's own numbers: an index, a name.
            said = type(error).__name__
        log.info("trace_failed", extra={"client": client.peer_id, "error": said, "node": node})
        if self._is_closing:
            return  # the stream's end says that this peer is gone, and others may take its place
        text = str(error)[:MAX_FAILURE_CHARS]
        try:
            await client.send(encode(Failed(type(error).__name__, node, text)))
        except SwarmError:
            log.info("client_left", extra={"client": client.peer_id})


def _accepted(bill: Bill) -> Accepted:
    return Accepted(bill.peak_bytes, bill.flops, bill.saved_bytes)
