"""A module called on what it cannot take: refused at the line, while the body is recorded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import HIDDEN, IDS, Setting
from told import told

from glasshive.client.errors import TraceError
from glasshive.graph.errors import NotASite, ShapeMismatch

FIRST = ("model.layers.1", "output", None)


@pytest.mark.parametrize("path", ["model.layers.3.mlp", "model.layers.3.self_attn.q_proj"])
def test_a_value_of_another_dtype(one_llama: Setting, path: str) -> None:
    def body(tracer: Any) -> None:
        hidden = one_llama.model.model.layers[2].output.double()
        one_llama.at(path)(hidden).save()  # blamed

    assert told(one_llama, ShapeMismatch, body).endswith(
        f"{path}(float64[1, 6, {HIDDEN}]) is refused: mm takes tensors of one dtype, but got "
        "float64 and float32; float32 is wanted: call .to(torch.float32) on the value"
    )


def test_whole_numbers_to_a_head(one_llama: Setting) -> None:
    def body(tracer: Any) -> None:
        one_llama.model.lm_head(one_llama.model.model.layers[2].output.long())  # blamed

    text = told(one_llama, ShapeMismatch, body)
    assert "it takes no int64; float32 is wanted: call .to(torch.float32)" in text


def test_a_norm_computes_in_a_wider_dtype_as_in_hugging_face(one_llama: Setting) -> None:
    with one_llama.model.trace(IDS):
        hidden = one_llama.model.model.layers[2].output.save()
        wide = one_llama.model.model.norm(hidden.double()).save()
    assert torch.equal(wide, one_llama.plain.get_submodule("model.norm")(hidden.double()))


@pytest.mark.parametrize("part", [lambda block: block, lambda block: block.self_attn])
def test_a_module_that_needs_more_than_hidden_states(
    one_llama: Setting, part: Callable[[Any], Any]
) -> None:
    layers = one_llama.model.model.layers

    def body(tracer: Any) -> None:
        part(layers[3])(layers[2].output).save()  # blamed

    text = told(one_llama, ShapeMismatch, body)
    assert "is refused: it lacks " in text
    assert "position_embeddings" in text
    assert "which the model makes for it in a forward pass" in text
    assert "assign its .input and read its .output" in text


def test_the_way_out_of_it_works(one_llama: Setting) -> None:
    """A block on another value, as part of the model."""
    layers = one_llama.model.model.layers
    with one_llama.model.trace(IDS):
        hidden = layers[1].output
        layers[3].input = hidden
        again = layers[3].output.save()
    seen: dict[Any, torch.Tensor] = {}
    one_llama.hooked(
        IDS,
        seen=seen,
        reads=[("model.layers.1", "output"), ("model.layers.3", "output")],
        edits=[("model.layers.3", "input", None, lambda _: seen[FIRST].clone(), "set")],
    )
    assert torch.equal(again, seen["model.layers.3", "output", None])


def test_an_attention_that_gives_a_tuple(get_setting: Any) -> None:
    setting = get_setting("gpt2", (3,))

    def body(tracer: Any) -> None:
        block = setting.model.transformer.h[3]
        block.attn(setting.model.transformer.h[2].output)  # blamed

    text = told(setting, NotASite, body)
    assert "transformer.h.3.attn(...) gives a tuple; only modules that give one tensor" in text


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda module, value: module(), "model.layers.3.mlp(): in a trace a module takes"),
        (lambda module, value: module(x=value), "model.layers.3.mlp(x=): in a trace a module"),
        (lambda module, value: module(value, 2), "mlp(TracedTensor, int): in a trace a module"),
    ],
)
def test_a_call_with_no_tensor_by_position(
    one_llama: Setting, call: Callable[[Any, Any], Any], text: str
) -> None:
    def body(tracer: Any) -> None:
        call(one_llama.model.model.layers[3].mlp, one_llama.model.model.layers[2].output)

    assert text in told(one_llama, TraceError, body)
