"""Invites to a private swarm, and what a joiner and a member say to the issuer.

An **invite** is one word that a person pastes: ``glasshive1`` and then base32 in lower case of

    length (2 bytes, big endian) + check (4 bytes of SHA-256) + msgpack [swarm, envelope]

The envelope, of kind ``invite``, is from the issuer to everyone; its request id is the invite's id
and its body `[1, role, addresses, issuers, whitelist root, secret]`. Length and check only tell a
cut-off or mistyped token from a wrong one. Whoever holds a token may join by it, so it is a secret.

Requests, each an envelope to the issuer that lives `REQUEST_SECONDS`, answered by a certificate:

- ``join``: `[1, invite id, proof]`. The proof is HMAC-SHA256 with the invite's secret over the
  request id, the invite's id and both keys, so the secret never travels, and a proof that was
  overheard is of no use to another key.
- ``renew``: `[1, certificate]`, signed by the member that it is of.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
from dataclasses import dataclass, field
from typing import Final

from glasshive.security.envelope import PUBLIC_SWARM, Envelope, open_envelope, seal
from glasshive.security.errors import (
    BadEnvelope,
    BadInvite,
    BadPeerId,
    EnvelopeExpired,
    InviteRefused,
    MalformedData,
    NotAMember,
    SecurityError,
)
from glasshive.security.keys import Identity, PeerId, peer_id_of, public_key_of
from glasshive.security.membership import (
    DAY_SECONDS,
    ID_BYTES,
    MAX_CERTIFICATE_BYTES,
    MAX_ISSUERS,
    Certificate,
    Role,
    role_of,
)
from glasshive.security.plain import Plain, decode_plain, encode_plain

__all__ = ["Invite", "join_request", "open_join", "open_renew", "renew_request"]

MAX_INVITE_SECONDS: Final = 30 * DAY_SECONDS
USUAL_INVITE_SECONDS: Final = 7 * DAY_SECONDS
REQUEST_SECONDS: Final = 120.0
SECRET_BYTES: Final = 16
MAX_ADDRESSES: Final = 8

_PREFIX: Final = "glasshive1"  # like bech32's: the alphabet after it has no 1
_INVITE: Final = "invite"
_JOIN: Final = "join"
_RENEW: Final = "renew"
_VERSION: Final = 1
_HEAD_BYTES: Final = 6
_MAX_INVITE_BYTES: Final = 4096
MAX_REQUEST_BYTES: Final = 1024
_MAX_TEXT: Final = 16_384
_SWARM: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_ADDRESS: Final = re.compile(r"/[A-Za-z0-9./:_-]{1,199}")
_NOT_BASE32: Final = re.compile(r"[^a-z2-7]")


@dataclass(frozen=True, slots=True)
class Invite:
    """What a token says: how to find a private swarm, whom to trust there, and how to get in.

    `invite_id` and `secret` have 16 bytes, `whitelist_root` is the SHA-256 of the root of its
    whitelist. The secret is in no repr. Making one with a field out of range raises BadInvite.
    """

    swarm: str
    issuer: PeerId
    invite_id: bytes
    role: Role
    addresses: tuple[str, ...]
    issuers: tuple[PeerId, ...]
    whitelist_root: bytes
    expires_at_seconds: float
    secret: bytes = field(repr=False)

    def __post_init__(self) -> None:
        _check(self)

    def token(self, identity: Identity) -> str:
        """The word to hand to who shall join; raises BadInvite if `identity` isn't its issuer."""
        if identity.peer_id != self.issuer:
            raise BadInvite(
                f"the invite is by {self.issuer}, the identity is {identity.peer_id}; "
                "an issuer signs its own only"
            )
        envelope = seal(
            identity,
            kind=_INVITE,
            swarm=self.swarm,
            receiver=None,
            request_id=self.invite_id,
            expires_at_seconds=self.expires_at_seconds,
            body=encode_plain(
                [
                    _VERSION,
                    self.role.value,
                    self.addresses,
                    [public_key_of(one) for one in self.issuers],
                    self.whitelist_root,
                    self.secret,
                ]
            ),
        )
        return _worded(encode_plain([self.swarm, envelope]))

    @classmethod
    def parse(cls, text: str, now: float) -> Invite:
        """The invite that `text` holds; white space in it, as mail puts it, doesn't matter.

        Raises BadInvite for what is none, InviteRefused for one that has expired at `now`. No text
        of an error holds any of the token.
        """
        data = _unworded(text)
        try:
            match decode_plain(data, max_bytes=_MAX_INVITE_BYTES, max_depth=1, max_elements=2):
                case [str(swarm), bytes(envelope)]:
                    pass
                case _:
                    raise MalformedData("wanted a swarm and a signed invite")
            opened = open_envelope(
                envelope,
                kind=_INVITE,
                swarm=swarm,
                clock=lambda: now,
                max_bytes=_MAX_INVITE_BYTES,
                max_lifetime_seconds=MAX_INVITE_SECONDS,
            )
            return _invite(opened)
        except EnvelopeExpired as error:
            raise InviteRefused(str(error)) from None
        except BadInvite:
            raise
        except SecurityError as error:
            raise BadInvite(
                f"the token is no invite that its issuer signed: {error}; ask for a new one"
            ) from None

    def check_certificate(self, data: bytes, peer_id: PeerId, now: float) -> Certificate:
        """The issuer's answer to a request to join, if it is what was asked for.

        It is a certificate for `peer_id` that came from this invite, with its role. Raises
        NotAMember.
        """
        found = Certificate.verify(
            data, peer_id=peer_id, swarm=self.swarm, issuers=(self.issuer,), now=now
        )
        if found.invite != self.invite_id or found.role is not self.role:
            raise NotAMember(
                f"got a certificate as {found.role} of the invite {found.invite.hex() or 'none'}, "
                f"wanted one as {self.role} of the invite {self.invite_id.hex()}; join again"
            )
        return found


