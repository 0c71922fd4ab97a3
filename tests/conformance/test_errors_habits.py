"""What people write who know NNsight or plain torch: it works, or the text says what to write."""

from __future__ import annotations

import contextvars
import re
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import HIDDEN, IDS, OTHER, Setting
from told import told

import glasshive
from glasshive.client.errors import NoRoute, NotInATrace, NotSaved, TraceError
from glasshive.graph.errors import NotYet

# Tracers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("log", "log lines come with gradients and cond; save the value, and print it after"),
        ("cond", "conditions come with gradients; torch.where(condition, a, b) chooses"),
        ("cache", "save what you need, as in [layer.output.save() for layer in model.model.layers"),
        ("apply", "no function travels to a peer; call yours on the traced values themselves"),
    ],
)
def test_what_tracers_do_not_do_yet(one_llama: Setting, name: str, text: str) -> None:
    def body(tracer: Any) -> None:
        getattr(tracer, name)  # blamed

    assert f"tracer.{name} is not in this release: " in told(one_llama, NotYet, body)
    assert text in told(one_llama, NotYet, body)


def test_a_name_that_no_tracer_has(one_llama: Setting) -> None:
    def body(tracer: Any) -> None:
        tracer.banana  # noqa: B018  # blamed

    assert "a tracer has no 'banana'; docs/api.md" in told(one_llama, AttributeError, body)


def test_a_result_that_is_not_there_yet(one_llama: Setting) -> None:
    def body(tracer: Any) -> None:
        one_llama.model.lm_head.output.save()
        tracer.result.hops  # noqa: B018  # blamed

    text = told(one_llama, TraceError, body)
    assert "once its block has ended without an error; what the model gives is model.output" in text


def test_a_barrier_does_nothing(one_llama: Setting) -> None:
    layers = one_llama.model.model.layers

    def patched(with_barrier: bool) -> Any:
        with one_llama.model.trace() as tracer:
            wait = tracer.barrier(2) if with_barrier else None
            with tracer.invoke(IDS):
                hidden = layers[2].output[:, -1]
                if wait is not None:
                    wait()
            with tracer.invoke(OTHER):
                if wait is not None:
                    wait()
                layers[2].output[:, -1] = hidden
                return one_llama.model.lm_head.output.save()

    assert torch.equal(patched(True), patched(False))


def test_an_invoke_without_a_prompt(one_llama: Setting) -> None:
    def body(tracer: Any) -> None:
        with tracer.invoke(IDS):
            pass
        with tracer.invoke():  # blamed
            pass

    text = told(one_llama, TraceError, body, None)
    assert "tracer.invoke() without a prompt, which in NNsight is about the rows of all" in text
    assert "give one invoke all prompts as a list, or read in every invoke and join" in text


def test_both_ways_out_of_an_invoke_without_a_prompt(one_llama: Setting) -> None:
    layer = one_llama.model.model.layers[2]
    with one_llama.model.trace() as tracer:
        with tracer.invoke(IDS):
            one = layer.output
        with tracer.invoke(OTHER):
            both = torch.cat([one, layer.output]).save()
    with one_llama.model.trace([IDS, OTHER]):
        batch = layer.output.save()
    assert torch.equal(both, batch)


# Gradients ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ask",
    [
        lambda loss, hidden: torch.autograd.grad(loss, hidden),
        lambda loss, hidden: torch.autograd.grad([loss], [hidden]),
        lambda loss, hidden: torch.autograd.grad(outputs=loss, inputs=torch.ones(2)),
        lambda loss, hidden: torch.autograd.backward(loss),
        lambda loss, hidden: torch.autograd.backward([loss], inputs=[hidden]),
        lambda loss, hidden: loss.backward(),
        lambda loss, hidden: loss.backward(retain_graph=True),
        lambda loss, hidden: hidden.retain_grad(),
        lambda loss, hidden: hidden.grad,
    ],
)
def test_gradients_come_later(one_llama: Setting, ask: Callable[[Any, Any], Any]) -> None:
    def body(tracer: Any) -> None:
        hidden = one_llama.model.model.layers[2].output
        loss = one_llama.model.lm_head.output.sum()
        ask(loss, hidden)

    text = told(one_llama, NotYet, body)
    assert re.match(
        r"test_errors_habits\.py:\d+: gradients through a traced model are not in", text
    )
    assert "save the activations and differentiate what comes after them outside the block" in text


def test_the_line_of_a_gradient(one_llama: Setting) -> None:
    def body(tracer: Any) -> None:
        hidden = one_llama.model.model.layers[2].output
        torch.autograd.grad(hidden.sum(), hidden)  # blamed

    told(one_llama, NotYet, body)


