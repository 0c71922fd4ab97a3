"""Hostile bytes for every decoder: seeded changes of good messages, and whatever hypothesis makes.

A decoder of bytes from outside gives a value or raises our error: nothing else, whatever the bytes
are. And it takes no memory for what a message only claims to hold.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import math
import random
import resource
import sys
import tracemalloc
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from typing import Any, TypeVar

import msgpack
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from soak import SEED, count

from glasshive.client import files
from glasshive.dht import directory, framing
from glasshive.dht.framing import FrameLimits, Stream
from glasshive.security.keys import Identity

T = TypeVar("T")
Errors = type[Exception] | tuple[type[Exception], ...]

PEER = Identity(bytes(32)).peer_id

MUTATIONS = count(200_000, 10_000_000)
EXAMPLES = count(1_000, 50_000)
MEASURED = (64, 4096)  # so many of so many tries; each start of tracemalloc loses some memory
MAX_PEAK_BYTES = 1 << 20
MAX_GROWTH_BYTES = 32 << 20

# What opens something long: msgpack's text, bytes, arrays, maps and extensions; lengths of frames.
_OPENINGS = [
    *(first + length for first in (b"\xdb", b"\xc6", b"\xdd", b"\xdf")
      for length in (b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\x10\0\0", b"\0\0\xff\xff")),
    *(b"\xc9" + length + code for length in (b"\xff\xff\xff\xff", b"\0\0\0\x40")
      for code in (b"\x40", b"\x50", b"\xff")),
    b"\xda\xff\xff", b"\xc5\xff\xff", b"\xdc\xff\xff", b"\xde\xff\xff", b"\xd9\xff", b"\xc4\xff",
    b"\x9f", b"\x8f", b"\xbf", b"\xff" * 4, b"\xff" * 8, b"\0" * 4, b"\0" * 8, b"\0\0\0\x01",
    b"\x91" * 40, b"\x81\xa1a" * 20, b"\xdc\xff\xff" * 20, b"\xdd\xff\xff\xff\xff" * 9,
    *(array * 200 for array in (b"\xdc\x40\0", b"\xdc\x10\0", b"\xdc\x04\0", b"\xdc\0\x64")),
]  # fmt: skip

# What may stand in a place where something else is wanted.
_ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2, 7, 255, 256, 2**31, 2**53, 2**63 - 1, 2**63, 2**64 - 1,
    -(2**63), 0.0, 1.0, -0.5, 1e308, math.nan, math.inf, -math.inf, "", "m", "neg", "add", "pick",
    "topk", "set", "input", "float32", "object", "__class__", "../x", "\0", "\x1b[2J", "é" * 9,
    "a" * 257, b"", b"x", bytes(16), bytes(32), bytes(33), [], [0], [0, 0], [1], [1, 1],
    [2, "float32"], [[]], [2**40] * 3, [1] * 17, [[[[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]]], {},
    {"a": 1}, {1: 1}, msgpack.ExtType(0x40, b"\x90"), msgpack.ExtType(0x50, b"\x93\xc0\xc0\x90"),
    msgpack.Timestamp(1, 0),
]  # fmt: skip


class Mutator:
    """Changes good messages, always the same ones for a seed.

    Half of the changes are to the bytes: bits and bytes changed, cut off, left out, put in,
    repeated, spliced with another message, a length blown up. With `trees` the other half are to
    what the msgpack says: a part replaced, left out, doubled or moved.
    """

    def __init__(self, originals: Sequence[bytes], seed: int, *, trees: bool = True) -> None:
        self._originals = list(originals)
        self._trees = [msgpack.unpackb(one) for one in originals] if trees else []
        self._random = random.Random(seed)

    def next(self) -> bytes:
        """The next changed message."""
        draw = self._random.random
        if self._trees and draw() < 0.5:
            return self._packed(self._trees[int(draw() * len(self._trees))])
        data = bytearray(self._originals[int(draw() * len(self._originals))])
        for _ in range(1 + int(draw() * 3)):
            self._change(data)
        return bytes(data)

    def _change(self, data: bytearray) -> None:
        draw = self._random.random
        place = int(draw() * len(data))
        how = int(draw() * 10)
        if how <= 1 and data:
            data[place] = int(draw() * 256)
        elif how <= 3 and data:
            data[place] ^= 1 << int(draw() * 8)
        elif how == 4:
            del data[place:]
        elif how == 5:
            del data[place : place + 1 + int(draw() * 4)]
        elif how == 6:
            data[place:place] = self._random.randbytes(1 + int(draw() * 4))
        elif how == 7:
            start = int(draw() * len(data))
            data[place:place] = data[start : start + 1 + int(draw() * 40)]
        elif how == 8:
            other = self._originals[int(draw() * len(self._originals))]
            data[place:] = other[int(draw() * len(other)) :]
        else:
            opening = _OPENINGS[int(draw() * len(_OPENINGS))]
            over = len(opening) if draw() < 0.5 else 0
            data[place : place + over] = opening

    def _packed(self, tree: Any) -> bytes:
        return bytes(msgpack.packb(self.changed(tree)))

    def changed(self, tree: Any) -> Any:
        """`tree` with one place replaced, left out, doubled or swapped with its neighbour's."""
        draw = self._random.random
        if isinstance(tree, dict) and tree and draw() > 0.15:
            pairs = self.changed([[key, value] for key, value in tree.items()])
            if not isinstance(pairs, list):
                return pairs
            return {
                pair[0]: pair[1]
                for pair in pairs
                if isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str)
            }
        if not isinstance(tree, list) or not tree or draw() < 0.15:
            return _ODD[int(draw() * len(_ODD))]
        parts = list(tree)
        place = int(draw() * len(parts))
        how = int(draw() * 8)
        if how == 0:
            del parts[place]
        elif how == 1:
            parts.insert(place, parts[int(draw() * len(parts))])
        elif how == 2:
            other = int(draw() * len(parts))
            parts[place], parts[other] = parts[other], parts[place]
        elif how == 3 and type(parts[place]) is int:
            parts[place] += int(draw() * 7) - 3
        else:
            parts[place] = self.changed(parts[place])
        return parts


