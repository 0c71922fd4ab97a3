"""Signed envelopes: everything is bound, nothing changed is accepted."""

import contextlib
from typing import Any

import msgpack
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from hostile import attack, fuzzed, like
from hypothesis import given
from soak import count

from glasshive.security import envelope as module
from glasshive.security.envelope import (
    CLOCK_SKEW_SECONDS,
    Envelope,
    ReplayCache,
    open_envelope,
    seal,
)
from glasshive.security.errors import (
    BadEnvelope,
    BadSignature,
    EnvelopeExpired,
    Replayed,
    SecurityError,
    WrongReceiver,
    WrongSwarm,
)
from glasshive.security.keys import Identity, public_key_of

ALICE, BOB, EVE = (Identity(bytes([number]) * 32) for number in (1, 2, 3))


def sealed(identity: Identity = ALICE, **changes: Any) -> bytes:
    fields: dict[str, Any] = {
        "kind": "request",
        "swarm": "lab",
        "receiver": BOB.peer_id,
        "request_id": b"id",
        "expires_at_seconds": 1000.25,
        "body": b"the body",
    }
    return seal(identity, **(fields | changes))


def opened(data: bytes, **changes: Any) -> Envelope:
    fields: dict[str, Any] = {
        "kind": "request",
        "swarm": "lab",
        "receiver": BOB.peer_id,
        "clock": lambda: 990.0,
    }
    return open_envelope(data, **(fields | changes))


def test_it_says_what_was_sealed() -> None:
    envelope = opened(sealed())
    assert envelope == Envelope(
        "request", "lab", ALICE.peer_id, BOB.peer_id, b"id", 1_000_250, b"the body"
    )
    assert envelope.expires_at_seconds == 1000.25
    assert opened(sealed(receiver=None), receiver=None).receiver is None


def test_the_signature_is_over_dsses_encoding() -> None:
    version, sender, payload, signature = msgpack.unpackb(sealed())
    assert (version, sender) == (1, ALICE.peer_id)
    kind = b"application/vnd.glasshive.envelope.v1"
    signed = b" ".join([b"DSSEv1", b"%d" % len(kind), kind, b"%d" % len(payload), payload])
    Ed25519PublicKey.from_public_bytes(public_key_of(sender)).verify(signature, signed)
    fields = ["request", "lab", ALICE.peer_id, BOB.peer_id, b"id", 1_000_250, b"the body"]
    assert msgpack.unpackb(payload) == fields


@pytest.mark.parametrize(
    ("error", "changes"),
    [
        (BadEnvelope, {"kind": "record"}),
        (WrongSwarm, {"swarm": "public"}),
        (WrongReceiver, {"receiver": EVE.peer_id}),
        (WrongReceiver, {"receiver": None}),
        (EnvelopeExpired, {"clock": lambda: 1000.26 + CLOCK_SKEW_SECONDS}),
        (EnvelopeExpired, {"max_lifetime_seconds": 0.0, "clock": lambda: 980.0}),
        (BadEnvelope, {"max_bytes": 200}),
    ],
)
def test_it_is_good_only_where_and_when_it_was_meant(
    error: type[Exception], changes: dict[str, Any]
) -> None:
    with pytest.raises(error):
        opened(sealed(), **changes)


def test_a_message_to_everyone_is_not_one_to_me() -> None:
    with pytest.raises(WrongReceiver):
        opened(sealed(receiver=None))


def test_clocks_may_differ_by_the_grace() -> None:
    opened(sealed(), clock=lambda: 1000.2 + CLOCK_SKEW_SECONDS)
    opened(sealed(), clock=lambda: 995.0 - CLOCK_SKEW_SECONDS, max_lifetime_seconds=5.5)
    opened(sealed(), clock=None)


