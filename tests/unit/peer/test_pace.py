"""Seconds of a host's own time: measured, and what a part may take of them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from tenants import Tenants

from glasshive.dht.memory_transport import MemoryNetwork
from glasshive.graph.budget import Budget, Cost, Pace
from glasshive.graph.dtypes import DType
from glasshive.graph.errors import OverBudget
from glasshive.graph.graph import Graph, Node, NodeId, Op, Read, Ref, Save, Site, Skip
from glasshive.graph.order import Pass, Passes
from glasshive.graph.plan import Part, Span, Stage
from glasshive.peer.admission import Admission
from glasshive.peer.errors import TraceEnded
from glasshive.peer.host_limits import HostLimits
from glasshive.peer.pace import HostPace, measure_pace
from glasshive.peer.served_model import ServedModel
from glasshive.peer.serving import Serving, record_of
from glasshive.security.keys import Identity

SITE = Site("model.layers.0", "output")


def part_of(served: ServedModel, batch: int, seq: int) -> tuple[Part, Passes]:
    """Saves a sum of a product of block 0's output with itself, for one pass of that size."""
    nodes = {
        NodeId(0): Read(SITE, 0),
        NodeId(1): Op("permute", (Ref(NodeId(0)), (0, 2, 1))),
        NodeId(2): Op("bmm", (Ref(NodeId(1)), Ref(NodeId(0)))),
        NodeId(3): Op("neg", (Ref(NodeId(2)),)),
        NodeId(4): Save(Ref(NodeId(3)), "s"),
    }
    stop = served.outline.event(SITE)
    stage = Stage(0, tuple(nodes), forward=True, stop_event=stop)
    part = Part(0, Span(0, 2), Graph(nodes), (stage,), {})
    return part, Passes((Pass((0,), seq, False, ((0, batch),)),))


def admission(served: ServedModel, pace: HostPace, seconds: float) -> Admission:
    budget = Budget(1 << 40, 1 << 60, 1 << 40, seconds=seconds)
    return Admission(served.outline, served.twin, budget, pace)


def test_a_pace_is_taken_over_as_it_is(served: ServedModel) -> None:
    line = served.pace.to_json()
    assert HostPace.from_json(line) == served.pace
    assert not set("\r\n") & set(line), "a report is one line"
    assert len(line) < 2048, "and the supervisor reads no longer ones than twice that"


def test_a_host_measures_its_pace(served: ServedModel) -> None:
    for pace in (served.pace, measure_pace(served.model, None)):
        dense = pace.graph.dense_flops_per_second
        assert {DType.FLOAT32, DType.BFLOAT16, DType.INT64} <= dense.keys()
        figures = (
            pace.tokens_per_second,
            pace.pass_seconds,
            pace.graph.flops_per_second,
            pace.graph.drawn_numbers_per_second,
            *dense.values(),
        )
        assert all(math.isfinite(one) and one > 0 for one in figures)


def test_the_fastest_pass_counts() -> None:
    pace = HostPace(tokens_per_second=100.0, hidden_size=100, graph=Pace())
    pace.saw(tokens=20, seconds=0.1)
    assert pace.tokens_per_second == 200
    pace.saw(tokens=20, seconds=10.0)
    pace.saw(tokens=20, seconds=0.0)
    pace.saw(tokens=2000, seconds=0.1)  # more at a time than were measured
    assert pace.tokens_per_second == 200


LOGITS = Read(Site("lm_head", "output"), 0)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("nodes", "is_whole"),
    [
        ((LOGITS, Save(Ref(NodeId(0)), "s")), True),
        ((Read(SITE, 0), Save(Ref(NodeId(0)), "s")), False),
        (
            (
                Read(SITE, 0),
                Skip("model.layers.1", 0, Ref(NodeId(0))),
                LOGITS,
                Save(Ref(NodeId(2)), "s"),
            ),
            False,
        ),
    ],
    ids=["whole", "without the head", "with a block skipped"],
)
async def test_a_whole_pass_corrects_what_was_measured(
    served: ServedModel, nodes: tuple[Node, ...], is_whole: bool
) -> None:
    busy = 0.5  # tokens a second, as if the machine had done something else
    pace = HostPace(busy, served.pace.hidden_size, served.pace.graph, pass_seconds=10.0)
    measured = replace(served, pace=pace)
    async with Tenants(measured) as tenants:
        client = tenants.client()
        before = record_of(tenants.home, measured, 60.0, 1)
        assert (before.throughput_tokens_per_second, before.pass_seconds) == (busy, 10.0)
        assert isinstance(await tenants.run(client, nodes), dict)
        announced = record_of(tenants.home, measured, 60.0, 1)
    assert (announced.throughput_tokens_per_second > busy) is is_whole
    assert (announced.pass_seconds < 10.0) is is_whole


