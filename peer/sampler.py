"""Chooses the next tokens of a generation from the logits, as transformers' `generate` does.

The processors are the model's own, built by transformers from its GenerationConfig. Greedy choices
are equal to `generate`'s. Where chance decides, `generate` draws from one generator for all rows
and steps; here each row and step has a seed of its own, so that a generation can be replayed from
any step, on any peer.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from typing import Any, Final

import torch
from torch import Tensor
from transformers import GenerationConfig

from glasshive.graph.errors import GraphError
from glasshive.graph.order import Pass
from glasshive.graph.sampling import WITHOUT_CHANCE, Sampling
from glasshive.peer.span_model import SpanModel

_NOT_THEIRS: Final = {"seed"}
# Which numbers are transformers' None; of the others it has a number that says the same.
_NONE: Final = {"min_p": 0.0, "top_h": 0.0, "min_new_tokens": 0, "forced_bos_token_id": -1}


class Sampler:
    """The choice of tokens behind one prompt, step by step, for all rows of its passes."""

    def __init__(
        self,
        model: SpanModel,
        sampling: Sampling,
        one: Pass,
        prompt: Tensor,
        mask: Tensor | None,
        new_tokens: int,
    ) -> None:
        self._sampling = sampling
        self._ids = prompt.to(model.device)
        self._goes_on = torch.ones(one.batch, dtype=torch.bool, device=model.device)
        self._rows = [
            (invoke, row)
            for invoke, (first, last) in zip(one.invokes, one.rows, strict=True)
            for row in range(last - first)
        ]
        self._step = 0
        self._vocabulary_tokens = int(model.config.get_text_config().vocab_size)
        self._processors = _processors(model, sampling, self._ids, mask, new_tokens)

    @property
    def tokens(self) -> Tensor:
        """The tokens behind which it goes on, int64 `[batch]`."""
        return self._ids[:, -1]

    @property
    def has_ended(self) -> bool:
        """Whether every row has come to a stop token."""
        return not bool(self._goes_on.any())

    def choose(self, logits: Tensor) -> Tensor:
        """The next token of every row, int64 `[batch]`, from logits `[batch, seq, vocabulary]`.

        Of a row that has ended it is the one for padding.
        """
        scores = logits[:, -1].to(copy=True, dtype=torch.float32)
        scores = self._processors(self._ids, scores)
        if self._sampling.do_sample:
            chosen = self._drawn(torch.softmax(scores, -1))
        else:
            chosen = scores.argmax(-1)
        return torch.where(self._goes_on, chosen, self._sampling.pad_token_id)

    def take(self, tokens: Tensor) -> None:
        """Go on behind these tokens, int64 `[batch]`, which need not be the chosen ones.

        Raises GraphError for one that is not in the vocabulary.
        """
        if int(tokens.min()) < 0 or int(tokens.max()) >= self._vocabulary_tokens:
            raise GraphError(
                f"a token that is written at the end of step {self._step} is not in the vocabulary "
                f"of {self._vocabulary_tokens}"
            )
        self._ids = torch.cat([self._ids, tokens[:, None]], 1)
        self._step += 1
        if self._sampling.eos_token_id:
            stops = torch.tensor(self._sampling.eos_token_id, device=tokens.device)
            self._goes_on &= ~torch.isin(tokens, stops)

    def _drawn(self, chances: Tensor) -> Tensor:
        """One token a row, `chances` being `[batch, vocabulary]`; drawn on the CPU, as anywhere."""
        drawn = [
            torch.multinomial(row, 1, generator=self._generator(invoke, index))
            for row, (invoke, index) in zip(chances.cpu(), self._rows, strict=True)
        ]
        return torch.cat(drawn).to(chances.device)

    def _generator(self, invoke: int, row: int) -> torch.Generator:
        where = f"{self._sampling.seed} {invoke} {row} {self._step}".encode()
        seed = int.from_bytes(hashlib.sha256(where).digest()[:8], "big") >> 1
        return torch.Generator().manual_seed(seed)


def _processors(
    model: SpanModel, sampling: Sampling, prompt: Tensor, mask: Tensor | None, new_tokens: int
) -> Any:
    """transformers' own list for this model, behind a prompt and for so many new tokens."""
    left_out = _NOT_THEIRS if sampling.do_sample else {*_NOT_THEIRS, *WITHOUT_CHANCE}
    named = asdict(sampling)
    config = GenerationConfig(  # type: ignore[no-untyped-call]
        **{name: _theirs(name, value) for name, value in named.items() if name not in left_out},
        max_length=prompt.shape[1] + new_tokens,
    )
    hosted: Any = model.module
    hosted._prepare_special_tokens(config, True, device=model.device)
    return hosted._get_logits_processor(
        generation_config=config,
        input_ids_seq_length=prompt.shape[1],
        encoder_input_ids=prompt,
        device=model.device,
        model_kwargs=None if mask is None else {"attention_mask": mask},
    )


def _theirs(name: str, value: Any) -> Any:
    """A field as transformers has it, whose processors are left out by None."""
    if value == _NONE.get(name, ()):
        return None
    if name == "sequence_bias":
        return dict(value)
    if name == "bad_words_ids":
        return [list(tokens) for tokens in value]
    return list(value) if isinstance(value, tuple) else value
