"""How fast this host computes: measured at its start, and again by every pass that it runs.

A process in another's place takes over the figures that were measured.

What a part may take is bounded in seconds of this host's own time: from the bound follow what
admission refuses, and the moment from which a stage that still runs is a runaway.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Final

import torch

from glasshive.graph.budget import Pace
from glasshive.graph.dtypes import DType
from glasshive.graph.kernels import run_op, to_torch_dtype
from glasshive.peer.device import wait_for
from glasshive.peer.span_model import SpanModel

_ENOUGH_SECONDS: Final = 0.25
_MOST_SECONDS: Final = 2.0
_MOST_TOKENS: Final = 512
_SIDE: Final = 256
_NUMBERS: Final = 1 << 21
_DRAWN: Final = 1 << 17


@dataclass(slots=True)
class HostPace:
    """The pace of one span on one device. `graph` is that of everything but the model's pass."""

    tokens_per_second: float
    hidden_size: int
    graph: Pace
    pass_seconds: float = 0.0  # of one token

    def forward_seconds(self, batch: int, seq: int, past: int = 0) -> float:
        """About how long the span's forward takes on `[batch, seq]` tokens behind `past` others.

        No pass is faster than that of one token, which reads all the weights.

        Attention grows with the length of a row: in a block of width d, a token costs about 24 d^2
        FLOPs, and 4 d for each token that it looks at.
        """
        longer = 1 + (past + seq) / (6 * self.hidden_size)
        return max(batch * seq * longer / self.tokens_per_second, self.pass_seconds)

    def saw(self, tokens: int, seconds: float) -> None:
        """A pass of that many tokens through the whole span has taken so long, hooks and all.

        What is fastest counts, as where it is measured: a moment in which others used the machine
        is corrected by the first pass in which they don't. Passes longer than those that are
        measured do more tokens a second than short ones can, and don't count.
        """
        if tokens <= _MOST_TOKENS and seconds > 0:
            self.tokens_per_second = max(self.tokens_per_second, tokens / seconds)
            self.pass_seconds = min(self.pass_seconds, seconds)

    def to_json(self) -> str:
        """One line, for the process that comes in this one's place."""
        return json.dumps(
            {
                "tokens_per_second": self.tokens_per_second,
                "hidden_size": self.hidden_size,
                "pass_seconds": self.pass_seconds,
                "flops_per_second": self.graph.flops_per_second,
                "drawn_numbers_per_second": self.graph.drawn_numbers_per_second,
                "dense_flops_per_second": {
                    dtype.value: pace for dtype, pace in self.graph.dense_flops_per_second.items()
                },
            },
            separators=(",", ":"),
        )

    @classmethod
    def from_json(cls, line: str) -> HostPace:
        """What `to_json` gave."""
        said = json.loads(line)
        dense = {
            DType.from_name(name): pace for name, pace in said["dense_flops_per_second"].items()
        }
        return cls(
            said["tokens_per_second"],
            said["hidden_size"],
            Pace(dense, said["flops_per_second"], said["drawn_numbers_per_second"]),
            said["pass_seconds"],
        )


def measure_pace(model: SpanModel, most_tokens: int | None) -> HostPace:
    """Some passes of growing length, and some kernels; a fraction of a second for a fast host.

    `most_tokens` is the longest row that the model takes, None if it takes any.
    """
    with torch.no_grad():
        return HostPace(
            _tokens_per_second(model, min(most_tokens or _MOST_TOKENS, _MOST_TOKENS)),
            model.hidden_size,
            measure_graph_pace(model.device),
            _best_seconds(_forward(model, 1), model.device),
        )


@cache
def measure_graph_pace(device: torch.device) -> Pace:
    """The pace of the ops of a graph on `device`, measured once in a process."""
    dense: dict[DType, float] = {}
    others: list[float] = []
    for dtype in DType:
        try:
            numbers = torch.ones(_NUMBERS, dtype=to_torch_dtype(dtype), device=device)
            if dtype.itemsize > 2:
                # A FLOP for each number, all of them through memory: the slowest FLOPs there are.
                others.append(_NUMBERS / _best_seconds(partial(torch.mul, numbers, 3), device))
            matrix = numbers[: _SIDE**2].view(_SIDE, _SIDE)
            dense[dtype] = 2 * _SIDE**3 / _best_seconds(partial(torch.mm, matrix, matrix), device)
        except (RuntimeError, TypeError):  # no such numbers on this device, or no products of them
            continue
    numbers = torch.ones(_DRAWN, device=device)
    draw = partial(run_op, "randn_like", (numbers, None, 1), device)
    return Pace(dense, min(others), _DRAWN / _best_seconds(draw, device))


def _tokens_per_second(model: SpanModel, most_tokens: int) -> float:
    tokens = min(16, most_tokens)
    while True:
        seconds = _best_seconds(_forward(model, tokens), model.device)
        if seconds >= _ENOUGH_SECONDS or tokens * 4 > most_tokens:
            return tokens / seconds
        tokens *= 4


def _forward(model: SpanModel, tokens: int) -> Callable[[], object]:
    """A pass of so many tokens."""
    ids = torch.zeros((1, tokens), dtype=torch.int64, device=model.device)
    hidden = torch.zeros((1, tokens, model.hidden_size), dtype=model.dtype, device=model.device)
    if model.is_first:
        return partial(model.run, input_ids=ids, hidden=None)
    return partial(model.run, input_ids=None, hidden=hidden)


def _best_seconds(work: Callable[[], object], device: torch.device) -> float:
    """The shortest of some runs after a first one that also sets things up.

    Others use the machine too, and what they take away is not the host's pace.
    """
    times: list[float] = []
    while (
        len(times) < 2
        or (len(times) < 4 and sum(times) < _MOST_SECONDS)
        or (len(times) < 5 and sum(times) < _ENOUGH_SECONDS)
    ):
        began = time.perf_counter()
        work()
        wait_for(device)
        times.append(time.perf_counter() - began)
    return max(min(times[1:]), 1e-9)
