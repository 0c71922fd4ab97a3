"""The demo's pictures and results, on small made-up tensors."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from glasshive import demo_oracle
from glasshive.demo_oracle import (
    DEMO,
    LensResult,
    LensSpec,
    PatchingSpec,
    lens_result,
    patching_result,
    sweep_cells,
    sweep_passes,
)
from glasshive.demo_pictures import logit_lens_png, patching_png, printable, token_label

LAYERS, POSITIONS = 30, 9
MAX_PNG_BYTES = 300_000


class Words:
    """A tokenizer of whole words: what the result builders ask of one."""

    def __init__(self) -> None:
        self.words: list[str] = []

    def __call__(self, prompt: str, add_special_tokens: bool) -> Any:
        pieces = prompt.replace(" ", "\0 ").strip("\0").split("\0")
        self.words += [piece for piece in pieces if piece not in self.words]
        return type("Encoding", (), {"input_ids": [self.words.index(piece) for piece in pieces]})

    def decode(self, ids: list[int]) -> str:
        return "".join(self.words[token] for token in ids)


@pytest.fixture
def lens() -> LensResult:
    words = Words()
    spec = LensSpec(prompt="one two three four", shown_tokens=3)
    words(spec.prompt, add_special_tokens=False)
    # What a lens may meet: white space, other scripts, pieces of characters, dollars, length.
    words.words += ["\n", " ", "   ", " 日本", "\ufffd", "$x$", "_{2", " " + "long" * 9, "", "\t"]
    random = torch.Generator().manual_seed(0)
    top_ids = torch.randint(len(words.words), (LAYERS, 3), generator=random)
    probabilities = torch.rand(LAYERS, 3, generator=random)
    last_logits = torch.randn(LAYERS, len(words.words), generator=random)
    return lens_result(spec, words, top_ids, probabilities, last_logits)


def size_of(png: Path) -> tuple[int, int]:
    data = png.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(data) < MAX_PNG_BYTES
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def test_lens_picture(lens: LensResult, tmp_path: Path) -> None:
    logit_lens_png(lens, tmp_path / "lens.png")
    width, height = size_of(tmp_path / "lens.png")
    assert 500 < width < 2000
    assert 800 < height < 2000


def test_patching_picture(tmp_path: Path) -> None:
    spec = PatchingSpec(
        clean="a b c d e $f g$ h i",
        corrupted="a b x d e $f g$ h i",
        answer=" c",
        distractor=" x",
        rows_per_pass=4,
    )
    answer_logits = torch.randn(1 + LAYERS * POSITIONS, 2, generator=torch.Generator())
    result = patching_result(spec, Words(), answer_logits, torch.tensor([4.0, -4.0]))
    patching_png(result, tmp_path / "patching.png")
    width, height = size_of(tmp_path / "patching.png")
    assert 800 < width < 2000
    assert 800 < height < 2000


def test_pictures_leave_no_process_wide_state(lens: LensResult, tmp_path: Path) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    logit_lens_png(lens, tmp_path / "lens.png")
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize(
    ("token", "label"),
    [
        (" and", "and"),
        ("iffel", "iffel"),
        ("\n", "⏎"),
        ("\n\n", "⏎⏎"),
        (" ", "␣"),
        ("    ", "␣×4"),
        ("", "∅"),
        (" 日", "□"),
        (" transcontinental", "transcontin…"),
    ],
)
def test_token_labels(token: str, label: str) -> None:
    assert token_label(token) == label


def test_printable_keeps_what_the_font_has() -> None:
    assert printable("naïve “Ω” → α\n") == "naïve “Ω” → α⏎"


def test_restored_is_0_at_corrupted_and_1_at_clean() -> None:
    spec = PatchingSpec("a b", "a c", " b", " c", rows_per_pass=8)
    answer_logits = torch.tensor([[0.0, 2.0], [0.0, 2.0], [3.0, 1.0], [1.0, 1.0], [4.0, 0.0]])
    result = patching_result(spec, Words(), answer_logits, torch.tensor([3.0, 1.0]))
    assert (result.clean_difference, result.corrupted_difference) == (2.0, -2.0)
    assert result.restored.tolist() == [[0.0, 1.0], [0.5, 1.5]]
    assert result.tokens == ("a", " b")
    assert result.corrupted_tokens == ("a", " c")


def test_passes_hold_every_cell_once_in_bounded_rows() -> None:
    passes = sweep_passes(layers=30, positions=14, rows_per_pass=32)
    assert [len(cells) for cells in passes] == [31] * 13 + [18]
    assert [cell for cells in passes for cell in cells] == sweep_cells(30, 14)
    assert passes[0][:3] == [None, (0, 0), (0, 1)]
    with pytest.raises(ValueError, match="at least 2"):
        sweep_passes(2, 2, rows_per_pass=1)


def test_difference_is_of_one_experiment(lens: LensResult) -> None:
    assert lens.largest_difference(lens) == 0.0
    with pytest.raises(ValueError, match="same experiment"):
        demo_oracle._largest(lens.last_logits, lens.probabilities)


@pytest.mark.real_model
def test_the_demos_prompts_work_on_the_real_model() -> None:
    from glasshive.models import SMOLLM2, ModelNotFoundError, find_model

    try:
        folder = find_model(SMOLLM2)
    except ModelNotFoundError:
        pytest.skip("SmolLM2-135M-Instruct has not been fetched")
    model, tokenizer = demo_oracle.load(folder)
    lens = demo_oracle.logit_lens(model, tokenizer)
    assert lens.top_tokens[-1][-1] == " Shakespeare"
    steered = demo_oracle.steering(model, tokenizer)
    assert steered.plain_top[0][0] == " lion"
    assert steered.steered_top[0][0] == " whale"
    spec = DEMO.patching
    clean, corrupted = (
        demo_oracle.token_ids(tokenizer, prompt) for prompt in (spec.clean, spec.corrupted)
    )
    assert len(clean) == len(corrupted)
    with torch.no_grad():
        best = model(torch.tensor([clean, corrupted]), use_cache=False).logits[:, -1].argmax(-1)
    assert best.tolist() == demo_oracle.answer_ids(tokenizer, spec)
