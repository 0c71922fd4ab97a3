"""How often each peer may do something."""

from __future__ import annotations

import pytest

from glasshive.dht.token_buckets import MAX_REMEMBERED, TokenBuckets
from glasshive.security.keys import PeerId

ALICE, BOB = PeerId("alice"), PeerId("bob")


def test_a_bucket_gives_its_burst_at_once_and_then_its_rate() -> None:
    now = 100.0
    buckets = TokenBuckets(2.0, 5, lambda: now)
    assert [buckets.take(ALICE) for _ in range(5)] == [0.0] * 5
    assert buckets.take(ALICE) == pytest.approx(0.5)
    assert buckets.take(ALICE) == pytest.approx(0.5)  # who is refused takes nothing
    assert buckets.take(BOB) == 0.0
    now += 0.5
    assert buckets.take(ALICE) == 0.0
    assert buckets.take(ALICE) == pytest.approx(0.5)
    now += 1000.0  # and never holds more than its burst
    assert [buckets.take(ALICE) for _ in range(5)] == [0.0] * 5
    assert buckets.take(ALICE) > 0


def test_what_is_owed_is_bounded() -> None:
    now = 100.0
    buckets = TokenBuckets(2.0, 6, lambda: now)
    buckets.charge(ALICE, 4)
    assert [buckets.take(ALICE) for _ in range(2)] == [0.0, 0.0]
    assert buckets.take(ALICE) == pytest.approx(0.5)
    for _ in range(100):
        buckets.charge(ALICE, 4)
    assert buckets.take(ALICE) == pytest.approx(3.5)
    assert buckets.take(BOB) == 0.0


def test_full_buckets_are_forgotten_and_others_bounded() -> None:
    now = 0.0
    buckets = TokenBuckets(1.0, 5, lambda: now)
    for number in range(2 * MAX_REMEMBERED):
        assert buckets.take(PeerId(str(number))) == 0.0
    assert len(buckets) == MAX_REMEMBERED
    now = 1.0
    buckets.take(ALICE)
    assert len(buckets) == 1
