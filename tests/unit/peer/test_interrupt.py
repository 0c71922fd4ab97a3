"""Ctrl-C while a trace runs."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

import glasshive


def test_an_interrupted_trace_ends_at_the_users_line(
    save_tiny_llama: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Failed with the frames of where the run was, and a chain of exceptions of waiting."""

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt from TimeoutError("a wait inside")

    model = glasshive.local(save_tiny_llama(), cuts=(3,))
    monkeypatch.setattr(type(model), "run", interrupted)
    with pytest.raises(KeyboardInterrupt) as caught:
        with model.trace([[1, 2, 3]]):
            model.lm_head.output.save()
    text = "".join(traceback.format_exception(caught.value))
    assert "TimeoutError" not in text
    assert [Path(one.filename).name for one in traceback.extract_tb(caught.tb)] == [
        *("test_interrupt.py", "tracer.py"),
    ]
