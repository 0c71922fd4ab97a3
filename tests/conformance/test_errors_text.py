"""What a researcher reads when an experiment has no meaning: the text, and the line it blames."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import HIDDEN, IDS, OTHER, Setting
from told import Body, line_of, told

import glasshive
from glasshive.client.errors import (
    BadPrompt,
    DataDependent,
    NotInATrace,
    NotInTable,
    NotSaved,
    OutOfSight,
    PeerFailed,
    PlainDestination,
    TraceError,
)
from glasshive.graph.budget import Budget
from glasshive.graph.codec import GraphLimits
from glasshive.graph.errors import (
    ImpossibleOrder,
    LateEdit,
    NoRoots,
    NotASite,
    NotYet,
    RowTaken,
    ShapeMismatch,
    UnknownOp,
    UnseenWrite,
)
from glasshive.models import ModelNotFoundError
from glasshive.peer.errors import BadSpan
from glasshive.peer.host_limits import HostLimits

# Order -------------------------------------------------------------------------------------------


def test_impossible_order(one_llama: Setting) -> None:
    layers = one_llama.model.model.layers

    def body(tracer: Any) -> None:
        later = layers[4].output
        layers[1].output[:] = later  # blamed

    text = told(one_llama, ImpossibleOrder, body)
    assert "impossible edit: model.layers.1.output runs before model.layers.4.output" in text
    assert "take that value in one invoke and write it in another" in text


def test_impossible_order_of_an_assignment(one_llama: Setting) -> None:
    layers = one_llama.model.model.layers

    def body(tracer: Any) -> None:
        layers[2].mlp.input = layers[2].mlp.output  # blamed

    text = told(one_llama, ImpossibleOrder, body)
    assert "model.layers.2.mlp.input runs before model.layers.2.mlp.output" in text


def test_impossible_order_through_another_invoke(one_llama: Setting) -> None:
    """B carries A's layer 4 in its own layer 5; A's layer 1 can't have it."""
    layers = one_llama.model.model.layers

    def body(tracer: Any) -> None:
        with tracer.invoke(IDS):
            held = layers[1].output
            late = layers[4].mlp.output
        with tracer.invoke(OTHER):
            layers[2].output = late
            held[:] = layers[3].output  # blamed

    text = told(one_llama, ImpossibleOrder, body, None)
    assert "model.layers.1.output runs before model.layers.4.mlp.output" in text


def test_late_edit(one_llama: Setting) -> None:
    layers = one_llama.model.model.layers

    def body(tracer: Any) -> None:
        layers[4].output.save()
        layers[1].output[:, -1] = 0  # blamed

    text = told(one_llama, LateEdit, body)
    line = (line_of(body) or 0) - 1
    assert "late edit: model.layers.1.output runs before model.layers.4.output" in text
    assert f"which was read already at test_errors_text.py:{line} and depends on it" in text
    assert "move this edit above that read, or read it in a second invoke" in text


def test_no_root(one_llama: Setting) -> None:
    def body(tracer: Any) -> None:
        _ = one_llama.model.lm_head.output

    text = told(one_llama, NoRoots, body)
    assert "nothing is saved, so nothing would come back; call .save() on a value" in text


def test_an_unseen_write_warns_on_its_line(one_llama: Setting) -> None:
    def trace() -> None:
        with one_llama.model.trace(IDS):
            one_llama.model.model.layers[1].output.save()
            one_llama.model.model.layers[3].output[:] = 0  # blamed

    with pytest.warns(UnseenWrite) as caught:
        trace()
    (warning,) = caught
    assert (warning.filename, warning.lineno) == (__file__, line_of(trace))
    text = str(warning.message)
    assert "nothing that is saved can see this edit of model.layers.3.output" in text
    assert "save a value from a later module of the same invoke" in text


def test_a_row_of_a_block_output_warns_once(one_llama: Setting) -> None:
    def trace() -> None:
        with one_llama.model.trace(IDS):
            one_llama.model.model.layers[1].output[0].save()
            one_llama.model.model.layers[2].output[0].save()

    with pytest.warns(RowTaken, match="takes one row of the batch") as caught:
        trace()
    assert len(caught) == 1


# Sites -------------------------------------------------------------------------------------------


