"""`glasshive swarm` and `glasshive whitelist`: made, passed around, signed, rotated, published."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tuf.api.metadata import Metadata, Root, Signature, Targets
from typer.testing import CliRunner

from glasshive import cli, trust_words
from glasshive.dht import trust_exchange
from glasshive.dht.errors import BadAddress, PeerUnreachable
from glasshive.dht.messages import TrustVersions
from glasshive.dht.transport import PeerAddress
from glasshive.graph.errors import GlasshiveError
from glasshive.graph.ops import OPS
from glasshive.models import ModelUnavailableError
from glasshive.new_swarm import new_folder
from glasshive.security import signing_keys
from glasshive.security.errors import (
    BadTrustDocument,
    BadWhitelist,
    KeyFileError,
    NotCurrent,
    UnderThreshold,
    WrongVersion,
)
from glasshive.security.keys import Identity
from glasshive.security.signing_keys import SigningKey
from glasshive.security.trust_root import (
    first_root,
    key_id_of,
    next_root,
    verify_whitelist,
)
from glasshive.settings import load_settings
from glasshive.swarm_trust import open_store
from glasshive.trust_files import Holder, TrustFolderError, WhitelistFile, read_whitelist_file
from glasshive.trust_folder import SigningRefused, TrustFolder

PASSPHRASE = "correct horse battery staple"
DAY = 86_400
AT_TERMINAL = SimpleNamespace(stdin=SimpleNamespace(isatty=lambda: True))
SVD = ("--remove-op", "linalg_svd")


@pytest.fixture(autouse=True)
def _own_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    for name in [one for one in os.environ if one.startswith("GLASSHIVE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GLASSHIVE_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("COLUMNS", "400")  # of errors in boxes
    passphrase = tmp_path / "passphrase"
    passphrase.write_text(PASSPHRASE + "\n")
    passphrase.chmod(0o600)
    monkeypatch.setenv("GLASSHIVE_PASSPHRASE_FILE", str(passphrase))
    # What makes a guess slow (tests/unit/security/test_signing_keys.py) makes these slow, too.
    monkeypatch.setattr(signing_keys, "_stretched", _quickly_stretched)
    monkeypatch.chdir(tmp_path)
    root, ours = logging.getLogger(), logging.getLogger("glasshive")
    before = list(root.handlers), root.level, ours.level
    yield
    root.handlers[:] = before[0]
    root.setLevel(before[1])
    ours.setLevel(before[2])


def _quickly_stretched(passphrase: str, salt: bytes) -> bytes:
    return hashlib.sha256(salt + passphrase.encode()).hexdigest().encode()


def run(*arguments: object, answer: str = "") -> str:
    """What a command prints; it must end well."""
    done = CliRunner().invoke(cli.app, [str(one) for one in arguments], input=answer)
    if done.exception is not None:
        raise AssertionError(done.output) from done.exception
    return done.output


def refused(*arguments: object, kind: type[Exception] = TrustFolderError) -> str:
    """The text of the error that a command ends with."""
    done = CliRunner().invoke(cli.app, [str(one) for one in arguments])
    assert type(done.exception) is kind, done.output
    assert isinstance(done.exception, GlasshiveError | ModelUnavailableError)
    return str(done.exception)


def wrong_usage(*arguments: object) -> str:
    done = CliRunner().invoke(cli.app, [str(one) for one in arguments])
    assert done.exit_code == 2, done.output
    return " ".join(done.output.replace("│", " ").split())


def key(name: str) -> tuple[Path, Path]:
    """(key, public part) of somebody, in a folder of their own machine."""
    Path(name).mkdir(exist_ok=True)
    run("swarm", "key", name, "--out", name)
    return Path(name, f"{name}.key"), Path(name, f"{name}.pub")


@pytest.fixture
def three() -> list[Path]:
    """ann.key, ben.key, cat.key; ann's folder `lab` is a swarm of 2 of 3, signed by her alone."""
    keys, parts = zip(*(key(name) for name in ("ann", "ben", "cat")), strict=True)
    run(
        "swarm", "init", "lab", *(f"--holder={one}" for one in parts), "--root-threshold=2",
        "--whitelist-threshold=2", "--key", keys[0],
    )  # fmt: skip
    return list(keys)


@pytest.fixture
def signed(three: list[Path]) -> list[Path]:
    """The same, with root 1 and whitelist 1 signed by ann and ben."""
    run("swarm", "sign", "--folder=lab", "--yes", "--key", three[1])
    for one in three[:2]:
        run("whitelist", "sign", "--folder=lab", "--yes", "--key", one)
    return three


def copy_of(folder: Path, to: str) -> Path:
    """What somebody else was sent: everything but the secrets."""
    place = Path(to, "lab")
    shutil.copytree(folder, place, ignore=shutil.ignore_patterns("keys"), dirs_exist_ok=True)
    return place


def modes(folder: Path) -> dict[str, int]:
    return {
        str(one.relative_to(folder)): one.stat().st_mode & 0o777
        for one in folder.rglob("*")
        if one.is_file() and one.name != ".lock"
    }


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(one): one.read_bytes() for one in folder.rglob("*") if one.is_file()}


def test_a_private_swarm_is_one_command() -> None:
    said = run("swarm", "init", "lab")
    lab = Path("lab")
    assert modes(lab) == {
        "hive.toml": 0o644,
        "keys/bootstrap.key": 0o600,
        "keys/owner.key": 0o600,
        "trust/1.root.json": 0o644,
        "trust/1.whitelist": 0o644,
        "trust/holders/owner.pub": 0o644,
    }
    assert (lab / "keys").stat().st_mode & 0o777 == 0o700
    secret, public = said.index("\nsecret;"), said.index("\nno secret;")
    for name in ("lab/keys/owner.key", "lab/keys/bootstrap.key"):
        assert secret < said.index(name) < public
    assert public < said.index("lab/hive.toml\n  lab/trust\n") < said.index("\nnext:")
    assert "glasshive bootstrap --config lab/hive.toml --key lab/keys/bootstrap.key" in said
    assert "glasshive invite host --folder lab" in said

    settings = load_settings("lab/hive.toml")
    bootstrap = Identity.load_or_create("lab/keys/bootstrap.key")
    assert settings.swarm == "lab"
    assert settings.bootstraps == (f"/ip4/127.0.0.1/tcp/31330/p2p/{bootstrap.peer_id}",)
    assert settings.root == Path("lab/trust/1.root.json")
    assert settings.issuers == (bootstrap.peer_id,)
    store = open_store(settings)
    assert store is not None

    # By tuf alone, without a line of ours.
    file = read_whitelist_file(lab / "trust/1.whitelist")
    root = Metadata[Root].from_bytes((lab / "trust/1.root.json").read_bytes())
    root.signed.verify_delegate("root", root.signed_bytes, root.signatures)
    targets = Metadata[Targets].from_bytes(file.document)
    root.signed.verify_delegate("targets", targets.signed_bytes, targets.signatures)
    targets.signed.targets["whitelist.msgpack"].verify_length_and_hashes(file.body)

    assert store.accept_whitelist(file.document, file.body)
    whitelist = file.whitelist
    assert (whitelist.version, whitelist.swarm, whitelist.models) == (1, "lab", None)
    assert whitelist.ops == {name: spec.version for name, spec in OPS.items()}
    assert whitelist.expires_seconds - whitelist.issued_seconds == 365 * DAY
    assert run("whitelist", "verify", "--folder=lab").startswith("whitelist 1 of 'lab' is good")


