"""Reading and checking a host's audit log: the files of a host, or an export on another machine.

Nothing but the host's peer id has to be known. What is found: a line that was changed, taken out,
moved, added, or written by another host, and an export that was cut, since its last line says where
it ends. What is not found without an earlier export: that the host itself, or a thief of its key,
has written another history, or has left out the newest entries before it exported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, NoReturn

from glasshive.security.audit_entry import (
    BEGINNING,
    MAX_LINE_BYTES,
    AuditExport,
    SignedEntry,
    export_line,
    read_line,
)
from glasshive.security.errors import BadAuditLog
from glasshive.security.keys import Identity, PeerId

__all__ = ["entries_in", "export_log", "log_files", "verify_export"]

_ADVICE: Final = "compare with another copy, and ask the host's owner"


def log_files(folder: Path) -> list[Path]:
    """The files of a log, oldest first."""
    return sorted(one for one in folder.glob("*.jsonl") if one.stem.isdecimal())


def entries_in(files: Sequence[Path], host: PeerId) -> Iterator[SignedEntry]:
    """The entries of the log of `host` in these files of it, checked, oldest first.

    Of a log that is being written, those whose lines are whole. Raises BadAuditLog and OSError.
    """
    chain = _Chain(host)
    for where, line in _lines_in(files):
        found = chain.read(where, line)
        if isinstance(found, AuditExport):
            _bad(where, "it ends an export, and this is a log")
        yield found


def export_log(
    folder: Path, identity: Identity, swarm: str, out: BinaryIO, now_milliseconds: int
) -> AuditExport:
    """Write the whole log of this host, checked, and where it ends, signed; that is returned.

    Raises BadAuditLog and OSError.
    """
    chain = _Chain(identity.peer_id)
    for where, line in _lines_in(log_files(folder)):
        found = chain.read(where, line)
        if isinstance(found, AuditExport) or found.swarm != swarm:
            _bad(where, f"it is no entry of swarm {swarm!r}")
        out.write(line)
    export = AuditExport(
        chain.first or 1, chain.last, chain.head, identity.peer_id, swarm, now_milliseconds
    )
    out.write(export_line(export, identity))
    return export


@dataclass(frozen=True, slots=True)
class VerifiedExport:
    """An export that holds: its last line, and the times of its first and last entry."""

    end: AuditExport
    from_milliseconds: int | None
    to_milliseconds: int | None


def verify_export(
    file: Path,
    host: PeerId,
    *,
    extends: AuditExport | None = None,
    on_entry: Callable[[SignedEntry], None] = lambda entry: None,
) -> VerifiedExport:
    """What an export of the log of `host` says, if it is whole and unchanged.

    `extends` is the end of an earlier export, which has to lie on the same chain. Raises
    BadAuditLog with the line, and OSError.
    """
    chain = _Chain(host)
    end: AuditExport | None = None
    times: list[int] = []
    met = extends is None
    where = str(file)
    for where, line in _numbered_lines(file, lambda number: f"line {number} of {file}"):
        if end is not None:
            _bad(where, "the export ends before it")
        found = chain.read(where, line)
        if isinstance(found, AuditExport):
            end = found
            continue
        times = [
            times[0] if times else found.entry.time_milliseconds,
            found.entry.time_milliseconds,
        ]
        if extends is not None:
            met = met or _meets(where, found, extends)
        on_entry(found)
    if end is None:
        _bad(where, "the export has no last line that says where it ends; its end was cut off")
    if extends is not None and not met and (end.last, end.head) != (extends.last, extends.head):
        _bad(
            str(file),
            f"it doesn't go on from the earlier export, which ends with entry {extends.last} as "
            f"{extends.head.hex()[:16]}: entries were taken out, or the history is another",
        )
    return VerifiedExport(end, *(times or (None, None)))


def _meets(where: str, found: SignedEntry, extends: AuditExport) -> bool:
    """Whether this entry shows that the chain is that of the earlier export."""
    for number, digest in ((found.number, found.digest), (found.number - 1, found.before)):
        if number == extends.last:
            if digest != extends.head:
                _bad(where, f"entry {number} is another in the earlier export: history was changed")
            return True
    return False


class _Chain:
    """Lines in order, each checked against those before."""

    def __init__(self, host: PeerId) -> None:
        self._host = host
        self._swarm: str | None = None
        self.first = 0
        self.last = 0
        self.head = BEGINNING

    def read(self, where: str, line: bytes) -> SignedEntry | AuditExport:
        """What the line says; raises BadAuditLog."""
        try:
            found = read_line(line, self._host)
        except BadAuditLog as error:
            _bad(where, str(error))
        if self._swarm not in (None, found.swarm):
            _bad(where, f"it is of swarm {found.swarm!r}, those before are of {self._swarm!r}")
        self._swarm = found.swarm
        if isinstance(found, AuditExport):
            if (found.first, found.last, found.head) != (self.first or 1, self.last, self.head):
                _bad(
                    where,
                    f"the host exported entries {found.first} to {found.last}, here are "
                    f"{self.first or 1} to {self.last}: some were taken out",
                )
            return found
        if self.last and found.number != self.last + 1:
            _bad(where, f"it is entry {found.number}, wanted {self.last + 1}")
        if not self.last and found.number == 1 and found.before != BEGINNING:
            _bad(where, "it is the first entry, and names one before it")
        if self.last and found.before != self.head:
            _bad(where, f"it doesn't follow on entry {self.last}: that is another than it names")
        self.first = self.first or found.number
        self.last, self.head = found.number, found.digest
        return found


def _lines_in(files: Sequence[Path]) -> Iterator[tuple[str, bytes]]:
    for file in files:

        def where(number: int, name: str = file.name) -> str:
            return f"line {number} of {name}"

        for place, line in _numbered_lines(file, where):
            if file == files[-1] and not line.endswith(b"\n") and len(line) <= MAX_LINE_BYTES:
                return  # it is being written
            yield place, line


def _numbered_lines(file: Path, where: Callable[[int], str]) -> Iterator[tuple[str, bytes]]:
    with file.open("rb") as opened:
        lines: Iterable[bytes] = iter(lambda: opened.readline(MAX_LINE_BYTES + 1), b"")
        for number, line in enumerate(lines, 1):
            yield where(number), line


def _bad(where: str, why: str) -> NoReturn:
    raise BadAuditLog(f"{where}: {why}; {_ADVICE}")
