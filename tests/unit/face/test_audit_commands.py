"""`glasshive audit`, and quotas in `invite`, `quota` and `members`."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from glasshive import cli
from glasshive.audit_commands import show
from glasshive.graph.errors import GlasshiveError
from glasshive.host_accounts import AuditLogError, audit_folder, open_accounts
from glasshive.security.audit_entry import AuditEntry
from glasshive.security.audit_log import AuditLog
from glasshive.security.audit_trail import log_files
from glasshive.security.errors import BadAuditLog, BadInvite, KeyFileError, NotAMember
from glasshive.security.invite_book import InviteBook
from glasshive.security.invites import Invite, join_request
from glasshive.security.keys import Identity
from glasshive.security.quota import MAX_QUOTA, Quota
from glasshive.settings import ConfigError, Settings, data_dir, load_settings
from glasshive.swarm_members import book_path

NOW = 1_700_000_000_000
ALICE, BOB = (Identity(bytes([number]) * 32) for number in (3, 4))


@contextlib.contextmanager
def logging_as_before() -> Iterator[None]:
    """Inside it, a command may set up logging to what is closed when it has ended."""
    root, ours = logging.getLogger(), logging.getLogger("glasshive")
    before = list(root.handlers), root.level, ours.level
    yield
    root.handlers[:] = before[0]
    root.setLevel(before[1])
    ours.setLevel(before[2])


@pytest.fixture(autouse=True)
def _own_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    for name in [one for one in os.environ if one.startswith("GLASSHIVE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GLASSHIVE_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.chdir(tmp_path)
    with logging_as_before():
        yield


def run(*arguments: object) -> str:
    """What a command prints on standard output; it must end well."""
    done = CliRunner().invoke(cli.app, [str(one) for one in arguments])
    if done.exception is not None:
        raise AssertionError(done.output) from done.exception
    return done.stdout


def refused(*arguments: object, kind: type[Exception]) -> str:
    """The text of the error that a command ends with."""
    done = CliRunner().invoke(cli.app, [str(one) for one in arguments])
    assert type(done.exception) is kind, done.output
    assert isinstance(done.exception, GlasshiveError)
    return str(done.exception)


def wrong_usage(*arguments: object) -> str:
    done = CliRunner().invoke(cli.app, [str(one) for one in arguments])
    assert done.exit_code == 2, done.output
    return " ".join(done.output.replace("│", " ").split())


# Quotas -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a private swarm called lab."""
    place = tmp_path_factory.mktemp("swarms") / "lab"
    passphrase = place.with_name("passphrase")
    passphrase.write_text("correct horse battery staple\n")
    passphrase.chmod(0o600)
    with logging_as_before():
        done = CliRunner().invoke(
            cli.app, ["swarm", "init", str(place), "--passphrase-file", str(passphrase)]
        )
    assert done.exception is None, done.output
    return place


@pytest.fixture
def lab(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "lab"))


def book_of(lab: Path) -> InviteBook:
    key = lab / "keys/bootstrap.key"
    return InviteBook(book_path(key), Identity.load_or_create(key), "lab")


def joined(lab: Path, token: str, who: Identity, number: int = 1) -> Quota:
    """The quota in the certificate of who joins by it."""
    book, now = book_of(lab), time.time()
    invite = Invite.parse(token, now)
    request = join_request(invite, who, request_id=number.to_bytes(16, "big"), now=now)
    return invite.check_certificate(book.join(request, now), who.peer_id, now).quota


def test_an_invite_gives_a_quota_that_members_shows(lab: Path) -> None:
    token = run(
        "invite", "client", "--traces=4", "--seconds-a-day", "3600", "--saved-bytes-a-day=10GB",
        "--folder=lab",
    ).splitlines()[-1]  # fmt: skip
    assert joined(lab, token, ALICE) == Quota(4, 3600, 10**10)
    said = "4 traces at a time, 3,600 s a day, 10,000,000,000 saved bytes a day"
    assert run("members", "--folder=lab").count(said) == 2  # of the member, and of the invite
    rows = json.loads(run("members", "--folder=lab", "--json"))
    quota = {"traces": 4, "seconds_a_day": 3600, "saved_bytes_a_day": 10**10}
    assert [one["quota"] for one in (*rows["members"], *rows["invites"])] == [quota, quota]


