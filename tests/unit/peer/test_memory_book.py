"""What all traces of a host together may take: promised, counted, and given back at their end."""

from __future__ import annotations

import asyncio
import re
import threading
from typing import Any

import pytest
import torch
from tenants import Tenants

from glasshive.dht.messages import Accepted
from glasshive.peer.errors import Busy, NotEnoughMemory
from glasshive.peer.host_limits import HostLimits
from glasshive.peer.memory_book import LENT_SHARE, MemoryBook, lent_bytes
from glasshive.peer.served_model import ServedModel
from glasshive.security.keys import PeerId

MIB = 1 << 20
ALICE, BOB, CAROL, DAVE, EVE = (PeerId(name) for name in ("alice", "bob", "carol", "dave", "eve"))


async def promised(tenants: Tenants, wanted_bytes: int) -> None:
    """Returns when exactly so much is promised."""
    await tenants.until(lambda: tenants.host._memory.promised_bytes == wanted_bytes)


async def one_peak_bytes(served: ServedModel) -> int:
    """What one of these traces is promised."""
    async with Tenants(served) as tenants:
        _, answer = await tenants.ask(tenants.client())
        assert isinstance(answer, Accepted)
        return answer.peak_bytes


def test_promises_stay_under_the_mark_and_a_refusal_says_when() -> None:
    now = 100.0
    book = MemoryBook(1000, lambda: now)
    book.promise("a", ALICE, 400, 160.0)
    book.promise("b", BOB, 500, 130.0)
    book.promise("c", CAROL, 100, 400.0)
    with pytest.raises(Busy) as caught:
        book.promise("d", DAVE, 600, 500.0)
    assert str(caught.value) == (
        "this peer has 1000 of 1000 bytes promised to other traces, and this one takes 600; try "
        "again soon (there is room in 60 s at the latest), or by way of another peer"
    )
    assert book.promised_bytes == 1000
    book.release("b")
    book.release("b")
    book.promise("d", DAVE, 500, 500.0)
    now = 1000.0  # those whose time is over are about to end
    with pytest.raises(Busy, match="room in 0 s at the latest"):
        book.promise("e", EVE, 1, 500.0)
    for one in "acd":
        book.release(one)
    assert book.promised_bytes == 0


def test_what_other_programs_take_is_not_promised() -> None:
    """What those who have promises took of theirs is in the room, and what they didn't, isn't."""
    room_bytes = 1000
    book = MemoryBook(1000, room_bytes=lambda: room_bytes)
    book.promise("a", ALICE, 400, 0.0)
    room_bytes = 600
    with pytest.raises(Busy) as caught:
        book.promise("b", BOB, 201, 0.0)
    assert str(caught.value) == (
        "this peer has 600 bytes of memory for all traces now, since other programs on its machine "
        "have taken the rest of 1000; 400 of them are promised to other traces, and this one takes "
        "201; try again later, or by way of another peer"
    )
    assert book.promised_bytes == 400
    book.promise("b", BOB, 200, 0.0)
    book.release("a")
    book.release("b")
    with pytest.raises(Busy) as alone:  # no trace has to end for it
        book.promise("c", CAROL, 601, 0.0)
    assert str(alone.value) == (
        "this peer has 600 bytes of memory for all traces now, since other programs on its machine "
        "have taken the rest of 1000; no other trace has any of them, and this one takes 601; save "
        "or edit less in one trace, go by way of another peer, or try again later"
    )


def test_one_client_s_traces_leave_room_for_others() -> None:
    book = MemoryBook(1000)
    book.promise("a", ALICE, 300, 0.0)
    book.promise("b", ALICE, 200, 0.0)
    with pytest.raises(Busy) as caught:
        book.promise("c", ALICE, 1, 0.0)
    assert str(caught.value) == (
        "traces of yours have 500 bytes of this peer, and with the 1 of this one it were more than "
        "your share of 500; wait for one of them, or try another peer"
    )
    book.promise("d", BOB, 500, 0.0)
    book.release("d")
    book.release("a")
    book.release("b")
    book.promise("e", ALICE, 1000, 0.0)  # one alone may have all


