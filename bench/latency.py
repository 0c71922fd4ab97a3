"""A generation over 3 peers through injected latency, against what compute and latency take.

Real host processes on loopback with one thread each, each behind a `FaultProxy`, which makes every
byte to and from it 5, 20 or 80 ms late. Two hosts share one connection, through the proxy of one of
them, so each hop is late once. A step takes what the three peers compute, and three hops: hidden
states from the first to the second and from there to the third, the token from the third to the
first. Bar: within 10 % of that. Legs to and from the client are late as well, but no step waits for
them: a step's time is that between the first token and the last, as they came to the client,
divided by their number. What the prompt's step computes is that of generations of one token.

The rows of 0 ms go through the same proxies: what hops cost besides. `injected_ms` is what a byte
really takes through such a proxy, by an echo beside: timers are late as well. `ratio_of_hops` is to
what the three peers compute, and three hops of which each takes what it does in the rows of 0 ms,
and so much longer as a byte does: whether any hop waits for more than one way. SmolLM2-135M in
fp32, and a random model of few numbers, where nothing hides what hops cost; with 0, 1 and 30 edits
a step, or those of `--edits`. An edit halves what a block's MLP gives for the last token; where
there are fewer blocks than edits, several are at one.
"""

from __future__ import annotations

import argparse
import contextlib
import socket
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from arrivals import SMALL_BLOCKS, save_small_model, watched
from harness import report
from trace_overhead import tokens

import glasshive
from glasshive.fault_proxy import FaultProxy, Faults
from glasshive.models import find_model
from glasshive.testing import LocalSwarm

ONE_WAY_MS = (0, 5, 20, 80)
HOPS = 3
NEW = 25
PROMPT = tokens(1, 8) % 2048
REPEATS = 3  # of each of three numbers of edits
EDITS = (0, 1, 30)
ECHOES = 20


class Run(NamedTuple):
    """ms of one generation: what a step took, and what all peers computed in all steps."""

    step: float
    computed: float


class Arm(NamedTuple):
    """What is measured: one latency, and one number of edits a step."""

    one_way_ms: int
    edits: int


def measure(
    name: str, folder: Path, blocks: int, edits: Sequence[int], repeats: int
) -> list[dict[str, Any]]:
    """A row for each latency and number of edits, the runs of all interleaved."""
    third = blocks // HOPS
    spans = [(0, third), (third, 2 * third), (2 * third, blocks)]
    arms = [Arm(one_way_ms, count) for count in edits for one_way_ms in ONE_WAY_MS]
    found: dict[Arm, list[Run]] = {one: [] for one in arms}
    of_prompt: dict[Arm, list[float]] = {one: [] for one in arms}
    injected: dict[int, list[float]] = {one: [] for one in ONE_WAY_MS}
    with (
        LocalSwarm(folder, spans, faults=True, threads=1) as hive,
        glasshive.connect(hive.config) as swarm,
    ):
        model = swarm.model(hive.model_name)
        for count in edits:  # from now on connections are there, and parts were checked
            for new in (NEW, 1):
                generate(swarm, model, blocks, new, count)
        for _ in range(repeats):
            for one in arms:
                faults = Faults(latency_seconds=one.one_way_ms / 1e3)
                for host in hive.hosts:
                    host.proxy.upstream.faults = host.proxy.downstream.faults = faults
                found[one].append(generate(swarm, model, blocks, NEW, one.edits))
                of_prompt[one].append(generate(swarm, model, blocks, 1, one.edits).computed)
                injected[one.one_way_ms].append(echoed_ms(faults))
    rows = []
    for one in arms:
        row = _row(name, one, found[one], median(of_prompt[one]), median(injected[one.one_way_ms]))
        rows.append(row)
        quiet = next(each for each in rows if each["edits"] == one.edits)  # without latency
        later_ms = row["injected_ms"] - quiet["injected_ms"]
        hops_ms = quiet["over_ms"] + HOPS * later_ms
        row["ratio_of_hops"] = row["step_ms"] / (row["compute_ms"] + hops_ms)
    return rows


def _row(
    name: str, arm: Arm, found: list[Run], prompt_ms: float, injected_ms: float
) -> dict[str, Any]:
    computed = [(one.computed - prompt_ms) / (NEW - 1) for one in found]
    formula = [each + HOPS * arm.one_way_ms for each in computed]
    ratios = [one.step / each for one, each in zip(found, formula, strict=True)]
    return {
        "model": name,
        "edits": arm.edits,
        "one_way_ms": arm.one_way_ms,
        "injected_ms": injected_ms,
        "step_ms": median(one.step for one in found),
        "compute_ms": median(computed),
        "formula_ms": median(formula),
        "ratio": median(ratios),
        "least": min(ratios),
        "most": max(ratios),
        "over_ms": median(one.step - each for one, each in zip(found, formula, strict=True)),
    }


def generate(swarm: Any, model: Any, blocks: int, new: int, edits: int) -> Run:
    """One generation."""
    edited = sorted((blocks // 2 + at) % blocks for at in range(edits))
    options = {"max_new_tokens": new, "eos_token_id": [], "progress": False}
    with watched(swarm) as jobs, model.generate(PROMPT, **options) as tracer:
        for _ in tracer.iter[:]:
            for index in edited:
                model.model.layers[index].mlp.output[:, -1] *= 0.5
    (arrivals,) = jobs
    if len(arrivals.tokens) != new:
        raise SystemExit(f"{len(arrivals.tokens)} tokens came; {new} are wanted")
    step_seconds = (arrivals.tokens[-1] - arrivals.tokens[0]) / max(new - 1, 1)
    computed_seconds = sum(hop.compute_seconds for hop in tracer.result.hops)
    return Run(1e3 * step_seconds, 1e3 * computed_seconds)


def echoed_ms(faults: Faults) -> float:
    """ms that a byte takes through one direction of a proxy: half of there and back."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            near, _ = server.accept()
            with near, contextlib.suppress(ConnectionError):  # the proxy ends with a reset
                while data := near.recv(1):
                    near.sendall(data)

        threading.Thread(target=answer, daemon=True).start()
        with (
            FaultProxy(server.getsockname()) as proxy,
            socket.create_connection(("127.0.0.1", proxy.port)) as far,
        ):
            proxy.upstream.faults = proxy.downstream.faults = faults
            took = []
            for _ in range(ECHOES):
                began = time.perf_counter()
                far.sendall(b"x")
                far.recv(1)
                took.append(time.perf_counter() - began)
    return 1e3 * median(took) / 2


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--edits", type=int, nargs="+", default=EDITS, help="at each step")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    asked = parser.parse_args()
    rows = measure(
        "SmolLM2-135M", find_model("SmolLM2-135M-Instruct"), 30, asked.edits, asked.repeats
    )
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "few-numbers"
        save_small_model(str(folder))
        rows += measure("few numbers", folder, SMALL_BLOCKS, asked.edits, asked.repeats)
    columns = list(rows[0])
    report("latency", columns, [[row[name] for name in columns] for row in rows], {"rows": rows})


if __name__ == "__main__":
    main()
