"""Prompts in every form, and what is none."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import BatchEncoding

from glasshive.client.errors import BadPrompt
from glasshive.client.prompts import Tokens, tokenize


class Letters:
    """A tokenizer: a is 1, b is 2, and so on."""

    pad_token_id = 9

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) - 96 for letter in text]}


def tokens(prompt: Any, tokenizer: Any = None) -> Tokens:
    return tokenize(prompt, tokenizer or Letters(), vocabulary_tokens=10, max_tokens=6)


@pytest.mark.parametrize(
    "prompt",
    [
        "abc",
        ["abc"],
        [1, 2, 3],
        (1, 2, 3),
        [[1, 2, 3]],
        torch.tensor([1, 2, 3]),
        torch.tensor([[1, 2, 3]], dtype=torch.int32),
        [torch.tensor([1, 2, 3])],
        np.array([[1, 2, 3]]),
        {"input_ids": [1, 2, 3]},
        {"input_ids": torch.tensor([[1, 2, 3]]), "attention_mask": torch.ones(1, 3)[0].long()},
        BatchEncoding({"input_ids": [[1, 2, 3]], "attention_mask": [[1, 1, 1]]}),
        {"input_ids": [1, 2, 3], "attention_mask": torch.tensor([True, True, True])},
    ],
    ids=str,
)
def test_forms_of_one_prompt(prompt: Any) -> None:
    found = tokens(prompt)
    assert found.input_ids.tolist() == [[1, 2, 3]]
    assert found.input_ids.dtype == torch.int64
    assert found.attention_mask is None
    assert found.position_ids is None
    assert (found.shape.batch, found.shape.seq, found.shape.padded) == (1, 3, False)
    assert found.mask.tolist() == [[1, 1, 1]]


@pytest.mark.parametrize(
    "prompt",
    [
        ["abc", "d"],
        [[1, 2, 3], [4]],
        [torch.tensor([1, 2, 3]), torch.tensor([4])],
        {"input_ids": [[1, 2, 3], [4]], "attention_mask": [[1, 1, 1], [1]]},
        {"input_ids": [[1, 2, 3], [9, 9, 4]], "attention_mask": [[1, 1, 1], [0, 0, 1]]},
        {"input_ids": [[1, 2, 3], [9, 9, 4]], "attention_mask": [[True] * 3, [False, False, True]]},
        {
            "input_ids": np.array([[1, 2, 3], [9, 9, 4]]),
            "attention_mask": np.array([[1, 1, 1], [0, 0, 1]], dtype=bool),
        },
    ],
    ids=str,
)
def test_rows_of_unequal_length_are_padded_on_the_left(prompt: Any) -> None:
    found = tokens(prompt)
    assert found.input_ids.tolist() == [[1, 2, 3], [9, 9, 4]]
    assert found.mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert found.position_ids is not None
    assert found.position_ids.tolist() == [[0, 1, 2], [0, 0, 0]]
    assert found.shape.padded


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("", "an empty prompt"),
        ([], "an empty prompt; give at least one token"),
        ([[]], "an empty prompt"),
        (["abc", ""], "prompt 1 of 2 is empty; give each at least one token"),
        (5, "a prompt of type int; give text, a list of texts, token ids"),
        (None, "a prompt of type NoneType"),
        ([1.0, 2.0], "a prompt of type list that holds float; give text, a list of texts"),
        ([True, False], "a prompt of type list that holds bool"),
        ([[1], "a"], "a prompt of type list that holds int and str"),
        (b"abc", "a prompt of type bytes"),
        ({1, 2}, "a prompt of type set"),
        (torch.ones(3), "token ids of type torch.float32; whole numbers are wanted"),
        (torch.ones(1, 1, 3).long(), r"token ids of shape \[1, 1, 3\]; \[seq\] or \[batch, seq\]"),
        (torch.tensor(3), r"token ids of shape \[\]"),
        (
            [1, 10],
            "token id 10 is not in the vocabulary of 10; give ids of this model's own tokenizer",
        ),
        ([1, -1], "token id -1 is not in the vocabulary of 10"),
        ([1] * 7, "a prompt of 7 tokens; the model takes at most 6"),
        ({"ids": [1]}, "a mapping with ids; what a tokenizer returns has input_ids"),
        ({}, "a mapping with nothing"),
        ({"input_ids": [1, 2], "attention_mask": [1]}, r"rows of \[1\] for ids with rows of \[2\]"),
        ({"input_ids": [1, 2], "attention_mask": [1, 0]}, "not left padding"),
        ({"input_ids": [1, 2], "attention_mask": [0, 2]}, "not left padding"),
        ({"input_ids": [[1, 2]], "attention_mask": [[0, 0]]}, "a row of padding only"),
        ({"input_ids": [1, 2], "attention_mask": [1.0, 1.0]}, "holds no whole numbers"),
        ({"input_ids": [1, 2], "attention_mask": "11"}, "of type str that holds no whole numbers"),
        ({"input_ids": [1, 2], "attention_mask": 1}, "of type int that holds no whole numbers"),
        (
            {"input_ids": [[1, 2], [3]], "attention_mask": [[0, 1], [1]]},
            "rows of unequal length whose mask leaves some tokens out; pad the ids",
        ),
    ],
    ids=str,
)
def test_what_is_no_prompt(prompt: Any, text: str) -> None:
    with pytest.raises(BadPrompt, match=rf"^test_prompts\.py:\d+: .*{text}"):
        tokens(prompt)


def test_text_without_a_tokenizer() -> None:
    with pytest.raises(BadPrompt, match="this model has no tokenizer here; give token ids"):
        tokenize("abc", None, vocabulary_tokens=10, max_tokens=None)


def test_parts_of_a_tokenizer_s_answer_are_not_left_out_silently() -> None:
    ids = {"input_ids": [[1, 2, 3]]}
    plain = tokenize(
        {**ids, "token_type_ids": [[0, 0, 0]]}, None, vocabulary_tokens=9, max_tokens=None
    )
    assert plain.input_ids.tolist() == [[1, 2, 3]]
    for name, value in (("token_type_ids", [[0, 1, 0]]), ("position_ids", [[5, 6, 7]])):
        with pytest.raises(BadPrompt, match=f"a mapping with '{name}', which peers do not take"):
            tokenize({**ids, name: value}, None, vocabulary_tokens=9, max_tokens=None)
