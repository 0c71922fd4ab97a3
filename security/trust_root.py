"""Who may sign: root and whitelist documents, after The Update Framework, through `tuf.api`.

Rules:

1. A root names the keys and the threshold of each of two roles: *root*, who may sign the next root,
   and *whitelist* (TUF's `targets`). TUF's `snapshot` and `timestamp` have no keys here.
2. The next root is signed by the threshold of the old root **and** by its own, and its version
   is one more. Of a chain only the last must not be expired.
3. A whitelist is two files: a document, which the whitelist role signs, and the body, which the
   document pins by length and SHA-256 (whitelist.py). Both say the same version and expiry.
4. A signature counts once for each key, and a key has one name: the hash of its bytes.
5. Every document has one rendering. Bytes that are not it, with a field that this release doesn't
   know, a doubled one, or other white space, are refused, so what is parsed is what was signed.
6. Documents are named by (role, version), never by their hash: signatures can be added to them.
   Where two of one version must be told apart, what counts is the hash of what is signed.

Nothing here knows files or the time of day; times come as arguments, in Unix seconds.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final, Literal, NewType

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from securesystemslib.signer import Signature, SSlibKey
from tuf.api.exceptions import LengthOrHashMismatchError
from tuf.api.metadata import (
    Metadata,
    Role,
    Root,
    TargetFile,
    Targets,
    VerificationResult,
)
from tuf.api.serialization import DeserializationError, SerializationError

from glasshive.security.errors import (
    BadTrustDocument,
    NotCurrent,
    UnderThreshold,
    WrongBody,
    WrongVersion,
)
from glasshive.security.signing_keys import SigningKey
from glasshive.security.whitelist import (
    FUTURE_SECONDS,
    MAX_BODY_BYTES,
    MAX_TIME_SECONDS,
    MAX_VERSION,
    Whitelist,
    decode_whitelist,
    encode_whitelist,
)

__all__ = [
    "KeyId",
    "RoleSignatures",
    "RootTerms",
    "TrustedRoot",
    "VerifiedWhitelist",
    "add_root_signature",
    "add_whitelist_signature",
    "first_root",
    "key_id_of",
    "merge_root_signatures",
    "merge_whitelist_signatures",
    "new_root",
    "new_whitelist_document",
    "next_root",
    "open_whitelist",
    "root_digest",
    "root_signatures",
    "root_terms",
    "verify_root_chain",
    "verify_whitelist",
    "whitelist_signatures",
]

KeyId = NewType("KeyId", str)
"""The SHA-256 of a public key in TUF's canonical form, 64 hexadecimal digits in lower case."""

MAX_DOCUMENT_BYTES: Final = 16 * 1024
MAX_KEYS: Final = 24
MAX_SIGNATURES: Final = 32

_ROOT: Final = "root"
_WHITELIST: Final = "targets"
_UNUSED: Final = ("snapshot", "timestamp")
_BODY_NAME: Final = "whitelist.msgpack"
_SPEC: Final = "1.0.31"
_HEX_64: Final = re.compile(r"[0-9a-f]{64}")
_HEX_128: Final = re.compile(r"[0-9a-f]{128}")


@dataclass(frozen=True, slots=True)
class RootTerms:
    """What a root's document says, whoever signed it: for people to read before they sign."""

    version: int
    expires_seconds: int
    root_keys: tuple[KeyId, ...]
    root_threshold: int
    whitelist_keys: tuple[KeyId, ...]
    whitelist_threshold: int


@dataclass(frozen=True, slots=True)
class TrustedRoot:
    """A root whose signatures were verified, and the bytes of its document."""

    version: int
    expires_seconds: int
    root_keys: tuple[KeyId, ...]
    root_threshold: int
    whitelist_keys: tuple[KeyId, ...]
    whitelist_threshold: int
    document: bytes = field(repr=False)
    _signed: Root = field(repr=False, compare=False)

    def public_key(self, key_id: KeyId) -> bytes:
        """The 32 bytes of a key that this root names. Raises BadTrustDocument."""
        key = self._signed.keys.get(key_id)
        if key is None:
            raise BadTrustDocument(f"root {self.version} names no key {key_id[:16]}...")
        return bytes.fromhex(key.keyval["public"])


