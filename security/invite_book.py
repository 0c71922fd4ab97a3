"""An issuer's own record: invites given, members taken in, what was taken back.

Rules:

1. Everything stands in one file, which a change replaces whole and on the disk **before** its
   answer is given: after a crash either nothing was answered or all is remembered. A lock beside
   the file lets `glasshive invite` and a running issuer share it.
2. An invite is refused when it has expired, is used up, was revoked, or is not proved. A use is a
   key: the same key joining again takes no second one, for as long as the invite lasts.
3. A request is answered once, also across a restart: its id is kept until it has expired. It is
   remembered only after it proved itself, so that strangers can't fill the memory.
4. A certificate is renewed by the issuer that gave it, in the same role, while it holds and for
   `RENEWABLE_SECONDS` after: a laptop may be off for longer than a certificate lives. Its member is
   in the book all the while, and longer unless others need the place; whoever is revoked is not
   renewed.
5. The version of the revocations rises with each, and is at least the time in whole seconds, so
   that even a lost file can't bring an old version back.

The file holds the secrets of open invites and is for its owner's eyes only.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, final

from glasshive.security.book_state import (
    MAX_STATE_BYTES,
    BookState,
    Member,
    OpenInvite,
    decode_state,
    encode_state,
)
from glasshive.security.durable_file import read_durable, write_durable
from glasshive.security.envelope import CLOCK_SKEW_SECONDS, Envelope, ReplayCache
from glasshive.security.errors import (
    BadInvite,
    BadInviteBook,
    InviteRefused,
    MembershipRevoked,
    NotAMember,
    SecurityError,
)
from glasshive.security.invites import (
    MAX_INVITE_SECONDS,
    SECRET_BYTES,
    USUAL_INVITE_SECONDS,
    Invite,
    join_proof,
    open_join,
    open_renew,
)
from glasshive.security.keys import Identity, PeerId, public_key_of
from glasshive.security.membership import (
    DAY_SECONDS,
    ID_BYTES,
    MAX_CERTIFICATE_SECONDS,
    MAX_REVOKED,
    USUAL_CERTIFICATE_SECONDS,
    Certificate,
    Revocations,
    Role,
)
from glasshive.security.quota import NO_QUOTA, Quota

__all__ = ["InviteBook", "InviteEntry"]

MAX_USES: Final = 1024
MAX_INVITES: Final = 1024
MAX_MEMBERS: Final = 4096
RENEWABLE_SECONDS: Final = 90 * DAY_SECONDS
LOCK_SECONDS: Final = 10.0

_MAX_SENDERS: Final = 1024
_MAX_REQUESTS_PER_SENDER: Final = 8
# By then no certificate can hold or be renewed that a revoked serial or invite would have to stop.
_REVOKED_KEPT_SECONDS: Final = (
    MAX_INVITE_SECONDS + MAX_CERTIFICATE_SECONDS + RENEWABLE_SECONDS + CLOCK_SKEW_SECONDS
)


@dataclass(frozen=True, slots=True)
class InviteEntry:
    """An invite as its issuer knows it; the secret is not shown."""

    invite_id: bytes
    role: Role
    uses: int
    used: int
    expires_at_seconds: float
    revoked: bool
    quota: Quota = NO_QUOTA


@final
class InviteBook:
    """The invites and members of one issuer of one private swarm, kept in one file.

    `certificate_seconds` may shorten a role's usual lifetime. Every method raises BadInviteBook if
    the file can't be read, written or grown, and then changed nothing.
    """

    def __init__(
        self,
        path: Path,
        identity: Identity,
        swarm: str,
        *,
        random_bytes: Callable[[int], bytes] = secrets.token_bytes,
        certificate_seconds: Mapping[Role, float] | None = None,
    ) -> None:
        self.path = path
        self.swarm = swarm
        self._identity = identity
        self.issuer = identity.peer_id
        self._random_bytes = random_bytes
        self._lifetimes = {**USUAL_CERTIFICATE_SECONDS, **(certificate_seconds or {})}
        for role, lifetime_seconds in self._lifetimes.items():
            if not 0 < lifetime_seconds <= MAX_CERTIFICATE_SECONDS:
                raise BadInviteBook(
                    f"got {lifetime_seconds} s for the certificates of a {role}, wanted more than "
                    f"0 and at most {MAX_CERTIFICATE_SECONDS:.0f} s"
                )

    # Invites ------------------------------------------------------------------------------------

    def invite(
        self,
        role: Role,
        *,
        addresses: Iterable[str],
        issuers: Iterable[PeerId],
        whitelist_root: bytes,
        now: float,
        uses: int = 1,
        lifetime_seconds: float = USUAL_INVITE_SECONDS,
        quota: Quota = NO_QUOTA,
    ) -> str:
        """The token of a new invite, for `uses` keys at most, each with that quota.

        Raises BadInvite.
        """
        if type(uses) is not int or not 0 < uses <= MAX_USES:
            raise BadInvite(f"got {uses!r} uses for an invite, wanted 1 to {MAX_USES}")
        if not 0 < lifetime_seconds <= MAX_INVITE_SECONDS:
            raise BadInvite(
                f"got an invite for {lifetime_seconds} s, wanted more than 0 and at most "
                f"{MAX_INVITE_SECONDS:.0f} s"
            )
        _check_quota(role, quota)
        made = Invite(
            swarm=self.swarm,
            issuer=self._identity.peer_id,
            invite_id=self._random_bytes(ID_BYTES),
            role=role,
            addresses=tuple(addresses),
            issuers=tuple(issuers),
            whitelist_root=whitelist_root,
            expires_at_seconds=_whole(now + lifetime_seconds),
            secret=self._random_bytes(SECRET_BYTES),
        )
        token = made.token(self._identity)
        with self._opened() as book:
            entry = OpenInvite(role, uses, made.expires_at_seconds, made.secret, quota)
            self._write(replace(book, invites={**book.invites, made.invite_id: entry}), now)
        return token

    def invites(self) -> tuple[InviteEntry, ...]:
        """The invites that are remembered, those that end first before others."""
        with self._opened() as book:
            entries = [
                InviteEntry(
                    invite_id,
                    one.role,
                    one.uses,
                    book.used(invite_id),
                    one.expires_at_seconds,
                    invite_id in book.revoked_invites,
                    one.quota,
                )
                for invite_id, one in book.invites.items()
            ]
        return tuple(sorted(entries, key=lambda one: one.expires_at_seconds))

    # Members ------------------------------------------------------------------------------------

    def join(self, request: bytes, now: float) -> bytes:
        """The certificate that answers a request to join.

        Raises InviteRefused, MembershipRevoked, Replayed, and what `open_join` raises.
        """
        envelope, invite_id, proof = open_join(
            request, swarm=self.swarm, issuer=self._identity.peer_id, now=now
        )
        joiner = envelope.sender
        with self._opened() as book:
            invite = self._proved(book, envelope, invite_id, proof, now)
            _admit_once(book, envelope, now)
            _check_peer(book, joiner, self.swarm)
            known = book.members.get((joiner, invite_id))
            if known is None and book.used(invite_id) >= invite.uses:
                raise InviteRefused(
                    f"the invite {invite_id.hex()} is used up: {invite.uses} of {invite.uses} "
                    f"keys have joined by it, and {joiner} is another; ask for a new invite"
                )
            return self._grant(book, joiner, invite.role, invite_id, now, envelope, invite.quota)

    def renew(self, request: bytes, now: float) -> bytes:
        """A new certificate for a member, in the same role, if its last one ended not long ago.

        Raises NotAMember, MembershipRevoked, Replayed, and what `open_renew` raises.
        """
        envelope, data = open_renew(
            request, swarm=self.swarm, issuer=self._identity.peer_id, now=now
        )
        held = Certificate.verify(
            data,
            peer_id=envelope.sender,
            swarm=self.swarm,
            issuers=(self._identity.peer_id,),
            now=None,
        )
        if now > held.expires_at_seconds + RENEWABLE_SECONDS:
            raise NotAMember(
                f"the certificate of {held.member} ended more than "
                f"{RENEWABLE_SECONDS / DAY_SECONDS:.0f} days ago, and is not renewed any more; ask "
                "for a new invite"
            )
        with self._opened() as book:
            _admit_once(book, envelope, now)
            _check_peer(book, held.member, self.swarm)
            for what, one, revoked in (
                ("certificate", held.serial, book.revoked_serials),
                ("invite", held.invite, book.revoked_invites),
            ):
                if one in revoked:
                    raise MembershipRevoked(
                        f"the certificate of {held.member} is not renewed: the {what} "
                        f"{one.hex()} was revoked; ask the issuer for a new invite"
                    )
            known = book.members.get((held.member, held.invite))
            if known is None or known.role is not held.role:
                raise NotAMember(
                    f"the certificate of {held.member} is not renewed: it is as {held.role}, the "
                    f"issuer has it as {known.role if known else 'no member'}; ask for an invite"
                )
            return self._grant(book, held.member, held.role, held.invite, now, envelope)

    def enrol(self, peer_id: PeerId, role: Role, now: float) -> bytes:
        """A certificate without an invite, as for the issuer's own machines.

        Raises MembershipRevoked or BadPeerId.
        """
        public_key_of(peer_id)
        with self._opened() as book:
            _check_peer(book, peer_id, self.swarm)
            return self._grant(book, peer_id, role, b"", now, None)

    def members(self) -> tuple[Member, ...]:
        """Everyone with a certificate, once for each invite they came by, in order of joining."""
        with self._opened() as book:
            found = [
                replace(
                    one,
                    revoked=one.peer_id in book.revoked_peers or one.invite in book.revoked_invites,
                )
                for one in book.members.values()
            ]
        return tuple(sorted(found, key=lambda one: one.since_seconds))

    def change_quota(
        self, peer_id: PeerId, changes: Mapping[str, int | None], now: float
    ) -> tuple[Member, ...]:
        """Gives a member other numbers, by their names in a Quota; what it is then.

        They stand in its next certificate. Raises NotAMember for who is none that runs traces, and
        BadEnvelope for a number out of range.
        """
        with self._opened() as book:
            changed = {
                key: replace(one, quota=replace(one.quota, **changes))
                for key, one in book.members.items()
                if one.peer_id == peer_id and one.role is not Role.HOST
            }
            if not changed:
                raise NotAMember(
                    f"{peer_id} has not joined {self.swarm!r} as a client or an admin, who alone "
                    "run traces and have quotas; `glasshive members` lists those who have"
                )
            self._write(replace(book, members={**book.members, **changed}), now)
        return tuple(changed.values())

    # Revocation ---------------------------------------------------------------------------------

    def revoke(
        self,
        now: float,
        *,
        peers: Iterable[PeerId] = (),
        invites: Iterable[bytes] = (),
        serials: Iterable[bytes] = (),
    ) -> bytes:
        """Takes back members, invites with all who came by them, or single certificates.

        The new signed list of revocations. Raises InviteRefused for an invite that is not in the
        book, BadPeerId for what is no peer.
        """
        peers, invites, serials = tuple(peers), tuple(invites), tuple(serials)
        for peer_id in peers:
            public_key_of(peer_id)
        if self.issuer in peers:
            raise BadInviteBook(
                f"{self.issuer} is the issuer itself, without whom no certificate of the swarm "
                "holds; to end the swarm stop its bootstrap peer, to change the issuer name "
                "another in the members' configs"
            )
        for serial in serials:
            if len(serial) != ID_BYTES:
                raise BadInviteBook(
                    f"got a serial of {len(serial)} bytes, wanted the {ID_BYTES} of a certificate"
                )
        with self._opened() as book:
            from_invites = {member.invite for member in book.members.values()}
            for one in invites:
                if not one or (one not in book.invites and one not in from_invites):
                    raise InviteRefused(
                        f"there is no invite {one.hex() or 'without an id'} in {self.path}; "
                        "`glasshive members` lists those that members came by"
                    )
            old = now - _REVOKED_KEPT_SECONDS
            changed = replace(
                book,
                version=max(book.version + 1, int(now)),
                revoked_peers={**dict.fromkeys(peers, now), **book.revoked_peers},
                revoked_serials=_added(book.revoked_serials, serials, now, old),
                revoked_invites=_added(book.revoked_invites, invites, now, old),
            )
            signed = self._signed(changed)
            self._write(changed, now)
        return signed

    def revocations(self) -> bytes | None:
        """The signed list in force; None while nothing was ever revoked."""
        with self._opened() as book:
            return self._signed(book) if book.version else None

    def _signed(self, book: BookState) -> bytes:
        n_revoked = sum(
            (len(book.revoked_peers), len(book.revoked_serials), len(book.revoked_invites))
        )
        if n_revoked > MAX_REVOKED:
            raise BadInviteBook(
                f"{self.path} would hold more than {MAX_REVOKED} revocations; begin a new swarm "
                "or give this one a new issuer, which ends every certificate of the old"
            )
        return Revocations(
            issuer=self._identity.peer_id,
            swarm=self.swarm,
            version=book.version,
            peers=frozenset(book.revoked_peers),
            serials=frozenset(book.revoked_serials),
            invites=frozenset(book.revoked_invites),
        ).sign(self._identity)

    # Rules --------------------------------------------------------------------------------------

    def _proved(
        self, book: BookState, envelope: Envelope, invite_id: bytes, proof: bytes, now: float
    ) -> OpenInvite:
        """The invite, if it can be joined by and the request proves it."""
        invite = book.invites.get(invite_id)
        if invite is None:
            raise InviteRefused(
                f"there is no invite {invite_id[:ID_BYTES].hex()} here (any more); "
                "ask for a new one"
            )
        wanted = join_proof(
            invite.secret, envelope.request_id, invite_id, envelope.sender, self._identity.peer_id
        )
        if not hmac.compare_digest(wanted, proof):
            raise InviteRefused(
                f"the request of {envelope.sender} doesn't prove that it knows the secret of the "
                f"invite {invite_id.hex()}; join with the whole token, unchanged"
            )
        if invite_id in book.revoked_invites:
            raise InviteRefused(f"the invite {invite_id.hex()} was revoked; ask for a new one")
        if now > invite.expires_at_seconds + CLOCK_SKEW_SECONDS:
            raise InviteRefused(
                f"the invite {invite_id.hex()} expired "
                f"{now - invite.expires_at_seconds:.0f} s ago; ask for a new one"
            )
        return invite

    def _grant(
        self,
        book: BookState,
        peer_id: PeerId,
        role: Role,
        invite: bytes,
        now: float,
        request: Envelope | None,
        quota: Quota = NO_QUOTA,
    ) -> bytes:
        """The signed certificate, once the book that knows of it is on the disk.

        A member that is known keeps its quota, which `change_quota` may have changed since.
        """
        known = book.members.get((peer_id, invite))
        quota = known.quota if known else quota
        certificate = Certificate(
            issuer=self._identity.peer_id,
            member=peer_id,
            role=role,
            swarm=self.swarm,
            serial=self._random_bytes(ID_BYTES),
            invite=invite,
            expires_at_seconds=_whole(now + self._lifetimes[role]),
            quota=quota,
        )
        signed = certificate.sign(self._identity)
        member = Member(
            peer_id,
            role,
            known.since_seconds if known else _whole(now),
            certificate.expires_at_seconds,
            invite,
            quota,
        )
        changed = replace(
            book,
            members={**book.members, (peer_id, invite): member},
            seen=book.seen if request is None else (*book.seen, request),
        )
        self._write(changed, now)
        return signed

    # The file -----------------------------------------------------------------------------------

    @contextmanager
    def _opened(self) -> Iterator[BookState]:
        """The book as the file has it, while no other process can change it."""
        from filelock import FileLock, Timeout

        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = FileLock(self.path.with_name(self.path.name + ".lock"), timeout=LOCK_SECONDS)
            with lock:
                yield self._read()
        except Timeout:
            raise BadInviteBook(
                f"another process has held {self.path} for {LOCK_SECONDS:.0f} s; "
                "end it, or try again"
            ) from None
        except OSError as error:
            raise BadInviteBook(
                f"can't use the invite book {self.path}: {error.strerror or error}; check the "
                "path, the rights of its folder and the space on its disk"
            ) from None

    def _read(self) -> BookState:
        try:
            data = read_durable(self.path, MAX_STATE_BYTES)
        except ValueError as error:
            raise BadInviteBook(f"can't use the invite book: {error}") from None
        if not data:
            return BookState(0, {}, {}, {}, {}, {}, ())
        try:
            return decode_state(data, self.swarm, self._identity.peer_id)
        except (SecurityError, ValueError, TypeError) as error:
            raise BadInviteBook(
                f"the invite book {self.path} is not one of {self._identity.peer_id} for swarm "
                f"{self.swarm!r}: {error}; restore it from a copy, a new one knows no revocation"
            ) from None

    def _write(self, book: BookState, now: float) -> None:
        book = _pruned(book, now)
        for what, n, most in (
            ("invites", len(book.invites), MAX_INVITES),
            ("members", len(book.members), MAX_MEMBERS),
        ):
            if n > most:
                raise BadInviteBook(
                    f"{self.path} would hold {n} {what}, at most {most}; wait until old ones end, "
                    "or let another issuer of the swarm take in more"
                )
        data = encode_state(book, self.swarm, self._identity.peer_id)
        if len(data) > MAX_STATE_BYTES:
            raise BadInviteBook(
                f"{self.path} would have {len(data)} bytes, at most {MAX_STATE_BYTES}; "
                "wait until old invites end"
            )
        write_durable(self.path, data)


def _admit_once(book: BookState, envelope: Envelope, now: float) -> None:
    """Raises Replayed if the book has seen the request, or too many of its sender's."""
    cache = ReplayCache(max_senders=_MAX_SENDERS, max_requests_per_sender=_MAX_REQUESTS_PER_SENDER)
    for one in book.seen:
        cache.admit(one, 0.0)  # when each was new; nothing is forgotten on the way
    cache.admit(envelope, now)


