"""The errors of the swarm.

SwarmError
├── TransportError              the network did not do it; trying again or elsewhere may help
│   ├── PeerUnreachable         no address of the peer answered
│   ├── StreamClosed            the other side, or a failing link, ended the stream
│   │   └── StreamRefused       the other side ended it at once and said why
│   │       ├── StreamBusy      it has too much to do now
│   │       └── ShutOut         a private swarm doesn't let this key in
│   ├── NotLetIn                the other side is no member that may serve a private swarm
│   ├── DeadlineExceeded        the wait ran out
│   ├── TransportLost           our own daemon is lost; close or rebuild the transport
│   └── TransportClosed         the transport was closed here
├── MalformedMessage            bytes from outside that break the format
│   ├── BadFrame
│   │   └── FrameTooLarge
│   └── BadDhtValue             a DHT value that the bounded decoder refuses
├── RecordRefused               a record that is forged, stale, too large or misplaced
├── BadAddress                  not a multiaddr that this release can use
│   └── ListenRefused           an address this release doesn't listen on
├── DaemonFailed                our own daemon can't be started on this machine
├── NoDht                       a DHT call on a transport without a DHT node
└── DirectoryError
    ├── DirectoryUnavailable    none of the peers asked gave a directory
    ├── UnknownModel            nobody serves it
    └── AmbiguousModel          one name, several manifests
"""

from __future__ import annotations

from glasshive.graph.errors import GlasshiveError

__all__ = [
    "AmbiguousModel",
    "BadAddress",
    "BadDhtValue",
    "BadFrame",
    "DaemonFailed",
    "DeadlineExceeded",
    "DirectoryError",
    "DirectoryUnavailable",
    "FrameTooLarge",
    "ListenRefused",
    "MalformedMessage",
    "NoDht",
    "NotLetIn",
    "PeerUnreachable",
    "RecordRefused",
    "ShutOut",
    "StreamBusy",
    "StreamClosed",
    "StreamRefused",
    "SwarmError",
    "TransportClosed",
    "TransportError",
    "TransportLost",
    "UnknownModel",
]


class SwarmError(GlasshiveError):
    """The root: everything that glasshive.dht raises on purpose."""


class TransportError(SwarmError):
    """The network did not do what was asked; another try or another peer may."""


class PeerUnreachable(TransportError):
    """No address of the peer answered, or it doesn't speak the protocol."""


class StreamClosed(TransportError):
    """The stream has ended; nothing more will arrive or leave on it."""


class StreamRefused(StreamClosed):
    """The other side refused the stream and said why in one short line."""


class StreamBusy(StreamRefused):
    """The other side has too much to do now; it, or another peer, may have time later."""


class ShutOut(StreamRefused):
    """The other side doesn't let this peer's key into its private swarm, or not any more."""


class NotLetIn(TransportError):
    """A peer of a private swarm answered without a certificate that permits it to serve."""


class DeadlineExceeded(TransportError):
    """The wait was longer than its deadline."""


class TransportLost(TransportError):
    """The daemon under this transport is lost; every stream is gone."""


class TransportClosed(TransportError):
    """The transport was closed by its owner."""


class MalformedMessage(SwarmError):
    """Bytes from outside that break the format."""


class BadFrame(MalformedMessage):
    """A frame whose lengths or header can't be accepted."""


class FrameTooLarge(BadFrame):
    """A frame longer than the limit of this stream."""


class BadDhtValue(MalformedMessage):
    """A serialized DHT value beyond the bounds of the decoder."""


class RecordRefused(SwarmError):
    """A record that is forged, stale, too large, misplaced or out of range."""


class BadAddress(SwarmError):
    """Text that is not a usable multiaddr."""


class ListenRefused(BadAddress):
    """An address that this release doesn't listen on."""


class DaemonFailed(SwarmError):
    """The daemon of a transport can't be started on this machine; no waiting for others helps."""


class NoDht(SwarmError):
    """A DHT call on a transport that has no DHT node."""


class DirectoryError(SwarmError):
    """A model could not be looked up."""


class DirectoryUnavailable(DirectoryError):
    """None of the peers asked gave a directory."""


class UnknownModel(DirectoryError):
    """Peers answered; none of them knows a peer that serves the model."""


class AmbiguousModel(DirectoryError):
    """Several manifests are announced under one name."""
