"""The rules that keep a trace from being silently wrong (docs/design.md), one section each."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import LOGITS, Edit, Read
from tiny_models import BLOCKS, HIDDEN, IDS, OTHER, Setting
from torch import Tensor

from glasshive.client.errors import AmbientState, PlainDestination
from glasshive.graph.errors import (
    LateEdit,
    NoRoots,
    NotASite,
    NotYet,
    ShapeMismatch,
    UnequalLengths,
    UnseenWrite,
)
from glasshive.graph.graph import Graph, Node, NodeId, Ref, Site, Write
from glasshive.graph.graph import Read as ReadNode
from glasshive.graph.order import InvokeShape, assign_passes


def refused(
    setting: Setting,
    error: type[Exception],
    text: str,
    body: Callable[[], Any],
    prompt: Any = IDS,
) -> None:
    """A trace with this body raises this error with this text."""

    def trace() -> None:
        with setting.model.trace(prompt):
            body()

    with pytest.raises(error, match=re.escape(text)):
        trace()


# 1. Across sites, event order; at one site, program order ----------------------------------------


def test_rule_1_sites_may_be_used_in_any_order(llama: Setting) -> None:
    with llama.model.trace(IDS):
        late = llama.model.model.layers[4].output.save()
        early = llama.model.model.layers[1].output.save()
        logits = llama.model.lm_head.output.save()
        first = llama.model.model.embed_tokens.output.save()
    paths = ["model.layers.4", "model.layers.1", "lm_head", "model.embed_tokens"]
    want = llama.hooked(IDS, reads=[Read(path, "output", name=path) for path in paths])
    for path, got in zip(paths, (late, early, logits, first), strict=True):
        assert torch.equal(got, want[path])


def test_rule_1_edits_of_later_sites_may_come_first_in_the_code(llama: Setting) -> None:
    layers = llama.model.model.layers
    with llama.model.trace(IDS):
        layers[4].mlp.output = torch.ones(1, 6, HIDDEN)
        layers[1].mlp.output = torch.zeros(1, 6, HIDDEN)
        logits = llama.model.lm_head.output.save()
    edits = [
        Edit("model.layers.4.mlp", "output", None, torch.ones_like, "set"),
        Edit("model.layers.1.mlp", "output", None, torch.zeros_like, "set"),
    ]
    assert torch.equal(logits, llama.hooked(IDS, edits=edits)[LOGITS])


def test_rule_1_a_read_sees_the_newest_version_and_the_model_the_last_one(llama: Setting) -> None:
    layer = llama.model.model.layers[2]
    with llama.model.trace(IDS):
        one = layer.output.clone().save()
        layer.output = layer.output * 2
        two = layer.output.clone().save()
        layer.output[:, 0] = 0
        layer.output = layer.output + 1
        three = layer.output.save()
        after = llama.model.model.layers[3].input.save()
    plain = llama.hooked(IDS, reads=[Read("model.layers.2", "output", name="h")])["h"]
    assert torch.equal(one, plain)
    assert torch.equal(two, plain * 2)
    expected = plain * 2
    expected[:, 0] = 0
    assert torch.equal(three, expected + 1)
    assert torch.equal(after, expected + 1)


def test_rule_1_augmented_assignment_is_one_edit_in_place(llama: Setting) -> None:
    """`site.output += v` gives back the object that was read; it is no second write."""
    with llama.model.trace(IDS) as tracer:
        llama.model.model.layers[2].output += 1
        llama.model.model.layers[2].output[:, 0] *= 2
        llama.model.lm_head.output.save()
        writes = tracer.sites.writes()
    assert [write.mode for write, _, _ in writes] == ["inplace"]


def test_rule_1_a_saved_object_shows_its_later_edits_and_a_clone_does_not(llama: Setting) -> None:
    with llama.model.trace(IDS):
        h = llama.model.model.layers[2].output.save()
        kept = h.clone().save()
        row = h[:, 3].save()
        h[:, 3] = 7
    assert (h[:, 3] == 7).all()
    assert (row == 7).all()
    assert not (kept == 7).any()


def test_rule_1_edits_at_other_sites_never_change_a_read(llama: Setting) -> None:
    """In a hook, a block's output and the next block's input are one piece of memory."""
    with llama.model.trace(IDS):
        out = llama.model.model.layers[2].output.save()
        llama.model.model.layers[3].input[:] = 0
        logits = llama.model.lm_head.output.save()
    plain = llama.hooked(IDS, reads=[Read("model.layers.2", "output", name="h")])["h"]
    assert torch.equal(out, plain)
    edit = Edit("model.layers.3", "input", None, lambda x: x.zero_())
    assert torch.equal(logits, llama.hooked(IDS, edits=[edit])[LOGITS])


# 2. A late edit is an error ----------------------------------------------------------------------


def late_in_place(layers: Any) -> None:
    layers[2].output[:, -1] = 0


def late_assignment(layers: Any) -> None:
    layers[2].output = torch.zeros(1, 6, HIDDEN)


def late_skip(layers: Any) -> None:
    layers[2].skip(torch.zeros(1, 6, HIDDEN))


def late_at_an_input(layers: Any) -> None:
    layers[2].mlp.input = torch.zeros(1, 6, HIDDEN)


@pytest.mark.parametrize("edit", [late_in_place, late_assignment, late_skip, late_at_an_input])
def test_rule_2_an_edit_after_a_read_that_depends_on_it(
    one_llama: Setting, edit: Callable[[Any], None]
) -> None:
    layers = one_llama.model.model.layers

    def body() -> None:
        layers[4].output.save()
        edit(layers)

    refused(one_llama, LateEdit, " runs before model.layers.4.output, which was read already", body)


def test_rule_2_through_an_object_that_was_held(one_llama: Setting) -> None:
    """NNsight ignores such an edit silently."""
    layers = one_llama.model.model.layers

    def body() -> None:
        view = layers[2].output[:, 1:3]
        layers[4].output.save()
        view[:] = 0

    refused(one_llama, LateEdit, "late edit: model.layers.2.output runs before", body)


def test_rule_2_through_an_object_that_was_assigned(one_llama: Setting) -> None:
    layers = one_llama.model.model.layers

    def body() -> None:
        new = layers[2].output * 2
        layers[2].output = new
        layers[4].output.save()
        new[:] = 0

    refused(one_llama, LateEdit, "late edit: model.layers.2.output runs before", body)


def test_rule_2_through_an_object_that_was_given_to_skip(one_llama: Setting) -> None:
    layers = one_llama.model.model.layers

    def body() -> None:
        new = layers[2].input * 2
        layers[2].skip(new)
        layers[4].output.save()
        new[:] = 0

    refused(one_llama, LateEdit, "late edit: model.layers.2.output runs before", body)


def test_rule_2_a_clone_may_be_edited_at_any_time(llama: Setting) -> None:
    with llama.model.trace(IDS):
        copy = llama.model.model.layers[2].output.clone()
        logits = llama.model.lm_head.output.save()
        copy[:] = 0
        copy.save()
    assert torch.equal(logits, llama.hooked(IDS)[LOGITS])
    assert not copy.any()


def test_rule_2_does_not_hold_between_invokes(llama: Setting) -> None:
    with llama.model.trace() as tracer:
        with tracer.invoke(IDS):
            plain = llama.model.lm_head.output.save()
        with tracer.invoke(IDS):
            llama.model.model.layers[2].output[:] = 0
            edited = llama.model.lm_head.output.save()
    edit = Edit("model.layers.2", "output", None, lambda x: x[1].zero_())
    want = llama.hooked([IDS, IDS], edits=[edit])[LOGITS]
    assert torch.equal(torch.cat([plain, edited]), want)


def test_rule_2_a_refused_edit_spoils_the_trace(one_llama: Setting) -> None:
    """Whoever catches the error gets it again at the end, not a result without the edit."""
    layers = one_llama.model.model.layers

    def body() -> None:
        held = layers[2].output
        layers[4].output.save()
        with contextlib.suppress(LateEdit):
            held[:] = 0

    refused(one_llama, LateEdit, "late edit: model.layers.2.output runs before", body)


# 3. Reads depend on earlier writes ---------------------------------------------------------------


def test_rule_3_a_write_that_the_model_carries_on_is_kept(llama: Setting) -> None:
    with llama.model.trace(IDS):
        llama.model.model.layers[1].mlp.output[:] = 0
        logits = llama.model.lm_head.output.save()
    edit = Edit("model.layers.1.mlp", "output", None, lambda x: x.zero_())
    assert torch.equal(logits, llama.hooked(IDS, edits=[edit])[LOGITS])


def test_rule_3_a_write_depends_on_earlier_ones_as_its_value_is_read(llama: Setting) -> None:
    layers = llama.model.model.layers
    with llama.model.trace() as tracer:
        with tracer.invoke(IDS):
            layers[0].output[:] *= 3
            h = layers[1].output
        with tracer.invoke(OTHER):
            layers[2].output = h
            logits = llama.model.lm_head.output.save()
    seen: dict[Any, Tensor] = {}
    want = llama.hooked(
        [IDS, OTHER],
        reads=[Read("model.layers.1", "output", name="h")],
        edits=[
            Edit("model.layers.0", "output", None, lambda x: x[0].mul_(3)),
            Edit("model.layers.2", "output", None, lambda x: x[1].copy_(seen["h"][0])),
        ],
        seen=seen,
    )
    assert torch.equal(logits, want[LOGITS][1:])


def test_rule_3_a_trace_without_roots(one_llama: Setting) -> None:
    def body() -> None:
        one_llama.model.model.layers[1].output[:] = 0

    refused(one_llama, NoRoots, "nothing is saved, so nothing would come back", body)


@pytest.mark.parametrize("how", ["in place", "assigned", "skipped"])
def test_rule_3_a_write_that_no_root_can_see(one_llama: Setting, how: str) -> None:
    """It is dropped with a warning, and no peer is contacted for it."""
    layers = one_llama.model.model.layers

    def trace() -> tuple[Tensor, Any]:
        with one_llama.model.trace(IDS) as tracer:
            saved = layers[1].output.save()
            if how == "in place":
                layers[4].output[:] = 0
            elif how == "assigned":
                layers[4].output = saved
            else:
                layers[4].skip(layers[4].input)
        return saved, tracer.result

    with pytest.warns(UnseenWrite) as caught:
        saved, result = trace()
    (warning,) = caught
    assert "nothing that is saved can see this edit of model.layers.4" in str(warning.message)
    assert warning.filename == __file__
    with open(__file__, encoding="utf-8") as source:
        assert "layers[4]" in source.readlines()[warning.lineno - 1]
    assert len(result.hops) == 1
    plain = one_llama.hooked(IDS, reads=[Read("model.layers.1", "output", name="h")])["h"]
    assert torch.equal(saved, plain)


def test_rule_3_an_edit_that_is_saved_as_a_value_is_seen(llama: Setting) -> None:
    """The model never reads the edited logits, but the user does: no warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnseenWrite)
        with llama.model.trace(IDS):
            llama.model.lm_head.output[:, 0] = 0
            logits = llama.model.lm_head.output.save()
        with llama.model.trace(IDS):
            llama.model.lm_head.output = llama.model.lm_head.output * 2
            doubled = llama.model.lm_head.output.save()
    want = llama.hooked(IDS)[LOGITS]
    assert torch.equal(doubled, want * 2)
    assert not logits[:, 0].any()
    assert torch.equal(logits[:, 1:], want[:, 1:])


def test_rule_3_a_like_edit_elsewhere_does_not_hide_the_warning(one_llama: Setting) -> None:
    """Both sites get the same zeros; only one of the edits is seen."""
    layers = one_llama.model.model.layers

    def trace() -> None:
        with one_llama.model.trace(IDS):
            layers[1].mlp.output[:] = 0
            layers[2].output.save()
            layers[4].mlp.output[:] = 0

    with pytest.warns(UnseenWrite, match=r"edit of model\.layers\.4\.mlp\.output"):
        trace()


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
