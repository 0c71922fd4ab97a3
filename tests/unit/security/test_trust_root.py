"""Roots and whitelist documents: made, signed one after the other, verified; the oracle is TUF."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
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
from tuf.api.metadata import Metadata, Root, Targets

from glasshive.security.errors import (
    BadTrustDocument,
    BadWhitelist,
    UnderThreshold,
    WrongBody,
    WrongVersion,
)
from glasshive.security.signing_keys import SigningKey
from glasshive.security.trust_root import (
    MAX_KEYS,
    add_root_signature,
    add_whitelist_signature,
    first_root,
    key_id_of,
    merge_root_signatures,
    merge_whitelist_signatures,
    new_root,
    new_whitelist_document,
    next_root,
    root_digest,
    root_signatures,
    root_terms,
    verify_root_chain,
    verify_whitelist,
    whitelist_signatures,
)


def ids(*keys: SigningKey) -> set[str]:
    return {key_id_of(key.public_key) for key in keys}


def test_a_first_root_says_who_may_sign() -> None:
    assert ROOT.version == 1
    assert set(ROOT.root_keys) == ids(ANN, BEN, CAT)
    assert set(ROOT.whitelist_keys) == ids(CAT, DAN, EVE)
    assert (ROOT.root_threshold, ROOT.whitelist_threshold) == (2, 2)
    assert ROOT.expires_seconds == NOW + 365 * DAY
    assert ROOT.document == FIRST


def test_documents_are_tufs_own() -> None:
    """Read and verified by tuf alone, without a line of ours."""
    root = Metadata[Root].from_bytes(FIRST)
    root.signed.verify_delegate("root", root.signed_bytes, root.signatures)
    document, body = signed_whitelist()
    targets = Metadata[Targets].from_bytes(document)
    root.signed.verify_delegate("targets", targets.signed_bytes, targets.signatures)
    targets.signed.targets["whitelist.msgpack"].verify_length_and_hashes(body)
    assert targets.signed.version == WHITELIST.version


def test_the_rendering_is_plain_json_sorted_and_compact() -> None:
    """The rendering is the library's: another release of it must give the same bytes."""
    tree = json.loads(FIRST)
    assert tree["signed"]["spec_version"] == "1.0.31"
    assert json.dumps(tree, separators=(",", ":"), sort_keys=True).encode() == FIRST


def test_signatures_come_one_by_one_from_files_passed_around(tmp_path: Path) -> None:
    place = tmp_path / "root-1.json"
    place.write_bytes(root_document(signed_by=()))
    for key, signers in ((ANN, ids(ANN)), (ANN, ids(ANN)), (CAT, ids(ANN, CAT))):
        place.write_bytes(add_root_signature(place.read_bytes(), key, None))
        (state,) = root_signatures(place.read_bytes(), None)
        assert (state.role, state.threshold, set(state.signed)) == ("this root", 2, signers)
    assert state.complete
    assert set(state.signed) == ids(ANN, CAT)
    assert set(state.missing) == ids(BEN)
    assert first_root(place.read_bytes()).version == 1


def test_what_is_missing_is_said_for_old_and_new_keys() -> None:
    document = root_document(
        version=2, root_keys=(BEN, DAN, EVE), signed_by=(DAN, BEN), before=ROOT
    )
    old, own = root_signatures(document, ROOT)
    assert (old.role, old.complete, set(old.signed)) == ("the root before", False, ids(BEN))
    assert (own.role, own.complete, set(own.signed)) == ("this root", True, ids(BEN, DAN))
    assert set(old.missing) == ids(ANN, CAT)


def test_whitelist_signatures_are_counted() -> None:
    document, body = signed_whitelist(signed_by=(EVE,))
    state = whitelist_signatures(document, ROOT)
    assert (state.complete, set(state.signed), set(state.missing)) == (
        False, ids(EVE), ids(CAT, DAN),
    )  # fmt: skip
    document = add_whitelist_signature(document, body, CAT, ROOT)
    assert whitelist_signatures(document, ROOT).complete


