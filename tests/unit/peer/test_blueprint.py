"""What a spare process knows of a model, when it is its turn and the model is another one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from glasshive.graph.budget import Pace
from glasshive.peer.blueprint import Blueprint
from glasshive.peer.pace import HostPace
from glasshive.peer.served_model import load_served_model

SaveTinyLlama = Callable[..., Path]


def test_it_is_taken_over_with_the_pace(save_tiny_llama: SaveTinyLlama) -> None:
    folder = save_tiny_llama()
    blueprint = Blueprint.of(folder, torch.float32, "sdpa")
    pace = HostPace(12.5, 32, Pace())
    served = load_served_model(
        *(folder, "tiny", None), dtype=torch.float32, device="cpu", blueprint=blueprint, pace=pace
    )
    assert served.outline is blueprint.outline
    assert served.pace is pace


def test_that_of_a_model_which_has_changed_is_made_anew(save_tiny_llama: SaveTinyLlama) -> None:
    blueprint = Blueprint.of(save_tiny_llama(), torch.float32, "sdpa")
    folder = save_tiny_llama(hidden_size=64, num_hidden_layers=3)
    pace = HostPace(12.5, 32, Pace())
    served = load_served_model(
        *(folder, "tiny", None), dtype=torch.float32, device="cpu", blueprint=blueprint, pace=pace
    )
    assert served.outline.n_blocks == 3
    assert served.outline.hidden_spec(1, 5).shape == (1, 5, 64)
    assert served.pace.hidden_size == 64
    assert served.pace is not pace


def test_that_of_another_number_format_or_attention_is_made_anew(
    save_tiny_llama: SaveTinyLlama,
) -> None:
    folder = save_tiny_llama()
    blueprint = Blueprint.of(folder, torch.float32, "sdpa")
    for dtype, attention in ((torch.bfloat16, "sdpa"), (torch.float32, "eager")):
        served = load_served_model(
            *(folder, "tiny", None),
            dtype=dtype,
            device="cpu",
            attention=attention,  # type: ignore[arg-type]
            blueprint=blueprint,
        )
        assert served.twin is not blueprint.twin
        assert served.outline.hidden_spec(1, 1).dtype.value == str(dtype).removeprefix("torch.")
