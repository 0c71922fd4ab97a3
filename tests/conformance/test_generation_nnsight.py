"""Generations against nnsight 0.8, bit by bit: the second oracle."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from nnsight_oracle import run_nnsight
from tiny_models import HIDDEN, IDS, NAMES, OTHER, Setting
from torch import Tensor

NEW = 8
SHORT = 5  # of the second of two invokes
_GREEDY = "do_sample=False, eos_token_id=None"
_CHOICE = f"max_new_tokens={NEW}, {_GREEDY}"
# BLOCKS is where an architecture has them.
NNSIGHT = {
    "steering": f"""
        with model.generate(t["ids"], {_CHOICE}) as tracer:
            kept = list().save()
            for step in tracer.iter[0:{NEW}]:
                BLOCKS[3].output[:, -1] += t["direction"]
                kept.append(BLOCKS[4].output.clone())
            ids = tracer.result.save()
        out.update(ids=ids, **{{f"h{{i}}": one for i, one in enumerate(kept)}})
    """,
    "one_step": f"""
        with model.generate(t["ids"], {_CHOICE}) as tracer:
            kept = list().save()
            for step in tracer.iter[0:{NEW}]:
                if step == 2:
                    BLOCKS[1].mlp.output[:] = 0
                kept.append(model.lm_head.output.clone())
            ids = tracer.result.save()
        out.update(ids=ids, **{{f"h{{i}}": one for i, one in enumerate(kept)}})
    """,
    "patch": f"""
        with model.trace(t["ids"]):
            clean = BLOCKS[4].output[:, 2:4].clone().save()
        with model.generate(t["other"], {_CHOICE}) as tracer:
            kept = list().save()
            for step in tracer.iter[0:{NEW}]:
                if step == 0:
                    BLOCKS[1].output[:, 2:4] = clean
                kept.append(BLOCKS[5].output.clone())
            ids = tracer.result.save()
        out.update(ids=ids, **{{f"h{{i}}": one for i, one in enumerate(kept)}})
    """,
    "invokes": f"""
        with model.generate({_CHOICE}) as tracer:
            with tracer.invoke(t["ids"]):
                one = list().save()
                for step in tracer.iter[0:{NEW}]:
                    BLOCKS[3].output[:, -1] += t["direction"]
                    one.append(BLOCKS[4].output.clone())
            with tracer.invoke(t["other"]):
                two = list().save()
                for step in tracer.iter[0:{SHORT}]:
                    two.append(BLOCKS[4].output.clone())
            with tracer.invoke():
                ids = tracer.result.save()
        out.update(ids=ids, **{{f"h{{i}}": x for i, x in enumerate([*one, *two])}})
    """,
    # nnsight's invokes have one length, so each of two lengths is alone.
    "lengths": f"""
        with model.generate(t["ids"], {_CHOICE}) as tracer:
            one = list().save()
            for step in tracer.iter[0:{NEW}]:
                BLOCKS[3].output[:, -1] += t["direction"]
                one.append(BLOCKS[4].output.clone())
            ids = tracer.result.save()
        with model.generate(t["short"], max_new_tokens={SHORT}, {_GREEDY}) as tracer:
            two = list().save()
            for step in tracer.iter[0:{SHORT}]:
                two.append(BLOCKS[4].output.clone())
            short = tracer.result.save()
        out.update(ids=ids, short=short)
        out.update({{f"h{{i}}": x for i, x in enumerate([*one, *two])}})
    """,
}


@pytest.fixture(scope="module")
def given() -> dict[str, Tensor]:
    return {
        "ids": torch.tensor([IDS]),
        "other": torch.tensor([OTHER]),
        "short": torch.tensor([OTHER[:4]]),
        "direction": torch.linspace(-2, 2, HIDDEN),
    }


@pytest.fixture(scope="module")
def get_answers(
    tiny_folder: Callable[[str], Path],
    given: dict[str, Tensor],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], dict[str, dict[str, Tensor]]]:
    """What nnsight gives for an architecture; it is asked once for each."""
    made: dict[str, dict[str, dict[str, Tensor]]] = {}

    def get(kind: str) -> dict[str, dict[str, Tensor]]:
        if kind not in made:
            texts = {
                name: text.replace("BLOCKS", f"model.{NAMES[kind].blocks}")
                for name, text in NNSIGHT.items()
            }
            scratch = tmp_path_factory.mktemp(f"nnsight-{kind}")
            made[kind] = run_nnsight(tiny_folder(kind), texts, given, scratch)
        return made[kind]

    return get


@pytest.fixture
def answers(
    tiny: Setting, get_answers: Callable[[str], dict[str, dict[str, Tensor]]]
) -> dict[str, dict[str, Tensor]]:
    return get_answers(tiny.kind)


def test_steering_at_every_step(
    tiny: Setting, given: dict[str, Tensor], answers: dict[str, dict[str, Tensor]]
) -> None:
    kept = []
    with tiny.model.generate(given["ids"], max_new_tokens=NEW, eos_token_id=[]) as tracer:
        for _ in tracer.iter[0:NEW]:
            tiny.at(tiny.block(3)).output[:, -1] += given["direction"]
            kept.append(tiny.at(tiny.block(4)).output.save())
        ids = tracer.result.save()
    check(answers["steering"], ids, kept)


def test_an_edit_at_one_step(
    tiny: Setting, given: dict[str, Tensor], answers: dict[str, dict[str, Tensor]]
) -> None:
    kept = []
    with tiny.model.generate(given["ids"], max_new_tokens=NEW, eos_token_id=[]) as tracer:
        for step in tracer.iter[0:NEW]:
            if step == 2:
                tiny.at(tiny.block(1, "mlp")).output[:] = 0
            kept.append(tiny.model.lm_head.output.save())
        ids = tracer.result.save()
    check(answers["one_step"], ids, kept)


def test_a_patch_of_the_prompt_is_read_at_every_step(
    tiny: Setting, given: dict[str, Tensor], answers: dict[str, dict[str, Tensor]]
) -> None:
    """From a later block of another prompt, which here is an invoke of the same generation."""
    with tiny.model.generate(eos_token_id=[]) as tracer:
        with tracer.invoke(given["ids"], max_new_tokens=1):
            clean = tiny.at(tiny.block(4)).output[:, 2:4]
        with tracer.invoke(given["other"], max_new_tokens=NEW):
            tiny.at(tiny.block(1)).output[:, 2:4] = clean
            kept = [tiny.at(tiny.block(5)).output.save() for _ in tracer.iter[:]]
    check(answers["patch"], tracer.output_ids[1], kept)


def steer_one_of_two(
    tiny: Setting, direction: Tensor, prompts: tuple[Tensor, Tensor], **second: int
) -> tuple[Any, list[Any]]:
    """A generation of two invokes, read for so many steps, of which only the first is edited."""
    with tiny.model.generate(max_new_tokens=NEW, eos_token_id=[]) as tracer:
        with tracer.invoke(prompts[0]):
            kept = []
            for _ in tracer.iter[:]:
                tiny.at(tiny.block(3)).output[:, -1] += direction
                kept.append(tiny.at(tiny.block(4)).output.save())
        with tracer.invoke(prompts[1], **second):
            kept += [tiny.at(tiny.block(4)).output.save() for _ in tracer.iter[0:SHORT]]
    return tracer, kept


def test_two_invokes_that_share_passes(
    tiny: Setting, given: dict[str, Tensor], answers: dict[str, dict[str, Tensor]]
) -> None:
    prompts = given["ids"], given["other"]
    tracer, kept = steer_one_of_two(tiny, given["direction"], prompts)
    assert tracer.result.passes == NEW
    check(answers["invokes"], torch.cat(list(tracer.output_ids)), kept)


def test_two_invokes_of_different_lengths(
    tiny: Setting, given: dict[str, Tensor], answers: dict[str, dict[str, Tensor]]
) -> None:
    prompts = given["ids"], given["short"]
    tracer, kept = steer_one_of_two(tiny, given["direction"], prompts, max_new_tokens=SHORT)
    one, two = tracer.output_ids
    wanted = dict(answers["lengths"])
    assert torch.equal(two, wanted.pop("short"))
    check(wanted, one, kept)


def check(wanted: Mapping[str, Tensor], ids: Any, kept: list[Any]) -> None:
    assert torch.equal(ids, wanted["ids"])
    assert len(kept) == len(wanted) - 1
    for index, one in enumerate(kept):
        assert torch.equal(one, wanted[f"h{index}"]), index
