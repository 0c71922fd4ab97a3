"""Running a plan over the peers of a route: prepare all, then run, gather saves, end everywhere.

The state of a job: `preparing` (every peer checks its part) -> `running` (inputs have left) ->
`done`, `failed` or `cancelled`. Input leaves only after every peer has accepted. Whatever the end
is, every stream is closed, which frees the trace on its peer.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias

import torch
from torch import Tensor

from glasshive.client.errors import (
    BadAnswer,
    PeerBusy,
    PeerError,
    PeerFailed,
    PeerLost,
    TraceTimeout,
)
from glasshive.dht.errors import (
    DeadlineExceeded,
    MalformedMessage,
    PeerUnreachable,
    StreamBusy,
    StreamClosed,
    TransportError,
)
from glasshive.dht.framing import Frame, Stream
from glasshive.dht.messages import (
    SILENCE_SECONDS,
    TRACE_PROTOCOL,
    Accepted,
    Alive,
    Cancel,
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
from glasshive.dht.tensor_frames import receive_tensor, send_tensor
from glasshive.dht.transport import PeerAddress, Transport
from glasshive.graph.graph import Save
from glasshive.graph.kernels import spec_of as spec_of_tensor
from glasshive.graph.kernels import tensor_from_bytes, tensor_to_bytes
from glasshive.graph.plan import Part, Plan
from glasshive.graph.plan_codec import encode_part
from glasshive.graph.tensors import TensorSpec
from glasshive.security.envelope import payload_digest
from glasshive.security.errors import SecurityError
from glasshive.security.keys import Identity, PeerId
from glasshive.security.requests import PlannedPeer, TraceRequest
from glasshive.security.results import SavesDigest, TraceResult

State: TypeAlias = Literal["preparing", "running", "done", "failed", "cancelled"]


@dataclass(frozen=True, slots=True)
class PassInput:
    """One pass's tokens: int64 `[batch, seq]`. Mask and positions only if a row is padded."""

    input_ids: Tensor
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None


@dataclass
class HopReport:
    """What one peer did: its own compute time, and the bytes that it sent on or back."""

    peer: PeerAddress
    part: Part
    state: Literal["preparing", "running", "done"] = "preparing"
    compute_seconds: float = 0.0
    hidden_bytes: int = 0
    carried_bytes: int = 0
    saved_bytes: int = 0
    peak_bytes: int = 0
    audited: bool = False


