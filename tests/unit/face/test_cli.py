"""The command line without a network: help, usage, exit codes, error lines, the status report."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
from rich.console import Console
from transformers import LlamaConfig

from glasshive import cli, host_process
from glasshive.dht.records import ModelId, PeerRecord
from glasshive.keyring import KeyInUse, take_free_key, take_key
from glasshive.models import find_model
from glasshive.peer.supervisor import Supervisor
from glasshive.security.keys import Identity
from glasshive.settings import data_dir
from glasshive.status_report import coverage_bar, missing_ranges, print_report, report_of
from glasshive.terminal import set_up_logging

LOOPBACK = "/ip4/127.0.0.1/tcp/0"


@pytest.fixture(autouse=True)
def _own_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    for name in [one for one in os.environ if one.startswith("GLASSHIVE_")]:
        monkeypatch.delenv(name)
    for name in ("CONFIG", "DATA", "CACHE"):
        monkeypatch.setenv(f"XDG_{name}_HOME", str(tmp_path / name))
    monkeypatch.setenv("HOME", str(tmp_path))
    root, ours = logging.getLogger(), logging.getLogger("glasshive")
    before = list(root.handlers), root.level, ours.level
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HIVEMIND_LOGLEVEL", "TRANSFORMERS_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS"):
            patch.setenv(name, "to be put back")
            patch.delenv(name)
        yield
    root.handlers[:] = before[0]
    root.setLevel(before[1])
    ours.setLevel(before[2])


def run(*arguments: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["glasshive", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    code = ended.value.code
    assert isinstance(code, int)
    return code


@pytest.fixture(autouse=True)
def _m_is_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "glasshive.models.find_model", lambda name: Path(name) if name == "m" else find_model(name)
    )


def one_line(text: str) -> str:
    return " ".join(text.replace("│", " ").split())


def test_without_an_argument_it_helps(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch=monkeypatch) == 0
    out, err = capfd.readouterr()
    assert all(name in out for name in ("serve", "bootstrap", "status", "manifest", "demo"))
    assert err == ""


def test_version(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    assert run("--version", monkeypatch=monkeypatch) == 0
    assert capfd.readouterr().out.startswith("glasshive 0.")


def test_help_says_what_serving_without_a_bootstrap_is(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run("serve", "--help", monkeypatch=monkeypatch) == 0
    said = one_line(capfd.readouterr().out)
    assert "Without one here or in the config this host begins a swarm of its own." in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nonsense",), "nonsense"),
        (
            ("serve",),
            "MODEL: name a model: a folder that Hugging Face saved, or SmolLM2-135M-Instruct once "
            "`glasshive demo` has fetched it",
        ),
        *(
            (
                ("serve", "m", "--blocks", got),
                f"got {got!r}, wanted first:end (end excluded), such as 0:10 for the first "
                f"ten{why}",
            )
            for got, why in (
                ("10", "; block 10 alone is 10:11"),
                ("10:5", ", and the first below the end"),
                ("3:3", ", and the first below the end"),
                ("a:b", ""),
                ("-1:3", ""),
                ("", ""),
            )
        ),
        (("serve", "m", "--name", ""), "got '', wanted 1 to 128 letters, digits, spaces"),
        (("serve", "m", "--name", "a\nb"), "wanted 1 to 128 letters, digits, spaces"),
        (("serve", "m", "--dtype", "int8"), "bfloat16"),
        (("status", "--nonsense"), "--nonsense"),
        (("demo", "--cuts", "20,10"), "wanted ascending blocks between 0 and 30"),
        (("demo", "--cuts", "ten"), "wanted ascending blocks"),
    ],
)
def test_wrong_usage_exits_with_2(
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    said: str,
) -> None:
    assert run(*arguments, monkeypatch=monkeypatch) == 2
    assert said in one_line(capfd.readouterr().err)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("status",), "error: no bootstrap peer is known"),
        (("status", "--config", "/none/hive.toml"), "error: there is no config file"),
        (
            ("manifest", "/none/model"),
            "error: there is no folder '/none/model'; give a model folder",
        ),
        (("manifest", "no-model"), "error: no model 'no-model' on this machine: there is no such"),
        (("serve", "no-model"), "error: no model 'no-model' on this machine: there is no such"),
        (
            ("serve", "m", "--bootstrap", "localhost:31330"),
            "error: got 'localhost:31330', wanted a multiaddr such as /dns4/localhost/tcp/31330/",
        ),
        (
            ("serve", "m", "--blocks", "0:1", "--listen", "/ip4/0.0.0.0/tcp/0"),
            "error: can't listen at /ip4/0.0.0.0/tcp/0: other machines could reach this one, and "
            "no signed whitelist says what they may run here; name the swarm's hive.toml with ",
        ),
        (
            ("bootstrap", "--listen", "/ip4/192.0.2.7/tcp/1"),
            "error: can't listen at /ip4/192.0.2.7/tcp/1: other machines could reach this one, and",
        ),
        (
            ("serve", "m", "--listen", "/ip4/127.0.0.1/tcp/0", "--announce", "/ip4/8.8.4.4/tcp/1"),
            "error: can't announce /ip4/8.8.4.4/tcp/1: other machines could reach this one, and",
        ),
        (
            ("bootstrap", "--listen", "/ip4/0.0.0.0/tcp/99999"),
            "error: got '/ip4/0.0.0.0/tcp/99999', whose port 99999 is out of range; ports go up",
        ),
        (
            ("bootstrap", "--listen", "nonsense"),
            "error: got --listen 'nonsense', wanted a multiaddr",
        ),
    ],
)
def test_our_errors_are_one_line_and_exit_with_1(
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    said: str,
) -> None:
    assert run(*arguments, monkeypatch=monkeypatch) == 1
    out, err = capfd.readouterr()
    assert said in err
    assert (out, err.count("\n")) == ("", 1)


def test_wrong_blocks_of_a_model_that_is_here(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = LlamaConfig(hidden_size=32, num_hidden_layers=6, num_attention_heads=4, vocab_size=64)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path / "tiny")
    (tmp_path / "tiny" / "model.safetensors").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    assert run("serve", "./tiny", "--blocks", "10", monkeypatch=monkeypatch) == 2
    assert "; ./tiny has 6 blocks, 0:6" in one_line(capfd.readouterr().err)


def test_an_interrupt_exits_with_130(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupted(path: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("glasshive.models.find_model", interrupted)
    assert run("manifest", str(tmp_path), monkeypatch=monkeypatch) == 130


def test_a_key_serves_one_process_of_a_machine(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from filelock import FileLock

    key = tmp_path / "host.key"
    with FileLock(tmp_path / "host.key.lock"):
        code = run("serve", "m", "--blocks", "0:1", "--key", str(key), monkeypatch=monkeypatch)
    assert code == 1
    assert f"is the peer of the key {key}" in capfd.readouterr().err


def test_a_free_key_is_taken_by_itself(tmp_path: Path) -> None:
    first = tmp_path / "keys" / "host.key"
    key, lock = take_free_key(first)
    second, other = take_free_key(first)
    assert (key, second) == (first, tmp_path / "keys" / "host-2.key")
    with pytest.raises(KeyInUse, match=r"host-2\.key; end it, or leave out --key"):
        take_key(second)
    lock.release()
    third, again = take_free_key(first)
    assert third == first
    other.release()
    again.release()


def test_which_key_was_taken_is_passed_on(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    started: list[list[str]] = []

    async def run_once(supervisor: Supervisor, *, until_stdin_ends: bool) -> int:
        started.append(list(supervisor._command(3, None)))
        return 0

    monkeypatch.setattr(Supervisor, "run", run_once)
    key, lock = take_free_key(data_dir() / "host.key")
    assert run("serve", "m", "--listen", LOOPBACK, monkeypatch=monkeypatch) == 0
    lock.release()
    second = key.with_name("host-2.key")
    # Not by this process: the model may not be there, and that would be said after it.
    assert capfd.readouterr().err == ""
    at = started[0].index("--key-in-use")
    assert started[0][at + 1] == "host.key"
    assert started[0][-2:] == ["--key", str(second)]
    assert second.stat().st_mode & 0o777 == 0o600
    assert run("serve", "m", "--listen", LOOPBACK, monkeypatch=monkeypatch) == 0
    assert started[1][-1] == str(key)
    assert "--key-in-use" not in started[1]
    assert capfd.readouterr().err == ""


def test_a_port_that_is_in_use_is_not_shared(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"/ip4/127.0.0.1/tcp/{taken.getsockname()[1]}"
        assert run("bootstrap", "--listen", listen, monkeypatch=monkeypatch) == 1
    said = capfd.readouterr().err
    assert f"error: can't listen at {listen}: another process does; give another port" in said


def test_a_clash_says_that_the_config_names_the_port(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Failed with "give another port", at which nobody who joins would look for it."""
    config = tmp_path / "hive.toml"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"/ip4/127.0.0.1/tcp/{taken.getsockname()[1]}"
        config.write_text(f'bootstraps = ["{listen}/p2p/{Identity.generate().peer_id}"]\n')
        arguments = ("--config", str(config), "--listen", listen)
        assert run("bootstrap", *arguments, monkeypatch=monkeypatch) == 1
        said = capfd.readouterr().err
        assert run("serve", "m", *arguments, monkeypatch=monkeypatch) == 1
    assert (
        f"another process does; stop that one (an earlier `glasshive bootstrap`?), since {config} "
        "names this port; with another port of --listen change `bootstraps` there too, and make "
        "invites anew: those made before hold the old address\n"
    ) in said
    assert "another process does; give another port with --listen" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("named", "flags", "listens"),
    [
        ("/ip4/192.168.1.5/tcp/31340", (), "/ip4/192.168.1.5/tcp/31340"),
        ("/ip6/::1/tcp/31340", (), "/ip6/::1/tcp/31340"),
        ("/ip4/192.168.1.5/tcp/31340", ("--listen", LOOPBACK), LOOPBACK),
        # What a router announces is no address of this machine, nor is a name.
        (
            "/ip4/203.0.113.7/tcp/31340",
            ("--announce", "/ip4/203.0.113.7/tcp/31340"),
            cli.BOOTSTRAP_LISTEN,
        ),
        ("/dns4/lab.example/tcp/31340", (), cli.BOOTSTRAP_LISTEN),
        (None, (), cli.BOOTSTRAP_LISTEN),
    ],
)
def test_a_bootstrap_listens_where_its_config_names_it(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    named: str | None,
    flags: tuple[str, ...],
    listens: str,
) -> None:
    """It listened at the usual place on loopback, where nobody who read the config looked."""
    key, config = tmp_path / "bootstrap.key", tmp_path / "hive.toml"
    own = Identity.load_or_create(key).peer_id
    other = f"/ip4/192.168.1.6/tcp/31340/p2p/{Identity.generate().peer_id}"
    config.write_text(
        f"bootstraps = {json.dumps([other, *([f'{named}/p2p/{own}'] if named else [])])}"
    )
    lives: list[host_process.Life] = []

    def run_bootstrap(life: host_process.Life) -> NoReturn:
        lives.append(life)
        sys.exit(0)

    monkeypatch.setattr(host_process, "run_bootstrap", run_bootstrap)
    arguments = ("--config", str(config), "--key", str(key), "--report-descriptor", "3", *flags)
    assert run("bootstrap", *arguments, monkeypatch=monkeypatch) == 0
    assert [one.listen for one in lives] == [listens]