def test_gradients_of_plain_tensors_are_torchs_own(one_llama: Setting) -> None:
    with one_llama.model.trace(IDS):
        one_llama.model.lm_head.output.save()
        with pytest.raises(RuntimeError, match="does not require grad"):
            torch.autograd.grad(torch.ones(()), torch.ones(()))


# Two models --------------------------------------------------------------------------------------


@pytest.fixture
def gpt2(get_setting: Any) -> Any:
    return get_setting("gpt2", (3,)).model


def test_a_module_of_another_model(one_llama: Setting, gpt2: Any) -> None:
    uses: list[Callable[[Any], Any]] = [
        lambda hidden: gpt2.transformer.h[1].output,
        lambda hidden: gpt2.transformer.ln_f(hidden),
        lambda hidden: gpt2.lm_head.weight,
        lambda hidden: setattr(gpt2.transformer.h[1], "output", hidden),
    ]
    for use in uses:

        def body(tracer: Any, use: Any = use) -> None:
            use(one_llama.model.model.layers[2].output)

        text = told(one_llama, NotInATrace, body)
        assert (
            f"of another model ({gpt2.name}) is used in a trace of {one_llama.model.name}" in text
        )
        assert "save what you need, end this block, and use it in a trace of the other" in text


def test_an_unsaved_value_of_another_models_trace(one_llama: Setting, gpt2: Any) -> None:
    with one_llama.model.trace(IDS):
        hidden = one_llama.model.model.layers[2].output
        one_llama.model.lm_head.output.save()
    with pytest.raises(NotSaved) as caught, gpt2.trace(IDS):
        gpt2.transformer.h[1].output = hidden
    text = str(caught.value)
    assert re.search(rf"made at \S+ in a trace of {one_llama.model.name}, was not saved", text)


def test_a_trace_of_another_model_inside(one_llama: Setting, gpt2: Any) -> None:
    def body(tracer: Any) -> None:
        with gpt2.trace(IDS):  # blamed
            pass

    name = one_llama.model.name
    text = told(one_llama, TraceError, body)
    assert f"a trace of {name} is open already, so a trace of {gpt2.name} cannot begin" in text


def test_values_of_two_models_open_at_once(one_llama: Setting, gpt2: Any) -> None:
    """Each thread has a trace of its own; a value goes from one to the other."""
    hidden: list[Any] = []
    ready, done = threading.Event(), threading.Event()

    def hold() -> None:
        with one_llama.model.trace(IDS):
            hidden.append(one_llama.model.model.layers[2].output)
            one_llama.model.lm_head.output.save()
            ready.set()
            done.wait(60)

    holder = threading.Thread(target=contextvars.Context().run, args=(hold,))
    holder.start()
    try:
        assert ready.wait(60)
        for use in (
            lambda: gpt2.transformer.h[1].output + hidden[0],
            lambda: gpt2.transformer.ln_f(hidden[0]),
            lambda: setattr(gpt2.transformer.h[1], "output", hidden[0]),
        ):
            with pytest.raises(TraceError) as caught, gpt2.trace(IDS):
                use()
            text = str(caught.value)
            assert text.startswith("test_errors_habits.py:")
            assert "values of two traces meet here (" in text
            assert f"a trace of {gpt2.name}" in text
            assert f"a trace of {one_llama.model.name}" in text
            assert "save the value in its own trace, and use it in the other when that" in text
    finally:
        done.set()
        holder.join()


def test_a_saved_value_goes_to_another_model(one_llama: Setting, gpt2: Any) -> None:
    with one_llama.model.trace(IDS):
        hidden = one_llama.model.model.layers[2].output.save()
    with gpt2.trace(IDS):
        gpt2.transformer.h[1].output = hidden
        seen = gpt2.transformer.h[2].input.save()
    assert torch.equal(seen, hidden)


# Options -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["avoid", "route"])
@pytest.mark.parametrize(
    ("peers", "text"),
    [
        ("12D3KooW", "got '12D3KooW' (str)"),
        (5, "got 5 (int)"),
        (True, "got True (bool)"),
        ({"a": 1}, "got {'a': 1} (dict)"),
        ([3], "got one of type int: got no peer id of 1 to 64 characters"),
        (["3xKqTf9s"], "got one '3xKqTf9s': 3xKqTf9s is not the id of an Ed25519 key"),
        (["l0l"], "got one 'l0l': 'l0l' is not base58"),
    ],
)
def test_peers_that_are_none(one_llama: Setting, option: str, peers: Any, text: str) -> None:
    with pytest.raises(TraceError) as caught:
        one_llama.model.trace(IDS, **{option: peers})
    assert str(caught.value).startswith("test_errors_habits.py:")
    wanted = f"{option}= takes whole peer ids, as in {option}=[tracer.result.hops[0].peer]; "
    assert wanted + text in str(caught.value)


