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

from glasshive.security.errors import MalformedData

__all__ = ["Plain", "decode_plain", "encode_plain"]

Plain: TypeAlias = bool | int | float | str | bytes | list["Plain"] | dict[str, "Plain"] | None

DEFAULT_MAX_BYTES: Final = 1024 * 1024
DEFAULT_MAX_DEPTH: Final = 16
DEFAULT_MAX_ELEMENTS: Final = 65_536

# What follows a first byte: n >= 0 bytes of payload, or one of these.
_REFUSED: Final = -1
_LENGTH_1, _LENGTH_2, _LENGTH_4 = -2, -3, -4  # text and bytes: a length field of that many bytes
_ARRAY, _MAP = -5, -6  # the count is in the first byte
_ARRAY_2, _ARRAY_4, _MAP_2, _MAP_4 = -7, -8, -9, -10


def _first_bytes() -> tuple[int, ...]:
    table = [_REFUSED] * 256
    table[0x00:0x80] = [0] * 128  # positive fixint
    table[0x80:0x90] = [_MAP] * 16
    table[0x90:0xA0] = [_ARRAY] * 16
    table[0xA0:0xC0] = list(range(32))  # fixstr
    table[0xC0] = table[0xC2] = table[0xC3] = 0  # nil, false, true
    table[0xC4:0xC7] = [_LENGTH_1, _LENGTH_2, _LENGTH_4]  # bin
    table[0xCA:0xD4] = [4, 8, 1, 2, 4, 8, 1, 2, 4, 8]  # float32/64, uint, int
    table[0xD9:0xDC] = [_LENGTH_1, _LENGTH_2, _LENGTH_4]  # str
    table[0xDC:0xE0] = [_ARRAY_2, _ARRAY_4, _MAP_2, _MAP_4]
    table[0xE0:0x100] = [0] * 32  # negative fixint
    return tuple(table)


_FIRST_BYTES: Final = _first_bytes()


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
    _scan(data, max_depth, max_elements)
    try:
        value: Plain = msgpack.unpackb(
            data, raw=False, strict_map_key=True, object_pairs_hook=_map_of_text
        )
    except MalformedData:
        raise
    except ValueError as error:  # text that is not UTF-8
        raise MalformedData(f"not plain data: {error}") from None
    return value


def _scan(data: bytes | bytearray | memoryview, max_depth: int, max_elements: int) -> None:
    """Walks the first bytes without building anything; raises MalformedData."""
    end = len(data)
    position = 0
    left = 1  # values still expected in the innermost container
    outer: list[int] = []  # the same for the containers around it
    elements = 0
    first_bytes = _FIRST_BYTES
    try:
        while True:
            if not left:
                if not outer:
                    break
                left = outer.pop()
                continue
            left -= 1
            first = data[position]
            position += 1
            follows = first_bytes[first]
            if follows >= 0:
                position += follows
                continue
            if follows >= _LENGTH_4:
                if follows == _REFUSED:
                    raise MalformedData(
                        f"not plain data: type byte {first:#04x} at {position - 1} is not allowed"
                    )
                width = 1 if follows == _LENGTH_1 else 2 if follows == _LENGTH_2 else 4
                length = int.from_bytes(data[position : position + width], "big")
                position += width + length
                continue
            if follows == _ARRAY:
                count = first & 0x0F
            elif follows == _MAP:
                count = (first & 0x0F) * 2
            else:
                width = 2 if follows in (_ARRAY_2, _MAP_2) else 4
                count = int.from_bytes(data[position : position + width], "big")
                position += width
                if follows in (_MAP_2, _MAP_4):
                    count *= 2
            elements += count
            if elements > max_elements:
                raise MalformedData(f"more than {max_elements} elements")
            if count > end - position:
                raise MalformedData(f"truncated: {count} elements in {end - position} bytes")
            outer.append(left)
            left = count
            if len(outer) > max_depth:
                raise MalformedData(f"nested deeper than {max_depth}")
    except IndexError:
        raise MalformedData(f"truncated at {end} bytes") from None
    if position != end:
        problem = "truncated" if position > end else f"{end - position} bytes left over"
        raise MalformedData(f"not one value: {problem}")


def _map_of_text(pairs: list[tuple[object, Plain]]) -> dict[str, Plain]:
    result: dict[str, Plain] = {}
    for key, value in pairs:
        if type(key) is not str:
            raise MalformedData(f"map key of type {type(key).__name__}, keys are text")
        if key in result:
            raise MalformedData(f"map key {key[:64]!r} twice")
        result[key] = value
    return result
