"""One way to bound a wait."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from glasshive.dht.errors import DeadlineExceeded

__all__ = ["within"]

T = TypeVar("T")


async def within(seconds: float, awaitable: Awaitable[T], what: str) -> T:
    """The result of `awaitable`; cancels it and raises DeadlineExceeded after `seconds`."""
    try:
        # Cheaper than wait_for, which runs the awaitable in a task of its own before 3.12.
        async with asyncio.timeout(seconds):
            return await awaitable
    except TimeoutError:
        raise DeadlineExceeded(
            f"{what} took longer than {seconds:g} s; try again, or allow more time"
        ) from None
