"""The bytes of unfinished frames: counted of a key, of an address and in all."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from glasshive.dht.unfinished_frames import UnfinishedFrames, UnfinishedLimits
from glasshive.security.keys import Identity

ANN, BOB, EVE = (Identity.generate().peer_id for _ in range(3))
LIMITS = UnfinishedLimits(per_remote_bytes=10, per_origin_bytes=15, in_all_bytes=25)


def test_each_limit_is_named_and_what_is_beyond_is_not_counted() -> None:
    frames = UnfinishedFrames(LIMITS)
    with ExitStack() as coming:
        of_ann = coming.enter_context(frames.one_more(ANN, "1.2.3.4"))
        assert of_ann(10) is None
        assert of_ann(1) == "unfinished frames of yours hold 10 bytes"
        second = coming.enter_context(frames.one_more(ANN, "5.6.7.8"))
        assert second(1) == "unfinished frames of yours hold 10 bytes"
        of_bob = coming.enter_context(frames.one_more(BOB, "1.2.3.4"))
        assert of_bob(6) == "unfinished frames from your address hold 15 bytes"
        assert of_bob(5) is None
        here = coming.enter_context(frames.one_more(EVE, ""))  # this machine is no address
        assert here(10) is None
        assert coming.enter_context(frames.one_more(BOB, ""))(1) == (
            "unfinished frames hold 25 bytes, try another peer"
        )
        assert frames.held_bytes == 25
    assert frames.held_bytes == 0


def test_a_frame_that_has_ended_makes_room_also_after_an_error() -> None:
    frames = UnfinishedFrames(LIMITS)
    for _ in range(5):
        with pytest.raises(EOFError), frames.one_more(ANN, "1.2.3.4") as hold:
            assert hold(10) is None
            raise EOFError
    assert frames.held_bytes == 0
    assert not frames._of_remote
    assert not frames._from_origin
