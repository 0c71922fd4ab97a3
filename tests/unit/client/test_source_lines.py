"""Warnings that blame the user's own line."""

from __future__ import annotations

import gc
import warnings

import pytest

from glasshive.client import source_lines

CELL = "def warns(warn_here):\n    for _ in range(3):\n        warn_here('seen at once')\n"


def test_a_loop_is_warned_once_and_a_cell_that_is_gone_leaves_nothing() -> None:
    """Seen failing where what was warned of was kept by the names of files."""
    gc.collect()
    kept_before = len(source_lines._SEEN)
    names: dict[str, object] = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for number in range(3):
            exec(compile(CELL, f"<cell {number}>", "exec"), names)
            names["warns"](source_lines.warn_here)  # type: ignore[operator]
    assert [(one.filename, one.lineno) for one in caught] == [
        (f"<cell {number}>", 3) for number in range(3)
    ]
    assert len(source_lines._SEEN) == kept_before + 1
    names.clear()
    gc.collect()
    assert len(source_lines._SEEN) == kept_before


def test_ranks_of_files_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_lines, "_MOST_RANKS", 5)
    for number in range(20):
        exec(compile("mark()", f"<another cell {number}>", "exec"), {"mark": source_lines.mark})
    assert len(source_lines._RANK) <= 5
