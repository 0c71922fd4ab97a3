"""A host's audit log: which graph each client ran on what, signed and chained.

Rules:

1. An entry is written when a trace that was checked has ended, whatever its end. It never holds
   token ids, values, prompts, constants or paths: the graph is there as a hash.
2. It is one line of JSON. The host signs the hash of the rest of the line in an envelope, and the
   rest names the number of the entry and the hash of the one before: what is changed, left out,
   moved or taken from another host's log is found with the host's peer id alone (`audit_trail`).
3. A line counts only as this module writes it, byte for byte: there is no second way to read one.
4. A thread of its own writes, and an entry is on the disk before its place in the bounded queue is
   free. A trace takes a place before it runs. While the disk refuses, none is given: rather no
   traces than traces that nobody wrote down. What is queued is tried again.
5. Files are numbered, and go on one from another. Old ones stay: at `MAX_FILES` of
   `MAX_FILE_BYTES` the log is full, which is as a disk that is full, until the oldest are moved
   elsewhere. The newest has to stay, for the chain goes on from its last line.
6. A line that a crash cut off is removed at the next start. What ran or was queued then stands in a
   file beside, which follows every beginning and end, and is written down at the next start.

Who has the host's key can write another history. Against that helps only an earlier export that
somebody else has kept.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Final, final

from glasshive.security.audit_entry import (
    BEGINNING,
    MAX_LINE_BYTES,
    AuditEntry,
    SignedEntry,
    entries_from_bytes,
    entries_to_bytes,
    entry_line,
    read_line,
)
from glasshive.security.audit_trail import entries_in, log_files
from glasshive.security.durable_file import read_durable, write_durable
from glasshive.security.errors import BadAuditLog
from glasshive.security.keys import Identity

__all__ = ["AuditLog"]

MAX_FILE_BYTES: Final = 16 << 20
MAX_FILES: Final = 64
MAX_WAITING: Final = 1024
RETRY_SECONDS: Final = 5.0
CLOSE_SECONDS: Final = 5.0

_MAX_BATCH: Final = 256
_MAX_RUNNING_BYTES: Final = MAX_WAITING * 1024
_WARN_FROM: Final = 0.8

log = logging.getLogger(__name__)


@final
class AuditLog:
    """The log of one host in one swarm, in `folder`, which it makes.

    Goes on where it ended. Raises BadAuditLog if that can't be read or isn't of this host, and
    OSError.
    """

    def __init__(
        self,
        folder: Path,
        identity: Identity,
        swarm: str,
        *,
        max_file_bytes: int = MAX_FILE_BYTES,
        max_files: int = MAX_FILES,
        retry_seconds: float = RETRY_SECONDS,
    ) -> None:
        self.folder = folder
        self._identity = identity
        self._swarm = swarm
        self._max_file_bytes = max_file_bytes
        self._max_files = max_files
        self._retry_seconds = retry_seconds
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        files = log_files(folder)
        self._file = files[-1] if files else _numbered(folder, 1)
        self._size = _cut_to_lines(self._file) if files else 0
        self._last, self._head = self._place_in(files)
        self._lock = threading.Condition()
        self._running: dict[bytes, AuditEntry] = {}
        self._waiting = deque(self._left_over(files))
        self._changed = bool(self._waiting)  # of what runs or waits, and the file doesn't know it
        self._reserved = 0
        self._trouble = ""
        self._ending = False
        self._closing = False
        self._thread = threading.Thread(target=self._write_all, name="audit", daemon=True)
        self._thread.start()

    @property
    def trouble(self) -> str:
        """Why the last entries are not on the disk; empty if nothing is wrong."""
        return self._trouble

    def reserve(self) -> bool:
        """Whether there was a place for one entry, which is then kept for `append` or `release`."""
        with self._lock:
            taken = self._reserved + len(self._waiting)
            if self._trouble or self._ending or taken >= MAX_WAITING:
                return False
            self._reserved += 1
            return True

    def begin(self, entry: AuditEntry) -> None:
        """Have the entry written if this process is killed before its trace has ended.

        A place is reserved for it. Doesn't wait.
        """
        with self._lock:
            self._running[entry.trace_id] = entry
            self._changed = True
            self._lock.notify_all()

    def append(self, entry: AuditEntry) -> None:
        """Have the entry written, in a place that was reserved. Doesn't wait."""
        with self._lock:
            self._reserved -= 1
            self._changed |= self._running.pop(entry.trace_id, None) is not None
            self._waiting.append(entry)
            self._lock.notify_all()

    def release(self) -> None:
        """Give a reserved place back."""
        with self._lock:
            self._reserved -= 1
            self._lock.notify_all()

    def close(self) -> None:
        """Give no more places, await what has one, and write it, each within `CLOSE_SECONDS`.

        What couldn't be written, or has not come, is counted in the host's own log; the next start
        knows of what has begun.
        """
        with self._lock:
            self._ending = True
            self._lock.wait_for(lambda: not self._reserved, CLOSE_SECONDS)
            self._closing = True
            self._lock.notify_all()
        self._thread.join(CLOSE_SECONDS)
        if left := len(self._waiting) + self._reserved:
            log.error("audit_entries_unwritten", extra={"entries": left})

    # On the thread ------------------------------------------------------------------------------

    def _write_all(self) -> None:
        while True:
            with self._lock:
                self._lock.wait_for(lambda: self._waiting or self._changed or self._closing)
                waiting, changed = list(self._waiting), self._changed
                batch = waiting[:_MAX_BATCH]
                running = [*waiting[_MAX_BATCH:], *self._running.values()]
                self._changed = False
            if not batch and not changed:
                return
            try:
                if batch:
                    self._write(batch)
                    with self._lock:
                        for _ in batch:
                            self._waiting.popleft()
                if changed:
                    write_durable(self._beside, entries_to_bytes(running))
            except OSError as error:
                why = str(error)
                if why != self._trouble:
                    log.error("audit_log_not_written", extra={"error": why})
                with self._lock:
                    self._changed |= changed
                    self._trouble = why
                    if self._closing:
                        return
                    self._lock.wait_for(lambda: self._closing, self._retry_seconds)
            else:
                with self._lock:
                    self._trouble = ""

    def _write(self, batch: Sequence[AuditEntry]) -> None:
        """All of the batch is on the disk, or an OSError is raised and none of it counts."""
        number, head, lines = self._last, self._head, b""
        for entry in batch:
            number += 1
            line, head = entry_line(entry, number, head, self._identity, self._swarm)
            lines += line
        if self._size and self._size + len(lines) > self._max_file_bytes:
            self._next_file()
        self._append(lines)
        self._size += len(lines)
        self._last, self._head = number, head

    def _append(self, data: bytes) -> None:
        new = not self._file.exists()
        descriptor = os.open(self._file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            size = os.fstat(descriptor).st_size
            if size < self._size:
                raise OSError(errno.EIO, f"{self._file} was cut; restore it from a copy")
            if size > self._size:  # what is left of a try that failed
                os.ftruncate(descriptor, self._size)
            left = memoryview(data)
            while left:
                left = left[os.write(descriptor, left) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if new and os.name == "posix":
            folder = os.open(self.folder, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def _next_file(self) -> None:
        n_files = len(log_files(self.folder))
        if n_files >= self._max_files:
            raise OSError(
                errno.ENOSPC,
                f"the audit log is full: {n_files} files in {self.folder}; move the oldest "
                "elsewhere, and leave the newest",
            )
        if n_files + 1 >= _WARN_FROM * self._max_files:
            log.warning("audit_log_nearly_full", extra={"files": n_files + 1})
        self._file = _numbered(self.folder, int(self._file.stem) + 1)
        self._size = 0

    # At the start -------------------------------------------------------------------------------

    def _place_in(self, files: Sequence[Path]) -> tuple[int, bytes]:
        """The number and the hash of the last entry."""
        for file in reversed(files):
            line = _last_line(file)
            if line:
                return self._place_of(line, file)
        return 0, BEGINNING

    def _left_over(self, files: Sequence[Path]) -> list[AuditEntry]:
        """What ran or waited when the last process was killed, unless it was written down yet."""
        try:
            data = read_durable(self._beside, _MAX_RUNNING_BYTES)
            found = entries_from_bytes(data, _MAX_RUNNING_BYTES) if data else []
        except (BadAuditLog, ValueError) as error:
            raise _unusable(self._beside, str(error)) from None
        if not found:
            return []
        log.warning("audit_traces_killed", extra={"traces": len(found)})
        # An id is a client's choice, who may use it again: an end is not before its beginning.
        ended = {
            one.entry.trace_id: one.entry.time_milliseconds
            for one in entries_in(files[-2:], self._identity.peer_id)
        }
        return [one for one in found if ended.get(one.trace_id, -1) < one.time_milliseconds]

    @property
    def _beside(self) -> Path:
        return self.folder / "running"

    def _place_of(self, line: bytes, file: Path) -> tuple[int, bytes]:
        try:
            found = read_line(line, self._identity.peer_id)
        except BadAuditLog as error:
            raise _unusable(file, f"its last line: {error}") from None
        if not isinstance(found, SignedEntry) or found.swarm != self._swarm:
            raise _unusable(file, f"its last line is no entry of swarm {self._swarm!r}")
        return found.number, found.digest


def _numbered(folder: Path, number: int) -> Path:
    return folder / f"{number:06}.jsonl"


def _cut_to_lines(file: Path) -> int:
    """The size of the file, without a last line that a crash has cut off."""
    size = file.stat().st_size
    with file.open("r+b") as opened:
        opened.seek(max(size - MAX_LINE_BYTES, 0))
        tail = opened.read()
        torn = len(tail) - (tail.rfind(b"\n") + 1)
        if torn == 0:
            return size
        if torn == len(tail) and len(tail) < size:
            raise _unusable(file, f"its last line has more than {MAX_LINE_BYTES} bytes")
        log.warning("audit_log_torn", extra={"file": file.name, "bytes": torn})
        opened.truncate(size - torn)
        os.fsync(opened.fileno())
    return size - torn


def _last_line(file: Path) -> bytes:
    """The last line of a file whose lines are whole; empty if it has none."""
    with file.open("rb") as opened:
        opened.seek(max(file.stat().st_size - 2 * MAX_LINE_BYTES, 0))
        whole, newline, _ = opened.read().rpartition(b"\n")
        return whole.rpartition(b"\n")[2] + newline


def _unusable(file: Path, why: str) -> BadAuditLog:
    return BadAuditLog(
        f"can't go on with the audit log: {file}: {why}; restore it from a copy, "
        "or move the whole folder elsewhere and begin a new log"
    )