def test_a_host_lends_most_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    class Free:
        available = 1000 * MIB

    monkeypatch.setattr("psutil.virtual_memory", Free)
    assert lent_bytes(torch.device("cpu")) == 1000 * MIB * LENT_SHARE
    assert lent_bytes(torch.device("cpu"), 900) == 900  # its owner knows better
    assert lent_bytes(torch.device("cpu"), 2000 * MIB) == 1000 * MIB
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (300 * MIB, 8000 * MIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 200 * MIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100 * MIB)
    assert lent_bytes(torch.device("cuda")) == 400 * MIB * LENT_SHARE
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3000 * MIB, 8000 * MIB))
    assert lent_bytes(torch.device("cuda")) == 1000 * MIB * LENT_SHARE


def test_a_host_without_memory_to_lend_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    class Free:
        available = 63 * MIB

    monkeypatch.setattr("psutil.virtual_memory", Free)
    with pytest.raises(NotEnoughMemory) as told:
        lent_bytes(torch.device("cpu"))
    assert str(told.value) == (
        "63 MiB are free for traces on cpu beside the model (a container's limit counts), and at "
        "least 64 are wanted; serve fewer blocks with --blocks, give the container more memory, or "
        "end what else takes it"
    )


def test_the_mark_bounds_each_trace_and_what_is_kept() -> None:
    small = HostLimits().within(8000)
    assert (small.const_cache_bytes, small.budget.peak_bytes) == (1000, 7000)
    assert small.budget.saved_bytes == 7000
    large = HostLimits().within(1 << 50)
    assert large.budget == HostLimits().budget
    assert large.const_cache_bytes == HostLimits().const_cache_bytes


@pytest.mark.asyncio
async def test_what_others_were_promised_is_not_promised_again(served: ServedModel) -> None:
    peak_bytes = await one_peak_bytes(served)
    limits = HostLimits(memory_bytes=2 * peak_bytes + 500, const_cache_bytes=0)
    async with Tenants(served, limits) as tenants:
        alice, bob = tenants.client(), tenants.client()
        first, answer = await tenants.ask(alice)
        assert isinstance(answer, Accepted)
        second, _ = await tenants.ask(tenants.client())
        _, busy = await tenants.ask(bob)
        assert (busy.code, busy.node) == ("Busy", -1)
        assert re.fullmatch(
            rf"this peer has {2 * peak_bytes} of {2 * peak_bytes + 500} bytes promised to other "
            rf"traces, and this one takes {peak_bytes}; try again soon \(there is room in \d+ s at "
            r"the latest\), or by way of another peer",
            busy.text,
        )
        await promised(tenants, 2 * peak_bytes)  # nobody lost what was his
        first.reset()
        await promised(tenants, peak_bytes)
        _, answer = await tenants.ask(bob)
        assert isinstance(answer, Accepted)
        second.reset()


@pytest.mark.asyncio
async def test_a_trace_that_alone_is_over_the_mark_is_over_budget(served: ServedModel) -> None:
    most_bytes = await one_peak_bytes(served) - 1
    async with Tenants(served, HostLimits(memory_bytes=most_bytes, const_cache_bytes=0)) as tenants:
        _, failed = await tenants.ask(tenants.client())
        assert failed.code == "OverBudget"
        assert f"but {most_bytes} are allowed" in failed.text


@pytest.mark.asyncio
async def test_a_stage_that_runs_on_keeps_its_memory(
    served: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    running, go_on = threading.Event(), threading.Event()
    run = served.model.run

    def slow(**inputs: Any) -> Any:
        running.set()
        assert go_on.wait(30)
        return run(**inputs)

    monkeypatch.setattr(served.model, "run", slow)
    async with Tenants(served) as tenants:
        client = tenants.client()
        left, answer = await tenants.ask(client)
        await tenants.begin(left)
        assert await asyncio.to_thread(running.wait, 30)
        left.reset()  # the client has gone, and the stage can't be interrupted
        await tenants.until(lambda: not tenants.host._slots)
        await promised(tenants, answer.peak_bytes)
        go_on.set()
        await promised(tenants, 0)
        stays, _ = await tenants.ask(client)
        await tenants.begin(stays)
        assert isinstance(await tenants.saves(stays), dict)
        await promised(tenants, 0)
