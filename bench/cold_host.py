"""From `glasshive serve` to the first trace that it has served, beside plain transformers.

A host imports, loads and hashes the model, tests itself, measures its pace, joins and announces; a
client finds it and traces. Beside it a new Python process that loads the model with transformers
and runs one forward pass. Weights are in the disk's cache for both.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from harness import interleaved, report

import glasshive
from glasshive.models import find_model
from glasshive.testing import LocalSwarm

PROMPT = "The Eiffel Tower is in the city of"
REPEATS = 5
PLAIN = """
import sys, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
with torch.no_grad():
    model(**tokenizer(sys.argv[2], return_tensors="pt"))
"""


def plain(path: Path) -> None:
    """Load and run the model in a process of its own."""
    subprocess.run([sys.executable, "-c", PLAIN, str(path), PROMPT], check=True)


def main() -> None:
    """Measure, and print the table."""
    path = find_model("SmolLM2-135M-Instruct")
    with LocalSwarm(path, [(0, 30)]) as hive:
        (host,) = hive.hosts

        def first_trace() -> None:
            host.restart()
            with glasshive.connect(hive.config) as swarm:
                model = swarm.model(hive.model_name)
                with model.trace(PROMPT, progress=False):
                    model.lm_head.output[:, -1].save()

        host.stop()
        timings = interleaved(
            {"cold host": first_trace, "stop": host.stop, "plain": lambda: plain(path)},
            repeats=REPEATS,
        )
    cold, bare = timings["cold host"], timings["plain"]
    ratio = cold.median / bare.median
    report(
        "cold_host",
        ["what", "median s", "least s", "over plain"],
        [
            ["serve to first trace", cold.median, cold.least, ratio],
            ["plain process to first forward", bare.median, bare.least, 1.0],
        ],
        {"cold_seconds": cold.median, "plain_seconds": bare.median, "ratio": ratio},
    )


if __name__ == "__main__":
    main()