def join_request(invite: Invite, identity: Identity, *, request_id: bytes, now: float) -> bytes:
    """What `identity` sends to the issuer of `invite`; a new `request_id` of 16 bytes each time."""
    proof = join_proof(invite.secret, request_id, invite.invite_id, identity.peer_id, invite.issuer)
    return seal(
        identity,
        kind=_JOIN,
        swarm=invite.swarm,
        receiver=invite.issuer,
        request_id=request_id,
        expires_at_seconds=now + REQUEST_SECONDS,
        body=encode_plain([_VERSION, invite.invite_id, proof]),
    )


def renew_request(
    certificate: bytes,
    identity: Identity,
    *,
    swarm: str,
    issuer: PeerId,
    request_id: bytes,
    now: float,
) -> bytes:
    """What a member sends to the issuer of its `certificate` before that ends."""
    return seal(
        identity,
        kind=_RENEW,
        swarm=swarm,
        receiver=issuer,
        request_id=request_id,
        expires_at_seconds=now + REQUEST_SECONDS,
        body=encode_plain([_VERSION, certificate]),
    )


def open_join(
    data: bytes, *, swarm: str, issuer: PeerId, now: float
) -> tuple[Envelope, bytes, bytes]:
    """(envelope, invite id, proof) of a request to join; the proof and replay are not checked yet.

    Raises BadEnvelope, BadSignature, WrongSwarm, WrongReceiver or EnvelopeExpired.
    """
    envelope, fields = _open_request(data, _JOIN, 3, swarm=swarm, issuer=issuer, now=now)
    match fields:
        case [_, bytes(invite_id), bytes(proof)]:
            return envelope, invite_id, proof
    raise BadEnvelope("the request to join doesn't name an invite and a proof")


def open_renew(data: bytes, *, swarm: str, issuer: PeerId, now: float) -> tuple[Envelope, bytes]:
    """(envelope, certificate) of a request to renew; the certificate is not checked yet.

    Raises as `open_join`.
    """
    envelope, fields = _open_request(data, _RENEW, 2, swarm=swarm, issuer=issuer, now=now)
    match fields:
        case [_, bytes(certificate)]:
            return envelope, certificate
    raise BadEnvelope("the request to renew holds no certificate")


def join_proof(
    secret: bytes, request_id: bytes, invite_id: bytes, joiner: PeerId, issuer: PeerId
) -> bytes:
    """What only who knows the secret can say, for this request of this joiner."""
    parts = (b"glasshive join 1", request_id, invite_id)
    keys = public_key_of(joiner) + public_key_of(issuer)
    said = b"".join(len(part).to_bytes(1, "big") + part for part in parts) + keys
    return hmac.digest(secret, said, "sha256")


def _open_request(
    data: bytes, kind: str, n_fields: int, *, swarm: str, issuer: PeerId, now: float
) -> tuple[Envelope, list[Plain]]:
    envelope = open_envelope(
        data,
        kind=kind,
        swarm=swarm,
        receiver=issuer,
        clock=lambda: now,
        max_bytes=MAX_REQUEST_BYTES,
        max_lifetime_seconds=REQUEST_SECONDS,
    )
    if len(envelope.request_id) != ID_BYTES:
        raise BadEnvelope(
            f"the id of a request to {kind} has {len(envelope.request_id)} bytes, wanted {ID_BYTES}"
        )
    try:
        fields = decode_plain(
            envelope.body,
            max_bytes=MAX_CERTIFICATE_BYTES + 64,
            max_depth=1,
            max_elements=n_fields,
        )
    except MalformedData as error:
        raise BadEnvelope(f"the request to {kind} can't be read: {error}") from None
    if not isinstance(fields, list) or len(fields) != n_fields:
        raise BadEnvelope(f"the request to {kind} is not an array of {n_fields}")
    if type(fields[0]) is not int or fields[0] != _VERSION:
        raise BadEnvelope(
            f"not a request to {kind} of version {_VERSION}; one side needs another release"
        )
    return envelope, fields


