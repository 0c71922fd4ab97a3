"""What a peer adds to a route, and the best of all routes against brute force."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
from peer_records import record_of
from soak import SEED, count

from glasshive.client.demand import (
    BUSY_FACTOR,
    BYTES_PER_SECOND,
    HOP_SECONDS,
    UNKNOWN_SECONDS,
    Alike,
    Carried,
    Demand,
    forward_seconds,
)
from glasshive.client.errors import NoRoute
from glasshive.client.route import MIXED_FACTOR, best_few, choose_route, liking_of, rivals
from glasshive.dht.records import ModelId, PeerRecord
from glasshive.security.keys import Identity

N_BLOCKS = 8
MODEL = ModelId("ab" * 32)


def record(start: int, end: int, **others: Any) -> PeerRecord:
    fields = {"start": start, "end": end, "n_blocks": 30, "expires_at_seconds": 60.0, **others}
    return record_of(Identity.generate(), MODEL, **fields)


BASE = record(0, 10, throughput_tokens_per_second=100.0)


def near(seconds: float) -> Any:
    return pytest.approx(seconds, abs=1e-12)


def test_a_peer_adds_computing_ways_and_bytes() -> None:
    demand = Demand((Alike(20), Alike(15, 2)), rounds=7, hidden_bytes=1000)
    assert demand.seconds(BASE, 10, 0.25) == near(0.5 + 7 * (0.25 + HOP_SECONDS))
    assert demand.seconds(BASE, 10) == near(0.5 + 7 * (UNKNOWN_SECONDS + HOP_SECONDS))
    half = demand.seconds(BASE, 5, 0.25)
    assert half == near(0.25 + 7 * (0.25 + HOP_SECONDS))
    busy = replace(BASE, load=0.5)
    assert demand.seconds(busy, 10, 0.0) == near(0.5 * (1 + BUSY_FACTOR / 2) + 7 * HOP_SECONDS)
    second = replace(BASE, start=10, end=20)
    came_seconds = 1000 / BYTES_PER_SECOND
    assert demand.seconds(second, 10, 0.0) == near(0.5 + 7 * HOP_SECONDS + came_seconds)
    assert demand.seconds(second, 0, 0.25) == near(0.25 + HOP_SECONDS)  # gives a parameter, say
    idle = replace(BASE, throughput_tokens_per_second=0.0)
    assert demand.seconds(idle, 10, 0.0) > 10_000


def test_generation_is_paced_by_the_pass_of_one_token() -> None:
    """A prompt of 9 tokens and 63 steps, each a round: seconds as they would pass on a clock.

    By the pace of long passes the processor nearby took 0.98 s, the GPU 1.54 s.
    """
    demand = Demand((Alike(9), Alike(1, 63)), rounds=64)
    near_cpu = record(0, 30, throughput_tokens_per_second=100.0, pass_seconds=0.06)
    far_gpu = replace(
        record(0, 30, throughput_tokens_per_second=20_000.0, pass_seconds=0.015),
        backend="cuda",
    )
    ways = {near_cpu.peer_id: 0.002, far_gpu.peer_id: 0.022}

    def seconds(one: PeerRecord, blocks: int) -> float:
        return demand.seconds(one, blocks, ways[one.peer_id])

    clock = {near_cpu.peer_id: 0.0, far_gpu.peer_id: 0.0}
    for _ in range(64):
        clock[near_cpu.peer_id] += 0.060 + 0.002 + 0.002
        clock[far_gpu.peer_id] += 0.015 + 0.022 + 0.002
    clock[near_cpu.peer_id] += 0.030  # nine tokens at 100 a second take 90 ms
    route = choose_route([near_cpu, far_gpu], range(30), 30, seconds=seconds)
    assert route.records == (far_gpu,)
    assert route.expected_seconds == pytest.approx(clock[far_gpu.peer_id])
    assert seconds(near_cpu, 30) == pytest.approx(clock[near_cpu.peer_id])
    assert seconds(near_cpu, 15) == pytest.approx(0.5 * (63 * 0.06 + 0.09) + 64 * 0.004)


def test_load_stretches_each_pass_of_a_generation() -> None:
    """A GPU nearby with all its places taken was chosen: at its pace, others took next to none."""
    demand = Demand((Alike(9), Alike(1, 63)), rounds=64)
    gpu = record(0, 30, throughput_tokens_per_second=20_000.0, pass_seconds=0.015)
    busy, idle = replace(gpu, load=1.0), replace(gpu, peer_id=Identity.generate().peer_id)
    ways = {busy.peer_id: 0.002, idle.peer_id: 0.020}

    def seconds(one: PeerRecord, blocks: int) -> float:
        return demand.seconds(one, blocks, ways[one.peer_id])

    route = choose_route([busy, idle], range(30), 30, seconds=seconds)
    assert route.records == (idle,)
    assert seconds(busy, 30) > 64 * 8 * 0.015, "eight others compute before each of its passes"


def test_a_long_pass_is_paced_by_tokens_and_a_short_one_by_itself() -> None:
    one = replace(BASE, pass_seconds=0.06)
    assert [forward_seconds(one, tokens) for tokens in (1, 6, 7, 512)] == [0.06, 0.06, 0.07, 5.12]


@pytest.mark.parametrize(
    ("start", "end", "wanted"),
    [(0, 3, 0), (0, 6, 0), (3, 6, 7), (4, 6, 107), (3, 9, 7), (6, 9, 107), (9, 12, 0)],
)
def test_what_a_span_is_sent_of_carried_values(start: int, end: int, wanted: int) -> None:
    """Each value comes once, however often it is used."""
    carried = (Carried(3, frozenset([4, 5, 7]), 100), Carried(0, frozenset([5, 8]), 7))
    span = replace(BASE, start=start, end=end)
    without, with_them = Demand(), Demand(carried=carried)
    more = with_them.seconds(span, end - start) - without.seconds(span, end - start)
    assert more * BYTES_PER_SECOND == pytest.approx(wanted, abs=1e-3)


def test_what_spans_are_sent_is_worked_out_once_for_each() -> None:
    """For each of 300 peers it was, twice: 0.3 s for 300 values and 1,000 peers, on the loop."""
    looked_at: list[int] = []

    class Noted(int):
        """A block at which a value is made, that notes when it is looked up."""

        def __hash__(self) -> int:
            looked_at.append(int(self))
            return super().__hash__()

    carried = tuple(Carried(Noted(at % 8), frozenset([7 - at % 8]), 10) for at in range(50))
    demand = Demand(carried=carried)
    spans = [(0, 4), (4, 8)]
    records = [record(*spans[i % 2], n_blocks=N_BLOCKS, backend=f"b{i % 3}") for i in range(300)]
    for _ in range(2):
        choose_route(records, range(N_BLOCKS), N_BLOCKS, seconds=demand.seconds)
        best_few(records, demand.seconds)
    assert len(looked_at) == len(carried) * len(spans)
    first = demand.seconds(records[0], 4) - Demand().seconds(records[0], 4)
    assert first * BYTES_PER_SECOND == pytest.approx(10 * sum(at % 8 >= 4 for at in range(50)))
    assert demand == Demand(carried=carried), "what was worked out is no part of a demand"


def test_own_traces_count_as_load() -> None:
    """As one place of sixteen, each, that its host may not have announced yet."""
    one = replace(BASE, load=0.25)
    own = [Demand().seconds(one, 10, 0.0, running) for running in range(5)]
    announced = [Demand().seconds(replace(one, load=0.25 + n / 16), 10, 0.0) for n in range(5)]
    assert own == pytest.approx(announced)
    assert own[1] > own[0]


# The best of all routes ------------------------------------------------------------------------


def fits(chain: Sequence[PeerRecord], needed: set[int]) -> bool:
    """Whether hidden states can go through a chain, and every needed block is on it."""
    depth = min(set(range(N_BLOCKS + 1)) - needed)
    at = 0
    for one in chain:
        if one.start != at if at < depth else one.start < at:
            return False
        at = one.end
    served = {block for one in chain for block in range(one.start, one.end)}
    return needed <= served


def all_routes(records: Sequence[PeerRecord], needed: set[int]) -> Iterator[tuple[PeerRecord, ...]]:
    for length in range(1, 6):
        for chain in itertools.permutations(records, length):
            if len({(one.dtype, one.attention) for one in chain}) == 1 and fits(chain, needed):
                yield chain


def seconds_of(chain: Sequence[PeerRecord], needed: set[int], demand: Demand, ways: Any) -> float:
    """The formula of the docstring, written down once more."""
    depth = min(set(range(N_BLOCKS + 1)) - needed)
    total = 0.0
    for one in chain:
        blocks = sum(block < depth for block in range(one.start, one.end))
        here = set(range(one.start, one.end))
        pace = one.throughput_tokens_per_second * len(here)  # blocks times tokens a second
        for tokens in (alike.tokens for alike in demand.passes for _ in range(alike.count)):
            alone = max(tokens * len(here) / pace, one.pass_seconds)
            total += alone * blocks / len(here) * (1 + 8 * one.load)
        total += (0.002 + ways[one.peer_id]) * (demand.rounds if blocks else 1)
        came = demand.hidden_bytes if blocks and one.start else 0
        for value in demand.carried:
            came += value.n_bytes * (value.made_at not in here and bool(here & value.used_at))
        total += came / 12.5e6
    return total * (MIXED_FACTOR if len({one.backend for one in chain}) > 1 else 1)


def random_records(rng: random.Random) -> list[PeerRecord]:
    records = []
    for _ in range(rng.randint(3, 9)):
        start = rng.choice([0, 0, 2, 3, 4, 6])
        records.append(
            record(
                start,
                rng.choice([end for end in (2, 3, 4, 6, 8) if end > start]),
                n_blocks=N_BLOCKS,
                backend=rng.choice(["cpu", "cpu", "cuda"]),
                dtype=rng.choice(["float32"] * 4 + ["bfloat16"]),
                throughput_tokens_per_second=rng.choice([1.0, 30.0, 1000.0]) * rng.uniform(0.5, 2),
                pass_seconds=rng.choice([0.0, 0.004, 0.2]),
                load=rng.choice([0.0, 0.0, 0.25, 1.0]),
            )
        )
    return records


@pytest.mark.parametrize("seed", range(SEED, SEED + count(150, 5000)))
def test_no_route_is_better_than_the_chosen_one(seed: int) -> None:
    """Fails with fewest hops first, with a greedy choice of each span, without MIXED_FACTOR."""
    rng = random.Random(seed)
    records = random_records(rng)
    ways = {one.peer_id: rng.choice([0.001, 0.05, 0.4]) for one in records}
    needed = set(range(rng.randint(0, N_BLOCKS))) | set(rng.sample(range(N_BLOCKS), 1))
    demand = Demand(
        passes=(Alike(rng.choice([1, 20, 5000])), Alike(1, rng.choice([1, 63]))),
        rounds=rng.choice([1, 1, 64]),
        hidden_bytes=rng.choice([0, 10_000, 100_000_000]),
        carried=tuple(
            Carried(rng.randrange(4), frozenset(rng.sample(range(N_BLOCKS), 2)), 10**8)
            for _ in range(rng.randint(0, 2))
        ),
    )
    wanted = min(
        (seconds_of(chain, needed, demand, ways) for chain in all_routes(records, needed)),
        default=None,
    )

    def seconds(one: PeerRecord, blocks: int) -> float:
        return demand.seconds(one, blocks, ways[one.peer_id])

    if wanted is None:
        with pytest.raises(NoRoute):
            choose_route(records, needed, N_BLOCKS, seconds=seconds)
        return
    route = choose_route(records, needed, N_BLOCKS, seconds=seconds)
    assert fits(route.records, needed)
    assert seconds_of(route.records, needed, demand, ways) == pytest.approx(wanted)
    is_mixed = len({one.backend for one in route.records}) > 1
    factor = MIXED_FACTOR if is_mixed else 1.0
    assert route.expected_seconds * factor == pytest.approx(wanted)
    liking = liking_of(str(rng.random()))
    blurred = choose_route(records, needed, N_BLOCKS, seconds=seconds, liking=liking)
    assert fits(blurred.records, needed)
    assert wanted <= seconds_of(blurred.records, needed, demand, ways) * (1 + 1e-9)
    assert seconds_of(blurred.records, needed, demand, ways) <= 1.05 * wanted
    found = seconds_of(blurred.records, needed, demand, ways)
    is_mixed = len({one.backend for one in blurred.records}) > 1
    assert blurred.expected_seconds * (MIXED_FACTOR if is_mixed else 1.0) == pytest.approx(found)


def test_who_competes_with_whom() -> None:
    first, second, third = record(0, 10), record(10, 30), record(0, 30)
    other_kind = record(0, 10, dtype="bfloat16")
    assert rivals([first, second, other_kind], range(30), 30) == []
    assert rivals([first, second, third], range(30), 30) == [first, second, third]
    assert rivals([first, second, third], range(5), 30) == [first, third]
    assert rivals([first, second, second, first], [29], 30) == [second, second]