def test_a_whitelist_says_who_signed_it() -> None:
    document, body = signed_whitelist()
    verified = verify_whitelist(ROOT, document, body, swarm=SWARM, least_version=7, now_seconds=NOW)
    assert verified.whitelist == WHITELIST
    assert set(verified.signers) == ids(CAT, DAN)
    assert (verified.document, verified.body) == (document, body)


def test_rotation_of_a_key_as_a_drill() -> None:
    """Cat's key was taken: Dan replaces it in both roles; two old keys and two new ones sign."""
    second = root_document(
        version=2, root_keys=(ANN, BEN, DAN), whitelist_keys=(DAN, EVE, ANN),
        signed_by=(ANN, BEN), before=ROOT,
    )  # fmt: skip
    third = root_document(
        version=3, root_keys=(ANN, BEN, DAN), whitelist_keys=(DAN, EVE, ANN),
        signed_by=(DAN, BEN), before=next_root(ROOT, second),
    )  # fmt: skip
    root = verify_root_chain(ROOT, [second, third], NOW)
    assert root.version == 3
    document, body = signed_whitelist(8, root=root, signed_by=(DAN, EVE))
    verify_whitelist(root, document, body, swarm=SWARM, least_version=7, now_seconds=NOW)


@pytest.mark.parametrize(
    "document",
    [
        b'{"signed": {"_type": "\\u001b[31mhostile\\n"}, "signatures": []}',
        b'{"signatures": [], "signed": {"_type": "root", "version": "\\u001b]0;hostile\\u0007"}}',
        b"[" * 9000,
    ],
)
def test_what_a_stranger_wrote_is_not_repeated(document: bytes) -> None:
    """Failed with the text of tuf's own error in ours."""
    with pytest.raises(BadTrustDocument) as caught:
        root_terms(document)
    assert str(caught.value) == "no root or whitelist document; get it anew from its source"


def test_the_digest_of_a_root_is_of_what_it_says() -> None:
    assert root_digest(FIRST) == root_digest(root_document(signed_by=(ANN, BEN, CAT)))
    assert root_digest(FIRST) == root_digest(root_document(signed_by=()))
    assert root_digest(FIRST) != root_digest(root_document(root_threshold=1))
    with pytest.raises(BadTrustDocument):
        root_digest(b"{}")


def test_only_the_last_root_of_a_chain_must_be_current() -> None:
    second = root_document(version=2, expires_seconds=NOW - DAY, before=ROOT)
    third = root_document(version=3, before=next_root(ROOT, second))
    assert verify_root_chain(ROOT, [second, third], NOW).version == 3


def test_a_root_with_a_key_twice_or_an_impossible_threshold_is_not_made() -> None:
    keys = [ANN.public_key, BEN.public_key]
    for changes, text in (
        ({"root_keys": [*keys, keys[0]]}, "Nonunique"),
        ({"root_threshold": 3}, "wants 3 signatures of 2 keys"),
        ({"root_threshold": 0}, "threshold"),
        ({"whitelist_keys": []}, "the role whitelist wants 1 signatures of 0 keys"),
        ({"whitelist_keys": [b"x"]}, "no public key of 32 bytes"),
        ({"version": 0}, "version"),
        ({"expires_seconds": 1.5}, "whole Unix seconds"),
        (
            {"root_keys": [SigningKey(bytes([n]) * 32).public_key for n in range(MAX_KEYS + 1)]},
            f"more than {MAX_KEYS}",
        ),
    ):
        wanted = {
            "version": 1, "expires_seconds": NOW, "root_keys": keys, "root_threshold": 1,
            "whitelist_keys": keys, "whitelist_threshold": 1,
        } | changes  # fmt: skip
        with pytest.raises(BadTrustDocument, match=text):
            new_root(**wanted)  # type: ignore[arg-type]


