"""The end of a trace is one thing only: its own, or a cancellation, whichever came first."""

from __future__ import annotations

from concurrent.futures import Future

import pytest

from glasshive.client.cancellation import Cancellation
from glasshive.client.errors import PeerLost, TraceCancelled
from glasshive.security.keys import Identity


def test_what_came_first_decides() -> None:
    first, second = Cancellation("a trace"), Cancellation("a trace")
    said = r"^a trace was cancelled by tracer\.cancel\(\) \S+ s after it had begun to run, and its "
    with pytest.raises(TraceCancelled, match=said):
        with first.running():
            assert first.cancel()
            assert first.cancel()
            raise PeerLost("gone", peer=Identity.generate().peer_id)
    assert first.cancel(), "as it was"
    with second.running():
        pass
    assert not second.cancel()
    second.check()


def test_an_interrupt_stays_one() -> None:
    cancellation = Cancellation("a trace")
    with pytest.raises(KeyboardInterrupt):
        with cancellation.running():
            assert cancellation.cancel()
            raise KeyboardInterrupt


def test_a_call_that_begins_after_the_cancellation_ends_at_once() -> None:
    cancellation = Cancellation("a trace")
    assert cancellation.cancel()
    with pytest.raises(TraceCancelled):
        cancellation.watch(Future())
