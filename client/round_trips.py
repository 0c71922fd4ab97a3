"""How long a message to a peer and the answer to it take, as this client has measured.

What happens anyway says so: the answer to a `Prepare` comes no sooner than a round trip. It comes
later by what the peer has to check, so it shortens what is known, and one that comes much later has
the peer asked. Peers are asked two small questions each, several at once, and the second answer is
timed: ahead of the traces of a model in use (warm_routes.py), and by a trace that finds peers that
compete and of which nobody was asked. That also opens the connection, which the network daemon then
keeps for a while. What peers measure between each other isn't known here. A peer that answers
before it is asked seems nearer than it is, as one seems faster that says so: this chooses among
honest peers.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Iterable
from typing import Final, NamedTuple, final

from glasshive.dht.errors import SwarmError
from glasshive.dht.messages import FILES_PROTOCOL, AskFile, File, decode, encode
from glasshive.dht.records import PeerRecord
from glasshive.dht.transport import PeerAddress, Transport
from glasshive.security.keys import PeerId

__all__ = ["PATIENCE_SECONDS", "RoundTrips"]

PATIENCE_SECONDS: Final = 1.0
"""For all answers together. Who gave none by then is taken to be that far away, for a while."""
MOST_ASKED: Final = 16
KNOWN_SECONDS: Final = 300.0
MISSED_SECONDS: Final = 30.0
MOST_PEERS: Final = 512

AHEAD_SECONDS: Final = 20.0
"""What is forgotten within so long is measured anew by who asks ahead."""

MUCH_SLOWER: Final = 2.0
"""So many times as long as known, and `MUCH_SECONDS` more, is no chance delay."""
MUCH_SECONDS: Final = 0.02

_ASKED_FOR: Final = "config.json"  # the smallest file that every peer has


class _Measured(NamedTuple):
    seconds: float
    until: float
    asked_until: float  # it need not be asked before
    is_missed: bool = False  # no answer had come by then


@final
class RoundTrips:
    """The shortest exchange with each peer of the last minutes, or since it took much longer.

    `clock` gives seconds. Written on the loop alone; read anywhere.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._measured: dict[PeerId, _Measured] = {}

    def of(self, peer: PeerId) -> float | None:
        """Seconds to a peer and back, at most; None if that was not measured of late."""
        found = self._measured.get(peer)
        return None if found is None or self._clock() >= found.until else found.seconds

    def text(self, peer: PeerId) -> str:
        """The round trip to a peer, for people."""
        found = self._found(peer)
        if found is None:
            return "not measured"
        if found.is_missed:
            return f"no answer in {found.seconds:g} s"
        return f"{1000 * found.seconds:.1f} ms"

    def saw(self, peer: PeerId, seconds: float) -> None:
        """An exchange with a peer took so long, maybe with work of its own."""
        now, found = self._clock(), self._found(peer)
        if found is None or seconds <= found.seconds:
            asked_until = 0.0 if found is None else found.asked_until
            self._put(peer, _Measured(seconds, now + KNOWN_SECONDS, asked_until))
        elif _is_much(seconds, found.seconds):
            self._put(peer, found._replace(asked_until=now))

    def to_ask(self, records: Iterable[PeerRecord], ahead_seconds: float = 0.0) -> list[PeerRecord]:
        """Those of the peers that were not asked of late: the first of them, and not too many.

        Also those of which that will be so in `ahead_seconds`.
        """
        then = self._clock() + ahead_seconds
        due = (one for one in records if then >= self._known_until(one.peer_id))
        return list(itertools.islice(due, MOST_ASKED))

    async def ask(
        self,
        transport: Transport,
        records: Iterable[PeerRecord],
        patience_seconds: float = PATIENCE_SECONDS,
    ) -> None:
        """Measure how far away these peers are, all at once, within `patience_seconds`."""
        tasks = {one.peer_id: asyncio.create_task(self._answer(transport, one)) for one in records}
        if not tasks:
            return
        try:
            await asyncio.wait(tasks.values(), timeout=patience_seconds)
        finally:
            for task in tasks.values():
                task.cancel()
            answers = await asyncio.gather(*tasks.values(), return_exceptions=True)
        now = self._clock()
        for peer, seconds in zip(tasks, answers, strict=True):
            if not isinstance(seconds, float):
                until = now + MISSED_SECONDS
                self._put(peer, _Measured(patience_seconds, until, until, is_missed=True))
                continue
            found, until = self._found(peer, AHEAD_SECONDS), now + KNOWN_SECONDS
            if found is None or seconds <= found.seconds:
                self._put(peer, _Measured(seconds, until, until))
            elif _is_much(seconds, found.seconds):  # for now: it may have been a bad moment
                until = now + MISSED_SECONDS
                self._put(peer, _Measured(seconds, until, until))
            else:
                self._put(peer, found._replace(asked_until=until))

    async def _answer(self, transport: Transport, record: PeerRecord) -> float | None:
        """Seconds from a question to the answer; None without one.

        The first answer waits for the connection, too, and says nothing of the way.
        """
        peer = PeerAddress(record.peer_id, record.addresses)
        ask = encode(AskFile(record.model, _ASKED_FOR))
        seconds = 0.0
        try:
            stream = await transport.open_stream(peer, FILES_PROTOCOL, PATIENCE_SECONDS)
            try:
                for _ in range(2):
                    began = self._clock()
                    await stream.send(ask, b"", PATIENCE_SECONDS)
                    answer = await stream.receive(PATIENCE_SECONDS)
                    seconds = self._clock() - began
                    decode(answer.header, File)
            finally:
                stream.reset()  # nothing of it is of use any more
        except SwarmError:
            return None
        return seconds

    def _known_until(self, peer: PeerId) -> float:
        """Until when a peer's round trip is known because it was asked."""
        found = self._measured.get(peer)
        return 0.0 if found is None else min(found.until, found.asked_until)

    def _found(self, peer: PeerId, ahead_seconds: float = 0.0) -> _Measured | None:
        """What is known of a peer, and not forgotten in `ahead_seconds`."""
        found = self._measured.get(peer)
        return None if found is None or self._clock() + ahead_seconds >= found.until else found

    def _put(self, peer: PeerId, measured: _Measured) -> None:
        """Write an entry; of too many the oldest one goes. Who reads sees all as before, or after.

        What was known of others isn't missing for a moment: another thread may choose in it.
        """
        kept = {one: known for one, known in self._measured.items() if one != peer}
        kept[peer] = measured
        while len(kept) > MOST_PEERS:
            del kept[next(iter(kept))]
        self._measured = kept


def _is_much(seconds: float, than_seconds: float) -> bool:
    """Whether it is much longer."""
    return seconds > MUCH_SLOWER * than_seconds + MUCH_SECONDS
