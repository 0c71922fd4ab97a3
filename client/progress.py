"""Lines that say where a trace is: state, seconds, bytes, and a row for each peer of the route.

A row has the peer's blocks and behind them a mark: `*` for who is at work, `+` for who has done its
part, `~` for who has taken the place of one that was lost. Then the end of its name, how far it is
and what it does, or what became of it, and in the end where its seconds went. Below stands who was
lost and who took over, and which of them speak to each other by way of this client, as they can't
reach each other. What is shown while a trace runs goes away; its last state stays if it was shown.

Lines that move would break what a streamer writes on the same terminal. There each peer that holds
the job up has a line of its own.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Container, Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from glasshive.client.experiment import TOKENS_PREFIX, ShowProgress
from glasshive.client.status_text import (
    SAY_AFTER_SECONDS,
    StatusText,
    is_terminal,
    say_line,
)

if TYPE_CHECKING:
    from glasshive.client.hop import HopReport
    from glasshive.client.job import Job

_SHOW_AFTER_SECONDS = 0.5
_LASTS_SECONDS = 1.0
_MOST_ROWS = 12
_NAME_CHARS = 8


class JobDisplay:
    """Shows a job on a terminal; nothing if `show` is False.

    With `show` None it appears on a terminal only, and only if the job takes longer than a blink;
    so it does with "plain", where a line says what holds the job up, and there are no others. What
    is in `said` was said already, by another display of the same trace.
    """

    def __init__(self, show: ShowProgress, said: set[str] | None = None) -> None:
        self._is_plain = show == "plain"
        self._always = bool(show) and not self._is_plain
        self._wanted = is_terminal(sys.stderr) if show is None or self._is_plain else self._always
        self._said: set[str] = set() if said is None else said
        self._held_up_since: dict[str, float] = {}
        self._status: StatusText | None = None
        self._job: Job | None = None
        self._tokens: Sequence[Sequence[str]] = ()

    def __enter__(self) -> JobDisplay:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._status is None:
            return
        job, text = self._job, None
        try:
            if error is None and job is not None:
                text = text_of(job, job.clock() - job.began_at, self._tokens)
        finally:
            self._status.stop(text)

    def update(self, job: Job) -> None:
        """Show the job as it is now; called again and again while it runs."""
        elapsed = job.clock() - job.began_at
        if not self._wanted or (elapsed < _SHOW_AFTER_SECONDS and not self._always):
            return
        if self._is_plain:
            self._say_what_holds_up(job)
            return
        if job is not self._job:
            self._job, self._tokens = job, token_saves(job)
        self._show(text_of(job, elapsed, self._tokens))

    def say(self, text: str, elapsed_seconds: float) -> None:
        """Show that something goes on before there is a job, for so long by now."""
        if not self._wanted:
            return
        if self._is_plain:
            if elapsed_seconds >= SAY_AFTER_SECONDS and text not in self._said:
                self._said.add(text)
                _say(text)
        elif elapsed_seconds >= _SHOW_AFTER_SECONDS or self._always:
            self._show(f"{text}  {elapsed_seconds:.1f} s")

    def _say_what_holds_up(self, job: Job) -> None:
        """Say it once each time, and only if it lasts: a process that stood still sees silence."""
        now = job.clock()
        held_up = {f"{hop}: {why}" for hop in job.hops if (why := hop.held_up(now))}
        since = {one: self._held_up_since.get(one, now) for one in sorted(held_up)}
        for one, began_at in since.items():
            if now - began_at >= _LASTS_SECONDS:
                _say(one)
                since[one] = math.inf
        self._held_up_since = since

    def _show(self, text: str) -> None:
        if self._status is None:
            self._status = StatusText(text)  # kept before it is seen: an interrupt takes it away
            self._status.start()
        else:
            self._status.update(text)


def _say(text: str) -> None:
    say_line(sys.stderr, f"\nglasshive: {text}\n")  # tokens may stand in the line before


def token_saves(job: Job) -> Sequence[Sequence[str]]:
    """What the tokens of each invoke of a generation come as, one name for each step."""
    names: dict[str, list[str]] = {}
    for name in job.expected:
        if name.startswith(TOKENS_PREFIX):
            names.setdefault(name.partition(".")[0], []).append(name)
    return tuple(names.values())


def text_of(job: Job, elapsed_seconds: float, tokens: Sequence[Sequence[str]]) -> str:
    """The lines for a job as it is now; `tokens` are its `token_saves`."""
    done = sum(hop.state == "done" for hop in job.hops)
    replaced = f", {len(job.replaced)} replaced" if job.replaced else ""
    rows = _rows(job)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"{job.state}  {elapsed_seconds:.1f} s{_steps(job, tokens)}"]
    lines += ["  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows[:_MOST_ROWS]]
    if len(rows) > _MOST_ROWS:
        lines.append(f"  and {len(rows) - _MOST_ROWS} more")
    lines += [f"  {one}" for one in job.replaced[-_MOST_ROWS:]]
    lines += [f"  {one.first} and {one.second} through you" for one in job.relayed]
    lines.append(
        f"  {done} of {len(rows)} done{replaced}, {_amount(job.sent_bytes)} out, "
        f"{_amount(job.received_bytes)} in, unaudited"
    )
    return "\n".join(lines)


def _steps(job: Job, tokens: Sequence[Sequence[str]]) -> str:
    """How far a generation is, of whose tokens some may never come because of a stop token."""
    if not tokens:
        return ""
    # A token that the user writes may come before its step.
    came = [_first_missing(names, job.saves) for names in tokens]
    total = sum(map(len, tokens))
    if job.state != "done" or sum(came) == total:
        return f"  {sum(came)} of {total} steps"
    if len(came) > 1:
        return f"  {sum(came)} of {total} steps, ended early with stop tokens"
    return f"  ended at step {came[0] - 1} of {total} with a stop token"


def _first_missing(names: Sequence[str], came: Container[str]) -> int:
    return next((at for at, name in enumerate(names) if name not in came), len(names))


def _rows(job: Job) -> list[tuple[str, str, str, str]]:
    """Blocks with marks, peer, passes, and what it does. In a trace the first not done is at work.

    In a generation the work goes around, and all that run have the mark.
    """
    at_work: list[HopReport] = [hop for hop in job.hops if hop.state == "running"]
    if not job.plan.passes.are_generation:
        at_work = at_work[:1]
    rows = []
    for hop in job.hops:
        mark = "+" if hop.state == "done" else "*" if hop in at_work else ""
        blocks = f"{hop.part.span}{mark}{'~' if hop.stands_in and not hop.became else ''}"
        passes, does = "", hop.doing(job.hops, job.clock())
        if hop.state == "done":
            does = f"computed {hop.compute_seconds:.2f} s, waited {hop.wait_seconds:.2f} s"
        elif len(hop.part.stages) > 1:
            passes = f"{hop.stages_done} of {len(hop.part.stages)} passes"
        rows.append((blocks, hop.peer.peer_id[-_NAME_CHARS:], passes, does))
    return rows


def _amount(size_bytes: int) -> str:
    size = float(size_bytes)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