@dataclass(frozen=True, slots=True)
class VerifiedWhitelist:
    """A whitelist whose signatures were verified, who signed it, and the bytes of both files."""

    whitelist: Whitelist
    signers: tuple[KeyId, ...]
    document: bytes = field(repr=False)
    body: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class RoleSignatures:
    """Whose signatures a document has, and whose it may still get, for one of its thresholds."""

    role: Literal["this root", "the root before", "whitelist"]
    threshold: int
    signed: tuple[KeyId, ...]
    missing: tuple[KeyId, ...]

    @property
    def complete(self) -> bool:
        """Whether the threshold is met."""
        return len(self.signed) >= self.threshold


# Making and signing -----------------------------------------------------------------------------


def key_id_of(public_key: bytes) -> KeyId:
    """The id of a key of 32 bytes. Raises BadTrustDocument."""
    return KeyId(_key(public_key).keyid)


def new_root(
    *,
    version: int,
    expires_seconds: int,
    root_keys: Sequence[bytes],
    root_threshold: int,
    whitelist_keys: Sequence[bytes],
    whitelist_threshold: int,
) -> bytes:
    """The document of a root with these public keys, not signed yet. Raises BadTrustDocument."""
    keys = {key.keyid: key for key in map(_key, (*root_keys, *whitelist_keys))}
    try:
        roles = {
            _ROOT: Role([key_id_of(one) for one in root_keys], root_threshold),
            _WHITELIST: Role([key_id_of(one) for one in whitelist_keys], whitelist_threshold),
            **{name: Role([], 1) for name in _UNUSED},
        }
        root = Root(version, _SPEC, _moment(expires_seconds), dict(keys), roles, True)
    except ValueError as error:
        raise BadTrustDocument(f"no root can be made of this: {error}") from None
    _check_root(root)
    return _rendered(Metadata(root))


def new_whitelist_document(whitelist: Whitelist) -> tuple[bytes, bytes]:
    """(document, body) of a whitelist, not signed yet. Raises BadWhitelist."""
    body = encode_whitelist(whitelist)
    target = TargetFile.from_data(_BODY_NAME, body, ["sha256"])
    signed = Targets(
        whitelist.version, _SPEC, _moment(whitelist.expires_seconds), {_BODY_NAME: target}
    )
    return _rendered(Metadata(signed)), body


def add_root_signature(document: bytes, key: SigningKey, before: TrustedRoot | None) -> bytes:
    """The root document with one more signature; `before` is the root that it follows.

    Raises BadTrustDocument, also for a key whose signature would not count, and WrongVersion.
    """
    metadata = _parse_root(document)
    counting = {*metadata.signed.roles[_ROOT].keyids}
    if before is not None:
        _check_next(before, metadata.signed)
        counting |= set(before.root_keys)
    return _with_signature(metadata, key, counting)


def add_whitelist_signature(
    document: bytes, body: bytes, key: SigningKey, root: TrustedRoot
) -> bytes:
    """The whitelist's document with one more signature.

    Nobody signs what can't be read: the body must be the one that the document pins. Raises
    BadTrustDocument, also for a key whose signature would not count, WrongBody and BadWhitelist.
    """
    metadata = _parse_whitelist(document)
    _body_of(metadata.signed, body)
    return _with_signature(metadata, key, set(root.whitelist_keys))


def merge_root_signatures(document: bytes, other: bytes, before: TrustedRoot | None) -> bytes:
    """The root document with the good signatures that `other`, a copy of it, has besides.

    Raises what `root_signatures` raises, and BadTrustDocument for a copy of something else.
    """
    signed = {one for state in root_signatures(other, before) for one in state.signed}
    return _merged(_parse_root(document), _parse_root(other), signed)


def merge_whitelist_signatures(document: bytes, other: bytes, root: TrustedRoot) -> bytes:
    """The same for a whitelist's document. Raises BadTrustDocument."""
    signed = set(whitelist_signatures(other, root).signed)
    return _merged(_parse_whitelist(document), _parse_whitelist(other), signed)


def root_signatures(document: bytes, before: TrustedRoot | None) -> tuple[RoleSignatures, ...]:
    """What a root document's thresholds have and lack. Raises BadTrustDocument, WrongVersion."""
    metadata = _parse_root(document)
    payload = metadata.signed_bytes
    own = metadata.signed.get_verification_result(_ROOT, payload, metadata.signatures)
    if before is None:
        return (_state("this root", own),)
    _check_next(before, metadata.signed)
    old = before._signed.get_verification_result(_ROOT, payload, metadata.signatures)
    return (_state("the root before", old), _state("this root", own))


def whitelist_signatures(document: bytes, root: TrustedRoot) -> RoleSignatures:
    """What a whitelist's threshold has and lacks. Raises BadTrustDocument."""
    metadata = _parse_whitelist(document)
    result = root._signed.get_verification_result(
        _WHITELIST, metadata.signed_bytes, metadata.signatures
    )
    return _state("whitelist", result)