def test_members_cuts_nothing_at_80_characters(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Failed with "10,000,000,..." and "e2a930b313..."."""
    monkeypatch.setenv("COLUMNS", "80")
    token = run(
        "invite", "client", "--traces=4", "--seconds-a-day", "3600", "--saved-bytes-a-day=10GB",
        "--folder=lab",
    ).splitlines()[-1]  # fmt: skip
    joined(lab, token, ALICE)
    said = run("members", "--folder=lab")
    assert said.count("10,000,000,000") == 2
    assert said.count(Invite.parse(token, time.time()).invite_id.hex()[:8]) == 2
    assert f"…{ALICE.peer_id[-8:]}" in said
    assert said.count("…") == 1


def test_an_invite_without_one_says_so(lab: Path) -> None:
    done = CliRunner().invoke(cli.app, ["invite", "admin", "--folder=lab", "--traces=none"])
    assert "Quota of each key on each host: no limit." in done.stderr
    assert joined(lab, done.stdout.strip(), ALICE) == Quota()


def test_a_host_has_no_quota(lab: Path) -> None:
    text = refused("invite", "host", "--traces=4", "--folder=lab", kind=BadInvite)
    assert "hosts run no traces" in text


def test_a_quota_is_changed_number_by_number(lab: Path) -> None:
    token = run("invite", "client", "--traces=4", "--seconds-a-day=60", "--folder=lab").strip()
    joined(lab, token, ALICE)
    end = f"…{ALICE.peer_id[-8:]}"  # as `members` shows it
    assert end in run("members", "--folder=lab")
    said = run("quota", end, "--traces=none", "--saved-bytes-a-day", "5 MiB", "--folder=lab")
    assert f"{ALICE.peer_id}, client by the invite " in said
    assert ": 60 s a day, 5,242,880 saved bytes a day\n" in said
    assert said.endswith(
        "it stands in the member's next certificate, which it gets within a day; until then the "
        "one that it has counts. Each host counts for itself\n"
    )
    assert joined(lab, token, ALICE, 2) == Quota(None, 60, 5 << 20)


@pytest.mark.parametrize(
    ("option", "text", "wanted"),
    [
        ("--traces", "many", "a whole number such as 4"),
        ("--traces", "-1", "a whole number such as 4"),
        ("--seconds-a-day", "1.5", "a whole number such as 3600"),
        ("--seconds-a-day", str(MAX_QUOTA + 1), "a whole number such as 3600"),
        ("--saved-bytes-a-day", "10 apples", "bytes, such as 5000000 or 10GB"),
        ("--saved-bytes-a-day", "99999PB", "bytes, such as 5000000 or 10GB"),
    ],
)
def test_what_is_no_quota_is_wrong_usage(lab: Path, option: str, text: str, wanted: str) -> None:
    for command in (("invite", "client"), ("quota", ALICE.peer_id)):
        said = wrong_usage(*command, f"{option}={text}", "--folder=lab")
        assert f"got {text!r}, wanted {wanted}, at most {MAX_QUOTA}; or none" in said
        assert option in said


def test_a_quota_needs_a_member_and_a_change(lab: Path) -> None:
    assert "name what to change: --traces" in wrong_usage("quota", ALICE.peer_id, "--folder=lab")
    refused("quota", ALICE.peer_id, "--traces=1", "--folder=lab", kind=NotAMember)


# The audit log ----------------------------------------------------------------------------------


def entry(number: int, client: Identity = ALICE) -> AuditEntry:
    return AuditEntry(
        time_milliseconds=NOW + 60_000 * number,
        client=client.peer_id,
        role="client",
        invite=b"i" * 16,
        trace_id=number.to_bytes(16, "big"),
        model_id="ab" * 32,
        dtype="bfloat16",
        blocks="0:10",
        graph_sha256=bytes([number]) * 32,
        nodes=7,
        outcome="done" if number % 2 else "QuotaExceeded",
        compute_milliseconds=1234,
        saved_bytes=4096,
    )


@pytest.fixture
def host() -> Identity:
    """A host of the public swarm that has run five traces."""
    identity = Identity.load_or_create(data_dir() / "host.key")
    log = AuditLog(audit_folder(load_settings(), identity.peer_id), identity, "public")
    for number in range(1, 6):
        assert log.reserve()
        log.append(entry(number, BOB if number == 3 else ALICE))
    log.close()
    return identity


def numbers(table: str) -> list[int]:
    """The entries in a table."""
    first = [line.strip("│┃ ").split(" ")[0] for line in table.splitlines()]
    return [int(one) for one in first if one.isdecimal()]


def test_show_prints_the_newest_entries(host: Identity) -> None:
    said = run("audit", "show")
    assert numbers(said) == [1, 2, 3, 4, 5]
    for text in (f"…{BOB.peer_id[-8:]}", "2023-11-14 22:16 ", "03030303 ", "1.234", "4.1KB"):
        assert text in said
    assert max(map(len, said.splitlines()[1:])) <= 80
    assert said.count("QuotaExceeded") == 2
    assert numbers(run("audit", "show", "--last=2")) == [4, 5]
    assert numbers(run("audit", "show", "--client", f"…{BOB.peer_id[-8:]}")) == [3]
    assert numbers(run("audit", "show", "--last=0")) == [1, 2, 3, 4, 5]


def test_show_fits_a_terminal_of_80_characters(
    host: Identity, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Failed with twelve columns, each of them cut."""
    folder = audit_folder(load_settings(), host.peer_id)
    log = AuditLog(folder, host, "public")
    assert log.reserve()
    hard = replace(
        entry(6), outcome="MachineOutOfMemory", compute_milliseconds=86_399_999,
        saved_bytes=999_900_000_000,
    )  # fmt: skip
    log.append(hard)
    log.close()
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    show(last=20, client=None, wide=False, config=None, key=None)
    said = capfd.readouterr().out
    assert numbers(said) == [1, 2, 3, 4, 5, 6]  # of a row that goes on below, one would be empty
    (row,) = (line.split() for line in said.splitlines() if line.split()[:1] == ["6"])
    assert row == [
        *("6", "2023-11-14", "22:19", f"…{ALICE.peer_id[-8:]}", "MachineOutOfMemory", "06060606"),
        *("86399.999", "999.9GB"),
    ]


@pytest.mark.parametrize("is_terminal", [False, True])
def test_show_wide_cuts_nothing(
    host: Identity,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    is_terminal: bool,
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("sys.stdout.isatty", lambda: is_terminal)
    show(last=20, client=None, wide=True, config=None, key=None)
    (row,) = (line for line in capfd.readouterr().out.splitlines() if line.split()[:1] == ["3"])
    assert row.split() == [
        *("3", "2023-11-14", "22:16", BOB.peer_id, "client", (b"i" * 16).hex(), "done"),
        *("03" * 32, "7", (3).to_bytes(16, "big").hex(), "ab" * 32, "0:10", "bfloat16"),
        *("1.234", "4,096"),
    ]


def test_an_export_is_verified_elsewhere_with_the_peer_id_alone(
    host: Identity, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = run("audit", "export", "--out=log.jsonl")
    assert f"  glasshive audit verify log.jsonl --host {host.peer_id}\n" in said
    lines = Path("log.jsonl").read_text()
    assert [json.loads(line).get("entry") for line in lines.splitlines()] == [1, 2, 3, 4, 5, None]
    assert run("audit", "export").splitlines()[:5] == lines.splitlines()[:5]
    monkeypatch.setenv("GLASSHIVE_DATA", str(tmp_path / "another machine"))
    said = run("audit", "verify", "log.jsonl", "--host", host.peer_id)
    assert said.startswith(
        f"signatures and chain hold: the audit log of {host.peer_id} in swarm 'public'\n"
        "  entries 1 to 5, 2023-11-14 22:14 UTC to 2023-11-14 22:18 UTC\n"
    )
    assert "only an earlier export that you kept can show: --extends EARLIER" in said
    assert not (tmp_path / "another machine").exists()
    Path("changed.jsonl").write_text(lines.replace('"nodes":7', '"nodes":8', 1))
    text = refused("audit", "verify", "changed.jsonl", "--host", host.peer_id, kind=BadAuditLog)
    assert text == (
        "line 1 of changed.jsonl: it is not what the host has signed; compare with another copy, "
        "and ask the host's owner"
    )
    refused("audit", "verify", "log.jsonl", "--host", BOB.peer_id, kind=BadAuditLog)


def test_verify_without_a_host_says_where_its_id_is() -> None:
    said = wrong_usage("audit", "verify", "log.jsonl")
    assert "--host: name the host whose log it is by its peer id" in said
    assert "what follows /p2p/ in the address that `glasshive serve` prints" in said


def test_a_later_export_is_held_against_an_earlier(host: Identity) -> None:
    run("audit", "export", "--out=1.jsonl")
    folder = audit_folder(load_settings(), host.peer_id)
    log = AuditLog(folder, host, "public")
    assert log.reserve()
    log.append(entry(6))
    log.close()
    run("audit", "export", "--out=2.jsonl")
    said = run("audit", "verify", "2.jsonl", "--host", host.peer_id, "--extends=1.jsonl")
    assert "it goes on from 1.jsonl: nothing that is there was changed or taken out" in said
    text = refused(
        *("audit", "verify", "1.jsonl", "--host", host.peer_id, "--extends=2.jsonl"),
        kind=BadAuditLog,
    )
    assert "it doesn't go on from the earlier export, which ends with entry 6" in text


def test_an_export_replaces_no_file_and_leaves_none_behind(host: Identity) -> None:
    run("audit", "export", "--out=log.jsonl")
    text = refused("audit", "export", "--out=log.jsonl", kind=AuditLogError)
    assert text == (
        "can't read or write log.jsonl: File exists; check the path, and give --out the name of a "
        "new file"
    )
    file = log_files(audit_folder(load_settings(), host.peer_id))[0]
    file.write_bytes(file.read_bytes().replace(b'"nodes":7', b'"nodes":8', 1))
    refused("audit", "export", "--out=damaged.jsonl", kind=BadAuditLog)
    assert not Path("damaged.jsonl").exists()


def test_where_there_is_no_log_or_no_key_it_says_where_one_would_be() -> None:
    text = refused("audit", "show", kind=KeyFileError)
    assert text == (
        f"there is no key {data_dir() / 'host.key'}; an audit log is read and exported on the "
        "host's machine, name its key with --key"
    )
    assert not (data_dir() / "host.key").exists()
    identity = Identity.load_or_create(data_dir() / "host.key")
    for command in ("show", "export"):
        text = refused("audit", command, kind=AuditLogError)
        assert f"there is no audit log of the host {identity.peer_id} in swarm 'public'" in text
        assert "with `audit = true` in its hive.toml" in text
    refused("audit", "verify", "none.jsonl", "--host", identity.peer_id, kind=AuditLogError)


# What a host keeps ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "audited"),
    [
        ("", False),
        ("audit = true", True),
        ("audit = false", False),
        (f'issuers = ["{ALICE.peer_id}"]', True),
        (f'issuers = ["{ALICE.peer_id}"]\naudit = false', False),
    ],
)
def test_a_host_keeps_a_log_in_private_swarms_and_where_it_is_set(
    lines: str, audited: bool
) -> None:
    Path("hive.toml").write_text(lines + "\n")
    assert load_settings("hive.toml").audited is audited


def test_the_setting_is_true_or_false(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("hive.toml").write_text('audit = "perhaps"\n')
    with pytest.raises(ConfigError, match=r"the setting audit in .*: wanted true or false"):
        load_settings("hive.toml")
    monkeypatch.setenv("GLASSHIVE_AUDIT", "true")
    assert load_settings().audited


def test_a_host_without_a_log_keeps_nothing() -> None:
    accounts = open_accounts(load_settings(), ALICE, None)
    accounts.close()
    assert accounts.audit_log is None
    assert not data_dir().exists()


def test_a_log_that_cant_be_kept_is_said_at_the_start() -> None:
    settings = Settings(swarm="../lab", audit=True)
    data_dir().mkdir()
    (data_dir() / "audit").write_bytes(b"")
    with pytest.raises(AuditLogError) as caught:
        open_accounts(settings, ALICE, None)
    folder = data_dir() / "audit" / "swarm-..%2Flab" / ALICE.peer_id
    assert str(caught.value) == (
        f"can't keep the audit log in {folder}: Not a directory; check the rights of the folder "
        "and the space on its disk, or set `audit = false` in hive.toml"
    )