def test_no_secret_is_where_it_should_not_be() -> None:
    said = run("swarm", "init", "lab") + run("whitelist", "show", "--folder=lab")
    key = SigningKey.load("lab/keys/owner.key", PASSPHRASE)
    for data in [said.encode(), *bytes_of(Path("lab")).values()]:
        assert PASSPHRASE.encode() not in data
        assert key._key.private_bytes_raw() not in data
        assert key._key.private_bytes_raw().hex().encode() not in data


def test_a_public_swarm_wants_three_holders() -> None:
    text = wrong_usage("swarm", "init", "hive", "--public", "--holder=ann", "--holder=ben")
    assert "a root of this swarm wants 3 signatures, and 2 may sign it; name more" in text
    assert not Path("hive").exists()
    holders = ("--holder=ann", "--holder=ben", "--holder=cat")
    said = run("swarm", "init", "hive", "--public", *holders, "--name", "the hive")
    assert "  the next root: 3 of 3 must sign: ann (" in said
    assert "  whitelists: 2 of 3 must sign: ann (" in said
    assert "Certificates of members" not in said
    assert {f"keys/{name}.key" for name in ("ann", "ben", "cat")} <= modes(Path("hive")).keys()
    whitelist = read_whitelist_file(Path("hive/trust/1.whitelist")).whitelist
    assert whitelist.swarm == "the hive"
    assert whitelist.expires_seconds - whitelist.issued_seconds == 30 * DAY
    run("swarm", "init", "lab")
    ours = read_whitelist_file(Path("lab/trust/1.whitelist")).whitelist
    assert whitelist.limits.narrowed(ours.limits) == whitelist.limits != ours.limits


def test_roles_can_have_holders_of_their_own() -> None:
    said = run(
        "swarm", "init", "lab", "--root-holder=ann", "--whitelist-holder=ben", "--holder=cat"
    )
    assert "  the next root: 1 of 2 must sign: cat (" in said
    assert "), ann (" in said
    root = TrustFolder(Path("lab"), time.time).root()
    assert len(set(root.root_keys) | set(root.whitelist_keys)) == 3
    # Ann's key counts for no whitelist.
    run("whitelist", "bump", "--folder=lab", *SVD)
    text = refused(
        "whitelist", "sign", "--folder=lab", "--yes", "--key=lab/keys/ann.key", kind=SigningRefused
    )
    assert text.startswith("the key ann (")
    assert "may not sign this whitelist; those who may and have not: " in text


def test_a_swarm_is_never_written_over() -> None:
    run("swarm", "init", "lab")
    before = bytes_of(Path("lab"))
    text = refused("swarm", "init", "lab", "--public", "--holder=ann")
    assert text.startswith("there is a swarm in lab already, and none is ever written over; choose")
    assert bytes_of(Path("lab")) == before
    Path("mine").mkdir()
    assert refused("swarm", "init", "mine").startswith("mine is there already; choose a new folder")


def test_a_folder_that_came_meanwhile_is_not_taken(tmp_path: Path) -> None:
    """Between the command's first look and the end of its questions; an empty one, too."""
    Path("lab").mkdir()
    before = {*tmp_path.iterdir()}
    with pytest.raises(TrustFolderError, match="lab is there already"):
        with new_folder(Path("lab")):
            pass
    assert {*tmp_path.iterdir()} == before


def test_a_swarm_that_fails_leaves_nothing(tmp_path: Path) -> None:
    before = {*tmp_path.iterdir()}
    (tmp_path / "passphrase").write_text("short")
    text = refused("swarm", "init", "lab", kind=KeyFileError)
    assert text.startswith("a passphrase of 5 characters; take at least 8")
    assert {*tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--name", "a\nb"), "wanted 1 to 64 letters, digits or ._-"),
        (("--listen", "/ip4/127.0.0.1/tcp/0"), "others have to know the bootstrap peer's port"),
        (("--days", "367"), "less than or equal to 366"),
        (("--whitelist-threshold", "2"), "a whitelist of this swarm wants 2 signatures, and 1 may"),
    ],
)
def test_wrong_usage_of_init(arguments: tuple[str, ...], said: str) -> None:
    assert said in wrong_usage("swarm", "init", "lab", *arguments)
    assert not Path("lab").exists()


def test_a_place_of_init_that_is_no_address_is_shown_as_one() -> None:
    """Failed with "wanted ...tcp/31330/p2p/12D3KooW...", and with a peer id in the answer."""
    text = refused("swarm", "init", "lab", "--listen=localhost:1", kind=BadAddress)
    assert text == "got 'localhost:1', wanted a multiaddr such as /dns4/localhost/tcp/1"
    text = refused("swarm", "init", "lab", "--listen=/ip4/0.0.0.0/tcp/99999", kind=BadAddress)
    assert text.startswith("got '/ip4/0.0.0.0/tcp/99999', whose port 99999 is out of range")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "\nHosts listen on this machine only, unless `serve` and `bootstrap` are told"),
        (
            ("--listen=/ip4/0.0.0.0/tcp/31330", "--announce=/ip4/203.0.113.7/tcp/31330"),
            "\nThe bootstrap peer listens for other machines too, as that line says. Hosts listen "
            "on this machine only, unless `serve` is told otherwise with --listen.\n",
        ),
    ],
)
def test_init_says_who_listens_where(arguments: tuple[str, ...], said: str) -> None:
    text = run("swarm", "init", "lab", *arguments)
    assert said in text
    assert text.count("on this machine only") == 1


def test_a_key_that_signs_nothing_is_no_key_of_a_swarm() -> None:
    secret, _ = key("eve")
    text = refused("swarm", "init", "lab", "--holder=ann", "--key", secret, kind=KeyFileError)
    assert "of --key is of none of the holders (ann); name its .pub file with --holder" in text
    assert not Path("lab").exists()


