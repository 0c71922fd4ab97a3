"""A model's manifest: what a model is, by the hashes of its files.

The model's id is the SHA-256 of the manifest's bytes, so a manifest needs no signature to be
checked against an id. Files that a client asks a peer for come from a closed list, are limited in
size, and are compared with the manifest before anyone reads them.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Final, NewType

from glasshive.security.errors import BadManifest, MalformedData
from glasshive.security.plain import decode_plain, encode_plain

ModelId = NewType("ModelId", str)
"""The SHA-256 of a model's manifest, 64 hexadecimal digits in lower case."""

VERSION: Final = 1
MANIFEST: Final = "manifest"
MAX_FILES: Final = 4096
MAX_MANIFEST_BYTES: Final = 1 << 20
MAX_NAME_CHARS: Final = 200

# What a client may ask for, with the most bytes that it accepts. Nothing else is ever fetched.
CLIENT_FILES: Final[dict[str, int]] = {
    "config.json": 1 << 20,
    "generation_config.json": 1 << 20,
    "tokenizer.json": 64 << 20,
    "tokenizer.model": 64 << 20,
    "tokenizer_config.json": 8 << 20,
    "special_tokens_map.json": 1 << 20,
    "added_tokens.json": 8 << 20,
    "vocab.json": 32 << 20,
    "vocab.txt": 32 << 20,
    "merges.txt": 32 << 20,
    "chat_template.jinja": 1 << 20,
}


@dataclass(frozen=True, slots=True)
class ManifestFile:
    """One file of a model: its name, length and SHA-256."""

    name: str
    size_bytes: int
    sha256: bytes


@dataclass(frozen=True, slots=True)
class Manifest:
    """A model's name and its files, in the order of their names."""

    name: str
    files: tuple[ManifestFile, ...]

    def encode(self) -> bytes:
        """The manifest's bytes, whose hash is the model's id."""
        return encode_plain(
            [VERSION, self.name, [[one.name, one.size_bytes, one.sha256] for one in self.files]]
        )

    @property
    def model_id(self) -> ModelId:
        """SHA-256 of the bytes, in hex."""
        return ModelId(hashlib.sha256(self.encode()).hexdigest())

    def file(self, name: str) -> ManifestFile | None:
        """The file called `name`, or None."""
        return next((one for one in self.files if one.name == name), None)

    def check_file(self, name: str, data: bytes | bytearray) -> None:
        """Return if `data` is the file called `name`. Raises BadManifest if it is not."""
        wanted = self.file(name)
        if wanted is None:
            raise BadManifest(f"the manifest of {self.name!r} has no file {name!r}")
        if len(data) != wanted.size_bytes or hashlib.sha256(data).digest() != wanted.sha256:
            raise BadManifest(
                f"{name} of {self.name!r} is not the file in the manifest: got {len(data)} bytes "
                f"with SHA-256 {hashlib.sha256(data).hexdigest()[:16]}..., wanted "
                f"{wanted.size_bytes} with {wanted.sha256.hex()[:16]}...; ask another peer"
            )


def decode_manifest(data: bytes | bytearray, model_id: str) -> Manifest:
    """The manifest in `data`, which must have the id `model_id`. Raises BadManifest."""
    got = hashlib.sha256(data).hexdigest()
    if got != model_id:
        raise BadManifest(f"a manifest with id {got[:16]}...; {model_id[:16]:.16}... was asked for")
    try:
        tree = decode_plain(bytes(data), max_bytes=MAX_MANIFEST_BYTES)
    except MalformedData as error:
        raise BadManifest(f"a manifest that cannot be read: {error}") from error
    if not isinstance(tree, list) or len(tree) != 3 or tree[0] != VERSION:
        raise BadManifest("a manifest of another version; update glasshive")
    _, name, files = tree
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME_CHARS:
        raise BadManifest("a manifest without a name")
    if not isinstance(files, list) or len(files) > MAX_FILES:
        raise BadManifest(f"a manifest of more than {MAX_FILES} files")
    manifest = Manifest(name, tuple(_file(one) for one in files))
    if len({one.name for one in manifest.files}) != len(files):
        raise BadManifest("a manifest that names a file twice")
    if manifest.encode() != data:
        raise BadManifest("a manifest's bytes are not its shortest encoding, so its id is another")
    return manifest


def _file(tree: object) -> ManifestFile:
    if isinstance(tree, list) and len(tree) == 3:
        name, size, digest = tree
        if (
            isinstance(name, str)
            and 0 < len(name) <= MAX_NAME_CHARS
            and "/" not in name
            and "\\" not in name
            and not name.startswith(".")
            and type(size) is int
            and size >= 0
            and isinstance(digest, bytes)
            and len(digest) == 32
        ):
            return ManifestFile(name, size, digest)
    raise BadManifest("a manifest whose files are not [name, size, SHA-256]")
