"""Running a plan over the peers of a route: prepare all, then run, gather saves, end everywhere.

The state of a job: `preparing` (every peer checks its part) -> `running` (inputs have left) ->
`done`, `failed` or `cancelled`. Input leaves only after every peer has accepted. Whatever the end
is, every stream is closed, which frees the trace on its peer.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import math
import time
from collections import Counter
from collections.abc import (
    Awaitable,
    Callable,
    Collection,
    Coroutine,
    Iterable,
    Mapping,
    Sequence,
)
from dataclasses import dataclass, field
from functools import partial
from typing import Final, Literal, TypeAlias

import torch
from torch import Tensor

from glasshive.client.errors import (
    NoRoute,
    PeerBusy,
    PeerError,
    PeerFailed,
    PeerLost,
    TraceTimeout,
)
from glasshive.client.hearing import Hearing
from glasshive.client.hop import HopReport
from glasshive.client.left_out import LeftOut, what_became
from glasshive.client.mending import Mending
from glasshive.client.peer_stream import PeerStream, blaming, how_little_it_says
from glasshive.client.provenance import Replaced
from glasshive.client.relay import Pair, Relayed, Relays
from glasshive.client.step_watch import STEP_LIMITS, ExpectedSeconds, StepLimits, StepWatch
from glasshive.dht.errors import MalformedMessage, SwarmError, TransportLost
from glasshive.dht.messages import (
    SILENCE_SECONDS,
    TRACE_PROTOCOL,
    Accepted,
    Constant,
    Done,
    Input,
    Need,
    Prepare,
    Revise,
    Run,
    Saved,
    decode,
    encode,
    spec_of,
)
from glasshive.dht.records import PeerRecord
from glasshive.dht.tensor_frames import receive_tensor, send_tensor
from glasshive.dht.transport import PeerAddress, Transport
from glasshive.graph.errors import BadTensor
from glasshive.graph.kernels import spec_of as spec_of_tensor
from glasshive.graph.kernels import tensor_from_bytes, tensor_to_bytes
from glasshive.graph.plan import Plan
from glasshive.graph.plan_codec import encode_part
from glasshive.graph.tensors import TensorSpec
from glasshive.security.envelope import payload_digest
from glasshive.security.errors import SecurityError
from glasshive.security.keys import Identity, PeerId
from glasshive.security.requests import MAX_REVISIONS, PlannedPeer, TraceRequest
from glasshive.security.results import SavesDigest, TraceResult

OWN_DAEMON_SECONDS: Final = 0.2
"""Within which the loss of our own network daemon is seen, after that of what went through it."""
TIMERS_SECONDS: Final = 0.05
"""So much earlier than its time a timer may end, by another clock than its own."""

StandIn: TypeAlias = Callable[[int, Callable[[], Collection[int]]], Awaitable[PeerRecord]]
State: TypeAlias = Literal["preparing", "running", "done", "failed", "cancelled"]


@dataclass(frozen=True, slots=True)
class PassInput:
    """One pass's tokens: int64 `[batch, seq]`. Mask and positions only if a row is padded."""

    input_ids: Tensor
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None


