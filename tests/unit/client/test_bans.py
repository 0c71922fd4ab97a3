"""Peers that are left out after trouble: for how long, and what ends it."""

from __future__ import annotations

import pytest

from glasshive.client.bans import LOST_SECONDS, MOST_PEERS, MOST_SECONDS, Bans
from glasshive.security.keys import PeerId

ANN, BEN = PeerId("ann"), PeerId("ben")


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def bans(clock: Clock) -> Bans:
    return Bans(clock)


def left_out_seconds(bans: Bans, clock: Clock) -> float:
    """How long Ann is left out from now on, found by bisection."""
    began, low, high = clock.now, 0.0, 4 * MOST_SECONDS
    for _ in range(40):
        clock.now = began + (low + high) / 2
        low, high = (clock.now - began, high) if ANN in bans else (low, clock.now - began)
    clock.now = began
    return round(high, 3)


def test_each_trouble_after_a_ban_doubles_the_next(bans: Bans, clock: Clock) -> None:
    assert ANN not in bans
    for wanted in (30, 60, 120, 240, 480, MOST_SECONDS, MOST_SECONDS):
        bans.trouble(ANN, LOST_SECONDS)
        assert left_out_seconds(bans, clock) == wanted
        assert BEN not in bans
        clock.now += wanted


def test_the_same_trouble_told_of_by_many_traces_counts_once(bans: Bans, clock: Clock) -> None:
    for _ in range(20):
        bans.trouble(ANN, LOST_SECONDS)
    assert left_out_seconds(bans, clock) == 30
    clock.now = 29.0
    bans.trouble(ANN, 1.0)
    assert left_out_seconds(bans, clock) == 1.0  # what was left of it
    bans.trouble(ANN, LOST_SECONDS)
    assert left_out_seconds(bans, clock) == 30


def test_who_has_served_well_begins_anew(bans: Bans, clock: Clock) -> None:
    bans.trouble(ANN, LOST_SECONDS)
    clock.now = 30.0
    bans.trouble(ANN, LOST_SECONDS)
    bans.served(ANN)
    assert ANN not in bans
    bans.trouble(ANN, LOST_SECONDS)
    assert left_out_seconds(bans, clock) == 30
    bans.served(BEN)  # with whom there was no trouble


def test_old_troubles_are_forgotten(bans: Bans, clock: Clock) -> None:
    bans.trouble(ANN, LOST_SECONDS)
    clock.now = 30.0 + MOST_SECONDS
    bans.trouble(ANN, LOST_SECONDS)
    assert left_out_seconds(bans, clock) == 30


def test_of_too_many_the_oldest_are_forgotten(bans: Bans) -> None:
    bans.trouble(ANN, LOST_SECONDS)
    for i in range(MOST_PEERS - 1):
        bans.trouble(PeerId(str(i)), LOST_SECONDS)
    assert ANN in bans
    bans.trouble(BEN, LOST_SECONDS)
    assert ANN not in bans
    assert BEN in bans
