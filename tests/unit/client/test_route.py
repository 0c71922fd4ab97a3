"""Choosing a chain of peers, and what is said when there is none."""

from __future__ import annotations

import random
import re
from collections import Counter
from dataclasses import replace

import pytest

from glasshive.client.coverage import Kind, Wanted
from glasshive.client.demand import Demand
from glasshive.client.errors import NoRoute
from glasshive.client.left_out import BUSY, LOST
from glasshive.client.route import (
    FEW,
    MOST_KEPT,
    MOST_TRIED,
    NEAR_TIE,
    best_few,
    choose_route,
    choose_stand_in,
    some_others,
)
from glasshive.dht.records import PeerRecord
from glasshive.security.keys import Identity, PeerId
from glasshive.security.manifest import ModelId

BLOCKS = 30
ALL = range(BLOCKS)
WANTED = Wanted("other", Kind("bfloat16", "none", "eager"), ("--config", "/lab/hive.toml"))


def record(start: int, end: int, **fields: object) -> PeerRecord:
    one = PeerRecord(
        peer_id=Identity.generate().peer_id,
        model=ModelId("ab" * 32),
        model_name="tiny",
        start=start,
        end=end,
        n_blocks=BLOCKS,
        dtype="float32",
        quantisation="none",
        backend="cpu",
        attention="sdpa",
        throughput_tokens_per_second=1.0,
        addresses=("/ip4/127.0.0.1/tcp/1",),
        whitelist_version=0,
        load=0.0,
        software_version="0.1.0",
        expires_at_seconds=60.0,
    )
    return replace(one, **fields)  # type: ignore[arg-type]


def spans(records: list[PeerRecord], needed: object = ALL, **options: object) -> list[str]:
    route = choose_route(records, list(needed), BLOCKS, **options)  # type: ignore[arg-type,call-overload]
    return [str(span) for span in route.spans]


def test_spans_that_fit_end_to_start() -> None:
    assert spans([record(10, 20), record(20, 30), record(0, 10)]) == ["0:10", "10:20", "20:30"]


def test_the_fewest_hops_and_then_the_least_load() -> None:
    records = [record(0, 10), record(10, 30), record(0, 15), record(15, 20), record(20, 30)]
    assert spans(records) == ["0:10", "10:30"]
    busy, idle = record(0, 30, load=0.9), record(0, 30, load=0.1)
    assert choose_route([busy, idle], ALL, BLOCKS).records == (idle,)


def test_one_class_of_hardware_if_that_costs_no_hop() -> None:
    first, same = record(0, 15), record(15, 30, load=0.9)
    other, whole = record(15, 30, backend="cuda"), record(0, 30, backend="cuda")
    assert choose_route([first, other, same], ALL, BLOCKS).records == (first, same)
    assert choose_route([first, other], ALL, BLOCKS).records == (first, other)
    assert choose_route([first, same, whole], ALL, BLOCKS).records == (whole,)


def test_peers_behind_the_last_needed_block_are_left_out() -> None:
    assert spans([record(0, 10), record(10, 20)], range(12)) == ["0:10", "10:20"]
    assert spans([record(0, 10), record(10, 20)], range(10)) == ["0:10"]


def test_the_home_of_a_parameter_needs_no_chain_up_to_it() -> None:
    records = [record(0, 10), record(20, 30), record(25, 30)]
    assert spans(records, [*range(5), 29]) == ["0:10", "20:30"]
    assert spans(records, [29]) == ["20:30"]


def test_kinds_are_never_mixed() -> None:
    for field, other in (("dtype", "bfloat16"), ("attention", "eager"), ("quantisation", "int8")):
        with pytest.raises(NoRoute, match="no chain of spans of one dtype and attention backend"):
            spans([record(0, 10), record(10, 30, **{field: other})])


def test_a_peer_to_avoid() -> None:
    lost, spare = record(0, 30), record(0, 30, load=0.9)
    route = choose_route([lost, spare], ALL, BLOCKS, avoid={lost.peer_id: LOST})
    assert route.records == (spare,)


