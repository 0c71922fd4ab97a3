"""Generations against nnsight 0.8, bit by bit: the second oracle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nnsight_oracle import run_nnsight
from tiny_models import HIDDEN, IDS, Setting
from torch import Tensor

NEW = 8
_ASK = "t['ids'], max_new_tokens=8, do_sample=False, eos_token_id=None"
NNSIGHT = {
    "steering": f"""
        with model.generate({_ASK}) as tracer:
            kept = list().save()
            for step in tracer.iter[0:8]:
                model.model.layers[3].output[:, -1] += t["direction"]
                kept.append(model.model.layers[4].output.clone())
            ids = tracer.result.save()
        out.update(ids=ids, **{{f"h{{i}}": one for i, one in enumerate(kept)}})
    """,
    "one_step": f"""
        with model.generate({_ASK}) as tracer:
            kept = list().save()
            for step in tracer.iter[0:8]:
                if step == 2:
                    model.model.layers[1].mlp.output[:] = 0
                kept.append(model.lm_head.output.clone())
            ids = tracer.result.save()
        out.update(ids=ids, **{{f"h{{i}}": one for i, one in enumerate(kept)}})
    """,
}


@pytest.fixture(scope="module")
def given() -> dict[str, Tensor]:
    return {"ids": torch.tensor([IDS]), "direction": torch.linspace(-2, 2, HIDDEN)}


@pytest.fixture(scope="module")
def answers(
    tiny_folder: Callable[[str], Path],
    given: dict[str, Tensor],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, dict[str, Tensor]]:
    return run_nnsight(tiny_folder("llama"), NNSIGHT, given, tmp_path_factory.mktemp("nnsight"))


def test_steering_at_every_step(
    llama: Setting, given: dict[str, Tensor], answers: dict[str, dict[str, Tensor]]
) -> None:
    model, kept = llama.model, []
    with model.generate(given["ids"], max_new_tokens=NEW, eos_token_id=[]) as tracer:
        for _ in tracer.iter[0:NEW]:
            model.model.layers[3].output[:, -1] += given["direction"]
            kept.append(model.model.layers[4].output.save())
        ids = tracer.result.save()
    check(answers["steering"], ids, kept)


def test_an_edit_at_one_step(
    llama: Setting, given: dict[str, Tensor], answers: dict[str, dict[str, Tensor]]
) -> None:
    model, kept = llama.model, []
    with model.generate(given["ids"], max_new_tokens=NEW, eos_token_id=[]) as tracer:
        for step in tracer.iter[0:NEW]:
            if step == 2:
                model.model.layers[1].mlp.output[:] = 0
            kept.append(model.lm_head.output.save())
        ids = tracer.result.save()
    check(answers["one_step"], ids, kept)


def check(wanted: dict[str, Tensor], ids: Any, kept: list[Any]) -> None:
    assert torch.equal(ids, wanted["ids"])
    assert len(kept) == len(wanted) - 1
    for index, one in enumerate(kept):
        assert torch.equal(one, wanted[f"h{index}"]), index
