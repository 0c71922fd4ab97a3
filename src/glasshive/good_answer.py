"""How long a start waits for bootstrap peers: not for one that is frozen, if another answers.

One alone could keep back what is newest, so the others have a moment to say more; and who asked
goes on listening to them when the start does not wait any more.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import Any, Final

__all__ = ["good_answer"]

MOMENT_SECONDS: Final = 1.0
"""For the others, once one has answered well. One that is frozen would be waited for for 10 s."""


async def good_answer(
    answers: Collection[asyncio.Task[bool]], then: Collection[asyncio.Task[Any]] = ()
) -> None:
    """Returns when all of `answers` and `then` are there, or a moment after an answer was True.

    The moment is also all that there is for `then`, which is made of the answers. What is not there
    goes on, and stays the caller's to end. Raises what an answer raises.
    """
    waiting = set(answers)
    while waiting:
        done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if any([one.result() for one in done]):
            break
    if rest := {*waiting, *then}:
        await asyncio.wait(rest, timeout=MOMENT_SECONDS)
