"""Certificates and revocations of a private swarm: who is let in to do what, and until when."""

import contextlib
import dataclasses
import itertools
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hostile import attack, fuzzed, like
from hypothesis import given
from soak import count

from glasshive.security import envelope as envelope_module
from glasshive.security.durable_file import read_durable, write_durable
from glasshive.security.envelope import CLOCK_SKEW_SECONDS, seal
from glasshive.security.errors import (
    BadEnvelope,
    BadSignature,
    MembershipRevoked,
    NotAMember,
    RoleRefused,
    SecurityError,
    StaleRevocations,
    WrongReceiver,
    WrongSwarm,
)
from glasshive.security.keys import Identity, PeerId, public_key_of
from glasshive.security.membership import (
    MAX_CERTIFICATE_BYTES,
    MAX_CERTIFICATE_SECONDS,
    MAX_ISSUERS,
    MAX_LIST_BYTES,
    MAX_REVOKED,
    Act,
    Certificate,
    Membership,
    Revocations,
    Role,
)
from glasshive.security.quota import MAX_QUOTA, Quota

ISSUER, SECOND, ALICE, BOB, EVE = (Identity(bytes([number]) * 32) for number in range(1, 6))
NOW = 1_700_000_000.0
HOUR = 3600.0
SERIAL, INVITE = b"s" * 16, b"i" * 16


def certificate_of(**changes: Any) -> Certificate:
    fields: dict[str, Any] = {
        "issuer": ISSUER.peer_id,
        "member": ALICE.peer_id,
        "role": Role.HOST,
        "swarm": "lab",
        "serial": SERIAL,
        "invite": INVITE,
        "expires_at_seconds": NOW + HOUR,
    }
    return Certificate(**(fields | changes))


def signed(**changes: Any) -> bytes:
    return certificate_of(**changes).sign(ISSUER)


def membership(**changes: Any) -> Membership:
    return Membership("lab", [ISSUER.peer_id, SECOND.peer_id], **changes)


def revocations(version: int = 1, by: Identity = ISSUER, **revoked: Any) -> bytes:
    fields = {what: frozenset(which) for what, which in revoked.items()}
    return Revocations(issuer=by.peer_id, swarm="lab", version=version, **fields).sign(by)


def admitted(data: bytes, act: Act = Act.SERVE, now: float = NOW) -> Certificate:
    return membership().admit(ALICE.peer_id, data, act, now)


# Certificates -----------------------------------------------------------------------------------


def test_a_certificate_says_what_was_signed() -> None:
    for certificate in (
        certificate_of(),
        certificate_of(invite=b"", role=Role.ADMIN),
        certificate_of(quota=Quota(traces=0)),
        certificate_of(quota=Quota(3, 600, 10**10)),
    ):
        assert admitted(certificate.sign(ISSUER)) == certificate


def test_the_longest_certificate_is_not_too_long() -> None:
    longest = certificate_of(
        swarm="l" * 64, role=Role.CLIENT, quota=Quota(MAX_QUOTA, MAX_QUOTA, MAX_QUOTA)
    ).sign(ISSUER)
    assert len(longest) <= MAX_CERTIFICATE_BYTES
    members = Membership("l" * 64, [ISSUER.peer_id])
    assert members.admit(ALICE.peer_id, longest, Act.TRACE, NOW).quota.traces == MAX_QUOTA


@pytest.mark.parametrize("number", [-1, MAX_QUOTA + 1, 1.0, True, "1", b"1", [1]])
@pytest.mark.parametrize("name", ["traces", "seconds_a_day", "saved_bytes_a_day"])
def test_a_quota_is_of_whole_numbers(name: str, number: Any) -> None:
    with pytest.raises(BadEnvelope, match=rf"the quota {name} is not a whole number of 0 to"):
        Quota(**{name: number})


