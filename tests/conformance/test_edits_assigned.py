"""Assigned values equal what torch hooks give when they return them, bit by bit."""

from __future__ import annotations

from typing import Any

import torch
from oracle import LOGITS, Edit, Read
from tiny_models import HIDDEN, IDS, Setting
from torch import Tensor, nn
from torch.nn import functional


def logits_of(setting: Setting, edit: Edit, ids: Any = IDS) -> Tensor:
    return setting.hooked(ids, edits=[edit])[LOGITS]


def test_a_block_output(tiny: Setting) -> None:
    path = tiny.block(2)
    with tiny.model.trace(IDS):
        tiny.at(path).output = tiny.at(path).output * 2 - 1
        here = tiny.at(path).output.save()
        logits = tiny.at("lm_head").output.save()
    want = tiny.hooked(
        IDS,
        edits=[Edit(path, "output", None, lambda x: x * 2 - 1, "set")],
        reads=[Read(path, "output", name="here")],
    )
    assert torch.equal(here, want["here"])
    assert torch.equal(logits, want[LOGITS])


def test_a_tensor_of_the_users(tiny: Setting) -> None:
    path = tiny.block(3, "mlp")
    noise = torch.randn(1, 6, HIDDEN, generator=torch.Generator().manual_seed(2))
    with tiny.model.trace(IDS):
        tiny.at(path).output = noise
        logits = tiny.at("lm_head").output.save()
    assert torch.equal(logits, logits_of(tiny, Edit(path, "output", None, lambda x: noise, "set")))


def test_a_number_fills_the_site(tiny: Setting) -> None:
    path = tiny.block(3, "mlp")
    with tiny.model.trace(IDS):
        tiny.at(path).output = 0
        logits = tiny.at("lm_head").output.save()
    edit = Edit(path, "output", None, torch.zeros_like, "set")
    assert torch.equal(logits, logits_of(tiny, edit))


def test_the_input_of_a_norm_leaves_the_residual_stream_alone(tiny: Setting) -> None:
    """In place and assigned differ, and each equals its hook."""

    def flat(tensor: Tensor) -> Tensor:
        changed = tensor.clone()
        changed[:, 1] = 1
        return changed

    path = tiny.block(3, "first_norm")
    with tiny.model.trace(IDS):
        tiny.at(path).input = flat(tiny.at(path).input)
        assigned = tiny.at("lm_head").output.save()
    with tiny.model.trace(IDS):
        tiny.at(path).input[:, 1] = 1
        in_place = tiny.at("lm_head").output.save()
    assert torch.equal(assigned, logits_of(tiny, Edit(path, "input", None, flat, "set")))
    edit = Edit(path, "input", None, lambda x: x[:, 1].fill_(1))
    assert torch.equal(in_place, logits_of(tiny, edit))
    assert not torch.equal(assigned, in_place)


def test_in_place_then_assigned(tiny: Setting) -> None:
    """The memory, which the residual stream shares, keeps the first edit; the norm sees both."""
    path = tiny.block(3, "first_norm")
    with tiny.model.trace(IDS):
        x = tiny.at(path).input
        x[:, 1] = 1
        tiny.at(path).input = x * 3
        tiny.at(path).input[:, 0] = 2
        logits = tiny.at("lm_head").output.save()

    def edit(tensor: Tensor) -> Tensor:
        tensor[:, 1] = 1
        changed = tensor * 3
        changed[:, 0] = 2
        return changed

    assert torch.equal(logits, logits_of(tiny, Edit(path, "input", None, edit, "set")))


def test_assigned_then_in_place_through_the_old_object(tiny: Setting) -> None:
    path = tiny.block(3, "first_norm")
    with tiny.model.trace(IDS):
        x = tiny.at(path).input
        tiny.at(path).input = x * 3
        x[:, 1] = 1
        logits = tiny.at("lm_head").output.save()

    def edit(tensor: Tensor) -> Tensor:
        changed = tensor * 3
        tensor[:, 1] = 1
        return changed

    assert torch.equal(logits, logits_of(tiny, Edit(path, "input", None, edit, "set")))


def test_a_view_of_itself(tiny: Setting) -> None:
    """What is assigned shares the memory of what was there."""
    path = tiny.block(2)
    with tiny.model.trace(IDS):
        out = tiny.at(path).output
        tiny.at(path).output = out.view(6, HIDDEN).unsqueeze(0)
        out[:, -1] = 0
        tiny.at(path).output[:, 0] = 1
        logits = tiny.at("lm_head").output.save()

    def edit(tensor: Tensor) -> Tensor:
        view = tensor.view(6, HIDDEN).unsqueeze(0)
        tensor[:, -1] = 0
        view[:, 0] = 1
        return view

    assert torch.equal(logits, logits_of(tiny, Edit(path, "output", None, edit, "set")))


