"""One line that says where a trace is: state, seconds, route, bytes. Gone when it is done."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING, Any

from glasshive.client.route import Route

if TYPE_CHECKING:
    from glasshive.client.job import Job

_SHOW_AFTER_SECONDS = 0.5


class JobDisplay:
    """Shows a job on a terminal; nothing if `show` is False.

    With `show` None it appears on a terminal only, and only if the job takes longer than a blink.
    """

    def __init__(self, show: bool | None, route: Route) -> None:
        self._wanted = sys.stderr.isatty() if show is None else show
        self._always = bool(show)
        self._route = " > ".join(str(span) for span in route.spans)
        self._status: Any = None

    def __enter__(self) -> JobDisplay:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._status is not None:
            self._status.stop()

    def update(self, job: Job) -> None:
        """Show the job as it is now; called again and again while it runs."""
        elapsed = job.clock() - job.began_at
        if not self._wanted or (elapsed < _SHOW_AFTER_SECONDS and not self._always):
            return
        done = sum(hop.state == "done" for hop in job.hops)
        text = (
            f"{job.state}  {elapsed:.1f} s  blocks {self._route}, {done} of {len(job.hops)} done  "
            f"{_amount(job.sent_bytes)} out, {_amount(job.received_bytes)} in  "
            "unaudited"
        )
        if self._status is None:
            from rich.console import Console

            self._status = Console(stderr=True).status(text)
            self._status.start()
        else:
            self._status.update(text)


def _amount(size_bytes: int) -> str:
    size = float(size_bytes)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
