"""The trace stream to one peer, and what its failures mean: whom they blame, in which words."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from glasshive.client.errors import BadAnswer, PeerBusy, PeerError, PeerFailed, PeerLost
from glasshive.client.hop import HopReport
from glasshive.client.step_watch import StepWatch
from glasshive.dht.errors import (
    DeadlineExceeded,
    MalformedMessage,
    StreamBusy,
    StreamClosed,
    TransportError,
    TransportLost,
)
from glasshive.dht.framing import Frame, Stream
from glasshive.dht.messages import Alive, Cancel, Failed, Lost, decode, encode, is_a
from glasshive.security.keys import PeerId
from glasshive.security.requests import TraceRequest

__all__ = ["PeerStream", "blaming", "failure_of", "how_little_it_says"]

_STOOD_STILL_SECONDS: Final = 0.5


@dataclass(slots=True)
class PeerStream:
    """The trace stream to one peer.

    `Failed` may come in place of any other frame, also of a tensor's next slice, and so may `Lost`:
    `on_lost` is told of which part, unless the peer has yet to hear that their edges begin anew.
    `on_idle` is called when an `Alive` shows that the peer has got no further for too long.
    """

    stream: Stream
    hop: HopReport
    hops: Sequence[HopReport]  # all of them
    silence_seconds: float
    request: TraceRequest
    request_sha256: bytes
    on_lost: Callable[[int], None]
    on_idle: Callable[[], None]
    watch: StepWatch
    told: list[tuple[int, int]]
    """How often each part had been given to another peer, or to the same one anew, when this one
    was told of it, and in which revision of the request that was."""
    revision: int
    renewed: Counter[int] = field(default_factory=Counter)
    """By another part: the last revision by which this peer was to begin the edges with it anew."""
    revisions: dict[bytes, TraceRequest] = field(default_factory=dict)
    """The request as it was signed anew, by the hash of each."""
    signs_of_life: int = 0
    """How often this peer said that it is there."""
    given_up: str = ""
    """Why this peer is taken for lost though it is there."""
    may_return: bool = True
    """Whether it may take its part again, once it has announced itself."""
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def peer_id(self) -> PeerId:
        return self.stream.peer_id

    async def receive(self, deadline_seconds: float | None = None) -> Frame:
        """The next frame that is news.

        Raises what a `Failed` means, and DeadlineExceeded if nothing at all came for long.
        """
        patience_seconds = deadline_seconds or self.silence_seconds
        while True:
            began = time.monotonic()
            try:
                frame = await self.stream.receive(patience_seconds)
            except StreamClosed:
                if self.given_up:
                    raise StreamClosed(self.given_up) from None
                raise
            except DeadlineExceeded:
                if time.monotonic() - began > patience_seconds + _STOOD_STILL_SECONDS:
                    continue  # it was this process that stood still; what came meanwhile is there
                raise
            if is_a(frame.header, Alive):
                self.signs_of_life += 1
                if self.watch.hear(decode(frame.header, Alive)):
                    self.on_idle()
                await asyncio.sleep(0)  # many may lie there, and others have their turns between
                continue
            self.watch.moved()
            if is_a(frame.header, Failed):
                # Before its part runs it has had nothing to do with others, and speaks for itself.
                others = self.hops if self.hop.state == "running" else ()
                raise failure_of(self.hop, decode(frame.header, Failed), others)
            if is_a(frame.header, Lost):
                lost = decode(frame.header, Lost)
                part = lost.part
                if part not in self.hop.neighbours:
                    raise MalformedMessage(f"lost part {part}, with which it has nothing to do")
                if self.hop.state != "running" or not self.hop.part.outlives_peers:
                    raise MalformedMessage(f"lost part {part}, and its part doesn't outlive that")
                if lost.revision > self.revision:
                    raise MalformedMessage(
                        f"lost part {part} in revision {lost.revision} of its request, of which "
                        f"{self.revision} is the last"
                    )
                if lost.revision >= self.renewed[part]:
                    self.on_lost(part)
            else:
                return frame

    def give_up(self, why: str, *, may_return: bool = False) -> None:
        """Take this peer for lost, as whoever reads from it will see.

        It `may_return` where that is all that is held against it.
        """
        self.given_up, self.may_return = why, may_return
        self.stream.reset()

    async def cancel(self) -> None:
        """Have the peer stop and free everything."""
        await self.stream.send(encode(Cancel()), b"", 1.0)


def how_little_it_says(error: BaseException) -> int:
    """A peer that says what is wrong with its part, or with another peer's, says more than one that
    has only lost contact. The loss of our own daemon is why all contact is lost."""
    says_why = isinstance(error, PeerFailed | TransportLost)
    return 0 if says_why else 1 if isinstance(error, BadAnswer) else 2


_OF_NEIGHBOURS: Final[dict[str, type[PeerError]]] = {
    "NeighbourLost": PeerLost,
    "NeighbourBusy": PeerBusy,
    "BadNeighbour": BadAnswer,
}


def failure_of(hop: HopReport, message: Failed, hops: Sequence[HopReport]) -> PeerError:
    """What a peer's `Failed` means: its own trouble with the part, or another peer's absence."""
    who = str(hop)
    text = _printable(message.text)
    if (kind := _OF_NEIGHBOURS.get(message.code)) is not None:
        # It may speak of those that the plan gives it to deal with, and of nobody else.
        others = hop.neighbours
        named = [one for one in hops if one.part.index in others and one.peer.peer_id in text]
        if not named:
            return kind(f"{who} says: {text}", peer=hop.peer.peer_id)
        return kind(f"{named[0]}: {who} says: {text}", peer=named[0].peer.peer_id)
    if message.code == "Busy":
        return PeerBusy(f"{who} is busy: {text}", peer=hop.peer.peer_id)
    return PeerFailed(
        text,
        code=_printable(message.code),
        node=message.node if message.node >= 0 else None,
        peer=hop.peer.peer_id,
        span=hop.part.span,
    )


def _printable(text: str) -> str:
    """Text from a peer without what could steer a terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


class blaming:  # noqa: N801  (reads as a phrase in the `with` that uses it)
    """Turns what the network says about one peer into an error that names the peer.

    The loss of our own daemon is no peer's fault, and stays what it is.
    """

    def __init__(self, hop: HopReport, silence_seconds: float, doing: str) -> None:
        self.hop = hop
        self.silence_seconds = silence_seconds
        self.doing = doing

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        who = self.hop
        if isinstance(error, MalformedMessage):
            raise BadAnswer(f"{who}: {error}", peer=self.hop.peer.peer_id) from error
        if isinstance(error, DeadlineExceeded):
            raise PeerLost(
                f"{who} has been silent for {self.silence_seconds:g} s {self.doing}: it is frozen, "
                "or the network between you and it is down",
                peer=self.hop.peer.peer_id,
            ) from error
        if isinstance(error, StreamBusy):
            raise PeerBusy(f"{who} is busy: {error}", peer=self.hop.peer.peer_id) from error
        if isinstance(error, TransportError) and not isinstance(error, TransportLost):
            raise PeerLost(
                f"{who} was lost {self.doing}: {error}", peer=self.hop.peer.peer_id
            ) from error
