"""What this machine keeps of its membership in a private swarm: certificates and revocations.

A swarm is private where its config names `issuers`. Each of its roots has a folder under the data
folder, as for whitelists; a certificate in it is a key's, so that hosts and clients of one machine
have their own. What is revoked is kept for all of them.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from filelock import FileLock, Timeout

from glasshive.dht.member_gate import MemberGate
from glasshive.security.durable_file import read_durable, write_durable
from glasshive.security.errors import BadEnvelope, MembershipFileError, NotAMember
from glasshive.security.invite_book import InviteBook
from glasshive.security.keys import Identity, PeerId
from glasshive.security.membership import (
    MAX_CERTIFICATE_BYTES,
    MAX_KEPT_BYTES,
    Act,
    Membership,
    Role,
    merged,
)
from glasshive.security.trust_root import root_digest
from glasshive.settings import ConfigError, Settings, data_dir
from glasshive.swarm_trust import read_root, root_name

LOCK_SECONDS: Final = 10.0


@dataclass(frozen=True, slots=True)
class MemberFiles:
    """The files of one swarm's membership. Every method raises MembershipFileError."""

    folder: Path

    def certificate(self, peer_id: PeerId) -> bytes:
        """The last certificate of this peer; empty if it never had one."""
        return self._read(self.certificate_path(peer_id), MAX_CERTIFICATE_BYTES)

    def keep_certificate(self, peer_id: PeerId, certificate: bytes) -> None:
        """Keep it instead of the last."""
        self._write(self.certificate_path(peer_id), certificate)

    def revocations(self) -> bytes:
        """What `keep_revocations` was last called with; empty if it never was."""
        return self._read(self.folder / "revocations", MAX_KEPT_BYTES)

    def keep_revocations(self, kept: bytes, swarm: str, issuers: Sequence[PeerId]) -> None:
        """Keep what a `Membership` knows, and what other processes of this machine have kept."""
        place = self.folder / "revocations"
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with FileLock(place.with_name("revocations.lock"), timeout=LOCK_SECONDS):
                self._write(place, merged(swarm, issuers, self.revocations(), kept))
        except (OSError, Timeout, BadEnvelope) as error:
            raise MembershipFileError(
                f"can't keep {place}: {getattr(error, 'strerror', None) or error}; check the "
                "rights of its folder and the space on its disk"
            ) from None

    def membership(self, swarm: str, issuers: Sequence[PeerId]) -> Membership:
        """Who belongs to the swarm, by what is kept of who was revoked; it keeps what it learns."""
        try:
            return Membership(
                swarm,
                issuers,
                kept=self.revocations(),
                keep=lambda kept: self.keep_revocations(kept, swarm, issuers),
            )
        except BadEnvelope as error:
            raise MembershipFileError(
                f"{self.folder / 'revocations'}: {error}; if it is lost, remove it, and what was "
                "revoked is fetched from the bootstrap peers"
            ) from None

    def certificate_path(self, peer_id: PeerId) -> Path:
        """Where the certificate of this peer is."""
        return self.folder / f"{peer_id}.certificate"

    def _read(self, place: Path, max_bytes: int) -> bytes:
        try:
            return read_durable(place, max_bytes)
        except (OSError, ValueError) as error:
            raise MembershipFileError(
                f"can't read what is kept of the membership: {error}; correct that, or remove the "
                "file and join again"
            ) from None

    def _write(self, place: Path, data: bytes) -> None:
        try:
            write_durable(place, data)
        except OSError as error:
            raise MembershipFileError(
                f"can't keep {place}: {error.strerror or error}; check the rights of its folder "
                "and the space on its disk"
            ) from None


def member_files(settings: Settings, *, data: Path | None = None) -> MemberFiles | None:
    """What is kept for the configured swarm, under `data` (without it this user's data folder).

    None for a swarm that isn't private. Raises ConfigError for one that names issuers, and no root
    or no name of its own.
    """
    if not settings.issuers:
        return None
    if settings.root is None:
        raise ConfigError(
            "the config names `issuers`, so its swarm is private, and no `root`; get its hive.toml "
            "anew from who runs the swarm, or join with an invite (`glasshive join TOKEN`)"
        )
    return files_under(settings.swarm, root_digest(read_root(settings.root)), data=data)


def files_under(swarm: str, root_digest: str, *, data: Path | None = None) -> MemberFiles:
    """What is kept for the private swarm of this name under the root of this digest."""
    return MemberFiles((data or data_dir()) / "members" / root_name(swarm, root_digest))


def open_gate(
    settings: Settings,
    identity: Identity,
    act: Act,
    key: Path,
    *,
    clock: Callable[[], float] = time.time,
) -> MemberGate | None:
    """The gate of this peer of a private swarm, with what is kept; None if the swarm isn't private.

    `key` is where the identity is kept. Raises NotAMember if `identity` has no certificate here
    that permits `act` now, ConfigError and MembershipFileError.
    """
    files = member_files(settings)
    if files is None:
        return None
    membership = files.membership(settings.swarm, settings.issuers)
    certificate = files.certificate(identity.peer_id)
    if not certificate:
        role = "host" if act is Act.SERVE else "client"
        raise NotAMember(
            f"the key {key}, {identity.peer_id}, is no member of the private swarm "
            f"{settings.swarm!r} yet; ask who runs it for an invite as a {role}, and run "
            f"`glasshive join TOKEN --key {shlex.quote(str(key))}`"
        )
    membership.admit(identity.peer_id, certificate, act, clock())
    return MemberGate(membership, clock, certificate)


def is_let_in(settings: Settings, key: Path, act: Act) -> bool:
    """Whether the configured swarm isn't private, or the key in the file `key` may do `act` in it.

    Raises what `open_gate` does, but NotAMember, and KeyFileError.
    """
    if not settings.issuers:
        return True
    if not key.is_file():
        return False
    try:
        open_gate(settings, Identity.load_or_create(key), act, key)
    except NotAMember:
        return False
    return True


def open_book(
    settings: Settings,
    key: Path,
    identity: Identity,
    *,
    data: Path | None = None,
    clock: Callable[[], float] = time.time,
) -> InviteBook | None:
    """The book of members of the issuer whose key this is; None for who is none.

    It lies beside the key. An issuer is a member by its own word: it has a new certificate, as a
    host, after this. Raises what `member_files` does, and BadInviteBook.
    """
    files = member_files(settings, data=data)
    if files is None or identity.peer_id not in settings.issuers:
        return None
    book = InviteBook(book_path(key), identity, settings.swarm)
    files.keep_certificate(identity.peer_id, book.enrol(identity.peer_id, Role.HOST, clock()))
    return book


def book_path(key: Path) -> Path:
    """Where the issuer of this key keeps its book."""
    return key.with_suffix(".members")
