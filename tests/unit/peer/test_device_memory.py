"""What is free at the moment when a trace is admitted, which other programs change."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tenants import Tenants

from glasshive.dht.messages import Accepted
from glasshive.peer import device_memory
from glasshive.peer.device_memory import LOOK_SECONDS, DeviceMemory
from glasshive.peer.served_model import ServedModel

MIB = 1 << 20


class Machine:
    """Whose numbers psutil and torch give from now on, in MiB."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.free, self.resident, self.mapped = 1000, 500, 200
        self.free_on_device, self.reserved, self.allocated = 300, 200, 100
        self.now, self.looks = 0.0, 0
        monkeypatch.setattr("psutil.virtual_memory", self._virtual_memory)
        monkeypatch.setattr("psutil.Process", lambda: SimpleNamespace(memory_info=self._own))
        monkeypatch.setattr(
            torch.cuda, "mem_get_info", lambda device: (self.free_on_device * MIB, 8000 * MIB)
        )
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: self.reserved * MIB)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: self.allocated * MIB)

    def _virtual_memory(self) -> SimpleNamespace:
        self.looks += 1
        return SimpleNamespace(available=self.free * MIB)

    def _own(self) -> SimpleNamespace:
        return SimpleNamespace(rss=self.resident * MIB, shared=self.mapped * MIB)

    def room(self, memory: DeviceMemory) -> float:
        """In MiB, as a look shows it that is made now."""
        self.now += LOOK_SECONDS
        return memory.room_bytes / MIB


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def test_what_others_take_is_gone_and_what_is_taken_here_comes_back(machine: Machine) -> None:
    memory = DeviceMemory(torch.device("cpu"), lambda: machine.now)
    assert machine.room(memory) == 1000
    machine.free, machine.resident = 700, 800  # all that is missing is ours
    assert machine.room(memory) == 1000
    machine.mapped, machine.resident = 250, 850  # a file that is mapped takes nothing away
    assert machine.room(memory) == 1000
    machine.free = 100
    assert machine.room(memory) == 400
    machine.resident = 300  # less than at first
    assert machine.room(memory) == 100


def test_on_a_gpu_whichever_has_less(machine: Machine) -> None:
    memory = DeviceMemory(torch.device("cuda"), lambda: machine.now)
    assert machine.room(memory) == 400
    machine.allocated, machine.reserved, machine.free_on_device = 250, 250, 250
    assert machine.room(memory) == 400
    machine.free_on_device = 50
    assert machine.room(memory) == 200
    machine.free = 30
    assert machine.room(memory) == 30


def test_a_look_counts_for_a_moment(machine: Machine) -> None:
    memory = DeviceMemory(torch.device("cpu"), lambda: machine.now)
    assert machine.room(memory) == 1000
    machine.free = 0
    machine.now += LOOK_SECONDS / 2
    assert (memory.room_bytes, machine.looks) == (1000 * MIB, 1)
    machine.now += LOOK_SECONDS / 2
    assert (memory.room_bytes, machine.looks) == (0, 2)


@pytest.mark.asyncio
async def test_a_host_admits_no_more_than_is_free_now(
    served: ServedModel, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though it is under the mark of what was free when the host started."""
    monkeypatch.setattr(device_memory, "LOOK_SECONDS", 0.0)
    async with Tenants(served) as tenants:
        mark_bytes = tenants.host.memory_bytes - tenants.host._limits.const_cache_bytes
        first, answer = await tenants.ask(tenants.client())
        assert isinstance(answer, Accepted)
        machine.free = 0  # another program has taken all
        _, busy = await tenants.ask(tenants.client())
        assert (busy.code, busy.node) == ("Busy", -1)
        assert busy.text == (
            "this peer has 0 bytes of memory for all traces now, since other programs on its "
            f"machine have taken the rest of {mark_bytes}; {answer.peak_bytes} of them are "
            f"promised to other traces, and this one takes {answer.peak_bytes}; try again later, "
            "or by way of another peer"
        )
        machine.free = 1000
        _, again = await tenants.ask(tenants.client())
        assert isinstance(again, Accepted)
        first.reset()
