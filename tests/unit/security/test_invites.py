"""Invites and requests: tokens survive mail and no typing errors, requests prove and bind."""

import base64
import contextlib
import hashlib
import hmac
from typing import Any

import msgpack
import pytest
from hostile import attack, fuzzed, like
from hypothesis import given
from joiners import (
    ADDRESSES,
    ALICE,
    DAY,
    EVE,
    ISSUER,
    NOW,
    SECOND,
    SECRET,
    invite_of,
    join_of,
    renew_of,
)
from soak import count

from glasshive.security import invites as invites_module
from glasshive.security.envelope import CLOCK_SKEW_SECONDS, seal
from glasshive.security.errors import (
    BadEnvelope,
    BadInvite,
    EnvelopeExpired,
    InviteRefused,
    SecurityError,
    WrongReceiver,
    WrongSwarm,
)
from glasshive.security.invites import (
    MAX_INVITE_SECONDS,
    REQUEST_SECONDS,
    Invite,
    open_join,
    open_renew,
)
from glasshive.security.keys import Identity, PeerId, public_key_of

TOKEN = invite_of().token(ISSUER)


# Tokens -----------------------------------------------------------------------------------------


def test_a_token_says_what_the_issuer_put_in() -> None:
    assert Invite.parse(TOKEN, NOW) == invite_of()
    assert TOKEN.startswith("glasshive1")
    assert len(TOKEN) < 1000


def test_a_token_may_be_folded_and_shouted() -> None:
    folded = "\n  ".join(TOKEN[start : start + 60] for start in range(0, len(TOKEN), 60))
    assert Invite.parse(f" {folded}\r\n", NOW) == invite_of()
    assert Invite.parse(TOKEN.upper(), NOW) == invite_of()


@pytest.mark.parametrize("length", [10, 11, 17, 18, 50, 300, len(TOKEN) - 1])
def test_a_cut_off_token_says_how_much_is_missing(length: int) -> None:
    wanted = len(TOKEN) if length >= 18 else "more"
    with pytest.raises(BadInvite) as caught:
        Invite.parse(TOKEN[:length], NOW)
    assert str(caught.value) == (
        f"the token is cut off: got {length} characters, wanted {wanted}; copy all of it"
    )


def test_every_mistyped_character_is_noticed() -> None:
    for place in range(len(TOKEN)):
        other = "b" if TOKEN[place] != "b" else "c"
        with pytest.raises(BadInvite) as caught:
            Invite.parse(TOKEN[:place] + other + TOKEN[place + 1 :], NOW)
        if place >= 18:
            assert "the token is mistyped: its check doesn't fit" in str(caught.value)
    with pytest.raises(BadInvite, match="mistyped"):
        Invite.parse(TOKEN + "a", NOW)
    with pytest.raises(BadInvite, match="mistyped: character 101 can't be in one"):
        Invite.parse(TOKEN[:100] + "0" + TOKEN[101:], NOW)


@pytest.mark.parametrize("text", ["", "x", "12D3KooW", TOKEN[1:], "glasshive", " ", "é" * 50])
def test_what_is_no_token_is_told_how_one_begins(text: str) -> None:
    with pytest.raises(BadInvite, match="a long word that begins with glasshive1; paste all"):
        Invite.parse(text, NOW)


def test_a_huge_text_is_refused_unread() -> None:
    with pytest.raises(BadInvite, match="got 20000 characters, an invite has at most 16384"):
        Invite.parse("g" * 20_000, NOW)
    with pytest.raises(BadInvite):
        Invite.parse("glasshive1" + "a" * 16_000, NOW)


