"""docs/whitelists.md against the code: its commands run, in order, as they are written."""

from __future__ import annotations

import re
import shlex
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from glasshive import cli
from glasshive.security.host_policy import HostRules
from glasshive.security.policy import Policy
from glasshive.security.whitelist import LIMIT_NAMES
from glasshive.trust_folder import TrustFolder

PAGE = (Path(__file__).parents[3] / "docs" / "whitelists.md").read_text()


def test_the_commands_run_as_they_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passphrase = tmp_path / "passphrase"
    passphrase.write_text("correct horse battery staple")
    passphrase.chmod(0o600)
    monkeypatch.setenv("GLASSHIVE_PASSPHRASE_FILE", str(passphrase))
    monkeypatch.setenv("GLASSHIVE_DATA", str(tmp_path / "data"))
    monkeypatch.setattr("glasshive.swarm_commands.set_up_logging", lambda form: None)
    monkeypatch.setattr("glasshive.whitelist_commands.set_up_logging", lambda form: None)
    terminal = SimpleNamespace(stdin=SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr("glasshive.trust_words.sys", terminal)
    monkeypatch.chdir(tmp_path)
    script = "\n".join(re.findall(r"^```bash\n(.*?)^```$", PAGE, re.M | re.DOTALL))
    lines = [line for line in script.splitlines() if line and line[0] != "#"]
    assert sum(line.startswith("glasshive ") for line in lines) >= 20
    for line in lines:
        first, *arguments = shlex.split(line)
        if first == "glasshive":
            done = CliRunner().invoke(cli.app, arguments, input="y\n")
            assert done.exit_code == 0, f"{line}\n{done.output}\n{done.exception}"
        else:
            subprocess.run(["bash", "-c", line], check=True)
    for name, root, whitelist in (("lab", 1, 1), ("duo", 1, 2), ("trio", 2, 2)):
        folder = TrustFolder(tmp_path / name, time.time)
        assert folder.root().version == root
        assert folder.whitelist_versions()[-1] == whitelist
        assert folder.pending_paths() == ()


def test_its_tables_and_numbers_are_those_of_the_code() -> None:
    table = PAGE.partition("| limit | of |")[2].partition("\n\n")[0]
    assert re.findall(r"`(\w+)`", table) == list(LIMIT_NAMES)
    floor = Policy.floor()
    text = " ".join(PAGE.split())
    assert f"ten pure ops ({', '.join(sorted(floor.ops))}), reads only" in text
    assert f"{floor.limits.nodes} nodes, {floor.limits.seconds} seconds" in text
    (own,) = re.findall(r"^```toml\n(.*?)^```$", PAGE, re.M | re.DOTALL)
    HostRules.from_text(own)
