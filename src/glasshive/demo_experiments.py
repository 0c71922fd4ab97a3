"""The demo's three experiments, written as a researcher would write them against a swarm.

The prompts, numbers and batches are those of demo_oracle.py, whose results these must equal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from glasshive.client.provenance import Provenance
from glasshive.demo_oracle import (
    DEMO,
    LensResult,
    LensSpec,
    PatchingResult,
    PatchingSpec,
    SteeringResult,
    SteeringSpec,
    answer_ids,
    lens_result,
    patching_result,
    steering_result,
    sweep_passes,
    token_ids,
)


@dataclass(frozen=True, slots=True)
class Ran:
    """A result, where each of its traces ran, and the blocks whose outputs a trace touched.

    `rows` and `tokens` are the size of each trace's forward pass.
    """

    result: Any
    traces: tuple[Provenance, ...]
    rows: tuple[int, ...]
    tokens: int
    touched_blocks: frozenset[int]


def logit_lens(model: Any, spec: LensSpec = DEMO.lens) -> Ran:
    """What every layer would say next: norm and head applied to each layer's output.

    A second trace, which is not in the report, brings the raw logits for the comparison.
    """
    ids = token_ids(model.tokenizer, spec.prompt)
    top_ids, probabilities, last_logits = [], [], []
    with model.trace(ids, progress=False) as tracer:
        for layer in model.model.layers:
            logits = model.lm_head(model.model.norm(layer.output[:, -spec.shown_tokens :]))
            best = logits.softmax(-1).max(-1)
            top_ids.append(best.indices[0].save())
            probabilities.append(best.values[0].save())
    with model.trace(ids, progress=False):
        for layer in model.model.layers:
            logits = model.lm_head(model.model.norm(layer.output[:, -spec.shown_tokens :]))
            last_logits.append(logits[0, -1].save())
    result: LensResult = lens_result(
        spec,
        model.tokenizer,
        torch.stack([plain(one) for one in top_ids]),
        torch.stack([plain(one) for one in probabilities]),
        torch.stack([plain(one) for one in last_logits]),
    )
    return Ran(result, (tracer.result,), (1,), len(ids), _all_blocks(model))


def activation_patching(
    model: Any,
    spec: PatchingSpec = DEMO.patching,
    on_pass: Callable[[int, int], None] = lambda done, total: None,
) -> Ran:
    """How much of the clean answer each (layer, position) of the clean run brings back.

    One trace is one forward pass: the clean prompt, and corrupted ones with one patch each.
    `on_pass(done, all)` is called before the first and after each.
    """
    clean = token_ids(model.tokenizer, spec.clean)
    corrupted = token_ids(model.tokenizer, spec.corrupted)
    pair = answer_ids(model.tokenizer, spec)
    layers = model.model.layers
    passes = sweep_passes(len(layers), len(clean), spec.rows_per_pass)
    traces, answers = [], []
    clean_logits = torch.empty(0)
    on_pass(0, len(passes))
    for number, cells in enumerate(passes):
        saved = []
        with model.trace(progress=False) as tracer:
            with tracer.invoke(clean):
                kept = {cell: layers[cell[0]].output[:, cell[1]] for cell in cells if cell}
                first = model.lm_head.output[:, -1, pair].save()
            for cell in cells:
                with tracer.invoke(corrupted):
                    if cell is not None:
                        layers[cell[0]].output[:, cell[1]] = kept[cell]
                    saved.append(model.lm_head.output[:, -1, pair].save())
        if number == 0:
            clean_logits = plain(first)[0]
        answers += [plain(one) for one in saved]
        traces.append(tracer.result)
        on_pass(number + 1, len(passes))
    result: PatchingResult = patching_result(
        spec, model.tokenizer, torch.cat(answers), clean_logits
    )
    rows = tuple(len(cells) + 1 for cells in passes)
    return Ran(result, tuple(traces), rows, len(clean), _all_blocks(model))


def steering(model: Any, spec: SteeringSpec = DEMO.steering) -> Ran:
    """The next word before and after one layer's output is moved along a direction."""
    block = model.model.layers[spec.layer]
    with model.trace(progress=False) as tracer:
        with tracer.invoke(token_ids(model.tokenizer, spec.toward)):
            toward = block.output
        with tracer.invoke(token_ids(model.tokenizer, spec.away)):
            away = block.output
        with tracer.invoke(token_ids(model.tokenizer, spec.prompt)):
            before = model.lm_head.output[0, -1].save()
        with tracer.invoke(token_ids(model.tokenizer, spec.prompt)):
            block.output += spec.scale * (toward.squeeze(0).mean(0) - away.squeeze(0).mean(0))
            after = model.lm_head.output[0, -1].save()
    result: SteeringResult = steering_result(spec, model.tokenizer, plain(before), plain(after))
    tokens = len(token_ids(model.tokenizer, spec.prompt))
    return Ran(result, (tracer.result,), (4,), tokens, frozenset({spec.layer}))


def _all_blocks(model: Any) -> frozenset[int]:
    return frozenset(range(len(model.model.layers)))


def plain(saved: Any) -> torch.Tensor:
    """A saved value as a plain tensor."""
    return torch.as_tensor(saved.value)
