"""An honest client beside a flood of 100 times its rate: its p50 and p95 against its own quiet.

Real processes and network daemons on loopback: two hosts of the whole SmolLM2-135M with one thread
each, an honest client that asks the first for a trace at a steady rate, and in a process of its own
a client that asks for as many whole traces as that, times 100. Three arms in turn: quiet; the flood
at the honest client's host; and as control the same flood at the other host, which costs the
machine about as much and shows what of the slowing is the machine's. Hosts, honest client and
flooder would have machines of their own: on Linux the clients have the last core, where the flooder
yields to the honest one, and the hosts the others. Bars: p95 <= 2 x quiet, and no failure of the
honest client.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from harness import report

import glasshive
from glasshive.client.job import Job
from glasshive.dht.transport import PeerAddress
from glasshive.graph.errors import GlasshiveError
from glasshive.models import find_model
from glasshive.testing import LocalSwarm

MODEL = "SmolLM2-135M-Instruct"
PROMPT = "The Eiffel Tower is in the city of"
HONEST_PER_SECOND = 1.0
TIMES = 100
TRACES = 20  # an arm and round
ROUNDS = 3
WARM_UP = 3
MAX_OPEN = 256  # of the flood's traces at a time
CORES = sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else []
ARMS = ("quiet", "flood", "flood elsewhere")


@dataclass
class Arm:
    """What the honest client and the flood met in one arm, over all rounds."""

    seconds: list[float]
    failures: int
    flood: Counter[str]

    def quantile(self, share: float) -> float:
        """The seconds below which so many of its traces were done."""
        return statistics.quantiles(self.seconds, n=100, method="inclusive")[round(share * 100) - 1]


@contextmanager
def on_cores(part: slice) -> Iterator[None]:
    """Inside it, what is started runs on that part of the cores, where the system lets one say."""
    cores = CORES[part]
    if not cores:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def trace(model: Any, **options: Any) -> None:
    """The trace that both ask for: a read of one block."""
    with model.trace(PROMPT, progress=False, **options):
        model.model.layers[15].output[:, -1].save()


class Flooder:
    """The process that floods: `at` names the host, from one call to the next; None for a rest."""

    def __init__(self, config: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--flooder", config],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=partial(os.nice, 19) if CORES else None,
        )
        self._answer()

    def at(self, host: PeerAddress | None) -> Counter[str]:
        """What became of the traces since the last call."""
        assert self._process.stdin is not None
        told = None if host is None else [host.peer_id, host.addresses]
        self._process.stdin.write(json.dumps(told) + "\n")
        self._process.stdin.flush()
        return Counter(self._answer())

    def end(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)

    def _answer(self) -> dict[str, int]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            sys.exit("the flooder has ended")
        answer: dict[str, int] = json.loads(line)
        return answer


def flooder(config: str) -> None:
    """Be that process: the same job again and again, under new ids, as fast as was said."""
    jobs: list[Job] = []
    stock = Job.run

    async def remembered(job: Job) -> Any:
        jobs.append(job)
        return await stock(job)

    with glasshive.connect(config) as swarm:
        Job.run = remembered  # type: ignore[method-assign]
        trace(swarm.model(MODEL))
        Job.run = stock  # type: ignore[method-assign]
        swarm._loop.run(flood(jobs[0]), 3600)


async def flood(job: Job) -> None:
    """Flood the hosts that standard input names, a line each, until it ends."""
    loop = asyncio.get_running_loop()
    answers: Counter[str] = Counter()
    open_jobs: set[asyncio.Task[None]] = set()
    target: list[PeerAddress] = []

    async def one(host: PeerAddress) -> None:
        again = replace(job, peers=[host], trace_id=secrets.token_bytes(16), saves={})
        try:
            await again.run()
            answers["done"] += 1
        except GlasshiveError as error:
            answers[type(error).__name__] += 1

    async def keep_on() -> None:
        due = loop.time()
        while True:
            due = max(due + 1 / (TIMES * HONEST_PER_SECOND), loop.time() - 1.0)
            await asyncio.sleep(max(due - loop.time(), 0))
            if not target:
                continue
            if len(open_jobs) >= MAX_OPEN:
                answers["held back"] += 1
                continue
            task = asyncio.create_task(one(target[0]))
            open_jobs.add(task)
            task.add_done_callback(open_jobs.discard)

    keeping = asyncio.create_task(keep_on())
    print("{}", flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        told = json.loads(line)
        target[:] = [] if told is None else [PeerAddress(told[0], tuple(told[1]))]
        if told is None and open_jobs:
            await asyncio.wait(open_jobs, timeout=60)
        print(json.dumps(answers), flush=True)
        answers.clear()
    keeping.cancel()


@contextmanager
def flooding(process: Flooder, host: PeerAddress | None, arm: Arm) -> Iterator[None]:
    """Inside it, the host is flooded, if there is one."""
    process.at(host)
    try:
        yield
    finally:
        arm.flood.update(process.at(None))


def at_a_steady_rate(model: Any, arm: Arm, traces: int, avoid: list[str]) -> None:
    """The honest client's traces: each begins when it is due, or when the one before is done."""
    due = time.monotonic()
    for _ in range(traces):
        time.sleep(max(due - time.monotonic(), 0.0))
        due = max(due, time.monotonic() - 1 / HONEST_PER_SECOND) + 1 / HONEST_PER_SECOND
        began = time.perf_counter()
        try:
            trace(model, avoid=avoid, retries=0)
        except GlasshiveError as error:
            print(f"failed: {error}", file=sys.stderr)
            arm.failures += 1
        else:
            arm.seconds.append(time.perf_counter() - began)