def test_a_name_is_no_path() -> None:
    for name in ("../ann", "a/b", "", "a.b", "-a", "a" * 33):
        assert "of a key's holder, wanted 1 to 32" in refused("swarm", "key", "--", name)
        assert "of a key's holder, wanted" in refused("swarm", "init", "lab", f"--holder={name}")
    assert not list(Path().glob("*.key"))


def test_a_key_is_made_on_its_owners_machine() -> None:
    secret, public = key("ann")
    assert modes(Path("ann")) == {"ann.key": 0o600, "ann.pub": 0o644}
    made = SigningKey.load(secret, PASSPHRASE)
    assert Holder.from_text(public.read_text()) == Holder("ann", made.public_key)
    assert "is never written over" in refused("swarm", "key", "ann", "--out=ann", kind=KeyFileError)
    # No key without its public part.
    Path("ben.pub").touch()
    assert "ben.pub is there already" in refused("swarm", "key", "ben")
    assert not Path("ben.key").exists()


# Signing -----------------------------------------------------------------------------------------


def test_two_of_three_sign_files_that_are_passed_around(three: list[Path]) -> None:
    lab = Path("lab")
    assert not (lab / "keys/ann.key").exists()
    ann_says = run("swarm", "show", "--folder=lab")
    assert "this root: 1 of 2 signatures, by ann (" in ann_says
    assert "; 1 more is missing, of: " in ann_says
    assert "it can be signed once root 1 is complete" in ann_says
    text = refused("whitelist", "sign", "--folder=lab", "--yes", "--key", three[0])
    assert text.startswith("root 1 of 'lab' is not signed by enough of its holders yet")

    bens = copy_of(lab, "ben")
    said = run("swarm", "sign", "--folder", bens, "--key", three[1], "--yes")
    assert "root 1 waits for signatures; it ends 20" in said
    assert "  whitelists: 2 of 3 must sign: ann (" in said
    assert "root 1 is complete: ben/lab/trust/1.root.json" in said
    assert not (bens / "trust/pending/1.root.json").exists()
    said = run("whitelist", "sign", "--folder", bens, "--key", three[1], "--yes")
    assert "whitelist: 1 of 2 signatures, by ben (" in said
    assert "; 1 more is missing, of: " in said

    # Ann gets both files back.
    said = run("swarm", "sign", bens / "trust/1.root.json", "--folder=lab")
    assert "root 1 is complete: lab/trust/1.root.json" in said
    waiting = bens / "trust/pending/1.whitelist"
    said = run("whitelist", "sign", waiting, "--folder=lab", "--key", three[0], "--yes")
    assert "whitelist 1 is complete: lab/trust/1.whitelist" in said
    assert not list((lab / "trust/pending").iterdir())
    assert "signed by ann (" in run("whitelist", "verify", "--folder=lab")
    # What is left over in Ben's copy waits no more once he has what is complete.
    shutil.copy(lab / "trust/1.whitelist", bens / "trust")
    assert "waits" not in run("swarm", "show", "--folder", bens)


def pasted(said: str, after: str) -> list[str]:
    """The commands that are printed under the line `after`, without the program's name."""
    lines = said.splitlines()
    indent = "    glasshive "
    found = itertools.takewhile(
        lambda line: line.startswith(indent), lines[lines.index(after) + 1 :]
    )
    return [line.removeprefix(indent) for line in found]


