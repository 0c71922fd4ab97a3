"""Handlers of incoming streams: tasks with an owner, bounded per remote and in all.

In a private swarm a handler runs only for who was let in.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from dataclasses import dataclass

from glasshive.dht.errors import SwarmError
from glasshive.dht.framing import Stream
from glasshive.dht.member_gate import MemberGate
from glasshive.dht.transport import StreamHandler
from glasshive.security.keys import PeerId

__all__ = ["HandlerTasks", "StreamLimits"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StreamLimits:
    """How many streams may be open toward this transport at one time."""

    per_remote: int = 64
    in_all: int = 1024


class HandlerTasks:
    """Runs a handler per stream; `close` cancels and awaits them all."""

    def __init__(self, limits: StreamLimits, gate: MemberGate | None = None) -> None:
        self._limits = limits
        self._gate = gate
        self._tasks: set[asyncio.Task[None]] = set()
        self._open: Counter[PeerId] = Counter()
        self._closed = False

    def __len__(self) -> int:
        return len(self._tasks)

    def start(
        self, stream: Stream, handler: StreamHandler, protocol: str
    ) -> asyncio.Task[None] | None:
        """The task that owns `stream` from now on; a stream beyond the limits is only refused.

        None if there are too many even for a refusal.
        """
        remote = stream.peer_id
        refusal: str | None = None
        if self._closed:
            refusal = "closing"
        elif len(self._tasks) >= self._limits.in_all:
            refusal = f"busy: {self._limits.in_all} streams are open, try another peer"
        elif self._open[remote] >= self._limits.per_remote:
            refusal = f"busy: {self._limits.per_remote} streams of yours are open, close some"
        if refusal is not None:
            if self._closed or len(self._tasks) >= 2 * self._limits.in_all:
                stream.reset()
                return None
            task = asyncio.create_task(stream.refuse(refusal))
        else:
            self._open[remote] += 1
            task = asyncio.create_task(self._run(stream, handler, protocol))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _run(self, stream: Stream, handler: StreamHandler, protocol: str) -> None:
        finished = False
        try:
            if self._gate is not None and not await self._gate.accept(stream, protocol):
                return
            await handler(stream)
            await stream.finish()
            finished = True
        except SwarmError as error:
            logger.info("stream_ended protocol=%s peer=%s: %s", protocol, stream.peer_id, error)
        except Exception:
            logger.exception("handler_failed protocol=%s peer=%s", protocol, stream.peer_id)
        finally:
            self._open[stream.peer_id] -= 1
            if not self._open[stream.peer_id]:
                del self._open[stream.peer_id]
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
