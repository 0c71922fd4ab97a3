"""Slots and passes: what comes before what, and which invokes share a forward."""

from __future__ import annotations

from dataclasses import replace

import pytest

from glasshive.graph.dtypes import DType
from glasshive.graph.errors import BadGraph, ImpossibleOrder, UnequalLengths
from glasshive.graph.graph import Graph, Node, NodeId, Op, Read, Ref, Save, Site, Write
from glasshive.graph.order import (
    BEFORE_ALL,
    InvokeShape,
    Passes,
    assign_passes,
    reads_behind,
    slots,
    spec_of_read,
)
from glasshive.graph.outline import Leaf, Outline


def out(block: int) -> Site:
    return Site(f"blocks.{block}", "output")


def graph(*nodes: Node) -> Graph:
    return Graph({NodeId(i): node for i, node in enumerate(nodes)})


def ref(i: int) -> Ref:
    return Ref(NodeId(i))


def patch(source: int, read_at: int, target: int, write_at: int) -> Graph:
    """A block's output of one invoke, written at a block of another, whose end is saved."""
    return graph(
        Read(out(read_at), source),
        Write(out(write_at), target, ref(0), "set"),
        Read(out(2), target),
        Save(ref(2), "s"),
    )


def test_a_slot_is_the_latest_of_the_inputs(outline: Outline) -> None:
    g = graph(
        Op("full", ((4,), 1.0, outline.hidden_spec(1, 1).dtype)),
        Read(out(0), 0),
        Read(out(2), 0),
        Op("add", (ref(1), ref(2), 1)),
        Op("mul", (ref(1), ref(0))),
    )
    passes = assign_passes(g, outline, [InvokeShape(1, 3)])
    found = slots(g, outline, passes)
    assert found[NodeId(0)] == BEFORE_ALL
    assert found[NodeId(3)] == (0, outline.event(out(2)))
    assert found[NodeId(4)] == (0, outline.event(out(0)))


def test_a_write_from_the_future_of_its_own_pass_is_refused(outline: Outline) -> None:
    g = graph(Read(out(2), 0), Write(out(0), 0, ref(0), "set"), Save(ref(0), "s"))
    passes = assign_passes(g, outline, [InvokeShape(1, 3)])
    with pytest.raises(ImpossibleOrder, match=r"blocks\.0\.output runs before") as caught:
        slots(g, outline, passes)
    assert caught.value.node == 1


def test_equal_lengths_share_a_pass_as_rows(outline: Outline) -> None:
    g = patch(0, 0, 1, 1)
    passes = assign_passes(g, outline, [InvokeShape(1, 3), InvokeShape(2, 3)])
    assert [one.invokes for one in passes.passes] == [(0, 1)]
    assert passes.rows(1) == (1, 3)
    assert passes.passes[0].batch == 3


def test_a_later_value_into_an_earlier_block_takes_two_passes(outline: Outline) -> None:
    passes = assign_passes(patch(0, 2, 1, 0), outline, [InvokeShape(1, 3), InvokeShape(1, 3)])
    assert [one.invokes for one in passes.passes] == [(0,), (1,)]


def test_the_order_of_the_invokes_in_the_text_does_not_matter(outline: Outline) -> None:
    passes = assign_passes(patch(1, 2, 0, 0), outline, [InvokeShape(1, 3), InvokeShape(1, 3)])
    assert [one.invokes for one in passes.passes] == [(1,), (0,)]


@pytest.mark.parametrize("other", [InvokeShape(1, 4), InvokeShape(1, 3, padded=True)])
def test_other_lengths_and_padding_get_a_pass_of_their_own(
    outline: Outline, other: InvokeShape
) -> None:
    passes = assign_passes(patch(0, 0, 1, 1), outline, [InvokeShape(1, 3), other])
    assert [one.invokes for one in passes.passes] == [(0,), (1,)]


