"""Whether an error says that memory ran out: of the machine, or of a device."""

from __future__ import annotations

import errno

__all__ = ["is_out_of_memory"]

_WORDS = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """So that nobody takes it for the fault of a file or a model.

    torch has a class for some devices only, and says it in words everywhere.
    """
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(one in str(error).lower() for one in _WORDS)
