"""One line that says where a trace is: state, seconds, route, bytes. Gone when it is done.

The route has each peer's blocks, and behind them a mark: `*` for who is at work, `+` for who has
done its part, `~` for who has taken the place of one that was lost. Behind the route it says which
of them speak to each other by way of this client, as they can't reach each other.
"""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from glasshive.client.hop import HopReport
    from glasshive.client.job import Job

_SHOW_AFTER_SECONDS = 0.5


class JobDisplay:
    """Shows a job on a terminal; nothing if `show` is False.

    With `show` None it appears on a terminal only, and only if the job takes longer than a blink.
    """

    def __init__(self, show: bool | None) -> None:
        self._wanted = sys.stderr.isatty() if show is None else show
        self._always = bool(show)
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
        self._show(text_of(job, elapsed))

    def say(self, text: str, elapsed_seconds: float) -> None:
        """Show that something goes on before there is a job, for so long by now."""
        if self._wanted and (elapsed_seconds >= _SHOW_AFTER_SECONDS or self._always):
            self._show(f"{text}  {elapsed_seconds:.1f} s")

    def _show(self, text: str) -> None:
        if self._status is None:
            from rich.console import Console

            self._status = Console(stderr=True).status(text)
            self._status.start()
        else:
            self._status.update(text)


def text_of(job: Job, elapsed_seconds: float) -> str:
    """The line for a job as it is now."""
    done = sum(hop.state == "done" for hop in job.hops)
    replaced = f", {len(job.replaced)} replaced" if job.replaced else ""
    relayed = "".join(f", {one.first} and {one.second} through you" for one in job.relayed)
    return (
        f"{job.state}  {elapsed_seconds:.1f} s  blocks {' > '.join(_marked(job))}, "
        f"{done} of {len(job.hops)} done{replaced}{relayed}  "
        f"{_amount(job.sent_bytes)} out, {_amount(job.received_bytes)} in  unaudited"
    )


def _marked(job: Job) -> list[str]:
    """Each hop with its marks. In a trace the first that is not done is at work.

    In a generation the work goes around, and all that run have the mark.
    """
    at_work: list[HopReport] = [hop for hop in job.hops if hop.state == "running"]
    if not job.plan.passes.are_generation:
        at_work = at_work[:1]
    marked = []
    for hop in job.hops:
        mark = "+" if hop.state == "done" else "*" if hop in at_work else ""
        marked.append(f"{hop.part.span}{mark}{'~' if hop.stands_in else ''}")
    return marked


def _amount(size_bytes: int) -> str:
    size = float(size_bytes)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
