"""Files that signers pass around: whatever their bytes are, ours or our error."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from signers import ANN, ROOT, SWARM, WHITELIST, signed_whitelist

from glasshive.security.errors import BadTrustDocument, BadWhitelist
from glasshive.security.plain import encode_plain
from glasshive.security.trust_root import whitelist_signatures
from glasshive.trust_files import (
    Holder,
    TrustFolderError,
    WhitelistFile,
    read_bounded,
    read_holder,
    read_whitelist_file,
)

FILE = WhitelistFile(*signed_whitelist())
MUTATIONS = 200_000 if os.environ.get("GLASSHIVE_SOAK") else 3_000


def test_a_whitelist_file_survives(tmp_path: Path) -> None:
    place = tmp_path / "7.whitelist"
    place.write_bytes(FILE.encode())
    found = read_whitelist_file(place)
    assert found == FILE
    assert (found.whitelist, found.whitelist.swarm) == (WHITELIST, SWARM)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc0",
        encode_plain([1, FILE.document]),
        encode_plain([2, FILE.document, FILE.body]),
        encode_plain([1, FILE.document, FILE.body, b""]),
        encode_plain([1, FILE.document.decode(), FILE.body]),
        encode_plain([1, FILE.document, b"no whitelist"]),
        encode_plain([1, FILE.document, b"x" * 400_000]),
        FILE.encode() + b"\0",
        b"\xdc\x00\x03" + FILE.encode()[1:],  # another encoding of an array of three
    ],
)
def test_other_bytes_are_refused(tmp_path: Path, data: bytes) -> None:
    place = tmp_path / "7.whitelist"
    place.write_bytes(data)
    with pytest.raises((BadWhitelist, TrustFolderError), match=r"7\.whitelist"):
        read_whitelist_file(place)


def test_changed_bytes_count_for_nothing() -> None:
    """No exception but ours, and whoever is said to have signed has signed these very bytes."""
    rng = random.Random(7)
    whole = FILE.encode()
    signed = set(whitelist_signatures(FILE.document, ROOT).signed)
    for _ in range(MUTATIONS):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 1, 2, 5))):
            data[rng.randrange(len(data))] = rng.randrange(256)
        if bytes(data) == whole:
            continue
        try:
            found = WhitelistFile.decode(bytes(data))
            counted = set(whitelist_signatures(found.document, ROOT).signed)
        except (BadWhitelist, BadTrustDocument):
            continue
        assert counted <= signed
        assert found.body != FILE.body or counted < signed or found.document == FILE.document


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has not the two lines"),
        ("name = 1\npublic_key = 2\n", "has not the two lines"),
        ('name = "ann"\n', "has not the two lines"),
        (Holder("ann", ANN.public_key).to_text() + "more = 1\n", "has not the two lines"),
        (f'name = "../ann"\npublic_key = "{"ab" * 32}"\n', "got the name '../ann' of a key's"),
        (f'name = "ann"\npublic_key = "{"AB" * 32}"\n', "not 64 hexadecimal digits in lower"),
        ('name = "ann"\npublic_key = "ab"\n', "not 64 hexadecimal digits"),
        ("name = ", "not TOML"),
        ("#" * 2000, "has more than 1024 bytes"),
    ],
)
def test_public_parts_that_are_none(tmp_path: Path, text: str, said: str) -> None:
    place = tmp_path / "ann.pub"
    place.write_text(text)
    with pytest.raises(TrustFolderError) as caught:
        read_holder(place)
    assert said in str(caught.value)
    assert str(place) in str(caught.value)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    place = tmp_path / "pipe"
    os.mkfifo(place)
    with pytest.raises(TrustFolderError, match="there is no file"):
        read_bounded(place, 10)
