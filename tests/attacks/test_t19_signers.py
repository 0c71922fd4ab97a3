"""T19: stolen keys and forged, old, swapped or altered roots and whitelists. All are refused.

For each attack the docstring says what was taken out of the code to see the test fail.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hostile import Mutator, attack
from securesystemslib.formats import encode_canonical
from signers import (
    ANN,
    BEN,
    CAT,
    DAN,
    DAY,
    EVE,
    FIRST,
    NOW,
    ROOT,
    SWARM,
    WHITELIST,
    root_document,
    signed_whitelist,
)
from soak import SEED, count

from glasshive.security.errors import (
    BadTrustDocument,
    BadWhitelist,
    NotCurrent,
    TrustRefused,
    UnderThreshold,
    WrongBody,
    WrongVersion,
)
from glasshive.security.policy import Policy
from glasshive.security.signing_keys import SigningKey
from glasshive.security.trust_root import (
    VerifiedWhitelist,
    first_root,
    key_id_of,
    next_root,
    open_whitelist,
    verify_root_chain,
    verify_whitelist,
)
from glasshive.security.trust_store import TrustStore
from glasshive.security.whitelist import encode_whitelist

REFUSALS = (TrustRefused, BadWhitelist)
Tree = dict[str, Any]


def taken(document: bytes, body: bytes, **changes: Any) -> VerifiedWhitelist:
    wanted: Tree = {"swarm": SWARM, "least_version": 7, "now_seconds": NOW} | changes
    return verify_whitelist(ROOT, document, body, **wanted)


def rendered(tree: Tree) -> bytes:
    return json.dumps(tree, separators=(",", ":"), sort_keys=True, default=repr).encode()


def signed_anew(tree: Tree, *signers: SigningKey) -> bytes:
    """A document of any content, with true signatures: signers who were fooled, or a thief."""
    payload = str(encode_canonical(tree["signed"])).encode()
    tree["signatures"] = [
        {"keyid": key_id_of(key.public_key), "sig": key.sign(payload).hex()} for key in signers
    ]
    return rendered(tree)


def open_store(folder: Path, now: float = NOW) -> TrustStore:
    return TrustStore(folder, swarm=SWARM, root=FIRST, clock=lambda: now)


# The threshold ----------------------------------------------------------------------------------


def test_one_stolen_key_of_three_signs_nothing() -> None:
    """Failed with the check of `result.verified` taken out of `open_whitelist`."""
    for keys in ((), (CAT,), (CAT, CAT)):
        with pytest.raises(UnderThreshold, match=r"whitelist 7 is signed by \d of the keys"):
            taken(*signed_whitelist(signed_by=keys))


def test_the_same_signature_twice_counts_once() -> None:
    """tuf itself refuses a doubled key id, and would count the key once: nothing of ours to take
    out."""
    document, body = signed_whitelist(signed_by=(CAT,))
    tree = json.loads(document)
    tree["signatures"] *= 2
    with pytest.raises(BadTrustDocument):
        taken(rendered(tree), body)


@pytest.mark.parametrize("disguise", [str.upper, str], ids=["upper case", "same"])
def test_one_key_under_two_names_counts_once(disguise: Callable[[str], str]) -> None:
    """Failed with the comparison of a key's name with its hash taken out of `_check_root`.

    TUF lets a key have any name, so a root could list one key twice and be met by one person.
    """
    tree = json.loads(root_document(signed_by=()))
    ann = key_id_of(ANN.public_key)
    twin = "0" * 64
    key = json.loads(json.dumps(tree["signed"]["keys"][ann]))
    key["keyval"]["public"] = disguise(key["keyval"]["public"])
    tree["signed"]["keys"][twin] = key
    tree["signed"]["roles"]["root"]["keyids"] = [ann, twin]
    tree["signed"]["keys"].pop(key_id_of(BEN.public_key))
    document = json.loads(signed_anew(tree, ANN))
    document["signatures"].append(document["signatures"][0] | {"keyid": twin})
    with pytest.raises(BadTrustDocument, match="no Ed25519 key under the hash of its bytes"):
        first_root(rendered(document))


def test_keys_of_the_root_role_sign_no_whitelist() -> None:
    """Failed with the role `root` in the place of `targets` in `open_whitelist`."""
    document, body = signed_whitelist(signed_by=())
    with pytest.raises(UnderThreshold):
        taken(signed_anew(json.loads(document), ANN, BEN), body)


def test_a_stranger_signs_nothing() -> None:
    """Failed as the first."""
    document, body = signed_whitelist(signed_by=())
    strangers = [SigningKey(bytes([number]) * 32) for number in (40, 41)]
    with pytest.raises(UnderThreshold):
        taken(signed_anew(json.loads(document), *strangers), body)


# Rollback and freeze ----------------------------------------------------------------------------


def test_rollback_is_refused_also_after_a_restart(tmp_path: Path) -> None:
    """Failed with the comparison with `least_version` taken out; and, of the part after the
    restart, with `highest` not written to the file."""
    old, new = signed_whitelist(6), signed_whitelist(7)
    store = open_store(tmp_path)
    assert store.accept_whitelist(*new)
    for one in (store, open_store(tmp_path)):
        with pytest.raises(WrongVersion, match="got whitelist 6, and 7 is known here"):
            one.accept_whitelist(*old)


def test_another_whitelist_of_the_same_version_is_refused(tmp_path: Path) -> None:
    """Failed with the comparison of the bodies taken out of `accept_whitelist`."""
    store = open_store(tmp_path)
    store.accept_whitelist(*signed_whitelist(7))
    with pytest.raises(WrongVersion, match="got another whitelist 7"):
        store.accept_whitelist(*signed_whitelist(7, ops={"add": 1}))


def test_a_revoked_version_is_refused(tmp_path: Path) -> None:
    """Failed with the look at `revoked_versions` taken out. 9 was signed with stolen keys."""
    store = open_store(tmp_path)
    store.accept_whitelist(*signed_whitelist(7))
    stolen = signed_whitelist(9, revoked_versions=frozenset())
    with pytest.raises(WrongVersion, match="whitelist 9 is revoked"):
        store.accept_whitelist(*stolen)
    assert store.accept_whitelist(*signed_whitelist(10))


@pytest.mark.parametrize("late", [0, 1, 10 * DAY])
def test_a_frozen_view_ends_with_the_expiry(tmp_path: Path, late: int) -> None:
    """An attacker who hides every newer whitelist keeps a host on the old one until it expires,
    and then the host runs the floor. Failed with `_why_floor` that gave "", and for what is offered
    with the look at `expires_seconds` taken out of `verify_whitelist`."""
    store = open_store(tmp_path)
    store.accept_whitelist(*signed_whitelist(7))
    held = open_store(tmp_path, WHITELIST.expires_seconds + late).whitelist
    assert held is not None
    policy = Policy.effective(held.whitelist, WHITELIST.expires_seconds + late)
    assert policy.floor_reason
    assert "linalg_svd" not in policy.ops
    with pytest.raises(NotCurrent, match="whitelist 7 expired at 2027-02-13 08:00 UTC"):
        taken(*signed_whitelist(7), now_seconds=WHITELIST.expires_seconds + late)


def test_a_whitelist_of_the_future_is_refused() -> None:
    """Failed with the look at `issued_seconds` taken out of `verify_whitelist`."""
    taken(*signed_whitelist(issued_seconds=NOW + 600))
    with pytest.raises(NotCurrent, match="in the future by this machine's clock"):
        taken(*signed_whitelist(issued_seconds=NOW + 601))


def test_under_an_expired_root_nothing_is_taken() -> None:
    """Failed with `_check_root_time` taken out of `verify_whitelist`."""
    root = first_root(root_document(expires_seconds=NOW))
    document, body = signed_whitelist()
    with pytest.raises(NotCurrent, match="root 1 expired at"):
        verify_whitelist(root, document, body, swarm=SWARM, least_version=0, now_seconds=NOW)


# The body ---------------------------------------------------------------------------------------


def test_a_swapped_body_is_refused() -> None:
    """Failed with `verify_length_and_hashes` taken out of `_body_of`."""
    document, body = signed_whitelist()
    loose = encode_whitelist(replace(WHITELIST, writable=("**",)))
    same_length = encode_whitelist(replace(WHITELIST, swarm="publiC"))
    assert len(same_length) == len(body)
    for other in (loose, same_length, body + b"\0", body[:-1], b""):
        with pytest.raises(WrongBody):
            taken(document, other)


@pytest.mark.parametrize("change", [{"version": 8}, {"expires_seconds": NOW + 300 * DAY}], ids=str)
def test_a_body_that_says_other_than_its_document_is_refused(change: Tree) -> None:
    """Failed with the comparison of version and expiry taken out of `_body_of`."""
    _, body = signed_whitelist(**change)
    pins = json.loads(signed_whitelist(**change)[0])["signed"]["targets"]
    tree = json.loads(signed_whitelist()[0])
    tree["signed"]["targets"] = pins
    with pytest.raises(WrongBody, match="are not those of its document"):
        taken(signed_anew(tree, CAT, DAN), body)


def test_the_whitelist_of_another_swarm_of_the_same_signers_is_refused() -> None:
    """Failed with the comparison of swarms taken out of `verify_whitelist`."""
    with pytest.raises(BadTrustDocument, match="the whitelist of swarm 'lab', this is 'public'"):
        taken(*signed_whitelist(swarm="lab", writable=("**",)))


# Roots ------------------------------------------------------------------------------------------

# Two of three keys of the root change.
CHANGED: Tree = {"version": 2, "root_keys": (CAT, DAN, EVE), "before": ROOT}


def test_a_rotation_takes_old_and_new_keys() -> None:
    """Failed with each half of the result in turn left out of `_trusted`."""
    next_root(ROOT, root_document(**CHANGED, signed_by=(ANN, BEN, DAN, EVE)))
    for signed_by, whose in (
        ((ANN, BEN), "its own"),
        ((DAN, EVE), "the root before it"),
        ((ANN, CAT), "its own"),  # two keys, of which each side knows the one or the other
        ((CAT, DAN), "the root before it"),
        ((), "the root before it"),
    ):
        with pytest.raises(UnderThreshold, match=f"root 2 is signed by . of the keys of {whose}"):
            next_root(ROOT, root_document(**CHANGED, signed_by=signed_by))


@pytest.mark.parametrize("version", [1, 3, 2**31 - 1])
def test_a_version_of_the_root_that_is_not_the_next_is_refused(version: int) -> None:
    """tuf refuses it, too, with a ValueError: failed with `_check_next` taken out of `_trusted`."""
    document = root_document(version=version, signed_by=(ANN, BEN))
    with pytest.raises(WrongVersion, match="roots are taken one by one, so root 2 is wanted"):
        next_root(ROOT, document)


def test_a_root_left_out_of_a_chain_is_refused(tmp_path: Path) -> None:
    """Failed as above."""
    second = root_document(**CHANGED, signed_by=(ANN, BEN, DAN, EVE))
    third = root_document(
        version=3, root_keys=(DAN, EVE), signed_by=(DAN, EVE), before=next_root(ROOT, second)
    )
    store = open_store(tmp_path)
    for chain in ([third], [third, second], [second, second]):
        with pytest.raises(WrongVersion):
            store.accept_roots(chain)
    assert store.accept_roots([second, third])


def test_old_roots_do_not_come_back_after_a_restart(tmp_path: Path) -> None:
    """Failed with `roots` written to the file without the new ones."""
    second = root_document(**CHANGED, signed_by=(ANN, BEN, DAN, EVE))
    open_store(tmp_path).accept_roots([second])
    forked = root_document(version=2, signed_by=(ANN, BEN), before=ROOT)
    store = open_store(tmp_path)
    assert store.root.version == 2
    with pytest.raises(WrongVersion, match="root 3 is wanted"):
        store.accept_roots([forked])


def test_a_chain_that_ends_with_an_expired_root_is_refused() -> None:
    """Failed with `_check_root_time` taken out of `verify_root_chain`."""
    second = root_document(version=2, expires_seconds=NOW, before=ROOT)
    with pytest.raises(NotCurrent, match="root 2 expired at"):
        verify_root_chain(ROOT, [second], NOW)


def test_the_keys_of_a_person_who_left_sign_nothing(tmp_path: Path) -> None:
    """The drill: Cat's key was stolen. Failed with the old root left in `accept_whitelist`."""
    store = open_store(tmp_path)
    store.accept_whitelist(*signed_whitelist(7, signed_by=(DAN, EVE)))
    store.accept_roots([root_document(version=2, whitelist_keys=(DAN, EVE), before=ROOT)])
    assert store.whitelist is not None
    with pytest.raises(UnderThreshold):
        store.accept_whitelist(*signed_whitelist(8, signed_by=(CAT, DAN)))
    assert store.accept_whitelist(*signed_whitelist(8, signed_by=(DAN, EVE)))


