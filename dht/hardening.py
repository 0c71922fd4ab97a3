"""What a hivemind DHT node needs before strangers may talk to it.

Besides the serializer (`glasshive.dht.serializer`) these are the gaps of hivemind 1.1.12 that let
one hostile message do lasting harm, found by reading its source:

1. Storing an *older* value under a key that has a newer one is refused, but first moves the key's
   place in the expiry heap, so the newer value is dropped when the older one would have expired.
   Anybody can replay an old signed record to that end, and honest replication does it by accident.
2. A find answer carries an expiry of its own that nothing checks: infinity ends the search at the
   first answer, and would be cached for ever. We take it from the entries instead, and keep no
   cache.
3. The stores have no bound on keys or on entries under a key.
4. Storing the *same* value again is refused too. A store that reaches a peer by two ways is told
   the later answer, so a record that was taken looked refused.
5. One find or store request may name as many keys as fit in 4 MiB, each answered at length
   (`glasshive.dht.member_calls` asks `too_many_keys`).
"""

from __future__ import annotations

from typing import Any, Final

from glasshive.dht.errors import RecordRefused
from glasshive.dht.records import RecordGate
from glasshive.dht.serializer import MAX_DICTIONARY_ENTRIES
from glasshive.security.errors import MalformedData
from glasshive.security.plain import decode_plain

__all__ = ["harden_node", "patch_storage", "signed_record_validator", "too_many_keys"]

MAX_STORED_KEYS: Final = 65_536
MAX_KEYS_PER_FIND: Final = 64
MAX_KEYS_PER_STORE: Final = 1024
_MAX_VALUE_BYTES: Final = 4096


def patch_storage() -> None:
    """hivemind's timed storages keep the newer value (1, 4), bounded (3). May be repeated."""
    from hivemind.dht.storage import DictionaryDHTValue
    from hivemind.utils.timed_storage import TimedStorage

    if "_glasshive" in TimedStorage.__dict__:
        return
    stock_store = TimedStorage.store
    stock_init = TimedStorage.__init__

    def store(self: Any, key: Any, value: Any, expiration_time: float) -> bool:
        known = self.data.get(key)
        if known is not None and known.expiration_time >= expiration_time:
            # It is there already if it came by two ways, and its sender is told the last answer.
            return bool(known.expiration_time == expiration_time and known.value == value)
        return bool(stock_store(self, key, value, expiration_time))

    def init(self: Any, maxsize: int | None = None) -> None:
        limit = MAX_DICTIONARY_ENTRIES if isinstance(self, DictionaryDHTValue) else MAX_STORED_KEYS
        stock_init(self, min(maxsize or limit, limit))

    TimedStorage.store = store
    TimedStorage.__init__ = init
    TimedStorage._glasshive = True


def signed_record_validator(gate: RecordGate, now: Any) -> Any:
    """A hivemind RecordValidatorBase that admits what `gate` admits, and nothing else."""
    from hivemind.dht.validation import DHTRecord, RecordValidatorBase

    class SignedRecordValidator(RecordValidatorBase):  # type: ignore[misc]
        def validate(self, record: DHTRecord) -> bool:
            try:
                subkey = decode_plain(record.subkey, max_bytes=_MAX_VALUE_BYTES, max_elements=0)
                value = decode_plain(record.value, max_bytes=_MAX_VALUE_BYTES, max_elements=0)
                if type(subkey) is not str or type(value) is not bytes:
                    return False
                gate.admit(record.key, subkey, value, record.expiration_time, now())
            except (MalformedData, RecordRefused):
                return False
            return True

    return SignedRecordValidator()


def too_many_keys(request: Any) -> bool:
    """Whether a request of the DHT names more keys than one is answered for (5)."""
    limits = {"FindRequest": MAX_KEYS_PER_FIND, "StoreRequest": MAX_KEYS_PER_STORE}
    limit = limits.get(request.DESCRIPTOR.name)
    return limit is not None and len(request.keys) > limit


def harden_node(node: Any) -> None:
    """The node's find takes expiries from the signed entries only (2)."""
    from hivemind.dht.storage import DictionaryDHTValue
    from hivemind.utils.timed_storage import ValueWithExpiration

    protocol = node.protocol
    stock_find = protocol.call_find

    async def call_find(peer: Any, keys: Any) -> Any:
        found = await stock_find(peer, keys)
        if not found:
            return found
        for key, (item, nearest) in list(found.items()):
            if item is None:
                continue
            if not isinstance(item.value, DictionaryDHTValue) or not item.value.data:
                found[key] = None, nearest
            else:
                latest = item.value.latest_expiration_time
                found[key] = ValueWithExpiration(item.value, latest), nearest
        return found

    protocol.call_find = call_find
