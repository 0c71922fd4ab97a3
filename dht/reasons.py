"""Why a peer did not answer, in a few words of ours.

The network daemon speaks of dials, back-off and multistream; people need to know what to check.
"""

from __future__ import annotations

import re
from typing import Final

__all__ = ["in_one_line", "nobody_answered", "why_unreachable"]

MOST_CHARACTERS: Final = 160

_WORDS: Final = (
    (r"peer id mi", "another peer answers there than the one of this id"),
    (r"connection refused", "nothing listens there (connection refused)"),
    (r"no such host|failed to resolve|no good addresses", "its address leads nowhere (host name?)"),
    (r"no route to host|network is unreachable", "there is no way to that address from here"),
    (
        r"protocols? not supported|doesn't speak",
        "a peer answers there, but not to this (another release?)",
    ),
    (r"dial backoff", "it did not answer when it was asked some seconds ago"),
    (r"i/o timeout|deadline exceeded|took longer than", "no answer in time"),
    (
        r"security protocol|multistream|not multistream|\bEOF\b|reset by peer|connection reset",
        "what listens there is no peer of a swarm",
    ),
)
# What p2pd, hivemind's wait for it, and its DHT node say of bootstrap peers that are away.
_NOBODY_ANSWERED: Final = (
    "failed to connect to bootstrap",
    "failed to start in",
    "bootstrap failed",
)
_OTHER_PEER: Final = re.compile(r"peer id mismatch: expected \S+, but remote key matches (\w+)")


def why_unreachable(said: str) -> str:
    """What `said`, the text of a failed connection, means; itself in short if it is not known."""
    other = _OTHER_PEER.search(said)
    if other:
        return f"another peer answers there, {other.group(1)[:80]}"
    for pattern, words in _WORDS:
        if re.search(pattern, said, re.IGNORECASE):
            return words
    text = " ".join(said.split())
    return text if len(text) <= MOST_CHARACTERS else text[:MOST_CHARACTERS] + "..."


def nobody_answered(said: str) -> bool:
    """Whether `said`, the text of a failed start, is of bootstrap peers that are away."""
    return any(words in said for words in _NOBODY_ANSWERED)


def in_one_line(error: BaseException) -> str:
    """The error in one short line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:200] + "..."
