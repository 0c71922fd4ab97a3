"""`glasshive swarm`: making a swarm, the keys of who signs for it, and changing who that is."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal, TypeVar

import typer

from glasshive.terminal import set_up_logging
from glasshive.trust_words import confirm, say, say_made, say_root_done, say_terms, say_waiting

if TYPE_CHECKING:
    from glasshive.new_swarm import NewKey
    from glasshive.security.signing_keys import SigningKey
    from glasshive.trust_files import Holder
    from glasshive.trust_folder import TrustFolder

app = typer.Typer(
    name="swarm",
    help="Make a swarm of your own, and say who signs for it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

BOOTSTRAP_LISTEN: Final = "/ip4/127.0.0.1/tcp/31330"
_PUBLIC_THRESHOLDS: Final = (3, 2)
_PRIVATE_THRESHOLDS: Final = (1, 1)
_SWARM_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._ -]{0,63}")
_HOLDER_HELP: Final = "a name (its key is made here) or a .pub file. May be repeated."

FolderOption = Annotated[Path, typer.Option("--folder", help="The swarm's folder.")]
SigningKeyOption = Annotated[
    Path | None, typer.Option("--key", help="Your signing key, such as ann.key.")
]
SigningKeysOption = Annotated[
    list[Path] | None, typer.Option("--key", help="A signing key to sign with. May be repeated.")
]
PassphraseOption = Annotated[
    Path | None,
    typer.Option("--passphrase-file", help="A file of mode 0600 with the passphrase; else asked."),
]
YesOption = Annotated[bool, typer.Option("--yes", help="Sign without being asked once more.")]
FilesArgument = Annotated[
    list[Path] | None, typer.Argument(help="Files that other signers sent you.")
]
HERE: Final = Path()

_T = TypeVar("_T")


@app.command()
def init(
    place: Annotated[Path, typer.Argument(help="A new folder for the swarm, such as lab.")],
    public: Annotated[
        bool, typer.Option("--public/--private", help="For strangers, or for an institution.")
    ] = False,
    name: Annotated[str | None, typer.Option(help="The swarm's name; else the folder's.")] = None,
    holder: Annotated[
        list[str] | None, typer.Option(help=f"Who signs roots and whitelists: {_HOLDER_HELP}")
    ] = None,
    root_holder: Annotated[
        list[str] | None, typer.Option(help=f"Who signs roots only: {_HOLDER_HELP}")
    ] = None,
    whitelist_holder: Annotated[
        list[str] | None, typer.Option(help=f"Who signs whitelists only: {_HOLDER_HELP}")
    ] = None,
    root_threshold: Annotated[
        int | None, typer.Option(min=1, help="Signatures of a root; else 1, public 3.")
    ] = None,
    whitelist_threshold: Annotated[
        int | None, typer.Option(min=1, help="Signatures of a whitelist; else 1, public 2.")
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(help="Allow only this model: folder, fetched one, ID=NAME. May be repeated."),
    ] = None,
    days: Annotated[
        int | None, typer.Option(min=1, max=366, help="The whitelist's; else 365, public 30.")
    ] = None,
    listen: Annotated[
        str, typer.Option(help="Where the bootstrap peer will listen.")
    ] = BOOTSTRAP_LISTEN,
    announce: Annotated[
        list[str] | None,
        typer.Option(help="Where others find it, if not at its own address. May be repeated."),
    ] = None,
    key: SigningKeysOption = None,
    passphrase_file: PassphraseOption = None,
) -> None:
    """Make a swarm: keys, root, first whitelist, bootstrap key and hive.toml in a new folder."""
    set_up_logging("pretty")
    from glasshive.first_whitelist import first_whitelist, named_models
    from glasshive.new_swarm import NewSwarm, check_new, make_swarm
    from glasshive.passphrases import load_signing_key

    check_new(place)
    swarm = place.resolve().name if name is None else name
    _check_swarm(swarm, public)
    _check_bootstrap_place(listen, announce or ())
    both = holder or []
    if not (public or both or root_holder or whitelist_holder):
        both = ["owner"]
    for_root = list(dict.fromkeys([*both, *(root_holder or [])]))
    for_whitelist = list(dict.fromkeys([*both, *(whitelist_holder or [])]))
    usual = _PUBLIC_THRESHOLDS if public else _PRIVATE_THRESHOLDS
    thresholds = (
        _threshold("root", root_threshold, usual[0], len(for_root)),
        _threshold("whitelist", whitelist_threshold, usual[1], len(for_whitelist)),
    )
    whitelist = first_whitelist(
        swarm,
        public=public,
        models=named_models(model) if model else None,
        now_seconds=int(time.time()),
        days=days,
    )
    keys = [load_signing_key(one, passphrase_file) for one in key or ()]
    holders, new_keys = _holders([*for_root, *for_whitelist], passphrase_file)
    new = NewSwarm(
        whitelist,
        listen,
        [holders[one] for one in for_root],
        thresholds[0],
        [holders[one] for one in for_whitelist],
        thresholds[1],
        new_keys,
        keys,
        public,
        tuple(announce or ()),
    )
    say_made(make_swarm(place, new, time.time), new)


@app.command()
def key(
    name: Annotated[str, typer.Argument(help="Your name among the signers, such as ann.")],
    out: Annotated[Path, typer.Option(help="The folder for both files.")] = HERE,
    passphrase_file: PassphraseOption = None,
) -> None:
    """Make a signing key on your own machine: NAME.key to keep, NAME.pub to pass around."""
    set_up_logging("pretty")
    from glasshive.passphrases import new_passphrase
    from glasshive.security.signing_keys import SigningKey
    from glasshive.trust_files import Holder, check_holder_name, write_new

    check_holder_name(name)
    made = SigningKey.generate()
    holder = Holder(name, made.public_key)
    secret, public = out / f"{name}.key", out / f"{name}.pub"
    made.save(secret, new_passphrase(f"{name}'s new key", passphrase_file))
    try:
        write_new(public, holder.to_text().encode())
    except BaseException:
        secret.unlink()  # it was made just now, and nobody has seen its public part
        raise
    say(f"secret, yours alone, keep a copy offline: {secret}")
    say(f"public, send it to whoever makes the root: {public}")
    say(f"its id, to be compared by telephone:       {holder.key_id}")


@app.command()
def show(folder: FolderOption = HERE) -> None:
    """Who signs for a swarm, how many must, and what waits for signatures."""
    set_up_logging("pretty")
    from glasshive.security.trust_root import root_terms

    trust = open_folder(folder)
    say(f"swarm {trust.swarm!r} in {trust.place}")
    roots = trust.roots()
    if roots:
        past = time.time() >= roots[-1].expires_seconds
        say_terms(trust, roots[-1], "is past its end" if past else "is in force")
    document = trust.pending_root()
    if document is not None:
        say_terms(trust, root_terms(document), "waits for signatures")
    newest = trust.newest_whitelist()
    if newest is not None:
        say(f"whitelist {newest.whitelist.version} is signed; `glasshive whitelist show` says more")
    say_waiting(trust)


@app.command()
def sign(
    files: FilesArgument = None,
    folder: FolderOption = HERE,
    key: SigningKeyOption = None,
    yes: YesOption = False,
    passphrase_file: PassphraseOption = None,
) -> None:
    """Sign the root that waits; with files of other signers, take up their signatures first."""
    set_up_logging("pretty")
    from glasshive.security.trust_root import MAX_DOCUMENT_BYTES, root_terms
    from glasshive.trust_files import read_bounded

    trust = open_folder(folder)
    take_and_sign(
        files or (),
        key,
        passphrase_file,
        yes,
        take=lambda one: trust.take_root(read_bounded(one, MAX_DOCUMENT_BYTES)),
        waiting=trust.pending_root,
        none_waits=f"no root waits for signatures in {folder}; `glasshive swarm rotate` makes the "
        "next",
        show=lambda document: say_terms(trust, root_terms(document), "waits for signatures"),
        sign=trust.sign_root,
    )
    say_root_done(trust)


@app.command()
def rotate(
    add: Annotated[
        list[str] | None, typer.Option(help="A new holder: a .pub file. May be repeated.")
    ] = None,
    remove: Annotated[
        list[str] | None, typer.Option(help="A holder to take away, by name. May be repeated.")
    ] = None,
    role: Annotated[
        Literal["root", "whitelist", "both"], typer.Option(help="Whose holders change.")
    ] = "both",
    root_threshold: Annotated[int | None, typer.Option(min=1, help="The new one.")] = None,
    whitelist_threshold: Annotated[int | None, typer.Option(min=1, help="The new one.")] = None,
    days: Annotated[int, typer.Option(min=1, max=3660, help="How long the root holds.")] = 365,
    replace: Annotated[
        bool,
        typer.Option(
            "--replace",
            help="Drop the root that waits. The new one has its number: only if no copy of the old "
            "one is complete, or can become so, anywhere.",
        ),
    ] = False,
    folder: FolderOption = HERE,
    key: SigningKeysOption = None,
    yes: YesOption = False,
    passphrase_file: PassphraseOption = None,
) -> None:
    """Make the next root: other holders, thresholds, or a later end. Old and new keys sign it."""
    set_up_logging("pretty")
    from glasshive.first_whitelist import DAY_SECONDS
    from glasshive.passphrases import load_signing_key
    from glasshive.rotation import rotated
    from glasshive.security.trust_root import root_terms
    from glasshive.trust_files import TrustFolderError, read_holder

    trust = open_folder(folder)
    if trust.pending_root() is not None and not replace:
        raise TrustFolderError(
            f"a root waits for signatures in {folder} already; have it signed, or, if no copy of "
            "it can become complete elsewhere, drop it with --replace"
        )
    new = [read_holder(Path(one)) for one in add or ()]
    document = rotated(
        trust,
        add=new,
        remove=remove or (),
        roles=("root", "whitelist") if role == "both" else (role,),
        root_threshold=root_threshold,
        whitelist_threshold=whitelist_threshold,
        expires_seconds=int(time.time()) + days * DAY_SECONDS,
    )
    say_terms(trust, root_terms(document), "is new", new)
    keys = [load_signing_key(one, passphrase_file) for one in key or ()]
    if keys:
        confirm(yes)
    for one in new:
        trust.add_holder(one)
    trust.put_root(document)
    waiting: bytes | None = document
    for signer in keys:
        if waiting is None:
            break  # the others' signatures were enough
        trust.sign_root(signer, waiting)
        waiting = trust.pending_root()
    say_root_done(trust)


def open_folder(place: Path) -> TrustFolder:
    """The swarm's folder. Raises TrustFolderError."""
    from glasshive.trust_folder import TrustFolder

    return TrustFolder(place, time.time)


