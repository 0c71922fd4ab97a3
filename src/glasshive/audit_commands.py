"""`glasshive audit`: reading, exporting and verifying a host's audit log."""

from __future__ import annotations

import sys
import time
from collections import deque
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from glasshive.terminal import print_rows, set_up_logging
from glasshive.trust_words import moment, say

if TYPE_CHECKING:
    from collections.abc import Iterator

    from glasshive.security.audit_entry import SignedEntry
    from glasshive.security.audit_trail import VerifiedExport
    from glasshive.security.keys import Identity, PeerId
    from glasshive.settings import Settings

app = typer.Typer(
    name="audit",
    help="Who ran which graph on this host: its signed audit log.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ConfigOption = Annotated[
    Path | None, typer.Option("--config", help="The host's hive.toml; else the default one.")
]
KeyOption = Annotated[
    Path | None, typer.Option("--key", help="The host's key; else host.key in the data folder.")
]

_COLUMNS = ("entry", "time", "client", "outcome", "graph", "seconds", "saved")
_WHOLE_COLUMNS = (
    *("entry", "time", "client", "role", "invite", "outcome", "graph", "nodes", "trace"),
    *("model", "blocks", "dtype", "seconds", "saved bytes"),
)


@app.command()
def show(
    last: Annotated[int, typer.Option(min=0, help="So many of the newest entries; 0: all.")] = 20,
    client: Annotated[
        str | None, typer.Option(help="Only of this client, by peer id or the end of it.")
    ] = None,
    wide: Annotated[
        bool, typer.Option("--wide", help="All that is written down, on lines as long as it takes.")
    ] = False,
    config: ConfigOption = None,
    key: KeyOption = None,
) -> None:
    """Print the newest entries of this host's audit log, after checking them."""
    set_up_logging("pretty")
    from glasshive.security.audit_trail import entries_in, log_files

    settings, identity = _host(config, key)
    files = log_files(_folder(settings, identity.peer_id))
    if last and client is None:
        files = files[-2:]  # the newest may just have been begun
    with _readable():
        found = deque(
            (
                one
                for one in entries_in(files, identity.peer_id)
                if client is None or one.entry.client.endswith(client.removeprefix("…"))
            ),
            maxlen=last or None,
        )
    say(f"{settings.swarm}, host {identity.peer_id}; times are UTC")
    rows = [_whole_row(one) if wide else _row(one) for one in found]
    print_rows(_WHOLE_COLUMNS if wide else _COLUMNS, rows, whole=wide)


def _row(one: SignedEntry) -> tuple[str, ...]:
    """An entry in `_COLUMNS`, which fit 80 characters: the end of its ids, the start of hashes."""
    from pydantic import ByteSize

    entry = one.entry
    return (
        *(str(one.number), _time(one), f"…{entry.client[-8:]}", entry.outcome),
        *(entry.graph_sha256.hex()[:8], f"{entry.compute_milliseconds / 1000:.3f}"),
        ByteSize(entry.saved_bytes).human_readable(decimal=True),
    )


def _whole_row(one: SignedEntry) -> tuple[str, ...]:
    """An entry in `_WHOLE_COLUMNS`."""
    entry = one.entry
    return (
        *(str(one.number), _time(one), entry.client, entry.role or "-", entry.invite.hex() or "-"),
        *(entry.outcome, entry.graph_sha256.hex(), str(entry.nodes), entry.trace_id.hex()),
        *(entry.model_id, entry.blocks, entry.dtype),
        *(f"{entry.compute_milliseconds / 1000:.3f}", f"{entry.saved_bytes:,}"),
    )


