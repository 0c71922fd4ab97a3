"""Prompts in every form that researchers use, as token ids `[batch, seq]` and a mask if padded.

A list of prompts of unequal length is one left-padded batch; its position ids follow the mask, so
that a prompt's result does not depend on the padding beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from glasshive.client.errors import BadPrompt
from glasshive.client.source_lines import at_line
from glasshive.graph.order import InvokeShape

Prompt: TypeAlias = (
    "str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]] | Tensor | Mapping[str, Any]"
)


@dataclass(frozen=True, slots=True)
class Tokens:
    """The input of one invoke. `attention_mask` is None if no row is padded."""

    input_ids: Tensor
    attention_mask: Tensor | None

    @property
    def shape(self) -> InvokeShape:
        """Rows and tokens."""
        batch, seq = self.input_ids.shape
        return InvokeShape(batch, seq, self.attention_mask is not None)

    @property
    def mask(self) -> Tensor:
        """The attention mask, int64 `[batch, seq]`: 1 for a token, 0 for padding."""
        if self.attention_mask is not None:
            return self.attention_mask
        return torch.ones_like(self.input_ids)

    @property
    def position_ids(self) -> Tensor | None:
        """Positions counted from each row's first token; None if no row is padded."""
        if self.attention_mask is None:
            return None
        return (self.attention_mask.cumsum(-1) - 1).clamp(min=0)


def tokenize(
    prompt: Prompt, tokenizer: Any, *, vocabulary_tokens: int, max_tokens: int | None
) -> Tokens:
    """The token ids of a prompt. Raises BadPrompt, saying what was got and what is possible.

    `tokenizer` is a transformers tokenizer, needed for text only; None if the model has none.
    """
    rows, mask = _rows(prompt, tokenizer)
    empty = [index for index, row in enumerate(rows) if not row]
    if empty and len(rows) > 1:
        raise _bad(f"prompt {empty[0]} of {len(rows)} is empty; give each at least one token")
    if empty or not rows:
        raise _bad("an empty prompt; give at least one token")
    longest = max(map(len, rows))
    if max_tokens is not None and longest > max_tokens:
        raise _bad(
            f"a prompt of {longest} tokens; the model takes at most {max_tokens}; shorten it"
        )
    for row in rows:
        for token in row:
            if not 0 <= token < vocabulary_tokens:
                raise _bad(
                    f"token id {token} is not in the vocabulary of {vocabulary_tokens}; give ids "
                    "of this model's own tokenizer"
                )
    if mask is not None and list(map(len, mask)) != list(map(len, rows)):
        raise _bad(
            f"an attention mask with rows of {list(map(len, mask))} for ids with rows of "
            f"{list(map(len, rows))}; one number for each token is wanted"
        )
    if len(set(map(len, rows))) > 1:
        if mask is not None and not all(all(row) for row in mask):
            raise _bad("rows of unequal length whose mask leaves some tokens out; pad the ids")
        mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
        pad = _pad_id(tokenizer)
        rows = [[pad] * (longest - len(row)) + row for row in rows]
    ids = torch.tensor(rows, dtype=torch.int64)
    if mask is None:
        return Tokens(ids, None)
    masks = torch.tensor(mask, dtype=torch.int64)
    if bool((masks == 1).all()):
        return Tokens(ids, None)
    if not bool(((masks == 0) | (masks == 1)).all()) or bool((masks.diff(dim=-1) < 0).any()):
        raise _bad(
            "an attention mask that is not left padding (zeros, then ones in each row); set "
            "tokenizer.padding_side = 'left', or give the texts as a list"
        )
    if bool((masks.sum(-1) == 0).any()):
        raise _bad("an attention mask with a row of padding only")
    return Tokens(ids, masks)


