"""The errors of glasshive.security.

SecurityError
├── KeyFileError        a key file that is missing its permissions, its format or its place
├── BadPeerId           text that is not the id of an Ed25519 key
├── BadSignature        the signature is not that peer's over those bytes
├── MalformedData       bytes that are not plain msgpack within the bounds
├── BadManifest         a manifest, or a file of one, that is not what its hash says
└── EnvelopeRefused     well signed or not, it can't be accepted here
    ├── BadEnvelope     not an envelope, or not the kind that was asked for
    ├── WrongSwarm      signed for another swarm
    ├── WrongReceiver   signed for another receiver
    ├── EnvelopeExpired too old, or valid for longer than the receiver allows
    └── Replayed        the same request was seen before, or too many are remembered to tell
"""

from __future__ import annotations

from glasshive.graph.errors import GlasshiveError

__all__ = [
    "BadEnvelope",
    "BadManifest",
    "BadPeerId",
    "BadSignature",
    "EnvelopeExpired",
    "EnvelopeRefused",
    "KeyFileError",
    "MalformedData",
    "Replayed",
    "SecurityError",
    "WrongReceiver",
    "WrongSwarm",
]


class SecurityError(GlasshiveError):
    """The root: everything that glasshive.security raises on purpose."""


class KeyFileError(SecurityError):
    """A key file can't be used; the text says what to do."""


class BadPeerId(SecurityError):
    """Text that is not the peer id of an Ed25519 key."""


class BadSignature(SecurityError):
    """The signature was not made by that peer over those bytes."""


class MalformedData(SecurityError):
    """Bytes from outside that are not plain msgpack within the bounds."""


class BadManifest(SecurityError):
    """A manifest, or a file of one, that is not what its hash says."""


class EnvelopeRefused(SecurityError):
    """A signed message that can't be accepted here and now."""


class BadEnvelope(EnvelopeRefused):
    """Not an envelope, or not of the kind that was asked for."""


class WrongSwarm(EnvelopeRefused):
    """Signed for another swarm."""


class WrongReceiver(EnvelopeRefused):
    """Signed for another receiver."""


class EnvelopeExpired(EnvelopeRefused):
    """Past its expiry, or valid for longer than the receiver allows."""


class Replayed(EnvelopeRefused):
    """Seen before, or the memory of what was seen is full for this sender."""
