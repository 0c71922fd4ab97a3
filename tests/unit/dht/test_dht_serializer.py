"""The bounded decoder takes what hivemind writes and refuses the rest with one error."""

import contextlib
import math
import os

import msgpack
import pytest
from hostile import attack, fuzzed, like
from hypothesis import given
from soak import count

from glasshive.dht import serializer
from glasshive.dht.errors import BadDhtValue

# hivemind 1.1 itself, at import.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")

DICTIONARY = 0x50
TUPLE = 0x40


def entries(count: int, size: int = 8, expiry: object = 100.0) -> bytes:
    rows = [[f"peer {i}", bytes(size), expiry] for i in range(count)]
    data: bytes = msgpack.packb(msgpack.ExtType(DICTIONARY, msgpack.packb([None, 5.0, rows])))
    return data


@pytest.mark.parametrize(
    "value", [None, 1, 1.5, "text", b"bytes", [1, [2, "x"]], {"a": [1]}, (1, ("x", b"y"))]
)
def test_what_hivemind_writes_comes_back(value: object) -> None:
    from hivemind.utils.serializer import MSGPackSerializer

    assert serializer.bounded_loads(MSGPackSerializer.dumps(value)) == value


def test_a_dictionary_of_hivemind_comes_back() -> None:
    from hivemind.dht.storage import DictionaryDHTValue
    from hivemind.utils.serializer import MSGPackSerializer

    written = DictionaryDHTValue()
    with written.freeze():
        for i in range(1000):
            written.store(f"peer {i}", os.urandom(1500), 1000.5 + i)
        read = serializer.bounded_loads(MSGPackSerializer.dumps(written))
    assert type(read) is DictionaryDHTValue
    assert read.data == written.data
    assert read.latest_expiration_time == 1999.5


def test_the_senders_claims_about_a_dictionary_are_not_used() -> None:
    data = msgpack.packb(
        msgpack.ExtType(DICTIONARY, msgpack.packb([1, math.inf, [["a", b"x", 7.0]]]))
    )
    read = serializer.bounded_loads(data)
    assert read.latest_expiration_time == 7.0
    assert read.maxsize == serializer.MAX_DICTIONARY_ENTRIES


def nested(levels: int) -> bytes:
    data: bytes = msgpack.packb([])
    for _ in range(levels):
        data = msgpack.packb(msgpack.ExtType(TUPLE, msgpack.packb([msgpack.ExtType(TUPLE, data)])))
    return data


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("nested too deep", nested(200)),
        ("nested deeper than 8", b"\x91" * 9 + b"\xc0"),
        ("not msgpack", b"\x91" * 5000 + b"\xc0"),
        ("not msgpack", b""),
        ("not msgpack", b"\xc1"),
        ("not msgpack", b"\x01\x02"),
        ("not msgpack", msgpack.packb(list(range(5000)))),
        ("not msgpack", b"\xdd\xff\xff\xff\xff" * 100),
        ("unknown extension type 81", msgpack.packb(msgpack.ExtType(0x51, b"\x80"))),
        ("unknown extension type -1", b"\xd6\xff\x00\x00\x00\x00"),
        ("payload is not an array", msgpack.packb(msgpack.ExtType(TUPLE, b"\x01"))),
        ("bytes, at most", msgpack.packb(bytes(70_000))),
        ("bytes, at most", b"\xc9\x00\x20\x00\x01\x50" + bytes(2 * 1024 * 1024 + 1)),
        ("dictionary of 1025 entries", entries(1025)),
        ("not as hivemind writes it", entries(1, size=3000)),
        ("entry is not text and bytes", entries(1).replace(b"\xa6peer 0", b"\xc4\x05peer0")),
        ("expiry is no time", entries(1, expiry=math.inf)),
        ("expiry is no time", entries(1, expiry=math.nan)),
        ("expiry is no time", entries(1, expiry=True)),
        ("not as hivemind writes it", entries(1, expiry=[1.0])),
        ("expiry is no time", entries(1, expiry={})),
    ],
)
def test_anything_else_is_refused(name: str, data: bytes) -> None:
    with pytest.raises(BadDhtValue, match=name):
        serializer.bounded_loads(data)


def test_a_damaged_value_raises_only_our_error() -> None:
    inner = msgpack.ExtType(TUPLE, msgpack.packb(["x", b"y"]))
    seeds = [[1, {"a": [2.5, None]}], ["t", msgpack.ExtType(TUPLE, msgpack.packb([1, inner]))]]
    loads_dictionary(PAYLOAD)  # loads hivemind, which takes memory once
    attack(serializer.bounded_loads, list(map(msgpack.packb, seeds)), BadDhtValue)


def loads_dictionary(payload: bytes) -> None:
    serializer.bounded_loads(msgpack.packb(msgpack.ExtType(DICTIONARY, payload)))


PAYLOAD: bytes = msgpack.packb([None, 5.0, [["peer 0", bytes(8), 100.0], ["peer 1", b"x", 7]]])


def test_a_damaged_dictionary_raises_only_our_error() -> None:
    attack(loads_dictionary, [PAYLOAD], BadDhtValue)


def test_a_damaged_dictionary_beyond_the_size_of_a_value_raises_only_our_error() -> None:
    large = entries(40, size=2000)
    assert len(large) > serializer.MAX_VALUE_BYTES
    attack(serializer.bounded_loads, [large], BadDhtValue, trees=False, tries=count(2_000, 100_000))


@fuzzed
@given(like(msgpack.packb([1, ["x", b"y", 2.5], {"a": 1}])), like(PAYLOAD))
def test_any_bytes_are_a_value_or_refused(value: bytes, payload: bytes) -> None:
    with contextlib.suppress(BadDhtValue):
        serializer.bounded_loads(value)
    with contextlib.suppress(BadDhtValue):
        loads_dictionary(payload)


def test_install_may_be_called_twice() -> None:
    from hivemind.utils.serializer import MSGPackSerializer

    serializer.install()
    serializer.install()
    with pytest.raises(BadDhtValue):
        MSGPackSerializer.loads(nested(9))
