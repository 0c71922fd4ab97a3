"""What a host says of a part that runs: how far it is, and for whom it waits.

Seen failing, each alone: without `_has_come`, the slices; with `_waits_for` left as it was while a
stage is queued, and without the look at `overdue_seconds`, the queue; with `_resting` that doesn't
say so, the one that gives way; without `_step`, the nodes.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from one_host import CARRIED, OTHER, OneHost, news, one_host, until, waiting

from glasshive.dht.messages import (
    AT_WORK,
    ITS_TURN,
    Alive,
    Done,
    More,
    Value,
    encode,
    is_a,
)
from glasshive.graph.graph import Graph, NodeId, Op, Ref, Save
from glasshive.graph.plan import BEFORE_PASSES, Part, Span, Stage
from glasshive.peer.hosted_trace import HostedTrace
from glasshive.peer.served_model import ServedModel

VALUE = NodeId(0)


@pytest_asyncio.fixture
async def swarm(served: ServedModel) -> AsyncIterator[OneHost]:
    async with one_host(served) as made:
        yield made


def void(value: object) -> None:
    """Work gives nothing back."""


def trace_of(swarm: OneHost) -> HostedTrace:
    (trace,) = swarm.host._traces.values()
    return trace


@pytest.mark.asyncio
async def test_a_part_that_waits_says_for_whom_and_each_slice_is_a_move(swarm: OneHost) -> None:
    graph = Graph({NodeId(1): Save(Ref(VALUE), "s")}, frozenset([VALUE]))
    stage = Stage(BEFORE_PASSES, (NodeId(1),), imports=((VALUE, 0),))
    await swarm.running(Part(1, Span(0, 2), graph, (stage,), {VALUE: CARRIED}))
    trace = trace_of(swarm)
    await until(lambda: trace.alive().waits_for == 0)
    assert trace.alive() == trace.alive() == Alive(0, 0, 0)
    edge = await swarm.edge()
    await edge.send(encode(Value(VALUE, BEFORE_PASSES, "float32", [4], [0])), bytes(4))
    await until(lambda: trace.alive() == Alive(0, 1, 0))
    await edge.send(encode(More()), bytes(4))
    await until(lambda: trace.alive() == Alive(0, 2, 0))


@pytest.mark.asyncio
@pytest.mark.parametrize("step_seconds", [60.0, 0.0])
async def test_what_waits_for_its_turn_gets_further_as_long_as_the_device_does(
    step_seconds: float, swarm: OneHost
) -> None:
    go_on, torch_thread = threading.Event(), swarm.host._torch
    other = torch_thread.run(
        *(OTHER.peer_id, b"other", lambda: void(go_on.wait(60))),
        seconds=1.0,
        step_seconds=step_seconds,
    )
    running = asyncio.create_task(other)
    await until(lambda: bool(torch_thread._running))
    stage = Stage(BEFORE_PASSES, (VALUE,))
    graph = Graph({VALUE: Op("full", ((4,), 1.0, CARRIED.dtype))})
    client = await swarm.running(Part(0, Span(0, 2), graph, (stage,), {}))
    trace = trace_of(swarm)
    await until(lambda: trace.alive().waits_for == ITS_TURN)
    await until(lambda: torch_thread.overdue_seconds > 0 or step_seconds > 0)
    before, after = trace.alive(), trace.alive()
    assert (after.stages, after.moves) == (0, before.moves + (step_seconds > 0))
    go_on.set()
    await running
    while not is_a((await news(client)).header, Done):
        pass


@pytest.mark.asyncio
async def test_each_node_is_a_move_and_so_is_each_stage(swarm: OneHost) -> None:
    nodes = {NodeId(i): Op("full", ((4,), float(i), CARRIED.dtype)) for i in range(3)}
    first = Stage(BEFORE_PASSES, (NodeId(0), NodeId(1)))
    value = NodeId(9)
    second = Stage(0, (NodeId(2),), imports=((value, 0),))
    graph = Graph(dict(nodes), frozenset([value]))
    await swarm.running(Part(1, Span(0, 2), graph, (first, second), {value: CARRIED}))
    trace = trace_of(swarm)
    await until(lambda: trace.alive().stages == 1)
    assert trace._steps >= 2
    assert trace.alive().waits_for == 0
    assert trace.alive().moves == trace._steps + 1


@pytest.mark.asyncio
async def test_what_gives_way_waits_for_its_turn(swarm: OneHost) -> None:
    await swarm.running(waiting())
    trace = trace_of(swarm)
    trace._waits_for = AT_WORK
    with trace.account.computing():
        with trace._resting(contextlib.nullcontext):
            assert trace.alive().waits_for == ITS_TURN
        assert trace.alive().waits_for == AT_WORK
