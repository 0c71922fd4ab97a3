"""Signing keys: encrypted, for their owner's eyes, never written over."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from glasshive.security.errors import KeyFileError
from glasshive.security.signing_keys import SigningKey

PASSPHRASE = "correct horse battery staple"
KEY = SigningKey(b"\7" * 32)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    path = tmp_path / "keys" / "ann.pem"
    KEY.save(path, PASSPHRASE)
    return path


def test_a_key_survives_and_signs(place: Path) -> None:
    key = SigningKey.load(place, PASSPHRASE)
    assert key.public_key == KEY.public_key
    Ed25519PublicKey.from_public_bytes(KEY.public_key).verify(key.sign(b"x"), b"x")
    assert SigningKey.generate().public_key != SigningKey.generate().public_key


def test_the_file_is_encrypted_and_its_owners(place: Path) -> None:
    data = place.read_bytes()
    assert place.stat().st_mode & 0o777 == 0o600
    assert b"BEGIN ENCRYPTED PRIVATE KEY" in data
    assert b"\7" * 8 not in data
    assert (b"\7" * 8).hex().encode() not in data
    # The passphrase is stretched: it alone doesn't open the PEM, so PEM's quick way is no way in.
    # What a wrong one makes of it looks padded right once in 256 times, and is no key then.
    with pytest.raises(ValueError, match=r"password|deserialize key data"):
        load_pem_private_key(data, PASSPHRASE.encode())
    assert repr(KEY) == f"SigningKey({KEY.public_key.hex()})"


def test_another_passphrase_is_refused(place: Path) -> None:
    with pytest.raises(KeyFileError, match="the passphrase does not open"):
        SigningKey.load(place, PASSPHRASE + " ")


def test_a_key_is_never_written_over(place: Path) -> None:
    before = place.read_bytes()
    with pytest.raises(KeyFileError, match="a key is never written over"):
        SigningKey.generate().save(place, PASSPHRASE)
    assert place.read_bytes() == before


def test_a_short_passphrase_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match="a passphrase of 7 characters"):
        KEY.save(tmp_path / "k.pem", "1234567")
    assert not list(tmp_path.iterdir())


def test_files_that_are_no_keys_are_refused(place: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match="No such file"):
        SigningKey.load(tmp_path / "none", PASSPHRASE)
    with pytest.raises(KeyFileError, match="not a regular file"):
        SigningKey.load("/dev/null", PASSPHRASE)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)  # to which nobody will ever write
    with pytest.raises(KeyFileError, match="not a regular file"):
        SigningKey.load(pipe, PASSPHRASE)
    data = place.read_bytes()
    for bad, text in ((data[1:], "not the file of a signing key"), (data[:-60], "is damaged")):
        place.write_bytes(bad)
        with pytest.raises(KeyFileError, match=text):
            SigningKey.load(place, PASSPHRASE)
    os.chmod(place, 0o640)
    with pytest.raises(KeyFileError, match=r"open to other users \(mode 0640\)"):
        SigningKey.load(place, PASSPHRASE)