def test_a_quota_is_said_in_words() -> None:
    assert Quota().describe() == "no limit"
    assert Quota(2, 3600, 10**10).describe() == (
        "2 traces at a time, 3,600 s a day, 10,000,000,000 saved bytes a day"
    )


def test_the_signature_is_the_issuers_over_member_role_serial_and_end() -> None:
    _, sender, payload, _ = msgpack.unpackb(signed())
    assert sender == ISSUER.peer_id
    *bound, body = msgpack.unpackb(payload)
    end = int((NOW + HOUR) * 1000)
    assert bound == ["certificate", "lab", ISSUER.peer_id, ALICE.peer_id, SERIAL, end]
    assert msgpack.unpackb(body) == [1, "host", INVITE, None, None, None]
    with_quota = msgpack.unpackb(signed(quota=Quota(1, None, 3)))[2]
    assert msgpack.unpackb(msgpack.unpackb(with_quota)[-1]) == [1, "host", INVITE, 1, None, 3]


# The oracle of roles is this table, written by hand.
PERMITTED = {
    ("client", "read records"),
    ("client", "run traces"),
    ("host", "read records"),
    ("host", "serve"),
    ("host", "announce a span"),
    ("admin", "read records"),
    ("admin", "run traces"),
    ("admin", "serve"),
    ("admin", "announce a span"),
    ("admin", "administer the swarm"),
}


@pytest.mark.parametrize(("role", "act"), list(itertools.product(Role, Act)))
def test_a_role_permits_its_acts_and_no_others(role: Role, act: Act) -> None:
    data = signed(role=role)
    if (role.value, act.value) in PERMITTED:
        assert admitted(data, act).role is role
    else:
        with pytest.raises(RoleRefused):
            admitted(data, act)


def test_a_refused_role_is_told_which_one_may() -> None:
    with pytest.raises(RoleRefused) as caught:
        admitted(signed(role=Role.CLIENT), Act.ANNOUNCE)
    assert str(caught.value) == (
        f"{ALICE.peer_id} is a client of swarm 'lab' and may not announce a span; wanted host or "
        "admin, ask an issuer for an invite with that role"
    )


def test_it_is_of_who_presents_it_only() -> None:
    with pytest.raises(NotAMember, match=f"what {EVE.peer_id} showed .* got a message to"):
        membership().admit(EVE.peer_id, signed(), Act.SERVE, NOW)
    members = membership()
    members.admit(ALICE.peer_id, signed(), Act.SERVE, NOW)  # and now it is remembered
    with pytest.raises(NotAMember):
        members.admit(EVE.peer_id, signed(), Act.SERVE, NOW)


def test_only_an_issuer_of_this_swarm_makes_members() -> None:
    with pytest.raises(NotAMember, match=f"is by {EVE.peer_id}, who is no issuer of swarm 'lab'"):
        admitted(certificate_of(issuer=EVE.peer_id).sign(EVE))
    with pytest.raises(NotAMember, match="for swarm 'other', this is 'lab'"):
        admitted(signed(swarm="other"))
    with pytest.raises(NotAMember, match="no issuer"):
        Membership("lab", []).admit(ALICE.peer_id, signed(), Act.SERVE, NOW)
    member = certificate_of().sign(ISSUER)  # a member's own word makes no member: no chains
    assert admitted(member).role is Role.HOST
    with pytest.raises(NotAMember):
        membership().admit(
            BOB.peer_id,
            certificate_of(issuer=ALICE.peer_id, member=BOB.peer_id).sign(ALICE),
            Act.SERVE,
            NOW,
        )


def test_what_is_too_long_for_a_certificate_is_not_looked_at() -> None:
    with pytest.raises(NotAMember, match="showed 600 bytes as a certificate, one has at most 512"):
        admitted(signed() + bytes(600 - len(signed())))


def test_who_shows_nothing_is_told_to_join() -> None:
    with pytest.raises(NotAMember) as caught:
        admitted(b"")
    assert str(caught.value) == (
        f"{ALICE.peer_id} showed no certificate of the private swarm 'lab'; "
        "join with an invite (`glasshive join TOKEN`)"
    )


