"""A trace over peers on a GPU, against plain Hugging Face hooks on the same GPU.

Real host processes on loopback, each on the one GPU, and a random Llama of 1.2 billion weights in
bfloat16. Forwards of 1x10 and 8x256 tokens, with 0, 1 and 16 edits; the last token's logits are
saved, or all 16 layers. Then an index out of range, which must be an error at its node and leave
the peers alive, and what a host measures of the GPU's pace. Says so and ends where there is no GPU.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import interleaved, report
from transformers import LlamaConfig, LlamaForCausalLM

import glasshive
from glasshive.client.errors import PeerFailed
from glasshive.peer.pace import measure_graph_pace
from glasshive.testing import LocalSwarm

BLOCKS = 16
SIZES = ((1, 10), (8, 256))
CUTS = {1: [(0, BLOCKS)], 2: [(0, 8), (8, BLOCKS)]}
REPEATS = 10


def make_model(folder: Path) -> Any:
    """A random model, saved to `folder`, on the GPU."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32_768,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=BLOCKS,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=2048,
        dtype=torch.bfloat16,
    )
    with torch.device("cuda"):
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    # Read back: a model that was cast has cast its rotary frequencies too, a loaded one has not.
    model: Any = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    return model.to("cuda").eval().requires_grad_(False)


def plain_arm(model: Any, ids: torch.Tensor, edits: int, whole: bool) -> Callable[[], Any]:
    """The experiment with torch hooks; what was saved ends on the CPU, where the user has it."""

    def zero(module: Any, args: Any, output: torch.Tensor) -> None:
        output[:, -1] = 0

    def run() -> Any:
        kept: list[torch.Tensor] = []
        layers = list(model.model.layers)
        handles = [one.mlp.register_forward_hook(zero) for one in layers[BLOCKS - edits :]]
        if whole:
            keep: Any = lambda module, args, output: kept.append(output.clone())  # noqa: E731
            handles += [one.register_forward_hook(keep) for one in layers]
        try:
            with torch.no_grad():
                logits = model(ids.to("cuda"), use_cache=False).logits
        finally:
            for handle in handles:
                handle.remove()
        return [one.cpu() for one in kept] if whole else logits[:, -1].cpu()

    return run


def swarm_arm(model: Any, ids: torch.Tensor, edits: int, whole: bool) -> Callable[[], Any]:
    """The experiment on a swarm."""

    def run() -> Any:
        layers = model.model.layers
        with model.trace(ids, progress=False):
            for layer in layers[BLOCKS - edits :]:
                layer.mlp.output[:, -1] = 0
            if whole:
                saved = [layer.output.save() for layer in layers]
            else:
                saved = model.lm_head.output[:, -1].save()
        return [one.value for one in saved] if whole else saved.value

    return run


def measure(plain: Any, folder: Path, peers: int) -> list[list[Any]]:
    """A row for each size and experiment."""
    rows = []
    with (
        LocalSwarm(folder, spans=CUTS[peers], dtype="bfloat16", device="cuda") as local,
        glasshive.connect(local.config) as swarm,
    ):
        model = swarm.model(folder.name)
        for batch, seq in SIZES:
            ids = torch.randint(0, 32_000, (batch, seq))
            for edits, whole in ((0, False), (1, False), (BLOCKS, False), (0, True)):
                arms = {
                    "plain": plain_arm(plain, ids, edits, whole),
                    "swarm": swarm_arm(model, ids, edits, whole),
                }
                one, two = arms["plain"](), arms["swarm"]()
                equal = all(map(torch.equal, one, two))
                found = interleaved(arms, repeats=REPEATS)
                rows.append(
                    [
                        *(peers, f"{batch}x{seq}", edits, "16 layers" if whole else "last logits"),
                        *(1e3 * found["plain"].median, 1e3 * found["swarm"].median),
                        *(found["swarm"].median / found["plain"].median, equal),
                    ]
                )
        try:
            with model.trace(torch.zeros((1, 4), dtype=torch.int64), progress=False):
                hidden = model.model.layers[0].output
                far = hidden[:, :, 0].argmax() + 99
                hidden.flatten(0, 1).index_select(0, far[None]).save()
            print("an index out of range was not refused")
        except PeerFailed as error:
            print(f"an index out of range: {str(error).splitlines()[0]}")
        again = swarm_arm(model, ids, 1, False)()
        print("and then a trace:", torch.equal(again, plain_arm(plain, ids, 1, False)()))
        print("restarts:", sum("restart" in host.log for host in local.hosts))
    return rows


def main() -> None:
    """Print the figures."""
    if not torch.cuda.is_available():
        print("bench/gpu.py: no CUDA GPU here, nothing measured")
        return
    began = time.perf_counter()
    pace = measure_graph_pace(torch.device("cuda"))
    print(f"pace, measured in {time.perf_counter() - began:.2f} s:", pace)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "random-1b"
        plain = make_model(folder)
        rows = [row for peers in CUTS for row in measure(plain, folder, peers)]
    columns = ["peers", "size", "edits", "saved", "plain_ms", "swarm_ms", "ratio", "bit_equal"]
    figures = {"rows": rows, "gpu": torch.cuda.get_device_name()}
    report("gpu", columns, rows, figures)


if __name__ == "__main__":
    main()