# Verifying --------------------------------------------------------------------------------------


def root_terms(document: bytes) -> RootTerms:
    """What the document says, with no signature looked at. Raises BadTrustDocument."""
    return _terms(_parse_root(document).signed)


def root_digest(document: bytes) -> str:
    """The SHA-256 of what a root says, whoever signed it or not. Raises BadTrustDocument."""
    return hashlib.sha256(_parse_root(document).signed_bytes).hexdigest()


def first_root(document: bytes) -> TrustedRoot:
    """The root that trust begins with: from the release, or from a file that a person trusts.

    It is signed by its own threshold. Raises BadTrustDocument or UnderThreshold.
    """
    return _trusted(document, None)


def next_root(trusted: TrustedRoot, document: bytes) -> TrustedRoot:
    """The root after `trusted`, whatever its expiry.

    Raises BadTrustDocument, WrongVersion (not one more) or UnderThreshold (old or new keys).
    """
    return _trusted(document, trusted)


def verify_root_chain(
    trusted: TrustedRoot, documents: Sequence[bytes], now_seconds: float
) -> TrustedRoot:
    """The last of the roots that follow `trusted`, one after the other; `trusted` if none does.

    Raises what `next_root` raises, and NotCurrent if the last is expired.
    """
    for document in documents:
        trusted = next_root(trusted, document)
    _check_root_time(trusted, now_seconds)
    return trusted


def open_whitelist(root: TrustedRoot, document: bytes, body: bytes) -> VerifiedWhitelist:
    """The whitelist that the keys of `root` signed, whatever its age and version.

    Raises BadTrustDocument, UnderThreshold, WrongBody or BadWhitelist.
    """
    metadata = _parse_whitelist(document)
    result = root._signed.get_verification_result(
        _WHITELIST, metadata.signed_bytes, metadata.signatures
    )
    if not result.verified:
        raise UnderThreshold(
            f"whitelist {metadata.signed.version} is signed by {len(result.signed)} of the keys of "
            f"root {root.version}, wanted {result.threshold}; ask its signers for the rest"
        )
    whitelist = _body_of(metadata.signed, body)
    return VerifiedWhitelist(whitelist, tuple(map(KeyId, sorted(result.signed))), document, body)


def verify_whitelist(
    root: TrustedRoot,
    document: bytes,
    body: bytes,
    *,
    swarm: str,
    least_version: int,
    now_seconds: float,
) -> VerifiedWhitelist:
    """The whitelist of this swarm that may be taken now, of `least_version` or above.

    Raises what `open_whitelist` raises, BadTrustDocument for another swarm, WrongVersion, and
    NotCurrent if whitelist or root is expired or the whitelist issued in the future.
    """
    _check_root_time(root, now_seconds)
    verified = open_whitelist(root, document, body)
    whitelist = verified.whitelist
    if whitelist.swarm != swarm:
        raise BadTrustDocument(f"got the whitelist of swarm {whitelist.swarm!r}, this is {swarm!r}")
    if whitelist.version < least_version:
        raise WrongVersion(
            f"got whitelist {whitelist.version}, and {least_version} is known here; an older one "
            "is never taken back, sign a new one"
        )
    if now_seconds >= whitelist.expires_seconds:
        raise NotCurrent(
            f"whitelist {whitelist.version} expired at {_in_words(whitelist.expires_seconds)}; "
            "ask its signers for a new one, and check this machine's clock"
        )
    if now_seconds < whitelist.issued_seconds - FUTURE_SECONDS:
        raise NotCurrent(
            f"whitelist {whitelist.version} was issued at {_in_words(whitelist.issued_seconds)}, "
            "in the future by this machine's clock; set the clock"
        )
    return verified


def _trusted(document: bytes, before: TrustedRoot | None) -> TrustedRoot:
    metadata = _parse_root(document)
    root = metadata.signed
    if before is not None:
        _check_next(before, root)
    result = root.get_root_verification_result(
        None if before is None else before._signed, metadata.signed_bytes, metadata.signatures
    )
    old = "its own" if before is None else "the root before it"
    for part, whose in ((result.first, old), (result.second, "its own")):
        if not part.verified:
            raise UnderThreshold(
                f"root {root.version} is signed by {len(part.signed)} of the keys of {whose}, "
                f"wanted {part.threshold}; ask their holders for the rest"
            )
    terms = _terms(root)
    return TrustedRoot(
        version=terms.version,
        expires_seconds=terms.expires_seconds,
        root_keys=terms.root_keys,
        root_threshold=terms.root_threshold,
        whitelist_keys=terms.whitelist_keys,
        whitelist_threshold=terms.whitelist_threshold,
        document=document,
        _signed=root,
    )


