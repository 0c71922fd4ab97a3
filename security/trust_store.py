"""What a host or client keeps of roots and whitelists, and never goes below.

One file, replaced as a whole: after a crash it is as it was, or as it was to become. It holds every
root since the first, for neighbours that are behind, and the highest whitelist that was ever taken.
What is read back is verified again from the first root on. The first root is known by what it says,
whichever of its keys have signed a copy of it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from filelock import FileLock, Timeout

from glasshive.security.durable_file import read_durable, write_durable
from glasshive.security.errors import (
    BadTrustStore,
    BadWhitelist,
    MalformedData,
    TrustRefused,
    UnderThreshold,
    WrongVersion,
)
from glasshive.security.plain import decode_plain, encode_plain
from glasshive.security.trust_root import (
    MAX_DOCUMENT_BYTES,
    TrustedRoot,
    VerifiedWhitelist,
    first_root,
    next_root,
    open_whitelist,
    root_digest,
    verify_root_chain,
    verify_whitelist,
)
from glasshive.security.whitelist import MAX_BODY_BYTES, MAX_VERSION

__all__ = ["TrustStore"]

MAX_ROOTS: Final = 256
LOCK_SECONDS: Final = 10.0

_FORMAT: Final = 1
_FILE: Final = "trust"
_MAX_FILE_BYTES: Final = (MAX_ROOTS + 2) * MAX_DOCUMENT_BYTES + MAX_BODY_BYTES


@dataclass(frozen=True, slots=True)
class _State:
    """What the file says: `kept` was signed by keys of some root of the chain.

    `whitelist` is the same by keys of the current root; None if these don't stand for it.
    """

    roots: tuple[bytes, ...]
    root: TrustedRoot
    kept: VerifiedWhitelist | None
    whitelist: VerifiedWhitelist | None

    @property
    def highest(self) -> int:
        return 0 if self.kept is None else self.kept.whitelist.version

    @property
    def rank(self) -> tuple[int, int]:
        return self.root.version, self.highest


class TrustStore:
    """The trusted root and the highest whitelist of one swarm, kept in a folder.

    Guarantees: root and whitelist versions only rise, also over restarts, crashes and several
    processes on one folder. `clock` gives Unix seconds.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        swarm: str,
        root: bytes,
        clock: Callable[[], float],
    ) -> None:
        """`root` is the first root's document. Raises BadTrustStore, or for a bad root
        BadTrustDocument or UnderThreshold."""
        self._place = Path(folder) / _FILE
        self._swarm = swarm
        self._clock = clock
        first = first_root(root)
        self._state = _State((root,), first, None, None)
        self._state = self._newest()

    @property
    def root(self) -> TrustedRoot:
        """The root that is trusted now; it may be expired."""
        return self._state.root

    @property
    def whitelist(self) -> VerifiedWhitelist | None:
        """The highest whitelist, signed by keys of the current root; it may be expired."""
        return self._state.whitelist

    @property
    def kept(self) -> VerifiedWhitelist | None:
        """The highest whitelist that was ever taken, also if its keys don't count any more.

        Where it is not `whitelist`, it may take away and never give.
        """
        return self._state.kept

    @property
    def highest_version(self) -> int:
        """The whitelist version that is never undercut; 0 before the first."""
        return self._state.highest

    def roots_after(self, version: int) -> tuple[bytes, ...]:
        """The documents of the roots that a neighbour at root `version` lacks."""
        behind = self._state.root.version - version
        return self._state.roots[-behind:] if 0 < behind < len(self._state.roots) else ()

    def refresh(self) -> None:
        """Take up what other processes on this folder have taken. Raises BadTrustStore."""
        self._newest()

    def accept_roots(self, documents: Sequence[bytes]) -> bool:
        """Take the roots that follow the trusted one, all or none; whether there are any.

        Raises what `verify_root_chain` raises, and BadTrustStore.
        """
        return self.accept(documents, None)

    def accept_whitelist(self, document: bytes, body: bytes) -> bool:
        """Take a whitelist if it is newer than the held one; whether it was.

        Raises what `verify_whitelist` raises, WrongVersion for one that the held whitelist revokes
        or that differs from it under the same version, and BadTrustStore.
        """
        return self.accept((), (document, body))

    def accept(
        self,
        roots: Sequence[bytes],
        whitelist: tuple[bytes, bytes] | None,
        *,
        after: int | None = None,
    ) -> bool:
        """Take roots and the whitelist (document, body) behind them; whether anything was new.

        `after` is the version of the root that they follow, if some may be known here by now; one
        that says something else than the known one of its version is a WrongVersion. They count in
        one step: a root that takes a key away leaves no moment without a whitelist if one that was
        signed anew comes with it.

        Good roots are taken even if the whitelist is not: a root is news by itself, and whoever
        could keep it away with a bad whitelist behind it could keep a stolen key alive. Raises what
        `accept_roots` and `accept_whitelist` raise.
        """
        with self._locked():
            old = self._newest()
            known = 0 if after is None else max(old.root.version - after, 0)
            _check_known(old.roots[len(old.roots) - known :], roots[:known], old.root.version)
            state = self._with_roots(old, roots[known:])
            try:
                if whitelist is not None:
                    state = self._with_whitelist(state, *whitelist)
            finally:
                if state is not old:
                    self._write(state)
            return state is not old

    def _with_roots(self, state: _State, documents: Sequence[bytes]) -> _State:
        if len(state.roots) + len(documents) > MAX_ROOTS:
            raise BadTrustStore(f"more than {MAX_ROOTS} roots; begin with a later first root")
        if not documents:
            return state
        root = verify_root_chain(state.root, documents, self._clock())
        whitelist = _kept_by(root, state.kept)
        return replace(state, roots=(*state.roots, *documents), root=root, whitelist=whitelist)

    def _with_whitelist(self, state: _State, document: bytes, body: bytes) -> _State:
        new = verify_whitelist(
            state.root,
            document,
            body,
            swarm=self._swarm,
            least_version=state.highest,
            now_seconds=self._clock(),
        )
        version = new.whitelist.version
        held = state.whitelist
        if held is not None and version in held.whitelist.revoked_versions:
            raise WrongVersion(f"whitelist {version} is revoked; sign a newer one")
        if state.kept is not None and version == state.highest:
            if body != state.kept.body:
                raise WrongVersion(
                    f"got another whitelist {version} than the one that is known here; "
                    "sign the next version"
                )
            if held is not None:
                return state
        return replace(state, kept=new, whitelist=new)

    # The file

    @contextmanager
    def _locked(self) -> Iterator[None]:
        lock = FileLock(self._place.with_name(_FILE + ".lock"), timeout=LOCK_SECONDS)
        try:
            self._place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock.acquire()
        except (Timeout, OSError) as error:
            raise BadTrustStore(
                f"can't lock {self._place} within {LOCK_SECONDS:.0f} s: {error}; check the rights "
                "of its folder, and whether a process hangs"
            ) from None
        try:
            yield
        finally:
            lock.release()

    def _newest(self) -> _State:
        """What the file says, unless this process knows more."""
        state = self._read()
        if state is not None and state.rank >= self._state.rank:
            self._state = state
        return self._state

    def _read(self) -> _State | None:
        """The verified content of the file, None if there is none."""
        try:
            is_there = self._place.exists()
            data = read_durable(self._place, _MAX_FILE_BYTES)
        except ValueError as error:
            raise BadTrustStore(str(error)) from None
        except OSError as error:
            raise BadTrustStore(
                f"can't read {self._place}: {error.strerror or error}; check its rights"
            ) from None
        if not is_there:
            return None
        roots, highest, document, body = self._parts(data)
        try:
            is_other = root_digest(roots[0]) != root_digest(self._state.roots[0])
            chain = [first_root(roots[0])]
            for one in roots[1:]:
                chain.append(next_root(chain[-1], one))
            kept = self._open(chain, highest, document, body)
        except (TrustRefused, BadWhitelist) as error:
            raise self._damaged(str(error)) from None
        if is_other:
            raise BadTrustStore(
                f"{self._place} begins with another root than the one that was given; each swarm "
                "has a folder of its own"
            )
        return _State(roots, chain[-1], kept, _kept_by(chain[-1], kept))

    def _parts(self, data: bytes) -> tuple[tuple[bytes, ...], int, bytes, bytes]:
        try:
            tree = decode_plain(
                data, max_bytes=_MAX_FILE_BYTES, max_depth=2, max_elements=MAX_ROOTS + 8
            )
        except MalformedData as error:
            raise self._damaged(str(error)) from None
        if not isinstance(tree, list) or len(tree) != 5 or tree[0] != _FORMAT:
            raise self._damaged("not a list of five of this release")
        _, roots, highest, document, body = tree
        if (
            not isinstance(roots, list)
            or not roots
            or type(highest) is not int
            or not 0 <= highest <= MAX_VERSION
            or type(document) is not bytes
            or type(body) is not bytes
            or bool(highest) != bool(document)
        ):
            raise self._damaged("a part of it is missing")
        documents = tuple(one for one in roots if type(one) is bytes)
        if len(documents) != len(roots):
            raise self._damaged("a root in it is not bytes")
        return documents, highest, document, body

    def _open(
        self, chain: Sequence[TrustedRoot], highest: int, document: bytes, body: bytes
    ) -> VerifiedWhitelist | None:
        """The kept whitelist, by the newest root whose keys signed it."""
        if not highest:
            return None
        by_each = (_signed_by(root, document, body) for root in reversed(chain))
        kept = next((one for one in by_each if one is not None), None)
        if kept is None:
            raise self._damaged("keys of no root in it signed the whitelist in it")
        if (kept.whitelist.version, kept.whitelist.swarm) != (highest, self._swarm):
            raise self._damaged("the whitelist in it is not the one that it names")
        return kept

    def _write(self, state: _State) -> None:
        kept = state.kept
        document, body = (b"", b"") if kept is None else (kept.document, kept.body)
        data = encode_plain([_FORMAT, state.roots, state.highest, document, body])
        try:
            write_durable(self._place, data)
        except OSError as error:
            raise BadTrustStore(
                f"can't write {self._place}: {error.strerror or error}; nothing was taken; make "
                "room or check its rights"
            ) from None
        self._state = state

    def _damaged(self, why: str) -> BadTrustStore:
        return BadTrustStore(
            f"{self._place} is damaged or of another release: {why}; restore it from a copy. "
            "Without it an older whitelist could come back, so it is not made anew by itself"
        )


def _signed_by(root: TrustedRoot, document: bytes, body: bytes) -> VerifiedWhitelist | None:
    """The whitelist by keys of `root`; None if too few of them signed it."""
    try:
        return open_whitelist(root, document, body)
    except UnderThreshold:
        return None


def _kept_by(root: TrustedRoot, kept: VerifiedWhitelist | None) -> VerifiedWhitelist | None:
    return None if kept is None else _signed_by(root, kept.document, kept.body)


def _check_known(known: Sequence[bytes], offered: Sequence[bytes], last: int) -> None:
    """Return if these roots, offered again, say what the known ones up to `last` say."""
    first = last - len(known) + 1
    for version, (mine, other) in enumerate(zip(known, offered, strict=False), first):
        if mine != other and root_digest(mine) != root_digest(other):
            raise WrongVersion(
                f"got another root {version} than the one that is known here: two were signed; ask "
                "who holds its keys which one counts, and where the other was taken begin with a "
                "new first root"
            )
