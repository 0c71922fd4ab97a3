"""Where the time of a run went, by the peers' signed words, and the routes that are taken.

Times are compared with each other, or with the wall time that they lie within; a part is slowed
down by far more than all the rest takes. Fails without the counters in `HostedTrace._run_stage` and
`OutgoingEdge._send`, each of which was taken out for it.
"""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llama import save_llama

import glasshive
from glasshive.client import router
from glasshive.client.demand import Alike, Demand, demand_of
from glasshive.client.errors import PeerBusy, TraceError
from glasshive.client.experiment import Experiment
from glasshive.client.router import Router
from glasshive.client.swarm import Swarm
from glasshive.dht.loop_thread import LoopThread
from glasshive.dht.memory_transport import MemoryNetwork
from glasshive.graph.plan import Span
from glasshive.local_model import _serve_all
from glasshive.peer import outgoing_edge
from glasshive.peer.executor import Executor
from glasshive.peer.served_model import load_served_model
from glasshive.security.keys import Identity, PeerId

IDS = [3, 14, 15, 9, 26, 5]
SLOW_SECONDS = 0.4
NEW = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("models") / "tiny", 6)


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return glasshive.local(folder, cuts=(2, 4))


@pytest.fixture
def slow_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each stage of the second part takes long."""
    run = Executor.run

    def slowly(self: Executor, *args: Any) -> None:
        if self._part.index == 1:
            threading.Event().wait(SLOW_SECONDS)
        run(self, *args)

    monkeypatch.setattr(Executor, "run", slowly)


def trace(model: Any) -> Any:
    with model.trace(IDS) as tracer:
        early = model.model.layers[0].output.mean()
        model.model.layers[5].output[:, -1] += early
        model.lm_head.output.save()
    return tracer


def generate(model: Any) -> Any:
    with model.generate([IDS], max_new_tokens=NEW, eos_token_id=[]) as tracer:
        for _ in tracer.iter[:]:
            model.model.layers[1].output.save()
    return tracer


@pytest.mark.usefixtures("slow_middle")
def test_who_comes_after_a_slow_part_waits_for_it(model: Any) -> None:
    profile = trace(model).profile()
    first, middle, last = profile.hops
    assert middle.compute_seconds >= SLOW_SECONDS
    assert last.wait_seconds > middle.wait_seconds
    assert first.wait_seconds == 0.0  # nothing comes to it
    assert last.wire_seconds == 0.0  # nothing leaves it
    for hop in profile.hops:  # a part waits, then computes
        assert hop.wait_seconds + hop.compute_seconds <= profile.seconds


@pytest.mark.usefixtures("slow_middle")
def test_in_a_generation_the_first_waits_for_tokens(model: Any) -> None:
    profile = generate(model).profile()
    first, middle, last = profile.hops
    assert middle.compute_seconds >= NEW * SLOW_SECONDS
    # The last waits for every step, the first for every token but that of the prompt.
    assert last.wait_seconds > first.wait_seconds > (NEW - 2) * SLOW_SECONDS
    assert first.wait_seconds > middle.wait_seconds
    for hop in profile.hops:
        assert hop.wait_seconds + hop.compute_seconds <= profile.seconds


def test_a_way_that_takes_no_bytes_is_wire_time_of_who_sends(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    send = outgoing_edge.send_tensor

    async def slowly(*args: Any) -> None:
        await asyncio.sleep(SLOW_SECONDS)  # the network's, not this test's; may end a little early
        await send(*args)

    monkeypatch.setattr(outgoing_edge, "send_tensor", slowly)
    result = trace(model).result
    first, middle, last = result.profile.hops
    assert first.wire_seconds >= 1.9 * SLOW_SECONDS  # hidden states, and a value for the last
    assert middle.wire_seconds >= 0.9 * SLOW_SECONDS
    assert last.wire_seconds == 0.0
    assert middle.wait_seconds > SLOW_SECONDS / 2
    hops = result.hops
    assert [one.n_bytes for one in result.profile.hops] == [
        hop.hidden_bytes + hop.carried_bytes for hop in hops
    ]
    assert hops[0].carried_bytes == 4
    assert result.seconds > first.wire_seconds / 2


@pytest.mark.parametrize("run", [trace, generate])
def test_a_profile_is_a_table(model: Any, run: Callable[[Any], Any]) -> None:
    tracer = run(model)
    profile = tracer.profile()
    title, *rows, end = repr(profile).splitlines()
    assert title.split("  ")[0] == "blocks"
    assert [row.split()[0] for row in rows] == ["0:2", "2:4", "4:6"]
    assert [row.split()[1] for row in rows] == [one.peer[-8:] for one in tracer.result.hops]
    assert len({len(row) for row in (title, *rows)}) == 1
    assert end == f"{tracer.result.seconds:.4f} s in all"
    assert profile == tracer.result.profile


def test_before_the_end_there_is_no_profile(model: Any) -> None:
    with pytest.raises(TraceError, match=r"once its block has ended"), model.trace(IDS) as tracer:
        tracer.profile()


def test_what_an_experiment_asks_of_routes_is_what_its_plan_sends(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The estimate of carried values, against the bytes that went."""
    demands: list[Demand] = []

    def heard(experiment: Experiment) -> Demand:
        demands.append(demand_of(experiment))
        return demands[-1]

    monkeypatch.setattr(router, "demand_of", heard)
    hops = trace(model).result.hops
    demand = demands[0]
    assert (demand.passes, demand.rounds) == ((Alike(len(IDS)),), 1)
    assert demand.hidden_bytes == len(IDS) * 32 * 4 == hops[0].hidden_bytes
    spans = [(0, 2), (2, 4), (4, 6)]
    assert sum(demand._carried_bytes(*one) for one in spans) == sum(h.carried_bytes for h in hops)


