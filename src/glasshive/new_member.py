"""Becoming a member of a private swarm: from an invite to config, root and certificate, and back
in after a long absence."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import shlex
import time
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from glasshive.dht.errors import BadAddress, PeerUnreachable, SwarmError
from glasshive.dht.hivemind_transport import HivemindTransport
from glasshive.dht.issuing import ask_to_join, ask_to_renew
from glasshive.dht.transport import PeerAddress
from glasshive.security.durable_file import write_durable
from glasshive.security.errors import BadInvite, NotAMember, TrustRefused
from glasshive.security.invites import Invite, join_request, renew_request
from glasshive.security.keys import Identity, PeerId
from glasshive.security.membership import ID_BYTES, Act, Certificate
from glasshive.security.trust_root import first_root, root_digest
from glasshive.settings import ConfigError, Settings, load_settings
from glasshive.swarm_members import MemberFiles, files_under, member_files
from glasshive.swarm_trust import read_root

ANSWER_SECONDS: Final = 30.0


@dataclass(frozen=True, slots=True)
class Joined:
    """What joining has come to."""

    certificate: Certificate
    config: Path
    wrote_config: bool


def join_swarm(
    invite: Invite,
    identity: Identity,
    key: Path,
    config: Path,
    clock: Callable[[], float] = time.time,
) -> Joined:
    """Ask the issuer for a certificate for `identity`, and keep all that a member needs.

    `config` is written, with the root beside it, if it isn't there; one that is there has to be of
    this swarm. Nothing is written before everything was checked. A key, kept at `key`, that is such
    a member already spends no invite. Raises ConfigError, also for that, StreamRefused
    with the issuer's reason, PeerUnreachable if nobody answers, BadInvite, NotAMember for a
    certificate that isn't as the invite says, and MembershipFileError.
    """
    _check_config(config, invite)
    _check_is_new(invite, identity, key, clock())
    request = join_request(invite, identity, request_id=secrets.token_bytes(ID_BYTES), now=clock())
    certificate, root = asyncio.run(_ask(invite, identity, request))
    granted = invite.check_certificate(certificate, identity.peer_id, clock())
    try:
        if bytes.fromhex(root_digest(root)) != invite.whitelist_root:
            raise BadInvite(
                "the issuer sent another root than its invite names, so nothing of it is kept; ask "
                "for a new invite"
            )
        first_root(root)
    except TrustRefused as error:
        raise BadInvite(f"what the issuer sent is no root: {error}; tell who invited you") from None
    wrote = not config.exists()
    if wrote:
        _write_config(config, invite, root)
    files = _files_of(config)
    files.keep_certificate(identity.peer_id, certificate)
    return Joined(granted, config, wrote)


def _check_config(config: Path, invite: Invite) -> None:
    """Return if `config` is free, or of the invite's swarm. Raises ConfigError."""
    if not config.exists():
        return
    settings = load_settings(config)
    same = settings.swarm == invite.swarm and set(settings.issuers) == set(invite.issuers)
    if same and settings.root is not None:
        same = root_digest(read_root(settings.root)) == invite.whitelist_root.hex()
    if not same:
        raise ConfigError(
            f"{config} is of the swarm {settings.swarm!r}, the invite of {invite.swarm!r} with its "
            "own issuers and root; name another file: `glasshive join TOKEN --config "
            f"{invite.swarm}.toml`"
        )


def _check_is_new(invite: Invite, identity: Identity, key: Path, now: float) -> None:
    """Return unless the key already is what it would become. Raises ConfigError."""
    files = files_under(invite.swarm, invite.whitelist_root.hex())
    held = files.certificate(identity.peer_id)
    membership = files.membership(invite.swarm, invite.issuers)
    try:
        if membership.admit(identity.peer_id, held, Act.READ, now).role is not invite.role:
            return
    except NotAMember:
        return
    other = key.with_stem(f"{key.stem}-2")  # which a second host takes by itself
    raise ConfigError(
        f"the key {key}, {identity.peer_id}, is a member of the private swarm {invite.swarm!r} "
        f"already, as {invite.role}, so the invite was not used; another peer on this machine "
        f"joins with a key of its own: `glasshive join TOKEN --key {shlex.quote(str(other))}`. To "
        "join anew with this one, as when its config is lost, first remove "
        f"{files.certificate_path(identity.peer_id)}"
    )


