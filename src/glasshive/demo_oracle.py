"""The demo's three experiments as plain Hugging Face with torch hooks: what a swarm must equal.

Nothing of glasshive is imported here, so that the comparison means something. `DEMO` holds the
prompts and numbers of the experiments; whoever runs them another way takes them from there, makes
the same batches, and fills the same result classes by `lens_result`, `patching_result` and
`steering_result`.

The batches (the last bits of a matrix product depend on them):

- logit lens: the prompt alone, one row. The lens sees the last tokens only, sliced before the norm.
- patching: passes of at most `rows_per_pass` rows, as `sweep_passes` says. Row 0 is the clean
  prompt; every other row is the corrupted prompt with one (layer, position) taken from row 0 of
  the same pass. The first cell is None: the corrupted prompt as it is.
- steering: one pass of four rows: toward, away, the prompt, the prompt steered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

Cell: TypeAlias = "tuple[int, int] | None"
"""(layer, position) to patch; None for the corrupted prompt as it is."""


@dataclass(frozen=True, slots=True)
class LensSpec:
    """A logit lens over every layer, at the last `shown_tokens` positions of `prompt`."""

    prompt: str
    shown_tokens: int


@dataclass(frozen=True, slots=True)
class PatchingSpec:
    """A sweep over layers x positions. The prompts have one length and differ in one token.

    `answer` is the token that completes `clean`, `distractor` the one that completes `corrupted`.
    """

    clean: str
    corrupted: str
    answer: str
    distractor: str
    rows_per_pass: int


@dataclass(frozen=True, slots=True)
class SteeringSpec:
    """Adds `scale` x (mean of `toward` - mean of `away`) to one layer's output at every position.

    The means are over positions of that layer's output. All three prompts have one length.
    """

    prompt: str
    toward: str
    away: str
    layer: int
    scale: float
    shown_tokens: int


@dataclass(frozen=True, slots=True)
class DemoSpec:
    lens: LensSpec
    patching: PatchingSpec
    steering: SteeringSpec


DEMO = DemoSpec(
    lens=LensSpec(prompt="The author of Romeo and Juliet is William", shown_tokens=7),
    patching=PatchingSpec(
        clean="When Jack and Anna arrived at the beach, Anna threw the ball to",
        corrupted="When Jack and Anna arrived at the beach, Jack threw the ball to",
        answer=" Jack",
        distractor=" Anna",
        rows_per_pass=32,
    ),
    steering=SteeringSpec(
        prompt="The most dangerous animal in the world is the",
        toward="The fish swam in the deep blue ocean.",
        away="The man walked in the busy old town.",
        layer=12,
        scale=1.5,
        shown_tokens=5,
    ),
)


@dataclass(frozen=True, slots=True)
class LensResult:
    """What each layer would say next, at each shown position.

    `top_ids` and `probabilities` are (layers, shown); `last_logits` is (layers, vocabulary), the
    lens's raw logits at the last position; `top_tokens` is `top_ids` as text.
    """

    spec: LensSpec
    tokens: tuple[str, ...]
    top_tokens: tuple[tuple[str, ...], ...]
    top_ids: Tensor
    probabilities: Tensor
    last_logits: Tensor

    def largest_difference(self, other: LensResult) -> float:
        """The largest absolute difference of any logit at the last position or probability."""
        return max(
            _largest(self.last_logits, other.last_logits),
            _largest(self.probabilities, other.probabilities),
        )


@dataclass(frozen=True, slots=True)
class PatchingResult:
    """How far patching one (layer, position) moves the answer back to the clean one.

    `answer_logits` is (cells, 2): the logits of answer and distractor at the last position, in the
    order of `sweep_cells`; `clean_logits` is (2,). `restored` is (layers, positions): the logit
    difference, 0 at the corrupted prompt's and 1 at the clean prompt's.
    """

    spec: PatchingSpec
    tokens: tuple[str, ...]
    corrupted_tokens: tuple[str, ...]
    answer_logits: Tensor
    clean_logits: Tensor
    clean_difference: float
    corrupted_difference: float
    restored: Tensor

    def largest_difference(self, other: PatchingResult) -> float:
        """The largest absolute difference of any of the logits."""
        return max(
            _largest(self.answer_logits, other.answer_logits),
            _largest(self.clean_logits, other.clean_logits),
        )


@dataclass(frozen=True, slots=True)
class SteeringResult:
    """The next token before and after; both logits are (vocabulary,), both tops best first."""

    spec: SteeringSpec
    plain_logits: Tensor
    steered_logits: Tensor
    plain_top: tuple[tuple[str, float], ...]
    steered_top: tuple[tuple[str, float], ...]

    def largest_difference(self, other: SteeringResult) -> float:
        """The largest absolute difference of any logit."""
        return max(
            _largest(self.plain_logits, other.plain_logits),
            _largest(self.steered_logits, other.steered_logits),
        )


# --- from tensors to results ----------------------------------------------------------------------


def lens_result(
    spec: LensSpec, tokenizer: Any, top_ids: Tensor, probabilities: Tensor, last_logits: Tensor
) -> LensResult:
    """Names the tokens; shapes as in `LensResult`."""
    shown = token_ids(tokenizer, spec.prompt)[-spec.shown_tokens :]
    return LensResult(
        spec=spec,
        tokens=_texts(tokenizer, shown),
        top_tokens=tuple(_texts(tokenizer, row) for row in top_ids.tolist()),
        top_ids=top_ids,
        probabilities=probabilities,
        last_logits=last_logits,
    )


def patching_result(
    spec: PatchingSpec, tokenizer: Any, answer_logits: Tensor, clean_logits: Tensor
) -> PatchingResult:
    """Normalises the sweep; shapes as in `PatchingResult`."""
    clean = token_ids(tokenizer, spec.clean)
    corrupted = token_ids(tokenizer, spec.corrupted)
    differences = answer_logits[:, 0] - answer_logits[:, 1]
    clean_difference = (clean_logits[0] - clean_logits[1]).item()
    corrupted_difference = differences[0].item()
    restored = (differences[1:] - corrupted_difference) / (clean_difference - corrupted_difference)
    return PatchingResult(
        spec=spec,
        tokens=_texts(tokenizer, clean),
        corrupted_tokens=_texts(tokenizer, corrupted),
        answer_logits=answer_logits,
        clean_logits=clean_logits,
        clean_difference=clean_difference,
        corrupted_difference=corrupted_difference,
        restored=restored.reshape(-1, len(clean)),
    )


def steering_result(
    spec: SteeringSpec, tokenizer: Any, plain_logits: Tensor, steered_logits: Tensor
) -> SteeringResult:
    """Ranks the next tokens; shapes as in `SteeringResult`."""
    return SteeringResult(
        spec=spec,
        plain_logits=plain_logits,
        steered_logits=steered_logits,
        plain_top=_top(tokenizer, plain_logits, spec.shown_tokens),
        steered_top=_top(tokenizer, steered_logits, spec.shown_tokens),
    )


def token_ids(tokenizer: Any, prompt: str) -> list[int]:
    """The prompt's tokens, without special ones (SmolLM2's tokenizer adds none)."""
    ids: list[int] = tokenizer(prompt, add_special_tokens=False).input_ids
    return ids


def answer_ids(tokenizer: Any, spec: PatchingSpec) -> list[int]:
    """The ids of answer and distractor, each of one token."""
    ids = [token_ids(tokenizer, text) for text in (spec.answer, spec.distractor)]
    if any(len(tokens) != 1 for tokens in ids):
        raise ValueError(f"{spec.answer!r} and {spec.distractor!r} must be one token each")
    return [tokens[0] for tokens in ids]


def sweep_cells(layers: int, positions: int) -> list[Cell]:
    """None, then every (layer, position), layer by layer."""
    return [None, *((layer, at) for layer in range(layers) for at in range(positions))]


def sweep_passes(layers: int, positions: int, rows_per_pass: int) -> list[list[Cell]]:
    """The cells cut into passes: row 0 of a pass is the clean prompt, row 1 + i its cell i."""
    if rows_per_pass < 2:
        raise ValueError(f"{rows_per_pass} rows a pass leave no row for a patch; give at least 2")
    cells = sweep_cells(layers, positions)
    step = rows_per_pass - 1
    return [cells[start : start + step] for start in range(0, len(cells), step)]


# --- plain Hugging Face ---------------------------------------------------------------------------


def load(folder: Path) -> tuple[Any, Any]:
    """Model (fp32, evaluation mode) and tokenizer from a local folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True
    )
    return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)


