"""Rule 6: an index on axis 0 of a block's output is a row of the batch, and says so once."""

from __future__ import annotations

import warnings

import pytest
import torch
from transformers import LlamaConfig

from glasshive.client.constants import Constants
from glasshive.client.recorder import recording
from glasshive.client.sites import Sites
from glasshive.graph.errors import RowTaken
from glasshive.graph.graph import Site
from glasshive.graph.order import InvokeShape
from glasshive.graph.outline import Outline
from glasshive.graph.twin import build_twin, scan


@pytest.fixture(scope="module")
def outline() -> Outline:
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    return scan(build_twin(config, torch.float32), config)


def used(outline: Outline, module: str, index: object) -> list[warnings.WarningMessage]:
    sites = Sites(outline, Constants())
    sites.invokes.append(InvokeShape(2, 5))
    with warnings.catch_warnings(record=True) as caught, recording(sites.recorder):
        warnings.simplefilter("always")
        h = sites.read(Site(module, "output"), 0)
        h[index]  # type: ignore[index]
        h[1] if index == 0 else None
    return [one for one in caught if one.category is RowTaken]


def test_an_index_on_the_rows_of_a_block_warns_once(outline: Outline) -> None:
    (warning,) = used(outline, "model.layers.1", 0)
    assert "takes one row of the batch" in str(warning.message)
    assert "leave out the [0]" in str(warning.message)
    assert warning.filename.endswith("test_row_warning.py")


@pytest.mark.parametrize("index", [slice(0, 1), (slice(None), -1), (..., 0)])
def test_other_indices_do_not(outline: Outline, index: object) -> None:
    assert not used(outline, "model.layers.1", index)


def test_other_modules_do_not(outline: Outline) -> None:
    assert not used(outline, "model.layers.1.mlp", 0)
