"""Twelve experiments against nnsight 0.8, bit by bit, at equal lengths."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nnsight_oracle import run_nnsight
from oracle import LOGITS
from tiny_models import HIDDEN, IDS, OTHER, Setting
from torch import Tensor

NNSIGHT = {
    "steering": """
        with model.trace(t["ids"]):
            model.model.layers[3].output[:] += t["direction"]
            logits = model.lm_head.output.save()
        out.update(logits=logits)
    """,
    "ablate_attention": """
        with model.trace(t["ids"]):
            model.model.layers[2].self_attn.output[0][:] = 0
            logits = model.lm_head.output.save()
        out.update(logits=logits)
    """,
    "head": """
        with model.trace(t["ids"]):
            z = model.model.layers[4].self_attn.o_proj.input.view(1, 6, 4, 8)
            z[:, :, 2] = 0
            logits = model.lm_head.output.save()
        out.update(logits=logits)
    """,
    "norm_in_place": """
        with model.trace(t["ids"]):
            model.model.layers[3].input_layernorm.input[:, 1] = 1
            logits = model.lm_head.output.save()
        out.update(logits=logits)
    """,
    "norm_assigned": """
        with model.trace(t["ids"]):
            x = model.model.layers[3].input_layernorm.input.clone()
            x[:, 1] = 1
            model.model.layers[3].input_layernorm.input = x
            logits = model.lm_head.output.save()
        out.update(logits=logits)
    """,
    "lens": """
        with model.trace(t["ids"]):
            lens = model.lm_head(model.model.norm(model.model.layers[2].output)).save()
        out.update(logits=lens)
    """,
    "lora": """
        with model.trace(t["ids"]):
            mlp = model.model.layers[4].mlp
            x = mlp.input
            mlp.output = mlp.output + (x @ t["down"]) @ t["up"]
            logits = model.lm_head.output.save()
        out.update(logits=logits)
    """,
    "sae": """
        with model.trace(t["ids"]):
            h = model.model.layers[1].output
            features = torch.relu(h @ t["down"])
            edited = features.clone()
            edited[..., 1] = 2
            model.model.layers[1].output = edited @ t["up"] + (h - features @ t["up"])
            logits = model.lm_head.output.save()
        out.update(logits=logits)
    """,
    "embedding": """
        with model.trace(t["ids"]):
            model.model.embed_tokens.output = model.model.embed_tokens.output * 2
            logits = model.lm_head.output.save()
        out.update(logits=logits)
    """,
    "skip": """
        with model.trace(t["ids"]):
            h = model.model.layers[2].output
            model.model.layers[3].skip(h)
            logits = model.lm_head.output.save()
        out.update(logits=logits)
    """,
    "patch": """
        with model.trace() as tracer:
            barrier = tracer.barrier(2)
            with tracer.invoke(t["ids"]):
                h = model.model.layers[2].output[:, 3]
                barrier()
            with tracer.invoke(t["other"]):
                barrier()
                model.model.layers[2].output[:, 3] = h
                logits = model.lm_head.output.save()
        out.update(logits=logits)
    """,
    "two_traces": """
        with model.trace(t["ids"]):
            h = model.model.layers[4].output.save()
        with model.trace(t["other"]):
            model.model.layers[1].output[:, -1] = h[:, -1]
            logits = model.lm_head.output.save()
        out.update(logits=logits)
    """,
}
GENERATOR = torch.Generator().manual_seed(12)
GIVEN = {
    "ids": torch.tensor([IDS]),
    "other": torch.tensor([OTHER]),
    "direction": torch.randn(HIDDEN, generator=GENERATOR),
    "down": torch.randn(HIDDEN, 8, generator=GENERATOR),
    "up": torch.randn(8, HIDDEN, generator=GENERATOR),
}


@pytest.fixture(scope="module")
def nnsight(
    tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Tensor]]:
    """Every experiment's answer from nnsight, which runs once."""
    return run_nnsight(tiny_folder("llama"), NNSIGHT, GIVEN, tmp_path_factory.mktemp("nnsight"))


def steering(model: Any) -> Any:
    with model.trace(IDS):
        model.model.layers[3].output[:] += GIVEN["direction"]
        return model.lm_head.output.save()


def ablate_attention(model: Any) -> Any:
    with model.trace(IDS):
        model.model.layers[2].self_attn.output[0][:] = 0
        return model.lm_head.output.save()


def head(model: Any) -> Any:
    with model.trace(IDS):
        z = model.model.layers[4].self_attn.o_proj.input.view(1, 6, 4, 8)
        z[:, :, 2] = 0
        return model.lm_head.output.save()


def norm_in_place(model: Any) -> Any:
    with model.trace(IDS):
        model.model.layers[3].input_layernorm.input[:, 1] = 1
        return model.lm_head.output.save()


def norm_assigned(model: Any) -> Any:
    with model.trace(IDS):
        x = model.model.layers[3].input_layernorm.input.clone()
        x[:, 1] = 1
        model.model.layers[3].input_layernorm.input = x
        return model.lm_head.output.save()


def lens(model: Any) -> Any:
    with model.trace(IDS):
        return model.lm_head(model.model.norm(model.model.layers[2].output)).save()


def lora(model: Any) -> Any:
    with model.trace(IDS):
        mlp = model.model.layers[4].mlp
        mlp.output = mlp.output + (mlp.input @ GIVEN["down"]) @ GIVEN["up"]
        return model.lm_head.output.save()


def sae(model: Any) -> Any:
    with model.trace(IDS):
        h = model.model.layers[1].output
        features = torch.relu(h @ GIVEN["down"])
        edited = features.clone()
        edited[..., 1] = 2
        model.model.layers[1].output = edited @ GIVEN["up"] + (h - features @ GIVEN["up"])
        return model.lm_head.output.save()


def embedding(model: Any) -> Any:
    with model.trace(IDS):
        model.model.embed_tokens.output = model.model.embed_tokens.output * 2
        return model.lm_head.output.save()


def skip(model: Any) -> Any:
    with model.trace(IDS):
        model.model.layers[3].skip(model.model.layers[2].output)
        return model.lm_head.output.save()


def patch(model: Any) -> Any:
    with model.trace() as tracer:
        with tracer.invoke(IDS):
            h = model.model.layers[2].output[:, 3]
        with tracer.invoke(OTHER):
            model.model.layers[2].output[:, 3] = h
            return model.lm_head.output.save()


def two_traces(model: Any) -> Any:
    with model.trace(IDS):
        h = model.model.layers[4].output.save()
    with model.trace(OTHER):
        model.model.layers[1].output[:, -1] = h[:, -1]
        return model.lm_head.output.save()


EXPERIMENTS = [
    steering,
    ablate_attention,
    head,
    norm_in_place,
    norm_assigned,
    lens,
    lora,
    sae,
    embedding,
    skip,
    patch,
    two_traces,
]


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda experiment: experiment.__name__)
def test_equals_nnsight(
    llama: Setting,
    nnsight: dict[str, dict[str, Tensor]],
    experiment: Callable[[Any], Any],
) -> None:
    logits = experiment(llama.model)
    assert torch.equal(logits, nnsight[experiment.__name__]["logits"])
    assert not torch.equal(logits, llama.hooked(IDS)[LOGITS])
