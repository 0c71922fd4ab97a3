"""What a client keeps of a look-up that nobody answers."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from glasshive.client import known_records
from glasshive.client import swarm as client_swarm
from glasshive.client.errors import NoRoute
from glasshive.client.known_records import FRESH_SECONDS, KnownRecords
from glasshive.dht.errors import DeadlineExceeded, ShutOut, UnknownModel


def records_of(*, is_silent: bool) -> tuple[KnownRecords, Any]:
    """Of a swarm whose directory gives nobody, or doesn't answer; and the one known peer."""
    known = peer()

    def answer() -> list[Any]:
        if is_silent:
            raise DeadlineExceeded("nobody answers")
        return []

    async def ask_records(*args: object) -> list[Any]:
        return answer()

    swarm: Any = SimpleNamespace(
        transport=SimpleNamespace(now=lambda: 0.0),
        look_up=lambda *args: answer(),
        ask_records=ask_records,
    )
    records: Any = KnownRecords(swarm, "ab", "float32", "sdpa")
    records.now = [known]
    return records, known


@pytest.mark.asyncio
@pytest.mark.parametrize("is_silent", [True, False])
@pytest.mark.parametrize("waits", [True, False])
async def test_it_was_tried_whether_or_not_it_was_answered(is_silent: bool, waits: bool) -> None:
    """Seen failing, each alone: with a time that only answers set, in `get` and in `ask`."""
    records, known = records_of(is_silent=is_silent)
    assert records.tried_at == -math.inf
    began = time.monotonic()
    if waits:
        await records.ask()
    else:
        records.get(fresh=False)
    assert began <= records.tried_at <= time.monotonic()
    assert records.now == ([known] if is_silent else [])


def test_no_trace_waits_past_its_deadline_for_another_s_look_up() -> None:
    """Seen failing with a turn that knows no deadline: it ended when the other one did."""
    records, _ = records_of(is_silent=False)
    asked, answered = threading.Event(), threading.Event()

    def look_up(*args: object) -> list[Any]:
        asked.set()
        assert answered.wait(60)
        return []

    records._swarm.look_up = look_up
    other = threading.Thread(target=records.get, kwargs={"fresh": True})
    other.start()
    try:
        assert asked.wait(60)
        with pytest.raises(DeadlineExceeded, match="another trace was still asking"):
            records.get(fresh=True, ends_at=time.monotonic() + 0.01)
        assert not answered.is_set()
    finally:
        answered.set()
        other.join()


class Asking:
    """Another thread that asks on and on, while the test runs."""

    def __init__(self, records: KnownRecords) -> None:
        self._asked, self._answered = threading.Event(), threading.Event()
        records._swarm.look_up = self._look_up  # type: ignore[method-assign]
        self._thread = threading.Thread(target=records.get, kwargs={"fresh": True})

    def _look_up(self, *args: object) -> list[Any]:
        self._asked.set()
        assert self._answered.wait(60)
        return []

    def __enter__(self) -> Asking:
        self._thread.start()
        assert self._asked.wait(60)
        return self

    def __exit__(self, *_: object) -> None:
        self._answered.set()
        self._thread.join()


@pytest.mark.timeout(30)
def test_who_knows_its_peers_of_late_waits_for_no_other_trace_s_look_up() -> None:
    records, known = records_of(is_silent=False)
    records._learn([known], time.monotonic())
    with Asking(records):
        assert records.get(fresh=False) == [known]


@pytest.mark.timeout(30)
def test_whose_peers_are_valid_waits_a_moment_for_another_trace_s_look_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(known_records, "ASK_SECONDS", 0.01)
    records, known = records_of(is_silent=False)
    with Asking(records):
        assert records.get(fresh=False) == [known]


def test_a_peer_whose_record_has_expired_spoils_those_of_no_others() -> None:
    """A trace failed for one that had died a minute ago, as the directory was away as well."""
    records, known = records_of(is_silent=True)
    records.now = [peer(expires_at_seconds=-1.0), known]
    assert records.get(fresh=False) == [known]
    with pytest.raises(DeadlineExceeded):
        records.get(fresh=True)
    records.now = records.now[:1]
    with pytest.raises(DeadlineExceeded):
        records.get(fresh=False)


@pytest.mark.asyncio
async def test_who_waits_for_somebody_asks_no_longer_than_its_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each question had two seconds, also when none was left."""
    records, _ = records_of(is_silent=True)
    clock = SimpleNamespace(monotonic=lambda: clock.seconds, seconds=0.0)
    monkeypatch.setattr(known_records, "time", clock)
    given: list[float] = []

    async def ask_records(model: str, seconds: float) -> list[Any]:
        given.append(seconds)
        clock.seconds += seconds
        raise DeadlineExceeded("nobody answers")

    async def sleep(seconds: float) -> None:
        clock.seconds += seconds

    def choose() -> None:
        raise NoRoute("nobody")

    records._swarm.ask_records = ask_records
    monkeypatch.setattr(known_records, "asyncio", SimpleNamespace(sleep=sleep))
    with pytest.raises(NoRoute):
        await records.until(choose, lambda: 25.0 - clock.seconds, 6.5)
    assert given == [2.0, 2.0, 0.5]
    assert clock.seconds == 6.5
    given.clear()
    with pytest.raises(NoRoute):
        await records.until(choose, lambda: -math.inf)
    assert given == [2.0]


@pytest.mark.asyncio
async def test_a_new_network_daemon_and_the_directory_share_the_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each had all of it."""
    given: list[float] = []
    swarm: Any = client_swarm.Swarm.__new__(client_swarm.Swarm)
    swarm._where, swarm._transport, swarm._bootstraps = client_swarm.SOMEWHERE, None, ()

    async def alive(within_seconds: float) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        while loop.time() < began + 0.01:  # noqa: ASYNC110
            await asyncio.sleep(0)

    async def ask_directory(
        transport: object, peers: object, model: str, seconds: float, **_: object
    ) -> list[Any]:
        given.append(seconds)
        return []

    swarm._alive = alive
    monkeypatch.setattr(client_swarm, "ask_directory", ask_directory)
    assert await swarm.ask_records("ab", 1.0) == []
    assert given[0] <= 0.99


