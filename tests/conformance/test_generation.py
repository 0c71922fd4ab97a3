"""Generations over one to four spans, bit-equal to transformers' `generate` with torch hooks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
from generation_oracle import generate_hooked
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import glasshive

KINDS = ("llama", "gpt2", "gemma3_text", "mixtral", "mamba2")
CUTS: tuple[tuple[int, ...], ...] = ((), (3,), (2, 4), (1, 3, 5))
NEW = 34  # well over the windows of Gemma's sliding layers
PROMPT = [[3, 14, 15, 92, 65, 35, 89, 79, 32, 38]]
OTHER = [[27, 18, 28, 18, 28, 45, 90, 45, 23, 53]]


@dataclass(frozen=True)
class Pair:
    """One tiny model: plain Hugging Face, and the same over spans."""

    plain: Any
    model: Any
    blocks: str

    def block(self, index: int) -> str:
        """The path of a block."""
        return f"{self.blocks}.{index}"

    def at(self, path: str) -> Any:
        """The module at a path."""
        here = self.model
        for name in path.split("."):
            here = here[int(name)] if name.isdigit() else getattr(here, name)
        return here


GetPair = Callable[[str, tuple[int, ...]], Pair]


@pytest.fixture(scope="module")
def get_pair(tmp_path_factory: pytest.TempPathFactory) -> GetPair:
    """A pair by kind and cuts; each is made once."""
    plain: dict[str, tuple[Any, Path]] = {}
    made: dict[tuple[str, tuple[int, ...]], Pair] = {}

    def get(kind: str, cuts: tuple[int, ...]) -> Pair:
        attention = "eager" if "mamba" in kind else "sdpa"
        if kind not in plain:
            torch.manual_seed(0)
            settings = {**architectures.TINY[kind], "eos_token_id": None}
            config = CONFIG_MAPPING[kind](**settings)
            whole = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
            folder = tmp_path_factory.mktemp(kind)
            whole.eval().requires_grad_(False).save_pretrained(folder)
            again = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention)
            plain[kind] = again.eval().requires_grad_(False), folder
        if (kind, cuts) not in made:
            whole, folder = plain[kind]
            model = glasshive.local(folder, cuts=cuts, attention=attention)
            made[kind, cuts] = Pair(whole, model, model.outline.blocks_path)
        return made[kind, cuts]

    return get


@pytest.fixture(
    params=[(kind, cuts) for kind in KINDS for cuts in CUTS],
    ids=lambda param: f"{param[0]}-{len(param[1]) + 1}",
)
def pair(request: pytest.FixtureRequest, get_pair: GetPair) -> Pair:
    """Every kind over one to four spans."""
    return get_pair(*request.param)


@pytest.fixture(params=[CUTS[1], CUTS[-1]], ids=lambda cuts: f"{len(cuts) + 1}-spans")
def llama(request: pytest.FixtureRequest, get_pair: GetPair) -> Pair:
    """A tiny Llama over two spans and over four."""
    return get_pair("llama", request.param)


def equal(saved: list[Any], wanted: list[Tensor]) -> bool:
    return len(saved) == len(wanted) and all(map(torch.equal, saved, wanted))


def test_tokens_and_every_step_of_every_block(pair: Pair) -> None:
    ids = torch.tensor(PROMPT)
    paths = [*(pair.block(i) for i in range(6)), "lm_head"]
    wanted_ids, wanted = generate_hooked(pair.plain, ids, NEW, reads=paths)
    with pair.model.generate(ids, max_new_tokens=NEW) as tracer:
        saved: dict[str, list[Any]] = {path: [] for path in paths}
        tokens = []
        for _ in tracer.iter[:]:
            for path in paths:
                saved[path].append(pair.at(path).output.save())
            tokens.append(pair.model.generator.output.save())
        result = tracer.result.save()
    assert torch.equal(tracer.output_ids, wanted_ids)
    assert torch.equal(result, wanted_ids)
    assert torch.equal(torch.stack(tokens, 1), wanted_ids[:, ids.shape[1] :])
    for path in paths:
        assert len(saved[path]) == NEW
        # A head may compute the prompt's last position only.
        assert equal([one[:, -1] for one in saved[path]], [one[:, -1] for one in wanted[path]])


def test_steering_at_every_step(pair: Pair) -> None:
    ids = torch.tensor(PROMPT)
    direction = torch.linspace(-3, 3, 64)

    def steer(step: int, output: Tensor) -> None:
        output[:, -1] += direction

    path = pair.block(2)
    wanted_ids, wanted = generate_hooked(
        pair.plain, ids, NEW, edits={path: steer}, reads=[pair.block(4)]
    )
    plain_ids, _ = generate_hooked(pair.plain, ids, NEW)
    assert not torch.equal(wanted_ids, plain_ids), "an edit that changes nothing shows nothing"
    with pair.model.generate(ids, max_new_tokens=NEW) as tracer:
        saved = []
        for _ in tracer.all():
            pair.at(path).output[:, -1] += direction
            saved.append(pair.at(pair.block(4)).output.save())
    assert torch.equal(tracer.output_ids, wanted_ids)
    assert equal(saved, wanted[pair.block(4)])


def test_ablation_at_one_step_is_seen_by_all_later_ones(pair: Pair) -> None:
    ids = torch.tensor(PROMPT)
    path = pair.block(3)

    def ablate(step: int, output: Tensor) -> Tensor | None:
        return torch.zeros_like(output) if step == 5 else None

    wanted_ids, wanted = generate_hooked(pair.plain, ids, NEW, edits={path: ablate}, reads=[path])
    with pair.model.generate(ids, max_new_tokens=NEW) as tracer:
        saved = []
        for step in tracer.iter[:]:
            if step == 5:
                pair.at(path).output = torch.zeros_like(pair.at(path).output)
            saved.append(pair.at(path).output.save())
    assert torch.equal(tracer.output_ids, wanted_ids)
    assert equal(saved, wanted[path])


def test_a_patch_of_the_prompt_from_another_invoke(pair: Pair) -> None:
    """What one prompt has at block 4 goes into another at block 1, and is read at every step."""
    clean, corrupt = torch.tensor(PROMPT), torch.tensor(OTHER)
    _, kept = generate_hooked(pair.plain, clean, 1, reads=[pair.block(4)])

    def patch(step: int, output: Tensor) -> None:
        if step == 0:
            output[:, 3:6] = kept[pair.block(4)][0][:, 3:6]

    wanted_ids, wanted = generate_hooked(
        pair.plain, corrupt, NEW, edits={pair.block(1): patch}, reads=[pair.block(5)]
    )
    with pair.model.generate() as tracer:
        with tracer.invoke(clean, max_new_tokens=1):
            value = pair.at(pair.block(4)).output[:, 3:6]
        with tracer.invoke(corrupt, max_new_tokens=NEW):
            pair.at(pair.block(1)).output[:, 3:6] = value
            saved = [pair.at(pair.block(5)).output.save() for _ in tracer.iter[:]]
    assert torch.equal(tracer.output_ids[1], wanted_ids)
    assert equal(saved, wanted[pair.block(5)])


def test_a_value_of_one_step_goes_into_a_later_one(pair: Pair) -> None:
    ids = torch.tensor(PROMPT)
    kept: list[Tensor] = []

    def keep(step: int, output: Tensor) -> None:
        if step == 2:
            kept.append(output.clone())

    def add(step: int, output: Tensor) -> None:
        if step == 7:
            output += kept[0]

    wanted_ids, wanted = generate_hooked(
        pair.plain,
        ids,
        NEW,
        edits={pair.block(4): keep, pair.block(1): add},
        reads=["lm_head"],
    )
    with pair.model.generate(ids, max_new_tokens=NEW) as tracer:
        for step in tracer.iter[[2, 7]]:
            if step == 2:
                value = pair.at(pair.block(4)).output
            else:
                pair.at(pair.block(1)).output += value
        saved = [pair.model.lm_head.output[:, -1].save() for _ in tracer.iter[:]]
    assert torch.equal(tracer.output_ids, wanted_ids)
    assert equal(saved, [one[:, -1] for one in wanted["lm_head"]])


def test_two_invokes_of_different_lengths(pair: Pair) -> None:
    one, two = torch.tensor(PROMPT), torch.tensor([[5, 6, 7]])
    path = pair.block(3)
    wanted = [
        generate_hooked(pair.plain, one, NEW, reads=[path]),
        generate_hooked(pair.plain, two, 21, reads=[path]),
    ]
    with pair.model.generate(max_new_tokens=NEW) as tracer:
        with tracer.invoke(one):
            first = [pair.at(path).output.save() for _ in tracer.iter[:]]
        with tracer.invoke(two, max_new_tokens=21):
            second = [pair.at(path).output.save() for _ in tracer.iter[:]]
    for ids, saved, (wanted_ids, reads) in zip(
        tracer.output_ids, (first, second), wanted, strict=True
    ):
        assert torch.equal(ids, wanted_ids)
        assert equal(saved, reads[path])


def test_rows_of_one_batch_and_of_invokes_that_share_passes(llama: Pair) -> None:
    rows = torch.tensor([PROMPT[0], OTHER[0], PROMPT[0][::-1]])
    path = llama.block(3)
    wanted_ids, wanted = generate_hooked(llama.plain, rows, 12, reads=[path])
    with llama.model.generate(rows, max_new_tokens=12) as tracer:
        saved = [llama.at(path).output.save() for _ in tracer.iter[:]]
    assert torch.equal(tracer.output_ids, wanted_ids)
    assert equal(saved, wanted[path])
    with llama.model.generate(max_new_tokens=12) as tracer:
        shared = []
        for row in rows:
            with tracer.invoke(row):
                shared.append([llama.at(path).output.save() for _ in tracer.iter[:]])
    assert tracer.result.passes == 12
    assert torch.equal(torch.cat(list(tracer.output_ids)), wanted_ids)
    assert equal([torch.cat(one) for one in zip(*shared, strict=True)], wanted[path])


@pytest.mark.parametrize("kind", [*KINDS, "mamba", "falcon_mamba"])
@pytest.mark.parametrize("cuts", [(), (2, 4)], ids=["1-span", "3-spans"])
def test_a_left_padded_batch(kind: str, cuts: tuple[int, ...], get_pair: GetPair) -> None:
    pair = get_pair(kind, cuts)
    prompts = [PROMPT[0], OTHER[0][:6], [7]]
    longest = len(prompts[0])
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in prompts])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts])
    path = pair.block(3)

    def steer(step: int, output: Tensor) -> None:
        output[:, -1] += 1.5

    wanted_ids, wanted = generate_hooked(
        pair.plain, ids, 12, attention_mask=mask, edits={path: steer}, reads=[path]
    )
    given = {"input_ids": ids, "attention_mask": mask}  # as a tokenizer gives them
    with pair.model.generate(given, max_new_tokens=12) as tracer:
        saved = []
        for _ in tracer.iter[:]:
            pair.at(path).output[:, -1] += 1.5
            saved.append(pair.at(path).output[:, -1].save())
    assert torch.equal(tracer.output_ids, wanted_ids)
    assert equal(saved, [one[:, -1] for one in wanted[path]])