def test_a_peer_that_is_avoided(one_llama: Setting) -> None:
    with one_llama.model.trace(IDS) as tracer:
        one_llama.model.lm_head.output.save()
    middle = tracer.result.hops[1].peer
    with pytest.raises(glasshive.GlasshiveError) as caught:
        with one_llama.model.trace(IDS, avoid=[middle]):
            one_llama.model.lm_head.output.save()
    assert "nobody else serves blocks 2:4" in str(caught.value)
    assert f"left out: 2:4 by {middle[-8:]} (named in avoid=)" in str(caught.value)


def test_a_route_is_of_the_peers_that_are_named(one_llama: Setting) -> None:
    with one_llama.model.trace(IDS) as tracer:
        free = one_llama.model.lm_head.output.save()
    peers = [hop.peer for hop in tracer.result.hops]
    with one_llama.model.trace(IDS, route=list(reversed(peers))) as again:
        bound = one_llama.model.lm_head.output.save()
    assert [hop.peer for hop in again.result.hops] == peers
    assert torch.equal(free, bound)
    for named, missing in ((peers[:2], "4:6"), ([], "0:6")):
        with pytest.raises(NoRoute) as caught:
            with one_llama.model.trace(IDS, route=named):
                one_llama.model.lm_head.output.save()
        assert f"no route: no peer of route= serves blocks {missing} (" in str(caught.value)
        assert str(caught.value).endswith("name peers that serve all of them, or leave route= out")


# Spellings that work -----------------------------------------------------------------------------


def test_saving_by_function(one_llama: Setting) -> None:
    layers = one_llama.model.model.layers
    with one_llama.model.trace(IDS):
        one = glasshive.save(layers[0].output)
        several = glasshive.save([layer.output[:, -1] for layer in layers])
        named = glasshive.save({"mlp": layers[1].mlp.output, "rest": (layers[1].output, 3)})
        parts = glasshive.save(layers[2].self_attn.output)
        number = glasshive.save(7)
    assert one.shape == (1, len(IDS), HIDDEN)
    assert torch.equal(torch.stack(several)[0], one[:, -1])
    assert torch.isfinite(named["mlp"]).all()
    assert torch.isfinite(named["rest"][0]).all()
    assert torch.isfinite(parts[0]).all()
    assert number == 7


def test_the_prompts_tokens_can_be_saved_and_used(one_llama: Setting) -> None:
    with one_llama.model.trace([IDS, IDS[:3]]) as tracer:
        ids, mask = tracer.input_ids.save(), tracer.attention_mask.save()
        lengths = tracer.lengths.save()
        hidden = one_llama.model.model.layers[1].output
        first = hidden[torch.arange(2), hidden.shape[1] - tracer.lengths].save()
        embedded = one_llama.model.model.embed_tokens(tracer.input_ids).save()
        tracer.input_ids[:] = 0  # a copy: the model gets the prompt
        tokens = one_llama.model.model.embed_tokens.input.save()
    padded = torch.tensor([IDS, [0, 0, 0, *IDS[:3]]])
    assert torch.equal(ids, padded)
    assert torch.equal(tokens, padded)
    assert torch.equal(mask, (torch.arange(6) >= torch.tensor([[0], [3]])).long())
    assert lengths.tolist() == [6, 3]
    assert first.shape == (2, HIDDEN)
    assert torch.equal(embedded, one_llama.plain.get_submodule("model.embed_tokens")(padded))


def test_dtype_and_device_of_a_model(one_llama: Setting) -> None:
    model = one_llama.model
    assert model.dtype is torch.float32
    with model.trace(IDS):
        hidden = model.model.layers[1].output
        other = torch.ones(HIDDEN, dtype=model.dtype, device=model.device)
        total = (hidden.to(model.device) + other).save()
    assert total.device == model.device


@pytest.mark.parametrize("path", ["", "model.layers.2"])
def test_named_modules_are_those_of_hugging_face(one_llama: Setting, path: str) -> None:
    ours = dict((one_llama.at(path) if path else one_llama.model).named_modules())
    theirs = dict(one_llama.plain.get_submodule(path).named_modules())
    assert list(ours) == list(theirs)
    prefix = f"{path}." if path else ""
    assert all(module.path == (prefix + name).rstrip(".") for name, module in ours.items())
    assert ours["mlp" if path else "model.layers.2.mlp"] == one_llama.model.model.layers[2].mlp