@pytest.mark.parametrize("folder", ["my lab", ""])
def test_the_command_that_is_printed_signs_as_it_is(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Failed with `glasshive whitelist sign --key NAME.key`, in the folder's parent."""
    run("swarm", "init", "my lab", "--holder=ann", "--holder=ben", "--name=lab")
    if not folder:
        monkeypatch.chdir("my lab")
    said = run("whitelist", "bump", *SVD, *(["--folder", folder] if folder else []))
    assert "pass " not in said
    command, *rest = pasted(said, "  whose key is here signs with")
    assert not rest  # one signature is missing, though both keys are here
    assert ("--folder" in command) == bool(folder)
    assert "whitelist 2 is complete" in run(*shlex.split(command), "--yes")


def test_who_has_no_key_here_signs_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    key("ben")
    both = ("--holder=ann", "--holder=ben/ben.pub")
    said = run("swarm", "init", "lab", *both, "--root-threshold=2", "--whitelist-threshold=2")
    # The whitelist that can't be signed before the root has no command yet.
    assert "glasshive whitelist sign" not in said
    passed = "  pass lab/hive.toml and lab/trust on; each signer runs, in the copy,"
    assert pasted(said, passed) == ["swarm sign --key NAME.key"]
    run("swarm", "sign", "--folder=lab", "--yes", "--key=ben/ben.key")
    said = run("whitelist", "bump", "--folder=lab", "--replace")
    (mine,) = pasted(said, "  whose key is here signs with")
    assert mine == "whitelist sign --folder lab --key lab/keys/ann.key"
    assert pasted(said, passed) == ["whitelist sign --key NAME.key"]
    said = run(*shlex.split(mine), "--yes")
    assert "whose key is here" not in said  # she has signed
    copied = copy_of(Path("lab"), "ben")
    (his,) = pasted(said, passed)
    monkeypatch.chdir(copied)
    assert "is complete" in run(*shlex.split(his.replace("NAME.key", "../ben.key")), "--yes")


def test_signatures_that_were_made_side_by_side_are_put_together(signed: list[Path]) -> None:
    run("whitelist", "bump", "--folder=lab", *SVD)
    places = [copy_of(Path("lab"), name) for name in ("ben", "cat")]
    for place, one in zip(places, signed[1:], strict=True):
        run("whitelist", "sign", "--folder", place, "--key", one, "--yes")
    files = [place / "trust/pending/2.whitelist" for place in places]
    said = run("whitelist", "sign", files[0], "--folder=lab")
    assert "1 of 2 signatures, by ben (" in said
    said = run("whitelist", "sign", files[1], "--folder=lab")
    assert "whitelist 2 is complete" in said
    text = refused("whitelist", "sign", files[0], "--folder=lab", kind=SigningRefused)
    assert text.startswith("got whitelist 2, and 2 is signed already; an old one is never taken")


def test_a_key_counts_once(signed: list[Path]) -> None:
    run("whitelist", "bump", "--folder=lab", *SVD)
    sign = ("sign", "--folder=lab", "--yes", "--key", signed[0])
    run("whitelist", *sign)
    before = bytes_of(Path("lab"))
    text = refused("whitelist", *sign, kind=SigningRefused)
    assert text.startswith("ann (")
    assert "has signed this whitelist already, and a key counts once; pass it on: " in text
    assert "1 of 2 signatures" in text
    run("swarm", "rotate", "--folder=lab", "--key", signed[0], "--yes")
    assert "has signed this root already" in refused("swarm", *sign, kind=SigningRefused)
    after = bytes_of(Path("lab"))
    assert {name: after[name] for name in before} == before


def test_too_few_signatures_are_refused(signed: list[Path]) -> None:
    run("whitelist", "bump", "--folder=lab", *SVD)
    text = refused("whitelist", "verify", "2", "--folder=lab", kind=UnderThreshold)
    assert text.startswith("whitelist 2 is signed by 0 of the keys of root 1, wanted 2; ask")
    run("whitelist", "sign", "--folder=lab", "--yes", "--key", signed[2])
    text = refused("whitelist", "verify", "2", "--folder=lab", kind=UnderThreshold)
    assert "is signed by 1 of the keys" in text
    # Nor by a file that claims to be complete.
    shutil.copy("lab/trust/pending/2.whitelist", "lab/trust/2.whitelist")
    refused("whitelist", "verify", "--folder=lab", kind=UnderThreshold)
    refused("whitelist", "publish", "--folder=lab", kind=UnderThreshold)
    said = run("whitelist", "show", "2", "--folder=lab")
    assert "waits for signatures" in said
    assert "in force" not in said


def test_a_root_that_claims_to_be_complete_is_refused(three: list[Path]) -> None:
    Path("lab/trust/pending/1.root.json").rename("lab/trust/1.root.json")
    for command in (("swarm", "show"), ("whitelist", "show"), ("whitelist", "publish")):
        text = refused(*command, "--folder=lab", kind=UnderThreshold)
        assert text.startswith("root 1 is signed by 1 of the keys of its own, wanted 2")


def test_a_signature_by_nobody_who_counts_is_refused(signed: list[Path]) -> None:
    run("whitelist", "bump", "--folder=lab", *SVD)
    secret, _ = key("eve")
    text = refused(
        "whitelist", "sign", "--folder=lab", "--yes", "--key", secret, kind=SigningRefused
    )
    assert text.startswith("the key unnamed (")
    assert "may not sign this whitelist; those who may and have not: " in text
    # A copy with a signature under ann's name that is not hers.
    place = Path("lab/trust/pending/2.whitelist")
    file = read_whitelist_file(place)
    run("whitelist", "sign", "--folder=lab", "--yes", "--key", signed[0])
    good = read_whitelist_file(place)
    tree = json.loads(good.document)
    digits = tree["signatures"][0]["sig"]
    tree["signatures"][0]["sig"] = digits[::-1]
    forged = WhitelistFile(
        json.dumps(tree, separators=(",", ":"), sort_keys=True).encode(), file.body
    )
    Path("forged.whitelist").write_bytes(forged.encode())
    run("whitelist", "sign", "forged.whitelist", "--folder=lab")
    assert read_whitelist_file(place) == good
    # As the first that comes it counts as none, and the real one replaces it.
    place.write_bytes(forged.encode())
    assert "0 of 2 signatures, by nobody" in run("swarm", "show", "--folder=lab")
    Path("good.whitelist").write_bytes(good.encode())
    assert "1 of 2" in run("whitelist", "sign", "good.whitelist", "--folder=lab")
    assert read_whitelist_file(place) == good


def with_junk(document: bytes, many: int) -> bytes:
    """The document with signatures of strangers, which count for nothing, under its own."""
    metadata: Metadata[Any] = Metadata.from_bytes(document)
    while len(metadata.signatures) < many:
        key = SigningKey.generate()
        key_id = key_id_of(key.public_key)
        metadata.signatures[key_id] = Signature(key_id, key.sign(metadata.signed_bytes).hex())
    return bytes(metadata.to_bytes())


def test_junk_in_copies_fills_no_place_of_signatures(signed: list[Path]) -> None:
    lab = Path("lab")
    rotate = ("swarm", "rotate", "--folder=lab", "--days=90")
    run(*rotate, "--key", signed[0], "--yes")
    run("whitelist", "bump", "--folder=lab", *SVD)
    run("whitelist", "sign", "--folder=lab", "--yes", "--key", signed[0])
    root, whitelist = lab / "trust/pending/2.root.json", lab / "trust/pending/2.whitelist"
    file = read_whitelist_file(whitelist)
    junk = {
        root: with_junk(root.read_bytes(), 32),
        whitelist: WhitelistFile(with_junk(file.document, 32), file.body).encode(),
    }
    good = {place: place.read_bytes() for place in junk}
    for place, data in junk.items():
        group = "swarm" if place is root else "whitelist"
        sent = Path(place.name)
        sent.write_bytes(data)
        # As the first copy that comes: only what counts is kept.
        place.unlink()
        run(group, "sign", sent, "--folder=lab")
        assert place.read_bytes() == good[place]
        # In a folder that was passed on as a whole: there is place for the next signature.
        place.write_bytes(data)
        assert "is complete" in run(group, "sign", "--folder=lab", "--yes", "--key", signed[1])
    for name in ("2.root.json", "2.whitelist"):
        data = (lab / "trust" / name).read_bytes()
        document = data if name == "2.root.json" else WhitelistFile.decode(data).document
        assert len(Metadata[Any].from_bytes(document).signatures) == 2


def test_another_whitelist_of_the_same_version_is_not_put_together(signed: list[Path]) -> None:
    bens = copy_of(Path("lab"), "ben")
    run("whitelist", "bump", "--folder=lab", *SVD)
    run("whitelist", "bump", "--folder", bens, "--limit=seconds=1000")
    run("whitelist", "sign", "--folder", bens, "--yes", "--key", signed[1])
    text = refused(
        *("whitelist", "sign", bens / "trust/pending/2.whitelist", "--folder=lab"),
        kind=BadTrustDocument,
    )
    assert text.startswith("got a copy of version 2 that says something else than the one here")
    run("whitelist", "bump", "--folder", bens, "--replace")
    text = refused(
        *("whitelist", "sign", bens / "trust/pending/3.whitelist", "--folder=lab"),
        kind=SigningRefused,
    )
    assert text.startswith("got whitelist 3, and 2 waits for signatures in lab")


def test_a_whitelist_of_another_swarm_is_not_signed(signed: list[Path]) -> None:
    run("swarm", "init", "other")
    run("whitelist", "bump", "--folder=other", *SVD)
    text = refused(
        *("whitelist", "sign", "other/trust/pending/2.whitelist", "--folder=lab", "--yes"),
        *("--key", signed[0]),
        kind=SigningRefused,
    )
    assert text.startswith("got a whitelist of the swarm 'other', and lab is the folder of 'lab'")


def test_a_revoked_version_is_not_signed(signed: list[Path]) -> None:
    bens = copy_of(Path("lab"), "ben")
    run("whitelist", "bump", "--folder", bens, *SVD)
    run("whitelist", "bump", "--folder", bens, *SVD, "--replace")
    third = bens / "trust/pending/3.whitelist"
    run("whitelist", "bump", "--folder=lab", "--revoke-version=3")
    for one in signed[:2]:
        run("whitelist", "sign", "--folder=lab", "--yes", "--key", one)
    text = refused(
        *("whitelist", "sign", third, "--folder=lab", "--yes", "--key", signed[0]),
        kind=SigningRefused,
    )
    assert text.startswith("whitelist 3 is revoked by 2; make the next one with")


def but_times(text: str) -> list[str]:
    """The lines of a comparison but those that change when a minute passes."""
    return [one for one in text.splitlines() if not one.startswith(("~ issued", "~ expires"))]


def test_nobody_signs_unasked(signed: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    run("whitelist", "bump", "--folder=lab", *SVD)
    before = bytes_of(Path("lab"))
    arguments = ["whitelist", "sign", "--folder=lab", "--key", str(signed[0])]
    text = refused(*arguments, kind=SigningRefused)
    assert text == (
        "nothing was signed: there is no terminal to ask whether to sign this; look at what is "
        "shown above, and pass --yes"
    )
    assert bytes_of(Path("lab")) == before
    monkeypatch.setattr(trust_words, "sys", AT_TERMINAL)
    done = CliRunner().invoke(cli.app, arguments, input="n\n")
    assert done.exit_code == 1
    assert bytes_of(Path("lab")) == before
    # What is asked about was shown, with what changes.
    shown = done.output[: done.output.index("Sign this?")]
    assert "whitelist 2 of the swarm 'lab': waits for signatures" in shown
    assert but_times(shown.partition("against whitelist 1:\n")[2])[:2] == [
        "~ version: 1 -> 2",
        "- op linalg_svd",
    ]
    assert "1 of 2 signatures, by ann (" in run(*arguments, answer="y\n")


def test_what_was_not_shown_is_not_signed(signed: list[Path]) -> None:
    folder = TrustFolder(Path("lab"), time.time)
    run("whitelist", "bump", "--folder=lab", *SVD)
    shown = folder.pending_whitelist()
    assert shown is not None
    run("whitelist", "bump", "--folder=lab", "--replace")
    key = SigningKey.load(signed[0], PASSPHRASE)
    with pytest.raises(SigningRefused, match="changed the whitelist that waits in lab while you"):
        folder.sign_whitelist(key, shown)
    run("swarm", "rotate", "--folder=lab")
    with pytest.raises(SigningRefused, match="changed the root that waits in lab while you read"):
        folder.sign_root(key, folder.root().document)


def test_a_wrong_passphrase_says_so_and_no_more(signed: list[Path], tmp_path: Path) -> None:
    run("whitelist", "bump", "--folder=lab", *SVD)
    wrong = tmp_path / "wrong"
    wrong.write_text("incorrect horse")
    wrong.chmod(0o600)
    text = refused(
        *("whitelist", "sign", "--folder=lab", "--yes", "--key", signed[0]),
        *("--passphrase-file", wrong),
        kind=KeyFileError,
    )
    assert text == (
        "the passphrase does not open ann/ann.key, or the file is damaged; try again, or restore "
        "it from a copy"
    )
    text = refused("whitelist", "sign", "--folder=lab", "--yes", "--key=no.key", kind=KeyFileError)
    assert text.startswith("there is no key file no.key; check the path")


def test_expired_and_old_whitelists_are_refused(signed: list[Path]) -> None:
    soon = TrustFolder(Path("lab"), lambda: time.time() + 366 * DAY)
    first = soon.whitelist_file(1)
    with pytest.raises(NotCurrent, match="expired at"):
        soon.verify(first)
    run("whitelist", "bump", "--folder=lab", *SVD)
    waiting = soon.pending_whitelist()
    assert waiting is not None
    with pytest.raises(SigningRefused, match="whitelist 2 is expired, so no host would take it"):
        soon.sign_whitelist(SigningKey.load(signed[0], PASSPHRASE), waiting)
    for one in signed[:2]:
        run("whitelist", "sign", "--folder=lab", "--yes", "--key", one)
    text = refused("whitelist", "verify", "1", "--folder=lab", kind=WrongVersion)
    assert text.startswith("got whitelist 1, and 2 is known here")
    assert "not in force: got whitelist 1" in run("whitelist", "show", "1", "--folder=lab")


# Changing ----------------------------------------------------------------------------------------


def test_bump_raises_the_version_and_says_what_changes() -> None:
    run("swarm", "init", "lab")
    host, client = (Identity(bytes([one]) * 32).peer_id for one in (1, 2))
    model = "ab" * 32
    said = run(
        *("whitelist", "bump", "--folder=lab", *SVD, "--remove-op=fft_c2c"),
        *("--limit=seconds=60", "--limit=peak_bytes=1_000_000", f"--add-model={model}=tiny"),
        *("--remove-write=**", "--add-write=model.layers.*.mlp", "--days=30", "--min-protocol=1"),
        *("--revoke-host", host, "--revoke-client", client, "--revoke-version=3"),
    )
    lines = said.splitlines()
    assert but_times(said)[:11] == [
        "~ version: 1 -> 2",
        "- op fft_c2c",
        "- op linalg_svd",
        "- write **",
        "+ write model.layers.*.mlp",
        "- models: every other",
        f"+ model {model}",
        f"+ revoked peer {host}",
        f"+ revoked client {client}",
        "+ revoked version 3",
        "~ limit peak_bytes: 4294967296 -> 1000000",
    ]
    assert "~ limit seconds: 300 -> 60" in lines
    assert "whitelist 2 waits for signatures" in lines
    sign = ("whitelist", "sign", "--folder=lab", "--yes", "--key=lab/keys/owner.key")
    run(*sign)
    second = read_whitelist_file(Path("lab/trust/2.whitelist")).whitelist
    assert second.ops.keys() == OPS.keys() - {"linalg_svd", "fft_c2c"}
    assert second.expires_seconds - second.issued_seconds == 30 * DAY
    assert second.models == {model: "tiny"}
    assert second.limits.seconds == 60

    # Back again, for as long as before; version 3 is revoked.
    run(
        *("whitelist", "bump", "--folder=lab", "--add-op=linalg_svd", "--every-model"),
        *("--add-write=**", "--restore", host, "--remove-write=model.layers.*.mlp"),
    )
    run(*sign)
    fourth = read_whitelist_file(Path("lab/trust/4.whitelist")).whitelist
    assert fourth.ops.keys() == OPS.keys() - {"fft_c2c"}
    assert fourth.models is None
    assert fourth.writable == ("**",)
    assert (fourth.revoked_peers, fourth.revoked_clients) == (frozenset(), {client})
    assert fourth.expires_seconds - fourth.issued_seconds == 30 * DAY


def test_diff_compares_versions_files_and_texts() -> None:
    run("swarm", "init", "lab")
    run("whitelist", "bump", "--folder=lab", *SVD, "--limit=nodes=7")
    said = run("whitelist", "diff", "1", "2", "--folder=lab")
    wanted = ["~ version: 1 -> 2", "- op linalg_svd", "~ limit nodes: 20000 -> 7"]
    assert but_times(said) == wanted
    backwards = run("whitelist", "diff", "lab/trust/pending/2.whitelist", "1", "--folder=lab")
    assert "+ op linalg_svd\n" in backwards
    text = run("whitelist", "show", "2", "--toml", "--folder=lab")
    Path("two.toml").write_text(text)
    assert run("whitelist", "diff", "two.toml", "2", "--folder=lab") == "they are equal\n"
    assert "has no whitelist 9; signed are 1" in refused(
        "whitelist", "diff", "1", "9", "--folder=lab"
    )
    # Whatever the files are called.
    Path("two").write_text(text)
    shutil.copy("lab/trust/pending/2.whitelist", "sent.toml")
    assert run("whitelist", "diff", "two", "sent.toml", "--folder=lab") == "they are equal\n"
    Path("two.png").write_bytes(b"\x89PNG\r\n")
    assert refused("whitelist", "diff", "1", "two.png", "--folder=lab", kind=BadWhitelist) == (
        "two.png is no whitelist file, such as 3.whitelist, and no TOML text, such as `glasshive "
        "whitelist show --toml` prints; is it another file?"
    )
    sign = ("whitelist", "sign", "two", "--folder=lab")
    assert refused(*sign, kind=BadWhitelist).endswith(
        "; a TOML text is for `bump --edit` and `diff`"
    )
    Path("two.toml").write_text(text.replace("nodes = 7", "nodes = 7.5"))
    assert refused(
        "whitelist", "diff", "1", "two.toml", "--folder=lab", kind=BadWhitelist
    ).startswith("two.toml: limits.nodes is 7.5; a whole number")


def test_a_text_can_be_edited() -> None:
    run("swarm", "init", "lab")
    text = run("whitelist", "show", "--toml", "--folder=lab")
    Path("mine.toml").write_text(text.replace("linalg_svd = 1\n", ""))
    said = run("whitelist", "bump", "--edit=mine.toml", "--limit=nodes=9", "--folder=lab")
    assert "~ version: 1 -> 2\n" in said
    assert "- op linalg_svd\n~ limit nodes: 20000 -> 9\n" in said
    Path("mine.toml").write_text(text.replace('swarm = "lab"', 'swarm = "other"'))
    assert "the text is of the swarm 'other'" in wrong_usage(
        "whitelist", "bump", "--edit=mine.toml", "--folder=lab", "--replace"
    )


def test_an_old_text_becomes_the_next_version(signed: list[Path]) -> None:
    text = run("whitelist", "show", "1", "--toml", "--folder=lab")
    Path("old.toml").write_text(text)
    run("whitelist", "bump", "--folder=lab", *SVD)
    for one in signed[:2]:
        run("whitelist", "sign", "--folder=lab", "--yes", "--key", one)
    said = run("whitelist", "bump", "--edit=old.toml", "--folder=lab")
    assert "~ version: 2 -> 3\n" in said
    assert "+ op linalg_svd\n" in said
    assert "whitelist 3 waits for signatures" in said
    # Above one that waits, too, and never a version that the newest revokes.
    said = run("whitelist", "bump", "--edit=old.toml", "--folder=lab", "--replace")
    assert "~ version: 2 -> 4\n" in said
    run("whitelist", "bump", "--folder=lab", "--replace", "--revoke-version=6")
    for one in signed[:2]:
        run("whitelist", "sign", "--folder=lab", "--yes", "--key", one)
    assert "~ version: 5 -> 7\n" in run("whitelist", "bump", "--edit=old.toml", "--folder=lab")


def test_a_folder_keeps_no_whitelist_that_could_not_come_next(signed: list[Path]) -> None:
    folder = TrustFolder(Path("lab"), time.time)
    run("whitelist", "bump", "--folder=lab", *SVD)
    old = folder.pending_whitelist()
    assert old is not None
    run("whitelist", "bump", "--folder=lab", *SVD, "--replace")
    before = bytes_of(Path("lab"))
    with pytest.raises(SigningRefused, match="got whitelist 1, and 1 is signed already; an old"):
        folder.put_whitelist(folder.whitelist_file(1), replace=True)
    with pytest.raises(SigningRefused, match="whitelist 3 waits for signatures in lab already"):
        folder.put_whitelist(old)
    with pytest.raises(SigningRefused, match="got whitelist 2 in the place of 3, wanted a higher"):
        folder.put_whitelist(old, replace=True)
    assert bytes_of(Path("lab")) == before


def test_a_key_has_one_id_wherever_it_is_shown() -> None:
    Path("ann").mkdir()
    said = run("swarm", "key", "ann", "--out=ann")
    (told,) = [one for one in said.splitlines() if "compared by telephone" in one]
    key_id = told.rpartition(" ")[2]
    assert len(key_id) == 64
    run("swarm", "init", "lab", "--holder=ann/ann.pub", "--key=ann/ann.key")
    assert f"ann ({key_id[:16]})" in run("swarm", "show", "--folder=lab")


def test_a_version_that_waited_is_not_used_again() -> None:
    run("swarm", "init", "lab")
    run("whitelist", "bump", "--folder=lab", *SVD)
    text = refused("whitelist", "bump", "--folder=lab", kind=SigningRefused)
    assert text.startswith("whitelist 2 waits for signatures in lab already; have it signed, or")
    said = run("whitelist", "bump", "--folder=lab", "--limit=nodes=9", "--replace")
    assert "~ version: 1 -> 3" in said
    assert "linalg_svd" not in said
    assert [one.name for one in Path("lab/trust/pending").iterdir()] == ["3.whitelist"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ("--remove-op=linalg_sdv",),
            "'linalg_sdv' is not on the whitelist; did you mean linalg_s",
        ),
        (("--add-op=system",), "the op 'system' is not in this release; "),
        (("--limit=second=1",), "the limit 'second' does not exist; did you mean seconds?"),
        (("--limit=seconds=-1",), "got the limit 'seconds=-1', wanted a whole number: seconds=60"),
        (("--limit=seconds",), "wanted a whole number: seconds=60"),
        (("--limit=seconds=1e3",), "wanted a whole number: seconds=60"),
        (("--remove-read=model.*",), "the read pattern 'model.*' is not on the whitelist"),
        (("--remove-model=tiny",), "every model is allowed, so none can be taken away"),
        (("--every-model", f"--add-model={'ab' * 32}=tiny"), "either every model is allowed, or"),
        (("--restore=12D3KooW",), "12D3KooW is not revoked, so there is nothing to restore"),
    ],
)
def test_changes_that_make_no_sense(arguments: tuple[str, ...], said: str) -> None:
    from glasshive.next_whitelist import BadChange

    run("swarm", "init", "lab")
    assert said in refused("whitelist", "bump", "--folder=lab", *arguments, kind=BadChange)
    assert not list(Path("lab/trust/pending").iterdir())


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("--add-read=a..b", "read has 'a..b', which is no pattern"),
        ("--revoke-host=me", "revoked.peers has no peer id"),
        ("--revoke-version=2147483648", "revoked.versions is 2147483648; a whole number"),
        ("--limit=seconds=99999999999999999", "limits.seconds is 99999999999999999; a whole"),
    ],
)
def test_fields_out_of_range(argument: str, said: str) -> None:
    run("swarm", "init", "lab")
    assert said in refused("whitelist", "bump", "--folder=lab", argument, kind=BadWhitelist)


