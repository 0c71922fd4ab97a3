"""Which tokens are chosen: transformers' `generate` decides, and its own processors for chance."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
from generation_oracle import drawn, generate_hooked
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import glasshive
from glasshive.client.errors import Misfit, NotSaved, PeerFailed, TraceError
from glasshive.graph.errors import GlasshiveError, GraphError, ShapeMismatch

CUTS: tuple[tuple[int, ...], ...] = ((), (1, 3, 5))
ROWS = torch.tensor([[3, 14, 15, 92, 65], [35, 89, 79, 32, 38], [9, 9, 9, 9, 9]])
NEW = 16
VARIED: dict[str, Any] = {"repetition_penalty": 1.7}  # left alone, a tiny model repeats itself


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama that stops at no token."""
    torch.manual_seed(0)
    config = LlamaConfig(**{**architectures.TINY["llama"], "eos_token_id": None})
    made: Path = tmp_path_factory.mktemp("choice")
    AutoModelForCausalLM.from_config(config).eval().save_pretrained(made)
    return made


@pytest.fixture(scope="module")
def plain(folder: Path) -> Any:
    """Plain Hugging Face."""
    return AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False)


@pytest.fixture(scope="module", params=CUTS, ids=lambda cuts: f"{len(cuts) + 1}-spans")
def model(folder: Path, request: pytest.FixtureRequest) -> Any:
    """The same over one span, and over three."""
    return glasshive.local(folder, cuts=request.param)


def test_chance_is_a_function_of_seed_row_and_step(model: Any, plain: Any) -> None:
    processors = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(1.3),
            TemperatureLogitsWarper(3.0),
            TopKLogitsWarper(40),
            TopPLogitsWarper(0.95),
            MinPLogitsWarper(0.001),
        ]
    )
    choice = {
        "do_sample": True,
        "repetition_penalty": 1.3,
        "temperature": 3.0,
        "top_k": 40,
        "top_p": 0.95,
        "min_p": 0.001,
    }
    with model.generate(ROWS, max_new_tokens=NEW, seed=7, **choice) as tracer:
        pass
    assert torch.equal(tracer.output_ids, drawn(plain, ROWS, NEW, processors, 7))
    with model.generate(ROWS, max_new_tokens=NEW, seed=8, **choice) as other:
        pass
    assert not torch.equal(tracer.output_ids, other.output_ids)


def test_torch_manual_seed_repeats_a_generation(model: Any) -> None:
    made = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        with model.generate(ROWS, max_new_tokens=NEW, do_sample=True, temperature=5.0) as tracer:
            pass
        made.append(tracer.output_ids)
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def stop_tokens(plain: Any) -> tuple[int, Tensor]:
    """A token with which the first row ends before the others, and what there is without it."""
    ids, _ = generate_hooked(plain, ROWS, NEW, **VARIED)
    new = ids[:, ROWS.shape[1] :]
    token = next(
        int(one)
        for at, one in enumerate(new[0])
        if at >= 2 and int(one) not in new[0, :at].tolist()
    )
    return token, new


@pytest.mark.parametrize("several", [False, True])
def test_a_row_ends_with_a_stop_token(several: bool, model: Any, plain: Any) -> None:
    token, _ = stop_tokens(plain)
    rows = ROWS if several else ROWS[:1]
    choice = {"eos_token_id": [token, 1], "pad_token_id": 5, **VARIED}
    path = "model.layers.3"
    wanted, reads = generate_hooked(plain, rows, NEW, reads=[path], **choice)
    with model.generate(rows, max_new_tokens=NEW, **choice) as tracer:
        saved = [model.model.layers[3].output.save() for _ in tracer.iter[:]]
        result = tracer.result.save()
    assert torch.equal(tracer.output_ids, wanted)
    assert torch.equal(result, wanted)
    made = len(reads[path])
    assert (made < NEW) is not several
    for one, want in zip(saved, reads[path], strict=False):
        assert torch.equal(one, want)
    for one in saved[made:]:
        with pytest.raises(NotSaved, match=rf"never came: .* ended at step {made - 1}, "):
            one.sum()


