"""Clients that ask a swarm one thing after another, whatever happens to it, and note what came.

What they ask reads, edits and carries values from peer to peer; what is wanted of each was found
before, by plain transformers with torch hooks.
"""

from __future__ import annotations

import math
import random
import shutil
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

import glasshive
from glasshive.client.provenance import Provenance
from glasshive.testing import LocalSwarm

N_BLOCKS = 6
NEW = 20
PENALTY = 1.5  # left alone, a tiny model says one token again and again
PROMPTS = [
    torch.tensor([[3, 14, 15, 9, 26, 5, 35], [1, 2, 3, 4, 5, 6, 7]]),
    torch.tensor([[60, 2, 31, 8]]),
]


@dataclass(frozen=True)
class Question:
    """What is asked, how, and what the answer is."""

    name: str
    ask: Callable[..., tuple[list[Tensor], Provenance]]
    wanted: list[Tensor]


def questions(folder: Path) -> list[Question]:
    """A trace and a generation for each prompt."""
    plain: Any = LlamaForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
    plain.eval().requires_grad_(False)
    found = []
    with one_thread():
        for i, prompt in enumerate(PROMPTS):
            found.append(Question(f"trace {i}", _trace_of(prompt), _traced(plain, prompt)))
            found.append(
                Question(f"generation {i}", _generation_of(prompt), _generated(plain, prompt))
            )
    return found


@contextmanager
def two_of_each(
    folder: Path, spans: Sequence[tuple[int, int]], cache: Path, **options: Any
) -> Iterator[LocalSwarm]:
    """A swarm in which two hosts serve each span, on one thread each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLASSHIVE_CACHE", str(cache))
        with LocalSwarm(folder, spans, replicas=2, threads=1, **options) as running:
            yield running


@contextmanager
def one_thread() -> Iterator[None]:
    """As the hosts compute, in this process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _trace_of(prompt: Tensor) -> Callable[..., tuple[list[Tensor], Provenance]]:
    """Reads in each third of the blocks, an edit, and a value of the first third for the last."""

    def ask(
        model: Any, recorded: Callable[[], None], **options: Any
    ) -> tuple[list[Tensor], Provenance]:
        layers = model.model.layers
        with model.trace(prompt, **options) as tracer:
            early = layers[1].output.save()
            layers[3].mlp.output[:, -1] = 0
            middle = layers[3].output.save()
            layers[4].output[:] += early
            logits = model.lm_head.output.save()
            recorded()
        return [early, middle, logits], tracer.result

    return ask


def _traced(plain: Any, prompt: Tensor) -> list[Tensor]:
    seen: list[Tensor] = []

    def keep(module: Any, args: Any, output: Tensor) -> None:
        seen.append(output.clone())

    def zero(module: Any, args: Any, output: Tensor) -> None:
        output[:, -1] = 0

    def add(module: Any, args: Any, output: Tensor) -> None:
        output += seen[0]

    hooks = {"layers.1": keep, "layers.3.mlp": zero, "layers.3": keep, "layers.4": add}
    with _hooks(plain, hooks):
        logits = plain(prompt).logits
    return [*seen, logits]


def _generation_of(prompt: Tensor) -> Callable[..., tuple[list[Tensor], Provenance]]:
    """At each step reads in the last third and a steered middle one.

    What the last block said at a step is added to the first one's output at the next.
    """

    def ask(
        model: Any, recorded: Callable[[], None], **options: Any
    ) -> tuple[list[Tensor], Provenance]:
        layers = model.model.layers
        options = {"max_new_tokens": NEW, "eos_token_id": []} | options
        with model.generate(prompt, repetition_penalty=PENALTY, **options) as tracer:
            saved, before = [], None
            for _ in tracer.iter[:]:
                if before is not None:
                    layers[0].output[:, -1] += before * 0.25
                layers[2].output[:, -1] += 1.5
                saved.append(layers[4].output.save())
                before = layers[5].output[:, -1]
            recorded()
        return [tracer.output_ids, *saved], tracer.result

    return ask


