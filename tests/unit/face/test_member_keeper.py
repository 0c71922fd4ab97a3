"""The keeper: a peer stays a member, and others out who were thrown out."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from joiners import ALICE, BOB, DAY, EVE, ISSUER, NOW
from lab import Lab, address_of, certificate_of
from structlog.testing import capture_logs

from glasshive.dht.framing import Stream
from glasshive.dht.issuing import serve_issuer
from glasshive.dht.member_gate import MemberGate
from glasshive.dht.memory_transport import MemoryTransport
from glasshive.dht.messages import MEMBERS_PROTOCOL
from glasshive.dht.revocation_lists import EXCHANGE_SECONDS, serve_revocations
from glasshive.member_keeper import MemberKeeper
from glasshive.security.errors import MembershipFileError, MembershipRevoked
from glasshive.security.invite_book import InviteBook
from glasshive.security.keys import Identity
from glasshive.security.membership import Act, Role


class Swarm:
    """The issuer at its desk, and members with their keepers."""

    def __init__(self, folder: Path, ends: contextlib.AsyncExitStack) -> None:
        self.lab = Lab()
        self.book = InviteBook(folder / "book", ISSUER, "lab")
        self.ends = ends
        self.kept: dict[str, list[bytes]] = {}
        certificate = self.book.enrol(ISSUER.peer_id, Role.HOST, NOW)
        self.gate = self.lab.gate(certificate)
        self.desk = self.lab.network.transport(ISSUER, gate=self.gate)

    async def open_desk(self, period_seconds: float = 0.005) -> MemberKeeper:
        await serve_issuer(self.desk, self.book, b"root")
        return await self._started(ISSUER, self.desk, self.gate, self.book, period_seconds)

    async def member(
        self, identity: Identity, role: Role, period_seconds: float = 0.005, **options: Any
    ) -> tuple[MemoryTransport, MemberGate]:
        gate = self.lab.gate(self.book.enrol(identity.peer_id, role, self.lab.clock()))
        transport = self.lab.network.transport(identity, gate=gate)
        await self._started(identity, transport, gate, None, period_seconds, **options)
        return transport, gate

    async def _started(
        self,
        identity: Identity,
        transport: MemoryTransport,
        gate: MemberGate,
        book: InviteBook | None,
        period_seconds: float,
        keep: Callable[[bytes], None] | None = None,
        warn_shut_out: bool = True,
    ) -> MemberKeeper:
        kept = self.kept.setdefault(identity.peer_id, [])
        keeper = MemberKeeper(
            transport,
            gate,
            identity,
            [address_of(self.desk)],
            keep or kept.append,
            book=book,
            period_seconds=period_seconds,
            warn_shut_out=warn_shut_out,
        )
        await self.ends.enter_async_context(keeper)
        return keeper


@pytest_asyncio.fixture
async def swarm(tmp_path: Path) -> AsyncIterator[Swarm]:
    async with contextlib.AsyncExitStack() as ends:
        yield Swarm(tmp_path, ends)


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.002)


@pytest.mark.asyncio
async def test_what_the_issuer_revokes_reaches_every_member(swarm: Swarm) -> None:
    await swarm.open_desk()
    _, hers = await swarm.member(ALICE, Role.HOST)
    eves = swarm.book.enrol(EVE.peer_id, Role.CLIENT, NOW)
    for gate in (swarm.gate, hers):
        gate.admit(EVE.peer_id, eves, Act.TRACE)
    swarm.book.revoke(NOW, peers=[EVE.peer_id])  # as `glasshive revoke` in another process
    await eventually(lambda: swarm.gate.membership.lists == hers.membership.lists != ())
    for gate in (swarm.gate, hers):
        with pytest.raises(MembershipRevoked):
            gate.admit(EVE.peer_id, eves, Act.TRACE)


@pytest.mark.asyncio
async def test_who_is_shut_out_is_told_once_if_at_all(swarm: Swarm) -> None:
    await swarm.open_desk(period_seconds=30)
    for identity in (ALICE, BOB):
        swarm.gate.learn(swarm.book.revoke(NOW, peers=[identity.peer_id]))
    with capture_logs() as logs:
        for identity, warns in ((ALICE, True), (BOB, False)):
            gate = swarm.lab.gate(certificate_of(identity, Role.CLIENT))
            transport = swarm.lab.network.transport(identity, gate=gate)
            looked = await swarm._started(identity, transport, gate, None, 30, warn_shut_out=warns)
            await looked._round()
    said = [one for one in logs if one["event"] == "membership_not_kept"]
    assert [one["about"] for one in said] == [ISSUER.peer_id]
    assert said[0]["error"].endswith(
        "not let in: the certificate of this peer for swarm 'lab' doesn't hold any more: its key "
        "was revoked; ask who runs the swarm to invite another key"
    )


@pytest.mark.asyncio
@pytest.mark.parametrize(("role", "life"), [(Role.HOST, 7 * DAY), (Role.CLIENT, DAY)])
async def test_a_certificate_is_renewed_when_half_of_it_is_over(
    swarm: Swarm, role: Role, life: float
) -> None:
    await swarm.open_desk()
    _, gate = await swarm.member(ALICE, role)
    first, looks = gate.certificate, swarm.lab.clock
    looks.seconds = NOW + 0.49 * life
    for _ in range(20):
        await asyncio.sleep(0.005)
    assert gate.certificate == first
    looks.seconds = NOW + 0.51 * life
    await eventually(lambda: gate.certificate != first)
    assert swarm.kept[ALICE.peer_id] == [gate.certificate]
    looks.seconds = NOW + 1.2 * life  # the first has ended
    gate.admit(ALICE.peer_id, gate.certificate, Act.READ)


@pytest.mark.asyncio
async def test_what_ended_while_the_machine_slept_is_renewed(swarm: Swarm) -> None:
    await swarm.open_desk()
    _, gate = await swarm.member(ALICE, Role.CLIENT)
    first, issuers = gate.certificate, swarm.gate.certificate
    swarm.lab.clock.seconds = NOW + 9 * DAY  # the issuer's own has ended, too
    await eventually(lambda: swarm.gate.certificate != issuers)
    swarm.lab.clock.seconds += 61  # who asked before that tries again a minute later
    await eventually(lambda: gate.certificate != first)
    gate.admit(ALICE.peer_id, gate.certificate, Act.TRACE)
    swarm.gate.admit(ISSUER.peer_id, swarm.gate.certificate, Act.SERVE)


@pytest.mark.asyncio
async def test_a_clock_that_was_ahead_keeps_no_renewal_back(swarm: Swarm) -> None:
    with capture_logs() as logs:
        _, gate = await swarm.member(ALICE, Role.HOST)
        swarm.lab.clock.seconds = NOW + 6.9 * DAY
        await eventually(lambda: any(one.get("about") == "renewing" for one in logs))
    first = gate.certificate
    swarm.lab.clock.seconds = NOW + 4 * DAY
    await swarm.open_desk()
    await eventually(lambda: gate.certificate != first)


@pytest.mark.asyncio
async def test_it_is_tried_again_while_the_issuer_is_away(swarm: Swarm) -> None:
    with capture_logs() as logs:
        _, gate = await swarm.member(ALICE, Role.CLIENT)
        swarm.lab.clock.seconds = NOW + 0.6 * DAY
        await eventually(lambda: any(one.get("about") == "renewing" for one in logs))
        first = gate.certificate
        for _ in range(10):
            await asyncio.sleep(0.005)
        assert sum(one.get("about") == "renewing" for one in logs) == 1  # once a minute, said once
        await swarm.open_desk()
        swarm.lab.clock.seconds += 61
        await eventually(lambda: gate.certificate != first)


@pytest.mark.asyncio
async def test_a_certificate_that_can_not_be_kept_is_not_used(swarm: Swarm) -> None:
    def full(certificate: bytes) -> None:
        raise MembershipFileError("no space left")

    await swarm.open_desk()
    with capture_logs() as logs:
        _, gate = await swarm.member(ALICE, Role.CLIENT, keep=full)
        first = gate.certificate
        swarm.lab.clock.seconds = NOW + 0.6 * DAY
        await eventually(lambda: any(one.get("error") == "no space left" for one in logs))
        assert gate.certificate == first


@pytest.mark.asyncio
async def test_the_issuer_renews_its_own(swarm: Swarm) -> None:
    await swarm.open_desk()
    first = swarm.gate.certificate
    swarm.lab.clock.seconds = NOW + 4 * DAY
    await eventually(lambda: swarm.gate.certificate != first)
    swarm.lab.clock.seconds = NOW + 10 * DAY
    swarm.gate.admit(ISSUER.peer_id, swarm.gate.certificate, Act.SERVE)


@pytest.mark.asyncio
async def test_an_answer_for_another_role_is_not_taken(
    swarm: Swarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    await swarm.open_desk()
    _, gate = await swarm.member(ALICE, Role.CLIENT)
    first = gate.certificate

    async def lie(*args: Any) -> bytes:
        return certificate_of(ALICE, Role.ADMIN, 2 * DAY)

    monkeypatch.setattr("glasshive.member_keeper.ask_to_renew", lie)
    with capture_logs() as logs:
        swarm.lab.clock.seconds = NOW + 0.6 * DAY
        await eventually(lambda: any(one.get("about") == "renewing" for one in logs))
    assert gate.certificate == first


@pytest.mark.asyncio
async def test_one_bootstrap_that_is_away_keeps_no_other_from_being_asked(swarm: Swarm) -> None:
    await swarm.open_desk()
    gate = swarm.lab.gate(swarm.book.enrol(BOB.peer_id, Role.HOST, NOW))
    transport = swarm.lab.network.transport(BOB, gate=gate)
    away = swarm.lab.network.transport(EVE)
    gone = address_of(away)
    await away.close()
    keeper = MemberKeeper(
        *(transport, gate, BOB, [gone, address_of(swarm.desk)], lambda data: None),
        period_seconds=0.005,
    )
    async with keeper:
        swarm.book.revoke(NOW, peers=[ALICE.peer_id])
        await eventually(lambda: bool(gate.membership.lists))


@pytest.mark.asyncio
async def test_a_frozen_bootstrap_keeps_nobody_waiting_nor_revocations_back(swarm: Swarm) -> None:
    """It had 10 s of every start. The other one may hide who was thrown out."""
    lab, thawed, asked = swarm.lab, asyncio.Event(), asyncio.Event()
    slows = lab.gate(swarm.book.enrol(EVE.peer_id, Role.HOST, NOW))
    slow = lab.network.transport(EVE, gate=slows)
    await serve_revocations(slow, slows)
    answer = slow._handlers[MEMBERS_PROTOCOL]

    async def frozen(stream: Stream) -> None:
        asked.set()
        await thawed.wait()
        await answer(stream)

    await slow.serve(MEMBERS_PROTOCOL, frozen)
    await swarm.open_desk(period_seconds=600)
    gate = lab.gate(swarm.book.enrol(BOB.peer_id, Role.HOST, NOW))
    transport = lab.network.transport(BOB, gate=gate)
    bootstraps = [address_of(slow), address_of(swarm.desk)]
    before = asyncio.all_tasks()
    keeper = MemberKeeper(
        *(transport, gate, BOB, bootstraps, lambda data: None), period_seconds=600
    )
    slows.learn(swarm.book.revoke(NOW, peers=[ALICE.peer_id]))
    async with asyncio.timeout(EXCHANGE_SECONDS / 2):
        await keeper.start()
    assert asked.is_set()
    assert gate.membership.lists == ()
    thawed.set()
    await eventually(lambda: bool(gate.membership.lists))  # without a period between
    await keeper.close()
    assert [one for one in asyncio.all_tasks() - before if "MemberKeeper." in repr(one)] == []


@pytest.mark.asyncio
async def test_no_frozen_bootstrap_is_asked_on_for_who_gave_up(swarm: Swarm) -> None:
    asked = asyncio.Event()
    slow = swarm.lab.network.transport(
        EVE, gate=swarm.lab.gate(swarm.book.enrol(EVE.peer_id, Role.HOST, NOW))
    )

    async def frozen(stream: Stream) -> None:
        asked.set()
        await asyncio.Event().wait()

    await slow.serve(MEMBERS_PROTOCOL, frozen)
    gate = swarm.lab.gate(swarm.book.enrol(BOB.peer_id, Role.HOST, NOW))
    transport = swarm.lab.network.transport(BOB, gate=gate)
    before = asyncio.all_tasks()
    keeper = MemberKeeper(transport, gate, BOB, [address_of(slow)], lambda data: None)
    starting = asyncio.create_task(keeper.start())
    await asked.wait()
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert [one for one in asyncio.all_tasks() - before if "MemberKeeper." in repr(one)] == []


def test_a_client_s_own_script_says_nothing_of_it() -> None:
    """It printed on standard output, among what the script prints."""
    script = (
        "from glasshive import member_keeper, trust_keeper\n"
        "for one in (member_keeper, trust_keeper):\n"
        "    one.log.info('revocations_changed', by='x')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert (done.stdout, done.stderr) == (b"", b"")
