"""A client's signed request and a host's signed result: what they say, bind and refuse."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
from typing import Any

import pytest
from hostile import attack, fuzzed, like
from hypothesis import given
from soak import count

from glasshive.security.envelope import CLOCK_SKEW_SECONDS, payload_digest, seal
from glasshive.security.errors import (
    BadEnvelope,
    BadSignature,
    EnvelopeExpired,
    SecurityError,
    WrongReceiver,
    WrongSender,
    WrongSwarm,
)
from glasshive.security.keys import Identity
from glasshive.security.plain import decode_plain, encode_plain
from glasshive.security.requests import (
    MAX_PEERS,
    MAX_RECORD_BYTES,
    REQUEST_SECONDS,
    PlannedPeer,
    TraceRequest,
)
from glasshive.security.results import RESULT_SECONDS, SavesDigest, TraceResult, Traffic

CLIENT, HOST, OTHER = (Identity(bytes([number]) * 32) for number in range(1, 4))
NOW = 1_700_000_000.0
PART = b"the bytes of a part"
FIELDS: dict[str, Any] = {
    "client": CLIENT.peer_id,
    "host": HOST.peer_id,
    "swarm": "lab",
    "trace_id": b"t" * 16,
    "model_id": "ab" * 32,
    "dtype": "float32",
    "peers": (PlannedPeer(OTHER.peer_id), PlannedPeer(HOST.peer_id, b"a record")),
    "part_index": 1,
    "deadline_seconds": 300.0,
    "part_sha256": hashlib.sha256(PART).digest(),
    "revision": 0,
    "relayed": (),
}
REQUEST = TraceRequest(**FIELDS)
SIGNED = REQUEST.sign(CLIENT, NOW)
RESULT = TraceResult(
    request=REQUEST,
    request_sha256=payload_digest(SIGNED),
    saves_sha256=b"s" * 32,
    compute_seconds=0.25,
    wait_seconds=0.5,
    wire_seconds=0.125,
    traffic=(Traffic(0, 100, 8), Traffic(3, 0, 1 << 40)),
)


def read(data: bytes, **changes: Any) -> TraceRequest:
    known = {"client": CLIENT.peer_id, "host": HOST.peer_id, "swarm": "lab", "now": NOW}
    return TraceRequest.verify(data, **(known | changes))[0]


def read_result(data: bytes, **changes: Any) -> TraceResult:
    known: dict[str, Any] = {
        "request": REQUEST,
        "request_sha256": payload_digest(SIGNED),
        "saves_sha256": b"s" * 32,
        "now": NOW,
    }
    return TraceResult.verify(data, **(known | changes))


# Requests ---------------------------------------------------------------------------------------


def test_a_request_says_what_was_signed() -> None:
    assert read(SIGNED) == REQUEST
    request, envelope = TraceRequest.verify(
        SIGNED, client=CLIENT.peer_id, host=HOST.peer_id, swarm="lab", now=NOW
    )
    assert (envelope.sender, envelope.request_id) == (request.client, request.trace_id)
    assert envelope.expires_at_seconds == NOW + REQUEST_SECONDS
    request.check_part(bytearray(PART))
    with pytest.raises(BadEnvelope, match=r"a part of 20 bytes that is not the one whose hash"):
        request.check_part(PART + b"!")


def test_a_request_lives_no_longer_than_its_trace() -> None:
    short = dataclasses.replace(REQUEST, deadline_seconds=2.5).sign(CLIENT, NOW)
    read(short, now=NOW + 2.5 + CLOCK_SKEW_SECONDS)
    for data, seconds in ((short, 2.5), (SIGNED, REQUEST_SECONDS)):
        with pytest.raises(EnvelopeExpired, match=r"the trace expired .* ago"):
            read(data, now=NOW + seconds + CLOCK_SKEW_SECONDS + 0.1)
    with pytest.raises(EnvelopeExpired, match="at most 60 s are accepted"):
        read(SIGNED, now=NOW - CLOCK_SKEW_SECONDS - 0.1)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"client": OTHER.peer_id}, WrongSender),
        ({"host": OTHER.peer_id}, WrongReceiver),
        ({"swarm": "public"}, WrongSwarm),
    ],
)
def test_a_request_is_for_one_host_of_one_swarm_and_by_its_sender(
    changes: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        read(SIGNED, **changes)


def test_only_the_client_signs_its_request_and_only_the_host_its_result() -> None:
    with pytest.raises(BadEnvelope, match="a client signs its own only"):
        REQUEST.sign(OTHER, NOW)
    with pytest.raises(BadEnvelope, match="a host signs its own only"):
        RESULT.sign(OTHER, NOW)


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("trace_id", b"t" * 15, "the id of a trace is not 16 bytes"),
        ("trace_id", "t" * 16, "the id of a trace is not 16 bytes"),
        ("model_id", "", "the model id of a trace is not text of 1 to 128"),
        ("model_id", "a" * 129, "the model id of a trace is not text of 1 to 128"),
        ("dtype", 7, "the dtype of a trace is not text of 1 to 128"),
        ("peers", (), "a plan of 0 peers, wanted 1 to 256"),
        ("peers", (PlannedPeer(HOST.peer_id),) * (MAX_PEERS + 1), "a plan of 257 peers"),
        ("peers", (PlannedPeer("p"), PlannedPeer(HOST.peer_id)), "a peer of the plan: p is not"),  # type: ignore[arg-type]
        ("peers", (PlannedPeer(OTHER.peer_id, bytes(MAX_RECORD_BYTES + 1)),
                   PlannedPeer(HOST.peer_id)), "in the plan is not bytes, at most 1536"),
        ("peers", (PlannedPeer(OTHER.peer_id, "text"), PlannedPeer(HOST.peer_id)),  # type: ignore[arg-type]
         "in the plan is not bytes|is not an array of id and record"),
        ("part_index", 2, "a plan of 2 peers has no part 2"),
        ("part_index", -1, "a plan of 2 peers has no part -1"),
        ("part_index", True, "a plan of 2 peers has no part True"),
        ("part_index", 0, f"the plan gives part 0 to {OTHER.peer_id}, not to {HOST.peer_id}"),
        ("deadline_seconds", math.nan, "the deadline is not 0 to 1000000 seconds"),
        ("deadline_seconds", -1.0, "the deadline is not 0 to 1000000 seconds"),
        ("deadline_seconds", 30, "the deadline is not 0 to 1000000 seconds"),
        ("part_sha256", b"p" * 31, "the hash of the part is not 32 bytes"),
        ("revision", -1, "the revision of a trace is not 0 to 64"),
        ("revision", 65, "the revision of a trace is not 0 to 64"),
        ("revision", True, "the revision of a trace is not 0 to 64"),
        ("relayed", (1,), "the relayed parts are not other parts of the plan, in their order"),
        ("relayed", (2,), "the relayed parts are not other parts of the plan, in their order"),
        ("relayed", (-1,), "the relayed parts are not other parts of the plan, in their order"),
        ("relayed", (0, 0), "the relayed parts are not other parts of the plan, in their order"),
        ("relayed", (False,), "the relayed parts are not other parts of the plan, in their order"),
        ("relayed", ("0",), "the relayed parts are not other parts of the plan, in their order"),
        ("relayed", 0, "the relayed parts are not other parts of the plan, in their order"),
    ],
)  # fmt: skip
def test_no_field_is_out_of_range(field: str, value: Any, text: str) -> None:
    """Neither where a request is made, nor where one is read that some other client signed."""
    changed = FIELDS | {field: value}
    with pytest.raises(BadEnvelope, match=text):
        TraceRequest(**changed)
    peers = [[one.peer_id, one.record] for one in changed["peers"]]
    body = [4, changed["model_id"], changed["dtype"], peers]
    names = ("part_index", "deadline_seconds", "part_sha256", "revision", "relayed")
    body += [changed[name] for name in names]
    if field == "trace_id" and type(value) is str:
        return  # an envelope holds no such id
    with pytest.raises(BadEnvelope, match=text):
        read(sealed("trace", body, request_id=changed["trace_id"]))


def sealed(kind: str, body: object, request_id: bytes = b"t" * 16) -> bytes:
    """An envelope of this kind from the client to the host, or back."""
    sender, receiver = (CLIENT, HOST) if kind == "trace" else (HOST, CLIENT)
    return seal(
        sender,
        kind=kind,
        swarm="lab",
        receiver=receiver.peer_id,
        request_id=request_id,
        expires_at_seconds=NOW + 30,
        body=body if isinstance(body, bytes) else encode_plain(body),
    )


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",
        [],
        [1] * 6,
        [3, "m", "d", [], 0, 1.0, bytes(32), 0],
        [4, "m", "d", [], 0, 1.0, bytes(32), 0],
        [5, "m", "d", [], 0, 1.0, bytes(32), 0, []],
        [True, "m", "d", [], 0, 1.0, bytes(32), 0, []],
    ],
)
@pytest.mark.parametrize("kind", ["trace", "result"])
def test_another_body_is_refused(kind: str, body: object) -> None:
    with pytest.raises(BadEnvelope, match=r"can't be read|one side needs another release"):
        (read if kind == "trace" else read_result)(sealed(kind, body))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"revision": 3}, "revision 3 of a trace whose revision 3 is in force"),
        ({"revision": 2}, "revision 2 of a trace whose revision 3 is in force"),
        ({"model_id": "cd" * 32}, "and nothing else"),
        ({"dtype": "float16"}, "and nothing else"),
        ({"trace_id": b"u" * 16}, "and nothing else"),
        ({"part_sha256": bytes(32)}, "and nothing else"),
        ({"peers": (*FIELDS["peers"], PlannedPeer(OTHER.peer_id))}, "and nothing else"),
        (
            {"peers": FIELDS["peers"][::-1], "part_index": 0},
            "the plan gives part 1 to|nothing else",
        ),
    ],
)
def test_a_revision_names_other_peers_or_what_is_relayed_and_nothing_else(
    changes: dict[str, Any], text: str
) -> None:
    before = TraceRequest(**FIELDS | {"revision": 3})
    others = (PlannedPeer(CLIENT.peer_id, b"r"), PlannedPeer(HOST.peer_id))
    changed = {"revision": 4, "peers": others, "deadline_seconds": 7.0, "relayed": (0,)}
    after = TraceRequest(**FIELDS | changed)
    assert read(after.sign(CLIENT, NOW)) == after
    after.check_revises(before)
    with pytest.raises(BadEnvelope, match=text):
        TraceRequest(**FIELDS | {"revision": 4} | changes).check_revises(before)


def test_a_request_of_the_release_before_is_told_which_version_is_wanted() -> None:
    """Its peers were ids; whatever they are, the number comes first."""
    for peers in ([CLIENT.peer_id, HOST.peer_id], [[CLIENT.peer_id, b""], [HOST.peer_id, b""]]):
        with pytest.raises(BadEnvelope) as caught:
            read(sealed("trace", [1, "ab" * 32, "float32", peers, 1, 30.0, bytes(32)]))
        assert str(caught.value) == (
            "not a trace's request of version 4; one side needs another release of glasshive"
        )


def test_the_largest_plan_fits() -> None:
    keys = [Identity(number.to_bytes(32, "big")).peer_id for number in range(1, MAX_PEERS)]
    far = tuple(PlannedPeer(key, bytes(MAX_RECORD_BYTES)) for key in keys)
    request = dataclasses.replace(
        REQUEST,
        peers=(*far, PlannedPeer(HOST.peer_id)),
        part_index=255,
        relayed=tuple(range(MAX_PEERS - 1)),
    )
    assert read(request.sign(CLIENT, NOW)) == request


# Results ----------------------------------------------------------------------------------------


def test_a_result_says_what_was_signed() -> None:
    data = RESULT.sign(HOST, NOW)
    assert read_result(data) == RESULT
    assert not read_result(data).audited
    read_result(data, now=NOW + RESULT_SECONDS + CLOCK_SKEW_SECONDS)
    with pytest.raises(EnvelopeExpired):
        read_result(data, now=NOW + RESULT_SECONDS + CLOCK_SKEW_SECONDS + 0.1)
    with pytest.raises(BadEnvelope, match="are not those whose hash the result signs"):
        read_result(data, saves_sha256=b"S" * 32)
    with pytest.raises(BadEnvelope, match="for another request than the one that was sent"):
        read_result(data, request_sha256=payload_digest(REQUEST.sign(CLIENT, NOW + 1)))


@pytest.mark.parametrize(
    ("place", "value", "text"),
    [
        (1, 0, "a result of part 0; wanted part 1"),
        (1, True, "a result of part True; wanted part 1"),
        (2, b"", "a hash in the result is not 32 bytes"),
        (3, 7, "a hash in the result is not 32 bytes"),
        (4, math.nan, "the compute time is not 0 to 1000000 seconds"),
        (4, 1, "the compute time is not 0 to 1000000 seconds"),
        (5, math.nan, "the wait time is not 0 to 1000000 seconds"),
        (5, -0.5, "the wait time is not 0 to 1000000 seconds"),
        (6, math.inf, "the wire time is not 0 to 1000000 seconds"),
        (6, 0, "the wire time is not 0 to 1000000 seconds"),
        (7, [[1, 2]], "traffic that is not an array of part, hidden and carried bytes"),
        (7, [[1, 2, -1]], "the traffic is not that to at most 256 parts, in bytes"),
        (7, [[0, 0, 0]] * 257, "the traffic is not that to at most 256 parts, in bytes"),
        (8, True, "a result that says it is audited"),
        (8, 0, "a result that says it is audited"),
    ],
)
def test_no_field_of_a_result_is_out_of_range(place: int, value: Any, text: str) -> None:
    times = [0.25, 0.5, 0.125]
    body: list[Any] = [2, 1, b"s" * 32, payload_digest(SIGNED), *times, [[0, 100, 8]], False]
    read_result(sealed("result", body))
    body[place] = value
    with pytest.raises(BadEnvelope, match=text):
        read_result(sealed("result", body))


def test_a_result_without_the_times_of_waiting_is_refused() -> None:
    """Version 1 had none."""
    body = [1, 1, b"s" * 32, payload_digest(SIGNED), 0.25, [[0, 100, 8]], False]
    for version in (1, 2):
        with pytest.raises(BadEnvelope, match="not a result of version 2; one side needs another"):
            read_result(sealed("result", [version, *body[1:]]))


def test_the_hash_of_saves_tells_names_shapes_order_and_bytes_apart() -> None:
    def digest(*saves: tuple[str, str, list[int], bytes]) -> bytes:
        whole = SavesDigest()
        for name, dtype, shape, data in saves:
            whole.begin(name, dtype, shape)
            for start in range(0, len(data), 3):  # in slices of any size
                whole.update(data[start : start + 3])
        return whole.digest()

    one, two = ("a", "int8", [4], b"1234"), ("b", "int8", [4], b"5678")
    different = [
        (),
        (one,),
        (one, two),
        (two, one),
        (("b", *one[1:]), ("a", *two[1:])),
        (("a", "uint8", [4], b"1234"), two),
        (("a", "int8", [2, 2], b"1234"), two),
        (("a", "int8", [4], b"1235"), two),
        (("a", "int8", [8], b"12345678"),),
    ]
    for first, second in itertools.combinations(different, 2):
        assert digest(*first) != digest(*second)
    plain = hashlib.sha256(encode_plain(["a", "int8", [4]]) + b"1234")
    assert digest(one) == plain.digest()


# Hostile bytes ----------------------------------------------------------------------------------


def test_the_digest_names_the_payload_and_not_the_bytes_around_it() -> None:
    version, sender, payload, signature = decode_plain(SIGNED)  # type: ignore[misc]
    longer = b"\xdc\x00\x04" + b"".join(map(encode_plain, (version, sender, payload, signature)))
    assert longer != SIGNED
    assert read(longer) == REQUEST
    assert payload_digest(longer) == payload_digest(SIGNED) == hashlib.sha256(payload).digest()  # type: ignore[arg-type]


def test_a_forged_signature_is_refused() -> None:
    forged = bytearray(SIGNED)
    forged[-1] ^= 1
    with pytest.raises(BadSignature):
        read(bytes(forged))


@pytest.mark.parametrize("kind", ["trace", "result"])
def test_any_signed_body_is_read_or_refused(kind: str) -> None:
    """Whoever has a key can sign anything: what is inside is as hostile as what is around it."""
    data = SIGNED if kind == "trace" else RESULT.sign(HOST, NOW)
    body = decode_plain(decode_plain(data)[2])[6]  # type: ignore[index]
    reader = read if kind == "trace" else read_result
    attack(
        lambda bytes_: reader(sealed(kind, bytes_)),
        [body],  # type: ignore[list-item]
        SecurityError,
        tries=count(5_000, 1_000_000),
    )


@fuzzed
@given(like(SIGNED, RESULT.sign(HOST, NOW)))
def test_any_bytes_are_refused(data: bytes) -> None:
    for reader, known in ((read, REQUEST), (read_result, RESULT)):
        try:
            assert reader(data) == known  # type: ignore[operator]
        except SecurityError:
            continue