def _terms(root: Root) -> RootTerms:
    own, whitelist = root.roles[_ROOT], root.roles[_WHITELIST]
    return RootTerms(
        version=root.version,
        expires_seconds=_expiry(root),
        root_keys=tuple(map(KeyId, own.keyids)),
        root_threshold=own.threshold,
        whitelist_keys=tuple(map(KeyId, whitelist.keyids)),
        whitelist_threshold=whitelist.threshold,
    )


def _check_next(before: TrustedRoot, root: Root) -> None:
    if root.version != before.version + 1:
        raise WrongVersion(
            f"got root {root.version} after root {before.version}; roots are taken one by one, so "
            f"root {before.version + 1} is wanted"
        )


def _check_root_time(root: TrustedRoot, now_seconds: float) -> None:
    if now_seconds >= root.expires_seconds:
        raise NotCurrent(
            f"root {root.version} expired at {_in_words(root.expires_seconds)}; ask its signers "
            "for the next one, and check this machine's clock"
        )


def _body_of(signed: Targets, body: bytes) -> Whitelist:
    """The whitelist in `body`, if it is what the document pins. Raises WrongBody, BadWhitelist."""
    try:
        signed.targets[_BODY_NAME].verify_length_and_hashes(body)
    except LengthOrHashMismatchError:
        raise WrongBody(
            f"got a body of {len(body)} bytes that is not the one signed in whitelist document "
            f"{signed.version}; get document and body from the same place"
        ) from None
    whitelist = decode_whitelist(body)
    if (whitelist.version, whitelist.expires_seconds) != (signed.version, _expiry(signed)):
        raise WrongBody(
            f"version and expiry of whitelist {whitelist.version} are not those of its document "
            f"(version {signed.version}); sign it anew"
        )
    return whitelist


# Documents --------------------------------------------------------------------------------------


def _parse_root(document: bytes) -> Metadata[Root]:
    metadata = _parse(document)
    if not isinstance(metadata.signed, Root):
        raise BadTrustDocument("got a signed document that is no root")
    _check_root(metadata.signed)
    return metadata


def _parse_whitelist(document: bytes) -> Metadata[Targets]:
    metadata = _parse(document)
    signed = metadata.signed
    if not isinstance(signed, Targets):
        raise BadTrustDocument("got a signed document that is no whitelist's")
    if signed.delegations is not None or list(signed.targets) != [_BODY_NAME]:
        raise BadTrustDocument(f"a whitelist's document pins {_BODY_NAME} and nothing else")
    target = signed.targets[_BODY_NAME]
    _none_unknown("the body's entry", target.unrecognized_fields)
    if type(target.length) is not int or not 0 < target.length <= MAX_BODY_BYTES:
        raise BadTrustDocument(f"the body's length is not a number from 1 to {MAX_BODY_BYTES}")
    if list(target.hashes) != ["sha256"] or not _HEX_64.fullmatch(target.hashes["sha256"]):
        raise BadTrustDocument("the body is not pinned by one SHA-256 in lower case")
    return metadata


def _parse(document: bytes) -> Metadata[Any]:
    """A document of tuf's, in its only rendering, with no field that is unknown."""
    if type(document) is not bytes or len(document) > MAX_DOCUMENT_BYTES:
        raise BadTrustDocument(f"a document is bytes, at most {MAX_DOCUMENT_BYTES}")
    try:
        metadata: Metadata[Any] = Metadata.from_bytes(document)
        rendered = _rendered(metadata)
    except (DeserializationError, SerializationError):  # whose text quotes what a stranger wrote
        raise BadTrustDocument(
            "no root or whitelist document; get it anew from its source"
        ) from None
    if rendered != document:
        raise BadTrustDocument("a document's bytes are not its only rendering; sign it anew")
    signed = metadata.signed
    _none_unknown("the document", metadata.unrecognized_fields)
    _none_unknown("the signed part", signed.unrecognized_fields)
    if signed.spec_version != _SPEC:
        raise BadTrustDocument(f"spec_version is not {_SPEC}; update glasshive")
    if type(signed.version) is not int or not 1 <= signed.version <= MAX_VERSION:
        raise BadTrustDocument(f"version is not a whole number from 1 to {MAX_VERSION}")
    if len(metadata.signatures) > MAX_SIGNATURES:
        raise BadTrustDocument(f"more than {MAX_SIGNATURES} signatures")
    for signature in metadata.signatures.values():
        _none_unknown("a signature", signature.unrecognized_fields)
        for text, form in ((signature.keyid, _HEX_64), (signature.signature, _HEX_128)):
            if not isinstance(text, str) or not form.fullmatch(text):
                raise BadTrustDocument("a signature is not in hexadecimal digits in lower case")
    return metadata


