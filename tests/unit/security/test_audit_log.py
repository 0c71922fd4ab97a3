"""A host's audit log: what is written, what survives, and what a changed copy can't hide."""

from __future__ import annotations

import errno
import json
import logging
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from hostile import attack
from soak import count

from glasshive.security import audit_entry, audit_log
from glasshive.security.audit_entry import (
    AuditEntry,
    AuditExport,
    SignedEntry,
    entries_from_bytes,
    entries_to_bytes,
    entry_line,
)
from glasshive.security.audit_log import AuditLog
from glasshive.security.audit_trail import entries_in, export_log, log_files, verify_export
from glasshive.security.errors import BadAuditLog
from glasshive.security.keys import Identity

HOST, OTHER, CLIENT = (Identity(bytes([number]) * 32) for number in range(1, 4))
NOW = 1_700_000_000_000


def entry(number: int = 1, **changes: Any) -> AuditEntry:
    fields: dict[str, Any] = {
        "time_milliseconds": NOW + number,
        "client": CLIENT.peer_id,
        "role": "client",
        "invite": b"i" * 16,
        "trace_id": number.to_bytes(16, "big"),
        "model_id": "ab" * 32,
        "dtype": "bfloat16",
        "blocks": "0:10",
        "graph_sha256": bytes([number % 256]) * 32,
        "nodes": 7,
        "outcome": "done",
        "compute_milliseconds": 1234,
        "saved_bytes": 4096,
    }
    return AuditEntry(**(fields | changes))


def write(log: AuditLog, *entries: AuditEntry) -> None:
    for one in entries:
        assert log.reserve()
        log.append(one)


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        threading.Event().wait(0.002)