def attack(
    decode: Callable[[bytes], object],
    originals: Sequence[bytes],
    errors: Errors,
    *,
    trees: bool = True,
    tries: int = MUTATIONS,
) -> int:
    """Decode `tries` changed messages; how many of them were taken.

    `decode` takes every one of the originals and raises nothing but `errors` for any bytes. Before
    the tries, long things are opened in the originals; these and one try in 64 are measured and may
    allocate `MAX_PEAK_BYTES` at once. All together may add `MAX_GROWTH_BYTES` to the process. What
    fails is told with the try, the seed and the bytes.
    """
    for one in originals:
        decode(one)  # also loads what is loaded once
    mutator = Mutator(originals, SEED, trees=trees)
    taken = 0
    before_bytes = _most_bytes()
    try:
        for data in _with_openings(originals):
            _take(decode, data, errors, "with something long opened", measured=True)
        for number in range(tries):
            measured = number % MEASURED[1] < MEASURED[0]
            name = f"try {number} of seed {SEED}"
            taken += _take(decode, mutator.next(), errors, name, measured=measured)
    finally:
        tracemalloc.stop()
    assert _most_bytes() - before_bytes < MAX_GROWTH_BYTES, "memory has grown"
    assert taken < tries, "nothing was refused"
    return taken


def _take(
    decode: Callable[[bytes], object],
    data: bytes,
    errors: Errors,
    name: str,
    *,
    measured: bool,
    more_tries: int = 2,
) -> bool:
    """Whether `decode` took `data`.

    What it allocates is measured again, up to `more_tries` times, if it is too much: the process
    counts what its other threads allocate, too, and what is loaded once.
    """
    if measured:
        tracemalloc.start()
        tracemalloc.reset_peak()
        held_bytes = tracemalloc.get_traced_memory()[0]
    elif tracemalloc.is_tracing():
        tracemalloc.stop()
    try:
        decode(data)
        taken = True
    except errors:
        taken = False
    except BaseException as error:
        error.add_note(f"{name}: {data[:1000].hex()}")
        raise
    if measured:
        peak_bytes = tracemalloc.get_traced_memory()[1] - held_bytes
        if peak_bytes > MAX_PEAK_BYTES and more_tries:
            more_tries -= 1
            return _take(decode, data, errors, name, measured=True, more_tries=more_tries)
        assert peak_bytes <= MAX_PEAK_BYTES, f"{peak_bytes} bytes, {name}: {data[:1000].hex()}"
    return taken


