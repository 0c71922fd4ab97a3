"""Patterns of module paths: which modules may be read, and which written.

A pattern is a module's Hugging Face path, in which a part may be `*` (any one part) and the last
part may be `**` (any number of parts, or none). Nothing else has a meaning:

    model.layers.*.mlp         the mlp of every block, not what is inside it
    model.layers.*.mlp.**      the mlp of every block and all inside it
    **                         every module, the model itself included

Whether one pattern covers another, and what two have in common, follows part by part, so a host can
be shown to narrow a whitelist and never to widen it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Final

__all__ = ["check_pattern", "common", "covered_by", "matches", "nearest_patterns"]

MAX_PATTERN_CHARS: Final = 128
MAX_PARTS: Final = 16
MAX_COMMON: Final = 128

_PART: Final = re.compile(r"[A-Za-z0-9_]+|\*")


def check_pattern(pattern: str) -> None:
    """Return if `pattern` is one. Raises ValueError, which says why not."""
    parts = pattern.split(".")
    if len(pattern) > MAX_PATTERN_CHARS or len(parts) > MAX_PARTS:
        raise ValueError(f"longer than {MAX_PATTERN_CHARS} characters or {MAX_PARTS} parts")
    if parts[-1] == "**":
        parts.pop()
    for part in parts:
        if not _PART.fullmatch(part):
            raise ValueError(
                f"the part {part!r} is neither a name, nor *; ** stands at the end only"
            )


def matches(pattern: str, module: str) -> bool:
    """Whether the module at the path `module` ("" for the model itself) is one of the pattern's."""
    head, open_end = _split(pattern)
    parts = module.split(".") if module else []
    if len(parts) < len(head) or (len(parts) > len(head) and not open_end):
        return False
    return all(a in ("*", b) for a, b in zip(head, parts, strict=False))


def covered_by(pattern: str, others: Iterable[str]) -> bool:
    """Whether one of the others alone matches every module that `pattern` matches."""
    return any(_common(pattern, other) == pattern for other in others)


def common(some: Iterable[str], others: Iterable[str]) -> tuple[str, ...]:
    """The patterns of what both sides match, in the order of their names.

    The widest MAX_COMMON: two lists that cross can have thousands in common, and each is asked
    about each module. What is left out is not allowed.
    """
    others = tuple(others)
    met = (_common(one, other) for one in some for other in others)
    both = {pattern for pattern in met if pattern is not None}
    found = sorted(both, key=lambda pattern: (_narrowness(pattern), pattern))[:MAX_COMMON]
    return tuple(
        sorted(
            pattern
            for pattern in found
            if not covered_by(pattern, (other for other in found if other != pattern))
        )
    )


def nearest_patterns(module: str, patterns: Iterable[str]) -> tuple[str, ...]:
    """At most three of the patterns, those most like `module` first."""
    return tuple(difflib.get_close_matches(module[:256], tuple(patterns), n=3, cutoff=0.0))


def _split(pattern: str) -> tuple[list[str], bool]:
    """The parts before `**`, and whether it is there."""
    parts = pattern.split(".")
    if parts[-1] == "**":
        return parts[:-1], True
    return parts, False


def _narrowness(pattern: str) -> tuple[int, bool]:
    """For a pattern that covers another no more than for that one."""
    head, open_end = _split(pattern)
    return sum(part != "*" for part in head), not open_end


def _common(one: str, other: str) -> str | None:
    """The pattern of what both match; None if that is nothing."""
    head, open_end = _split(one)
    other_head, other_open_end = _split(other)
    length = max(len(head), len(other_head))
    if (len(head) < length and not open_end) or (len(other_head) < length and not other_open_end):
        return None
    parts: list[str] = []
    for place in range(length):
        a = head[place] if place < len(head) else "*"
        b = other_head[place] if place < len(other_head) else "*"
        if a != b and "*" not in (a, b):
            return None
        parts.append(b if a == "*" else a)
    if open_end and other_open_end:
        parts.append("**")
    return ".".join(parts)
