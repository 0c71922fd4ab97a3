"""The law of splitting: over random graphs and every cut, the split run equals the uncut run.

`GLASSHIVE_SOAK=1` runs 10,000 graphs instead of 300; `GLASSHIVE_SEED` chooses the first seed.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from random_traces import BLOCKS, HIDDEN, VOCABULARY, RandomTrace
from soak import SEED, SOAK, count
from stage_runner import CuttingRunner
from transformers import LlamaConfig, LlamaForCausalLM

from glasshive.graph.errors import ImpossibleOrder, UnequalLengths, UnseenWrite

GRAPHS = count(300, 10_000)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("random")
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.mark.timeout(0 if SOAK else 120)
def test_a_split_run_equals_the_uncut_run(folder: Path) -> None:
    runner = CuttingRunner(folder)
    model = runner.model()
    impossible = 0
    for seed in range(SEED, SEED + GRAPHS):
        torch.manual_seed(seed)
        trace = RandomTrace(model, seed)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UnseenWrite)
                trace.run()
        except (ImpossibleOrder, UnequalLengths):
            impossible += 1
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise
    assert impossible < GRAPHS / 3, "the generator makes too little that can run"
    assert runner.refused < runner.runs / 3
