"""T6: generations that are run, cut off or left keep nothing at the peers: no cache, task or file.

Three hosts in this process. A third of the generations run to their end, a third pass their
deadline at some step, and of a third the client leaves in the middle of the steps.

Seen failing: with what `Executor._inputs` begins kept in a list of the process.
"""

from __future__ import annotations

import gc
import os
import random
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from soak import SEED, count
from tiny_llama import save_llama
from waits import wait_for

import glasshive
from glasshive.client.errors import TraceTimeout
from glasshive.client.job import Job
from glasshive.peer.hosted_trace import HostedTrace
from glasshive.peer.span_cache import SpanCache

SESSIONS = count(18, 300)
NEW = 40
PROMPT = torch.tensor([[3, 14, 15, 9, 26]])


class Left(Exception):
    """The client has enough."""


class Leaves:
    """A streamer that leaves once a token has come."""

    def put(self, value: torch.Tensor) -> None:
        if value.dim() == 1:
            raise Left

    def end(self) -> None:
        """Nothing more comes."""


def kept() -> dict[str, int]:
    """What there is of generations in this process."""
    gc.collect()
    kinds: dict[str, type] = {"caches": SpanCache, "traces": HostedTrace, "jobs": Job}
    objects = gc.get_objects()
    found = {name: sum(type(one) is kind for one in objects) for name, kind in kinds.items()}
    return {**found, "threads": threading.active_count(), "files": len(os.listdir("/dev/fd"))}


@pytest.mark.timeout(600)
def test_what_ended_is_kept_nowhere(tmp_path: Path) -> None:
    model: Any = glasshive.local(save_llama(tmp_path / "tiny", 6), cuts=(2, 4))
    draw = random.Random(SEED)
    big = torch.eye(300)

    def generate(work: int, **options: Any) -> None:
        with model.generate(PROMPT, max_new_tokens=NEW, eos_token_id=[], **options) as tracer:
            for _ in tracer.iter[:]:
                states = model.model.layers[3].output
                states.save()
                for _ in range(work):
                    ((big * states[0, -1, 0]) @ big).sum().save()

    generate(0)
    before = kept()
    ends = {"ran": 0, "late": 0, "left": 0}
    for number in range(SESSIONS):
        if number % 3 == 0:
            generate(0)
            ends["ran"] += 1
        elif number % 3 == 1:
            with pytest.raises(TraceTimeout):
                generate(6, deadline=draw.uniform(0.02, 0.1))
            ends["late"] += 1
        else:
            with pytest.raises(Left):
                generate(40, streamer=Leaves())
            ends["left"] += 1
    assert min(ends.values()) >= SESSIONS // 3
    wait_for(lambda: all(value <= before[name] for name, value in kept().items()), before)
