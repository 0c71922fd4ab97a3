"""Rules 1 to 3 of a trace (docs/design.md): order, late edits, and what depends on what."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import LOGITS, Edit, Read
from tiny_models import HIDDEN, IDS, OTHER, Setting, refused
from torch import Tensor

from glasshive.graph.errors import (
    LateEdit,
    NoRoots,
    UnseenWrite,
)

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
