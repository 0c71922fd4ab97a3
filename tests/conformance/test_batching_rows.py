"""Rows of one batch: prompts of equal and unequal length, in one invoke and in several."""

from __future__ import annotations

from typing import Any

import torch
from oracle import LOGITS, Edit, Read, left_padded
from tiny_models import IDS, OTHER, Setting
from torch import Tensor

UNEQUAL = [[3, 14, 15, 9, 26, 5], [35, 8, 9], [7]]


def padded(setting: Setting, prompts: list[list[int]], **arguments: Any) -> dict[Any, Tensor]:
    """What plain Hugging Face gives for a left-padded batch, with its mask and positions."""
    ids, mask = left_padded(prompts)
    return setting.hooked(ids.tolist(), attention_mask=mask, **arguments)


def real(logits: Tensor, prompts: list[list[int]]) -> list[Tensor]:
    """Without the padding."""
    return [row[-len(prompt) :] for row, prompt in zip(logits, prompts, strict=True)]


def test_invokes_of_one_length_are_rows_of_one_pass(tiny: Setting) -> None:
    prompts = [IDS, OTHER, IDS[::-1]]
    saved = []
    with tiny.model.trace() as tracer:
        for prompt in prompts:
            with tracer.invoke(prompt):
                saved.append(tiny.at("lm_head").output.save())
    assert tracer.result.passes == 1
    assert torch.equal(torch.cat(saved), tiny.hooked(prompts)[LOGITS])


def test_an_edit_of_one_row_leaves_the_others_exact(tiny: Setting) -> None:
    path = tiny.block(2)
    saved = []
    with tiny.model.trace() as tracer:
        for index, prompt in enumerate([IDS, OTHER, IDS]):
            with tracer.invoke(prompt):
                if index == 1:
                    tiny.at(path).output[:] = 0
                saved.append(tiny.at("lm_head").output.save())
    edit = Edit(path, "output", None, lambda x: x[1].zero_())
    assert torch.equal(torch.cat(saved), tiny.hooked([IDS, OTHER, IDS], edits=[edit])[LOGITS])


def test_invokes_of_several_rows(tiny: Setting) -> None:
    path = tiny.block(3)
    with tiny.model.trace() as tracer:
        with tracer.invoke([IDS, OTHER]):
            hidden = tiny.at(path).output
            tiny.at(path).output = hidden.flip(0)
            two = tiny.at("lm_head").output.save()
        with tracer.invoke([OTHER, OTHER, IDS]):
            tiny.at(path).output[1] += hidden[0]
            three = tiny.at("lm_head").output.save()
    assert (two.shape[0], three.shape[0]) == (2, 3)

    def edit(tensor: Tensor) -> None:
        tensor[3] += tensor[0]
        tensor[:2] = tensor[:2].flip(0)

    ids = [IDS, OTHER, OTHER, OTHER, IDS]
    want = tiny.hooked(ids, edits=[Edit(path, "output", None, edit)])[LOGITS]
    assert torch.equal(torch.cat([two, three]), want)


def test_invokes_of_other_lengths_get_passes_of_their_own(tiny: Setting) -> None:
    prompts = [IDS, IDS[:4], OTHER, OTHER[:4], IDS[:1]]
    saved = []
    with tiny.model.trace() as tracer:
        for prompt in prompts:
            with tracer.invoke(prompt):
                saved.append(tiny.at("lm_head").output.save())
    assert tracer.result.passes == 3
    six, four = tiny.hooked([IDS, OTHER])[LOGITS], tiny.hooked([IDS[:4], OTHER[:4]])[LOGITS]
    assert torch.equal(torch.cat([saved[0], saved[2]]), six)
    assert torch.equal(torch.cat([saved[1], saved[3]]), four)
    assert torch.equal(saved[4], tiny.hooked(IDS[:1])[LOGITS])


def test_a_batch_of_unequal_prompts_is_padded_on_the_left(tiny: Setting) -> None:
    path = tiny.block(2)
    with tiny.model.trace(UNEQUAL) as tracer:
        hidden = tiny.at(path).output.save()
        logits = tiny.at("lm_head").output.save()
        lengths, mask, ids = tracer.lengths, tracer.attention_mask, tracer.input_ids
    assert lengths.tolist() == [6, 3, 1]
    assert torch.equal(mask, left_padded(UNEQUAL)[1])
    assert torch.equal(ids * mask, left_padded(UNEQUAL)[0])
    want = padded(tiny, UNEQUAL, reads=[Read(path, "output", name="hidden")])
    # What stands where there is padding means nothing; the rest is exact.
    for got, expected in zip(real(logits, UNEQUAL), real(want[LOGITS], UNEQUAL), strict=True):
        assert torch.equal(got, expected)
    for got, expected in zip(real(hidden, UNEQUAL), real(want["hidden"], UNEQUAL), strict=True):
        assert torch.equal(got, expected)


def test_padding_does_not_change_an_answer(tiny: Setting) -> None:
    with tiny.model.trace(UNEQUAL):
        logits = tiny.at("lm_head").output[:, -1].save()
    for row, prompt in enumerate(UNEQUAL):
        alone = tiny.hooked(prompt)[LOGITS][0, -1]
        torch.testing.assert_close(logits[row], alone, rtol=0, atol=1e-4)


