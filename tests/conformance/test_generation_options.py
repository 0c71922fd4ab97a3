"""Every option of the choice of tokens alone: `generate` decides, and transformers' processors."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
from generation_oracle import drawn, generate_hooked
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    GenerationConfig,
    LlamaConfig,
    LogitNormalization,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

import glasshive
from glasshive.client.errors import PeerFailed, TraceError

ROWS = torch.tensor([[3, 14, 15, 92, 65], [35, 89, 79, 32, 38], [9, 9, 9, 9, 9]])
NEW = 16
VARIED: dict[str, Any] = {"repetition_penalty": 1.7}  # left alone, a tiny model repeats itself


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama that stops at no token, and is surer than random ones are."""
    torch.manual_seed(0)
    config = LlamaConfig(**{**architectures.TINY["llama"], "eos_token_id": None})
    made: Path = tmp_path_factory.mktemp("options")
    whole = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        whole.lm_head.weight *= 12
    whole.save_pretrained(made)
    return made


@pytest.fixture(scope="module")
def plain(folder: Path) -> Any:
    """Plain Hugging Face."""
    return AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    """The same over two spans."""
    return glasshive.local(folder, cuts=(3,))


@pytest.fixture(scope="module")
def new(plain: Any) -> list[int]:
    """The tokens that the first row gets without any option but VARIED."""
    ids, _ = generate_hooked(plain, ROWS, NEW, **VARIED)
    tokens: list[int] = ids[0, ROWS.shape[1] :].tolist()
    return tokens


def test_a_penalty_of_what_was_there_before(model: Any, plain: Any) -> None:
    begun, _ = generate_hooked(plain, ROWS, 3)  # of which more would come
    for choice in (
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 2},
        {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3},
        {"encoder_repetition_penalty": 0.1},
        {"encoder_no_repeat_ngram_size": 1},
    ):
        check_greedy(model, plain, begun, choice, {})


def check_greedy(
    model: Any, plain: Any, rows: Tensor, choice: dict[str, Any], without: dict[str, Any]
) -> None:
    """The same tokens as `generate`, and others than without this option."""
    base = {"pad_token_id": 5, **without}
    wanted, _ = generate_hooked(plain, rows, NEW, **base, **choice)
    before, _ = generate_hooked(plain, rows, NEW, **base)
    assert not torch.equal(wanted, before), "an option that changes nothing shows nothing"
    with model.generate(rows, max_new_tokens=NEW, **base, **choice) as tracer:
        pass
    assert torch.equal(tracer.output_ids, wanted)


def test_tokens_that_are_not_to_come(model: Any, plain: Any, new: list[int]) -> None:
    for choice in (
        {"suppress_tokens": [new[2], new[5]]},
        {"begin_suppress_tokens": [new[0], 5]},
        {"bad_words_ids": [[new[1], new[2]], [new[6]]]},
        {"sequence_bias": {(new[3],): -50.0, (new[0], 77): 1000.0}},
        {"sequence_bias": [[[new[0], 77], 1000.0]]},
    ):
        check_greedy(model, plain, ROWS, choice, VARIED)


def test_when_stop_tokens_come(model: Any, plain: Any, new: list[int]) -> None:
    stop = {**VARIED, "eos_token_id": [new[3], 1]}
    for choice in (
        {"min_new_tokens": NEW - 2},
        {"min_length": ROWS.shape[1] + 9},
    ):
        check_greedy(model, plain, ROWS[:1], choice, stop)
    check_greedy(model, plain, ROWS[:1], {"forced_eos_token_id": [44, 45]}, VARIED)
    late = {"exponential_decay_length_penalty": (2, 1.9), "eos_token_id": 44}
    wanted, _ = generate_hooked(plain, ROWS[:1], NEW, **VARIED, **late)
    assert wanted.shape[1] < ROWS.shape[1] + NEW, "the penalty brings a stop token"
    check_greedy(model, plain, ROWS[:1], late, VARIED)