def test_it_ends_and_may_not_last_for_too_long() -> None:
    end = NOW + HOUR
    admitted(signed(), now=end + CLOCK_SKEW_SECONDS)
    with pytest.raises(NotAMember, match="expired 11 s ago; join again"):
        admitted(signed(), now=end + CLOCK_SKEW_SECONDS + 1)
    longest = NOW + MAX_CERTIFICATE_SECONDS
    # A new one lives for the longest, and whoever judges it may have a clock that is behind.
    admitted(signed(expires_at_seconds=longest + HOUR))
    with pytest.raises(NotAMember, match="at most 604800 s are accepted"):
        admitted(signed(expires_at_seconds=longest + HOUR + 1))


def test_a_remembered_certificate_still_ends() -> None:
    members = membership()
    members.admit(ALICE.peer_id, signed(), Act.SERVE, NOW)
    with pytest.raises(NotAMember, match="expired"):
        members.admit(ALICE.peer_id, signed(), Act.SERVE, NOW + 2 * HOUR)


def test_a_signature_is_checked_once_and_the_memory_is_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checked: list[str] = []
    real = envelope_module.verify

    def counted(peer_id: str, data: bytes, signature: bytes) -> None:
        checked.append(peer_id)
        real(peer_id, data, signature)

    monkeypatch.setattr(envelope_module, "verify", counted)
    members = membership(max_remembered=2)
    several = [signed(serial=bytes([number]) * 16) for number in range(3)]
    for data in (several[0], several[0], several[1], several[0]):
        members.admit(ALICE.peer_id, data, Act.SERVE, NOW)
    assert len(checked) == 2
    for data in (several[2], several[0], several[1]):  # the third put out the second
        members.admit(ALICE.peer_id, data, Act.SERVE, NOW)
    assert len(checked) == 4


@pytest.mark.parametrize(
    "changes",
    [
        {"serial": b"short"},
        {"serial": "s" * 16},
        {"invite": b"x"},
        {"role": "host"},
        {"member": PeerId("nobody")},
        {"issuer": PeerId("nobody")},
        {"swarm": ""},
        {"swarm": "s" * 65},
        {"expires_at_seconds": -1.0},
    ],
)
def test_no_certificate_is_made_with_a_field_out_of_range(changes: dict[str, Any]) -> None:
    with pytest.raises(BadEnvelope):
        certificate_of(**changes).sign(ISSUER)


def test_an_issuer_signs_its_own_only() -> None:
    with pytest.raises(BadEnvelope, match="an issuer signs its own only"):
        certificate_of().sign(EVE)
    with pytest.raises(BadEnvelope, match="an issuer signs its own only"):
        Revocations(issuer=ISSUER.peer_id, swarm="lab", version=1).sign(EVE)


def with_body(body: object, **changes: Any) -> bytes:
    return with_bytes(msgpack.packb(body), **changes)


def with_bytes(body: bytes, **changes: Any) -> bytes:
    fields: dict[str, Any] = {
        "kind": "certificate",
        "swarm": "lab",
        "receiver": ALICE.peer_id,
        "request_id": SERIAL,
        "expires_at_seconds": NOW + HOUR,
        "body": body,
    }
    return seal(ISSUER, **(fields | changes))


BODY: list[Any] = [1, "host", INVITE, None, None, None]