def test_means_that_leave_out_the_padding(tiny: Setting) -> None:
    path = tiny.block(4)
    with tiny.model.trace(UNEQUAL) as tracer:
        hidden = tiny.at(path).output
        mask = tracer.attention_mask.unsqueeze(-1)
        means = ((hidden * mask).sum(1) / tracer.lengths.unsqueeze(-1)).save()
    plain = padded(tiny, UNEQUAL, reads=[Read(path, "output", name="h")])["h"]
    mask = left_padded(UNEQUAL)[1].unsqueeze(-1)
    want = (plain * mask).sum(1) / mask.sum(1)
    assert torch.equal(means, want)


def test_edits_in_a_padded_batch(tiny: Setting) -> None:
    first, second = tiny.block(1, "attention"), tiny.block(4)
    with tiny.model.trace(UNEQUAL):
        tiny.at(first).output[0][:, -1] *= 2
        tiny.at(second).output[1] = tiny.at(second).output[0]
        logits = tiny.at("lm_head").output.save()

    def copy(tensor: Tensor) -> None:
        tensor[1] = tensor[0]

    want = padded(
        tiny,
        UNEQUAL,
        edits=[
            Edit(first, "output", 0, lambda x: x[:, -1].mul_(2)),
            Edit(second, "output", None, copy),
        ],
    )
    for got, expected in zip(real(logits, UNEQUAL), real(want[LOGITS], UNEQUAL), strict=True):
        assert torch.equal(got, expected)


def test_padded_and_unpadded_invokes_do_not_share_a_pass(tiny: Setting) -> None:
    with tiny.model.trace() as tracer:
        with tracer.invoke(UNEQUAL):
            one = tiny.at("lm_head").output.save()
        with tracer.invoke(IDS):
            two = tiny.at("lm_head").output.save()
    assert tracer.result.passes == 2
    assert torch.equal(two, tiny.hooked(IDS)[LOGITS])
    want = padded(tiny, UNEQUAL)[LOGITS]
    for got, expected in zip(real(one, UNEQUAL), real(want, UNEQUAL), strict=True):
        assert torch.equal(got, expected)


def test_padded_invokes_of_one_length_share_a_pass(tiny: Setting) -> None:
    other = [[9, 8], [1, 2, 3, 4, 5, 6]]
    with tiny.model.trace() as tracer:
        with tracer.invoke(UNEQUAL):
            one = tiny.at("lm_head").output.save()
        with tracer.invoke(other):
            two = tiny.at("lm_head").output.save()
    assert tracer.result.passes == 1
    prompts = [*UNEQUAL, *other]
    want = padded(tiny, prompts)[LOGITS]
    rows = zip(real(torch.cat([one, two]), prompts), real(want, prompts), strict=True)
    assert all(torch.equal(got, expected) for got, expected in rows)


def test_a_patch_between_padded_batches(tiny: Setting) -> None:
    path = tiny.block(3)
    other = [[9, 8], [1, 2, 3, 4, 5, 6], [4]]
    with tiny.model.trace() as tracer:
        with tracer.invoke(UNEQUAL):
            clean = tiny.at(path).output[:, -1]
        with tracer.invoke(other):
            tiny.at(path).output[:, -1] = clean
            logits = tiny.at("lm_head").output[:, -1].save()

    def patch(tensor: Tensor) -> None:
        tensor[3:, -1] = tensor[:3, -1]

    want = padded(tiny, [*UNEQUAL, *other], edits=[Edit(path, "output", None, patch)])
    assert torch.equal(logits, want[LOGITS][3:, -1])


def test_alone_gives_every_invoke_its_own_pass(tiny: Setting) -> None:
    saved = []
    with tiny.model.trace(batching="alone") as tracer:
        for prompt in (IDS, OTHER, IDS):
            with tracer.invoke(prompt):
                saved.append(tiny.at("lm_head").output.save())
    assert tracer.result.passes == 3
    for prompt, got in zip((IDS, OTHER, IDS), saved, strict=True):
        assert torch.equal(got, tiny.hooked(prompt)[LOGITS])


def test_text_of_unequal_length(llama: Setting) -> None:
    texts = ["w3 w14 w15 w9 w26 w5", "w35 w8 w9", "w7"]
    mask = left_padded(UNEQUAL)[1]
    forms: list[Any] = [
        texts,
        UNEQUAL,
        [torch.tensor(row) for row in UNEQUAL],
        {"input_ids": left_padded(UNEQUAL)[0], "attention_mask": mask},
    ]
    want = padded(llama, UNEQUAL)[LOGITS]
    for prompt in forms:
        with llama.model.trace(prompt) as tracer:
            logits = llama.model.lm_head.output.save()
            assert torch.equal(tracer.attention_mask, mask)
        for got, expected in zip(real(logits, UNEQUAL), real(want, UNEQUAL), strict=True):
            assert torch.equal(got, expected)


def test_skip_for_some_rows_only(tiny: Setting) -> None:
    path = tiny.block(2)
    with tiny.model.trace() as tracer:
        with tracer.invoke(IDS):
            plain = tiny.at("lm_head").output.save()
        with tracer.invoke(OTHER):
            tiny.at(path).skip(tiny.at(path).input)
            skipped = tiny.at("lm_head").output.save()
    seen: dict[Any, Tensor] = {}

    def skip(tensor: Tensor) -> None:
        tensor[1] = seen["in"][1]

    want = tiny.hooked(
        [IDS, OTHER],
        reads=[Read(path, "input", name="in")],
        edits=[Edit(path, "output", None, skip)],
        seen=seen,
    )
    assert torch.equal(torch.cat([plain, skipped]), want[LOGITS])
