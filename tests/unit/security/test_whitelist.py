"""Whitelists: one encoding, nothing unknown, missing, doubled or out of range, as bytes or text."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgpack
import pytest
from hostile import attack, fuzzed, like
from hypothesis import given
from signers import DAY, LIMITS, NOW, WHITELIST

from glasshive.security.errors import BadWhitelist
from glasshive.security.whitelist import (
    LIMIT_NAMES,
    MAX_BODY_BYTES,
    MAX_LIMIT,
    MAX_OPS,
    MAX_PATTERNS,
    MAX_REVOKED,
    decode_whitelist,
    encode_whitelist,
    limits_by_name,
    whitelist_from_text,
    whitelist_to_text,
)

DATA = encode_whitelist(WHITELIST)
EVERY_MODEL = replace(WHITELIST, models=None, readable=(), ops={})
TEXT = whitelist_to_text(WHITELIST)


def tree() -> dict[str, Any]:
    return msgpack.unpackb(DATA)  # type: ignore[no-any-return]


def refusal(changed: object) -> str:
    with pytest.raises(BadWhitelist) as caught:
        decode_whitelist(msgpack.packb(changed))
    return str(caught.value)


@pytest.mark.parametrize("whitelist", [WHITELIST, EVERY_MODEL])
def test_bytes_and_text_survive(whitelist: Any) -> None:
    assert decode_whitelist(encode_whitelist(whitelist)) == whitelist
    assert whitelist_from_text(whitelist_to_text(whitelist)) == whitelist
    assert encode_whitelist(whitelist_from_text(whitelist_to_text(whitelist))) == encode_whitelist(
        whitelist
    )


def test_limits_are_the_fields_in_order() -> None:
    assert limits_by_name(LIMITS) == {name: getattr(LIMITS, name) for name in LIMIT_NAMES}
    assert len(set(limits_by_name(LIMITS).values())) == len(LIMIT_NAMES)


PLACES = [(name,) for name in tree()] + [
    (name, inner) for name in ("revoked", "limits") for inner in tree()[name]
]


@pytest.mark.parametrize("place", PLACES, ids=".".join)
def test_a_missing_field_is_named(place: tuple[str, ...]) -> None:
    changed = tree()
    inner = changed if len(place) == 1 else changed[place[0]]
    del inner[place[-1]]
    assert refusal(changed) == f"the field {'.'.join(place)} is missing"


@pytest.mark.parametrize("where", ["", "revoked.", "limits."])
def test_an_unknown_field_is_named(where: str) -> None:
    changed = tree()
    inner = changed[where[:-1]] if where else changed
    inner["audit"] = 1
    assert f"unknown field {where}audit" in refusal(changed)


def test_a_doubled_field_is_refused() -> None:
    pairs = [*tree().items(), ("version", 8)]
    data = msgpack.Packer().pack_map_pairs(pairs)
    with pytest.raises(BadWhitelist, match="map key 'version' twice"):
        decode_whitelist(data)


@pytest.mark.parametrize(
    "place", [("version",), ("issued",), ("expires",), ("min_protocol",), ("format",)]
    + [("limits", name) for name in LIMIT_NAMES] + [("ops", "add")],
    ids=".".join,
)  # fmt: skip
@pytest.mark.parametrize("value", [True, 7.0, "7", None, -1, 2**63, [7]], ids=repr)
def test_numbers_are_whole_and_bounded(place: tuple[str, ...], value: object) -> None:
    changed = tree()
    inner = changed if len(place) == 1 else changed[place[0]]
    inner[place[-1]] = value
    text = refusal(changed)
    assert ".".join(place) in text
    # The last word is that of the field, not of the comparison with the only encoding.
    assert "only encoding" not in text


def test_other_encodings_of_the_same_are_refused() -> None:
    turned = dict(reversed(tree().items()))
    assert "only encoding" in refusal(turned)
    version = DATA.index(b"version") + len(b"version")
    assert DATA[version] == 7
    longer = DATA[:version] + b"\xcc\x07" + DATA[version + 1 :]
    with pytest.raises(BadWhitelist, match="only encoding"):
        decode_whitelist(longer)
    changed = tree()
    changed["write"] = changed["write"][::-1]
    assert "only encoding" in refusal(changed)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"swarm": ""}, "swarm is not a name"),
        ({"swarm": "\x1b[2J"}, "swarm is not a name"),
        ({"expires": NOW - DAY}, "expires is 1799913600; a whole number from 1799913601"),
        ({"expires": NOW + 400 * DAY}, "more than 366 days after issued"),
        ({"read": ["a*"]}, "read has 'a*', which is no pattern"),
        ({"write": ["a", "a"]}, "write is not a list of different texts"),
        ({"write": ["a"] * (MAX_PATTERNS + 1)}, f"not a list of at most {MAX_PATTERNS}"),
        ({"write": "**"}, "write is not a list"),
        ({"models": {"ab": "x"}}, "models has 'ab', which is no manifest id"),
        ({"models": {"ab" * 32: "x\n"}}, "is not a name of 1 to 200"),
        ({"models": "all"}, 'models is neither "*" nor a table'),
        ({"ops": {"__class__.x": 1}}, "which is no op's name"),
        ({"ops": {f"o{n}": 1 for n in range(MAX_OPS + 1)}}, f"at most {MAX_OPS} op names"),
        ({"ops": ["add"]}, "ops is not a table"),
        ({"revoked": {"peers": ["x"], "clients": [], "versions": []}}, "revoked.peers has no peer"),
        ({"revoked": {"peers": [], "clients": [], "versions": [7]}}, "this whitelist itself"),
        ({"revoked": {"peers": [], "clients": [], "versions": [3, 3]}}, "has one twice"),
        (
            {"revoked": {"peers": [], "clients": [], "versions": [*range(8, 9 + MAX_REVOKED)]}},
            f"revoked.versions is not a list of at most {MAX_REVOKED}",
        ),
        ({"format": 2}, "another format than 1"),
    ],
)  # fmt: skip
def test_what_is_out_of_range_is_named(change: dict[str, Any], text: str) -> None:
    assert text in refusal(tree() | change)


@pytest.mark.parametrize("data", [b"", b"\x80", b"\xc0", DATA[:-1], DATA + b"\0"])
def test_other_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(BadWhitelist):
        decode_whitelist(data)


def test_a_whitelist_that_is_too_long_is_refused() -> None:
    with pytest.raises(BadWhitelist, match=f"at most {MAX_BODY_BYTES}"):
        decode_whitelist(bytes(MAX_BODY_BYTES + 1))


def test_what_is_out_of_range_is_not_written_either() -> None:
    with pytest.raises(BadWhitelist, match=r"limits\.nodes is 9007199254740992"):
        encode_whitelist(replace(WHITELIST, limits=replace(LIMITS, nodes=MAX_LIMIT + 1)))


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ("nodes = 5000", "node = 5000", "unknown field limits.node; did you mean limits.nodes?"),
        ("nodes = 5000", "", "the field limits.nodes is missing"),
        ("nodes = 5000", "nodes = 5e3", "limits.nodes is 5000.0; a whole number"),
        ("nodes = 5000", "nodes = 5000\nnodes = 1", "not TOML"),
        ("nodes = 5000", f"nodes = {'9' * 5000}", "a number has too many digits"),
        ("nodes = 5000", f"nodes = 0x{'f' * 5000}", "a number has too many digits"),
        ("versions = [3, 9]", f"versions = [0x{'f' * 5000}]", "a number has too many digits"),
        ("add = 1", "add = true", "ops.add is a bool; a whole number"),
        ("issued = 2027", 'issued = "2027" #', "issued is not a moment"),
        ("T08:00:00Z", "T08:00:00", "issued is not a moment in whole seconds with a zone"),
        ("T08:00:00Z", "T08:00:00.5Z", "issued is not a moment in whole seconds"),
        ('"model.layers.*.mlp"', '"model.layers.[0-9].mlp"', "write has 'model.layers.[0-9].mlp'"),
        ("[revoked]", "[revoke]", "unknown field revoke; did you mean revoked?"),
    ],
)
def test_the_text_is_as_strict_and_names_the_field(old: str, new: str, text: str) -> None:
    assert old in TEXT
    with pytest.raises(BadWhitelist) as caught:
        whitelist_from_text(TEXT.replace(old, new, 1))
    assert text in str(caught.value)


def test_changed_bytes_are_refused_or_another_whitelist() -> None:
    def decoded(data: bytes) -> None:
        whitelist = decode_whitelist(data)
        assert encode_whitelist(whitelist) == data
        assert (whitelist == WHITELIST) == (data == DATA) or data == other

    other = encode_whitelist(EVERY_MODEL)
    attack(decoded, [DATA, other], BadWhitelist)


@fuzzed
@given(like(DATA))
def test_any_bytes_are_a_whitelist_or_refused(data: bytes) -> None:
    try:
        assert encode_whitelist(decode_whitelist(data)) == data
    except BadWhitelist:
        pass