@pytest.mark.asyncio
async def test_a_host_announces_how_fast_it_was_seen_to_be(served: ServedModel) -> None:
    """It announced what it had measured at its start, as long as it ran."""
    pace = HostPace(100.0, served.pace.hidden_size, served.pace.graph, pass_seconds=0.1)
    identity = Identity.generate()
    home = MemoryNetwork().transport(identity)
    async with Serving(home, identity, replace(served, pace=pace)) as serving:

        def announced() -> tuple[float, float]:
            serving.refresh()
            return serving.record.throughput_tokens_per_second, serving.record.pass_seconds

        assert announced() == (100.0, 0.1)
        pace.saw(tokens=1, seconds=0.095)  # nobody is told of so little
        assert announced() == (100.0, 0.1)
        pace.saw(tokens=1, seconds=0.08)
        assert announced() == (100.0, 0.08)
        pace.saw(tokens=400, seconds=2.0)
        assert announced() == (200.0, 0.08)
    await home.close()


def test_no_pass_is_thought_faster_than_one_of_one_token(served: ServedModel) -> None:
    assert served.pace.pass_seconds > 0
    pace = HostPace(tokens_per_second=1000.0, hidden_size=100, graph=Pace(), pass_seconds=0.05)
    assert pace.forward_seconds(1, 1, past=10) == 0.05
    assert pace.forward_seconds(1, 100) > 0.1
    pace.saw(tokens=1, seconds=0.02)
    assert pace.pass_seconds == 0.02


def test_attention_makes_long_rows_dearer() -> None:
    pace = HostPace(tokens_per_second=100.0, hidden_size=100, graph=Pace())
    assert pace.forward_seconds(2, 600) == pytest.approx(2 * 600 * 2 / 100)
    assert pace.forward_seconds(1200, 1) == pytest.approx(12, rel=0.01)


def test_each_kind_of_work_has_its_own_pace(served: ServedModel) -> None:
    part, passes = part_of(served, 3, 10)
    product = 2 * 3 * 32 * 32 * 10
    moved = 2 * 3 * 32 * 10 + 3 * 32 * 32  # by the product itself
    negated = 3 * 32 * 32

    def bill(dense: float, other: float) -> float:
        pace = HostPace(math.inf, 32, Pace({DType.FLOAT32: dense}, other))
        return admission(served, pace, 1e9).admit(part, passes, b"").seconds

    assert bill(product / 7, math.inf) == pytest.approx(7)
    assert bill(math.inf, moved + negated) == pytest.approx(1, rel=0.01)
    pace = HostPace(math.inf, 32, Pace({DType.FLOAT32: product / 7}, math.inf))
    text = r"node 2 \(op bmm\) brings the graph to about 7 s of this peer.s time, but 5 s are al"
    with pytest.raises(OverBudget, match=text):
        admission(served, pace, 5.0).admit(part, passes, b"")


def test_number_formats_and_random_numbers_have_their_own_pace() -> None:
    pace = Pace({DType.FLOAT32: 100.0, DType.INT64: 2.0}, 10.0, 5.0)
    assert pace.seconds(Cost(20, 0)) == 2
    assert pace.seconds(Cost(0, 0, 200, DType.FLOAT32)) == 2
    assert pace.seconds(Cost(0, 0, 200, DType.INT64)) == 100
    assert pace.seconds(Cost(0, 0, 200, DType.FLOAT16)) == 100  # not measured: as the slowest
    assert pace.seconds(Cost(10, 0, drawn_numbers=10)) == 3
    assert Pace().seconds(Cost(10, 0, 10, drawn_numbers=10)) == 0


def test_a_runaway_is_far_over_what_was_thought() -> None:
    limits = HostLimits()
    assert limits.stage_seconds(0.0) == 30.0
    assert limits.runaway_seconds(0.0) == 15.0
    assert limits.runaway_seconds(1.0) == 25.0
    assert limits.runaway_seconds(limits.budget.seconds) == limits.trace_seconds


def test_a_check_that_nobody_waits_for_ends_at_the_next_op(served: ServedModel) -> None:
    part, passes = part_of(served, 2, 3)
    ops = 3
    calls: list[None] = []

    def go_on() -> None:
        calls.append(None)
        if len(calls) == ops:
            raise TraceEnded("nobody waits for this check any more")

    fast = HostPace(tokens_per_second=1e9, hidden_size=32, graph=Pace())
    with pytest.raises(TraceEnded):
        admission(served, fast, 60.0).admit(part, passes, b"", go_on)
    assert len(calls) == ops
