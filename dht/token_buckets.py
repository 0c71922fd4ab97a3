"""How often each peer may do something: so often in a second, and a number of times at once."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Final, final

from glasshive.security.keys import PeerId

__all__ = ["TokenBuckets"]

MAX_REMEMBERED: Final = 4096


@final
class TokenBuckets:
    """A bucket of `burst` tokens for each peer, which fills by `per_second`.

    Of at most `MAX_REMEMBERED` peers it is known how full theirs are; those who took longest ago
    are forgotten first, and a bucket that is full by now needs no remembering at all.
    """

    def __init__(
        self, per_second: float, burst: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._per_second = per_second
        self._burst = burst
        self._clock = clock
        self._full_at: OrderedDict[PeerId, float] = OrderedDict()  # by when each is full again

    def __len__(self) -> int:
        return len(self._full_at)

    def take(self, peer: PeerId) -> float:
        """Take a token: 0, or if there is none the seconds until there is one again."""
        now = self._clock()
        full_at = max(self._full_at.get(peer, now), now) + 1 / self._per_second
        missing_seconds = full_at - now - self._burst / self._per_second
        if missing_seconds > 1e-9:
            return missing_seconds
        self._remember(peer, full_at, now)
        return 0.0

    def charge(self, peer: PeerId, tokens: int) -> None:
        """Take so many tokens, there or not: at most a burst of them is owed."""
        now = self._clock()
        full_at = max(self._full_at.get(peer, now), now) + tokens / self._per_second
        self._remember(peer, min(full_at, now + 2 * self._burst / self._per_second), now)

    def _remember(self, peer: PeerId, full_at: float, now: float) -> None:
        self._full_at[peer] = full_at
        self._full_at.move_to_end(peer)
        while len(self._full_at) > MAX_REMEMBERED or next(iter(self._full_at.values())) <= now:
            self._full_at.popitem(last=False)