# Routes ----------------------------------------------------------------------------------------


@dataclass
class Twice:
    """The same model with two peers for each span."""

    model: Any
    network: MemoryNetwork

    @property
    def runner(self) -> Any:
        return self.model._runner

    def kill(self, peer: PeerId) -> None:
        loop = self.runner._swarm._loop.loop
        loop.call_soon_threadsafe(self.network.kill, peer)


@pytest.fixture
def twice(folder: Path) -> Iterator[Twice]:
    served = [
        load_served_model(folder, "tiny", span, dtype=torch.float32, device="cpu")
        for span in (Span(0, 3), Span(3, 6))
        for _ in range(2)
    ]
    with LoopThread() as loop:
        network = MemoryNetwork()
        peers = loop.run(_serve_all(network, served, None), 60)
        identity = Identity.generate()
        swarm = Swarm(loop, network.transport(identity, dht=False), identity, peers, folder / "f")
        yield Twice(swarm.model(served[0].manifest.model_id), network)


def test_peers_that_compete_are_measured_and_shown(twice: Twice) -> None:
    assert "not measured" not in repr(twice.model)
    _, _, route_now = repr(twice.model).partition("route of a trace now, about ")
    _, *route = route_now.splitlines()
    assert [line.split()[1] for line in route] == ["0:3", "3:6"]
    shown = re.compile(r" round trip [\d.]+ ms  \d+ tokens/s  [\d.]+ ms a pass  load 0%$")
    assert all(map(shown.search, route))
    ways = twice.runner._swarm.round_trips
    records = twice.runner.router.records.get(fresh=False)
    assert len(records) == 4
    assert ways.to_ask(records) == []
    assert all(0 < ways.of(one.peer_id) < 1.0 for one in records)


def test_a_trace_counts_on_its_peers_while_it_runs(
    twice: Twice, monkeypatch: pytest.MonkeyPatch
) -> None:
    swarm = twice.runner._swarm
    run_job, seen = swarm.run_job, []

    def heard(*args: Any) -> None:
        seen.append(swarm.in_flight.counts())
        run_job(*args)

    monkeypatch.setattr(swarm, "run_job", heard)
    hops = trace(twice.model).result.hops
    assert seen == [{hop.peer: 1 for hop in hops}]
    assert swarm.in_flight.counts() == {}


def test_a_single_chain_is_measured_by_the_way(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refresh(self: Router) -> None:
        """Nothing is asked ahead of a trace."""

    monkeypatch.setattr(Router, "refresh", refresh)
    model = glasshive.local(folder, cuts=(3,))
    swarm = model._runner._swarm
    hops = trace(model).result.hops
    assert all(swarm.round_trips.of(hop.peer) is not None for hop in hops)
    # Nobody was asked for it.
    assert len(swarm.round_trips.to_ask(model._runner.router.records.now)) == 2


def test_a_lost_peer_is_left_out_by_the_next_trace_too(twice: Twice) -> None:
    first = trace(twice.model).result.hops[0].peer
    twice.kill(first)
    second = trace(twice.model).result
    assert first in twice.runner.router.bans
    assert first not in [hop.peer for hop in second.hops]
    third = trace(twice.model).result
    assert first not in [hop.peer for hop in third.hops]
    assert third.retried == 0


def test_a_peer_that_has_served_well_is_taken_again(twice: Twice) -> None:
    """Fails without `served` in the runner."""
    peers = [one.peer_id for one in twice.runner.router.records.get(fresh=True)]
    for peer in peers:
        twice.runner.router.bans.trouble(peer, 30.0)
    served = {hop.peer for hop in trace(twice.model).result.hops}
    assert [peer in twice.runner.router.bans for peer in peers] == [
        peer not in served for peer in peers
    ]


def test_a_peer_stands_in_without_the_directory(
    twice: Twice, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = generate(twice.model)
    asked: list[object] = []
    monkeypatch.setattr(twice.runner._swarm, "ask_records", lambda *args: asked.append(args))
    lost: list[PeerId] = []
    saved = Executor.run

    def dies(self: Executor, stage: Any, *args: Any) -> None:
        if self._part.index == 1 and stage.pass_index == 2 and not lost:
            lost.append(wanted.result.hops[1].peer)
            twice.kill(lost[0])
        saved(self, stage, *args)

    monkeypatch.setattr(Executor, "run", dies)
    again = generate(twice.model)
    assert torch.equal(again.output_ids, wanted.output_ids)
    assert [one.lost for one in again.result.replaced] == lost
    assert again.result.retried == 0
    assert asked == []
    assert again.result.hops[1].peer == again.result.replaced[0].by
    assert lost[0] in twice.runner.router.bans


def test_a_busy_peer_is_left_out_for_a_moment(
    twice: Twice, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy = trace(twice.model).result.hops[1].peer
    run_job = Swarm.run_job

    def refuse(self: Swarm, job: Any, *rest: Any) -> None:
        if busy in [one.peer_id for one in job.peers]:
            raise PeerBusy("16 traces are running here", peer=busy)
        run_job(self, job, *rest)

    monkeypatch.setattr(Swarm, "run_job", refuse)
    result = trace(twice.model).result
    assert result.retried == 0  # nothing had run
    assert result.hops[1].peer != busy