def test_show_says_what_others_can_and_cannot_do() -> None:
    run("swarm", "init", "lab")
    run("whitelist", "bump", "--folder=lab", *SVD, "--remove-write=**", "--limit=peak_bytes=3072")
    run("whitelist", "sign", "--folder=lab", "--yes", "--key=lab/keys/owner.key")
    said = run("whitelist", "show", "--folder=lab")
    assert "whitelist 2 of the swarm 'lab': signed and in force\nsigned by: owner (" in said
    assert "1 of 1 signatures, by owner (" in said
    assert "(365 days left)" in said
    assert "They can't run 1 op of this release: linalg_svd; nor any other code." in said
    assert "linalg_svdvals" in said
    assert "read and called, and whose weights may be fetched: every one\n" in said
    assert "modules that may be written: none\n" in said
    lines = [line.split() for line in said.splitlines()]
    assert ["seconds", "300", "seconds", "of", "the", "host's"] in [one[:6] for one in lines]
    assert ["peak_bytes", "3", "KiB"] in [one[:3] for one in lines]
    assert "When it ends, hosts fall to the floor: add, mean, mul," in said

    data: dict[str, Any] = json.loads(run("whitelist", "show", "--json", "--folder=lab"))
    assert list(data) == [
        *("swarm", "version", "state", "in_force", "signers", "signatures", "issued", "expires"),
        *("expires_in_seconds", "min_protocol", "ops", "ops_refused", "ops_of_other_releases"),
        *("read", "write", "models", "limits", "revoked"),
    ]
    assert data["ops_refused"] == ["linalg_svd"]
    assert data["limits"]["peak_bytes"] == {"value": 3072, "unit": "bytes"}
    assert data["in_force"] is True