def test_what_is_edited_after_it_was_assigned(tiny: Setting) -> None:
    path = tiny.block(2)
    with tiny.model.trace(IDS):
        new = tiny.at(path).output * 2
        tiny.at(path).output = new
        new[:, -1] = 0
        logits = tiny.at("lm_head").output.save()

    def edit(tensor: Tensor) -> Tensor:
        new = tensor * 2
        new[:, -1] = 0
        return new

    assert torch.equal(logits, logits_of(tiny, Edit(path, "output", None, edit, "set")))


def test_one_tensor_at_two_sites(tiny: Setting) -> None:
    """An edit after the second assignment comes too late for the first, as in a hook."""
    first, second = tiny.block(1, "mlp"), tiny.block(4, "mlp")
    with tiny.model.trace(IDS):
        new = tiny.at(first).output * 2
        new[:, 0] = 1
        tiny.at(first).output = new
        new[:, 1] = 1
        tiny.at(second).output = new
        new[:, 2] = 1
        tiny.at(second).output[:, 3] = 1
        logits = tiny.at("lm_head").output.save()
    held: list[Tensor] = []

    def at_first(tensor: Tensor) -> Tensor:
        held.append(tensor * 2)
        held[0][:, :2] = 1
        return held[0]

    def at_second(tensor: Tensor) -> Tensor:
        held[0][:, 2:4] = 1
        return held[0]

    want = tiny.hooked(
        IDS,
        edits=[
            Edit(first, "output", None, at_first, "set"),
            Edit(second, "output", None, at_second, "set"),
        ],
    )
    assert torch.equal(logits, want[LOGITS])


def test_the_memory_of_one_site_at_another(tiny: Setting) -> None:
    """Transplant a block's output into a later MLP and edit it there: the block keeps its own."""
    first, second = tiny.block(1), tiny.block(4, "mlp")
    with tiny.model.trace(IDS):
        tiny.at(second).output = tiny.at(first).output
        tiny.at(second).output[:, 2] = 0
        logits = tiny.at("lm_head").output.save()
    held: dict[Any, Tensor] = {}

    def transplant(tensor: Tensor) -> Tensor:
        moved = held["first"].clone()
        moved[:, 2] = 0
        return moved

    want = tiny.hooked(
        IDS,
        reads=[Read(first, "output", name="first")],
        edits=[Edit(second, "output", None, transplant, "set")],
        seen=held,
    )
    assert torch.equal(logits, want[LOGITS])


def test_a_site_whose_memory_went_elsewhere_can_still_be_edited(tiny: Setting) -> None:
    first, second = tiny.block(1), tiny.block(4, "mlp")
    with tiny.model.trace(IDS):
        tiny.at(second).output = tiny.at(first).output
        tiny.at(second).output[:, 2] = 0
        tiny.at(first).output[:, 0] = 3
        logits = tiny.at("lm_head").output.save()
    held: dict[Any, Tensor] = {}

    def transplant(tensor: Tensor) -> Tensor:
        moved = held["first"].clone()
        moved[:, 2] = 0
        return moved

    want = tiny.hooked(
        IDS,
        reads=[Read(first, "output", None, "before", name="first")],
        edits=[
            Edit(first, "output", None, lambda x: x[:, 0].fill_(3)),
            Edit(second, "output", None, transplant, "set"),
        ],
        seen=held,
    )
    assert torch.equal(logits, want[LOGITS])


def test_a_whole_tuple(tiny: Setting) -> None:
    path = tiny.block(3, "attention")
    with tiny.model.trace(IDS):
        out = tiny.at(path).output
        tiny.at(path).output = (out[0] * 0.5, *out[1:])
        logits = tiny.at("lm_head").output.save()
    edit = Edit(path, "output", 0, lambda x: x * 0.5, "set")
    assert torch.equal(logits, logits_of(tiny, edit))


def test_named_outputs(tiny: Setting) -> None:
    base = tiny.names.embed.split(".")[0]
    with tiny.model.trace(IDS):
        out = tiny.at(base).output
        tiny.at(base).output = {**out, "last_hidden_state": out.last_hidden_state * 2}
        logits = tiny.model.output.logits.save()
    edit = Edit(base, "output", "last_hidden_state", lambda x: x * 2, "set")
    assert torch.equal(logits, logits_of(tiny, edit))


