"""Answers the streams on which values go from a part of a trace to another."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from typing import Final, final

from glasshive.dht.errors import MalformedMessage, TransportError
from glasshive.dht.framing import Stream
from glasshive.dht.messages import Opening, Relay, decode, encode
from glasshive.peer.hosted_trace import HostedTrace
from glasshive.security.keys import PeerId

__all__ = ["EdgeStreams"]

NEWS_SECONDS: Final = 2.0
"""For so long a stream is held that the plan gives to another peer as far as is known here."""


@final
class EdgeStreams:
    """Takes values for the `traces` that run, by their ids: from other peers, or by their clients.

    A stream says what it is for within `patience_seconds`.
    """

    def __init__(self, traces: Mapping[bytes, HostedTrace], patience_seconds: float) -> None:
        self._traces = traces
        self._patience_seconds = patience_seconds

    async def answer(self, stream: Stream) -> None:
        """A stream that another peer has opened to push its values."""
        await self._receive(stream)

    async def answer_relay(self, stream: Stream) -> None:
        """A stream that a client has opened, as two peers of its trace can't reach each other.

        Raises MalformedMessage for what is no relay.
        """
        relay = decode((await stream.receive(self._patience_seconds)).header, Relay)
        trace = self._traces.get(relay.trace_id)
        if trace is None or trace.client.peer_id != stream.peer_id:
            await stream.refuse("no such trace of yours here")
            return
        # What makes it so comes by the trace's own stream, and is checked on a thread.
        while trace.request.revision < relay.revision and self._runs(trace):
            await trace.revised.wait()
        if refusal := trace.relay_refusal(relay) if self._runs(trace) else "the trace has ended":
            await stream.refuse(refusal)
        elif relay.sender == trace.part.index:
            await trace.send_by(relay.receiver, stream)
        else:
            await stream.send(encode(relay))  # what is passed on to one that refuses would be lost
            await self._receive(stream, relay.trace_id)

    def _runs(self, trace: HostedTrace) -> bool:
        return self._traces.get(trace.request.trace_id) is trace

    async def _receive(self, stream: Stream, trace_id: bytes | None = None) -> None:
        """Take the values that come; those of trace `trace_id` only, if it is given."""
        opening = decode((await stream.receive(self._patience_seconds)).header, Opening)
        trace = self._traces.get(opening.trace_id)
        if trace is None or trace_id not in (None, opening.trace_id):
            await stream.refuse("no such trace here")
            return
        if refusal := await self._refusal(trace, opening, stream.peer_id):
            await stream.refuse(refusal)
            return
        renewed = trace.renewed[opening.sender]
        try:
            await trace.receive_from(opening, stream)
        except (MalformedMessage, TransportError) as error:
            await trace.lose(opening.sender, error, renewed)
            raise

    async def _refusal(self, trace: HostedTrace, opening: Opening, sender: PeerId) -> str:
        """Why a stream is not taken; a stand-in may be here before its client's word of it."""
        refusal = trace.refusal(opening, sender)
        if opening.again and trace.part.outlives_peers:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(NEWS_SECONDS):
                    while refusal and self._runs(trace):
                        await trace.revised.wait()
                        refusal = trace.refusal(opening, sender)
        # It may have ended as soon as the word came by which the stream would be taken.
        return refusal or ("" if self._runs(trace) else "the trace has ended")
