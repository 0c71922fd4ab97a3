"""Records: signed announcements of a span, and who may put them where in the DHT.

A record is an envelope (`glasshive.security.envelope`) of kind ``peer-record`` to everyone, whose
body is one msgpack array::

    [2, manifest, model name, start, end, blocks, dtype, quantisation, backend, attention,
     throughput, seconds of a pass, addresses, whitelist version, load, software version, withdrawn]

Rules, checked where a record is stored and again where it is read:

1. The signature is the announcing peer's, and its subkey in the DHT is that peer's id.
2. The DHT key is one that follows from the record (`keys_of`), so nobody can copy a record to
   where it doesn't belong, and one identity can only fill the keys of what it announces.
3. The DHT's expiry is the signed one, at most `MAX_LIFETIME_SECONDS` ahead: an old record can't be
   stored again to outlive a newer one.
4. At most `MAX_RECORD_BYTES`; every field within its range; text is printable ASCII.

A peer that leaves stores a withdrawn record that outlives its last one by a second, since the DHT
keeps whichever expires later.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from typing import Final

from glasshive.dht.addresses import MAX_ADDRESSES, check_announced
from glasshive.dht.errors import BadAddress, RecordRefused
from glasshive.security.envelope import (
    CLOCK_SKEW_SECONDS,
    PUBLIC_SWARM,
    open_envelope,
    seal,
)
from glasshive.security.errors import BadPeerId, MalformedData, SecurityError
from glasshive.security.keys import Identity, PeerId, public_key_of
from glasshive.security.manifest import ModelId
from glasshive.security.plain import decode_plain, encode_plain
from glasshive.security.requests import MAX_RECORD_BYTES

__all__ = [
    "MAX_LIFETIME_SECONDS",
    "MODELS_KEY",
    "ModelId",
    "PeerRecord",
    "RecordGate",
    "block_key",
    "is_text",
    "key_id",
    "keys_of",
    "lookup_key",
]

MAX_LIFETIME_SECONDS: Final = 60.0
MAX_BLOCKS: Final = 1024

_KIND: Final = "peer-record"
_VERSION: Final = 2
_FIELDS: Final = 17
_DTYPES: Final = frozenset({"float32", "bfloat16", "float16"})
_TEXT: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._/@:+,()-]{0,127}")
_MODEL_ID: Final = re.compile(r"[0-9a-f]{64}")

MODELS_KEY: Final = "glasshive/1/models"
"""Under this key every peer announces itself, so that a swarm can be listed."""


def block_key(model: ModelId, block: int) -> str:
    """The DHT key of the peers that serve one block of a model."""
    return f"glasshive/1/block/{model}/{block}"


def lookup_key(model: str) -> str:
    """The DHT key of the peers of a model, by name or by manifest hash."""
    return f"glasshive/1/model/{model}"


def key_id(key: str) -> bytes:
    """The 20 bytes that the DHT makes of a key."""
    return hashlib.sha1(key.encode(), usedforsecurity=False).digest()


@dataclass(frozen=True, slots=True)
class PeerRecord:
    """What one peer says of itself: it serves blocks `[start, end)` of a model, this way.

    `throughput_tokens_per_second` is its estimate for long passes through its whole span, and
    `pass_seconds` how long a pass of one token takes, below which no pass is. `load` is 0 (idle)
    to 1.
    `signed` are the bytes that it was read from, to be shown to others; empty in one that was made
    here. Making one with a field out of range raises RecordRefused.
    """

    model: ModelId
    model_name: str
    start: int
    end: int
    n_blocks: int
    dtype: str
    backend: str
    attention: str
    throughput_tokens_per_second: float
    addresses: tuple[str, ...]
    whitelist_version: int
    load: float
    software_version: str
    peer_id: PeerId
    expires_at_seconds: float
    pass_seconds: float = 0.0
    quantisation: str = "none"
    withdrawn: bool = False
    signed: bytes = field(default=b"", compare=False, repr=False)

    def __post_init__(self) -> None:
        _check(self)

    def sign(self, identity: Identity, *, swarm: str = PUBLIC_SWARM) -> bytes:
        """The record as it is announced; raises RecordRefused if it isn't this identity's own."""
        if identity.peer_id != self.peer_id:
            raise RecordRefused(
                f"the record is of {self.peer_id}, the identity is {identity.peer_id}; "
                "a peer announces itself only"
            )
        return seal(
            identity,
            kind=_KIND,
            swarm=swarm,
            receiver=None,
            request_id=b"",
            expires_at_seconds=self.expires_at_seconds,
            body=encode_plain(
                [
                    _VERSION,
                    bytes.fromhex(self.model),
                    self.model_name,
                    self.start,
                    self.end,
                    self.n_blocks,
                    self.dtype,
                    self.quantisation,
                    self.backend,
                    self.attention,
                    float(self.throughput_tokens_per_second),
                    float(self.pass_seconds),
                    self.addresses,
                    self.whitelist_version,
                    float(self.load),
                    self.software_version,
                    self.withdrawn,
                ]
            ),
        )

    @classmethod
    def verify(cls, data: bytes, now: float | None, *, swarm: str = PUBLIC_SWARM) -> PeerRecord:
        """The record in `data`, well signed and in range; raises RecordRefused.

        It has not expired at `now` and doesn't expire later than a record may, give or take the
        clocks' skew. `now=None` leaves the time to the caller.
        """
        if len(data) > MAX_RECORD_BYTES:
            raise RecordRefused(f"record of {len(data)} bytes, at most {MAX_RECORD_BYTES}")
        try:
            envelope = open_envelope(
                data,
                kind=_KIND,
                swarm=swarm,
                clock=None if now is None else lambda: now,
                max_bytes=MAX_RECORD_BYTES,
                max_lifetime_seconds=MAX_LIFETIME_SECONDS,
            )
            fields = decode_plain(
                envelope.body,
                max_bytes=MAX_RECORD_BYTES,
                max_depth=2,
                max_elements=_FIELDS + MAX_ADDRESSES,
            )
        except (SecurityError, MalformedData) as error:
            raise RecordRefused(f"record refused: {error}") from None
        return _from_fields(fields, envelope.sender, envelope.expires_at_seconds, data)

    @property
    def announced_at_seconds(self) -> float:
        """It was signed no earlier than then, by its peer's clock."""
        return self.expires_at_seconds - MAX_LIFETIME_SECONDS

    def renewed(self, expires_at_seconds: float) -> PeerRecord:
        """The same with another expiry, in whole milliseconds as it is signed."""
        return replace(
            self,
            expires_at_seconds=round(expires_at_seconds * 1000) / 1000,
            signed=b"",
        )


