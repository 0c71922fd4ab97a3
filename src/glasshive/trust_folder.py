"""The folder of a swarm: who may sign for it, what they signed, and what waits for signatures.

    lab/
        hive.toml                what hosts and clients read
        trust/                   no secret in it: copy it to whoever asks
            1.root.json          every root since the first
            1.whitelist          every whitelist that enough of its signers signed
            holders/ann.pub      the public part of each key, with a name for it
            pending/2.whitelist  a root, a whitelist, or both, with too few signatures yet
        keys/                    for their owner's eyes: encrypted signing keys, the bootstrap's key

Rules:

1. What is below `trust/` but not below `pending/` was verified from `1.root.json` on, each time it
   is read. Whoever holds the folder believes that first root.
2. A root or whitelist that has its signatures moves out of `pending/` and never changes again.
3. A key signs a document once, and only what it signs for counts. Other signatures are left out
   before anything is added, so that junk in a copy can't fill the place of good ones.
4. Files are replaced whole, and one command at a time writes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final, final

from filelock import FileLock, Timeout
from tuf.api.metadata import Metadata
from tuf.api.serialization import DeserializationError

from glasshive.security.durable_file import write_durable
from glasshive.security.errors import BadTrustDocument, UnderThreshold
from glasshive.security.signing_keys import SigningKey
from glasshive.security.trust_root import (
    MAX_DOCUMENT_BYTES,
    KeyId,
    RoleSignatures,
    TrustedRoot,
    VerifiedWhitelist,
    add_root_signature,
    add_whitelist_signature,
    first_root,
    key_id_of,
    merge_root_signatures,
    merge_whitelist_signatures,
    next_root,
    open_whitelist,
    root_signatures,
    root_terms,
    verify_whitelist,
    whitelist_signatures,
)
from glasshive.security.trust_store import MAX_ROOTS
from glasshive.security.whitelist import read_toml
from glasshive.settings import MAX_CONFIG_BYTES
from glasshive.trust_files import (
    Holder,
    TrustFolderError,
    WhitelistFile,
    check_holder_name,
    read_bounded,
    read_holder,
    read_text,
    read_whitelist_file,
)

MAX_HOLDERS: Final = 64
_LOCK_SECONDS: Final = 10.0
_VERSION: Final = re.compile(r"([1-9]\d{0,9})\.(root\.json|whitelist)")


class SigningRefused(TrustFolderError):
    """A signature that would not count, or that is there already."""


@final
class TrustFolder:
    """One swarm's folder. `clock` gives Unix seconds."""

    def __init__(self, place: Path, clock: Callable[[], float]) -> None:
        """Raises TrustFolderError if there is no swarm in `place`."""
        self.place = place
        self._clock = clock
        self._trust = place / "trust"
        self._pending = self._trust / "pending"
        if not self.hive.is_file():
            raise TrustFolderError(
                f"there is no swarm in {place}: {self.hive} is missing; name a swarm's folder with "
                "--folder, or make one with `glasshive swarm init`"
            )
        try:
            tree = read_toml(read_text(self.hive, MAX_CONFIG_BYTES), TrustFolderError)
        except TrustFolderError as error:
            raise TrustFolderError(f"{self.hive}: {error}") from None
        swarm = tree.get("swarm")
        if not isinstance(swarm, str):
            raise TrustFolderError(f'{self.hive} names no swarm; write its name: swarm = "lab"')
        self.swarm = swarm

    @classmethod
    def create(cls, place: Path, hive: str, clock: Callable[[], float]) -> TrustFolder:
        """The empty folder `place` as that of a new swarm; hive.toml has the text `hive`.

        Raises TrustFolderError.
        """
        try:
            for name in ("trust/holders", "trust/pending"):
                (place / name).mkdir(parents=True)
            (place / "keys").mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise unusable(place, error) from None
        _write(place / "hive.toml", hive.encode())
        return cls(place, clock)

    @property
    def hive(self) -> Path:
        """The settings that hosts and clients of the swarm read."""
        return self.place / "hive.toml"

    @property
    def keys(self) -> Path:
        """The folder of what must stay secret."""
        return self.place / "keys"

    # Who

    def holders(self) -> dict[KeyId, Holder]:
        """Everybody whose public part is here, by key. Raises TrustFolderError."""
        places = sorted((self._trust / "holders").glob("*.pub"))
        if len(places) > MAX_HOLDERS:
            raise TrustFolderError(
                f"{self._trust / 'holders'} has more than {MAX_HOLDERS} public parts; take some out"
            )
        found = [read_holder(place) for place in places]
        for place, holder in zip(places, found, strict=True):
            if place.stem != holder.name:
                raise TrustFolderError(
                    f"{place} is the public part of {holder.name!r}; rename it to {holder.name}.pub"
                )
        return {one.key_id: one for one in found}

    def add_holder(self, holder: Holder) -> None:
        """Keep a public part. Raises TrustFolderError if its name or key is another holder's."""
        check_holder_name(holder.name)
        for other in self.holders().values():
            if other == holder:
                return
            if other.name.lower() == holder.name.lower() or other.public_key == holder.public_key:
                raise TrustFolderError(
                    f"{holder.name} ({holder.key_id[:16]}...) and {other.name} "
                    f"({other.key_id[:16]}...) have the same name or the same key; each holder "
                    "has a key and a name of their own"
                )
        _write(self._trust / "holders" / f"{holder.name}.pub", holder.to_text().encode())

    def name_of(self, key_id: KeyId) -> str:
        """What a key's holder is called here, and the beginning of the key's id."""
        holder = self.holders().get(key_id)
        return f"{holder.name if holder else 'unnamed'} ({key_id[:16]})"

    def names_of(self, key_ids: Iterable[KeyId]) -> list[str]:
        """The same of several keys, by name."""
        return sorted(map(self.name_of, key_ids))

    # What is in force

    def roots(self) -> tuple[TrustedRoot, ...]:
        """Every root since the first, each verified by the one before. Raises TrustRefused and
        TrustFolderError."""
        found: list[TrustedRoot] = []
        for version in self._versions("root.json"):
            if version != len(found) + 1:
                raise TrustFolderError(
                    f"{self._trust} has no {len(found) + 1}.root.json, and later roots; copy it "
                    "from another signer"
                )
            document = self._document(self._trust / f"{version}.root.json")
            found.append(next_root(found[-1], document) if found else first_root(document))
            if found[-1].version != version:
                raise TrustFolderError(
                    f"{self._trust / f'{version}.root.json'} is root {found[-1].version}"
                )
        return tuple(found)

    def root(self) -> TrustedRoot:
        """The newest root. Raises TrustFolderError if the first still waits for signatures."""
        roots = self.roots()
        if not roots:
            raise TrustFolderError(
                f"root 1 of {self.swarm!r} is not signed by enough of its holders yet, so nothing "
                "can be signed under it; sign it with `glasshive swarm sign`"
            )
        return roots[-1]

    def root_path(self, version: int) -> Path:
        """Where a complete root is."""
        return self._trust / f"{version}.root.json"

    def whitelist_path(self, version: int) -> Path:
        """Where a complete whitelist is."""
        return self._trust / f"{version}.whitelist"

    def whitelist_versions(self) -> tuple[int, ...]:
        """The versions that were signed, ascending."""
        return self._versions("whitelist")

    def newest_whitelist(self) -> WhitelistFile | None:
        """The signed whitelist of the highest version; None before the first."""
        versions = self.whitelist_versions()
        return self.whitelist_file(versions[-1]) if versions else None

    def whitelist_file(self, version: int) -> WhitelistFile:
        """A whitelist by version, signed or waiting. Raises TrustFolderError, BadWhitelist."""
        for place in (self._trust, self._pending):
            path = place / f"{version}.whitelist"
            if path.is_file():
                found = read_whitelist_file(path)
                if found.whitelist.version != version:
                    raise TrustFolderError(f"{path} is whitelist {found.whitelist.version}")
                return found
        known = ", ".join(map(str, self.whitelist_versions())) or "none"
        raise TrustFolderError(
            f"{self._trust} has no whitelist {version}; signed are {known}, and "
            "`glasshive whitelist bump` makes the next"
        )

    def verify(self, file: WhitelistFile) -> VerifiedWhitelist:
        """The whitelist, if a host that knows what is here would take it.

        Raises what `verify_whitelist` raises.
        """
        return verify_whitelist(
            self.root(), file.document, file.body, swarm=self.swarm,
            least_version=max(self.whitelist_versions(), default=1), now_seconds=self._clock(),
        )  # fmt: skip

    # What waits for signatures

    def pending_root(self) -> bytes | None:
        """The next root's document; None if none waits. Raises TrustFolderError."""
        place = self._pending_place("root.json")
        return None if place is None else self._document(place)

    def pending_whitelist(self) -> WhitelistFile | None:
        """The next whitelist; None if none waits. Raises TrustFolderError, BadWhitelist."""
        place = self._pending_place("whitelist")
        return None if place is None else read_whitelist_file(place)

    def pending_paths(self) -> tuple[Path, ...]:
        """The files to pass to those who have not signed yet."""
        places = (self._pending_place("root.json"), self._pending_place("whitelist"))
        return tuple(place for place in places if place is not None)

    def root_states(self, document: bytes) -> tuple[RoleSignatures, ...]:
        """What the thresholds of the root that comes next have and lack. Raises TrustRefused."""
        return root_signatures(document, self._before())

    def put_root(self, document: bytes) -> tuple[RoleSignatures, ...]:
        """Keep the next root: as pending, or for good once its signatures are complete."""
        with self._locked():
            return self._put_root(document)

    def put_whitelist(self, file: WhitelistFile, *, replace: bool = False) -> RoleSignatures | None:
        """Keep the next whitelist, likewise; None while the first root waits itself.

        With `replace` the one that waits is dropped, with its signatures. Raises SigningRefused for
        one that could not come next here.
        """
        with self._locked():
            self._check_next_whitelist(file)
            self._check_room(file, replace=replace)
            if replace:
                self._drop("whitelist")
            return self._put_whitelist(file)

    def sign_root(self, key: SigningKey, shown: bytes) -> tuple[RoleSignatures, ...]:
        """Add a signature to the root that waits, which is the one that its signer was `shown`.

        Raises SigningRefused, also for a key that signed it already, and TrustFolderError.
        """
        with self._locked():
            document = self.pending_root()
            if document is None or document != shown:
                raise self._changed("root")
            states = self.root_states(document)
            self._check_signer(key, states, "root")
            return self._put_root(
                add_root_signature(self._counting_root(document), key, self._before())
            )

    def sign_whitelist(self, key: SigningKey, shown: WhitelistFile) -> RoleSignatures:
        """Add a signature to the whitelist that waits, likewise."""
        with self._locked():
            file = self.pending_whitelist()
            if file is None or file != shown:
                raise self._changed("whitelist")
            root = self.root()
            self._check_next_whitelist(file)
            state = whitelist_signatures(file.document, root)
            self._check_signer(key, (state,), "whitelist")
            counting = self._counting_whitelist(file)
            document = add_whitelist_signature(counting.document, file.body, key, root)
            done = self._put_whitelist(WhitelistFile(document, file.body))
            return state if done is None else done

    def take_root(self, document: bytes) -> tuple[RoleSignatures, ...]:
        """Take up the signatures that count of a copy of the next root, from another signer."""
        with self._locked():
            self._check_next_root(document)
            known = self.pending_root()
            copies = (document,) if known is None else (known, document)
            return self._put_root(self._counting_root(*copies))

    def take_whitelist(self, file: WhitelistFile) -> RoleSignatures | None:
        """Take up the signatures of a copy of the next whitelist, likewise.

        Raises SigningRefused for one that could not come next here, and TrustFolderError while the
        first root waits itself.
        """
        with self._locked():
            self._check_next_whitelist(file)
            known = self.pending_whitelist()
            if known is not None and known.whitelist.version != file.whitelist.version:
                raise SigningRefused(
                    f"got whitelist {file.whitelist.version}, and {known.whitelist.version} waits "
                    f"for signatures in {self.place}; have that signed, or take it out of "
                    f"{self._pending}"
                )
            copies = (file,) if known is None else (known, file)
            return self._put_whitelist(self._counting_whitelist(*copies))

    # Rules

    def _check_next_root(self, document: bytes) -> None:
        """Raises SigningRefused for a root that does not come next here."""
        version, comes = root_terms(document).version, len(self.roots()) + 1
        if version != comes:
            raise SigningRefused(
                f"got root {version}, and root {comes} comes next in {self.place}; copy what is "
                "missing from another signer"
            )

    def _check_room(self, file: WhitelistFile, *, replace: bool) -> None:
        """Raises SigningRefused for a whitelist in whose place another one waits."""
        known = self.pending_whitelist()
        if known is None:
            return
        version, waits = file.whitelist.version, known.whitelist.version
        if not replace:
            raise SigningRefused(
                f"whitelist {waits} waits for signatures in {self.place} already; have it signed, "
                "or drop it with --replace"
            )
        if version <= waits:  # another signer may have completed the one that waits
            raise SigningRefused(
                f"got whitelist {version} in the place of {waits}, wanted a higher version; make "
                "it anew with `glasshive whitelist bump --replace`"
            )

    def _counting_root(self, *copies: bytes) -> bytes:
        """The root that all copies are of, with those of their signatures that count now."""
        before = self._before()
        document = _unsigned(copies[0])
        for copy in copies:
            document = merge_root_signatures(document, copy, before)
        return document

    def _counting_whitelist(self, *copies: WhitelistFile) -> WhitelistFile:
        """The same of a whitelist."""
        root = self.root()
        document = _unsigned(copies[0].document)
        for copy in copies:
            document = merge_whitelist_signatures(document, copy.document, root)
        return WhitelistFile(document, copies[0].body)

    def _before(self) -> TrustedRoot | None:
        """The root that the next one follows."""
        roots = self.roots()
        return roots[-1] if roots else None

    def _check_next_whitelist(self, file: WhitelistFile) -> None:
        """Raises SigningRefused for a whitelist that no host of this swarm would take next."""
        whitelist = file.whitelist
        if whitelist.swarm != self.swarm:
            raise SigningRefused(
                f"got a whitelist of the swarm {whitelist.swarm!r}, and {self.place} is the folder "
                f"of {self.swarm!r}; name the right folder with --folder"
            )
        newest = max(self.whitelist_versions(), default=0)
        if whitelist.version <= newest:
            raise SigningRefused(
                f"got whitelist {whitelist.version}, and {newest} is signed already; an old one is "
                "never taken back, make the next one with `glasshive whitelist bump`"
            )
        held = self.newest_whitelist()
        if held is not None and whitelist.version in held.whitelist.revoked_versions:
            raise SigningRefused(
                f"whitelist {whitelist.version} is revoked by {newest}; make the next one with "
                "`glasshive whitelist bump`"
            )
        if self._clock() >= whitelist.expires_seconds:
            raise SigningRefused(
                f"whitelist {whitelist.version} is expired, so no host would take it; make the "
                "next one with `glasshive whitelist bump --replace`"
            )

    def _check_signer(self, key: SigningKey, states: Sequence[RoleSignatures], what: str) -> None:
        key_id = key_id_of(key.public_key)
        if any(key_id in state.signed for state in states):
            raise SigningRefused(
                f"{self.name_of(key_id)} has signed this {what} already, and a key counts once; "
                f"pass it on: {'; '.join(self.in_words(state) for state in states)}"
            )
        if not any(key_id in state.missing for state in states):
            wanted = {one for state in states for one in state.missing}
            raise SigningRefused(
                f"the key {self.name_of(key_id)} may not sign this {what}; those who may and have "
                f"not: {', '.join(self.names_of(wanted))}"
            )

    def _changed(self, what: str) -> SigningRefused:
        return SigningRefused(
            f"another command changed the {what} that waits in {self.place} while you read it; "
            "look at it again, and sign that"
        )

    def in_words(self, state: RoleSignatures) -> str:
        """What a threshold has and lacks, with the names of the holders."""
        signed = ", ".join(self.names_of(state.signed)) or "nobody"
        text = f"{state.role}: {len(state.signed)} of {state.threshold} signatures, by {signed}"
        if state.complete:
            return f"{text}; complete"
        missing = ", ".join(self.names_of(state.missing))
        count = state.threshold - len(state.signed)
        return f"{text}; {count} more {'is' if count == 1 else 'are'} missing, of: {missing}"

    # Files

    def _put_root(self, document: bytes) -> tuple[RoleSignatures, ...]:
        roots = self.roots()
        if len(roots) >= MAX_ROOTS:
            raise TrustFolderError(f"more than {MAX_ROOTS} roots; begin with a new first root")
        self._check_next_root(document)
        states = self.root_states(document)
        name = f"{len(roots) + 1}.root.json"
        if all(state.complete for state in states):
            # By the rules that hosts have, before it counts here.
            next_root(roots[-1], document) if roots else first_root(document)
            _write(self._trust / name, document)
            self._drop("root.json")
            waiting = self.pending_whitelist()
            if waiting is not None:
                self._put_whitelist(waiting)  # by the new thresholds it may be complete
        else:
            _write(self._pending / name, document)
        return states

    def _put_whitelist(self, file: WhitelistFile) -> RoleSignatures | None:
        name = f"{file.whitelist.version}.whitelist"
        roots = self.roots()
        state = whitelist_signatures(file.document, roots[-1]) if roots else None
        if state is not None and state.complete:
            open_whitelist(roots[-1], file.document, file.body)
            _write(self._trust / name, file.encode())
            self._drop("whitelist")
        else:
            _write(self._pending / name, file.encode())
        return state

    def _drop(self, kind: str) -> None:
        """Take away what waits, and what is left of what waited once."""
        for version in self._versions(kind, self._pending):
            (self._pending / f"{version}.{kind}").unlink(missing_ok=True)

    def _pending_place(self, kind: str) -> Path | None:
        """The file that waits; one of a version that is signed by now doesn't."""
        signed = max(self._versions(kind), default=0)
        versions = [one for one in self._versions(kind, self._pending) if one > signed]
        if len(versions) > 1:
            raise TrustFolderError(
                f"several of one kind wait in {self._pending}: {', '.join(map(str, versions))}; "
                "take all but the right one out"
            )
        return self._pending / f"{versions[0]}.{kind}" if versions else None

    def _versions(self, kind: str, place: Path | None = None) -> tuple[int, ...]:
        try:
            names = os.listdir(place or self._trust)
        except OSError as error:
            raise unusable(place or self._trust, error) from None
        matches = (_VERSION.fullmatch(name) for name in names)
        return tuple(sorted(int(one[1]) for one in matches if one is not None and one[2] == kind))

    def _document(self, place: Path) -> bytes:
        return read_bounded(place, MAX_DOCUMENT_BYTES)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        lock = FileLock(self._trust / ".lock", timeout=_LOCK_SECONDS)
        try:
            lock.acquire()
        except (Timeout, OSError) as error:
            raise TrustFolderError(
                f"can't lock {self._trust} within {_LOCK_SECONDS:.0f} s: {error}; end the other "
                "command, or check the folder's rights"
            ) from None
        try:
            yield
        finally:
            lock.release()


def whitelist_stands(root: TrustedRoot, file: WhitelistFile) -> bool:
    """Whether enough of the keys that `root` names signed the whitelist."""
    try:
        open_whitelist(root, file.document, file.body)
    except UnderThreshold:
        return False
    return True


def _unsigned(document: bytes) -> bytes:
    """A root's or whitelist's document without its signatures. Raises BadTrustDocument."""
    try:
        metadata = Metadata.from_bytes(document)
    except DeserializationError:  # whose text quotes what a stranger wrote
        raise BadTrustDocument("no root or whitelist document; get it anew") from None
    metadata.signatures.clear()
    return bytes(metadata.to_bytes())


def _write(place: Path, data: bytes) -> None:
    """Write a file that everybody may read. Raises TrustFolderError."""
    try:
        write_durable(place, data)
        place.chmod(0o644)
    except OSError as error:
        raise unusable(place, error) from None


def unusable(place: Path, error: OSError) -> TrustFolderError:
    """What to say of a file or folder that the system refuses."""
    return TrustFolderError(
        f"can't use {place}: {error.strerror or error}; check the path and the rights of its folder"
    )
