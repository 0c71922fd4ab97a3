"""The outline of a model: events in order, axes by meaning, and what is no site says why."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from transformers import GPT2Config, LlamaConfig, MixtralConfig

from glasshive.graph.errors import NotASite, UnknownModule, UnsupportedModel
from glasshive.graph.graph import IO, Site
from glasshive.graph.kernels import from_torch_dtype
from glasshive.graph.outline import Outline, PassKind, Steps
from glasshive.graph.tensor_trees import leaf_of, with_leaf
from glasshive.graph.twin import build_twin, outline_of, scan

LLAMA = LlamaConfig(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=64,
    bos_token_id=1,
    eos_token_id=2,
)
SIDES: tuple[IO, IO] = ("input", "output")
GPT2 = GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=64, bos_token_id=1, eos_token_id=2)


def scanned(config: Any) -> Outline:
    return scan(build_twin(config, torch.float32), config)


@pytest.fixture(scope="module")
def llama() -> Outline:
    return scanned(LLAMA)


def test_events_are_in_the_order_of_the_run(llama: Outline) -> None:
    order = [
        Site("model.embed_tokens", "output"),
        Site("model.layers.0", "input", (0,)),
        Site("model.layers.0.input_layernorm", "output"),
        Site("model.layers.0.self_attn", "output", (0,)),
        Site("model.layers.0.mlp", "output"),
        Site("model.layers.0", "output"),
        Site("model.layers.1", "input", (0,)),
        Site("model.layers.2", "output"),
        Site("model.norm", "output"),
        Site("lm_head", "output"),
    ]
    events = [llama.event(site) for site in order]
    assert events == sorted(events)
    assert [llama.block(event) for event in events] == [-1, 0, 0, 0, 0, 0, 1, 2, 3, 3]
    # a module around the blocks begins with the embeddings and ends with the head
    assert llama.block(llama.event(Site("model", "input"))) == -1
    assert llama.block(llama.event(Site("model", "output"))) == 3


def test_axes_are_told_apart(llama: Outline) -> None:
    assert llama.leaf(Site("model.layers.1", "output"), PassKind.PLAIN).axes == ("batch", "seq", 32)
    assert (
        llama.leaf(Site("model.layers.1.self_attn", "output", (0,)), PassKind.PLAIN).batch_axis == 0
    )
    assert llama.leaf(Site("lm_head", "output"), PassKind.PLAIN).shape(3, 5) == (3, 5, 64)
    assert str(llama.hidden_spec(2, 7)) == "float32[2, 7, 32]"


def test_a_dtype_is_the_model_s() -> None:
    half = scan(build_twin(LLAMA, torch.bfloat16), LLAMA)
    assert half.leaf(Site("model.layers.1", "output"), PassKind.PLAIN).dtype == from_torch_dtype(
        torch.bfloat16
    )


def test_twins_of_one_kind_are_scanned_once() -> None:
    config = copy.deepcopy(LLAMA)
    known = outline_of(build_twin(config, torch.float32), config)
    assert known == scanned(config)
    config._name_or_path = "/elsewhere"
    assert outline_of(build_twin(config, torch.float32), config) is known
    assert outline_of(build_twin(config, torch.float32, "eager"), config) is not known
    assert outline_of(build_twin(config, torch.bfloat16), config) is not known
    config.num_hidden_layers = 2
    assert outline_of(build_twin(config, torch.float32), config).n_blocks == 2


def test_what_is_no_site_says_why(llama: Outline) -> None:
    with pytest.raises(NotASite, match=r"'model\.layers' \(ModuleList\) is called 0 times"):
        llama.event(Site("model.layers", "output"))
    with pytest.raises(NotASite, match=r"tensors here: model\.layers\.1\.output"):
        llama.leaf(Site("model.layers.1", "output", (3,)), PassKind.PLAIN)
    with pytest.raises(UnknownModule, match=r"did you mean model\.layers\.1\.mlp"):
        llama.event(Site("model.layers.1.mpl", "output"))
    with pytest.raises(UnknownModule, match="has no parameter 'bias'; it has weight"):
        llama.param("model.norm", "bias")


def test_a_dropout_that_never_runs_is_no_site() -> None:
    gpt2 = scanned(GPT2)
    with pytest.raises(NotASite, match="is called 0 times"):
        gpt2.event(Site("transformer.h.0.attn.attn_dropout", "output"))


def test_experts_that_see_flat_tokens_are_no_sites_but_their_block_is() -> None:
    config = MixtralConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
        vocab_size=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    outline = scanned(config)
    assert outline.leaf(Site("model.layers.0", "output"), PassKind.PLAIN).axes == (
        "batch",
        "seq",
        32,
    )
    gate = outline.modules["model.layers.0.mlp.gate"]
    assert all("batch" not in leaf.axes for leaf in gate.inputs)


def test_what_reaches_blocks_by_a_side_way_is_known(llama: Outline) -> None:
    gpt2 = scanned(GPT2)
    for kind in PassKind:
        for io in SIDES:
            for leaf in llama.leaves("model.rotary_emb", io, kind):
                assert leaf.bypasses
            for leaf in llama.leaves("model.embed_tokens", io, kind):
                assert not leaf.bypasses
            for leaf in gpt2.leaves("transformer.wpe", io, kind):
                assert not leaf.bypasses


def test_of_what_the_whole_model_takes_only_the_tokens_keep_to_the_chain(llama: Outline) -> None:
    """Every peer of a route is given the mask and the positions, and makes its own of them."""
    for module in ("", "model"):
        leaves = {leaf.path: leaf for leaf in llama.leaves(module, "input", PassKind.PADDED)}
        assert not leaves["input_ids",].bypasses
        assert leaves["attention_mask",].bypasses
        assert leaves["position_ids",].bypasses


# A padded batch ----------------------------------------------------------------------------------


def test_tables_have_rows_in_a_padded_batch_only(llama: Outline) -> None:
    table = Site("model.rotary_emb", "output", (0,))
    assert llama.leaf(table, PassKind.PLAIN).shape(3, 7) == (1, 7, 8)
    assert llama.leaf(table, PassKind.PADDED).shape(3, 7) == (3, 7, 8)
    wpe = Site("transformer.wpe", "output")
    gpt2 = scanned(GPT2)
    assert gpt2.leaf(wpe, PassKind.PLAIN).batch_axis is None
    assert gpt2.leaf(wpe, PassKind.PADDED).batch_axis == 0
    hidden = Site("model.layers.1", "output")
    assert llama.leaf(hidden, PassKind.PADDED) == llama.leaf(hidden, PassKind.PLAIN)


def test_a_mask_is_a_site_of_a_padded_batch_only(llama: Outline) -> None:
    mask = Site("model.layers.1.self_attn", "input", ("attention_mask",))
    assert llama.leaf(mask, PassKind.PADDED).shape(3, 7) == (3, 1, 7, 7)
    assert llama.leaf(mask, PassKind.PADDED).beside
    text = r"told apart in a batch without padding; tensors in a batch without padding: model\.lay"
    with pytest.raises(NotASite, match=text):
        llama.leaf(mask, PassKind.PLAIN)


def test_the_last_chunk_of_a_prompt_has_what_prompt_and_steps_agree_on(llama: Outline) -> None:
    hidden, mask = (
        Site("model.layers.1", "output"),
        Site("model.layers.1.self_attn", "input", ("attention_mask",)),
    )
    assert llama.leaf(hidden, PassKind.CHUNK).shape(3, 4, 7) == (3, 4, 32)
    assert llama.leaf(Site("lm_head", "output"), PassKind.CHUNK).shape(3, 4, 7) == (3, 1, 64)
    assert llama.leaf(mask, PassKind.PADDED_CHUNK).shape(3, 4, 7) == (3, 1, 4, 11)
    with pytest.raises(NotASite, match=r"told apart in the last chunk of a prompt; tensors in the"):
        llama.leaf(mask, PassKind.CHUNK)
    assert llama.steps().in_chunks


@pytest.mark.parametrize("why", ["asks for numbers", "takes no mask", "runs other modules"])
def test_a_twin_that_cannot_be_scanned_padded_has_what_has_rows_anyway(why: str) -> None:
    """As before: hidden states of a padded batch are known, its position tables are not."""
    twin: Any = build_twin(GPT2, torch.float32)
    run = twin.forward

    def asks(
        input_ids: Any, attention_mask: Any = None, position_ids: Any = None, **rest: Any
    ) -> Any:
        if attention_mask is not None:
            attention_mask.sum().item()
        return run(input_ids=input_ids, **rest)

    def blind(input_ids: Any, use_cache: bool) -> Any:
        return run(input_ids=input_ids, use_cache=use_cache)

    def other(
        input_ids: Any, attention_mask: Any = None, position_ids: Any = None, **rest: Any
    ) -> Any:
        if attention_mask is not None:
            twin.lm_head(torch.zeros(1, 32, device="meta"))
        return run(input_ids=input_ids, **rest)

    ways = {"asks for numbers": asks, "takes no mask": blind, "runs other modules": other}
    twin.forward = ways[why]
    outline = scan(twin, GPT2)
    assert outline.leaf(Site("transformer.h.1", "output"), PassKind.PADDED).axes == (
        "batch",
        "seq",
        32,
    )
    with pytest.raises(NotASite, match=r"told apart in a batch with padding; tensors .*: none"):
        outline.leaf(Site("transformer.wpe", "output"), PassKind.PADDED)


def test_what_every_block_receives_is_marked(llama: Outline) -> None:
    """The rotary table lies beside the chain, wherever it is handed on; hidden states do not."""
    for module in ("model.layers.1", "model.layers.2.self_attn"):
        table = Site(module, "input", ("position_embeddings", 0))
        assert llama.leaf(table, PassKind.PLAIN).beside
        assert llama.leaf(table, PassKind.PLAIN).batch_axis is None
    assert not llama.leaf(Site("model.layers.1", "input", (0,)), PassKind.PLAIN).beside
    assert not llama.leaf(
        Site("model.layers.1.self_attn", "input", ("hidden_states",)), PassKind.PLAIN
    ).beside
    config = copy.deepcopy(LLAMA)  # which is told how it attends; that of other tests stays
    twin = build_twin(config, torch.float32, "eager")
    mask = Site("model.layers.1.self_attn", "input", ("attention_mask",))
    assert scan(twin, config).leaf(mask, PassKind.PLAIN).beside


def test_what_sums_up_all_rows_is_no_site() -> None:
    """One invoke would see the others' rows in it."""
    twin = build_twin(LLAMA, torch.float32)
    mlp: Any = twin.get_submodule("model.layers.1.mlp")
    mlp.gate_proj.register_forward_hook(lambda module, args, output: (output, output.mean()))
    mlp.forward = lambda hidden: hidden + mlp.gate_proj(hidden)[1]
    outline = scan(twin, LLAMA)
    assert outline.leaf(Site("model.layers.1.mlp.gate_proj", "output", (0,)), PassKind.PLAIN).axes
    with pytest.raises(NotASite, match="not a tensor whose rows and tokens can be told apart"):
        outline.leaf(Site("model.layers.1.mlp.gate_proj", "output", (1,)), PassKind.PLAIN)


