"""Does this architecture split into spans without changing one bit? Asked before it is served.

A tiny random model of the same kind is made out of the real configuration, and a chain of spans is
compared with the whole Hugging Face model by `torch.equal`: a forward pass, a left-padded batch,
cached decoding. Two more passes show that the comparison means something: leaving a span out must
change the result, and the cached result must be the one that recomputing gives, while two
sequences are decoded in turn (a model that keeps state outside its cache would mix tenants up).
The same is asked of a pass between whose blocks others run, as a stage gives way to other tenants.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from glasshive.graph.memory import is_out_of_memory
from glasshive.graph.twin import config_text
from glasshive.peer.checkpoint import (
    HF_ATTENTION,
    Attention,
    check_attention,
    first_line,
    load_span_from,
    model_class_for,
    quiet,
)
from glasshive.peer.errors import ModelTypeRefused
from glasshive.peer.span_cache import SpanCache
from glasshive.peer.span_model import SpanModel

_MOST_REMEMBERED = 64
_BLOCKS = 6
_MOST_BLOCKS = 12
_MOST_PARAMETERS = 60_000_000
_PROMPT_TOKENS = 12
_PADDING_TOKENS = 5
_STEPS = 3
_VOCABULARY = 256
_FIRST_PLAIN_TOKEN = 3

_PER_HEAD = re.compile(r"head_?dim|d_head|rotary_dim|key_head|value_head")
_HEADS = re.compile(r"heads?$")
_WINDOW = re.compile(r"sliding_window$|window_size$|chunk_size$")
_POSITIONS = re.compile(r"max_position|n_positions|n_ctx|max_seq_len|seq_length")
_KEPT = re.compile(r"kernel|state|multiple|group")
_WIDTH = re.compile(r"size|dim|rank|width|n_embd|n_inner|d_model|d_ff|d_inner|d_ssm|intermediate")

# What was tested in this process: class and text of the configuration, and the attention.
_passed: set[tuple[type, str, str]] = set()


def self_test(config: PreTrainedConfig, attention: Attention = "sdpa") -> None:
    """Raise `ModelTypeRefused`, saying why, unless models of this kind split exactly.

    Runs on the CPU in float32, on random weights, in about half a second, once in a process for
    each configuration, and leaves the random state of torch as it was. Raises
    `UnsupportedAttention` where the class lacks the backend.
    """
    check_attention(model_class_for(config), attention)
    _refuse_growing_rope(config)
    kind = type(config), config_text(config), attention
    if kind in _passed:
        return
    with torch.random.fork_rng(devices=[]), torch.no_grad(), quiet(), _one_thread():
        torch.manual_seed(0)
        try:
            tiny, whole = _tiny_model(config, attention)
            _compare(tiny, whole, attention)
        except ModelTypeRefused:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise _refused(
                config,
                f"running it over spans fails with {type(error).__name__}: {first_line(error)}",
            ) from error
    if len(_passed) < _MOST_REMEMBERED:
        _passed.add(kind)


@contextmanager
def _one_thread() -> Iterator[None]:
    # Tensors this small only lose by threads, and on a busy machine they lose seconds.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _refused(config: PreTrainedConfig, why: str) -> ModelTypeRefused:
    return ModelTypeRefused(
        f"model type {config.model_type!r} does not split into spans exactly: {why}; "
        "serve another model"
    )


def _compare(config: PreTrainedConfig, whole: PreTrainedModel, attention: Attention) -> None:
    n_blocks: int = config.get_text_config().num_hidden_layers
    tensors = whole.state_dict()
    cuts = (0, 1, 2, 3) if n_blocks == 3 else (0, 2, 3, n_blocks)
    spans = [
        load_span_from(
            config,
            tensors,
            start,
            end,
            dtype=torch.float32,
            device=torch.device("cpu"),
            attention=attention,
        )
        for start, end in pairwise(cuts)
    ]
    prompt = _tokens(config, _PROMPT_TOKENS)
    plain = _logits(whole, input_ids=prompt)
    if not torch.equal(_chain(spans, prompt), plain):
        raise _refused(config, "a forward pass over spans differs from the whole model's")
    if torch.equal(_chain([spans[0], spans[2]], prompt), plain):
        raise _refused(config, "leaving out a block changes nothing, so nothing can be compared")
    _compare_interrupted(config, spans, prompt, plain)
    _compare_padded(config, whole, spans, prompt)
    _compare_decoding(config, whole, spans, prompt)


def _compare_interrupted(
    config: PreTrainedConfig, spans: list[SpanModel], prompt: Tensor, plain: Tensor
) -> None:
    """Between any two blocks another pass, of another length, runs whole on the same modules.

    And before each module of one block of each span.
    """
    given, hidden = _tokens(config, _PROMPT_TOKENS - 4), prompt
    for span in spans:
        alone = _run(span, given)
        with _other_pass(span, given) as results:
            hidden = _run(span, hidden)
        if not all(torch.equal(one, alone) for one in results):
            raise _refused(config, "a pass between two blocks of another one differs")
        given = alone
    if not torch.equal(hidden, plain):
        raise _refused(
            config, "a pass between whose blocks others run differs: it keeps state in its modules"
        )


@contextmanager
def _other_pass(span: SpanModel, given: Tensor) -> Iterator[list[Tensor]]:
    """Inside it, whatever runs is interrupted before each block by a pass of `given`."""
    results: list[Tensor] = []
    inside = False

    def run(block: nn.Module, args: Any) -> None:
        nonlocal inside
        if inside:
            return
        inside = True
        with span.paused():
            results.append(_run(span, given))
        inside = False

    first, *later = [
        span.module.get_submodule(span.block_path(i)) for i in range(span.start, span.end)
    ]
    hooks = [one.register_forward_pre_hook(run) for one in (*first.modules(), *later)]
    try:
        yield results
    finally:
        for hook in hooks:
            hook.remove()


def _compare_padded(
    config: PreTrainedConfig, whole: PreTrainedModel, spans: list[SpanModel], prompt: Tensor
) -> None:
    accepts = inspect.signature(whole.forward).parameters
    if "attention_mask" not in accepts:
        return
    mask = torch.ones_like(prompt)
    mask[1, :_PADDING_TOKENS] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    arguments = {"input_ids": prompt, "attention_mask": mask}
    if "position_ids" in accepts:
        arguments["position_ids"] = positions
    padded = _chain(spans, prompt, attention_mask=mask, position_ids=positions)
    if not torch.equal(padded, _logits(whole, **arguments)):
        raise _refused(config, "a left-padded batch over spans differs from the whole model's")


def _compare_decoding(
    config: PreTrainedConfig, whole: PreTrainedModel, spans: list[SpanModel], prompt: Tensor
) -> None:
    accepts = inspect.signature(whole.forward).parameters
    keyword = "past_key_values" if "past_key_values" in accepts else "cache_params"
    cache = DynamicCache(config=config)
    caches = [span.new_cache() for span in spans]
    others = [span.new_cache() for span in spans]
    wanted = _logits(whole, input_ids=prompt, use_cache=True, **{keyword: cache})
    got = _chain(spans, prompt, caches)
    _chain(spans, _tokens(config, _PROMPT_TOKENS - 4), others)
    seen = prompt
    for _ in range(_STEPS):
        if not torch.equal(got, wanted):
            raise _refused(config, "cached decoding over spans differs from the whole model's")
        token = _tokens(config, 1)
        seen = torch.cat([seen, token], dim=1)
        wanted = _logits(whole, input_ids=token, use_cache=True, **{keyword: cache})
        got = _chain(spans, token, caches)
        _chain(spans, token, others)
    recomputed = _chain(spans, seen)[:, -1:]
    off_by = (got - recomputed).abs().max()
    context_counts_for = (_chain(spans, token) - recomputed).abs().max()
    if not 10 * off_by < context_counts_for:
        raise _refused(
            config,
            f"cached decoding is off by {off_by:.1e} from recomputing the sequence (the context "
            f"counts for {context_counts_for:.1e}), so it keeps state outside its cache",
        )


def _run(span: SpanModel, given: Tensor) -> Tensor:
    """What one span makes of token ids, if it is the first, or hidden states."""
    result = span.run(
        input_ids=given if span.is_first else None, hidden=None if span.is_first else given
    )
    if result is None:
        raise ModelTypeRefused("a span returned nothing although no hook ended its forward")
    return result


def _chain(
    spans: list[SpanModel],
    input_ids: Tensor,
    caches: list[SpanCache] | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> Tensor:
    hidden: Tensor | None = None
    for index, span in enumerate(spans):
        hidden = span.run(
            input_ids=input_ids if span.is_first else None,
            hidden=hidden,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=None if caches is None else caches[index],
        )
    if hidden is None:
        raise ModelTypeRefused("a span returned nothing although no hook ended its forward")
    return hidden


def _logits(model: PreTrainedModel, **arguments: Any) -> Tensor:
    logits: Tensor = model(**arguments).logits
    return logits


def _tokens(config: PreTrainedConfig, tokens: int) -> Tensor:
    vocabulary: int = config.get_text_config().vocab_size
    return torch.randint(_FIRST_PLAIN_TOKEN, vocabulary, (2, tokens))


def _refuse_growing_rope(config: PreTrainedConfig) -> None:
    ropes = config.get_text_config().to_dict().get("rope_parameters") or {}
    for rope in (ropes, *(value for value in ropes.values() if isinstance(value, dict))):
        if rope.get("rope_type") == "dynamic":
            raise _refused(
                config,
                "its rotary table (rope_type 'dynamic') grows with the longest sequence seen, so "
                "one client's result would depend on another's",
            )


def _tiny_model(
    config: PreTrainedConfig, attention: Attention
) -> tuple[PreTrainedConfig, PreTrainedModel]:
    """The smallest model of this kind that works, and its configuration.

    Sizes depend on each other in ways that no general rule knows, so several are tried.
    """
    why = "no smaller size was found"
    model_class = model_class_for(config)
    for settings in _smaller(config):
        try:
            tiny = type(config)(**settings)
            tiny._attn_implementation = HF_ATTENTION[attention]
            with torch.device("meta"):
                size = sum(parameter.numel() for parameter in model_class(tiny).parameters())
            if size > _MOST_PARAMETERS:
                why = (
                    f"the smallest copy that works has more than {_MOST_PARAMETERS:.0e} parameters"
                )
                continue
            # A weight that requires a gradient can take another matmul kernel, even under no_grad.
            whole = model_class(tiny).requires_grad_(False)
            whole.train(False)
            logits = _logits(whole, input_ids=_tokens(tiny, _PROMPT_TOKENS))
            if bool(logits.isfinite().all()):
                return tiny, whole
            why = "random weights give no finite result"
        except Exception as error:
            if is_out_of_memory(error):
                raise
            why = first_line(error)
    raise ModelTypeRefused(
        f"model type {config.model_type!r} could not be tested, because no tiny copy of it runs "
        f"({why}); serve another model"
    )


def _smaller(config: PreTrainedConfig) -> Iterator[dict[str, Any]]:
    """Settings of smaller and smaller likeness to `config`, smallest first."""
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", None) or 1
    hidden: int = text.hidden_size
    head_dim = getattr(text, "head_dim", None) or hidden // heads
    narrow = [f for f in (64, 32, 16, 8, 4, 2, 1) if head_dim % f == 0 and head_dim // f >= 4]
    fewer = [g for g in (32, 16, 8, 4, 2, 1) if heads % g == 0 and heads // g >= 2] or [1]
    for cut_blocks in (True, False):
        for by_width in narrow[:4]:
            for by_heads in dict.fromkeys((*fewer[:3], 1)):
                yield _shrink(config.to_dict(), by_width, by_heads, cut_blocks)


def _shrink(
    settings: dict[str, Any], by_width: int, by_heads: int, cut_blocks: bool
) -> dict[str, Any]:
    """A copy of `settings` with narrower heads, fewer heads, and fewer blocks where asked for."""
    small = copy.deepcopy(settings)
    n_blocks = next(
        (
            small[name]
            for name in ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
            if isinstance(small.get(name), int)
        ),
        None,
    )
    kept = _kept_blocks(small, n_blocks) if cut_blocks and n_blocks else n_blocks
    for name, value in settings.items():
        if name in ("rope_parameters", "rope_scaling") and isinstance(value, dict):
            small[name] = _plain_rope(value)
        elif isinstance(value, dict) and name.endswith("_config"):
            small[name] = _shrink(value, by_width, by_heads, cut_blocks)
        elif isinstance(value, list) and n_blocks and len(value) == n_blocks:
            small[name] = value[:kept]
        elif isinstance(value, int) and not isinstance(value, bool):
            small[name] = _smaller_number(name, value, by_width, by_heads, n_blocks, kept)
    for name in ("dtype", "torch_dtype", "model_type", "transformers_version", "architectures"):
        small.pop(name, None)
    return small


def _smaller_number(
    name: str, value: int, by_width: int, by_heads: int, n_blocks: int | None, kept: int | None
) -> int:
    if name in ("num_hidden_layers", "n_layer", "num_layers", "n_layers") and kept is not None:
        return kept
    if "vocab_size" in name:
        return min(value, _VOCABULARY)
    if name.endswith("_token_id"):
        return min(value, _FIRST_PLAIN_TOKEN - 1)
    if name in ("first_k_dense_replace", "num_kv_shared_layers"):
        return min(value, 2)
    if "expert" in name and not _WIDTH.search(name):
        return min(value, 2 if re.search(r"per_tok|shared|top_?k", name) else 8)
    if re.search(r"top_?k|topk_group|n_group$", name):
        return min(value, 2)
    if _WINDOW.search(name):
        return min(value, 8)
    if _POSITIONS.search(name):
        return min(value, 512)
    if _HEADS.search(name):
        return max(1, value // by_heads)
    if _PER_HEAD.search(name):
        return max(1, value // by_width)
    if _WIDTH.search(name) and not _KEPT.search(name) and value >= by_width:
        return -(-value // (by_width * by_heads))
    return value


def _kept_blocks(settings: dict[str, Any], n_blocks: int) -> int:
    """How many blocks hold every kind of block that the model has."""
    kept = min(_BLOCKS, n_blocks) if n_blocks > 2 else _BLOCKS
    for value in settings.values():
        if isinstance(value, list) and len(value) == n_blocks:
            kinds = {repr(item) for item in value}
            while len({repr(item) for item in value[:kept]}) < len(kinds) and kept < _MOST_BLOCKS:
                kept += 1
    return kept


def _plain_rope(rope: dict[str, Any]) -> dict[str, Any]:
    """Rotary settings without the tables and lengths that fit one head size only."""
    plain: dict[str, Any] = {}
    for name, value in rope.items():
        if isinstance(value, dict):
            plain[name] = _plain_rope(value)
        elif name in ("rope_type", "rope_theta", "partial_rotary_factor"):
            plain[name] = "default" if name == "rope_type" else value
    return plain