def test_where_it_ended_is_said(model: Any) -> None:
    """Rows and invokes end at steps of their own: token 7 is written there."""
    with model.generate(max_new_tokens=8, eos_token_id=[7], pad_token_id=5) as tracer:
        for ends in ((2, 4, 2), (3,), (None, 1), ()):
            rows = ROWS[: len(ends)] if ends else ROWS[:1]
            with tracer.invoke(rows, max_new_tokens=6):
                for step in tracer.iter[:]:
                    model.lm_head.output.save()
                    model.generator.output[:] = torch.tensor(
                        [7 if step == end else 9 for end in ends or (5,)]
                    )
    assert tracer.ended_at == [[2, 4, 2], [3], [None, 1], [5]]
    assert repr(tracer) == (
        f"<{tracer.title}: ended at step 4 of 6 with a stop token (its rows with one at steps "
        "2, 4, 2); ended at step 3 of 6 with a stop token; 6 new tokens (its rows with one at "
        "steps -, 1); 6 new tokens>"
    )
    with model.generate(ROWS, max_new_tokens=2) as tracer:
        pass
    assert tracer.ended_at == [None] * 3
    assert repr(tracer) == f"<{tracer.title}: 2 new tokens>"


@pytest.mark.filterwarnings("ignore:.* begins behind the 6 steps")
def test_slices_of_steps_are_those_of_a_list(model: Any) -> None:
    steps = list(range(6))
    with model.generate(ROWS, max_new_tokens=6) as tracer:
        for wanted in (
            *(slice(2, 5), slice(3, None), slice(-2, None), slice(1, -1), slice(None, None, 2)),
            *(slice(1, None, 3), slice(None, None, -1), slice(4, 1, -2), slice(9, None)),
        ):
            assert list(tracer.iter[wanted]) == steps[wanted]
            assert len(tracer.iter[wanted]) == len(steps[wanted])


def test_a_slice_of_steps_is_read_at_its_steps(model: Any, plain: Any) -> None:
    path = "model.layers.3"
    _, reads = generate_hooked(plain, ROWS, 6, reads=[path])
    with model.generate(ROWS, max_new_tokens=6) as tracer:
        late = [model.model.layers[3].output.save() for _ in tracer.iter[2:5]]
        last = [model.model.layers[3].output.save() for _ in tracer.iter[-2:]]
        every = [model.model.layers[3].output.save() for _ in tracer.iter[1::2]]
    for saved, wanted in ((late, slice(2, 5)), (last, slice(4, 6)), (every, slice(1, None, 2))):
        assert len(saved) == len(reads[path][wanted])
        assert all(map(torch.equal, saved, reads[path][wanted]))


def test_a_generation_of_which_nothing_is_run_is_an_error(model: Any) -> None:
    """It was one of the graph's, which named no line."""
    with (
        pytest.raises(TraceError, match=r"test_generation_choice\.py:\d+: nothing of this gener"),
        model.generate(ROWS, max_new_tokens=3) as tracer,
    ):
        for _ in tracer.iter[:]:
            model.generator.output = torch.tensor([5, 6, 7])


def test_a_token_can_be_written(model: Any, plain: Any) -> None:
    """The token of step 2 is another: what follows is what `generate` makes of those so far."""
    with model.generate(ROWS, max_new_tokens=6) as tracer:
        for step in tracer.iter[:]:
            if step == 2:
                model.generator.output[:] = 17
    begun, _ = generate_hooked(plain, ROWS, 2)
    forced = torch.cat([begun, torch.full((3, 1), 17)], 1)
    wanted, _ = generate_hooked(plain, forced, 3)
    assert torch.equal(tracer.output_ids, wanted)


def test_a_token_outside_the_vocabulary_is_refused(model: Any) -> None:
    text = r"test_generation_choice.py:\d+: GraphError at peer .*not in the vocabulary of 128"
    with (
        pytest.raises(PeerFailed, match=text),
        model.generate(ROWS, max_new_tokens=3) as tracer,
    ):
        for _ in tracer.iter[0]:
            model.generator.output[:] = 128