@dataclass
class Job:
    """One plan on one route. Create it, `run` it once, `cancel` it at any time."""

    transport: Transport
    identity: Identity  # the transport's
    plan: Plan
    peers: Sequence[PeerAddress]  # by the parts' index
    records: Sequence[bytes]  # what each peer signed of itself, by which others find it
    model_id: str
    dtype: str
    inputs: Sequence[PassInput]
    consts: Mapping[bytes, Tensor]
    expected: Mapping[str, TensorSpec]  # the saves, by name
    trace_id: bytes
    deadline_seconds: float
    # Of what has come in the end: which others never come, because a generation has ended.
    never_come: Callable[[Mapping[str, Tensor]], frozenset[str]] = lambda came: frozenset()
    # What is wrong with a save that has come as announced; empty if nothing is.
    objection: Callable[[str, Tensor], str] = lambda name, tensor: ""
    silence_seconds: float = SILENCE_SECONDS  # a peer that says nothing for so long is lost
    clock: Callable[[], float] = time.monotonic
    state: State = "preparing"
    saves: dict[str, Tensor] = field(default_factory=dict)
    sent_bytes: int = 0
    received_bytes: int = 0
    hops: list[HopReport] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.hops = [HopReport(self.peers[part.index], part) for part in self.plan.parts]
        self.began_at = self.clock()
        self._ended = {hop.peer.peer_id: asyncio.Event() for hop in self.hops}
        self._said: dict[PeerId, PeerError] = {}

    @property
    def left_seconds(self) -> float:
        """How long the job may still take."""
        return max(self.began_at + self.deadline_seconds - self.clock(), 0.0)

    async def run(self) -> dict[str, Tensor]:
        """The saved tensors by name, on the CPU.

        Raises PeerFailed for what a peer refused or what failed there, PeerLost for a peer that
        cannot be reached, is gone or has fallen silent, BadAnswer for one that breaks the protocol,
        TraceTimeout.
        """
        streams: list[_PeerStream] = []
        try:
            async with asyncio.timeout(self.deadline_seconds):
                await self._together(self._prepare(hop, streams) for hop in self.hops)
                self.state = "running"
                by_peer: dict[str, _PeerStream] = {stream.peer_id: stream for stream in streams}
                await self._together(self._run_hop(hop, by_peer) for hop in self.hops)
                if self.plan.passes.are_generation:
                    self._check_complete()
        except TimeoutError:
            self.state = "failed"
            slow = ", ".join(
                f"{hop.peer.peer_id} (blocks {hop.part.span}, {hop.state})"
                for hop in self.hops
                if hop.state != "done"
            )
            raise TraceTimeout(
                f"the trace was not done in the {self.deadline_seconds:.3g} s that it had; "
                f"still at work: {slow or 'nobody'}; allow more with deadline=, or leave out a "
                "slow peer with avoid="
            ) from None
        except asyncio.CancelledError:
            self.state = "cancelled"
            await asyncio.gather(*(_cancel(stream) for stream in streams), return_exceptions=True)
            raise
        except BaseException:
            self.state = "failed"
            raise
        finally:
            await asyncio.gather(*(one.stream.close() for one in streams), return_exceptions=True)
        self.state = "done"
        return self.saves

    async def _together(self, several: Iterable[Coroutine[None, None, None]]) -> None:
        try:
            async with asyncio.TaskGroup() as tasks:
                for one in several:
                    tasks.create_task(one)
        except BaseExceptionGroup as group:
            raise min(group.exceptions, key=_how_little_it_says) from None

    async def _prepare(self, hop: HopReport, streams: list[_PeerStream]) -> None:
        body = encode_part(hop.part, self.plan.passes)
        request = self._request(hop, body)
        signed = request.sign(self.identity, self.transport.now())
        with _blaming(hop, self.silence_seconds, "while it was asked to prepare"):
            stream = _PeerStream(
                await self.transport.open_stream(hop.peer, TRACE_PROTOCOL, self.silence_seconds),
                hop,
                self.hops,
                self.silence_seconds,
                request,
                payload_digest(signed),
            )
            streams.append(stream)
            await stream.stream.send(encode(Prepare(signed)), body, self.silence_seconds)
            self.sent_bytes += len(body)
            frame = await stream.receive()
            for name in decode(frame.header, Need).digests:
                tensor = self.consts.get(name)
                if tensor is None:
                    raise MalformedMessage("asked for a constant that is not in the trace")
                spec = spec_of_tensor(tensor)
                data = tensor_to_bytes(tensor)
                await self._send_tensor(stream, Constant(spec.dtype.value, list(spec.shape)), data)
            frame = await stream.receive()
            hop.peak_bytes = decode(frame.header, Accepted).peak_bytes

    def _request(self, hop: HopReport, part: bytes) -> TraceRequest:
        receivers = hop.part.receivers
        return TraceRequest(
            client=self.transport.peer_id,
            host=hop.peer.peer_id,
            swarm=self.transport.swarm,
            trace_id=self.trace_id,
            model_id=self.model_id,
            dtype=self.dtype,
            peers=tuple(
                PlannedPeer(peer.peer_id, record if index in receivers else b"")
                for index, (peer, record) in enumerate(zip(self.peers, self.records, strict=True))
            ),
            part_index=hop.part.index,
            deadline_seconds=float(self.left_seconds),
            part_sha256=hashlib.sha256(part).digest(),
        )

    async def _run_hop(self, hop: HopReport, streams: Mapping[str, _PeerStream]) -> None:
        try:
            with _blaming(hop, self.silence_seconds, "while it ran its part"):
                await self._run_part(hop, streams[hop.peer.peer_id])
        except PeerError as error:
            self._said[hop.peer.peer_id] = error
            self._ended[hop.peer.peer_id].set()
            if error.peer != hop.peer.peer_id:
                await self._hear_out(error.peer)
            # That one may blame a third in its turn, and so on.
            said = [error]
            while (other := self._said.get(said[-1].peer)) is not None and other not in said:
                said.append(other)
            raise min(said, key=_how_little_it_says) from None
        finally:
            self._ended[hop.peer.peer_id].set()

    async def _hear_out(self, peer: PeerId) -> None:
        """Wait a while until a peer that another one blames has spoken for itself.

        A peer whose part fails ends its streams to its neighbours, and they may be quicker to say
        that they have lost it than it is to say why: it may have much to send to a slow client.
        """
        ended = self._ended.get(peer)
        if ended is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.silence_seconds):
                    await ended.wait()

    async def _run_part(self, hop: HopReport, stream: _PeerStream) -> None:
        for stage in hop.part.stages:
            if stage.forward and not self.plan.passes.passes[stage.pass_index].step:
                has_ids = hop.part.span.start == 0 or hop.part.sampling is not None
                await self._send_inputs(stream, stage.pass_index, has_ids)
        await stream.stream.send(encode(Run()), b"", self.silence_seconds)
        hop.state = "running"
        # No peer answers for another: a save comes from whoever runs it.
        own = _saves_of(hop)
        came = SavesDigest()
        while True:
            frame = await stream.receive()
            message = decode(frame.header, Saved, Done)
            if isinstance(message, Done):
                if not self.plan.passes.are_generation:
                    self._check_came(hop, frozenset())
                result = self._result(stream, message, came)
                hop.state = "done"
                hop.compute_seconds = result.compute_seconds
                hop.hidden_bytes = sum(one.hidden_bytes for one in result.traffic)
                hop.carried_bytes = sum(one.carried_bytes for one in result.traffic)
                hop.audited = result.audited
                await stream.stream.close()
                return
            spec = spec_of(message.dtype, message.shape)
            wanted = self.expected[message.name] if message.name in own else None
            if wanted is None or message.name in self.saves or spec != wanted:
                raise MalformedMessage(
                    f"sent {message.name[:40]!r} as {spec}; "
                    f"{wanted or 'nothing of that name'} is expected of it"
                )
            came.begin(message.name, message.dtype, message.shape)
            data = await receive_tensor(stream, frame, spec, self.silence_seconds, came.update)
            tensor = tensor_from_bytes(spec, data)
            if objection := self.objection(message.name, tensor):
                raise MalformedMessage(objection)
            self.saves[message.name] = tensor
            hop.saved_bytes += len(data)
            self.received_bytes += len(data)

    def _check_complete(self) -> None:
        """Raise BadAnswer if a save never came of which the chosen tokens don't say why."""
        never = self.never_come(self.saves)
        # Who chooses the tokens first: if it held some back, others had nothing to save.
        for hop in sorted(self.hops, key=lambda one: one.part.sampling is None):
            with _blaming(hop, self.silence_seconds, "while it ran its part"):
                self._check_came(hop, never)

    def _check_came(self, hop: HopReport, never: frozenset[str]) -> None:
        if missing := sorted(_saves_of(hop) - self.saves.keys() - never):
            raise MalformedMessage(f"said that it is done, but {missing!s:.200} never came")

    def _result(self, stream: _PeerStream, message: Done, came: SavesDigest) -> TraceResult:
        try:
            return TraceResult.verify(
                message.result,
                request=stream.request,
                request_sha256=stream.request_sha256,
                saves_sha256=came.digest(),
                now=self.transport.now(),
            )
        except SecurityError as error:
            raise MalformedMessage(f"its result can't be taken: {error}") from error

    async def _send_inputs(self, stream: _PeerStream, pass_index: int, has_ids: bool) -> None:
        one = self.inputs[pass_index]
        named = {
            "input_ids": one.input_ids if has_ids else None,
            "attention_mask": one.attention_mask,
            "position_ids": one.position_ids,
        }
        for name, tensor in named.items():
            if tensor is not None:
                message = Input(pass_index, name, "int64", list(tensor.shape))
                await self._send_tensor(stream, message, tensor_to_bytes(tensor.to(torch.int64)))

    async def _send_tensor(self, stream: _PeerStream, message: object, data: memoryview) -> None:
        # The deadline is each slice's: a slow link is slow, and a frozen peer takes nothing.
        await send_tensor(stream.stream, message, data, self.silence_seconds)
        self.sent_bytes += len(data)