def _check_root(root: Root) -> None:
    if type(root.version) is not int or not 1 <= root.version <= MAX_VERSION:
        raise BadTrustDocument(f"version is not a whole number from 1 to {MAX_VERSION}")
    if root.consistent_snapshot is not True:
        raise BadTrustDocument("consistent_snapshot is not true")
    used: set[str] = set()
    for name, role in root.roles.items():
        title = "whitelist" if name == _WHITELIST else name
        _none_unknown(f"the role {title}", role.unrecognized_fields)
        if type(role.threshold) is not int or not isinstance(role.keyids, list):
            raise BadTrustDocument(f"the role {title} is not a list of keys and a threshold")
        if name in _UNUSED:
            if role.keyids or role.threshold != 1:
                raise BadTrustDocument(f"the role {title} has keys, but it is not used")
        elif not 1 <= role.threshold <= len(role.keyids):
            raise BadTrustDocument(
                f"the role {title} wants {role.threshold!s:.20} signatures of "
                f"{len(role.keyids)} keys"
            )
        used.update(role.keyids)
    if used != root.keys.keys() or len(used) > MAX_KEYS:
        raise BadTrustDocument(f"keys and roles don't belong together, or more than {MAX_KEYS}")
    for keyid, key in root.keys.items():
        _none_unknown("a key", key.unrecognized_fields)
        public = key.keyval.get("public")
        if (
            (key.keytype, key.scheme) != ("ed25519", "ed25519")
            or len(key.keyval) != 1
            or not isinstance(public, str)
            or not _HEX_64.fullmatch(public)
            or key_id_of(bytes.fromhex(public)) != keyid
        ):
            raise BadTrustDocument(
                f"the key {keyid[:16]!r} is no Ed25519 key under the hash of its bytes"
            )


def _none_unknown(what: str, unrecognized: Mapping[str, object]) -> None:
    for name in unrecognized:
        raise BadTrustDocument(
            f"{what} has the field {name[:64]!r}, which this release doesn't know; update glasshive"
        )


def _key(public_key: bytes) -> SSlibKey:
    try:
        return SSlibKey.from_crypto(Ed25519PublicKey.from_public_bytes(public_key))
    except (ValueError, TypeError):
        raise BadTrustDocument("got no public key of 32 bytes") from None


def _with_signature(metadata: Metadata[Any], key: SigningKey, counting: set[str]) -> bytes:
    keyid = key_id_of(key.public_key)
    if keyid not in counting:
        raise BadTrustDocument(
            f"the key {keyid[:16]}... is none of those whose signature counts here: "
            f"{', '.join(sorted(one[:16] for one in counting))}"
        )
    metadata.signatures[keyid] = Signature(keyid, key.sign(metadata.signed_bytes).hex())
    return _rendered(metadata)


def _merged(metadata: Metadata[Any], other: Metadata[Any], signed: set[KeyId]) -> bytes:
    if metadata.signed_bytes != other.signed_bytes:
        raise BadTrustDocument(
            f"got a copy of version {other.signed.version} that says something else than the one "
            "here; find out which is meant, and sign that"
        )
    for keyid in sorted(signed):
        metadata.signatures[keyid] = other.signatures[keyid]
    return _rendered(metadata)


def _state(
    role: Literal["this root", "the root before", "whitelist"], result: VerificationResult
) -> RoleSignatures:
    return RoleSignatures(
        role,
        result.threshold,
        tuple(map(KeyId, sorted(result.signed))),
        tuple(map(KeyId, sorted(result.unsigned))),
    )


def _rendered(metadata: Metadata[Any]) -> bytes:
    return bytes(metadata.to_bytes())


def _moment(seconds: int) -> datetime:
    if type(seconds) is not int or not 0 < seconds <= MAX_TIME_SECONDS:
        raise BadTrustDocument("an expiry is in whole Unix seconds, up to the year 9999")
    return datetime.fromtimestamp(seconds, UTC)


def _expiry(signed: Root | Targets) -> int:
    return int(signed.expires.timestamp())


def _in_words(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
