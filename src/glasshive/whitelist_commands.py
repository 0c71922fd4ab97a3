"""`glasshive whitelist`: reading, comparing, changing, signing and publishing whitelists."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from glasshive.swarm_commands import (
    HERE,
    FilesArgument,
    FolderOption,
    PassphraseOption,
    SigningKeyOption,
    YesOption,
    open_folder,
    take_and_sign,
)
from glasshive.terminal import set_up_logging
from glasshive.trust_words import moment, say, say_publish, say_waiting

if TYPE_CHECKING:
    from glasshive.security.trust_store import TrustStore
    from glasshive.security.whitelist import Whitelist
    from glasshive.settings import Settings
    from glasshive.trust_files import WhitelistFile
    from glasshive.trust_folder import TrustFolder
    from glasshive.whitelist_report import Standing

app = typer.Typer(
    name="whitelist",
    help="What the hosts of a swarm may run, and who says so.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_PUBLISH_SECONDS: Final = 60.0

WhichArgument = Annotated[
    str | None,
    typer.Argument(help="A version, or a file; else the newest that is signed, or waits."),
]
ListOption = list[str] | None


@app.command()
def show(
    which: WhichArgument = None,
    folder: FolderOption = HERE,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    as_toml: Annotated[
        bool, typer.Option("--toml", help="Print the text that `bump --edit` reads.")
    ] = False,
) -> None:
    """What others can and cannot run by a whitelist, until when, and who signed it."""
    set_up_logging("pretty")
    trust = open_folder(folder)
    file = _chosen(trust, which)
    if as_toml:
        from glasshive.security.whitelist import whitelist_to_text

        print(whitelist_to_text(file.whitelist), end="")
        return
    _show(trust, file, as_json=as_json)


@app.command()
def diff(
    old: Annotated[str, typer.Argument(metavar="A", help="A version, a file, or a TOML text.")],
    new: Annotated[str, typer.Argument(metavar="B", help="Likewise.")],
    folder: FolderOption = HERE,
) -> None:
    """What B takes (-), gives (+) and changes (~) against A."""
    set_up_logging("pretty")
    _print_diff(_read(old, folder), _read(new, folder))


@app.command()
def verify(which: WhichArgument = None, folder: FolderOption = HERE) -> None:
    """Whether a host would take a whitelist now: signatures, threshold, version, swarm, dates."""
    set_up_logging("pretty")
    trust = open_folder(folder)
    file = _chosen(trust, which)
    found = trust.verify(file)
    say(
        f"whitelist {found.whitelist.version} of {trust.swarm!r} is good until "
        f"{moment(found.whitelist.expires_seconds)}, by root {trust.root().version}; signed by "
        f"{', '.join(trust.names_of(found.signers))}"
    )


@app.command()
def sign(
    files: FilesArgument = None,
    folder: FolderOption = HERE,
    key: SigningKeyOption = None,
    yes: YesOption = False,
    passphrase_file: PassphraseOption = None,
) -> None:
    """Sign the whitelist that waits; files of other signers add their signatures first."""
    set_up_logging("pretty")
    from glasshive.trust_files import read_whitelist_file

    trust = open_folder(folder)
    before = trust.newest_whitelist()

    def show_what_changes(file: WhitelistFile) -> None:
        trust.root()  # nothing is asked of the signer if nothing can be signed yet
        _show(trust, file)
        if before is not None:
            say(f"\nagainst whitelist {before.whitelist.version}:")
            _print_diff(before.whitelist, file.whitelist)

    take_and_sign(
        files or (),
        key,
        passphrase_file,
        yes,
        take=lambda one: trust.take_whitelist(read_whitelist_file(one)),
        waiting=trust.pending_whitelist,
        none_waits=f"no whitelist waits for signatures in {folder}; `glasshive whitelist bump` "
        "makes the next one, and a file that you were sent is named before --key",
        show=show_what_changes,
        sign=trust.sign_whitelist,
    )
    _say_done(trust)


@app.command()
def bump(
    add_op: Annotated[ListOption, typer.Option(help="Allow an op.")] = None,
    remove_op: Annotated[ListOption, typer.Option(help="Take an op away.")] = None,
    add_model: Annotated[
        ListOption,
        typer.Option(help="Allow a model (folder, fetched one, ID=NAME) and none not named."),
    ] = None,
    remove_model: Annotated[ListOption, typer.Option(help="By name or manifest id.")] = None,
    every_model: Annotated[bool, typer.Option("--every-model", help="Allow each model.")] = False,
    add_read: Annotated[
        ListOption, typer.Option(help="A pattern of modules to read, call, take weights of.")
    ] = None,
    remove_read: Annotated[ListOption, typer.Option(help="Such a pattern.")] = None,
    add_write: Annotated[ListOption, typer.Option(help="A pattern of modules to write.")] = None,
    remove_write: Annotated[ListOption, typer.Option(help="Such a pattern.")] = None,
    limit: Annotated[ListOption, typer.Option(help="NAME=NUMBER, such as seconds=60.")] = None,
    revoke_host: Annotated[
        ListOption,
        typer.Option(
            help="A peer id: other hosts refuse traces through it, clients with the root avoid it."
        ),
    ] = None,
    revoke_client: Annotated[
        ListOption, typer.Option(help="A peer id: hosts with the root refuse its traces.")
    ] = None,
    restore: Annotated[ListOption, typer.Option(help="A peer id that was revoked.")] = None,
    revoke_version: Annotated[
        list[int] | None,
        typer.Option(min=1, help="A higher version, never to be taken, even if it is signed."),
    ] = None,
    min_protocol: Annotated[int | None, typer.Option(min=1, help="Of hosts.")] = None,
    days: Annotated[
        int | None, typer.Option(min=1, max=366, help="How long it holds; else as long as before.")
    ] = None,
    edit: Annotated[
        Path | None,
        typer.Option(help="A text of `show --toml` that you changed, or a whitelist file."),
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Drop the whitelist that waits, for a higher version.")
    ] = False,
    folder: FolderOption = HERE,
) -> None:
    """Make the next version of the whitelist, which then waits for signatures. Options repeat."""
    set_up_logging("pretty")
    from glasshive.first_whitelist import DAY_SECONDS, named_models
    from glasshive.next_whitelist import Changes, next_whitelist
    from glasshive.trust_files import WhitelistFile

    trust = open_folder(folder)
    changes = Changes(
        add_op or (), remove_op or (), add_read or (), remove_read or (), add_write or (),
        remove_write or (), named_models(add_model or ()), remove_model or (), every_model,
        limit or (), revoke_host or (), revoke_client or (), restore or (), revoke_version or (),
        min_protocol, None if days is None else days * DAY_SECONDS,
    )  # fmt: skip
    before, above = _base(trust)
    text = before if edit is None else _read(str(edit), folder)
    if text.swarm != trust.swarm:
        raise typer.BadParameter(
            f"the text is of the swarm {text.swarm!r}, and the folder of {trust.swarm!r}",
            param_hint="--edit",
        )
    after = next_whitelist(text, changes, now_seconds=int(time.time()), above=above)
    trust.put_whitelist(WhitelistFile.unsigned(after), replace=replace)
    _print_diff(before, after)
    say_waiting(trust)


@app.command()
def publish(
    folder: FolderOption = HERE,
    only_here: Annotated[
        bool, typer.Option("--only-here", help="Ask no bootstrap peer; hosts here take it up.")
    ] = False,
    root_alone: Annotated[
        bool,
        typer.Option(
            "--root-alone",
            help="The newest root, though its keys signed no whitelist: hosts fall to the floor.",
        ),
    ] = False,
) -> None:
    """Bring roots and the newest whitelist to your hosts on this machine and the bootstrap peers.

    From them every host of the swarm has it, without a restart.
    """
    set_up_logging("pretty")
    from glasshive.settings import load_settings
    from glasshive.swarm_trust import store_of
    from glasshive.trust_files import TrustFolderError

    trust = open_folder(folder)
    trust.root()
    roots, newest = trust.roots(), trust.newest_whitelist()
    if newest is None and not root_alone:
        raise TrustFolderError(
            f"no whitelist of {folder} has its signatures yet; sign it with `glasshive whitelist "
            "sign`"
        )
    whitelist = None
    if newest is not None and not root_alone:
        # First: a host that takes the root and can't take the whitelist is at the floor.
        trust.verify(newest)
        whitelist = newest.document, newest.body
    settings = load_settings(trust.hive, swarm=trust.swarm)
    store = store_of(trust.swarm, roots[0].document)
    store.accept([one.document for one in roots[1:]], whitelist, after=roots[0].version)
    whose = "your hosts and bootstrap peers on this machine (same user, same GLASSHIVE_DATA)"
    say(
        f"{whose} take up root {store.root.version} and whitelist {store.highest_version} within "
        "seconds"
        if store.whitelist is not None
        else f"{whose} take up root {store.root.version} within seconds, and have no whitelist "
        "under it: they are at the floor"
    )
    if not only_here:
        _tell(settings, store)


# What they share ---------------------------------------------------------------------------------


def _chosen(trust: TrustFolder, which: str | None) -> WhitelistFile:
    """The whitelist that is meant. Raises TrustFolderError, BadWhitelist."""
    from glasshive.trust_files import read_whitelist_file

    if which is not None:
        if which.isdecimal():
            return trust.whitelist_file(int(which))
        return read_whitelist_file(Path(which))
    return trust.newest_whitelist() or trust.pending_whitelist() or trust.whitelist_file(1)


def _read(which: str, folder: Path) -> Whitelist:
    """A whitelist by version, file or TOML text. Raises TrustFolderError, BadWhitelist."""
    from glasshive.trust_files import read_whitelist

    if which.isdecimal():
        return open_folder(folder).whitelist_file(int(which)).whitelist
    return read_whitelist(Path(which))


def _base(trust: TrustFolder) -> tuple[Whitelist, int]:
    """What the next whitelist is made from, and which version it must be above.

    A version that waited may be complete at another signer, so it is never used for another; nor is
    one that the newest revokes, whatever an edited text says.
    """
    newest, waiting = trust.newest_whitelist(), trust.pending_whitelist()
    base = (newest or waiting or trust.whitelist_file(1)).whitelist
    above = base.version if waiting is None else waiting.whitelist.version
    while above + 1 in base.revoked_versions:
        above += 1
    return base, above


def _show(trust: TrustFolder, file: WhitelistFile, *, as_json: bool = False) -> None:
    from rich.console import Console

    from glasshive.whitelist_report import print_report, report_of

    report = report_of(file.whitelist, _standing(trust, file), time.time())
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        print_report(report, Console())


def _standing(trust: TrustFolder, file: WhitelistFile) -> Standing:
    from glasshive.security.errors import SecurityError, UnderThreshold
    from glasshive.security.trust_root import whitelist_signatures
    from glasshive.whitelist_report import Standing

    roots = trust.roots()
    if not roots:
        return Standing("waits for signatures", False, (), "root 1 is not complete yet")
    state = whitelist_signatures(file.document, roots[-1])
    signers = tuple(trust.names_of(state.signed))
    try:
        trust.verify(file)
    except UnderThreshold:
        return Standing("waits for signatures", False, signers, trust.in_words(state))
    except SecurityError as error:
        return Standing(f"not in force: {error}", False, signers, trust.in_words(state))
    return Standing("signed and in force", True, signers, trust.in_words(state))


def _print_diff(old: Whitelist, new: Whitelist) -> None:
    from rich.console import Console
    from rich.text import Text

    from glasshive.security.policy import diff_whitelists

    colours = {"-": "red", "+": "green", "~": "yellow"}
    console = Console(highlight=False, soft_wrap=True)
    lines = diff_whitelists(old, new)
    for line in lines:
        console.print(Text(line, style=colours[line[0]]))
    if not lines:
        console.print("they are equal")


def _say_done(trust: TrustFolder) -> None:
    """What signing a whitelist has come to."""
    newest = trust.newest_whitelist()
    if not say_waiting(trust) and newest is not None:
        version = newest.whitelist.version
        say(f"whitelist {version} is complete: {trust.whitelist_path(version)}")
        say_publish(trust)


def _tell(settings: Settings, store: TrustStore) -> None:
    """Exchange with the bootstrap peers, side by side. Raises PeerUnreachable if none takes it."""
    import asyncio

    from glasshive.dht.errors import PeerUnreachable, SwarmError
    from glasshive.dht.hivemind_transport import HivemindTransport
    from glasshive.dht.transport import PeerAddress
    from glasshive.dht.trust_exchange import exchange_trust
    from glasshive.security.errors import NotAMember, SecurityError
    from glasshive.security.keys import Identity
    from glasshive.security.membership import Act
    from glasshive.swarm_members import open_gate

    bootstraps = [PeerAddress.parse(one) for one in settings.bootstraps]
    identity, gate = Identity.generate(), None
    if settings.issuers:
        identity = Identity.load_or_create(settings.client_key_path)
        try:
            gate = open_gate(settings, identity, Act.READ, settings.client_key_path)
        except NotAMember as error:
            error.args = (
                f"no bootstrap peer was told: {error}; or publish with --only-here, on the machine "
                "of a bootstrap peer or host, who take it up there and tell the others",
            )
            raise
    told: list[str] = []

    async def tell() -> None:
        transport = await HivemindTransport.create(
            identity, listen=(), dht="none", swarm=settings.swarm, gate=gate
        )
        try:
            await asyncio.gather(*(tell_one(transport, one) for one in bootstraps))
        finally:
            await transport.close()

    async def tell_one(transport: HivemindTransport, peer: PeerAddress) -> None:
        try:
            theirs = await exchange_trust(transport, peer, store)
        except (SwarmError, SecurityError) as error:  # its own trouble, and no other peer's
            say(f"bootstrap peer {peer.peer_id}: {error}")
        else:
            told.append(peer.peer_id)
            say(f"bootstrap peer {peer.peer_id} has whitelist {theirs.whitelist}")

    async def in_time() -> None:
        async with asyncio.timeout(_PUBLISH_SECONDS):
            await tell()

    with contextlib.suppress(TimeoutError):
        asyncio.run(in_time())
    if not told:
        raise PeerUnreachable(
            "no bootstrap peer took it; start one (`glasshive bootstrap`), and publish again"
        )
