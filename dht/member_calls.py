"""Certificates in the DHT's own calls, and a bound on what one call may ask for.

hivemind has a place for credentials in each request and response of its DHT (`auth`), and an
`authorizer` that fills and judges them. But that sees a message only, not from whom it came, and a
certificate counts for the peer alone that the transport has proved. So requests are judged where
the caller's id is known, in the handlers of its protocol, and responses by an authorizer for each
peer that is called.
"""

from __future__ import annotations

import functools
from typing import Any, Final

from glasshive.dht.hardening import too_many_keys
from glasshive.dht.member_gate import MemberGate
from glasshive.security.errors import NotAMember
from glasshive.security.keys import PeerId
from glasshive.security.membership import Act

__all__ = ["call_guard", "patch_calls"]

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
