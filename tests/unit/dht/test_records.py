"""Records: what is signed comes back, and nothing else gets in."""

import contextlib
import hashlib
import math
from typing import Any

import msgpack
import pytest
from hostile import attack, fuzzed, like
from hypothesis import given
from soak import count

from glasshive.dht import records
from glasshive.dht.errors import RecordRefused
from glasshive.dht.records import (
    MAX_RECORD_BYTES,
    MODELS_KEY,
    ModelId,
    PeerRecord,
    RecordGate,
    block_key,
    key_id,
    keys_of,
    lookup_key,
)
from glasshive.security.envelope import Envelope, seal
from glasshive.security.keys import Identity

ALICE, EVE = Identity(b"a" * 32), Identity(b"e" * 32)
MODEL = ModelId(hashlib.sha256(b"manifest").hexdigest())
NOW = 1_700_000_000.0


def record_of(identity: Identity = ALICE, **changes: Any) -> PeerRecord:
    fields: dict[str, Any] = {
        "model": MODEL,
        "model_name": "HuggingFaceTB/SmolLM2-135M",
        "start": 3,
        "end": 6,
        "n_blocks": 30,
        "dtype": "bfloat16",
        "backend": "cpu torch-2.13",
        "attention": "sdpa",
        "throughput_tokens_per_second": 123.5,
        "pass_seconds": 0.0625,
        "addresses": (f"/ip4/127.0.0.1/tcp/4001/p2p/{identity.peer_id}", "/ip4/203.0.113.7/tcp/1"),
        "whitelist_version": 7,
        "load": 0.25,
        "software_version": "0.1.0",
        "peer_id": identity.peer_id,
        "expires_at_seconds": NOW + 45.125,
    }
    return PeerRecord(**(fields | changes))


def test_a_signed_record_comes_back() -> None:
    for record in (record_of(), record_of(withdrawn=True, quantisation="int8", addresses=())):
        signed = record.sign(ALICE, swarm="lab")
        assert PeerRecord.verify(signed, NOW, swarm="lab") == record
        assert len(signed) < 700


def test_its_body_is_the_documented_array() -> None:
    _, sender, payload, _ = msgpack.unpackb(record_of().sign(ALICE))
    kind, swarm, inner, receiver, request_id, expiry, body = msgpack.unpackb(payload)
    assert (kind, swarm, sender, inner) == ("peer-record", "public", ALICE.peer_id, ALICE.peer_id)
    assert (receiver, request_id, expiry) == ("", b"", 1_700_000_045_125)
    assert msgpack.unpackb(body) == [
        2,
        bytes.fromhex(MODEL),
        "HuggingFaceTB/SmolLM2-135M",
        3,
        6,
        30,
        "bfloat16",
        "none",
        "cpu torch-2.13",
        "sdpa",
        123.5,
        0.0625,
        [f"/ip4/127.0.0.1/tcp/4001/p2p/{ALICE.peer_id}", "/ip4/203.0.113.7/tcp/1"],
        7,
        0.25,
        "0.1.0",
        False,
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "x" * 64},
        {"model": MODEL[:-1]},
        {"model": MODEL.upper()},
        {"model_name": ""},
        {"model_name": "a\x1b[31m"},
        {"model_name": "a\n"},
        {"model_name": "é"},
        {"model_name": "a" * 129},
        {"model_name": b"a"},
        {"start": 6},
        {"start": -1},
        {"start": True},
        {"start": 3.0},
        {"end": 31},
        {"n_blocks": 1025, "end": 1025},
        {"dtype": "float64"},
        {"dtype": ["float32"]},
        {"quantisation": ""},
        {"backend": " "},
        {"attention": None},
        {"throughput_tokens_per_second": math.inf},
        {"throughput_tokens_per_second": math.nan},
        {"throughput_tokens_per_second": -1.0},
        {"pass_seconds": math.inf},
        {"pass_seconds": math.nan},
        {"pass_seconds": -0.001},
        {"pass_seconds": "0.1"},
        {"pass_seconds": True},
        {"load": 1.01},
        {"load": "0"},
        {"load": False},
        {"addresses": ("/ip4/1.2.3.4/tcp/1",) * 5},
        {"addresses": ["/ip4/1.2.3.4/tcp/1"]},
        {"addresses": ("example.org:80",)},
        {"addresses": ("/ip4/1.2.3.4/tcp/1\n",)},
        {"addresses": (5,)},
        {"addresses": (f"/ip4/127.0.0.1/tcp/4001/p2p/{EVE.peer_id}",)},
        {"peer_id": "12D3KooWnobody"},
        {"whitelist_version": -1},
        {"whitelist_version": 2**31},
        {"expires_at_seconds": math.inf},
        {"software_version": "0.1\t"},
        {"withdrawn": 1},
    ],
)
def test_fields_out_of_range_are_refused_here_and_from_outside(changes: dict[str, Any]) -> None:
    with pytest.raises(RecordRefused):
        record_of(**changes)