def test_a_bootstrap_s_process_listens_at_what_was_checked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It may be given another key than the one that the config names, as that one is in use."""
    commands: list[list[str]] = []

    async def run_none(supervisor: Supervisor, *, until_stdin_ends: bool) -> int:
        commands.append(supervisor._command(3, None))
        return 0

    monkeypatch.setattr(Supervisor, "run", run_none)
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        named = f"/ip4/127.0.0.1/tcp/{trial.getsockname()[1]}"
    key, config = tmp_path / "bootstrap.key", tmp_path / "hive.toml"
    config.write_text(f'bootstraps = ["{named}/p2p/{Identity.load_or_create(key).peer_id}"]\n')
    assert (
        run("bootstrap", "--config", str(config), "--key", str(key), monkeypatch=monkeypatch) == 0
    )
    (command,) = commands
    assert command[command.index("--listen") + 1] == named


def test_an_address_of_the_config_that_is_elsewhere_is_said_to_be(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    async def run_none(supervisor: Supervisor, *, until_stdin_ends: bool) -> int:
        return 0

    monkeypatch.setattr(Supervisor, "run", run_none)
    key, config = tmp_path / "bootstrap.key", tmp_path / "hive.toml"
    named = "/ip4/10.254.253.252/tcp/31340"
    own = Identity.load_or_create(key).peer_id
    config.write_text(f'root = "1.root.json"\nbootstraps = ["{named}/p2p/{own}"]\n')
    arguments = ("--config", str(config), "--key", str(key))
    assert run("bootstrap", *arguments, monkeypatch=monkeypatch) == 1
    assert (
        f"{config} names this peer there, and that is no address of this machine; if a router "
        "leads from there to this one, say with --listen where this peer listens, and "
        f"--announce {named}\n"
    ) in capfd.readouterr().err


def test_manifest_names_every_file_that_counts(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = tmp_path / "tiny"
    folder.mkdir()
    contents = {"config.json": b"{}", "model.safetensors": b"weights", "README.md": b"no"}
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    for _ in range(2):  # the second time from the cache, if the files have settled
        assert run("manifest", str(folder), "--json", monkeypatch=monkeypatch) == 0
        found = json.loads(capfd.readouterr().out)
        assert found["name"] == "tiny"
        assert {one["name"]: one["sha256"] for one in found["files"]} == {
            name: hashlib.sha256(contents[name]).hexdigest()
            for name in ("config.json", "model.safetensors")
        }
    assert run("manifest", str(folder), monkeypatch=monkeypatch) == 0
    assert found["id"] in capfd.readouterr().out


def test_a_remembered_manifest_holds_only_for_unchanged_files(tmp_path: Path) -> None:
    from glasshive.manifest_cache import known_manifest

    folder = tmp_path / "tiny"
    folder.mkdir()
    weights = folder / "model.safetensors"
    (folder / "config.json").write_bytes(b"{}")
    weights.write_bytes(b"before")
    for path in folder.iterdir():
        os.utime(path, ns=(10**18, 10**18))
    hashed: list[int] = []

    def count(done: int, total: int) -> None:
        hashed.append(done)

    first = known_manifest(folder, "tiny", count)
    assert hashed
    hashed.clear()
    assert known_manifest(folder, "tiny", count) == first
    assert not hashed
    weights.write_bytes(b"beyond")  # as long as before
    os.utime(weights, ns=(10**18, 10**18 + 1))
    changed = known_manifest(folder, "tiny", count)
    assert changed.model_id != first.model_id
    assert hashed


MODEL = ModelId(hashlib.sha256(b"manifest").hexdigest())


def record(start: int, end: int, **changes: Any) -> PeerRecord:
    fields: dict[str, Any] = {
        "model": MODEL,
        "model_name": "tiny",
        "start": start,
        "end": end,
        "n_blocks": 6,
        "dtype": "float32",
        "backend": "cpu torch-2.13",
        "attention": "sdpa",
        "throughput_tokens_per_second": 1234.5,
        "addresses": (),
        "whitelist_version": 0,
        "load": 0.25,
        "software_version": "0.1.0",
        "peer_id": Identity.generate().peer_id,
        "expires_at_seconds": 1060.0,
    }
    return PeerRecord(**(fields | changes))


def test_the_report_says_which_blocks_are_missing() -> None:
    (model,) = report_of("lab", [record(2, 4), record(0, 3)], 1000.0)["models"]
    assert model["peers_per_block"] == [1, 1, 2, 1, 0, 0]
    assert model["missing_blocks"] == ["4:6"]
    assert [(one["start"], one["end"]) for one in model["served_by"]] == [(0, 3), (2, 4)]
    assert model["served_by"][0]["expires_in_seconds"] == 60.0


def test_kinds_that_no_trace_mixes_do_not_cover_for_each_other() -> None:
    (model,) = report_of("lab", [record(0, 4), record(4, 6, dtype="bfloat16")], 1000.0)["models"]
    assert model["missing_blocks"] == ["4:6"]
    assert len(model["served_by"]) == 2


WHERE = ["--bootstrap", "/ip4/127.0.0.1/tcp/31330/p2p/12D3KooW"]


def shown(peers: list[PeerRecord]) -> str:
    out = io.StringIO()
    print_report(report_of("lab", peers, 1000.0), Console(file=out, width=80), WHERE)
    return out.getvalue()


def test_the_report_fits_a_terminal() -> None:
    peers = [record(0, 2), record(4, 6)]
    text = shown(peers)
    assert "float32, sdpa attention: blocks 2:4 are missing\n▃▃··▃▃\n" in text
    assert all(one.peer_id[-8:] in text for one in peers)
    assert "1,234" in text
    for peer in peers:
        text = text.replace("…" + peer.peer_id[-8:], "")
    assert "…" not in text
    commands = [line for line in text.splitlines() if "glasshive serve" in line]
    assert commands == [
        "  glasshive serve tiny --blocks 2:4 --dtype float32 --attention sdpa " + " ".join(WHERE)
    ]


def test_each_kind_is_told_for_itself() -> None:
    peers = [
        record(0, 6, attention="eager"),
        *(record(0, 4), record(3, 6)),
        record(2, 6, dtype="bfloat16"),
    ]
    text = shown(peers)
    assert "float32, eager attention: every block is served\n" in text
    assert "float32, sdpa attention: every block is served, but no spans fit end to start" in text
    assert "glasshive serve tiny --blocks 4:6 --dtype float32 --attention sdpa" in text
    assert "bfloat16, sdpa attention: blocks 0:2 are missing" in text
    assert "glasshive serve tiny --blocks 0:2 --dtype bfloat16 --attention sdpa" in text


def test_what_scripts_read_stays() -> None:
    (model,) = report_of("lab", [record(0, 4), record(3, 6)], 1000.0)["models"]
    assert list(model) == [
        *("name", "id", "n_blocks", "complete", "peers_per_block", "missing_blocks"),
        *("kinds", "served_by"),
    ]
    assert model["kinds"] == [
        {
            "dtype": "float32",
            "quantisation": "none",
            "attention": "sdpa",
            "complete": False,
            "peers_per_block": [1, 1, 1, 2, 1, 1],
            "missing_blocks": [],
            "spans_to_add": ["4:6"],
        }
    ]
    assert (model["complete"], model["missing_blocks"]) == (False, [])


def test_an_empty_swarm_is_said_to_be_empty() -> None:
    """And how that is changed: in a line to paste, of which only MODEL is to be filled in."""
    first, command, *_ = shown([]).splitlines()
    assert first == "nobody serves a model in the swarm lab yet; to serve one from here, run"
    assert command == "  " + " ".join(["glasshive serve MODEL", *WHERE])
    assert "where MODEL is a model's folder, or the name of" in shown([])


def test_ranges_and_the_bar() -> None:
    assert missing_ranges([0, 1, 0, 0, 2, 0]) == ["0:1", "2:4", "5:6"]
    assert missing_ranges([1, 1]) == missing_ranges([]) == []
    assert coverage_bar([0, 1, 50]) == "·▃█"
    assert coverage_bar([1] * 100 + [0] + [1] * 27) == "▃" * 50 + "·" + "▃" * 13


def test_json_logs_are_an_object_a_line() -> None:
    code = """
