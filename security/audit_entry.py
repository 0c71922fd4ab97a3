"""One line of a host's audit log: what it says, how it is signed, and the one way to write it.

A line is a JSON object. `signed` is an envelope, in base64, from the host to everyone, whose body
is the SHA-256 of the line without it: the line's hash. An entry names the hash of the one `before`.
A line counts only if it is, byte for byte, as this module writes what it says.

    {"entry":2,"time_milliseconds":...,"host":...,"swarm":...,"client":...,...,"before":...,"signed":...}
    {"export":2,"first":1,"head":...,"time_milliseconds":...,"host":...,"swarm":...,"signed":...}

The second kind ends an export: its last entry's number and hash, and the number of its first.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any, Final

from glasshive.security.envelope import open_envelope, seal
from glasshive.security.errors import BadAuditLog, BadPeerId, MalformedData, SecurityError
from glasshive.security.keys import Identity, PeerId, public_key_of
from glasshive.security.plain import decode_plain, encode_plain

__all__ = ["AuditEntry", "AuditExport", "SignedEntry"]

MAX_LINE_BYTES: Final = 4096
BEGINNING: Final = bytes(32)  # what the first entry names as the one before

_ENTRY: Final = "audit-entry"
_EXPORT: Final = "audit-export"
_FAR_SECONDS: Final = 253_402_300_799.0  # an envelope has an expiry; a line of a log has none
_MAX_NUMBER: Final = (1 << 53) - 1
_MAX_TEXT: Final = 128
_ENTRY_FIELDS: Final = (
    "entry", "time_milliseconds", "host", "swarm", "client", "role", "invite", "trace", "model",
    "dtype", "blocks", "graph_sha256", "nodes", "outcome", "compute_milliseconds", "saved_bytes",
    "before", "signed",
)  # fmt: skip
_EXPORT_FIELDS: Final = (
    "export", "first", "head", "time_milliseconds", "host", "swarm", "signed",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """One trace of one client on a host. `role` and `invite` are empty in a swarm of everyone.

    `graph_sha256` is of the part of the graph as it was sent to the host, with its passes;
    `outcome` is "done", the name of an error, or "killed", if the host's process ended before the
    trace: then the time is that of its beginning, and nobody knows what it took.
    """

    time_milliseconds: int
    client: PeerId
    role: str
    invite: bytes
    trace_id: bytes
    model_id: str
    dtype: str
    blocks: str
    graph_sha256: bytes
    nodes: int
    outcome: str
    compute_milliseconds: int
    saved_bytes: int


@dataclass(frozen=True, slots=True)
class SignedEntry:
    """An entry at its place in the log of a host: its number, and the hashes of it and before."""

    number: int
    host: PeerId
    swarm: str
    entry: AuditEntry
    before: bytes
    digest: bytes


@dataclass(frozen=True, slots=True)
class AuditExport:
    """A host's word, at a time, that its log went from `first` to `last`, whose hash is `head`."""

    first: int
    last: int
    head: bytes
    host: PeerId
    swarm: str
    time_milliseconds: int


def entry_line(
    entry: AuditEntry, number: int, before: bytes, identity: Identity, swarm: str
) -> tuple[bytes, bytes]:
    """(line, hash) of the entry, signed by the host."""
    said = {
        "entry": number,
        "time_milliseconds": entry.time_milliseconds,
        "host": identity.peer_id,
        "swarm": swarm,
        "client": entry.client,
        "role": entry.role,
        "invite": entry.invite.hex(),
        "trace": entry.trace_id.hex(),
        "model": entry.model_id,
        "dtype": entry.dtype,
        "blocks": entry.blocks,
        "graph_sha256": entry.graph_sha256.hex(),
        "nodes": entry.nodes,
        "outcome": entry.outcome,
        "compute_milliseconds": entry.compute_milliseconds,
        "saved_bytes": entry.saved_bytes,
        "before": before.hex(),
    }
    return _signed(said, _ENTRY, identity, swarm)


def export_line(export: AuditExport, identity: Identity) -> bytes:
    """The line that ends an export, signed by the host."""
    said = {
        "export": export.last,
        "first": export.first,
        "head": export.head.hex(),
        "time_milliseconds": export.time_milliseconds,
        "host": identity.peer_id,
        "swarm": export.swarm,
    }
    return _signed(said, _EXPORT, identity, export.swarm)[0]


def entries_to_bytes(entries: Iterable[AuditEntry]) -> bytes:
    """Entries that are no lines of a log yet."""
    return encode_plain([astuple(one) for one in entries])


def entries_from_bytes(data: bytes, max_bytes: int) -> list[AuditEntry]:
    """What `entries_to_bytes` was given; raises BadAuditLog."""
    try:
        match decode_plain(data, max_bytes=max_bytes, max_depth=2):
            case list(rows):
                return [_entry(row) for row in rows]
    except MalformedData as error:
        raise BadAuditLog(str(error)) from None
    raise BadAuditLog("it is no list of entries")