@pytest.mark.parametrize(
    "data",
    [
        with_body(BODY, kind="peer-record"),
        with_body(BODY, receiver=None),
        with_body(BODY, request_id=b""),
        with_body([2, *BODY[1:]]),
        with_body([True, *BODY[1:]]),
        with_body([1, "root", *BODY[2:]]),
        with_body([1, b"host", *BODY[2:]]),
        with_body([1, "host", "i" * 16, *BODY[3:]]),
        with_body([*BODY, 0]),
        with_body(BODY[:5]),
        with_body(BODY[:3]),
        with_body([1, "host"]),
        with_body([*BODY[:3], -1, None, None]),
        with_body([*BODY[:3], None, 1.0, None]),
        with_body([*BODY[:3], None, None, True]),
        with_body([*BODY[:3], None, None, 1 << 53]),
        with_body([*BODY[:3], None, None, [1]]),
        with_body({"role": "host"}),
        with_body([1, ["host"], *BODY[2:]]),
        b"\xc0",
        b"x" * (MAX_CERTIFICATE_BYTES + 1),
    ],
)
def test_what_an_issuer_didnt_mean_as_a_certificate_is_none(data: bytes) -> None:
    with pytest.raises(NotAMember):
        admitted(data, Act.READ)
    admitted(with_body(BODY), Act.READ)


# Revocations ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("revoked", "what", "key"),
    [
        ({"peers": [ALICE.peer_id]}, "its key", "another"),
        ({"peers": [ISSUER.peer_id]}, f"its issuer {ISSUER.peer_id}", "this"),
        ({"serials": [SERIAL]}, f"the certificate {SERIAL.hex()}", "this"),
        ({"invites": [INVITE]}, f"its invite {INVITE.hex()}", "this"),
    ],
)
@pytest.mark.parametrize("by", [ISSUER, SECOND])
def test_any_issuer_takes_back_a_member_a_certificate_an_invite_or_an_issuer(
    by: Identity, revoked: dict[str, Any], what: str, key: str
) -> None:
    members = membership()
    members.admit(ALICE.peer_id, signed(), Act.SERVE, NOW)
    assert members.learn(revocations(by=by, **revoked))
    with pytest.raises(MembershipRevoked) as caught:
        members.admit(ALICE.peer_id, signed(), Act.SERVE, NOW)
    assert str(caught.value) == (
        f"the certificate of {ALICE.peer_id} for swarm 'lab' doesn't hold any more: "
        f"{what} was revoked; ask who runs the swarm to invite {key} key"
    )
    other = certificate_of(
        issuer=SECOND.peer_id, member=BOB.peer_id, serial=b"t" * 16, invite=b""
    ).sign(SECOND)
    members.admit(BOB.peer_id, other, Act.SERVE, NOW)


def test_a_lower_version_is_refused_and_the_same_changes_nothing() -> None:
    members = membership()
    assert members.learn(revocations(4, peers=[ALICE.peer_id]))
    assert not members.learn(revocations(4, peers=[ALICE.peer_id]))
    with pytest.raises(StaleRevocations) as caught:
        members.learn(revocations(3))
    assert str(caught.value) == (
        f"got version 3 of the revocations of {ISSUER.peer_id}, version 4 was seen; "
        "ask for the newest"
    )
    assert members.versions == {ISSUER.peer_id: 4}
    assert members.learn(revocations(1, by=SECOND))  # each issuer counts for itself
    assert members.learn(revocations(5))  # and may take a removal back
    members.admit(ALICE.peer_id, signed(), Act.SERVE, NOW)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_removal_wins_a_tie_in_either_order(order: tuple[int, int]) -> None:
    tied = [revocations(7, peers=[ALICE.peer_id]), revocations(7, peers=[EVE.peer_id])]
    members = membership()
    for index in order:
        assert members.learn(tied[index])
    with pytest.raises(MembershipRevoked):
        members.admit(ALICE.peer_id, signed(), Act.SERVE, NOW)
    assert set(members.lists) == set(tied)


def test_ties_are_bounded() -> None:
    members = membership()
    for number in range(4):
        assert members.learn(revocations(7, serials=[bytes([number]) * 16]))
    with pytest.raises(StaleRevocations, match="has to publish a higher version"):
        members.learn(revocations(7, serials=[b"x" * 16]))
    assert members.learn(revocations(8, serials=[b"x" * 16]))


