"""Sites whose tensors are others in a padded batch: position tables, positions and masks."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
from oracle import LOGITS, Edit, Read, left_padded, positions_of, run_hooked
from soak import SOAK
from tiny_models import CUTS, DEVICE, IDS, Setting, load_plain, refused, save_tiny
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import glasshive
from glasshive.graph.errors import NotASite, NotYet
from glasshive.graph.graph import Site
from glasshive.graph.outline import Leaf, Outline, PassKind
from glasshive.graph.twin import build_twin, scan

UNEQUAL = [[3, 14, 15, 9, 26, 5], [35, 8, 9], [7]]
OTHER = [[9, 8], [1, 2, 3, 4, 5, 6]]
KINDS = ("llama", "gpt2", "gemma")
TYPES = [
    "llama",
    "gpt2",
    "gemma",
    "gpt_neox",
    "opt",
    "bloom",
    "falcon",
    "gemma2",
    "mamba",
    "jamba",
    "qwen3_next",
]

GetPadded = Callable[[str, tuple[int, ...]], Setting]


@pytest.fixture(scope="module")
def get_padded(tmp_path_factory: pytest.TempPathFactory) -> GetPadded:
    """A tiny Llama, GPT-2 or Gemma over the spans between these cuts; each is loaded once."""
    folders: dict[str, Path] = {}
    plain: dict[str, Any] = {}
    made: dict[tuple[str, tuple[int, ...]], Setting] = {}

    def get(kind: str, cuts: tuple[int, ...]) -> Setting:
        if kind not in folders:
            folders[kind] = tmp_path_factory.mktemp(f"padded-{kind}")
            if kind == "gemma":
                torch.manual_seed(0)
                config = CONFIG_MAPPING[kind](**architectures.TINY[kind])
                AutoModelForCausalLM.from_config(config).save_pretrained(folders[kind])
            else:
                save_tiny(kind, folders[kind])
            plain[kind] = load_plain(folders[kind])
        if (kind, cuts) not in made:
            model = glasshive.local(folders[kind], cuts=cuts, device=DEVICE)
            names = "gpt2" if kind == "gpt2" else "llama"
            made[kind, cuts] = Setting(names, cuts, plain[kind], model)
        return made[kind, cuts]

    return get


@pytest.fixture(
    params=list(itertools.product(KINDS, CUTS)),
    ids=lambda param: f"{param[0]}-{len(param[1]) + 1}",
)
def setting(request: pytest.FixtureRequest, get_padded: GetPadded) -> Setting:
    """Each kind over 1, 2 and 3 spans."""
    return get_padded(*request.param)


@pytest.fixture(params=CUTS, ids=lambda cuts: f"{len(cuts) + 1}-spans")
def llama(request: pytest.FixtureRequest, get_padded: GetPadded) -> Setting:
    return get_padded("llama", request.param)


@pytest.fixture(params=CUTS, ids=lambda cuts: f"{len(cuts) + 1}-spans")
def gpt2(request: pytest.FixtureRequest, get_padded: GetPadded) -> Setting:
    return get_padded("gpt2", request.param)


def padded_sites(outline: Outline) -> Iterator[tuple[Site, Leaf]]:
    """Every tensor that a padded batch has at a site."""
    for path, info in outline.modules.items():
        for leaf in info.padded_inputs:
            yield Site(path, "input", leaf.path), leaf
        for leaf in info.padded_outputs:
            yield Site(path, "output", leaf.path), leaf


def read_of(site: Site) -> Read:
    return Read(site.module, site.io, site.leaf, name=str(site))


def plainly(setting: Setting, prompts: list[list[int]], **arguments: Any) -> dict[Any, Tensor]:
    """What plain Hugging Face gives for the same left-padded batch."""
    ids, mask = left_padded(prompts)
    return run_hooked(setting.plain, ids, attention_mask=mask, **arguments)


def same_answers(got: Tensor, want: Tensor, prompts: list[list[int]]) -> bool:
    """Equal in every bit, but for what stands where there is padding."""
    rows = zip(got, want, prompts, strict=True)
    return all(torch.equal(g[-len(p) :], w[-len(p) :]) for g, w, p in rows)


# Reads -------------------------------------------------------------------------------------------


def test_every_site_of_a_padded_batch_is_read_exactly(setting: Setting) -> None:
    sites = [site for site, _ in padded_sites(setting.model.outline)]
    saved: dict[Site, Any] = {}
    with setting.model.trace(UNEQUAL) as tracer:
        for site in sites:
            saved[site] = tracer.read(site).save()
        ids, mask = tracer.input_ids, tracer.attention_mask
    want = run_hooked(setting.plain, ids, attention_mask=mask, reads=list(map(read_of, sites)))
    for site, got in saved.items():
        assert got.shape[0] == len(UNEQUAL), site
        assert torch.equal(got, want[str(site)]), site
    names = {str(site) for site in sites}
    tables = {
        "llama": "model.rotary_emb.output[0]",
        "gpt2": "transformer.wpe.output",
    }
    assert any(name.startswith(tables[setting.kind]) for name in names), names


def test_each_invoke_of_a_padded_pass_reads_its_own_rows(llama: Setting) -> None:
    tables = []
    with llama.model.trace() as tracer:
        for prompts in (UNEQUAL, OTHER):
            with tracer.invoke(prompts):
                tables.append(llama.model.model.rotary_emb.output[0].save())
    assert tracer.result.passes == 1
    read = Read("model.rotary_emb", "output", 0, name="cos")
    want = plainly(llama, [*UNEQUAL, *OTHER], reads=[read])["cos"]
    assert torch.equal(torch.cat(tables), want)
    assert not torch.equal(want[0], want[1])


def test_a_table_is_one_for_all_rows_only_without_padding(get_padded: GetPadded) -> None:
    """The same site in two invokes of one trace, padded and not."""
    llama = get_padded("llama", (2, 4))
    with llama.model.trace() as tracer:
        with tracer.invoke(UNEQUAL):
            rows = llama.model.model.rotary_emb.output[0].save()
        with tracer.invoke([IDS, IDS]):
            one = llama.model.model.rotary_emb.output[0].save()
    assert (rows.shape[0], one.shape[0]) == (3, 1)
    assert torch.equal(rows[0], one[0])


# Edits -------------------------------------------------------------------------------------------


def test_position_embeddings_of_a_padded_batch_are_edited(gpt2: Setting) -> None:
    wpe = gpt2.model.transformer.wpe

    def flip(tensor: Tensor) -> Tensor:
        return tensor.flip(1)

    def halve_the_last(tensor: Tensor) -> None:
        tensor[:, -1] *= 0.5

    for mode in ("set", "inplace"):
        with gpt2.model.trace(UNEQUAL):
            if mode == "set":
                wpe.output = flip(wpe.output)
            else:
                halve_the_last(wpe.output)
            logits = gpt2.model.lm_head.output.save()
        edit = Edit("transformer.wpe", "output", None, flip if mode == "set" else halve_the_last)
        want = plainly(gpt2, UNEQUAL, edits=[edit._replace(mode=mode)])[LOGITS]
        assert same_answers(logits, want, UNEQUAL)
        assert not same_answers(logits, plainly(gpt2, UNEQUAL)[LOGITS], UNEQUAL)


def test_an_invoke_edits_the_position_embeddings_of_its_own_rows(gpt2: Setting) -> None:
    """Without padding they are one tensor for the whole pass, and such invokes run alone."""
    saved = []
    with gpt2.model.trace() as tracer:
        for index, prompts in enumerate((UNEQUAL, OTHER)):
            with tracer.invoke(prompts):
                if index == 1:
                    gpt2.model.transformer.wpe.output[:] = 0
                saved.append(gpt2.model.lm_head.output.save())
    assert tracer.result.passes == 1
    edit = Edit("transformer.wpe", "output", None, lambda x: x[3:].zero_())
    want = plainly(gpt2, [*UNEQUAL, *OTHER], edits=[edit])[LOGITS]
    assert same_answers(torch.cat(saved), want, [*UNEQUAL, *OTHER])


def test_positions_of_a_padded_batch_are_edited(gpt2: Setting) -> None:
    """What `wpe` is given, by assignment: an edit in place would reach the blocks, too."""
    wpe = gpt2.model.transformer.wpe

    def later(positions: Tensor) -> Tensor:
        return positions + 3

    with gpt2.model.trace(UNEQUAL):
        wpe.input = later(wpe.input)
        logits = gpt2.model.lm_head.output.save()
    edit = Edit("transformer.wpe", "input", None, later, "set")
    assert same_answers(logits, plainly(gpt2, UNEQUAL, edits=[edit])[LOGITS], UNEQUAL)
    assert not same_answers(logits, plainly(gpt2, UNEQUAL)[LOGITS], UNEQUAL)


@pytest.mark.parametrize("table", ["position_embeddings", "attention_mask"])
def test_what_one_module_of_a_padded_batch_is_given_is_edited(llama: Setting, table: str) -> None:
    path = "model.layers.3.self_attn"
    leaf: Any = ("position_embeddings", 0) if table == "position_embeddings" else (table,)

    def change(tensor: Tensor) -> Tensor:
        if table == "position_embeddings":
            return tensor * 0.5
        changed = tensor.clone()
        changed[..., -1, :-1] = False  # the last token sees itself only
        return changed

    with llama.model.trace(UNEQUAL):
        args, named = llama.at(path).inputs
        if table == "position_embeddings":
            cosines, sines = named[table]
            new: Any = (change(cosines), sines)
        else:
            new = change(named[table])
        llama.at(path).inputs = args, {**named, table: new}
        logits = llama.at("lm_head").output.save()
    want = plainly(llama, UNEQUAL, edits=[Edit(path, "input", leaf, change, "set")])[LOGITS]
    assert same_answers(logits, want, UNEQUAL)
    assert not same_answers(logits, plainly(llama, UNEQUAL)[LOGITS], UNEQUAL)


def test_rows_of_a_mask_belong_to_their_invoke(llama: Setting) -> None:
    path = "model.layers.2.self_attn"
    saved = []
    with llama.model.trace() as tracer:
        for index, prompts in enumerate((UNEQUAL, OTHER)):
            with tracer.invoke(prompts):
                if index == 1:
                    args, named = llama.at(path).inputs
                    mask = torch.zeros_like(named["attention_mask"])
                    mask[..., -1] = True
                    llama.at(path).inputs = args, {**named, "attention_mask": mask}
                saved.append(llama.at("lm_head").output.save())
    assert tracer.result.passes == 1

    def blind(tensor: Tensor) -> Tensor:
        changed = tensor.clone()
        changed[3:] = False
        changed[3:, ..., -1] = True
        return changed

    edit = Edit(path, "input", "attention_mask", blind, "set")
    want = plainly(llama, [*UNEQUAL, *OTHER], edits=[edit])[LOGITS]
    assert same_answers(torch.cat(saved), want, [*UNEQUAL, *OTHER])


# What stays refused, at the user's line ----------------------------------------------------------


def test_what_every_peer_has_for_itself_is_not_edited(get_padded: GetPadded) -> None:
    llama = get_padded("llama", (2, 4))
    whole = llama.model.model

    def the_table() -> None:
        whole.rotary_emb.output[0][:] = 0

    def the_positions_of_all() -> None:
        args, named = whole.inputs
        whole.inputs = args, {**named, "position_ids": named["position_ids"] * 0}

    def the_mask_of_all() -> None:
        whole.inputs[1]["attention_mask"][:] = 1

    def the_mask_in_place() -> None:
        whole.layers[1].self_attn.inputs[1]["attention_mask"][:] = True

    text = "reaches every block beside the hidden states (each peer computes it for itself)"
    for body in (the_table, the_positions_of_all, the_mask_of_all):
        refused(llama, NotYet, text, body, UNEQUAL)
    refused(llama, NotYet, "cannot edit it in place for all", the_mask_in_place, UNEQUAL)
    with pytest.raises(NotYet) as caught:
        with llama.model.trace(UNEQUAL):
            the_table()
    assert Path(__file__).name in str(caught.value)


def test_a_mask_is_there_only_in_a_padded_batch(get_padded: GetPadded) -> None:
    outline = get_padded("llama", ()).model.outline
    mask = Site("model.layers.1.self_attn", "input", ("attention_mask",))
    assert outline.leaf(mask, PassKind.PADDED).axes == ("batch", 1, "seq", "seq")
    with pytest.raises(NotASite, match="told apart in a batch without padding; tensors in a batch"):
        outline.leaf(mask, PassKind.PLAIN)


# Every architecture ------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", architectures.EXACT if SOAK else TYPES)
def test_the_outline_knows_what_a_padded_batch_gives(model_type: str) -> None:
    """Every dtype and shape, against a run of the real model on a padded batch of other sizes."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](**architectures.TINY[model_type])
    attention = "sdpa" if model_type in ("llama", "gpt2", "gemma", "opt", "jamba") else "eager"
    model: Any = AutoModelForCausalLM.from_config(
        config, attn_implementation=attention, experts_implementation="batched_mm"
    ).eval()
    twin = build_twin(config, torch.float32, attention)
    outline = scan(twin, config)
    sites = list(padded_sites(outline))
    assert any(site.module == outline.blocks_path + ".0" for site, _ in sites)
    ids, mask = left_padded([[1, 2, 3, 4, 5], [6, 7], [8, 9, 10], [11]])
    given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions_of(mask)}
    accepted = inspect.signature(model.forward).parameters
    found: dict[Site, tuple[str, tuple[int, ...]]] = {}

    def note(site: Site, tree: Any) -> None:
        for step in site.leaf:
            tree = tree[step]
        found[site] = (str(tree.dtype).removeprefix("torch."), tuple(tree.shape))

    for site, _ in sites:
        module = model.get_submodule(site.module)
        if site.io == "output":
            module.register_forward_hook(lambda m, args, out, site=site: note(site, out))
        else:
            module.register_forward_pre_hook(
                lambda m, args, kwargs, site=site: note(site, {**dict(enumerate(args)), **kwargs}),
                with_kwargs=True,
            )
    with torch.no_grad():
        model(**{name: tensor for name, tensor in given.items() if name in accepted})
    for site, leaf in sites:
        assert found[site] == (leaf.dtype.value, leaf.shape(4, 5)), site


