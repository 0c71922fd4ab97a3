"""Traces whose connections go through fault proxies: right, or a named error, in time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_llama import save_llama
from transformers import LlamaForCausalLM
from waits import wait_for

import glasshive
from glasshive.client import left_out
from glasshive.client.errors import PeerLost, TraceTimeout
from glasshive.fault_proxy import Direction, Faults
from glasshive.graph.errors import GlasshiveError
from glasshive.testing import LocalSwarm, SwarmNotReady

NAME = "tiny-llama"
PROMPT = torch.arange(4 * 100).reshape(4, 100) % 64
HIDDEN_BYTES = 4 * 100 * 32 * 4  # what goes from the first host to the second
DEADLINE_SECONDS = 5.0  # of a trace that need not succeed


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("models") / NAME, 4)


@pytest.fixture(scope="module")
def wanted(llama: Path) -> torch.Tensor:
    """Plain Hugging Face with a hook."""
    model = LlamaForCausalLM.from_pretrained(llama)

    def zero(module: object, args: object, output: torch.Tensor) -> None:
        output[:, -1] = 0

    model.model.layers[1].mlp.register_forward_hook(zero)
    with torch.no_grad():
        logits: torch.Tensor = model(PROMPT).logits[:, -1]
    return logits


@pytest.fixture(scope="module")
def hive(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalSwarm]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLASSHIVE_CACHE", str(tmp_path_factory.mktemp("cache")))
        with LocalSwarm(llama, [(0, 2), (2, 4)], faults=True) as running:
            yield running


@pytest.fixture(scope="module")
def model(hive: LocalSwarm) -> Iterator[glasshive.Model]:
    with glasshive.connect(hive.config) as swarm:
        wait_for(lambda: len(swarm.records()) == 2, "both hosts are listed")
        yield swarm.model(NAME)


@pytest.fixture(autouse=True)
def healed(hive: LocalSwarm, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(left_out, "RETURN_SECONDS", 0.0)  # an error may come at once
    yield
    spoil(hive, Faults())


def run(model: glasshive.Model, deadline: float = 60.0) -> torch.Tensor:
    with model.trace(PROMPT, deadline=deadline):
        model.model.layers[1].mlp.output[:, -1] = 0
        saved = model.lm_head.output[:, -1].save()
    return saved


def directions(hive: LocalSwarm) -> list[Direction]:
    return [one for host in hive.hosts for one in (host.proxy.upstream, host.proxy.downstream)]


def spoil(hive: LocalSwarm, faults: Faults) -> None:
    for one in directions(hive):
        one.faults = faults


def delivered_bytes(hive: LocalSwarm) -> int:
    return sum(one.delivered_bytes for one in directions(hive))


class Trace(threading.Thread):
    """A trace that runs, and what came of it."""

    def __init__(self, model: glasshive.Model) -> None:
        super().__init__(daemon=True)
        self.model = model
        self.outcome: torch.Tensor | BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self.outcome = run(self.model, DEADLINE_SECONDS)
        except BaseException as error:
            self.outcome = error

    def check(self, wanted: torch.Tensor) -> None:
        """Within its deadline it has the right result, or a named error."""
        self.join(60)
        if isinstance(self.outcome, torch.Tensor):
            assert torch.equal(self.outcome, wanted)
        else:
            assert isinstance(self.outcome, GlasshiveError), repr(self.outcome)


def check_recovers(model: glasshive.Model, wanted: torch.Tensor) -> None:
    """Peers that were lost are asked again, and then the result is right; it never is wrong."""

    def traced() -> bool:
        try:
            assert torch.equal(run(model, DEADLINE_SECONDS), wanted)
        except GlasshiveError:
            return False
        return True

    wait_for(traced, "a trace after the faults")


def test_all_that_peers_say_goes_through_the_proxies(
    model: glasshive.Model, hive: LocalSwarm, wanted: torch.Tensor
) -> None:
    run(model)
    clients = [host.proxy.upstream.delivered_bytes for host in hive.hosts]
    before = delivered_bytes(hive)
    assert torch.equal(run(model), wanted)
    assert all(
        host.proxy.upstream.delivered_bytes > seen
        for host, seen in zip(hive.hosts, clients, strict=True)
    )
    wait_for(lambda: delivered_bytes(hive) - before > HIDDEN_BYTES, "hidden states were seen")
    # With the proxies closed nobody is reached: no daemon dials where the others really listen.
    for host in hive.hosts:
        host.proxy.refuses = True
        host.proxy.reset()
    before = delivered_bytes(hive)
    with pytest.raises(PeerLost):
        run(model)
    assert delivered_bytes(hive) == before
    for host in hive.hosts:
        host.proxy.refuses = False
    check_recovers(model, wanted)


def test_who_has_no_proxy_says_so(hive: LocalSwarm) -> None:
    with pytest.raises(SwarmNotReady, match=r"bootstrap has no proxy; .*faults=True"):
        _ = hive.bootstrap.proxy


def test_latency_and_bandwidth_change_no_result(
    model: glasshive.Model, hive: LocalSwarm, wanted: torch.Tensor
) -> None:
    spoil(hive, Faults(latency_seconds=0.05, bandwidth_bytes_per_second=200_000))
    assert torch.equal(run(model), wanted)


@pytest.mark.parametrize("every", [300, 20_000], ids=["handshakes", "hidden states"])
def test_corruption_is_no_wrong_result(
    model: glasshive.Model, hive: LocalSwarm, wanted: torch.Tensor, every: int
) -> None:
    before = sum(one.corrupted_bytes for one in directions(hive))
    spoil(hive, Faults(corrupt_every_bytes=every))
    Trace(model).check(wanted)
    assert sum(one.corrupted_bytes for one in directions(hive)) > before
    spoil(hive, Faults())
    check_recovers(model, wanted)


@pytest.mark.parametrize("how", ["reset", "half-closed"])
def test_connections_that_end_within_a_trace(
    model: glasshive.Model, hive: LocalSwarm, wanted: torch.Tensor, how: str
) -> None:
    run(model)  # with connections that exist
    before = delivered_bytes(hive)
    spoil(hive, Faults(bandwidth_bytes_per_second=HIDDEN_BYTES / 4))
    trace = Trace(model)
    wait_for(lambda: delivered_bytes(hive) - before > HIDDEN_BYTES / 4, "hidden states travel")
    assert trace.outcome is None
    for host in hive.hosts:
        if how == "reset":
            host.proxy.reset()
        else:
            host.proxy.upstream.half_close()
    spoil(hive, Faults())
    trace.check(wanted)
    check_recovers(model, wanted)


@pytest.mark.parametrize("towards", ["the host", "others"])
def test_a_black_hole_in_one_direction_is_named(
    model: glasshive.Model, hive: LocalSwarm, wanted: torch.Tensor, towards: str
) -> None:
    run(model)
    host = hive.hosts[0]
    direction = host.proxy.upstream if towards == "the host" else host.proxy.downstream
    direction.faults = Faults(black_hole=True)
    with pytest.raises((PeerLost, TraceTimeout), match=host.peer_id):
        run(model, DEADLINE_SECONDS)
    direction.faults = Faults()
    check_recovers(model, wanted)
