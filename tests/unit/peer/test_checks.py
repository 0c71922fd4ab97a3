"""The thread for checks: whose turn it is, and who is told what when one takes too long."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable

import pytest
import pytest_asyncio

from glasshive.peer.checks import Checks
from glasshive.peer.errors import Busy, TraceEnded
from glasshive.security.keys import Identity

ALICE, BOB = Identity.generate().peer_id, Identity.generate().peer_id
SECONDS = 1000.0


@pytest_asyncio.fixture
async def checks() -> AsyncIterator[Checks]:
    made = Checks(SECONDS)
    yield made
    made.close()


class Gate:
    """A check that has begun and goes on when it is told to; `unwanted` if it saw that it was."""

    def __init__(self) -> None:
        self.begun, self.opened = threading.Event(), threading.Event()
        self.unwanted = False

    def __call__(self, go_on: Callable[[], None]) -> str:
        self.begun.set()
        assert self.opened.wait(30)
        try:
            go_on()
        except TraceEnded:
            self.unwanted = True
            raise
        return "done"

    async def has_begun(self) -> None:
        assert await asyncio.to_thread(self.begun.wait, 30)


@pytest.fixture
def leap(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Lets the loop's clock leap, when a loop runs."""
    leapt = [0.0]

    def forward(seconds: float) -> None:
        loop = asyncio.get_running_loop()
        if not leapt[0]:
            stock = loop.time
            monkeypatch.setattr(loop, "time", lambda: stock() + leapt[0])
        leapt[0] += seconds

    return forward


@pytest.mark.asyncio
async def test_clients_take_turns_however_much_one_has_sent(checks: Checks) -> None:
    gate = Gate()
    order: list[str] = []
    first = asyncio.create_task(checks.run(ALICE, gate))
    await gate.has_begun()
    others = [
        asyncio.create_task(checks.run(client, lambda _, name=name: order.append(name)))  # type: ignore[misc]
        for client, name in [(ALICE, "a1"), (ALICE, "a2"), (ALICE, "a3"), (BOB, "b1"), (BOB, "b2")]
    ]
    await asyncio.sleep(0)  # each stands in its line
    gate.opened.set()
    assert await first == "done"
    await asyncio.gather(*others)
    assert order == ["b1", "a1", "b2", "a2", "a3"]


@pytest.mark.asyncio
async def test_who_had_no_turn_is_not_told_to_send_less(
    checks: Checks, leap: Callable[[float], None]
) -> None:
    gate = Gate()
    first = asyncio.create_task(checks.run(ALICE, gate))
    await gate.has_begun()
    second = asyncio.create_task(checks.run(BOB, lambda _: "never"))
    await asyncio.sleep(0)
    leap(SECONDS + 1)
    with pytest.raises(Busy) as told:
        await asyncio.wait_for(second, 30)
    assert str(told.value) == (
        "this peer was checking other traces for 1000 s, and it was not the turn of this one; try "
        "again, or by way of another peer"
    )
    with pytest.raises(Busy, match=r"^checking took longer than 1000 s here; .* a smaller graph$"):
        await asyncio.wait_for(first, 30)
    # The thread is busy until the check sees that nobody waits for it; only then is it another's.
    third = asyncio.create_task(checks.run(BOB, lambda _: "never"))
    await asyncio.sleep(0)
    leap(SECONDS + 1)
    with pytest.raises(Busy, match="not the turn of this one"):
        await asyncio.wait_for(third, 30)
    fourth = asyncio.create_task(checks.run(BOB, lambda _: gate.unwanted))
    await asyncio.sleep(0)
    gate.opened.set()
    assert await asyncio.wait_for(fourth, 30) is True


@pytest.mark.asyncio
async def test_a_check_has_its_whole_time_from_its_turn_on(
    checks: Checks, leap: Callable[[float], None]
) -> None:
    one, two = Gate(), Gate()
    first = asyncio.create_task(checks.run(ALICE, one))
    await one.has_begun()
    second = asyncio.create_task(checks.run(BOB, two))
    await asyncio.sleep(0)
    leap(0.8 * SECONDS)
    one.opened.set()
    await two.has_begun()
    leap(0.8 * SECONDS)
    await asyncio.sleep(0.001)  # the loop looks at its clock
    two.opened.set()
    assert await asyncio.wait_for(asyncio.gather(first, second), 30) == ["done", "done"]
