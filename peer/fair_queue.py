"""Work that waits for one worker, taken in turn among clients by what each has been given.

Whoever has been given the least of the worker's time goes next, and the work of one client in the
order in which it came. Turns alone would not be fair: stages take from a millisecond to minutes,
and a client of long ones would have nearly all of the time.

Idle time earns nothing: a client that comes (again) starts level with the one that was served last,
so it neither waits for what others had while it was away nor has the worker to itself for as long
as they had it (start-time fair queuing).
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Final, Generic, TypeVar, final

from glasshive.peer.errors import Busy
from glasshive.security.keys import PeerId

MAX_REMEMBERED: Final = 1024

W = TypeVar("W")


@final
class FairQueue(Generic[W]):
    """At most `per_client` things wait of each client. For one thread at a time."""

    def __init__(self, per_client: int) -> None:
        self._per_client = per_client
        self._waiting: OrderedDict[PeerId, deque[W]] = OrderedDict()
        self._had_seconds: dict[PeerId, float] = {}  # of those who wait, or are above the level
        self._level_seconds = 0.0

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def put(self, client: PeerId, work: W) -> None:
        """Have `work` wait. Raises Busy if as much of this client's waits as may."""
        own = self._waiting.setdefault(client, deque())
        if len(own) >= self._per_client:
            raise Busy(
                f"{self._per_client} stages of yours wait here for their turn; wait for one of "
                "your traces, or try another peer"
            )
        if not own:
            had_seconds = self._had_seconds.get(client, 0.0)
            self._had_seconds[client] = max(had_seconds, self._level_seconds)
        own.append(work)

    @property
    def is_empty(self) -> bool:
        """Whether nothing waits. From any thread."""
        return not self._waiting

    def take(self) -> tuple[PeerId, W] | None:
        """Whose turn it is, and with what; None if nothing waits."""
        if not self._waiting:
            return None
        client = min(self._waiting, key=self._had_seconds.__getitem__)  # the first of equals
        return client, self.take_of(client)

    def ahead_of(
        self, client: PeerId, seconds: float, fits: Callable[[W], bool]
    ) -> tuple[PeerId, W] | None:
        """Whose turn it is among those given less than `client`, by more than so much, and whose
        next work fits. Nothing is taken."""
        most_seconds = self._had_seconds.get(client, self._level_seconds) - seconds
        ahead = [
            one
            for one, own in self._waiting.items()
            if self._had_seconds[one] < most_seconds and fits(own[0])
        ]
        if not ahead:
            return None
        first = min(ahead, key=self._had_seconds.__getitem__)
        return first, self._waiting[first][0]

    def take_of(self, client: PeerId) -> W:
        """The next work of a client that waits."""
        own = self._waiting[client]
        work = own.popleft()
        self._waiting.move_to_end(client)
        if not own:
            del self._waiting[client]
        self._level_seconds = max(self._level_seconds, self._had_seconds[client])
        return work

    def charge(self, client: PeerId, seconds: float) -> None:
        """The client was given so much."""
        had_seconds = self._had_seconds.get(client, self._level_seconds)
        self._had_seconds[client] = had_seconds + seconds
        if len(self._had_seconds) > MAX_REMEMBERED:
            self._forget()

    def discard(self, client: PeerId, work: W) -> None:
        """Have `work` wait no longer, if it still does."""
        own = self._waiting.get(client)
        if own is not None and work in own:
            own.remove(work)
            if not own:
                del self._waiting[client]

    def _forget(self) -> None:
        """Forget those who have left: of keys that are level, and of all if there are too many."""
        left = [one for one in self._had_seconds if one not in self._waiting]
        level = [one for one in left if self._had_seconds[one] <= self._level_seconds]
        for client in level or left:
            del self._had_seconds[client]