@dataclass
class Job:
    """One plan on one route. Create it and `run` it once; cancelling that ends it on every peer."""

    transport: Transport
    identity: Identity  # the transport's
    plan: Plan
    peers: list[PeerAddress]  # by the parts' index
    records: list[bytes]  # what each peer signed of itself, by which others find it
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
    # Who may run the part of this index in place of its peer, or that peer itself where it has come
    # back; raises NoRoute. What is known of the peers that it dials has to be valid then: the
    # second argument says which parts they have at the time.
    stand_in: StandIn | None = None
    # The records of peers that have announced themselves anew since: these live for a minute.
    known: Callable[[], Mapping[PeerId, bytes]] = dict
    # Told how long a peer took to answer what it was asked first.
    on_answer: Callable[[PeerId, float], None] = lambda peer, seconds: None
    most_moves: int = 0
    allowed_seconds: float | None = None  # all tries together; None: as this one
    left_out: LeftOut | None = None  # of all tries; None: of this one
    relay: Collection[Pair] = ()  # known not to reach each other
    silence_seconds: float = SILENCE_SECONDS  # a peer that says nothing for so long is lost
    step_limits: StepLimits = STEP_LIMITS  # and one that does nothing
    expected_seconds: ExpectedSeconds = lambda part, stage: 0.0
    clock: Callable[[], float] = time.monotonic
    state: State = "preparing"
    saves: dict[str, Tensor] = field(default_factory=dict)
    sent_bytes: int = 0
    received_bytes: int = 0
    hops: list[HopReport] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.hops = [HopReport(self.peers[part.index], part) for part in self.plan.parts]
        self.began_at = self.clock()
        self.has_run = False  # whether inputs may have left
        self.replaced: list[Replaced] = []
        self._left_out = self.left_out or LeftOut(
            now=self.transport.now, tried_at=self.clock, clock=self.clock
        )
        self.moves = 0  # how often a part was given to another peer or given anew, or was to be
        self._given = [1] * len(self.peers)  # by part: how often it was given to a peer
        self._revisions: Counter[PeerId] = Counter()  # the highest one that each peer was shown
        self._streams: dict[int, PeerStream] = {}  # by the part's index
        self.hearing = Hearing(self._streams, self.silence_seconds, self.clock)
        here = {peer.peer_id for peer in self.peers}
        self.relays = Relays(
            *(self.transport, [pair for pair in self.relay if pair <= here], self.silence_seconds),
            left_seconds=lambda: self.left_seconds,
            on_bytes=self._count_relayed,
        )
        self._mending = Mending(
            *(self._streams, self._given, self.relays, self._revise),
            start=lambda work: self._tasks.create_task(work),
            clock=self.clock,
        )

    @property
    def relayed(self) -> tuple[Relayed, ...]:
        """Between which peers something was passed on."""
        return tuple(self.relays.used.values())

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
        try:
            async with asyncio.timeout(self.left_seconds) as timer:
                await self._together(self._prepare(hop) for hop in self.hops)
                self.state, self.has_run = "running", True
                for one, other in itertools.combinations(self.hops, 2):
                    self._mending.carry(one, other)
                await self._together(self._run_hop(hop) for hop in self.hops)
                if self.plan.passes.are_generation:
                    self._check_complete()
        except (TimeoutError, PeerFailed) as error:
            self.state = "failed"
            # A peer may be quicker to say that the deadline is over.
            is_ended = isinstance(error, PeerFailed) and error.code == "TraceEnded"
            if not timer.expired() and not (is_ended and self.left_seconds < TIMERS_SECONDS):
                if isinstance(error, PeerFailed) and is_ended and "deadline" in str(error):
                    raise self._limited_by(error) from None
                raise
            slow = ", ".join(
                f"{hop.peer.peer_id} (blocks {hop.part.span}, {hop.doing(self.hops, self.clock())})"
                for hop in self.hops
                if hop.state != "done"
            )
            raise TraceTimeout(
                f"the trace was not done in the {self._allowed_seconds:g} s that it had; "
                f"not done: {slow or 'nobody'}; allow more with deadline=, or leave out a "
                "slow peer with avoid="
            ) from None
        except asyncio.CancelledError:
            self.state = "cancelled"
            running = [stream.cancel() for stream in self._streams.values()]
            await asyncio.gather(*running, return_exceptions=True)
            streams = [one.stream.close() for one in self._streams.values()]
            await asyncio.gather(*streams, return_exceptions=True)
            raise
        except BaseException:
            self.state = "failed"
            raise
        finally:
            for opened in self._streams.values():
                opened.stream.reset()  # at once: the deadline may be over
            await self.relays.close()
        self.state = "done"
        return self.saves

    @property
    def _allowed_seconds(self) -> float:
        return self.deadline_seconds if self.allowed_seconds is None else self.allowed_seconds

    def _limited_by(self, error: PeerFailed) -> TraceTimeout:
        """What it means that a peer says that the deadline passed, when it hasn't."""
        return TraceTimeout(
            f"peer {error.peer} (blocks {error.span}) ended the trace after "
            f"{self.clock() - self.began_at:.3g} s by a limit of its own, before the deadline of "
            f"{self._allowed_seconds:g} s was over; ask for less at a time, or leave it out with "
            "avoid="
        )

    async def _together(self, several: Iterable[Coroutine[None, None, None]]) -> None:
        async def run() -> None:
            async with asyncio.TaskGroup() as self._tasks:
                for one in several:
                    self._tasks.create_task(one)

        try:
            # A task of its own: until Python 3.13 a group that fails leaves whoever waits for it
            # counted as cancelled, and a timeout around it then ends as if it were none
            # (github.com/python/cpython/issues/116720).
            await asyncio.create_task(run())
        except BaseExceptionGroup as group:
            error = min(group.exceptions, key=how_little_it_says)
            await self._check_own_daemon(error)
            raise error from None

    async def _check_own_daemon(self, error: BaseException) -> None:
        """Raise TransportLost if a peer seems lost because our own network daemon is.

        Its streams end a few milliseconds before it is seen to have.
        """
        if isinstance(error, PeerLost):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(OWN_DAEMON_SECONDS):
                    await self.transport.lost.wait()
            if self.transport.lost.is_set():
                raise TransportLost("the network daemon of this process is lost") from error

    async def _prepare(self, hop: HopReport) -> None:
        body = encode_part(hop.part, self.plan.passes)
        before = self._revisions.get(hop.peer.peer_id)
        revision = int(hop.stands_in) if before is None else before + 1
        request = self._request(hop, hashlib.sha256(body).digest(), revision)
        signed = request.sign(self.identity, self.transport.now())
        self._revisions[hop.peer.peer_id] = revision
        told = [(given, revision) for given in self._given]
        watch = StepWatch(hop, self.hops, self.expected_seconds, self.step_limits, self.clock)
        with blaming(hop, self.silence_seconds, "while it was asked to prepare"):
            stream = PeerStream(
                await self.transport.open_stream(hop.peer, TRACE_PROTOCOL, self.silence_seconds),
                hop,
                self.hops,
                self.silence_seconds,
                request,
                payload_digest(signed),
                on_lost=partial(self._mend, hop),
                on_idle=partial(self._get_going, hop, watch),
                watch=watch,
                told=told,
                revision=request.revision,
            )
            self._streams[hop.part.index] = stream
            await stream.stream.send(encode(Prepare(signed)), body, self.silence_seconds)
            self.sent_bytes += len(body)
            asked_at = self.clock()
            frame = await stream.receive()
            self.on_answer(hop.peer.peer_id, self.clock() - asked_at)
            for name in decode(frame.header, Need).digests:
                tensor = self.consts.get(name)
                if tensor is None:
                    raise MalformedMessage("asked for a constant that is not in the trace")
                spec = spec_of_tensor(tensor)
                data = tensor_to_bytes(tensor)
                await self._send_tensor(stream, Constant(spec.dtype.value, list(spec.shape)), data)
            frame = await stream.receive()
            hop.peak_bytes = decode(frame.header, Accepted).peak_bytes

    def _request(self, hop: HopReport, part_sha256: bytes, revision: int) -> TraceRequest:
        # One that nobody has now is not dialled either: who has it next is told of.
        relayed = [
            i
            for i in hop.neighbours
            if self.relays.are_relayed(hop, self._hop(i)) or self._hop(i).became
        ]
        receivers = hop.part.receivers.difference(relayed)
        known, both = self.known(), zip(self.peers, self.records, strict=True)
        self.records = [known.get(peer.peer_id, old) for peer, old in both]
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
            part_sha256=part_sha256,
            revision=revision,
            relayed=tuple(sorted(relayed)),
        )

    async def _run_hop(self, hop: HopReport) -> None:
        try:
            while hop.state != "done":
                try:
                    with blaming(hop, self.silence_seconds, "while it ran its part"):
                        await self._run_part(hop, self._streams[hop.part.index])
                except (PeerLost, PeerFailed) as error:
                    is_lost = isinstance(error, PeerLost) or error.is_own_fault
                    if not is_lost or error.peer != hop.peer.peer_id:
                        raise
                    await self._replace(hop, error)
        except PeerError as error:
            peer, hear_others = hop.peer.peer_id, not hop.part.outlives_peers
            self.hearing.ended(peer, error)
            raise await self.hearing.cause(peer, error, hear_others=hear_others) from None
        finally:
            self.hearing.ended(hop.peer.peer_id)

    async def _run_part(self, hop: HopReport, stream: PeerStream) -> None:
        for stage in hop.part.stages:
            if stage.forward and not self.plan.passes.passes[stage.pass_index].step:
                has_ids = hop.part.span.start == 0 or hop.part.sampling is not None
                await self._send_inputs(stream, stage.pass_index, has_ids)
        # No peer answers for another: a save comes from whoever runs it.
        own = hop.saves
        known_saves = len(own & self.saves.keys())
        await stream.stream.send(encode(Run(known_saves)), b"", self.silence_seconds)
        hop.state, hop.heard_at = "running", self.clock()  # only now is it heard again
        if self.replaced:
            for one in self.hops:
                self._tasks.create_task(self._tell(one))
        came = SavesDigest()
        while True:
            frame = await stream.receive()
            message = decode(frame.header, Saved, Done)
            if isinstance(message, Done):
                if not self.plan.passes.are_generation:
                    self._check_came(hop, frozenset())
                result = self._result(stream, message, came)
                self._check_heard(hop, result.request.revision)
                hop.state = "done"
                hop.compute_seconds = result.compute_seconds
                hop.wait_seconds = result.wait_seconds
                hop.wire_seconds = result.wire_seconds
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
            try:
                tensor = tensor_from_bytes(spec, data)
            except BadTensor as error:
                raise MalformedMessage(f"sent {message.name!r}: {error}") from error
            if objection := self.objection(message.name, tensor):
                raise MalformedMessage(objection)
            self.saves[message.name] = tensor
            if self.plan.passes.are_generation:
                self._left_out.gained()
            hop.saved_bytes += len(data)
            self.received_bytes += len(data)

    # Peers that are lost --------------------------------------------------------------------

    async def _replace(self, hop: HopReport, lost: PeerError) -> None:
        """Have another peer accept the part of one that is lost, or that one when it is back.

        One that has failed by its own fault counts as lost.

        Raises `lost` if the part doesn't outlive its peers, or nobody can be had for it; with what
        the last one said that was asked, and didn't take it.
        """
        if self.stand_in is None or not hop.part.outlives_peers:
            raise lost
        await self._check_own_daemon(lost)
        self._leave_out(hop, lost)
        began, gone = self.clock(), hop.peer.peer_id
        hop.state, hop.stands_in = "preparing", True
        said = ""
        while self.moves < self.most_moves and not self._is_late(hop):
            self._streams[hop.part.index].stream.reset()
            try:
                record = await self.stand_in(hop.part.index, partial(self._to_dial, hop))
            except TransportLost:
                raise
            except (NoRoute, SwarmError):
                break
            self.moves += 1
            self._given[hop.part.index] += 1
            self.relays.forget(hop.peer.peer_id)
            hop.peer = PeerAddress(record.peer_id, record.addresses)
            hop.became = ""
            self.peers[hop.part.index] = hop.peer
            self.records[hop.part.index] = record.signed
            try:
                await self._prepare(hop)
            except PeerError as error:
                self._leave_out(hop, error)
                if isinstance(error, PeerBusy | PeerLost):
                    self.moves -= 1  # it ran nothing again; the deadline bounds how often
                did = "refused" if isinstance(error, PeerFailed | PeerBusy) else "could not"
                said = f"; {hop.peer.peer_id}, asked to stand in, {did}: {error}"
                continue  # then yet another
            if self._is_late(hop):
                break
            self._mending.forget(hop.part.index)
            seconds = self.clock() - began
            self.replaced.append(
                Replaced(
                    str(hop.part.span),
                    lost=gone,
                    by=hop.peer.peer_id,
                    seconds=seconds,
                    backend=record.backend,
                )
            )
            return
        lost.args = (f"{lost}{said}",)
        raise lost

    def _to_dial(self, hop: HopReport) -> Collection[int]:
        """The parts to which a part sends, but those that nobody has now."""
        return [index for index in hop.part.receivers if not self._hop(index).became]

    def _leave_out(self, hop: HopReport, error: PeerError) -> None:
        """Who is lost may come back, but not who did too little, or has had its revisions."""
        stream = self._streams.get(hop.part.index)
        is_bad = stream is not None and stream.peer_id == error.peer and not stream.may_return
        worn_out = self._revisions[error.peer] >= MAX_REVISIONS
        self._left_out.heed(error, for_good=is_bad or worn_out)
        is_awaited = self._left_out.left_seconds(error.peer) > 0
        hop.became, hop.gone_at = what_became(error), self.clock() if is_awaited else math.inf

    def _is_late(self, hop: HopReport) -> bool:
        """Whether a neighbour of a part is done, and so has given up what it had sent."""
        return any(self._hop(index).state == "done" for index in hop.neighbours)

    def _check_heard(self, hop: HopReport, revision: int) -> None:
        """Raise PeerLost if a peer ended before it had heard who needs its values again."""
        told = self._streams[hop.part.index].told
        for index in hop.neighbours:
            other, (given, since) = self._hop(index), told[index]
            is_coming = other.stands_in and other.state == "preparing"
            is_news = given != self._given[index] or since > revision
            if is_coming or (is_news and other.state != "done"):
                raise PeerLost(
                    f"{hop} had done its part and given up what it had sent, before it heard that "
                    f"{other} needs it again",
                    peer=hop.peer.peer_id,
                    is_there=True,
                )

    async def _tell(self, hop: HopReport) -> None:
        """Tell the peer of a part which of its neighbours have changed since it was told."""
        for index in hop.neighbours:
            if self._hop(index).state == "running":
                await self._revise(hop, index, only_news=True)

    async def _revise(self, hop: HopReport, part: int, *, only_news: bool = False) -> None:
        """Have the peer of a part open its edges with another anew, at whoever runs that now."""
        stream = self._streams[hop.part.index]
        async with stream.turn:
            is_news = stream.told[part][0] != self._given[part]
            is_current = self._streams[hop.part.index] is stream and hop.state == "running"
            if not is_current or (only_news and not is_news):
                return
            if stream.revision == MAX_REVISIONS:
                stream.give_up(f"{MAX_REVISIONS} times it was told of other peers; no more are")
                return
            stream.revision += 1
            stream.renewed[part] = stream.revision
            self._revisions[stream.peer_id] = stream.revision
            if is_news:
                stream.told[part] = self._given[part], stream.revision
            request = self._request(hop, stream.request.part_sha256, stream.revision)
            signed = request.sign(self.identity, self.transport.now())
            stream.revisions[payload_digest(signed)] = request
            with contextlib.suppress(SwarmError):  # its own task sees that it is gone
                await stream.stream.send(encode(Revise(signed, part)), b"", self.silence_seconds)

    def _mend(self, hop: HopReport, part: int) -> None:
        """The peer of a part says that its stream with another is gone."""
        self._mending.mend(hop, self._hop(part))

    def _count_relayed(self, n_bytes: int) -> None:
        self.received_bytes += n_bytes
        self.sent_bytes += n_bytes

    def _get_going(self, hop: HopReport, watch: StepWatch) -> None:
        """The peer of a part has got no further for too long.

        Raises PeerLost if another one is to blame, which said before that it was done.
        """
        seconds, other = watch.idle_seconds, watch.at_odds_with
        watch.moved()
        if other is None:
            self._streams[hop.part.index].give_up(
                f"it has got no further in {seconds:.3g} s, and waits for no other peer"
            )
            return
        # One of the two lies, and chance has it whose turn to be blamed it is first: where all is
        # run again, it may be the other's.
        is_turned = self.trace_id[0] % 2 == 1
        good, bad = sorted((hop, other), key=lambda one: one.part.index, reverse=is_turned)
        if hop.part.outlives_peers and other.state == "running":
            self._mending.mend_at_once(good, bad)
            return
        why = f"for {seconds:.3g} s it and {good} have not agreed on what has come"
        if bad.state == "done":
            raise PeerLost(f"{bad}: {why}", peer=bad.peer.peer_id)
        self._streams[bad.part.index].give_up(why)

    def _hop(self, part: int) -> HopReport:
        return next(one for one in self.hops if one.part.index == part)

    def _check_complete(self) -> None:
        """Raise BadAnswer if a save never came of which the chosen tokens don't say why."""
        never = self.never_come(self.saves)
        # Who chooses the tokens first: if it held some back, others had nothing to save.
        for hop in sorted(self.hops, key=lambda one: one.part.sampling is None):
            with blaming(hop, self.silence_seconds, "while it ran its part"):
                self._check_came(hop, never)

    def _check_came(self, hop: HopReport, never: frozenset[str]) -> None:
        if missing := sorted(hop.saves - self.saves.keys() - never):
            raise MalformedMessage(f"said that it is done, but {missing!s:.200} never came")

    def _result(self, stream: PeerStream, message: Done, came: SavesDigest) -> TraceResult:
        try:
            return TraceResult.verify(
                message.result,
                request=stream.request,
                request_sha256=stream.request_sha256,
                saves_sha256=came.digest(),
                revisions=stream.revisions,
                now=self.transport.now(),
            )
        except SecurityError as error:
            raise MalformedMessage(f"its result can't be taken: {error}") from error

    async def _send_inputs(self, stream: PeerStream, pass_index: int, has_ids: bool) -> None:
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

    async def _send_tensor(self, stream: PeerStream, message: object, data: memoryview) -> None:
        # The deadline is each slice's: a slow link is slow, and a frozen peer takes nothing.
        await send_tensor(stream.stream, message, data, self.silence_seconds)
        self.sent_bytes += len(data)
