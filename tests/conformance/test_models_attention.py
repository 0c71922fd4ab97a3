"""Models whose attention is eager, and models with experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
from oracle import LOGITS, Edit, Read
from tiny_models import BLOCKS, CUTS, DEVICE, IDS, OTHER, Setting, load_plain
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import glasshive
from glasshive.graph.errors import NotASite


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("cuts", CUTS, ids=lambda cuts: f"{len(cuts) + 1}-spans")
def test_attention_patterns(get_setting: Any, kind: str, cuts: tuple[int, ...]) -> None:
    """They exist with eager attention only: read, averaged, and written."""
    setting = get_setting(kind, cuts, "eager")
    paths = [setting.block(i, "attention") for i in range(BLOCKS)]
    with setting.model.trace([IDS, OTHER]):
        patterns = [setting.at(path).output[1].save() for path in paths]
        entropy = torch.stack(
            [-(setting.at(path).output[1] + 1e-9).log().mean((0, 2, 3)) for path in paths]
        ).save()
        logits = setting.at("lm_head").output.save()
    want = setting.hooked([IDS, OTHER], reads=[Read(path, "output", 1) for path in paths])
    for path, got in zip(paths, patterns, strict=True):
        assert got.shape == (2, 4, 6, 6)
        assert torch.equal(got, want[path, "output", 1])
    plain = [want[path, "output", 1] for path in paths]
    assert torch.equal(entropy, torch.stack([-(p + 1e-9).log().mean((0, 2, 3)) for p in plain]))
    assert torch.equal(logits, want[LOGITS])


@pytest.mark.parametrize("cuts", CUTS, ids=lambda cuts: f"{len(cuts) + 1}-spans")
def test_edits_with_eager_attention(get_setting: Any, cuts: tuple[int, ...]) -> None:
    setting = get_setting("llama", cuts, "eager")
    path = setting.block(3, "projection")
    with setting.model.trace(IDS):
        setting.at(path).input.view(1, 6, 4, 8)[:, :, 1] = 0
        logits = setting.at("lm_head").output.save()

    def ablate(tensor: Tensor) -> None:
        tensor.view(1, 6, 4, 8)[:, :, 1] = 0

    edit = Edit(path, "input", None, ablate)
    assert torch.equal(logits, setting.hooked(IDS, edits=[edit])[LOGITS])


def test_without_eager_attention_there_are_no_patterns(one_llama: Setting) -> None:
    with one_llama.model.trace(IDS):
        output = one_llama.model.model.layers[2].self_attn.output
        assert len(output) == 2
        assert output[1] is None
        one_llama.model.lm_head.output.save()


# Experts -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["mixtral", "qwen3_moe"])
def experts_folder(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Path:
    folder: Path = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    config = CONFIG_MAPPING[request.param](**architectures.TINY[request.param])
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("cuts", CUTS, ids=lambda cuts: f"{len(cuts) + 1}-spans")
def test_experts(experts_folder: Path, cuts: tuple[int, ...]) -> None:
    setting = Setting(
        "llama",
        cuts,
        load_plain(experts_folder),
        glasshive.local(experts_folder, cuts=cuts, device=DEVICE),
    )
    layers = setting.model.model.layers
    with setting.model.trace([IDS, OTHER]):
        layers[1].mlp.output[:, -1] = 0
        layers[4].mlp.input = layers[4].mlp.input * 0.5
        hidden = layers[3].output.save()
        logits = setting.model.lm_head.output.save()
    want = setting.hooked(
        [IDS, OTHER],
        edits=[
            Edit("model.layers.1.mlp", "output", None, lambda x: x[:, -1].zero_()),
            Edit("model.layers.4.mlp", "input", None, lambda x: x * 0.5, "set"),
        ],
        reads=[Read("model.layers.3", "output", name="hidden")],
    )
    assert torch.equal(hidden, want["hidden"])
    assert torch.equal(logits, want[LOGITS])


def test_tokens_in_a_row_are_no_site(experts_folder: Path) -> None:
    """Inside, all tokens of all rows are one axis, so no invoke's own can be told apart."""
    model = glasshive.local(experts_folder, device=DEVICE)

    def trace() -> None:
        with model.trace(IDS):
            model.model.layers[1].mlp.experts.output.save()

    with pytest.raises(NotASite):
        trace()