def test_an_op_of_another_release_is_told_apart() -> None:
    run("swarm", "init", "lab")
    text = run("whitelist", "show", "--toml", "--folder=lab")
    changed = text.replace("\nrelu = 1\n", "\nrelu = 2\nteleport = 1\n")
    assert changed != text
    Path("mine.toml").write_text(changed)
    run("whitelist", "bump", "--edit=mine.toml", "--folder=lab")
    said = run("whitelist", "show", "2", "--folder=lab")
    assert "They can't run 1 op of this release: relu; nor any other code." in said
    assert "Allowed, and not in this release: relu, teleport." in said


# Rotation and publishing -------------------------------------------------------------------------


def test_rotation_of_a_key_as_a_drill(signed: list[Path]) -> None:
    """Ben's key was stolen: Dan takes his place. Two old keys and two new ones sign."""
    ann, ben, cat = signed
    dan, dans = key("dan")
    said = run(
        *("swarm", "rotate", "--folder=lab", "--remove=ben", "--add", dans, "--key", ann, "--yes")
    )
    assert "root 2 is new; it ends " in said
    assert "the root before: 1 of 2 signatures, by ann (" in said
    assert "this root: 1 of 2 signatures, by ann (" in said
    # Two new keys are not enough: one of the old ones must sign too.
    said = run("swarm", "sign", "--folder=lab", "--yes", "--key", dan)
    assert "the root before: 1 of 2 signatures" in said
    assert "this root: 2 of 2 signatures" in said
    assert not Path("lab/trust/2.root.json").exists()
    said = run("swarm", "sign", "--folder=lab", "--yes", "--key", cat)
    assert "root 2 is complete: lab/trust/2.root.json" in said
    assert "whitelist 1 has too few signatures of its keys" in said
    assert "make the next whitelist with `glasshive whitelist bump`," in said

    root = first_root(Path("lab/trust/1.root.json").read_bytes())
    second = next_root(root, Path("lab/trust/2.root.json").read_bytes())
    assert (second.version, second.root_threshold, len(second.root_keys)) == (2, 2, 3)

    # Hosts have whitelist 1; they are not taken to the floor by accident.
    settings = load_settings("lab/hive.toml")
    store = open_store(settings)
    assert store is not None
    first = read_whitelist_file(Path("lab/trust/1.whitelist"))
    store.accept_whitelist(first.document, first.body)
    refused("whitelist", "publish", "--only-here", "--folder=lab", kind=UnderThreshold)
    store.refresh()
    assert store.root.version == 1

    # Ben's key counts no more, Dan's does.
    run("whitelist", "bump", "--folder=lab")
    text = refused("whitelist", "sign", "--folder=lab", "--yes", "--key", ben, kind=SigningRefused)
    assert "may not sign this whitelist" in text
    for one in (dan, ann):
        run("whitelist", "sign", "--folder=lab", "--yes", "--key", one)
    file = read_whitelist_file(Path("lab/trust/2.whitelist"))
    verify_whitelist(
        second, file.document, file.body, swarm="lab", least_version=1, now_seconds=time.time()
    )
    said = run("whitelist", "publish", "--only-here", "--folder=lab")
    assert "(same user, same GLASSHIVE_DATA) take up root 2 and whitelist 2 within" in said
    store.refresh()
    assert (store.root.version, store.highest_version) == (2, 2)
    assert run("whitelist", "publish", "--only-here", "--folder=lab") == said


