"""`tracer.cancel()`: the block ends with TraceCancelled, and no peer keeps anything of the trace.

Hosts in this process; tests/swarm/test_leaks.py measures how soon real ones are free.
"""

from __future__ import annotations

import io
import re
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from generation_oracle import generate_hooked
from replicas import Replicas, load
from tiny_llama import save_llama
from transformers import LlamaForCausalLM
from waits import wait_for

import glasshive
from glasshive.client import hop, known_records, left_out, progress
from glasshive.client.errors import (
    BadAnswer,
    NoRoute,
    NotSaved,
    PeerLost,
    TokensDiffer,
    TraceCancelled,
    TraceError,
    TraceTimeout,
)
from glasshive.client.experiment import Experiment
from glasshive.client.known_records import KnownRecords
from glasshive.client.saved import SavedTensor
from glasshive.dht import loop_thread
from glasshive.graph.errors import NoRoots
from glasshive.peer.served_model import ServedModel
from glasshive.security.errors import MalformedData
from glasshive.security.keys import PeerId
from glasshive.security.results import TraceResult

NEW = 12
PATHS = ("model.layers.1", "model.layers.3", "lm_head")
PROMPT = torch.tensor([[3, 14, 15, 9, 26, 5, 35, 8]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("models"), 6)


@pytest.fixture(scope="module")
def served(folder: Path) -> list[ServedModel]:
    return load(folder, "sdpa", (2, 4))


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> tuple[torch.Tensor, dict[str, list[torch.Tensor]]]:
    """All tokens, and what modules gave at each step, by transformers' own `generate`."""
    plain: Any = LlamaForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
    return generate_hooked(plain, PROMPT, NEW, reads=PATHS, do_sample=False, eos_token_id=None)


@pytest.fixture(scope="module")
def wanted(undisturbed: tuple[torch.Tensor, Any]) -> torch.Tensor:
    """All new tokens."""
    return undisturbed[0][:, PROMPT.shape[1] :]


@pytest.fixture(scope="module")
def reads(undisturbed: tuple[Any, dict[str, list[torch.Tensor]]]) -> dict[str, list[torch.Tensor]]:
    """What these modules gave at each step, by path."""
    return undisturbed[1]


@pytest.fixture
def hive(
    served: list[ServedModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Replicas]:
    """One host for each span."""
    monkeypatch.setattr(known_records, "ASK_AGAIN_SECONDS", 0.02)
    with Replicas(served, tmp_path, monkeypatch, copies=1) as running:
        yield running


class Streamer:
    """Does something when it is given the third tokens, or the end."""

    def __init__(
        self,
        third: Callable[[], object] = lambda: None,
        last: Callable[[], object] = lambda: None,
    ) -> None:
        self.put_in: list[torch.Tensor] = []
        self._third, self._last = third, last

    def put(self, value: torch.Tensor) -> None:
        self.put_in.append(value)
        if len(self.put_in) == 4:  # the prompt is the first
            self._third()

    def end(self) -> None:
        self._last()


def generation(hive: Replicas, **options: Any) -> Any:
    return hive.model.generate(
        *(PROMPT,), max_new_tokens=NEW, eos_token_id=[], deadline=60, **options
    )


def is_free(hive: Replicas) -> bool:
    hosts = [one.host for one in hive.hosts]
    return not any(len(one._slots) or one._memory.promised_bytes for one in hosts)


def check_cancelled(hive: Replicas, tracer: Any, wanted: torch.Tensor) -> None:
    """It was tried once, all peers are free, and what had come is there."""
    (job,) = hive.jobs
    wait_for(lambda: job.state == "cancelled", "the loop has cancelled it")
    wait_for(lambda: is_free(hive), "every host is free")
    made = tracer.new_tokens
    assert made.dtype == torch.int64
    assert torch.equal(made, wanted[:, : made.shape[1]])
    assert torch.equal(tracer.output_ids, torch.cat([PROMPT, made], 1))
    with pytest.raises(TraceError):
        _ = tracer.result
    assert tracer.cancel() is True, "as it was"


def steps_said(made: torch.Tensor) -> str:
    """What a note says of a generation that has made these tokens."""
    n_made = made.shape[1]
    return (
        f"tracer.new_tokens has {n_made} of 12 steps, and what had come of what was saved at them "
        "is there"
    )


def frames_of(error: BaseException) -> list[str]:
    """The functions in its traceback."""
    return [one.name for one in traceback.extract_tb(error.__traceback__)]


def at(model: Any, path: str) -> Any:
    """The module of a path."""
    if path == "lm_head":
        return model.lm_head
    return model.model.layers[int(path.rpartition(".")[2])]


def check_saved(
    saved: dict[str, list[Any]], reads: dict[str, list[torch.Tensor]], n_made: int, error: str
) -> None:
    """Of done steps there is what came, some of every path; all others say why not."""
    for path, values in saved.items():
        assert len(values) == NEW
        assert any(isinstance(one, SavedTensor) for one in values)
        for step, (value, wanted) in enumerate(zip(values, reads[path], strict=True)):
            if isinstance(value, SavedTensor):
                assert step < n_made
                assert torch.equal(value, wanted)
                continue
            with pytest.raises(NotSaved) as missing:
                value.sum()
            why = (
                f"it had not come when the generation ended with {error}"
                if step < n_made
                else f"it is of step {step}, and the generation ended with {error} when {n_made} "
                "were done; what had come of those is there"
            )
            assert str(missing.value).endswith(f" never came: {why}")


def test_from_another_thread(
    hive: Replicas, wanted: torch.Tensor, reads: dict[str, list[torch.Tensor]]
) -> None:
    """Seen failing with `Cancellation.watch` that forgets the future: it ran to its end."""
    tracer = generation(hive)
    said: list[bool] = []
    hive.after(1, NEW // 2, lambda: said.append(tracer.cancel()))
    saved: dict[str, list[Any]] = {path: [] for path in PATHS}
    kept: list[Any] = []
    with pytest.raises(TraceCancelled) as caught:
        with tracer:
            for _ in tracer.iter[:]:
                for path, values in saved.items():
                    values.append(at(hive.model, path).output.save())
                kept.append(saved["lm_head"][-1])
            glasshive.save(kept)
            ids = tracer.result.save()
            several = torch.stack([one[:, -1] for one in saved["lm_head"]]).save()
    assert str(caught.value).startswith("a generation of tiny was cancelled by tracer.cancel() ")
    n_made = tracer.new_tokens.shape[1]
    assert str(caught.value).endswith(f"; tracer.new_tokens has {n_made} of 12 steps")
    assert said == [True]
    assert 1 < n_made < NEW
    check_cancelled(hive, tracer, wanted)
    check_saved(saved, reads, n_made, "TraceCancelled")
    assert len(kept) == n_made, "a list that was saved is as long as there are steps"
    assert torch.equal(kept[0], reads["lm_head"][0])
    assert torch.equal(ids, torch.cat([PROMPT, wanted[:, :n_made]], 1))
    with pytest.raises(NotSaved, match=f"never came: it is of step {NEW - 1}, and the gener"):
        several.mean()


def test_from_a_streamer(hive: Replicas, wanted: torch.Tensor) -> None:
    """Seen failing without the look in `_Streaming`: more was put than the three."""
    streamer = Streamer(lambda: tracer.cancel())
    tracer = generation(hive, streamer=streamer)
    with pytest.raises(TraceCancelled):
        with tracer:
            pass
    assert torch.equal(torch.stack(streamer.put_in[1:], 1), wanted[:, :3])
    assert tracer.new_tokens.shape[1] >= 3
    wait_for(lambda: is_free(hive), "every host is free")


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, TraceTimeout])
def test_what_had_come_is_there_after_any_end(
    error: type[BaseException],
    hive: Replicas,
    wanted: torch.Tensor,
    reads: dict[str, list[torch.Tensor]],
) -> None:
    """Seen to be lost: `new_tokens` said that the block had to end without an error."""

    def interrupt() -> None:
        raise error

    tracer = generation(hive, streamer=Streamer(interrupt))
    saved: dict[str, list[Any]] = {path: [] for path in PATHS}
    with pytest.raises(error) as caught:
        with tracer:
            for _ in tracer.iter[:]:
                for path, values in saved.items():
                    values.append(at(hive.model, path).output.save())
    made = tracer.new_tokens
    check_saved(saved, reads, made.shape[1], error.__name__)
    notes = getattr(caught.value, "__notes__", [])
    is_error = issubclass(error, Exception)
    by_streamer = re.compile(r"test_cancel\.py:\d+: the streamer of this generation raised it")
    assert [by_streamer.fullmatch(one) is not None for one in notes[:1]] == [True] * is_error
    assert notes[1:] == ([steps_said(made)] if error is TraceTimeout else [])
    assert ("interrupt" in frames_of(caught.value)) is is_error, "the user's own code"
    assert torch.equal(made, wanted[:, : made.shape[1]])
    assert f"{made.shape[1]} of {NEW} new tokens" in repr(tracer) or made.shape[1] == NEW
    wait_for(lambda: is_free(hive), "every host is free")


def test_what_had_come_since_the_last_look_is_there(
    hive: Replicas, wanted: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens are heard twenty times a second. Of a short generation none was there."""
    monkeypatch.setattr(loop_thread, "TICK_SECONDS", 60.0)
    tracer = generation(hive)
    hive.after(1, NEW // 2, tracer.cancel)
    with pytest.raises(TraceCancelled) as caught:
        with tracer:
            pass
    n_made = tracer.new_tokens.shape[1]
    assert 0 < n_made < NEW
    assert str(caught.value).endswith(f"; tracer.new_tokens has {n_made} of 12 steps")
    check_cancelled(hive, tracer, wanted)


def test_after_a_loss_that_nobody_mends(
    hive: Replicas,
    wanted: torch.Tensor,
    reads: dict[str, list[torch.Tensor]],
) -> None:
    tracer = generation(hive, retries=0)
    lost = hive.hosts[1]
    hive.after(0, NEW // 2, hive.kill(1))
    saved: dict[str, list[Any]] = {path: [] for path in PATHS}
    with pytest.raises(PeerLost) as caught:
        with tracer:
            for _ in tracer.iter[:]:
                for path, values in saved.items():
                    values.append(at(hive.model, path).output.save())
    hive.hosts.remove(lost)
    made = tracer.new_tokens
    assert 1 < made.shape[1] < NEW
    assert torch.equal(made, wanted[:, : made.shape[1]])
    check_saved(saved, reads, made.shape[1], "PeerLost")
    assert caught.value.__notes__ == [steps_said(made)]


@pytest.mark.parametrize("level", ["DEBUG", "INFO"])
def test_where_in_here_an_error_was_raised_is_for_debugging(
    level: str, hive: Replicas, caplog: pytest.LogCaptureFixture
) -> None:
    """For the user it was 75 lines of no use, with their own in the midst."""
    caplog.set_level(level, "glasshive.client.tracer")
    avoid = {hive.hosts[1].record.peer_id}
    for stops in (False, True):
        with pytest.raises(NoRoute) as caught:
            with hive.model.trace(PROMPT, avoid=avoid) as tracer:
                hive.model.lm_head.output.save()
                if stops:
                    tracer.stop()
        assert ("route" in frames_of(caught.value)) is (level == "DEBUG")
        if level == "DEBUG":
            return
        assert frames_of(caught.value)[1:] == ["__exit__"]
        assert caught.value.__cause__ is caught.value.__context__ is None
    try:
        raise ZeroDivisionError
    except ZeroDivisionError as error:
        before = error
        with pytest.raises(NoRoute) as caught:
            with hive.model.trace(PROMPT, avoid=avoid):
                hive.model.lm_head.output.save()
    assert frames_of(caught.value)[1:] == ["__exit__"]
    assert caught.value.__context__ is before, "that is how the user came there"
    with pytest.raises(NoRoots) as roots:
        with hive.model.trace(PROMPT):
            pass
    assert frames_of(roots.value)[1:] == ["__exit__"]


def test_in_the_last_moment(
    hive: Replicas,
    wanted: torch.Tensor,
    reads: dict[str, list[torch.Tensor]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """When all values are there already, and nothing is left to keep."""
    fill = Experiment.fill

    def filling(experiment: Experiment, came: Any) -> None:
        fill(experiment, came)
        tracer.cancel()

    monkeypatch.setattr(Experiment, "fill", filling)
    tracer = generation(hive)
    with pytest.raises(TraceCancelled, match=r"tracer\.new_tokens has 12 of 12 steps$"):
        with tracer:
            logits = [hive.model.lm_head.output.save() for _ in tracer.iter[:]]
            ids = tracer.result.save()
    assert all(map(torch.equal, logits, reads["lm_head"]))
    assert torch.equal(ids, torch.cat([PROMPT, wanted], 1))


def test_nothing_is_kept_of_what_may_be_wrong(
    hive: Replicas, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A peer that signs other values than those that came."""

    def refuse(*args: Any, **options: Any) -> Any:
        raise MalformedData("another hash")

    monkeypatch.setattr(TraceResult, "verify", refuse)
    tracer = generation(hive)
    with pytest.raises(BadAnswer, match="its result can't be taken: another hash"):
        with tracer:
            first = hive.model.lm_head.output.save()
    assert tracer.new_tokens.shape == (1, 0)
    with pytest.raises(NotSaved, match="ended with BadAnswer and has not brought results back"):
        first.sum()


@pytest.mark.parametrize("is_cancelled", [False, True])
def test_nothing_is_kept_of_what_differs_from_what_was_told(
    is_cancelled: bool, hive: Replicas
) -> None:
    """As a generation may that is run again; a cancel in that moment doesn't hide it."""

    is_told = threading.Event()

    def run_again() -> None:
        tracer._streaming._told[1] = torch.tensor([63])
        is_told.set()
        if is_cancelled:
            tracer.cancel()

    # More are still to come then.
    hive.after(1, NEW // 2, lambda: wait_for(is_told.is_set, "three are told"))
    tracer = generation(hive, streamer=Streamer(run_again))
    with pytest.raises(TraceCancelled if is_cancelled else TokensDiffer) as caught:
        with tracer:
            first = hive.model.lm_head.output.save()
    differs = re.compile("step 1 gave .* when the generation was run again, and the streamer had ")
    notes = getattr(caught.value, "__notes__", [])
    (said,) = notes if is_cancelled else [str(caught.value), *notes]
    assert differs.match(said.removeprefix("nothing that was saved is there: "))
    with pytest.raises(NotSaved, match="has not brought results back"):
        first.sum()


def test_nothing_is_kept_of_what_padding_made(hive: Replicas) -> None:
    """Where a value of an invoke is written after the end of that, the generation ends with
    StepNeverRan, and a cancel before that doesn't hide it.
    """
    tracer = hive.model.generate(max_new_tokens=NEW, eos_token_id=[7], deadline=60)
    hive.after(1, NEW - 3, tracer.cancel)
    with pytest.raises(TraceCancelled, match="of 24 steps\n") as caught:
        with tracer:
            with tracer.invoke(PROMPT):
                for step in tracer.iter[:]:
                    if step == 1:
                        hive.model.generator.output[:] = 7
                    if step == 2:
                        padding = hive.model.model.layers[1].output
            with tracer.invoke(PROMPT):
                first = hive.model.lm_head.output.save()
                for _ in tracer.iter[3]:
                    hive.model.model.layers[3].output = padding
    assert tracer.new_tokens[1].shape[1] > 3
    (note,) = caught.value.__notes__
    assert re.match(
        r"nothing that was saved is there: test_cancel\.py:\d+: this writes a value of step 2 "
        "of invoke 0, which ended at step 1, with a stop token; ",
        note,
    )
    with pytest.raises(NotSaved, match="has not brought results back"):
        first.sum()


def test_before_the_end_of_the_block_nothing_is_sent(hive: Replicas) -> None:
    for n_before in (0, 1):
        tracer: Any = hive.model.trace(PROMPT)
        if n_before:
            assert tracer.cancel()
        with pytest.raises(TraceCancelled, match="had ended, and nothing was sent"):
            with tracer:
                hive.model.lm_head.output.save()
                if not n_before:
                    cancelling = threading.Thread(target=tracer.cancel)
                    cancelling.start()
                    cancelling.join()
    assert hive.jobs == []


def test_an_error_of_the_body_is_the_user_s_own(hive: Replicas) -> None:
    tracer: Any = hive.model.trace(PROMPT)
    with pytest.raises(ZeroDivisionError):
        with tracer:
            assert tracer.cancel()
            _ = 1 / 0
    tracer = hive.model.trace(PROMPT)
    with pytest.raises(ZeroDivisionError):
        with tracer:
            _ = 1 / 0
    assert not tracer.cancel(), "it had ended"


def test_after_the_end_it_has_no_effect(hive: Replicas, wanted: torch.Tensor) -> None:
    said: list[bool] = []
    streamer = Streamer(last=lambda: said.append(tracer.cancel()))
    tracer = generation(hive, streamer=streamer)
    with tracer:
        state = hive.model.lm_head.output.save()
    assert said == [False]
    assert tracer.cancel() is False
    assert torch.equal(tracer.new_tokens, wanted)
    assert torch.equal(state[:, -1].argmax(-1), wanted[:, 0])
    assert tracer.result.retried == 0


def cancelled_while_a_lost_peer_is_waited_for(
    hive: Replicas, tracer: Any, monkeypatch: pytest.MonkeyPatch, is_time: Callable[[], bool]
) -> PeerId:
    """Who was lost; `is_time` says, each time that peers are looked for, when to cancel."""
    monkeypatch.setattr(left_out, "RETURN_SECONDS", 60.0)
    ask = KnownRecords.ask

    async def asking(self: KnownRecords, within_seconds: float) -> None:
        if is_time():
            tracer.cancel()
        await ask(self, within_seconds)

    monkeypatch.setattr(KnownRecords, "ask", asking)
    lost = hive.hosts[1]
    hive.after(0, NEW // 2, hive.kill(1))
    with pytest.raises(TraceCancelled):
        with tracer:
            pass
    hive.hosts.remove(lost)
    return lost.record.peer_id


def test_while_a_lost_peer_is_waited_for(
    hive: Replicas, wanted: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracer = generation(hive)
    n_asked = 0

    def is_third() -> bool:
        nonlocal n_asked
        n_asked += 1
        return n_asked == 3

    cancelled_while_a_lost_peer_is_waited_for(hive, tracer, monkeypatch, is_third)
    assert n_asked == 3
    check_cancelled(hive, tracer, wanted)


class Terminal(io.StringIO):
    """Something that people read."""

    def isatty(self) -> bool:
        """It is one."""
        return True


def test_beside_a_streamer_it_is_said_why_no_tokens_come(
    hive: Replicas, wanted: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen to say nothing for 25 s: lines that move share no terminal with a streamer."""
    monkeypatch.setattr(hop, "RETURN_SECONDS", 60.0)
    monkeypatch.setattr(hop, "HELD_UP_SECONDS", 0.0)
    for name in ("_SHOW_AFTER_SECONDS", "_LASTS_SECONDS"):
        monkeypatch.setattr(progress, name, 0.0)
    monkeypatch.setattr("sys.stdout", Terminal())
    monkeypatch.setattr("sys.stderr", said := Terminal())
    streamer = Streamer()
    tracer = generation(hive, streamer=streamer)
    peer = cancelled_while_a_lost_peer_is_waited_for(
        *(hive, tracer, monkeypatch), lambda: bool(said.getvalue())
    )
    lines = said.getvalue().split("\nglasshive: ")
    assert f"peer {peer} (blocks 2:4): lost; waiting up to 60 s for it or another\n" in lines
    assert len(streamer.put_in) > 1
    check_cancelled(hive, tracer, wanted)
