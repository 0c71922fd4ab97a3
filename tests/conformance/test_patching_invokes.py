"""Values that go from one invoke to another: activation and path patching, and sweeps of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import LOGITS, Edit, Read
from tiny_models import BLOCKS, IDS, OTHER, Setting
from torch import Tensor

from glasshive.graph.errors import UnseenWrite

PAIR = [IDS, OTHER]


def rows(*edits: Edit, setting: Setting, ids: Any, reads: Any = ()) -> dict[Any, Tensor]:
    return setting.hooked(ids, edits=list(edits), reads=list(reads))


def test_patch_one_position_within_a_pass(tiny: Setting) -> None:
    path = tiny.block(2)
    with tiny.model.trace() as tracer:
        with tracer.invoke(IDS):
            clean = tiny.at(path).output[:, 3]
        with tracer.invoke(OTHER):
            tiny.at(path).output[:, 3] = clean
            logits = tiny.at("lm_head").output.save()

    def patch(tensor: Tensor) -> None:
        tensor[1, 3] = tensor[0, 3]

    want = rows(Edit(path, "output", None, patch), setting=tiny, ids=PAIR)
    assert torch.equal(logits, want[LOGITS][1:])
    assert tracer.result.passes == 1


def test_patch_from_an_earlier_to_a_later_layer(tiny: Setting) -> None:
    early, late = tiny.block(1), tiny.block(4, "mlp")
    with tiny.model.trace() as tracer:
        with tracer.invoke(IDS):
            clean = tiny.at(early).output
        with tracer.invoke(OTHER):
            tiny.at(late).output = clean * 0.5
            logits = tiny.at("lm_head").output.save()
    seen: dict[Any, Tensor] = {}

    def patch(tensor: Tensor) -> None:
        tensor[1] = seen["early"][0] * 0.5

    want = tiny.hooked(
        PAIR,
        reads=[Read(early, "output", name="early")],
        edits=[Edit(late, "output", None, patch)],
        seen=seen,
    )
    assert torch.equal(logits, want[LOGITS][1:])
    assert tracer.result.passes == 1


def test_patch_from_a_later_to_an_earlier_layer_takes_two_passes(tiny: Setting) -> None:
    late, early = tiny.block(4), tiny.block(1)
    with tiny.model.trace() as tracer:
        with tracer.invoke(IDS):
            clean = tiny.at(late).output
        with tracer.invoke(OTHER):
            tiny.at(early).output[:, -1] = clean[:, -1]
            logits = tiny.at("lm_head").output.save()
    want = tiny.hooked(IDS, reads=[Read(late, "output", name="late")])["late"]
    edit = Edit(early, "output", None, lambda x: x[:, -1].copy_(want[:, -1]))
    assert torch.equal(logits, tiny.hooked(OTHER, edits=[edit])[LOGITS])
    assert tracer.result.passes == 2


def test_an_edit_of_an_invoke_that_is_closed_is_seen_by_nobody(tiny: Setting) -> None:
    early, late = tiny.block(1), tiny.block(4)

    def trace() -> Tensor:
        with tiny.model.trace() as tracer:
            with tracer.invoke(OTHER):
                out = tiny.at(early).output
            with tracer.invoke(IDS):
                out[:, -1] = tiny.at(late).output[:, -1]
            with tracer.invoke(OTHER):
                logits: Tensor = tiny.at("lm_head").output.save()
        return logits

    with pytest.warns(UnseenWrite, match="nothing that is saved can see this edit"):
        logits = trace()
    assert torch.equal(logits, tiny.hooked(OTHER)[LOGITS])


def test_patch_over_two_traces(tiny: Setting) -> None:
    path = tiny.block(3)
    with tiny.model.trace(IDS):
        clean = tiny.at(path).output.save()
    with tiny.model.trace(OTHER):
        tiny.at(path).output[:, 1:3] = clean[:, 1:3]
        logits = tiny.at("lm_head").output.save()
    want = tiny.hooked(IDS, reads=[Read(path, "output", name="clean")])["clean"]
    edit = Edit(path, "output", None, lambda x: x[:, 1:3].copy_(want[:, 1:3]))
    assert torch.equal(logits, tiny.hooked(OTHER, edits=[edit])[LOGITS])


def test_prompts_of_unequal_length_patch_over_passes(tiny: Setting) -> None:
    path = tiny.block(2)
    long = [*IDS, 7, 8]
    with tiny.model.trace() as tracer:
        with tracer.invoke(long):
            clean = tiny.at(path).output[:, -1]
        with tracer.invoke(OTHER):
            tiny.at(path).output[:, -1] = clean
            logits = tiny.at("lm_head").output.save()
    want = tiny.hooked(long, reads=[Read(path, "output", name="clean")])["clean"]
    edit = Edit(path, "output", None, lambda x: x[:, -1].copy_(want[:, -1]))
    assert torch.equal(logits, tiny.hooked(OTHER, edits=[edit])[LOGITS])
    assert tracer.result.passes == 2


def test_a_chain_of_three_invokes(tiny: Setting) -> None:
    """A's late layer into B's early one, B's late one into C's early one: three passes."""
    with tiny.model.trace() as tracer:
        with tracer.invoke(IDS):
            first = tiny.at(tiny.block(4)).output
        with tracer.invoke(OTHER):
            tiny.at(tiny.block(1)).output[:, 0] = first[:, -1]
            second = tiny.at(tiny.block(5)).output
        with tracer.invoke(IDS):
            tiny.at(tiny.block(0)).output[:, 2] += second[:, 2]
            logits = tiny.at("lm_head").output.save()
    assert tracer.result.passes == 3
    one = tiny.hooked(IDS, reads=[Read(tiny.block(4), "output", name="h")])["h"]
    two = tiny.hooked(
        OTHER,
        edits=[Edit(tiny.block(1), "output", None, lambda x: x[:, 0].copy_(one[:, -1]))],
        reads=[Read(tiny.block(5), "output", name="h")],
    )["h"]
    edit = Edit(tiny.block(0), "output", None, lambda x: x[:, 2].add_(two[:, 2]))
    assert torch.equal(logits, tiny.hooked(IDS, edits=[edit])[LOGITS])


def test_two_invokes_exchange_values_in_one_pass(tiny: Setting) -> None:
    """Each needs the other, at later layers: rows of one pass."""
    with tiny.model.trace() as tracer:
        with tracer.invoke(IDS):
            from_one = tiny.at(tiny.block(1)).output
        with tracer.invoke(OTHER):
            tiny.at(tiny.block(2)).output[:, 0] = from_one[:, 0]
            from_two = tiny.at(tiny.block(3)).output
            two = tiny.at("lm_head").output.save()
        with tracer.invoke(OTHER):
            tiny.at(tiny.block(4)).output[:, 1] = from_two[:, 1]
            three = tiny.at("lm_head").output.save()
    assert tracer.result.passes == 1
    seen: dict[Any, Tensor] = {}
    want = tiny.hooked(
        [IDS, OTHER, OTHER],
        reads=[
            Read(tiny.block(1), "output", name="one"),
            Read(tiny.block(3), "output", name="two"),
        ],
        edits=[
            Edit(tiny.block(2), "output", None, lambda x: x[1, 0].copy_(seen["one"][0, 0])),
            Edit(tiny.block(4), "output", None, lambda x: x[2, 1].copy_(seen["two"][1, 1])),
        ],
        seen=seen,
    )
    assert torch.equal(torch.cat([two, three]), want[LOGITS][1:])


def test_several_invokes_write_one_site_each_in_its_way(tiny: Setting) -> None:
    """Set, in place, both, and none, at the input of a norm: only in-place reaches the residual."""
    path = tiny.block(3, "first_norm")
    noise = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(4))
    logits = []
    with tiny.model.trace() as tracer:
        with tracer.invoke(IDS):
            tiny.at(path).input = noise
            logits.append(tiny.at("lm_head").output.save())
        with tracer.invoke(IDS):
            tiny.at(path).input[:] = noise
            logits.append(tiny.at("lm_head").output.save())
        with tracer.invoke(IDS):
            tiny.at(path).input[:, 1] = 2
            tiny.at(path).input = noise * 3
            logits.append(tiny.at("lm_head").output.save())
        with tracer.invoke(IDS):
            logits.append(tiny.at("lm_head").output.save())
    assert tracer.result.passes == 1

    def edit(tensor: Tensor) -> Tensor:
        tensor[1] = noise
        tensor[2, 1] = 2
        given = tensor.clone()
        given[0] = noise
        given[2] = noise * 3
        return given

    want = rows(Edit(path, "input", None, edit, "set"), setting=tiny, ids=[IDS] * 4)
    for index, got in enumerate(logits):
        assert torch.equal(got, want[LOGITS][index : index + 1]), index


def test_an_edit_of_a_value_given_to_another_invoke_is_made_there(tiny: Setting) -> None:
    path = tiny.block(2)
    with tiny.model.trace() as tracer:
        with tracer.invoke(IDS):
            clean = tiny.at(path).output
            one = tiny.at("lm_head").output.save()
        with tracer.invoke(OTHER):
            tiny.at(path).output = clean
            tiny.at(path).output[:, 0] = 0
            two = tiny.at("lm_head").output.save()

    def edit(tensor: Tensor) -> None:
        tensor[1] = tensor[0]
        tensor[1, 0] = 0

    want = rows(Edit(path, "output", None, edit), setting=tiny, ids=PAIR)
    assert torch.equal(torch.cat([one, two]), want[LOGITS])


def test_path_patching(tiny: Setting) -> None:
    """One head's direct effect: everything else is frozen at its clean value."""
    sender = tiny.block(1, "projection")
    frozen = [tiny.block(i, "attention") for i in range(2, BLOCKS)]
    with tiny.model.trace() as tracer:
        with tracer.invoke(OTHER):
            head = tiny.at(sender).input[:, :, 8:16]
        with tracer.invoke(IDS):
            clean = [tiny.at(path).output[0] for path in frozen]
            plain = tiny.at("lm_head").output.save()
        with tracer.invoke(IDS):
            tiny.at(sender).input[:, :, 8:16] = head
            for path, value in zip(frozen, clean, strict=True):
                tiny.at(path).output[0][:] = value
            patched = tiny.at("lm_head").output.save()
    assert tracer.result.passes == 1

    def send(tensor: Tensor) -> None:
        tensor[2, :, 8:16] = tensor[0, :, 8:16]

    def freeze(tensor: Tensor) -> None:
        tensor[2] = tensor[1]

    want = rows(
        Edit(sender, "input", None, send),
        *(Edit(path, "output", 0, freeze) for path in frozen),
        setting=tiny,
        ids=[OTHER, IDS, IDS],
    )
    assert torch.equal(torch.cat([plain, patched]), want[LOGITS][1:])


