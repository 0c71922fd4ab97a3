"""Cutting a graph: who computes what, what travels, and who is never asked."""

from __future__ import annotations

import pytest

from glasshive.graph.budget import Budget, Cost, Surroundings, admit
from glasshive.graph.dtypes import DType
from glasshive.graph.errors import BadRoute, NotYet
from glasshive.graph.graph import (
    Call,
    Const,
    Graph,
    Node,
    NodeId,
    Op,
    Param,
    Read,
    Ref,
    Save,
    Site,
    Write,
)
from glasshive.graph.kernels import infer
from glasshive.graph.order import InvokeShape, assign_passes, spec_of_read
from glasshive.graph.outline import Outline
from glasshive.graph.plan import HIDDEN, Plan, Span, check_part
from glasshive.graph.split import needed_blocks, split
from glasshive.graph.tensors import TensorSpec

THREE = (Span(0, 1), Span(1, 2), Span(2, 3))


def out(block: int) -> Site:
    return Site(f"blocks.{block}", "output")


def graph(*nodes: Node) -> Graph:
    return Graph({NodeId(i): node for i, node in enumerate(nodes)})


def ref(i: int) -> Ref:
    return Ref(NodeId(i))


def plan_of(g: Graph, outline: Outline, route: tuple[Span, ...], invokes: int = 1) -> Plan:
    """The plan of a graph for invokes of one row and five tokens; every part is checked."""
    passes = assign_passes(g, outline, [InvokeShape(1, 5)] * invokes)

    def read(node: Read) -> TensorSpec:
        return spec_of_read(node, outline, passes)

    def call(node: Call, args: object) -> tuple[TensorSpec, Cost]:
        return TensorSpec(DType.FLOAT32, (1, 5, 4)), Cost(1, 0)

    def param(node: Param) -> TensorSpec:
        return outline.param(node.module, node.name)

    bill = admit(g, Surroundings(read, call, param, infer), Budget(1 << 40, 1 << 40, 1 << 40))
    specs = {i: spec for i, spec in bill.specs.items() if isinstance(spec, TensorSpec)}
    plan = split(g, outline, passes, route, specs)
    for part in plan.parts:
        check_part(part, passes, outline)
    return plan


def edges(plan: Plan) -> list[tuple[int, int, int]]:
    return [(edge.sender, edge.receiver, edge.value) for edge in plan.edges()]


def test_a_route_ends_at_the_last_block_that_is_read(outline: Outline) -> None:
    g = graph(Read(out(1), 0), Save(ref(0), "s"))
    assert needed_blocks(g, outline) == {0, 1}
    plan = plan_of(g, outline, THREE)
    assert [part.span for part in plan.parts] == [Span(0, 1), Span(1, 2)]
    assert edges(plan) == [(0, 1, HIDDEN)]
    (stage,) = plan.parts[1].stages
    assert stage.stop_event == outline.event(out(1))


def test_a_value_goes_straight_to_who_needs_it(outline: Outline) -> None:
    g = graph(
        Read(Site("blocks.0.mlp", "output"), 0),
        Write(out(2), 0, ref(0), "set"),
        Read(Site("head", "output"), 0),
        Save(ref(2), "s"),
    )
    assert edges(plan_of(g, outline, THREE)) == [(0, 1, HIDDEN), (0, 2, 0), (1, 2, HIDDEN)]


def test_what_leaves_a_span_anyway_is_not_carried(outline: Outline) -> None:
    g = graph(
        Read(out(0), 0),
        Op("mul", (ref(0), 2.0)),
        Read(out(1), 0),
        Op("add", (ref(1), ref(2), 1)),
        Save(ref(3), "s"),
    )
    plan = plan_of(g, outline, THREE)
    # the product exists at span 0, so that is what crosses; block 0's output itself does not
    assert edges(plan) == [(0, 1, HIDDEN), (0, 1, 1)]
    g = graph(Read(out(0), 0), Read(out(1), 0), Op("add", (ref(0), ref(1), 1)), Save(ref(2), "s"))
    plan = plan_of(g, outline, THREE)
    assert edges(plan) == [(0, 1, HIDDEN)]
    assert plan.parts[1].stages[0].from_hidden == ((0, 0),)


def test_an_edited_exit_is_carried(outline: Outline) -> None:
    g = graph(
        Read(out(0), 0),
        Op("mul", (ref(0), 2.0)),
        Write(out(0), 0, ref(1), "set"),
        Read(out(1), 0),
        Op("add", (ref(0), ref(3), 1)),
        Save(ref(4), "s"),
    )
    # block 0's output before the edit is not what leaves the span any more
    assert (0, 1, 0) in edges(plan_of(g, outline, THREE))


