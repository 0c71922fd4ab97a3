"""Membership of a private swarm: certificates, what they permit, and what takes them back.

Rules:

1. A certificate is an envelope of kind ``certificate`` from one of the swarm's *issuers* to one
   peer, whose id the transport proves; another peer can't present it. Its expiry is the
   envelope's, at most `MAX_CERTIFICATE_SECONDS` ahead; its serial is the envelope's request id.
2. Who is an issuer stands in the swarm's own configuration, never in a certificate: no chains.
3. A role permits a closed set of acts. What is not permitted is refused.
4. A list of revocations is an envelope of kind ``revocations`` from an issuer to everyone. Of each
   issuer the highest version ever seen is in force, also after a restart; a lower one is refused.
   Of several different lists under one version all are in force: removal wins ties.
5. Any issuer's list counts against every certificate: by its member, its issuer, its serial, or the
   invite that it came from. A removal never lapses, so a list has no expiry that a reader heeds.

Nothing here does IO: `Membership` is handed what was kept and what to keep by.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, final

from glasshive.security.envelope import CLOCK_SKEW_SECONDS, Envelope, open_envelope, seal
from glasshive.security.errors import (
    BadEnvelope,
    BadPeerId,
    MalformedData,
    MembershipRevoked,
    NotAMember,
    RoleRefused,
    SecurityError,
    StaleRevocations,
)
from glasshive.security.keys import Identity, PeerId, peer_id_of, public_key_of
from glasshive.security.plain import decode_plain, encode_plain
from glasshive.security.quota import NO_QUOTA, Quota, quota_of

__all__ = ["Act", "Certificate", "Membership", "Revocations", "Role", "merged"]

DAY_SECONDS: Final = 86_400.0
MAX_CERTIFICATE_SECONDS: Final = 7 * DAY_SECONDS
MAX_CERTIFICATE_BYTES: Final = 512
MAX_ISSUERS: Final = 8
MAX_REVOKED: Final = 4096
MAX_LIST_BYTES: Final = 192 * 1024
MAX_VERSION: Final = (1 << 53) - 1
ID_BYTES: Final = 16

_CERTIFICATE: Final = "certificate"
_REVOCATIONS: Final = "revocations"
_BEHIND_SECONDS: Final = 3600.0  # the clock of who judges; a new certificate lives for the maximum
_VERSION: Final = 1
_MAX_TIES: Final = 4
MAX_LISTS: Final = MAX_ISSUERS * _MAX_TIES
MAX_KEPT_BYTES: Final = MAX_LISTS * (MAX_LIST_BYTES + 80)
_FAR_SECONDS: Final = 253_402_300_799.0  # an envelope has an expiry; a removal has none


class Role(StrEnum):
    """What a member is."""

    HOST = "host"
    CLIENT = "client"
    ADMIN = "admin"


class Act(StrEnum):
    """What a member asks to do. Who answers a call or takes a stream serves."""

    READ = "read records"
    TRACE = "run traces"
    SERVE = "serve"
    ANNOUNCE = "announce a span"
    ADMINISTER = "administer the swarm"


_PERMITTED: Final[dict[Role, frozenset[Act]]] = {
    Role.CLIENT: frozenset({Act.READ, Act.TRACE}),
    Role.HOST: frozenset({Act.READ, Act.SERVE, Act.ANNOUNCE}),
    Role.ADMIN: frozenset(Act),
}

USUAL_CERTIFICATE_SECONDS: Final[dict[Role, float]] = {
    Role.HOST: 7 * DAY_SECONDS,
    Role.CLIENT: DAY_SECONDS,
    Role.ADMIN: DAY_SECONDS,
}


@dataclass(frozen=True, slots=True)
class Certificate:
    """An issuer's word that `member` belongs to `swarm` as `role`, until it expires.

    `serial` is its own 16 bytes; `invite` the 16 bytes of the invite that it came from, or empty.
    `quota` is what each host lets the member use. Making one with a field out of range raises
    BadEnvelope.
    """

    issuer: PeerId
    member: PeerId
    role: Role
    swarm: str
    serial: bytes
    invite: bytes
    expires_at_seconds: float
    quota: Quota = NO_QUOTA

    def __post_init__(self) -> None:
        try:
            public_key_of(self.issuer)
            public_key_of(self.member)
        except BadPeerId as error:
            raise BadEnvelope(f"a certificate by or for no peer: {error}") from None
        if type(self.role) is not Role:
            raise BadEnvelope(f"the role of a certificate is none of {', '.join(Role)}")
        if type(self.serial) is not bytes or len(self.serial) != ID_BYTES:
            raise BadEnvelope(f"the serial of a certificate is not {ID_BYTES} bytes")
        if type(self.invite) is not bytes or len(self.invite) not in (0, ID_BYTES):
            raise BadEnvelope(f"the invite of a certificate is not {ID_BYTES} bytes, nor empty")

    def sign(self, identity: Identity) -> bytes:
        """The certificate as its member presents it; raises BadEnvelope if it isn't the issuer."""
        if identity.peer_id != self.issuer:
            raise BadEnvelope(
                f"the certificate is by {self.issuer}, the identity is {identity.peer_id}; "
                "an issuer signs its own only"
            )
        return seal(
            identity,
            kind=_CERTIFICATE,
            swarm=self.swarm,
            receiver=self.member,
            request_id=self.serial,
            expires_at_seconds=self.expires_at_seconds,
            body=encode_plain([_VERSION, self.role.value, self.invite, *self.quota.numbers]),
        )

    @classmethod
    def verify(
        cls,
        data: bytes,
        *,
        peer_id: PeerId,
        swarm: str,
        issuers: Iterable[PeerId],
        now: float | None,
    ) -> Certificate:
        """The certificate in `data`, by one of `issuers`, for `peer_id`; raises NotAMember.

        It has not expired at `now` and isn't valid for longer than one may be, give or take the
        clocks' skew. `now=None` leaves the time to the caller (`check_time`).
        """
        if not data:
            raise NotAMember(
                f"{peer_id} showed no certificate of the private swarm {swarm!r}; "
                "join with an invite (`glasshive join TOKEN`)"
            )
        try:
            envelope = open_envelope(
                data,
                kind=_CERTIFICATE,
                swarm=swarm,
                receiver=peer_id,
                clock=None,
                max_bytes=MAX_CERTIFICATE_BYTES,
            )
            certificate = _certificate(envelope)
        except SecurityError as error:
            raise NotAMember(
                f"what {peer_id} showed is no certificate of its own for swarm {swarm!r}: {error}; "
                "join with an invite (`glasshive join TOKEN`)"
            ) from None
        if certificate.issuer not in issuers:
            raise NotAMember(
                f"the certificate of {peer_id} is by {certificate.issuer}, who is no issuer of "
                f"swarm {swarm!r} here; ask an issuer for an invite, or update the swarm's issuers"
            )
        if now is not None:
            certificate.check_time(now)
        return certificate

    def check_time(self, now: float) -> None:
        """Returns if the certificate holds at `now`; raises NotAMember."""
        left_seconds = self.expires_at_seconds - now
        if left_seconds < -CLOCK_SKEW_SECONDS:
            raise NotAMember(
                f"the certificate of {self.member} for swarm {self.swarm!r} expired "
                f"{-left_seconds:.0f} s ago; join again (certificates are renewed before they "
                "end), and check the clocks of both machines"
            )
        if left_seconds > MAX_CERTIFICATE_SECONDS + _BEHIND_SECONDS:
            raise NotAMember(
                f"the certificate of {self.member} for swarm {self.swarm!r} is valid for "
                f"{left_seconds:.0f} s more, at most {MAX_CERTIFICATE_SECONDS:.0f} s are accepted; "
                "check the clocks of both machines"
            )

    def permits(self, act: Act) -> bool:
        """Whether the role permits `act`."""
        return act in _PERMITTED[self.role]