# Documents that say more or otherwise -----------------------------------------------------------


def _places(tree: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The ways to every table in a document."""
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree)
    found = [place] if isinstance(tree, dict) else []
    for name, value in inner:
        if isinstance(value, dict | list):
            found += _places(value, (*place, name))
    return found


def _at(tree: Any, place: tuple[Any, ...]) -> Any:
    for name in place:
        tree = tree[name]
    return tree


WHITELIST_TREE: Tree = json.loads(signed_whitelist()[0])


@pytest.mark.parametrize("place", _places(WHITELIST_TREE), ids=str)
def test_an_unknown_field_in_a_whitelist_document_is_refused(place: tuple[Any, ...]) -> None:
    """Signed truly. Failed with `_none_unknown` that returned at once."""
    tree = json.loads(signed_whitelist()[0])
    _at(tree, place)["zzz"] = "x"
    document = signed_anew(tree, CAT, DAN)
    if place[:1] == ("signatures",):
        tree["signatures"][place[1]]["zzz"] = "x"
        document = rendered(tree)
    with pytest.raises(BadTrustDocument):
        taken(document, signed_whitelist()[1])


@pytest.mark.parametrize("place", _places(json.loads(FIRST)), ids=str)
def test_an_unknown_field_in_a_root_is_refused(place: tuple[Any, ...]) -> None:
    """As above."""
    tree = json.loads(FIRST)
    _at(tree, place)["zzz"] = "x"
    document = signed_anew(tree, ANN, BEN)
    if place[:1] == ("signatures",):
        tree["signatures"][place[1]]["zzz"] = "x"
        document = rendered(tree)
    with pytest.raises(BadTrustDocument):
        first_root(document)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: b" " + data,
        lambda data: data.replace(b":", b": ", 1),
        lambda data: data.replace(b'"version":1', b'"version":9,"version":1'),
        lambda data: data.replace(b'"_type"', b'"\\u005ftype"'),
        lambda data: data + b"\n",
        lambda data: data.replace(b'"sig":"', b'"sig":"0', 1),
    ],
)
def test_other_bytes_for_the_same_root_are_refused(change: Callable[[bytes], bytes]) -> None:
    """Failed with the comparison with the rendering taken out of `_parse`, all but the last."""
    assert change(FIRST) != FIRST
    with pytest.raises(BadTrustDocument):
        first_root(change(FIRST))


def test_signatures_have_one_case() -> None:
    """The letters of hexadecimal digits are no second way: failed with `_HEX_128` for any case."""
    tree = json.loads(FIRST)
    for signature in tree["signatures"]:
        signature["sig"] = signature["sig"].upper()
    with pytest.raises(BadTrustDocument, match="in lower case"):
        first_root(rendered(tree))


@pytest.mark.parametrize(
    "data",
    [b"", b"{}", b"[" * 16_000, b"1" * 5000, b'{"a":' * 3000, b"\xff", b"null", b" " * 16_385],
    ids=lambda data: repr(data[:8]),
)
def test_bytes_that_are_no_document_are_refused(data: bytes) -> None:
    with pytest.raises(BadTrustDocument):
        first_root(data)


# Mutations --------------------------------------------------------------------------------------

DOCUMENT, BODY = signed_whitelist()
SECOND = root_document(**CHANGED, signed_by=(ANN, BEN, DAN, EVE))
TRIES = count(20_000, 1_000_000)


def _read_whitelist(data: bytes) -> object:
    return open_whitelist(ROOT, data, BODY)


def _read_body(data: bytes) -> object:
    return open_whitelist(ROOT, DOCUMENT, data)


def _read_root(data: bytes) -> object:
    return next_root(ROOT, data)


@pytest.mark.parametrize(
    ("read", "original"),
    [(_read_root, SECOND), (_read_whitelist, DOCUMENT), (_read_body, BODY)],
    ids=["root", "whitelist", "body"],
)
def test_no_changed_bytes_are_taken_with_a_changed_signed_part(
    read: Callable[[bytes], object], original: bytes
) -> None:
    """The root's failed with the look at `verified` taken out of `_trusted`, the body's with its
    hash unchecked. The whitelist's is held twice, since the body repeats what its document says: it
    failed with `verified` and the comparison with the body both taken out."""

    def unchanged(data: bytes) -> None:
        read(data)
        if original is BODY:
            assert data == BODY
        else:
            assert json.loads(data)["signed"] == json.loads(original)["signed"]

    tries = TRIES // 4 if original is BODY else TRIES
    attack(unchanged, [original], REFUSALS, trees=original is BODY, tries=tries)


@pytest.mark.parametrize(
    ("read", "original"),
    [(_read_root, SECOND), (_read_whitelist, DOCUMENT)],
    ids=["root", "whitelist"],
)
def test_no_changed_content_is_taken(read: Callable[[bytes], object], original: bytes) -> None:
    """Fields replaced, left out, doubled and moved, in the right rendering. The whitelist's failed
    as above; a changed root seldom makes sense to the end, so the next test looks at each leaf."""
    mutator = Mutator([b"\xc0"], SEED)
    tree = json.loads(original)
    tried = accepted = 0
    for _ in range(TRIES):
        changed = mutator.changed(tree)
        data = rendered(changed) if isinstance(changed, dict) else repr(changed).encode()
        if data == original:
            continue
        tried += 1
        try:
            read(data)
        except REFUSALS:
            continue
        assert changed["signed"] == tree["signed"]
        accepted += 1
    assert tried > TRIES / 2
    assert accepted < tried / 10


def _leaves(tree: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The ways to every number, text and list of texts in a document."""
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree)
    found = []
    for name, value in inner:
        if isinstance(value, dict):
            found += _leaves(value, (*place, name))
        else:
            found.append((*place, name))
    return found


def _neighbours(value: Any) -> list[Any]:
    """Values that are nearly the same, and as valid in their place as can be."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value - 1, value + 1]
    if isinstance(value, list):
        return [value[::-1], value[1:], value[:-1], [*value, "0" * 64]]
    digits = [place for place, one in enumerate(value) if one in "0123456789abcdef"]
    return [
        value[:place] + ("1" if value[place] == "0" else "0") + value[place + 1 :]
        for place in digits
    ]


@pytest.mark.parametrize(
    ("read", "original"),
    [(_read_root, SECOND), (_read_whitelist, DOCUMENT)],
    ids=["root", "whitelist"],
)
def test_every_leaf_of_the_signed_part_is_bound(
    read: Callable[[bytes], object], original: bytes
) -> None:
    """Failed as the bytes' test did."""
    read(original)
    tried = 0
    for place in _leaves(json.loads(original)["signed"]):
        changed = json.loads(original)
        above = _at(changed["signed"], place[:-1])
        for value in _neighbours(above[place[-1]]):
            if value == above[place[-1]]:
                continue
            kept, above[place[-1]] = above[place[-1]], value
            with pytest.raises(REFUSALS):
                read(rendered(changed))
            above[place[-1]] = kept
            tried += 1
    assert tried > 80
