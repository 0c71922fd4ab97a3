"""What a user sees of a command: logs, progress bars, error lines. All of it on standard error."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import FrameType
from typing import Literal

import structlog
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

LogFormat = Literal["pretty", "json"]
OnBytes = Callable[[int, int], None]

_LONG_LINE = 10_000
console = Console(stderr=True, highlight=False, soft_wrap=True)


def set_up_logging(log_format: LogFormat, *, verbose: bool = False) -> None:
    """Our logs, and the warnings of libraries, in one form; to be called once, at the start."""
    os.environ.setdefault("HIVEMIND_LOGLEVEL", "CRITICAL")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    shared: list[structlog.types.Processor] = [
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso" if log_format == "json" else "%H:%M:%S"),
    ]
    last: structlog.types.Processor
    if log_format == "json":
        last = structlog.processors.JSONRenderer()
    else:
        last = structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(),
            pad_event_to=24,
            # The default also shows what the variables hold: clients' tokens and tensors.
            exception_formatter=structlog.dev.plain_traceback,
        )
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.ExtraAdder(), *shared],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                *([structlog.processors.format_exc_info] if log_format == "json" else []),
                last,
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("glasshive").setLevel(logging.DEBUG if verbose else logging.INFO)


def print_error(error: BaseException) -> None:
    """One red line that says what is wrong."""
    console.print(f"[bold red]error:[/] {_escape(' '.join(str(error).split()))}")


class Bytes(ProgressColumn):
    """How many bytes of how many; nothing while that isn't known."""

    def __init__(self) -> None:
        super().__init__()
        self._known = DownloadColumn()

    def render(self, task: Task) -> Text:
        """See ProgressColumn."""
        return self._known.render(task) if task.total else Text()


class Ended(BaseException):
    """This process was asked to end. Not an `Exception`: nothing but the end may catch it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.exit_code = 128 + number


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """In it SIGINT, SIGTERM and SIGHUP raise Ended once, so that everything is cleared away.

    Further ones are passed over, so that nothing disturbs the clearing away.
    For the main thread.
    """
    arrived: list[int] = []

    def end(number: int, frame: FrameType | None) -> None:
        arrived.append(number)
        if len(arrived) == 1:
            raise Ended(number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, end) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


@contextlib.contextmanager
def byte_bar(title: str, *, show: bool) -> Iterator[OnBytes]:
    """A function of (done, total) bytes that moves a bar, on a terminal only; gone at the end."""
    if not (show and console.is_terminal):
        yield lambda done, total: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), Bytes(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def print_rows(
    columns: Sequence[str], rows: Iterable[Sequence[str]], *, whole: bool = False
) -> None:
    """A table on standard output, of which nothing is cut: where it is too narrow, cells go on
    below. If `whole`, and where no terminal is, each row is one line, however long."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for one in columns:
        table.add_column(one, overflow="fold")
    for row in rows:
        table.add_row(*map(_escape, row))
    width = _LONG_LINE if whole or not sys.stdout.isatty() else None
    Console(width=width, highlight=False).print(table)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)
