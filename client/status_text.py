"""What a terminal says of what goes on: text beside a sign that moves, or a line after a while."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from typing import IO, Final, final

__all__ = ["SAY_AFTER_SECONDS", "StatusText", "is_terminal", "say_line", "waiting_for"]

FRAMES_PER_SECOND: Final = 12.5
SAY_AFTER_SECONDS: Final = 3.0


@final
class StatusText:
    """Text on standard error between `start` and `stop`. What is printed then stands above it."""

    def __init__(self, text: str) -> None:
        from rich.console import Console
        from rich.live import Live
        from rich.spinner import Spinner
        from rich.text import Text

        self._console = Console(stderr=True)
        self._text = Text(text)
        self._live = Live(
            Spinner("dots", self._text, style="status.spinner"),
            console=self._console,
            refresh_per_second=FRAMES_PER_SECOND,
            transient=True,
            # By default all that is printed goes to standard error: also what is meant for a file.
            redirect_stdout=is_terminal(sys.stdout),
        )

    def start(self) -> None:
        """Show it, until `stop`: whoever starts it must have it by then."""
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
    """What takes some seconds inside it has a line on standard error, if that is a terminal.

    No sign that moves: it would wipe out what the user has begun to print.
    """
    terminal = sys.stderr
    if not is_terminal(terminal):
        yield
        return
    say = threading.Timer(SAY_AFTER_SECONDS, say_line, [terminal, f"glasshive: {text} ...\n"])
    say.daemon = True
    try:
        say.start()
        yield
    finally:
        say.cancel()


def say_line(terminal: IO[str], line: str) -> None:
    """Write it there at once, if anybody reads that."""
    with contextlib.suppress(OSError, ValueError):  # there may be nobody any more
        terminal.write(line)
        terminal.flush()


def is_terminal(stream: IO[str] | None) -> bool:
    """Whether people read what is written there as it comes."""
    try:
        return stream is not None and stream.isatty()
    except (AttributeError, ValueError):  # what a user puts in its place has no such thing; closed
        return False
