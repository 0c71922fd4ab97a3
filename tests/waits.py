"""Waiting for what other processes do."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

# On a machine that does much else, starting a host takes a minute.
_DEADLINE_SECONDS = 120.0


def wait_for(condition: Callable[[], object], what: object) -> None:
    """Returns when the condition holds; fails the test, saying `what`, when it does not in time."""
    ends_at = time.monotonic() + _DEADLINE_SECONDS
    while not condition():
        if time.monotonic() > ends_at:
            pytest.fail(f"not within {_DEADLINE_SECONDS:g} s: {what}")
        time.sleep(0.02)
