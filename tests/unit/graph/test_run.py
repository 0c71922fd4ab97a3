"""The interpreter holds a value from its node to its last use, and no longer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from glasshive.graph.errors import BadGraph, ShapeMismatch
from glasshive.graph.graph import Graph, Node, NodeId, Op, Read, Ref, Save, Site, Write
from glasshive.graph.run import Interpreter


def graph(*nodes: Node, imports: frozenset[NodeId] = frozenset()) -> Graph:
    start = len(imports)
    return Graph({NodeId(start + i): node for i, node in enumerate(nodes)}, imports)


def ref(i: int) -> Ref:
    return Ref(NodeId(i))


def join(name: str, args: Sequence[Any]) -> str:
    return f"{name}({', '.join(map(str, args))})"


READ = Read(Site("m", "output"), 0)


def test_values_are_forgotten_after_their_last_use() -> None:
    g = graph(
        READ,
        Op("neg", (ref(0),)),
        Op("cat", ((ref(0), ref(1)), 0)),
        Save(ref(2), "s"),
    )
    values = Interpreter(g, join)
    values.put(NodeId(0), "x")
    values.put(NodeId(1), values.run(NodeId(1), g.nodes[NodeId(1)]))  # type: ignore[arg-type]
    assert len(values) == 2
    values.put(NodeId(2), values.run(NodeId(2), g.nodes[NodeId(2)]))  # type: ignore[arg-type]
    assert len(values) == 1
    assert values.take(NodeId(2)) == "cat(['x', 'neg(x)'], 0)"
    assert len(values) == 0


def test_a_value_that_nothing_uses_is_not_kept() -> None:
    values = Interpreter(graph(READ), join)
    values.put(NodeId(0), "x")
    assert len(values) == 0


def test_every_use_counts_also_twice_in_one_node_and_outside_the_graph() -> None:
    g = graph(READ, Op("mul", (ref(0), ref(0))), Write(Site("m", "output"), 0, ref(0), "set"))
    values = Interpreter(g, join, extra_uses=[NodeId(0), NodeId(0)])
    values.put(NodeId(0), "x")
    assert values.run(NodeId(1), g.nodes[NodeId(1)]) == "mul(x, x)"  # type: ignore[arg-type]
    assert [values.take(NodeId(0)) for _ in range(3)] == ["x"] * 3
    with pytest.raises(BadGraph, match="a value is used that is not there") as caught:
        values.take(NodeId(0))
    assert caught.value.node == 0


def test_imports_are_put_in() -> None:
    g = graph(Op("neg", (ref(0),)), Save(ref(1), "s"), imports=frozenset({NodeId(0)}))
    values = Interpreter(g, join)
    values.put(NodeId(0), "x")
    assert values.run(NodeId(1), g.nodes[NodeId(1)]) == "neg(x)"  # type: ignore[arg-type]


def test_an_error_of_a_kernel_names_the_node() -> None:
    def fail(name: str, args: Sequence[Any]) -> None:
        raise ShapeMismatch("no")

    g = graph(READ, Op("neg", (ref(0),)), Save(ref(1), "s"))
    values = Interpreter(g, fail)
    values.put(NodeId(0), "x")
    with pytest.raises(ShapeMismatch) as caught:
        values.run(NodeId(1), g.nodes[NodeId(1)])  # type: ignore[arg-type]
    assert caught.value.node == 1
