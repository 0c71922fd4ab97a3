"""Generations over real host processes, and what happens when one of these is killed meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llama import save_llama
from transformers import LlamaForCausalLM

import glasshive
from glasshive.testing import LocalPeer, LocalSwarm

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:path is deprecated:DeprecationWarning"),
]

PROMPT = torch.tensor([[3, 14, 15, 9, 26, 5, 35], [1, 2, 3, 4, 5, 6, 7]])
NEW = 64
PENALTY = 1.5  # left alone, a tiny model says one token again and again


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("models") / "tiny-llama", 6)


@pytest.fixture(scope="module")
def hive(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalSwarm]:
    """Blocks 0:3 by two hosts, and 3:6 by two."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLASSHIVE_CACHE", str(tmp_path_factory.mktemp("cache")))
        with LocalSwarm(folder, [(0, 3), (3, 6), (0, 3), (3, 6)]) as running:
            yield running


@pytest.fixture
def model(hive: LocalSwarm) -> Iterator[Any]:
    with glasshive.connect(hive.config) as swarm:
        yield swarm.model(hive.model_name)


@pytest.fixture(scope="module")
def wanted(folder: Path) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """What transformers' own `generate` gives with a hook that steers block 2."""
    plain: Any = LlamaForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
    plain.eval().requires_grad_(False)
    kept: list[torch.Tensor] = []

    def steer(module: Any, args: Any, output: torch.Tensor) -> None:
        output[:, -1] += 1.5

    def keep(module: Any, args: Any, output: torch.Tensor) -> None:
        kept.append(output.clone())

    plain.model.layers[2].register_forward_hook(steer)
    plain.model.layers[4].register_forward_hook(keep)
    ids = plain.generate(
        PROMPT,
        attention_mask=torch.ones_like(PROMPT),
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=None,
        repetition_penalty=PENALTY,
    )
    return ids, kept


class Killer:
    """A streamer that kills a host once some tokens have come."""

    def __init__(self, host: LocalPeer) -> None:
        self.put_in: list[torch.Tensor] = []
        self.killed_at = 0
        self._host = host

    def put(self, value: torch.Tensor) -> None:
        self.put_in.append(value)
        if self._host.running and len(self.put_in) > 2:
            self._host.kill()
            self.killed_at = len(self.put_in)

    def end(self) -> None:
        """Nothing more comes."""


def steered(model: Any, work: int = 1, **options: Any) -> tuple[Any, list[Any]]:
    """The same over the swarm, with some work at each step that takes its time."""
    big = torch.eye(work)
    options |= {"max_new_tokens": NEW, "eos_token_id": [], "repetition_penalty": PENALTY}
    with model.generate(PROMPT, **options) as tracer:
        saved = []
        for _ in tracer.iter[:]:
            model.model.layers[2].output[:, -1] += 1.5
            states = model.model.layers[4].output
            saved.append(states.save())
            ((big * states[0, -1, 0]) @ big).sum().save()
    return tracer, saved


def test_a_generation_equals_one_machine(
    model: Any, wanted: tuple[torch.Tensor, list[torch.Tensor]]
) -> None:
    tracer, saved = steered(model)
    assert torch.equal(tracer.output_ids, wanted[0])
    assert len(saved) == NEW
    assert all(map(torch.equal, saved, wanted[1]))
    assert [hop.blocks for hop in tracer.result.hops] == ["0:3", "3:6"]


@pytest.mark.parametrize("index", [0, 1], ids=["first", "last"])
def test_a_killed_peer_costs_nothing_but_time(
    index: int,
    hive: LocalSwarm,
    model: Any,
    wanted: tuple[torch.Tensor, list[torch.Tensor]],
) -> None:
    """In the middle of its steps: the generation is run again on another route, all of it."""
    used = steered(model)[0].result.hops[index].peer
    host = next(one for one in hive.hosts if one.peer_id == used)
    killer = Killer(host)
    try:
        tracer, saved = steered(model, work=800, streamer=killer)
    finally:
        host.start()
    assert 2 < killer.killed_at < NEW, "killed in the middle"
    assert tracer.result.retried >= 1
    assert used not in [hop.peer for hop in tracer.result.hops]
    assert torch.equal(tracer.output_ids, wanted[0])
    assert all(map(torch.equal, saved, wanted[1]))
    assert torch.equal(torch.stack(killer.put_in[1:], 1), wanted[0][:, PROMPT.shape[1] :])
