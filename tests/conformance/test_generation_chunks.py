"""Prompts in chunks, bit-equal to transformers' own `generate(prefill_chunk_size=...)` with hooks.

What is compared is every step of ours with the forward passes behind those of transformers' chunks
before the last.

Seen failing, each alone: with the mask of a chunk's own tokens only, or positions from 0 on, in
`PassInputs.of_chunk`, the padded rows; with a cache begun anew at step 0 in `Executor._inputs`, all
but whole prompts; with tokens chosen in chunks, what looks at the whole prompt; with the option not
read in `sampling_of`, the configuration and the chunks.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
from generation_oracle import Edit, generate_hooked
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import glasshive
from glasshive.client.demand import demand_of
from glasshive.client.errors import TraceError
from glasshive.graph.errors import UnsupportedModel

KINDS = ("llama", "gpt2", "gemma3_text", "mixtral")
CUTS: tuple[tuple[int, ...], ...] = ((), (3,), (2, 4))
NEW = 6
LENGTH = 20  # well over the windows of Gemma's sliding layers
SIZES = (5, 8, 19, 3, 50)  # of which one divides it, one leaves one token, one is longer


@dataclass(frozen=True)
class Pair:
    """One tiny model: plain Hugging Face, and the same over spans."""

    plain: Any
    model: Any

    def block(self, index: int) -> str:
        """The path of a block."""
        return f"{self.model.outline.blocks_path}.{index}"

    def at(self, path: str) -> Any:
        """The module at a path."""
        here = self.model
        for name in path.split("."):
            here = here[int(name)] if name.isdigit() else getattr(here, name)
        return here


GetPair = Callable[..., Pair]


@pytest.fixture(scope="module")
def get_pair(tmp_path_factory: pytest.TempPathFactory) -> GetPair:
    """A pair by kind, cuts and kernel of attention; each is made once."""
    folders: dict[str, Path] = {}
    made: dict[tuple[str, tuple[int, ...], str], Pair] = {}

    def get(kind: str, cuts: tuple[int, ...], attention: Any = "sdpa") -> Pair:
        if kind not in folders:
            torch.manual_seed(0)
            config = CONFIG_MAPPING[kind](**{**architectures.TINY[kind], "eos_token_id": None})
            whole = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
            folders[kind] = tmp_path_factory.mktemp(kind)
            whole.save_pretrained(folders[kind])
        key = (kind, cuts, attention)
        if key not in made:
            plain = AutoModelForCausalLM.from_pretrained(
                folders[kind], attn_implementation=attention
            )
            model = glasshive.local(folders[kind], cuts=cuts, attention=attention)
            made[key] = Pair(plain.eval().requires_grad_(False), model)
        return made[key]

    return get


@pytest.fixture(
    params=list(itertools.product(KINDS, CUTS)), ids=lambda one: f"{one[0]}-{len(one[1]) + 1}"
)
def pair(request: pytest.FixtureRequest, get_pair: GetPair) -> Pair:
    """Every kind over one to three spans."""
    return get_pair(*request.param)


@pytest.fixture(params=CUTS, ids=lambda cuts: f"{len(cuts) + 1}-spans")
def llama(request: pytest.FixtureRequest, get_pair: GetPair) -> Pair:
    """A tiny Llama over one to three spans."""
    return get_pair("llama", request.param)


@pytest.fixture
def thirds(get_pair: GetPair) -> Pair:
    """A tiny Llama over three spans."""
    return get_pair("llama", CUTS[-1])


def prompt(rows: int = 1, length: int = LENGTH, seed: int = 0) -> Tensor:
    numbers = torch.Generator().manual_seed(seed)
    return torch.randint(3, architectures.VOCABULARY, (rows, length), generator=numbers)


def before(length: int, size: int) -> int:
    """How many chunks transformers runs before the last."""
    return (length - 1) // size


def oracle(
    plain: Any,
    ids: Tensor,
    size: int,
    *,
    reads: list[str],
    edits: dict[str, Edit] | None = None,
    **options: Any,
) -> tuple[Tensor, dict[str, list[Tensor]]]:
    """The tokens, and what each module gave from the last chunk on, edited from there on."""
    earlier = before(ids.shape[1], size)

    def later(edit: Edit) -> Edit:
        return lambda step, output: None if step < earlier else edit(step - earlier, output)

    edits = {path: later(edit) for path, edit in (edits or {}).items()}
    options = {"new_tokens": NEW, "eos_token_id": None, **options}
    tokens, found = generate_hooked(
        plain, ids, prefill_chunk_size=size, reads=reads, edits=edits, **options
    )
    return tokens, {path: several[earlier:] for path, several in found.items()}


def generate(pair: Pair, ids: Any, size: int | None, **options: Any) -> Any:
    options = {"max_new_tokens": NEW, "eos_token_id": [], **options}
    return pair.model.generate(ids, prefill_chunk_size=size, **options)


def equal(saved: list[Any], wanted: list[Tensor]) -> bool:
    return len(saved) == len(wanted) and all(map(torch.equal, saved, wanted))


@pytest.mark.parametrize("size", SIZES)
def test_tokens_and_every_step_of_every_block(size: int, pair: Pair) -> None:
    ids = prompt()
    paths = [*(pair.block(i) for i in range(6)), "lm_head"]
    wanted_ids, wanted = oracle(pair.plain, ids, size, reads=paths)
    with generate(pair, ids, size) as tracer:
        saved: dict[str, list[Any]] = {path: [] for path in paths}
        for _ in tracer.iter[:]:
            for path in paths:
                saved[path].append(pair.at(path).output.save())
    assert torch.equal(tracer.output_ids, wanted_ids)
    chunk = LENGTH - before(LENGTH, size) * size
    assert saved[pair.block(0)][0].shape[1] == chunk
    for path in paths:
        assert equal(saved[path], wanted[path]), path


@pytest.mark.parametrize("size", [6, 7])
def test_padded_rows_of_which_one_begins_behind_the_first_chunk(size: int, pair: Pair) -> None:
    ids = prompt(rows=3)
    mask = torch.ones_like(ids)
    mask[0, :9] = mask[1, :2] = 0
    paths = [pair.block(i) for i in (0, 3, 5)]
    wanted_ids, wanted = oracle(pair.plain, ids, size, reads=paths, attention_mask=mask)
    inputs = {"input_ids": ids, "attention_mask": mask}
    with generate(pair, inputs, size) as tracer:
        saved: dict[str, list[Any]] = {path: [] for path in paths}
        for _ in tracer.iter[:]:
            for path in paths:
                saved[path].append(pair.at(path).output.save())
    assert torch.equal(tracer.output_ids, wanted_ids)
    for path in paths:
        assert equal(saved[path], wanted[path]), path


def test_edits_at_step_0_and_later(pair: Pair) -> None:
    """Step 0 has the tokens of the last chunk, each of which is edited; so is the last at later."""
    ids, size = prompt(), 6
    direction = torch.linspace(-3, 3, 64)

    def steer(step: int, output: Tensor) -> Tensor | None:
        if step == 3:
            return output * 0
        output[:, -2:] += direction
        return None

    path, behind = pair.block(1), pair.block(4)
    wanted_ids, wanted = oracle(pair.plain, ids, size, reads=[behind], edits={path: steer})
    assert not torch.equal(wanted_ids, oracle(pair.plain, ids, size, reads=[])[0])
    with generate(pair, ids, size) as tracer:
        saved = []
        for step in tracer.iter[:]:
            if step == 3:
                pair.at(path).output = pair.at(path).output * 0
            else:
                pair.at(path).output[:, -2:] += direction
            saved.append(pair.at(behind).output.save())
    assert torch.equal(tracer.output_ids, wanted_ids)
    assert equal(saved, wanted[behind])


def test_invokes_of_several_lengths(llama: Pair) -> None:
    """One longer than several chunks, two that share theirs, and one that is a single one."""
    size = 7
    prompts = [prompt(1, 20), prompt(1, 9, seed=1), prompt(2, 9, seed=2), prompt(1, 5, seed=3)]
    path = llama.block(5)
    with generate(llama, None, size) as tracer:
        saved: list[list[Any]] = []
        for ids in prompts:
            with tracer.invoke(ids):
                saved.append([llama.at(path).output.save() for _ in tracer.iter[:]])
    for ids, found, tokens in zip(prompts, saved, tracer.output_ids, strict=True):
        # A matmul of more rows may round otherwise, so those that share a pass are compared alike.
        shared = torch.cat(prompts[1:3]) if ids.shape[1] == 9 else ids
        rows = slice(0, 1) if ids is prompts[1] else slice(-len(ids), None)
        wanted_ids, wanted = oracle(llama.plain, shared, size, reads=[path])
        assert torch.equal(tokens, wanted_ids[rows])
        assert equal(found, [one[rows] for one in wanted[path]])


def test_a_value_of_one_prompt_goes_into_the_last_chunk_of_another(llama: Pair) -> None:
    clean, corrupt, size = prompt(), prompt(seed=1), 8
    _, kept = oracle(llama.plain, clean, size, reads=[llama.block(4)], new_tokens=1)

    def patch(step: int, output: Tensor) -> None:
        if step == 0:
            output[:, 1:3] = kept[llama.block(4)][0][:, 1:3]

    wanted_ids, wanted = oracle(
        llama.plain, corrupt, size, reads=[llama.block(5)], edits={llama.block(1): patch}
    )
    with generate(llama, None, size) as tracer:
        with tracer.invoke(clean, max_new_tokens=1):
            value = llama.at(llama.block(4)).output[:, 1:3]
        with tracer.invoke(corrupt):
            llama.at(llama.block(1)).output[:, 1:3] = value
            saved = [llama.at(llama.block(5)).output.save() for _ in tracer.iter[:]]
    assert torch.equal(tracer.output_ids[1], wanted_ids)
    assert equal(saved, wanted[llama.block(5)])


def test_penalties_and_stop_tokens_look_at_the_whole_prompt(llama: Pair) -> None:
    ids, size = prompt(), 6
    choice = {"repetition_penalty": 1.8, "no_repeat_ngram_size": 2}
    plain_ids, _ = oracle(llama.plain, ids, size, reads=[], **choice)
    only_last, _ = oracle(llama.plain, ids[:, -2:], size, reads=[], **choice)
    assert not torch.equal(plain_ids[:, LENGTH:], only_last[:, 2:])
    stop = int(plain_ids[0, LENGTH + 3])
    wanted_ids, _ = oracle(
        llama.plain, ids, size, reads=[], **choice, **{"eos_token_id": stop, "pad_token_id": 0}
    )
    assert wanted_ids.shape[1] < LENGTH + NEW
    with generate(llama, ids, size, eos_token_id=[stop], pad_token_id=0, **choice) as tracer:
        pass
    assert torch.equal(tracer.output_ids, wanted_ids)


def test_nothing_is_chosen_before_the_last_chunk(
    llama: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor if a client's plan has the last peer go on to the logits of each chunk."""
    ids, size, choice = prompt(), 6, {"repetition_penalty": 1.8, "no_repeat_ngram_size": 2}
    monkeypatch.setattr("glasshive.graph.split._stop_event", lambda *args: None)
    with generate(llama, ids, size, **choice) as tracer:
        pass
    assert torch.equal(tracer.output_ids, oracle(llama.plain, ids, size, reads=[], **choice)[0])


