"""What a researcher says of the choice of tokens, in transformers' names, as what peers keep to."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Final

import torch

from glasshive.client.errors import TraceError
from glasshive.client.source_lines import here
from glasshive.graph.errors import BadGraph
from glasshive.graph.sampling import WITHOUT_CHANCE, Sampling

HABITS: Final[Mapping[str, str]] = {
    "remote": "a trace always runs on the peers of the model's swarm (in this process for "
    "glasshive.local)",
    "backend": "a trace always runs on the peers of the model's swarm",
    "scan": "shapes are always checked while the body is recorded",
    "validate": "shapes are always checked while the body is recorded",
    "trace": "the body is always recorded",
    **dict.fromkeys(
        ("input_ids", "attention_mask"),
        "what a tokenizer gave is the prompt, whole: generate(inputs, max_new_tokens=...)",
    ),
}
"""What NNsight takes besides, and why it is not needed here."""
# What makes no difference to which tokens are chosen, or is said elsewhere.
_BESIDE: Final = frozenset(
    {
        *("max_length", "max_new_tokens", "max_time", "bos_token_id", "decoder_start_token_id"),
        *("use_cache", "cache_implementation", "cache_config", "low_memory", "is_assistant"),
        *("early_stopping", "length_penalty", "diversity_penalty", "num_beam_groups"),
        *("output_attentions", "output_hidden_states", "output_scores", "output_logits"),
        *("return_dict_in_generate", "return_legacy_cache", "compile_config", "disable_compile"),
        *("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_early_exit"),
        *("assistant_confidence_threshold", "assistant_lookbehind", "target_lookbehind"),
        *("transformers_version", "continuous_batching_config"),
        *("max_matching_ngram_size", "prompt_lookup_num_tokens"),
    }
)
_CHUNKS: Final = "prefill_chunk_size"
_OURS: Final = tuple(one.name for one in fields(Sampling) if one.name != "seed")
_MAX_SEED: Final = 2**63 - 1


def sampling_of(
    configured: Any, choice: Mapping[str, object], seed: int | None, vocabulary_tokens: int
) -> tuple[Sampling, int | None, int]:
    """How tokens are chosen, how many the model's own configuration says, if it does, and how many
    of the prompt are run at a time: 0 for all.

    `configured` is the model's GenerationConfig; `choice` goes before it, and transformers' own
    defaults come last, as in its `generate`. Raises TraceError for what no peer does.
    """
    from transformers import GenerationConfig

    merged: Any = GenerationConfig()  # type: ignore[no-untyped-call]
    own = copy.deepcopy(configured)
    merged.update(**own.to_dict(), defaults_only=True, allow_custom_entries=False)
    merged.update(**own._get_default_generation_params(), defaults_only=True)
    known = merged.to_dict()
    for name in choice:
        if (why := HABITS.get(name)) is not None:
            raise TraceError(f"generate({name}=...) is no option here: {why}", line=here())
        if name in _BESIDE:
            instead = "say max_new_tokens=" if name == "max_length" else "leave it out"
            raise TraceError(
                f"generate({name}={choice[name]!r:.40}) has no meaning here; {instead}", line=here()
            )
        if name not in known or name.startswith("_"):
            near = difflib.get_close_matches(name, [*_OURS, _CHUNKS, "max_new_tokens", "seed"], n=1)
            raise TraceError(
                f"generate({name}={choice[name]!r:.40}) is no option here"
                + (
                    f"; did you mean {near[0]}?"
                    if near
                    else f"; there are {', '.join([*_OURS, _CHUNKS])}"
                ),
                line=here(),
            )
    merged.update(**choice)
    _check_others(merged, choice)
    stops = merged.eos_token_id
    stops = tuple(stops) if isinstance(stops, list | tuple) else () if stops is None else (stops,)
    pad = merged.pad_token_id
    if not merged.do_sample and seed is not None:
        raise TraceError(
            f"seed={seed!r:.40} has no effect without do_sample=True: the likeliest token is "
            "taken; leave it out",
            line=here(),
        )
    given = merged.to_dict() if merged.do_sample else WITHOUT_CHANCE
    sampling = Sampling(
        do_sample=merged.do_sample or False,
        temperature=_float(given["temperature"], 1.0),
        top_k=given["top_k"] or 0,
        top_p=_float(given["top_p"], 1.0),
        min_p=_float(given["min_p"], 0.0),
        typical_p=_float(given["typical_p"], 1.0),
        epsilon_cutoff=_float(given["epsilon_cutoff"], 0.0),
        eta_cutoff=_float(given["eta_cutoff"], 0.0),
        repetition_penalty=_float(merged.repetition_penalty, 1.0),
        no_repeat_ngram_size=merged.no_repeat_ngram_size or 0,
        min_new_tokens=merged.min_new_tokens or 0,
        eos_token_id=stops,
        pad_token_id=(stops[0] if stops else 0) if pad is None else pad,
        seed=_seed(seed) if merged.do_sample else 0,
    )
    try:
        sampling.check(vocabulary_tokens)
    except BadGraph as error:
        raise TraceError(str(error), line=here()) from None
    return sampling, merged.max_new_tokens, _chunk_tokens(merged.prefill_chunk_size)


def _chunk_tokens(asked: object) -> int:
    if asked is None:
        return 0
    if type(asked) is not int or asked < 1:
        raise TraceError(
            f"{_CHUNKS}={asked!r:.40}; how many tokens of a prompt are run at a time is wanted, "
            "from 1 on, or None for all",
            line=here(),
        )
    return asked


def _check_others(merged: Any, choice: Mapping[str, object]) -> None:
    """Raise TraceError for a setting that would change the tokens, and that no peer knows."""
    neutral = type(merged)()._get_default_generation_params()
    for name, value in merged.to_dict().items():
        if name in (*_OURS, _CHUNKS) or name in _BESIDE or name.startswith("_"):
            continue
        if value in (None, False, neutral.get(name)) or value in ([], {}):
            continue
        whose = "" if name in choice else " in the model's own generation_config"
        raise TraceError(
            f"{name}={value!r:.40}{whose}: peers choose one token after the other, by "
            f"{', '.join(_OURS)}; leave it out"
            + ("" if name in choice else f", with generate({name}=...) as transformers has it"),
            line=here(),
        )


def _float(value: object, default: float) -> Any:
    return default if value is None else float(value) if isinstance(value, int) else value


def _seed(seed: int | None) -> int:
    if seed is None:
        return int(torch.randint(_MAX_SEED, (), device="cpu").item())
    if type(seed) is not int or not 0 <= seed <= _MAX_SEED:
        raise TraceError(
            f"seed={seed!r:.40}; a whole number from 0 to 2**63 - 1 is wanted", line=here()
        )
    return seed