def test_a_list_of_modules_is_no_site(one_llama: Setting) -> None:
    def body(tracer: Any) -> None:
        one_llama.model.model.layers.output.save()  # blamed

    text = told(one_llama, NotASite, body)
    assert "'model.layers' (ModuleList) is called 0 times in a forward pass" in text
    assert "use a module that is called once, such as one inside or around it" in text


def test_a_dropout_that_is_never_called_is_no_site(get_setting: Any) -> None:
    setting = get_setting("gpt2", (2, 4))

    def body(tracer: Any) -> None:
        setting.model.transformer.h[1].attn.attn_dropout.output.save()  # blamed

    text = told(setting, NotASite, body)
    assert "'transformer.h.1.attn.attn_dropout' (Dropout) is called 0 times" in text


def test_an_unknown_module_and_the_nearest_names(one_llama: Setting) -> None:
    def body(tracer: Any) -> None:
        one_llama.model.model.layers[2].mpl.output.save()  # blamed

    text = told(one_llama, AttributeError, body)
    assert "model.layers.2 (LlamaDecoderLayer) has no module or parameter 'mpl'" in text
    assert "did you mean mlp?" in text


@pytest.mark.parametrize(
    ("use", "text"),
    [
        (lambda model: model.model.layer[3], "model (LlamaModel) has no module or parameter"),
        (lambda model: model.model.layer[3], "'layer'; did you mean layers?"),
        (lambda model: model.layers, "did you mean model.model.layers?"),
        (lambda model: model.model.layers[3].outputs, "did you mean output or inputs?"),
        (lambda model: model.transformer, "print(model) shows what there is"),
    ],
)
def test_names_that_are_not_there(one_llama: Setting, use: Body, text: str) -> None:
    def body(tracer: Any) -> None:
        use(one_llama.model)

    assert text in told(one_llama, AttributeError, body)


@pytest.mark.parametrize(
    "use",
    [
        lambda layer: layer * 2,
        lambda layer: 2 + layer,
        lambda layer: -layer,
        lambda layer: torch.relu(layer),
        lambda layer: torch.ones(3) * layer,
        lambda layer: torch.stack([torch.ones(3), layer]),
        lambda layer: layer > 0,
    ],
)
def test_a_module_is_no_value(one_llama: Setting, use: Body) -> None:
    def body(tracer: Any) -> None:
        use(one_llama.model.model.layers[3])

    text = told(one_llama, TraceError, body)
    assert text.startswith("test_errors_text.py:")
    assert "model.layers.3 is a module, not a value, so it cannot be computed with; take" in text
    assert "(.output) or gets (.input), or call it on a value" in text


def test_a_module_is_true_and_cannot_be_replaced(one_llama: Setting) -> None:
    layers = one_llama.model.model.layers
    assert layers[3]
    with pytest.raises(TraceError, match=r"cannot be replaced; .*layers\[3\]\.output = .*\.skip\("):
        layers[3] = layers[2]
    with pytest.raises(TypeError, match=r"is not a list of modules; .* write \.output"):
        _ = layers[3][0]
    with pytest.raises(TypeError, match=r"model\.layers is indexed by '3'; a number from 0 to 5"):
        _ = layers["3"]


def test_a_block_that_is_not_there(one_llama: Setting) -> None:
    def body(tracer: Any) -> None:
        one_llama.model.model.layers[6].output.save()  # blamed

    assert "model.layers has 6 modules; index 6 is outside" in told(one_llama, IndexError, body)


def test_a_tuple_that_is_assigned_a_tensor(one_llama: Setting) -> None:
    def body(tracer: Any) -> None:
        one_llama.model.model.layers[2].self_attn.output = torch.zeros(1, 6, HIDDEN)  # blamed

    text = told(one_llama, TraceError, body)
    assert "model.layers.2.self_attn.output is a tuple, but a Tensor is assigned" in text
    assert "model.layers.2.self_attn.output[0][:] = ..." in text


def test_inputs_that_are_no_pair(one_llama: Setting) -> None:
    def body(tracer: Any) -> None:
        one_llama.model.model.layers[2].inputs = torch.zeros(1, 6, HIDDEN)  # blamed

    assert "a pair is wanted, of a tuple and a dictionary" in told(one_llama, TraceError, body)


