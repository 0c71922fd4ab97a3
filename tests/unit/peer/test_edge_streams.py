"""Which streams of other peers a trace takes, at the moment when it ends."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from glasshive.dht.messages import Opening, encode
from glasshive.peer.edge_streams import EdgeStreams
from glasshive.security.keys import Identity

TRACE_ID = bytes(16)


class Trace:
    """One that has no use for a stream until it is told better."""

    def __init__(self) -> None:
        self.request = SimpleNamespace(trace_id=TRACE_ID)
        self.part = SimpleNamespace(outlives_peers=True)
        self.revised = asyncio.Event()
        self.refused = "the plan gives this edge to another peer"
        self.was_asked = asyncio.Event()
        self.renewed = {0: 0}
        self.taken: list[Opening] = []

    def refusal(self, opening: Opening, peer_id: str) -> str:
        self.was_asked.set()
        return self.refused

    async def receive_from(self, opening: Opening, stream: object) -> None:
        self.taken.append(opening)


class Link:
    """A stream that is opened as by a stand-in."""

    peer_id = Identity.generate().peer_id

    def __init__(self) -> None:
        self.refusals: list[str] = []

    async def receive(self, seconds: float) -> Any:
        return SimpleNamespace(header=encode(Opening(TRACE_ID, 0, 1, 1)))

    async def refuse(self, why: str) -> None:
        self.refusals.append(why)


@pytest.mark.asyncio
@pytest.mark.parametrize("has_ended", [False, True])
async def test_a_stream_that_waited_for_word_is_not_taken_by_a_trace_that_has_ended(
    has_ended: bool,
) -> None:
    """The word and the end came at once, and it was taken: nobody would have ended it."""
    trace, link = Trace(), Link()
    traces: Any = {TRACE_ID: trace}
    answering = asyncio.create_task(EdgeStreams(traces, 5).answer(link))  # type: ignore[arg-type]
    await asyncio.wait_for(trace.was_asked.wait(), 5)
    trace.refused = ""
    trace.revised.set()
    if has_ended:
        del traces[TRACE_ID]
    await asyncio.wait_for(answering, 5)
    assert link.refusals == (["the trace has ended"] if has_ended else [])
    assert len(trace.taken) == (not has_ended)