def test_a_stolen_threshold_can_be_cut_off_at_once(signed: list[Path]) -> None:
    ann, _, cat = signed
    run("whitelist", "publish", "--only-here", "--folder=lab")
    run(
        *("swarm", "rotate", "--folder=lab", "--remove=ben", "--role=whitelist"),
        *("--key", ann, "--key", cat, "--yes"),
    )
    said = run("whitelist", "publish", "--only-here", "--root-alone", "--folder=lab")
    assert "take up root 2 within seconds, and have no whitelist under it: they are at" in said
    store = open_store(load_settings("lab/hive.toml"))
    assert store is not None
    assert (store.root.version, store.whitelist) == (2, None)


def test_a_whitelist_that_a_new_threshold_completes_is_complete(signed: list[Path]) -> None:
    run("whitelist", "bump", "--folder=lab", *SVD)
    run("whitelist", "sign", "--folder=lab", "--yes", "--key", signed[2])
    run(
        *("swarm", "rotate", "--folder=lab", "--whitelist-threshold=1", "--yes"),
        *("--key", signed[0], "--key", signed[1]),
    )
    assert Path("lab/trust/2.whitelist").exists()
    assert "by root 2; signed by cat (" in run("whitelist", "verify", "--folder=lab")


def test_more_keys_and_copies_than_needed_do_no_harm(signed: list[Path]) -> None:
    everybody = [part for one in signed for part in ("--key", one)]
    said = run("swarm", "rotate", "--folder=lab", "--yes", *everybody)
    assert "root 2 is complete" in said
    assert "root 2 is in force" in run("swarm", "show", "--folder=lab")
    for what, arguments in (("swarm", ("rotate",)), ("whitelist", ("bump", *SVD))):
        run(what, *arguments, "--folder=lab")
        kind = "root.json" if what == "swarm" else "whitelist"
        copies = []
        for one in signed:
            place = copy_of(Path("lab"), f"{one.stem}-{what}")
            run(what, "sign", "--folder", place, "--yes", "--key", one)
            copies += place.glob(f"trust/pending/*.{kind}")
        assert len(copies) == 3
        assert "is complete" in run(what, "sign", *copies, "--folder=lab", "--key", signed[0])