def test_weights_cannot_be_assigned(one_llama: Setting) -> None:
    def body(tracer: Any) -> None:
        one_llama.model.lm_head.weight = torch.zeros(64, HIDDEN)  # blamed

    text = told(one_llama, AttributeError, body)
    assert "lm_head.weight cannot be assigned" in text
    assert "weights are read-only" in text


def test_a_call_of_what_holds_the_blocks(one_llama: Setting) -> None:
    def body(tracer: Any) -> None:
        one_llama.model.model(one_llama.model.model.layers[0].output)

    assert "model holds the blocks, which lie on several peers" in told(one_llama, NotASite, body)


def test_a_call_that_the_module_refuses(one_llama: Setting) -> None:
    def body(tracer: Any) -> None:
        one_llama.model.lm_head(one_llama.model.model.layers[0].mlp.down_proj.input)

    text = told(one_llama, ShapeMismatch, body)
    assert "lm_head(float32[1, 6, 48]) is refused" in text


def test_rotary_tables(one_llama: Setting) -> None:
    def body(tracer: Any) -> None:
        one_llama.model.model.rotary_emb.output[0][:] = 0  # blamed

    text = told(one_llama, NotYet, body)
    assert "reaches every block beside the hidden states" in text
    assert "edit what the blocks make of it instead" in text


# Values ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "use",
    [
        bool,
        int,
        float,
        lambda value: value.item(),
        lambda value: value.tolist(),
        lambda value: [1, 2, 3][value],
        lambda value: f"{value:.3f}",
        lambda value: 1 if value > 0 else 2,
    ],
)
def test_a_number_that_does_not_exist_yet(one_llama: Setting, use: Callable[[Any], Any]) -> None:
    def body(tracer: Any) -> None:
        use(one_llama.model.lm_head.output.argmax())

    text = told(one_llama, DataDependent, body)
    assert text.startswith("test_errors_text.py:")
    assert "torch.where" in text


def test_a_shape_that_depends_on_numbers(one_llama: Setting) -> None:
    def body(tracer: Any) -> None:
        hidden = one_llama.model.model.layers[1].output
        hidden[hidden > 0].save()  # blamed

    text = told(one_llama, DataDependent, body)
    assert "use torch.where(mask, h, 0), h * mask, or h.masked_fill" in text


def test_memory_that_does_not_exist(one_llama: Setting) -> None:
    def body(tracer: Any) -> None:
        one_llama.model.model.layers[1].output.numpy()  # blamed

    text = told(one_llama, OutOfSight, body)
    assert "use torch functions, or save it and use it after the block" in text


def test_a_plain_destination(one_llama: Setting) -> None:
    def body(tracer: Any) -> None:
        buffer = torch.zeros(3, HIDDEN)
        buffer[1] = one_llama.model.model.layers[1].output.mean((0, 1))  # blamed

    text = told(one_llama, PlainDestination, body)
    assert "a traced value is written into a plain tensor" in text
    assert "torch.stack" in text


def test_a_value_of_another_shape(one_llama: Setting) -> None:
    def body(tracer: Any) -> None:
        one_llama.model.model.layers[1].output = torch.zeros(1, 5, HIDDEN)  # blamed

    text = told(one_llama, ShapeMismatch, body)
    assert "a tensor of float32[1, 5, 32] is assigned to model.layers.1.output" in text
    assert "which is float32[1, 6, 32]" in text


def test_a_value_of_another_dtype(one_llama: Setting) -> None:
    def body(tracer: Any) -> None:
        site = one_llama.model.model.layers[1]
        site.output = site.output.double()  # blamed

    text = told(one_llama, ShapeMismatch, body)
    assert "a tensor of float64[1, 6, 32] is assigned" in text
    assert "call .to(torch.float32)" in text


def test_a_value_that_is_no_tensor(one_llama: Setting) -> None:
    def body(tracer: Any) -> None:
        one_llama.model.model.layers[1].output = "zero"  # blamed

    assert "a str is assigned to model.layers.1.output" in told(one_llama, ShapeMismatch, body)