def test_a_removal_outlives_the_process(tmp_path: Path) -> None:
    place = tmp_path / "lab" / "revocations"

    def started() -> Membership:
        kept = read_durable(place, 1 << 24)
        return membership(kept=kept, keep=lambda data: write_durable(place, data))

    first = started()
    first.learn(revocations(5, peers=[ALICE.peer_id]))
    first.learn(revocations(5, serials=[b"x" * 16]))
    first.learn(revocations(2, by=SECOND, invites=[b"y" * 16]))
    again = started()
    assert again.versions == first.versions == {ISSUER.peer_id: 5, SECOND.peer_id: 2}
    assert again.lists == first.lists
    with pytest.raises(MembershipRevoked):
        again.admit(ALICE.peer_id, signed(), Act.SERVE, NOW)
    with pytest.raises(StaleRevocations):
        again.learn(revocations(4))


def test_what_can_not_be_kept_is_in_force_and_kept_later() -> None:
    kept: list[bytes] = []
    full = [True]

    def keep(data: bytes) -> None:
        if full[0]:
            raise OSError(28, "no space left")
        kept.append(data)

    members = membership(keep=keep)
    with pytest.raises(OSError, match="no space"):
        members.learn(revocations(5, peers=[ALICE.peer_id]))
    assert members.versions == {ISSUER.peer_id: 5}
    with pytest.raises(MembershipRevoked):
        members.admit(ALICE.peer_id, signed(), Act.SERVE, NOW)
    with pytest.raises(OSError, match="no space"):
        members.save()
    full[0] = False
    members.save()
    members.save()
    assert kept == [members.kept]
    assert Membership("lab", [ISSUER.peer_id], kept=kept[0]).versions == members.versions


def test_lists_of_a_former_issuer_are_dropped_at_the_start() -> None:
    kept: list[bytes] = []
    first = membership(keep=kept.append)
    first.learn(revocations(5, by=SECOND, peers=[ALICE.peer_id]))
    first.learn(revocations(3))
    later = Membership("lab", [ISSUER.peer_id], kept=kept[-1])
    assert later.versions == {ISSUER.peer_id: 3}


@pytest.mark.parametrize(
    "kept",
    [
        b"\xc0",
        b"\x91",
        msgpack.packb([b"list"]),
        msgpack.packb([[ISSUER.peer_id, b"list"]]),
        msgpack.packb([[ISSUER.peer_id, revocations(by=SECOND)]]),
    ],
)
def test_a_damaged_memory_admits_nobody(kept: bytes) -> None:
    with pytest.raises(BadEnvelope, match="the kept revocations of swarm 'lab' can't be read"):
        membership(kept=kept)


def test_the_longest_list_fits_and_a_longer_one_is_not_made() -> None:
    peers = [Identity(number.to_bytes(32, "big")).peer_id for number in range(8)]
    serials = [number.to_bytes(16, "big") for number in range(MAX_REVOKED - 8)]
    data = revocations(peers=peers, serials=serials)
    assert len(data) + 16 * MAX_REVOKED < MAX_LIST_BYTES  # also if all were the 32 of a key
    assert membership().learn(data)
    with pytest.raises(BadEnvelope, match="more than 4096"):
        revocations(peers=[*peers, ALICE.peer_id], serials=serials)


def test_a_swarm_has_few_issuers() -> None:
    many = [Identity(bytes([number]) * 32).peer_id for number in range(1, MAX_ISSUERS + 2)]
    with pytest.raises(BadEnvelope, match="9 issuers, at most 8"):
        Membership("lab", many)