@dataclass(frozen=True, slots=True)
class Revocations:
    """What one issuer took back: peers (members or issuers), serials and invites.

    At most `MAX_REVOKED` in all. Making one with a field out of range raises BadEnvelope.
    """

    issuer: PeerId
    swarm: str
    version: int
    peers: frozenset[PeerId] = frozenset()
    serials: frozenset[bytes] = frozenset()
    invites: frozenset[bytes] = frozenset()

    def __post_init__(self) -> None:
        if type(self.version) is not int or not 0 < self.version <= MAX_VERSION:
            raise BadEnvelope(f"the version of revocations is not 1 to {MAX_VERSION}")
        if len(self.peers) + len(self.serials) + len(self.invites) > MAX_REVOKED:
            raise BadEnvelope(f"a list of more than {MAX_REVOKED} revocations")
        for one in (*self.serials, *self.invites):
            if type(one) is not bytes or len(one) != ID_BYTES:
                raise BadEnvelope(f"a revoked serial or invite is not {ID_BYTES} bytes")

    def sign(self, identity: Identity) -> bytes:
        """The list as it is passed on; raises BadEnvelope if `identity` isn't its issuer."""
        if identity.peer_id != self.issuer:
            raise BadEnvelope(
                f"the revocations are by {self.issuer}, the identity is {identity.peer_id}; "
                "an issuer signs its own only"
            )
        body = [
            _VERSION,
            self.version,
            sorted(map(public_key_of, self.peers)),
            sorted(self.serials),
            sorted(self.invites),
        ]
        return seal(
            identity,
            kind=_REVOCATIONS,
            swarm=self.swarm,
            receiver=None,
            request_id=b"",
            expires_at_seconds=_FAR_SECONDS,
            body=encode_plain(body),
        )

    @classmethod
    def verify(cls, data: bytes, *, swarm: str, issuers: Iterable[PeerId]) -> Revocations:
        """The list in `data`, by one of `issuers`.

        Raises BadEnvelope, BadSignature, WrongSwarm or WrongReceiver.
        """
        envelope = open_envelope(
            data, kind=_REVOCATIONS, swarm=swarm, clock=None, max_bytes=MAX_LIST_BYTES
        )
        if envelope.sender not in issuers:
            raise BadEnvelope(
                f"revocations by {envelope.sender}, who is no issuer of swarm {swarm!r} here; "
                "take them from an issuer"
            )
        try:
            fields = decode_plain(
                envelope.body,
                max_bytes=MAX_LIST_BYTES,
                max_depth=2,
                max_elements=MAX_REVOKED + 5,
            )
        except MalformedData as error:
            raise BadEnvelope(f"the revocations can't be read: {error}") from None
        match fields:
            case [int(layout), int(version), list(peers), list(serials), list(invites)] if (
                type(layout) is int and layout == _VERSION
            ):
                return cls(
                    issuer=envelope.sender,
                    swarm=envelope.swarm,
                    version=version,
                    peers=frozenset(map(_peer, peers)),
                    serials=frozenset(map(_id, serials)),
                    invites=frozenset(map(_id, invites)),
                )
        raise BadEnvelope(
            f"not revocations of version {_VERSION}; one side needs another release of glasshive"
        )


