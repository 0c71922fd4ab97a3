"""What trust costs: signatures and admission in a warm trace, a door, and refusing a bomb.

The classic experiments of the demo on SmolLM2-135M over 3 hosts in this process, whose own calls of
signing, verifying, hashing and admission are timed while they run, by the clock of their own
threads. Bar: <= 2 ms on the way of a trace, whose hosts work side by side. Bombs are those that
tests throw. Bars: refused in 50 ms each, memory growth under 32 MB; the longest graph that may be
sent has none. A look-up of a model over real daemons, for one of whose blocks 1,000 records were
sent that nobody may use: bar 2 times as long as when it is quiet; and while they are sent, by a
peer in the same process as holder and reader.
"""

from __future__ import annotations

import asyncio
import importlib.util
import random
import resource
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from harness import report

import glasshive
from glasshive.demo_experiments import activation_patching, steering
from glasshive.dht.member_gate import MemberGate
from glasshive.graph import kernels
from glasshive.graph.codec import DEFAULT_LIMITS, decode_graph, encode_graph
from glasshive.graph.errors import GraphError
from glasshive.graph.graph import Op
from glasshive.models import find_model
from glasshive.peer.admission import Admission
from glasshive.security.keys import Identity
from glasshive.security.membership import Act, Certificate, Membership, Role
from glasshive.security.requests import TraceRequest
from glasshive.security.results import SavesDigest, TraceResult

ROUNDS = 3
HOSTS = 3
TESTS = Path(__file__).parents[1] / "tests"
LIES = 1_000
LOOK_UPS = 40
PARTS = {
    "sign requests": (TraceRequest, "sign"),
    "verify requests": (TraceRequest, "verify"),
    "hash parts": (TraceRequest, "check_part"),
    "hash saves": (SavesDigest, "update"),
    "sign results": (TraceResult, "sign"),
    "verify results": (TraceResult, "verify"),
    "admission": (Admission, "admit"),
}