@torch.no_grad()
def logit_lens(model: Any, tokenizer: Any, spec: LensSpec = DEMO.lens) -> LensResult:
    """The logit lens by forward hooks on every block."""
    top_ids, probabilities, last_logits = [], [], []

    def look(layer: int, output: Tensor) -> None:
        logits = model.lm_head(model.model.norm(output[:, -spec.shown_tokens :]))
        best = logits.softmax(-1).max(-1)
        top_ids.append(best.indices[0])
        probabilities.append(best.values[0])
        last_logits.append(logits[0, -1].clone())

    with _hooked(model.model.layers, look):
        model(input_ids=torch.tensor([token_ids(tokenizer, spec.prompt)]), use_cache=False)
    return lens_result(
        spec,
        tokenizer,
        torch.stack(top_ids),
        torch.stack(probabilities),
        torch.stack(last_logits),
    )


@torch.no_grad()
def activation_patching(
    model: Any,
    tokenizer: Any,
    spec: PatchingSpec = DEMO.patching,
    on_pass: Callable[[int, int], None] | None = None,
) -> PatchingResult:
    """The sweep by forward hooks on every block; `on_pass` is told (passes done, passes)."""
    clean = token_ids(tokenizer, spec.clean)
    corrupted = token_ids(tokenizer, spec.corrupted)
    if len(clean) != len(corrupted):
        raise ValueError(f"{len(clean)} and {len(corrupted)} tokens; a minimal pair has one length")
    pair = answer_ids(tokenizer, spec)
    passes = sweep_passes(len(model.model.layers), len(clean), spec.rows_per_pass)
    answer_logits: list[Tensor] = []
    clean_logits = torch.empty(0)
    for number, cells in enumerate(passes):

        def patch(layer: int, output: Tensor, cells: list[Cell] = cells) -> None:
            for row, cell in enumerate(cells, start=1):
                if cell is not None and cell[0] == layer:
                    output[row, cell[1]] = output[0, cell[1]]

        rows = torch.tensor([clean, *([corrupted] * len(cells))])
        with _hooked(model.model.layers, patch):
            logits = model(input_ids=rows, use_cache=False).logits[:, -1, pair]
        if number == 0:
            clean_logits = logits[0]
        answer_logits.append(logits[1:])
        if on_pass is not None:
            on_pass(number + 1, len(passes))
    return patching_result(spec, tokenizer, torch.cat(answer_logits), clean_logits)


