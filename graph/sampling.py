"""How the tokens of a generation are chosen: plain numbers, with transformers' names and meanings.

A closed list. Whoever runs the last block builds transformers' own processors from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, astuple, dataclass, fields
from typing import Any, Final

from glasshive.graph.errors import BadGraph

MAX_STOP_TOKENS: Final = 64
MAX_NGRAM: Final = 64
WITHOUT_CHANCE: Final[Mapping[str, Any]] = {
    "temperature": 1.0,
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
    invoke, the row and the step, so that it does not matter who draws.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    min_new_tokens: int = 0
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
        for name, token in [("pad_token_id", self.pad_token_id)] + [
            ("eos_token_id", one) for one in self.eos_token_id
        ]:
            if not 0 <= token < vocabulary_tokens:
                raise BadGraph(
                    f"{name}={token} is not in the vocabulary of {vocabulary_tokens} tokens"
                )

    def to_plain(self) -> list[Any]:
        """The fields in order, for msgpack."""
        return [list(value) if isinstance(value, tuple) else value for value in astuple(self)]

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


def _tokens(value: Any) -> bool:
    return (
        isinstance(value, tuple)
        and len(value) <= MAX_STOP_TOKENS
        and all(type(one) is int for one in value)
    )


_TOKEN: Final = (_whole(0, 1 << 31), "a token's id")
_PART: Final = "a number from 0 to 1"
_RULES: Final[Mapping[str, tuple[Callable[[Any], bool], str]]] = {
    "do_sample": (lambda value: type(value) is bool, "True or False"),
    "temperature": (_number(0.0, 1e6, open_below=True), "a number above 0"),
    "top_k": (_whole(0, 1 << 31), "a whole number from 0 on (0: all tokens)"),
    "top_p": (_number(0.0, 1.0, open_below=True), "a number above 0 and at most 1"),
    "min_p": (_number(0.0, 1.0), _PART),
    "typical_p": (_number(0.0, 1.0, open_below=True), "a number above 0 and at most 1"),
    "epsilon_cutoff": (_number(0.0, 1.0), _PART),
    "eta_cutoff": (_number(0.0, 1.0), _PART),
    "repetition_penalty": (_number(0.0, 1e6, open_below=True), "a number above 0"),
    "no_repeat_ngram_size": (_whole(0, MAX_NGRAM), f"a whole number from 0 to {MAX_NGRAM}"),
    "min_new_tokens": (_whole(0, 1 << 24), "a whole number from 0 on"),
    "eos_token_id": (_tokens, f"at most {MAX_STOP_TOKENS} tokens' ids"),
    "pad_token_id": _TOKEN,
    "seed": (_whole(0, (1 << 63) - 1), "a whole number from 0 to 2**63 - 1"),
}