def _with_openings(originals: Sequence[bytes]) -> Iterator[bytes]:
    """The originals, cut at some places, where something long is opened and does not come."""
    for one in originals:
        for place in sorted({len(one) * eighth // 8 for eighth in range(8)} | {0, 1, 2, 3}):
            for opening in _OPENINGS:
                yield one[:place] + opening
                yield one[:place] + opening + one[place:]


def _most_bytes() -> int:
    """The most memory that this process ever had."""
    unit_bytes = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit_bytes


class Link:
    """A byte link on which `data` comes and then the end; what is sent on it is lost."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._taken = 0

    @property
    def has_more(self) -> bool:
        """Whether some of the data was not read yet."""
        return self._taken < len(self._data)

    def stream(self) -> Stream:
        """A stream on this link, whose frames fit in what a try may allocate."""
        limits = FrameLimits(header_bytes=MAX_PEAK_BYTES // 4, body_bytes=MAX_PEAK_BYTES // 2)
        return Stream(self, self, PEER, limits)

    async def read(self, n: int = -1, /) -> bytes:
        start, self._taken = self._taken, self._taken + n
        return self._data[start : self._taken]

    async def readexactly(self, n: int, /) -> bytes:
        part = await self.read(n)
        if len(part) < n:
            raise asyncio.IncompleteReadError(part, n)
        return part

    def write(self, data: bytes, /) -> None: ...

    async def drain(self) -> None: ...

    def close(self) -> None: ...

    async def wait_closed(self) -> None: ...

    def abort(self) -> None: ...


def at_once(coroutine: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine for which everything is there, within `no_deadlines`."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        result: T = end.value
        return result
    coroutine.close()
    raise AssertionError("it waits for something")


@contextlib.contextmanager
def no_deadlines() -> Iterator[None]:
    """Streams need no event loop: their waits, in which nothing is waited for, have no deadline."""

    async def at_any_time(_seconds: float, awaitable: Awaitable[T], _what: str) -> T:
        return await awaitable

    with pytest.MonkeyPatch.context() as patch:
        for module in (framing, directory, files):
            patch.setattr(module, "within", at_any_time)
        yield


fuzzed = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # they hold for all examples
)
"""Runs a test of a decoder as often as hypothesis is to."""

_anything = st.one_of(
    st.sampled_from(_ODD),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(),
    st.text(max_size=20),
    st.binary(max_size=40),
    st.lists(st.integers(-1, 300), max_size=5),
)


def like(*originals: bytes) -> st.SearchStrategy[bytes]:
    """Bytes of any kind, and messages as these of msgpack with anything in some of the places."""
    trees = st.sampled_from([msgpack.unpackb(one) for one in originals])
    edits = st.lists(st.tuples(st.integers(0, 255), _anything), min_size=1, max_size=3)
    return st.one_of(st.binary(max_size=200), st.builds(_replaced, trees, edits))


def _replaced(tree: list[Any], edits: list[tuple[int, Any]]) -> bytes:
    whole = [copy.deepcopy(tree)]
    places: list[tuple[list[Any], int]] = []
    work = [whole]
    while work:
        part = work.pop()
        places.extend((part, index) for index in range(len(part)))
        work.extend(inner for inner in part if isinstance(inner, list))
    for number, value in edits:
        part, index = places[number % len(places)]
        part[index] = value
    return bytes(msgpack.packb(whole[0]))
