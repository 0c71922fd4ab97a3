"""Choosing a chain of peers, and what is said when there is none."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from glasshive.client.errors import NoRoute
from glasshive.client.route import choose_route
from glasshive.dht.records import PeerRecord
from glasshive.security.keys import Identity
from glasshive.security.manifest import ModelId

BLOCKS = 30
ALL = range(BLOCKS)


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
    route = choose_route([lost, spare], ALL, BLOCKS, avoid={lost.peer_id})
    assert route.records == (spare,)
    with pytest.raises(NoRoute, match="1 lost peers are left out"):
        choose_route([lost], ALL, BLOCKS, avoid={lost.peer_id})


def test_what_is_missing_and_who_serves_the_rest() -> None:
    first, last = record(0, 10), record(20, 25, dtype="float32")
    with pytest.raises(NoRoute) as caught:
        spans([first, last])
    text = str(caught.value)
    assert "nobody serves blocks 10:20, 25:30" in text
    assert f"0:10 float32 by {first.peer_id[-8:]}" in text
    assert f"20:25 float32 by {last.peer_id[-8:]}" in text
    assert "start the missing part with `glasshive serve MODEL --blocks A:B`" in text


def test_nobody_at_all() -> None:
    text = "nobody serves blocks 0:30 (served now: nothing)"
    with pytest.raises(NoRoute, match=re.escape(text)):
        spans([])


def test_spans_that_overlap_do_not_fit() -> None:
    with pytest.raises(NoRoute, match="every needed block is served, but no chain"):
        spans([record(0, 12), record(10, 30)])
