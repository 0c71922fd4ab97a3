"""What a host keeps in the data folder of what others took of it: counts of quotas, audit log."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from glasshive.dht.member_gate import MemberGate
from glasshive.graph.errors import GlasshiveError
from glasshive.security.keys import Identity, PeerId
from glasshive.settings import Settings, data_dir
from glasshive.swarm_members import member_files

if TYPE_CHECKING:
    from glasshive.peer.accounts import Accounts


class AuditLogError(GlasshiveError):
    """The folder of a host's audit log can't be used, or there is no log in it."""


def audit_folder(settings: Settings, host: PeerId) -> Path:
    """Where the host of that id keeps its audit log in the configured swarm."""
    return data_dir() / "audit" / f"swarm-{quote(settings.swarm, safe='')}" / host


def open_accounts(settings: Settings, identity: Identity, gate: MemberGate | None) -> Accounts:
    """The accounts of this host, to be closed: quotas in a private swarm, a log where one is set.

    Raises MembershipFileError, BadAuditLog and AuditLogError.
    """
    from glasshive.peer.accounts import Accounts
    from glasshive.peer.quotas import Quotas
    from glasshive.security.audit_log import AuditLog

    audit_log = None
    if settings.audited:
        folder = audit_folder(settings, identity.peer_id)
        try:
            audit_log = AuditLog(folder, identity, settings.swarm)
        except OSError as error:
            raise AuditLogError(
                f"can't keep the audit log in {folder}: {error.strerror or error}; check the "
                "rights of the folder and the space on its disk, or set `audit = false` in "
                "hive.toml"
            ) from None
    files = member_files(settings)
    if files is None or gate is None:
        return Accounts(audit_log=audit_log)
    quotas = Quotas(files.folder / f"{identity.peer_id}.quotas")
    return Accounts(gate=gate, quotas=quotas, audit_log=audit_log)