import logging, structlog
from glasshive.terminal import set_up_logging
set_up_logging("json")
structlog.get_logger("glasshive.x").info("ours", blocks="0:2")
logging.getLogger("glasshive.y").info("standard", extra={"client": "12D3"})
logging.getLogger("glasshive.y").debug("hidden")
logging.getLogger("library").info("hidden")
logging.getLogger("library").warning("seen %d", 3)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert [line["event"] for line in lines] == ["ours", "standard", "seen 3"]
    assert (lines[0]["blocks"], lines[1]["client"]) == ("0:2", "12D3")
    assert done.stdout == ""


def test_pretty_logs_are_lines(capfd: pytest.CaptureFixture[str]) -> None:
    set_up_logging("pretty")
    logging.getLogger("glasshive.x").info("ready", extra={"peer": "12D3"})
    err = capfd.readouterr().err
    assert "ready" in err
    assert "12D3" in err


@pytest.mark.parametrize("log_format", ["pretty", "json"])
def test_no_log_of_an_error_shows_what_variables_hold(log_format: str) -> None:
    code = f"""
import logging, torch
from glasshive.terminal import set_up_logging
set_up_logging({log_format!r})
def run(number):
    token_ids, body = torch.tensor([number]), str(number + 1)
    raise KeyError("a bug")
try:
    run(420_000)
except KeyError:
    logging.getLogger("glasshive.peer").exception("host_failed", extra={{"client": "12D3"}})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    for shown in ("host_failed", "12D3", "in run", "a bug"):
        assert shown in done.stderr
    for hidden in ("420000", "420001"):
        assert hidden not in done.stderr
