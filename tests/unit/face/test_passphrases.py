"""Passphrases: from a file of one's own or from a terminal, twice for a new key, never shown."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from glasshive.passphrases import PassphraseError, known_passphrase, new_passphrase
from glasshive.security.signing_keys import SigningKey

PASSPHRASE = "correct horse battery staple"


@pytest.fixture(autouse=True)
def _no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLASSHIVE_PASSPHRASE_FILE", raising=False)


def private(place: Path, data: bytes) -> Path:
    place.write_bytes(data)
    place.chmod(0o600)
    return place


def test_a_file_is_read_without_the_end_of_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for end in (b"", b"\n", b"\r\n"):
        file = private(tmp_path / "p", " é x ".encode() + end)
        assert known_passphrase("ann", file) == new_passphrase("ann", file) == " é x "
    monkeypatch.setenv("GLASSHIVE_PASSPHRASE_FILE", str(file))
    assert known_passphrase("ann", None) == " é x "
    other = private(tmp_path / "other", b"other")
    assert known_passphrase("ann", other) == "other"


@pytest.mark.parametrize(
    ("data", "mode", "said"),
    [
        (PASSPHRASE.encode(), 0o644, "open to other users (mode 0644), wanted 0600; run `chmod"),
        (b"", 0o600, "has not one line; write one into it"),
        (b"\n", 0o600, "has not one line"),
        (b"a\nb\n", 0o600, "has not one line"),
        (b"\xff", 0o600, "is no UTF-8 text"),
        (b"x" * 5000, 0o600, "has more than 4096 bytes"),
    ],
)
def test_a_file_that_is_none_is_refused(tmp_path: Path, data: bytes, mode: int, said: str) -> None:
    file = private(tmp_path / "p", data)
    file.chmod(mode)
    with pytest.raises(PassphraseError) as caught:
        known_passphrase("ann", file)
    assert said in str(caught.value)
    assert PASSPHRASE not in str(caught.value)


def test_no_file_and_no_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PassphraseError, match=r"can't read the passphrase file .*: No such file"):
        known_passphrase("ann", tmp_path / "none")
    with open(os.devnull) as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        with pytest.raises(
            PassphraseError, match="no terminal to ask for the passphrase of ann; name a file of"
        ):
            known_passphrase("ann", None)


def typed(folder: Path, *lines: str) -> tuple[int, str]:
    """(exit code, all that a terminal showed) of `swarm key ann`, with these lines typed.

    Each is typed once the command asks, so that it can't be echoed before echo is off.
    """
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "glasshive.cli", "swarm", "key", "ann", "--out", str(folder)],
        stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    shown, ends_at = b"", time.monotonic() + 60
    waiting = [*lines]
    try:
        while time.monotonic() < ends_at:
            if select.select([ours], [], [], 0.1)[0]:
                try:
                    data = os.read(ours, 4096)
                except OSError:  # Linux says so that the other end is closed
                    break
                if not data:
                    break
                shown += data
                asked = shown.count(b"words or more: ") + shown.count(b"The same again: ")
                while waiting and asked > len(lines) - len(waiting):
                    os.write(ours, waiting.pop(0).encode() + b"\n")
        return process.wait(10), shown.decode()
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def test_a_new_passphrase_is_typed_twice_and_not_shown(tmp_path: Path) -> None:
    code, shown = typed(tmp_path, PASSPHRASE, "another", PASSPHRASE, PASSPHRASE)
    assert code == 0, shown
    assert "they differ; once more" in shown
    assert PASSPHRASE not in shown
    SigningKey.load(tmp_path / "ann.key", PASSPHRASE)


def test_three_tries(tmp_path: Path) -> None:
    code, shown = typed(tmp_path, *(f"passphrase {number}" for number in range(6)))
    assert code == 1
    assert "differed 3 times; start again" in shown
    assert not list(tmp_path.iterdir())


def test_no_option_takes_a_passphrase_itself() -> None:
    """It would stand in the shell's history and in the list of processes."""
    for group, command in (
        *(("swarm", one) for one in ("init", "key", "sign", "rotate")),
        ("whitelist", "sign"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "glasshive.cli", group, command, "--help"],
            capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "200"},
        )  # fmt: skip
        assert "--passphrase-file" in done.stdout
        assert done.stdout.replace("--passphrase-file", "").count("--passphrase") == 0
