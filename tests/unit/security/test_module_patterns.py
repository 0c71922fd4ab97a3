"""Patterns against every path of a small world, and the sets that these give."""

from __future__ import annotations

import itertools
import re

import pytest

from glasshive.security.module_patterns import (
    MAX_COMMON,
    MAX_PARTS,
    MAX_PATTERN_CHARS,
    check_pattern,
    common,
    covered_by,
    matches,
    nearest_patterns,
)

NAMES = ("a", "b", "c1")
PATHS = [""] + [
    ".".join(parts) for n in range(1, 5) for parts in itertools.product(NAMES, repeat=n)
]
HEADS = [list(parts) for n in range(3) for parts in itertools.product(("a", "b", "*"), repeat=n)]
PATTERNS = [".".join(head) for head in HEADS if head] + [".".join([*head, "**"]) for head in HEADS]


def by_regex(pattern: str) -> re.Pattern[str]:
    """The same language, written as a regular expression over paths that end in a dot."""
    return re.compile(
        "".join(
            r"(?:[^.]+\.)*"
            if part == "**"
            else r"[^.]+\."
            if part == "*"
            else re.escape(part) + r"\."
            for part in pattern.split(".")
        )
    )


def extent(pattern: str) -> frozenset[str]:
    regex = by_regex(pattern)
    return frozenset(path for path in PATHS if regex.fullmatch(path and path + "."))


EXTENTS = {pattern: extent(pattern) for pattern in PATTERNS}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_matches_is_the_regular_expression(pattern: str) -> None:
    check_pattern(pattern)
    assert {path for path in PATHS if matches(pattern, path)} == EXTENTS[pattern]


def test_cover_and_common_are_those_of_the_sets() -> None:
    for one, other in itertools.product(PATTERNS, repeat=2):
        assert covered_by(one, [other]) == (EXTENTS[one] <= EXTENTS[other]), (one, other)
        met = common([one], [other])
        assert frozenset().union(*map(extent, met)) == EXTENTS[one] & EXTENTS[other], (one, other)


def test_common_of_lists_names_nothing_twice() -> None:
    assert common(["a.*", "b.**"], ["**", "a.b"]) == ("a.*", "b.**")
    assert common(["a.*"], ["b.*"]) == ()
    assert common([], ["**"]) == ()


def test_lists_that_cross_have_at_most_so_many_in_common() -> None:
    """Failed with no bound: there were 4,032, and they took many seconds."""
    rows = [f"a{number}.*" for number in range(64)]
    columns = [f"*.b{number}" for number in range(63)]
    met = common([*rows, "*.*.wide.**"], [*columns, "**"])
    assert len(met) <= MAX_COMMON
    assert {*rows, "*.*.wide.**"} <= set(met)  # the widest stay
    assert all(covered_by(one, rows) or one == "*.*.wide.**" for one in met)
    assert len(common(rows, columns)) == MAX_COMMON


@pytest.mark.parametrize(
    "pattern",
    [
        "", ".", "a.", ".a", "a..b", "a.**.b", "**.a", "a*", "*a", "a.b*.c", "***", "a b", "a/b",
        "[ab]", "a?", "a.(b|c)", r"a\.b", "é", "a\n", "a" * (MAX_PATTERN_CHARS + 1),
        ".".join("a" * (MAX_PARTS + 1)),
    ],
)  # fmt: skip
def test_the_syntax_is_closed(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"the part|longer than"):
        check_pattern(pattern)


def test_the_nearest_comes_first() -> None:
    near = nearest_patterns("model.layers.3.mpl", ["lm_head", "model.layers.*.mlp", "model.norm"])
    assert near[0] == "model.layers.*.mlp"
    assert nearest_patterns("x", []) == ()
