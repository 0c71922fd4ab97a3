"""What the clients of a simulation run, and what it gives undisturbed.

The oracle is transformers with torch hooks on one machine. Of the one experiment that draws, it is
an undisturbed run: which token a seed draws is our own rule, and the rest is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from generation_oracle import generate_hooked
from torch import Tensor

from glasshive.client.errors import NotSaved
from glasshive.client.provenance import Provenance

__all__ = ["EXPERIMENTS", "N_BLOCKS", "Begun", "Saves", "oracle_of"]

N_BLOCKS: Final = 6
PROMPT: Final = torch.tensor([[3, 14, 15, 9, 26], [1, 2, 3, 4, 5]])
NEW: Final = 8
PENALTY: Final = 1.5  # left alone, a tiny model says one token again and again

Saves = dict[str, Any]
"""What was saved, by name: filled only if the run was ok."""
Begun = Callable[[Any], object]
"""Is given the tracer while its block is open, as whoever may cancel it."""


def trace(model: Any, saves: Saves, begun: Begun, **options: Any) -> Provenance:
    """Reads and edits on every span; what one edit adds comes from a span before it."""
    layers = model.model.layers
    with model.trace(PROMPT, **options) as tracer:
        begun(tracer)
        early = layers[0].output
        layers[1].output[:, -1] += 1.5
        layers[3].output = layers[3].output + 0.25 * early
        saves["mid"] = layers[3].output.save()
        layers[5].output[:, 0] *= 1.25
        saves["last"] = layers[5].output.save()
        saves["logits"] = model.lm_head.output.save()
    return tracer.result


def generate(model: Any, saves: Saves, begun: Begun, **options: Any) -> Provenance:
    """The same at each step, and what one step adds comes from the last span a step before it."""
    layers = model.model.layers
    before = None
    given = {"eos_token_id": []} | options
    with model.generate(PROMPT, max_new_tokens=NEW, repetition_penalty=PENALTY, **given) as tracer:
        begun(tracer)
        for step, _ in enumerate(tracer.iter[:]):
            if before is not None:
                layers[0].output = layers[0].output + 0.125 * before
            layers[1].output[:, -1] += 1.5
            saves[f"mid{step}"] = layers[3].output.save()
            saves[f"last{step}"] = layers[5].output.save()
            before = layers[5].output[:, -1:]
    saves["ids"] = tracer.output_ids
    return tracer.result


def stops(model: Any, saves: Saves, begun: Begun, **options: Any) -> Provenance:
    """A generation that ends before its last step."""
    return generate(model, saves, begun, eos_token_id=STOPS, **options)


def draws(model: Any, saves: Saves, begun: Begun, **options: Any) -> Provenance:
    """A generation whose tokens are drawn."""
    with model.generate(
        PROMPT, max_new_tokens=NEW, do_sample=True, seed=11, eos_token_id=[], **options
    ) as tracer:
        begun(tracer)
        for step, _ in enumerate(tracer.iter[:]):
            model.model.layers[2].output[:, -1] += 1.5
            saves[f"last{step}"] = model.model.layers[5].output.save()
    saves["ids"] = tracer.output_ids
    return tracer.result


STOPS: Final = list(range(0, 64, 4))
EXPERIMENTS: Final[Mapping[str, Callable[..., Provenance]]] = {
    one.__name__: one for one in (trace, generate, stops, draws)
}


def plain(saves: Saves) -> dict[str, Tensor | None]:
    """The tensors; None for what a generation ended before."""
    return {name: _plain(one) for name, one in saves.items()}


def _plain(one: Any) -> Tensor | None:
    try:
        return one.clone()
    except NotSaved:
        return None


def oracle_of(name: str, model: Any) -> dict[str, Tensor | None]:
    """What the experiment `trace`, `generate` or `stops` saves, by transformers and hooks."""
    return _trace_oracle(model) if name == "trace" else _generate_oracle(model, name == "stops")


def _trace_oracle(model: Any) -> dict[str, Tensor | None]:
    layers = model.model.layers
    found: dict[str, Tensor | None] = {}
    early: list[Tensor] = []

    def at_3(module: Any, args: Any, output: Tensor) -> Tensor:
        found["mid"] = output + 0.25 * early[0]
        return found["mid"].clone()

    def at_5(module: Any, args: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[:, 0] *= 1.25
        found["last"] = output
        return output.clone()

    def at_1(module: Any, args: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[:, -1] += 1.5
        return output

    hooks = [
        layers[0].register_forward_hook(lambda m, a, output: early.append(output.clone())),
        layers[1].register_forward_hook(at_1),
        layers[3].register_forward_hook(at_3),
        layers[5].register_forward_hook(at_5),
    ]
    with torch.no_grad():
        found["logits"] = model(PROMPT).logits
    for one in hooks:
        one.remove()
    return found


def _generate_oracle(model: Any, does_stop: bool) -> dict[str, Tensor | None]:
    before: list[Tensor] = []

    def at_0(step: int, output: Tensor) -> Tensor | None:
        return output + 0.125 * before[-1] if before else None

    def at_1(step: int, output: Tensor) -> Tensor:
        output = output.clone()
        output[:, -1] += 1.5
        return output

    def at_5(step: int, output: Tensor) -> None:
        before.append(output[:, -1:].clone())

    ids, found = generate_hooked(
        model,
        PROMPT,
        NEW,
        reads=["model.layers.3", "model.layers.5"],
        edits={"model.layers.0": at_0, "model.layers.1": at_1, "model.layers.5": at_5},
        repetition_penalty=PENALTY,
        eos_token_id=STOPS if does_stop else None,
    )
    saves: dict[str, Tensor | None] = {"ids": ids}
    for name, path in (("mid", "model.layers.3"), ("last", "model.layers.5")):
        for step in range(NEW):
            saves[f"{name}{step}"] = found[path][step] if step < len(found[path]) else None
    return saves
