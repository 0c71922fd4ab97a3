"""In-place edits equal the same edits in torch hooks, bit by bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import LOGITS, Edit, Leaf, Read
from tiny_models import HIDDEN, IDS, OTHER, Setting
from torch import Tensor

STEER = torch.randn(HIDDEN, generator=torch.Generator().manual_seed(7))


def at_once(tensor: Tensor) -> None:
    tensor[:, -1] *= 2
    tensor[:, 0] = 1
    tensor[0, 2] -= STEER
    tensor[..., 3] = tensor[..., 4]


def by_methods(tensor: Tensor) -> None:
    tensor[:, 1:3].mul_(0.5).add_(STEER, alpha=2)
    tensor.select(1, 4).copy_(tensor.select(1, 0))
    tensor.clamp_(-2, 2)


def through_nested_views(tensor: Tensor) -> None:
    heads = tensor.view(1, 6, 4, 8).transpose(1, 2)
    heads[:, 1] = 0
    heads[:, 2, 1:3][..., ::2] += 1
    tensor.permute(2, 0, 1)[5] = 3


def through_a_transposed_view(tensor: Tensor) -> None:
    tensor.transpose(1, 2)[:, 3] *= -1
    tensor.mT[:, ::3, 1] = 2
    tensor[0].t()[7].zero_()


def with_masks_and_indices(tensor: Tensor) -> None:
    tensor[:, [0, 3]] = STEER
    tensor[torch.zeros(1, dtype=torch.int64), torch.tensor([2])] += 1
    tensor.masked_fill_(tensor > 1, 0.25)
    tensor[:, :, torch.arange(HIDDEN) % 5 == 0] = 0


def everywhere(tensor: Tensor) -> None:
    tensor[:] = 0


EDITS = [
    at_once,
    by_methods,
    through_nested_views,
    through_a_transposed_view,
    with_masks_and_indices,
    everywhere,
]


def check(
    setting: Setting,
    path: str,
    io: str,
    leaf: Leaf,
    get: Callable[[Any], Any],
    edit: Callable[[Tensor], Any],
    ids: Any = IDS,
) -> None:
    """Run one in-place edit both ways; compare the logits, the site itself, and a later block."""
    last = setting.block(5)
    with setting.model.trace(ids):
        edit(get(setting.at(path)))
        later = setting.at(last).output.save()
        logits = setting.at("lm_head").output.save()
        here = get(setting.at(path)).save()
    want = setting.hooked(
        ids,
        edits=[Edit(path, io, leaf, edit)],
        reads=[Read(path, io, leaf, name="here"), Read(last, "output", name="later")],
    )
    assert torch.equal(here, want["here"])
    assert torch.equal(later, want["later"])
    assert torch.equal(logits, want[LOGITS])
    assert not torch.equal(logits, setting.hooked(ids)[LOGITS])


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_a_block_output(tiny: Setting, edit: Callable[[Tensor], None]) -> None:
    check(tiny, tiny.block(2), "output", None, lambda module: module.output, edit)


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_a_block_input(llama: Setting, edit: Callable[[Tensor], None]) -> None:
    check(llama, llama.block(4), "input", None, lambda module: module.input, edit)


def test_ablate_an_mlp(tiny: Setting) -> None:
    check(tiny, tiny.block(3, "mlp"), "output", None, lambda module: module.output, everywhere)


def test_ablate_attention_in_its_tuple(tiny: Setting) -> None:
    path = tiny.block(1, "attention")
    check(tiny, path, "output", 0, lambda module: module.output[0], everywhere)


def test_one_leaf_of_a_tuple(tiny: Setting) -> None:
    path = tiny.block(4, "attention")
    check(tiny, path, "output", 0, lambda module: module.output[0], at_once)


def test_one_head_through_the_input_of_the_projection(tiny: Setting) -> None:
    def ablate(tensor: Tensor) -> None:
        tensor.view(1, 6, 4, 8)[:, :, 2] = 0

    path = tiny.block(2, "projection")
    check(tiny, path, "input", None, lambda module: module.input, ablate)


def test_the_embedding(tiny: Setting) -> None:
    path = tiny.names.embed
    check(tiny, path, "output", None, lambda module: module.output, at_once)


def test_token_ids(tiny: Setting) -> None:
    def swap(tensor: Tensor) -> None:
        tensor[:, 2] = 11
        tensor[:, 0] += 1

    path = tiny.names.embed
    with tiny.model.trace(IDS):
        swap(tiny.at(path).input)
        logits = tiny.at("lm_head").output.save()
    changed = [IDS[0] + 1, IDS[1], 11, *IDS[3:]]
    assert torch.equal(logits, tiny.hooked(changed)[LOGITS])


def test_the_input_of_a_norm_changes_the_residual_stream_too(tiny: Setting) -> None:
    path = tiny.block(3, "first_norm")
    check(tiny, path, "input", None, lambda module: module.input, at_once)


def test_the_input_of_the_second_norm(tiny: Setting) -> None:
    path = tiny.block(2, "second_norm")
    check(tiny, path, "input", None, lambda module: module.input, by_methods)


def test_final_norm_and_head(tiny: Setting) -> None:
    def double(tensor: Tensor) -> None:
        tensor[:, -1] *= 2

    for path, io in ((tiny.names.final_norm, "output"), ("lm_head", "input")):
        with tiny.model.trace(IDS):
            double(getattr(tiny.at(path), io))
            logits = tiny.at("lm_head").output.save()
        want = tiny.hooked(IDS, edits=[Edit(path, io, None, double)])
        assert torch.equal(logits, want[LOGITS])


def test_named_outputs(tiny: Setting) -> None:
    base = tiny.names.embed.split(".")[0]
    with tiny.model.trace(IDS):
        tiny.at(base).output.last_hidden_state[:, 1] = 0
        tiny.model.output.logits[:, 0] = 5
        logits = tiny.model.output.logits.save()
        head = tiny.at("lm_head").output.clone
    del head
    want = tiny.hooked(
        IDS, edits=[Edit(base, "output", "last_hidden_state", lambda x: x[:, 1].zero_())]
    )
    expected = want[LOGITS].clone()
    expected[:, 0] = 5
    assert torch.equal(logits, expected)


def test_several_sites_in_one_trace(tiny: Setting) -> None:
    paths = [tiny.block(i) for i in (0, 2, 3, 5)]
    with tiny.model.trace(IDS):
        for path in paths:
            tiny.at(path).output[:, -1] += STEER
        logits = tiny.at("lm_head").output.save()
    edits = [Edit(path, "output", None, lambda x: x[:, -1].add_(STEER)) for path in paths]
    assert torch.equal(logits, tiny.hooked(IDS, edits=edits)[LOGITS])


def test_steering_with_a_direction_of_the_users(tiny: Setting) -> None:
    path = tiny.block(3)
    with tiny.model.trace([IDS, OTHER]):
        tiny.at(path).output[:] += 4 * STEER
        logits = tiny.at("lm_head").output[:, -1].save()
    want = tiny.hooked(
        [IDS, OTHER], edits=[Edit(path, "output", None, lambda x: x.add_(4 * STEER))]
    )
    assert torch.equal(logits, want[LOGITS][:, -1])


def test_an_edit_by_what_was_read_before(tiny: Setting) -> None:
    first, second = tiny.block(1), tiny.block(4)
    with tiny.model.trace(IDS):
        early = tiny.at(first).output
        tiny.at(second).output[:, -1] += early[:, 0] - early[:, 1]
        logits = tiny.at("lm_head").output.save()
    seen: dict[Any, Tensor] = {}

    def add(tensor: Tensor) -> None:
        tensor[:, -1] += seen["early"][:, 0] - seen["early"][:, 1]

    want = tiny.hooked(
        IDS,
        reads=[Read(first, "output", name="early")],
        edits=[Edit(second, "output", None, add)],
        seen=seen,
    )
    assert torch.equal(logits, want[LOGITS])


def test_the_residual_stream_by_the_weights_of_the_head(tiny: Setting) -> None:
    """The row of a weight that lies on the last span goes into an earlier one."""
    path = tiny.block(2)
    with tiny.model.trace(IDS):
        tiny.at(path).output += tiny.at("lm_head").weight[9]
        logits = tiny.at("lm_head").output.save()
    row = tiny.plain.get_submodule("lm_head").weight[9]
    want = tiny.hooked(IDS, edits=[Edit(path, "output", None, lambda x: x.add_(row))])
    assert torch.equal(logits, want[LOGITS])


def test_position_embeddings_of_gpt2(get_setting: Any) -> None:
    def shuffle(tensor: Tensor) -> None:
        tensor[:, 1] = tensor[:, 4]
        tensor[:, 0] = 0

    for cuts in ((), (2, 4)):
        setting = get_setting("gpt2", cuts)
        path = "transformer.wpe"
        with setting.model.trace(IDS):
            shuffle(setting.at(path).output)
            logits = setting.at("lm_head").output.save()
        want = setting.hooked(IDS, edits=[Edit(path, "output", None, shuffle)])
        assert torch.equal(logits, want[LOGITS])


def test_an_edit_of_position_embeddings_is_of_one_invoke(get_setting: Any) -> None:
    setting = get_setting("gpt2", (2, 4))
    with setting.model.trace() as tracer:
        with tracer.invoke(IDS):
            plain = setting.at("lm_head").output.save()
        with tracer.invoke(IDS):
            setting.at("transformer.wpe").output[:] = 0
            edited = setting.at("lm_head").output.save()
    assert torch.equal(plain, setting.hooked(IDS)[LOGITS])
    edit = Edit("transformer.wpe", "output", None, lambda x: x.zero_())
    assert torch.equal(edited, setting.hooked(IDS, edits=[edit])[LOGITS])
