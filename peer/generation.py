"""What enters a forward pass, and what a generation keeps on a span between its passes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from glasshive.graph.order import Pass
from glasshive.graph.sampling import Sampling
from glasshive.peer.errors import WrongInput
from glasshive.peer.sampler import Sampler
from glasshive.peer.span_cache import SpanCache
from glasshive.peer.span_model import SpanModel


@dataclass(frozen=True, slots=True)
class PassInputs:
    """What enters a forward pass: token ids, mask and positions if padded.

    `input_ids`, `attention_mask` and `position_ids` are int64 `[batch, seq]`. The tokens are those
    of the first span; of a generation's prompt the last one has them too, to choose the next ones.
    They are those of a whole prompt, also where that is run in chunks.
    """

    input_ids: Tensor | None = None
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None

    def of_chunk(self, past: int, seq: int) -> PassInputs:
        """What enters a pass of so many tokens of this prompt, which follow so many others.

        Its mask is that of all tokens so far, as transformers has it.
        """
        now = slice(past, past + seq)
        ids, mask, positions = self.input_ids, self.attention_mask, self.position_ids
        return PassInputs(
            None if ids is None else ids[:, now],
            None if mask is None else mask[:, : now.stop],
            None if positions is None else positions[:, now],
        )

    def of_step(self, step: int, tokens: Tensor | None, *, masked: bool) -> PassInputs:
        """What enters a step behind this prompt: the tokens chosen before, int64 `[batch]`.

        `masked` is whether the model takes the prompt's mask there, longer by the new tokens.
        """
        mask = self.attention_mask if masked else None
        positions = self.position_ids
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(mask), step)], 1)
        if positions is not None:
            positions = positions[:, -1:] + step
        return PassInputs(None if tokens is None else tokens[:, None], mask, positions)

    def on(self, device: torch.device) -> PassInputs:
        """The same on `device`."""
        return PassInputs(
            *(
                None if one is None else one.to(device)
                for one in (self.input_ids, self.attention_mask, self.position_ids)
            )
        )


@dataclass(slots=True)
class Generation:
    """What a generation keeps on this span between its steps."""

    prompt: PassInputs
    cache: SpanCache
    sampler: Sampler | None

    @classmethod
    def begin(
        cls,
        model: SpanModel,
        prompt: PassInputs,
        one: Pass,
        sampling: Sampling | None,
        new_tokens: int,
    ) -> Generation:
        """The state before the first pass of a prompt and so many new tokens at most.

        Raises WrongInput without the tokens to go on from.
        """
        sampler = None
        if sampling is not None:
            if prompt.input_ids is None:
                raise WrongInput("the prompt's tokens did not come to where the next are chosen")
            ids, mask = prompt.input_ids, prompt.attention_mask
            sampler = Sampler(model, sampling, one, ids, mask, new_tokens)
        return cls(prompt, model.new_cache(), sampler)
