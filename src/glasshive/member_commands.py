"""`glasshive invite`, `join`, `members`, `quota`, `revoke`: who belongs to a private swarm.

All but `join` work on the issuer's book, which lies beside the bootstrap peer's key in the folder
that `glasshive swarm init` made; a bootstrap peer that runs takes up at once what they change.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from glasshive.swarm_commands import HERE, FolderOption, open_folder
from glasshive.terminal import set_up_logging
from glasshive.trust_words import ask, moment, say

if TYPE_CHECKING:
    from rich.table import Table

    from glasshive.security.book_state import Member
    from glasshive.security.invite_book import InviteBook, InviteEntry
    from glasshive.security.keys import PeerId
    from glasshive.settings import Settings

app = typer.Typer()

_DAY_SECONDS: Final = 86_400

IssuerKeyOption = Annotated[
    Path | None,
    typer.Option("--key", help="The issuer's key; else keys/bootstrap.key in the folder."),
]
TracesOption = Annotated[
    str | None, typer.Option("--traces", help="Quota: traces at a time on each host, or none.")
]
SecondsOption = Annotated[
    str | None,
    typer.Option("--seconds-a-day", help="Quota: computing seconds a day on each host, or none."),
]
SavedBytesOption = Annotated[
    str | None,
    typer.Option(
        "--saved-bytes-a-day", help="Quota: bytes saved a day on each host, as 10GB, or none."
    ),
]


@app.command()
def invite(
    role: Annotated[str, typer.Argument(help="What the member will be: host, client or admin.")],
    uses: Annotated[int, typer.Option(min=1, max=1024, help="How many keys may join by it.")] = 1,
    days: Annotated[float, typer.Option(min=0.01, max=30, help="How long it may be used.")] = 7,
    traces: TracesOption = None,
    seconds_a_day: SecondsOption = None,
    saved_bytes_a_day: SavedBytesOption = None,
    folder: FolderOption = HERE,
    key: IssuerKeyOption = None,
) -> None:
    """Make an invite to a private swarm: one word, for whoever shall join by it."""
    set_up_logging("pretty")
    from glasshive.security.invites import Invite
    from glasshive.security.quota import Quota
    from glasshive.security.trust_root import root_digest
    from glasshive.swarm_trust import read_root

    settings, book = _book(folder, key)
    wanted = _role(role)
    quota = Quota(**_quota_changes(traces, seconds_a_day, saved_bytes_a_day))
    if not any(one.endswith(f"/p2p/{book.issuer}") for one in settings.bootstraps):
        from glasshive.settings import ConfigError

        raise ConfigError(
            f"{folder / 'hive.toml'} names no address of the issuer {book.issuer} among its "
            "bootstraps, and who joins has to reach it; add its address"
        )
    root = read_root(settings.root) if settings.root else b""
    now = time.time()
    token = book.invite(
        wanted,
        addresses=settings.bootstraps,
        issuers=settings.issuers,
        whitelist_root=bytes.fromhex(root_digest(root)),
        now=now,
        uses=uses,
        lifetime_seconds=days * _DAY_SECONDS,
        quota=quota,
    )
    made = Invite.parse(token, now)
    whom = "one key" if uses == 1 else f"{uses} keys"
    article = "an" if role == "admin" else "a"
    _note(
        f"an invite for {whom} to join {settings.swarm!r} as {article} {made.role}, until "
        f"{moment(int(made.expires_at_seconds))}.\n"
        f"Quota of each key on each host: {quota.describe()}.\n"
        "Whoever has this word can join by it: hand it over by a channel that you trust.\n"
        f"They run `glasshive join`, and paste it. Take it back, and all who came by it, with\n"
        f"  glasshive revoke --invite {made.invite_id.hex()[:16]} --folder {_quoted(folder)}"
    )
    print(token)


@app.command()
def join(
    token: Annotated[
        str | None, typer.Argument(help="The invite; without it, it is asked for, or read.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="The hive.toml to write; else the default one.")
    ] = None,
    key: Annotated[
        Path | None,
        typer.Option("--key", help="The key that joins; else this user's for the invite's role."),
    ] = None,
) -> None:
    """Join a private swarm by an invite; afterwards `glasshive serve` and `connect` find it."""
    set_up_logging("pretty")
    from glasshive.new_member import join_swarm
    from glasshive.security.invites import Invite
    from glasshive.security.keys import Identity
    from glasshive.security.membership import Role
    from glasshive.settings import config_path, load_settings

    if token is None:
        token = typer.prompt("The invite", hide_input=True) if sys.stdin.isatty() else ""
        token = token or sys.stdin.read(1 << 16)
    found = Invite.parse(token, time.time())
    place = config_path(config)
    settings = load_settings(place, may_be_missing=True)
    hosts = found.role is Role.HOST
    own = settings.host_key_path if hosts else settings.client_key_path
    path = key or own
    identity = Identity.load_or_create(path)
    joined = join_swarm(found, identity, path, place)
    until = moment(int(joined.certificate.expires_at_seconds))
    say(f"joined the private swarm {found.swarm!r} as a {found.role}, until {until};")
    say("the certificate is renewed by itself while a process of this key runs, before it ends")
    say(f"  key     {path}\n  peer    {identity.peer_id}")
    say(f"  config  {place}{'' if joined.wrote_config else ' (as it was)'}")
    from_default = config_path() == place
    where = "" if from_default else f" --config {_quoted(place)}"
    with_key = "" if path == own else f" --key {_quoted(path)}"
    say("\nnext:")
    if hosts:
        say(f"  glasshive serve MODEL{where}{with_key}")
    else:
        say(f"  glasshive status{where}{with_key}")
        argument = "" if from_default else f'"{place}"'
        say(f"  python: swarm = glasshive.connect({argument})")


@app.command()
def members(
    folder: FolderOption = HERE,
    key: IssuerKeyOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Who belongs to a private swarm, by which invite and until when; and the invites."""
    set_up_logging("pretty")
    settings, book = _book(folder, key)
    found, open_invites = book.members(), book.invites()
    if as_json:
        rows = {
            "swarm": settings.swarm,
            "members": [_member_row(one) for one in found],
            "invites": [_invite_row(one) for one in open_invites],
        }
        print(json.dumps(rows, indent=2))
        return
    from rich.console import Console

    console = Console()
    if not found:
        say(f"nobody has joined {settings.swarm!r} yet; `glasshive invite host` lets a host in")
    else:
        table = _table("peer", "role", "since", "until", "quota", "invite", title=settings.swarm)
        now = time.time()
        for member in found:
            until = "revoked" if member.revoked else moment(int(member.until_seconds))
            if member.until_seconds < now and not member.revoked:
                until = f"ended {until}"
            by = member.invite.hex()[:8] or "none"
            since = moment(int(member.since_seconds))
            quota = member.quota.describe()
            # The bootstrap peer: it makes the others, and is a member by its own word.
            role = "issuer" if member.peer_id in settings.issuers else member.role.value
            table.add_row(f"…{member.peer_id[-8:]}", role, since, until, quota, by)
        console.print(table)
    if open_invites:
        table = _table("invite", "role", "used", "until", "quota", title="invites")
        for one in open_invites:
            until = "revoked" if one.revoked else moment(int(one.expires_at_seconds))
            used = f"{one.used} of {one.uses}"
            quota = one.quota.describe()
            table.add_row(one.invite_id.hex()[:8], one.role.value, used, until, quota)
        console.print(table)