def test_constants_are_repeated_and_never_travel(outline: Outline) -> None:
    const = Const(b"\1" * 32, DType.FLOAT32, (4,))
    g = graph(
        const,
        Op("mul", (ref(0), 2.0)),
        Read(out(0), 0),
        Op("add", (ref(2), ref(1), 1)),
        Save(ref(3), "a"),
        Read(out(2), 0),
        Op("add", (ref(5), ref(1), 1)),
        Save(ref(6), "b"),
    )
    plan = plan_of(g, outline, THREE)
    assert edges(plan) == [(0, 1, HIDDEN), (1, 2, HIDDEN)]
    holders = [part.index for part in plan.parts if NodeId(0) in part.graph.nodes]
    assert holders == [0, 2]


def test_a_call_runs_where_its_module_lies(outline: Outline) -> None:
    g = graph(
        Read(out(0), 0),
        Op("slice", (ref(0), 1, 4, 5, 1)),
        Call("head", (ref(1),)),
        Save(ref(2), "s"),
    )
    assert needed_blocks(g, outline) == {0, 2}
    plan = plan_of(g, outline, THREE)
    # the middle span has nothing to do, and only the slice crosses
    assert [part.index for part in plan.parts] == [0, 2]
    assert edges(plan) == [(0, 2, 1)]
    assert not plan.parts[1].stages[0].forward


def test_a_parameter_behind_its_consumer_comes_before_the_passes(outline: Outline) -> None:
    g = graph(
        Param("head", "weight"),
        Op("select", (ref(0), 0, 1)),
        Read(out(0), 0),
        Op("add", (ref(2), ref(1), 1)),
        Write(out(0), 0, ref(3), "set"),
        Read(Site("head", "output"), 0),
        Save(ref(5), "s"),
    )
    plan = plan_of(g, outline, THREE)
    assert (2, 0, 1) in edges(plan)  # the row, not the whole weight
    first = plan.parts[2].stages[0]
    assert first.pass_index == -1
    assert not first.forward


def test_a_call_behind_its_consumer_in_one_pass_is_refused(outline: Outline) -> None:
    g = graph(
        Read(out(0), 0),
        Call("head", (ref(0),)),
        Write(out(1), 0, ref(1), "set"),
        Read(out(2), 0),
        Save(ref(3), "s"),
    )
    assert len(plan_of(g, outline, (Span(0, 3),)).parts) == 1
    with pytest.raises(NotYet, match="whose peer lies behind it") as caught:
        plan_of(g, outline, THREE)
    assert caught.value.node == 2


def test_a_call_on_an_earlier_peer_waits_for_the_next_pass(outline: Outline) -> None:
    g = graph(Read(out(2), 0), Call("embed", (ref(0),)), Save(ref(1), "s"))
    plan = plan_of(g, outline, THREE)
    assert (2, 0, 0) in edges(plan)
    assert [stage.pass_index for stage in plan.parts[0].stages] == [0, 1]


def test_values_between_passes_of_one_peer_stay_there(outline: Outline) -> None:
    g = graph(
        Read(out(2), 0),
        Write(Site("blocks.2", "input", (0,)), 1, ref(0), "set"),
        Read(Site("head", "output"), 1),
        Save(ref(2), "s"),
    )
    plan = plan_of(g, outline, THREE, invokes=2)
    assert len(plan.passes.passes) == 2
    assert not [edge for edge in plan.edges() if edge.value != HIDDEN]


def test_a_route_with_a_gap_names_the_missing_blocks(outline: Outline) -> None:
    g = graph(Read(out(2), 0), Save(ref(0), "s"))
    with pytest.raises(BadRoute, match=r"blocks \[1\] are on no span"):
        plan_of(g, outline, (Span(0, 1), Span(2, 3)))
    with pytest.raises(BadRoute, match="overlap"):
        plan_of(g, outline, (Span(0, 2), Span(1, 3)))


def test_a_large_parameter_stays_and_the_value_comes_to_it(outline: Outline) -> None:
    """`h[:, -1] @ head.weight.T`: a row travels, and not the weight."""
    g = graph(
        Read(out(0), 0),
        Op("select", (ref(0), 1, 4)),
        Param("head", "weight"),
        Op("permute", (ref(2), (1, 0))),
        Op("mm", (ref(1), ref(3))),
        Save(ref(4), "s"),
    )
    plan = plan_of(g, outline, THREE)
    assert edges(plan) == [(0, 2, 1)]
    assert NodeId(4) in plan.parts[-1].graph.nodes


def test_a_large_parameter_travels_if_an_earlier_write_waits_for_it(outline: Outline) -> None:
    g = graph(
        Read(out(0), 0),
        Param("head", "weight"),
        Op("select", (ref(0), 0, 0)),
        Op("mm", (ref(2), ref(1))),
        Op("reshape", (ref(3), (1, 5, 4))),
        Write(out(0), 0, ref(4), "set"),
        Read(out(2), 0),
        Save(ref(6), "s"),
    )
    assert (2, 0, 1) in edges(plan_of(g, outline, THREE))
