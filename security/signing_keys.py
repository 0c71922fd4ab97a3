"""The keys of the people who sign roots and whitelists: one Ed25519 key a person, kept offline.

A key file is PEM (PKCS #8, encrypted) below one line of ours, and readable by its owner only. PEM's
own key derivation is quick to guess through, so what encrypts the PEM is not the passphrase but
scrypt of it, whose salt stands in our line.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from pathlib import Path
from typing import Final, final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from glasshive.security.durable_file import read_private
from glasshive.security.errors import KeyFileError

__all__ = ["SigningKey"]

MIN_PASSPHRASE_CHARS: Final = 8
_MAX_FILE_BYTES: Final = 4096
_SALT_BYTES: Final = 16
_HEADER: Final = re.compile(rb"glasshive signing key, scrypt 2\^15 8 1, salt ([0-9a-f]{32})\n")


@final
class SigningKey:
    """One person's private key. Its repr shows the public key only."""

    __slots__ = ("_key", "public_key")

    public_key: bytes
    """The 32 bytes that the others need to name this key in a root."""

    def __init__(self, private_key: bytes) -> None:
        """From the 32 bytes of the private key; see `generate` and `load`."""
        if len(private_key) != 32:
            raise KeyFileError(f"got a private key of {len(private_key)} bytes, wanted 32")
        self._key = Ed25519PrivateKey.from_private_bytes(private_key)
        self.public_key = self._key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)

    @classmethod
    def generate(cls) -> SigningKey:
        """A new key from the system's randomness."""
        return cls(secrets.token_bytes(32))

    @classmethod
    def load(cls, path: str | os.PathLike[str], passphrase: str) -> SigningKey:
        """The key kept at `path`. Raises KeyFileError."""
        place = Path(path)
        try:
            data = read_private(place, _MAX_FILE_BYTES)
        except ValueError as error:
            raise KeyFileError(str(error)) from None
        except OSError as error:
            raise _unusable(place, error) from None
        header = _HEADER.match(data)
        if header is None:
            raise KeyFileError(f"{place} is not the file of a signing key; restore it from a copy")
        password = _stretched(passphrase, bytes.fromhex(header.group(1).decode()))
        try:
            key = load_pem_private_key(data[header.end() :], password)
        except (ValueError, TypeError):
            raise KeyFileError(
                f"the passphrase does not open {place}, or the file is damaged; try again, or "
                "restore it from a copy"
            ) from None
        if not isinstance(key, Ed25519PrivateKey):
            raise KeyFileError(f"{place} holds no Ed25519 key; make one for signing")
        return cls(key.private_bytes_raw())

    def save(self, path: str | os.PathLike[str], passphrase: str) -> None:
        """Write the key to a new file, encrypted. Raises KeyFileError, also if the file is there.

        A file that can't be written whole is taken away again.
        """
        place = Path(path)
        if len(passphrase) < MIN_PASSPHRASE_CHARS:
            raise KeyFileError(
                f"a passphrase of {len(passphrase)} characters; take at least "
                f"{MIN_PASSPHRASE_CHARS}, better four words"
            )
        salt = secrets.token_bytes(_SALT_BYTES)
        pem = self._key.private_bytes(
            Encoding.PEM,
            PrivateFormat.PKCS8,
            BestAvailableEncryption(_stretched(passphrase, salt)),
        )
        header = f"glasshive signing key, scrypt 2^15 8 1, salt {salt.hex()}\n".encode()
        try:
            place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            raise KeyFileError(
                f"{place} is there already, and a key is never written over; choose another place"
            ) from None
        except OSError as error:
            raise _unusable(place, error) from None
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(header + pem)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            place.unlink(missing_ok=True)
            raise _unusable(place, error) from None

    def sign(self, data: bytes) -> bytes:
        """The 64-byte Ed25519 signature over `data`."""
        return self._key.sign(data)

    def __repr__(self) -> str:
        return f"SigningKey({self.public_key.hex()})"


def _stretched(passphrase: str, salt: bytes) -> bytes:
    """What encrypts the PEM: 32 MiB and about a tenth of a second for each guess."""
    secret = hashlib.scrypt(
        passphrase.encode("utf-8", "surrogatepass"), salt=salt, n=2**15, r=8, p=1, maxmem=2**26
    )
    return secret.hex().encode()


def _unusable(place: Path, error: OSError) -> KeyFileError:
    return KeyFileError(
        f"can't use the key file {place}: {error.strerror or error}; "
        "check the path and the rights of its folder"
    )
