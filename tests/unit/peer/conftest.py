"""Tiny random checkpoints on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tenants import load_tiny
from transformers import LlamaConfig, LlamaForCausalLM

from glasshive.peer.served_model import ServedModel

SaveTinyLlama = Callable[..., Path]


@pytest.fixture
def save_tiny_llama(tmp_path: Path) -> SaveTinyLlama:
    """Writes a random Llama of 6 blocks (hidden size 32, vocabulary 64) and returns its folder.

    `shard_size` as transformers takes it; other arguments go into the configuration.
    """

    def save(shard_size: str = "1GB", **settings: Any) -> Path:
        torch.manual_seed(0)
        config = LlamaConfig(
            **{
                "vocab_size": 64,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 6,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 128,
                **settings,
            }
        )
        folder = tmp_path / "model"
        LlamaForCausalLM(config).save_pretrained(folder, max_shard_size=shard_size)
        return folder

    return save


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    """A Llama of 2 blocks (hidden size 32, vocabulary 64, rows of at most 24 tokens), whole."""
    return load_tiny(tmp_path_factory.mktemp("tiny"))
