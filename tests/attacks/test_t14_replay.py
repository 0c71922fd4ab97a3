"""T14: signed bytes are said again: to the same and to others, across restarts, around their end.

Every signed kind that exists is here: record, certificate, invite, join, renew, revocations, and a
trace's request and result. What is meant to be shown again (a record, a certificate, an invite, a
list of revocations) must be of no use to another, elsewhere, or later; a request is answered once.

That each attack works where its mechanism is taken out is shown by the tests called
``test_without_...``, which take it out; without them a refusal here could have another cause. The
others were run once with each check in the source taken out, alone, and some test failed for each.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hostile import attack
from soak import count

from glasshive.dht.errors import RecordRefused
from glasshive.dht.records import ModelId, PeerRecord, RecordGate, key_id, keys_of
from glasshive.peer import seen_requests
from glasshive.peer.seen_requests import SeenRequests
from glasshive.security import invite_book, membership
from glasshive.security.durable_file import read_durable, write_durable
from glasshive.security.envelope import CLOCK_SKEW_SECONDS, open_envelope, payload_digest, seal
from glasshive.security.errors import (
    BadEnvelope,
    EnvelopeExpired,
    InviteRefused,
    MembershipRevoked,
    NotAMember,
    Replayed,
    SecurityError,
    StaleRevocations,
    WrongReceiver,
    WrongSender,
    WrongSwarm,
)
from glasshive.security.invite_book import InviteBook
from glasshive.security.invites import (
    REQUEST_SECONDS,
    Invite,
    join_request,
    open_join,
    open_renew,
    renew_request,
)
from glasshive.security.keys import Identity
from glasshive.security.membership import Act, Certificate, Membership, Revocations, Role
from glasshive.security.requests import REQUEST_SECONDS as TRACE_SECONDS
from glasshive.security.requests import PlannedPeer, TraceRequest
from glasshive.security.results import RESULT_SECONDS, TraceResult, Traffic

ISSUER, SECOND, ALICE, EVE = (Identity(bytes([number]) * 32) for number in range(1, 5))
ISSUERS = (ISSUER.peer_id, SECOND.peer_id)
NOW = 1_700_000_000.0
DAY = 86_400.0
AFTER_REQUEST = NOW + REQUEST_SECONDS + CLOCK_SKEW_SECONDS + 1


class Swarm:
    """The issuers' books and one host's membership in a folder; `restart` forgets all but files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.restart()
        self.token = self.book.invite(
            Role.HOST,
            addresses=["/ip4/192.0.2.7/tcp/31330"],
            issuers=ISSUERS,
            whitelist_root=bytes(32),
            now=NOW,
            uses=5,
        )

    def restart(self) -> None:
        self.book = InviteBook(self.folder / "book", ISSUER, "lab")
        self.second = InviteBook(self.folder / "second", SECOND, "lab")
        self.other = InviteBook(self.folder / "other", ISSUER, "other")
        self.seen = SeenRequests(self.folder / "seen", now=NOW)
        place = self.folder / "revocations"
        self.host = Membership(
            "lab",
            ISSUERS,
            kept=read_durable(place, 1 << 24),
            keep=lambda data: write_durable(place, data),
        )

    def join(self, number: int = 1) -> bytes:
        invite = Invite.parse(self.token, NOW)
        return join_request(invite, ALICE, request_id=number.to_bytes(16, "big"), now=NOW)

    def renew(self, certificate: bytes, number: int = 1) -> bytes:
        return renew_request(
            certificate,
            ALICE,
            swarm="lab",
            issuer=ISSUER.peer_id,
            request_id=number.to_bytes(16, "big"),
            now=NOW,
        )


@pytest.fixture
def swarm(tmp_path: Path) -> Swarm:
    return Swarm(tmp_path)


def stay(swarm: Swarm) -> None:
    """The receiver goes on running."""


def restart(swarm: Swarm) -> None:
    """The receiver has only its files."""
    swarm.restart()


then = pytest.mark.parametrize("then", [stay, restart])
Then = Callable[[Swarm], None]


# Requests ---------------------------------------------------------------------------------------


def request_and_answer(
    swarm: Swarm, kind: str
) -> tuple[bytes, Callable[[InviteBook, float], bytes]]:
    """A request that was answered once, and how a book is asked to answer it again."""
    if kind == "join":
        request = swarm.join()
        swarm.book.join(request, NOW)
        return request, lambda book, now: book.join(request, now)
    request = swarm.renew(swarm.book.join(swarm.join(), NOW))
    swarm.book.renew(request, NOW)
    return request, lambda book, now: book.renew(request, now)


