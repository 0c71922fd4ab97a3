"""Counting what members take of a host in a day, against their quotas."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgpack
import pytest
from hostile import attack
from soak import count

from glasshive.peer import quotas as quotas_module
from glasshive.peer.errors import QuotaExceeded
from glasshive.peer.quotas import Quotas
from glasshive.security.errors import MembershipFileError, SecurityError
from glasshive.security.keys import Identity, public_key_of
from glasshive.security.quota import Quota

ALICE, BOB = (Identity(bytes([number]) * 32).peer_id for number in (3, 4))
DAY = 86_400
NOON = 20_000 * DAY + DAY / 2


class Clock:
    def __init__(self) -> None:
        self.now = NOON

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "of-a-host.quotas"


@pytest.fixture
def quotas(place: Path, clock: Clock) -> Iterator[Quotas]:
    found = Quotas(place, clock=clock)
    yield found
    found.close()


def refusal(quotas: Quotas, quota: Quota, seconds: float = 0.0, saved_bytes: int = 0) -> str:
    """The text with which Alice's trace is refused; afterwards all is as before."""
    with pytest.raises(QuotaExceeded) as caught:
        use(quotas, quota, seconds, saved_bytes)
    return str(caught.value)


def use(quotas: Quotas, quota: Quota, seconds: float = 0.0, saved_bytes: int = 0) -> None:
    """A trace of Alice's that takes what it was thought to take."""
    hold = quotas.begin(ALICE, quota)
    try:
        hold.reserve(seconds, saved_bytes)
    except QuotaExceeded:
        hold.settle(0.0, 0)
        raise
    hold.settle(seconds, saved_bytes)


# Each quota -------------------------------------------------------------------------------------


def test_traces_at_a_time(quotas: Quotas) -> None:
    quota = Quota(traces=2)
    first, _ = quotas.begin(ALICE, quota), quotas.begin(ALICE, quota)
    quotas.begin(BOB, quota)  # counted for himself
    assert refusal(quotas, quota) == (
        "your quota of traces at a time on this host is 2, and as many are running; wait until one "
        "has ended, or ask who runs the swarm for a larger one"
    )
    first.settle(1e6, 1 << 50)
    quotas.begin(ALICE, quota)


def test_a_quota_of_no_traces_doesnt_say_to_wait(quotas: Quotas) -> None:
    assert refusal(quotas, Quota(traces=0)) == (
        "your quota of traces at a time on this host is 0; ask who runs the swarm for a larger one"
    )


def test_seconds_of_a_day(quotas: Quotas) -> None:
    quota = Quota(seconds_a_day=600)
    use(quotas, quota, 590)
    assert refusal(quotas, quota, 20.25) == (
        "this trace takes about 20.2 s of computing here, and of your quota of 600 a day on this "
        "host 590 are used or taken by what runs; trace less at a time; more is free at 2024-10-05 "
        "00:00 UTC, in 12 h 0 min; ask who runs the swarm for a larger quota"
    )
    use(quotas, quota, 10)
    assert refusal(quotas, quota) == (
        "your quota is 600 s of computing a day on this host, and 600 are used or taken by what "
        "runs; more is free at 2024-10-05 00:00 UTC, in 12 h 0 min; ask who runs the swarm for a "
        "larger quota"
    )
    quotas.begin(BOB, quota).reserve(600, 0)


def test_saved_bytes_of_a_day(quotas: Quotas) -> None:
    quota = Quota(saved_bytes_a_day=1000)
    use(quotas, quota, 1e6, 900)
    assert refusal(quotas, quota, 0, 101).startswith(
        "this trace takes about 101 saved bytes here, and of your quota of 1000 a day on this host "
        "900 are used"
    )
    use(quotas, quota, 0, 100)
    assert refusal(quotas, quota).startswith("your quota is 1000 saved bytes a day on this host")


def test_without_a_quota_nothing_is_counted_or_written(quotas: Quotas, place: Path) -> None:
    for quota in (Quota(), Quota(traces=2)):
        use(quotas, quota, 1e9, 1 << 52)
    quotas.close()
    assert not place.exists()


# Estimates and what was really taken ------------------------------------------------------------


def test_what_runs_is_taken_as_estimated_until_it_is_settled(quotas: Quotas) -> None:
    quota = Quota(seconds_a_day=100, saved_bytes_a_day=1000)
    running = quotas.begin(ALICE, quota)
    running.reserve(60, 10)
    assert "60 are used or taken by what runs" in refusal(quotas, quota, 50)
    running.settle(5, 10)  # it took less
    use(quotas, quota, 50)
    assert "of 100 a day on this host 55 are used" in refusal(quotas, quota, 46)
    running = quotas.begin(ALICE, quota)
    running.reserve(1, 0)
    running.settle(200, 2000)  # it took more
    assert "and 255 are used" in refusal(quotas, quota)


def test_a_refused_trace_takes_nothing(quotas: Quotas) -> None:
    quota = Quota(traces=1, seconds_a_day=10)
    for _ in range(3):
        refusal(quotas, quota, 11)
    use(quotas, quota, 10)


# Days -------------------------------------------------------------------------------------------