def test_an_expired_token_is_refused_by_its_time() -> None:
    end = NOW + DAY
    Invite.parse(TOKEN, end + CLOCK_SKEW_SECONDS)
    with pytest.raises(InviteRefused, match=r"the invite expired 11\.0 s ago; ask for a new one"):
        Invite.parse(TOKEN, end + CLOCK_SKEW_SECONDS + 1)
    late = invite_of(expires_at_seconds=NOW + MAX_INVITE_SECONDS + 60).token(ISSUER)
    with pytest.raises(InviteRefused, match="at most 2592000 s are accepted"):
        Invite.parse(late, NOW)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"swarm": "public"}, "which needs no invite"),
        ({"swarm": "\x1b[2J"}, "the name of a private swarm"),
        ({"addresses": ()}, "names 0 addresses, wanted 1 to 8"),
        ({"addresses": ADDRESSES * 5}, "names 10 addresses"),
        ({"addresses": ("192.0.2.7:31330",)}, "no multiaddr"),
        ({"addresses": ("/ip4/" + "1" * 200,)}, "no multiaddr"),
        ({"addresses": ("/ip4/\x1b[2J",)}, "no multiaddr"),
        ({"issuers": (SECOND.peer_id,)}, "among them who signed it"),
        ({"issuers": (ISSUER.peer_id,) * 9}, "names 9 issuers"),
        ({"issuers": (ISSUER.peer_id, PeerId("nobody"))}, "an issuer of the invite"),
        ({"whitelist_root": b"root"}, "not a SHA-256 of 32 bytes"),
        ({"invite_id": b""}, "have 16 bytes each"),
        ({"secret": b"short"}, "have 16 bytes each"),
    ],
)
def test_no_invite_is_made_with_a_field_out_of_range(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(BadInvite, match=text) as caught:
        invite_of(**changes)
    assert "secret of 16" not in str(caught.value)


def worded(data: bytes) -> str:
    """A token around any bytes, as the module's docstring says."""
    check = hashlib.sha256(b"glasshive invite 1" + data).digest()[:4]
    whole = len(data).to_bytes(2, "big") + check + data
    return "glasshive1" + base64.b32encode(whole).decode().lower().rstrip("=")


def unworded(token: str) -> bytes:
    digits = token.removeprefix("glasshive1").upper()
    return base64.b32decode(digits + "=" * (-len(digits) % 8))[6:]


def of_body(body: bytes, identity: Identity = ISSUER) -> str:
    return worded(signed_body(body, identity))


def signed_body(body: bytes, identity: Identity = ISSUER) -> Any:
    envelope = seal(
        identity,
        kind="invite",
        swarm="lab",
        receiver=None,
        request_id=b"i" * 16,
        expires_at_seconds=NOW + DAY,
        body=body,
    )
    return msgpack.packb(["lab", envelope])


ENVELOPE: bytes = msgpack.unpackb(unworded(TOKEN))[1]
BODY: bytes = msgpack.unpackb(msgpack.unpackb(ENVELOPE)[2])[6]


def test_the_tests_make_tokens_as_the_code_does() -> None:
    assert worded(unworded(TOKEN)) == TOKEN
    assert of_body(BODY) == TOKEN


def test_only_its_issuer_signs_an_invite() -> None:
    with pytest.raises(BadInvite, match="an issuer signs its own only"):
        invite_of().token(EVE)
    with pytest.raises(BadInvite, match="among them who signed it"):
        Invite.parse(of_body(BODY, EVE), NOW)  # names ISSUER and SECOND, signed by another


@pytest.mark.parametrize("kind", ["join", "renew"])
def test_no_mutation_of_a_request_is_accepted_with_another_content(kind: str) -> None:
    opened: Any = open_join if kind == "join" else open_renew
    data = join_of(invite_of()) if kind == "join" else renew_of(b"certificate")
    expected = opened(data, swarm="lab", issuer=ISSUER.peer_id, now=NOW)

    def as_before(changed: bytes) -> None:
        assert opened(changed, swarm="lab", issuer=ISSUER.peer_id, now=NOW) == expected

    tries = count(10_000, 1_000_000)
    assert attack(as_before, [data], SecurityError, tries=tries) < tries / 50


@pytest.fixture
def good_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is parsed is the bytes that a word stands for: only the signature is in the way."""
    monkeypatch.setattr(invites_module, "_unworded", lambda data: data)


@pytest.mark.usefixtures("good_words")
def test_no_mutation_of_an_invite_is_accepted_with_another_content() -> None:
    expected = invite_of()

    def as_before(data: Any) -> None:
        assert Invite.parse(msgpack.packb(["lab", data]), NOW) == expected

    tries = count(10_000, 1_000_000)
    assert attack(as_before, [ENVELOPE], SecurityError, tries=tries) < tries / 50


@pytest.mark.usefixtures("good_words")
def test_an_issuer_that_lies_meets_only_our_errors() -> None:
    tries = count(5_000, 1_000_000)
    attack(lambda body: Invite.parse(signed_body(body), NOW), [BODY], SecurityError, tries=tries)


def test_no_mutated_word_is_another_invite() -> None:
    expected = invite_of()

    def as_before(data: bytes) -> None:
        assert Invite.parse(data.decode("latin-1"), NOW) == expected

    attack(as_before, [TOKEN.encode()], SecurityError, trees=False, tries=count(5_000, 1_000_000))


@fuzzed
@given(like(BODY))
def test_any_bytes_are_an_invite_or_refused(body: bytes) -> None:
    for text in (of_body(body), worded(body), body.decode("latin-1")):
        with contextlib.suppress(SecurityError):
            Invite.parse(text, NOW)


# Requests ---------------------------------------------------------------------------------------


def test_the_proof_is_an_hmac_over_request_invite_and_both_keys() -> None:
    request = join_of(invite_of())
    envelope, invite_id, proof = open_join(request, swarm="lab", issuer=ISSUER.peer_id, now=NOW)
    said = b"\x10glasshive join 1" + b"\x10" + envelope.request_id + b"\x10" + invite_id
    said += public_key_of(ALICE.peer_id) + public_key_of(ISSUER.peer_id)
    assert proof == hmac.new(SECRET, said, hashlib.sha256).digest()
    assert SECRET not in request


@pytest.mark.parametrize(
    ("error", "changes"),
    [
        (WrongSwarm, {"swarm": "other"}),
        (WrongReceiver, {"issuer": SECOND.peer_id}),
        (EnvelopeExpired, {"now": NOW + REQUEST_SECONDS + CLOCK_SKEW_SECONDS + 1}),
        (EnvelopeExpired, {"now": NOW - CLOCK_SKEW_SECONDS - 1}),
    ],
)
def test_a_request_is_good_only_where_and_when_it_was_meant(
    error: type[Exception], changes: dict[str, Any]
) -> None:
    place: dict[str, Any] = {"swarm": "lab", "issuer": ISSUER.peer_id, "now": NOW}
    with pytest.raises(error):
        open_join(join_of(invite_of()), **(place | changes))
    with pytest.raises(error):
        open_renew(renew_of(b"certificate"), **(place | changes))


def request_of(kind: str, body: bytes, request_id: bytes = bytes(16)) -> bytes:
    return seal(
        ALICE,
        kind=kind,
        swarm="lab",
        receiver=ISSUER.peer_id,
        request_id=request_id,
        expires_at_seconds=NOW + 60,
        body=body,
    )


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        *(
            ("join", msgpack.packb(body))
            for body in ([1], [2, b"i", b"p"], [True, b"i", b"p"], [1, "i", b"p"], {}, [1, b"i", 1])
        ),
        *(("renew", msgpack.packb(body)) for body in ([1], [2, b"c"], [1, "c"], 1, [1, b"c", 0])),
        ("join", b"\xc1"),
        ("record", msgpack.packb([1, b"i", b"p"])),
    ],
)
def test_what_is_no_request_is_refused(kind: str, body: bytes) -> None:
    with pytest.raises(BadEnvelope):
        opened = open_renew if kind == "renew" else open_join
        opened(request_of(kind, body), swarm="lab", issuer=ISSUER.peer_id, now=NOW)


def test_the_id_of_a_request_is_long_enough_to_be_its_own() -> None:
    for kind, opened in (("join", open_join), ("renew", open_renew)):
        with pytest.raises(BadEnvelope, match=f"a request to {kind} has 3 bytes, wanted 16"):
            opened(request_of(kind, b"", b"abc"), swarm="lab", issuer=ISSUER.peer_id, now=NOW)
