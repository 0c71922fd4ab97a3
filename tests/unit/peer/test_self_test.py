"""The self-test of an architecture, apart from the architectures themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from glasshive.peer import self_test as module
from glasshive.peer.errors import ModelTypeRefused, UnsupportedAttention
from glasshive.peer.self_test import self_test
from glasshive.peer.span_cache import SpanCache

TINY: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize("n_blocks", [1, 2, 3, 4, 80])
def test_any_number_of_blocks_is_tested(n_blocks: int) -> None:
    self_test(LlamaConfig(**{**TINY, "num_hidden_layers": n_blocks}))


def test_one_configuration_is_tested_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tested: list[str] = []
    compare = module._compare

    def counted(config: Any, whole: Any, attention: Any) -> None:
        tested.append(attention)
        compare(config, whole, attention)

    monkeypatch.setattr(module, "_passed", set())
    monkeypatch.setattr(module, "_compare", counted)
    for _ in range(2):
        self_test(LlamaConfig(**TINY))
        self_test(LlamaConfig(**TINY), "eager")
        self_test(LlamaConfig(**{**TINY, "num_attention_heads": 2}))
    assert tested == ["sdpa", "eager", "sdpa"]


def test_a_model_of_seventy_billion_parameters_is_tested_small() -> None:
    self_test(
        LlamaConfig(
            hidden_size=8192,
            intermediate_size=28672,
            num_hidden_layers=80,
            num_attention_heads=64,
            num_key_value_heads=8,
            vocab_size=128256,
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        )
    )


def test_a_cache_that_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: without the aliases of later spans, lengths are read from an empty entry."""

    class PlainCache(SpanCache):
        def __init__(self, config: LlamaConfig, start: int, end: int) -> None:
            super().__init__(config, start, end)
            fresh = SpanCache(config, 0, config.num_hidden_layers).layers
            self.layers = [*fresh[:start], *self.hosted, *fresh[end:]]

    monkeypatch.setattr(module, "_passed", set())
    monkeypatch.setattr("glasshive.peer.span_model.SpanCache", PlainCache)
    with pytest.raises(ModelTypeRefused, match="cached decoding over spans differs"):
        self_test(LlamaConfig(**TINY))


def test_a_rotary_table_that_grows_is_refused() -> None:
    rope: dict[str, Any] = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(ModelTypeRefused, match="one client's result would depend on another's"):
        self_test(LlamaConfig(**TINY, rope_parameters=rope))


def test_unknown_attention_is_an_error() -> None:
    with pytest.raises(UnsupportedAttention, match="eager, sdpa"):
        self_test(LlamaConfig(**TINY), "magic")  # type: ignore[arg-type]


def test_a_configuration_that_never_runs_is_refused() -> None:
    with pytest.raises(ModelTypeRefused, match="could not be tested"):
        self_test(LlamaConfig(**{**TINY, "hidden_act": "no such function"}))


def test_the_tiny_copy_is_small() -> None:
    config = LlamaConfig()
    sizes = list(module._smaller(config))
    assert sizes[0]["hidden_size"] < 300
    assert sizes[0]["num_hidden_layers"] == 6


def test_a_model_that_keeps_state_between_its_blocks_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its first block notes how long the row is, and the others go by that."""
    stock, noted = LlamaDecoderLayer.forward, [0]

    def forward(block: LlamaDecoderLayer, hidden_states: torch.Tensor, **how: Any) -> torch.Tensor:
        if block.self_attn.layer_idx == 0:
            noted[0] = hidden_states.shape[1]
        return stock(block, hidden_states, **how) + noted[0]

    monkeypatch.setattr(module, "_passed", set())
    monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)
    with pytest.raises(ModelTypeRefused, match="between whose blocks others run differs"):
        self_test(LlamaConfig(**TINY))