def body_of(record: PeerRecord) -> list[Any]:
    body: list[Any] = msgpack.unpackb(msgpack.unpackb(msgpack.unpackb(record.sign(ALICE))[2])[6])
    return body


def sealed(body: object, **changes: Any) -> bytes:
    fields: dict[str, Any] = {
        "kind": "peer-record",
        "swarm": "public",
        "receiver": None,
        "request_id": b"",
        "expires_at_seconds": NOW + 45,
        "body": msgpack.packb(body),
    }
    return seal(ALICE, **(fields | changes))


@pytest.mark.parametrize("place", range(17))
@pytest.mark.parametrize("value", [None, -1, 2**40, 1.5, "", "\x1b", b"", [], [[]], {}, [b"x"]])
def test_no_wrong_type_in_a_well_signed_body_gets_through(place: int, value: object) -> None:
    body = body_of(record_of())
    body[place] = value
    if (place, value) in ((10, 2**40), (10, 1.5), (11, 2**40), (11, 1.5), (12, [])):
        return  # a throughput, seconds, no addresses
    with pytest.raises(RecordRefused):
        PeerRecord.verify(sealed(body), NOW)


def test_a_record_of_another_release_says_so() -> None:
    """One of the form before had no seconds of a pass, which nothing takes the place of."""
    older = body_of(record_of())
    del older[11]
    older[0] = 1
    assert len(older) == 16
    with pytest.raises(RecordRefused, match="not of version 2; one side needs another release"):
        PeerRecord.verify(sealed(older), NOW)


@pytest.mark.parametrize(
    "signed",
    [
        sealed(body_of(record_of())[:-1]),
        sealed([*body_of(record_of()), 1]),
        sealed(None),
        sealed(body_of(record_of()), kind="request"),
        sealed(body_of(record_of()), swarm="lab"),
        sealed(body_of(record_of()), receiver=EVE.peer_id),
        sealed(body_of(record_of()), expires_at_seconds=NOW + 71),
        sealed(body_of(record_of()), expires_at_seconds=NOW - 11),
        b"",
        bytes(2000),
    ],
)
def test_what_is_not_a_fresh_record_of_this_swarm_is_refused(signed: bytes) -> None:
    with pytest.raises(RecordRefused):
        PeerRecord.verify(signed, NOW)


def test_a_record_is_signed_by_its_own_peer_only() -> None:
    with pytest.raises(RecordRefused, match="announces itself only"):
        record_of().sign(EVE)


def test_the_longest_record_fits() -> None:
    address = "/ip6/2600:1111:2222:3333:4444:5555:255.255.255.255/udp/31331/quic-v1"
    texts = ("model_name", "backend", "attention", "software_version", "quantisation")
    longest = record_of(
        addresses=(f"{address}/p2p/{ALICE.peer_id}",) * 4,
        **dict(start=1022, end=1023, n_blocks=1024, whitelist_version=2**31 - 1, load=0.5),
        **{name: name[0] * 128 for name in texts},
    )
    signed = longest.sign(ALICE, swarm="s" * 64)
    assert 1500 < len(signed) < MAX_RECORD_BYTES
    assert PeerRecord.verify(signed, NOW, swarm="s" * 64) == longest


