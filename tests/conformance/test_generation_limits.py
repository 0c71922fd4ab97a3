"""What a host's limits and policy say of generations."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llama import save_llama

import glasshive
from glasshive.client import tries
from glasshive.client.errors import PeerBusy, PeerError, PeerFailed
from glasshive.graph.graph import Graph, NodeId, Read, Ref, Save, Site, Write
from glasshive.peer.host_limits import HostLimits
from glasshive.security.errors import NotAllowed
from glasshive.security.policy import Policy

PROMPT = torch.tensor([[3, 14, 15, 9, 26]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("models") / "tiny", 2)


def generate(model: Any, new: int, **options: Any) -> None:
    with model.generate(PROMPT, max_new_tokens=new, eos_token_id=[], retries=0, **options):
        pass


def test_a_host_may_run_none(folder: Path) -> None:
    model = glasshive.local(folder, limits=HostLimits(generations_per_client=0))
    with pytest.raises(PeerFailed, match="generations are not allowed here") as caught:
        generate(model, 2)
    assert caught.value.code == "NotAllowed"
    with model.trace(PROMPT):
        model.lm_head.output.save()


def test_a_client_has_so_many_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tries, "LEAST_PAUSE_SECONDS", math.inf)  # nobody waits for a place
    model = glasshive.local(folder, limits=HostLimits(generations_per_client=1))
    met: list[PeerError] = []

    class Second:
        """Begins another generation in the middle of the first."""

        def put(self, value: torch.Tensor) -> None:
            if value.dim() == 1 and not met:  # a token: the first one runs
                with pytest.raises(PeerBusy, match="1 generations of yours are running") as caught:
                    generate(model, 2)
                met.append(caught.value)

        def end(self) -> None:
            """Nothing more comes."""

    big = torch.eye(600)
    with model.generate(
        PROMPT, max_new_tokens=60, eos_token_id=[], streamer=Second(), retries=0
    ) as tracer:
        for _ in tracer.iter[:]:
            states = model.model.layers[1].output
            ((big * states[0, -1, 0]) @ big).sum().save()
    assert len(met) == 1
    generate(model, 2)


def test_tokens_are_read_by_everybody_and_written_by_who_may() -> None:
    policy = replace(Policy.of_release(), readable=("lm_head",), writable=("lm_head",))
    site, value = Site("generator", "output"), NodeId(0)
    read = {value: Read(site, 0), NodeId(1): Save(Ref(value), "t")}
    policy.check_graph(Graph(read))
    with pytest.raises(NotAllowed, match="writing 'generator' is not allowed"):
        policy.check_graph(Graph({**read, NodeId(2): Write(site, 0, Ref(value), "set")}))
