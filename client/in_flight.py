"""Which peers this client's own traces run on at the moment.

What peers announce of their load is up to 15 s old, so traces that begin together would all take
the same peers.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import final

from glasshive.dht.records import PeerRecord
from glasshive.security.keys import PeerId

__all__ = ["InFlight"]


@final
class InFlight:
    """The running traces of one connection, of all models. Used from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._hosts: dict[object, Sequence[PeerRecord]] = {}

    @contextlib.contextmanager
    def on(self, hosts: Sequence[PeerRecord]) -> Iterator[None]:
        """Inside, a trace runs on `hosts`, which the trace may change meanwhile."""
        trace = object()
        with self._lock:
            self._hosts[trace] = hosts
        try:
            yield
        finally:
            with self._lock:
                del self._hosts[trace]

    def counts(self) -> Mapping[PeerId, int]:
        """How many traces run on each peer now, of those on which any does."""
        with self._lock:
            hosts = list(self._hosts.values())
        return Counter(peer for trace in hosts for peer in {one.peer_id for one in trace})
