"""What a host remembers of the requests that it took: bounded, kept, and never in its way."""

from __future__ import annotations

import logging
import struct
import zlib
from pathlib import Path

import pytest

from glasshive.peer import seen_requests
from glasshive.peer.seen_requests import SeenRequests
from glasshive.security.durable_file import write_private
from glasshive.security.envelope import CLOCK_SKEW_SECONDS, Envelope
from glasshive.security.errors import Replayed
from glasshive.security.keys import Identity, PeerId, public_key_of

ALICE, EVE = (Identity(bytes([number]) * 32).peer_id for number in (1, 2))
NOW = 1_700_000_000.0
RECORD_BYTES = seen_requests._RECORD_BYTES


def envelope_of(number: int, sender: PeerId = ALICE, expires_at: float = NOW + 60) -> Envelope:
    return Envelope(
        kind="trace",
        swarm="lab",
        sender=sender,
        receiver=None,
        request_id=number.to_bytes(16, "big"),
        expires_at_milliseconds=round(expires_at * 1000),
        body=b"",
    )


def is_new(seen: SeenRequests, envelope: Envelope, now: float = NOW) -> bool:
    try:
        seen.admit(envelope, now)
    except Replayed:
        return False
    return True


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "data" / "seen" / "host"


def test_what_was_taken_is_known_after_any_number_of_restarts(place: Path) -> None:
    for number in range(20):
        seen = SeenRequests(place, now=NOW)
        assert [is_new(seen, envelope_of(one)) for one in range(number + 1)] == (
            [False] * number + [True]
        )
        assert is_new(seen, envelope_of(number, EVE))
    assert place.stat().st_mode & 0o777 == 0o600
    assert place.parent.stat().st_mode & 0o777 == 0o700


def test_each_revision_is_known_after_a_restart(place: Path) -> None:
    """A trace is asked for again, under a higher one, at a peer that was lost and is back."""
    for _ in range(2):
        seen = SeenRequests(place, now=NOW)
        fresh = len(seen._cache) == 0
        for revision in (0, 1, 7, 64):
            if fresh:
                seen.admit(envelope_of(1), NOW, revision)
            with pytest.raises(Replayed, match="was seen before"):
                seen.admit(envelope_of(1), NOW, revision)
    seen.admit(envelope_of(1), NOW, 2)
    assert place.stat().st_size == 5 * RECORD_BYTES


def test_a_file_of_an_earlier_release_is_read(place: Path) -> None:
    """Which had no revisions, and an expiry of 8 bytes."""
    fields = struct.pack(">32s16sQ", public_key_of(ALICE), bytes(15) + b"\1", round(1000 * NOW))
    write_private(place, fields + struct.pack(">I", zlib.crc32(fields, seen_requests._LAYOUT)))
    assert not is_new(SeenRequests(place, now=NOW), envelope_of(1))


def test_expired_requests_leave_the_file(place: Path) -> None:
    seen = SeenRequests(place, now=NOW)
    assert is_new(seen, envelope_of(1, expires_at=NOW + 1))
    assert is_new(seen, envelope_of(2))
    assert place.stat().st_size == 2 * RECORD_BYTES
    SeenRequests(place, now=NOW + 1 + CLOCK_SKEW_SECONDS)  # just still to be refused
    assert place.stat().st_size == 2 * RECORD_BYTES
    later = SeenRequests(place, now=NOW + 2 + CLOCK_SKEW_SECONDS)
    assert place.stat().st_size == RECORD_BYTES
    assert not is_new(later, envelope_of(2), NOW + 2)


def test_the_file_is_bounded(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seen_requests, "LEAST_RECORDS", 8)
    seen = SeenRequests(place, now=NOW)
    sizes = []
    for number in range(200):  # one a second, so that 70 or so can still be shown
        now = NOW + number
        assert is_new(seen, envelope_of(number, expires_at=now + 60), now)
        sizes.append(place.stat().st_size // RECORD_BYTES)
    last = [envelope_of(one, expires_at=NOW + one + 60) for one in range(139, 200)]
    again = SeenRequests(place, now=now)
    assert not any(is_new(again, one, now) for one in last)
    assert max(sizes) <= 2 * 71


@pytest.mark.parametrize("bound", ["MAX_REQUESTS", "MAX_REQUESTS_PER_CLIENT"])
def test_the_memory_is_bounded(bound: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seen_requests, bound, 5)
    seen = SeenRequests()
    assert all(is_new(seen, envelope_of(number)) for number in range(5))
    with pytest.raises(Replayed, match="5 requests"):
        seen.admit(envelope_of(5), NOW)
    assert is_new(seen, envelope_of(5, EVE)) == (bound == "MAX_REQUESTS_PER_CLIENT")
    later = NOW + 61 + CLOCK_SKEW_SECONDS
    assert is_new(seen, envelope_of(6, expires_at=later + 60), later)


@pytest.mark.parametrize("damage", ["cut", "flipped", "garbage"])
def test_of_a_damaged_file_is_taken_what_can_be_read(
    place: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    seen = SeenRequests(place, now=NOW)
    assert all(is_new(seen, envelope_of(number)) for number in range(3))
    data = bytearray(place.read_bytes())
    if damage == "cut":
        del data[-1:]
    elif damage == "flipped":
        data[2 * RECORD_BYTES + 40] ^= 1
    else:
        data[2 * RECORD_BYTES :] = b"x" * 100
    place.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        again = SeenRequests(place, now=NOW)
    assert "seen_requests_damaged" in caplog.text
    assert [is_new(again, envelope_of(number)) for number in range(3)] == [False, False, True]
    assert [is_new(SeenRequests(place, now=NOW), envelope_of(one)) for one in range(3)] == [
        False
    ] * 3


def test_a_file_that_others_can_write_is_not_believed(
    place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert is_new(SeenRequests(place, now=NOW), envelope_of(1))
    place.chmod(0o666)
    with caplog.at_level(logging.WARNING):
        seen = SeenRequests(place, now=NOW)
    assert "seen_requests_unreadable" in caplog.text
    assert is_new(seen, envelope_of(1))
    assert place.stat().st_mode & 0o777 == 0o600


def test_a_host_works_on_without_its_file_and_keeps_it_when_it_can(
    place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place.mkdir(parents=True)  # where the file should be
    with caplog.at_level(logging.WARNING):
        seen = SeenRequests(place, now=NOW)
        assert all(is_new(seen, envelope_of(number)) for number in range(3))
    assert not any(is_new(seen, envelope_of(number)) for number in range(3))
    assert caplog.text.count("seen_requests_not_kept") == 1
    place.rmdir()
    assert is_new(seen, envelope_of(3))  # with it all the others are written
    again = SeenRequests(place, now=NOW)
    assert not any(is_new(again, envelope_of(number)) for number in range(4))