def _argument(module: Any, name: str, run: Callable[[], Any]) -> list[Tensor]:
    """What a module was given by that name, at each of its calls."""
    found: list[Tensor] = []

    def hook(module: Any, args: Any, kwargs: Any) -> None:
        found.append(kwargs[name].clone())

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        run()
    finally:
        handle.remove()
    return found


def test_tensors_of_present_and_of_all_tokens(get_pair: GetPair) -> None:
    """Attention's patterns, and the mask of a padded batch, have both in the last chunk."""
    pair, size = get_pair("llama", (3,), "eager"), 8
    ids = prompt(rows=2)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    path = f"{pair.block(4)}.self_attn"
    patterns: list[Tensor] = []
    handle = pair.plain.get_submodule(path).register_forward_hook(
        lambda module, args, output: patterns.append(output[1].clone())
    )
    masks = _argument(
        pair.plain.get_submodule(path),
        "attention_mask",
        lambda: oracle(pair.plain, ids, size, reads=[], attention_mask=mask),
    )
    handle.remove()
    with generate(pair, {"input_ids": ids, "attention_mask": mask}, size) as tracer:
        seen, seen_masks = [], []
        for _ in tracer.iter[:]:
            seen_masks.append(pair.at(path).inputs[1]["attention_mask"].save())
            seen.append(pair.at(path).output[1].save())
    assert seen[0].shape == (2, 4, 4, LENGTH)
    assert equal(seen, patterns[before(LENGTH, size) :])
    assert equal(seen_masks, masks[before(LENGTH, size) :])