@pytest.mark.parametrize(
    ("why", "until"),
    [
        (LOST, ", or wait until one that was lost is back"),
        (BUSY, ", or wait until one that is busy has a place"),
        ("named in avoid=", ""),
    ],
)
def test_who_is_left_out_of_what_it_serves_is_said_with_why(why: str, until: str) -> None:
    """Seen to say that nobody serves these blocks, of a host that was busy."""
    there, gone = record(0, 10), record(10, 30)
    with pytest.raises(NoRoute) as caught:
        choose_route([there, gone], ALL, BLOCKS, avoid={gone.peer_id: why})
    text = str(caught.value)
    assert text.startswith("no route: nobody else serves blocks 10:30 (served now: 0:10 float32 ")
    assert f"; left out: 10:30 by {gone.peer_id[-8:]} ({why})); start the missing part" in text
    assert text.endswith(f"`{until}")
    only = {there.peer_id, gone.peer_id}
    with pytest.raises(NoRoute, match="no other peer of route= serves blocks 10:30") as caught:
        choose_route([there, gone], ALL, BLOCKS, avoid={gone.peer_id: why}, only=only)
    assert until[5:] in str(caught.value)


def test_peers_to_take_and_no_others() -> None:
    better, mine = record(0, 30), record(0, 30, load=0.9)
    route = choose_route([better, mine], ALL, BLOCKS, only={mine.peer_id})
    assert route.records == (mine,)
    parts = [record(0, 10), record(10, 20), record(20, 30)]
    only = {one.peer_id for one in parts}
    assert choose_route([*parts, better], ALL, BLOCKS, only=only).records == tuple(parts)
    assert spans([*parts, better], range(10), only=only) == ["0:10"]
    with pytest.raises(NoRoute, match="no peer of route= serves blocks 20:30") as caught:
        choose_route([*parts[:2], better], ALL, BLOCKS, only=only)
    unknown = f"not announced for this model, dtype and attention: {parts[2].peer_id}; name peers "
    assert unknown in str(caught.value)
    with pytest.raises(NoRoute, match=r"left out: 0:10 .*; name peers that serve all of them"):
        choose_route(parts, ALL, BLOCKS, only=only, avoid={parts[0].peer_id: LOST})


def test_what_is_missing_and_who_serves_the_rest() -> None:
    first, last = record(0, 10), record(20, 25, dtype="float32")
    with pytest.raises(NoRoute) as caught:
        spans([first, last], wanted=WANTED)
    text = str(caught.value)
    assert "nobody serves blocks 10:20, 25:30" in text
    assert f"0:10 float32 sdpa by {first.peer_id[-8:]}" in text
    assert f"20:25 float32 sdpa by {last.peer_id[-8:]}" in text
    kind = "--dtype float32 --attention sdpa --config /lab/hive.toml"
    assert text.endswith(
        f"start the missing part with `glasshive serve tiny --blocks 10:20 {kind}` "
        f"and `glasshive serve tiny --blocks 25:30 {kind}`"
    )


def test_only_what_the_trace_needs_is_asked_for() -> None:
    with pytest.raises(NoRoute) as caught:
        spans([record(0, 10), record(20, 25)], range(15))
    assert "--blocks 10:20 " in str(caught.value)
    assert "--blocks 25:30" not in str(caught.value)


def test_each_kind_says_what_it_lacks_and_the_nearest_is_to_be_completed() -> None:
    records = [record(0, 10), record(10, 12), record(10, 30, attention="eager")]
    with pytest.raises(NoRoute) as caught:
        spans(records)
    text = str(caught.value)
    assert "float32, eager attention lacks 0:10; float32, sdpa attention lacks 12:30" in text
    assert "`glasshive serve tiny --blocks 0:10 --dtype float32 --attention eager " in text


def test_of_many_peers_the_first_are_named() -> None:
    with pytest.raises(
        NoRoute, match=r"served now: (0:10 float32 sdpa by \w{8}, ){8}and 12 more\)"
    ):
        spans([record(0, 10) for _ in range(20)])


def test_nobody_at_all() -> None:
    text = "nobody serves blocks 0:30 (served now: nothing)"
    with pytest.raises(NoRoute, match=re.escape(text)):
        spans([])
    with pytest.raises(NoRoute, match="`glasshive serve MODEL --blocks 0:30 --bootstrap ADDRESS`"):
        spans([])
    with pytest.raises(NoRoute) as caught:
        spans([], wanted=WANTED)
    assert str(caught.value).endswith(
        "with `glasshive serve other --blocks 0:30 --dtype bfloat16 --attention eager "
        "--config /lab/hive.toml`"
    )


