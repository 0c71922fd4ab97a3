"""Manifests: an id is a hash, and a file is what its manifest says or is refused."""

from __future__ import annotations

import contextlib
import hashlib

import pytest
from hostile import attack, fuzzed, like
from hypothesis import given

from glasshive.security.errors import BadManifest
from glasshive.security.manifest import Manifest, ManifestFile, decode_manifest

CONFIG = b'{"model_type": "llama"}'


TINY = Manifest(
    "tiny",
    (
        ManifestFile("config.json", len(CONFIG), hashlib.sha256(CONFIG).digest()),
        ManifestFile("model.safetensors", 1 << 30, b"\7" * 32),
    ),
)


@pytest.fixture
def manifest() -> Manifest:
    return TINY


def test_a_manifest_survives_and_its_id_is_its_hash(manifest: Manifest) -> None:
    data = manifest.encode()
    assert manifest.model_id == hashlib.sha256(data).hexdigest()
    assert decode_manifest(data, manifest.model_id) == manifest


def test_another_id_is_refused(manifest: Manifest) -> None:
    with pytest.raises(BadManifest, match=r"a manifest with id .* was asked for"):
        decode_manifest(manifest.encode(), "0" * 64)


def test_a_file_is_checked_by_length_and_hash(manifest: Manifest) -> None:
    manifest.check_file("config.json", CONFIG)
    with pytest.raises(BadManifest, match="is not the file in the manifest"):
        manifest.check_file("config.json", CONFIG.replace(b"llama", b"gemma"))
    with pytest.raises(BadManifest, match=r"has no file 'weights\.bin'"):
        manifest.check_file("weights.bin", b"")


@pytest.mark.parametrize("name", ["../config.json", "a/b", "a\\b", ".hidden", "", "x" * 300])
def test_names_that_are_paths_are_refused(name: str) -> None:
    bad = Manifest("tiny", (ManifestFile(name, 1, b"\0" * 32),))
    with pytest.raises(BadManifest, match="files are not"):
        decode_manifest(bad.encode(), bad.model_id)


def test_a_file_is_named_once(manifest: Manifest) -> None:
    twice = Manifest("tiny", manifest.files[:1] * 2)
    with pytest.raises(BadManifest, match="names a file twice"):
        decode_manifest(twice.encode(), twice.model_id)


@pytest.mark.parametrize(
    "data",
    [
        b"\x93\xc3\xa4tiny\x90",  # true is no version
        b"\x93\xcc\x01\xa4tiny\x90",  # 1 in two bytes
        b"\xdc\x00\x03\x01\xa4tiny\x90",  # three parts in a long array
    ],
)
def test_a_manifest_has_one_encoding_and_so_one_id(data: bytes) -> None:
    with pytest.raises(BadManifest):
        decode_manifest(data, hashlib.sha256(data).hexdigest())


def read(data: bytes) -> None:
    """A manifest of any id, as a peer would make it up."""
    model_id = hashlib.sha256(data).hexdigest()
    assert decode_manifest(data, model_id).model_id == model_id


def test_mutations_are_refused_or_read() -> None:
    assert attack(read, [TINY.encode(), Manifest("none", ()).encode()], BadManifest) > 1000


@fuzzed
@given(like(TINY.encode()))
def test_any_bytes_are_a_manifest_or_refused(data: bytes) -> None:
    with contextlib.suppress(BadManifest):
        read(data)
