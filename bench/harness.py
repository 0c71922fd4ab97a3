"""How every script here measures: arms interleaved in one process, medians, one JSON line.

The machine is shared and noisy, so an arm's figure means nothing alone: what counts is its ratio to
the arm beside it in the same run.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

# The same in every arm and every process that is started from here.
os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one arm over its repeats."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median."""
        return statistics.median(self.seconds)

    @property
    def least(self) -> float:
        """The minimum."""
        return min(self.seconds)


def interleaved(
    arms: Mapping[str, Callable[[], object]], *, repeats: int, warm_up: int = 1
) -> dict[str, Timing]:
    """Time the arms in turn, `repeats` times each, after `warm_up` rounds that do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(warm_up + repeats):
        for name, run in arms.items():
            began = time.perf_counter()
            run()
            took = time.perf_counter() - began
            if turn >= warm_up:
                seconds[name].append(took)
    return {name: Timing(tuple(times)) for name, times in seconds.items()}


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import torch

    return {
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "load": round(os.getloadavg()[0], 1),
    }


def report(
    name: str, columns: list[str], rows: list[list[Any]], figures: Mapping[str, Any]
) -> None:
    """Print a table for people and one JSON line for machines."""
    table = Table(title=name, title_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column == columns[0] else "right")
    for row in rows:
        table.add_row(*(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row))
    Console().print(table)
    print(json.dumps({"bench": name, **figures, "machine": machine()}))
