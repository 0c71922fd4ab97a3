"""When the tokens of a generation came to its client, and what its job did meanwhile.

`watched(swarm)` looks at the jobs of a swarm: `Job.saves` is a dictionary that notes the time of
each token that is put into it, on the loop, so that nothing waits for the four ticks a second at
which a streamer is told.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from glasshive.client.job import Job
from glasshive.client.provenance import Replaced
from glasshive.client.swarm import Swarm

SMALL_BLOCKS = 6


@dataclass
class Arrivals:
    """Of one job: when it began and each token came, on the clock of `time.monotonic`."""

    job: Job
    tokens: list[float] = field(default_factory=list)
    accepted: list[float] = field(default_factory=list)  # when a stand-in had accepted its part


class _Saves(dict[str, Tensor]):
    """The saves of a job, whose tokens are those that hold integers."""

    def __init__(self, arrivals: Arrivals, on_token: Callable[[Arrivals], None]) -> None:
        super().__init__()
        self._arrivals = arrivals
        self._on_token = on_token

    def __setitem__(self, name: str, value: Tensor) -> None:
        super().__setitem__(name, value)
        if value.dtype == torch.int64:
            self._arrivals.tokens.append(time.monotonic())
            self._on_token(self._arrivals)


class _Replacements(list[Replaced]):
    """The stand-ins of a job."""

    def __init__(self, arrivals: Arrivals) -> None:
        super().__init__()
        self._arrivals = arrivals

    def append(self, one: Replaced) -> None:
        self._arrivals.accepted.append(time.monotonic())
        super().append(one)


@contextlib.contextmanager
def watched(
    swarm: Swarm,
    on_job: Callable[[Job], None] = lambda job: None,
    on_token: Callable[[Arrivals], None] = lambda arrivals: None,
) -> Iterator[list[Arrivals]]:
    """The jobs that run inside it, in turn. `on_token` is called on the loop: it must not wait."""
    seen: list[Arrivals] = []
    run_job = swarm.run_job

    def run(job: Job, *rest: Any) -> None:
        arrivals = Arrivals(job)
        seen.append(arrivals)
        job.saves, job.replaced = _Saves(arrivals, on_token), _Replacements(arrivals)
        on_job(job)
        run_job(job, *rest)

    swarm.run_job = run  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        del swarm.run_job  # type: ignore[method-assign]


def save_small_model(folder: str) -> None:
    """A random Llama of few numbers, whose peers do little but what glasshive itself costs."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=SMALL_BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
