"""Folded lists: what was folded comes back, steps fold to a few entries; others are refused."""

from __future__ import annotations

import tracemalloc
from typing import Any

import msgpack
import pytest
from hostile import fuzzed
from hypothesis import given
from hypothesis import strategies as st

from glasshive.graph.errors import BadGraph
from glasshive.graph.repeats import fold, unfold

LEAF = st.one_of(
    st.integers(-3, 12),
    st.booleans(),
    st.none(),
    st.sampled_from([0.0, -0.0, 1.5, float("inf")]),
    st.sampled_from(["a", "layers.9.mlp", "s007", "x1234567890", "-1", "1e5"]),
    st.binary(max_size=2),
)
ITEM = st.recursive(LEAF, lambda inner: st.lists(inner, max_size=3), max_leaves=6).map(
    lambda tree: [*tree, 7, 7, 7] if isinstance(tree, list) else [tree, 7, 7]
)


def moved(item: Any, by: int) -> Any:
    """The item with every number that is one further by so much."""
    if type(item) is int:
        return item + by
    return [moved(one, by) for one in item] if isinstance(item, list) else item


def exact(items: Any) -> str:
    """Text that tells -0.0 from 0.0, 1 from True, and no list from a tuple."""
    return repr(msgpack.unpackb(msgpack.packb(items)))


def again(folded: list[Any], most_items: int = 10_000, most_bytes: int = 1 << 20) -> list[Any]:
    """What comes of it on the other side."""
    entries = msgpack.unpackb(msgpack.packb(folded), use_list=False)
    return list(unfold(entries, most_items, most_bytes))


@fuzzed
@given(st.lists(st.tuples(st.lists(ITEM, max_size=4), st.integers(0, 6), st.integers(-2, 3))))
def test_what_was_folded_comes_back(runs: list[tuple[list[Any], int, int]]) -> None:
    items = [
        moved(one, time * by) for run, times, by in runs for time in range(times) for one in run
    ]
    assert exact(again(fold(items))) == exact(items)


def step(number: int) -> list[Any]:
    """Nodes of one step: for each of three layers a read, an op on it and on the step before."""
    nodes: list[Any] = []
    for layer in range(3):
        at = 100 + 9 * number + 3 * layer
        nodes.append([at, 1, f"model.layers.{layer}", "output", [0], number, 0])
        nodes.append([at + 1, 4, "add", [[0, at], [0, at - 9], [0, 5], 1.5]])
        nodes.append([at + 2, 8, at + 1, f"h{3 * number + layer}"])
    return nodes


def test_a_thousand_steps_are_as_long_as_a_few() -> None:
    few = fold([node for number in range(4) for node in step(number)])
    many = fold([node for number in range(1000) for node in step(number)])
    assert len(many) == len(few) <= 19
    assert again(many) == again([node for number in range(1000) for node in step(number)])


def test_a_step_of_its_own_stands_in_full() -> None:
    steps = [step(number) for number in range(40)]
    steps[20][4][3][3] = 2.5
    items = [node for one in steps for node in one]
    folded = fold(items)
    assert len(folded) < 60
    assert exact(again(folded)) == exact(items)


@pytest.mark.parametrize("other", [-0.0, 0, False, None, "0", [0.0], [[0.0, 1]]])
def test_only_numbers_may_differ(other: object) -> None:
    items = [[1, 1, 0.0], [2, 1, 0.0], [3, 1, other]]
    assert fold(items) == items


def test_a_number_in_a_text_goes_on() -> None:
    names = [[8, 8, f"s{number}"] for number in range(8, 12)]
    assert fold(names) == [[8, 8, "s8"], [8, 8, "s9"], [1, 2]]
    assert again(fold(names)) == [(8, 8, f"s{number}") for number in range(8, 12)]
    # 10 and 01 are not the numbers 1, 0 and 0, 1.
    assert len(fold([[1, 1, "08"], [1, 1, "09"], [1, 1, "10"]])) == 3


THREE = [[1, 1, "a"], [2, 1, "a"], [3, 1, "a"]]


@pytest.mark.parametrize(
    ("entries", "text"),
    [
        ([*THREE, [2, 1]], "a repeat of 2 items, 1 times; two are there"),
        ([*THREE, [0, 1]], "a repeat of 0 items"),
        ([*THREE, [-1, 1]], "a repeat of -1 items"),
        ([*THREE, [1, 0]], "1 items, 0 times"),
        ([*THREE, [1, -5]], "1 items, -5 times"),
        ([*THREE, [1, True]], "1 items, True times"),
        ([*THREE, [1, 1.0]], "1 items, 1.0 times"),
        ([*THREE, [[1], 1]], "two are there"),
        ([[1, 1]], "two are there"),
        ([*THREE, [1, 98]], "1 items 98 times is more than is allowed"),
        ([*THREE, [1, 10**18]], "is more than is allowed"),
        ([[1, 1, "a" * 200], [2, 1, "a" * 200], [1, 50]], "1 items 50 times is more"),
        ([[1, 1, "a"], [1, 1, "b"], [1, 1]], "differ in more than their numbers"),
        ([[1, 1, 1], [1, 1, [1]], [1, 1]], "differ in more than their numbers"),
        ([[1, 1, -(2**62)], [1, 1, 2**62], [1, 1]], "beyond 64 bits"),
        ([[1, 1, "a1"], [1, 1, "a0"], [1, 1]], "goes on to -1 in a text"),
        ([[1, 1, "a1"], [1, 1, "a999999999"], [1, 1]], "goes on to 1999999997 in a text"),
    ],
)
def test_hostile_repeats_are_refused(entries: list[Any], text: str) -> None:
    with pytest.raises(BadGraph, match=text):
        again(entries, most_items=100, most_bytes=2000)


def test_a_repeat_beyond_its_bounds_takes_no_memory() -> None:
    entries: list[Any] = [[1, 1, "a"], [2, 1, "a"], [1, 99]]
    entries += [[100, 10**9]]
    tracemalloc.start()
    with pytest.raises(BadGraph, match="100 items 1000000000 times"):
        again([*entries[:3], *[[i, 1, "a"] for i in range(100)], entries[3]])
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 1 << 20
