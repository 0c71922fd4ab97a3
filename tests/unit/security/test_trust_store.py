"""The store of trust: versions only rise, over restarts, crashes and several processes."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hostile import Mutator
from signers import (
    ANN,
    BEN,
    CAT,
    DAN,
    DAY,
    EVE,
    FIRST,
    NOW,
    ROOT,
    SWARM,
    WHITELIST,
    root_document,
    signed_whitelist,
)
from soak import SEED, count

from glasshive.security import trust_store
from glasshive.security.errors import BadTrustStore, NotCurrent, UnderThreshold, WrongVersion
from glasshive.security.plain import decode_plain, encode_plain
from glasshive.security.trust_root import next_root
from glasshive.security.trust_store import TrustStore

SECOND = root_document(version=2, whitelist_keys=(DAN, EVE), before=ROOT)
SECOND_ROOT = next_root(ROOT, SECOND)


class Clock:
    now = float(NOW)

    def __call__(self) -> float:
        return self.now


def open_store(folder: Path, clock: Clock | None = None, root: bytes = FIRST) -> TrustStore:
    return TrustStore(folder, swarm=SWARM, root=root, clock=clock or Clock())


def test_an_empty_store_trusts_the_first_root_only(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    assert store.root == ROOT
    assert store.whitelist is None
    assert store.highest_version == 0
    assert not list(tmp_path.iterdir())


def test_what_was_taken_is_there_after_a_restart(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    assert store.accept_whitelist(*signed_whitelist(7, signed_by=(DAN, EVE)))
    assert store.accept_roots([SECOND])
    assert not store.accept_roots([])
    for one in (store, open_store(tmp_path)):
        assert one.root.version == 2
        assert one.highest_version == 7
        assert one.whitelist is not None
        assert one.whitelist.whitelist == WHITELIST
        assert one.roots_after(1) == (SECOND,)
        assert one.roots_after(2) == one.roots_after(3) == ()
    assert (tmp_path / "trust").stat().st_mode & 0o777 == 0o600


def test_the_same_again_is_no_news(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    assert store.accept_whitelist(*signed_whitelist())
    assert not store.accept_whitelist(*signed_whitelist())
    assert not store.accept_whitelist(*signed_whitelist(signed_by=(DAN, EVE)))


def test_a_key_that_is_taken_away_takes_its_whitelists_along(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.accept_whitelist(*signed_whitelist(7, signed_by=(CAT, DAN)))
    store.accept_roots([SECOND])
    for one in (store, open_store(tmp_path)):
        assert one.whitelist is None
        assert one.highest_version == 7
        with pytest.raises(WrongVersion, match="got whitelist 6, and 7 is known here"):
            one.accept_whitelist(*signed_whitelist(6, root=SECOND_ROOT, signed_by=(DAN, EVE)))
    # The same body, signed by those who may now, is as good as before.
    assert store.accept_whitelist(*signed_whitelist(7, root=SECOND_ROOT, signed_by=(DAN, EVE)))
    assert store.whitelist is not None


def test_an_expired_whitelist_stays_as_the_floor_of_versions(tmp_path: Path) -> None:
    open_store(tmp_path).accept_whitelist(*signed_whitelist())
    clock = Clock()
    clock.now = WHITELIST.expires_seconds + 1
    store = open_store(tmp_path, clock)
    assert store.highest_version == 7
    with pytest.raises(NotCurrent):
        store.accept_whitelist(*signed_whitelist(8))
    with pytest.raises(WrongVersion):
        store.accept_whitelist(*signed_whitelist(6, expires_seconds=NOW + 60 * DAY))


def test_roots_are_taken_all_or_none(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    fourth = root_document(version=4, before=replace(SECOND_ROOT, version=3))
    with pytest.raises(WrongVersion, match="root 3 is wanted"):
        store.accept_roots([SECOND, fourth])
    assert store.root.version == open_store(tmp_path).root.version == 1


def test_a_root_and_the_whitelist_behind_it_count_in_one_step(tmp_path: Path) -> None:
    seen: list[tuple[int, int | None]] = []

    class Looking(TrustStore):
        def _write(self, state: Any) -> None:
            super()._write(state)
            held = self.whitelist
            seen.append((self.root.version, held and held.whitelist.version))

    store = Looking(tmp_path, swarm=SWARM, root=FIRST, clock=Clock())
    store.accept_whitelist(*signed_whitelist(7, signed_by=(CAT, DAN)))
    anew = signed_whitelist(7, root=SECOND_ROOT, signed_by=(DAN, EVE))
    assert store.accept([SECOND], anew)
    assert seen == [(1, 7), (2, 7)]  # never a root without a whitelist
    assert not store.accept([SECOND], anew, after=1)  # known by now
    with pytest.raises(WrongVersion, match="root 3 is wanted"):
        store.accept([SECOND], None)


def test_a_good_root_is_taken_though_the_whitelist_behind_it_is_not(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    with pytest.raises(UnderThreshold):
        store.accept([SECOND], signed_whitelist(7, signed_by=(CAT, DAN)))
    assert (open_store(tmp_path).root.version, open_store(tmp_path).highest_version) == (2, 0)


def test_a_copy_of_the_first_root_with_other_signatures_is_the_same(tmp_path: Path) -> None:
    """Two signers may complete root 1 each. Failed with the documents compared as they are."""
    open_store(tmp_path).accept_whitelist(*signed_whitelist())
    for signed_by in ((ANN, CAT), (ANN, BEN, CAT)):
        assert open_store(tmp_path, root=root_document(signed_by=signed_by)).highest_version == 7


def test_another_root_of_a_known_version_is_refused(tmp_path: Path) -> None:
    """Failed with the known ones of the offered roots skipped, as they came."""
    store = open_store(tmp_path)
    store.accept_roots([SECOND])
    forked = root_document(version=2, whitelist_keys=(CAT, DAN), before=ROOT)
    third = root_document(version=3, before=next_root(ROOT, forked))
    for chain in ([forked], [forked, third]):
        with pytest.raises(WrongVersion, match="got another root 2 than the one that is known"):
            store.accept(chain, None, after=1)
    assert store.root.version == 2
    # What other signers completed says the same.
    same = root_document(
        version=2, whitelist_keys=(DAN, EVE), before=ROOT, signed_by=(ANN, BEN, CAT)
    )
    assert not store.accept([same], None, after=1)
    assert store.accept([same, root_document(version=3, before=SECOND_ROOT)], None, after=1)
    assert store.root.version == 3


def test_what_its_keys_no_longer_stand_for_is_still_kept(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.accept_whitelist(*signed_whitelist(7, signed_by=(CAT, DAN)))
    store.accept_roots([SECOND])
    for one in (store, open_store(tmp_path)):
        assert one.whitelist is None
        assert one.kept is not None
        assert one.kept.whitelist == WHITELIST


def test_a_kept_whitelist_that_no_root_stands_for_is_damage(tmp_path: Path) -> None:
    """Failed with what no keys signed taken as signed by keys that were taken away."""
    store = open_store(tmp_path)
    store.accept_whitelist(*signed_whitelist())
    parts = decode_plain((tmp_path / "trust").read_bytes())
    assert isinstance(parts, list)
    document, body = signed_whitelist(7, signed_by=(CAT,))
    (tmp_path / "trust").write_bytes(encode_plain([*parts[:3], document, body]))
    with pytest.raises(BadTrustStore, match="keys of no root in it signed the whitelist in it"):
        open_store(tmp_path)


def test_two_processes_on_one_folder_never_undercut_each_other(tmp_path: Path) -> None:
    one, other = open_store(tmp_path), open_store(tmp_path)
    one.accept_whitelist(*signed_whitelist(8))
    with pytest.raises(WrongVersion, match="8 is known here"):
        other.accept_whitelist(*signed_whitelist(7))
    assert other.highest_version == 8


def test_a_file_put_back_from_a_copy_does_not_lower_a_running_store(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.accept_whitelist(*signed_whitelist(7))
    old = (tmp_path / "trust").read_bytes()
    store.accept_whitelist(*signed_whitelist(8))
    (tmp_path / "trust").write_bytes(old)
    with pytest.raises(WrongVersion):
        store.accept_whitelist(*signed_whitelist(7))


CRASH = """
import os, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from signers import FIRST, NOW, SWARM, signed_whitelist
from glasshive.security import durable_file
from glasshive.security.trust_store import TrustStore

