"""Who is let in at the streams of a private swarm, in both directions."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest
from joiners import ALICE, BOB, DAY, EVE, ISSUER, NOW
from lab import Lab, address_of, certificate_of, removal_of

from glasshive.dht import messages
from glasshive.dht.directory import ask_directory
from glasshive.dht.errors import (
    DirectoryUnavailable,
    FrameTooLarge,
    MalformedMessage,
    NotLetIn,
    ShutOut,
    StreamClosed,
    StreamRefused,
)
from glasshive.dht.member_gate import MemberGate
from glasshive.dht.messages import (
    DIRECTORY_PROTOCOL,
    EDGE_PROTOCOL,
    JOIN_PROTOCOL,
    TRACE_PROTOCOL,
    Hello,
    encode,
)
from glasshive.dht.transport import Stream
from glasshive.security.errors import MembershipFileError, MembershipRevoked, NotAMember
from glasshive.security.membership import Act, Membership, Revocations, Role

DOCS = Path(__file__).parents[3] / "docs"


async def echo(stream: Stream) -> None:
    while True:
        frame = await stream.receive(5)
        await stream.send(frame.header)


async def eventually(condition: Any) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


def permitted() -> dict[str, dict[str, bool]]:
    """What docs/protocol.md says of each protocol and role."""
    text = (DOCS / "protocol.md").read_text().split("## 16.")[1]
    table: dict[str, dict[str, bool]] = {}
    for row in re.findall(r"^\| (`.*|any other) \| (\w+) \| (\w+) \| (\w+) \|$", text, re.M):
        for name in re.findall(r"`([^`]+)`", row[0]) or ["any/1"]:
            whole = name if name.startswith(("glasshive/", "any")) else f"glasshive/{name}"
            roles = zip(("host", "client", "admin"), row[1:], strict=True)
            table[whole] = {role: said == "yes" for role, said in roles}
    return table


def protocols() -> set[str]:
    return {value for name, value in vars(messages).items() if name.endswith("_PROTOCOL")}


def test_every_protocol_is_judged() -> None:
    assert set(permitted()) == protocols() - {JOIN_PROTOCOL} | {"any/1"}


@pytest.mark.asyncio
@pytest.mark.parametrize("protocol", sorted(permitted()))
@pytest.mark.parametrize("role", list(Role))
async def test_a_role_opens_what_it_is_permitted_to(protocol: str, role: Role) -> None:
    lab = Lab()
    alice, _ = lab.member(ALICE, role)
    bob, _ = lab.member(BOB, Role.HOST)
    await bob.serve(protocol, echo)
    if permitted()[protocol][role]:
        stream = await alice.open_stream(address_of(bob), protocol, 5)
        await stream.send("hello")
        assert (await stream.receive(5)).header == "hello"
    else:
        with pytest.raises(StreamRefused, match=f"not let in: this peer is a {role} of swarm"):
            await alice.open_stream(address_of(bob), protocol, 5)


@pytest.mark.asyncio
async def test_a_peer_that_was_seen_is_not_waited_for_and_still_judged() -> None:
    lab = Lab()
    alice, gate = lab.member(ALICE, Role.CLIENT)
    eve = lab.stranger(EVE)
    shows = [certificate_of(EVE, Role.HOST), b"junk", certificate_of(EVE, Role.HOST)]
    goes_on = asyncio.Event()

    async def answer(stream: Stream) -> None:
        await stream.receive(5)
        await goes_on.wait()
        await stream.send(encode(Hello(shows.pop(0))))
        await stream.send((await stream.receive(5)).header)

    await eve.serve(TRACE_PROTOCOL, answer)
    goes_on.set()
    first = await alice.open_stream(address_of(eve), TRACE_PROTOCOL, 5)
    await first.send("one")
    assert (await first.receive(5)).header == "one"

    goes_on.clear()
    second = await alice.open_stream(address_of(eve), TRACE_PROTOCOL, 5)  # it hasn't said a word
    await second.send("two")
    goes_on.set()
    with pytest.raises(NotLetIn, match="is no certificate of its own"):
        await second.receive(5)
    assert second.closed

    # What was seen is judged by the time and the revocations of now.
    lab.clock.seconds += DAY + 11
    gate.certificate = certificate_of(ALICE, Role.CLIENT, 2 * DAY)
    with pytest.raises(NotLetIn, match="expired 11 s ago"):
        await alice.open_stream(address_of(eve), TRACE_PROTOCOL, 5)


@pytest.mark.asyncio
async def test_the_first_frame_is_bounded_and_a_greeting() -> None:
    lab = Lab()
    alice, _ = lab.member(ALICE, Role.CLIENT)
    eve = lab.stranger(EVE)
    answers: list[tuple[Any, bytes]] = [
        (encode(Hello(certificate_of(EVE, Role.HOST))), b""),
        ("something else", b""),
        (encode(Hello(certificate_of(EVE, Role.HOST))), b"body"),
        ("x" * 600, b""),
    ]

    async def answer(stream: Stream) -> None:
        await stream.receive(5)
        await stream.send(*answers.pop(0))
        await stream.receive(5)

    await eve.serve(TRACE_PROTOCOL, answer)
    await alice.open_stream(address_of(eve), TRACE_PROTOCOL, 5)
    for error in (MalformedMessage, FrameTooLarge, FrameTooLarge):
        stream = await alice.open_stream(address_of(eve), TRACE_PROTOCOL, 5)
        with pytest.raises(error):
            await stream.receive(5)


@pytest.mark.asyncio
async def test_who_is_thrown_out_loses_its_streams() -> None:
    lab = Lab()
    alice, _ = lab.member(ALICE, Role.CLIENT)
    bob, his = lab.member(BOB, Role.HOST)
    eve, eves = lab.member(EVE, Role.CLIENT)
    await bob.serve(TRACE_PROTOCOL, echo)
    streams = [await one.open_stream(address_of(bob), TRACE_PROTOCOL, 5) for one in (alice, eve)]
    assert his.learn(removal_of(ALICE))
    assert not his.learn(removal_of(ALICE))
    with pytest.raises(StreamClosed):
        await streams[0].receive(5)
    await streams[1].send("still here")
    assert (await streams[1].receive(5)).header == "still here"
    again = await alice.open_stream(address_of(bob), TRACE_PROTOCOL, 5)  # he was seen before
    with pytest.raises(StreamRefused, match=r"this peer .*: its key was revoked; ask who runs"):
        await again.receive(5)

    # And the other way round: who opened it may be the first to hear of it.
    stream = await eve.open_stream(address_of(bob), TRACE_PROTOCOL, 5)
    eves.learn(removal_of(BOB, version=2))
    with pytest.raises(StreamClosed):
        await stream.receive(5)
    with pytest.raises(NotLetIn, match="was revoked"):
        await eve.open_stream(address_of(bob), TRACE_PROTOCOL, 5)


@pytest.mark.asyncio
async def test_who_is_shut_out_of_the_directory_is_told_why_and_no_more() -> None:
    lab = Lab()
    alice, _ = lab.member(ALICE, Role.CLIENT)
    bob, his = lab.member(BOB, Role.HOST)
    eve = lab.stranger(EVE)
    await bob.serve(DIRECTORY_PROTOCOL, echo)
    his.learn(removal_of(ALICE))
    with pytest.raises(ShutOut) as caught:
        await ask_directory(alice, [address_of(bob)])
    assert str(caught.value) == (
        f"the swarm {alice.swarm!r} doesn't let this key, {ALICE.peer_id}, in: the certificate of "
        "this peer for swarm 'lab' doesn't hold any more: its key was revoked; ask who runs the "
        "swarm to invite another key"
    )
    # One that is only away may let it in.
    with pytest.raises(DirectoryUnavailable, match="its key was revoked"):
        await ask_directory(alice, [address_of(bob), address_of(eve)])


@pytest.mark.asyncio
async def test_a_stream_ends_with_the_certificate_that_was_shown_on_it() -> None:
    lab = Lab()
    first = certificate_of(ALICE, Role.CLIENT, serial=b"1" * 16)
    second = certificate_of(ALICE, Role.ADMIN, serial=b"2" * 16)
    gate = lab.gate(first)
    alice = lab.network.transport(ALICE, gate=gate)
    bob, his = lab.member(BOB, Role.HOST)
    await bob.serve(TRACE_PROTOCOL, echo)
    streams = [await alice.open_stream(address_of(bob), TRACE_PROTOCOL, 5)]
    gate.certificate = second
    streams.append(await alice.open_stream(address_of(bob), TRACE_PROTOCOL, 5))
    for stream in streams:
        await stream.send("both")
        assert (await stream.receive(5)).header == "both"
    gone = Revocations(ISSUER.peer_id, "lab", 1, serials=frozenset([b"1" * 16]))
    his.learn(gone.sign(ISSUER))
    with pytest.raises(StreamClosed):
        await streams[0].receive(5)
    await streams[1].send("still")
    assert (await streams[1].receive(5)).header == "still"


@pytest.mark.asyncio
async def test_a_removal_that_can_not_be_kept_is_in_force_all_the_same() -> None:
    lab, full = Lab(), [True]

    def keep(kept: bytes) -> None:
        if full[0]:
            raise MembershipFileError("no space left")
        saved.append(kept)

    saved: list[bytes] = []
    membership = Membership("lab", [ISSUER.peer_id], keep=keep)
    gate = MemberGate(membership, lab.clock, certificate_of(BOB, Role.HOST))
    bob = lab.network.transport(BOB, gate=gate)
    alice, _ = lab.member(ALICE, Role.CLIENT)
    await bob.serve(TRACE_PROTOCOL, echo)
    stream = await alice.open_stream(address_of(bob), TRACE_PROTOCOL, 5)
    await stream.send("in")
    await stream.receive(5)
    with pytest.raises(MembershipFileError):
        gate.learn(removal_of(ALICE))
    with pytest.raises(StreamClosed):
        await stream.receive(5)
    with pytest.raises(MembershipFileError):
        membership.save()
    full[0] = False
    membership.save()
    membership.save()
    assert len(saved) == 1
    with pytest.raises(MembershipRevoked):
        Membership("lab", [ISSUER.peer_id], kept=saved[0]).admit(
            ALICE.peer_id, certificate_of(ALICE, Role.CLIENT), Act.TRACE, NOW
        )


@pytest.mark.asyncio
async def test_whoever_joins_needs_no_certificate() -> None:
    lab = Lab()
    bob, _ = lab.member(BOB, Role.HOST)
    await bob.serve(JOIN_PROTOCOL, echo)
    for transport in (lab.stranger(EVE), lab.member(ALICE, Role.HOST)[0]):
        stream = await transport.open_stream(address_of(bob), JOIN_PROTOCOL, 5)
        await stream.send("request")
        assert (await stream.receive(5)).header == "request"


@pytest.mark.asyncio
async def test_a_new_certificate_is_shown_at_once() -> None:
    lab = Lab()
    gate = lab.gate(b"")
    alice = lab.network.transport(ALICE, gate=gate)
    bob, _ = lab.member(BOB, Role.HOST)
    await bob.serve(EDGE_PROTOCOL, echo)
    with pytest.raises(StreamRefused, match="showed no certificate"):
        await alice.open_stream(address_of(bob), EDGE_PROTOCOL, 5)
    gate.certificate = certificate_of(ALICE, Role.HOST)
    await alice.open_stream(address_of(bob), EDGE_PROTOCOL, 5)


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("glasshive.dht.member_gate.MAX_REMEMBERED", 2)
    gate = Lab().gate(b"")
    for one in (ALICE, BOB, EVE):
        gate.admit(one.peer_id, certificate_of(one, Role.HOST), Act.READ)
    gate.admit(EVE.peer_id, b"", Act.READ)
    with pytest.raises(NotAMember):
        gate.admit(ALICE.peer_id, b"", Act.READ)
