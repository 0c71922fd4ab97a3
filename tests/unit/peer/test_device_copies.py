"""The loop answers everybody, so that whatever waits for the device happens on other threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import glasshive
from glasshive.peer import executor, host, hosted_trace
from glasshive.peer.executor import Executor
from glasshive.peer.generation import PassInputs


def test_copies_and_waits_are_not_on_the_loop(
    save_tiny_llama: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[str]] = {}

    def watch(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def noting(*args: Any, **kwargs: Any) -> Any:
            seen.setdefault(name, []).append(threading.current_thread().name.partition("_")[0])
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, noting)

    watch(PassInputs, "on")
    watch(Executor, "put")
    watch(Executor, "run")
    watch(executor, "wait_for")
    watch(hosted_trace, "tensor_to_bytes")
    watch(host, "tensor_from_bytes")
    model = glasshive.local(save_tiny_llama(), cuts=(3,))
    with model.trace([[1, 2, 3]]):
        early = model.model.layers[0].output
        late = model.model.layers[4].output + torch.full((32,), 2.0)
        both = (early + late).save()
    assert both.shape == (1, 3, 32)

    assert seen["put"] == ["torch"]  # `early`, at the second peer
    assert seen["tensor_to_bytes"] == ["torch"] * 3  # it, the hidden states, and what is saved
    assert set(seen["run"]) == {"torch"}
    # Every stage has its inputs brought over, and is done when the device is.
    assert len(seen["run"]) == len(seen["on"]) == len(seen["wait_for"]) >= 2
    assert set(seen["tensor_from_bytes"]) <= {"check", "glasshive-local"}
    assert seen["tensor_from_bytes"].count("check") == 1  # the constant