def keys_of(record: PeerRecord) -> tuple[str, ...]:
    """Every DHT key that the record belongs under, the blocks of its span last."""
    return (
        MODELS_KEY,
        lookup_key(record.model_name),
        lookup_key(record.model),
        *(block_key(record.model, block) for block in range(record.start, record.end)),
    )


class RecordGate:
    """Decides whether a record may be where it is; remembers the signatures it has checked."""

    def __init__(self, swarm: str, *, max_remembered: int = 4096) -> None:
        self.swarm = swarm
        self._max_remembered = max_remembered
        self._remembered: OrderedDict[bytes, tuple[PeerRecord, frozenset[bytes]]] = OrderedDict()

    def admit(
        self, key: bytes, subkey: str, value: bytes, expires_at_seconds: float, now: float
    ) -> PeerRecord:
        """The record, if it may be stored under `key` (a `key_id`); raises RecordRefused.

        One that has expired passes: the DHT drops it by itself, and a skewed clock elsewhere must
        not make a whole answer invalid. A reader looks at `expires_at_seconds`.
        """
        record, keys = self._verify(value)
        if record.peer_id != subkey:
            raise RecordRefused(f"a record of {record.peer_id} under the subkey of another")
        if key not in keys:
            raise RecordRefused(f"a record of {record.peer_id} under a key that is not its own")
        if expires_at_seconds != record.expires_at_seconds:
            raise RecordRefused(
                f"a record of {record.peer_id} with another expiry than the signed one"
            )
        if record.expires_at_seconds > now + MAX_LIFETIME_SECONDS + CLOCK_SKEW_SECONDS:
            raise RecordRefused(
                f"a record of {record.peer_id} that expires in "
                f"{record.expires_at_seconds - now:.0f} s, at most {MAX_LIFETIME_SECONDS:.0f} s"
            )
        return record

    def _verify(self, value: bytes) -> tuple[PeerRecord, frozenset[bytes]]:
        if len(value) > MAX_RECORD_BYTES:
            raise RecordRefused(f"record of {len(value)} bytes, at most {MAX_RECORD_BYTES}")
        digest = hashlib.sha256(value).digest()
        known = self._remembered.get(digest)
        if known is not None:
            self._remembered.move_to_end(digest)
            return known
        record = PeerRecord.verify(value, None, swarm=self.swarm)
        checked = record, frozenset(map(key_id, keys_of(record)))
        self._remembered[digest] = checked
        if len(self._remembered) > self._max_remembered:
            self._remembered.popitem(last=False)
        return checked