def written(folder: Path, host: Identity = HOST) -> list[AuditEntry]:
    return [one.entry for one in entries_in(log_files(folder), host.peer_id)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "audit"


@pytest.fixture
def logs(folder: Path) -> Iterator[Callable[..., AuditLog]]:
    """Makes logs in the folder, and closes them."""
    made: list[AuditLog] = []

    def make(identity: Identity = HOST, swarm: str = "lab", **changes: Any) -> AuditLog:
        made.append(AuditLog(folder, identity, swarm, **changes))
        return made[-1]

    yield make
    for one in made:
        one.close()


Logs = Callable[..., AuditLog]


# Writing ----------------------------------------------------------------------------------------


def test_entries_are_read_as_they_were_written(logs: Logs, folder: Path) -> None:
    log = logs()
    entries = [entry(1), entry(2, role="", invite=b"", outcome="TraceEnded"), entry(3)]
    write(log, *entries)
    log.close()
    assert written(folder) == entries
    assert [one.number for one in entries_in(log_files(folder), HOST.peer_id)] == [1, 2, 3]
    (file,) = log_files(folder)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_line_says_all_in_words_and_is_chained(logs: Logs, folder: Path) -> None:
    log = logs()
    write(log, entry(1), entry(2))
    log.close()
    first, second = [json.loads(line) for line in log_files(folder)[0].read_text().splitlines()]
    assert list(first) == [
        *("entry", "time_milliseconds", "host", "swarm", "client", "role", "invite", "trace"),
        *("model", "dtype", "blocks", "graph_sha256", "nodes", "outcome"),
        *("compute_milliseconds", "saved_bytes", "before", "signed"),
    ]
    assert (first["entry"], first["host"], first["swarm"]) == (1, HOST.peer_id, "lab")
    assert first["before"] == "00" * 32
    assert second["before"] not in (first["before"], "")


def test_a_restart_goes_on_with_the_chain(logs: Logs, folder: Path) -> None:
    for number in range(1, 5):
        log = logs()
        write(log, entry(number))
        log.close()
    assert written(folder) == [entry(number) for number in range(1, 5)]


def test_files_go_on_one_from_another_and_stay(logs: Logs, folder: Path) -> None:
    log = logs(max_file_bytes=2500)
    for number in range(1, 8):
        write(log, entry(number))
        until(lambda: not log._waiting)
    log.close()
    assert [file.name for file in log_files(folder)] == [f"00000{n}.jsonl" for n in range(1, 5)]
    assert all(file.stat().st_size <= 2500 for file in log_files(folder))
    assert written(folder) == [entry(number) for number in range(1, 8)]
    (folder / "000001.jsonl").rename(folder.parent / "old")  # what an owner may do
    log = logs(max_file_bytes=2500)
    write(log, entry(8))
    log.close()
    assert written(folder) == [entry(number) for number in range(3, 9)]


def test_nobody_waits_for_the_disk_but_the_thread(
    logs: Logs, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = threading.Event()
    writers: set[str] = set()
    synced: list[int] = []
    sync = os.fsync

    def slow(descriptor: int) -> None:
        writers.add(threading.current_thread().name)
        assert disk.wait(20)
        sync(descriptor)
        if stat.S_ISREG((status := os.fstat(descriptor)).st_mode):
            synced.append(status.st_size)

    monkeypatch.setattr(audit_log.os, "fsync", slow)
    log = logs()
    write(log, *map(entry, range(1, 50)))
    assert len(log._waiting) > 0
    disk.set()
    until(lambda: not log._waiting)
    (file,) = log_files(folder)
    assert synced[-1] == file.stat().st_size  # before a place is free
    assert writers == {"audit"}


# What is refused --------------------------------------------------------------------------------


def test_places_are_bounded_and_come_back(logs: Logs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_log, "MAX_WAITING", 2)
    log = logs()
    assert log.reserve()
    assert log.reserve()
    assert not log.reserve()
    log.append(entry(1))
    until(log.reserve)  # it is on the disk
    assert not log.reserve()
    log.release()
    assert log.reserve()
    log.release()
    log.release()
    log.close()
    assert not log.reserve()


def test_closing_awaits_those_who_have_a_place(
    logs: Logs, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log = logs()
    assert log.reserve()
    closing = threading.Thread(target=log.close)
    closing.start()
    until(lambda: log._ending)
    assert not log.reserve()
    log.append(entry(1))
    closing.join(20)
    assert written(folder) == [entry(1)]
    monkeypatch.setattr(audit_log, "CLOSE_SECONDS", 0.01)
    log = logs()
    assert log.reserve()
    log.close()  # whoever has it doesn't come
    (lost,) = [one for one in caplog.records if one.message == "audit_entries_unwritten"]
    assert lost.__dict__["entries"] == 1
    log.release()


def test_a_full_disk_gives_no_places_and_loses_nothing(
    logs: Logs, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    full = threading.Event()
    write_some = os.write

    def half(descriptor: int, data: Any) -> int:
        if not full.is_set():
            return write_some(descriptor, data)
        if len(data) < 100:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_some(descriptor, data[: len(data) // 2])

    monkeypatch.setattr(audit_log.os, "write", half)
    log = logs(retry_seconds=0.01)
    write(log, entry(1))
    until(lambda: not log._waiting)
    full.set()
    with caplog.at_level(logging.ERROR):
        write(log, entry(2))
        until(lambda: bool(log.trouble))
        assert not log.reserve()
    assert log.trouble == f"[Errno 28] {os.strerror(errno.ENOSPC)}"
    assert caplog.text.count("audit_log_not_written") == 1
    full.clear()
    until(log.reserve)
    log.append(entry(3))
    log.close()
    assert written(folder) == [entry(1), entry(2), entry(3)]  # and nothing of the halves


def test_a_full_log_is_as_a_full_disk_until_old_files_are_moved(
    logs: Logs, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = logs(max_file_bytes=1000, max_files=2, retry_seconds=0.01)
    with caplog.at_level(logging.WARNING):
        for number in (1, 2):
            write(log, entry(number))
            until(lambda: not log._waiting)
        assert "audit_log_nearly_full" in caplog.text
        write(log, entry(3))
        until(lambda: bool(log.trouble))
    assert log.trouble == (
        f"[Errno 28] the audit log is full: 2 files in {folder}; move the oldest elsewhere, and "
        "leave the newest"
    )
    assert not log.reserve()
    (folder / "000001.jsonl").rename(folder.parent / "old")
    until(lambda: not log._waiting)
    assert written(folder) == [entry(2), entry(3)]


def test_entries_that_cant_be_written_at_the_end_are_counted(
    logs: Logs, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    log = logs(retry_seconds=60)
    monkeypatch.setattr(audit_log.os, "fsync", full)
    write(log, entry(1), entry(2))
    log.close()
    (lost,) = [one for one in caplog.records if one.message == "audit_entries_unwritten"]
    assert lost.__dict__["entries"] == 2


def test_a_log_that_is_cut_while_it_is_written_takes_no_more(logs: Logs, folder: Path) -> None:
    log = logs(retry_seconds=0.01)
    write(log, entry(1))
    until(lambda: not log._waiting)
    (file,) = log_files(folder)
    file.write_bytes(b"")
    write(log, entry(2))
    until(lambda: bool(log.trouble))
    assert log.trouble == f"[Errno 5] {file} was cut; restore it from a copy"


# At the start -----------------------------------------------------------------------------------


def test_a_line_that_a_crash_cut_off_is_removed(
    logs: Logs, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = logs()
    write(log, entry(1), entry(2))
    log.close()
    (file,) = log_files(folder)
    whole = file.read_bytes()
    first = whole.index(b"\n") + 1
    for left, entries in ((len(whole) - 1, [1]), (first + 1, [1]), (first, [1]), (7, [])):
        file.write_bytes(whole[:left])
        assert written(folder) == [entry(number) for number in entries]
        logs().close()
        assert file.read_bytes() == whole[: first * len(entries)]
    assert caplog.text.count("audit_log_torn") == 3


def beside(folder: Path) -> list[AuditEntry]:
    """What stands beside the log, since it runs or waits."""
    file = folder / "running"
    return entries_from_bytes(file.read_bytes(), 1 << 20) if file.exists() else []


def test_traces_that_a_kill_ended_are_written_at_the_next_start(logs: Logs, folder: Path) -> None:
    log = logs()
    for number in (1, 2):
        assert log.reserve()
        log.begin(entry(number, outcome="killed"))
    log.append(entry(1))
    until(lambda: beside(folder) == [entry(2, outcome="killed")])
    for _ in range(2):  # and once
        again = logs()
        until(lambda: written(folder) == [entry(1), entry(2, outcome="killed")])
        again.close()
        assert beside(folder) == []
    log.release()


def test_what_was_written_before_the_kill_is_not_written_twice(logs: Logs, folder: Path) -> None:
    log = logs()
    write(log, entry(1, time_milliseconds=NOW))
    log.close()
    known = entry(1, time_milliseconds=NOW - 5, outcome="killed")
    waited = entry(1, time_milliseconds=NOW)
    # Who has a trace of the same id later doesn't hide that one.
    reused = entry(1, time_milliseconds=NOW + 1, outcome="killed")
    (folder / "running").write_bytes(entries_to_bytes([known, waited, reused]))
    (folder / "running").chmod(0o600)
    logs().close()
    assert written(folder) == [entry(1, time_milliseconds=NOW), reused]


def test_a_disk_that_refuses_what_runs_gives_no_places_and_nothing_comes_twice(
    logs: Logs, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(place: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    log = logs(retry_seconds=0.01)
    assert log.reserve()
    log.begin(entry(1, outcome="killed"))
    until(lambda: len(beside(folder)) == 1)
    with monkeypatch.context() as patch:
        patch.setattr(audit_log, "write_durable", full)
        log.append(entry(1))
        until(lambda: bool(log.trouble))
        assert not log.reserve()
    until(lambda: not log.trouble)
    log.close()
    assert written(folder) == [entry(1)]
    assert beside(folder) == []


def test_what_stands_beside_and_is_damaged_is_said(logs: Logs, folder: Path) -> None:
    logs().close()
    good = entries_to_bytes([entry(1)])
    for data in (good[:-1], b"\x91\x91\x01", b"\x01"):
        (folder / "running").write_bytes(data)
        (folder / "running").chmod(0o600)
        with pytest.raises(BadAuditLog, match=r"can't go on with the audit log: .*running: "):
            logs()
    assert (
        attack(
            lambda data: entries_from_bytes(data, 1 << 20),
            [good],
            BadAuditLog,
            tries=count(5_000, 200_000),
        )
        < 5_000
    )


@pytest.mark.parametrize(
    ("identity", "swarm", "why"),
    [
        (OTHER, "lab", f"its last line: it is of the host {HOST.peer_id}, wanted {OTHER.peer_id}"),
        (HOST, "other", "its last line is no entry of swarm 'other'"),
    ],
)
def test_a_log_of_another_host_or_swarm_isnt_gone_on_with(
    logs: Logs, folder: Path, identity: Identity, swarm: str, why: str
) -> None:
    log = logs()
    write(log, entry(1))
    log.close()
    with pytest.raises(BadAuditLog) as caught:
        logs(identity, swarm)
    assert str(caught.value) == (
        f"can't go on with the audit log: {folder / '000001.jsonl'}: {why}; "
        "restore it from a copy, or move the whole folder elsewhere and begin a new log"
    )


def test_a_log_that_ends_in_something_else_isnt_gone_on_with(logs: Logs, folder: Path) -> None:
    folder.mkdir()
    file = folder / "000001.jsonl"
    for data in (b"{}\n", b"x" * 5000):
        file.write_bytes(data)
        with pytest.raises(BadAuditLog, match="can't go on with the audit log"):
            logs()
        assert file.read_bytes() == data


# Exports ----------------------------------------------------------------------------------------


@pytest.fixture
def lines(logs: Logs, folder: Path) -> list[bytes]:
    """The lines of an export of four entries."""
    log = logs(max_file_bytes=2500)
    for number in range(1, 5):
        write(log, entry(number))
        until(lambda: not log._waiting)
    log.close()
    return exported(folder)


def exported(folder: Path, host: Identity = HOST, now: int = NOW) -> list[bytes]:
    out = BytesIO()
    export_log(folder, host, "lab", out, now)
    return out.getvalue().splitlines(keepends=True)


def verified(tmp_path: Path, lines: list[bytes], **more: Any) -> AuditExport:
    file = tmp_path / "export.jsonl"
    file.write_bytes(b"".join(lines))
    return verify_export(file, more.pop("host", HOST.peer_id), **more).end


def fault(tmp_path: Path, lines: list[bytes], **more: Any) -> str:
    """What is wrong with an export, without the name of the file."""
    with pytest.raises(BadAuditLog) as caught:
        verified(tmp_path, lines, **more)
    text = str(caught.value)
    assert text.endswith("; compare with another copy, and ask the host's owner")
    return text.replace(f" of {tmp_path / 'export.jsonl'}", "").rpartition("; compare")[0]


def test_an_export_is_verified_with_the_peer_id_alone(lines: list[bytes], tmp_path: Path) -> None:
    seen: list[SignedEntry] = []
    end = verified(tmp_path, lines, on_entry=seen.append)
    assert (end.first, end.last, end.swarm, end.time_milliseconds) == (1, 4, "lab", NOW)
    assert [one.entry for one in seen] == [entry(number) for number in range(1, 5)]
    assert end.head == seen[-1].digest
    found = verify_export(tmp_path / "export.jsonl", HOST.peer_id)
    assert (found.from_milliseconds, found.to_milliseconds) == (NOW + 1, NOW + 4)


def test_an_empty_log_is_exported_too(logs: Logs, folder: Path, tmp_path: Path) -> None:
    logs()
    end = verified(tmp_path, exported(folder))
    assert (end.first, end.last) == (1, 0)


CHANGES = {
    "entry": 9, "time_milliseconds": NOW, "host": OTHER.peer_id, "swarm": "other",
    "client": OTHER.peer_id, "role": "admin", "invite": "", "trace": "00" * 16, "model": "cd" * 32,
    "dtype": "float32", "blocks": "0:11", "graph_sha256": "ff" * 32, "nodes": 8, "outcome": "Busy",
    "compute_milliseconds": 0, "saved_bytes": 0, "before": "11" * 32,
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_field_is_found(lines: list[bytes], tmp_path: Path, name: str) -> None:
    said = json.loads(lines[1])
    assert said[name] != CHANGES[name]
    lines[1] = audit_entry._written(said | {name: CHANGES[name]}) + b"\n"
    assert fault(tmp_path, lines).startswith("line 2: ")
    reason = {
        "host": f"it is of the host {OTHER.peer_id}, wanted {HOST.peer_id}",
        "swarm": "its signature doesn't hold: got a message for swarm 'lab', this is 'other'",
    }.get(name, "it is not what the host has signed")
    assert fault(tmp_path, lines) == f"line 2: {reason}"


def test_all_fields_of_an_entry_are_among_those_changes() -> None:
    assert {*CHANGES, "signed"} == set(audit_entry._ENTRY_FIELDS)


@pytest.mark.parametrize("name", ["export", "first", "head", "time_milliseconds"])
def test_a_changed_end_is_found(lines: list[bytes], tmp_path: Path, name: str) -> None:
    said = json.loads(lines[-1])
    changed = said[name][::-1] if name == "head" else said[name] - 1
    lines[-1] = audit_entry._written(said | {name: changed}) + b"\n"
    assert fault(tmp_path, lines) == "line 5: it is not what the host has signed"


def test_removed_reordered_and_repeated_entries_are_found(
    lines: list[bytes], tmp_path: Path
) -> None:
    assert fault(tmp_path, [lines[0], *lines[2:]]) == "line 2: it is entry 3, wanted 2"
    assert fault(tmp_path, [lines[1], lines[0], *lines[2:]]) == "line 2: it is entry 1, wanted 3"
    assert fault(tmp_path, [lines[0], *lines]) == "line 2: it is entry 1, wanted 2"
    exported = "the host exported entries 1 to 4, here are"
    assert fault(tmp_path, lines[1:]) == f"line 4: {exported} 2 to 4: some were taken out"
    assert fault(tmp_path, [*lines[:3], lines[-1]]) == (
        f"line 4: {exported} 1 to 3: some were taken out"
    )
    assert fault(tmp_path, [lines[-1]]) == f"line 1: {exported} 1 to 0: some were taken out"


def test_a_cut_end_is_found(lines: list[bytes], tmp_path: Path) -> None:
    cut = "the export has no last line that says where it ends; its end was cut off"
    for n in range(1, len(lines)):
        assert fault(tmp_path, lines[:n]) == f"line {n}: {cut}"
    assert fault(tmp_path, []).endswith(cut)
    assert fault(tmp_path, [*lines[:2], lines[2][:-9]]) == (
        "line 3: it is cut off, or no line of an audit log"
    )
    assert fault(tmp_path, [*lines, lines[0]]) == "line 6: the export ends before it"


def test_entries_of_another_host_are_found(
    lines: list[bytes], tmp_path: Path, folder: Path
) -> None:
    log = AuditLog(tmp_path / "other", OTHER, "lab")
    write(log, *map(entry, range(1, 5)))
    log.close()
    other = exported(tmp_path / "other", OTHER)
    whose = f"it is of the host {OTHER.peer_id}, wanted {HOST.peer_id}"
    assert fault(tmp_path, [lines[0], other[1], *lines[2:]]) == f"line 2: {whose}"
    assert fault(tmp_path, [*lines[:-1], other[-1]]) == f"line 5: {whose}"
    # Its owner may write this host's name into it, and sign again.
    said = json.loads(lines[1])
    del said["signed"]
    forged = audit_entry._signed(said, "audit-entry", OTHER, "lab")[0]
    assert fault(tmp_path, [lines[0], forged, *lines[2:]]) == (
        f"line 2: it is signed by {OTHER.peer_id}, wanted {HOST.peer_id}"
    )
    assert fault(tmp_path, lines, host=OTHER.peer_id).startswith("line 1: it is of the host")


def test_entries_of_another_swarm_or_history_of_the_host_are_found(
    lines: list[bytes], tmp_path: Path
) -> None:
    elsewhere, _ = entry_line(entry(2), 2, bytes(32), HOST, "elsewhere")
    assert fault(tmp_path, [lines[0], elsewhere, *lines[2:]]) == (
        "line 2: it is of swarm 'elsewhere', those before are of 'lab'"
    )
    other, _ = entry_line(entry(2), 2, bytes(32), HOST, "lab")
    assert fault(tmp_path, [lines[0], other, *lines[2:]]) == (
        "line 2: it doesn't follow on entry 1: that is another than it names"
    )
    first, _ = entry_line(entry(1), 1, b"1" * 32, HOST, "lab")
    assert fault(tmp_path, [first, *lines[1:]]) == (
        "line 1: it is the first entry, and names one before it"
    )


def test_a_line_counts_only_as_it_is_written(lines: list[bytes], tmp_path: Path) -> None:
    """A second way to write a line could say one thing to our reader and another to others."""
    good = lines[1]
    twice = good.replace(b'"nodes":7', b'"nodes":8,"nodes":7')
    spaced = good.replace(b":", b": ", 1)
    more = good.replace(b'"nodes"', b'"note":"x","nodes"')
    crlf = good.replace(b"\n", b"\r\n")
    for line in (twice, spaced, more, crlf, b"\n", b"[]\n", b"[" * 3000 + b"\n", b"1" * 5000):
        assert fault(tmp_path, [lines[0], line, *lines[2:]]).startswith("line 2: it ")


def test_text_from_a_host_can_do_nothing_to_a_terminal(tmp_path: Path) -> None:
    for changes in ({"outcome": "\x1b[2J"}, {"role": "x" * 129}, {"nodes": -1}, {"nodes": True}):
        line, _ = entry_line(entry(1, **changes), 1, bytes(32), HOST, "lab")
        assert fault(tmp_path, [line]).startswith("line 1: a ")


def test_a_later_export_goes_on_from_an_earlier(
    lines: list[bytes], tmp_path: Path, logs: Logs, folder: Path
) -> None:
    earlier = verified(tmp_path, lines)
    assert verified(tmp_path, lines, extends=earlier) == earlier  # nothing has come
    log = logs()
    write(log, entry(5), entry(6))
    log.close()
    later = exported(folder)
    assert verified(tmp_path, later, extends=earlier).last == 6
    log_files(folder)[0].unlink()  # of entries 1 and 2
    assert verified(tmp_path, exported(folder), extends=earlier).first > 1


def test_a_host_that_takes_entries_back_is_found_by_an_earlier_export(
    lines: list[bytes], tmp_path: Path, logs: Logs, folder: Path
) -> None:
    earlier = verified(tmp_path, lines)
    for file in log_files(folder):
        file.unlink()
    log = logs()
    write(log, *map(entry, range(1, 4)))
    log.close()
    shorter = exported(folder)
    verified(tmp_path, shorter)  # alone it is whole
    assert fault(tmp_path, shorter, extends=earlier) == (
        f"{tmp_path / 'export.jsonl'}: it doesn't go on from the earlier export, which ends with "
        f"entry 4 as {earlier.head.hex()[:16]}: entries were taken out, or the history is another"
    )
    log = logs()
    write(log, entry(4, outcome="Busy"), entry(5))
    log.close()
    assert fault(tmp_path, exported(folder), extends=earlier) == (
        "line 4: entry 4 is another in the earlier export: history was changed"
    )


def test_a_damaged_log_is_not_exported(lines: list[bytes], folder: Path) -> None:
    file = log_files(folder)[0]
    file.write_bytes(file.read_bytes().replace(b'"nodes":7', b'"nodes":8', 1))
    with pytest.raises(BadAuditLog, match=r"line 1 of 000001.jsonl: it is not what the host"):
        exported(folder)


def test_no_changed_line_is_read_as_another() -> None:
    line, _ = entry_line(entry(1), 1, bytes(32), HOST, "lab")
    expected = audit_entry.read_line(line, HOST.peer_id)

    def as_before(changed: bytes) -> None:
        assert audit_entry.read_line(changed, HOST.peer_id) == expected

    tries = count(10_000, 500_000)
    assert attack(as_before, [line], BadAuditLog, trees=False, tries=tries) < tries / 50
