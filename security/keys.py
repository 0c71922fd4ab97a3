"""Identities: one Ed25519 key per host and per client.

A peer id is the libp2p id of the key: base58 of ``00 24`` (identity multihash, 36 bytes) and the
protobuf public key ``08 01 12 20`` + 32 bytes. The same key serves the DHT, the streams and every
signature, so the id that a stream proves is the id that a record is checked against.

A key file holds the libp2p private key, ``08 01 12 40`` + 32 private + 32 public bytes, and is
readable by its owner only.
"""

from __future__ import annotations

import os
import secrets
from functools import lru_cache
from pathlib import Path
from typing import Final, NewType, final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from glasshive.security.durable_file import read_private
from glasshive.security.errors import BadPeerId, BadSignature, KeyFileError

__all__ = ["Identity", "PeerId", "peer_id_of", "public_key_of", "verify"]

PeerId = NewType("PeerId", str)

SIGNATURE_BYTES: Final = 64
_PRIVATE_PREFIX: Final = bytes.fromhex("08011240")
_ID_PREFIX: Final = bytes.fromhex("002408011220")
_KEY_FILE_BYTES: Final = len(_PRIVATE_PREFIX) + 64
_MAX_ID_CHARACTERS: Final = 64

_ALPHABET: Final = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_DIGITS: Final = {character: value for value, character in enumerate(_ALPHABET)}


@final
class Identity:
    """A private key and the peer id that follows from it. Its repr shows the id only."""

    __slots__ = ("_key", "_public", "peer_id")

    peer_id: PeerId

    def __init__(self, private_key: bytes) -> None:
        """From the 32 bytes of the private key; see `generate` and `load_or_create`."""
        if len(private_key) != 32:
            raise KeyFileError(f"got a private key of {len(private_key)} bytes, wanted 32")
        self._key = Ed25519PrivateKey.from_private_bytes(private_key)
        self._public = self._key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        self.peer_id = peer_id_of(self._public)

    @classmethod
    def generate(cls) -> Identity:
        """A new identity from the system's randomness."""
        return cls(secrets.token_bytes(32))

    @classmethod
    def load_or_create(cls, path: str | os.PathLike[str]) -> Identity:
        """The identity kept at `path`; the first call makes it, for its owner's eyes only.

        The file appears complete or not at all, and of two processes that create it at once both
        return the same identity. Raises KeyFileError.
        """
        place = Path(path)
        try:
            if not place.exists():
                _create_key_file(place)
            return cls(_read_key_file(place))
        except OSError as error:
            raise KeyFileError(
                f"can't use the key file {place}: {error.strerror or error}; "
                "check the path and the rights of its folder"
            ) from None

    def sign(self, data: bytes) -> bytes:
        """The 64-byte Ed25519 signature over `data`."""
        return self._key.sign(data)

    def libp2p_key_file_bytes(self) -> bytes:
        """The private key as libp2p keeps it: what a key file holds. Handle as a secret."""
        return _PRIVATE_PREFIX + self._key.private_bytes_raw() + self._public

    def __repr__(self) -> str:
        return f"Identity({self.peer_id})"


def peer_id_of(public_key: bytes) -> PeerId:
    """The peer id of an Ed25519 public key of 32 bytes."""
    if len(public_key) != 32:
        raise BadPeerId(f"got a public key of {len(public_key)} bytes, wanted 32")
    return PeerId(_to_base58(_ID_PREFIX + public_key))


def public_key_of(peer_id: str) -> bytes:
    """The 32 bytes of the public key inside `peer_id`; raises BadPeerId."""
    if not isinstance(peer_id, str) or not 0 < len(peer_id) <= _MAX_ID_CHARACTERS:
        raise BadPeerId(f"got no peer id of 1 to {_MAX_ID_CHARACTERS} characters")
    data = _from_base58(peer_id)
    if len(data) != len(_ID_PREFIX) + 32 or not data.startswith(_ID_PREFIX):
        raise BadPeerId(
            f"{peer_id} is not the id of an Ed25519 key; such an id begins with 12D3KooW"
        )
    return data[len(_ID_PREFIX) :]


def verify(peer_id: str, data: bytes, signature: bytes) -> None:
    """Returns if `signature` is by `peer_id` over `data`; raises BadSignature or BadPeerId."""
    try:
        _key_object(peer_id).verify(signature, data)
    except InvalidSignature:
        raise BadSignature(f"the signature is not by {peer_id} over these bytes") from None


@lru_cache(maxsize=1024)
def _key_object(peer_id: str) -> Ed25519PublicKey:
    return Ed25519PublicKey.from_public_bytes(public_key_of(peer_id))


def _create_key_file(place: Path) -> None:
    """Puts a new key file at `place`, unless another process was faster."""
    place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = place.with_name(f".{place.name}.{secrets.token_hex(8)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(Identity.generate().libp2p_key_file_bytes())
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(draft, place)  # unlike a rename, it never replaces a key that is there
        except FileExistsError:
            return
    finally:
        os.unlink(draft)


def _read_key_file(place: Path) -> bytes:
    """The 32 private bytes; raises KeyFileError, or OSError from the file system."""
    try:
        data = read_private(place, _KEY_FILE_BYTES)
    except ValueError as error:
        raise KeyFileError(f"{error}, or delete it to get a new identity") from None
    if len(data) != _KEY_FILE_BYTES or not data.startswith(_PRIVATE_PREFIX):
        raise KeyFileError(
            f"{place} is not a libp2p Ed25519 key file ({_KEY_FILE_BYTES} bytes that begin with "
            "08 01 12 40); restore it, or delete it to get a new identity"
        )
    private, public = data[4:36], data[36:]
    if Identity(private).libp2p_key_file_bytes()[36:] != public:
        raise KeyFileError(
            f"the two halves of the key in {place} don't belong together; "
            "restore it, or delete it to get a new identity"
        )
    return private


def _to_base58(data: bytes) -> str:
    number = int.from_bytes(data, "big")
    characters: list[str] = []
    while number:
        number, digit = divmod(number, 58)
        characters.append(_ALPHABET[digit])
    zeros = len(data) - len(data.lstrip(b"\0"))
    return "1" * zeros + "".join(reversed(characters))


@lru_cache(maxsize=1024)
def _from_base58(text: str) -> bytes:
    number = 0
    for character in text:
        digit = _DIGITS.get(character)
        if digit is None:
            raise BadPeerId(f"{text!r} is not base58")
        number = number * 58 + digit
    zeros = len(text) - len(text.lstrip("1"))
    return b"\0" * zeros + number.to_bytes((number.bit_length() + 7) // 8, "big")
