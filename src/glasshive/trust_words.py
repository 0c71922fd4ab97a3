"""What the commands of signers say: who may sign, who has, what waits, what to do next."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from glasshive.dht.addresses import is_beyond

if TYPE_CHECKING:
    from glasshive.new_swarm import NewSwarm
    from glasshive.security.trust_root import RoleSignatures, RootTerms, TrustedRoot
    from glasshive.trust_files import Holder
    from glasshive.trust_folder import TrustFolder


def say(text: str) -> None:
    """Lines for people, on standard output."""
    typer.echo(text)


def moment(seconds: int) -> str:
    """A time for people."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


def confirm(yes: bool) -> None:
    """Return if the user wants to sign what was shown, or said so before.

    Raises SigningRefused where there is no terminal to ask at, and Abort for a no.
    """
    from glasshive.trust_folder import SigningRefused

    ask(
        "Sign this?",
        yes,
        lambda: SigningRefused(
            "nothing was signed: there is no terminal to ask whether to sign this; look at what is "
            "shown above, and pass --yes"
        ),
    )


def ask(question: str, yes: bool, unasked: Callable[[], Exception]) -> None:
    """Return if the user says yes, or said so before.

    Raises what `unasked` makes where there is no terminal to ask at, and Abort for a no.
    """
    if yes:
        return
    if not sys.stdin.isatty():
        raise unasked()
    typer.confirm(question, abort=True)


def say_terms(
    folder: TrustFolder, root: RootTerms | TrustedRoot, state: str, new: Iterable[Holder] = ()
) -> None:
    """Who may sign by a root, and how many must. `new` are holders that the folder lacks yet."""
    names = {one.key_id: f"{one.name} ({one.key_id[:16]})" for one in new}
    say(f"root {root.version} {state}; it ends {moment(root.expires_seconds)}")
    for what, keys, threshold in (
        ("the next root", root.root_keys, root.root_threshold),
        ("whitelists", root.whitelist_keys, root.whitelist_threshold),
    ):
        who = ", ".join(names.get(one) or folder.name_of(one) for one in keys)
        say(f"  {what}: {threshold} of {len(keys)} must sign: {who}")


def say_waiting(folder: TrustFolder) -> bool:
    """What waits for whose signatures, and what to do; whether anything does."""
    from glasshive.security.trust_root import whitelist_signatures

    document, file = folder.pending_root(), folder.pending_whitelist()
    roots = folder.roots()
    if document is not None:
        say(f"root {len(roots) + 1} waits for signatures")
        states = folder.root_states(document)
        for state in states:
            say(f"  {folder.in_words(state)}")
        _say_sign(folder, "swarm", states)
    if file is not None:
        say(f"whitelist {file.whitelist.version} waits for signatures")
        if not roots:
            say("  it can be signed once root 1 is complete")
        else:
            state = whitelist_signatures(file.document, roots[-1])
            say(f"  {folder.in_words(state)}")
            _say_sign(folder, "whitelist", [state])
    return document is not None or file is not None


def _say_sign(folder: TrustFolder, group: str, states: Iterable[RoleSignatures]) -> None:
    """The commands that sign what waits: here with the keys that are here, else in a copy."""
    where = [] if folder.place == Path() else ["--folder", str(folder.place)]
    keys = {one: folder.keys / f"{holder.name}.key" for one, holder in folder.holders().items()}
    commands: dict[str, None] = {}
    is_enough = True
    for state in states:
        here = [keys[one] for one in state.missing if one in keys and keys[one].is_file()]
        lacks = max(state.threshold - len(state.signed), 0)
        is_enough = is_enough and len(here) >= lacks
        for key in here[:lacks]:
            command = ["glasshive", group, "sign", *where, "--key", str(key)]
            commands[shlex.join(command)] = None
    if commands:
        say("  whose key is here signs with")
        for one in commands:
            say(f"    {one}")
    if not is_enough:
        say(f"  pass {folder.hive} and {folder.place / 'trust'} on; each signer runs, in the copy,")
        say(f"    glasshive {group} sign --key NAME.key")


