"""Invites to a swarm called lab, and requests by them, for the tests of membership."""

from __future__ import annotations

import hashlib
from typing import Any

from glasshive.security.invites import Invite, join_request, renew_request
from glasshive.security.keys import Identity
from glasshive.security.membership import Role

ISSUER, SECOND, ALICE, BOB, EVE = (Identity(bytes([number]) * 32) for number in range(1, 6))
NOW = 1_700_000_000.0
HOUR, DAY = 3600.0, 86_400.0
ADDRESSES = (
    f"/ip4/192.0.2.7/tcp/31330/p2p/{EVE.peer_id}",
    "/dns4/hive.example.org/tcp/31330",
)
SECRET = b"the secret of 16"


def invite_of(**changes: Any) -> Invite:
    fields: dict[str, Any] = {
        "swarm": "lab",
        "issuer": ISSUER.peer_id,
        "invite_id": b"i" * 16,
        "role": Role.HOST,
        "addresses": ADDRESSES,
        "issuers": (ISSUER.peer_id, SECOND.peer_id),
        "whitelist_root": hashlib.sha256(b"root").digest(),
        "expires_at_seconds": NOW + DAY,
        "secret": SECRET,
    }
    return Invite(**(fields | changes))


def join_of(invite: Invite, identity: Identity = ALICE, number: int = 1, **at: float) -> bytes:
    return join_request(
        invite, identity, request_id=number.to_bytes(16, "big"), now=at.get("now", NOW)
    )


def renew_of(certificate: bytes, identity: Identity = ALICE, number: int = 1, **at: float) -> bytes:
    return renew_request(
        certificate,
        identity,
        swarm="lab",
        issuer=ISSUER.peer_id,
        request_id=number.to_bytes(16, "big"),
        now=at.get("now", NOW),
    )