def test_what_only_a_chunk_is_given_is_no_site(thirds: Pair) -> None:
    """A kernel that finds a whole prompt causal takes a mask for a chunk: refused where it is."""
    path = f"{thirds.block(4)}.self_attn"
    text = r"test_generation_chunks\.py:\d+: .*self_attn\.inputs\[1\] has no 'attention_mask'"
    with pytest.raises(KeyError, match=text), generate(thirds, prompt(), 8):
        thirds.at(path).inputs[1]["attention_mask"].save()


def test_what_the_generation_config_says(tmp_path: Path, get_pair: GetPair) -> None:
    plain = get_pair("llama", ()).plain
    plain.save_pretrained(tmp_path)
    config = plain.generation_config.__class__.from_pretrained(tmp_path)
    config.prefill_chunk_size = 6
    config.save_pretrained(tmp_path)
    pair = Pair(plain, glasshive.local(tmp_path, cuts=(3,), attention="sdpa"))
    path, ids = pair.block(0), prompt()
    for options, tokens in (({}, 2), ({"prefill_chunk_size": None}, 20)):
        with pair.model.generate(ids, max_new_tokens=2, eos_token_id=[], **options):
            first = pair.at(path).output.save()
        assert first.shape[1] == tokens


@pytest.mark.parametrize("asked", [0, -3, 2.5, True, "8"])
def test_sizes_that_are_none(asked: Any, thirds: Pair) -> None:
    text = f"prefill_chunk_size={asked!r}; how many tokens of a prompt are run at a time is wanted"
    with pytest.raises(TraceError, match=text), generate(thirds, prompt(), asked):
        pass


