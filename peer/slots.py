"""Who has which of a host's places for traces, from a valid `Prepare` to the end of the trace."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Final, final

from glasshive.graph.errors import BadGraph
from glasshive.peer.client_stream import ClientStream
from glasshive.peer.errors import Busy
from glasshive.peer.host_limits import HostLimits
from glasshive.security.requests import TraceRequest

__all__ = ["Slots"]

FORMER_SECONDS: Final = 6.0
"""In which what is left of a trace has ended when its client asks for it anew."""


@dataclass(eq=False, slots=True)
class _Slot:
    client: ClientStream
    revision: int
    is_free: asyncio.Event = field(default_factory=asyncio.Event)


@final
class Slots:
    """The slots that are taken, by the id of the trace. `len` is how many."""

    def __init__(self) -> None:
        self._taken: dict[bytes, _Slot] = {}

    def __len__(self) -> int:
        return len(self._taken)

    @contextlib.asynccontextmanager
    async def hold(
        self,
        request: TraceRequest,
        client: ClientStream,
        limits: HostLimits,
        *,
        members_only: bool,
    ) -> AsyncIterator[None]:
        """Inside it the trace has a slot. Raises Busy, or BadGraph for an id that the client uses.

        A client that asks under a higher revision has lost the trace here: what is left of it ends
        first.
        """
        await self._end_former(request, client)
        # Nothing is awaited between look and take.
        self._check(request.trace_id, client, limits, members_only=members_only)
        slot = self._taken[request.trace_id] = _Slot(client, request.revision)
        try:
            yield
        finally:
            del self._taken[request.trace_id]
            slot.is_free.set()

    async def _end_former(self, request: TraceRequest, client: ClientStream) -> None:
        former = self._taken.get(request.trace_id)
        if former is None or former.client.peer_id != client.peer_id:
            return
        if former.revision >= request.revision:
            return
        former.client.reset()
        try:
            async with asyncio.timeout(FORMER_SECONDS):
                await former.is_free.wait()
        except TimeoutError:
            raise Busy(
                "what is left of this trace here has not ended yet; try again soon"
            ) from None

    def _check(
        self, trace_id: bytes, client: ClientStream, limits: HostLimits, *, members_only: bool
    ) -> None:
        """Raise why a trace gets no slot now."""
        clients = [slot.client for slot in self._taken.values()]
        if (same := self._taken.get(trace_id)) is not None:
            if same.client.peer_id == client.peer_id:
                raise BadGraph("a trace of this id is running here")
            # Whoever is asked to stand in is not to blame for what others of the plan do here.
            raise Busy("another client has a trace of this id here; try another peer")
        if len(clients) >= limits.traces:
            raise Busy(f"{limits.traces} traces are running here; try again soon")
        if sum(one.peer_id == client.peer_id for one in clients) >= limits.traces_per_client:
            raise Busy(
                f"{limits.traces_per_client} traces of yours are running here"
                + (f"; no more are allowed{by}" if (by := limits.by("traces_per_client")) else "")
            )
        of_origin = sum(one.origin == client.origin for one in clients)
        # In a private swarm a key costs an invite, and an institution may have one address.
        counted = client.origin and not members_only
        if counted and of_origin >= limits.traces_per_origin:
            raise Busy(
                f"{limits.traces_per_origin} traces from your address are running here, under "
                "whatever keys; wait for one of them, or try another peer"
            )