@app.command()
def quota(
    peer: Annotated[str, typer.Argument(help="A member, by peer id or the end of it.")],
    traces: TracesOption = None,
    seconds_a_day: SecondsOption = None,
    saved_bytes_a_day: SavedBytesOption = None,
    folder: FolderOption = HERE,
    key: IssuerKeyOption = None,
) -> None:
    """Change what each host lets a member of a private swarm use; what isn't named stays."""
    set_up_logging("pretty")
    changes = _quota_changes(traces, seconds_a_day, saved_bytes_a_day)
    if not changes:
        raise typer.BadParameter(
            "name what to change: --traces, --seconds-a-day or --saved-bytes-a-day; "
            "`glasshive members` shows what is"
        )
    _, book = _book(folder, key)
    peer_id = _peer(peer, book.members())
    for one in book.change_quota(peer_id, changes, time.time()):
        by = one.invite.hex()[:16] or "none"
        say(f"{peer_id}, {one.role} by the invite {by}: {one.quota.describe()}")
    say(
        "it stands in the member's next certificate, which it gets within a day; until then the "
        "one that it has counts. Each host counts for itself"
    )


@app.command()
def revoke(
    peers: Annotated[list[str] | None, typer.Argument(help="Members, by peer id.")] = None,
    invite: Annotated[
        list[str] | None,
        typer.Option("--invite", help="An invite, and all who came by it. May be repeated."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Don't ask once more.")] = False,
    folder: FolderOption = HERE,
    key: IssuerKeyOption = None,
) -> None:
    """Throw members out of a private swarm, or take invites back. A key never comes in again."""
    set_up_logging("pretty")
    if not peers and not invite:
        raise typer.BadParameter("name members by peer id, or invites with --invite")
    settings, book = _book(folder, key)
    known = book.members()
    gone = [_peer(one, known) for one in peers or ()]
    invites = [_invite_id(one, book) for one in invite or ()]
    by_invite = [one for one in known if one.invite in invites and not one.revoked]
    for peer_id in gone:
        as_what = ", ".join(one.role.value for one in known if one.peer_id == peer_id)
        say(f"{peer_id}, {as_what or 'not in the book of members'}")
    for one in by_invite:
        say(f"{one.peer_id}, {one.role}, by the invite {one.invite.hex()[:16]}")
    ask(
        f"Throw out of {settings.swarm!r} for good?",
        yes,
        lambda: typer.BadParameter(
            "nothing was revoked: there is no terminal to ask whether to throw them out of "
            f"{settings.swarm!r} for good; look at what is shown above, and pass --yes"
        ),
    )
    everyone = dict.fromkeys([*gone, *(one.peer_id for one in by_invite)])
    book.revoke(time.time(), peers=everyone, invites=invites)
    say(
        "done. A bootstrap peer that runs takes it up within seconds, hosts and clients from it; "
        "while none does, certificates end by themselves within 7 days"
    )


def _book(folder: Path, key: Path | None) -> tuple[Settings, InviteBook]:
    """The settings and the book of the issuer.

    Raises TrustFolderError, ConfigError and KeyFileError.
    """
    from glasshive.security.errors import KeyFileError
    from glasshive.security.invite_book import InviteBook
    from glasshive.security.keys import Identity
    from glasshive.settings import ConfigError, load_settings
    from glasshive.swarm_members import book_path, member_files

    settings = load_settings(open_folder(folder).hive)
    if member_files(settings) is None:
        raise ConfigError(
            f"the swarm {settings.swarm!r} of {folder / 'hive.toml'} is not private: it names no "
            "issuers, and whoever reaches it belongs to it; `glasshive swarm init` makes a "
            "private one"
        )
    place = key or folder / "keys/bootstrap.key"
    if not place.exists():
        raise KeyFileError(
            f"there is no key {place}; members are made on the machine that has the issuer's key, "
            "name it with --key"
        )
    identity = Identity.load_or_create(place)
    if identity.peer_id not in settings.issuers:
        raise ConfigError(
            f"the key {place} is {identity.peer_id}, who is no issuer by {folder / 'hive.toml'}; "
            f"the issuers are {', '.join(settings.issuers)}"
        )
    return settings, InviteBook(book_path(place), identity, settings.swarm)


def _table(*columns: str, title: str) -> Table:
    """A table of which nothing is cut: where it is too wide, cells go on below, numbers whole."""
    from rich.table import Table

    table = Table(title=title)
    for one in columns:
        table.add_column(one, overflow="fold", min_width=14 if one == "quota" else None)
    return table


def _role(text: str) -> Any:
    from glasshive.security.membership import Role

    if text not in list(Role):
        raise typer.BadParameter(
            f"got the role {text[:40]!r}, wanted {', '.join(Role)}", param_hint="ROLE"
        )
    return Role(text)


def _peer(text: str, known: tuple[Member, ...]) -> PeerId:
    """The peer that is meant, by its whole id or by a member's end of one, as `members` has it."""
    from glasshive.security.errors import BadPeerId
    from glasshive.security.keys import PeerId, public_key_of

    text = text.removeprefix("…")
    ends = {one.peer_id for one in known if len(text) >= 6 and one.peer_id.endswith(text)}
    if len(ends) == 1:
        return ends.pop()
    try:
        public_key_of(text)
    except BadPeerId as error:
        raise typer.BadParameter(
            f"{error}; `glasshive members` lists those who joined", param_hint="PEERS"
        ) from None
    return PeerId(text)


def _invite_id(text: str, book: InviteBook) -> bytes:
    """The invite that is meant, by the beginning of its id."""
    known = {one.invite_id for one in book.invites()} | {one.invite for one in book.members()}
    found = [one for one in known if one and len(text) >= 4 and one.hex().startswith(text.lower())]
    if len(found) != 1:
        raise typer.BadParameter(
            f"{'no invite is' if not found else 'several invites are'} called {text[:40]!r}; "
            "`glasshive members` lists them",
            param_hint="--invite",
        )
    return found[0]


def _quota_changes(
    traces: str | None, seconds_a_day: str | None, saved_bytes_a_day: str | None
) -> dict[str, int | None]:
    """The numbers that were given, by their names in a Quota."""
    from pydantic import ByteSize, TypeAdapter

    given = (
        ("traces", traces, int, "a whole number such as 4"),
        ("seconds_a_day", seconds_a_day, int, "a whole number such as 3600"),
        (
            "saved_bytes_a_day",
            saved_bytes_a_day,
            TypeAdapter(ByteSize).validate_python,
            "bytes, such as 5000000 or 10GB",
        ),
    )
    return {
        name: None if text == "none" else _quota_number(name, text, number, wanted)
        for name, text, number, wanted in given
        if text is not None
    }


def _quota_number(name: str, text: str, number: Callable[[str], int], wanted: str) -> int:
    from glasshive.security.quota import MAX_QUOTA

    try:
        found = int(number(text))
    except ValueError:
        found = -1
    if not 0 <= found <= MAX_QUOTA:
        raise typer.BadParameter(
            f"got {text[:40]!r}, wanted {wanted}, at most {MAX_QUOTA}; or none",
            param_hint=f"--{name.replace('_', '-')}",
        )
    return found


def _member_row(one: Member) -> dict[str, Any]:
    return {
        "peer": one.peer_id,
        "role": one.role.value,
        "since_seconds": one.since_seconds,
        "until_seconds": one.until_seconds,
        "quota": asdict(one.quota),
        "invite": one.invite.hex(),
        "revoked": one.revoked,
    }


def _invite_row(one: InviteEntry) -> dict[str, Any]:
    return {
        "invite": one.invite_id.hex(),
        "role": one.role.value,
        "uses": one.uses,
        "used": one.used,
        "until_seconds": one.expires_at_seconds,
        "quota": asdict(one.quota),
        "revoked": one.revoked,
    }


def _note(text: str) -> None:
    """Words for a person, beside what a script reads from standard output."""
    typer.echo(text, err=True)


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))
