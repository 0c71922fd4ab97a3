"""Plain data in msgpack, decoded within bounds.

Plain data is null, bool, int, float, text, bytes, arrays, and maps from text. `decode_plain` takes
nothing else, and decides that **before** anything is allocated:

1. at most `max_bytes` of input, `max_elements` values in all, `max_depth` containers deep;
2. a container can't claim more elements than there are bytes left;
3. no extension types, no time stamps, nothing after the value;
4. text is UTF-8, the keys of a map are text and differ (msgpack itself keeps the last silently).
"""

from __future__ import annotations

from typing import Final, TypeAlias

import msgpack

from glasshive.graph.msgpack_scan import scan
from glasshive.security.errors import MalformedData

__all__ = ["Plain", "decode_plain", "encode_plain"]

Plain: TypeAlias = bool | int | float | str | bytes | list["Plain"] | dict[str, "Plain"] | None

DEFAULT_MAX_BYTES: Final = 1024 * 1024
DEFAULT_MAX_DEPTH: Final = 16
DEFAULT_MAX_ELEMENTS: Final = 65_536


def encode_plain(value: object) -> bytes:
    """`value` as msgpack; tuples become arrays. Raises MalformedData for what is not plain."""
    try:
        return msgpack.packb(value, use_bin_type=True)  # type: ignore[no-any-return]
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise MalformedData(
            f"can't write this as plain data: {error}; "
            "use null, bool, int, float, text, bytes, arrays and maps from text"
        ) from None


def decode_plain(
    data: bytes | bytearray | memoryview,
    *,
    max_bytes: int = DEFAULT_MAX_BYTES,
    max_depth: int = DEFAULT_MAX_DEPTH,
    max_elements: int = DEFAULT_MAX_ELEMENTS,
) -> Plain:
    """The value that `data` holds; raises MalformedData for anything outside the rules above."""
    if len(data) > max_bytes:
        raise MalformedData(f"got {len(data)} bytes, at most {max_bytes} are decoded")
    try:
        scan(data, max_depth, max_elements)
        value: Plain = msgpack.unpackb(
            data, raw=False, strict_map_key=True, object_pairs_hook=_map_of_text
        )
    except MalformedData:
        raise
    except ValueError as error:  # of the scan, or text that is not UTF-8
        raise MalformedData(f"not plain data: {error}") from None
    return value


def _map_of_text(pairs: list[tuple[object, Plain]]) -> dict[str, Plain]:
    result: dict[str, Plain] = {}
    for key, value in pairs:
        if type(key) is not str:
            raise MalformedData(f"map key of type {type(key).__name__}, keys are text")
        if key in result:
            raise MalformedData(f"map key {key[:64]!r} twice")
        result[key] = value
    return result