@pytest.mark.parametrize(
    ("error", "data"),
    [
        (BadEnvelope, revocations(by=EVE)),
        (BadEnvelope, with_body([1, 1, [], [], []])),
        (WrongSwarm, Revocations(issuer=ISSUER.peer_id, swarm="b", version=1).sign(ISSUER)),
        (WrongReceiver, with_body([1, 1, [], [], []], kind="revocations")),
        *(
            (BadEnvelope, with_body(body, kind="revocations", receiver=None))
            for body in (
                [2, 1, [], [], []],
                [True, 1, [], [], []],
                [1, 0, [], [], []],
                [1, True, [], [], []],
                [1, 1 << 53, [], [], []],
                [1, 1, [], []],
                [1, 1, [b"k" * 31], [], []],
                [1, 1, [ALICE.peer_id], [], []],
                [1, 1, [], [b"s"], []],
                [1, 1, [], ["s" * 16], []],
                [1, 1, [], [], [b"i" * 17]],
                [1, 1, [], [], [1]],
                [1, 1, [[]], [], []],
                [1, 1, {}, [], []],
            )
        ),
    ],
)
def test_what_is_no_list_by_an_issuer_is_refused(error: type[Exception], data: bytes) -> None:
    members = membership()
    with pytest.raises(error):
        members.learn(data)
    assert members.versions == {}
    members.learn(with_body([1, 1, [], [], []], kind="revocations", receiver=None))


# Changed bytes ----------------------------------------------------------------------------------


def test_no_mutation_of_a_certificate_is_accepted_with_another_content() -> None:
    expected = certificate_of()

    def as_before(data: bytes) -> None:
        assert admitted(data) == expected

    tries = count(20_000, 1_000_000)
    assert attack(as_before, [signed()], SecurityError, tries=tries) < tries / 50


def test_no_mutation_of_revocations_is_accepted_with_another_content() -> None:
    data = revocations(5, peers=[ALICE.peer_id, EVE.peer_id], serials=[SERIAL], invites=[INVITE])
    issuers = (ISSUER.peer_id,)
    expected = Revocations.verify(data, swarm="lab", issuers=issuers)

    def as_before(changed: bytes) -> None:
        assert Revocations.verify(changed, swarm="lab", issuers=issuers) == expected

    tries = count(20_000, 1_000_000)
    assert attack(as_before, [data], SecurityError, tries=tries) < tries / 50


BODIES = [
    (b"certificate", msgpack.packb(BODY)),
    (b"revocations", msgpack.packb([1, 3, [public_key_of(ALICE.peer_id)], [SERIAL], [INVITE]])),
]


def of_liar(kind: bytes, body: bytes) -> None:
    """An issuer signs whatever it likes as a certificate or as revocations."""
    if kind == b"certificate":
        admitted(with_bytes(body), Act.READ)
    else:
        membership().learn(with_bytes(body, kind="revocations", receiver=None))


@pytest.mark.parametrize(("kind", "body"), BODIES, ids=["certificate", "revocations"])
def test_an_issuer_that_lies_meets_only_our_errors(kind: bytes, body: bytes) -> None:
    attack(lambda data: of_liar(kind, data), [body], SecurityError, tries=count(5_000, 1_000_000))


@fuzzed
@given(like(BODIES[0][1]), like(BODIES[1][1]))
def test_any_bytes_are_a_body_or_refused(first: bytes, second: bytes) -> None:
    for (kind, _), body in zip(BODIES, (first, second), strict=True):
        with contextlib.suppress(SecurityError):
            of_liar(kind, body)


def test_a_certificate_can_not_be_signed_for_another_role_by_its_member() -> None:
    # What a thief of the member's key can do: sign, but not as the issuer.
    stolen = dataclasses.replace(certificate_of(role=Role.ADMIN), issuer=ALICE.peer_id).sign(ALICE)
    version, _, payload, signature = msgpack.unpackb(stolen)
    with pytest.raises(NotAMember):
        admitted(stolen)
    with pytest.raises(NotAMember, match="the signature is not by"):
        admitted(msgpack.packb([version, ISSUER.peer_id, payload, signature]))
    with pytest.raises(BadSignature):
        Revocations.verify(
            msgpack.packb([version, ISSUER.peer_id, payload, signature]),
            swarm="lab",
            issuers=(ISSUER.peer_id,),
        )
