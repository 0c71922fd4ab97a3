"""Generations of many seconds, and what ends them early."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NoReturn

import torch

NEW = 40
WORK = 1200  # a matrix product of some 70 ms at each step
HELD = 2048  # a matrix of 16 MiB that a session holds from its first step to its last
HELD_BYTES = 4 * HELD**2


class Then:
    """A streamer that does something with the tracer as soon as some tokens have come."""

    tracer: Any = None  # whose tokens they are

    def __init__(self, act: Callable[[Any], object] = lambda tracer: None) -> None:
        self.has_begun = threading.Event()
        self._act = act
        self._seen = 0

    def put(self, value: torch.Tensor) -> None:
        self._seen += 1
        if self._seen == 3:
            self.has_begun.set()
            self._act(self.tracer)

    def end(self) -> None:
        """Nothing more comes."""


def interrupt(tracer: Any) -> NoReturn:
    """What Ctrl-C does to the thread that waits for a trace."""
    raise KeyboardInterrupt


def linger(
    model: Any, then: Then | None = None, *, new: int = NEW, work: int = WORK, **options: Any
) -> None:
    """A generation of many seconds, with a matrix that each of its peers holds all the time."""
    layers = model.model.layers
    factor, column, row = torch.eye(work), torch.ones(HELD, 1), torch.ones(1, HELD)
    prompt = torch.tensor([[3, 14, 15, 9, 26]])
    then = Then() if then is None else then
    options = {"max_new_tokens": new, "eos_token_id": [], "streamer": then} | options
    with model.generate(prompt, **options) as tracer:
        then.tracer = tracer
        matrices = []
        for step in tracer.iter[:]:
            early, late = (layers[i].output[:1, -1, 0].sum() for i in (1, 4))
            if step == 0:
                matrices = [column * one * row for one in (early, late)]
            ((factor * late) @ factor).sum().save()
            if step == new - 1:
                (matrices[0] * early).sum().save()
                (matrices[1] * late).sum().save()
