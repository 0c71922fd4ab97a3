"""The two oracles agree with each other: torch hooks, and nnsight in a process of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from nnsight_oracle import run_nnsight
from oracle import LOGITS, Edit, Read, left_padded, positions_of, run_hooked
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

BLOCKS = 4


@pytest.fixture(scope="module")
def llama() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        # Weights of this size let attention and MLP move the residual stream visibly.
        initializer_range=0.2,
    )
    model: Any = LlamaForCausalLM(config)
    return model.eval()


@pytest.fixture(scope="module")
def folder(llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("llama")
    llama.save_pretrained(path)
    return path


IDS = torch.tensor([[3, 14, 15, 9, 26, 5]])
OTHER = torch.tensor([[35, 8, 9, 7, 93 % 64, 23]])

NNSIGHT = {
    "save_all": """
        with model.trace(t["ids"]):
            h0 = model.model.layers[0].output.save()
            h1 = model.model.layers[1].output.save()
            h2 = model.model.layers[2].output.save()
            h3 = model.model.layers[3].output.save()
            logits = model.lm_head.output.save()
        out.update(h0=h0, h1=h1, h2=h2, h3=h3, logits=logits)
    """,
    "ablate_mlp": """
        with model.trace(t["ids"]):
            model.model.layers[1].mlp.output[:] = 0
            logits = model.lm_head.output.save()
        out.update(logits=logits)
    """,
    "last_token": """
        with model.trace(t["ids"]):
            model.model.layers[2].output[:, -1] *= 2
            logits = model.lm_head.output.save()
        out.update(logits=logits)
    """,
    "tuple_leaf": """
        with model.trace(t["ids"]):
            model.model.layers[1].self_attn.output[0][:, 2] = 0
            logits = model.lm_head.output.save()
        out.update(logits=logits)
    """,
    "norm_input_inplace": """
        with model.trace(t["ids"]):
            model.model.layers[1].input_layernorm.input[:, 1] = 1
            logits = model.lm_head.output.save()
        out.update(logits=logits)
    """,
    "norm_input_assigned": """
        with model.trace(t["ids"]):
            x = model.model.layers[1].input_layernorm.input.clone()
            x[:, 1] = 1
            model.model.layers[1].input_layernorm.input = x
            logits = model.lm_head.output.save()
        out.update(logits=logits)
    """,
    "o_proj_input": """
        with model.trace(t["ids"]):
            z = model.model.layers[1].self_attn.o_proj.input.view(1, 6, 4, 8)
            z[:, :, 2] = 0
            logits = model.lm_head.output.save()
        out.update(logits=logits)
    """,
    "lens": """
        with model.trace(t["ids"]):
            lens = model.lm_head(model.model.norm(model.model.layers[1].output)).save()
        out.update(lens=lens)
    """,
    "patch": """
        with model.trace() as tracer:
            barrier = tracer.barrier(2)
            with tracer.invoke(t["ids"]):
                h = model.model.layers[1].output[:, 3]
                barrier()
            with tracer.invoke(t["other"]):
                barrier()
                model.model.layers[1].output[:, 3] = h
                logits = model.lm_head.output.save()
        out.update(logits=logits)
    """,
}


@pytest.fixture(scope="module")
def nnsight(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    tensors = {"ids": IDS, "other": OTHER}
    return run_nnsight(folder, NNSIGHT, tensors, tmp_path_factory.mktemp("nnsight"))


def zero(tensor: Tensor) -> None:
    tensor[:] = 0


def double_last(tensor: Tensor) -> None:
    tensor[:, -1] *= 2


def zero_position(tensor: Tensor) -> None:
    tensor[:, 2] = 0


def ones_at_1(tensor: Tensor) -> None:
    tensor[:, 1] = 1


def with_ones_at_1(tensor: Tensor) -> Tensor:
    changed = tensor.clone()
    changed[:, 1] = 1
    return changed


def zero_head(tensor: Tensor) -> None:
    tensor.view(1, 6, 4, 8)[:, :, 2] = 0


def test_reads_equal_nnsight(llama: Any, nnsight: dict[str, dict[str, Tensor]]) -> None:
    paths = [f"model.layers.{block}" for block in range(BLOCKS)]
    ours = run_hooked(llama, IDS, reads=[Read(path, "output") for path in paths])
    for block, path in enumerate(paths):
        assert torch.equal(ours[path, "output", None], nnsight["save_all"][f"h{block}"])
    assert torch.equal(ours[LOGITS], nnsight["save_all"]["logits"])


@pytest.mark.parametrize(
    ("name", "edit"),
    [
        ("ablate_mlp", Edit("model.layers.1.mlp", "output", None, zero)),
        ("last_token", Edit("model.layers.2", "output", None, double_last)),
        ("tuple_leaf", Edit("model.layers.1.self_attn", "output", 0, zero_position)),
        (
            "norm_input_inplace",
            Edit("model.layers.1.input_layernorm", "input", None, ones_at_1),
        ),
        (
            "norm_input_assigned",
            Edit("model.layers.1.input_layernorm", "input", None, with_ones_at_1, "set"),
        ),
        ("o_proj_input", Edit("model.layers.1.self_attn.o_proj", "input", None, zero_head)),
    ],
)
def test_edits_equal_nnsight(
    llama: Any, nnsight: dict[str, dict[str, Tensor]], name: str, edit: Edit
) -> None:
    ours = run_hooked(llama, IDS, edits=[edit])
    assert torch.equal(ours[LOGITS], nnsight[name]["logits"])
    assert not torch.equal(ours[LOGITS], run_hooked(llama, IDS)[LOGITS])


def test_in_place_and_assigned_norm_inputs_differ(nnsight: dict[str, dict[str, Tensor]]) -> None:
    in_place, assigned = nnsight["norm_input_inplace"], nnsight["norm_input_assigned"]
    assert not torch.equal(in_place["logits"], assigned["logits"])


def test_lens_equals_nnsight(llama: Any, nnsight: dict[str, dict[str, Tensor]]) -> None:
    def lens(hidden: Tensor) -> Tensor:
        logits: Tensor = llama.lm_head(llama.model.norm(hidden))
        return logits

    reads = [
        Read("model.layers.1", "output", fn=lens, name="lens"),
        Read("lm_head", "output", name="head"),
    ]
    ours = run_hooked(llama, IDS, reads=reads)
    assert torch.equal(ours["lens"], nnsight["lens"]["lens"])
    assert torch.equal(ours["head"], ours[LOGITS])  # the lens's own calls fired no hooks


def test_patching_between_rows_equals_nnsight(
    llama: Any, nnsight: dict[str, dict[str, Tensor]]
) -> None:
    def patch(tensor: Tensor) -> None:
        tensor[1, 3] = tensor[0, 3]

    rows = torch.cat([IDS, OTHER])
    ours = run_hooked(llama, rows, edits=[Edit("model.layers.1", "output", None, patch)])
    assert torch.equal(ours[LOGITS][1:], nnsight["patch"]["logits"])


def test_reads_are_clones_at_their_event(llama: Any) -> None:
    path = "model.layers.1"
    reads = [Read(path, "output", None, "before"), Read(path, "output", name="after")]
    ours = run_hooked(llama, IDS, reads=reads, edits=[Edit(path, "output", None, zero)])
    plain = run_hooked(llama, IDS, reads=[Read(path, "output")])
    assert torch.equal(ours[path, "output", None], plain[path, "output", None])
    assert not ours["after"].any()


def test_keyword_leaf(llama: Any) -> None:
    leaf = ("position_embeddings", 0)
    reads = [
        Read("model.layers.2.self_attn", "input", leaf, name="cosines"),
        Read("model.layers.2.self_attn", "input", "hidden_states", name="hidden"),
        Read("model.layers.2.self_attn", "input", name="first"),
    ]
    edits = [
        Edit("model.layers.2.self_attn", "input", leaf, torch.zeros_like, "set"),
    ]
    ours = run_hooked(llama, IDS, reads=reads, edits=edits)
    assert not ours["cosines"].any()
    assert torch.equal(ours["hidden"], ours["first"])
    assert not torch.equal(ours[LOGITS], run_hooked(llama, IDS)[LOGITS])


def test_padding_changes_no_answer(llama: Any) -> None:
    long, short = IDS[0].tolist(), OTHER[0, :4].tolist()
    ids, mask = left_padded([long, short])
    assert positions_of(mask)[1].tolist() == [0, 0, 0, 1, 2, 3]
    ours = run_hooked(llama, ids, attention_mask=mask)
    alone = run_hooked(llama, OTHER[:, :4])
    torch.testing.assert_close(ours[LOGITS][1, -1], alone[LOGITS][0, -1], rtol=0, atol=1e-4)


def test_a_module_that_never_runs_is_an_error(llama: Any) -> None:
    with pytest.raises(LookupError, match="never reached"):
        run_hooked(llama, IDS, reads=[Read("model.layers", "output")])
