"""What `glasshive.connect` makes of its argument, before any network."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import glasshive
from glasshive.connection import config_and_bootstraps, host_arguments, swarm_arguments
from glasshive.dht.errors import BadAddress
from glasshive.settings import ConfigError, load_settings

ONE = "/ip4/127.0.0.1/tcp/31330/p2p/12D3KooWK99VoVxNE7XzyBwXEzW7xhK7Gpv85r9F3V3fyKSUKPH5"
TWO = ONE.replace("31330", "31331")


@pytest.fixture(autouse=True)
def _own_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("CONFIG", "SWARM", "BOOTSTRAPS", "KEY", "HOST_KEY"):
        monkeypatch.delenv(f"GLASSHIVE_{name}", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("HOME", str(tmp_path))


def test_an_address_or_several() -> None:
    assert config_and_bootstraps(ONE) == (None, (ONE,))
    assert config_and_bootstraps([ONE, TWO]) == (None, (ONE, TWO))
    assert config_and_bootstraps(None) == (None, ())


def test_a_file_as_text_or_path(tmp_path: Path) -> None:
    file = tmp_path / "hive.toml"
    file.write_text(f'bootstraps = ["{ONE}"]\n')
    for where in (file, str(file)):
        assert config_and_bootstraps(where) == (where, ())
        settings = load_settings(where)
        assert settings.bootstraps == (ONE,)
        # Of the public swarm: the address is enough, on every machine.
        assert swarm_arguments(settings, where) == ("--bootstrap", ONE)
        assert host_arguments(settings, where) == ("--bootstrap", ONE)


def test_a_command_comes_to_a_swarm_of_its_own_by_its_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Failed with the address alone: it would be of the public swarm."""
    file = tmp_path / "lab.toml"
    file.write_text(f'swarm = "lab"\nbootstraps = ["{ONE}", "{TWO}"]\n')
    both = ("--bootstrap", ONE, "--bootstrap", TWO)
    monkeypatch.chdir(tmp_path)
    for where in (file, "lab.toml"):
        assert swarm_arguments(load_settings(where), where) == ("--config", str(file), *both)
        # A host has its own hive.toml, which names the rest; not this user's path.
        assert host_arguments(load_settings(where), where) == ("--config", "hive.toml")
    monkeypatch.setenv("GLASSHIVE_CONFIG", str(file))
    found = load_settings(bootstraps=(ONE,))
    assert swarm_arguments(found, None) == ("--config", str(file), "--bootstrap", ONE)
    monkeypatch.delenv("GLASSHIVE_CONFIG")
    monkeypatch.setenv("GLASSHIVE_SWARM", "lab")  # and no file: what is pasted here has it too
    for arguments in (swarm_arguments, host_arguments):
        assert arguments(load_settings(bootstraps=(ONE,)), None) == ("--bootstrap", ONE)


def test_no_bootstrap_says_where_to_write_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no bootstrap peer .* write it\s+into .*/hive\.toml"):
        glasshive.connect()
    file = tmp_path / "lab.toml"
    file.write_text('swarm = "lab"\n')
    with pytest.raises(ConfigError, match=r"into .*/lab\.toml"):
        glasshive.connect(file)
    with pytest.raises(ConfigError, match="no config file"):
        glasshive.connect("nowhere.toml")


def test_a_bad_address_is_refused_before_anything_starts() -> None:
    with pytest.raises(glasshive.GlasshiveError, match="multiaddr"):
        glasshive.connect(["/ip4/127.0.0.1/tcp/1"])
    for typed in ("localhost:31330", "http://localhost:31330", "/dns4/localhost"):
        with pytest.raises(BadAddress, match=r"such as /\w+/[\w.]+/tcp/31330/p2p/12D3KooW"):
            glasshive.connect(typed)


def test_importing_is_light() -> None:
    heavy = "torch", "transformers", "hivemind"
    code = (
        "import sys, glasshive.cli, glasshive.connection, glasshive.testing, "
        f"glasshive.peer.supervisor; print([one for one in {heavy} if one in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def _run_to_its_end(tmp_path: Path, script: str) -> tuple[int, str, str]:
    """The exit code, output and warnings of a script that has connected to nobody as `swarm`."""
    code = f"""
import atexit, os, sys
import glasshive
atexit.register(lambda: print(os.getpid() == parent, repr(swarm)))
parent = os.getpid()
swarm = glasshive.connect({ONE!r})
{script}
"""
    command = [sys.executable, "-W", "ignore", "-c", code]
    env = {**os.environ, "GLASSHIVE_DATA": str(tmp_path / "data"), "GLASSHIVE_SWARM": "local-1-2"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)
    return done.returncode, done.stdout, done.stderr


def test_a_connection_that_nobody_closes_is_closed_at_exit(tmp_path: Path) -> None:
    code, said, warned = _run_to_its_end(tmp_path, "")
    assert said == "True <Swarm 'local-1-2' through 1 bootstrap peer, closed>\n"
    assert (code, warned) == (0, "")


def test_a_forked_child_ends_without_the_connections_of_its_parent(tmp_path: Path) -> None:
    """It waited 30 s for a thread that only the parent has, and ended with a traceback."""
    script = """
if (child := os.fork()) == 0:
    sys.exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
    code, said, warned = _run_to_its_end(tmp_path, script)
    assert said.splitlines() == [
        "False <Swarm 'local-1-2' through 1 bootstrap peer>",
        "7",
        "True <Swarm 'local-1-2' through 1 bootstrap peer, closed>",
    ]
    assert (code, warned) == (0, "")