@dataclass(frozen=True, slots=True)
class _Held:
    """What is in force of one issuer: different lists of one version, and their bytes."""

    version: int
    lists: tuple[Revocations, ...]
    signed: tuple[bytes, ...]


@final
class Membership:
    """Who may do what in one private swarm, by its issuers' certificates and revocations.

    `keep` is called with the bytes to keep when a list has taken effect; `kept` is what it was last
    called with, so that a restart forgets no removal. Without `keep` the memory ends with the
    process. Raises BadEnvelope for more than `MAX_ISSUERS` issuers, and for `kept` bytes that are
    not such a memory; lists in it by who is no issuer any more are dropped.
    """

    def __init__(
        self,
        swarm: str,
        issuers: Iterable[PeerId],
        *,
        kept: bytes = b"",
        keep: Callable[[bytes], None] | None = None,
        max_remembered: int = 4096,
    ) -> None:
        self.swarm = swarm
        self.issuers = frozenset(issuers)
        if len(self.issuers) > MAX_ISSUERS:
            raise BadEnvelope(
                f"swarm {swarm!r} has {len(self.issuers)} issuers, at most {MAX_ISSUERS}; "
                "name fewer in its configuration"
            )
        self._keep = keep
        self._max_remembered = max_remembered
        self._remembered: OrderedDict[bytes, Certificate] = OrderedDict()
        self._held: dict[PeerId, _Held] = {}
        self._is_kept = True
        self._take(self._read(kept))

    def admit(self, peer_id: PeerId, certificate: bytes, act: Act, now: float) -> Certificate:
        """The certificate, if it lets `peer_id`, whose id the transport proved, do `act` at `now`.

        Raises NotAMember, or of its kind MembershipRevoked or RoleRefused.
        """
        found = self._verify(peer_id, certificate)
        found.check_time(now)
        self._check_revoked(found)
        if not found.permits(act):
            raise RoleRefused(
                f"{peer_id} is a {found.role} of swarm {self.swarm!r} and may not {act}; wanted "
                f"{' or '.join(role for role in Role if act in _PERMITTED[role])}, "
                "ask an issuer for an invite with that role"
            )
        return found

    def learn(self, data: bytes) -> bool:
        """Puts a list of revocations in force; False if it was already.

        Raises StaleRevocations for a version below the highest seen of its issuer, and BadEnvelope,
        BadSignature, WrongSwarm or WrongReceiver; and what `keep` raises: then the list is in force
        all the same, and `save` tries to keep it again.
        """
        found = Revocations.verify(data, swarm=self.swarm, issuers=self.issuers)
        held = self._held.get(found.issuer)
        if held is not None and found.version < held.version:
            raise StaleRevocations(
                f"got version {found.version} of the revocations of {found.issuer}, version "
                f"{held.version} was seen; ask for the newest"
            )
        if held is None or found.version > held.version:
            held = _Held(found.version, (found,), (data,))
        elif found in held.lists:
            return False
        elif len(held.lists) >= _MAX_TIES:
            raise StaleRevocations(
                f"{found.issuer} signed more than {_MAX_TIES} different lists as version "
                f"{found.version}; the issuer has to publish a higher version"
            )
        else:
            held = _Held(found.version, (*held.lists, found), (*held.signed, data))
        self._take({**self._held, found.issuer: held})
        self._is_kept = False
        self.save()
        return True

    def save(self) -> None:
        """Keep what is in force and isn't kept yet. Raises what `keep` does."""
        if not self._is_kept and self._keep is not None:
            self._keep(self.kept)
        self._is_kept = True

    @property
    def kept(self) -> bytes:
        """What is in force, as a later Membership reads it."""
        return encode_plain(
            [[who, data] for who, each in self._held.items() for data in each.signed]
        )

    @property
    def lists(self) -> tuple[bytes, ...]:
        """The signed lists in force, as other members can `learn` them."""
        return tuple(data for held in self._held.values() for data in held.signed)

    @property
    def versions(self) -> dict[PeerId, int]:
        """The version in force of each issuer that has revoked anything."""
        return {issuer: held.version for issuer, held in self._held.items()}

    def _verify(self, peer_id: PeerId, data: bytes) -> Certificate:
        """The certificate, its time left open; a signature is checked once."""
        if len(data) > MAX_CERTIFICATE_BYTES:
            raise NotAMember(
                f"{peer_id} showed {len(data)} bytes as a certificate, "
                f"one has at most {MAX_CERTIFICATE_BYTES}; join with an invite"
            )
        digest = hashlib.sha256(data).digest()
        known = self._remembered.get(digest)
        if known is not None and known.member == peer_id:
            self._remembered.move_to_end(digest)
            return known
        found = Certificate.verify(
            data, peer_id=peer_id, swarm=self.swarm, issuers=self.issuers, now=None
        )
        self._remembered[digest] = found
        if len(self._remembered) > self._max_remembered:
            self._remembered.popitem(last=False)
        return found

    def _check_revoked(self, found: Certificate) -> None:
        for what, revoked, key in (
            ("its key", found.member in self._peers, "another"),
            (f"its issuer {found.issuer}", found.issuer in self._peers, "this"),
            (f"the certificate {found.serial.hex()}", found.serial in self._serials, "this"),
            (f"its invite {found.invite.hex()}", found.invite in self._invites, "this"),
        ):
            if revoked:
                raise MembershipRevoked(
                    f"the certificate of {found.member} for swarm {self.swarm!r} doesn't hold any "
                    f"more: {what} was revoked; ask who runs the swarm to invite {key} key"
                )

    def _take(self, held: dict[PeerId, _Held]) -> None:
        lists = [one for each in held.values() for one in each.lists]
        self._peers = frozenset[PeerId]().union(*(one.peers for one in lists))
        self._serials = frozenset[bytes]().union(*(one.serials for one in lists))
        self._invites = frozenset[bytes]().union(*(one.invites for one in lists))
        self._held = held

    def _read(self, kept: bytes) -> dict[PeerId, _Held]:
        """What `kept` was; raises BadEnvelope."""
        if not kept:
            return {}
        held: dict[PeerId, _Held] = {}
        try:
            pairs = decode_plain(kept, max_bytes=MAX_KEPT_BYTES, max_depth=2)
            if not isinstance(pairs, list):
                raise MalformedData("not an array")
            for pair in pairs:
                match pair:
                    case [str(issuer), bytes(data)]:
                        pass
                    case _:
                        raise MalformedData("not an array of issuers and lists")
                if issuer not in self.issuers:
                    continue
                found = Revocations.verify(data, swarm=self.swarm, issuers=(PeerId(issuer),))
                before = held.get(found.issuer, _Held(found.version, (), ()))
                held[found.issuer] = _Held(
                    found.version, (*before.lists, found), (*before.signed, data)
                )
        except SecurityError as error:
            raise BadEnvelope(
                f"the kept revocations of swarm {self.swarm!r} can't be read: {error}; "
                "restore them, or fetch the newest lists from every issuer before admitting anyone"
            ) from None
        return held


