"""Bytes that the classic experiments move, over three peers, against Petals' way.

Petals' way: peers run blocks and nothing else, so hidden states go to the client and back at every
block whose output an experiment touches (and inside a block nothing can be touched at all). Counted
from the plans: what the edges carry, what is saved, what the client sends (constants once, then
they are cached). 1 x 12 tokens of SmolLM2-135M in fp32; one hidden state is 27,648 bytes. There the
head is at the client, so logits do not travel; here the 196,608 bytes of one row do, unless the
experiment reduces them first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from harness import report

import glasshive

HIDDEN_BYTES = 12 * 576 * 4
PROMPT = list(range(500, 512))


def experiments(model: Any) -> dict[str, tuple[Callable[[], None], range | tuple[int, ...]]]:
    """Each experiment's body, and the blocks whose outputs it touches."""
    layers = model.model.layers
    dense = torch.randn(576, 1024, generator=torch.Generator().manual_seed(0))

    def last_logits() -> None:
        model.lm_head.output[:, -1].save()

    def save_all() -> None:
        for layer in layers:
            layer.output.save()

    def read_early() -> None:
        layers[5].output.save()

    def ablate() -> None:
        layers[12].mlp.output[:] = 0
        last_logits()

    def steer_all() -> None:
        direction = layers[2].output[:, -1] - layers[2].output[:, 0]
        for layer in layers[15:]:
            layer.output[:, -1] += direction
        last_logits()

    def patch() -> None:
        layers[20].output[:, -1] = layers[8].output[:, -1]
        last_logits()

    def lens_last() -> None:
        for layer in layers:
            model.lm_head(model.model.norm(layer.output[:, -1:])).argmax(-1).save()

    def lens_all() -> None:
        for layer in layers:
            model.lm_head(model.model.norm(layer.output)).topk(5).values.save()

    def sae() -> None:
        acts = torch.relu(layers[8].output @ dense)
        layers[8].output = layers[8].output + 0.1 * (acts @ dense.T)
        last_logits()

    return {
        "last logits": (last_logits, ()),
        "read layer 5": (read_early, (5,)),
        "save 30 layers": (save_all, range(30)),
        "ablate one MLP": (ablate, (12,)),
        "steer layers 15-29": (steer_all, (2, *range(15, 30))),
        "patch layer 8 into 20": (patch, (8, 20)),
        "logit lens, last position": (lens_last, range(30)),
        "logit lens, all positions": (lens_all, range(30)),
        "SAE at layer 8": (sae, (8,)),
    }


def main() -> None:
    """Print the figures."""
    model = glasshive.local("SmolLM2-135M-Instruct", cuts=(10, 20))
    rows = []
    for name, (body, touched) in experiments(model).items():
        estimate: dict[str, Any] = {}
        try:
            with model.trace(PROMPT) as tracer:
                body()
                estimate = dict(tracer.estimate())
                raise _Abandoned
        except _Abandoned:
            pass
        ours = estimate["hop_bytes"] + estimate["saved_bytes"] + estimate["sent_bytes"]
        depth = 10 * estimate["hops"]
        ends = {end for end in (10, 20, 30) if end <= depth} | {block + 1 for block in touched}
        petals = 2 * len(ends) * HIDDEN_BYTES
        rows.append(
            {
                "experiment": name,
                "hops": estimate["hops"],
                "hop_bytes": estimate["hop_bytes"],
                "sent_bytes": estimate["sent_bytes"],
                "saved_bytes": estimate["saved_bytes"],
                "ours_bytes": ours,
                "petals_bytes": petals,
                "share": ours / petals,
            }
        )
    columns = list(rows[0])
    report("split_bytes", columns, [[row[c] for c in columns] for row in rows], {"rows": rows})


class _Abandoned(Exception):
    """Leaves a trace without running it."""


if __name__ == "__main__":
    main()
