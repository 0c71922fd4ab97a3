"""What is read and saved equals what torch hooks see in the plain model."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from oracle import LOGITS, Read
from tiny_models import BLOCKS, HIDDEN, IDS, OTHER, Setting

from glasshive.client.errors import TraceError


def test_every_block_output_and_the_logits(tiny: Setting) -> None:
    with tiny.model.trace(IDS):
        saved = [tiny.at(tiny.block(i)).output.save() for i in range(BLOCKS)]
        logits = tiny.at("lm_head").output.save()
    want = tiny.hooked(IDS, reads=[Read(tiny.block(i), "output") for i in range(BLOCKS)])
    for index, got in enumerate(saved):
        assert torch.equal(got, want[tiny.block(index), "output", None])
    assert torch.equal(logits, want[LOGITS])


def test_the_inputs_of_every_kind_of_module(tiny: Setting) -> None:
    paths = [
        tiny.names.embed,
        *(tiny.block(i) for i in range(BLOCKS)),
        *(tiny.block(2, part) for part in ("first_norm", "second_norm", "mlp", "projection")),
        tiny.names.final_norm,
        "lm_head",
    ]
    with tiny.model.trace(IDS):
        saved = {path: tiny.at(path).input.save() for path in paths}
    want = tiny.hooked(IDS, reads=[Read(path, "input") for path in paths])
    for path in paths:
        assert torch.equal(saved[path], want[path, "input", None]), path


def test_outputs_inside_blocks(tiny: Setting) -> None:
    parts = ("first_norm", "second_norm", "mlp", "projection")
    with tiny.model.trace(IDS):
        saved = {
            (i, part): tiny.at(tiny.block(i, part)).output.save() for i in (1, 4) for part in parts
        }
        attention = tiny.at(tiny.block(3, "attention")).output[0].save()
    reads = [Read(tiny.block(i, part), "output") for i in (1, 4) for part in parts]
    want = tiny.hooked(IDS, reads=[*reads, Read(tiny.block(3, "attention"), "output", 0)])
    for (i, part), got in saved.items():
        assert torch.equal(got, want[tiny.block(i, part), "output", None])
    assert torch.equal(attention, want[tiny.block(3, "attention"), "output", 0])


def test_named_arguments_are_leaves(llama: Setting) -> None:
    path = llama.block(3, "attention")
    with llama.model.trace(IDS):
        args, named = llama.at(path).inputs
        hidden = named["hidden_states"].save()
        cosines, sines = (one.save() for one in named["position_embeddings"])
    assert args == ()
    leaves: list[Any] = ["hidden_states", ("position_embeddings", 0), ("position_embeddings", 1)]
    want = llama.hooked(IDS, reads=[Read(path, "input", leaf) for leaf in leaves])
    for leaf, got in zip(leaves, (hidden, cosines, sines), strict=True):
        assert torch.equal(got, want[path, "input", leaf])


def test_the_first_positional_argument_and_input_are_one_site(llama: Setting) -> None:
    with llama.model.trace(IDS):
        block = llama.model.model.layers[2]
        assert block.inputs[0][0] is block.input
        block.input[:, 1] = 0
        logits = llama.model.lm_head.output.save()
        seen = block.inputs[0][0].save()
    assert not seen[:, 1].any()
    edit = ("model.layers.2", "input", None, lambda x: x[:, 1].zero_())
    assert torch.equal(logits, llama.hooked(IDS, edits=[edit])[LOGITS])


def test_named_outputs_by_attribute_and_by_key(tiny: Setting) -> None:
    base = tiny.names.embed.split(".")[0]
    with tiny.model.trace(IDS):
        logits = tiny.model.output.logits.save()
        hidden = tiny.at(base).output["last_hidden_state"].save()
    want = tiny.hooked(IDS, reads=[Read(base, "output", "last_hidden_state", name="last")])
    assert torch.equal(logits, want[LOGITS])
    assert torch.equal(hidden, want["last"])


def test_tuples_and_names_are_saved_whole(tiny: Setting) -> None:
    path = tiny.block(2, "attention")
    with tiny.model.trace(IDS):
        attention = tiny.at(path).output.save()
        named = tiny.model.output.save()
        args, _ = tiny.at(tiny.block(3)).inputs.save()
    want = tiny.hooked(
        IDS,
        reads=[
            Read(path, "output", 0, name="attention"),
            Read(tiny.block(3), "input", name="in"),
        ],
    )
    assert isinstance(attention, tuple)
    assert torch.equal(attention[0], want["attention"])
    assert torch.equal(named.logits, want[LOGITS])
    assert torch.equal(args[0], want["in"])


def test_token_ids_are_an_input(tiny: Setting) -> None:
    with tiny.model.trace([IDS, OTHER]) as tracer:
        ids = tiny.at(tiny.names.embed).input.save()
        assert torch.equal(tracer.input_ids, torch.tensor([IDS, OTHER]))
        assert tracer.attention_mask.all()
        assert tracer.lengths.tolist() == [6, 6]
    assert ids.tolist() == [IDS, OTHER]


def test_reductions_before_saving(tiny: Setting) -> None:
    direction = torch.randn(HIDDEN, generator=torch.Generator().manual_seed(1))
    with tiny.model.trace([IDS, OTHER]):
        hidden = [tiny.at(tiny.block(i)).output for i in range(BLOCKS)]
        norms = torch.stack([h.norm(dim=-1).mean(1) for h in hidden]).save()
        projected = torch.stack([h[:, -1] @ direction for h in hidden], dim=1).save()
        top = tiny.at("lm_head").output[:, -1].softmax(-1).topk(3)
        values, indices = top.values.save(), top.indices.save()
        largest = hidden[-1].abs().amax(dim=(0, 1)).save()
    want = tiny.hooked([IDS, OTHER], reads=[Read(tiny.block(i), "output") for i in range(BLOCKS)])
    plain = [want[tiny.block(i), "output", None] for i in range(BLOCKS)]
    assert torch.equal(norms, torch.stack([h.norm(dim=-1).mean(1) for h in plain]))
    assert torch.equal(projected, torch.stack([h[:, -1] @ direction for h in plain], dim=1))
    best = want[LOGITS][:, -1].softmax(-1).topk(3)
    assert torch.equal(values, best.values)
    assert torch.equal(indices, best.indices)
    assert torch.equal(largest, plain[-1].abs().amax(dim=(0, 1)))


def test_saves_of_views_and_of_what_is_edited_later(tiny: Setting) -> None:
    path = tiny.block(2)
    with tiny.model.trace(IDS):
        out = tiny.at(path).output
        before = out.clone().save()
        whole = out.save()
        last = out[:, -1].save()
        heads = out.view(1, 6, 4, 8).transpose(1, 2).save()
        out[:, -1] = 1
        after = tiny.at(tiny.block(3)).output.save()
    want = tiny.hooked(
        IDS,
        reads=[
            Read(path, "output", None, "before", name="before"),
            Read(path, "output", name="edited"),
            Read(tiny.block(3), "output", name="after"),
        ],
        edits=[(path, "output", None, lambda x: x[:, -1].fill_(1))],
    )
    assert torch.equal(before, want["before"])
    assert torch.equal(whole, want["edited"])
    assert torch.equal(last, want["edited"][:, -1])
    assert torch.equal(heads, want["edited"].view(1, 6, 4, 8).transpose(1, 2))
    assert torch.equal(after, want["after"])


def test_weights_are_read_only_copies(tiny: Setting) -> None:
    path = tiny.block(4, "projection")
    with tiny.model.trace(IDS):
        weight = tiny.at(path).weight.save()
        row = tiny.at("lm_head").weight[7].save()
        embedding = tiny.at(tiny.names.embed).weight[IDS].save()
    assert torch.equal(weight, tiny.plain.get_submodule(path).weight)
    assert torch.equal(row, tiny.plain.get_submodule("lm_head").weight[7])
    assert torch.equal(embedding, tiny.plain.get_submodule(tiny.names.embed).weight[IDS])


def test_an_edit_of_a_weight_is_refused_and_of_a_clone_is_not(llama: Setting) -> None:
    with pytest.raises(TraceError, match=r"lm_head\.weight is edited in place, but weights are"):
        with llama.model.trace(IDS):
            llama.model.lm_head.weight[0, 1:] = 0
    with llama.model.trace(IDS):
        weight = llama.model.lm_head.weight.clone()
        weight[:] = 0
        zeros = weight.save()
        logits = llama.model.lm_head.output.save()
    assert not zeros.any()
    assert torch.equal(logits, llama.hooked(IDS)[LOGITS])


def test_nothing_but_a_weight_needs_no_forward(llama: Setting) -> None:
    with llama.model.trace(IDS) as tracer:
        norm = llama.model.model.norm.weight.save()
    assert torch.equal(norm, llama.plain.get_submodule("model.norm").weight)
    assert len(tracer.result.hops) == 1
    assert all(hop.hidden_bytes == 0 for hop in tracer.result.hops)  # no hidden states travelled


def test_the_route_ends_at_the_last_block_that_is_read(get_setting: Any) -> None:
    setting = get_setting("llama", (2, 4))
    for block, hops in ((0, 1), (1, 1), (2, 2), (3, 2), (4, 3)):
        with setting.model.trace(IDS) as tracer:
            got = setting.model.model.layers[block].output.save()
        assert len(tracer.result.hops) == hops
        want = setting.hooked(IDS, reads=[Read(f"model.layers.{block}", "output")])
        assert torch.equal(got, want[f"model.layers.{block}", "output", None])


def test_stop_ends_the_body_and_keeps_what_was_saved(get_setting: Any) -> None:
    setting = get_setting("llama", (2, 4))
    with setting.model.trace(IDS) as tracer:
        first = setting.model.model.layers[1].output.save()
        tracer.stop()
        pytest.fail("the body goes on")  # pragma: no cover
    want = setting.hooked(IDS, reads=[Read("model.layers.1", "output")])
    assert torch.equal(first, want["model.layers.1", "output", None])
    assert len(tracer.result.hops) == 1


def test_stop_inside_an_invoke(llama: Setting) -> None:
    with llama.model.trace() as tracer:
        with tracer.invoke(IDS):
            one = llama.model.model.layers[1].output.save()
        with tracer.invoke(OTHER):
            two = llama.model.model.layers[1].output.save()
            tracer.stop()
        pytest.fail("the body goes on")  # pragma: no cover
    want = llama.hooked([IDS, OTHER], reads=[Read("model.layers.1", "output")])
    assert torch.equal(torch.cat([one, two]), want["model.layers.1", "output", None])


def test_traces_in_several_threads(llama: Setting) -> None:
    found: dict[int, Any] = {}

    def work(number: int) -> None:
        for _ in range(3):
            with llama.model.trace([number + 1] * 5):
                llama.model.model.layers[1].output[:, 0] = number
                found[number] = llama.model.lm_head.output.save()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.backends.mha.get_fastpath_enabled()
    for number in range(4):

        def edit(tensor: torch.Tensor, number: int = number) -> None:
            tensor[:, 0] = number

        edits = [("model.layers.1", "output", None, edit)]
        want = llama.hooked([number + 1] * 5, edits=edits)[LOGITS]
        assert torch.equal(found[number], want)


def test_text_and_ids_are_the_same_prompt(llama: Setting) -> None:
    forms: list[Any] = [
        "w3 w14 w15 w9 w26 w5",
        ["w3 w14 w15 w9 w26 w5"],
        IDS,
        [IDS],
        torch.tensor(IDS),
        torch.tensor([IDS]),
        torch.tensor(IDS).numpy(),
        [torch.tensor(IDS)],
        {"input_ids": [IDS], "attention_mask": [[1] * 6]},
        llama.model.tokenizer(["w3 w14 w15 w9 w26 w5"], return_tensors="pt"),
        llama.model.tokenizer("w3 w14 w15 w9 w26 w5"),
    ]
    want = llama.hooked(IDS)[LOGITS]
    for prompt in forms:
        with llama.model.trace(prompt):
            logits = llama.model.lm_head.output.save()
        assert torch.equal(logits, want), prompt


def test_estimate_counts_what_the_run_then_sends(get_setting: Any) -> None:
    setting = get_setting("llama", (2, 4))
    layers = setting.model.model.layers
    with setting.model.trace(IDS) as tracer:
        layers[4].output[:, -1] += layers[1].output[:, 0]
        logits = setting.model.lm_head.output[:, -1].save()
        estimate = tracer.estimate()
    assert estimate["hops"] == 3
    assert estimate["passes"] == 1
    assert estimate["saved_bytes"] == logits.numel() * 4 == tracer.result.received_bytes
    hops = tracer.result.hops
    assert estimate["hop_bytes"] == sum(hop.hidden_bytes + hop.carried_bytes for hop in hops)