def merged(swarm: str, issuers: Iterable[PeerId], *kept: bytes) -> bytes:
    """What several memories of one swarm know together. Raises BadEnvelope for what is none."""
    issuers = tuple(issuers)
    first, *others = (Membership(swarm, issuers, kept=one) for one in kept)
    for other in others:
        for signed in other.lists:
            with contextlib.suppress(StaleRevocations):
                first.learn(signed)
    return first.kept


def _certificate(envelope: Envelope) -> Certificate:
    """The certificate that a verified envelope holds; raises BadEnvelope."""
    try:
        fields = decode_plain(
            envelope.body, max_bytes=MAX_CERTIFICATE_BYTES, max_depth=1, max_elements=6
        )
    except MalformedData as error:
        raise BadEnvelope(f"the certificate can't be read: {error}") from None
    if not isinstance(fields, list) or len(fields) != 6:
        raise BadEnvelope("the body of the certificate is not an array of six")
    version, role, invite, *numbers = fields
    if type(version) is not int or version != _VERSION:
        raise BadEnvelope(
            f"not a certificate of version {_VERSION}; one side needs another release of glasshive"
        )
    if envelope.receiver is None or type(invite) is not bytes:
        raise BadEnvelope("the certificate is for nobody, or its invite is not bytes")
    return Certificate(
        issuer=envelope.sender,
        member=envelope.receiver,
        role=role_of(role),
        swarm=envelope.swarm,
        serial=envelope.request_id,
        invite=invite,
        expires_at_seconds=envelope.expires_at_seconds,
        quota=quota_of(list(numbers)),
    )


def role_of(value: object) -> Role:
    """The role called `value`; raises BadEnvelope."""
    for role in Role:
        if type(value) is str and value == role.value:
            return role
    raise BadEnvelope(f"the role is none of {', '.join(Role)}; one side needs another release")


def _peer(value: object) -> PeerId:
    if type(value) is not bytes or len(value) != 32:
        raise BadEnvelope("a revoked peer is not the 32 bytes of its key")
    return peer_id_of(value)


def _id(value: object) -> bytes:
    if type(value) is not bytes:
        raise BadEnvelope("a revoked serial or invite is not bytes")
    return value