def say_root_done(folder: TrustFolder) -> None:
    """What signing a root has come to."""
    from glasshive.trust_folder import whitelist_stands

    if folder.pending_root() is None:
        root = folder.root()
        say(f"root {root.version} is complete: {folder.root_path(root.version)}")
        newest = folder.newest_whitelist()
        if newest is not None and whitelist_stands(root, newest):
            say_publish(folder)
        elif newest is not None:
            say(
                f"whitelist {newest.whitelist.version} has too few signatures of its keys, so a "
                "host with this root alone falls to the floor:"
            )
            if folder.pending_whitelist() is None:
                say("  make the next whitelist with `glasshive whitelist bump`,")
            say("  have the next whitelist signed, and publish both together")
    say_waiting(folder)


def say_publish(folder: TrustFolder) -> None:
    """How hosts get what is complete."""
    from glasshive.security.membership import Act
    from glasshive.settings import load_settings
    from glasshive.swarm_members import is_let_in

    settings = load_settings(folder.hive)
    # The bootstrap peers of a private swarm take it from members only.
    here = "" if is_let_in(settings, settings.client_key_path, Act.READ) else " --only-here"
    place = _quoted(folder.place)
    say(f"bring it to the hosts: glasshive whitelist publish --folder {place}{here}")


def say_made(folder: TrustFolder, new: NewSwarm) -> None:
    """What was made with a swarm: which files are secret, what to hand to whom, what comes next."""
    place, whitelist = folder.place, new.whitelist
    kind = "public" if new.public else "private"
    say(f"made the {kind} swarm {whitelist.swarm!r} in {place}")
    roots = folder.roots()
    if roots:
        say_terms(folder, roots[-1], "is complete")
    if folder.newest_whitelist() is not None:
        say(f"whitelist 1 is complete; it ends {moment(whitelist.expires_seconds)}")
    say("\nsecret; keep each with its owner, and a copy offline:")
    for name in new.new_keys:
        say(f"  {folder.keys / f'{name}.key'}  signs for {name}; encrypted with the passphrase")
    makes = "the bootstrap peer" if new.public else "the bootstrap peer, who takes members in"
    say(f"  {folder.keys / 'bootstrap.key'}  makes who has it {makes}")
    if new.public:
        say("\nno secret; hand both, side by side, to every host and client:")
    else:
        say("\nno secret; who joins by an invite gets what it needs of them:")
    say(f"  {folder.hive}\n  {place / 'trust'}")
    say("\nnext:")
    if not say_waiting(folder):
        say_start(folder, new)
    if is_beyond(new.listen):
        say(
            "\nThe bootstrap peer listens for other machines too, as that line says. Hosts listen "
            "on this machine only, unless `serve` is told otherwise with --listen."
        )
    else:
        say(
            "\nHosts listen on this machine only, unless `serve` and `bootstrap` are told "
            "otherwise with --listen."
        )


def say_start(folder: TrustFolder, new: NewSwarm) -> None:
    """The commands that start a swarm whose first whitelist is complete."""
    place, config = _quoted(folder.place), _quoted(folder.hive)
    own = _quoted(folder.keys / "bootstrap.key")
    say(f"  glasshive whitelist show --folder {place}")
    found = "".join(f" --announce {one}" for one in new.announce)
    say(f"  glasshive bootstrap --config {config} --key {own} --listen {new.listen}{found}")
    # In a private swarm bootstrap peers take it from members only; who makes it is none yet.
    here = "" if new.public else " --only-here"
    say(f"  glasshive whitelist publish --folder {place}{here}    # and after every new whitelist")
    if new.public:
        say(f"  glasshive serve MODEL --config {config}")
        say(f"  glasshive status --config {config}")
    else:
        say(f"  glasshive invite host --folder {place}      # one word, for who lends a machine:")
        say("  glasshive join                               # there; then `glasshive serve MODEL`")
        say(f"  glasshive invite client --folder {place}    # and for who traces")


def _quoted(path: Path) -> str:
    """A path as it is written in a command."""
    return shlex.quote(str(path))
