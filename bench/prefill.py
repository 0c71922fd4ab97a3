"""Seconds to the first token of a prompt of 1,024 tokens over 3 peers: whole, and in chunks.

Real host processes on loopback with one thread each, each behind a `FaultProxy`: as it is, and with
links of 20 ms and of a bandwidth by which the hidden states of the prompt take 2 s from one peer to
the next. Whole, a peer computes while the two others wait, and nobody computes while hidden states
travel; in chunks all of these go on at a time, as far as there are cores for it. Chunks and links
are interleaved, and a ratio is that of a whole prompt to the chunks of the same round. The token is
compared with that of transformers' `generate` with the same chunks, in this process with one thread
and before the hosts are started; what chunks gain or lose there has nothing to do with peers.
SmolLM2-135M in fp32, and a random model of few numbers, where all that there is to gain is on the
links.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from arrivals import SMALL_BLOCKS, save_small_model, watched
from harness import report
from transformers import AutoModelForCausalLM

import glasshive
from glasshive.fault_proxy import Faults
from glasshive.models import find_model
from glasshive.testing import LocalSwarm

PEERS = 3
TOKENS = 1024
PROMPT = torch.randint(3, 2048, (1, TOKENS), generator=torch.Generator().manual_seed(0))
CHUNKS = (None, 512, 256, 128)
ONE_WAY_SECONDS = 0.02
TRANSFER_SECONDS = 2.0
REPEATS = 3


def measure(name: str, folder: Path, blocks: int) -> list[dict[str, Any]]:
    """A row for each link and size of chunks."""
    third = blocks // PEERS
    spans = [(0, third), (third, 2 * third), (2 * third, blocks)]
    found: dict[tuple[str, int | None], list[float]] = {}
    wanted, hidden_bytes = oracle(folder, found)
    links = {
        "as it is": Faults(),
        "injected": Faults(ONE_WAY_SECONDS, hidden_bytes / TRANSFER_SECONDS),
    }
    with (
        LocalSwarm(folder, spans, faults=True, threads=1) as hive,
        glasshive.connect(hive.config) as swarm,
    ):
        model = swarm.model(hive.model_name)
        for turn in range(REPEATS + 1):
            for link, faults in links.items():
                for host in hive.hosts:
                    host.proxy.upstream.faults = host.proxy.downstream.faults = faults
                for size in CHUNKS:
                    seconds, token = first_token(swarm, model, size)
                    if token != wanted[size]:
                        raise SystemExit(f"token {token} with chunks of {size}: not {wanted[size]}")
                    if turn:  # in the first round connections are made, and parts checked
                        found.setdefault((link, size), []).append(seconds)
    rows = []
    for (link, size), seconds in found.items():
        ratios = [one / other for one, other in zip(found[link, None], seconds, strict=True)]
        rows.append(
            {
                "model": name,
                "link": link,
                "chunks of": size or "whole",
                "seconds": median(seconds),
                "whole / this": median(ratios),
                "least": min(ratios),
                "most": max(ratios),
            }
        )
    return rows


def oracle(
    folder: Path, found: dict[tuple[str, int | None], list[float]]
) -> tuple[dict[int | None, int], int]:
    """transformers' own first token by the size of chunks, and the bytes of hidden states.

    The seconds that it took go to `found`.
    """
    plain: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    torch.set_num_threads(1)
    tokens = {}
    for turn in range(REPEATS + 1):
        for size in CHUNKS:
            began = time.monotonic()
            ids = plain.generate(
                PROMPT,
                attention_mask=torch.ones_like(PROMPT),
                max_new_tokens=1,
                do_sample=False,
                prefill_chunk_size=size,
            )
            tokens[size] = int(ids[0, -1])
            if turn:
                found.setdefault(("one process", size), []).append(time.monotonic() - began)
    return tokens, 4 * TOKENS * plain.config.hidden_size


def first_token(swarm: Any, model: Any, size: int | None) -> tuple[float, int]:
    """The seconds from the end of the block to the token, as it came to the client."""
    options = {"max_new_tokens": 1, "eos_token_id": [], "progress": False}
    with (
        watched(swarm) as jobs,
        model.generate(PROMPT, prefill_chunk_size=size, **options) as tracer,
    ):
        began = time.monotonic()
    return jobs[0].tokens[0] - began, int(tracer.output_ids[0, -1])


def main() -> None:
    """Print the figures; with a word behind it, those of the random model only."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "few-numbers"
        save_small_model(str(folder))
        rows = measure("few numbers", folder, SMALL_BLOCKS)
    if len(sys.argv) == 1:
        rows += measure("SmolLM2-135M", find_model("SmolLM2-135M-Instruct"), 30)
    columns = list(rows[0])
    report("prefill", columns, [[row[name] for name in columns] for row in rows], {"rows": rows})


if __name__ == "__main__":
    main()
