"""What an issuer's book holds, and the bytes of its file.

The file is one msgpack array, in whole milliseconds and with keys as their 32 bytes::

    [2, swarm, issuer, version of the revocations, invites, members,
     revoked peers, revoked serials, revoked invites, requests seen]

Those of an invite and of a member end with the three numbers of a quota.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from glasshive.security.envelope import Envelope
from glasshive.security.keys import PeerId, peer_id_of, public_key_of
from glasshive.security.membership import Role, role_of
from glasshive.security.plain import decode_plain, encode_plain
from glasshive.security.quota import NO_QUOTA, Quota, quota_of

__all__ = ["MAX_STATE_BYTES", "BookState", "Member", "OpenInvite", "decode_state", "encode_state"]

MAX_STATE_BYTES: Final = 4 * 1024 * 1024

_VERSION: Final = 2
_MAX_STATE_ELEMENTS: Final = 262_144


@dataclass(frozen=True, slots=True)
class Member:
    """A peer and its newest certificate from one invite (`invite` is empty: without one)."""

    peer_id: PeerId
    role: Role
    since_seconds: float
    until_seconds: float
    invite: bytes
    quota: Quota = NO_QUOTA
    revoked: bool = False


@dataclass(frozen=True, slots=True)
class OpenInvite:
    """An invite that may still be joined by."""

    role: Role
    uses: int
    expires_at_seconds: float
    secret: bytes = field(repr=False)
    quota: Quota = NO_QUOTA


@dataclass(frozen=True, slots=True)
class BookState:
    """What the file says: members are by peer and invite. Nothing is changed in place."""

    version: int
    invites: Mapping[bytes, OpenInvite]
    members: Mapping[tuple[PeerId, bytes], Member]
    revoked_peers: Mapping[PeerId, float]
    revoked_serials: Mapping[bytes, float]
    revoked_invites: Mapping[bytes, float]
    seen: tuple[Envelope, ...]

    def used(self, invite_id: bytes) -> int:
        """How many keys have joined by the invite."""
        return sum(invite == invite_id for _, invite in self.members)


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)


def encode_state(book: BookState, swarm: str, issuer: PeerId) -> bytes:
    """The bytes of the file."""
    return encode_plain(
        [
            _VERSION,
            swarm,
            public_key_of(issuer),
            book.version,
            [
                [
                    invite_id,
                    one.role.value,
                    one.uses,
                    _milliseconds(one.expires_at_seconds),
                    one.secret,
                    *one.quota.numbers,
                ]
                for invite_id, one in book.invites.items()
            ],
            [
                [
                    public_key_of(one.peer_id),
                    one.role.value,
                    _milliseconds(one.since_seconds),
                    _milliseconds(one.until_seconds),
                    one.invite,
                    *one.quota.numbers,
                ]
                for one in book.members.values()
            ],
            [[public_key_of(one), _milliseconds(at)] for one, at in book.revoked_peers.items()],
            [[one, _milliseconds(at)] for one, at in book.revoked_serials.items()],
            [[one, _milliseconds(at)] for one, at in book.revoked_invites.items()],
            [
                [one.kind, public_key_of(one.sender), one.request_id, one.expires_at_milliseconds]
                for one in book.seen
            ],
        ]
    )


def decode_state(data: bytes, swarm: str, issuer: PeerId) -> BookState:
    """Raises a SecurityError, ValueError or TypeError for what `encode_state` didn't write."""
    fields = decode_plain(
        data, max_bytes=MAX_STATE_BYTES, max_depth=3, max_elements=_MAX_STATE_ELEMENTS
    )
    match fields:
        case [
            int(layout),
            str(its_swarm),
            bytes(its_issuer),
            int(version),
            list(invites),
            list(members),
            list(peers),
            list(serials),
            list(revoked_invites),
            list(seen),
        ]:
            pass
        case _:
            raise ValueError("it is cut off or damaged")
    if layout != _VERSION:
        raise ValueError("it is of another release of glasshive")
    if its_swarm != swarm or peer_id_of(its_issuer) != issuer:
        raise ValueError(f"it is of {peer_id_of(its_issuer)} for swarm {its_swarm[:64]!r}")
    return BookState(
        version=version,
        invites=dict(map(_invite_row, invites)),
        members={(one.peer_id, one.invite): one for one in map(_member_row, members)},
        revoked_peers={peer_id_of(key): at for key, at in map(_revoked_row, peers)},
        revoked_serials=dict(map(_revoked_row, serials)),
        revoked_invites=dict(map(_revoked_row, revoked_invites)),
        seen=tuple(_seen_row(one, swarm, issuer) for one in seen),
    )


def _invite_row(row: object) -> tuple[bytes, OpenInvite]:
    match row:
        case [bytes(invite_id), role, int(uses), int(expires), bytes(secret), *quota]:
            return invite_id, OpenInvite(
                role_of(role), uses, expires / 1000, secret, quota_of(quota)
            )
    raise ValueError("an invite in it is damaged")


def _member_row(row: object) -> Member:
    match row:
        case [bytes(key), role, int(since), int(until), bytes(invite), *quota]:
            return Member(
                peer_id_of(key),
                role_of(role),
                since / 1000,
                until / 1000,
                invite,
                quota_of(quota),
            )
    raise ValueError("a member in it is damaged")


def _revoked_row(row: object) -> tuple[bytes, float]:
    match row:
        case [bytes(one), int(at)]:
            return one, at / 1000
    raise ValueError("a revocation in it is damaged")


def _seen_row(row: object, swarm: str, issuer: PeerId) -> Envelope:
    match row:
        case [str(kind), bytes(key), bytes(request_id), int(expires)]:
            return Envelope(kind, swarm, peer_id_of(key), issuer, request_id, expires, b"")
    raise ValueError("a request in it is damaged")
