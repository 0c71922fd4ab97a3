"""Rules 4 to 9 of a trace (docs/design.md): passes, rows, side ways, skips and ambient state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import LOGITS, Edit, Read
from tiny_models import BLOCKS, HIDDEN, IDS, OTHER, Setting, refused
from torch import Tensor

from glasshive.client.errors import AmbientState, PlainDestination
from glasshive.graph.errors import (
    NotASite,
    NotYet,
    ShapeMismatch,
    UnequalLengths,
)
from glasshive.graph.graph import Graph, Node, NodeId, Ref, Site, Write
from glasshive.graph.graph import Read as ReadNode
from glasshive.graph.order import InvokeShape, assign_passes

# 4. No barriers ----------------------------------------------------------------------------------


def test_rule_4_passes_follow_the_values(llama: Setting) -> None:
    layers = llama.model.model.layers
    with llama.model.trace() as tracer:
        with tracer.invoke(IDS):
            late = layers[4].output
        with tracer.invoke(OTHER):
            layers[2].output = late
            logits = llama.model.lm_head.output.save()
    assert tracer.result.passes == 2
    h = llama.hooked(IDS, reads=[Read("model.layers.4", "output", name="h")])["h"]
    edit = Edit("model.layers.2", "output", None, lambda x: h, "set")
    assert torch.equal(logits, llama.hooked(OTHER, edits=[edit])[LOGITS])


def test_rule_4_invokes_that_need_each_other_share_a_pass(llama: Setting) -> None:
    """A's early layer goes into B, B's middle layer back into A."""
    layers = llama.model.model.layers
    with llama.model.trace() as tracer:
        with tracer.invoke(IDS):
            a = layers[3].output
            a_early = layers[1].output
        with tracer.invoke(OTHER):
            layers[2].output = a_early * 1
            b = layers[2].output
            a[:] = b
            end = a.save()
            logits = llama.model.lm_head.output.save()
    assert tracer.result.passes == 1
    seen: dict[Any, Tensor] = {}
    want = llama.hooked(
        [IDS, OTHER],
        reads=[Read("model.layers.1", "output", name="a")],
        edits=[Edit("model.layers.2", "output", None, lambda x: x[1].copy_(seen["a"][0]))],
        seen=seen,
    )
    assert torch.equal(logits, want[LOGITS][1:])
    assert torch.equal(end, want["a"][:1])


def test_rule_4_invokes_that_need_each_other_and_differ(llama: Setting) -> None:
    """The tracer closes an invoke before the next one, so only a graph can ask for this."""
    nodes: list[Node] = [
        ReadNode(Site("model.layers.1", "output"), 0),
        Write(Site("model.layers.2", "output"), 1, Ref(NodeId(0)), "set"),
        ReadNode(Site("model.layers.3", "output"), 1),
        Write(Site("model.layers.4", "output"), 0, Ref(NodeId(2)), "set"),
    ]
    graph = Graph({NodeId(i): node for i, node in enumerate(nodes)})
    outline = llama.model.outline
    same = [InvokeShape(1, 6), InvokeShape(2, 6)]
    assert assign_passes(graph, outline, same).passes[0].invokes == (0, 1)
    with pytest.raises(UnequalLengths, match=r"0 and 1 need each other.*0: 6 tokens, 1: 5"):
        assign_passes(graph, outline, [InvokeShape(1, 6), InvokeShape(1, 5)])


# 5. Invokes of equal length share a forward ------------------------------------------------------


def test_rule_5_rows_of_one_batch_and_passes_of_bounded_rows(llama: Setting) -> None:
    """The same rows in the same batch are bit-equal; the split into passes is by the rule."""
    prompts = [[seed, 5, 9, 11] for seed in range(7)]
    for pass_rows, passes in ((32, 1), (4, 2), (3, 3), (1, 7)):
        saved = []
        with llama.model.trace(pass_rows=pass_rows) as tracer:
            for prompt in prompts:
                with tracer.invoke(prompt):
                    saved.append(llama.model.lm_head.output.save())
        assert tracer.result.passes == passes
        for start in range(0, len(prompts), pass_rows):
            some = prompts[start : start + pass_rows]
            want = llama.hooked(some)[LOGITS]
            assert torch.equal(torch.cat(saved[start : start + pass_rows]), want)


# 6. Rows are explicit ----------------------------------------------------------------------------


def test_rule_6_rows_are_told_by_the_axis_and_never_by_a_size(llama: Setting) -> None:
    """As many rows as tokens, as heads, and as the tokens times anything."""
    for rows, tokens in ((4, 4), (2, 2), (8, 4), (6, 6)):
        ids = [[(7 * row + token) % 60 + 1 for token in range(tokens)] for row in range(rows)]
        saved = []
        with llama.model.trace() as tracer:
            for row in ids:
                with tracer.invoke(row):
                    llama.model.model.layers[1].self_attn.output[0][:, 0] = 1
                    llama.model.model.layers[2].mlp.input[:, -1] *= 2
                    saved.append(llama.model.lm_head.output.save())
        edits = [
            Edit("model.layers.1.self_attn", "output", 0, lambda x: x[:, 0].fill_(1)),
            Edit("model.layers.2.mlp", "input", None, lambda x: x[:, -1].mul_(2)),
        ]
        assert torch.equal(torch.cat(saved), llama.hooked(ids, edits=edits)[LOGITS])


def test_rule_6_a_tensor_without_rows_is_read_by_every_invoke_alike(llama: Setting) -> None:
    tables = []
    with llama.model.trace() as tracer:
        for prompt in (IDS, OTHER):
            with tracer.invoke(prompt):
                tables.append(llama.model.model.rotary_emb.output[0].save())
    assert tracer.result.passes == 1
    want = llama.hooked(IDS, reads=[Read("model.rotary_emb", "output", 0, name="cos")])["cos"]
    assert torch.equal(tables[0], want)
    assert torch.equal(tables[1], want)


# 7. What bypasses the chain is not half-edited ---------------------------------------------------


def test_rule_7_rotary_tables_are_refused(one_llama: Setting) -> None:
    rotary = one_llama.model.model.rotary_emb

    def in_place() -> None:
        rotary.output[0][:] = 0

    def assigned() -> None:
        cosines, sines = rotary.output
        rotary.output = (cosines * 2, sines)

    def at_the_input() -> None:
        rotary.input[:] = 0

    for edit in (in_place, assigned, at_the_input):
        refused(one_llama, NotYet, "reaches every block beside the hidden states", edit)


def test_rule_7_a_table_that_every_block_receives_is_not_edited_in_place(
    one_llama: Setting,
) -> None:
    """In a hook it would change the table of all later blocks; here only of those on one peer."""
    attention = one_llama.model.model.layers[1].self_attn

    def body() -> None:
        attention.inputs[1]["position_embeddings"][0][:] = 0

    text = "each peer has its own, so one peer cannot edit it in place for all"
    refused(one_llama, NotYet, text, body)


def test_rule_7_masks(get_setting: Any) -> None:
    """In place is refused; what is assigned is of one module alone, as in a hook."""

    def blind(mask: Tensor) -> Tensor:
        changed = mask.clone()
        changed[..., 0] = torch.finfo(torch.float32).min
        changed[..., 0, 0] = 0
        return changed

    for cuts in ((), (2, 4)):
        setting = get_setting("llama", cuts, "eager")
        attention = setting.model.model.layers[3].self_attn

        def in_place(attention: Any = attention) -> None:
            attention.inputs[1]["attention_mask"][:] = 0

        refused(setting, NotYet, "cannot edit it in place", in_place)
        with setting.model.trace(IDS):
            args, named = attention.inputs
            attention.inputs = args, {**named, "attention_mask": blind(named["attention_mask"])}
            logits = setting.model.lm_head.output.save()
        edit = Edit("model.layers.3.self_attn", "input", "attention_mask", blind, "set")
        want = setting.hooked(IDS, edits=[edit])[LOGITS]
        assert torch.equal(logits, want)
        assert not torch.equal(logits, setting.hooked(IDS)[LOGITS])


def test_rule_7_position_embeddings_enter_the_hidden_states(get_setting: Any) -> None:
    """GPT-2 adds them before block 0, so an edit of them is an edit of the chain."""
    for cuts in ((), (3,), (2, 4)):
        setting = get_setting("gpt2", cuts)
        wpe = setting.model.transformer.wpe
        with setting.model.trace(IDS):
            wpe.output = wpe.output.flip(1)
            logits = setting.model.lm_head.output.save()
        edit = Edit("transformer.wpe", "output", None, lambda x: x.flip(1), "set")
        assert torch.equal(logits, setting.hooked(IDS, edits=[edit])[LOGITS])


# 8. Skip, and calls ------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["", "mlp", "attention", "first_norm"])
def test_rule_8_skip(tiny: Setting, part: str) -> None:
    path = tiny.block(2, part)
    given = torch.randn(1, 6, HIDDEN, generator=torch.Generator().manual_seed(9))
    with tiny.model.trace(IDS):
        tiny.at(path).skip(given)
        logits = tiny.at("lm_head").output.save()
    leaf = 0 if part == "attention" else None
    edit = Edit(path, "output", leaf, lambda x: given, "set")
    assert torch.equal(logits, tiny.hooked(IDS, edits=[edit])[LOGITS])


def test_rule_8_skip_by_the_modules_own_input(tiny: Setting) -> None:
    path = tiny.block(3)
    with tiny.model.trace(IDS):
        block = tiny.at(path)
        block.input[:, 0] = 1
        block.skip(block.input)
        block.output[:, 1] = 2
        out = block.output.save()
        logits = tiny.at("lm_head").output.save()
    seen: dict[Any, Tensor] = {}

    def given(tensor: Tensor) -> Tensor:
        new = seen["in"].clone()
        new[:, 1] = 2
        return new

    want = tiny.hooked(
        IDS,
        edits=[
            Edit(path, "input", None, lambda x: x[:, 0].fill_(1)),
            Edit(path, "output", None, given, "set"),
        ],
        reads=[Read(path, "input", name="in"), Read(path, "output", name="out")],
        seen=seen,
    )
    assert torch.equal(out, want["out"])
    assert torch.equal(logits, want[LOGITS])


def test_rule_8_a_skipped_module_does_not_run(get_setting: Any) -> None:
    setting = get_setting("llama", ())
    with setting.model.trace(IDS) as tracer:
        setting.model.model.layers[2].skip(setting.model.model.layers[2].input)
        setting.model.lm_head.output.save()
        kinds = [type(write).__name__ for write, _, _ in tracer.sites.writes()]
    assert kinds == ["Skip"]


def test_rule_8_every_block_skipped_is_a_lens_on_the_embedding(tiny: Setting) -> None:
    with tiny.model.trace(IDS):
        for index in range(BLOCKS):
            block = tiny.at(tiny.block(index))
            block.skip(block.input)
        last = tiny.at(tiny.block(BLOCKS - 1)).output.save()
    want = tiny.hooked(IDS, reads=[Read(tiny.block(0), "input", name="h")])["h"]
    assert torch.equal(last, want)


def test_rule_8_sites_inside_a_skipped_module(one_llama: Setting) -> None:
    layers = one_llama.model.model.layers

    def after() -> None:
        layers[2].skip(layers[2].input)
        layers[2].mlp.output.save()

    def before() -> None:
        layers[2].mlp.output = torch.zeros(1, 6, HIDDEN)
        layers[2].skip(layers[2].input)

    refused(one_llama, NotASite, "is inside model.layers.2, which this invoke skips", after)
    refused(one_llama, NotASite, "model.layers.2.mlp.output inside it is used above", before)


def test_rule_8_a_value_of_another_shape(one_llama: Setting) -> None:
    def body() -> None:
        one_llama.model.model.layers[2].skip(torch.zeros(1, 5, HIDDEN))

    refused(one_llama, ShapeMismatch, "float32[1, 5, 32] is assigned to", body)


def test_rule_8_what_holds_the_blocks_cannot_be_skipped(one_llama: Setting) -> None:
    def body() -> None:
        one_llama.model.model.skip(torch.zeros(1, 6, HIDDEN))

    refused(one_llama, NotASite, "cannot be skipped", body)


def test_rule_8_a_call_runs_without_the_users_edits(llama: Setting) -> None:
    norm = llama.model.model.norm
    with llama.model.trace(IDS):
        norm.output[:] = 0
        called = norm(llama.model.model.layers[5].output).save()
        logits = llama.model.lm_head.output.save()
    plain = llama.hooked(IDS, reads=[Read("model.norm", "output", name="n")])["n"]
    assert torch.equal(called, plain)
    assert not logits.any()


# 9. Recording is independent of ambient state ----------------------------------------------------


def test_rule_9_gradients_are_off_and_weights_of_the_users_may_require_them(llama: Setting) -> None:
    probe = torch.nn.Linear(HIDDEN, 2)
    with llama.model.trace(IDS):
        assert not torch.is_grad_enabled()
        answer = probe(llama.model.model.layers[2].output[:, -1]).save()
    assert torch.is_grad_enabled()
    h = llama.hooked(IDS, reads=[Read("model.layers.2", "output", name="h")])["h"]
    with torch.no_grad():
        assert torch.equal(answer, probe(h[:, -1]))


def test_rule_9_a_trace_under_inference_mode(llama: Setting) -> None:
    with torch.inference_mode():
        direction = torch.ones(HIDDEN)
        with llama.model.trace(IDS):
            llama.model.model.layers[2].output += direction
            logits = llama.model.lm_head.output.save()
    edit = Edit("model.layers.2", "output", None, lambda x: x.add_(torch.ones(HIDDEN)))
    assert torch.equal(logits, llama.hooked(IDS, edits=[edit])[LOGITS])


@pytest.mark.parametrize(
    ("mode", "text"),
    [
        (torch.inference_mode, "inference_mode() is open inside the trace"),
        (torch.enable_grad, "gradients are switched on inside the trace"),
    ],
)
def test_rule_9_modes_opened_inside_the_body(
    one_llama: Setting, mode: Callable[[], Any], text: str
) -> None:
    def body() -> None:
        with mode():
            _ = one_llama.model.model.layers[2].output * 2

    refused(one_llama, AmbientState, text, body)


def test_rule_9_a_plain_destination(one_llama: Setting) -> None:
    def body() -> None:
        buffer = torch.zeros(BLOCKS, HIDDEN)
        buffer[0] = one_llama.model.model.layers[0].output.mean((0, 1))

    refused(one_llama, PlainDestination, "a traced value is written into a plain tensor", body)


def test_rule_9_another_default_dtype(one_llama: Setting) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        refused(one_llama, AmbientState, "torch's default dtype is torch.float64", lambda: None)
    finally:
        torch.set_default_dtype(torch.float32)


def test_rule_9_a_tensor_of_the_users_is_taken_as_it_is_when_recorded(llama: Setting) -> None:
    direction = torch.ones(HIDDEN)
    with llama.model.trace(IDS):
        once = (llama.model.model.layers[2].output * direction).save()
        direction.mul_(3)
        thrice = (llama.model.model.layers[2].output * direction).save()
        direction.zero_()
    assert torch.equal(thrice, once * 3)