@pytest.mark.parametrize("use", ["assigned", "called", "added", "before"])
def test_an_array_in_the_place_of_a_tensor(one_llama: Setting, use: str) -> None:
    """Failed: torch and NumPy say what they got, and not what to do."""
    array, site = np.ones((1, 6, HIDDEN), np.float32), one_llama.model.model.layers[1]

    def body(tracer: Any) -> None:
        if use == "assigned":
            site.output = array
        elif use == "called":
            one_llama.model.lm_head(array)
        elif use == "added":
            torch.add(site.output, array)
        else:
            array @ site.output

    kind = {"assigned": ShapeMismatch, "called": TraceError}.get(use, TypeError)
    with pytest.raises(kind) as caught, one_llama.model.trace(IDS) as tracer:
        body(tracer)
    said = [str(caught.value), *getattr(caught.value, "__notes__", ())]
    assert said[-1].endswith("torch.from_numpy(array) makes a tensor of a NumPy array")
    assert len(said) == (2 if kind is TypeError else 1)


def test_an_in_place_edit_of_another_shape(one_llama: Setting) -> None:
    def body(tracer: Any) -> None:
        one_llama.model.model.layers[1].output[:, 0] = torch.zeros(5)  # blamed

    text = told(one_llama, ShapeMismatch, body)
    assert (
        "float32[5] does not fit the part of float32[1, 6, 32] of model.layers.1.output that it "
        "is assigned to" in text
    )
    assert "The expanded size of the tensor (32) must match the existing size (5)" in text
    assert "give what broadcasts to it" in text


def test_an_in_place_edit_past_the_end(one_llama: Setting) -> None:
    def body(tracer: Any) -> None:
        one_llama.model.model.layers[1].output[:, 99] = 0  # blamed

    text = told(one_llama, ShapeMismatch, body)
    assert "index 99 is out of bounds for dimension 1 with size 6" in text
    assert "in float32[1, 6, 32] of model.layers.1.output; indices count from 0" in text


def test_an_in_place_edit_by_a_word(one_llama: Setting) -> None:
    def body(tracer: Any) -> None:
        one_llama.model.model.layers[1].output[..., "a"] = 1  # blamed

    text = told(one_llama, ShapeMismatch, body)
    assert "float32[1, 6, 32] of model.layers.1.output is indexed by ellipsis and str" in text


def test_an_in_place_op_of_another_shape(one_llama: Setting) -> None:
    def body(tracer: Any) -> None:
        one_llama.model.model.layers[1].output[0] += torch.ones(3)  # blamed

    text = told(one_llama, ShapeMismatch, body)
    assert "add_(float32[6, 32] of model.layers.1.output, float32[3]): " in text
    assert "to compare shapes, print(h.shape) in the trace" in text


def test_a_product_of_shapes_that_do_not_fit(one_llama: Setting) -> None:
    def body(tracer: Any) -> None:
        _ = one_llama.model.model.layers[1].output @ torch.zeros(31, 3)  # blamed

    told(one_llama, ShapeMismatch, body)


def test_an_op_outside_the_table(one_llama: Setting) -> None:
    def body(tracer: Any) -> None:
        torch.frexp(one_llama.model.model.layers[1].output)  # blamed

    text = told(one_llama, NotInTable, body)
    assert issubclass(NotInTable, UnknownOp)
    assert "frexp (aten.frexp.Tensor) is not in the table of ops that peers run" in text
    assert "the nearest there are exp, exp2, expm1; save its input and call it after" in text


def test_an_unsaved_value_after_the_block(one_llama: Setting) -> None:
    with one_llama.model.trace(IDS):
        kept = one_llama.model.model.layers[1].output  # made here
        one_llama.model.lm_head.output.save()
    with pytest.raises(NotSaved) as caught:
        _ = kept + 1
    text = str(caught.value)
    assert "was not saved, so it did not come back; call .save() on it inside the trace" in text
    assert "float32[1, 6, 32]" in text
    assert "made at test_errors_text.py:" in text


