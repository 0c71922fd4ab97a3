"""Logit lenses: the model's own norm and head on hidden states, by call and by weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import LOGITS, Edit, Read
from tiny_models import BLOCKS, IDS, OTHER, Setting
from torch import Tensor

from glasshive.graph.errors import NotASite


def lens(setting: Setting, hidden: Tensor) -> Tensor:
    """By the plain model's modules."""
    norm = setting.plain.get_submodule(setting.names.final_norm)
    head = setting.plain.get_submodule("lm_head")
    result: Tensor = head(norm(hidden))
    return result


def test_by_call_over_all_layers(tiny: Setting) -> None:
    norm, head = tiny.at(tiny.names.final_norm), tiny.at("lm_head")
    with tiny.model.trace(IDS):
        saved = [head(norm(tiny.at(tiny.block(i)).output)).save() for i in range(BLOCKS)]
        logits = head.output.save()
    reads = [
        Read(tiny.block(i), "output", fn=lambda h: lens(tiny, h), name=i) for i in range(BLOCKS)
    ]
    want = tiny.hooked(IDS, reads=reads)
    for index, got in enumerate(saved):
        assert torch.equal(got, want[index])
    assert torch.equal(logits, want[LOGITS])
    assert torch.equal(saved[-1], logits)


def test_by_call_at_the_last_position(tiny: Setting) -> None:
    norm, head = tiny.at(tiny.names.final_norm), tiny.at("lm_head")
    with tiny.model.trace([IDS, OTHER]):
        tops = [
            head(norm(tiny.at(tiny.block(i)).output[:, -1])).argmax(-1).save()
            for i in range(BLOCKS)
        ]
    reads = [
        Read(tiny.block(i), "output", fn=lambda h: lens(tiny, h[:, -1]).argmax(-1), name=i)
        for i in range(BLOCKS)
    ]
    want = tiny.hooked([IDS, OTHER], reads=reads)
    assert torch.equal(torch.stack(tops), torch.stack([want[i] for i in range(BLOCKS)]))


def test_by_weight(tiny: Setting) -> None:
    head = tiny.at("lm_head")
    with tiny.model.trace(IDS):
        saved = [
            (tiny.at(tiny.block(i)).output[:, -1] @ head.weight.T).save() for i in range(BLOCKS)
        ]
    weight = tiny.plain.get_submodule("lm_head").weight
    want = tiny.hooked(IDS, reads=[Read(tiny.block(i), "output", name=i) for i in range(BLOCKS)])
    for index, got in enumerate(saved):
        assert torch.equal(got, want[index][:, -1] @ weight.T)


def test_the_effect_of_an_edit_seen_by_a_lens(tiny: Setting) -> None:
    """The norm that is edited in the model is not edited in a call of it."""
    norm, head = tiny.at(tiny.names.final_norm), tiny.at("lm_head")
    path = tiny.block(2)
    with tiny.model.trace(IDS):
        tiny.at(path).output[:, -1] *= 3
        norm.output[:] = norm.output * 2
        seen = head(norm(tiny.at(tiny.block(3)).output)).save()
        logits = head.output.save()
    want = tiny.hooked(
        IDS,
        edits=[
            Edit(path, "output", None, lambda x: x[:, -1].mul_(3)),
            Edit(tiny.names.final_norm, "output", None, lambda x: x * 2, "set"),
        ],
        reads=[Read(tiny.block(3), "output", fn=lambda h: lens(tiny, h), name="seen")],
    )
    assert torch.equal(seen, want["seen"])
    assert torch.equal(logits, want[LOGITS])


def test_calls_of_modules_inside_blocks(tiny: Setting) -> None:
    """What one block's MLP would do to another block's residual stream."""
    mlp, norm = tiny.block(4, "mlp"), tiny.block(4, "second_norm")
    with tiny.model.trace(IDS):
        hidden = tiny.at(tiny.block(1)).output
        moved = tiny.at(mlp)(tiny.at(norm)(hidden)).save()
    want = tiny.hooked(IDS, reads=[Read(tiny.block(1), "output", name="h")])["h"]
    plain = tiny.plain.get_submodule(mlp)(tiny.plain.get_submodule(norm)(want))
    assert torch.equal(moved, plain)


def test_a_call_of_a_module_that_lies_before_its_argument(tiny: Setting) -> None:
    """The value goes back to an earlier peer, which runs the module after its own part."""
    early, late = tiny.block(0, "mlp"), tiny.block(5)
    with tiny.model.trace(IDS):
        again = tiny.at(early)(tiny.at(late).output).save()
    want = tiny.hooked(IDS, reads=[Read(late, "output", name="h")])["h"]
    assert torch.equal(again, tiny.plain.get_submodule(early)(want))


def test_a_call_of_the_embedding(tiny: Setting) -> None:
    embed = tiny.at(tiny.names.embed)
    ids = torch.tensor([[9, 8, 7]])
    with tiny.model.trace(IDS):
        vectors = embed(ids).save()
        top = tiny.at("lm_head").output[:, -1].argmax(-1)
        next_vector = embed(top).save()
    table = tiny.plain.get_submodule(tiny.names.embed).weight
    assert torch.equal(vectors, table[ids])
    assert torch.equal(next_vector, table[tiny.hooked(IDS)[LOGITS][:, -1].argmax(-1)])


def test_a_call_inside_a_skipped_module_still_runs(llama: Setting) -> None:
    path = "model.layers.2.mlp"
    with llama.model.trace(IDS):
        mlp = llama.at(path)
        mlp.skip(mlp(mlp.input) * 2)
        logits = llama.model.lm_head.output.save()
    edit = Edit(path, "output", None, lambda x: x * 2, "set")
    assert torch.equal(logits, llama.hooked(IDS, edits=[edit])[LOGITS])


def test_a_call_that_gives_its_argument_back_is_refused(get_setting: Any) -> None:
    """Dropout does nothing here: in a hook its result is the argument itself, edits and all."""
    setting = get_setting("gpt2", (2, 4))
    blocks = setting.model.transformer.h
    with pytest.raises(NotASite, match="gives back its argument's own memory"):
        with setting.model.trace(IDS):
            blocks[0].mlp.dropout(blocks[2].output).save()