@contextmanager
def timed(found: dict[str, float]) -> Iterator[None]:
    """Inside it, the seconds of each part's calls are added up in `found`."""

    def timing(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            began = time.thread_time()  # not what other threads of this process take meanwhile
            try:
                return call(*args, **kwargs)
            finally:
                found[name] += time.thread_time() - began

        return run

    with ExitStack() as undo:
        for name, (owner, attribute) in PARTS.items():
            stock = owner.__dict__[attribute]
            bound = isinstance(stock, classmethod)
            made = timing(name, stock.__func__ if bound else stock)
            setattr(owner, attribute, classmethod(made) if bound else made)
            undo.callback(setattr, owner, attribute, stock)
        yield


def logit_lens(model: Any) -> int:
    """The best token of every layer; returns how many traces that took."""
    with model.trace("The Eiffel Tower is in the city of", progress=False):
        for layer in model.model.layers:
            logits = model.lm_head(model.model.norm(layer.output[:, -5:]))
            logits.softmax(-1).max(-1).indices.save()
    return 1


def cost_of_traces() -> dict[str, dict[str, float]]:
    """For each experiment the least milliseconds a trace of each part, over some rounds."""
    model = glasshive.local(find_model("SmolLM2-135M-Instruct"), cuts=(10, 20))
    experiments: dict[str, Callable[[Any], int]] = {
        "logit lens": logit_lens,
        "activation patching": lambda model: len(activation_patching(model).traces),
        "steering": lambda model: len(steering(model).traces),
    }
    costs: dict[str, dict[str, float]] = {}
    for name, experiment in experiments.items():
        experiment(model)  # warm: admission keeps its verdicts
        least: dict[str, float] = {}
        for _ in range(ROUNDS):
            found: dict[str, float] = defaultdict(float)
            with timed(found):
                n_traces = experiment(model)
            for part, seconds in found.items():
                each = 1e3 * seconds / n_traces
                least[part] = min(each, least.get(part, each))
        costs[name] = least
    return costs


def on_the_way(parts: dict[str, float]) -> float:
    """The milliseconds that a trace waits: hosts work side by side, the client does all of its own.

    Both sides hash what is saved.
    """
    client = parts["sign requests"] + parts["verify results"] + parts["hash saves"] / 2
    hosts = ("verify requests", "hash parts", "admission", "sign results")
    return client + (sum(parts[one] for one in hosts) + parts["hash saves"] / 2) / HOSTS


def cost_of_a_door() -> float:
    """Microseconds to judge a certificate that was seen before, as on every stream and call."""
    issuer, member = Identity.generate(), Identity.generate()
    now = time.time()
    certificate = Certificate(
        *(issuer.peer_id, member.peer_id, Role.CLIENT, "lab", bytes(16), b"", round(now) + 3600.0)
    ).sign(issuer)
    gate = MemberGate(Membership("lab", [issuer.peer_id]), time.time)
    times = []
    for _ in range(2_000):
        began = time.perf_counter()
        gate.admit(member.peer_id, certificate, Act.TRACE)
        times.append(time.perf_counter() - began)
    return 1e6 * statistics.median(times)


def attack(name: str) -> ModuleType:
    """What the tests attack with."""
    sys.path.append(str(TESTS))
    spec = importlib.util.spec_from_file_location(name, TESTS / "attacks" / f"{name}.py")
    if spec is None or spec.loader is None:
        sys.exit(f"there is no {TESTS}; run the bench in a checkout")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


async def cost_of_lies() -> dict[str, float]:
    """Milliseconds of a look-up over real daemons, quiet, while lies are sent, and after them.

    The lies are forged, stale, oversized and misplaced records for a block of the model that is
    looked up, sent to the peer that holds its records by one that keeps to no rule. Who sends, who
    holds and who looks up are one process here, so all their work is in the second figure.
    """
    from hivemind.dht.routing import DHTID
    from hivemind.p2p import PeerID

    from glasshive.dht.announcer import announce
    from glasshive.dht.directory import find_records
    from glasshive.dht.hivemind_transport import HivemindTransport

    lies = attack("test_t12_forged_records")
    alice = Identity.generate()
    home = await HivemindTransport.create(alice)
    attacker, reader = [
        await HivemindTransport.create(Identity.generate(), bootstraps=home.addresses[:1])
        for _ in range(2)
    ]
    record = lies.record_of(alice, home, expires_at_seconds=float(round(home.now()) + 60))
    await announce(home, alice, record)
    rng = random.Random(0)
    made = [lies.forged(rng, attacker) for _ in range(LIES)]

    async def look_up(times: list[float]) -> None:
        began = time.perf_counter()
        found = await find_records(reader, lies.MODEL)
        times.append(time.perf_counter() - began)
        if [one.peer_id for one in found] != [alice.peer_id]:
            sys.exit(f"a look-up found {found}")

    async def send() -> None:
        protocol = attacker._node.protocol
        for start in range(0, LIES, lies.AT_A_TIME):
            some = made[start : start + lies.AT_A_TIME]
            await protocol.call_store(
                PeerID.from_base58(alice.peer_id),
                [DHTID.generate(source=lies.KEY.encode())] * len(some),
                [protocol.serializer.dumps(value) for _, value, _ in some],
                [expires for _, _, expires in some],
                subkeys=[subkey for subkey, _, _ in some],
            )

    times: dict[str, list[float]] = {"first": [], "quiet": [], "beside": [], "after": []}
    for arm in ("first", "quiet"):
        for _ in range(LOOK_UPS):
            await look_up(times[arm])
    sending = asyncio.create_task(send())
    while not sending.done():
        await look_up(times["beside"])
    await sending
    for _ in range(LOOK_UPS):
        await look_up(times["after"])
    for transport in (reader, attacker, home):
        await transport.close()
    return {name: 1e3 * statistics.median(some) for name, some in times.items()}


def cost_of_bombs() -> tuple[dict[str, float], float, float]:
    """Milliseconds to refuse each bomb of the tests, the megabytes that all added, and a long one.

    No shape is known beforehand, as with an attacker's own numbers. The long one has as many nodes
    as are allowed, and only its last one is too large: milliseconds too.
    """
    bombs = attack("test_t04_size_bombs")

    def refuse(data: bytes) -> float:
        kernels._inferred.clear()
        began = time.thread_time()
        try:
            bombs.admit(decode_graph(data), bombs.MODEL, bombs.BUDGET)
        except GraphError:
            return 1e3 * (time.thread_time() - began)
        sys.exit("a bomb was admitted")

    graphs = {name: encode_graph(make()) for name, make in bombs.BOMBS.items()}
    graphs |= attack("test_t03_graph_bombs").byte_bombs()
    for graph in graphs.values():
        refuse(graph)  # torch loads its meta kernels
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    took = {name: min(refuse(graph) for _ in range(3)) for name, graph in graphs.items()}
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib
    chain = [Op("mul", (bombs.ref(i), float(i))) for i in range(DEFAULT_LIMITS.nodes - 2)]
    last = Op("repeat", (bombs.ref(len(chain)), (2**20, 1, 1)))
    long = encode_graph(bombs.graph_of(bombs.READ, *chain, last))
    return took, grown_kib / 1024, min(refuse(long) for _ in range(3))


def main() -> None:
    """Print the figures."""
    torch.set_num_threads(2)
    bombs, grown_mb, long_ms = cost_of_bombs()
    door_us = cost_of_a_door()
    look_up_ms = asyncio.run(cost_of_lies())
    costs = cost_of_traces()
    sums = {name: sum(parts.values()) for name, parts in costs.items()}
    rows: list[list[Any]] = [
        [part, *(costs[name].get(part, 0.0) for name in costs)] for part in PARTS
    ]
    ways = {name: on_the_way(parts) for name, parts in costs.items()}
    slowest = max(bombs, key=lambda name: bombs[name])
    report(
        "trust",
        ["ms a trace", *costs],
        [
            *rows,
            ["all of them, on 3 hosts and the client", *sums.values()],
            ["on the way of the trace", *ways.values()],
            ["a certificate judged, us", door_us, "", ""],
            [f"{len(bombs)} bombs refused, median ms", statistics.median(bombs.values()), "", ""],
            [f"the slowest ({slowest}), ms", bombs[slowest], "", ""],
            ["memory that all of them added, MB", grown_mb, "", ""],
            [f"{DEFAULT_LIMITS.nodes} nodes, the last too large, ms", long_ms, "", ""],
            *[
                [f"a look-up, {LIES} lies {when}, ms", look_up_ms[arm], "", ""]
                for arm, when in (("quiet", "not sent"), ("beside", "sent"), ("after", "were sent"))
            ],
        ],
        {
            "trace_ms": ways,
            "door_us": door_us,
            "slowest_bomb_ms": bombs[slowest],
            "bombs_mb": grown_mb,
            "longest_graph_ms": long_ms,
            "look_up_ms": look_up_ms,
            "look_up_ratio": look_up_ms["after"] / look_up_ms["quiet"],
            "look_up_ratio_while_sent": look_up_ms["beside"] / look_up_ms["quiet"],
        },
    )


if __name__ == "__main__":
    main()