def test_another_sender_outside_is_refused() -> None:
    version, _, payload, _ = msgpack.unpackb(sealed())
    kind = b"application/vnd.glasshive.envelope.v1"
    signed = b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)
    stolen = msgpack.packb([version, EVE.peer_id, payload, EVE.sign(signed)])
    with pytest.raises(BadEnvelope, match="one sender outside"):
        opened(stolen)
    with pytest.raises(BadSignature):
        opened(msgpack.packb([version, EVE.peer_id, payload, ALICE.sign(signed)]))


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": ""},
        {"swarm": ""},
        {"kind": "k" * 65},
        {"request_id": b"x" * 33},
        {"expires_at_seconds": -1.0},
        {"body": "text"},
        {"receiver": "r" * 65},
    ],
)
def test_fields_out_of_range_are_refused_on_both_sides(changes: dict[str, Any]) -> None:
    with pytest.raises(BadEnvelope):
        sealed(**changes)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc0",
        msgpack.packb([1, "x", b"", bytes(64), 5]),
        msgpack.packb([2, ALICE.peer_id, b"", bytes(64)]),
        msgpack.packb([True, ALICE.peer_id, b"", bytes(64)]),
        msgpack.packb([1, b"x", b"", bytes(64)]),
        msgpack.packb([1, "x", b"", bytes(64)]),
        msgpack.packb([1, ALICE.peer_id, b"", bytes(63)]),
    ],
)
def test_what_is_no_envelope_is_refused(data: bytes) -> None:
    with pytest.raises(BadEnvelope):
        opened(data)


def test_no_mutation_is_accepted_with_another_content() -> None:
    good = sealed()
    expected = opened(good)

    def open_as_before(data: bytes) -> None:
        assert opened(data) == expected

    tries = count(20_000, 1_000_000)  # a real signature is checked in each
    taken = attack(open_as_before, [good], SecurityError, tries=tries)
    assert taken < tries / 50  # those that changed nothing


PAYLOAD: bytes = msgpack.unpackb(sealed())[2]


def opened_payload(payload: bytes) -> Envelope:
    """What an envelope around this payload says, where its sender signs whatever it likes."""
    return opened(msgpack.packb([1, ALICE.peer_id, payload, bytes(64)]), clock=None)


@pytest.fixture
def good_signatures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every signature by a peer id is good."""
    monkeypatch.setattr(module, "verify", lambda peer_id, data, signature: public_key_of(peer_id))


@pytest.mark.usefixtures("good_signatures")
def test_a_damaged_envelope_of_a_liar_raises_only_our_errors() -> None:
    attack(opened, [sealed(), sealed(body=b"")], SecurityError)


@pytest.mark.usefixtures("good_signatures")
def test_a_signed_payload_of_a_liar_raises_only_our_errors() -> None:
    attack(opened_payload, [PAYLOAD], SecurityError)


@pytest.mark.usefixtures("good_signatures")
@fuzzed
@given(like(PAYLOAD), like(sealed()))
def test_any_bytes_are_an_envelope_or_refused(payload: bytes, envelope: bytes) -> None:
    with contextlib.suppress(SecurityError):
        opened_payload(payload)
    with contextlib.suppress(SecurityError):
        opened(envelope)


def envelope_of(sender: Identity, number: int, expires: float) -> Envelope:
    return Envelope(
        "request", "lab", sender.peer_id, BOB.peer_id, b"%d" % number, int(expires * 1000), b""
    )


def test_a_request_is_admitted_once() -> None:
    cache = ReplayCache()
    first = envelope_of(ALICE, 1, 100.0)
    cache.admit(first, 50.0)
    with pytest.raises(Replayed, match="seen before"):
        cache.admit(first, 51.0)
    cache.admit(envelope_of(ALICE, 2, 100.0), 50.0)
    cache.admit(envelope_of(EVE, 1, 100.0), 50.0)


def test_a_full_memory_refuses_its_own_sender_only() -> None:
    cache = ReplayCache(max_requests_per_sender=3)
    for number in range(3):
        cache.admit(envelope_of(EVE, number, 100.0 + number), 50.0)
    with pytest.raises(Replayed, match="3 requests open"):
        cache.admit(envelope_of(EVE, 3, 100.0), 50.0)
    cache.admit(envelope_of(ALICE, 3, 100.0), 50.0)
    after = 100.5 + CLOCK_SKEW_SECONDS  # the first has expired, the others not
    cache.admit(envelope_of(EVE, 4, 200.0), after)
    with pytest.raises(Replayed):
        cache.admit(envelope_of(EVE, 5, 200.0), after)


def test_a_sender_is_forgotten_only_after_its_requests_expired() -> None:
    cache = ReplayCache(max_senders=1)
    cache.admit(envelope_of(EVE, 1, 100.0), 50.0)
    with pytest.raises(Replayed, match="1 senders"):
        cache.admit(envelope_of(ALICE, 1, 100.0), 60.0)
    cache.admit(envelope_of(ALICE, 1, 200.0), 101.0 + CLOCK_SKEW_SECONDS)
