"""What is kept ready for the next trace of a model in use, and when that ends. On virtual time."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from peer_records import record_of
from virtual_time import UserLoop, VirtualLoop, by_user

from glasshive.client import known_records, router, runner
from glasshive.client import swarm as client_swarm
from glasshive.client.cancellation import Cancellation
from glasshive.client.demand import Demand
from glasshive.client.experiment import TraceOptions
from glasshive.client.round_trips import (
    AHEAD_SECONDS,
    KNOWN_SECONDS,
    PATIENCE_SECONDS,
    RoundTrips,
)
from glasshive.client.route import FEW
from glasshive.client.router import Router
from glasshive.client.runner import ModelRunner
from glasshive.client.swarm import Swarm
from glasshive.client.warm_routes import (
    IN_USE_SECONDS,
    LONGEST_WAIT_SECONDS,
    MOST_MODELS,
    WAIT_SECONDS,
    WarmRoutes,
)
from glasshive.dht.errors import DirectoryUnavailable, ShutOut, SwarmError
from glasshive.dht.framing import Stream
from glasshive.dht.memory_transport import MemoryNetwork
from glasshive.dht.messages import FILES_PROTOCOL, File, encode
from glasshive.dht.records import ModelId, PeerRecord
from glasshive.security.keys import Identity, PeerId

MODEL = ModelId("ab" * 32)
BLOCKS = 4
LONGEST_SECONDS = LONGEST_WAIT_SECONDS + PATIENCE_SECONDS


class Experiment:
    """As much of one as choosing a route needs: it takes every block."""

    graph = outline = None

    def __init__(self) -> None:
        self.cancellation = Cancellation()


class Home:
    """A client of blocks 0:2, served by one host, and 2:4, served by more than are kept in mind."""

    def __init__(self, folder: Path, clock: Callable[[], float]) -> None:
        self.network = MemoryNetwork(clock=clock)
        self.clock = clock
        self.folder = folder
        self.asked_at: list[float] = []  # the directory
        self.fails: SwarmError | None = None
        self.questions: Counter[PeerId] = Counter()

    async def start(self) -> None:
        spans = [(0, 2)] + [(2, BLOCKS)] * (FEW + 1)
        self.hosts = [await self.host(start, end) for start, end in spans]
        identity = Identity.generate()
        self.client = self.network.transport(identity, dht=False)
        self.swarm = Swarm(UserLoop(), self.client, identity, [], self.folder)  # type: ignore[arg-type]
        self.router = Router(
            *(self.swarm, MODEL, "tiny", "float32", "sdpa", BLOCKS),
            chance=lambda: 0.0,
            liking=lambda peer: 0.0,
        )
        self.runner: Any = ModelRunner(self.swarm, self.router)
        self.runner._run_once = lambda experiment, options, route, *rest: route

    async def host(
        self, start: int, end: int, way_seconds: float = 0.0, **others: Any
    ) -> PeerRecord:
        identity = Identity.generate()
        transport = self.network.transport(identity)

        async def answer(stream: Stream) -> None:
            for _ in range(2):
                await stream.receive(10)
                self.questions[identity.peer_id] += 1
                await asyncio.sleep(way_seconds)
                await stream.send(encode(File(0)), b"", 10)

        await transport.serve(FILES_PROTOCOL, answer)
        return record_of(
            *(identity, MODEL),
            start=start,
            end=end,
            attention="sdpa",
            addresses=transport.addresses,
            expires_at_seconds=1e9,
            **others,
        )

    async def ask_directory(self, *args: object, **options: object) -> list[PeerRecord]:
        self.asked_at.append(self.clock())
        if self.fails is not None:
            raise self.fails
        return self.hosts

    async def trace(self) -> int:
        """How many questions it asks in its own path, of the directory and of peers."""

        def run() -> int:
            before = len(self.asked_at) + self.questions.total()
            self.route = self.runner.run(Experiment(), TraceOptions())
            return len(self.asked_at) + self.questions.total() - before

        return await by_user(run)

    async def close(self) -> None:
        await by_user(self.swarm.close)

    def known(self) -> list[bool]:
        """Of which hosts the round trip is known."""
        return [self.swarm.round_trips.of(one.peer_id) is not None for one in self.hosts]


Story = Callable[[Home], Coroutine[Any, Any, None]]
Tell = Callable[[Story], None]


@pytest.fixture
def loop() -> Iterator[VirtualLoop]:
    """A loop on which nothing is left at the end."""
    made = VirtualLoop()
    asyncio.set_event_loop(made)
    yield made
    left = asyncio.all_tasks(made)
    asyncio.set_event_loop(None)
    made.close()
    assert not left


@pytest.fixture
def tell(loop: VirtualLoop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tell:
    """Has what a story awaits take virtual time."""
    clock = SimpleNamespace(monotonic=loop.time)
    for module in (router, runner, known_records):
        monkeypatch.setattr(module, "time", clock)
    chance = random.Random(5).random
    for kind, options in ((RoundTrips, {}), (WarmRoutes, {"chance": chance})):
        made = partial(kind, clock=loop.time, **options)
        monkeypatch.setattr(client_swarm, kind.__name__, made)
    for module in (router, runner):
        monkeypatch.setattr(module, "needed_blocks", lambda graph, outline: range(BLOCKS))
        monkeypatch.setattr(module, "demand_of", lambda experiment: Demand())
    home = Home(tmp_path, loop.time)
    monkeypatch.setattr(client_swarm, "ask_directory", home.ask_directory)

    async def run(story: Story) -> None:
        await home.start()
        await story(home)
        await home.close()

    return lambda story: loop.run_until_complete(run(story))


def test_what_is_known_is_asked_for_before_it_is_too_old() -> None:
    longest_seconds = LONGEST_SECONDS + 2 * known_records.ASK_SECONDS  # from asked to answered
    assert longest_seconds < known_records.FRESH_SECONDS
    assert longest_seconds < AHEAD_SECONDS


def test_after_a_pause_a_trace_asks_nobody(tell: Tell) -> None:
    """Without the refreshing it asked the directory: what it knew was 16 s old, and more."""

    async def story(home: Home) -> None:
        assert await home.trace() == 1 + 2 * FEW
        for pause_seconds in (16, 50, 110, 17):
            await asyncio.sleep(pause_seconds)
            assert await home.trace() == 0

    tell(story)


def test_a_model_that_was_just_asked_for_is_made_ready_for_its_first_trace(tell: Tell) -> None:
    async def story(home: Home) -> None:
        with home.swarm.warm.in_use(home.router.refresh, at_once=True):
            pass
        await asyncio.sleep(1)
        assert await home.trace() == 0

    tell(story)


def test_the_best_few_of_each_span_are_measured_and_one_more(tell: Tell) -> None:
    """Also the only one of its span, of which a trace has nothing to choose."""

    async def story(home: Home) -> None:
        await home.trace()
        assert home.known() == [False, *[True] * FEW, False]
        await asyncio.sleep(LONGEST_SECONDS)
        assert all(home.known())

    tell(story)


def test_who_is_near_is_found_whatever_others_announce(tell: Tell) -> None:
    """The three that seem fastest held the places of those that are measured, for good."""

    async def story(home: Home) -> None:
        chance = random.Random(7)
        home.router._chance = chance.random
        home.hosts = [await home.host(0, 2)]
        for number in range(10):
            pace, way_seconds = (1e6, 0.09) if number < FEW else (50.0, 0.002)
            home.hosts.append(
                await home.host(
                    *(2, BLOCKS), way_seconds=way_seconds, throughput_tokens_per_second=pace
                )
            )
        await home.trace()
        assert home.route.records[1] in home.hosts[1 : 1 + FEW]
        for _ in range(20):
            await asyncio.sleep(LONGEST_SECONDS)
        assert all(home.known())
        await home.trace()
        assert home.route.records[1] in home.hosts[1 + FEW :]

    tell(story)


def test_in_long_use_little_is_asked_and_nothing_by_traces(tell: Tell) -> None:
    async def story(home: Home) -> None:
        await home.trace()
        await asyncio.sleep(LONGEST_SECONDS)
        began_at, asked = home.clock(), len(home.asked_at)
        home.questions.clear()
        while (seconds := home.clock() - began_at) < 3000:
            await asyncio.sleep(37)
            assert home.known()[:-1] == [True, *[True] * FEW]
            assert await home.trace() == 0
        assert len(home.asked_at) - asked <= seconds / WAIT_SECONDS + 1
        most = 2 * (seconds / (KNOWN_SECONDS - AHEAD_SECONDS) + 1)
        assert 0 < max(home.questions.values()) <= most

    tell(story)


def test_a_long_trace_keeps_its_model_in_use(tell: Tell) -> None:
    async def story(home: Home) -> None:
        with home.swarm.warm.in_use(home.router.refresh):
            await asyncio.sleep(5 * IN_USE_SECONDS)
            assert home.asked_at[-1] >= home.clock() - LONGEST_SECONDS

    tell(story)


def test_nothing_is_asked_for_a_model_that_nobody_uses(tell: Tell) -> None:
    async def story(home: Home) -> None:
        await home.trace()
        await asyncio.sleep(IN_USE_SECONDS + LONGEST_SECONDS)
        asked, questions = len(home.asked_at), home.questions.total()
        assert asked > IN_USE_SECONDS / LONGEST_SECONDS
        assert asyncio.all_tasks() == {asyncio.current_task()}
        await asyncio.sleep(3600)
        assert (len(home.asked_at), home.questions.total()) == (asked, questions)
        assert await home.trace() > 0
        await asyncio.sleep(60)
        assert await home.trace() == 0  # it begins anew

    tell(story)


def test_close_ends_it(tell: Tell) -> None:
    async def story(home: Home) -> None:
        await home.trace()
        asked = len(home.asked_at)
        await home.close()
        assert asyncio.all_tasks() == {asyncio.current_task()}
        with home.swarm.warm.in_use(home.router.refresh, at_once=True):
            await asyncio.sleep(60)
        assert len(home.asked_at) == asked

    tell(story)


def test_a_directory_that_is_lost_does_no_harm(tell: Tell) -> None:
    async def story(home: Home) -> None:
        await home.trace()
        home.fails = DirectoryUnavailable("none of 3 bootstrap peers gave a directory")
        await asyncio.sleep(60)
        assert len(home.asked_at) > 60 / LONGEST_SECONDS
        assert await home.trace() == 1  # as without: those who were known may be there
        home.fails = None
        await asyncio.sleep(LONGEST_SECONDS)
        assert await home.trace() == 0

    tell(story)


def test_a_bug_in_it_does_no_harm(tell: Tell, caplog: pytest.LogCaptureFixture) -> None:
    async def story(home: Home) -> None:
        await home.trace()
        home.fails = ValueError("a bug")  # type: ignore[assignment]
        await asyncio.sleep(LONGEST_SECONDS)
        assert [one.message for one in caplog.records] == ["refresh_failed"]
        home.fails = None
        await asyncio.sleep(LONGEST_SECONDS)
        assert await home.trace() == 0

    tell(story)


def test_who_is_shut_out_asks_no_more_and_the_next_trace_tells_of_it(tell: Tell) -> None:
    """It ran on peers that refuse it, as what was known was fresh."""

    async def story(home: Home) -> None:
        await home.trace()
        home.fails = ShutOut("the swarm 'lab' doesn't let this key in")
        await asyncio.sleep(LONGEST_SECONDS)
        assert len(home.asked_at) == 2
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert home.clock() < known_records.FRESH_SECONDS
        with pytest.raises(ShutOut):
            await home.trace()
        await asyncio.sleep(60)
        assert len(home.asked_at) == 4  # by the trace, and once after it

    tell(story)


def test_a_new_network_daemon_is_left_to_the_next_trace(tell: Tell) -> None:
    """One that runs would not see that it was lost, and blame its peers."""

    async def story(home: Home) -> None:
        await home.trace()
        asked = len(home.asked_at)
        home.network.kill(home.client.peer_id)
        await asyncio.sleep(60)
        assert home.client.lost.is_set()
        assert len(home.asked_at) == asked
        assert await home.trace() == 1
        assert not home.client.lost.is_set()
        await asyncio.sleep(60)
        assert await home.trace() == 0

    tell(story)


def test_of_too_many_models_those_used_last_are_kept(loop: VirtualLoop) -> None:
    refreshed: Counter[int] = Counter()

    async def refresh(number: int) -> None:
        refreshed[number] += 1

    async def story() -> None:
        warm = WarmRoutes(UserLoop().submit, clock=loop.time)
        models = [partial(refresh, number) for number in range(MOST_MODELS + 2)]
        for model in [*models, models[1]]:
            with warm.in_use(model):
                pass
        await asyncio.sleep(LONGEST_WAIT_SECONDS)
        assert sorted(refreshed) == [1, *range(3, MOST_MODELS + 2)]
        assert set(refreshed.values()) == {1}
        await warm.close()

    loop.run_until_complete(story())


def test_a_model_that_runs_is_kept_however_many_were_used_since(loop: VirtualLoop) -> None:
    """A long generation's model was given up once four others had been used after it began."""
    refreshed: Counter[str] = Counter()

    async def refresh(name: str) -> None:
        refreshed[name] += 1

    async def story() -> None:
        warm = WarmRoutes(UserLoop().submit, clock=loop.time)
        running, *others = (partial(refresh, str(number)) for number in range(MOST_MODELS + 2))
        with warm.in_use(running):
            for model in others:
                with warm.in_use(model):
                    pass
            await asyncio.sleep(LONGEST_WAIT_SECONDS)
        assert refreshed["0"] == 1
        assert refreshed["1"] == refreshed["2"] == 0
        refreshed.clear()
        with warm.in_use(partial(refresh, "new")):  # it has just been used, though it began first
            pass
        await asyncio.sleep(LONGEST_WAIT_SECONDS)
        assert refreshed["0"] > 0
        await warm.close()

    loop.run_until_complete(story())
