"""What a host keeps of its clients' constants: never another's, never more than it may."""

from __future__ import annotations

import torch

from glasshive.peer.const_cache import CLIENT_SHARE, ENTRY_BYTES, LEASE_SECONDS, ConstCache
from glasshive.security.keys import Identity

ALICE = Identity.generate().peer_id
BOB = Identity.generate().peer_id
ENTRY = 40 + ENTRY_BYTES  # ten numbers


def numbers(value: float = 0.0) -> torch.Tensor:
    return torch.full((10,), value)


def test_a_constant_is_its_client_s_alone() -> None:
    cache = ConstCache(100_000)
    cache.put(ALICE, b"a", torch.zeros(10))
    assert cache.get(ALICE, b"a") is not None
    assert cache.get(BOB, b"a") is None


def test_the_cache_counts_what_it_holds() -> None:
    cache = ConstCache(CLIENT_SHARE * 2 * ENTRY)
    for _ in range(5):
        cache.put(ALICE, b"a", numbers())  # the same each time
    cache.put(ALICE, b"b", numbers())
    assert cache.held_bytes == 2 * ENTRY
    assert cache.get(ALICE, b"a") is not None
    cache.put(ALICE, b"c", numbers())  # the one used longest ago goes
    assert cache.held_bytes == 2 * ENTRY
    assert cache.get(ALICE, b"b") is None
    assert cache.get(ALICE, b"a") is not None
    cache.put(ALICE, b"d", torch.zeros(1000))  # more than a client's share: it is not held at all
    assert cache.held_bytes == 2 * ENTRY
    assert cache.get(ALICE, b"d") is None


def test_constants_of_no_size_take_room_too() -> None:
    cache = ConstCache(CLIENT_SHARE * 100 * ENTRY_BYTES)
    for number in range(10_000):
        cache.put(ALICE, number.to_bytes(4, "big"), torch.zeros(0))
    assert len(cache) == 100
    assert cache.held_bytes == 100 * ENTRY_BYTES


def test_no_client_pushes_out_another_s() -> None:
    cache = ConstCache(CLIENT_SHARE * 10 * ENTRY)
    cache.put(BOB, b"b", numbers(1.0))
    others = [Identity.generate().peer_id for _ in range(CLIENT_SHARE)]
    for client in others:  # all that there is, by many keys
        for number in range(100):
            cache.put(client, number.to_bytes(4, "big"), numbers())
    assert cache.held_bytes == CLIENT_SHARE * 10 * ENTRY
    assert cache.get(BOB, b"b") is not None
    held = {client: cache.get(client, (99).to_bytes(4, "big")) for client in others}
    assert all(tensor is not None for tensor in held.values())  # each in place of its own
    cache.put(ALICE, b"a", numbers())  # of Alice's nothing could go, and nobody else's does
    assert cache.get(ALICE, b"a") is None
    cache.put(BOB, b"c", numbers())  # nor for Bob, but what is his
    assert cache.get(BOB, b"b") is None
    assert cache.get(BOB, b"c") is not None
    assert cache.held_bytes == CLIENT_SHARE * 10 * ENTRY


def test_a_constant_that_nobody_uses_is_forgotten_when_its_lease_ends() -> None:
    now = 0.0
    cache = ConstCache(CLIENT_SHARE * 10 * ENTRY, lambda: now)
    cache.put(ALICE, b"a", numbers())
    cache.put(ALICE, b"b", numbers())
    cache.put(BOB, b"c", numbers())
    now = LEASE_SECONDS - 1
    cache.drop_ended()
    assert len(cache) == 3
    assert cache.get(ALICE, b"a") is not None  # used again
    now = LEASE_SECONDS
    cache.drop_ended()
    assert (len(cache), cache.held_bytes) == (1, ENTRY)
    assert cache.get(ALICE, b"a") is not None
    now = 3 * LEASE_SECONDS
    cache.drop_ended()
    assert (len(cache), cache.held_bytes) == (0, 0)
