"""The door of a peer in a private swarm: who is let in, and what this peer shows at other doors.

Every stream of a private swarm begins with the certificates of both sides::

    opener -> acceptor   Hello
    acceptor -> opener   Hello, or a refusal with its reason

Rules:

1. A certificate is checked against the id that the transport has proved. It is no secret.
2. The acceptor reads nothing else before; the opener's role has to permit what the protocol does.
   A protocol that is not in the table is for admins.
3. Whoever answers has to be permitted to serve. The opener sends nothing to a peer before it has
   shown that. One that has shown it to this process is not waited for again: what it shows now is
   checked with the first frame from it.
4. A remembered certificate is judged anew each time, by the time and the revocations of now. A
   stream ends at once when the certificate that was shown on it is revoked.
5. Strangers open one protocol only, by which they join. Few of them are at the door at a time, of
   one key very few, and none for long.

Calls of the DHT carry the same certificates (`glasshive.dht.member_calls`).
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from typing import Final, final
from weakref import WeakKeyDictionary

from glasshive.dht.errors import MalformedMessage, NotLetIn
from glasshive.dht.framing import NOT_LET_IN, Frame, FrameLimits, Stream
from glasshive.dht.messages import (
    DIRECTORY_PROTOCOL,
    EDGE_PROTOCOL,
    FILES_PROTOCOL,
    JOIN_PROTOCOL,
    MEMBERS_PROTOCOL,
    RELAY_PROTOCOL,
    TRACE_PROTOCOL,
    TRUST_PROTOCOL,
    Hello,
    decode,
    encode,
)
from glasshive.security.errors import NotAMember
from glasshive.security.keys import PeerId
from glasshive.security.membership import MAX_CERTIFICATE_BYTES, Act, Certificate, Membership

__all__ = ["MemberGate", "reset_removed"]

logger = logging.getLogger(__name__)

HELLO_SECONDS: Final = 10.0
MAX_AT_THE_DOOR: Final = 256
MAX_AT_THE_DOOR_PER_PEER: Final = 4
MAX_REMEMBERED: Final = 4096

_ACTS: Final[dict[str, Act]] = {
    DIRECTORY_PROTOCOL: Act.READ,
    FILES_PROTOCOL: Act.READ,
    TRUST_PROTOCOL: Act.READ,
    MEMBERS_PROTOCOL: Act.READ,
    TRACE_PROTOCOL: Act.TRACE,
    RELAY_PROTOCOL: Act.TRACE,
    EDGE_PROTOCOL: Act.SERVE,
}
_LIMITS: Final = FrameLimits(
    header_bytes=MAX_CERTIFICATE_BYTES + 16, body_bytes=0, header_depth=1, header_elements=2
)


@final
class MemberGate:
    """Lets members of one private swarm in, and shows this peer's own `certificate` to others.

    `now` gives swarm time. The certificate may be replaced at any time by a newer one.
    """

    def __init__(
        self, membership: Membership, now: Callable[[], float], certificate: bytes = b""
    ) -> None:
        self.membership = membership
        self.certificate = certificate
        self._now = now
        self._shown: OrderedDict[PeerId, bytes] = OrderedDict()
        self._at_the_door: Counter[PeerId] = Counter()
        self._streams: WeakKeyDictionary[Stream, tuple[bytes, Act]] = WeakKeyDictionary()
        self._watchers: list[Callable[[], None]] = []

    def admit(self, peer_id: PeerId, certificate: bytes, act: Act) -> None:
        """Return if `certificate`, or without one the last that the peer has shown, permits `act`.

        Raises NotAMember.
        """
        shown = certificate or self._shown.get(peer_id, b"")
        self.membership.admit(peer_id, shown, act, self._now())
        self._shown[peer_id] = shown
        self._shown.move_to_end(peer_id)
        if len(self._shown) > MAX_REMEMBERED:
            self._shown.popitem(last=False)

    def certificate_of(self, peer_id: PeerId, act: Act) -> Certificate:
        """The certificate that the peer has last shown here, if it permits `act` now.

        Raises NotAMember.
        """
        return self.membership.admit(peer_id, self._shown.get(peer_id, b""), act, self._now())

    def holds(self, stream: Stream) -> bool:
        """Whether what the other side has shown on this stream still lets it be there."""
        shown = self._streams.get(stream)
        if shown is None:
            return True  # it is still at the door, or joins
        try:
            self.membership.admit(stream.peer_id, *shown, self._now())
        except NotAMember:
            return False
        return True

    def learn(self, revocations: bytes) -> bool:
        """Put a list of revocations in force; False if it was. Raises as `Membership.learn`."""
        learned = True
        try:
            learned = self.membership.learn(revocations)
        finally:
            if learned:  # also if it couldn't be kept
                for watcher in list(self._watchers):
                    watcher()
        return learned

    def on_removals(self, watcher: Callable[[], None]) -> Callable[[], None]:
        """Have `watcher` called whenever somebody may have been thrown out; what ends that."""
        self._watchers.append(watcher)
        return lambda: self._watchers.remove(watcher) if watcher in self._watchers else None

    async def accept(self, stream: Stream, protocol: str) -> bool:
        """Whether the peer that opened `stream` may go on; if not, the stream has been refused.

        Raises a SwarmError for a peer that says nothing, or what is no greeting.
        """
        if protocol == JOIN_PROTOCOL:
            return True
        peer, act = stream.peer_id, _ACTS.get(protocol, Act.ADMINISTER)
        crowded = self._at_the_door.total() >= MAX_AT_THE_DOOR
        if peer not in self._shown and (
            crowded or self._at_the_door[peer] >= MAX_AT_THE_DOOR_PER_PEER
        ):
            await stream.refuse("busy: others are being let in here; try again soon")
            return False
        self._at_the_door[peer] += 1
        try:
            hello = _hello_in(await _receive_hello(stream, HELLO_SECONDS))
            self.admit(peer, hello.certificate, act)
            self._streams[stream] = self._shown[peer], act
        except MalformedMessage:
            await stream.refuse(f"{NOT_LET_IN}this swarm is private; join it (`glasshive join`)")
            raise
        except NotAMember as error:
            logger.warning("not_let_in protocol=%s peer=%s: %s", protocol, stream.peer_id, error)
            # Its own id it knows, and a reason has little room.
            await stream.refuse(f"{NOT_LET_IN}{str(error).replace(stream.peer_id, 'this peer')}")
            return False
        finally:
            self._at_the_door[peer] -= 1
            if not self._at_the_door[peer]:
                del self._at_the_door[peer]
        await stream.send(encode(Hello(self.certificate)), b"", HELLO_SECONDS)
        return True

    async def enter(self, stream: Stream, protocol: str) -> None:
        """Show this peer's certificate on a stream that it has opened, and see the other side's.

        Raises NotLetIn for a peer that may not serve here, StreamRefused if it didn't let us in,
        and other SwarmErrors; then the stream has ended.
        """
        if protocol == JOIN_PROTOCOL:
            return
        entered = False
        try:
            await stream.send(encode(Hello(self.certificate)), b"", HELLO_SECONDS)
            if self._may_serve(stream.peer_id):
                self._streams[stream] = self._shown[stream.peer_id], Act.SERVE
                stream.expect_first(_LIMITS, lambda frame: self._see(stream, frame))
            else:
                self._see(stream, await _receive_hello(stream, HELLO_SECONDS))
            entered = True
        finally:
            if not entered:
                stream.reset()

    def _may_serve(self, peer_id: PeerId) -> bool:
        try:
            self.admit(peer_id, b"", Act.SERVE)
        except NotAMember:
            return False
        return True

    def _see(self, stream: Stream, frame: Frame) -> None:
        """Raise NotLetIn or MalformedMessage unless the frame shows that the peer may serve."""
        certificate = _hello_in(frame).certificate
        try:
            if not certificate:
                raise NotAMember(f"{stream.peer_id} showed no certificate")
            self.admit(stream.peer_id, certificate, Act.SERVE)
            self._streams[stream] = certificate, Act.SERVE
        except NotAMember as error:
            raise NotLetIn(f"{stream.peer_id} answered, but may not serve here: {error}") from None


def reset_removed(gate: MemberGate, streams: Iterable[Stream]) -> None:
    """End the streams of those that the gate doesn't let in any more."""
    for stream in list(streams):
        if not gate.holds(stream):
            logger.warning("removed peer=%s", stream.peer_id)
            stream.reset()


async def _receive_hello(stream: Stream, deadline_seconds: float) -> Frame:
    usual, stream.limits = stream.limits, _LIMITS
    try:
        return await stream.receive(deadline_seconds)
    finally:
        stream.limits = usual


def _hello_in(frame: Frame) -> Hello:
    hello = decode(frame.header, Hello)
    if frame.body:
        raise MalformedMessage("a greeting with a body")
    return hello