def _rows(prompt: Any, tokenizer: Any) -> tuple[list[list[int]], list[list[int]] | None]:
    if isinstance(prompt, Mapping):
        if "input_ids" not in prompt:
            names = ", ".join(map(str, prompt)) or "nothing"
            raise _bad(f"a mapping with {names}; what a tokenizer returns has input_ids")
        for name, value in prompt.items():
            if name not in ("input_ids", "attention_mask") and not _is_trivial(name, value):
                raise _bad(
                    f"a mapping with {str(name)[:40]!r}, which peers do not take; give input_ids "
                    "and attention_mask alone"
                )
        rows, _ = _rows(_as_lists(prompt["input_ids"]), tokenizer)
        return rows, _mask(prompt.get("attention_mask"))
    if isinstance(prompt, str):
        return [_encode(prompt, tokenizer)], None
    prompt = _as_lists(prompt)
    if isinstance(prompt, Sequence) and not len(prompt):
        return [], None
    if isinstance(prompt, Sequence) and not isinstance(prompt, bytes | bytearray):
        if all(isinstance(one, str) for one in prompt):
            return [_encode(one, tokenizer) for one in prompt], None
        matrix = _matrix(prompt)
        if matrix is not None:
            return matrix, None
    raise _bad(
        f"a prompt {_kind(prompt)}; give text, a list of texts, token ids (one "
        "list or a list of lists), a tensor of ids, or what a tokenizer returns"
    )


def _bad(message: str) -> BadPrompt:
    return BadPrompt(f"{at_line()}{message}")


def _kind(prompt: Any) -> str:
    """What was given in place of a prompt, in words."""
    of = f"of type {type(prompt).__name__}"
    if not isinstance(prompt, list | tuple):
        return of
    kinds = dict.fromkeys(type(one).__name__ for row in prompt for one in _items(row))
    return f"{of} that holds {' and '.join(kinds)}"


def _items(row: Any) -> Sequence[Any]:
    return row if isinstance(row, list | tuple) else (row,)


def _is_trivial(name: str, value: Any) -> bool:
    """Whether leaving out a part of a tokenizer's answer changes nothing: nothing, or all zeros."""
    if value is None:
        return True
    return name == "token_type_ids" and not torch.as_tensor(value).any()


def _mask(mask: Any) -> list[list[int]] | None:
    if mask is None:
        return None
    if isinstance(mask, Tensor) or hasattr(mask, "__array__"):
        mask = torch.as_tensor(mask).tolist()
    if isinstance(mask, Sequence) and not isinstance(mask, str):
        mask = [int(one) if type(one) is bool else one for one in mask]
        mask = [list(map(int, one)) if _is_bools(one) else one for one in mask]
    found = _matrix(mask) if isinstance(mask, list) else None
    if found is None:
        raise _bad(
            f"an attention mask of type {type(mask).__name__} that holds no whole numbers; 1 for a "
            "token and 0 for padding are wanted"
        )
    return found


def _is_bools(row: Any) -> bool:
    return isinstance(row, list) and all(type(one) is bool for one in row)


def _as_lists(value: Any) -> Any:
    if isinstance(value, Tensor) or hasattr(value, "__array__"):
        if value.ndim not in (1, 2):
            raise _bad(f"token ids of shape {list(value.shape)}; [seq] or [batch, seq] is wanted")
        if "int" not in str(value.dtype):
            raise _bad(f"token ids of type {value.dtype}; whole numbers are wanted")
        return value.tolist()
    return value


def _matrix(value: Any) -> list[list[int]] | None:
    if isinstance(value, Sequence) and all(type(one) is int for one in value):
        return [list(value)]
    rows = []
    for row in value:
        if isinstance(row, Tensor):
            row = _as_lists(row)
        if not isinstance(row, Sequence) or not all(type(one) is int for one in row):
            return None
        rows.append(list(row))
    return rows


def _encode(text: str, tokenizer: Any) -> list[int]:
    if tokenizer is None:
        raise _bad("this model has no tokenizer here; give token ids")
    ids: list[int] = tokenizer(text)["input_ids"]
    return ids


def _pad_id(tokenizer: Any) -> int:
    # Padding is masked out, so which token stands there makes no difference.
    for name in ("pad_token_id", "eos_token_id"):
        found = getattr(tokenizer, name, None)
        if isinstance(found, int):
            return found
    return 0