def test_a_site_outside_a_trace(one_llama: Setting) -> None:
    for use in ("output", "input", "inputs"):
        with pytest.raises(NotInATrace, match="is used outside a trace; open one with"):
            getattr(one_llama.model.model.layers[1], use)
    with pytest.raises(NotInATrace, match="lm_head is used outside a trace"):
        _ = one_llama.model.lm_head.weight
    with pytest.raises(NotInATrace, match=r"model\.norm is used outside a trace"):
        one_llama.model.model.norm(torch.zeros(1, HIDDEN))


def test_a_site_outside_an_invoke(one_llama: Setting) -> None:
    def body(tracer: Any) -> None:
        one_llama.model.lm_head.output.save()  # blamed

    text = told(one_llama, TraceError, body, None)
    assert "no prompt: a site belongs to an invoke" in text


def test_an_invoke_in_a_trace_that_has_a_prompt(one_llama: Setting) -> None:
    def body(tracer: Any) -> None:
        with tracer.invoke(OTHER):  # blamed
            pass

    assert "in a trace that was given a prompt itself" in told(one_llama, TraceError, body)


@pytest.mark.parametrize(
    ("option", "text"),
    [
        (
            {"remote": True},
            "trace(remote=True) is no option here: a trace always runs on the peers",
        ),
        ({"scan": True}, "shapes are always checked while the body is recorded; leave it out"),
        (
            {"rows": 3},
            "there are batching, pass_rows, deadline, retries, route, avoid, "
            "across_hardware, progress",
        ),
        ({"pass_rows": 0}, "pass_rows=0; a whole number from 1 on is wanted"),
    ],
)
def test_options_of_a_trace(one_llama: Setting, option: dict[str, Any], text: str) -> None:
    with pytest.raises(TraceError, match=re.escape(text)) as caught:
        one_llama.model.trace(IDS, **option)
    assert str(caught.value).startswith("test_errors_text.py:")


def test_a_trace_without_a_prompt(one_llama: Setting) -> None:
    def body(tracer: Any) -> None:
        pass

    text = told(one_llama, TraceError, body, None)
    assert "a trace without a prompt; write `with model.trace(prompt):`" in text


def test_a_tracer_after_its_block(one_llama: Setting) -> None:
    with one_llama.model.trace(IDS) as tracer:
        kept = one_llama.model.model.layers[1].output
        one_llama.model.lm_head.output.save()
    for call, use in (
        ("tracer.stop()", tracer.stop),
        ("tracer.estimate()", tracer.estimate),
        ("tracer.invoke(...)", lambda: tracer.invoke(IDS).__enter__()),
    ):
        text = f"{call} outside its `with model.trace(...)` block; call it inside"
        with pytest.raises(TraceError, match=re.escape(text)):
            use()
    with pytest.raises(NotSaved, match=r"call \.save\(\) on it inside the trace"):
        kept.save()


def test_an_invoke_inside_another(one_llama: Setting) -> None:
    def body(tracer: Any) -> None:
        with tracer.invoke(IDS), tracer.invoke(OTHER):  # blamed
            pass

    assert "an invoke inside another" in told(one_llama, TraceError, body, None)


def test_a_trace_inside_another(one_llama: Setting) -> None:
    def body(tracer: Any) -> None:
        with one_llama.model.trace(OTHER):  # blamed
            pass

    text = told(one_llama, TraceError, body)
    name = one_llama.model.name
    assert f"a trace of {name} is open already, so a trace of {name} cannot begin inside it" in text
    assert "end its block first: what it saved can be used in the next one" in text


def test_a_value_of_another_trace(one_llama: Setting) -> None:
    with one_llama.model.trace(IDS):
        kept = one_llama.model.model.layers[1].output
        one_llama.model.lm_head.output.save()

    def body(tracer: Any) -> None:
        one_llama.model.model.layers[1].output = kept

    assert "was not saved" in told(one_llama, NotSaved, body)


def test_an_error_of_the_users_sends_nothing(one_llama: Setting) -> None:
    saved = []

    def body(tracer: Any) -> None:
        saved.append(one_llama.model.lm_head.output.save())
        raise ZeroDivisionError

    told(one_llama, ZeroDivisionError, body)
    with pytest.raises(NotSaved, match="its trace ended with ZeroDivisionError and"):
        _ = saved[0] + 1


