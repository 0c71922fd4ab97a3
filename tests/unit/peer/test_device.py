"""A device that is not there is refused by name, before anything is read."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import glasshive
from glasshive.peer.device import find_device
from glasshive.peer.errors import NoSuchDevice


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch, "__version__", "9.9")
    monkeypatch.setattr(torch.version, "cuda", None)


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("name", ["cuda", "cuda:1", "mps"])
def test_a_device_that_is_not_there(name: str) -> None:
    kind = name.partition(":")[0]
    with pytest.raises(NoSuchDevice) as caught:
        find_device(name)
    assert str(caught.value) == (
        f"got the device {name!r}, but torch 9.9, built without CUDA, has cpu here; choose one of "
        f"those, or install a torch and a driver for {kind} (https://pytorch.org/get-started)"
    )
    with pytest.raises(NoSuchDevice):  # before the folder is even looked for
        glasshive.local(Path("/none"), device=name)


@pytest.mark.usefixtures("no_gpu")
def test_what_is_no_device() -> None:
    with pytest.raises(NoSuchDevice, match=re.escape("got the device 'gpu', wanted cpu, cuda or")):
        find_device("gpu")


@pytest.mark.usefixtures("no_gpu")
def test_without_a_gpu_it_is_the_cpu() -> None:
    assert find_device("auto") == find_device("cpu") == torch.device("cpu")


def test_one_of_two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert find_device("auto") == torch.device("cuda")
    assert find_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(NoSuchDevice, match=r"cuda:2.* has cpu, cuda \(2\)"):
        find_device("cuda:2")
