"""What a researcher says of the choice of tokens, in transformers' names, as what peers keep to."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from glasshive.client.errors import TraceError
from glasshive.client.source_lines import here, warn_here
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
        *("bos_token_id", "decoder_start_token_id", "max_cache_len"),
        *("use_cache", "cache_implementation", "cache_config", "low_memory", "is_assistant"),
        *("early_stopping", "length_penalty", "diversity_penalty", "num_beam_groups"),
        *("output_attentions", "output_hidden_states", "output_scores", "output_logits"),
        *("return_dict_in_generate", "return_legacy_cache", "compile_config", "disable_compile"),
        *("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_early_exit"),
        *("assistant_confidence_threshold", "assistant_lookbehind", "target_lookbehind"),
        *("transformers_version", "continuous_batching_config", "speculation_type", "use_mtp"),
        *("max_matching_ngram_size", "prompt_lookup_num_tokens"),
    }
)
_BEAMS: Final = "peers follow one row of tokens for each prompt, not several beams"
# What would change the tokens and is not done, and why.
_REFUSED: Final[Mapping[str, str]] = {
    "max_time": "a generation has deadline= instead, and one that reaches it fails; "
    "tracer.cancel() ends it early and keeps its tokens",
    "num_beams": _BEAMS,
    "constraints": _BEAMS,
    "force_words_ids": _BEAMS,
    "num_return_sequences": "each row gives one; repeat the prompt, as in "
    "generate([prompt] * 3, do_sample=True)",
    "penalty_alpha": "contrastive search runs the model again for each candidate",
    "dola_layers": "it compares the logits of several blocks, which lie on several peers; a trace "
    "can do that: read them and write model.generator.output",
    "guidance_scale": "it runs the model a second time for each token; a trace can do that with "
    "two invokes",
    "stop_strings": "the peer that chooses tokens has no tokenizer; eos_token_id= takes tokens",
    "token_healing": "the peer that chooses tokens has no tokenizer",
    "watermarking_config": "it draws a list of tokens for each row and step, beside the seeds here",
    "assistant_ensemble_weight": "there is no second model beside this one",
}
_CHUNKS: Final = "prefill_chunk_size"
_OURS: Final = tuple(one.name for one in fields(Sampling) if one.name != "seed")
_LENGTHS: Final = ("max_new_tokens", "max_length")
_NEUTRAL: Final[Mapping[str, Any]] = asdict(Sampling())
_MAX_SEED: Final = 2**63 - 1


@dataclass(frozen=True, slots=True)
class TokenChoice:
    """What a researcher and a model's configuration say of a generation.

    `max_new_tokens` and `max_length`, of which the first goes before, are as they were given, and
    None where nothing is said. `chunk_tokens` is how many of a prompt run at a time: 0 for all.
    """

    sampling: Sampling
    max_new_tokens: Any
    max_length: Any
    chunk_tokens: int

    def new_tokens(self, prompt_tokens: int) -> Any:
        """How many tokens come behind a prompt at most, None if nothing says it."""
        if self.max_new_tokens is not None or self.max_length is None:
            return self.max_new_tokens
        if type(self.max_length) is not int or self.max_length <= prompt_tokens:
            raise TraceError(
                f"max_length={self.max_length!r:.40} and a prompt of {prompt_tokens} tokens, which "
                "count too; say how many new ones with max_new_tokens=",
                line=here(),
            )
        return self.max_length - prompt_tokens


def choice_of(
    configured: Any, choice: Mapping[str, object], seed: int | None, vocabulary_tokens: int
) -> TokenChoice:
    """How tokens are chosen, and how many.

    `configured` is the model's GenerationConfig; `choice` goes before it, and transformers' own
    defaults come last, as in its `generate`. Raises TraceError for what no peer does.
    """
    from transformers import GenerationConfig

    plain: Any = GenerationConfig()  # type: ignore[no-untyped-call]
    defaults = plain.to_dict() | plain._get_default_generation_params() | {"max_length": None}
    choice = {name: _untensored(value) for name, value in choice.items()}
    _check_names(choice, defaults)
    own = {name: value for name, value in configured.to_dict().items() if value is not None}
    values = defaults | {name: own[name] for name in own.keys() & defaults.keys()} | choice
    _check_others(values, defaults, choice)
    is_drawn = values["do_sample"] or False
    if not is_drawn and seed is not None:
        raise TraceError(
            f"seed={seed!r:.40} has no effect without do_sample=True: the likeliest token is "
            "taken; leave it out",
            line=here(),
        )
    stops = _listed(values["eos_token_id"])
    pad = values["pad_token_id"]
    asked: dict[str, Any] = {name: _asked(name, values[name]) for name in _OURS}
    if not is_drawn:
        _warn_without_chance(choice, defaults)
        asked |= WITHOUT_CHANCE
    if values["min_new_tokens"] is not None:
        asked["min_length"] = 0  # transformers goes by the other then
    for name in ("suppress_tokens", "begin_suppress_tokens"):
        asked[name] = _in_vocabulary(asked[name], vocabulary_tokens)
    asked |= {
        "do_sample": is_drawn,
        "eos_token_id": stops,
        "pad_token_id": (stops[0] if stops else 0) if pad is None else pad,
        "seed": _seed(seed) if is_drawn else 0,
    }
    sampling = Sampling(**asked)
    try:
        sampling.check(vocabulary_tokens)
    except BadGraph as error:
        raise TraceError(str(error), line=here()) from None
    chunk_tokens = _chunk_tokens(values[_CHUNKS])
    return TokenChoice(sampling, values["max_new_tokens"], values["max_length"], chunk_tokens)


def _warn_without_chance(choice: Mapping[str, object], defaults: Mapping[str, object]) -> None:
    """Warn of what was written in this call and makes no difference, as chance decides nothing."""
    idle = [
        f"{name}={choice[name]!r:.40}"
        for name in choice.keys() & WITHOUT_CHANCE.keys()
        if choice[name] not in (None, WITHOUT_CHANCE[name], defaults[name])
    ]
    if idle:
        have = "has" if len(idle) == 1 else "have"
        warn_here(f"{' and '.join(sorted(idle))} {have} no effect without do_sample=True")


def _check_names(choice: Mapping[str, object], known: Mapping[str, object]) -> None:
    """Raise TraceError for an option that transformers doesn't have, or that says nothing here."""
    for name, value in choice.items():
        if (why := HABITS.get(name)) is not None:
            raise TraceError(f"generate({name}=...) is no option here: {why}", line=here())
        if name not in known or name.startswith("_"):
            near = difflib.get_close_matches(name, [*_OURS, *_LENGTHS, _CHUNKS, "seed"], n=1)
            raise TraceError(
                f"generate({name}={value!r:.40}) is no option here"
                + (
                    f"; did you mean {near[0]}?"
                    if near
                    else f"; there are {', '.join([*_OURS, *_LENGTHS, _CHUNKS])}"
                ),
                line=here(),
            )
        if name in _OURS and not _is_plain(value):
            raise TraceError(
                f"generate({name}={value!r:.40}): numbers, or lists of them, are wanted",
                line=here(),
            )
        if name in _BESIDE and value is not None:
            raise TraceError(
                f"generate({name}={value!r:.40}) has no meaning here; leave it out", line=here()
            )