async def renew_ended(
    settings: Settings, identity: Identity, clock: Callable[[], float] = time.time
) -> None:
    """Have the certificate that is kept for `identity` renewed if it has ended, before it is shown.

    A process renews its own while it runs; this is for one that was not running then. Raises
    NotAMember if the issuer doesn't renew it or can't be asked.
    """
    files = member_files(settings)
    held = files.certificate(identity.peer_id) if files else b""
    if files is None or not held:
        return
    found = Certificate.verify(
        held, peer_id=identity.peer_id, swarm=settings.swarm, issuers=settings.issuers, now=None
    )
    now = clock()
    if now < found.expires_at_seconds:
        return
    request = renew_request(
        held,
        identity,
        swarm=settings.swarm,
        issuer=found.issuer,
        request_id=secrets.token_bytes(ID_BYTES),
        now=now,
    )
    try:
        peers = [PeerAddress.parse(one) for one in settings.bootstraps]
        async with _asking(identity, settings.swarm) as transport:
            issuer = _issuer_among(peers, found.issuer)
            new = await ask_to_renew(transport, issuer, request, ANSWER_SECONDS)
        Certificate.verify(
            new,
            peer_id=identity.peer_id,
            swarm=settings.swarm,
            issuers=(found.issuer,),
            now=clock(),
        )
    except SwarmError as error:
        raise NotAMember(
            f"the certificate of {identity.peer_id} for the swarm {settings.swarm!r} has ended, "
            f"and its issuer does not renew it: {error}"
        ) from None
    files.keep_certificate(identity.peer_id, new)


@contextlib.asynccontextmanager
async def _asking(identity: Identity, swarm: str) -> AsyncIterator[HivemindTransport]:
    """A transport to ask an issuer by."""
    transport = await HivemindTransport.create(identity, listen=(), dht="none", swarm=swarm)
    try:
        yield transport
    finally:
        await transport.close()


def _issuer_among(peers: Iterable[PeerAddress], issuer: PeerId) -> PeerAddress:
    """The issuer with all of its addresses. Raises PeerUnreachable if it has none."""
    own = tuple(a for one in peers if one.peer_id == issuer for a in one.addresses)
    if not own:
        raise PeerUnreachable(
            f"no address of the issuer {issuer} is known; it has to be among the bootstrap peers"
        )
    return PeerAddress(issuer, own)


async def _ask(invite: Invite, identity: Identity, request: bytes) -> tuple[bytes, bytes]:
    """What the issuer gives, at whichever of the invite's addresses of it answers."""
    try:
        peers = [PeerAddress.parse(one) for one in invite.addresses]
    except BadAddress as error:
        raise BadInvite(f"an address of the invite: {error}; ask for a new one") from None
    async with _asking(identity, invite.swarm) as transport:
        try:
            issuer = _issuer_among(peers, invite.issuer)
            return await ask_to_join(transport, issuer, request, ANSWER_SECONDS)
        except PeerUnreachable as error:
            raise PeerUnreachable(
                f"the issuer of the invite doesn't answer: {error}; it has to run while you join "
                "(`glasshive bootstrap`), and this machine to reach it"
            ) from None


def _write_config(config: Path, invite: Invite, root: bytes) -> None:
    # By its digest: another swarm of this name may have a config in the same folder.
    name = f"{invite.swarm}.{invite.whitelist_root.hex()[:16]}.root.json"
    text = (
        f"# Written by `glasshive join`. It holds no secret.\n"
        f"swarm = {json.dumps(invite.swarm)}\n"
        f"bootstraps = {json.dumps(list(invite.addresses))}\n"
        "# Who makes members of this private swarm, and who may sign its whitelist.\n"
        f"issuers = {json.dumps(list(invite.issuers))}\n"
        f"root = {json.dumps(name)}\n"
    )
    try:
        write_durable(config.parent / name, root)
        write_durable(config, text.encode())
    except OSError as error:
        raise ConfigError(
            f"can't write {config}: {error.strerror or error}; check the path and the rights of "
            "its folder, or name another file with --config"
        ) from None


def _files_of(config: Path) -> MemberFiles:
    files = member_files(load_settings(config))
    if files is None:  # its issuers were compared, or written just now
        raise ConfigError(f"{config} names no issuers")
    return files
