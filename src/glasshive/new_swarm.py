"""A new swarm: keys, first root, first whitelist, bootstrap key and hive.toml in a new folder."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from glasshive.first_whitelist import DAY_SECONDS
from glasshive.security.errors import KeyFileError
from glasshive.security.keys import Identity, PeerId
from glasshive.security.signing_keys import SigningKey
from glasshive.security.trust_root import (
    add_root_signature,
    add_whitelist_signature,
    first_root,
    key_id_of,
    new_root,
    new_whitelist_document,
)
from glasshive.security.whitelist import Whitelist
from glasshive.trust_files import Holder, TrustFolderError, WhitelistFile
from glasshive.trust_folder import TrustFolder, unusable

ROOT_DAYS: Final = 365


@dataclass(frozen=True, slots=True)
class NewKey:
    """A signing key that is made with the swarm, and what it will be encrypted with."""

    key: SigningKey
    passphrase: str

    def __repr__(self) -> str:
        return f"NewKey({self.key})"


@dataclass(frozen=True, slots=True)
class NewSwarm:
    """What a swarm is made of. `whitelist` is its first and names it; `listen` is where the
    bootstrap peer will be. One that isn't `public` takes in members only."""

    whitelist: Whitelist
    listen: str
    root_holders: Sequence[Holder]
    root_threshold: int
    whitelist_holders: Sequence[Holder]
    whitelist_threshold: int
    new_keys: Mapping[str, NewKey]  # by the holder's name
    keys: Sequence[SigningKey] = ()  # others that are at hand to sign
    public: bool = False
    announce: Sequence[str] = ()  # where others find it, if not at `listen`


def make_swarm(place: Path, new: NewSwarm, clock: Callable[[], float]) -> TrustFolder:
    """The folder of the new swarm, at `place`; there is none if anything fails.

    Root and whitelist are signed by every key at hand, and wait for the rest. Raises
    TrustFolderError, also if there is something at `place`, KeyFileError, and BadTrustDocument or
    BadWhitelist for what can't be signed.
    """
    at_hand = [*(one.key for one in new.new_keys.values()), *new.keys]
    root = new_root(
        version=1,
        expires_seconds=int(clock()) + ROOT_DAYS * DAY_SECONDS,
        root_keys=[one.public_key for one in new.root_holders],
        root_threshold=new.root_threshold,
        whitelist_keys=[one.public_key for one in new.whitelist_holders],
        whitelist_threshold=new.whitelist_threshold,
    )
    document, body = new_whitelist_document(new.whitelist)
    holders = {one.public_key: one for one in (*new.root_holders, *new.whitelist_holders)}
    _check_used(new.keys, holders)
    for key in _those_of(new.root_holders, at_hand):
        root = add_root_signature(root, key, None)
    with new_folder(place) as draft:
        bootstrap = Identity.load_or_create(draft / "keys/bootstrap.key")
        hive = _hive_text(new, bootstrap.peer_id)
        folder = TrustFolder.create(draft, hive, clock)
        for holder in holders.values():
            folder.add_holder(holder)
        for name, made in new.new_keys.items():
            made.key.save(folder.keys / f"{name}.key", made.passphrase)
        if all(state.complete for state in folder.put_root(root)):
            for key in _those_of(new.whitelist_holders, at_hand):
                document = add_whitelist_signature(document, body, key, first_root(root))
        folder.put_whitelist(WhitelistFile(document, body))
    return TrustFolder(place, clock)


def _those_of(holders: Iterable[Holder], keys: Iterable[SigningKey]) -> list[SigningKey]:
    public = {one.public_key for one in holders}
    return [key for key in keys if key.public_key in public]


def _check_used(keys: Iterable[SigningKey], holders: Mapping[bytes, Holder]) -> None:
    for key in keys:
        if key.public_key not in holders:
            names = ", ".join(one.name for one in holders.values())
            raise KeyFileError(
                f"the key {key_id_of(key.public_key)[:16]}... of --key is of none of the holders "
                f"({names}); name its .pub file with --holder too"
            )


def _hive_text(new: NewSwarm, bootstrap: PeerId) -> str:
    issuers = (
        "# Who makes members of this private swarm: the bootstrap peer.\n"
        f"issuers = [{json.dumps(bootstrap)}]\n"
    )
    places = new.announce or [new.listen]
    return (
        "# Hosts, bootstrap peers and clients read this file: --config, GLASSHIVE_CONFIG, or\n"
        "# glasshive.connect. It holds no secret; paths are relative to it.\n"
        f"swarm = {json.dumps(new.whitelist.swarm)}\n"
        f"bootstraps = {json.dumps([f'{one}/p2p/{bootstrap}' for one in places])}\n"
        f"{'' if new.public else issuers}"
        "# Who may sign the whitelist that hosts keep to.\n"
        'root = "trust/1.root.json"\n'
        "# A host's own file, which can only narrow the whitelist:\n"
        '# policy = "policy.toml"\n'
    )


@contextmanager
def new_folder(place: Path) -> Iterator[Path]:
    """An empty folder that is `place` once the block ends well, and gone if it doesn't.

    Raises TrustFolderError, also if there is something at `place` already.
    """
    check_new(place)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent))
    except OSError as error:
        raise unusable(place, error) from None
    try:
        yield draft
        draft.chmod(0o755)
        draft.rename(place)
    except OSError as error:
        raise unusable(place, error) from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def check_new(place: Path) -> None:
    """Return if there is nothing at `place`. Raises TrustFolderError."""
    if any((place / name).exists() for name in ("hive.toml", "trust", "keys")):
        raise TrustFolderError(
            f"there is a swarm in {place} already, and none is ever written over; choose another "
            "folder, or change that swarm with `glasshive swarm rotate` and `glasshive whitelist "
            "bump`"
        )
    if place.exists():
        raise TrustFolderError(f"{place} is there already; choose a new folder for the swarm")