def test_causal_tracing_with_noise(tiny: Setting) -> None:
    noise = torch.randn(1, 2, 32, generator=torch.Generator().manual_seed(8))
    embed, path = tiny.names.embed, tiny.block(3)
    with tiny.model.trace() as tracer:
        with tracer.invoke(IDS):
            kept = tiny.at(path).output[:, 2]
        with tracer.invoke(IDS):
            tiny.at(embed).output[:, 1:3] += noise
            tiny.at(path).output[:, 2] = kept
            logits = tiny.at("lm_head").output.save()

    def restore(tensor: Tensor) -> None:
        tensor[1, 2] = tensor[0, 2]

    want = rows(
        Edit(embed, "output", None, lambda x: x[1, 1:3].add_(noise[0])),
        Edit(path, "output", None, restore),
        setting=tiny,
        ids=[IDS, IDS],
    )
    assert torch.equal(logits, want[LOGITS][1:])


SWEEP = [(block, position) for block in range(BLOCKS) for position in range(5)]


def sweep_in_hooks(setting: Setting, patches: list[tuple[int, int]]) -> Tensor:
    """The clean row first, then a row for each patch."""
    edits = []
    for block in range(BLOCKS):

        def patch(tensor: Tensor, block: int = block) -> None:
            for row, (where, position) in enumerate(patches, start=1):
                if where == block:
                    tensor[row, position] = tensor[0, position]

        edits.append(Edit(setting.block(block), "output", None, patch))
    return setting.hooked([IDS] + [OTHER] * len(patches), edits=edits)[LOGITS]