def peer(**others: Any) -> Any:
    about = {
        "dtype": "float32",
        "quantisation": "none",
        "attention": "sdpa",
        "expires_at_seconds": math.inf,
        "peer_id": object(),
        "announced_at_seconds": 0.0,
    }
    return SimpleNamespace(**about | others)


class Slow:
    """A directory whose answers a test gives, in any order, at times that it says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.answers: list[asyncio.Future[list[Any]]] = []
        self.asked = asyncio.Event()
        self.quick: list[Any] = []  # what a thread of the user's is told, at once
        swarm: Any = SimpleNamespace(
            transport=SimpleNamespace(now=lambda: 0.0),
            ask_records=self.ask_records,
            look_up=lambda *args: self.quick,
        )
        clock = SimpleNamespace(monotonic=lambda: self.now)
        monkeypatch.setattr(known_records, "time", clock)
        self.records: Any = KnownRecords(swarm, "ab", "float32", "sdpa")

    async def ask_records(self, *args: object) -> list[Any]:
        self.answers.append(asyncio.get_running_loop().create_future())
        self.asked.set()
        return await self.answers[-1]

    async def asks(self, now: float) -> asyncio.Task[None]:
        self.now = now
        self.asked.clear()
        task = asyncio.create_task(self.records.ask())
        await asyncio.wait_for(self.asked.wait(), 10)
        return task


@pytest.mark.asyncio
async def test_an_older_question_s_answer_replaces_no_newer_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It did, counted as fresh from when it came, and the last look-up began before the last."""
    slow, old, new, newest = Slow(monkeypatch), peer(), peer(), peer()
    first, second = await slow.asks(1.0), await slow.asks(2.0)
    slow.answers[1].set_result([new])
    await second
    slow.now = 9.0
    slow.answers[0].set_result([old])
    await first
    assert slow.records.now == [new]
    assert slow.records.tried_at == 2.0
    slow.now = 2.0 + FRESH_SECONDS - 0.01
    assert slow.records.are_fresh
    slow.now = 2.0 + FRESH_SECONDS
    assert not slow.records.are_fresh
    # And a thread that asks while the loop does.
    third = await slow.asks(20.0)
    slow.now, slow.quick = 21.0, [newest]
    assert slow.records.get(fresh=True) == [newest]
    slow.answers[2].set_result([old])
    await third
    assert slow.records.get(fresh=False) == [newest]
    assert slow.records.tried_at == 21.0


@pytest.mark.asyncio
async def test_an_older_record_replaces_no_newer_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bootstrap peer that is behind gave it, and others were shown where a peer had been."""
    slow, ann = Slow(monkeypatch), {"peer_id": "ann"}
    before, now, ended = (
        peer(**ann, announced_at_seconds=1.0),
        peer(**ann, announced_at_seconds=2.0),
        peer(**ann, announced_at_seconds=3.0, expires_at_seconds=-1.0),
    )

    async def learn(record: object) -> object:
        task = await slow.asks(slow.now + 1.0)
        slow.answers[-1].set_result([record])
        await task
        (known,) = slow.records.now
        return known

    assert [await learn(one) for one in (before, now, before)] == [before, now, now]
    assert await learn(ended) is ended
    assert await learn(before) is before, "what has ended says nothing"


@pytest.mark.asyncio
async def test_what_was_answered_late_is_as_old_as_its_question(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slow = Slow(monkeypatch)
    task = await slow.asks(1.0)
    slow.now = 1.0 + FRESH_SECONDS
    slow.answers[0].set_result([peer()])
    await task
    assert not slow.records.are_fresh


@pytest.mark.asyncio
async def test_a_model_that_nobody_serves_any_more_has_no_peers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Those who withdrew were kept when the loop asked, as if the directory had been silent."""
    slow = Slow(monkeypatch)
    slow.records.now = [peer()]
    task = await slow.asks(1.0)
    slow.answers[0].set_exception(UnknownModel("no peer announces ab"))
    await task
    assert slow.records.now == []


@pytest.mark.asyncio
async def test_who_is_shut_out_asks_again(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Slow(monkeypatch)
    first = await slow.asks(1.0)
    slow.answers[0].set_result([peer()])
    await first
    assert slow.records.are_fresh
    second = await slow.asks(2.0)
    slow.answers[1].set_exception(ShutOut("no"))
    with pytest.raises(ShutOut):
        await second
    assert not slow.records.are_fresh
