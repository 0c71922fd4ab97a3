"""Tiny random Llama and GPT-2 of six blocks: plain, and split into spans by glasshive."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import run_hooked
from tokenizers import Tokenizer
from tokenizers import models as tokenizer_models
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

# Where peers and oracle compute: `GLASSHIVE_TEST_DEVICE=cuda` compares them on a GPU.
DEVICE = os.environ.get("GLASSHIVE_TEST_DEVICE", "cpu")
BLOCKS = 6
VOCABULARY = 64
HIDDEN = 32
HEADS = 4
CUTS: tuple[tuple[int, ...], ...] = ((), (3,), (2, 4))
IDS = [3, 14, 15, 9, 26, 5]
OTHER = [35, 8, 9, 7, 29, 23]


@dataclass(frozen=True)
class Names:
    """Where things are in one architecture, as module paths with `{}` for the block's number."""

    embed: str
    blocks: str
    attention: str
    projection: str
    mlp: str
    first_norm: str
    second_norm: str
    final_norm: str
    head: str = "lm_head"


NAMES = {
    "llama": Names(
        embed="model.embed_tokens",
        blocks="model.layers",
        attention="self_attn",
        projection="self_attn.o_proj",
        mlp="mlp",
        first_norm="input_layernorm",
        second_norm="post_attention_layernorm",
        final_norm="model.norm",
    ),
    "gpt2": Names(
        embed="transformer.wte",
        blocks="transformer.h",
        attention="attn",
        projection="attn.c_proj",
        mlp="mlp",
        first_norm="ln_1",
        second_norm="ln_2",
        final_norm="transformer.ln_f",
    ),
}


@dataclass(frozen=True)
class Setting:
    """One model: `plain` is Hugging Face's, `model` is glasshive's, cut at `cuts`."""

    kind: str
    cuts: tuple[int, ...]
    plain: nn.Module
    model: Any

    @property
    def names(self) -> Names:
        """Where things are in this architecture."""
        return NAMES[self.kind]

    def block(self, index: int, part: str = "") -> str:
        """The path of a block, or of one of its parts by its field in `Names`."""
        path = f"{self.names.blocks}.{index}"
        return f"{path}.{getattr(self.names, part)}" if part else path

    def at(self, path: str) -> Any:
        """glasshive's module at a path, found as a user would: by attribute and index."""
        return module_at(self.model, path)

    def hooked(self, ids: Any, **arguments: Any) -> dict[Any, Tensor]:
        """What plain Hugging Face with torch hooks gives; `ids` is a list or a list of lists."""
        rows = torch.tensor(ids)
        return run_hooked(self.plain, rows if rows.dim() == 2 else rows[None], **arguments)


def refused(
    setting: Setting,
    error: type[Exception],
    text: str,
    body: Callable[[], Any],
    prompt: Any = IDS,
) -> None:
    """A trace with this body raises this error with this text."""

    def trace() -> None:
        with setting.model.trace(prompt):
            body()

    with pytest.raises(error, match=re.escape(text)):
        trace()


def module_at(model: Any, path: str) -> Any:
    """glasshive's module at a path."""
    here = model
    for name in path.split("."):
        here = here[int(name)] if name.isdigit() else getattr(here, name)
    return here


def save_tiny(kind: str, folder: Path) -> None:
    """Write a checkpoint with random weights, large enough for every block to count."""
    torch.manual_seed(0)
    if kind == "llama":
        model: Any = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=HIDDEN,
                intermediate_size=48,
                num_hidden_layers=BLOCKS,
                num_attention_heads=HEADS,
                num_key_value_heads=2,
                max_position_embeddings=64,
                pad_token_id=0,
                initializer_range=0.2,
            )
        )
    else:
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCABULARY,
                n_embd=HIDDEN,
                n_layer=BLOCKS,
                n_head=HEADS,
                n_positions=64,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
                initializer_range=0.2,
            )
        )
    model.save_pretrained(folder)
    vocabulary = {f"w{token}": token for token in range(VOCABULARY)}
    words = Tokenizer(tokenizer_models.WordLevel(vocabulary, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", unk_token="w0").save_pretrained(
        folder
    )


def load_plain(folder: Path, attention: str = "sdpa") -> nn.Module:
    """Hugging Face's own model, which needs no gradients here."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, attn_implementation=attention
    )
    model.requires_grad_(False)
    return model.to(DEVICE).eval()  # type: ignore[no-any-return]