_ALIVE: Final = encode(Alive())
_STOOD_STILL_SECONDS: Final = 0.5


@dataclass(frozen=True, slots=True)
class _PeerStream:
    """The trace stream to one peer. `Alive` says no more than that the peer is not silent.

    `Failed` may come in place of any other frame, also of a tensor's next slice.
    """

    stream: Stream
    hop: HopReport
    hops: Sequence[HopReport]  # all of them
    silence_seconds: float
    request: TraceRequest
    request_sha256: bytes

    @property
    def peer_id(self) -> PeerId:
        return self.stream.peer_id

    async def receive(self, deadline_seconds: float | None = None) -> Frame:
        """The next frame that is news.

        Raises what a `Failed` means, and DeadlineExceeded if nothing at all came for long.
        """
        patience_seconds = deadline_seconds or self.silence_seconds
        while True:
            began = time.monotonic()
            try:
                frame = await self.stream.receive(patience_seconds)
            except DeadlineExceeded:
                if time.monotonic() - began > patience_seconds + _STOOD_STILL_SECONDS:
                    continue  # it was this process that stood still; what came meanwhile is there
                raise
            if is_a(frame.header, Failed):
                raise _failure(self.hop, decode(frame.header, Failed), self.hops)
            if frame.header != _ALIVE:
                return frame


