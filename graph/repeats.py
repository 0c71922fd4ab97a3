"""Lists in which a run of items comes again with every number moved on, as the steps of a
generation do: such a run is written once.

In a folded list the entry `[period, count]` stands for `count` more runs of `period` items. Each is
the last one, with its numbers, also those in its texts, as far on from there as these are from the
run before it. So two runs stand in full. An item has any other length than two.
"""

from __future__ import annotations

import re
import struct
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

import msgpack

from glasshive.graph.errors import BadGraph

__all__ = ["fold", "unfold"]

_MOST_TRIES: Final = 32  # at each item, of periods
_NUMBER: Final = re.compile(r"(?:0|[1-9][0-9]{0,8})")
_LARGEST: Final = 2**63 - 1
_LARGEST_IN_TEXT: Final = 10**9 - 1
_INT, _TEXT, _FLOAT, _LIST = object(), object(), object(), object()


def fold(items: Sequence[Any]) -> list[Any]:
    """The shortest list, as far as is looked for, that `unfold` makes these items of."""
    keys: list[Any] = []
    numbers: list[list[int]] = []
    for item in items:
        found: list[int] = []
        keys.append(_key(item, found))
        numbers.append(found)
    folded: list[Any] = []
    seen: defaultdict[Any, list[int]] = defaultdict(list)
    broken: dict[int, int] = {}  # by the period: the next item that is not as foreseen
    at = 0
    while at < len(items):
        period, count = 0, 0
        for before in seen[keys[at]][-1 : -_MOST_TRIES - 1 : -1]:
            tried = at - before
            if before < tried or at <= broken.get(tried, -1) < at + tried:
                continue
            end = at
            while end < len(items) and _is_next(keys, numbers, end, tried):
                end += 1
            broken[tried] = end
            if (end - at) // tried * tried > period * count:
                period, count = tried, (end - at) // tried
        if count:
            folded.append([period, count])
        else:
            folded.append(items[at])
        for _ in range(period * count or 1):
            seen[keys[at]].append(at)
            at += 1
    return folded


def unfold(entries: Iterable[Any], most_items: int, most_bytes: int) -> Iterator[Any]:
    """The items of a folded list of tuples, one after the other.

    Raises BadGraph before it makes more than `most_items`, or, of repeated ones, more than would
    take `most_bytes` in full; and for a repeat of what is not there, or beyond what numbers may be.
    """
    items: list[Any] = []
    for entry in entries:
        if type(entry) is not tuple or len(entry) != 2:
            items.append(entry)
            yield entry
            continue
        period, count = entry
        if not (type(period) is type(count) is int and 1 <= 2 * period <= len(items) and count > 0):
            raise BadGraph(f"a repeat of {period!r:.20} items, {count!r:.20} times; two are there")
        run = items[-period:]
        most_bytes -= count * len(msgpack.packb(run))
        if len(items) + period * count > most_items or most_bytes < 0:
            raise BadGraph(f"a repeat of {period} items {count} times is more than is allowed")
        moves = [_moves(*both) for both in zip(items[-2 * period : -period], run, strict=True)]
        for times in range(1, count + 1):
            for item, (base, steps) in zip(run, moves, strict=True):
                moved = (number + times * step for number, step in zip(base, steps, strict=True))
                items.append(_filled(item, moved))
                yield items[-1]


def _is_next(keys: list[Any], numbers: list[list[int]], at: int, period: int) -> bool:
    first, second = at - 2 * period, at - period
    if not keys[first] == keys[second] == keys[at]:
        return False
    three = zip(numbers[first], numbers[second], numbers[at], strict=True)
    return all(c - b == b - a for a, b, c in three)


def _moves(first: Any, second: Any) -> tuple[list[int], list[int]]:
    """The numbers of the second, and how far each is from the first's."""
    before: list[int] = []
    base: list[int] = []
    if _key(first, before) != _key(second, base):
        raise BadGraph("a repeat of items that differ in more than their numbers")
    return base, [b - a for a, b in zip(before, base, strict=True)]


def _key(item: Any, numbers: list[int]) -> Any:
    """What two items have in common that differ in their numbers only; those go to `numbers`."""
    kind = type(item)
    if kind is int:
        numbers.append(item)
        return _INT
    if kind is str:
        numbers.extend(map(int, _NUMBER.findall(item)))
        return _TEXT, tuple(_NUMBER.split(item))
    if kind is float:
        return _FLOAT, struct.pack(">d", item)  # 0.0 is not -0.0, and a NaN is itself
    if kind is list or kind is tuple:
        return _LIST, tuple([_key(one, numbers) for one in item])
    return kind, item


def _filled(item: Any, numbers: Iterator[int]) -> Any:
    """The item with these numbers in place of its own."""
    kind = type(item)
    if kind is int:
        if not -_LARGEST - 1 <= (number := next(numbers)) <= _LARGEST:
            raise BadGraph("a repeat goes on beyond 64 bits")
        return number
    if kind is str:
        return _NUMBER.sub(lambda _: _digits(next(numbers)), item)
    if kind is tuple:
        return tuple([_filled(one, numbers) for one in item])
    return item


def _digits(number: int) -> str:
    if not 0 <= number <= _LARGEST_IN_TEXT:
        raise BadGraph(f"a repeat goes on to {number} in a text")
    return str(number)
