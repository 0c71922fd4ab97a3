"""docs/whitelists.md against the code: its commands run, in order, as they are written."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

from glasshive.security.host_policy import HostRules
from glasshive.security.policy import Policy
from glasshive.security.whitelist import LIMIT_NAMES
from glasshive.trust_folder import TrustFolder

PAGE = (Path(__file__).parents[3] / "docs" / "whitelists.md").read_text()


def test_the_commands_run_as_they_are_written(tmp_path: Path) -> None:
    script = "\n".join(re.findall(r"^```bash\n(.*?)^```$", PAGE, re.M | re.DOTALL))
    assert script.count("glasshive ") >= 20
    passphrase = tmp_path / "passphrase"
    passphrase.write_text("correct horse battery staple")
    passphrase.chmod(0o600)
    env = {
        **os.environ,
        "GLASSHIVE_PASSPHRASE_FILE": str(passphrase),
        "GLASSHIVE_DATA": str(tmp_path / "data"),
        "RUN": sys.executable,
    }
    command = 'glasshive() { echo y | "$RUN" -m glasshive.cli "$@"; }\nset -e\n' + script
    done = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=110
    )
    assert done.returncode == 0, done.stderr
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
