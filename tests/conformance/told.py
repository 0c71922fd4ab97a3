"""The text of the error that a trace raises, known to blame the right line."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_models import IDS, Setting

Body = Callable[[Any], Any]


def told(setting: Setting, error: type[BaseException], body: Body, prompt: Any = IDS) -> str:
    """The text of the error that a trace with this body raises; it must blame the marked line.

    The line is the one in `body` that ends in `# blamed`; without one, no line is checked.
    """

    def trace() -> None:
        with setting.model.trace(prompt) as tracer:
            body(tracer)

    with pytest.raises(error) as caught:
        trace()
    text = str(caught.value)
    blamed = line_of(body)
    if blamed is not None:
        file = Path(inspect.getsourcefile(body) or "").name
        assert text.startswith(f"{file}:{blamed}: "), text
    return text


def line_of(body: Callable[..., Any]) -> int | None:
    """The line of `body` that ends in `# blamed`."""
    lines, start = inspect.getsourcelines(body)
    marked = [
        start + index for index, line in enumerate(lines) if line.rstrip().endswith("# blamed")
    ]
    return marked[0] if marked else None
