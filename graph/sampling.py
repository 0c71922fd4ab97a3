"""How the tokens of a generation are chosen: plain numbers, with transformers' names and meanings.

A closed list. Whoever runs the last block builds transformers' own processors from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, astuple, dataclass, fields
from typing import Any, Final

from glasshive.graph.errors import BadGraph

MAX_STOP_TOKENS: Final = 64
MAX_NGRAM: Final = 64
MAX_LISTED_TOKENS: Final = 1024
MAX_SEQUENCES: Final = 1024
MAX_SEQUENCE_TOKENS: Final = 4096  # of all sequences of one field
MAX_ELEMENTS: Final = 16_384  # what all fields hold at most, lists and what is in them
WITHOUT_CHANCE: Final[Mapping[str, Any]] = {
    "temperature": 1.0,
    "top_h": 0.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}
"""What only chance asks for, as it is where the most likely token is taken."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """The fields of transformers' GenerationConfig that peers keep to, and the seed of chance.

    Without `do_sample` the most likely token is taken. A row ends with one of `eos_token_id`, and
    goes on with `pad_token_id` as long as others do not end. Chance is a function of the seed, the
    invoke, the row and the step, so that it does not matter who draws. Where transformers has None
    it is here what leaves the scores as they are: 0 or 1, an empty tuple, -1 for no token.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_h: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0
    repetition_penalty: float = 1.0
    encoder_repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    encoder_no_repeat_ngram_size: int = 0
    min_length: int = 0
    min_new_tokens: int = 0
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    sequence_bias: tuple[tuple[tuple[int, ...], float], ...] = ()
    exponential_decay_length_penalty: tuple[int, float] | tuple[()] = ()
    forced_bos_token_id: int = -1
    forced_eos_token_id: tuple[int, ...] = ()
    remove_invalid_values: bool = False
    renormalize_logits: bool = False
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int = 0
    seed: int = 0

    def check(self, vocabulary_tokens: int) -> None:
        """Return if every field is one that transformers takes. Raises BadGraph naming the first.

        A token outside the vocabulary would end a process that computes on a GPU.
        """
        for name, value in asdict(self).items():
            is_good, wanted = _RULES[name]
            if not is_good(value):
                raise BadGraph(f"{name}={value!r:.40}: {wanted} is wanted")
        for name, token in self._listed():
            if not 0 <= token < vocabulary_tokens:
                raise BadGraph(
                    f"{name}={token} is not in the vocabulary of {vocabulary_tokens} tokens"
                )
        if self.exponential_decay_length_penalty and not self.eos_token_id:
            raise BadGraph(
                "exponential_decay_length_penalty without eos_token_id: it raises the score of "
                "stop tokens"
            )
        stops = {(one,) for one in self.eos_token_id}
        if self.bad_words_ids and stops.issuperset(self.bad_words_ids):
            raise BadGraph(
                f"bad_words_ids={self.bad_words_ids!r:.40}: these are stop tokens, which "
                "transformers leaves out of it"
            )

    def _listed(self) -> Iterator[tuple[str, int]]:
        """Every token that is named, and by which field."""
        yield "pad_token_id", self.pad_token_id
        if self.forced_bos_token_id != -1:
            yield "forced_bos_token_id", self.forced_bos_token_id
        for name, tokens in (
            ("suppress_tokens", self.suppress_tokens),
            ("begin_suppress_tokens", self.begin_suppress_tokens),
            ("forced_eos_token_id", self.forced_eos_token_id),
            ("eos_token_id", self.eos_token_id),
        ):
            for token in tokens:
                yield name, token
        for tokens in self.bad_words_ids:
            for token in tokens:
                yield "bad_words_ids", token
        for tokens, _ in self.sequence_bias:
            for token in tokens:
                yield "sequence_bias", token

    def to_plain(self) -> list[Any]:
        """The fields in order, for msgpack."""
        return list(astuple(self))

    @classmethod
    def from_plain(cls, plain: object) -> Sampling:
        """What `to_plain` gave. Raises BadGraph for anything else."""
        if not isinstance(plain, tuple) or len(plain) != len(fields(cls)):
            raise BadGraph(f"how tokens are chosen: a list of {len(fields(cls))} is wanted")
        named: dict[str, Any] = {
            field.name: one for field, one in zip(fields(cls), plain, strict=True)
        }
        return cls(**named)


