"""Which spans complete a kind, against trying every set of spans."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from glasshive.client.coverage import Kind, by_kind, kinds_text, serve_command, spans_to_add
from glasshive.client.errors import NoRoute
from glasshive.client.swarm import Swarm
from glasshive.dht.records import PeerRecord
from glasshive.graph.plan import Span
from glasshive.security.keys import Identity
from glasshive.security.manifest import ModelId

PEER = Identity.generate().peer_id
KIND = Kind("float32", "none", "sdpa")


def record(start: int, end: int, n_blocks: int = 6, attention: str = "sdpa") -> PeerRecord:
    return PeerRecord(
        peer_id=PEER,
        model=ModelId("ab" * 32),
        model_name="tiny",
        start=start,
        end=end,
        n_blocks=n_blocks,
        dtype="float32",
        backend="cpu",
        attention=attention,
        throughput_tokens_per_second=1.0,
        addresses=(),
        whitelist_version=0,
        load=0.0,
        software_version="0.1.0",
        expires_at_seconds=60.0,
    )


def missing(*spans: tuple[int, int], n_blocks: int = 6) -> list[str]:
    return [str(one) for one in spans_to_add([record(*span) for span in spans], n_blocks)]


def test_holes_and_overlaps() -> None:
    assert missing() == ["0:6"]
    assert missing((0, 6)) == missing((0, 3), (3, 6)) == []
    assert missing((0, 2), (4, 6)) == ["2:4"]
    assert missing((1, 2), (3, 4)) == ["0:1", "2:3", "4:6"]
    assert missing((0, 4), (2, 6)) == ["0:2"]
    assert missing((0, 4), (3, 6)) == ["4:6"]


def chains(spans: list[tuple[int, int]], n_blocks: int) -> bool:
    reached = {0}
    for start, end in sorted(spans):
        if start in reached:
            reached.add(end)
    return n_blocks in reached


def test_no_smaller_addition_would_do() -> None:
    rng = random.Random(0)
    n_blocks = 5
    every = [(a, b) for a in range(n_blocks) for b in range(a + 1, n_blocks + 1)]
    for _ in range(60):
        there = rng.sample(every, rng.randrange(0, 5))
        added = spans_to_add([record(*one, n_blocks) for one in there], n_blocks)
        assert chains([*there, *((one.start, one.end) for one in added)], n_blocks)
        blocks = sum(one.end - one.start for one in added)
        least = min(
            sum(b - a for a, b in some)
            for count in range(4)
            for some in itertools.combinations(every, count)
            if chains([*there, *some], n_blocks)
        )
        assert blocks == least, there


def test_kinds_and_what_they_lack() -> None:
    records = [record(0, 6), record(0, 2, attention="eager"), record(4, 6, attention="eager")]
    assert list(by_kind(records)) == [Kind("float32", "none", "eager"), KIND]
    assert kinds_text(records, 6) == (
        "float32, eager attention lacks 2:4; float32, sdpa attention is complete"
    )


def test_the_command_can_be_pasted() -> None:
    assert serve_command("my model", Span(0, 3), KIND, ["--config", "a b.toml"]) == (
        "glasshive serve 'my model' --blocks 0:3 --dtype float32 --attention sdpa "
        "--config 'a b.toml'"
    )


def test_a_model_that_is_served_quantised_alone_is_not_this_one() -> None:
    """Seen to be taken for it, and no trace then found a route."""
    served = [replace(record(0, 6), quantisation="int8")]
    swarm: Any = SimpleNamespace(records=lambda name: served, _keeper=None)
    text = "^tiny is not served with quantisation none; it is with int8$"
    with pytest.raises(NoRoute, match=text):
        Swarm.model(swarm, "tiny")
