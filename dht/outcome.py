"""How a task ended that nobody waits for."""

from __future__ import annotations

import asyncio
from typing import Any

__all__ = ["forget_outcome"]


def forget_outcome(future: asyncio.Future[Any]) -> None:
    """For `add_done_callback`: asyncio doesn't complain that nobody took the exception."""
    if not future.cancelled():
        future.exception()