def _generated(plain: Any, prompt: Tensor) -> list[Tensor]:
    seen: list[Tensor] = []
    before: list[Tensor] = []

    def add(module: Any, args: Any, output: Tensor) -> None:
        if before:
            output[:, -1] += before[-1] * 0.25

    def steer(module: Any, args: Any, output: Tensor) -> None:
        output[:, -1] += 1.5

    def keep(module: Any, args: Any, output: Tensor) -> None:
        seen.append(output.clone())

    def note(module: Any, args: Any, output: Tensor) -> None:
        before.append(output[:, -1].clone())

    hooks = {"layers.0": add, "layers.2": steer, "layers.4": keep, "layers.5": note}
    with _hooks(plain, hooks):
        ids = plain.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=None,
            repetition_penalty=PENALTY,
        )
    return [ids, *seen]


@contextmanager
def _hooks(plain: Any, hooks: dict[str, Callable[[Any, Any, Tensor], None]]) -> Iterator[None]:
    handles = [
        plain.model.get_submodule(path).register_forward_hook(hook) for path, hook in hooks.items()
    ]
    try:
        with torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Answer:
    """What came of asking once. `disturbed`: peers were lost on the way.

    `seconds` are those of the run, for which the deadline is: from when it was recorded.
    """

    question: str
    at: float  # on the monotonic clock
    seconds: float
    deadline_seconds: float
    is_right: bool
    disturbed: int
    error: BaseException | None

    def __str__(self) -> str:
        took = f"{self.seconds:.2f} s of {self.deadline_seconds:g} s"
        text = f"at {self.at:.1f} s: {self.question}, {took}: "
        if self.error is None:
            return text + ("right" if self.is_right else "WRONG")
        return text + "".join(traceback.format_exception(self.error))


class SteadyClient(threading.Thread):
    """Asks one question after another, in an order by its seed, until it is told to `stop`.

    Its key is its own. With `deadlines` each trace has so many seconds as one of them says.
    """

    def __init__(
        self,
        config: Path,
        model_name: str,
        asked: Sequence[Question],
        seed: int,
        deadlines: Sequence[float] = (),
    ) -> None:
        super().__init__(daemon=True, name=f"client of seed {seed}")
        self.answers: list[Answer] = []
        self.ready = threading.Event()
        self.failure: BaseException | None = None  # of the client itself, outside of any trace
        self._config = _config_of(config, seed)
        self._model_name = model_name
        self._asked = asked
        self._randomness = random.Random(seed)
        self._deadlines = deadlines
        self._stopping = threading.Event()
        self.start()

    def stop(self) -> None:
        """Ask nothing more; what is asked is still answered."""
        self._stopping.set()

    def run(self) -> None:
        """The thread."""
        try:
            with glasshive.connect(self._config) as swarm:
                model = swarm.model(self._model_name)
                self.ready.set()
                while not self._stopping.is_set():
                    self.answers.append(self._answer(self._randomness.choice(self._asked), model))
        except BaseException as error:
            self.failure = error
            self.ready.set()

    def _answer(self, question: Question, model: Any) -> Answer:
        deadline, options = math.inf, {}
        if self._deadlines:
            deadline = options["deadline"] = self._randomness.choice(self._deadlines)
        is_right, disturbed, error = False, 0, None
        began = time.monotonic()

        def recorded() -> None:
            nonlocal began
            began = time.monotonic()

        try:
            got, result = question.ask(model, recorded, **options)
        except BaseException as caught:
            error = caught
            seconds = time.monotonic() - began
        else:
            seconds = time.monotonic() - began
            disturbed = result.retried + len(result.replaced)
            is_right = len(got) == len(question.wanted) and all(
                map(torch.equal, got, question.wanted)
            )
        return Answer(question.name, began, seconds, deadline, is_right, disturbed, error)


def _config_of(config: Path, seed: int) -> Path:
    """The same swarm's with a key of its own: hosts take a limited number of traces of a key."""
    own = config.with_name(f"client-{seed}.toml")
    shutil.copy(config, own)
    own.write_text(own.read_text().replace("client.key", f"client-{seed}.key"))
    return own


def p95(answers: Sequence[Answer]) -> float:
    """Of how long they took."""
    times = sorted(one.seconds for one in answers)
    return times[min(int(len(times) * 0.95), len(times) - 1)]