def test_nobody_signs_what_does_not_count_or_cannot_be_read() -> None:
    with pytest.raises(BadTrustDocument, match="none of those whose signature counts"):
        add_root_signature(FIRST, EVE, None)
    document, body = signed_whitelist(signed_by=())
    with pytest.raises(BadTrustDocument, match="none of those whose signature counts"):
        add_whitelist_signature(document, body, ANN, ROOT)
    with pytest.raises(WrongBody, match="not the one signed in whitelist document 7"):
        add_whitelist_signature(document, body + b"\0", CAT, ROOT)
    skipped = root_document(version=3, signed_by=())
    with pytest.raises(WrongVersion, match="root 2 is wanted"):
        add_root_signature(skipped, ANN, ROOT)


def test_a_root_is_no_whitelist_and_back() -> None:
    document, body = signed_whitelist()
    with pytest.raises(BadTrustDocument, match="is no root"):
        first_root(document)
    with pytest.raises(BadTrustDocument, match="is no whitelist's"):
        verify_whitelist(ROOT, FIRST, body, swarm=SWARM, least_version=0, now_seconds=NOW)


def test_a_body_that_is_signed_but_no_whitelist_is_refused() -> None:
    document, body = new_whitelist_document(WHITELIST)
    other = b"\xc0" * len(body)
    tree = json.loads(document)
    tree["signed"]["targets"]["whitelist.msgpack"]["hashes"]["sha256"] = hashlib.sha256(
        other
    ).hexdigest()
    changed = json.dumps(tree, separators=(",", ":"), sort_keys=True).encode()
    with pytest.raises(BadWhitelist):
        add_whitelist_signature(changed, other, CAT, ROOT)


def test_a_first_root_is_signed_by_its_own_threshold() -> None:
    with pytest.raises(UnderThreshold, match=r"signed by 1 of the keys of .*, wanted 2"):
        first_root(root_document(signed_by=(ANN,)))


def test_signatures_of_copies_are_put_together() -> None:
    ann, ben = (root_document(signed_by=(one,)) for one in (ANN, BEN))
    assert merge_root_signatures(ann, ben, None) == FIRST
    assert merge_root_signatures(FIRST, ann, None) == FIRST
    document, body = signed_whitelist()
    cat, dan = (signed_whitelist(signed_by=(one,))[0] for one in (CAT, DAN))
    merged = merge_whitelist_signatures(cat, dan, ROOT)
    assert set(whitelist_signatures(merged, ROOT).signed) == ids(CAT, DAN)
    verify_whitelist(ROOT, merged, body, swarm=SWARM, least_version=7, now_seconds=NOW)
    assert document == merged


def test_copies_of_something_else_and_bad_signatures_are_not_put_together() -> None:
    with pytest.raises(BadTrustDocument, match="a copy of version 1 that says something else"):
        merge_root_signatures(FIRST, root_document(root_threshold=1), None)
    with pytest.raises(BadTrustDocument, match="a copy of version 8 that says something else"):
        merge_whitelist_signatures(signed_whitelist()[0], signed_whitelist(8)[0], ROOT)
    document, _ = signed_whitelist(signed_by=(CAT,))
    tree = json.loads(signed_whitelist(signed_by=(DAN, EVE))[0])
    tree["signatures"][0]["sig"] = tree["signatures"][1]["sig"]
    bad = json.dumps(tree, separators=(",", ":"), sort_keys=True).encode()
    merged = merge_whitelist_signatures(document, bad, ROOT)
    signers = {one["keyid"] for one in json.loads(merged)["signatures"]}
    assert signers == {*ids(CAT), tree["signatures"][1]["keyid"]}


def test_terms_are_what_a_document_says_whoever_signed_it() -> None:
    terms = root_terms(root_document(signed_by=()))
    assert (terms.version, terms.expires_seconds) == (1, ROOT.expires_seconds)
    assert (terms.root_keys, terms.root_threshold) == (ROOT.root_keys, ROOT.root_threshold)
    assert terms.whitelist_keys == ROOT.whitelist_keys
    assert terms.whitelist_threshold == ROOT.whitelist_threshold
    assert ROOT.public_key(ROOT.root_keys[0]) in {ANN.public_key, BEN.public_key, CAT.public_key}
    with pytest.raises(BadTrustDocument, match="root 1 names no key"):
        ROOT.public_key(key_id_of(SigningKey.generate().public_key))