# What is refused ---------------------------------------------------------------------------------


def test_a_step_that_is_not_there_is_refused(model: Any) -> None:
    with (
        pytest.raises(TraceError, match="step 4 of a generation of 4 new tokens, whose steps are"),
        model.generate(ROWS, max_new_tokens=4) as tracer,
    ):
        for _ in tracer.iter[4]:
            pass


def test_a_slice_without_steps_is_told(model: Any) -> None:
    """An edit that is never made looks like one that changes nothing."""

    def reads_no_step() -> None:
        with model.generate(ROWS, max_new_tokens=4) as tracer:
            for wanted in (slice(0), slice(2, 2), slice(4, None)):  # the first two are no mistake
                for _ in tracer.iter[wanted]:
                    raise AssertionError

    text = r"tracer.iter\[4:...\] begins behind the 4 steps of this invoke"
    with pytest.warns(UserWarning, match=text) as told:
        reads_no_step()
    assert [one.filename for one in told] == [__file__]


@pytest.mark.parametrize("wanted", [1.5, "1", [0, 1.5], None])
def test_what_is_no_step_is_refused(wanted: Any, model: Any) -> None:
    with (
        pytest.raises(TraceError, match="a step's number, a list of them or a slice is wanted"),
        model.generate(ROWS, max_new_tokens=4) as tracer,
    ):
        list(tracer.iter[wanted])


def test_more_saves_than_come_back_are_refused_before_anything_is_sent(model: Any) -> None:
    text = r"test_generation_choice.py:\d+: 4050 saved values, and 50 tokens, which come back too"
    with (
        pytest.raises(TraceError, match=text),
        model.generate(ROWS[:1], max_new_tokens=50) as tracer,
    ):
        for _ in tracer.iter[:]:
            states = model.model.layers[0].output
            for _ in range(81):
                (states + 0).save()


def test_logits_that_are_no_numbers_are_told(model: Any) -> None:
    text = r"test_generation_choice.py:\d+: GraphError at peer .*no token can be chosen: "
    with (
        pytest.raises(PeerFailed, match=text),
        model.generate(ROWS, max_new_tokens=3, do_sample=True, top_k=0),
    ):
        model.lm_head.output[:] = float("nan")


# What an early end leaves -------------------------------------------------------------------------


def ending(plain: Any) -> tuple[int, int]:
    """A stop token of the first row, and the step at which it comes."""
    token, new = stop_tokens(plain)
    return token, new[0].tolist().index(token)


def test_what_needs_a_step_that_never_ran_never_comes(model: Any, plain: Any) -> None:
    """Also where an early module is called on a late value, which happens one pass later."""
    token, last = ending(plain)
    layers = model.model.layers
    with model.generate(ROWS[:1], max_new_tokens=NEW, eos_token_id=token, **VARIED) as tracer:
        called, joined = [], layers[2].output
        for step in tracer.iter[:]:
            called.append(layers[0].mlp(layers[5].output[:, -1]).save())
            joined = joined[:, -1:] + layers[2].output
            if step == last:
                until_last = joined.save()
        too_late = joined.save()
    assert tracer.new_tokens.shape[1] == last + 1
    for one in called[: last + 1]:
        assert torch.isfinite(one).all()
    assert torch.isfinite(until_last).all()
    for lost in (*called[last + 1 :], too_late):
        with pytest.raises(NotSaved, match="never came"):
            lost.sum()


@pytest.mark.parametrize("batching", ["shared", "alone"])
def test_a_value_after_the_end_of_its_invoke_is_written_nowhere(
    batching: str, model: Any, plain: Any
) -> None:
    """Where invokes share passes there is such a value, and it is nobody's."""
    token, last = ending(plain)
    with (
        pytest.raises(
            GlasshiveError, match=r"test_generation_choice.py:\d+: .*this writes a value"
        ),
        model.generate(
            max_new_tokens=NEW, eos_token_id=token, pad_token_id=5, batching=batching, **VARIED
        ) as tracer,
    ):
        with tracer.invoke(ROWS[:1]):
            for _ in tracer.iter[last + 1]:
                value = model.model.layers[1].output
        with tracer.invoke(ROWS[1:2]):
            for _ in tracer.iter[last + 2]:
                model.model.layers[3].output = value
            model.lm_head.output.save()