def test_named_arguments(llama: Setting) -> None:
    """Each attention gets a rotary table of its own when it is assigned."""
    path = llama.block(3, "attention")
    with llama.model.trace(IDS):
        args, named = llama.at(path).inputs
        cosines, sines = named["position_embeddings"]
        llama.at(path).inputs = args, {**named, "position_embeddings": (cosines * 0.5, sines)}
        logits = llama.model.lm_head.output.save()
    edit = Edit(path, "input", ("position_embeddings", 0), lambda x: x * 0.5, "set")
    assert torch.equal(logits, logits_of(llama, edit))


def test_a_block_input(tiny: Setting) -> None:
    path = tiny.block(4)
    with tiny.model.trace(IDS):
        tiny.at(path).input = tiny.at(path).input.flip(1)
        logits = tiny.at("lm_head").output.save()
    edit = Edit(path, "input", None, lambda x: x.flip(1), "set")
    assert torch.equal(logits, logits_of(tiny, edit))


def test_the_embedding_of_other_tokens(tiny: Setting) -> None:
    """Embedding transfer: the table is asked inside the trace."""
    path = tiny.names.embed
    other = torch.tensor([[8, 9, 10, 11, 12, 13]])
    with tiny.model.trace(IDS):
        tiny.at(path).output = tiny.at(path).weight[other]
        logits = tiny.at("lm_head").output.save()
    assert torch.equal(logits, tiny.hooked(other.tolist())[LOGITS])


def test_a_soft_prompt(tiny: Setting) -> None:
    path = tiny.names.embed
    soft = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(3))
    with tiny.model.trace(IDS):
        tiny.at(path).output[:, :3] = soft
        logits = tiny.at("lm_head").output.save()
    edit = Edit(path, "output", None, lambda x: x[:, :3].copy_(soft.expand(1, 3, HIDDEN)))
    assert torch.equal(logits, logits_of(tiny, edit))


class Sae(nn.Module):
    """A sparse autoencoder, as researchers write them."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(HIDDEN, 96)
        self.decoder = nn.Linear(96, HIDDEN)

    def encode(self, hidden: Tensor) -> Tensor:
        return functional.relu(self.encoder(hidden - self.decoder.bias))

    def forward(self, hidden: Tensor) -> Tensor:
        result: Tensor = self.decoder(self.encode(hidden))
        return result


def splice(sae: Sae, hidden: Tensor) -> Tensor:
    """Edit one feature and keep the error term."""
    features = sae.encode(hidden)
    edited = features.clone()
    edited[..., 11] = 5
    error = hidden - sae.decoder(features)
    return sae.decoder(edited) + error  # type: ignore[no-any-return]


def test_a_sparse_autoencoder(tiny: Setting) -> None:
    torch.manual_seed(5)
    sae = Sae()
    path = tiny.block(3)
    with tiny.model.trace(IDS):
        hidden = tiny.at(path).output
        features = sae.encode(hidden).save()
        tiny.at(path).output = splice(sae, hidden)
        logits = tiny.at("lm_head").output.save()
    want = tiny.hooked(
        IDS,
        reads=[Read(path, "output", None, "before", sae.encode, "features")],
        edits=[Edit(path, "output", None, lambda x: splice(sae, x), "set")],
    )
    assert torch.equal(features, want["features"])
    assert torch.equal(logits, want[LOGITS])


def test_a_low_rank_adapter(tiny: Setting) -> None:
    generator = torch.Generator().manual_seed(6)
    down = torch.randn(HIDDEN, 4, generator=generator)
    up = torch.randn(4, HIDDEN, generator=generator)
    paths = [tiny.block(i, "mlp") for i in range(1, 5)]
    with tiny.model.trace(IDS):
        for path in paths:
            mlp = tiny.at(path)
            mlp.output = mlp.output + (mlp.input @ down) @ up * 0.5
        logits = tiny.at("lm_head").output.save()
    seen: dict[Any, Tensor] = {}
    want = tiny.hooked(
        IDS,
        reads=[Read(path, "input", name=path) for path in paths],
        edits=[
            Edit(
                path, "output", None, lambda x, path=path: x + (seen[path] @ down) @ up * 0.5, "set"
            )
            for path in paths
        ],
        seen=seen,
    )
    assert torch.equal(logits, want[LOGITS])
