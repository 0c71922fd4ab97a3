"""Clients at work while peers are killed one after another, or while the network misbehaves.

Nothing that comes is ever wrong. While peers are killed whose span another one serves, nothing
fails either. While connections are slow, broken or spoiled a trace may fail, by an error that says
so and in time.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import soak
from steady_clients import Answer, Question, SteadyClient, p95, two_of_each
from waits import wait_for

import glasshive
from glasshive.client.errors import NoRoute, PeerError, TraceTimeout
from glasshive.dht.records import MAX_LIFETIME_SECONDS
from glasshive.fault_proxy import Direction, Faults
from glasshive.testing import LocalPeer, LocalSwarm

pytestmark = pytest.mark.timeout(soak.count(400, 1800))

SPANS = [(0, 2), (2, 4), (4, 6)]
KILL_EVERY_SECONDS = 5.0
CHAOS_SECONDS = soak.count(45, 600)
QUIET_SECONDS = soak.count(5, 30)
ROTATE_SECONDS = 3.0
FAULTY_SECONDS = soak.count(30, 300)
DEADLINES_SECONDS = (1.0, 20.0)  # the first is less than a black hole lasts
SLACK_SECONDS = 1.0
# What a client says of a swarm whose directory can be asked.
NAMED = (PeerError, TraceTimeout, NoRoute)


@pytest.fixture(scope="module")
def hive(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalSwarm]:
    """Each third of the blocks by two hosts, all of them behind fault proxies."""
    cache = tmp_path_factory.mktemp("cache")
    with two_of_each(folder, SPANS, cache, faults=True) as running:
        yield running


@pytest.fixture
def swarm(hive: LocalSwarm) -> Iterator[glasshive.Swarm]:
    """A look at what is announced."""
    with glasshive.connect(hive.config) as connected:
        yield connected


@contextmanager
def at_work(
    hive: LocalSwarm, asked: Sequence[Question], n_clients: int, deadlines: Sequence[float] = ()
) -> Iterator[list[SteadyClient]]:
    """Clients that have had an answer each; at the end they stop, and all of them has answers."""
    clients = [
        SteadyClient(hive.config, hive.model_name, asked, soak.SEED * 100 + i, deadlines)
        for i in range(n_clients)
    ]
    try:
        wait_for(lambda: all(one.answers or one.failure for one in clients), "first answers")
        yield clients
    finally:
        for one in clients:
            one.stop()
    for one in clients:
        wait_for(lambda one=one: not one.is_alive(), f"{one.name} has its last answer")
        if one.failure is not None:
            raise one.failure


class Killer:
    """Kills hosts and starts them again, each only while another of its span is there."""

    def __init__(self, hive: LocalSwarm, swarm: glasshive.Swarm) -> None:
        self.killed: list[tuple[float, str]] = []  # when, by `time.monotonic`, and who
        self._hosts = {host.peer_id: host for host in hive.hosts}
        self._span = {
            host: SPANS[index % len(SPANS)] for index, host in enumerate(self._hosts.values())
        }
        self._swarm = swarm
        self._model_id = swarm.records()[0].model
        self._expiry: dict[str, float] = {}  # of the last record that a killed host can have made
        self._randomness = random.Random(soak.SEED)

    def announced(self) -> dict[str, float]:
        """Of the hosts that have announced themselves since their start, until when it holds."""
        return {
            one.peer_id: one.expires_at_seconds
            for one in self._swarm.records(self._model_id)
            if one.expires_at_seconds > self._expiry.get(one.peer_id, 0.0)
        }

    def kill_one(self) -> bool:
        """Kill and start a host, if there is one that may be killed."""
        expiry = self.announced()
        there = Counter(self._span[self._hosts[one]] for one in expiry)
        may_go = [one for one in sorted(expiry) if there[self._span[self._hosts[one]]] > 1]
        if not may_go:
            return False
        victim = self._randomness.choice(may_go)
        host = self._hosts[victim]
        host.kill()
        # By the clock: what the directory has said may be older than its last record.
        self._expiry[victim] = time.time() + MAX_LIFETIME_SECONDS
        self.killed.append((time.monotonic(), victim))
        host.start()
        return True


def told(answers: Sequence[Answer]) -> str:
    """The answers that were not right, with the seed of the run."""
    bad = [str(one) for one in answers if one.error is not None or not one.is_right]
    return "\n".join([f"GLASSHIVE_SEED={soak.SEED}: {len(bad)} of {len(answers)}", *bad])


def test_peers_that_are_killed_cost_no_result(
    hive: LocalSwarm,
    swarm: glasshive.Swarm,
    asked: list[Question],
    record_property: Callable[[str, object], None],
) -> None:
    """Fails where a generation's part has no other peer (`Job._replace` raising at once, and no
    retries), or a replacement's saves are not what the lost one's were."""
    killer = Killer(hive, swarm)
    wait_for(lambda: len(killer.announced()) == len(hive.hosts), "every host is announced")
    try:
        with at_work(hive, asked, 4) as clients:
            quiet_at = time.monotonic()
            wait_for(lambda: time.monotonic() > quiet_at + QUIET_SECONDS, "quiet time")
            began = next_at = time.monotonic()
            while time.monotonic() < began + CHAOS_SECONDS:
                wait_for(lambda at=next_at: time.monotonic() > at, "time for the next")
                wait_for(killer.kill_one, "a host that may be killed")
                next_at += KILL_EVERY_SECONDS
    finally:
        for host in hive.hosts:
            host.wait_ready()
    answers = [answer for one in clients for answer in one.answers]
    quiet = [one for one in answers if quiet_at < one.at < began - 1]
    rest = [one for one in answers if one.at >= began]
    told_of = {
        "killed": len(killer.killed),
        "answers": len(rest),
        "of which saw a loss": sum(one.disturbed > 0 for one in rest),
        "p95 seconds": round(p95(rest), 2),
        "quiet p95 seconds": round(p95(quiet), 2),
    }
    print(told_of)
    record_property("chaos", told_of)
    kills = "".join(f"\n{at:.1f} s: {who[-8:]} killed" for at, who in killer.killed)
    assert all(one.error is None and one.is_right for one in answers), told(answers) + kills
    assert len(killer.killed) >= max(3, CHAOS_SECONDS / 30), told_of
    assert told_of["of which saw a loss"], told_of


FAULTS: dict[str, Callable[[LocalPeer, random.Random], None]] = {}


def fault(
    spoil: Callable[[LocalPeer, random.Random], None],
) -> Callable[[LocalPeer, random.Random], None]:
    """One of the things that are done to a host's connections."""
    FAULTS[spoil.__name__] = spoil
    return spoil