def sweep(setting: Setting, **options: Any) -> tuple[list[Tensor], Any]:
    logits = []
    with setting.model.trace(**options) as tracer:
        with tracer.invoke(IDS):
            clean = [setting.at(setting.block(i)).output for i in range(BLOCKS)]
        for block, position in SWEEP:
            with tracer.invoke(OTHER):
                setting.at(setting.block(block)).output[:, position] = clean[block][:, position]
                logits.append(setting.at("lm_head").output[:, -1].save())
    return logits, tracer


def test_a_sweep_of_thirty_patches_is_one_pass(tiny: Setting) -> None:
    logits, tracer = sweep(tiny)
    want = sweep_in_hooks(tiny, SWEEP)
    assert tracer.result.passes == 1
    assert torch.equal(torch.cat(logits), want[1:, -1])


@pytest.mark.parametrize("pass_rows", [8, 11])
def test_a_sweep_in_passes_of_bounded_rows(tiny: Setting, pass_rows: int) -> None:
    """The clean row is in the first pass, and its values go on to the others."""
    logits, tracer = sweep(tiny, pass_rows=pass_rows)
    assert tracer.result.passes == -(-31 // pass_rows)
    first = sweep_in_hooks(tiny, SWEEP[: pass_rows - 1])[1:, -1]
    assert torch.equal(torch.cat(logits[: pass_rows - 1]), first)
    clean = tiny.hooked(
        [IDS] + [OTHER] * (pass_rows - 1),
        reads=[Read(tiny.block(i), "output", name=i) for i in range(BLOCKS)],
    )
    rest = SWEEP[pass_rows - 1 :]
    for start in range(0, len(rest), pass_rows):
        some = rest[start : start + pass_rows]
        edits = []
        for block in range(BLOCKS):

            def patch(tensor: Tensor, block: int = block, some: Any = some) -> None:
                for row, (where, position) in enumerate(some):
                    if where == block:
                        tensor[row, position] = clean[block][0, position]

            edits.append(Edit(tiny.block(block), "output", None, patch))
        want = tiny.hooked([OTHER] * len(some), edits=edits)[LOGITS][:, -1]
        at = pass_rows - 1 + start
        assert torch.equal(torch.cat(logits[at : at + len(some)]), want)


def test_a_sweep_alone_equals_each_patch_alone(llama: Setting) -> None:
    with llama.model.trace(batching="alone") as tracer:
        with tracer.invoke(IDS):
            clean = llama.model.model.layers[2].output
        logits = []
        for position in range(3):
            with tracer.invoke(OTHER):
                llama.model.model.layers[2].output[:, position] = clean[:, position]
                logits.append(llama.model.lm_head.output.save())
    assert tracer.result.passes == 4
    want = llama.hooked(IDS, reads=[Read("model.layers.2", "output", name="h")])["h"]
    for position, got in enumerate(logits):

        def patch(tensor: Tensor, position: int = position) -> None:
            tensor[:, position] = want[:, position]

        edit = Edit("model.layers.2", "output", None, patch)
        assert torch.equal(got, llama.hooked(OTHER, edits=[edit])[LOGITS])