@torch.no_grad()
def steering(model: Any, tokenizer: Any, spec: SteeringSpec = DEMO.steering) -> SteeringResult:
    """The steering edit by one forward hook."""
    prompts = (spec.toward, spec.away, spec.prompt, spec.prompt)
    rows = [token_ids(tokenizer, prompt) for prompt in prompts]
    if len({len(row) for row in rows}) != 1:
        raise ValueError(f"{[len(row) for row in rows]} tokens; the prompts must have one length")

    def steer(layer: int, output: Tensor) -> None:
        if layer == spec.layer:
            direction = output[0].mean(0) - output[1].mean(0)
            output[3] += spec.scale * direction

    with _hooked(model.model.layers, steer):
        logits = model(input_ids=torch.tensor(rows), use_cache=False).logits[:, -1]
    return steering_result(spec, tokenizer, logits[2].clone(), logits[3].clone())


@contextmanager
def _hooked(layers: Any, function: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Calls `function(index, output)` after each layer; it may edit the output in place."""
    handles = [
        layer.register_forward_hook(
            lambda module, inputs, output, index=index: function(index, output)
        )
        for index, layer in enumerate(layers)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _top(tokenizer: Any, logits: Tensor, count: int) -> tuple[tuple[str, float], ...]:
    best = logits.softmax(-1).topk(count)
    texts = _texts(tokenizer, best.indices.tolist())
    return tuple(zip(texts, best.values.tolist(), strict=True))


def _texts(tokenizer: Any, ids: list[int]) -> tuple[str, ...]:
    return tuple(tokenizer.decode([token]) for token in ids)


def _largest(left: Tensor, right: Tensor) -> float:
    """The largest absolute difference; a NaN on either side shows as NaN."""
    if left.shape != right.shape:
        raise ValueError(
            f"shapes {tuple(left.shape)} and {tuple(right.shape)}; wanted the same experiment"
        )
    return (left - right).abs().max().item()
