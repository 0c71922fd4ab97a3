"""What is mended in hivemind's DHT node, each against hivemind's own classes, without a network."""

import asyncio
import math
from typing import Any

import msgpack
import pytest

from glasshive.dht import hardening, member_calls
from glasshive.dht.errors import RecordRefused

# hivemind 1.1 itself, at import.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")

FAR = 4_000_000_000.0


def test_an_older_value_neither_replaces_a_newer_one_nor_ends_it_early() -> None:
    hardening.patch_storage()
    hardening.patch_storage()
    from hivemind.dht.routing import DHTID
    from hivemind.dht.storage import DHTLocalStorage

    storage, key = DHTLocalStorage(), DHTID(5)
    assert storage.store_subkey(key, "peer", b"new", FAR + 20)
    assert not storage.store_subkey(key, "peer", b"old", FAR)
    assert not storage.store_subkey(key, "peer", b"another", FAR + 20)
    assert storage.store_subkey(key, "peer", b"new", FAR + 20)  # the same, by a second way
    dictionary = storage.get(key).value
    assert dictionary.get("peer") == (b"new", FAR + 20)
    # The heap decides when a value is dropped; stock hivemind puts the older expiry there.
    assert [entry.expiration_time for entry in dictionary.expiration_heap] == [FAR + 20]
    assert storage.store_subkey(key, "peer", b"newer", FAR + 30)
    assert dictionary.get("peer") == (b"newer", FAR + 30)


def test_storages_are_bounded() -> None:
    hardening.patch_storage()
    from hivemind.dht.routing import DHTID
    from hivemind.dht.storage import DHTLocalStorage, DictionaryDHTValue

    storage = DHTLocalStorage()
    for number in range(1100):
        storage.store_subkey(DHTID(1), f"peer {number}", b"", FAR + number)
    dictionary = storage.get(DHTID(1)).value
    assert len(dictionary) == 1024
    assert "peer 0" not in dictionary  # the one that expires first makes room
    assert storage.maxsize == hardening.MAX_STORED_KEYS
    assert DictionaryDHTValue(10**9).maxsize == 1024
    assert DHTLocalStorage(3).maxsize == 3


class Gate:
    """Admits one value, and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []

    def admit(self, *arguments: Any) -> None:
        self.asked.append(arguments)
        if arguments[2] != b"good":
            raise RecordRefused("refused")


@pytest.mark.parametrize(
    ("accepted", "subkey", "value"),
    [
        (True, "peer", b"good"),
        (False, "peer", b"bad"),
        (False, "peer", "good"),
        (False, b"peer", b"good"),
        (False, None, b"good"),
        (False, ["peer"], b"good"),
        (False, "peer", [b"good"]),
    ],
)
def test_only_records_are_valid(accepted: bool, subkey: object, value: object) -> None:
    from hivemind.dht.validation import DHTRecord

    gate: Any = Gate()
    validator = hardening.signed_record_validator(gate, lambda: 5.0)
    record = DHTRecord(b"k" * 20, msgpack.packb(subkey), msgpack.packb(value), FAR)
    assert validator.validate(record) is accepted
    if accepted:
        assert gate.asked == [(b"k" * 20, "peer", b"good", FAR, 5.0)]


@pytest.mark.parametrize("damaged", [b"", b"\xc1", b"\xa4peer\x00", bytes(5000)])
def test_a_damaged_subkey_or_value_is_invalid(damaged: bytes) -> None:
    from hivemind.dht.validation import DHTRecord

    gate: Any = Gate()
    validator = hardening.signed_record_validator(gate, lambda: 5.0)
    good_subkey, good_value = msgpack.packb("peer"), msgpack.packb(b"good")
    assert not validator.validate(DHTRecord(b"k", damaged, good_value, FAR))
    assert not validator.validate(DHTRecord(b"k", good_subkey, damaged, FAR))
    # hivemind's mark of a value without a subkey
    assert not validator.validate(DHTRecord(b"k", msgpack.packb(None), good_value, FAR))


def test_requests_with_too_many_keys_are_refused() -> None:
    from hivemind.proto import dht_pb2

    bounds = member_calls.call_guard(None)

    async def allowed(request: Any) -> bool:
        return bool(await bounds.validate_request(request))

    async def main() -> None:
        assert await allowed(dht_pb2.FindRequest(keys=[b"k"] * 64))
        assert not await allowed(dht_pb2.FindRequest(keys=[b"k"] * 65))
        assert await allowed(dht_pb2.StoreRequest(keys=[b"k"] * 1024))
        assert not await allowed(dht_pb2.StoreRequest(keys=[b"k"] * 1025))
        assert await allowed(dht_pb2.PingRequest())
        assert not await bounds.validate_response(None, None)

    asyncio.run(main())


@pytest.mark.parametrize("claimed", [math.inf, math.nan, FAR * 10])
def test_the_expiry_of_an_answer_follows_from_its_entries(claimed: float) -> None:
    from hivemind.dht.storage import DictionaryDHTValue
    from hivemind.utils.timed_storage import ValueWithExpiration

    full, empty = DictionaryDHTValue(), DictionaryDHTValue()
    full.store("peer", b"", FAR)
    answer: dict[str, Any] = {
        "full": (ValueWithExpiration(full, claimed), {}),
        "empty": (ValueWithExpiration(empty, claimed), {}),
        "bytes": (ValueWithExpiration(b"", claimed), {}),
        "none": (None, {}),
    }

    class Protocol:
        async def call_find(self, peer: Any, keys: Any) -> Any:
            return answer if keys else None

    class Node:
        protocol = Protocol()

    hardening.harden_node(Node)
    found = asyncio.run(Node.protocol.call_find("peer", ["x"]))
    assert found["full"][0].expiration_time == FAR
    assert [found[key][0] for key in ("empty", "bytes", "none")] == [None, None, None]
    assert asyncio.run(Node.protocol.call_find("peer", [])) is None