def _from_fields(
    fields: object, sender: PeerId, expires_at_seconds: float, data: bytes
) -> PeerRecord:
    if not isinstance(fields, list) or not fields:
        raise RecordRefused(f"record refused: wanted an array of {_FIELDS} fields")
    if type(fields[0]) is not int or fields[0] != _VERSION:
        raise RecordRefused(
            f"record refused: not of version {_VERSION}; one side needs another release"
        )
    if len(fields) != _FIELDS:
        raise RecordRefused(f"record refused: wanted an array of {_FIELDS} fields")
    manifest, name, start, end, n_blocks, dtype, quantisation = fields[1:8]
    backend, attention, throughput, pass_seconds, addresses, whitelist = fields[8:14]
    load, software, withdrawn = fields[14:]
    if type(manifest) is not bytes or type(addresses) is not list:
        raise RecordRefused("record refused: wanted bytes for the manifest, an array of addresses")
    return PeerRecord(
        model=ModelId(manifest.hex()),
        model_name=name,
        start=start,
        end=end,
        n_blocks=n_blocks,
        dtype=dtype,
        quantisation=quantisation,
        backend=backend,
        attention=attention,
        throughput_tokens_per_second=throughput,
        pass_seconds=pass_seconds,
        addresses=tuple(addresses),
        whitelist_version=whitelist,
        load=load,
        software_version=software,
        peer_id=sender,
        expires_at_seconds=expires_at_seconds,
        withdrawn=withdrawn,
        signed=data,
    )


def is_text(value: object) -> bool:
    """Whether a record can hold it as a name: 1 to 128 letters, digits and ` ._/@:+,()-`."""
    return type(value) is str and _TEXT.fullmatch(value) is not None


def _check(record: PeerRecord) -> None:
    """Raises RecordRefused for any field of the wrong type or out of range."""
    if type(record.model) is not str or not _MODEL_ID.fullmatch(record.model):
        raise RecordRefused("the manifest hash of the record is not 64 hexadecimal digits")
    for name, text in (
        ("model name", record.model_name),
        ("quantisation", record.quantisation),
        ("backend", record.backend),
        ("attention", record.attention),
        ("software version", record.software_version),
    ):
        if not is_text(text):
            raise RecordRefused(
                f"the {name} of the record is not 1 to 128 letters, digits and ._/@:+,()- "
            )
    if type(record.dtype) is not str or record.dtype not in _DTYPES:
        raise RecordRefused(f"the dtype of the record is none of {', '.join(sorted(_DTYPES))}")
    for count in (record.start, record.end, record.n_blocks, record.whitelist_version):
        if type(count) is not int or not 0 <= count < 1 << 31:
            raise RecordRefused("span, blocks and whitelist version of a record are counts")
    if not record.start < record.end <= record.n_blocks <= MAX_BLOCKS:
        raise RecordRefused(
            f"the span {record.start}..{record.end} of a record is not within "
            f"{record.n_blocks} blocks (at most {MAX_BLOCKS})"
        )
    for number in (
        record.throughput_tokens_per_second,
        record.pass_seconds,
        record.load,
        record.expires_at_seconds,
    ):
        if type(number) not in (int, float) or not math.isfinite(number) or number < 0:
            raise RecordRefused("the figures and the expiry of a record are finite, 0 or more")
    if record.load > 1:
        raise RecordRefused("the load of a record is between 0 and 1")
    if type(record.withdrawn) is not bool:
        raise RecordRefused("a record is withdrawn or not, true or false")
    _check_addresses(record)


def _check_addresses(record: PeerRecord) -> None:
    try:
        public_key_of(record.peer_id)
        if type(record.addresses) is not tuple or len(record.addresses) > MAX_ADDRESSES:
            raise RecordRefused(f"a record has at most {MAX_ADDRESSES} addresses")
        for address in record.addresses:
            if type(address) is not str:
                raise RecordRefused("the addresses of a record are text")
            check_announced(address)
            _, mark, owner = address.rpartition("/p2p/")
            if mark and owner != record.peer_id:
                raise RecordRefused(f"an address in a record of {record.peer_id} is of {owner}")
    except (BadAddress, BadPeerId) as error:
        raise RecordRefused(f"record refused: {error}") from None
