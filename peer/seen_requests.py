"""Which signed requests a host has taken: none is taken twice, also after a restart.

A request is remembered until it has expired, by its sender, id and revision (a peer that was lost
and is back is shown a trace that it knows under a higher one): in memory, and in a file if the host
has one. The file grows by one record for each request, and is written anew without the expired
ones when it would have more than twice as many as are remembered, and more than 8,192.

What the file doesn't hold after a loss of power, when it is damaged or can't be written, could be
shown again by who signed it, on a connection with that key, for `REQUEST_SECONDS` and the grace for
clocks: a second run of a trace that the same client may ask for anew at any time. So nothing waits
for the disk, and such a file is a warning: a host that did not start would be the greater harm.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Final, final

from glasshive.security.durable_file import append_private, read_durable, write_private
from glasshive.security.envelope import CLOCK_SKEW_SECONDS, Envelope, ReplayCache
from glasshive.security.errors import Replayed
from glasshive.security.keys import PeerId, peer_id_of, public_key_of
from glasshive.security.requests import TRACE_ID_BYTES

log = logging.getLogger(__name__)

MAX_REQUESTS: Final = 131_072
MAX_REQUESTS_PER_CLIENT: Final = 32_768
LEAST_RECORDS: Final = 4_096

_KIND: Final = "trace"
# The client's key, the trace's id, the revision, expiry in ms.
_FIELDS: Final = struct.Struct(">32s16sB7s")
_CHECK: Final = struct.Struct(">I")
_RECORD_BYTES: Final = _FIELDS.size + _CHECK.size
_LAYOUT: Final = zlib.crc32(b"glasshive seen requests 1")
_MAX_FILE_BYTES: Final = 2 * MAX_REQUESTS * _RECORD_BYTES


@final
class SeenRequests:
    """The memory of one host, kept in the file `place` if one is given.

    It holds at most `MAX_REQUESTS`, of one client `MAX_REQUESTS_PER_CLIENT`; what is more is
    refused, as it could not be told to be new.
    """

    def __init__(self, place: Path | None = None, *, now: float = 0.0) -> None:
        self._place = place
        self._cache = ReplayCache(
            max_senders=MAX_REQUESTS,
            max_requests_per_sender=MAX_REQUESTS_PER_CLIENT,
            max_requests=MAX_REQUESTS,
        )
        self._records = 0  # in the file
        self._is_kept = True
        if place is not None:
            self._load(place, now)

    def admit(self, envelope: Envelope, now: float, revision: int = 0) -> None:
        """Remember a verified request; raises Replayed if it can't be told to be new."""
        if revision:
            envelope = replace(envelope, request_id=envelope.request_id + bytes([revision]))
        self._cache.admit(envelope, now)
        if self._place is not None:
            self._keep(self._place, envelope)

    def _keep(self, place: Path, envelope: Envelope) -> None:
        key = public_key_of(envelope.sender)
        record = _record(key, envelope.request_id, envelope.expires_at_seconds)
        try:
            append_private(place, record)
            self._records += 1
            if not self._is_kept or self._records > 2 * max(len(self._cache), LEAST_RECORDS):
                self._write(place)
            self._is_kept = True
        except OSError as error:
            if self._is_kept:  # said once, and again after it was well
                log.warning("seen_requests_not_kept", extra={"error": str(error)})
            self._is_kept = False

    def _load(self, place: Path, now: float) -> None:
        try:
            data = read_durable(place, _MAX_FILE_BYTES)
            who = functools.cache(peer_id_of)
            damaged = 0
            for start in range(0, len(data), _RECORD_BYTES):
                envelope = _envelope(data[start : start + _RECORD_BYTES], who)
                if envelope is None:
                    damaged += 1
                elif envelope.expires_at_seconds + CLOCK_SKEW_SECONDS >= now:
                    with contextlib.suppress(Replayed):
                        self._cache.admit(envelope, now)
            if damaged:
                log.warning("seen_requests_damaged", extra={"file": str(place), "lost": damaged})
        except (OSError, ValueError) as error:
            log.warning("seen_requests_unreadable", extra={"error": str(error)})
        try:
            self._write(place)
        except OSError as error:
            log.warning("seen_requests_not_kept", extra={"error": str(error)})
            self._is_kept = False

    def _write(self, place: Path) -> None:
        key = functools.cache(public_key_of)
        found = [_record(key(sender), one, expires) for sender, _, one, expires in self._cache]
        write_private(place, b"".join(found))
        self._records = len(found)


def _record(key: bytes, request_id: bytes, expires_at_seconds: float) -> bytes:
    trace_id, revision = request_id[:TRACE_ID_BYTES], request_id[TRACE_ID_BYTES:] or b"\0"
    until = round(expires_at_seconds * 1000).to_bytes(7, "big")
    fields = _FIELDS.pack(key, trace_id, revision[0], until)
    return fields + _CHECK.pack(zlib.crc32(fields, _LAYOUT))


def _envelope(record: bytes, who: Callable[[bytes], PeerId]) -> Envelope | None:
    """As much of the envelope as is remembered; None for a record that is damaged or cut off."""
    fields, check = record[: _FIELDS.size], record[_FIELDS.size :]
    if check != _CHECK.pack(zlib.crc32(fields, _LAYOUT)):
        return None
    key, trace_id, revision, until = _FIELDS.unpack(fields)
    return Envelope(
        kind=_KIND,
        swarm="",
        sender=who(key),
        receiver=None,
        request_id=trace_id + (bytes([revision]) if revision else b""),
        expires_at_milliseconds=int.from_bytes(until, "big"),
        body=b"",
    )