def test_with_instead_of_for_is_refused(model: Any) -> None:
    with (
        pytest.raises(TraceError, match=r"write `for step in tracer\.iter"),
        model.generate(ROWS, max_new_tokens=4) as tracer,
        tracer.iter[:],
    ):
        pass


def test_a_block_cannot_be_skipped_but_an_mlp_can(model: Any, plain: Any) -> None:
    layer = model.model.layers[2]
    with (
        pytest.raises(GraphError, match=r"model.layers.2 cannot be skipped in a generation: later"),
        model.generate(ROWS, max_new_tokens=4),
    ):
        layer.skip(layer.input)

    def nothing(step: int, output: Tensor) -> Tensor | None:
        return torch.zeros_like(output) if step == 1 else None

    wanted, _ = generate_hooked(plain, ROWS, 6, edits={"model.layers.2.mlp": nothing})
    with model.generate(ROWS, max_new_tokens=6) as tracer:
        for _ in tracer.iter[1]:
            layer.mlp.skip(torch.zeros(3, 1, 64))
    assert torch.equal(tracer.output_ids, wanted)


def test_a_late_edit_names_the_steps(model: Any) -> None:
    text = "model.layers.1.output at step 1 runs before model.layers.0.output at step 2, which was"
    with (
        pytest.raises(GraphError, match=text),
        model.generate(ROWS, max_new_tokens=4) as tracer,
    ):
        for _ in tracer.iter[2]:
            model.model.layers[0].output.save()
        for _ in tracer.iter[1]:
            model.model.layers[1].output[:] = 0


def test_next_goes_on_by_module_or_for_all(model: Any, plain: Any) -> None:
    path = "model.layers.3"
    _, reads = generate_hooked(plain, ROWS, 4, reads=[path, "lm_head"])
    with model.generate(ROWS, max_new_tokens=4) as tracer:
        first = model.lm_head.output.save()
        second = model.lm_head.next().output.save()
        third = model.lm_head.next().output.save()
        still = model.model.layers[3].output.save()
        tracer.next(3)
        last = model.model.layers[3].output.save()
    for saved, want in zip((first, second, third), reads["lm_head"], strict=False):
        assert torch.equal(saved, want)
    assert torch.equal(still, reads[path][0])
    assert torch.equal(last, reads[path][3])


def test_one_token_is_not_taken_for_all(model: Any) -> None:
    with (
        pytest.warns(UserWarning, match="is the token of step 0 alone; all tokens are tracer.resu"),
        model.generate(ROWS, max_new_tokens=2),
    ):
        first = model.generator.output.save()
    assert first.shape == (3,)


def test_a_generation_without_its_block_says_so(model: Any) -> None:
    left = model.generate(ROWS, max_new_tokens=2)
    assert "it runs when its `with` block ends" in repr(left)
    for use in (lambda: left.text, lambda: left.output_ids, lambda: left.new_tokens):
        with pytest.raises(TraceError, match=r"write `with model.generate\(prompt, max_new_tokens"):
            use()
    with left:
        pass
    assert "2 new tokens" in repr(left)


def test_a_saved_container_is_saved_as_it_is_in_the_end(model: Any, plain: Any) -> None:
    """Seen failing: with only what a container holds when it is saved."""
    layer = model.model.layers[2]
    with model.generate(ROWS, max_new_tokens=4) as tracer:
        states, by_step = glasshive.save([]), glasshive.save({})
        pairs: list[Any] = glasshive.save([[]])
        for step in tracer.iter[:]:
            states.append(layer.output)
            by_step[step] = layer.output[:, -1]
            pairs[0].append((step, layer.output.sum()))
    kept: list[Tensor] = []
    hook = plain.model.layers[2].register_forward_hook(lambda *args: kept.append(args[2].clone()))
    generate_hooked(plain, ROWS, 4)
    hook.remove()
    assert all(map(torch.equal, states, kept))
    assert len(states) == len(kept) == 4
    assert torch.equal(by_step[3], kept[3][:, -1])
    assert torch.equal(pairs[0][2][1], kept[2].sum())