def read_line(line: bytes, host: PeerId) -> SignedEntry | AuditExport:
    """What a line of the log of `host` says; raises BadAuditLog if it isn't the host's word."""
    said = _read(line)
    swarm, its_host = _text(said["swarm"]), _peer(said["host"])
    if its_host != host:
        raise BadAuditLog(f"it is of the host {its_host}, wanted {host}")
    kind = _ENTRY if "entry" in said else _EXPORT
    digest = _digest({name: value for name, value in said.items() if name != "signed"})
    try:
        signed = base64.b64decode(_text(said["signed"], MAX_LINE_BYTES), validate=True)
        envelope = open_envelope(signed, kind=kind, swarm=swarm, clock=None)
    except (binascii.Error, SecurityError) as error:
        raise BadAuditLog(f"its signature doesn't hold: {error}") from None
    if envelope.sender != host:
        raise BadAuditLog(f"it is signed by {envelope.sender}, wanted {host}")
    if envelope.body != digest:
        raise BadAuditLog("it is not what the host has signed")
    if kind == _EXPORT:
        return AuditExport(
            first=_count(said["first"]),
            last=_count(said["export"]),
            head=_hex(said["head"]),
            host=host,
            swarm=swarm,
            time_milliseconds=_count(said["time_milliseconds"]),
        )
    entry = AuditEntry(
        time_milliseconds=_count(said["time_milliseconds"]),
        client=_peer(said["client"]),
        role=_text(said["role"]),
        invite=_hex(said["invite"]),
        trace_id=_hex(said["trace"]),
        model_id=_text(said["model"]),
        dtype=_text(said["dtype"]),
        blocks=_text(said["blocks"]),
        graph_sha256=_hex(said["graph_sha256"]),
        nodes=_count(said["nodes"]),
        outcome=_text(said["outcome"]),
        compute_milliseconds=_count(said["compute_milliseconds"]),
        saved_bytes=_count(said["saved_bytes"]),
    )
    return SignedEntry(_count(said["entry"]), host, swarm, entry, _hex(said["before"]), digest)


def _entry(row: object) -> AuditEntry:
    match row:
        case [
            int(at),
            str(client),
            str(role),
            bytes(invite),
            bytes(trace),
            str(model),
            str(dtype),
            str(blocks),
            bytes(graph),
            int(nodes),
            str(outcome),
            int(compute),
            int(saved),
        ]:
            return AuditEntry(
                *(at, _peer(client), role, invite, trace, model, dtype, blocks, graph, nodes),
                *(outcome, compute, saved),
            )
    raise BadAuditLog("an entry in it is damaged")


def _signed(
    said: Mapping[str, Any], kind: str, identity: Identity, swarm: str
) -> tuple[bytes, bytes]:
    digest = _digest(said)
    envelope = seal(
        identity,
        kind=kind,
        swarm=swarm,
        receiver=None,
        request_id=b"",
        expires_at_seconds=_FAR_SECONDS,
        body=digest,
    )
    return _written({**said, "signed": base64.b64encode(envelope).decode()}) + b"\n", digest


def _digest(said: Mapping[str, Any]) -> bytes:
    return hashlib.sha256(_written(said)).digest()


def _written(said: Mapping[str, Any]) -> bytes:
    """The one way in which these fields are written."""
    return json.dumps(said, separators=(",", ":"), allow_nan=False).encode()


def _read(line: bytes) -> dict[str, Any]:
    """The fields of a line that has those of an entry or an export, in order, as they are written.

    A line that says a field twice, or orders them otherwise, would say two things to two readers.
    """
    if len(line) > MAX_LINE_BYTES:
        raise BadAuditLog(f"it has {len(line)} bytes, a line has at most {MAX_LINE_BYTES}")
    try:
        said = json.loads(line)
        if type(said) is dict and _written(said) + b"\n" == line:
            names: Sequence[str] = tuple(said)
            if names in (_ENTRY_FIELDS, _EXPORT_FIELDS):
                return said
    except (ValueError, RecursionError):
        pass
    raise BadAuditLog("it is cut off, or no line of an audit log")


def _count(value: object) -> int:
    if type(value) is not int or not 0 <= value <= _MAX_NUMBER:
        raise BadAuditLog(f"a number in it is not a whole one of 0 to {_MAX_NUMBER}")
    return value


def _text(value: object, most: int = _MAX_TEXT) -> str:
    if type(value) is not str or len(value) > most or not value.isprintable():
        raise BadAuditLog(f"a text in it is not one of at most {most} printable characters")
    return value


def _hex(value: object) -> bytes:
    try:
        return bytes.fromhex(_text(value))
    except ValueError:
        raise BadAuditLog("an id or a hash in it is not in hexadecimal digits") from None


def _peer(value: object) -> PeerId:
    text = _text(value)
    try:
        public_key_of(text)
    except BadPeerId as error:
        raise BadAuditLog(f"a peer in it is none: {error}") from None
    return PeerId(text)
