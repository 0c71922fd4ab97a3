"""A bounded replacement for hivemind's ``MSGPackSerializer.loads``.

The stock decoder re-enters itself for two of its extension types with no bound on the depth, so
one message of about a kilobyte exhausts the C stack and kills the process. `install` replaces it
and must run before any listener exists. The rules here:

1. a value is at most 64 KiB; a dictionary value (one entry per announcing peer) at most 2 MiB;
2. extension types are the tuple and the dictionary, nothing else;
3. nesting is at most 8 deep, extension types counted, with at most 4,096 elements at a level of
   extension, and nothing nests in a dictionary's entries;
4. a dictionary has at most 1,024 entries of (text, bytes, finite time), read one by one.
"""

from __future__ import annotations

import math
from typing import Any, Final

import msgpack

from glasshive.dht.errors import BadDhtValue
from glasshive.graph.msgpack_scan import scan

__all__ = ["MAX_DICTIONARY_ENTRIES", "bounded_loads", "install"]

MAX_VALUE_BYTES: Final = 64 * 1024
MAX_DICTIONARY_BYTES: Final = 2 * 1024 * 1024
MAX_DICTIONARY_ENTRIES: Final = 1024
MAX_DEPTH: Final = 8
MAX_SUBKEY_BYTES: Final = 256
MAX_ENTRY_BYTES: Final = 2 * 1024  # 1,024 entries of the largest record fit into a dictionary
MAX_ELEMENTS: Final = 4096

_TUPLE_EXT_CODE: Final = 0x40
_DICTIONARY_EXT_CODE: Final = 0x50


def install() -> None:
    """hivemind decodes with `bounded_loads` from now on; may be called again at no harm."""
    from hivemind.utils.serializer import MSGPackSerializer

    MSGPackSerializer.loads = staticmethod(bounded_loads)


def bounded_loads(data: bytes) -> Any:
    """The decoded value; raises BadDhtValue for anything outside the rules above."""
    if len(data) > MAX_VALUE_BYTES:
        entries = _outer_dictionary(data)
        if entries is None:
            raise BadDhtValue(
                f"value of {len(data)} bytes, at most {MAX_VALUE_BYTES} are decoded "
                f"({MAX_DICTIONARY_BYTES} for a dictionary); it was dropped"
            )
        return _decode_dictionary(entries)
    return _decode(data, MAX_DEPTH)


def _outer_dictionary(data: bytes) -> bytes | None:
    """The payload if all of `data` is one dictionary of legal size, else None. No decoding."""
    if len(data) > MAX_DICTIONARY_BYTES:
        return None
    # ext 32: c9, length in four bytes, type code. Shorter forms are below MAX_VALUE_BYTES.
    if data[0] != 0xC9 or data[5] != _DICTIONARY_EXT_CODE:
        return None
    if int.from_bytes(data[1:5], "big") != len(data) - 6:
        return None
    return data[6:]


def _decode(data: bytes, depth_left: int) -> Any:
    if depth_left <= 0:
        raise BadDhtValue(f"value nested too deep, at most {MAX_DEPTH} levels are decoded")

    def decode_extension(code: int, payload: bytes) -> Any:
        if code == _TUPLE_EXT_CODE:
            items = _decode(payload, depth_left - 1)
            if not isinstance(items, list):
                raise BadDhtValue("tuple whose payload is not an array; it was dropped")
            return tuple(items)
        if code == _DICTIONARY_EXT_CODE:
            return _decode_dictionary(payload)
        raise BadDhtValue(f"unknown extension type {code}; it was dropped")

    try:
        scan(data, depth_left, MAX_ELEMENTS, extensions=True)
        value = msgpack.unpackb(data, raw=False, ext_hook=decode_extension)
    except BadDhtValue:
        raise
    except (ValueError, TypeError, RecursionError) as error:
        raise BadDhtValue(f"value is not msgpack: {error}") from None
    _check(value, depth_left)
    return value


def _check(value: object, depth_left: int) -> None:
    """Raises BadDhtValue where containers nest deeper than that, or a time stamp is met."""
    if isinstance(value, dict):
        children: Any = value.values()
    elif isinstance(value, (list, tuple)):
        children = value
    elif isinstance(value, msgpack.Timestamp):  # extension -1, which msgpack decodes by itself
        raise BadDhtValue("unknown extension type -1; it was dropped")
    else:
        return
    if depth_left <= 0:
        raise BadDhtValue(f"value nested too deep, at most {MAX_DEPTH} levels are decoded")
    for child in children:
        _check(child, depth_left - 1)


def _decode_dictionary(payload: bytes) -> Any:
    """hivemind's dictionary value: [maximum size, latest expiry, [[subkey, value, expiry], ...]].

    The first two are the sender's claims about itself and are not used: the size is ours, the
    latest expiry follows from the entries.
    """
    from hivemind.dht.storage import DictionaryDHTValue

    # No container may appear where an entry's element is read, so nothing can nest.
    unpacker = msgpack.Unpacker(
        raw=False,
        max_buffer_size=MAX_DICTIONARY_BYTES,
        read_size=max(len(payload), 1),  # the buffer, which is else of a MiB for each dictionary
        max_array_len=0,
        max_map_len=0,
        max_ext_len=0,
        max_str_len=MAX_SUBKEY_BYTES,
        max_bin_len=MAX_ENTRY_BYTES,
    )
    try:
        unpacker.feed(payload)
        _expect(unpacker.read_array_header() == 3, "dictionary is not an array of three")
        unpacker.skip()
        unpacker.skip()
        count = unpacker.read_array_header()
        _expect(count <= MAX_DICTIONARY_ENTRIES, f"dictionary of {count} entries")
        dictionary = DictionaryDHTValue(MAX_DICTIONARY_ENTRIES)
        with dictionary.freeze():
            for _ in range(count):
                _expect(unpacker.read_array_header() == 3, "entry is not an array of three")
                subkey, value, expiry = unpacker.unpack(), unpacker.unpack(), unpacker.unpack()
                _expect(type(subkey) is str and type(value) is bytes, "entry is not text and bytes")
                _expect(type(expiry) in (int, float) and math.isfinite(expiry), "expiry is no time")
                dictionary.store(subkey, value, float(expiry))
        _expect(unpacker.tell() == len(payload), "bytes left after the dictionary")
    except BadDhtValue:
        raise
    except (ValueError, TypeError, msgpack.OutOfData, msgpack.UnpackException) as error:
        raise BadDhtValue(f"dictionary is not as hivemind writes it: {error}") from None
    return dictionary


def _expect(condition: bool, problem: str) -> None:
    if not condition:
        raise BadDhtValue(f"{problem}; it was dropped")