def _check_others(
    values: Mapping[str, Any], neutral: Mapping[str, object], choice: Mapping[str, object]
) -> None:
    """Raise TraceError for a setting that would change the tokens, and that no peer knows."""
    for name, value in values.items():
        if name in (*_OURS, *_LENGTHS, _CHUNKS) or name in _BESIDE or name.startswith("_"):
            continue
        if value in (None, False, neutral.get(name)) or value in ([], {}):
            continue
        if name == "guidance_scale" and value == 1:
            continue
        whose = "" if name in choice else " in the model's own generation_config"
        why = _REFUSED.get(name, f"peers choose tokens by {', '.join(_OURS)}")
        raise TraceError(
            f"{name}={value!r:.40}{whose}: {why}; leave it out"
            + ("" if name in choice else f", with generate({name}={neutral.get(name)!r})"),
            line=here(),
        )


def _asked(name: str, value: Any) -> Any:
    """A setting of transformers as a field of Sampling; what is neither goes on, to be refused."""
    default = _NEUTRAL[name]
    if value is None:
        return default
    if isinstance(default, float):
        return _float(value)
    if name in ("bad_words_ids", "sequence_bias"):
        pairs = list(value.items()) if isinstance(value, Mapping) else value
        if not isinstance(pairs, list | tuple):
            return value
        if name == "bad_words_ids":
            return tuple(map(_listed, pairs))
        return tuple(
            (_listed(one[0]), _float(one[1]))
            if isinstance(one, list | tuple) and len(one) == 2
            else one
            for one in pairs
        )
    if name == "exponential_decay_length_penalty":
        decay = _listed(value)
        return (decay[0], _float(decay[1])) if len(decay) == 2 else decay
    return _listed(value) if isinstance(default, tuple) else value


def _listed(value: Any) -> tuple[Any, ...]:
    """One token or several; of None none."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _in_vocabulary(tokens: tuple[Any, ...], vocabulary_tokens: int) -> tuple[Any, ...]:
    """Without those that are never chosen anyway, such as the -1 of older configurations."""
    return tuple(one for one in tokens if type(one) is not int or 0 <= one < vocabulary_tokens)


def _is_plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, Mapping):
        return _is_plain(list(value.items()))
    return value is None or isinstance(value, int | float | str)


def _untensored(value: Any) -> Any:
    """What is said with a tensor or an array, as plain numbers."""
    return value.tolist() if isinstance(value, Tensor | np.ndarray | np.generic) else value


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


def _float(value: object) -> Any:
    """A whole number as a float, if it is not beyond all of those; anything else as it is."""
    return float(value) if isinstance(value, int) and abs(value) < 1 << 53 else value


def _seed(seed: int | None) -> int:
    if seed is None:
        return int(torch.randint(_MAX_SEED, (), device="cpu").item())
    if type(seed) is not int or not 0 <= seed <= _MAX_SEED:
        raise TraceError(
            f"seed={seed!r:.40}; a whole number from 0 to 2**63 - 1 is wanted", line=here()
        )
    return seed