def test_min_new_tokens_goes_before_min_length(model: Any, plain: Any, new: list[int]) -> None:
    choice = {**VARIED, "eos_token_id": new[3], "min_length": 17, "min_new_tokens": 2}
    wanted, _ = generate_hooked(plain, ROWS[:1], NEW, **choice)
    assert wanted.shape[1] == ROWS.shape[1] + 4
    with model.generate(ROWS[:1], max_new_tokens=NEW, **choice) as tracer:
        pass
    assert torch.equal(tracer.output_ids, wanted)


def test_the_first_and_the_last_token_are_forced(model: Any, plain: Any) -> None:
    check_greedy(model, plain, torch.tensor([[3], [8]]), {"forced_bos_token_id": 99}, VARIED)
    check_greedy(model, plain, ROWS, {"forced_eos_token_id": 44}, VARIED)


def test_scores_that_are_no_numbers_are_removed(model: Any, plain: Any) -> None:
    choice = {"remove_invalid_values": True, **VARIED}

    def spoil(step: int, output: Tensor) -> None:
        output[..., 17] = float("nan")

    wanted, _ = generate_hooked(plain, ROWS, 6, edits={"lm_head": spoil}, **choice)
    assert 17 not in wanted[:, ROWS.shape[1] :]
    with model.generate(ROWS, max_new_tokens=6, **choice) as tracer:
        for _ in tracer.iter[:]:
            model.lm_head.output[..., 17] = float("nan")
    assert torch.equal(tracer.output_ids, wanted)