def _invite(envelope: Envelope) -> Invite:
    """The invite that a verified envelope holds; raises BadInvite or another SecurityError."""
    fields = decode_plain(
        envelope.body,
        max_bytes=_MAX_INVITE_BYTES,
        max_depth=2,
        max_elements=6 + MAX_ADDRESSES + MAX_ISSUERS,
    )
    match fields:
        case [int(version), role, list(addresses), list(issuers), bytes(root), bytes(secret)] if (
            type(version) is int and version == _VERSION
        ):
            return Invite(
                swarm=envelope.swarm,
                issuer=envelope.sender,
                invite_id=envelope.request_id,
                role=role_of(role),
                addresses=tuple(_address(one) for one in addresses),
                issuers=tuple(_issuer(one) for one in issuers),
                whitelist_root=root,
                expires_at_seconds=envelope.expires_at_seconds,
                secret=secret,
            )
    raise BadInvite(
        f"not an invite of version {_VERSION}; one side needs another release of glasshive"
    )


def _address(value: object) -> str:
    if type(value) is not str:
        raise BadInvite("an address of the invite is not text; ask for a new one")
    return value


def _issuer(value: object) -> PeerId:
    if type(value) is not bytes:
        raise BadInvite("an issuer of the invite is not a key; ask for a new one")
    return peer_id_of(value)


def _check(invite: Invite) -> None:
    """Raises BadInvite for any field out of range; never shows the secret."""
    if not _SWARM.fullmatch(invite.swarm) or invite.swarm == PUBLIC_SWARM:
        raise BadInvite(
            f"the name of a private swarm is 1 to 64 letters, digits and ._-, and not "
            f"{PUBLIC_SWARM!r}, which needs no invite; choose another"
        )
    if len(invite.invite_id) != ID_BYTES or len(invite.secret) != SECRET_BYTES:
        raise BadInvite(f"the id and the secret of an invite have {ID_BYTES} bytes each")
    if len(invite.whitelist_root) != hashlib.sha256().digest_size:
        raise BadInvite("the fingerprint of the whitelist's root is not a SHA-256 of 32 bytes")
    if not 0 < len(invite.addresses) <= MAX_ADDRESSES:
        raise BadInvite(
            f"the invite names {len(invite.addresses)} addresses, wanted 1 to {MAX_ADDRESSES} "
            "of bootstrap peers"
        )
    if not all(_ADDRESS.fullmatch(one) for one in invite.addresses):
        raise BadInvite(
            "an address of the invite is no multiaddr such as /ip4/192.0.2.7/tcp/31330/p2p/12D3KooW"
        )
    if len(invite.issuers) > MAX_ISSUERS or invite.issuer not in invite.issuers:
        raise BadInvite(
            f"the invite names {len(invite.issuers)} issuers, wanted at most {MAX_ISSUERS} and "
            "among them who signed it"
        )
    try:
        for one in invite.issuers:
            public_key_of(one)
    except BadPeerId as error:
        raise BadInvite(f"an issuer of the invite: {error}") from None


def _worded(data: bytes) -> str:
    if len(data) > _MAX_INVITE_BYTES:
        raise BadInvite(
            f"the invite has {len(data)} bytes, at most {_MAX_INVITE_BYTES}; name fewer addresses"
        )
    whole = len(data).to_bytes(2, "big") + _sum(data) + data
    return _PREFIX + base64.b32encode(whole).decode().rstrip("=").lower()


def _unworded(text: str) -> bytes:
    """The bytes that a token stands for; raises BadInvite, and never quotes the token."""
    if len(text) > _MAX_TEXT:
        raise BadInvite(
            f"got {len(text)} characters, an invite has at most {_MAX_TEXT}; paste the token only"
        )
    word = "".join(text.split()).lower()
    if not word.startswith(_PREFIX):
        raise BadInvite(
            f"this is no invite: one is a long word that begins with {_PREFIX}; paste all of it"
        )
    digits = word[len(_PREFIX) :]
    odd = _NOT_BASE32.search(digits)
    if odd is not None:
        raise BadInvite(
            f"the token is mistyped: character {len(_PREFIX) + odd.start() + 1} can't be in one, "
            "which has only letters and the digits 2 to 7 there; copy it again"
        )
    wanted = _wanted_digits(digits)
    if wanted is None or len(digits) < wanted:
        raise BadInvite(
            f"the token is cut off: got {len(word)} characters, wanted "
            f"{'more' if wanted is None else len(_PREFIX) + wanted}; copy all of it"
        )
    try:
        whole = base64.b32decode(digits.upper() + "=" * (-len(digits) % 8))
    except binascii.Error:
        whole = b""
    data = whole[_HEAD_BYTES:]
    if len(digits) != wanted or _worded(data) != word:
        raise BadInvite("the token is mistyped: its check doesn't fit the rest; copy it again")
    return data


def _wanted_digits(digits: str) -> int | None:
    """How many digits the token says that it has, or None if not even that is there."""
    if len(digits) < 8:
        return None
    length = int.from_bytes(base64.b32decode(digits[:8].upper())[:2], "big")
    return -(-8 * (_HEAD_BYTES + length) // 5)


def _sum(data: bytes) -> bytes:
    return hashlib.sha256(b"glasshive invite 1" + data).digest()[: _HEAD_BYTES - 2]