def test_a_new_day_begins_at_midnight_utc(quotas: Quotas, clock: Clock) -> None:
    quota = Quota(seconds_a_day=600)
    use(quotas, quota, 600)
    clock.now = 20_001 * DAY - 1
    assert "more is free at 2024-10-05 00:00 UTC, in 0 h 1 min" in refusal(quotas, quota)
    clock.now += 1
    use(quotas, quota, 600)
    refusal(quotas, quota)


def test_a_trace_over_midnight_is_of_the_day_of_its_end(quotas: Quotas, clock: Clock) -> None:
    quota = Quota(seconds_a_day=600)
    hold = quotas.begin(ALICE, quota)
    hold.reserve(100, 0)
    clock.now += DAY
    assert "100 are used or taken" in refusal(quotas, quota, 501)
    hold.settle(600, 0)
    assert "600 are used or taken" in refusal(quotas, quota)


def test_members_of_a_day_are_bounded(
    quotas: Quotas, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quotas_module, "MAX_MEMBERS", 1)
    quota = Quota(seconds_a_day=600)
    quotas.begin(BOB, quota).settle(1, 1)
    quotas.begin(BOB, quota)
    assert refusal(quotas, quota).startswith(
        "1 members with quotas have used this host today, and it counts no more; more is free at "
    )
    use(quotas, Quota(traces=3))  # who isn't counted needs no room
    clock.now += DAY
    use(quotas, quota)


# The file ---------------------------------------------------------------------------------------


def test_a_restart_forgets_nothing(quotas: Quotas, place: Path, clock: Clock) -> None:
    quota = Quota(seconds_a_day=600, saved_bytes_a_day=1000)
    use(quotas, quota, 599.5, 1)
    use(quotas, quota, 0, 998)
    quotas.close()
    again = Quotas(place, clock=clock)
    assert "600 are used or taken" in refusal(again, quota, 1)
    assert "of 1000 a day on this host 999 are used" in refusal(again, quota, 0, 2)
    again.close()
    clock.now += DAY
    use(Quotas(place, clock=clock), quota, 600)


def kept(place: Path) -> dict[bytes, list[int]]:
    """Milliseconds and bytes of each member, by its key, as the file says."""
    if not place.exists():
        return {}
    _, day, rows = msgpack.unpackb(place.read_bytes())
    assert day == 20_000
    return {key: numbers for key, *numbers in rows}


def test_a_process_that_is_killed_has_charged_the_estimate(
    quotas: Quotas, place: Path, clock: Clock
) -> None:
    quota = Quota(seconds_a_day=600)
    hold = quotas.begin(ALICE, quota)
    hold.reserve(40, 3)
    until = time.monotonic() + 20
    while kept(place) != {public_key_of(ALICE): [40_000, 3]}:  # before it has ended
        assert time.monotonic() < until
    again = Quotas(place, clock=clock)
    assert "40 are used or taken" in refusal(again, quota, 599)
    again.close()
    hold.settle(7, 0)
    quotas.close()
    assert kept(place) == {public_key_of(ALICE): [7_000, 0]}


def test_nobody_waits_for_the_disk(
    quotas: Quotas, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = threading.Event()
    writers: list[str] = []
    write = quotas_module.write_durable

    def slow(path: Path, data: bytes) -> None:
        writers.append(threading.current_thread().name)
        assert disk.wait(20)
        write(path, data)

    monkeypatch.setattr(quotas_module, "write_durable", slow)
    quota = Quota(seconds_a_day=600)
    for _ in range(50):
        use(quotas, quota, 1)
    disk.set()
    quotas.close()
    assert kept(place) == {public_key_of(ALICE): [50_000, 0]}
    assert len(writers) <= 2  # one that was under way, and one for all the rest
    assert all(name.startswith("quotas") for name in writers)


def test_a_disk_that_refuses_is_logged_and_the_counts_go_on(
    quotas: Quotas, place: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(quotas_module, "write_durable", full)
    quota = Quota(seconds_a_day=600)
    with caplog.at_level(logging.ERROR):
        use(quotas, quota, 600)
        quotas.close()
    assert "quotas_not_kept" in caplog.text
    assert "600 are used" in refusal(quotas, quota)


def test_a_file_that_cant_be_read_is_an_error_that_says_what_to_do(
    place: Path, clock: Clock
) -> None:
    place.write_bytes(b"\x93\x01")
    place.chmod(0o600)
    with pytest.raises(MembershipFileError) as caught:
        Quotas(place, clock=clock)
    assert str(caught.value).startswith("can't read what members have used of this host: ")
    assert str(caught.value).endswith(
        f"; correct that, or remove {place}, and the counts of today begin at 0"
    )
    place.chmod(0o644)
    with pytest.raises(MembershipFileError, match="is open to other users"):
        Quotas(place, clock=clock)


def test_no_changed_file_is_more_than_an_error(quotas: Quotas, place: Path) -> None:
    use(quotas, Quota(seconds_a_day=600), 5, 7)
    quotas.close()
    errors = (SecurityError, ValueError)
    attack(quotas_module._decoded, [place.read_bytes()], errors, tries=count(10_000, 500_000))
