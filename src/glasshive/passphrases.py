"""Passphrases of signing keys: asked for at a terminal, or read from a file of their owner's alone.

Never from the command line or from a variable, where other processes and shell histories see them,
and never in a log or an error.
"""

from __future__ import annotations

import os
import sys
from getpass import getpass
from pathlib import Path
from typing import Final

from glasshive.graph.errors import GlasshiveError
from glasshive.security.durable_file import read_private
from glasshive.security.errors import KeyFileError
from glasshive.security.signing_keys import SigningKey

PASSPHRASE_VARIABLE: Final = "GLASSHIVE_PASSPHRASE_FILE"  # noqa: S105 (a name)
_MAX_FILE_BYTES: Final = 4096
_TRIES: Final = 3


class PassphraseError(GlasshiveError):
    """There is no passphrase to be had: no terminal, no such file, or two that differ."""


def known_passphrase(whose: str, file: Path | None) -> str:
    """The passphrase of a key that exists. `whose` says which key. Raises PassphraseError."""
    return _from_file(file) or _ask(f"Passphrase of {whose}: ", whose)


def new_passphrase(whose: str, file: Path | None) -> str:
    """A passphrase for a new key, typed twice where it is typed. Raises PassphraseError."""
    given = _from_file(file)
    if given is not None:
        return given
    for _ in range(_TRIES):
        first = _ask(f"New passphrase of {whose}, four words or more: ", whose)
        if first == _ask("The same again: ", whose):
            return first
        print("they differ; once more", file=sys.stderr)
    raise PassphraseError(f"the passphrases of {whose} differed {_TRIES} times; start again")


def _from_file(file: Path | None) -> str | None:
    """What the file that is named says; None if none is. The end of its line doesn't count."""
    named = os.environ.get(PASSPHRASE_VARIABLE)
    place = file or (Path(named).expanduser() if named else None)
    if place is None:
        return None
    try:
        text = read_private(place, _MAX_FILE_BYTES).decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError:
        raise PassphraseError(
            f"the passphrase file {place} is no UTF-8 text; write it anew"
        ) from None
    except ValueError as error:
        raise PassphraseError(f"the passphrase file {error}") from None
    except OSError as error:
        raise PassphraseError(
            f"can't read the passphrase file {place}: {error.strerror or error}; check the path in "
            f"--passphrase-file or {PASSPHRASE_VARIABLE}"
        ) from None
    text = text.removesuffix("\r")
    if not text or "\n" in text:
        raise PassphraseError(f"the passphrase file {place} has not one line; write one into it")
    return text


def _ask(prompt: str, whose: str) -> str:
    if not sys.stdin.isatty():
        raise PassphraseError(
            f"there is no terminal to ask for the passphrase of {whose}; name a file of mode 0600 "
            f"with --passphrase-file or {PASSPHRASE_VARIABLE}"
        )
    try:
        return getpass(prompt, stream=sys.stderr)
    except EOFError:
        raise PassphraseError(f"got no passphrase of {whose}; start again") from None


def load_signing_key(place: Path, file: Path | None) -> SigningKey:
    """The signing key at `place`. Raises PassphraseError, and KeyFileError for a wrong one."""
    if not place.is_file():
        raise KeyFileError(
            f"there is no key file {place}; check the path, or make a key with "
            "`glasshive swarm key NAME`"
        )
    return SigningKey.load(place, known_passphrase(str(place), file))
