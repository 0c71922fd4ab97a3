"""Where in the user's own code something was recorded.

A mark (code object, instruction) costs well under a microsecond; it becomes a file and a line only
when an error or a report needs it. Lines stay at the client: no graph carries them.
"""

from __future__ import annotations

import os
import sys
import sysconfig
import warnings
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any, Final, TypeAlias
from weakref import WeakKeyDictionary

import torch

Mark: TypeAlias = "tuple[CodeType, int] | None"


@dataclass(frozen=True, slots=True)
class SourceLine:
    """A line of the user's code. Its text is `experiment.py:85`."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{os.path.basename(self.file)}:{self.line}"


def _own_folders() -> tuple[str, ...]:
    here = os.path.dirname(os.path.realpath(__file__))
    package = sys.modules[__name__.partition(".")[0]]
    return (here, *(os.path.realpath(path) for path in package.__path__))


def _library_folders() -> tuple[str, ...]:
    names = ("stdlib", "platstdlib", "purelib", "platlib")
    found = {os.path.realpath(path) for name in names if (path := sysconfig.get_path(name))}
    found.add(os.path.dirname(os.path.realpath(torch.__file__)))
    return tuple(sorted(found))


_OWN: Final = tuple(os.path.join(path, "") for path in _own_folders())
_LIBRARIES: Final = tuple(os.path.join(path, "") for path in _library_folders())
_FROZEN: Final = ("<frozen ", "<__array_function__", "<attrs generated", "<eval_with_key>")
# File name -> 0 for the user's own, 1 for a library, 2 for glasshive.
_RANK: dict[str, int] = {}
_MOST_RANKS: Final = 10_000  # each cell of a notebook has a file name of its own
# What each of the user's functions and cells was warned of, while it lives.
_SEEN: Final[WeakKeyDictionary[CodeType, dict[Any, Any]]] = WeakKeyDictionary()


def _rank(file: str) -> int:
    if file.startswith(_FROZEN):
        rank = 1
    elif file.startswith("<"):  # a prompt or `python -c`
        rank = 0
    else:
        real = os.path.realpath(file)
        rank = 2 if real.startswith(_OWN) else int(real.startswith(_LIBRARIES))
    if len(_RANK) >= _MOST_RANKS:
        _RANK.clear()
    _RANK[file] = rank
    return rank


def _is_generated(frame: FrameType) -> bool:
    """Whether it is a method that `dataclass` wrote for glasshive, in a file of no name."""
    if not frame.f_code.co_filename.startswith("<"):
        return False
    module = frame.f_globals.get("__name__")
    return isinstance(module, str) and module.partition(".")[0] == __name__.partition(".")[0]


def mark() -> Mark:
    """The innermost place on the stack that is the user's own code.

    If there is none (a program that is itself an installed package), the innermost place outside
    glasshive and torch is taken; None if there is none either.
    """
    frame = sys._getframe(1)
    second: Mark = None
    while True:
        code = frame.f_code
        rank = _RANK.get(code.co_filename)
        if rank is None:
            rank = _rank(code.co_filename)
        if rank == 0 and not _is_generated(frame):
            return code, frame.f_lasti
        if rank == 1 and second is None and "torch" not in code.co_filename:
            second = code, frame.f_lasti
        back = frame.f_back
        if back is None:
            return second
        frame = back


def has_users_code(error: BaseException, handled: BaseException | None) -> bool:
    """Whether the user's own code ran where this error was raised, or one that led to it.

    `handled` was there before, and led to nothing. A user's code that is an installed package
    can't be told from libraries that we use.
    """
    one: BaseException | None = error
    seen: set[int] = set()
    while one is not None and one is not handled and id(one) not in seen:
        seen.add(id(one))
        trace = one.__traceback__
        while trace is not None:
            frame = trace.tb_frame
            if _rank(frame.f_code.co_filename) == 0 and not _is_generated(frame):
                return True
            trace = trace.tb_next
        one = one.__cause__ or (None if one.__suppress_context__ else one.__context__)
    return False


def resolve(place: Mark) -> SourceLine | None:
    """The file and line of a mark."""
    if place is None:
        return None
    code, instruction = place
    found = code.co_firstlineno
    for start, end, line in code.co_lines():
        if start <= instruction < end and line is not None:
            found = line
            break
    return SourceLine(code.co_filename, found)


def here() -> SourceLine | None:
    """The line of the user's own code that is running now."""
    return resolve(mark())


def at_line() -> str:
    """How an error begins that blames the line running now: `experiment.py:85: `, or nothing."""
    line = here()
    return f"{line}: " if line is not None else ""


def warn_here(text: str, kind: type[Warning] = UserWarning) -> None:
    """Give a warning that blames the line of the user's own code that is running now."""
    place = mark()
    line = resolve(place)
    if place is None or line is None:
        warnings.warn(text, kind, stacklevel=3)
    else:
        code, _ = place
        seen = _SEEN.setdefault(code, {})  # as Python keeps it: a loop is warned once
        warnings.warn_explicit(text, kind, line.file, line.line, registry=seen)