def take_and_sign(
    files: Sequence[Path],
    key: Path | None,
    passphrase_file: Path | None,
    yes: bool,
    *,
    take: Callable[[Path], object],
    waiting: Callable[[], _T | None],
    none_waits: str,
    show: Callable[[_T], None],
    sign: Callable[[SigningKey, _T], object],
) -> None:
    """Take up the signatures in `files`; then show what waits, and sign it if there is a key.

    What the files complete is not signed once more. Raises SigningRefused with `none_waits` if
    there is nothing to sign and no file, and what the five callables raise.
    """
    from glasshive.passphrases import load_signing_key
    from glasshive.trust_folder import SigningRefused

    if not files and key is None:
        raise typer.BadParameter("name your key with --key, or files that others signed")
    for one in files:
        take(one)
        if waiting() is None:
            break  # that was enough
    found = waiting()
    if key is None or (found is None and files):
        return
    if found is None:
        raise SigningRefused(none_waits)
    show(found)
    confirm(yes)
    sign(load_signing_key(key, passphrase_file), found)


def _check_swarm(name: str, public: bool) -> None:
    if not _SWARM_NAME.fullmatch(name) or (not public and " " in name):
        raise typer.BadParameter(
            f"got the swarm's name {name[:80]!r}, wanted 1 to 64 letters, digits"
            f"{', spaces' if public else ''} or ._-, the first a letter or digit",
            param_hint="--name",
        )


