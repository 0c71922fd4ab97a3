"""The real model over one to four spans, bit-equal to plain Hugging Face with torch hooks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from generation_oracle import generate_hooked
from oracle import Edit, Read, run_hooked

import glasshive
from glasshive import demo_experiments, demo_oracle
from glasshive.models import fetch_smollm2

pytestmark = [pytest.mark.real_model, pytest.mark.timeout(300)]

PROMPT = "The Eiffel Tower is in the city of"
NEW = 32


@pytest.fixture(scope="module")
def folder() -> Path:
    """The checkpoint; fetched once into the cache directory."""
    return fetch_smollm2()


@pytest.fixture(scope="module")
def plain(folder: Path) -> tuple[Any, Any]:
    """Plain Hugging Face: the model and its tokenizer."""
    model, tokenizer = demo_oracle.load(folder)
    return model.requires_grad_(False), tokenizer


@pytest.fixture(scope="module", params=[(), (15,), (10, 20)], ids=["1-span", "2-spans", "3-spans"])
def model(folder: Path, request: pytest.FixtureRequest) -> Any:
    """The same through glasshive."""
    return glasshive.local(folder, cuts=request.param)


def test_it_says_paris(model: Any) -> None:
    with model.trace(PROMPT):
        logits = model.lm_head.output[:, -1].save()
    assert model.tokenizer.decode(logits.argmax(-1)) == " Paris"


def test_every_layer_and_the_logits(model: Any, plain: tuple[Any, Any]) -> None:
    ids = torch.tensor([demo_oracle.token_ids(plain[1], PROMPT)])
    layers = [f"model.layers.{i}" for i in range(30)]
    wanted = run_hooked(plain[0], ids, reads=[Read(path, "output", ()) for path in layers])
    with model.trace(ids):
        saved = [layer.output.save() for layer in model.model.layers]
        logits = model.lm_head.output.save()
    for path, one in zip(layers, saved, strict=True):
        assert torch.equal(one, wanted[path, "output", ()]), path
    assert torch.equal(logits, wanted["logits"])


def test_edits_on_every_span(model: Any, plain: tuple[Any, Any]) -> None:
    ids = torch.randint(100, 9000, (4, 12), generator=torch.Generator().manual_seed(1))

    def zero_last(value: torch.Tensor) -> None:
        value[:, -1] = 0

    edits = [
        Edit("model.layers.3.mlp", "output", (), zero_last, "inplace"),
        Edit("model.layers.12.input_layernorm", "input", (0,), zero_last, "inplace"),
        Edit("model.layers.17.self_attn.o_proj", "input", (0,), lambda x: x * 0.5, "set"),
        Edit("model.layers.25.self_attn", "output", (0,), zero_last, "inplace"),
        Edit("model.norm", "output", (), lambda x: x.flip(0), "set"),
    ]
    wanted = run_hooked(plain[0], ids, edits=edits)
    layers = model.model.layers
    with model.trace(ids):
        layers[3].mlp.output[:, -1] = 0
        layers[12].input_layernorm.input[:, -1] = 0
        layers[17].self_attn.o_proj.input = layers[17].self_attn.o_proj.input * 0.5
        layers[25].self_attn.output[0][:, -1] = 0
        model.model.norm.output = model.model.norm.output.flip(0)
        logits = model.lm_head.output.save()
    assert torch.equal(logits, wanted["logits"])


def test_the_demo_s_lens_and_steering(model: Any, plain: tuple[Any, Any]) -> None:
    lens = demo_experiments.logit_lens(model).result
    assert lens.largest_difference(demo_oracle.logit_lens(*plain)) == 0.0
    assert lens.top_tokens[-1][-1] == " Shakespeare"
    steering = demo_experiments.steering(model).result
    assert steering.largest_difference(demo_oracle.steering(*plain)) == 0.0
    assert steering.steered_top[0][0] == " whale"


def test_a_sweep_of_thirty_patches_is_one_pass(model: Any, plain: tuple[Any, Any]) -> None:
    spec = demo_oracle.DEMO.patching
    clean = demo_oracle.token_ids(plain[1], spec.clean)
    corrupted = demo_oracle.token_ids(plain[1], spec.corrupted)
    at = next(i for i, (a, b) in enumerate(zip(clean, corrupted, strict=True)) if a != b)
    layers = model.model.layers
    saved = []
    with model.trace() as tracer:
        with tracer.invoke(clean):
            kept = [layer.output[:, at] for layer in layers]
        for layer, value in zip(layers, kept, strict=True):
            with tracer.invoke(corrupted):
                layer.output[:, at] = value
                saved.append(model.lm_head.output[:, -1].save())
    assert tracer.result.passes == 1

    def patch(row: int) -> Any:
        def edit(value: torch.Tensor) -> None:
            value[row, at] = value[0, at]

        return edit

    ids = torch.tensor([clean, *[corrupted] * 30])
    edits = [Edit(f"model.layers.{i}", "output", (), patch(i + 1), "inplace") for i in range(30)]
    wanted = run_hooked(plain[0], ids, edits=edits)["logits"][1:, -1]
    assert torch.equal(torch.cat([one.value for one in saved]), wanted)


@pytest.fixture(scope="module")
def dampened(plain: tuple[Any, Any]) -> tuple[torch.Tensor, dict[str, list[torch.Tensor]]]:
    """What plain Hugging Face generates with an edit at every step, to the very last."""
    ids = torch.tensor([demo_oracle.token_ids(plain[1], PROMPT)])

    def dampen(step: int, output: Any) -> None:
        output[:, -1] *= 0.9

    return generate_hooked(
        *(plain[0], ids, NEW),
        edits={"model.layers.12": dampen},
        reads=["model.layers.25", "lm_head"],
        eos_token_id=None,
    )


@pytest.mark.parametrize(
    "model",
    [(), (15,), (10, 20), (7, 15, 22)],
    indirect=True,
    ids=["1-span", "2-spans", "3-spans", "4-spans"],
)
def test_a_generation_with_an_edit_at_every_step(
    model: Any,
    plain: tuple[Any, Any],
    dampened: tuple[torch.Tensor, dict[str, list[torch.Tensor]]],
) -> None:
    wanted_ids, wanted = dampened
    with model.generate(PROMPT, max_new_tokens=NEW, eos_token_id=[]) as tracer:
        states, logits = [], []
        for _ in tracer.iter[:]:
            model.model.layers[12].output[:, -1] *= 0.9
            states.append(model.model.layers[25].output.save())
            logits.append(model.lm_head.output.save())
    assert torch.equal(tracer.output_ids, wanted_ids)
    assert tracer.new_tokens.shape == (1, NEW)
    assert tracer.text == [plain[1].decode(wanted_ids[0, -NEW:], skip_special_tokens=True)]
    for saved, reads in ((states, wanted["model.layers.25"]), (logits, wanted["lm_head"])):
        assert len(saved) == len(reads) == NEW
        assert all(map(torch.equal, saved, reads))


@pytest.mark.parametrize("model", [(10, 20)], indirect=True, ids=["3-spans"])
def test_invokes_of_a_generation_with_edits_at_some_steps(
    model: Any, plain: tuple[Any, Any]
) -> None:
    """One prompt's ablation at a step; a patch from it into another's prompt, which is read at each
    step, and a value of one step in a later one; of different lengths."""
    spec = demo_oracle.DEMO.patching
    clean, other = (
        torch.tensor([demo_oracle.token_ids(plain[1], text)]) for text in (spec.clean, PROMPT)
    )
    kept: dict[str, torch.Tensor] = {}

    def ablate(step: int, output: torch.Tensor) -> torch.Tensor | None:
        if step == 0:
            kept["prompt"] = output[:, 2:4].clone()
        return torch.zeros_like(output) if step == 5 else None

    def patch(step: int, output: torch.Tensor) -> None:
        if step == 0:
            output[:, 2:4] = kept["prompt"]
        if step == 9:
            output += kept["step 4"]

    def keep(step: int, output: torch.Tensor) -> None:
        if step == 4:
            kept["step 4"] = output.clone()

    early, late = "model.layers.6", "model.layers.23"
    wanted = [generate_hooked(plain[0], clean, 20, edits={late: ablate}, reads=[late])]
    wanted.append(
        generate_hooked(plain[0], other, 32, edits={early: patch, late: keep}, reads=[late])
    )
    layers = model.model.layers
    states: list[list[Any]] = [[], []]
    with model.generate(max_new_tokens=32) as tracer:
        with tracer.invoke(clean, max_new_tokens=20):
            for step in tracer.iter[:]:
                if step == 0:
                    value = layers[23].output[:, 2:4]
                if step == 5:
                    layers[23].output = torch.zeros_like(layers[23].output)
                states[0].append(layers[23].output.save())
        with tracer.invoke(other):
            for step in tracer.iter[:]:
                if step == 0:
                    layers[6].output[:, 2:4] = value
                if step == 4:
                    at_step_4 = layers[23].output
                if step == 9:
                    layers[6].output += at_step_4
                states[1].append(layers[23].output.save())
    assert tracer.output_ids[1].shape[1] - other.shape[1] == 32
    for ids, saved, (wanted_ids, reads) in zip(tracer.output_ids, states, wanted, strict=True):
        assert torch.equal(ids, wanted_ids)
        for one, read in zip(saved, reads[late], strict=True):
            assert torch.equal(one, read)
