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


def test_others_run_between_the_records_of_a_store() -> None:
    hardening.patch_storage()
    member_calls.patch_calls()
    from hivemind.dht.protocol import DHTProtocol
    from hivemind.dht.routing import DHTID
    from hivemind.dht.storage import DHTLocalStorage, DictionaryDHTValue
    from hivemind.proto import dht_pb2

    class Node:
        IS_DICTIONARY = DHTProtocol.IS_DICTIONARY
        IS_REGULAR_VALUE = DHTProtocol.IS_REGULAR_VALUE
        serializer = DHTProtocol.serializer
        authorizer = None
        node_info = dht_pb2.NodeInfo(node_id=b"n")

        def __init__(self) -> None:
            self.storage, self.cache = DHTLocalStorage(), DHTLocalStorage()
            self.pinged = 0

        async def rpc_ping(self, request: Any, context: Any) -> None:
            self.pinged += request.peer.node_id == b"caller"

        def _validate_record(self, key: bytes, subkey: bytes, value: bytes, expiry: float) -> bool:
            return value == b"good"

    def store(*records: tuple[bytes, bytes]) -> Any:
        return dht_pb2.StoreRequest(
            keys=[DHTID(7).to_bytes()] * len(records),
            subkeys=[subkey for subkey, _ in records],
            values=[value for _, value in records],
            expiration_time=[FAR] * len(records),
            in_cache=[False] * len(records),
            peer=dht_pb2.NodeInfo(node_id=b"caller"),
        )

    async def main() -> None:
        node, passed, name = Node(), 0, Node.serializer.dumps

        async def others() -> None:
            nonlocal passed
            while True:
                await asyncio.sleep(0)
                passed += 1

        beside = asyncio.create_task(others())
        single = [(name(f"{i}"), b"good" if i % 2 else b"bad") for i in range(100)]
        answer = await DHTProtocol.rpc_store(node, store(*single), None)
        assert list(answer.store_ok) == [False, True] * 50
        assert passed > 90
        whole = DictionaryDHTValue()
        for i in range(200):
            whole.store(f"of {i}", b"bad" if i == 9 else b"good", FAR)
        together = store((Node.IS_DICTIONARY, Node.serializer.dumps(whole)), (name("x"), b"good"))
        answer = await DHTProtocol.rpc_store(node, together, None)
        assert list(answer.store_ok) == [False, True]
        assert passed > 290
        beside.cancel()
        kept = node.storage.get(DHTID(7)).value
        assert len(kept) == 50 + 199 + 1
        assert kept.get("1") == (b"good", FAR)
        assert kept.get("of 9") is None
        assert node.pinged == 2
        assert answer.peer.node_id == b"n"
        no_subkey = store((Node.IS_REGULAR_VALUE, b"good"))
        assert list((await DHTProtocol.rpc_store(node, no_subkey, None)).store_ok) == [False]
        many = [
            asyncio.create_task(DHTProtocol.rpc_store(node, store(*single), None))
            for _ in range(member_calls.MAX_STORES + 1)
        ]
        *judged, refused = await asyncio.gather(*many, return_exceptions=True)
        assert "64 stores are being judged here" in str(refused)
        assert all(len(one.store_ok) == 100 for one in judged)
        assert len((await DHTProtocol.rpc_store(node, store(*single), None)).store_ok) == 100
        together.in_cache.append(False)
        with pytest.raises(RecordRefused, match="not of one length"):
            await DHTProtocol.rpc_store(node, together, None)
        with pytest.raises(RecordRefused, match="dictionary that is none"):
            await DHTProtocol.rpc_store(node, store((Node.IS_DICTIONARY, name(5))), None)

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