store = TrustStore(sys.argv[1], swarm=SWARM, root=FIRST, clock=lambda: NOW)
document, body = signed_whitelist(8)
left = int(sys.argv[2])

def dying(real):
    def call(*args, **kwargs):
        global left
        left -= 1
        if left < 0:
            os._exit(9)
        return real(*args, **kwargs)
    return call

class Half:
    # A file of which half is written when the process dies.
    def __init__(self, file):
        self._file = file
    def __enter__(self):
        return self
    def __exit__(self, *what):
        self._file.close()
    def write(self, data):
        global left
        if left == 0:
            self._file.write(data[: len(data) // 2])
            self._file.flush()
        left -= 1
        if left < 0:
            os._exit(9)
        self._file.write(data)
    def flush(self):
        self._file.flush()
    def fileno(self):
        return self._file.fileno()

fdopen = os.fdopen
names = ("replace", "fsync", "open")
mine = type(sys)("os_that_dies")
mine.__dict__.update(os.__dict__)
mine.__dict__.update({{name: dying(getattr(os, name)) for name in names}})
mine.fdopen = lambda *args: Half(fdopen(*args))
durable_file.os = mine
store.accept_whitelist(document, body)
os._exit(7)
"""


def test_a_crash_at_any_moment_of_a_write_leaves_old_or_new(tmp_path: Path) -> None:
    """The process dies before its n-th call to the system, at each n, with half a file written."""
    code = CRASH.format(tests=str(Path(__file__).parents[2]))
    seen = []
    for number in range(20):
        folder = tmp_path / str(number)
        open_store(folder).accept_whitelist(*signed_whitelist(7))
        done = subprocess.run(
            [sys.executable, "-c", code, str(folder), str(number)], timeout=60, check=False
        )
        assert done.returncode in (7, 9)
        store = open_store(folder)
        seen.append(store.highest_version)
        assert store.whitelist is not None
        with pytest.raises(WrongVersion):
            store.accept_whitelist(*signed_whitelist(6))
        assert store.accept_whitelist(*signed_whitelist(10))
        if done.returncode == 7:
            break
    assert done.returncode == 7
    assert seen == sorted(seen)
    assert seen.count(7) >= 4
    assert seen[-1] == 8


def test_a_disk_that_is_full_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(tmp_path)
    store.accept_whitelist(*signed_whitelist(7))

    def full(place: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(trust_store, "write_durable", full)
        with pytest.raises(BadTrustStore, match="No space left on device; nothing was taken"):
            store.accept_whitelist(*signed_whitelist(8))
    assert store.highest_version == open_store(tmp_path).highest_version == 7


@pytest.mark.parametrize("data", [b"", b"\xc0", b"\x95\x01\x90\x00\xc4\x00\xc4\x00"])
def test_a_damaged_file_is_not_a_new_beginning(tmp_path: Path, data: bytes) -> None:
    open_store(tmp_path).accept_whitelist(*signed_whitelist())
    (tmp_path / "trust").write_bytes(data)
    with pytest.raises(BadTrustStore, match="is damaged or of another release"):
        open_store(tmp_path)


def test_the_folder_of_another_swarm_is_refused(tmp_path: Path) -> None:
    open_store(tmp_path).accept_whitelist(*signed_whitelist())
    with pytest.raises(BadTrustStore, match="begins with another root"):
        open_store(tmp_path, root=root_document(root_threshold=1))
    with pytest.raises(BadTrustStore, match="the whitelist in it is not the one"):
        TrustStore(tmp_path, swarm="lab", root=FIRST, clock=Clock())


def test_a_file_open_to_others_is_refused(tmp_path: Path) -> None:
    open_store(tmp_path).accept_whitelist(*signed_whitelist())
    (tmp_path / "trust").chmod(0o644)
    with pytest.raises(BadTrustStore, match="is open to other users"):
        open_store(tmp_path)


def test_a_lock_that_is_held_is_waited_for_and_then_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trust_store, "LOCK_SECONDS", 0.05)
    store = open_store(tmp_path)
    with trust_store.FileLock(tmp_path / "trust.lock"):
        with pytest.raises(BadTrustStore, match=r"can't lock .* within"):
            store.accept_whitelist(*signed_whitelist())


def test_roots_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trust_store, "MAX_ROOTS", 1)
    with pytest.raises(BadTrustStore, match="more than 1 roots"):
        open_store(tmp_path).accept_roots([SECOND])


def test_changed_files_are_refused_or_say_the_same(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.accept_whitelist(*signed_whitelist(7, signed_by=(DAN, EVE)))
    store.accept_roots([SECOND])
    place = tmp_path / "trust"
    good = place.read_bytes()

    mutator = Mutator([good], SEED)
    refused = 0
    tries = count(2_000, 100_000)
    for _ in range(tries):
        place.write_bytes(mutator.next())
        try:
            found = open_store(tmp_path)
        except BadTrustStore:
            refused += 1
            continue
        # Its owner can cut the file back; what is in it nobody can change.
        assert found.root in (ROOT, SECOND_ROOT)
        assert found.highest_version in (0, 7)
        assert found.whitelist is None or found.whitelist.whitelist == WHITELIST
    assert refused > tries * 0.9
