"""Certificates in the DHT's own calls, and bounds on what one call may ask for at a time.

hivemind has a place for credentials in each request and response of its DHT (`auth`), and an
`authorizer` that fills and judges them. But that sees a message only, not from whom it came, and a
certificate counts for the peer alone that the transport has proved. So requests are judged where
the caller's id is known, in the handlers of its protocol, and responses by an authorizer for each
peer that is called.

A store of a thousand records, each with a signature to verify, would have the loop to itself for a
tenth of a second and more. So they are judged one by one, and whatever else waits runs between.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Iterator
from typing import Any, Final

from glasshive.dht.errors import RecordRefused
from glasshive.dht.hardening import too_many_keys
from glasshive.dht.member_gate import MemberGate
from glasshive.security.errors import NotAMember
from glasshive.security.keys import PeerId
from glasshive.security.membership import Act

__all__ = ["call_guard", "patch_calls"]

MAX_STORES: Final = 64  # of one node at a time, each with up to 4 MiB of records
_RECORD_FIELDS: Final = ("keys", "subkeys", "values", "expiration_time", "in_cache")
_ACTS: Final = {"rpc_ping": Act.READ, "rpc_find": Act.READ, "rpc_store": Act.ANNOUNCE}


def call_guard(gate: MemberGate | None) -> Any:
    """A hivemind AuthorizerBase for a node; with a gate it calls and answers members only.

    Needs `patch_calls`.
    """
    from hivemind.utils.auth import AuthorizerBase

    class CallGuard(AuthorizerBase):  # type: ignore[misc]
        def __init__(self, peer_id: PeerId | None = None) -> None:
            self.gate = gate
            self._peer_id = peer_id

        def toward(self, peer_id: PeerId) -> CallGuard:
            """The same for calls of one peer."""
            return CallGuard(peer_id)

        async def sign_request(self, request: Any, service_public_key: Any) -> None:
            if gate is not None:
                request.auth.client_access_token.signature = gate.certificate

        async def validate_request(self, request: Any) -> bool:
            return not too_many_keys(request)

        async def sign_response(self, response: Any, request: Any) -> None:
            if gate is not None:
                response.auth.service_access_token.signature = gate.certificate

        async def validate_response(self, response: Any, request: Any) -> bool:
            if response is None:
                return False
            if gate is not None:
                if self._peer_id is None:
                    return False
                certificate = response.auth.service_access_token.signature
                try:
                    gate.admit(self._peer_id, certificate, Act.SERVE)
                except NotAMember:
                    return False
            return True

    return CallGuard()


def patch_calls() -> None:
    """Have hivemind's DHT judge who calls, where a node has a `call_guard`. May be repeated."""
    from hivemind.dht.protocol import DHTProtocol

    if "_glasshive" in DHTProtocol.__dict__:
        return
    DHTProtocol.rpc_store = _one_by_one(DHTProtocol.rpc_store)
    for name, act in _ACTS.items():
        setattr(DHTProtocol, name, _judged(DHTProtocol.__dict__[name], act))
    stock_stub = DHTProtocol.get_stub

    def get_stub(self: Any, peer: Any) -> Any:
        stub = stock_stub(self, peer)
        toward = getattr(self.authorizer, "toward", None)
        if toward is not None:
            stub._authorizer = toward(PeerId(peer.to_base58()))
        return stub

    DHTProtocol.get_stub = get_stub
    DHTProtocol._glasshive = True


def _judged(stock: Any, act: Act) -> Any:
    """The handler of a call, which raises NotAMember for callers that `act` isn't permitted to."""

    @functools.wraps(stock)
    async def handler(self: Any, request: Any, context: Any) -> Any:
        gate: MemberGate | None = getattr(self.authorizer, "gate", None)
        if gate is not None:
            # hivemind's own ping inside of a find or store has no certificate; its caller has
            # shown one by then.
            caller = PeerId(context.remote_id.to_base58())
            gate.admit(caller, request.auth.client_access_token.signature, act)
        return await stock(self, request, context)

    return handler


def _one_by_one(stock: Any) -> Any:
    """The handler of a store, which gives the loop to others before it looks at a record."""
    from hivemind.dht.routing import DHTID

    @functools.wraps(stock)
    async def rpc_store(self: Any, request: Any, context: Any) -> Any:
        records = [getattr(request, name) for name in _RECORD_FIELDS]
        if len(set(map(len, records))) != 1:
            raise RecordRefused("a store request whose lists are not of one length")
        under_way = self.__dict__.setdefault("_glasshive_stores", [0])
        if under_way[0] >= MAX_STORES:
            raise RecordRefused(f"{MAX_STORES} stores are being judged here")
        under_way[0] += 1
        try:
            return await judged(self, request, records, context)
        finally:
            under_way[0] -= 1

    async def judged(self: Any, request: Any, records: list[Any], context: Any) -> Any:
        answer = await stock(self, type(request)(peer=request.peer), context)  # who called
        for key, subkey, value, expires_at, in_cache in zip(*records, strict=True):
            if subkey == self.IS_REGULAR_VALUE:  # whose a value without subkey is nobody knows
                answer.store_ok.append(False)
                continue
            storage = self.cache if in_cache else self.storage
            taken = []
            for entry in _entries(self, subkey, value, expires_at):
                await asyncio.sleep(0)
                taken.append(
                    self._validate_record(key, *entry)
                    and storage.store_subkey(
                        DHTID.from_bytes(key), self.serializer.loads(entry[0]), *entry[1:]
                    )
                )
            answer.store_ok.append(all(taken))
        return answer

    return rpc_store


def _entries(
    node: Any, subkey: bytes, value: bytes, expires_at: float
) -> Iterator[tuple[bytes, bytes, float]]:
    """(subkey, value, expiry) of a record, and of all those of a dictionary: a key passed on."""
    if subkey != node.IS_DICTIONARY:
        yield subkey, value, expires_at
        return
    from hivemind.dht.storage import DictionaryDHTValue

    dictionary = node.serializer.loads(value)
    if not isinstance(dictionary, DictionaryDHTValue):
        raise RecordRefused("a stored dictionary that is none")
    for name, entry in list(dictionary.items()):
        yield node.serializer.dumps(name), entry.value, entry.expiration_time