def test_mutations_change_nothing_or_are_refused() -> None:
    record = record_of()
    good = record.sign(ALICE)

    def verify_as_before(data: bytes) -> None:
        assert PeerRecord.verify(data, NOW) == record

    tries = count(20_000, 1_000_000)  # a real signature is checked in each
    assert attack(verify_as_before, [good], RecordRefused, tries=tries) < tries / 50


BODIES: list[bytes] = [
    msgpack.packb(body_of(record_of())),
    msgpack.packb(body_of(record_of(withdrawn=True, addresses=()))),
]


def verified_body(body: bytes) -> None:
    """Takes the body of a record that was signed well, within `any_body`."""
    record = PeerRecord.verify(body, NOW)
    assert len(record.addresses) <= 4
    assert 0 <= record.start < record.end <= record.n_blocks <= 1024


@pytest.fixture
def any_body(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every message is the body of an envelope by Alice, who signs whatever she likes."""

    def opened(body: bytes, **_: object) -> Envelope:
        return Envelope("peer-record", "public", ALICE.peer_id, None, b"", int(NOW * 1000), body)

    monkeypatch.setattr(records, "open_envelope", opened)


@pytest.mark.usefixtures("any_body")
def test_a_body_of_a_liar_is_a_record_or_refused() -> None:
    attack(verified_body, BODIES, RecordRefused)


@pytest.mark.usefixtures("any_body")
@fuzzed
@given(like(*BODIES))
def test_any_body_is_a_record_or_refused(body: bytes) -> None:
    with contextlib.suppress(RecordRefused):
        verified_body(body)


def test_keys_are_the_models_the_model_and_each_block() -> None:
    assert keys_of(record_of()) == (
        "glasshive/1/models",
        "glasshive/1/model/HuggingFaceTB/SmolLM2-135M",
        f"glasshive/1/model/{MODEL}",
        f"glasshive/1/block/{MODEL}/3",
        f"glasshive/1/block/{MODEL}/4",
        f"glasshive/1/block/{MODEL}/5",
    )


class TestGate:
    record = record_of()
    signed = record.sign(ALICE)
    expiry = record.expires_at_seconds

    def admit(self, **changes: Any) -> PeerRecord:
        fields: dict[str, Any] = {
            "key": key_id(block_key(MODEL, 4)),
            "subkey": ALICE.peer_id,
            "value": self.signed,
            "expires_at_seconds": self.expiry,
            "now": NOW,
        }
        return RecordGate("public").admit(**(fields | changes))

    def test_its_own_record_under_its_own_keys(self) -> None:
        for key in keys_of(self.record):
            assert self.admit(key=key_id(key)) == self.record

    def test_a_record_that_has_expired_is_left_to_the_reader(self) -> None:
        assert self.admit(now=NOW + 1000) == self.record

    @pytest.mark.parametrize(
        "changes",
        [
            {"key": key_id(block_key(MODEL, 6))},
            {"key": key_id(lookup_key("other"))},
            {"key": MODELS_KEY.encode()},
            {"subkey": EVE.peer_id},
            {"subkey": ""},
            {"expires_at_seconds": NOW + 45.126},
            {"expires_at_seconds": math.inf},
            {"expires_at_seconds": math.nan},
            {"now": NOW - 26},
            {"value": signed[:-1]},
            {"value": record_of(EVE).sign(EVE)},
            {"value": record.sign(ALICE, swarm="lab")},
            {"value": b""},
        ],
    )
    def test_anything_else_is_refused(self, changes: dict[str, Any]) -> None:
        with pytest.raises(RecordRefused):
            self.admit(**changes)

    def test_it_remembers_a_bounded_number(self) -> None:
        gate = RecordGate("public", max_remembered=3)
        for number in range(10):
            record = record_of(load=number / 10)
            gate.admit(key_id(MODELS_KEY), ALICE.peer_id, record.sign(ALICE), self.expiry, NOW)
        assert len(gate._remembered) == 3
