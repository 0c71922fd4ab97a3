"""Said once to each user of a swarm of strangers, before anything is sent: who sees what."""

from __future__ import annotations

import contextlib
import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

LOCAL_PREFIX: Final = "local-"
"""With this begin the names of swarms that a test or demonstration makes on its own machine."""


def tell_once(swarm: str, data: Path, say: Callable[[str], object] | None = None) -> bool:
    """Say who sees a user's prompts in the public swarm of this name, if it wasn't said before.

    It goes to standard error, or to `say`. What was said is remembered in the folder `data`; where
    that can't be written it is said again. Returns whether it was said now.
    """
    if swarm.startswith(LOCAL_PREFIX):
        return False
    mark = data / "told" / hashlib.sha256(swarm.encode()).hexdigest()[:32]
    if mark.exists():
        return False
    (say or sys.stderr.write)(
        f"glasshive: whoever likes can be a peer of the swarm {swarm!r}. A peer that computes for "
        "you sees the activations of its blocks, the first one your tokens, and a peer could lie "
        "about results. Use a private swarm for what others must not see (docs/for-researchers.md "
        "says more). You are told this once.\n"
    )
    with contextlib.suppress(OSError):
        mark.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        mark.touch(mode=0o600)
    return True