def test_scores_are_normalised_in_the_end(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No token shows it: it is seen by its call."""
    seen: list[Tensor] = []
    normalise = LogitNormalization.__call__

    def call(self: LogitNormalization, ids: Tensor, scores: Tensor) -> Tensor:
        seen.append(normalise(self, ids, scores))
        return seen[-1]

    monkeypatch.setattr(LogitNormalization, "__call__", call)
    for asked, calls in ((False, 0), (True, 3)):
        with model.generate(ROWS, max_new_tokens=3, renormalize_logits=asked):
            pass
        assert len(seen) == calls


def test_a_penalty_beyond_all_numbers_is_told(model: Any) -> None:
    text = r"GraphError at peer .*no token can be chosen: .*Numerical result out of range"
    choice = {"exponential_decay_length_penalty": (0, 1e6), "eos_token_id": 44}
    with (
        pytest.raises(PeerFailed, match=text),
        model.generate(ROWS[:1], max_new_tokens=60, min_new_tokens=60, **choice),
    ):
        pass


CHANCE: list[tuple[dict[str, Any], LogitsProcessor]] = [
    ({"temperature": 0.4}, TemperatureLogitsWarper(0.4)),
    ({"top_h": 0.4}, TopHLogitsWarper(0.4)),
    ({"top_k": 3}, TopKLogitsWarper(3)),
    ({"top_k": None}, TopKLogitsWarper(50)),
    ({"top_p": 0.5}, TopPLogitsWarper(0.5)),
    ({"min_p": 0.3}, MinPLogitsWarper(0.3)),
    ({"typical_p": 0.4}, TypicalLogitsWarper(0.4)),
    ({"epsilon_cutoff": 0.05}, EpsilonLogitsWarper(0.05)),
    ({"eta_cutoff": 0.05}, EtaLogitsWarper(0.05)),
]


@pytest.mark.parametrize(("choice", "processor"), CHANCE, ids=[str(one) for one, _ in CHANCE])
def test_chance(choice: dict[str, Any], processor: LogitsProcessor, model: Any, plain: Any) -> None:
    if choice == {"top_k": None}:
        choice = {}  # transformers' own default
        top_k: dict[str, Any] = {}
    else:
        top_k = {} if "top_k" in choice else {"top_k": 0}
    wanted = drawn(plain, ROWS, NEW, LogitsProcessorList([processor]), 3)
    assert not torch.equal(wanted, drawn(plain, ROWS, NEW, LogitsProcessorList(), 3))
    with model.generate(
        ROWS, max_new_tokens=NEW, do_sample=True, seed=3, **top_k, **choice
    ) as tracer:
        pass
    assert torch.equal(tracer.output_ids, wanted)


# What the model's own configuration says ----------------------------------------------------------


def configured(folder: Path, to: Path, **settings: Any) -> tuple[Any, Any]:
    """Plain Hugging Face and our model, whose generation_config.json has these settings."""
    whole = AutoModelForCausalLM.from_pretrained(folder).eval()
    GenerationConfig(**settings).save_pretrained(folder_of := to / "configured")
    whole.generation_config = GenerationConfig.from_pretrained(folder_of)
    whole.save_pretrained(folder_of)
    return whole, glasshive.local(folder_of)


def test_the_models_own_configuration_is_honoured(
    folder: Path, new: list[int], tmp_path: Path
) -> None:
    whole, model = configured(
        folder,
        tmp_path,
        repetition_penalty=1.7,
        max_new_tokens=9,
        eos_token_id=[new[4], 1],
        pad_token_id=6,
        suppress_tokens=[-1, new[1]],
        begin_suppress_tokens=[new[0]],
    )
    wanted = whole.generate(ROWS, attention_mask=torch.ones_like(ROWS))
    bare = whole.generate(ROWS, attention_mask=torch.ones_like(ROWS), suppress_tokens=None)
    assert not torch.equal(wanted, bare)
    with model.generate(ROWS) as tracer:
        pass
    assert torch.equal(tracer.output_ids, wanted)


def test_chance_stop_tokens_and_padding_of_a_configuration(
    folder: Path, plain: Any, tmp_path: Path
) -> None:
    processors = LogitsProcessorList([TemperatureLogitsWarper(0.7), TopKLogitsWarper(9)])
    made = drawn(plain, ROWS, NEW, processors, 4)
    stop, behind = int(made[0, 8]), ROWS.shape[1]
    settings = {"do_sample": True, "temperature": 0.7, "top_k": 9, "max_new_tokens": NEW}
    _, model = configured(folder, tmp_path, **settings, eos_token_id=[stop, 127], pad_token_id=6)
    with model.generate(ROWS, seed=4) as tracer:
        pass
    ids = tracer.output_ids
    assert (ids[0, 9:] == 6).all()
    for row, wanted in zip(ids[:, behind:].tolist(), made[:, behind:].tolist(), strict=True):
        ends = min((wanted.index(one) for one in (stop, 127) if one in wanted), default=NEW - 1)
        end = min(ends + 1, len(row))
        assert row[:end] == wanted[:end]
        assert set(row[end:]) <= {6}


def test_max_length_counts_the_prompt(folder: Path, tmp_path: Path) -> None:
    whole, model = configured(folder, tmp_path, max_length=12)
    for rows in (ROWS, ROWS[:, :2]):
        wanted = whole.generate(rows, attention_mask=torch.ones_like(rows))
        assert wanted.shape[1] == 12
        with model.generate(rows) as tracer:
            pass
        assert torch.equal(tracer.output_ids, wanted)
    with model.generate(ROWS, max_new_tokens=2) as tracer:
        pass
    assert tracer.output_ids.shape[1] == 7
    with model.generate(ROWS, max_length=9) as tracer:
        pass
    assert tracer.output_ids.shape[1] == 9


def test_what_a_configuration_has_and_no_peer_does_is_refused(folder: Path, tmp_path: Path) -> None:
    _, model = configured(folder, tmp_path, max_time=3.0, max_new_tokens=2)
    text = (
        r"test_generation_options.py:\d+: max_time=3.0 in the model's own generation_config: a "
        r"generation has deadline= instead, .*; leave it out, with generate\(max_time=None\)"
    )
    with pytest.raises(TraceError, match=text), model.generate(ROWS):
        pass
    with model.generate(ROWS, max_time=None) as tracer:
        pass
    assert tracer.new_tokens.shape == (3, 2)


# What is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choice", "text"),
    [
        (
            {"remote": True},
            r"generate\(remote=...\) is no option here: a trace always runs",
        ),
        ({"use_cache": False}, r"generate\(use_cache=False\) has no meaning here; leave it out"),
        ({"max_time": 7}, r"max_time=7: a generation has deadline= instead, .*; leave it out$"),
        (
            {"max_length": 5, "max_new_tokens": None},
            r"max_length=5 and a prompt of 5 tokens, which count too; say how many new ones with",
        ),
        ({"num_return_sequences": 2}, r"num_return_sequences=2: each row gives one; repeat the"),
        ({"watermarking_config": 3}, r"watermarking_config=3: it draws a list of tokens for each"),
        ({"guidance_scale": 1.5}, r"guidance_scale=1.5: it runs the model a second time for each"),
        ({"stop_strings": ["a"]}, r"stop_strings=\['a'\]: the peer that chooses tokens has no tok"),
        ({"pad_token_id": "x"}, r"pad_token_id='x': a token's id is wanted"),
        (
            {"top_k": iter([3])},
            r"generate\(top_k=<list_iterator .*: numbers, or lists of them, are",
        ),
        ({"temperature": 10**400, "do_sample": True}, r"temperature=10+: a number above 0 is"),
        ({"suppress_tokens": 1.5}, r"suppress_tokens=\(1.5,\): a list of at most 1024 tokens' ids"),
        ({"bad_words_ids": [[]]}, r"bad_words_ids=\(\(\),\): at most 1024 lists of 1 to 64"),
        ({"bad_words_ids": [[200]]}, r"bad_words_ids=200 is not in the vocabulary of 128 tokens"),
        (
            {"bad_words_ids": [[7]], "eos_token_id": 7},
            r"bad_words_ids=\(\(7,\),\): these are stop tokens, which transformers leaves out",
        ),
        ({"sequence_bias": 3}, r"sequence_bias=3: \[tokens, number\] pairs, of at most 1024 lists"),
        (
            {"sequence_bias": {(1, 2): float("nan")}},
            r"sequence_bias=\(\(\(1, 2\), nan\),\): \[tokens",
        ),
        (
            {"exponential_decay_length_penalty": (2, 1.5), "eos_token_id": []},
            r"exponential_decay_length_penalty without eos_token_id: it raises the score of stop",
        ),
        (
            {"exponential_decay_length_penalty": 2},
            r"exponential_decay_length_penalty=\(2,\): a pair of after how many new",
        ),
        ({"forced_bos_token_id": 128}, r"forced_bos_token_id=128 is not in the vocabulary of 128"),
        ({"do_sample": "no"}, r"do_sample='no': True or False is wanted"),
        ({"no_repeat_ngram_size": 65}, r"no_repeat_ngram_size=65: a whole number from 0 to 64"),
        ({"seed": 3}, r"seed=3 has no effect without do_sample=True"),
        ({"streamer": True}, r"streamer=True; what has put\(tokens\) and end\(\) is wanted"),
        (
            {"input_ids": ROWS},
            r"generate\(input_ids=...\) is no option here: what a tok",
        ),
        (
            {"num_beams": 4},
            r"num_beams=4: peers follow one row of tokens for each prompt, not",
        ),
        (
            {"temprature": 2.0},
            r"generate\(temprature=2.0\) is no option here; did you mean te",
        ),
        ({"do_sample": True, "temperature": -1.0}, r"temperature=-1.0: a number above 0 is wanted"),
        ({"do_sample": True, "top_p": 1.5}, r"top_p=1.5: a number above 0 and at most 1 is wanted"),
        ({"eos_token_id": 999}, r"eos_token_id=999 is not in the vocabulary of 128 tokens"),
        ({"do_sample": True, "seed": -1}, r"seed=-1; a whole number from 0"),
        ({"max_new_tokens": 0}, r"max_new_tokens=0, where the number of new tokens is wanted"),
        ({"max_new_tokens": 500}, r"5 tokens and 500 new ones; the model takes at most 128"),
    ],
    ids=lambda one: re.sub(r" at 0x\w+", "", str(one)),  # the same in every process
)
def test_what_no_peer_does_is_refused_at_the_users_line(
    choice: dict[str, Any], text: str, model: Any
) -> None:
    given = {"max_new_tokens": 4, **choice}
    with (
        pytest.raises(TraceError, match=rf"test_generation_options.py:\d+: {text}"),
        model.generate(ROWS, **given),
    ):
        pass


def test_how_many_tokens_must_be_said(model: Any) -> None:
    text = (
        "max_new_tokens=None, where .* is wanted, .*; the model's own generation_config has no "
        "max_new_tokens or max_length"
    )
    with pytest.raises(TraceError, match=text), model.generate(ROWS):
        pass
