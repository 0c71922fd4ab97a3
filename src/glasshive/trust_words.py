"""What the commands of signers say: who may sign, who has, what waits, what to do next."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from glasshive.new_swarm import NewSwarm
    from glasshive.security.trust_root import RootTerms, TrustedRoot
    from glasshive.trust_files import Holder
    from glasshive.trust_folder import TrustFolder


def say(text: str) -> None:
    """Lines for people, on standard output."""
    typer.echo(text)


def moment(seconds: int) -> str:
    """A time for people."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


def confirm(yes: bool) -> None:
    """Return if the user wants to sign what was shown, or said so before."""
    if not yes:
        typer.confirm("Sign this?", abort=True)


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
        for state in folder.root_states(document):
            say(f"  {folder.in_words(state)}")
        _say_pass_on(folder, "swarm")
    if file is not None:
        say(f"whitelist {file.whitelist.version} waits for signatures")
        if not roots:
            say("  it can be signed once root 1 is complete")
        else:
            say(f"  {folder.in_words(whitelist_signatures(file.document, roots[-1]))}")
        _say_pass_on(folder, "whitelist")
    return document is not None or file is not None


def _say_pass_on(folder: TrustFolder, group: str) -> None:
    say(
        f"  pass {folder.hive.name} and trust/ of {folder.place} on; each signer runs, in the copy,"
    )
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
    say(f"bring it to the hosts: glasshive whitelist publish --folder {_quoted(folder.place)}")


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
        say_start(folder, new.listen, public=new.public)
    say("\nHosts of this release listen on this machine only.")


def say_start(folder: TrustFolder, listen: str, *, public: bool) -> None:
    """The commands that start a swarm whose first whitelist is complete."""
    place, config = _quoted(folder.place), _quoted(folder.hive)
    own = _quoted(folder.keys / "bootstrap.key")
    say(f"  glasshive whitelist show --folder {place}")
    say(f"  glasshive bootstrap --config {config} --key {own} --listen {listen}")
    say(f"  glasshive whitelist publish --folder {place}    # and after every new whitelist")
    if public:
        say(f"  glasshive serve MODEL --config {config}")
        say(f"  glasshive status --config {config}")
    else:
        say(f"  glasshive invite host --folder {place}      # one word, for who lends a machine:")
        say("  glasshive join                               # there; then `glasshive serve MODEL`")
        say(f"  glasshive invite client --folder {place}    # and for who traces")


def _quoted(path: Path) -> str:
    """A path as it is written in a command."""
    return shlex.quote(str(path))
