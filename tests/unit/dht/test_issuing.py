"""Joining, renewing and hearing of revocations, over streams of the memory transport."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest
from joiners import ADDRESSES, ALICE, BOB, DAY, EVE, ISSUER, NOW, SECOND, join_of, renew_of
from lab import Lab, address_of, certificate_of, removal_of

from glasshive.dht import issuing
from glasshive.dht.errors import (
    DeadlineExceeded,
    FrameTooLarge,
    MalformedMessage,
    StreamClosed,
    StreamRefused,
)
from glasshive.dht.issuing import ask_to_join, ask_to_renew, serve_issuer
from glasshive.dht.memory_transport import MemoryTransport
from glasshive.dht.messages import (
    JOIN_PROTOCOL,
    MEMBERS_PROTOCOL,
    AskToJoin,
    RevocationLists,
    encode,
)
from glasshive.dht.revocation_lists import fetch_revocations, serve_revocations
from glasshive.dht.transport import PeerAddress, Stream
from glasshive.security.invite_book import InviteBook
from glasshive.security.invites import Invite
from glasshive.security.membership import Role

ROOT = b"the first root"


@dataclass
class Office:
    """An issuer that answers, and its book."""

    lab: Lab
    book: InviteBook
    address: PeerAddress
    transport: MemoryTransport

    def invite(self, role: Role = Role.CLIENT, uses: int = 1) -> Invite:
        token = self.book.invite(
            role,
            addresses=ADDRESSES,
            issuers=[ISSUER.peer_id],
            whitelist_root=bytes(32),
            now=NOW,
            uses=uses,
        )
        return Invite.parse(token, NOW)


async def office_in(folder: Path) -> Office:
    lab = Lab()
    book = InviteBook(folder / "book", ISSUER, "lab")
    gate = lab.gate(book.enrol(ISSUER.peer_id, Role.HOST, NOW))
    transport = lab.network.transport(ISSUER, gate=gate)
    await serve_issuer(transport, book, ROOT)
    await serve_revocations(transport, gate)
    return Office(lab, book, address_of(transport), transport)


@pytest.mark.asyncio
async def test_a_stranger_joins_by_an_invite_and_is_let_in(tmp_path: Path) -> None:
    office = await office_in(tmp_path)
    invite = office.invite()
    alice = office.lab.stranger(ALICE)
    certificate, root = await ask_to_join(alice, office.address, join_of(invite), 5)
    assert root == ROOT
    assert invite.check_certificate(certificate, ALICE.peer_id, NOW).role is Role.CLIENT
    assert [one.peer_id for one in office.book.members()] == [ISSUER.peer_id, ALICE.peer_id]

    inside = office.lab.network.transport(ALICE, gate=office.lab.gate(certificate))
    await inside.open_stream(office.address, MEMBERS_PROTOCOL, 5)
    new = await ask_to_renew(inside, office.address, renew_of(certificate), 5)
    assert new != certificate
    # Long after it ended a stranger's transport will do: no certificate is needed to renew one.
    office.lab.clock.seconds += 5 * DAY
    late = renew_of(new, number=2, now=office.lab.clock.seconds)
    await ask_to_renew(office.lab.stranger(ALICE), office.address, late, 5)


@pytest.mark.asyncio
async def test_a_refusal_says_why(tmp_path: Path) -> None:
    office = await office_in(tmp_path)
    invite = office.invite()
    alice, eve = office.lab.stranger(ALICE), office.lab.stranger(EVE)
    request = join_of(invite)
    await ask_to_join(alice, office.address, request, 5)
    with pytest.raises(StreamRefused, match="was seen before"):
        await ask_to_join(alice, office.address, request, 5)
    with pytest.raises(StreamRefused, match="is used up: 1 of 1 keys have joined by it"):
        await ask_to_join(eve, office.address, join_of(invite, EVE), 5)
    with pytest.raises(StreamRefused, match="not an envelope"):
        await ask_to_join(eve, office.address, b"junk", 5)
    with pytest.raises(StreamRefused, match="is no certificate"):
        await ask_to_renew(eve, office.address, renew_of(b"junk", EVE), 5)
    with pytest.raises(FrameTooLarge):
        await ask_to_join(eve, office.address, bytes(1025), 5)
    assert len(office.book.members()) == 2


@pytest.mark.asyncio
async def test_what_is_wrong_with_the_book_stays_with_the_issuer(tmp_path: Path) -> None:
    office = await office_in(tmp_path)
    request = join_of(office.invite())
    office.book.path.write_bytes(b"damaged")
    with pytest.raises(StreamRefused, match="the issuer can't use its book of members; its log"):
        await ask_to_join(office.lab.stranger(ALICE), office.address, request, 5)


@pytest.mark.asyncio
async def test_few_are_answered_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(issuing, "MAX_ASKING", 1)
    office = await office_in(tmp_path)
    eve, alice = office.lab.stranger(EVE), office.lab.stranger(ALICE)
    judging, judge = threading.Event(), office.book.join
    first, second = (join_of(office.invite(), one) for one in (EVE, ALICE))

    def slow(request: bytes, now: float) -> bytes:
        assert judging.wait(30)
        return judge(request, now)

    monkeypatch.setattr(office.book, "join", slow)
    asked = asyncio.create_task(ask_to_join(eve, office.address, first, 20))
    while not office.transport._tasks:  # noqa: ASYNC110
        await asyncio.sleep(0)
    with pytest.raises(StreamRefused, match="busy: 1 others ask to join; try again soon"):
        await ask_to_join(alice, office.address, second, 5)
    judging.set()
    await asked
    await ask_to_join(alice, office.address, second, 5)


@pytest.mark.asyncio
async def test_who_says_nothing_takes_nobody_s_place(tmp_path: Path) -> None:
    office = await office_in(tmp_path)
    eve = office.lab.stranger(EVE)
    silent = [await eve.open_stream(office.address, JOIN_PROTOCOL, 5) for _ in range(20)]
    ends = []
    for stream in silent:
        with pytest.raises((StreamRefused, DeadlineExceeded)) as caught:
            await stream.receive(0.05)
        ends.append("others have a place here and say nothing" in str(caught.value))
    assert ends.count(True) == 20 - issuing.MAX_SILENT_PER_PEER
    await ask_to_join(office.lab.stranger(ALICE), office.address, join_of(office.invite()), 5)


@pytest.mark.asyncio
async def test_a_request_is_bounded_before_it_is_read(tmp_path: Path) -> None:
    office = await office_in(tmp_path)
    stream = await office.lab.stranger(EVE).open_stream(office.address, JOIN_PROTOCOL, 5)
    await stream.send(encode(AskToJoin()), bytes(1025))
    with pytest.raises(StreamClosed):
        await stream.receive(5)


# Revocations ------------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_a_list_travels_from_member_to_member() -> None:
    lab = Lab()
    (alice, hers), (bob, his) = lab.member(ALICE, Role.CLIENT), lab.member(BOB, Role.HOST)
    await serve_revocations(bob, his)
    assert not await fetch_revocations(alice, address_of(bob), hers, 5)
    his.learn(removal_of(EVE))
    assert await fetch_revocations(alice, address_of(bob), hers, 5)
    assert hers.membership.lists == his.membership.lists
    assert not await fetch_revocations(alice, address_of(bob), hers, 5)
    # Who knows more takes nothing old.
    hers.learn(removal_of(EVE, SECOND, version=2))
    assert not await fetch_revocations(alice, address_of(bob), hers, 5)
    assert set(hers.membership.versions.values()) == {2}


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("sizes", "body"), [([3], b"1234"), ([5], b"1234"), ([2] * 33, bytes(66)), ([-1], b"")]
)
async def test_lists_that_do_not_add_up_are_refused(sizes: list[int], body: bytes) -> None:
    lab = Lab()
    (alice, hers), (bob, _) = lab.member(ALICE, Role.CLIENT), lab.member(BOB, Role.HOST)

    async def lie(stream: Stream) -> None:
        await stream.receive(5)
        await stream.send(encode(RevocationLists(sizes)), body)

    await bob.serve(MEMBERS_PROTOCOL, lie)
    with pytest.raises(MalformedMessage):
        await fetch_revocations(alice, address_of(bob), hers, 5)
    assert not hers.membership.lists


@pytest.mark.asyncio
async def test_a_list_that_no_issuer_signed_is_left_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    lab = Lab()
    (alice, hers), (bob, _) = lab.member(ALICE, Role.CLIENT), lab.member(BOB, Role.HOST)
    lists = [b"junk", certificate_of(EVE, Role.HOST), removal_of(EVE)]

    async def answer(stream: Stream) -> None:
        await stream.receive(5)
        sizes = [len(one) for one in lists]
        await stream.send(encode(RevocationLists(sizes)), b"".join(lists))

    await bob.serve(MEMBERS_PROTOCOL, answer)
    assert await fetch_revocations(alice, address_of(bob), hers, 5)
    assert hers.membership.lists == (removal_of(EVE),)
    assert caplog.text.count("revocations_refused") == 2