@then
@pytest.mark.parametrize("kind", ["join", "renew"])
def test_a_request_is_answered_once(swarm: Swarm, kind: str, then: Then) -> None:
    _, again = request_and_answer(swarm, kind)
    before = swarm.book.members()
    then(swarm)
    for _ in range(3):
        with pytest.raises(Replayed, match="was seen before; send a new one under a new id"):
            again(swarm.book, NOW + 1)
    with pytest.raises(Replayed):  # in the grace for clocks it has not expired
        again(swarm.book, NOW + REQUEST_SECONDS + CLOCK_SKEW_SECONDS)
    for now in (AFTER_REQUEST, NOW + DAY):
        with pytest.raises(EnvelopeExpired):
            again(swarm.book, now)
    assert swarm.book.members() == before


@then
@pytest.mark.parametrize("kind", ["join", "renew"])
def test_others_requests_in_between_dont_make_it_new(swarm: Swarm, kind: str, then: Then) -> None:
    _, again = request_and_answer(swarm, kind)
    for number in range(2, 6):
        swarm.book.join(swarm.join(number), NOW + number)
        swarm.book.enrol(EVE.peer_id, Role.HOST, NOW + number)
        then(swarm)
        with pytest.raises(Replayed):
            again(swarm.book, NOW + number)


@then
@pytest.mark.parametrize("kind", ["join", "renew"])
def test_a_request_is_remembered_for_the_grace_of_clocks(
    swarm: Swarm, kind: str, then: Then
) -> None:
    _, again = request_and_answer(swarm, kind)
    expired = NOW + REQUEST_SECONDS + CLOCK_SKEW_SECONDS / 2
    swarm.book.enrol(EVE.peer_id, Role.HOST, expired)  # so the file is written anew
    then(swarm)
    with pytest.raises(Replayed):
        again(swarm.book, expired + 1)


@then
@pytest.mark.parametrize("kind", ["join", "renew"])
def test_a_request_is_of_no_use_elsewhere(swarm: Swarm, kind: str, then: Then) -> None:
    _, again = request_and_answer(swarm, kind)
    then(swarm)
    with pytest.raises(WrongReceiver):
        again(swarm.second, NOW)
    with pytest.raises(WrongSwarm):
        again(swarm.other, NOW)
    assert swarm.second.members() == swarm.other.members() == ()