def _check_bootstrap_place(listen: str, announce: Sequence[str]) -> None:
    """Raises BadAddress or ListenRefused for an address that no bootstrap peer could have."""
    from glasshive.dht.addresses import check_announced, check_places
    from glasshive.dht.errors import BadAddress
    from glasshive.dht.transport import check_address

    check_address(listen)
    if listen.endswith("/tcp/0"):
        raise typer.BadParameter(
            f"others have to know the bootstrap peer's port; name one, such as {BOOTSTRAP_LISTEN}",
            param_hint="--listen",
        )
    check_places([listen], announce, whitelisted=True)
    if not announce:
        try:
            check_announced(listen)
        except BadAddress:
            raise typer.BadParameter(
                f"others can't find the bootstrap peer by {listen}; say with --announce which "
                "address of its machine, or of its router, leads there",
                param_hint="--listen",
            ) from None


def _threshold(role: str, given: int | None, usual: int, holders: int) -> int:
    threshold = usual if given is None else given
    if threshold > holders:
        raise typer.BadParameter(
            f"a {role} of this swarm wants {threshold} signatures, and {holders} may sign it; name "
            f"more with --holder, or say --{role}-threshold",
            param_hint=f"--{role}-threshold",
        )
    return threshold


def _holders(
    named: Sequence[str], passphrase_file: Path | None
) -> tuple[dict[str, Holder], dict[str, NewKey]]:
    """Who was named, by what they were named by; and the keys that are made for those of them who
    have none."""
    from glasshive.new_swarm import NewKey
    from glasshive.passphrases import new_passphrase
    from glasshive.security.signing_keys import SigningKey
    from glasshive.trust_files import Holder, check_holder_name, read_holder

    holders: dict[str, Holder] = {}
    made: dict[str, NewKey] = {}
    for one in dict.fromkeys(named):
        if one.endswith(".pub"):
            holders[one] = read_holder(Path(one))
            continue
        check_holder_name(one)
        key = SigningKey.generate()
        made[one] = NewKey(key, new_passphrase(f"{one}'s new key", passphrase_file))
        holders[one] = Holder(one, key.public_key)
    return holders, made
