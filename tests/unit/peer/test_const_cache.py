"""What a host keeps of its clients' constants: never another's, never more than it may."""

from __future__ import annotations

import torch

from glasshive.peer.const_cache import ENTRY_BYTES, ConstCache
from glasshive.security.keys import Identity

ALICE = Identity.generate().peer_id
BOB = Identity.generate().peer_id


def test_a_constant_is_its_client_s_alone() -> None:
    cache = ConstCache(10_000)
    cache.put(ALICE, b"a", torch.zeros(10))
    assert cache.get(ALICE, b"a") is not None
    assert cache.get(BOB, b"a") is None


def test_the_cache_counts_what_it_holds() -> None:
    entry_bytes = 40 + ENTRY_BYTES
    cache = ConstCache(2 * entry_bytes)
    for _ in range(5):
        cache.put(ALICE, b"a", torch.zeros(10))  # 40 bytes, the same each time
    cache.put(ALICE, b"b", torch.zeros(10))
    assert cache.held_bytes == 2 * entry_bytes
    assert cache.get(ALICE, b"a") is not None
    cache.put(ALICE, b"c", torch.zeros(10))  # the one used longest ago goes
    assert cache.held_bytes == 2 * entry_bytes
    assert cache.get(ALICE, b"b") is None
    assert cache.get(ALICE, b"a") is not None
    cache.put(ALICE, b"d", torch.zeros(1000))  # too large to be held at all
    assert cache.held_bytes == 2 * entry_bytes
    assert cache.get(ALICE, b"d") is None


def test_constants_of_no_size_take_room_too() -> None:
    cache = ConstCache(100 * ENTRY_BYTES)
    for number in range(10_000):
        cache.put(ALICE, number.to_bytes(4, "big"), torch.zeros(0))
    assert len(cache) == 100
    assert cache.held_bytes == 100 * ENTRY_BYTES
