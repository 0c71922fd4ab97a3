"""A trace that fails while it runs: the user sees why, at the line, after one attempt."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import glasshive
from glasshive.client.errors import PeerFailed
from glasshive.client.job import Job
from glasshive.client.peer_stream import PeerStream
from glasshive.dht.framing import Frame
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
    run, fail, receive = Job.run, Host._fail, PeerStream.receive

    async def noted_run(self: Job) -> Any:
        attempts.append(self)
        return await run(self)

    async def noted_fail(self: Host, *args: Any) -> None:
        failed.append(True)
        await fail(self, *args)

    async def late(self: PeerStream, deadline_seconds: float | None = None) -> Frame:
        async with asyncio.timeout(30):
            while self.hop.state == "running" and not failed:  # noqa: ASYNC110 (in another task)
                await asyncio.sleep(0.01)
        return await receive(self, deadline_seconds)

    monkeypatch.setattr(Job, "run", noted_run)
    monkeypatch.setattr(Host, "_fail", noted_fail)
    monkeypatch.setattr(PeerStream, "receive", late)
    with pytest.raises(PeerFailed, match="index") as caught:
        with model.trace(PROMPTS, pass_rows=256, progress=False):
            model.model.layers[blamed].output.save()
            hidden = model.model.layers[blamed + 1].output
            torch.index_select(hidden, 1, hidden[0, :, 0].argsort() + 1000).save()  # fails
            model.lm_head.output[:, -1].save()
    lines = Path(__file__).read_text().splitlines()
    (line,) = [i for i, text in enumerate(lines, 1) if text.endswith("# fails")]
    assert str(caught.value).startswith(f"test_errors_late.py:{line}: ShapeMismatch at peer ")
    assert len(attempts) == 1