@pytest.mark.parametrize("kind", ["join", "renew"])
def test_without_the_memory_a_request_is_answered_twice(
    swarm: Swarm, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(invite_book, "_admit_once", lambda *_: None)
    _, again = request_and_answer(swarm, kind)
    assert again(swarm.book, NOW + 1)


@pytest.mark.parametrize("kind", ["join", "renew"])
def test_without_the_file_a_request_is_answered_again_after_a_restart(
    swarm: Swarm, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = invite_book.decode_state

    def forgetful(*args: Any) -> Any:
        return replace(stock(*args), seen=())

    _, again = request_and_answer(swarm, kind)
    swarm.restart()
    monkeypatch.setattr(invite_book, "decode_state", forgetful)
    assert again(swarm.book, NOW + 1)


@pytest.mark.parametrize("kind", ["join", "renew"])
def test_without_a_receiver_a_request_reaches_another_issuer(swarm: Swarm, kind: str) -> None:
    # Nothing but the receiver in it is wrong there: who reads as its receiver reads it.
    request, _ = request_and_answer(swarm, kind)
    opened: Any = open_join if kind == "join" else open_renew
    assert opened(request, swarm="lab", issuer=ISSUER.peer_id, now=NOW)
    with pytest.raises(WrongReceiver):
        opened(request, swarm="lab", issuer=SECOND.peer_id, now=NOW)


# Certificates -----------------------------------------------------------------------------------


@then
def test_a_certificate_is_of_no_use_to_who_overheard_it(swarm: Swarm, then: Then) -> None:
    data = swarm.book.join(swarm.join(), NOW)
    swarm.host.admit(ALICE.peer_id, data, Act.SERVE, NOW)
    then(swarm)
    for act in Act:
        with pytest.raises(NotAMember, match="got a message to"):
            swarm.host.admit(EVE.peer_id, data, act, NOW)
    with pytest.raises(NotAMember, match="is no certificate of its own"):
        swarm.book.renew(
            renew_request(
                data, EVE, swarm="lab", issuer=ISSUER.peer_id, request_id=bytes(16), now=NOW
            ),
            NOW,
        )
    with pytest.raises(NotAMember, match="for swarm 'lab', this is 'other'"):
        Membership("other", ISSUERS).admit(ALICE.peer_id, data, Act.SERVE, NOW)
    swarm.host.admit(ALICE.peer_id, data, Act.SERVE, NOW)  # its own it stays


@then
def test_a_certificate_that_ended_or_was_revoked_stays_so(swarm: Swarm, then: Then) -> None:
    data = swarm.book.join(swarm.join(), NOW)
    swarm.host.admit(ALICE.peer_id, data, Act.SERVE, NOW)
    then(swarm)
    with pytest.raises(NotAMember, match="expired"):
        swarm.host.admit(ALICE.peer_id, data, Act.SERVE, NOW + 7 * DAY + CLOCK_SKEW_SECONDS + 1)
    swarm.host.admit(ALICE.peer_id, data, Act.SERVE, NOW)
    swarm.host.learn(swarm.book.revoke(NOW, peers=[ALICE.peer_id]))
    then(swarm)
    with pytest.raises(MembershipRevoked):
        swarm.host.admit(ALICE.peer_id, data, Act.SERVE, NOW)
    with pytest.raises(MembershipRevoked):
        swarm.book.renew(swarm.renew(data, 2), NOW)
    with pytest.raises(MembershipRevoked):
        swarm.book.join(swarm.join(2), NOW)


def test_without_a_receiver_a_certificate_admits_who_overheard_it(
    swarm: Swarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    def for_anyone(data: bytes, **how: Any) -> Any:
        if how["kind"] == "certificate":
            how["receiver"] = msgpack.unpackb(msgpack.unpackb(data)[2])[3]
        return open_envelope(data, **how)

    data = swarm.book.join(swarm.join(), NOW)
    monkeypatch.setattr(membership, "open_envelope", for_anyone)
    assert swarm.host.admit(EVE.peer_id, data, Act.SERVE, NOW)


def test_without_the_check_of_time_an_old_certificate_admits(
    swarm: Swarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = swarm.book.join(swarm.join(), NOW)
    monkeypatch.setattr(Certificate, "check_time", lambda self, now: None)
    assert swarm.host.admit(ALICE.peer_id, data, Act.SERVE, NOW + 365 * DAY)


# Revocations ------------------------------------------------------------------------------------


@then
def test_an_old_list_brings_nobody_back(swarm: Swarm, then: Then) -> None:
    data = swarm.book.join(swarm.join(), NOW)
    old = swarm.book.revoke(NOW, peers=[EVE.peer_id])
    new = swarm.book.revoke(NOW + 60, peers=[ALICE.peer_id])
    assert swarm.host.learn(old)
    assert swarm.host.learn(new)
    then(swarm)
    with pytest.raises(StaleRevocations, match="ask for the newest"):
        swarm.host.learn(old)
    assert not swarm.host.learn(new)
    then(swarm)
    with pytest.raises(MembershipRevoked):
        swarm.host.admit(ALICE.peer_id, data, Act.SERVE, NOW)


@then
def test_a_list_is_of_no_use_elsewhere_and_never_lapses(swarm: Swarm, then: Then) -> None:
    listed = swarm.book.revoke(NOW, peers=[ALICE.peer_id])
    swarm.host.learn(listed)
    then(swarm)
    data = swarm.second.enrol(ALICE.peer_id, Role.HOST, NOW + 3650 * DAY)
    with pytest.raises(MembershipRevoked):
        swarm.host.admit(ALICE.peer_id, data, Act.SERVE, NOW + 3650 * DAY)
    with pytest.raises(WrongSwarm):
        Membership("other", ISSUERS).learn(listed)
    with pytest.raises(SecurityError, match="no issuer of swarm 'lab'"):
        Membership("lab", [SECOND.peer_id]).learn(listed)


def test_without_the_kept_lists_an_old_one_brings_back_who_was_revoked(swarm: Swarm) -> None:
    data = swarm.book.join(swarm.join(), NOW)
    old = swarm.book.revoke(NOW, peers=[EVE.peer_id])
    swarm.host.learn(swarm.book.revoke(NOW + 60, peers=[ALICE.peer_id]))
    forgetful = Membership("lab", ISSUERS)
    assert forgetful.learn(old)
    assert forgetful.admit(ALICE.peer_id, data, Act.SERVE, NOW)


# Invites ----------------------------------------------------------------------------------------


@then
def test_a_token_is_of_no_use_when_it_ended_is_used_up_or_revoked(swarm: Swarm, then: Then) -> None:
    once = swarm.book.invite(
        Role.CLIENT,
        addresses=["/ip4/192.0.2.7/tcp/31330"],
        issuers=ISSUERS,
        whitelist_root=bytes(32),
        now=NOW,
    )
    invite = Invite.parse(once, NOW)
    swarm.book.join(join_request(invite, ALICE, request_id=bytes(16), now=NOW), NOW)
    then(swarm)
    with pytest.raises(InviteRefused, match="used up"):
        swarm.book.join(join_request(invite, EVE, request_id=bytes(16), now=NOW), NOW)
    late = NOW + 7 * DAY + CLOCK_SKEW_SECONDS + 1
    with pytest.raises(InviteRefused, match="expired"):
        Invite.parse(swarm.token, late)
    with pytest.raises(InviteRefused, match="expired"):  # who skips that meets it at the issuer
        invite = Invite.parse(swarm.token, NOW)
        swarm.book.join(join_request(invite, EVE, request_id=bytes(16), now=late), late)
    swarm.book.revoke(NOW, invites=[invite.invite_id])
    then(swarm)
    with pytest.raises(InviteRefused, match="revoked"):
        swarm.book.join(join_request(invite, EVE, request_id=bytes(16), now=NOW), NOW)


# Records ----------------------------------------------------------------------------------------

RECORD = PeerRecord(
    model=ModelId("ab" * 32),
    model_name="tiny",
    start=0,
    end=4,
    n_blocks=8,
    dtype="float32",
    backend="cpu",
    attention="sdpa",
    throughput_tokens_per_second=1.0,
    addresses=(),
    whitelist_version=1,
    load=0.0,
    software_version="0.1.0",
    peer_id=ALICE.peer_id,
    expires_at_seconds=NOW + 45,
)


@pytest.mark.parametrize("restarted", [False, True])
def test_a_record_is_of_no_use_elsewhere_for_another_or_later(restarted: bool) -> None:
    data = RECORD.sign(ALICE, swarm="lab")
    here, end = key_id(keys_of(RECORD)[0]), RECORD.expires_at_seconds
    gate = RecordGate("lab")
    assert gate.admit(here, ALICE.peer_id, data, end, NOW) == RECORD
    if restarted:
        gate = RecordGate("lab")
    for key, subkey, expires, text in (
        (here, EVE.peer_id, end, "under the subkey of another"),
        (key_id("glasshive/1/model/other"), ALICE.peer_id, end, "under a key that is not its own"),
        (here, ALICE.peer_id, end + 30, "another expiry than the signed one"),
        (here, ALICE.peer_id, NOW + DAY, "another expiry than the signed one"),
    ):
        with pytest.raises(RecordRefused, match=text):
            gate.admit(key, subkey, data, expires, NOW)
    with pytest.raises(RecordRefused, match="for swarm 'lab', this is 'other'"):
        RecordGate("other").admit(here, ALICE.peer_id, data, end, NOW)
    assert PeerRecord.verify(data, end + CLOCK_SKEW_SECONDS, swarm="lab") == RECORD
    with pytest.raises(RecordRefused, match="expired"):
        PeerRecord.verify(data, end + CLOCK_SKEW_SECONDS + 1, swarm="lab")


# Traces -----------------------------------------------------------------------------------------

HOST, OTHER_HOST = ISSUER, SECOND
PART = b"the bytes of a part"


def trace_of(number: int = 1, client: Identity = ALICE) -> TraceRequest:
    """What the client asks of HOST, in a plan of two."""
    return TraceRequest(
        client=client.peer_id,
        host=HOST.peer_id,
        swarm="lab",
        trace_id=number.to_bytes(16, "big"),
        model_id="ab" * 32,
        dtype="float32",
        peers=(
            PlannedPeer(HOST.peer_id, b"a record"),
            PlannedPeer(OTHER_HOST.peer_id),
        ),
        part_index=0,
        deadline_seconds=300.0,
        part_sha256=hashlib.sha256(PART).digest(),
    )


def take(
    swarm: Swarm,
    data: bytes,
    now: float,
    *,
    by: Identity = ALICE,
    host: Identity = HOST,
    where: str = "lab",
) -> TraceRequest:
    """The request, as a host takes it from a connection of `by`."""
    request, envelope = TraceRequest.verify(
        data, client=by.peer_id, host=host.peer_id, swarm=where, now=now
    )
    swarm.seen.admit(envelope, now)
    return request


@then
def test_a_trace_is_taken_once(swarm: Swarm, then: Then) -> None:
    data = trace_of().sign(ALICE, NOW)
    assert take(swarm, data, NOW) == trace_of()
    then(swarm)
    for later in (0.0, 1.0, TRACE_SECONDS, TRACE_SECONDS + CLOCK_SKEW_SECONDS):
        with pytest.raises(Replayed, match="was seen before; send a new one under a new id"):
            take(swarm, data, NOW + later)
        then(swarm)
    for now in (NOW + TRACE_SECONDS + CLOCK_SKEW_SECONDS + 1, NOW + DAY):
        with pytest.raises(EnvelopeExpired):
            take(swarm, data, now)
        then(swarm)
    assert take(swarm, trace_of(2).sign(ALICE, NOW), NOW)


@then
def test_others_traces_in_between_dont_make_it_new(
    swarm: Swarm, then: Then, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seen_requests, "LEAST_RECORDS", 4)  # so the file is written anew
    data = trace_of().sign(ALICE, NOW)
    take(swarm, data, NOW)
    for number in range(2, 30):
        take(swarm, trace_of(number, EVE).sign(EVE, NOW), NOW, by=EVE)
        then(swarm)
        with pytest.raises(Replayed):
            take(swarm, data, NOW)


@then
def test_a_trace_is_of_no_use_elsewhere_or_to_others(swarm: Swarm, then: Then) -> None:
    data = trace_of().sign(ALICE, NOW)
    take(swarm, data, NOW)
    then(swarm)
    with pytest.raises(WrongSender, match="shows a trace that was signed by"):
        take(swarm, data, NOW, by=EVE)
    with pytest.raises(WrongReceiver):
        take(swarm, data, NOW, host=OTHER_HOST)
    with pytest.raises(WrongSwarm):
        take(swarm, data, NOW, where="other")
    with pytest.raises(BadEnvelope, match="not the one whose hash the client signed"):
        trace_of().check_part(PART + b"!")
    trace_of().check_part(PART)
    early = trace_of(7).sign(ALICE, NOW + CLOCK_SKEW_SECONDS + 1)  # to be kept for later
    with pytest.raises(EnvelopeExpired, match="valid for"):
        take(swarm, early, NOW)


def test_without_the_memory_a_trace_is_taken_twice(swarm: Swarm) -> None:
    data = trace_of().sign(ALICE, NOW)
    for _ in range(2):
        swarm.seen = SeenRequests()
        assert take(swarm, data, NOW)


def test_without_the_file_a_trace_is_taken_again_after_a_restart(swarm: Swarm) -> None:
    data = trace_of().sign(ALICE, NOW)
    take(swarm, data, NOW)
    (swarm.folder / "seen").unlink()
    swarm.restart()
    assert take(swarm, data, NOW)


def result_of(request: TraceRequest, signed: bytes, saves: bytes = b"7" * 32) -> TraceResult:
    return TraceResult(
        request=request,
        request_sha256=payload_digest(signed),
        saves_sha256=saves,
        compute_seconds=0.25,
        wait_seconds=0.5,
        wire_seconds=0.125,
        traffic=(Traffic(1, 100, 8),),
    )


def test_a_result_is_of_no_use_for_another_trace_or_later() -> None:
    signed = trace_of().sign(ALICE, NOW)
    data = result_of(trace_of(), signed).sign(HOST, NOW)
    stock: dict[str, Any] = {
        "request": trace_of(),
        "request_sha256": payload_digest(signed),
        "saves_sha256": b"7" * 32,
        "now": NOW,
    }
    for _ in range(2):  # the same stream's, whoever says it again
        assert TraceResult.verify(data, **stock) == result_of(trace_of(), signed)
    again = trace_of().sign(ALICE, NOW + 1)  # of the same id
    hers, there = trace_of(1, EVE), replace(trace_of(), host=OTHER_HOST.peer_id, part_index=1)
    for changes, error, text in (
        ({"request": trace_of(2)}, BadEnvelope, "of trace 0000.*1; wanted .* of trace 0000.*2$"),
        ({"request": hers}, WrongReceiver, "got a message to"),
        ({"request": there}, BadEnvelope, "a result by"),
        ({"request": replace(trace_of(), swarm="other")}, WrongSwarm, "this is 'other'"),
        ({"request_sha256": payload_digest(again)}, BadEnvelope, "for another request than the"),
        ({"saves_sha256": b"8" * 32}, BadEnvelope, "the saves that came are not those whose hash"),
        ({"now": NOW + RESULT_SECONDS + CLOCK_SKEW_SECONDS + 1}, EnvelopeExpired, "expired"),
        ({"now": NOW - CLOCK_SKEW_SECONDS - 1}, EnvelopeExpired, "valid for"),
    ):
        with pytest.raises(error, match=text):
            TraceResult.verify(data, **(stock | changes))


@pytest.mark.parametrize("kind", ["trace", "result"])
def test_what_was_changed_says_what_was_signed_or_is_refused(kind: str) -> None:
    """The bytes around a signed payload may be written otherwise; what they say may not."""
    signed = trace_of().sign(ALICE, NOW)
    known = {"trace": trace_of(), "result": result_of(trace_of(), signed)}

    def read(data: bytes) -> None:
        if kind == "trace":
            got: object = TraceRequest.verify(
                data, client=ALICE.peer_id, host=HOST.peer_id, swarm="lab", now=NOW
            )[0]
        else:
            got = TraceResult.verify(
                data,
                request=trace_of(),
                request_sha256=payload_digest(signed),
                saves_sha256=b"7" * 32,
                now=NOW,
            )
        assert got == known[kind]

    data = signed if kind == "trace" else known["result"].sign(HOST, NOW)  # type: ignore[union-attr]
    attack(read, [data], SecurityError, tries=count(2_000, 1_000_000))


# Of one kind as another -------------------------------------------------------------------------


def test_no_kind_is_taken_for_another(swarm: Swarm) -> None:
    certificate = swarm.book.join(swarm.join(), NOW)
    token = Invite.parse(swarm.token, NOW)
    asked = trace_of().sign(ALICE, NOW)
    said = {
        "record": RECORD.sign(ALICE, swarm="lab"),
        "certificate": certificate,
        "invite": swarm.token,
        "join": swarm.join(7),
        "renew": swarm.renew(certificate, 8),
        "revocations": Revocations(issuer=ISSUER.peer_id, swarm="lab", version=9).sign(ISSUER),
        "trace": asked,
        "result": result_of(trace_of(), asked).sign(HOST, NOW),
    }
    readers: dict[str, Callable[[Any], object]] = {
        "record": lambda data: PeerRecord.verify(data, NOW, swarm="lab"),
        "certificate": lambda data: swarm.host.admit(ALICE.peer_id, data, Act.SERVE, NOW),
        "invite": lambda data: Invite.parse(
            data if isinstance(data, str) else data.decode("latin-1"), NOW
        ),
        "join": lambda data: swarm.book.join(data, NOW),
        "renew": lambda data: swarm.book.renew(data, NOW),
        "revocations": lambda data: swarm.host.learn(data),
        "trace": lambda data: TraceRequest.verify(
            data, client=ALICE.peer_id, host=HOST.peer_id, swarm="lab", now=NOW
        ),
        "result": lambda data: TraceResult.verify(
            data,
            request=trace_of(),
            request_sha256=payload_digest(asked),
            saves_sha256=b"7" * 32,
            now=NOW,
        ),
    }
    assert token.role is Role.HOST
    for kind, other in itertools.product(said, readers):
        data: Any = said[kind]
        if isinstance(data, str) and other != "invite":
            data = data.encode()
        if kind == other:
            assert readers[other](data)
        else:
            with pytest.raises((SecurityError, RecordRefused)):
                readers[other](data)
    # The kind alone stands in the way, where the same is signed by the same under another one.
    for kind in sorted(readers.keys() - {"invite"}):
        fresh = {"join": swarm.join(9), "renew": swarm.renew(certificate, 10)}.get(kind, said[kind])
        with pytest.raises((SecurityError, RecordRefused), match="got a signed 'other', wanted"):
            readers[kind](relabelled(fresh, "other"))
        assert readers[kind](relabelled(fresh, None)) is not None


def relabelled(data: Any, kind: str | None) -> bytes:
    """What `data` says, signed again by its sender, as another kind if one is given."""
    stock, swarm, sender, receiver, request_id, expires_at, body = msgpack.unpackb(
        msgpack.unpackb(data)[2]
    )
    return seal(
        {one.peer_id: one for one in (ISSUER, ALICE)}[sender],
        kind=kind or stock,
        swarm=swarm,
        receiver=receiver or None,
        request_id=request_id,
        expires_at_seconds=expires_at / 1000,
        body=body,
    )