def _check_peer(book: BookState, peer_id: PeerId, swarm: str) -> None:
    if peer_id in book.revoked_peers:
        raise MembershipRevoked(
            f"{peer_id} was revoked as a member of swarm {swarm!r}; "
            "ask the issuer, who would have to invite another key"
        )


def _check_quota(role: Role, quota: Quota) -> None:
    if role is Role.HOST and quota != NO_QUOTA:
        raise BadInvite(
            f"got an invite for a host with a quota ({quota.describe()}), and hosts run no traces; "
            "leave it out"
        )


def _added(
    revoked: Mapping[bytes, float], new: Iterable[bytes], now: float, old: float
) -> dict[bytes, float]:
    kept = {one: at for one, at in revoked.items() if at >= old}
    return {**dict.fromkeys(new, now), **kept}


def _pruned(book: BookState, now: float) -> BookState:
    """Without what can't matter any more: ended invites, expired requests, and members long gone.

    Those only as far as others need their places: a clock that was once ahead forgets nobody.
    """
    ended = now - CLOCK_SKEW_SECONDS
    invites = {
        invite_id: one for invite_id, one in book.invites.items() if one.expires_at_seconds >= ended
    }
    gone = [
        (one.until_seconds, key)
        for key, one in book.members.items()
        if one.until_seconds < ended - RENEWABLE_SECONDS and one.invite not in invites
    ]
    too_many = max(len(book.members) - MAX_MEMBERS, 0)
    dropped = {key for _, key in sorted(gone)[:too_many]}
    return replace(
        book,
        invites=invites,
        members={key: one for key, one in book.members.items() if key not in dropped},
        seen=tuple(one for one in book.seen if one.expires_at_seconds >= ended),
    )


def _whole(seconds: float) -> float:
    """In whole milliseconds, as it is signed."""
    return round(seconds * 1000) / 1000
