"""A generation over 1, 2 and 3 peers against `generate` with hooks, and nnsight local.

Real host processes on loopback, SmolLM2-135M in fp32: 32 greedy tokens behind a prompt of 8, with
0, 1 and 30 edits at each step (the last token of a block's MLP output set to zero), saving the last
token's logits at each step. Every swarm arm is interleaved with the plain arm; nnsight runs in a
process of its own, interleaved with a plain arm there, since importing it patches `object`. The
time over the spans' own compute is that of the whole less what the peers say that they computed; of
8 and of 32 tokens it tells what a step takes, and what comes before the first one. Bar: <= 3 ms a
step for 3 peers.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from harness import interleaved, report
from trace_overhead import CUTS, hooked, plain_model, tokens
from transformers import AutoTokenizer

import glasshive
from glasshive.models import find_model
from glasshive.testing import LocalSwarm

EDITS = (0, 1, 30)
NEW = 32
FEW = 8
# Peers, and threads of each. Hosts that share two cores wake each other's threads.
ARMS: list[tuple[int, int | None]] = [*((peers, None) for peers in CUTS), (3, 1)]
PROMPT = tokens(1, 8)
REPEATS = 5


@contextmanager
def computing_with(threads: int | None) -> Iterator[None]:
    """In this process, too; None: as many as usual."""
    usual = torch.get_num_threads()
    torch.set_num_threads(threads or usual)
    try:
        yield
    finally:
        torch.set_num_threads(usual)


def plain_arm(model: Any, edits: int) -> Callable[[], Any]:
    """The experiment with torch hooks on transformers' own loop."""

    def zero(module: Any, args: Any, output: torch.Tensor) -> None:
        output[:, -1] = 0

    def run() -> Any:
        kept: list[torch.Tensor] = []

        def keep(module: Any, args: Any, output: torch.Tensor) -> None:
            kept.append(output[:, -1].clone())

        layers = list(model.model.layers)
        with (
            torch.no_grad(),
            hooked([layer.mlp for layer in layers[30 - edits :]], zero),
            hooked([model.lm_head], keep),
        ):
            ids = model.generate(
                PROMPT,
                attention_mask=torch.ones_like(PROMPT),
                max_new_tokens=NEW,
                do_sample=False,
                eos_token_id=None,
            )
        return [ids, *kept]

    return run


def swarm_arm(
    model: Any,
    edits: int,
    over_compute: list[float],
    new: int = NEW,
    compute: list[float] | None = None,
) -> Callable[[], Any]:
    """The experiment on a swarm; the seconds that it took over the peers' compute go to a list.

    Those of the compute go to another one.
    """

    def run() -> Any:
        layers = model.model.layers
        with model.generate(PROMPT, max_new_tokens=new, eos_token_id=[], progress=False) as tracer:
            saved = []
            for _ in tracer.iter[:]:
                for layer in layers[30 - edits :]:
                    layer.mlp.output[:, -1] = 0
                saved.append(model.lm_head.output[:, -1].save())
        computed = sum(hop.compute_seconds for hop in tracer.result.hops)
        over_compute.append(tracer.result.seconds - computed)
        if compute is not None:
            compute.append(computed)
        return [tracer.output_ids, *saved]

    return run


def measure_swarm(plain: Any, peers: int, threads: int | None) -> list[dict[str, Any]]:
    """Ratios over the plain arm for one number of peers, each with so many threads to compute."""
    rows = []
    folder = find_model("SmolLM2-135M-Instruct")
    with (
        LocalSwarm(folder, spans=CUTS[peers], threads=threads) as local,
        glasshive.connect(local.config) as swarm,
    ):
        model = swarm.model(folder.name)
        for edits in EDITS:
            over_compute: list[float] = []
            over_few: list[float] = []
            arms = {
                "plain": plain_arm(plain, edits),
                "swarm": swarm_arm(model, edits, over_compute),
                "few": swarm_arm(model, edits, over_few, FEW),
            }
            with computing_with(threads):  # kernels round by it
                one_machine = arms["plain"]()
            equal = all(
                torch.equal(one, two.value)
                for one, two in zip(one_machine, arms["swarm"](), strict=True)
            )
            if not equal:
                raise SystemExit(f"{peers} peers, {edits} edits: another result than one machine's")
            over_compute.clear()
            found = interleaved(arms, repeats=REPEATS)
            step_seconds = (median(over_compute) - median(over_few)) / (NEW - FEW)
            rows.append(
                {
                    "peers": peers,
                    "threads": threads or torch.get_num_threads(),
                    "edits": edits,
                    "plain_tokens_per_second": NEW / found["plain"].median,
                    "swarm_tokens_per_second": NEW / found["swarm"].median,
                    "ratio": found["swarm"].median / found["plain"].median,
                    "least_ratio": found["swarm"].least / found["plain"].least,
                    "step_over_compute_ms": 1e3 * step_seconds,
                    "before_first_step_ms": 1e3 * (median(over_few) - FEW * step_seconds),
                }
            )
    return rows


def measure_nnsight() -> dict[int, float]:
    """Ratios of nnsight over the plain arm by the number of edits, from a process of its own."""
    answer = subprocess.run(
        [sys.executable, __file__, "--nnsight"], capture_output=True, text=True, check=True
    )
    return {edits: ratio for edits, ratio in json.loads(answer.stdout.splitlines()[-1])}


def nnsight_worker() -> None:
    """Measure nnsight beside a plain arm, and print the ratios as JSON."""
    from nnsight import TransformersModel

    plain = plain_model()
    tokenizer = AutoTokenizer.from_pretrained(find_model("SmolLM2-135M-Instruct"))
    model = TransformersModel(plain_model(), task="text-generation", tokenizer=tokenizer)

    def arm(edits: int) -> Callable[[], Any]:
        def run() -> Any:
            with (
                torch.no_grad(),
                model.generate(
                    PROMPT, max_new_tokens=NEW, do_sample=False, eos_token_id=None
                ) as tracer,
            ):
                saved = list().save()
                for _ in tracer.iter[0:NEW]:
                    for layer in model.model.layers[30 - edits :]:
                        layer.mlp.output[:, -1] = 0
                    saved.append(model.lm_head.output[:, -1].clone())
            return saved

        return run

    rows = []
    for edits in EDITS:
        found = interleaved({"plain": plain_arm(plain, edits), "nnsight": arm(edits)}, repeats=3)
        rows.append((edits, found["nnsight"].median / found["plain"].median))
    print(json.dumps(rows))


def main() -> None:
    """Print the figures."""
    plain = plain_model()
    rows = [row for peers, threads in ARMS for row in measure_swarm(plain, peers, threads)]
    nnsight = measure_nnsight()
    for row in rows:
        row["nnsight_ratio"] = nnsight[row["edits"]]
    columns = list(rows[0])
    report(
        "generation",
        columns,
        [[row[name] for name in columns] for row in rows],
        {"rows": rows},
    )


if __name__ == "__main__":
    nnsight_worker() if "--nnsight" in sys.argv else main()
