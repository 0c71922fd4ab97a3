"""What three hops cost besides the computing, with and without what a peer does.

Three processes with a network daemon each pass a frame around, as large as the hidden state of one
token of SmolLM2-135M, over the streams that peers use. In place of a stage each multiplies
matrices for as long as ten of that model's blocks take, on a thread of its own as hosts do, or on
the loop; or it computes nothing. In turn with them, three hosts generate tokens with that model.
`besides_ms` is how much longer a round, or a step, takes than what all three computed. A step can't
take less than a round with threads, whatever is left out of it; what it takes more is what peers
do. Bar: at most 0.5 ms a hop (docs/adr/0018).
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.connection import Connection
from statistics import median
from typing import Any

from harness import report

PLACES = 3
ROUNDS, WARM_UP = 150, 20
HIDDEN = 576
MATRICES = 24  # of 10 MB
ARMS = ("nothing", "on the loop", "on a thread")
REPEATS, GENERATIONS = 5, 3
PROTOCOL = "glasshive-bench/ring/1"
DEADLINE_SECONDS = 30.0


def place(pipe: Connection, arm: str, leads: bool) -> None:
    """The process of one place. Sends its address, is sent the next one's, sends its times."""
    from glasshive.dht.loop_thread import new_loop

    asyncio.set_event_loop(loop := new_loop())
    loop.run_until_complete(_place(pipe, arm, leads))
    loop.close()


async def _place(pipe: Connection, arm: str, leads: bool) -> None:
    from glasshive.dht.framing import Stream
    from glasshive.dht.hivemind_transport import HivemindTransport
    from glasshive.dht.transport import PeerAddress
    from glasshive.security.keys import Identity

    compute = _computing(arm)
    came: asyncio.Queue[Stream] = asyncio.Queue()

    async def accept(stream: Stream) -> None:
        await came.put(stream)
        await asyncio.Event().wait()

    transport = await HivemindTransport.create(Identity.generate(), dht="none")
    await transport.serve(PROTOCOL, accept)
    pipe.send(PeerAddress(transport.peer_id, tuple(transport.addresses)))
    following = await asyncio.to_thread(pipe.recv)
    out = await transport.open_stream(following, PROTOCOL, DEADLINE_SECONDS)
    await out.send("opened")
    previous = await came.get()
    await previous.receive(DEADLINE_SECONDS)
    state, rounds, computed = bytes(4 * HIDDEN), [], []
    for number in range(ROUNDS):
        began = time.perf_counter()
        if not leads:
            await previous.receive(DEADLINE_SECONDS)
        computed.append(await compute())
        await out.send(number, state)
        if leads:
            await previous.receive(DEADLINE_SECONDS)
        rounds.append(time.perf_counter() - began)
    pipe.send((rounds, computed))
    await asyncio.to_thread(pipe.recv)  # until all have ended their rounds
    await transport.close()


def _computing(arm: str) -> Callable[[], Awaitable[float]]:
    """Computes as the arm says, and gives the seconds that it took."""
    import torch

    torch.set_num_threads(1)
    weights = [torch.randn(HIDDEN, 8 * HIDDEN) for _ in range(MATRICES)]
    state = torch.randn(1, HIDDEN)
    pool = ThreadPoolExecutor(max_workers=1)

    def compute() -> float:
        began = time.perf_counter()
        for one in weights:
            state @ one
        return time.perf_counter() - began

    async def run() -> float:
        if arm == "nothing":
            return 0.0
        if arm == "on the loop":
            return compute()
        return await asyncio.get_running_loop().run_in_executor(pool, compute)

    return run


def measured(arm: str) -> tuple[float, float]:
    """ms of a round besides what all three compute, and what they compute; medians."""
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(PLACES)]
    processes = [
        context.Process(target=place, args=(far, arm, number == 0))
        for number, (_, far) in enumerate(pipes)
    ]
    for process in processes:
        process.start()
    try:
        near = [one for one, _ in pipes]
        addresses = [_got(pipe) for pipe in near]
        for pipe, following in zip(near, [*addresses[1:], addresses[0]], strict=True):
            pipe.send(following)
        times = [_got(pipe) for pipe in near]
        for pipe in near:
            pipe.send("all are done")
    finally:
        for process in processes:
            process.join(DEADLINE_SECONDS)
            process.kill()
    together = [sum(computed) for computed in zip(*(one for _, one in times), strict=True)]
    besides = [whole - part for whole, part in zip(times[0][0], together, strict=True)]
    return 1e3 * median(besides[WARM_UP:]), 1e3 * median(together[WARM_UP:])


def of_hosts(model: Any) -> tuple[float, float]:
    """ms of a step of a generation besides what its three hosts compute, and what they do."""
    from generation import FEW, NEW, swarm_arm

    besides: dict[int, list[float]] = {FEW: [], NEW: []}
    computed: dict[int, list[float]] = {FEW: [], NEW: []}
    for _ in range(GENERATIONS):
        for new in (FEW, NEW):
            swarm_arm(model, 0, besides[new], new, computed[new])()
    of_step = [(median(one[NEW]) - median(one[FEW])) / (NEW - FEW) for one in (besides, computed)]
    return 1e3 * of_step[0], 1e3 * of_step[1]


def _got(pipe: Connection) -> Any:
    if not pipe.poll(2 * DEADLINE_SECONDS):
        raise SystemExit(f"a process said nothing for {2 * DEADLINE_SECONDS:g} s")
    return pipe.recv()


def main() -> None:
    """Print the figures."""
    os.environ["OMP_NUM_THREADS"] = "1"  # of the three, which compute one after the other
    from trace_overhead import CUTS

    import glasshive
    from glasshive.models import find_model
    from glasshive.testing import LocalSwarm

    folder = find_model("SmolLM2-135M-Instruct")
    with (
        LocalSwarm(folder, spans=CUTS[PLACES], threads=1) as local,
        glasshive.connect(local.config) as swarm,
    ):
        hosts = partial(of_hosts, swarm.model(folder.name))
        hosts()
        arms = {**{arm: partial(measured, arm) for arm in ARMS}, "hosts": hosts}
        found: dict[str, list[tuple[float, float]]] = {arm: [] for arm in arms}
        for _ in range(REPEATS):
            for arm, measure in arms.items():
                found[arm].append(measure())
    besides = {arm: [one for one, _ in times] for arm, times in found.items()}
    rows = [
        [arm, median(times), min(times), max(times), median(part for _, part in found[arm])]
        for arm, times in besides.items()
    ]
    hops = [
        (step - floor) / PLACES
        for step, floor in zip(besides["hosts"], besides["on a thread"], strict=True)
    ]
    rows.append(["a hop over the ring", median(hops), min(hops), max(hops), ""])
    columns = ["each computes", "besides_ms", "least", "most", "computed_ms"]
    report("ring", columns, rows, {"rows": [dict(zip(columns, row, strict=True)) for row in rows]})


if __name__ == "__main__":
    main()