def test_alone_gives_every_invoke_its_own(outline: Outline) -> None:
    g = patch(0, 0, 1, 1)
    shapes = [InvokeShape(1, 3)] * 2
    passes = assign_passes(g, outline, shapes, alone=True)
    assert [one.invokes for one in passes.passes] == [(0,), (1,)]


def test_a_sweep_is_one_pass_and_a_large_one_is_cut(outline: Outline) -> None:
    nodes: list[Node] = [Read(out(0), 0)]
    for invoke in range(1, 31):
        nodes.append(Write(out(1), invoke, ref(0), "set"))
        nodes.append(Read(out(2), invoke))
        nodes.append(Save(ref(len(nodes) - 1), f"s{invoke}"))
    g = graph(*nodes)
    shapes = [InvokeShape(1, 5)] * 31
    assert len(assign_passes(g, outline, shapes).passes) == 1
    cut = assign_passes(g, outline, shapes, pass_rows=8)
    assert [one.batch for one in cut.passes] == [8, 8, 8, 7]
    assert cut.passes[0].invokes[0] == 0  # the one that the others need comes first
    assert [i for one in cut.passes for i in one.invokes] == list(range(31))


def test_mutual_need_wants_one_pass_and_one_length(outline: Outline) -> None:
    g = graph(
        Read(out(0), 0),
        Write(out(1), 1, ref(0), "set"),
        Read(out(1), 1),
        Write(out(2), 0, ref(2), "set"),
        Read(Site("head", "output"), 0),
        Save(ref(4), "s"),
    )
    together = assign_passes(g, outline, [InvokeShape(1, 3)] * 2)
    assert [one.invokes for one in together.passes] == [(0, 1)]
    slots(g, outline, together)
    with pytest.raises(UnequalLengths, match=r"need each other.*equal lengths"):
        assign_passes(g, outline, [InvokeShape(1, 3), InvokeShape(1, 4)])
    with pytest.raises(UnequalLengths, match="batching='alone'"):
        assign_passes(g, outline, [InvokeShape(1, 3)] * 2, alone=True)


def test_mutual_need_that_no_order_meets_is_impossible(outline: Outline) -> None:
    g = graph(
        Read(out(2), 0),
        Write(out(1), 1, ref(0), "set"),
        Read(out(1), 1),
        Write(out(0), 0, ref(2), "set"),
        Save(ref(2), "s"),
    )
    with pytest.raises(ImpossibleOrder, match="needs a later value of invoke"):
        assign_passes(g, outline, [InvokeShape(1, 3)] * 2)


def test_chunks_of_a_prompt_come_before_step_0_which_is_the_last(outline: Outline) -> None:
    g = graph(Read(out(0), 0), Save(ref(0), "s"), Read(out(0), 1), Save(ref(2), "t"))
    shapes = [InvokeShape(1, 8, new_tokens=3, chunk_tokens=n) for n in (3, 8)]
    passes = assign_passes(g, outline, shapes)
    found = [(one.step, one.seq, one.past, one.group) for one in passes.passes]
    first = [(-2, 3, 0, 2), (-1, 3, 3, 2), (0, 2, 6, 2), (1, 1, 8, 2), (2, 1, 9, 2)]
    assert found == [*first, (0, 8, 0, 5), (1, 1, 8, 5), (2, 1, 9, 5)]
    assert [passes.of(0), passes.of(0, 1), passes.of(1)] == [2, 3, 5]
    assert [passes.begins_next(index) for index in range(8)] == [
        *(False, False, True, True, False),
        *(True, True, False),
    ]
    assert [passes.new_tokens(index) for index in (2, 5)] == [3, 3]
    assert [passes.chunk_tokens(index) for index in (2, 5)] == [3, 0]
    assert slots(g, outline, passes)[NodeId(0)] == (2, outline.event(out(0)))


