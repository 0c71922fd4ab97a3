"""Text on standard error that says what goes on, beside a sign that moves, until it is over."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import IO, Final, final

__all__ = ["StatusText", "is_terminal", "waiting_for"]

FRAMES_PER_SECOND: Final = 12.5


@final
class StatusText:
    """Shows `text` until `stop`. What is printed meanwhile stands above it."""

    def __init__(self, text: str) -> None:
        from rich.console import Console
        from rich.live import Live
        from rich.spinner import Spinner
        from rich.text import Text

        self._console = Console(stderr=True)
        self._text = Text(text)
        self._spinner = Spinner("dots", self._text, style="status.spinner")
        self._live = Live(
            self._spinner,
            console=self._console,
            refresh_per_second=FRAMES_PER_SECOND,
            transient=True,
            # By default all that is printed goes to standard error: also what is meant for a file.
            redirect_stdout=is_terminal(sys.stdout),
        )
        self._live.start(refresh=True)

    def update(self, text: str) -> None:
        """Show this instead."""
        self._text.plain = text

    def stop(self, last: str | None = None) -> None:
        """Take it away; `last` stays in its place."""
        self._live.stop()
        if last is not None:
            self._console.print(last, markup=False, highlight=False)


@contextlib.contextmanager
def waiting_for(text: str) -> Iterator[None]:
    """Inside it the text is shown, on a terminal only."""
    if not is_terminal(sys.stderr):
        yield
        return
    status = StatusText(text)
    try:
        yield
    finally:
        status.stop()


def is_terminal(stream: IO[str] | None) -> bool:
    """Whether people read what is written there as it comes."""
    return stream is not None and stream.isatty()