def test_a_saved_list_is_as_long_as_the_generation(model: Any) -> None:
    """What was saved one by one says of itself that it never came."""
    layer = model.model.layers[2]
    with model.generate(ROWS, max_new_tokens=6, eos_token_id=[7]) as tracer:
        states: list[Any] = glasshive.save([])
        by_step: dict[int, Any] = glasshive.save({})
        layers: list[Any] = glasshive.save([[] for _ in range(2)])
        single = []
        for step in tracer.iter[:]:
            states.append((step, layer.output[:, -1]))
            by_step[step] = layer.output[:, -1]
            single.append(layer.output[:, -1].save())
            for index in range(2):
                layers[index].append(model.model.layers[index].output)
            if step == 2:
                model.generator.output[:] = 7
        stacked = glasshive.save([torch.stack(single)])
    assert tracer.new_tokens.shape == (3, 3)
    assert [step for step, _ in states] == list(by_step) == [0, 1, 2]
    assert [len(one) for one in layers] == [3, 3]
    assert stacked == []
    assert all(torch.equal(state, single[step]) for step, state in states)
    with pytest.raises(NotSaved, match="it is of step 3, and the generation ended at step 2"):
        single[3].sum()


def test_what_stays_in_a_saved_list_has_its_place(model: Any) -> None:
    """Seen failing: with all that never came taken out, which gave one prompt another's value."""
    layer = model.model.layers[2]
    with model.generate(max_new_tokens=4, eos_token_id=[7]) as tracer:
        states: list[Any] = glasshive.save([])
        for ids, ends_at in ((ROWS[:1], 1), (ROWS[:1, :4], 9)):
            with tracer.invoke(ids):
                for step in tracer.iter[:]:
                    if step == 3:
                        states.append(layer.output)
                    model.generator.output[:] = 7 if step == ends_at else 5
    assert len(states) == 2
    with pytest.raises(NotSaved, match="it is of step 3, and the generation ended at step 1"):
        states[0].sum()
    assert states[1].shape == (1, 1, 64)


def test_chance_that_is_off_is_not_looked_at(model: Any, plain: Any) -> None:
    with pytest.warns(UserWarning, match="have no effect without do_sample=True"):
        tracer = model.generate(ROWS, max_new_tokens=4, temperature=0.0, top_p=7.0)
    with tracer:
        pass
    assert torch.equal(tracer.output_ids, generate_hooked(plain, ROWS, 4)[0])


def test_a_trace_has_no_steps(model: Any) -> None:
    for use in (
        lambda tracer: tracer.iter[:],
        lambda tracer: tracer.all(),
        lambda tracer: model.lm_head.next(),
        lambda tracer: model.generator.output,
    ):
        with pytest.raises(TraceError, match=r"model.generate\("), model.trace(ROWS) as tracer:
            use(tracer)


class Heard:
    """A streamer as transformers has them."""

    def __init__(self) -> None:
        self.put_in: list[Tensor] = []
        self.ended = 0

    def put(self, value: Tensor) -> None:
        self.put_in.append(value)

    def end(self) -> None:
        self.ended += 1


