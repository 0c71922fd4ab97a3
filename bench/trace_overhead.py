"""A trace over 1, 2 and 3 peers against the same on plain Hugging Face hooks and on nnsight local.

Real host processes on loopback, SmolLM2-135M in fp32. Forwards of 1x10 and 8x64 tokens, with 0, 1
and 30 edits (the last token of a block's MLP output set to zero), saving the last token's logits;
and one that saves 30 whole layers, beside its bytes. Every swarm arm is interleaved with the plain
arm; nnsight runs in a process of its own, interleaved with a plain arm there, since importing it
patches `object`. Bar: <= 1.15x for 8x64 with edits and last-token logits, on 2 and 3 peers.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from harness import interleaved, report
from transformers import AutoModelForCausalLM

import glasshive
from glasshive.models import find_model
from glasshive.testing import LocalSwarm

SIZES = ((1, 10), (8, 64))
EDITS = (0, 1, 30)
CUTS = {1: [(0, 30)], 2: [(0, 15), (15, 30)], 3: [(0, 10), (10, 20), (20, 30)]}
REPEATS = 5


def tokens(batch: int, seq: int) -> torch.Tensor:
    """Token ids that depend on the size alone."""
    return torch.randint(100, 10_000, (batch, seq), generator=torch.Generator().manual_seed(seq))


def plain_model() -> Any:
    """Plain Hugging Face."""
    folder = find_model("SmolLM2-135M-Instruct")
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval().requires_grad_(False)


@contextmanager
def hooked(modules: list[Any], hook: Callable[..., Any]) -> Iterator[None]:
    """Forward hooks for one forward."""
    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def plain_arm(model: Any, ids: torch.Tensor, edits: int, whole_layers: bool) -> Callable[[], Any]:
    """The experiment with torch hooks."""

    def zero(module: Any, args: Any, output: torch.Tensor) -> None:
        output[:, -1] = 0

    def run() -> Any:
        kept: list[torch.Tensor] = []

        def keep(module: Any, args: Any, output: torch.Tensor) -> None:
            kept.append(output.clone())

        layers = list(model.model.layers)
        with torch.no_grad(), hooked([layer.mlp for layer in layers[30 - edits :]], zero):
            if whole_layers:
                with hooked(layers, keep):
                    model(ids, use_cache=False)
                return kept
            return model(ids, use_cache=False).logits[:, -1].clone()

    return run


def swarm_arm(model: Any, ids: torch.Tensor, edits: int, whole_layers: bool) -> Callable[[], Any]:
    """The experiment on a swarm."""

    def run() -> Any:
        layers = model.model.layers
        with model.trace(ids, progress=False):
            for layer in layers[30 - edits :]:
                layer.mlp.output[:, -1] = 0
            if whole_layers:
                saved = [layer.output.save() for layer in layers]
            else:
                saved = model.lm_head.output[:, -1].save()
        return saved

    return run


def measure_swarm(plain: Any, peers: int) -> list[dict[str, Any]]:
    """Ratios over the plain arm for one number of peers."""
    rows = []
    folder = find_model("SmolLM2-135M-Instruct")
    with (
        LocalSwarm(folder, spans=CUTS[peers]) as local,
        glasshive.connect(local.config) as swarm,
    ):
        model = swarm.model(folder.name)
        for batch, seq in SIZES:
            ids = tokens(batch, seq)
            for edits, whole in [*((edits, False) for edits in EDITS), (0, True)]:
                arms = {
                    "plain": plain_arm(plain, ids, edits, whole),
                    "swarm": swarm_arm(model, ids, edits, whole),
                }
                equal = _equal(arms["plain"](), arms["swarm"]())
                found = interleaved(arms, repeats=REPEATS)
                rows.append(
                    {
                        "peers": peers,
                        "size": f"{batch}x{seq}",
                        "edits": edits,
                        "saved": "30 layers" if whole else "last logits",
                        "saved_bytes": 30 * ids.numel() * 576 * 4 if whole else batch * 49152 * 4,
                        "plain_ms": 1e3 * found["plain"].median,
                        "swarm_ms": 1e3 * found["swarm"].median,
                        "ratio": found["swarm"].median / found["plain"].median,
                        "least_ratio": found["swarm"].least / found["plain"].least,
                        "bit_equal": equal,
                    }
                )
    return rows


def _equal(one: Any, two: Any) -> bool:
    if isinstance(one, list):
        return all(_equal(a, b) for a, b in zip(one, two, strict=True))
    return torch.equal(one, two.value)


def measure_nnsight() -> list[dict[str, Any]]:
    """Ratios of nnsight over the plain arm, from a process of its own."""
    answer = subprocess.run(
        [sys.executable, __file__, "--nnsight"], capture_output=True, text=True, check=True
    )
    rows: list[dict[str, Any]] = json.loads(answer.stdout.splitlines()[-1])
    return rows


def nnsight_worker() -> None:
    """Measure nnsight beside a plain arm, and print the ratios as JSON."""
    from nnsight import TransformersModel
    from transformers import AutoTokenizer

    plain = plain_model()
    tokenizer = AutoTokenizer.from_pretrained(find_model("SmolLM2-135M-Instruct"))
    model = TransformersModel(plain_model(), task="text-generation", tokenizer=tokenizer)

    def arm(ids: torch.Tensor, edits: int, whole: bool) -> Callable[[], Any]:
        def run() -> Any:
            with torch.no_grad(), model.trace(ids, use_cache=False):
                if whole:
                    saved = list().save()
                    for layer in model.model.layers:
                        saved.append(layer.output.clone())
                else:
                    for layer in model.model.layers[30 - edits :]:
                        layer.mlp.output[:, -1] = 0
                    saved = model.lm_head.output[:, -1].save()
            return saved

        return run

    rows = []
    for batch, seq in SIZES:
        ids = tokens(batch, seq)
        for edits, whole in [*((edits, False) for edits in EDITS), (0, True)]:
            found = interleaved(
                {"plain": plain_arm(plain, ids, edits, whole), "nnsight": arm(ids, edits, whole)},
                repeats=REPEATS,
            )
            rows.append(
                {
                    "size": f"{batch}x{seq}",
                    "edits": edits,
                    "saved": "30 layers" if whole else "last logits",
                    "ratio": found["nnsight"].median / found["plain"].median,
                    "nnsight_ms": 1e3 * found["nnsight"].median,
                }
            )
    print(json.dumps(rows))


def main() -> None:
    """Print the figures."""
    plain = plain_model()
    rows = [row for peers in CUTS for row in measure_swarm(plain, peers)]
    nnsight = {(row["size"], row["edits"], row["saved"]): row["ratio"] for row in measure_nnsight()}
    for row in rows:
        row["nnsight_ratio"] = nnsight[row["size"], row["edits"], row["saved"]]
    columns = list(rows[0])
    report(
        "trace_overhead",
        columns,
        [[row[name] for name in columns] for row in rows],
        {"rows": rows},
    )


if __name__ == "__main__":
    nnsight_worker() if "--nnsight" in sys.argv else main()