def test_more_chunks_than_a_plan_has_passes(thirds: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("glasshive.client.generation.MAX_PASSES", 24)
    text = r"behind a prompt of 20 in chunks of 1 take 25 passes.*at most 24; take a larger prefill"
    with pytest.raises(TraceError, match=text), generate(thirds, prompt(), 1):
        pass


def test_chunks_follow_each_other_without_a_round_trip(thirds: Pair) -> None:
    """What a route is expected to take: as many tokens and bytes, and no more ways."""
    demands = []
    for size in (None, 6):
        with generate(thirds, prompt(), size) as tracer:
            demands.append(demand_of(tracer._finish()))
    whole, chunks = demands
    assert chunks.hidden_bytes == whole.hidden_bytes
    assert chunks.rounds == whole.rounds == NEW
    tokens = [sum(one.tokens * one.count for one in demand.passes) for demand in demands]
    assert tokens[0] == tokens[1]
    passes = [sum(one.count for one in demand.passes) for demand in demands]
    assert passes == [NEW, NEW + 3]


def test_where_transformers_has_no_chunks(get_pair: GetPair) -> None:
    """Mamba 2 has its cache under another name, and transformers' `generate` looks for one."""
    pair = get_pair("mamba2", (3,), "eager")
    with pytest.raises(ValueError, match="Cannot use prefill chunking without a cache"):
        oracle(pair.plain, prompt(), 6, reads=[])
    with (
        pytest.raises(UnsupportedModel, match=r"can't run a prompt of such a model in chunks"),
        generate(pair, prompt(), 6),
    ):
        pass
    with generate(pair, prompt(), None) as tracer:
        pass
    assert tracer.output_ids.shape[1] == LENGTH + NEW