def _whole(low: int, high: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and low <= value <= high


def _number(low: float, high: float, *, open_below: bool = False) -> Callable[[Any], bool]:
    def is_good(value: Any) -> bool:
        return (
            type(value) is float
            and math.isfinite(value)
            and low <= value <= high
            and not (open_below and value == low)
        )

    return is_good


def _tokens(most: int, least: int = 0) -> Callable[[Any], bool]:
    return lambda value: (
        isinstance(value, tuple)
        and least <= len(value) <= most
        and all(type(one) is int for one in value)
    )


_is_sequence: Final = _tokens(MAX_NGRAM, 1)


def _sequences(value: Any) -> bool:
    return (
        isinstance(value, tuple)
        and len(value) <= MAX_SEQUENCES
        and all(map(_is_sequence, value))
        and sum(map(len, value)) <= MAX_SEQUENCE_TOKENS
    )


def _biases(value: Any) -> bool:
    if not isinstance(value, tuple) or len(value) > MAX_SEQUENCES:
        return False
    return all(
        isinstance(pair, tuple)
        and len(pair) == 2
        and type(pair[1]) is float
        and (math.isfinite(pair[1]) or pair[1] == -math.inf)
        for pair in value
    ) and _sequences(tuple(tokens for tokens, _ in value))


def _decay(value: Any) -> bool:
    return value == () or (
        isinstance(value, tuple)
        and len(value) == 2
        and _whole(0, 1 << 24)(value[0])
        and _number(0.0, 1e6, open_below=True)(value[1])
    )


def _flag(value: Any) -> bool:
    return type(value) is bool


_FLAG: Final = (_flag, "True or False")
_PART: Final = (_number(0.0, 1.0), "a number from 0 to 1")
_MASS: Final = (_number(0.0, 1.0, open_below=True), "a number above 0 and at most 1")
_FACTOR: Final = (_number(0.0, 1e6, open_below=True), "a number above 0")
_NGRAM: Final = (_whole(0, MAX_NGRAM), f"a whole number from 0 to {MAX_NGRAM}")
_COUNT: Final = (_whole(0, 1 << 24), "a whole number from 0 on")
_STOPS: Final = (_tokens(MAX_STOP_TOKENS), f"at most {MAX_STOP_TOKENS} tokens' ids")
_LISTED: Final = (_tokens(MAX_LISTED_TOKENS), f"a list of at most {MAX_LISTED_TOKENS} tokens' ids")
_SEQUENCES: Final = (
    f"at most {MAX_SEQUENCES} lists of 1 to {MAX_NGRAM} tokens' ids, {MAX_SEQUENCE_TOKENS} in all"
)
_RULES: Final[Mapping[str, tuple[Callable[[Any], bool], str]]] = {
    "do_sample": _FLAG,
    "temperature": _FACTOR,
    "top_h": _PART,
    "top_k": (_whole(0, 1 << 31), "a whole number from 0 on (0: all tokens)"),
    "top_p": _MASS,
    "min_p": _PART,
    "typical_p": _MASS,
    "epsilon_cutoff": _PART,
    "eta_cutoff": _PART,
    "repetition_penalty": _FACTOR,
    "encoder_repetition_penalty": _FACTOR,
    "no_repeat_ngram_size": _NGRAM,
    "encoder_no_repeat_ngram_size": _NGRAM,
    "min_length": _COUNT,
    "min_new_tokens": _COUNT,
    "suppress_tokens": _LISTED,
    "begin_suppress_tokens": _LISTED,
    "bad_words_ids": (_sequences, _SEQUENCES),
    "sequence_bias": (_biases, f"[tokens, number] pairs, of {_SEQUENCES},"),
    "exponential_decay_length_penalty": (
        _decay,
        "a pair of after how many new tokens it begins and a factor above 0",
    ),
    "forced_bos_token_id": (_whole(-1, 1 << 31), "a token's id"),
    "forced_eos_token_id": _STOPS,
    "remove_invalid_values": _FLAG,
    "renormalize_logits": _FLAG,
    "eos_token_id": _STOPS,
    "pad_token_id": (_whole(0, 1 << 31), "a token's id"),
    "seed": (_whole(0, (1 << 63) - 1), "a whole number from 0 to 2**63 - 1"),
}