def _how_little_it_says(error: BaseException) -> int:
    """A peer that says what is wrong with its part, or with another peer's, says more than one that
    has only lost contact."""
    return 0 if isinstance(error, PeerFailed) else 1 if isinstance(error, BadAnswer) else 2


def _saves_of(hop: HopReport) -> set[str]:
    """The names of what a peer saves."""
    return {node.name for node in hop.part.graph.nodes.values() if isinstance(node, Save)}


async def _cancel(stream: _PeerStream) -> None:
    await stream.stream.send(encode(Cancel()), b"", 1.0)


_OF_NEIGHBOURS: Final[dict[str, type[PeerError]]] = {
    "NeighbourLost": PeerLost,
    "NeighbourBusy": PeerBusy,
    "BadNeighbour": BadAnswer,
}


def _failure(hop: HopReport, message: Failed, hops: Sequence[HopReport]) -> PeerError:
    """What a peer's `Failed` means: its own trouble with the part, or another peer's absence."""
    who = _who(hop)
    text = _printable(message.text)
    if (kind := _OF_NEIGHBOURS.get(message.code)) is not None:
        # It may speak of those that the plan gives it to deal with, and of nobody else.
        others = {i for stage in hop.part.stages for _, i in (*stage.imports, *stage.exports)}
        named = [one for one in hops if one.part.index in others and one.peer.peer_id in text]
        if not named:
            return kind(f"{who} says: {text}", peer=hop.peer.peer_id)
        return kind(f"{_who(named[0])}: {who} says: {text}", peer=named[0].peer.peer_id)
    if message.code == "Busy":
        return PeerBusy(f"{who} is busy: {text}", peer=hop.peer.peer_id)
    return PeerFailed(
        text,
        code=_printable(message.code),
        node=message.node if message.node >= 0 else None,
        peer=hop.peer.peer_id,
        span=hop.part.span,
    )


def _who(hop: HopReport) -> str:
    return f"peer {hop.peer.peer_id} (blocks {hop.part.span})"


def _printable(text: str) -> str:
    """Text from a peer without what could steer a terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


class _blaming:  # noqa: N801  (reads as a phrase in the `with` that uses it)
    """Turns what the network says about one peer into an error that names the peer."""

    def __init__(self, hop: HopReport, silence_seconds: float, doing: str) -> None:
        self.hop = hop
        self.silence_seconds = silence_seconds
        self.doing = doing

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        who = _who(self.hop)
        if isinstance(error, MalformedMessage):
            raise BadAnswer(f"{who}: {error}", peer=self.hop.peer.peer_id) from error
        if isinstance(error, DeadlineExceeded):
            raise PeerLost(
                f"{who} has been silent for {self.silence_seconds:g} s {self.doing}: it is frozen, "
                "or the network between you and it is down",
                peer=self.hop.peer.peer_id,
            ) from error
        if isinstance(error, StreamBusy):
            raise PeerBusy(f"{who} is busy: {error}", peer=self.hop.peer.peer_id) from error
        if isinstance(error, PeerUnreachable | StreamClosed | TransportError):
            raise PeerLost(
                f"{who} was lost {self.doing}: {error}", peer=self.hop.peer.peer_id
            ) from error
