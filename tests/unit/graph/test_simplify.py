"""What a graph does not need."""

from __future__ import annotations

import pytest

from glasshive.graph.dtypes import DType
from glasshive.graph.errors import NoRoots
from glasshive.graph.graph import Graph, Node, NodeId, Op, Read, Ref, Save, Site, Skip, Write
from glasshive.graph.outline import Outline
from glasshive.graph.simplify import drop_unseen, share_repeated, simplify


def out(block: int) -> Site:
    return Site(f"blocks.{block}", "output")


def graph(*nodes: Node) -> Graph:
    return Graph({NodeId(i): node for i, node in enumerate(nodes)})


def ref(i: int) -> Ref:
    return Ref(NodeId(i))


def test_equal_nodes_become_one() -> None:
    found = share_repeated(
        graph(
            Read(out(0), 0),
            Op("mul", (ref(0), 2.0)),
            Op("mul", (ref(0), 2.0)),
            Op("add", (ref(1), ref(2), 1)),
            Save(ref(3), "s"),
        )
    )
    assert list(found.nodes) == [0, 1, 3, 4]
    assert found.nodes[NodeId(3)] == Op("add", (ref(1), ref(1), 1))


@pytest.mark.parametrize("other", [2, True, 2.0000001])
def test_kinds_of_numbers_are_never_confused(other: object) -> None:
    nodes = graph(Read(out(0), 0), Op("mul", (ref(0), 2.0)), Op("mul", (ref(0), other)))  # type: ignore[arg-type]
    assert len(share_repeated(nodes)) == 3


def test_random_ops_are_never_shared() -> None:
    draw = Op("rand_like", (ref(0), None, 7))
    assert len(share_repeated(graph(Read(out(0), 0), draw, draw))) == 3


def test_a_write_is_live_if_a_later_read_of_its_invoke_is(outline: Outline) -> None:
    seen = graph(
        Read(out(0), 0),
        Write(out(0), 0, ref(0), "set"),
        Read(out(2), 0),
        Save(ref(2), "s"),
    )
    kept, dropped = drop_unseen(seen, outline)
    assert not dropped
    assert len(kept) == 4


def test_a_write_that_nothing_sees_is_dropped_and_named(outline: Outline) -> None:
    late = graph(
        Read(out(0), 0),
        Save(ref(0), "s"),
        Write(out(1), 0, ref(0), "set"),
        Write(out(0), 1, ref(0), "set"),
        Op("mul", (ref(0), 2.0)),
    )
    kept, dropped = drop_unseen(late, outline)
    assert list(dropped) == [2, 3]
    assert list(kept.nodes) == [0, 1]


def test_a_skip_counts_as_a_write_at_the_module_s_input(outline: Outline) -> None:
    inside = graph(
        Read(Site("blocks.1", "input", (0,)), 0),
        Skip("blocks.1", 0, ref(0)),
        Read(out(1), 0),
        Save(ref(2), "s"),
    )
    assert not drop_unseen(inside, outline)[1]
    before = graph(
        Read(Site("blocks.1", "input", (0,)), 0), Skip("blocks.1", 0, ref(0)), Save(ref(0), "s")
    )
    assert list(drop_unseen(before, outline)[1]) == [1]


def test_writes_are_seen_through_other_invokes(outline: Outline) -> None:
    chain = graph(
        Read(out(0), 0),
        Write(out(1), 0, ref(0), "set"),
        Read(out(2), 0),
        Write(out(2), 1, ref(2), "set"),
        Read(Site("head", "output"), 1),
        Save(ref(4), "s"),
    )
    kept, dropped = drop_unseen(chain, outline)
    assert not dropped
    assert len(kept) == 6


def test_nothing_saved_is_an_error(outline: Outline) -> None:
    with pytest.raises(NoRoots, match=r"nothing is saved.*call \.save\(\)"):
        simplify(graph(Read(out(0), 0)), outline)


def test_what_a_dropped_write_would_have_written_may_be_saved(outline: Outline) -> None:
    """Then its value is not lost; but the like value of another write says nothing of this one."""
    saved = graph(
        Read(out(0), 0),
        Op("mul", (ref(0), 2.0)),
        Write(out(2), 0, ref(1), "inplace"),
        Save(ref(1), "s"),
    )
    assert drop_unseen(saved, outline)[1] == {2: True}
    alike = graph(
        Op("full", ((1, 5, 4), 0, DType.FLOAT32)),
        Write(out(0), 0, ref(0), "inplace"),
        Read(out(1), 0),
        Save(ref(2), "s"),
        Op("full", ((1, 5, 4), 0, DType.FLOAT32)),
        Write(out(2), 0, ref(4), "inplace"),
    )
    kept, dropped = simplify(alike, outline)
    assert dropped == {5: False}
    assert list(kept.nodes) == [0, 1, 2, 3]


def test_equal_values_of_live_writes_become_one(outline: Outline) -> None:
    alike = graph(
        Op("full", ((1, 5, 4), 0, DType.FLOAT32)),
        Op("full", ((1, 5, 4), 0, DType.FLOAT32)),
        Write(out(0), 0, ref(0), "inplace"),
        Write(out(1), 0, ref(1), "inplace"),
        Read(out(2), 0),
        Save(ref(4), "s"),
    )
    kept, dropped = simplify(alike, outline)
    assert not dropped
    assert list(kept.nodes) == [0, 2, 3, 4, 5]
    assert kept.nodes[NodeId(3)] == Write(out(1), 0, ref(0), "inplace")
