"""The errors of glasshive.security.

SecurityError
├── KeyFileError        a key file that is missing its permissions, its format or its place
├── BadPeerId           text that is not the id of an Ed25519 key
├── BadSignature        the signature is not that peer's over those bytes
├── MalformedData       bytes that are not plain msgpack within the bounds
├── BadManifest         a manifest, or a file of one, that is not what its hash says
├── NotAllowed          an op, module or model that this host's policy doesn't allow
├── BadWhitelist        a whitelist, or its text, that is not complete and within its bounds
├── BadPolicy           a host's own policy file that is no such file, or allows too much
├── BadTrustStore       the kept root and whitelist can't be read, written or believed
├── TrustRefused        a root or whitelist that can't be accepted here
│   ├── BadTrustDocument  bytes that are no root or whitelist document of this swarm
│   ├── UnderThreshold  too few of the keys that must sign it did
│   ├── NotCurrent      expired, or issued in the future
│   ├── WrongVersion    older than what is known, revoked, or with one left out
│   └── WrongBody       the whitelist is not the one that was signed
├── BadAuditLog         an audit log that was changed, cut, or is not the host's
├── BadInvite           text that is no invite: cut off, mistyped, or not as its issuer signed it
├── InviteRefused       an invite, or a request to join by it, that its issuer does not take
├── BadInviteBook       the file of an issuer's invites and members can't be used
├── MembershipFileError  what is kept of a membership can't be read or written
├── NotAMember          no certificate, or none that holds here and now
│   ├── MembershipRevoked  it held once, and was taken back
│   └── RoleRefused     it holds, and its role doesn't permit what was asked
├── StaleRevocations    a list of revocations below the highest version seen
└── EnvelopeRefused     well signed or not, it can't be accepted here
    ├── BadEnvelope     not an envelope, or not the kind that was asked for
    ├── WrongSwarm      signed for another swarm
    ├── WrongReceiver   signed for another receiver
    ├── WrongSender     shown on a connection by who did not sign it
    ├── EnvelopeExpired too old, or valid for longer than the receiver allows
    └── Replayed        the same request was seen before, or too many are remembered to tell
"""

from __future__ import annotations

from glasshive.graph.errors import GlasshiveError, GraphError

__all__ = [
    "BadAuditLog",
    "BadEnvelope",
    "BadInvite",
    "BadInviteBook",
    "BadManifest",
    "BadPeerId",
    "BadPolicy",
    "BadSignature",
    "BadTrustDocument",
    "BadTrustStore",
    "BadWhitelist",
    "EnvelopeExpired",
    "EnvelopeRefused",
    "InviteRefused",
    "KeyFileError",
    "MalformedData",
    "MembershipFileError",
    "MembershipRevoked",
    "NotAMember",
    "NotAllowed",
    "NotCurrent",
    "Replayed",
    "RoleRefused",
    "SecurityError",
    "StaleRevocations",
    "TrustRefused",
    "UnderThreshold",
    "WrongBody",
    "WrongReceiver",
    "WrongSender",
    "WrongSwarm",
    "WrongVersion",
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


class NotAllowed(SecurityError, GraphError):
    """An op, module or model that this host's policy does not allow; `node` is the one to blame."""


class BadWhitelist(SecurityError):
    """A whitelist, or the text of one, that is not complete and within its bounds."""


class BadPolicy(SecurityError):
    """A host's own policy file that can't be read, or that allows more than the whitelist does."""


class BadTrustStore(SecurityError):
    """The kept root and whitelist can't be read, written or believed."""


class TrustRefused(SecurityError):
    """A root or whitelist that can't be accepted here and now."""


class BadTrustDocument(TrustRefused):
    """Bytes that are no root or whitelist document of this swarm and release."""


class UnderThreshold(TrustRefused):
    """Fewer of the keys that must sign a document did than its root demands."""


class NotCurrent(TrustRefused):
    """Past its expiry by this machine's clock, or issued in its future."""


class WrongVersion(TrustRefused):
    """Older than what is known, revoked, or a root with another left out before it."""


class WrongBody(TrustRefused):
    """A whitelist that is not the one that was signed."""


class BadAuditLog(SecurityError):
    """An audit log, or an export of one, that was changed, cut, or is not the host's."""


class BadInvite(SecurityError):
    """Text that is no invite, or one that its issuer didn't sign as it is."""


class InviteRefused(SecurityError):
    """An invite that is used up, expired, revoked or unknown, or is not proved."""


class BadInviteBook(SecurityError):
    """The file of an issuer's invites and members can't be read, written or grown."""


class MembershipFileError(SecurityError):
    """What this machine keeps of its membership can't be read or written."""


class NotAMember(SecurityError):
    """A peer without a certificate of this swarm that holds here and now."""


class MembershipRevoked(NotAMember):
    """A certificate, its member, its issuer or its invite was taken back."""


class RoleRefused(NotAMember):
    """A member whose role doesn't permit what it asks."""


class StaleRevocations(SecurityError):
    """A list of revocations that would undo what a newer one says."""


class EnvelopeRefused(SecurityError):
    """A signed message that can't be accepted here and now."""


class BadEnvelope(EnvelopeRefused):
    """Not an envelope, or not of the kind that was asked for."""


class WrongSwarm(EnvelopeRefused):
    """Signed for another swarm."""


class WrongReceiver(EnvelopeRefused):
    """Signed for another receiver."""


class WrongSender(EnvelopeRefused):
    """Shown on a connection of another peer than the one that signed it."""


class EnvelopeExpired(EnvelopeRefused):
    """Past its expiry, or valid for longer than the receiver allows."""


class Replayed(EnvelopeRefused):
    """Seen before, or the memory of what was seen is full for this sender."""
