"""Outputs that are tuples or have names: as in Hugging Face, and clear where no tensor is."""

from __future__ import annotations

import copy
import operator
import pickle  # noqa: TID251  (the results of users)
import traceback
from typing import Any

import pytest
import torch
from tiny_models import IDS, Setting
from told import told

from glasshive.client.errors import TraceError


def test_an_output_with_names_is_indexed_as_in_hugging_face(tiny: Setting) -> None:
    model = tiny.model
    inner = model.model if tiny.kind == "llama" else model.transformer
    with model.trace(IDS):
        first = model.output[0].save()
        last = inner.output[0].save()
        assert model.output[0] is model.output.logits is model.output["logits"]
        assert inner.output[0] is inner.output.last_hidden_state
        assert model.output[:1] == model.output.to_tuple()[:1] == (first,)
    ids = torch.tensor([IDS])
    with torch.no_grad():
        assert torch.equal(first, tiny.plain(ids)[0])
        assert torch.equal(last, tiny.plain.get_submodule(inner.path)(ids)[0])
        assert len(tiny.plain(ids).to_tuple()) == 2  # and a cache, which is no tensor


def test_an_edit_through_an_index(one_llama: Setting) -> None:
    model = one_llama.model
    with model.trace(IDS):
        model.model.output[0][:, -1] = 0
        logits = model.output[0].save()
    want = one_llama.hooked(
        IDS,
        edits=[("model", "output", "last_hidden_state", lambda h: h[:, -1].zero_())],
    )
    assert torch.equal(logits, want["logits"])


@pytest.mark.parametrize(
    ("use", "error", "text"),
    [
        (lambda o: o[1], KeyError, "past_key_values of the whole model's output is no tensor"),
        (lambda o: o["past_key_values"], KeyError, "is no tensor (a cache, or lists)"),
        (lambda o: o.past_key_values, AttributeError, "is no tensor (a cache, or lists)"),
        (lambda o: o[2], IndexError, "the whole model's output has no 2; it has logits"),
        (lambda o: o["x"], KeyError, "the whole model's output has no 'x'; it has logits"),
        (lambda o: o.x, AttributeError, "the whole model's output has no 'x'; it has logits"),
    ],
)
def test_what_an_output_with_names_lacks(
    one_llama: Setting, use: Any, error: type[Exception], text: str
) -> None:
    def body(tracer: Any) -> None:
        use(one_llama.model.output)

    told_text = told(one_llama, error, body)
    assert text in told_text
    assert "test_structures.py:" in told_text


def set_item(tree: Any, key: Any) -> None:
    tree[key] = tree[key] * 2


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (lambda m: set_item(m.output, "logits"), "the whole model's output['logits'] cannot be"),
        (lambda m: set_item(m.output, 0), "the whole model's output[0] cannot be assigned"),
        (lambda m: setattr(m.output, "logits", 1), "edit it in place (the whole model's output['"),
        (lambda m: m.output.update(logits=1), "cannot be assigned by itself"),
        (lambda m: operator.ior(m.output, {"logits": 1}), "cannot be assigned by itself"),
        (lambda m: m.output.setdefault("new", 1), "cannot be assigned by itself"),
        (lambda m: m.output.pop("logits"), "cannot be assigned by itself"),
        (lambda m: m.output.popitem(), "cannot be assigned by itself"),
        (lambda m: m.output.clear(), "cannot be assigned by itself"),
        (lambda m: operator.delitem(m.output, "logits"), "cannot be assigned by itself"),
        (
            lambda m: set_item(m.model.layers[2].self_attn.output, 0),
            "model.layers.2.self_attn.output[0] cannot be assigned by itself; edit it in place",
        ),
        (
            lambda m: set_item(m.model.layers[2].self_attn.inputs[1], "hidden_states"),
            "model.layers.2.self_attn.inputs[1]['hidden_states'] cannot be assigned by itself",
        ),
    ],
)
def test_a_part_that_is_assigned_by_itself(one_llama: Setting, edit: Any, text: str) -> None:
    """It would reach no model: never silently."""

    def body(tracer: Any) -> None:
        edit(one_llama.model)

    assert text in told(one_llama, TraceError, body)


def test_a_tensor_for_an_output_with_names(one_llama: Setting) -> None:
    def body(tracer: Any) -> None:
        one_llama.model.output = one_llama.model.output.logits * 2  # blamed

    text = told(one_llama, TraceError, body)
    assert "the whole model's output is a dictionary with 'logits', but a TracedTensor is" in text


def test_a_whole_output_with_names_is_assigned(one_llama: Setting) -> None:
    model = one_llama.model
    with model.trace(IDS):
        hidden = model.model.output.last_hidden_state
        model.model.output = {"last_hidden_state": hidden * 0}
        logits = model.output.logits.save()
    assert (logits == logits[0, 0]).all()


# What is None ------------------------------------------------------------------------------------


def uses() -> list[Any]:
    def unpacked(attention: Any) -> None:
        _, weights = attention.output
        weights.mean()

    return [
        lambda attention: attention.output[1].save(),
        lambda attention: attention.output[-1].save(),
        lambda attention: attention.output[1] + 1,
        lambda attention: attention.output[1][0],
        unpacked,
    ]


@pytest.mark.parametrize("use", uses())
def test_the_use_of_a_part_that_is_none_says_why(one_llama: Setting, use: Any) -> None:
    with pytest.raises((AttributeError, TypeError)) as caught, one_llama.model.trace(IDS):
        use(one_llama.model.model.layers[3].self_attn)
    text = "".join(traceback.format_exception(caught.value))
    assert "model.layers.3.self_attn.output[1] is None: with sdpa attention no weights" in text
    assert "hosts with --attention eager, or glasshive.local(..., attention='eager')" in text


def test_a_part_that_is_none_is_given_back(one_llama: Setting) -> None:
    """`(h, output[1])` is how a tuple is written anew."""
    attention = one_llama.model.model.layers[3].self_attn
    with one_llama.model.trace(IDS):
        assert attention.output[1] is None
        attention.output = (attention.output[0] * 0, attention.output[1])
        after = attention.output[0].save()
    assert (after == 0).all()


def test_an_error_about_another_none_is_left_alone(one_llama: Setting) -> None:
    with pytest.raises(AttributeError) as caught, one_llama.model.trace(IDS):
        _ = one_llama.model.model.layers[3].self_attn.output[0]
        None.save()  # type: ignore[attr-defined]
    assert not getattr(caught.value, "__notes__", None)


def test_a_part_behind_the_end(one_llama: Setting) -> None:
    def body(tracer: Any) -> None:
        one_llama.model.model.layers[3].self_attn.output[2]  # blamed

    text = told(one_llama, IndexError, body)
    assert "model.layers.3.self_attn.output has 2 parts; index 2 is outside" in text


# After the block ---------------------------------------------------------------------------------


def test_structures_are_plain_once_the_block_is_over(one_llama: Setting) -> None:
    model = one_llama.model
    with model.trace(IDS):
        named = model.output.save()
        parts = model.model.layers[3].self_attn.output.save()
    for copied in (copy.deepcopy(named), pickle.loads(pickle.dumps(named))):
        assert torch.equal(copied["logits"], named[0])
    for copied in (copy.deepcopy(parts), pickle.loads(pickle.dumps(parts))):
        assert torch.equal(copied[0], parts[0])
        assert copied[1] is None
    named["logits"] = named["logits"].argmax(-1)
    assert named[0].shape == (1, len(IDS))
