"""Spans of every measured architecture against the whole Hugging Face model, bit by bit.

The oracle is the plain model. Its weights require no gradient here: a weight that does can send a
matrix product to another kernel, even under `no_grad`, and change the last bit.

`GLASSHIVE_SOAK=1` adds bfloat16, eager attention and other cuts.
"""

from __future__ import annotations

import importlib.util
import inspect
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from soak import SOAK
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, DynamicCache, PreTrainedConfig, PreTrainedModel

from glasshive.peer.checkpoint import Attention, Checkpoint, model_class_for, supported_attentions
from glasshive.peer.errors import ModelTypeRefused
from glasshive.peer.self_test import self_test
from glasshive.peer.span_cache import SpanCache
from glasshive.peer.span_model import SpanModel


def _architectures() -> ModuleType:
    path = Path(__file__).with_name("architectures.py")
    spec = importlib.util.spec_from_file_location("glasshive_test_architectures", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ARCHITECTURES = _architectures()
EXACT: list[str] = ARCHITECTURES.EXACT
REFUSED: dict[str, str] = ARCHITECTURES.REFUSED
PROMPT_TOKENS = 12
STEPS = 4


@dataclass(frozen=True)
class Variant:
    """What is run: the type of the numbers, the attention backend asked for, where it is cut."""

    dtype: torch.dtype
    attention: Attention
    cuts: tuple[int, ...]


VARIANTS = [Variant(torch.float32, "sdpa", (0, 2, 3, 6))]
if SOAK:
    VARIANTS += [
        Variant(torch.bfloat16, "sdpa", (0, 2, 3, 6)),
        Variant(torch.float32, "eager", (0, 2, 3, 6)),
        Variant(torch.float32, "sdpa", (0, 1, 5, 6)),
        Variant(torch.float32, "sdpa", (0, 5, 6)),
    ]


@dataclass(frozen=True)
class Pair:
    """The whole model of Hugging Face, and the spans that we loaded from its checkpoint."""

    whole: PreTrainedModel
    spans: list[SpanModel]

    @property
    def accepts(self) -> frozenset[str]:
        return frozenset(inspect.signature(self.whole.forward).parameters)


def tiny_config(model_type: str) -> PreTrainedConfig:
    return CONFIG_MAPPING[model_type](**ARCHITECTURES.TINY[model_type])


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, Variant], Pair]:
    return {}


@pytest.fixture(params=VARIANTS, ids=lambda v: f"{v.dtype}-{v.attention}-{v.cuts}")
def variant(request: pytest.FixtureRequest) -> Variant:
    chosen: Variant = request.param
    return chosen


@pytest.fixture(params=EXACT)
def pair(
    request: pytest.FixtureRequest,
    variant: Variant,
    pairs: dict[tuple[str, Variant], Pair],
    tmp_path_factory: pytest.TempPathFactory,
) -> Pair:
    key = (request.param, variant)
    if key not in pairs:
        pairs[key] = _load(request.param, variant, tmp_path_factory.mktemp(request.param))
    return pairs[key]


def _load(model_type: str, variant: Variant, folder: Path) -> Pair:
    config = tiny_config(model_type)
    model_class = model_class_for(config)
    attention = variant.attention
    if attention not in supported_attentions(model_class):
        attention = "eager"
    torch.manual_seed(0)
    model_class(config).save_pretrained(folder, max_shard_size="150KB")
    whole = model_class.from_pretrained(
        folder, dtype=variant.dtype, attn_implementation=attention, local_files_only=True
    )
    whole.requires_grad_(False)
    assert not whole.training
    checkpoint = Checkpoint(folder)
    spans = [
        checkpoint.load_span(start, end, variant.dtype, "cpu", attention)
        for start, end in pairwise(variant.cuts)
    ]
    return Pair(whole, spans)


def chain(
    spans: list[SpanModel],
    input_ids: Tensor,
    caches: list[SpanCache] | None = None,
    **arguments: Tensor,
) -> Tensor:
    hidden: Tensor | None = None
    for index, span in enumerate(spans):
        hidden = span.run(
            input_ids=input_ids if index == 0 else None,
            hidden=hidden,
            cache=None if caches is None else caches[index],
            **arguments,
        )
    assert hidden is not None
    return hidden


def tokens(seed: int, count: int = PROMPT_TOKENS) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, ARCHITECTURES.VOCABULARY, (2, count), generator=generator)


def left_padded(count: int) -> tuple[Tensor, Tensor]:
    mask = torch.ones(2, count, dtype=torch.int64)
    mask[1, :5] = 0
    return mask, (mask.cumsum(-1) - 1).clamp(min=0)