def cost_of_a_flood(rounds: int = ROUNDS, traces: int = TRACES) -> dict[str, Arm]:
    """What each arm met."""
    folder = find_model(MODEL)
    n_blocks = 30
    arms = {name: Arm([], 0, Counter()) for name in ARMS}
    with ExitStack() as ends:
        with on_cores(slice(None, -1)):
            hive = LocalSwarm(folder, spans=[(0, n_blocks)], replicas=2, threads=1)
            local = ends.enter_context(hive)
        ends.enter_context(on_cores(slice(-1, None)))
        swarm = ends.enter_context(glasshive.connect(local.config))
        model = swarm.model(folder.name)
        own, other = (PeerAddress.parse(one.address) for one in local.hosts)
        config = local.config.with_name("flooder.toml")
        config.write_text(local.config.read_text().replace("client.key", "flooder.key"))
        process = Flooder(str(config))
        targets = {"quiet": None, "flood": own, "flood elsewhere": other}
        at_a_steady_rate(model, Arm([], 0, Counter()), WARM_UP, [other.peer_id])
        for _ in range(rounds):
            for name, arm in arms.items():
                with flooding(process, targets[name], arm):
                    at_a_steady_rate(model, arm, traces, [other.peer_id])
        process.end()
    return arms


def main() -> None:
    """Print the figures."""
    arms = cost_of_a_flood()
    quiet = arms["quiet"]
    asked = arms["flood"].flood.total() - arms["flood"].flood["held back"]
    rows: list[list[Any]] = [
        [
            name,
            1e3 * arm.quantile(0.5),
            1e3 * arm.quantile(0.95),
            arm.quantile(0.5) / quiet.quantile(0.5),
            arm.quantile(0.95) / quiet.quantile(0.95),
            f"{arm.failures} of {len(arm.seconds) + arm.failures}",
            ", ".join(f"{count} {what}" for what, count in sorted(arm.flood.items())),
        ]
        for name, arm in arms.items()
    ]
    report(
        "flood",
        ["arm", "p50 ms", "p95 ms", "p50 ratio", "p95 ratio", "failed", "the flood's traces"],
        rows,
        {
            "p95_ratio": arms["flood"].quantile(0.95) / quiet.quantile(0.95),
            "flood_a_second": asked / (len(quiet.seconds) / HONEST_PER_SECOND),
            "p95_ratio_elsewhere": arms["flood elsewhere"].quantile(0.95) / quiet.quantile(0.95),
            "failures": arms["flood"].failures,
        },
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--flooder"]:
        flooder(sys.argv[2])
    else:
        main()
