"""What a client keeps of a look-up that nobody answers."""

from __future__ import annotations

import math
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from glasshive.client.known_records import KnownRecords
from glasshive.dht.errors import DeadlineExceeded


def records_of(*, is_silent: bool) -> tuple[KnownRecords, Any]:
    """Of a swarm whose directory gives nobody, or doesn't answer; and the one known peer."""
    known = SimpleNamespace(dtype="float32", attention="sdpa", expires_at_seconds=math.inf)

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
