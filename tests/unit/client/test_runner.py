"""Retrying a trace elsewhere: within one deadline, whatever has to be asked meanwhile."""

from __future__ import annotations

from typing import Any

import pytest

from glasshive.client import runner
from glasshive.client import swarm as client_swarm
from glasshive.client.errors import PeerBusy, PeerLost, TraceTimeout
from glasshive.client.experiment import TraceOptions
from glasshive.client.route import Route
from glasshive.client.runner import ModelRunner
from glasshive.dht.errors import DeadlineExceeded
from glasshive.dht.memory_transport import MemoryNetwork, MemoryTransport
from glasshive.dht.records import PeerRecord
from glasshive.security.keys import Identity
from glasshive.security.manifest import ModelId
from glasshive.security.policy import Policy

BLOCKS = 4


class Experiment:
    """As much of one as choosing a route needs: it takes every block."""

    graph = outline = None

    def line_of(self, node: object) -> None:
        return None


class Swarm:
    """Knows three peers that serve everything, and notes how long it was given to say so."""

    policy: Policy | None = None
    revoked = client_swarm.Swarm.revoked

    def __init__(self) -> None:
        self.transport: MemoryTransport = MemoryNetwork().transport(Identity.generate())
        self.given_seconds: list[float] = []
        self.known = [self._record() for _ in range(3)]

    def records(self, model: str, within_seconds: float) -> list[PeerRecord]:
        self.given_seconds.append(within_seconds)
        return self.known

    def _record(self) -> PeerRecord:
        return PeerRecord(
            peer_id=Identity.generate().peer_id,
            model=ModelId("ab" * 32),
            model_name="tiny",
            start=0,
            end=BLOCKS,
            n_blocks=BLOCKS,
            dtype="float32",
            quantisation="none",
            backend="cpu",
            attention="sdpa",
            throughput_tokens_per_second=1.0,
            addresses=("/ip4/127.0.0.1/tcp/1",),
            whitelist_version=0,
            load=0.0,
            software_version="0.1.0",
            expires_at_seconds=self.transport.now() + 60.0,
        )


def test_the_directory_is_asked_within_the_deadline_of_the_trace(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runner, "needed_blocks", lambda graph, outline: range(BLOCKS))
    swarm = Swarm()
    model: Any = ModelRunner(swarm, "ab" * 32, "float32", "sdpa", BLOCKS)  # type: ignore[arg-type]
    tried: list[str] = []

    def lose(experiment: object, options: object, route: Route, *rest: object) -> None:
        tried.append(route.records[0].peer_id)
        raise PeerLost("gone", peer=route.records[0].peer_id)

    monkeypatch.setattr(model, "_run_once", lose)
    with pytest.raises(PeerLost):
        model.run(Experiment(), TraceOptions(deadline_seconds=7.0, retries=2))
    assert len(set(tried)) == 3
    assert len(swarm.given_seconds) == 3
    assert swarm.given_seconds[0] <= 7.0
    assert swarm.given_seconds == sorted(swarm.given_seconds, reverse=True)


def test_a_deadline_that_passes_while_the_directory_is_asked_is_the_trace_s_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runner, "needed_blocks", lambda graph, outline: range(BLOCKS))
    swarm = Swarm()
    model: Any = ModelRunner(swarm, "ab" * 32, "float32", "sdpa", BLOCKS)  # type: ignore[arg-type]

    def late(*args: object) -> list[PeerRecord]:
        raise DeadlineExceeded("the directory did not answer")

    monkeypatch.setattr(swarm, "records", late)
    with pytest.raises(TraceTimeout) as caught:
        model.run(Experiment(), TraceOptions(deadline_seconds=1e-6))
    assert str(caught.value) == (
        "the trace was not done in the 1e-06 s that it had; the directory had not said yet who "
        "serves the model; allow more time with deadline="
    )
    with pytest.raises(DeadlineExceeded):  # a directory that is slow by itself
        model.run(Experiment(), TraceOptions(deadline_seconds=60.0))


def test_a_busy_peer_is_asked_again_by_the_next_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "needed_blocks", lambda graph, outline: range(BLOCKS))
    swarm = Swarm()
    swarm.known = swarm.known[:1]
    model: Any = ModelRunner(swarm, "ab" * 32, "float32", "sdpa", BLOCKS)  # type: ignore[arg-type]

    def busy(experiment: object, options: object, route: Route, *rest: object) -> None:
        raise PeerBusy("16 traces are running here", peer=route.records[0].peer_id)

    monkeypatch.setattr(model, "_run_once", busy)
    for _ in range(2):
        with pytest.raises(PeerBusy):
            model.run(Experiment(), TraceOptions(retries=0))
        assert model._lost == {}
