"""What a loaded span does: its hooks, its inputs, its cache, and what it says it owns."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
)

from glasshive.graph.kernels_checks import GuardedOps
from glasshive.peer.checkpoint import Checkpoint
from glasshive.peer.errors import WrongInput
from glasshive.peer.span_model import SpanModel, StopForward

SaveTinyLlama = Callable[..., Path]
PROMPT = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


@pytest.fixture
def folder(save_tiny_llama: SaveTinyLlama) -> Path:
    return save_tiny_llama()


@pytest.fixture
def whole(folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder).requires_grad_(False)


@pytest.fixture
def spans(folder: Path) -> list[SpanModel]:
    checkpoint = Checkpoint(folder)
    return [checkpoint.load_span(start, end) for start, end in pairwise((0, 2, 3, 6))]


def hidden_after(whole: LlamaForCausalLM, n_blocks: int) -> Tensor:
    hidden: Tensor = whole.model(PROMPT, output_hidden_states=True).hidden_states[n_blocks]
    return hidden


def test_hooks_of_others_see_and_change_what_crosses_the_cuts(
    spans: list[SpanModel], whole: LlamaForCausalLM
) -> None:
    span = spans[1]
    seen: list[Tensor] = []

    def look(block: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0])

    def double(block: nn.Module, args: Any, output: Tensor) -> Tensor:
        seen.append(output)
        return output * 2

    block = span.module.get_submodule("model.layers.2")
    handles = [
        block.register_forward_pre_hook(look),
        block.register_forward_hook(double, prepend=True),
    ]
    received = hidden_after(whole, 2)
    sent = span.run(input_ids=None, hidden=received)
    assert sent is not None
    assert seen[0] is received
    assert torch.equal(seen[1], hidden_after(whole, 3))
    assert torch.equal(sent, seen[1] * 2)
    for handle in handles:
        handle.remove()
    assert torch.equal(span.run(input_ids=None, hidden=received), seen[1])  # type: ignore[arg-type]


def test_a_hook_may_end_the_forward(spans: list[SpanModel], whole: LlamaForCausalLM) -> None:
    def stop(module: nn.Module, args: Any, output: Any) -> None:
        raise StopForward

    span = spans[2]
    received = hidden_after(whole, 3)
    handle = span.module.get_submodule("model.layers.4").register_forward_hook(stop)
    assert span.run(input_ids=None, hidden=received) is None
    handle.remove()
    logits = span.run(input_ids=None, hidden=received)
    assert logits is not None
    assert torch.equal(logits, whole(PROMPT).logits)


def test_an_error_in_a_hook_leaves_the_span_usable(
    spans: list[SpanModel], whole: LlamaForCausalLM
) -> None:
    def fail(module: nn.Module, args: Any, output: Any) -> None:
        raise ValueError("a hook of the test")

    handle = spans[0].module.get_submodule("model.layers.1.mlp").register_forward_hook(fail)
    with pytest.raises(ValueError, match="a hook of the test"):
        spans[0].run(input_ids=PROMPT, hidden=None)
    handle.remove()
    sent = spans[0].run(input_ids=PROMPT, hidden=None)
    assert sent is not None
    assert torch.equal(sent, hidden_after(whole, 2))


def test_a_hosted_block_can_be_called_on_the_side(
    spans: list[SpanModel], whole: LlamaForCausalLM
) -> None:
    """From inside a hook, the cut blocks are ordinary modules while the span is paused."""
    span = spans[1]
    received = hidden_after(whole, 2)
    block = span.module.get_submodule("model.layers.2")
    results: list[Tensor] = []

    def call_again(norm: nn.Module, args: Any, output: Tensor) -> None:
        positions = torch.arange(PROMPT.shape[1])[None]
        rotary = span.module.get_submodule("model.rotary_emb")(received, positions)
        with span.paused():
            handle.remove()
            results.append(block(received * 0.5, position_embeddings=rotary))

    handle = block.get_submodule("post_attention_layernorm").register_forward_hook(call_again)
    sent = span.run(input_ids=None, hidden=received)
    assert sent is not None
    assert torch.equal(sent, hidden_after(whole, 3))
    rotary = whole.model.rotary_emb(received, torch.arange(PROMPT.shape[1])[None])
    wanted = whole.model.layers[2](received * 0.5, position_embeddings=rotary)
    assert torch.equal(results[0], wanted)


def test_gradients_reach_the_received_hidden_states(
    spans: list[SpanModel], whole: LlamaForCausalLM
) -> None:
    received = hidden_after(whole, 2).clone().requires_grad_()
    sent = spans[1].run(input_ids=None, hidden=received)
    assert sent is not None
    (gradient,) = torch.autograd.grad(sent.sum(), received)
    assert gradient.shape == received.shape
    assert gradient.abs().max() > 0


@pytest.mark.parametrize(
    ("index", "arguments", "text"),
    [
        (0, {"input_ids": None, "hidden": None}, "takes input_ids"),
        (0, {"input_ids": PROMPT, "hidden": torch.zeros(2, 4, 32)}, "no hidden states"),
        (0, {"input_ids": PROMPT[0], "hidden": None}, r"got \[4\]"),
        (0, {"input_ids": PROMPT[:, :0], "hidden": None}, "at least one"),
        (1, {"input_ids": PROMPT, "hidden": None}, "takes hidden states"),
        (1, {"input_ids": None, "hidden": torch.zeros(2, 4, 31)}, r"\[batch, seq, 32\]"),
        (1, {"input_ids": None, "hidden": torch.zeros(2, 4, 32, dtype=torch.int64)}, "hidden"),
        (0, {"input_ids": PROMPT, "hidden": None, "attention_mask": PROMPT[:, :2]}, r"\[2, 4\]"),
        (0, {"input_ids": PROMPT, "hidden": None, "position_ids": PROMPT[:1]}, r"\[2, 4\]"),
    ],
)
def test_inputs_that_do_not_fit_are_errors(
    spans: list[SpanModel], index: int, arguments: dict[str, Any], text: str
) -> None:
    with pytest.raises(WrongInput, match=text):
        spans[index].run(**arguments)


def test_a_cache_of_another_span_is_an_error(spans: list[SpanModel]) -> None:
    with pytest.raises(WrongInput, match="another span"):
        spans[0].run(input_ids=PROMPT, hidden=None, cache=spans[1].new_cache())


def test_the_cache_counts_tokens_and_bytes_and_moves_rows(spans: list[SpanModel]) -> None:
    cache = spans[0].new_cache()
    assert (cache.length_tokens, cache.held_bytes()) == (0, 0)
    sent = spans[0].run(input_ids=PROMPT, hidden=None, cache=cache)
    assert sent is not None
    # 2 blocks, keys and values, 2 rows, 2 heads, 4 tokens, 8 wide, 4 bytes each
    assert (cache.length_tokens, cache.held_bytes()) == (4, 2 * 2 * 2 * 2 * 4 * 8 * 4)
    later = spans[2].new_cache()
    hidden = spans[1].run(input_ids=None, hidden=sent)
    spans[2].run(input_ids=None, hidden=hidden, cache=later)
    before = [layer.keys.clone() for layer in later.hosted]
    later.reorder_cache(torch.tensor([1, 0]))
    for layer, keys in zip(later.hosted, before, strict=True):
        assert torch.equal(layer.keys, keys.flip(0))
    later.crop(-1)
    assert later.length_tokens == later.get_seq_length() == 3
    assert [layer.keys.shape[-2] for layer in later.hosted] == [3, 3, 3]
    later.batch_select_indices(torch.tensor([0]))
    assert later.hosted[0].keys.shape[0] == 1
    later.reset()
    assert (later.length_tokens, later.get_seq_length()) == (0, 0)


def test_each_module_is_owned_where_it_runs_on_true_values(spans: list[SpanModel]) -> None:
    first, middle, last = spans
    owned_by = {
        "model.layers.0": [first],
        "model.layers.1.self_attn.q_proj": [first],
        "model.layers.2.mlp": [middle],
        "model.layers.5.input_layernorm": [last],
        "model.embed_tokens": [first],
        "model.rotary_emb": [first, middle, last],
        "model.norm": [last],
        "lm_head": [last],
        "model.layers": [],
        "model.layers.6": [],
        "model.layers.1.nothing": [],
        "model.__class__": [],
    }
    for path, owners in owned_by.items():
        for side in ("input", "output"):
            assert [span for span in spans if span.owns(path, side)] == owners, path
    for path in ("", "model"):
        assert [span for span in spans if span.owns(path, "input")] == [first]
        assert [span for span in spans if span.owns(path, "output")] == [last]


def test_what_is_computed_from_a_dummy_embedding_is_not_owned(tmp_path: Path) -> None:
    """Bloom normalises the embedding: on later spans that module runs, but on a dummy."""
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=64, hidden_size=32, n_layer=4, n_head=4)
    BloomForCausalLM(config).save_pretrained(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    first = checkpoint.load_span(0, 2, attention="eager")
    last = checkpoint.load_span(2, 4, attention="eager")
    path = "transformer.word_embeddings_layernorm"
    assert (first.owns(path), last.owns(path)) == (True, False)
    assert (first.owns("transformer.ln_f"), last.owns("transformer.ln_f")) == (False, True)
    # The head is tied: the last span holds the embedding too, and never calls it.
    tied = "transformer.word_embeddings"
    assert (first.owns(tied), last.owns(tied)) == (True, False)


def test_module_names_and_class_stay_those_of_hugging_face(spans: list[SpanModel]) -> None:
    span = spans[1]
    assert type(span.module).__name__ == "LlamaForCausalLM"
    assert type(span.module).__module__ == LlamaForCausalLM.__module__
    assert (span.blocks_path, span.n_blocks, span.hidden_size) == ("model.layers", 6, 32)
    assert (span.is_first, span.is_last) == (False, False)
    assert (span.dtype, span.device) == (torch.float32, torch.device("cpu"))
    assert span.block_path(2) == "model.layers.2"


# Indices on devices where a bad one ends the process ---------------------------------------------


@pytest.fixture
def gpt2(tmp_path: Path) -> SpanModel:
    """A whole GPT-2 that knows 12 positions, guarded as on an accelerator."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=12)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    model = Checkpoint(tmp_path / "gpt2").load_span(0, 2)
    assert not model.guarded  # the CPU looks by itself
    model.guarded = True
    return model