def test_a_tracer_that_is_used_twice(one_llama: Setting) -> None:
    tracer = one_llama.model.trace(IDS)
    with tracer:
        one_llama.model.lm_head.output.save()
    with pytest.raises(TraceError, match="this tracer has had its block"):
        tracer.__enter__()


@pytest.mark.parametrize(
    ("option", "value", "text"),
    [
        ("batching", "alon", "batching='alon'; 'shared' or 'alone' is wanted"),
        ("pass_rows", 0, "pass_rows=0; a whole number from 1 on is wanted"),
        ("pass_rows", 2.5, "pass_rows=2.5; a whole number"),
        ("deadline", 0, "deadline=0; seconds above 0 are wanted, at most 1000000"),
        ("deadline", "x", "deadline='x'; seconds above 0 are wanted"),
        ("deadline", None, "deadline=None; seconds above 0 are wanted"),
        ("deadline", True, "deadline=True; seconds above 0 are wanted"),
        ("deadline", math.inf, "deadline=inf; seconds above 0 are wanted, at most 1000000"),
        ("deadline", math.nan, "deadline=nan; seconds above 0 are wanted"),
        ("deadline", 1e6 + 1, "deadline=1000001.0; seconds above 0 are wanted, at most 1000000"),
        ("retries", -1, "retries=-1; a whole number from 0 on is wanted"),
    ],
)
def test_options_that_mean_nothing(one_llama: Setting, option: str, value: Any, text: str) -> None:
    with pytest.raises(TraceError, match=re.escape(text)):
        one_llama.model.trace(IDS, **{option: value})


def test_position_tables_of_a_padded_batch(one_llama: Setting) -> None:
    def body(tracer: Any) -> None:
        one_llama.model.model.rotary_emb.output[0][1] *= 2  # blamed

    text = told(one_llama, NotYet, body, [IDS, [3]])
    assert "model.rotary_emb.output[0] reaches every block beside the hidden states" in text


# Prompts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("", "an empty prompt; give at least one token"),
        ([], "an empty prompt; give at least one token"),
        ([[3, 4], []], "prompt 1 of 2 is empty; give each at least one token"),
        ([3, "a"], "a prompt of type list that holds int and str; give text, a list of texts"),
        (3.5, "a prompt of type float; give text, a list of texts, token ids"),
        (torch.ones(2, 3), "token ids of type torch.float32; whole numbers are wanted"),
        ([3, 64], "token id 64 is not in the vocabulary of 64"),
        (list(itertools.repeat(3, 65)), "a prompt of 65 tokens; the model takes at most 64"),
        ({"attention_mask": [1]}, "what a tokenizer returns has input_ids"),
        ({"input_ids": [3, 4], "attention_mask": [1, 0]}, "is not left padding"),
    ],
)
def test_prompts_that_are_none(one_llama: Setting, prompt: Any, text: str) -> None:
    with pytest.raises(BadPrompt, match=re.escape(text)) as caught:
        one_llama.model.trace(prompt).__enter__()
    assert str(caught.value).startswith("test_errors_text.py:")
    with pytest.raises(BadPrompt, match=re.escape(text)):
        with one_llama.model.trace() as tracer, tracer.invoke(prompt):
            pass
    with one_llama.model.trace(IDS):  # nothing was left open
        one_llama.model.lm_head.output.save()


# Hosts -------------------------------------------------------------------------------------------


def limited(folder: Path, **limits: Any) -> Setting:
    model = glasshive.local(folder, cuts=(3,), limits=HostLimits(**limits))
    return Setting("llama", (3,), torch.nn.Identity(), model)


def test_over_budget_in_bytes(tiny_folder: Callable[[str], Path]) -> None:
    budget = Budget(peak_bytes=1 << 20, flops=10**12, saved_bytes=1 << 20)
    setting = limited(tiny_folder("llama"), budget=budget)

    def body(tracer: Any) -> None:
        hidden = setting.model.model.layers[1].output
        wide = hidden.expand(2000, 6, HIDDEN).clone()  # blamed
        wide.sum().save()

    text = told(setting, PeerFailed, body)
    assert "OverBudget at peer 12D3" in text
    assert "(blocks 0:3)" in text
    assert re.search(r"node \d+ \(op \w+\) brings the graph to \d+ bytes at once", text)
    assert "1048576 are allowed; save or edit less in one trace" in text


