"""The transport: one interface over hivemind, and over memory for tests.

A transport has an identity. It opens streams to peers and serves streams of a protocol, and it
stores and finds records in the DHT if it has a DHT node. All of its methods belong to one asyncio
loop; from other threads use `glasshive.dht.loop_thread`.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from glasshive.dht.errors import BadAddress
from glasshive.dht.framing import Frame, FrameLimits, Stream
from glasshive.security.errors import BadPeerId
from glasshive.security.keys import PeerId, public_key_of

__all__ = [
    "Frame",
    "FrameLimits",
    "PeerAddress",
    "Stream",
    "StreamHandler",
    "Transport",
    "check_address",
]

StreamHandler = Callable[[Stream], Awaitable[None]]

MAX_ADDRESS_CHARACTERS: Final = 200
MAX_PORT: Final = 65535
_COPY: Final = "copy the line that `glasshive bootstrap` printed"
_ADDRESS: Final = re.compile(
    r"/(?:ip4/[0-9.]{7,15}|ip6/[0-9A-Fa-f:.]{2,45}|dns[46]?/[A-Za-z0-9.-]{1,100})"
    r"/(?:tcp|udp)/([0-9]{1,5})"
    r"(?:/[A-Za-z0-9-]{1,64}){0,8}"
)
_HOST: Final = re.compile(r"(?:[a-z]+://)?([A-Za-z0-9][A-Za-z0-9.-]{0,99})(?::([0-9]{1,5}))?/?")


@dataclass(frozen=True, slots=True)
class PeerAddress:
    """A peer and where it may be found. Without addresses only an open connection will do."""

    peer_id: PeerId
    addresses: tuple[str, ...] = ()

    @classmethod
    def parse(cls, address: str) -> PeerAddress:
        """From one multiaddr that ends in ``/p2p/ID``; raises BadAddress."""
        _check(address, f"/p2p/12D3KooW...; {_COPY}")
        _, mark, peer_id = address.rpartition("/p2p/")
        if not mark:
            raise BadAddress(
                f"got {address!r}, wanted a multiaddr that ends in /p2p/ and a peer id; {_COPY}"
            )
        try:
            public_key_of(peer_id)
        except BadPeerId as error:
            raise BadAddress(f"got {address!r}: {error}") from None
        return cls(PeerId(peer_id), (address,))


def check_address(address: str) -> None:
    """Returns if `address` reads as an IP or DNS multiaddr of fair length; raises BadAddress."""
    _check(address, "")


def _check(address: str, end: str) -> None:
    """`check_address`; `end` is what the address of the text ends in."""
    found = _ADDRESS.fullmatch(address) if len(address) <= MAX_ADDRESS_CHARACTERS else None
    if found is None:
        raise BadAddress(
            f"got {address[:MAX_ADDRESS_CHARACTERS]!r}, wanted a multiaddr such as "
            f"{_meant(address)}{end}"
        )
    if int(found.group(1)) > MAX_PORT:
        raise BadAddress(
            f"got {address!r}, whose port {found.group(1)} is out of range; ports go up to "
            f"{MAX_PORT}"
        )


def _meant(address: str) -> str:
    """The multiaddr of what may be a host's name with a port; one word alone is no name of one."""
    found = _HOST.fullmatch(address)
    if found is None or not (found.group(2) or "." in found.group(1)):
        return "/ip4/192.0.2.7/tcp/31330"
    host, port = found.groups()
    kind = "ip4" if re.fullmatch(r"[0-9.]+", host) else "dns4"
    return f"/{kind}/{host}/tcp/{port or 31330}"


class Transport(Protocol):
    """See the module. Every method but `now` raises TransportLost or TransportClosed at the end."""

    @property
    def peer_id(self) -> PeerId:
        """Who this transport is."""

    @property
    def addresses(self) -> tuple[str, ...]:
        """Multiaddrs, each with ``/p2p/ID``, under which others can reach it; maybe none."""

    @property
    def listening(self) -> tuple[str, ...]:
        """Multiaddrs of this machine at which it listens; others may reach it under other ones."""

    @property
    def swarm(self) -> str:
        """The name of the swarm, bound into every signature."""

    @property
    def members_only(self) -> bool:
        """Whether the swarm is private: who is no member of it has nothing of this peer."""

    async def open_stream(
        self, peer: PeerAddress, protocol: str, deadline_seconds: float
    ) -> Stream:
        """A stream to `peer`, proved to be it; raises PeerUnreachable or DeadlineExceeded."""

    async def serve(self, protocol: str, handler: StreamHandler) -> None:
        """From now on runs `handler` for each stream that peers open for `protocol`.

        Each runs in a task that the transport owns and cancels at its end; streams beyond the
        limit of one remote or of all are refused with a reason. The stream is closed when the
        handler returns, and reset when it raises.
        """

    async def store(
        self, key: str, subkey: PeerId, value: bytes, expires_at_seconds: float
    ) -> bool:
        """Whether the DHT took the record; False if it has a newer one.

        Raises RecordRefused for what no honest peer would take, NoDht, or a TransportError.
        """

    async def store_many(
        self, keys: Sequence[str], subkey: PeerId, value: bytes, expires_at_seconds: float
    ) -> Mapping[str, bool]:
        """`store` of one record under several keys."""

    async def fetch(self, keys: Sequence[str]) -> dict[str, dict[PeerId, bytes]]:
        """For each key the newest record of each peer, all of them valid and not expired.

        Raises NoDht or a TransportError. No record is {}.
        """

    @property
    def lost(self) -> asyncio.Event:
        """Set when the transport is lost; `rebuild` makes a new one. Not set by `close`."""

    async def rebuild(self) -> None:
        """After `lost`: the same identity, the same addresses if they are free, the same handlers.

        Streams are not brought back, and the caller announces its records again. What raises leaves
        the transport lost, to be rebuilt later.
        """

    def now(self) -> float:
        """Swarm time: seconds since 1970, which peers hold to within some seconds."""

    async def close(self) -> None:
        """Ends every stream and task. Never raises; may be called again."""
