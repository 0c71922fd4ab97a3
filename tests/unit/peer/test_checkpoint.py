"""Reading a span's part of a checkpoint: only what it needs, and nothing made up."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from glasshive.peer.checkpoint import Checkpoint
from glasshive.peer.errors import (
    BadCheckpoint,
    BadSpan,
    MissingTensor,
    ModelTypeRefused,
    UnsupportedAttention,
    WrongWeights,
)

SaveTinyLlama = Callable[..., Path]


def edit_config(folder: Path, **settings: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def shard_of(folder: Path, tensor: str) -> Path:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return folder / str(index["weight_map"][tensor])


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_only_the_span_is_loaded(save_tiny_llama: SaveTinyLlama, tied: bool) -> None:
    folder = save_tiny_llama(tie_word_embeddings=tied)
    whole = dict(LlamaForCausalLM.from_pretrained(folder).named_parameters())
    checkpoint = Checkpoint(folder)
    ends = {
        (0, 2): {"model.embed_tokens.weight"},
        (2, 5): set(),
        (5, 6): {"model.embed_tokens.weight"} if tied else {"lm_head.weight"},
    }
    for (start, end), outside in ends.items():
        span = checkpoint.load_span(start, end)
        loaded = dict(span.module.named_parameters())
        wanted = {
            name
            for name in whole
            if name in outside | {"model.norm.weight"}
            or any(name.startswith(f"model.layers.{index}.") for index in range(start, end))
        }
        assert loaded.keys() == wanted
        for name, value in loaded.items():
            assert torch.equal(value, whole[name])
            assert not value.requires_grad
        assert not any(module.training for module in span.module.modules())
        held = sum(value.nbytes for value in loaded.values())
        assert checkpoint.span_bytes(start, end, torch.float32) == held
        assert checkpoint.span_bytes(start, end, torch.bfloat16) == held // 2


def test_shards_that_are_not_needed_may_be_missing(save_tiny_llama: SaveTinyLlama) -> None:
    folder = save_tiny_llama(shard_size="40KB")
    whole = LlamaForCausalLM.from_pretrained(folder)
    prompt = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        wanted = whole.model(prompt, output_hidden_states=True).hidden_states[2]
    needed = {
        shard_of(folder, name)
        for name in whole.state_dict()
        if name.startswith(
            ("model.embed_tokens", "model.layers.0.", "model.layers.1.", "model.norm")
        )
    }
    removed = set(folder.glob("*.safetensors")) - needed
    assert removed
    for path in removed:
        path.unlink()
    span = Checkpoint(folder).load_span(0, 2)
    got = span.run(input_ids=prompt, hidden=None)
    assert got is not None
    assert torch.equal(got, wanted)


def test_a_needed_shard_that_is_missing_is_named(save_tiny_llama: SaveTinyLlama) -> None:
    folder = save_tiny_llama(shard_size="40KB")
    path = shard_of(folder, "model.layers.1.mlp.up_proj.weight")
    path.unlink()
    with pytest.raises(WrongWeights, match=rf"{path.name} is missing"):
        Checkpoint(folder).load_span(0, 2)


def test_a_missing_tensor_is_an_error_where_it_is_needed(save_tiny_llama: SaveTinyLlama) -> None:
    folder = save_tiny_llama()
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.3.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    checkpoint = Checkpoint(folder)
    with pytest.raises(MissingTensor, match=r"model\.layers\.3\.mlp\.up_proj\.weight") as caught:
        checkpoint.load_span(2, 4)
    assert caught.value.names == ("model.layers.3.mlp.up_proj.weight",)
    assert path.name in str(caught.value)
    checkpoint.load_span(0, 3)


@pytest.mark.parametrize("kept_bytes", [0, 7, 500, -1])
def test_a_file_that_is_cut_off_is_an_error(
    save_tiny_llama: SaveTinyLlama, kept_bytes: int
) -> None:
    folder = save_tiny_llama()
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept_bytes])
    with pytest.raises(WrongWeights, match="no whole safetensors file"):
        Checkpoint(folder).load_span(0, 2)


def test_a_shard_of_rubbish_is_an_error(save_tiny_llama: SaveTinyLlama) -> None:
    folder = save_tiny_llama(shard_size="40KB")
    path = shard_of(folder, "model.layers.1.mlp.up_proj.weight")
    path.write_bytes(b"\xff" * 4096)
    with pytest.raises(WrongWeights, match=path.name):
        Checkpoint(folder).load_span(0, 2)


@pytest.mark.parametrize("span", [(4, 40), (0, 7), (-1, 2), (3, 3), (4, 2), (6, 7)])
def test_a_span_that_the_model_lacks_is_an_error(
    save_tiny_llama: SaveTinyLlama, span: tuple[int, int]
) -> None:
    checkpoint = Checkpoint(save_tiny_llama())
    with pytest.raises(BadSpan, match=rf"the span {span[0]}:{span[1]}.*within 0:6"):
        checkpoint.load_span(*span)
    with pytest.raises(BadSpan):
        checkpoint.span_bytes(*span, torch.float32)


def test_progress_rises_to_the_total(save_tiny_llama: SaveTinyLlama) -> None:
    checkpoint = Checkpoint(save_tiny_llama(shard_size="40KB"))
    calls: list[tuple[int, int]] = []
    checkpoint.load_span(
        1, 3, torch.bfloat16, on_progress=lambda done, total: calls.append((done, total))
    )
    total_bytes = checkpoint.span_bytes(1, 3, torch.bfloat16)
    done = [done for done, _ in calls]
    assert {total for _, total in calls} == {total_bytes}
    assert done == sorted(done)
    assert len(done) > 10
    assert done[-1] == total_bytes


def test_remote_code_is_never_run(save_tiny_llama: SaveTinyLlama, tmp_path: Path) -> None:
    folder = save_tiny_llama()
    ran = tmp_path / "ran"
    (folder / "mine.py").write_text(f"open({str(ran)!r}, 'w')\n")
    auto_map = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}
    edit_config(folder, auto_map=auto_map)
    Checkpoint(folder).load_span(0, 2)
    edit_config(folder, model_type="mine")
    with pytest.raises(ModelTypeRefused, match="named by auto_map, is never run"):
        Checkpoint(folder)
    assert not ran.exists()


def test_settings_that_change_what_forward_returns_are_ignored(
    save_tiny_llama: SaveTinyLlama,
) -> None:
    folder = save_tiny_llama()
    edit_config(folder, return_dict=False, output_hidden_states=True, output_attentions=True)
    span = Checkpoint(folder).load_span(0, 6)
    logits = span.run(input_ids=torch.tensor([[5, 6]]), hidden=None)
    assert logits is not None
    assert logits.shape == (1, 2, 64)


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, BadCheckpoint, "quantised"),
        ({"model_type": None}, ModelTypeRefused, "None is unknown"),
        ({"model_type": "vit"}, ModelTypeRefused, "no causal decoder"),
        ({"hidden_size": "wide"}, BadCheckpoint, "no valid configuration"),
        ({"num_hidden_layers": 0}, BadCheckpoint, "number of blocks"),
    ],
)
def test_a_configuration_that_is_not_served_says_why(
    save_tiny_llama: SaveTinyLlama, settings: dict[str, Any], error: type[Exception], text: str
) -> None:
    folder = save_tiny_llama()
    edit_config(folder, **settings)
    with pytest.raises(error, match=text):
        Checkpoint(folder)


@pytest.mark.parametrize("content", ["", "[]", "{", "[" * 100_000])
def test_a_configuration_that_is_no_json_object_is_an_error(
    save_tiny_llama: SaveTinyLlama, content: str
) -> None:
    folder = save_tiny_llama()
    (folder / "config.json").write_text(content)
    with pytest.raises(BadCheckpoint, match=r"config\.json"):
        Checkpoint(folder)


def test_folders_without_a_model_are_errors(save_tiny_llama: SaveTinyLlama, tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint, match="no folder"):
        Checkpoint(tmp_path / "nothing")
    with pytest.raises(BadCheckpoint, match=r"config\.json is missing"):
        Checkpoint(tmp_path)
    folder = save_tiny_llama()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(BadCheckpoint, match="only safetensors"):
        Checkpoint(folder).load_span(0, 2)


def test_unknown_attention_and_dtype_are_errors(save_tiny_llama: SaveTinyLlama) -> None:
    checkpoint = Checkpoint(save_tiny_llama())
    assert checkpoint.attentions()[:2] == ("eager", "sdpa")
    with pytest.raises(UnsupportedAttention, match="eager, sdpa"):
        checkpoint.load_span(0, 2, attention="magic")  # type: ignore[arg-type]
    with pytest.raises(WrongWeights, match="wanted one of"):
        checkpoint.load_span(0, 2, torch.int8)