def test_rotations_that_make_no_sense(signed: list[Path]) -> None:
    rotate = ("swarm", "rotate", "--folder=lab")
    assert refused(*rotate, "--remove=eve").startswith(
        "no holder of the role is called 'eve'; there are ann ("
    )
    assert "is a holder of the root role already" in refused(*rotate, "--add=ann/ann.pub")
    text = refused(*rotate, "--remove=ann", "--remove=ben", kind=BadTrustDocument)
    assert text == "the role root wants 2 signatures of 1 keys"
    assert "there is no file eve.pub" in refused(*rotate, "--add=eve.pub")
    other = Holder("ann", SigningKey.generate().public_key)
    Path("ann.pub").write_text(other.to_text())
    assert "have the same name or the same key" in refused(*rotate, "--add=ann.pub")
    assert not list(Path("lab/trust/pending").iterdir())
    run(*rotate)
    text = refused(*rotate)
    assert text.startswith("a root waits for signatures in lab already; have it signed, or, if no")
    assert "can become complete elsewhere, drop it with --replace" in text
    said = run(*rotate, "--replace", "--days=30", "--remove=ben", "--root-threshold=1")
    assert "the next root: 1 of 2 must sign" in said


def test_one_bootstrap_s_trouble_is_no_other_s(
    signed: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [Identity.generate().peer_id for _ in range(3)]
    config = Path("lab/hive.toml")
    lines = [one for one in config.read_text().splitlines() if not one.startswith("bootstraps")]
    addresses = [f"/ip4/127.0.0.1/tcp/{31330 + i}/p2p/{one}" for i, one in enumerate(ids)]
    lines = [one for one in lines if not one.startswith("issuers")]  # the signer is no member
    config.write_text("\n".join([f"bootstraps = {json.dumps(addresses)}", *lines, ""]))

    async def exchange(transport: object, peer: PeerAddress, store: object) -> TrustVersions:
        if peer.peer_id == ids[0]:
            raise UnderThreshold("whitelist 7 is signed by 1 of the keys of root 2")
        if peer.peer_id == ids[1]:
            raise PeerUnreachable("nothing listens there")
        return TrustVersions(1, 1)

    monkeypatch.setattr(trust_exchange, "exchange_trust", exchange)
    said = run("whitelist", "publish", "--folder=lab")
    assert f"bootstrap peer {ids[0]}: whitelist 7 is signed by 1 of the keys of root 2" in said
    assert f"bootstrap peer {ids[1]}: nothing listens there" in said
    assert f"bootstrap peer {ids[2]} has whitelist 1" in said


def test_publish_wants_what_is_complete(three: list[Path]) -> None:
    text = refused("whitelist", "publish", "--folder=lab")
    assert text.startswith("root 1 of 'lab' is not signed by enough of its holders yet")
    run("swarm", "sign", "--folder=lab", "--yes", "--key", three[1])
    text = refused("whitelist", "publish", "--folder=lab")
    assert text.startswith("no whitelist of lab has its signatures yet")


# The folder --------------------------------------------------------------------------------------


def test_what_is_missing_in_a_folder_is_said() -> None:
    assert refused("swarm", "show").startswith("there is no swarm in .: hive.toml is missing; name")
    run("swarm", "init", "lab")
    Path("lab/trust/3.root.json").write_bytes(b"{}")
    assert "has no 2.root.json, and later roots" in refused("swarm", "show", "--folder=lab")
    Path("lab/trust/3.root.json").unlink()
    shutil.copy("lab/trust/1.whitelist", "lab/trust/2.whitelist")
    assert "2.whitelist is whitelist 1" in refused("whitelist", "show", "--folder=lab")
    Path("lab/trust/2.whitelist").write_bytes(b"\0" * 300_000)
    assert "is it another file?" in refused("whitelist", "show", "--folder=lab")
    Path("lab/trust/2.whitelist").unlink()
    Path("lab/hive.toml").write_text("swarm = [")
    assert refused("swarm", "show", "--folder=lab").startswith("lab/hive.toml: not TOML")


def test_commands_are_wired_and_load_nothing_heavy() -> None:
    code = "import sys, glasshive.cli; print(*{one.split('.')[0] for one in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "hivemind", "tuf"} & set(done.stdout.split())
    done = subprocess.run(
        [sys.executable, "-m", "glasshive.cli", "whitelist", "verify"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: there is no swarm in .")
