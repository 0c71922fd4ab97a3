"""A module called on the twin refuses what the real module refuses, and says what to do."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from glasshive.graph.calls import Calls
from glasshive.graph.errors import NotASite, ShapeMismatch, UnknownModule
from glasshive.graph.kernels import from_torch_dtype, spec_of
from glasshive.graph.outline import Outline
from glasshive.graph.tensors import TensorSpec
from glasshive.graph.twin import build_twin, scan

SIZES = {"vocab_size": 64}
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(
        **SIZES,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    ),
    "gpt2": GPT2Config(**SIZES, n_embd=32, n_layer=2, n_head=4, n_positions=64),
}
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
OTHERS = (*FLOATS, torch.int64, torch.int32, torch.bool)
F32 = from_torch_dtype(torch.float32)


class Both:
    """A model without data, and the same with it."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        config = CONFIGS[name]
        twin = build_twin(config, dtype)
        self.outline: Outline = scan(twin, config)
        self.calls = Calls(twin, self.outline)
        torch.manual_seed(0)
        real: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
        self.real = real.eval().requires_grad_(False)


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def dtype(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def both(request: pytest.FixtureRequest, dtype: torch.dtype) -> Both:
    return Both(request.param, dtype)


def refusal(calls: Calls, path: str, *args: TensorSpec) -> str:
    with pytest.raises(ShapeMismatch) as caught:
        calls.spec(path, args)
    return str(caught.value)


def test_a_dtype_is_refused_where_the_real_module_refuses_it(both: Both) -> None:
    agreed = {True: 0, False: 0}
    for path, info in both.outline.modules.items():
        if both.outline.holds_blocks(path) or not info.inputs or "drop" in path:
            continue
        leaf = info.inputs[0]
        for given in OTHERS:
            value = torch.ones(leaf.shape(1, 5), dtype=given)
            try:
                wanted = both.real.get_submodule(path)(value)
            except Exception:
                wanted = None
            try:
                got = both.calls.spec(path, (spec_of(value),))
            except (ShapeMismatch, NotASite):
                got = None
            if not given.is_floating_point and leaf.dtype == from_torch_dtype(torch.int64):
                pass  # token ids: as torch says
            elif not given.is_floating_point:
                wanted = None  # whole numbers in place of others: refused here in any case
            assert (got is None) == (not isinstance(wanted, torch.Tensor)), (path, given)
            if got is not None:
                assert got == spec_of(wanted), (path, given)
            agreed[got is None] += 1
    assert min(agreed.values()) > 10, agreed


def test_a_call_gives_a_spec_or_says_what_does_not_fit() -> None:
    calls = Both("llama", torch.float32).calls
    assert calls.spec("lm_head", (TensorSpec(F32, (1, 5, 32)),)) == TensorSpec(F32, (1, 5, 64))
    assert "lm_head(float32[1, 5, 31]) is refused: a and b must have same" in refusal(
        calls, "lm_head", TensorSpec(F32, (1, 5, 31))
    )


def test_a_wrong_dtype_says_what_to_call() -> None:
    calls = Both("llama", torch.bfloat16).calls
    text = refusal(calls, "lm_head", TensorSpec(F32, (1, 5, 32)))
    assert text == (
        "lm_head(float32[1, 5, 32]) is refused: mm takes tensors of one dtype, but got float32 and "
        "bfloat16; bfloat16 is wanted: call .to(torch.bfloat16) on the value"
    )
    text = refusal(calls, "model.embed_tokens", TensorSpec(F32, (1, 5)))
    assert "it takes no float32; int64 is wanted: call .to(torch.int64)" in text


def test_a_mixed_layer_norm_is_allowed_one_way_only() -> None:
    """Weights of 32 bits on values of 16, which torch allows; not the other way round."""
    short = from_torch_dtype(torch.bfloat16)
    calls = Both("gpt2", torch.float32).calls
    assert calls.spec("transformer.ln_f", (TensorSpec(short, (1, 5, 32)),)).dtype is short
    calls = Both("gpt2", torch.bfloat16).calls
    assert "bfloat16 is wanted" in refusal(calls, "transformer.ln_f", TensorSpec(F32, (1, 5, 32)))


@pytest.mark.parametrize("part", ["", ".self_attn"])
@pytest.mark.parametrize("count", [1, 2])
def test_a_call_that_lacks_arguments_names_them(part: str, count: int) -> None:
    calls = Both("llama", torch.float32).calls
    hidden = TensorSpec(F32, (1, 5, 32))
    text = refusal(calls, f"model.layers.1{part}", *[hidden] * count)
    assert re.search(r"it lacks .*\bposition_embeddings\b.*, which the model makes for it", text)
    assert "assign its .input and read its .output" in text


def test_a_call_with_too_many_arguments() -> None:
    calls = Both("llama", torch.float32).calls
    hidden = TensorSpec(F32, (1, 5, 32))
    text = refusal(calls, "model.layers.1.mlp", hidden, hidden)
    assert text.endswith("is refused: too many positional arguments")


def test_what_cannot_be_called_at_all() -> None:
    calls = Both("gpt2", torch.float32).calls
    hidden = TensorSpec(F32, (1, 5, 32))
    with pytest.raises(UnknownModule, match="no module 'head'"):
        calls.spec("head", (hidden,))
    with pytest.raises(NotASite, match="holds the blocks"):
        calls.spec("transformer", (hidden,))
    with pytest.raises(NotASite, match=r"gives a tuple.*assign its \.input and read its \.output"):
        calls.spec("transformer.h.0.attn", (hidden,))
    with pytest.raises(NotASite, match="gives back its argument's own memory"):
        calls.spec("transformer.drop", (hidden,))


def test_all_that_a_call_makes_is_counted(both: Both, dtype: torch.dtype) -> None:
    """At least what its own modules give on real tensors, and no more than a few times that."""
    found = 0
    value = torch.randn(2, 5, 32).to(dtype)
    for path in (one for one, _ in both.real.named_modules() if one.endswith("mlp")):
        inside_bytes: list[int] = []
        hooks = [
            one.register_forward_hook(lambda m, i, out, to=inside_bytes: to.append(out.nbytes))
            for one in both.real.get_submodule(path).modules()
        ]
        result = both.real.get_submodule(path)(value)
        for hook in hooks:
            hook.remove()
        _, made_bytes = both.calls.run(path, (spec_of(value),))
        least_bytes = sum(inside_bytes) - result.nbytes  # the last module's is the mlp's own
        assert least_bytes <= made_bytes <= 6 * least_bytes
        assert made_bytes > 3 * result.nbytes
        found += 1
    assert found == 2
