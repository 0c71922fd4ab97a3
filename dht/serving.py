"""Handlers of incoming streams: tasks with an owner, bounded per remote and in all.

Bounded are how many are open (of a key, from an address, in all), how many are new in a second, and
how long one is open before its first frame begins: all of that before a byte of the stream is read.
Who goes beyond is told so, in a refusal that begins with "busy: ", and a few such refusals are all
that it has of this peer.

In a private swarm a handler runs only for who was let in.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeVar

from glasshive.dht.addresses import origin_of
from glasshive.dht.errors import SwarmError
from glasshive.dht.framing import Stream
from glasshive.dht.member_gate import MemberGate
from glasshive.dht.token_buckets import TokenBuckets
from glasshive.dht.transport import StreamHandler
from glasshive.dht.unfinished_frames import UnfinishedFrames
from glasshive.security.keys import PeerId

__all__ = ["HandlerTasks", "StreamLimits"]

logger = logging.getLogger(__name__)


T = TypeVar("T")

REFUSALS_PER_REMOTE: Final = 8
"""Each lingers for up to two seconds, so that it arrives."""

BUSY_TOKENS: Final = 20
"""What a stream on which this peer said that it is busy takes of its remote's new ones: whoever
asks again and again costs the most, and gets nothing by it."""


@dataclass(frozen=True, slots=True)
class StreamLimits:
    """What others may open toward this transport.

    A trace opens a stream to each host of its route, and each host one to those it sends values to.
    Small traces take 10 to 40 ms besides their passes, and a client has eight at a time: at 40 ms
    they open 200 streams in a second.
    """

    per_remote: int = 64
    per_origin: int = 768  # a class behind one address has most, and leaves others room
    in_all: int = 1024
    new_per_second: float = 200.0  # of one remote
    burst: int = 400
    first_frame_seconds: float = 10.0  # whoever opens a stream has something to say


class HandlerTasks:
    """Runs a handler per stream; `close` cancels and awaits them all."""

    def __init__(
        self,
        limits: StreamLimits,
        gate: MemberGate | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limits = limits
        self._gate = gate
        self._tasks: set[asyncio.Task[None]] = set()
        self._open: Counter[PeerId] = Counter()
        self._open_from: Counter[str] = Counter()
        self._refusing: Counter[PeerId] = Counter()
        self._new = TokenBuckets(limits.new_per_second, limits.burst, clock)
        self.unfinished = UnfinishedFrames()
        self._closed = False

    def __len__(self) -> int:
        return len(self._tasks)

    def start(
        self, stream: Stream, handler: StreamHandler, protocol: str, address: str
    ) -> asyncio.Task[None] | None:
        """The task that owns `stream` from now on; a stream beyond the limits is only refused.

        `address` is the multiaddr that its remote called from.
        None if there are too many even for a refusal.
        """
        stream.origin = origin_of(address)
        stream.unfinished = self.unfinished
        refusal = self._refusal(stream)
        if refusal is None:
            task = asyncio.create_task(self._run(stream, handler, protocol))
            self._count(self._open, stream.peer_id, task)
            self._count(self._open_from, stream.origin, task)
        elif self._closed or not self._may_refuse(stream.peer_id):
            stream.reset()
            return None
        else:
            task = asyncio.create_task(stream.refuse(refusal))
            self._count(self._refusing, stream.peer_id, task)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _refusal(self, stream: Stream) -> str | None:
        """Why a new stream is not served; None if it is."""
        limits = self._limits
        remote, origin = stream.peer_id, stream.origin
        if self._closed:
            return "closing"
        if (wait_seconds := self._new.take(remote)) > 0:
            return (
                f"busy: more than {limits.new_per_second:g} new streams a second of yours, of "
                f"which one told busy counts as {BUSY_TOKENS}; "
                f"try again in {max(wait_seconds, 0.001):.3f} s"
            )
        if self._open[remote] >= limits.per_remote:
            return f"busy: {limits.per_remote} streams of yours are open, close some"
        if origin and self._open_from[origin] >= limits.per_origin:
            return f"busy: {limits.per_origin} streams from your address are open, close some"
        if self._open.total() >= limits.in_all:
            return f"busy: {limits.in_all} streams are open, try another peer"
        return None

    def _may_refuse(self, remote: PeerId) -> bool:
        """Whether there is room for a refusal: what floods this peer is not told each time."""
        return (
            self._refusing[remote] < REFUSALS_PER_REMOTE
            and self._refusing.total() < self._limits.in_all
        )

    @staticmethod
    def _count(among: Counter[T], whose: T, task: asyncio.Task[None]) -> None:
        """Count the task until it has ended."""
        among[whose] += 1

        def ended(_: asyncio.Task[None]) -> None:
            among[whose] -= 1
            if not among[whose]:
                del among[whose]

        task.add_done_callback(ended)

    async def _run(self, stream: Stream, handler: StreamHandler, protocol: str) -> None:
        finished = False
        try:
            if self._gate is not None and not await self._gate.accept(stream, protocol):
                return
            stream.expect_soon(self._limits.first_frame_seconds)
            await handler(stream)
            if stream.told_busy:
                self._new.charge(stream.peer_id, BUSY_TOKENS - 1)
            await stream.finish()
            finished = True
        except SwarmError as error:
            logger.info("stream_ended protocol=%s peer=%s: %s", protocol, stream.peer_id, error)
        except Exception:
            logger.exception("handler_failed protocol=%s peer=%s", protocol, stream.peer_id)
        finally:
            if not finished:
                stream.reset()

    async def close(self) -> None:
        """Cancels every handler and waits until all have ended."""
        self._closed = True
        await self.cancel_all()

    async def cancel_all(self) -> None:
        """Cancels the handlers of now; later streams are served again."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=5)
