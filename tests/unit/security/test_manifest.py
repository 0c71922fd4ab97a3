"""Manifests: an id is a hash, and a file is what its manifest says or is refused."""

from __future__ import annotations

import hashlib
import os
import random

import pytest

from glasshive.security.errors import BadManifest
from glasshive.security.manifest import Manifest, ManifestFile, decode_manifest

CONFIG = b'{"model_type": "llama"}'


@pytest.fixture
def manifest() -> Manifest:
    return Manifest(
        "tiny",
        (
            ManifestFile("config.json", len(CONFIG), hashlib.sha256(CONFIG).digest()),
            ManifestFile("model.safetensors", 1 << 30, b"\7" * 32),
        ),
    )


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


def test_mutations_are_refused_or_read(manifest: Manifest) -> None:
    count = 1_000_000 if os.environ.get("GLASSHIVE_SOAK") else 20_000
    rng = random.Random(3)
    original = manifest.encode()
    for _ in range(count):
        data = bytearray(original)
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        name = hashlib.sha256(data).hexdigest()  # as a peer would that made it up
        try:
            assert decode_manifest(data, name).model_id == name or len(data) == len(original)
        except BadManifest:
            continue