def ids(tokens: int) -> Tensor:
    return torch.arange(tokens)[None]


def test_more_tokens_than_positions_are_refused_before_torch_sees_them(gpt2: SpanModel) -> None:
    for tokens in (12, 5):
        assert gpt2.run(input_ids=ids(tokens), hidden=None) is not None
    for _ in range(2):
        with pytest.raises(ValueError, match=r"index 12 is not in 0\.\.11"):
            gpt2.run(input_ids=ids(13), hidden=None)
    gpt2.guarded = False
    with pytest.raises(IndexError, match="index out of range in self"):
        gpt2.run(input_ids=ids(13), hidden=None)


def test_a_length_is_looked_at_once(gpt2: SpanModel, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []

    class Counted(GuardedOps):
        def __enter__(self) -> Any:
            looked.append(1)
            return super().__enter__()

    monkeypatch.setattr("glasshive.peer.span_model.GuardedOps", Counted)
    for tokens, times in ((6, 1), (6, 1), (4, 1), (7, 2)):
        gpt2.run(input_ids=ids(tokens), hidden=None)
        assert len(looked) == times
    gpt2.run(input_ids=ids(3), hidden=None, is_edited=True)
    assert len(looked) == 3


@pytest.mark.parametrize("way", ["edited", "padded", "stopped"])
def test_a_pass_that_proves_nothing_about_positions(gpt2: SpanModel, way: str) -> None:
    """It never reached position 12, so the next of its length must be looked at."""
    long = ids(13)
    if way == "edited":
        wpe = gpt2.module.get_submodule("transformer.wpe")
        handle = wpe.register_forward_pre_hook(lambda module, args: (args[0] * 0,))
        gpt2.run(input_ids=long, hidden=None, is_edited=True)
    elif way == "padded":
        mask = torch.ones_like(long)
        gpt2.run(input_ids=long, hidden=None, attention_mask=mask, position_ids=long * 0)
        handle = None
    else:

        def stop(module: nn.Module, args: Any, output: Any) -> None:
            raise StopForward

        wte = gpt2.module.get_submodule("transformer.wte")
        handle = wte.register_forward_hook(stop)
        assert gpt2.run(input_ids=long, hidden=None) is None
    if handle is not None:
        handle.remove()
    with pytest.raises(ValueError, match="index 12 is not in"):
        gpt2.run(input_ids=long, hidden=None)
