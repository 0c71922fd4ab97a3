"""What msgpack claims to hold, found out before anything is allocated for it.

msgpack's own decoder makes room for as many elements as an array says it has, at every level: a
message of three kilobytes that is nothing but openings of arrays would take a gigabyte. So what
may hold much is scanned first: values in all, depth, and no more elements than bytes left.
"""

from __future__ import annotations

from typing import Final

__all__ = ["scan"]

# What follows a first byte: n >= 0 bytes of payload, or one of these.
_REFUSED: Final = -1
_LENGTH_1, _LENGTH_2, _LENGTH_4 = -2, -3, -4  # text and bytes: a length field of that many bytes
_ARRAY, _MAP = -5, -6  # the count is in the first byte
_ARRAY_2, _ARRAY_4, _MAP_2, _MAP_4 = -7, -8, -9, -10
_EXTENSION_1, _EXTENSION_2, _EXTENSION_4 = -11, -12, -13


def _first_bytes(*, extensions: bool) -> tuple[int, ...]:
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
    if extensions:
        table[0xC7:0xCA] = [_EXTENSION_1, _EXTENSION_2, _EXTENSION_4]
        table[0xD4:0xD9] = [2, 3, 5, 9, 17]  # with the type's byte
    return tuple(table)


_PLAIN: Final = _first_bytes(extensions=False)
_EXTENDED: Final = _first_bytes(extensions=True)


def scan(
    data: bytes | bytearray | memoryview,
    max_depth: int,
    max_elements: int,
    *,
    extensions: bool = False,
) -> None:
    """Return if `data` is one value within these bounds. Raises ValueError, which says why not.

    A map's keys and values count as elements. What an extension holds is not looked at.
    """
    end = len(data)
    position = 0
    left = 1  # values still expected in the innermost container
    outer: list[int] = []  # the same for the containers around it
    elements = 0
    first_bytes = _EXTENDED if extensions else _PLAIN
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
                    raise ValueError(f"type byte {first:#04x} at {position - 1} is not allowed")
                width = 1 if follows == _LENGTH_1 else 2 if follows == _LENGTH_2 else 4
                length = int.from_bytes(data[position : position + width], "big")
                position += width + length
                continue
            if follows == _ARRAY:
                count = first & 0x0F
            elif follows == _MAP:
                count = (first & 0x0F) * 2
            elif follows <= _EXTENSION_1:
                width = 1 if follows == _EXTENSION_1 else 2 if follows == _EXTENSION_2 else 4
                length = int.from_bytes(data[position : position + width], "big")
                position += width + 1 + length
                continue
            else:
                width = 2 if follows in (_ARRAY_2, _MAP_2) else 4
                count = int.from_bytes(data[position : position + width], "big")
                position += width
                if follows in (_MAP_2, _MAP_4):
                    count *= 2
            elements += count
            if elements > max_elements:
                raise ValueError(f"more than {max_elements} elements")
            if count > end - position:
                raise ValueError(f"truncated: {count} elements in {end - position} bytes")
            outer.append(left)
            left = count
            if len(outer) > max_depth:
                raise ValueError(f"nested deeper than {max_depth}")
    except IndexError:
        raise ValueError(f"truncated at {end} bytes") from None
    if position != end:
        problem = "truncated" if position > end else f"{end - position} bytes left over"
        raise ValueError(f"not one value: {problem}")
