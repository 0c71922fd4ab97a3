"""`tracer.cancel()`: the block ends with TraceCancelled, and no peer keeps anything of the trace.

Hosts in this process; tests/swarm/test_leaks.py measures how soon real ones are free.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from replicas import Replicas, load
from tiny_llama import save_llama
from transformers import LlamaForCausalLM
from waits import wait_for

from glasshive.client import known_records, left_out
from glasshive.client.errors import TraceCancelled, TraceError
from glasshive.client.known_records import KnownRecords
from glasshive.dht import loop_thread
from glasshive.graph.errors import GlasshiveError
from glasshive.peer.served_model import ServedModel

NEW = 12
PROMPT = torch.tensor([[3, 14, 15, 9, 26, 5, 35, 8]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("models"), 6)


@pytest.fixture(scope="module")
def served(folder: Path) -> list[ServedModel]:
    return load(folder, "sdpa", (2, 4))


@pytest.fixture(scope="module")
def wanted(folder: Path) -> torch.Tensor:
    """All new tokens, by transformers' own `generate`."""
    plain: Any = LlamaForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
    ids: torch.Tensor = plain.generate(
        PROMPT, max_new_tokens=NEW, do_sample=False, eos_token_id=None
    )
    return ids[:, PROMPT.shape[1] :]


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


def test_from_another_thread(hive: Replicas, wanted: torch.Tensor) -> None:
    """Seen failing with `Cancellation.watch` that forgets the future: it ran to its end."""
    tracer = generation(hive)
    said: list[bool] = []
    hive.after(1, NEW // 2, lambda: said.append(tracer.cancel()))
    with pytest.raises(TraceCancelled) as caught:
        with tracer:
            state = hive.model.model.layers[3].output.save()
    assert str(caught.value).startswith("a generation of tiny was cancelled by tracer.cancel() ")
    n_made = tracer.new_tokens.shape[1]
    assert str(caught.value).endswith(f"; tracer.new_tokens has {n_made} of 12 steps")
    assert said == [True]
    assert n_made < NEW
    check_cancelled(hive, tracer, wanted)
    with pytest.raises(GlasshiveError, match="because its trace ended with TraceCancelled and has"):
        state.mean()


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


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_what_had_come_is_there_after_any_end(
    error: type[BaseException], hive: Replicas, wanted: torch.Tensor
) -> None:
    """Seen to be lost: `new_tokens` said that the block had to end without an error."""

    def interrupt() -> None:
        raise error

    tracer = generation(hive, streamer=Streamer(interrupt))
    with pytest.raises(error):
        with tracer:
            pass
    made = tracer.new_tokens
    assert made.shape[1] >= 3
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


def test_while_a_lost_peer_is_waited_for(
    hive: Replicas, wanted: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(left_out, "RETURN_SECONDS", 60.0)
    tracer = generation(hive)
    ask, n_asked = KnownRecords.ask, 0

    async def asking(self: KnownRecords, within_seconds: float) -> None:
        nonlocal n_asked
        n_asked += 1
        if n_asked == 3:
            tracer.cancel()
        await ask(self, within_seconds)

    monkeypatch.setattr(KnownRecords, "ask", asking)
    lost = hive.hosts[1]
    hive.after(0, NEW // 2, hive.kill(1))
    with pytest.raises(TraceCancelled):
        with tracer:
            pass
    hive.hosts.remove(lost)
    assert n_asked == 3
    check_cancelled(hive, tracer, wanted)