@pytest.mark.parametrize("cuts", [(), (3,)])
def test_a_block_that_is_called_gets_no_mask(get_padded: GetPadded, cuts: tuple[int, ...]) -> None:
    """As the same call in plain Hugging Face: causal, and padding is attended to."""
    setting = get_padded("gpt2", cuts)
    blocks = setting.model.transformer.h
    with setting.model.trace(UNEQUAL):
        hidden = blocks[1].output.save()
        called = blocks[2](hidden).save()
        masked = blocks[2].output.save()
    with torch.no_grad():
        want: Any = setting.plain.get_submodule("transformer.h.2")(hidden.value)
    assert torch.equal(called, want)
    assert torch.allclose(called[0], masked[0], atol=1e-5)  # the row without padding
    assert not torch.allclose(called[1, -1], masked[1, -1], atol=1e-3)


@pytest.mark.parametrize("cuts", [(), (3,)])
def test_a_block_that_runs_on_an_assigned_value_has_the_batchs_mask(
    get_padded: GetPadded, cuts: tuple[int, ...]
) -> None:
    setting = get_padded("llama", cuts)
    layers = setting.model.model.layers
    with setting.model.trace(UNEQUAL):
        layers[4].input = layers[1].output
        batch = layers[4].output.save()
    for row, ids in enumerate(UNEQUAL):
        with setting.model.trace(ids):
            layers[4].input = layers[1].output
            alone = layers[4].output.save()
        assert torch.allclose(batch[row, -len(ids) :], alone[0], atol=1e-5)
