"""A trace that fails while it runs: the user sees why, at the line, after one attempt."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import glasshive
from glasshive.client import job as jobs
from glasshive.client.errors import PeerFailed
from glasshive.client.job import Job
from glasshive.dht.tensor_frames import receive_tensor
from glasshive.peer.host import Host

PROMPTS = [list(range(1, 25))] * 200  # a hidden state is several slices


@pytest.mark.parametrize("blamed", [0, 3])
def test_a_failure_is_heard_however_slow_the_client_reads(
    tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, blamed: int
) -> None:
    """A save is on its way when a node fails, and a neighbour sees the stream end."""
    model = glasshive.local(tiny_folder("llama"), cuts=(3,))
    attempts: list[Job] = []
    failed: list[bool] = []
    run, fail = Job.run, Host._fail

    async def noted_run(self: Job) -> Any:
        attempts.append(self)
        return await run(self)

    async def noted_fail(self: Host, *args: Any) -> None:
        failed.append(True)
        await fail(self, *args)

    async def late(*args: Any) -> bytearray:
        async with asyncio.timeout(30):
            while not failed:  # noqa: ASYNC110 (it comes true in another task)
                await asyncio.sleep(0.01)
        return await receive_tensor(*args)

    monkeypatch.setattr(Job, "run", noted_run)
    monkeypatch.setattr(Host, "_fail", noted_fail)
    monkeypatch.setattr(jobs, "receive_tensor", late)
    with pytest.raises(PeerFailed, match="index") as caught:
        with model.trace(PROMPTS, pass_rows=256, progress=False):
            hidden = model.model.layers[blamed].output
            hidden.save()
            torch.index_select(hidden, 1, hidden[0, :, 0].argsort() + 1000).save()  # fails
            model.lm_head.output[:, -1].save()
    lines = Path(__file__).read_text().splitlines()
    (line,) = [i for i, text in enumerate(lines, 1) if text.endswith("# fails")]
    assert str(caught.value).startswith(f"test_errors_late.py:{line}: ShapeMismatch at peer ")
    assert len(attempts) == 1
