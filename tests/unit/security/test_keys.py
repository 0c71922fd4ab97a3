"""Identities: the peer id, the key file, signatures. The oracles are base58 and cryptography."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import base58
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from glasshive.security import keys
from glasshive.security.errors import BadPeerId, BadSignature, KeyFileError
from glasshive.security.keys import Identity, PeerId, public_key_of, verify


def test_the_peer_id_is_libp2ps() -> None:
    secret = bytes(range(32))
    public = Ed25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()
    expected = base58.b58encode(bytes.fromhex("002408011220") + public).decode()
    identity = Identity(secret)
    assert identity.peer_id == expected
    assert identity.peer_id.startswith("12D3KooW")
    assert public_key_of(identity.peer_id) == public
    assert identity.libp2p_key_file_bytes() == bytes.fromhex("08011240") + secret + public


@given(st.binary(max_size=60))
def test_base58_agrees_with_the_library(data: bytes) -> None:
    assert keys._to_base58(data) == base58.b58encode(data).decode()
    assert keys._from_base58(keys._to_base58(data)) == data


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0OIl",
        "12D3KooW",
        "1" * 52,
        "Q" * 65,
        "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N",
        "é" * 52,
        base58.b58encode(bytes.fromhex("002408021220") + bytes(32)).decode(),
    ],
)
def test_other_ids_are_refused(text: str) -> None:
    with pytest.raises(BadPeerId):
        public_key_of(text)


def test_a_signature_binds_key_and_bytes() -> None:
    one, other = Identity.generate(), Identity.generate()
    signature = one.sign(b"data")
    verify(one.peer_id, b"data", signature)
    for peer_id, data, wrong in (
        (other.peer_id, b"data", signature),
        (one.peer_id, b"Data", signature),
        (one.peer_id, b"data", signature[:-1]),
        (one.peer_id, b"data", bytes([signature[0] ^ 1]) + signature[1:]),
    ):
        with pytest.raises(BadSignature):
            verify(peer_id, data, wrong)
    with pytest.raises(BadPeerId):
        verify(PeerId("nobody"), b"data", signature)


def test_the_private_key_is_not_shown() -> None:
    identity = Identity(bytes(range(32)))
    assert repr(identity) == f"Identity({identity.peer_id})"
    assert str(identity) == repr(identity)


def test_a_key_file_is_made_once_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "identity.key"
    first = Identity.load_or_create(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_bytes() == first.libp2p_key_file_bytes()
    assert Identity.load_or_create(str(path)).peer_id == first.peer_id
    assert os.listdir(path.parent) == ["identity.key"]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o666])
def test_an_open_key_file_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "key"
    Identity.load_or_create(path)
    path.chmod(mode)
    with pytest.raises(KeyFileError, match=rf"mode {mode:04o}.*chmod 600"):
        Identity.load_or_create(path)


def test_a_damaged_key_file_is_refused_and_left(tmp_path: Path) -> None:
    path = tmp_path / "key"
    good = Identity.generate().libp2p_key_file_bytes()
    for data, text in (
        (b"", "not a libp2p Ed25519 key file"),
        (good[:-1], "not a libp2p Ed25519 key file"),
        (good + b"\n", "has more than 68 bytes; .* or delete it to get a new identity"),
        (b"\x08\x00" + good[2:], "not a libp2p Ed25519 key file"),
        (good[:-1] + bytes([good[-1] ^ 1]), "don't belong together"),
    ):
        path.write_bytes(data)
        path.chmod(0o600)
        with pytest.raises(KeyFileError, match=text):
            Identity.load_or_create(path)
        assert path.read_bytes() == data


def test_a_folder_is_no_key_file(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match="can't use the key file"):
        Identity.load_or_create(tmp_path)


def test_processes_that_start_at_once_share_the_identity(tmp_path: Path) -> None:
    code = (
        "import sys; from glasshive.security.keys import Identity; "
        "print(Identity.load_or_create(sys.argv[1]).peer_id)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "key")]
    several = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(6)]
    ids = {one.communicate(timeout=60)[0] for one in several}
    assert len(ids) == 1
    assert [one.returncode for one in several] == [0] * 6
