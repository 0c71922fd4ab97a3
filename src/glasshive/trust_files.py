"""Two kinds of files that the people who sign for a swarm pass around.

- `ann.pub`: the public part of a signing key, TOML: a name and 64 hexadecimal digits. The name is
  what its holder is called here; nobody signs it.
- `3.whitelist`: a whitelist's document and its body (security/trust_root.py) in one file, so that
  nobody gets one without the other. Bounded, with one encoding.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from glasshive.graph.errors import GlasshiveError
from glasshive.security.errors import BadWhitelist, MalformedData
from glasshive.security.plain import decode_plain, encode_plain
from glasshive.security.trust_root import (
    MAX_DOCUMENT_BYTES,
    KeyId,
    key_id_of,
    new_whitelist_document,
)
from glasshive.security.whitelist import (
    MAX_BODY_BYTES,
    Whitelist,
    decode_whitelist,
    read_toml,
    whitelist_from_text,
)

MAX_WHITELIST_FILE_BYTES: Final = MAX_DOCUMENT_BYTES + MAX_BODY_BYTES + 64
MAX_PUBLIC_PART_BYTES: Final = 1024
MAX_TEXT_BYTES: Final = 1 << 20
HOLDER_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,31}")

_FORMAT: Final = 1
_FILE_BEGINS: Final = b"\x93"  # a msgpack list of three, which no UTF-8 text begins with
_HEX_64: Final = re.compile(r"[0-9a-f]{64}")


class TrustFolderError(GlasshiveError):
    """A swarm's folder, or a file of one, that can't be used; the text says what to do."""


@dataclass(frozen=True, slots=True)
class Holder:
    """Somebody who signs: what they are called here, and the 32 bytes of their public key."""

    name: str
    public_key: bytes

    @property
    def key_id(self) -> KeyId:
        """What roots and signatures call the key."""
        return key_id_of(self.public_key)

    def to_text(self) -> str:
        """The public part file, which `from_text` reads."""
        return (
            "# The public part of a glasshive signing key: no secret. Compare its id, which\n"
            "# `swarm key` and `swarm show` print, with its holder before you let it sign.\n"
            f'name = "{self.name}"\npublic_key = "{self.public_key.hex()}"\n'
        )

    @classmethod
    def from_text(cls, text: str) -> Holder:
        """Raises TrustFolderError for a text that is no public part."""
        tree = read_toml(text, TrustFolderError)
        name, digits = tree.get("name"), tree.get("public_key")
        if tree.keys() != {"name", "public_key"} or not isinstance(name, str):
            raise TrustFolderError("it has not the two lines name and public_key")
        if not isinstance(digits, str) or not _HEX_64.fullmatch(digits):
            raise TrustFolderError("its public_key is not 64 hexadecimal digits in lower case")
        return cls(check_holder_name(name), bytes.fromhex(digits))


@dataclass(frozen=True, slots=True)
class WhitelistFile:
    """A whitelist on its way: the document with the signatures that it has so far, and the body."""

    document: bytes
    body: bytes

    @classmethod
    def unsigned(cls, whitelist: Whitelist) -> WhitelistFile:
        """The file of a whitelist that nobody has signed yet. Raises BadWhitelist."""
        return cls(*new_whitelist_document(whitelist))

    @property
    def whitelist(self) -> Whitelist:
        """What the body says, whoever signed it. Raises BadWhitelist."""
        return decode_whitelist(self.body)

    def encode(self) -> bytes:
        """The file's only encoding."""
        return encode_plain([_FORMAT, self.document, self.body])

    @classmethod
    def decode(cls, data: bytes) -> WhitelistFile:
        """Raises BadWhitelist for bytes that are no such file, or whose body is no whitelist."""
        try:
            tree = decode_plain(
                data, max_bytes=MAX_WHITELIST_FILE_BYTES, max_depth=1, max_elements=8
            )
        except MalformedData as error:
            raise BadWhitelist(
                f"no whitelist file, such as 3.whitelist: {error}; a TOML text is for "
                "`bump --edit` and `diff`"
            ) from None
        if not isinstance(tree, list) or len(tree) != 3 or tree[0] != _FORMAT:
            raise BadWhitelist("no whitelist file of this release; is it another file?")
        _, document, body = tree
        if type(document) is not bytes or type(body) is not bytes:
            raise BadWhitelist("no whitelist file: document and body are not bytes")
        found = cls(document, body)
        if found.encode() != data:
            raise BadWhitelist("a whitelist file's bytes are not its only encoding")
        decode_whitelist(body)
        return found


def check_holder_name(name: str) -> str:
    """The name, which is also a file's. Raises TrustFolderError."""
    if not HOLDER_NAME.fullmatch(name):
        raise TrustFolderError(
            f"got the name {name[:40]!r} of a key's holder, wanted 1 to 32 letters, digits, "
            "_ or -, such as ann"
        )
    return name


def read_whitelist_file(place: Path) -> WhitelistFile:
    """The whitelist file at `place`. Raises TrustFolderError, and BadWhitelist with the path."""
    try:
        return WhitelistFile.decode(read_bounded(place, MAX_WHITELIST_FILE_BYTES))
    except BadWhitelist as error:
        raise BadWhitelist(f"{place}: {error}") from None


def read_whitelist(place: Path) -> Whitelist:
    """The whitelist at `place`, a whitelist file or a TOML text, whatever it is called.

    Raises TrustFolderError, and BadWhitelist with the path.
    """
    data = read_bounded(place, MAX_TEXT_BYTES)
    try:
        if data[:1] == _FILE_BEGINS:
            return WhitelistFile.decode(data).whitelist
        return whitelist_from_text(data.decode("utf-8"))
    except UnicodeDecodeError:
        raise BadWhitelist(
            f"{place} is no whitelist file, such as 3.whitelist, and no TOML text, such as "
            "`glasshive whitelist show --toml` prints; is it another file?"
        ) from None
    except BadWhitelist as error:
        raise BadWhitelist(f"{place}: {error}") from None


def read_holder(place: Path) -> Holder:
    """The holder whose public part is at `place`. Raises TrustFolderError."""
    try:
        return Holder.from_text(read_text(place, MAX_PUBLIC_PART_BYTES))
    except TrustFolderError as error:
        raise TrustFolderError(f"the public part of a key {place}: {error}") from None


def read_text(place: Path, max_bytes: int) -> str:
    """A file's text. Raises TrustFolderError."""
    try:
        return read_bounded(place, max_bytes).decode("utf-8")
    except UnicodeDecodeError:
        raise TrustFolderError(f"{place} is no UTF-8 text; is it another file?") from None


def read_bounded(place: Path, max_bytes: int) -> bytes:
    """A file's bytes, at most so many. Raises TrustFolderError."""
    try:
        if not place.is_file():  # opening a pipe would wait for whoever writes to it
            raise TrustFolderError(f"there is no file {place}; check the path")
        with place.open("rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise TrustFolderError(
            f"can't read {place}: {error.strerror or error}; check the path and its rights"
        ) from None
    if len(data) > max_bytes:
        raise TrustFolderError(f"{place} has more than {max_bytes} bytes; is it another file?")
    return data


def write_new(place: Path, data: bytes) -> None:
    """Write a file that everybody may read. Raises TrustFolderError, also if it is there."""
    try:
        descriptor = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
    except FileExistsError:
        raise TrustFolderError(f"{place} is there already; choose another name or folder") from None
    except OSError as error:
        raise TrustFolderError(
            f"can't write {place}: {error.strerror or error}; check the rights of its folder"
        ) from None