def test_spans_that_overlap_do_not_fit() -> None:
    with pytest.raises(NoRoute, match="every needed block is served, but no chain"):
        spans([record(0, 12), record(10, 30)])
    with pytest.raises(NoRoute, match="serve tiny --blocks 0:10 "):
        spans([record(0, 12), record(10, 30)])


def test_the_best_few_of_each_span_the_best_of_all_first() -> None:
    slow, fast, faster, fastest = (
        record(0, 10, throughput_tokens_per_second=pace) for pace in (1.0, 2.0, 3.0, 4.0)
    )
    far, near = record(10, 30), record(10, 30)
    other = replace(near, backend="cuda")  # gives other bits, so it stands in for nobody else
    far_away = {far.peer_id: 1.0}

    def seconds(one: PeerRecord, blocks: int) -> float:
        return Demand().seconds(one, blocks, far_away.get(one.peer_id, 0.0))

    assert FEW == 3
    found = best_few([slow, far, fast, other, faster, near, fastest], seconds)
    assert found == [fastest, near, other, faster, far, fast]
    many = [record(block, block + 1) for block in range(BLOCKS) for _ in range(2)]
    assert best_few(many) == [*many[::2], *many[1::2]][:MOST_KEPT]
    assert len(many) > MOST_KEPT


# Chance ----------------------------------------------------------------------------------------


def test_near_ties_are_left_to_chance_and_others_are_not() -> None:
    """All clients took the first of equal peers, and all of them the same one."""
    alike = [record(0, 30) for _ in range(4)]
    slower = record(0, 30, throughput_tokens_per_second=0.9)  # by a tenth, and more than NEAR_TIE
    nearly = record(0, 30, throughput_tokens_per_second=0.99)
    assert NEAR_TIE == 0.05
    rng = random.Random(3)

    def liking(peer: PeerId) -> float:
        return rng.random()  # another client each time

    records = [slower, *alike, nearly]
    taken = Counter(
        choose_route(records, ALL, BLOCKS, liking=liking).records[0].peer_id for _ in range(2000)
    )
    assert set(taken) == {one.peer_id for one in (*alike, nearly)}
    assert min(taken[one.peer_id] for one in alike) > 300
    assert choose_route(records, ALL, BLOCKS).records == (alike[0],)
    stood_in = Counter(
        choose_stand_in(records, alike[0], [alike[0].peer_id], liking=liking).peer_id
        for _ in range(500)
    )
    assert set(stood_in) == {one.peer_id for one in (*alike[1:], nearly)}
    kept = {one.peer_id for _ in range(500) for one in best_few(records, liking=liking)}
    assert kept == {one.peer_id for one in (*alike, nearly)}


def test_each_peer_is_priced_once() -> None:
    """It was for its hardware, for all hardware together, and for the sum."""
    records = [record(start, start + 10, backend=name) for start in (0, 10, 20) for name in "ab"]
    priced: Counter[str] = Counter()

    def seconds(one: PeerRecord, blocks: int) -> float:
        priced[one.peer_id] += 1
        return float(blocks)

    assert choose_route(records, ALL, BLOCKS, seconds=seconds).expected_seconds == 30.0
    assert priced == {one.peer_id: 1 for one in records}


def test_one_more_of_each_span_is_tried() -> None:
    """Whatever they announce: of the three that seem fastest nobody else's place is held."""
    chance = random.Random(4).random
    firsts = [record(0, 10, throughput_tokens_per_second=1e9) for _ in range(3)]
    others, seconds = [record(0, 10) for _ in range(5)], [record(10, 30) for _ in range(2)]
    known = {one.peer_id for one in (*firsts, others[0])}
    tried: Counter[str] = Counter()
    for _ in range(200):
        found = some_others(
            [*firsts, *others, *seconds], lambda one: one.peer_id not in known, chance
        )
        assert sorted(one.start for one in found) == [0, 10]
        tried.update(one.peer_id for one in found)
    assert set(tried) == {one.peer_id for one in (*others[1:], *seconds)}
    assert some_others(firsts, lambda one: one.peer_id not in known, chance) == []
    many = [record(block, block + 1) for block in range(BLOCKS)]
    tried.clear()
    for _ in range(200):
        found = some_others(many, lambda one: True, chance)
        assert len(found) == len({one.peer_id for one in found}) == MOST_TRIED
        tried.update(one.peer_id for one in found)
    assert len(tried) == BLOCKS