@torch.no_grad()
def test_forward_is_exact(pair: Pair) -> None:
    prompt = tokens(1)
    whole = pair.whole(prompt).logits
    assert torch.equal(chain(pair.spans, prompt), whole)
    if len(pair.spans) > 2:
        without = [*pair.spans[:1], *pair.spans[2:]]
        assert not torch.equal(chain(without, prompt), whole), "the blocks count for nothing"


@torch.no_grad()
def test_left_padded_batch_is_exact(pair: Pair) -> None:
    prompt = tokens(1)
    mask, positions = left_padded(PROMPT_TOKENS)
    arguments = {"attention_mask": mask}
    if "position_ids" in pair.accepts:
        arguments["position_ids"] = positions
    got = chain(pair.spans, prompt, attention_mask=mask, position_ids=positions)
    assert torch.equal(got, pair.whole(prompt, **arguments).logits)


@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
@torch.no_grad()
def test_cached_decoding_of_two_clients_in_turn_is_exact(pair: Pair, padded: bool) -> None:
    keyword = "past_key_values" if "past_key_values" in pair.accepts else "cache_params"
    wholes = [DynamicCache(config=pair.whole.config) for _ in range(2)]
    caches = [[span.new_cache() for span in pair.spans] for _ in range(2)]
    seen = [tokens(seed, PROMPT_TOKENS - 3 * seed) for seed in range(2)]
    new = list(seen)
    for step in range(STEPS + 1):
        for client in range(2):
            arguments: dict[str, Tensor] = {}
            theirs: dict[str, Any] = {keyword: wholes[client], "use_cache": True}
            if padded:
                mask, positions = left_padded(seen[client].shape[1])
                positions = positions[:, -new[client].shape[1] :]
                arguments = {"attention_mask": mask, "position_ids": positions}
                theirs["attention_mask"] = mask
                if "position_ids" in pair.accepts:
                    theirs["position_ids"] = positions
            got = chain(pair.spans, new[client], caches[client], **arguments)
            assert torch.equal(got, pair.whole(new[client], **theirs).logits), (step, client)
            if not padded and pair.spans[0].dtype == torch.float32:
                again = pair.whole(seen[client], use_cache=False).logits
                assert torch.allclose(got[:, -1], again[:, -1], atol=1e-4), "the cache is ignored"
            new[client] = tokens(10 * step + client, 1)
            seen[client] = torch.cat([seen[client], new[client]], dim=1)


def test_gradient_at_the_first_cut_is_exact(pair: Pair) -> None:
    prompt = tokens(1)
    ours = chain(pair.spans[:1], prompt).detach().requires_grad_()
    hidden: Tensor | None = ours
    for span in pair.spans[1:]:
        hidden = span.run(input_ids=None, hidden=hidden)
    assert hidden is not None
    (got,) = torch.autograd.grad(hidden.float().square().sum(), ours)

    leaves: list[Tensor] = []

    def cut(block: nn.Module, args: Any, kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        leaves.append(hidden.detach().requires_grad_())
        return (
            ((leaves[0], *args[1:]), kwargs)
            if args
            else (args, {**kwargs, "hidden_states": leaves[0]})
        )

    first_of_second = pair.spans[1].block_path(pair.spans[1].start)
    block = pair.whole.get_submodule(first_of_second)
    handle = block.register_forward_pre_hook(cut, with_kwargs=True)
    logits = pair.whole(prompt).logits
    handle.remove()
    (wanted,) = torch.autograd.grad(logits.float().square().sum(), leaves[0])
    assert torch.equal(got, wanted)
    assert wanted.abs().max() > 0


@pytest.mark.parametrize("model_type", EXACT)
def test_self_test_accepts_what_splits_exactly(model_type: str) -> None:
    config = tiny_config(model_type)
    attentions = supported_attentions(model_class_for(config))
    before = torch.random.get_rng_state()
    self_test(config, "sdpa" if "sdpa" in attentions else "eager")
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("model_type", sorted(REFUSED))
def test_self_test_refuses_what_does_not_and_says_why(model_type: str) -> None:
    config = tiny_config(model_type)
    attentions = supported_attentions(model_class_for(config))
    with pytest.raises(ModelTypeRefused, match=REFUSED[model_type]):
        self_test(config, "sdpa" if "sdpa" in attentions else "eager")


@pytest.mark.parametrize("model_type", sorted(set(EXACT) - ARCHITECTURES.BROKEN_DEFAULTS))
@pytest.mark.skipif(not SOAK, reason="GLASSHIVE_SOAK is not set")
def test_self_test_makes_a_tiny_copy_of_a_configuration_of_full_size(model_type: str) -> None:
    config = CONFIG_MAPPING[model_type]()
    attentions = supported_attentions(model_class_for(config))
    self_test(config, "sdpa" if "sdpa" in attentions else "eager")