def test_lines_that_move_and_a_streamer_share_no_terminal(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shown(**options: Any) -> bool | str | None:
        return model.generate(ROWS, streamer=Heard(), **options).options.show_progress

    monkeypatch.setattr("sys.stdout.isatty", lambda: False, raising=False)
    assert [shown(), shown(progress=True)] == [None, True]
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert [shown(progress=one) for one in (None, True, False)] == ["plain", True, False]
    assert model.generate(ROWS).options.show_progress is None


def test_tokens_go_to_a_streamer_as_generate_gives_them(model: Any, plain: Any) -> None:
    wanted, got = Heard(), Heard()
    plain.generate(ROWS, max_new_tokens=5, do_sample=False, streamer=wanted)
    with model.generate(ROWS, max_new_tokens=5, streamer=got):
        pass
    assert len(got.put_in) == len(wanted.put_in)
    assert all(map(torch.equal, got.put_in, wanted.put_in))
    assert got.ended == wanted.ended == 1


STEP_1 = "; at step 1 of the generation, which has one token, the last: the prompt's are at step 0"


def test_what_does_not_fit_says_of_which_step(model: Any) -> None:
    """Seen failing without `Recorder.at_step`."""
    layer = model.model.layers[2]
    whole = torch.zeros(1, 4, 48)

    def told(body: Callable[[Any], None]) -> str:
        with (
            pytest.raises(ShapeMismatch) as caught,
            model.generate(ROWS, max_new_tokens=3) as tracer,
        ):
            body(tracer)
        return str(caught.value)

    def indexed(tracer: Any) -> None:
        for _ in tracer.iter[:]:
            layer.output[:, 2] = 0

    def advanced(tracer: Any) -> None:
        layer.output[:, -1] = 0
        tracer.next()
        layer.output[:, -1] = torch.zeros(5)

    def one_module(tracer: Any) -> None:
        layer.next().output.add_(whole)

    def called(tracer: Any) -> None:
        for _ in tracer.iter[1]:
            model.model.norm(layer.output[..., :-1])

    for body in (indexed, advanced, one_module, called):
        assert told(body).endswith(STEP_1), body

    def assigned(tracer: Any) -> None:
        for _ in tracer.iter[2]:
            layer.output = whole

    assert "is assigned to model.layers.2.output at step 2, which is " in told(assigned)

    def at_the_prompt(tracer: Any) -> None:
        layer.output[:, 7] = 0

    assert told(at_the_prompt).endswith("; at step 0 of the generation, that of the prompt")

    def after_a_loop(tracer: Any) -> None:
        states = [layer.output for _ in tracer.iter[:]]
        torch.cat([states[0], states[1]])

    assert "at step" not in told(after_a_loop), "it is of two"


def test_an_error_in_a_trace_says_nothing_of_steps(model: Any) -> None:
    with pytest.raises(Misfit) as caught, model.trace(ROWS):
        model.model.layers[2].output[:, 7] = 0
    assert "step" not in str(caught.value)


def test_what_only_chance_asks_for_warns_once_at_the_users_line(model: Any) -> None:
    """Seen failing without the warning, and with one for each call."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(2):
            model.generate(ROWS, max_new_tokens=2, temperature=0.7, top_p=None, top_k=50)
        model.generate(ROWS, max_new_tokens=2, temperature=0.7, top_p=0.9)
    assert [str(one.message) for one in caught] == [
        "temperature=0.7 has no effect without do_sample=True",
        "temperature=0.7 and top_p=0.9 have no effect without do_sample=True",
    ]
    assert {one.filename for one in caught} == {__file__}
    assert {one.category for one in caught} == {UserWarning}


def test_no_warning_of_what_was_not_written_or_is_used(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.generation_config, "temperature", 0.6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate(ROWS, max_new_tokens=2)
        model.generate(ROWS, max_new_tokens=2, temperature=0.7, do_sample=True)


def test_an_attribute_of_the_tokens_in_the_block_says_what_they_are(model: Any) -> None:
    """Seen failing without `TracedTensor.__getattr__`."""
    with model.generate(ROWS, max_new_tokens=2) as tracer:
        with pytest.raises(AttributeError) as caught:
            _ = tracer.result.seconds
        with pytest.raises(AttributeError, match=r"^a traced tensor has no attribute 'nothing'$"):
            _ = model.model.layers[2].output.nothing
    assert "no attribute 'seconds': in the block tracer.result is all tokens" in str(caught.value)
    assert "which peers ran what, tracer.result says after the block" in str(caught.value)
    assert tracer.result.passes