@pytest.mark.parametrize("chunk", range(1, 9))
def test_an_invoke_has_the_tensors_of_its_passes(chunk: int, outline: Outline) -> None:
    g = graph(Read(out(0), 0), Save(ref(0), "s"))
    shape = InvokeShape(2, 7, new_tokens=3, chunk_tokens=chunk)
    passes = assign_passes(g, outline, [shape])
    leaf = Leaf((), DType.FLOAT32, ("batch", "seq", "total"))
    for step in range(3):
        one = passes.passes[passes.of(0, step)]
        assert shape.spec(leaf, step) == one.spec(leaf)
        assert shape.kind(step) == one.kind
    assert sum(one.seq for one in passes.passes if one.step <= 0) == 7


def test_an_invoke_from_which_nothing_is_read_is_not_run(outline: Outline) -> None:
    g = graph(Read(out(1), 1), Save(ref(0), "s"))
    passes = assign_passes(g, outline, [InvokeShape(1, 3)] * 3)
    assert [one.invokes for one in passes.passes] == [(1,)]


def test_reads_behind_a_value(outline: Outline) -> None:
    g = graph(Read(out(0), 0), Read(out(2), 0), Read(out(1), 1), Op("add", (ref(1), ref(2), 1)))
    assert reads_behind(g, outline)[NodeId(3)] == {
        0: (0, outline.event(out(2))),
        1: (0, outline.event(out(1))),
    }


def test_an_invoke_without_a_pass_is_an_error() -> None:
    with pytest.raises(BadGraph, match="invoke 3 is in no pass"):
        Passes(()).of(3)


def test_an_edit_of_a_tensor_without_rows_takes_a_pass_of_its_own(outline: Outline) -> None:
    """Position embeddings are one tensor for all rows of a pass."""
    table = Leaf((), DType.FLOAT32, (1, "seq", 4))
    embed = replace(outline.modules["embed"], outputs=(table,))
    shared = replace(outline, modules={**outline.modules, "embed": embed})
    site = Site("embed", "output")
    g = graph(
        Read(site, 1),
        Op("mul", (ref(0), 2.0)),
        Write(site, 1, ref(1), "inplace"),
        *(Read(out(0), invoke) for invoke in range(4)),
    )
    shapes = [InvokeShape(1, 5)] * 4
    found = assign_passes(g, shared, shapes)
    assert [one.invokes for one in found.passes] == [(0,), (1,), (2, 3)]
    mutual = graph(
        Read(out(0), 0),
        Write(out(1), 1, ref(0), "set"),
        Read(out(1), 1),
        Write(out(2), 0, ref(2), "set"),
        Write(site, 0, ref(0), "set"),
    )
    with pytest.raises(UnequalLengths, match="invoke 0 edits a tensor that all rows") as caught:
        assign_passes(mutual, shared, shapes[:2])
    assert caught.value.node == 1


def test_an_edit_of_a_tensor_that_has_rows_in_a_padded_batch_shares_a_pass(
    outline: Outline,
) -> None:
    table = Leaf((), DType.FLOAT32, (1, "seq", 4))
    embed = replace(outline.modules["embed"], outputs=(table,))  # padded: batch, seq, 4
    shared = replace(outline, modules={**outline.modules, "embed": embed})
    site = Site("embed", "output")
    g = graph(
        Read(site, 1),
        Op("mul", (ref(0), 2.0)),
        Write(site, 1, ref(1), "inplace"),
        *(Read(out(0), invoke) for invoke in range(3)),
    )
    padded = assign_passes(g, shared, [InvokeShape(2, 5, padded=True)] * 3)
    assert [one.invokes for one in padded.passes] == [(0, 1, 2)]
    assert spec_of_read(Read(site, 1), shared, padded).shape == (2, 5, 4)
    plain = assign_passes(g, shared, [InvokeShape(2, 5)] * 3)
    assert [one.invokes for one in plain.passes] == [(0,), (1,), (2,)]
    assert spec_of_read(Read(site, 1), shared, plain).shape == (1, 5, 4)
