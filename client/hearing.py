"""Whom a job that has failed is to blame: what its peers say of themselves and of each other.

A peer whose part fails ends its streams to its neighbours, and they may be quicker to say that they
have lost it than it is to say why: it may have much to send to a slow client. They fail in turn,
and so do theirs.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping
from typing import Final, final

from glasshive.client.errors import PeerError, PeerLost
from glasshive.client.peer_stream import PeerStream, how_little_it_says
from glasshive.client.relay import Pair
from glasshive.dht.messages import ALIVE_SECONDS
from glasshive.security.keys import PeerId

__all__ = ["Hearing"]

LISTEN_SECONDS: Final = 0.25


@final
class Hearing:
    """Hears the peers of one job, on whose trace `streams`, by their parts, they speak."""

    def __init__(
        self,
        streams: Mapping[int, PeerStream],
        silence_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._streams = streams
        self._silence_seconds = silence_seconds
        self._clock = clock
        self._said: dict[PeerId, PeerError] = {}  # in the order in which they said it
        self._ended: set[PeerId] = set()
        self._news = asyncio.Event()
        self.parted: set[Pair] = set()
        """Of whom one has lost the other, while both were heard here."""

    def ended(self, peer: PeerId, error: PeerError | None = None) -> None:
        """Nothing more comes from this peer; the error is what it said last, or that it is lost."""
        if error is not None:
            self._said[peer] = error
        self._ended.add(peer)
        self._news.set()

    async def cause(self, peer: PeerId, error: PeerError, *, hear_others: bool) -> PeerError:
        """What led to the error with which this peer has ended.

        With `hear_others` those who are blamed are waited for a while, until they have spoken for
        themselves. Those who outlive each other say nothing of that.
        """
        said, by = [error], [peer]
        while True:
            blamed = said[-1].peer
            if hear_others and blamed != by[-1]:
                await self._hear_out(blamed)
            other = self._said.get(blamed)
            if other is None or other in said:
                break
            said.append(other)
            by.append(blamed)
        cause = said[-1]
        if other is not None and other is not cause:
            # They blame each other in a circle: who spoke first has led the others to it.
            spoken = list(self._said.values())
            cause = min(said, key=spoken.index)
        blamer = by[said.index(cause)]
        if hear_others and type(cause) is PeerLost and self._is_there(cause.peer, blamer):
            self.parted.add(frozenset((blamer, cause.peer)))
        return min([cause, *said], key=how_little_it_says)

    async def _hear_out(self, peer: PeerId) -> None:
        """Wait a while until a peer that another one blames has spoken for itself.

        One that only says that it is there, again and again, is.
        """
        stream = self._stream_of(peer)
        if stream is None:
            return
        began, enough = self._clock(), stream.signs_of_life + 2  # one may have been on its way
        while peer not in self._ended and self._clock() < began + self._silence_seconds:
            if stream.signs_of_life >= enough and self._clock() > began + 2 * ALIVE_SECONDS:
                return
            self._news.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LISTEN_SECONDS):
                    await self._news.wait()

    def _is_there(self, peer: PeerId, blamer: PeerId) -> bool:
        """Whether a peer that another has lost is not lost to the client."""
        said, stream = self._said.get(peer), self._stream_of(peer)
        if peer == blamer or stream is None:
            return False
        if said is not None:
            return type(said) is PeerLost and said.peer != peer
        return stream.hop.state == "running"

    def _stream_of(self, peer: PeerId) -> PeerStream | None:
        streams = self._streams.values()
        return next((one for one in streams if one.hop.peer.peer_id == peer), None)