def test_padding_among_tokens_without_values_is_not_looked_for() -> None:
    config = GPT2Config(**{**GPT2.to_dict(), "pad_token_id": 0})
    twin = build_twin(config, torch.float32)
    assert scan(twin, config).n_blocks == 2
    assert twin.config.pad_token_id == 0


def test_where_weights_lie(llama: Outline) -> None:
    assert llama.owner_block("model.embed_tokens") == -1
    assert llama.owner_block("model.layers.2.mlp.down_proj") == 2
    assert llama.owner_block("lm_head") == llama.n_blocks


def test_a_model_without_a_list_of_blocks_is_refused() -> None:
    config = LlamaConfig(**{**LLAMA.to_dict(), "num_hidden_layers": 3})
    twin = build_twin(config, torch.float32)
    config.num_hidden_layers = 7
    with pytest.raises(UnsupportedModel, match="no list of 7 blocks"):
        scan(twin, config)


def test_leaves_of_outputs_can_be_read_and_replaced() -> None:
    one, two = torch.zeros(2), torch.ones(2)
    tree = (one, {"k": (one, None)})
    assert leaf_of(tree, (1, "k", 0)) is one
    changed = with_leaf(tree, (1, "k", 0), two)
    assert changed[1]["k"][0] is two
    assert tree[1]["k"][0] is one
    for path in ((1, "k", 1), (5,), ("x",)):
        with pytest.raises(NotASite, match="no tensor at"):
            leaf_of(tree, path)


def test_threads_that_ask_at_a_time_disturb_no_run() -> None:
    """Seen failing without the lock: each found the other's modules among its own."""
    outline = scanned(LLAMA)
    asked = threading.Barrier(4)

    def ask(_: int) -> Steps:
        asked.wait(60)
        return outline.steps()

    with ThreadPoolExecutor(4) as threads:
        first, *others = threads.map(ask, range(4))
    assert all(one is first for one in others)