def test_over_budget_in_saves(tiny_folder: Callable[[str], Path]) -> None:
    budget = Budget(peak_bytes=1 << 30, flops=10**12, saved_bytes=1000)
    setting = limited(tiny_folder("llama"), budget=budget)

    def body(tracer: Any) -> None:
        setting.model.lm_head.output.save()

    text = told(setting, PeerFailed, body)
    assert "brings the saves to 1536 bytes, but 1000 are allowed" in text
    assert "slice or reduce before saving" in text
    assert "(blocks 3:6)" in text


def test_over_budget_in_flops(tiny_folder: Callable[[str], Path]) -> None:
    budget = Budget(peak_bytes=1 << 30, flops=10_000, saved_bytes=1 << 20)
    setting = limited(tiny_folder("llama"), budget=budget)

    def body(tracer: Any) -> None:
        hidden = setting.model.model.layers[4].output
        (hidden @ torch.ones(HIDDEN, 2000)).sum().save()  # blamed

    text = told(setting, PeerFailed, body)
    assert "FLOPs, but 10000 are allowed; split the work over several traces" in text


def test_more_nodes_than_a_host_takes(tiny_folder: Callable[[str], Path]) -> None:
    setting = limited(tiny_folder("llama"), graph=GraphLimits(nodes=40))

    def body(tracer: Any) -> None:
        value = setting.model.model.layers[1].output
        for _ in range(50):
            value = torch.sin(value)
        value.save()

    text = told(setting, PeerFailed, body)
    assert "BadGraph at peer" in text
    assert "40" in text


def test_more_rows_than_a_host_takes(tiny_folder: Callable[[str], Path]) -> None:
    setting = limited(tiny_folder("llama"), batch_rows=2)

    def body(tracer: Any) -> None:
        setting.model.lm_head.output.save()

    text = told(setting, PeerFailed, body, [IDS, IDS, IDS])
    assert "a pass of 3 rows of 6 tokens; this peer takes at most 2 rows" in text


def test_a_forward_that_fails_names_the_edit(llama: Setting) -> None:
    """A token that no embedding has, written inside the trace."""

    def body(tracer: Any) -> None:
        llama.model.model.embed_tokens.input[:, 1] = 999  # blamed
        llama.model.lm_head.output.save()

    text = told(llama, PeerFailed, body)
    assert "the model's forward pass failed after what was written here: index out of range" in text


def test_the_trace_after_an_error_runs(one_llama: Setting) -> None:
    def body(tracer: Any) -> None:
        one_llama.model.model.embed_tokens.input[:, 1] = 999
        one_llama.model.lm_head.output.save()

    told(one_llama, PeerFailed, body)
    with one_llama.model.trace(IDS):
        logits = one_llama.model.lm_head.output.save()
    assert torch.equal(logits, one_llama.hooked(IDS)["logits"])


@pytest.mark.parametrize(
    ("cuts", "text"),
    [
        (10, "cuts=10, but a list is wanted: cuts=(10,) for one cut"),
        ("3", "cuts='3', but a list is wanted"),
        (None, "cuts=None, but a list is wanted"),
        ((2.0,), "cuts=(2.0,), but numbers of blocks are wanted, as in cuts=(10, 20)"),
        ((6,), "cuts=(6,), but {name} has 6 blocks, so a cut lies in 1..5: it is the first block"),
        ((0,), "so a cut lies in 1..5"),
        ((-1,), "so a cut lies in 1..5"),
        ((4, 2), "cuts=(4, 2) do not ascend; write cuts=(2, 4)"),
        ((3, 3), "cuts=(3, 3) do not ascend; write cuts=(3,)"),
    ],
)
def test_cuts_that_are_none(tiny_folder: Callable[[str], Path], cuts: Any, text: str) -> None:
    folder = tiny_folder("llama")
    with pytest.raises(BadSpan, match=re.escape(text.replace("{name}", folder.name))):
        glasshive.local(folder, cuts=cuts)


def test_a_folder_that_is_not_there() -> None:
    with pytest.raises(ModelNotFoundError, match="no model 'no/such/folder'"):
        glasshive.local("no/such/folder")