def _time(one: SignedEntry) -> str:
    return moment(one.entry.time_milliseconds // 1000).removesuffix(" UTC")


@app.command()
def export(
    out: Annotated[
        Path | None, typer.Option("--out", help="A new file; else standard output.")
    ] = None,
    config: ConfigOption = None,
    key: KeyOption = None,
) -> None:
    """Write the whole audit log of this host as JSON lines, with a signed last line."""
    set_up_logging("pretty")
    from glasshive.security.audit_trail import export_log

    settings, identity = _host(config, key)
    folder = _folder(settings, identity.peer_id)
    now = round(time.time() * 1000)
    if out is None:
        with _readable():
            export_log(folder, identity, settings.swarm, sys.stdout.buffer, now)
        return
    whole = False
    with _readable(), out.open("xb") as file:
        try:
            end = export_log(folder, identity, settings.swarm, file, now)
            whole = True
        finally:
            if not whole:
                out.unlink(missing_ok=True)
    say(
        f"{out} has entries {end.first} to {end.last}; anybody checks it, on any machine, with\n"
        f"  glasshive audit verify {out.name} --host {identity.peer_id}\n"
        "Give it to somebody else to keep: against an earlier export the next one can be checked"
    )


@app.command()
def verify(
    file: Annotated[Path, typer.Argument(help="A file of `glasshive audit export`.")],
    host: Annotated[
        str | None, typer.Option("--host", help="The peer id of the host whose log it is.")
    ] = None,
    extends: Annotated[
        Path | None,
        typer.Option("--extends", help="An earlier export, from which this one must go on."),
    ] = None,
) -> None:
    """Whether an export is whole and as that host signed it. Needs no key and no network."""
    set_up_logging("pretty")
    from glasshive.security.audit_trail import verify_export

    if host is None:
        raise typer.BadParameter(
            "name the host whose log it is by its peer id, as you know it and not as the file says "
            "it: what follows /p2p/ in the address that `glasshive serve` prints, or peer_id in "
            "`glasshive status --json`",
            param_hint="--host",
        )
    peer_id = _peer(host)
    with _readable():
        earlier = None if extends is None else verify_export(extends, peer_id).end
        found = verify_export(file, peer_id, extends=earlier)
    _say_verified(found, peer_id)
    if extends is not None:
        say(f"it goes on from {extends}: nothing that is there was changed or taken out")
    else:
        say(
            "whether the host has left out its newest entries, or has signed another history, only "
            "an earlier export that you kept can show: --extends EARLIER"
        )


def _say_verified(found: VerifiedExport, host: PeerId) -> None:
    end = found.end
    say(f"signatures and chain hold: the audit log of {host} in swarm {end.swarm!r}")
    if found.from_milliseconds is None or found.to_milliseconds is None:
        say("  it had no entries")
    else:
        times = (found.from_milliseconds, found.to_milliseconds)
        first, last = (moment(one // 1000) for one in times)
        say(f"  entries {end.first} to {end.last}, {first} to {last}")
    say(f"  exported {moment(end.time_milliseconds // 1000)}, head {end.head.hex()}")
    if end.first > 1:
        say(f"  entries before {end.first} were not in the host's folder any more")


def _host(config: Path | None, key: Path | None) -> tuple[Settings, Identity]:
    """The settings and the identity of the host. Raises ConfigError and KeyFileError."""
    from glasshive.security.errors import KeyFileError
    from glasshive.security.keys import Identity
    from glasshive.settings import load_settings

    settings = load_settings(config, host_key=key)
    place = settings.host_key_path
    if not place.exists():
        raise KeyFileError(
            f"there is no key {place}; an audit log is read and exported on the host's machine, "
            "name its key with --key"
        )
    return settings, Identity.load_or_create(place)


def _folder(settings: Settings, host: PeerId) -> Path:
    """The folder of the host's log, in which there is one. Raises AuditLogError."""
    from glasshive.host_accounts import AuditLogError, audit_folder
    from glasshive.security.audit_trail import log_files

    folder = audit_folder(settings, host)
    if not log_files(folder):
        raise AuditLogError(
            f"there is no audit log of the host {host} in swarm {settings.swarm!r} in {folder}; a "
            "host keeps one in private swarms, and with `audit = true` in its hive.toml, from its "
            "first trace on; name the config with --config and its key with --key"
        )
    return folder


@contextmanager
def _readable() -> Iterator[None]:
    """Raises AuditLogError for an OSError inside."""
    from glasshive.host_accounts import AuditLogError

    try:
        yield
    except OSError as error:
        raise AuditLogError(
            f"can't read or write {error.filename or 'the audit log'}: {error.strerror or error}; "
            "check the path, and give --out the name of a new file"
        ) from None


def _peer(text: str) -> PeerId:
    from glasshive.security.errors import BadPeerId
    from glasshive.security.keys import PeerId, public_key_of

    try:
        public_key_of(text)
    except BadPeerId as error:
        raise typer.BadParameter(str(error), param_hint="--host") from None
    return PeerId(text)