def directions(host: LocalPeer) -> list[Direction]:
    return [host.proxy.upstream, host.proxy.downstream]


@fault
def latency(host: LocalPeer, randomness: random.Random) -> None:
    for one in directions(host):
        one.faults = Faults(latency_seconds=randomness.uniform(0.02, 0.4))


@fault
def bandwidth(host: LocalPeer, randomness: random.Random) -> None:
    for one in directions(host):
        one.faults = Faults(bandwidth_bytes_per_second=randomness.uniform(5_000, 100_000))


@fault
def corruption(host: LocalPeer, randomness: random.Random) -> None:
    for one in directions(host):
        one.faults = Faults(corrupt_every_bytes=randomness.randrange(300, 20_000))


@fault
def black_hole(host: LocalPeer, randomness: random.Random) -> None:
    randomness.choice(directions(host)).faults = Faults(black_hole=True)


@fault
def half_close(host: LocalPeer, randomness: random.Random) -> None:
    randomness.choice(directions(host)).half_close()


@fault
def reset(host: LocalPeer, randomness: random.Random) -> None:
    host.proxy.reset()


@fault
def refused(host: LocalPeer, randomness: random.Random) -> None:
    host.proxy.refuses = True
    host.proxy.reset()


def heal(hive: LocalSwarm) -> None:
    for host in hive.hosts:
        host.proxy.refuses = False
        for one in directions(host):
            one.faults = Faults()


def test_faults_of_the_network_cost_time_or_a_named_error(
    hive: LocalSwarm,
    swarm: glasshive.Swarm,
    asked: list[Question],
    record_property: Callable[[str, object], None],
) -> None:
    """Other ones at other hosts every few seconds.

    Fails where a wait of the client's has no deadline, or an error of a library comes through.
    """
    wait_for(lambda: len(swarm.records()) == len(hive.hosts), "every host is announced")
    randomness = random.Random(soak.SEED)
    done: list[str] = []
    try:
        with at_work(hive, asked, 2, DEADLINES_SECONDS) as clients:
            began = next_at = time.monotonic()
            while time.monotonic() < began + FAULTY_SECONDS:
                heal(hive)
                for host in randomness.sample(hive.hosts, randomness.randrange(1, 4)):
                    name = randomness.choice(sorted(FAULTS))
                    FAULTS[name](host, randomness)
                    done.append(f"{time.monotonic() - began:.1f} s: {name} at {host.name}")
                next_at += ROTATE_SECONDS
                wait_for(lambda at=next_at: time.monotonic() > at, "time for the next")
            heal(hive)
            healed = [len(one.answers) for one in clients]
            wait_for(
                lambda: all(
                    any(answer.is_right for answer in one.answers[seen + 1 :])
                    for one, seen in zip(clients, healed, strict=True)
                ),
                "right answers once more",
            )
    finally:
        heal(hive)
    answers = [answer for one in clients for answer in one.answers]
    told_of = {
        "answers": len(answers),
        "of which saw a loss": sum(one.disturbed > 0 for one in answers),
        "errors": dict(
            Counter(type(one.error).__name__ for one in answers if one.error is not None)
        ),
        "longest beyond its deadline": round(
            max(one.seconds - one.deadline_seconds for one in answers), 2
        ),
    }
    print(told_of, *done, sep="\n")
    record_property("faults", told_of)
    said = told(answers) + "\n" + "\n".join(done)
    assert any(one.error is not None or one.disturbed for one in answers), "faults that do nothing"
    assert all(one.is_right for one in answers if one.error is None), said
    assert all(isinstance(one.error, NAMED) for one in answers if one.error is not None), said
    late = [one for one in answers if one.seconds > one.deadline_seconds + SLACK_SECONDS]
    assert not late, told(late) + "\n" + "\n".join(done)
