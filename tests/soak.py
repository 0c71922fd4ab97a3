"""How much the tests try: less in `make test`, the full counts with `GLASSHIVE_SOAK=1`.

`GLASSHIVE_SEED` (0) chooses the first seed of every test that draws at random, so that a failure
can be seen again and another run can look elsewhere.
"""

from __future__ import annotations

import os

SOAK = os.environ.get("GLASSHIVE_SOAK") == "1"
SEED = int(os.environ.get("GLASSHIVE_SEED", "0"))


def count(usual: int, full: int) -> int:
    """How often to try: `usual` in `make test`, `full` in `make soak`."""
    return full if SOAK else usual
