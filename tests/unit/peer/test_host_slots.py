"""What one client can hold of a host: slots, constants, and never another's."""

from __future__ import annotations

import torch

from glasshive.peer.host import _ConstCache
from glasshive.security.keys import Identity

ALICE = Identity.generate().peer_id
BOB = Identity.generate().peer_id


def test_a_constant_is_its_client_s_alone() -> None:
    cache = _ConstCache(1000)
    cache.put(ALICE, b"a", torch.zeros(10))
    assert cache.get(ALICE, b"a") is not None
    assert cache.get(BOB, b"a") is None


def test_the_cache_counts_what_it_holds() -> None:
    cache = _ConstCache(100)
    for _ in range(5):
        cache.put(ALICE, b"a", torch.zeros(10))  # 40 bytes, the same each time
    cache.put(ALICE, b"b", torch.zeros(10))
    assert cache._held_bytes == 80
    cache.put(ALICE, b"c", torch.zeros(10))  # the oldest goes
    assert cache._held_bytes == 80
    assert cache.get(ALICE, b"a") is None
    cache.put(ALICE, b"d", torch.zeros(1000))  # too large to be held at all
    assert cache._held_bytes == 80
    assert cache.get(ALICE, b"d") is None
