"""A swarm from the commands alone: made, started, its whitelist published, changed and served."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llama import save_llama
from waits import wait_for

import glasshive
from glasshive.client.errors import PeerFailed
from glasshive.security.errors import NotAllowed

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:path is deprecated:DeprecationWarning"),
]

PROMPT = torch.tensor([[3, 14, 15, 9, 26, 5, 35]])
DEADLINE_SECONDS = 90.0


class Machine:
    """A machine of its own: data and cache folders, and the processes that were started there."""

    def __init__(self, place: Path) -> None:
        place.mkdir()
        passphrase = place / "passphrase"
        passphrase.write_text("correct horse battery staple")
        passphrase.chmod(0o600)
        self.log = place / "log"
        self.env = {
            **{name: value for name, value in os.environ.items() if "GLASSHIVE" not in name},
            "GLASSHIVE_DATA": str(place / "data"),
            "GLASSHIVE_CACHE": str(place / "cache"),
            "GLASSHIVE_PASSPHRASE_FILE": str(passphrase),
            "OMP_NUM_THREADS": "1",
        }
        self.processes: list[subprocess.Popen[bytes]] = []

    def run(self, *arguments: object) -> str:
        command = [sys.executable, "-m", "glasshive.cli", *map(str, arguments)]
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def start(self, *arguments: object) -> None:
        with self.log.open("ab") as log:
            command = [sys.executable, "-m", "glasshive.cli", *map(str, arguments)]
            self.processes.append(
                subprocess.Popen([*command, "--log-format=json"], env=self.env, stderr=log)
            )

    def events(self, name: str) -> list[dict[str, Any]]:
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        found = [json.loads(line) for line in lines if line.startswith("{")]
        return [one for one in found if one["event"] == name]


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[tuple[Machine, Machine, Machine]]:
    """That of who signs, of the bootstrap peer, of a host."""
    found = Machine(tmp_path / "ann"), Machine(tmp_path / "peer"), Machine(tmp_path / "host")
    try:
        yield found
    finally:
        running = [process for one in found for process in one.processes]
        for process in running:
            process.terminate()
        for process in running:
            process.wait(30)


def test_a_swarm_from_the_commands_alone(
    machines: tuple[Machine, Machine, Machine], tmp_path: Path
) -> None:
    ann, peer, host = machines
    save_llama(tmp_path / "tiny", 2)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        listen = f"/ip4/127.0.0.1/tcp/{free.getsockname()[1]}"
    lab, hive = tmp_path / "lab", tmp_path / "lab/hive.toml"
    ann.run("swarm", "init", lab, "--listen", listen, "--model", tmp_path / "tiny")

    # The bootstrap peer and the host know the root, and no whitelist: that comes from Ann.
    peer.start(
        "bootstrap", "--config", hive, "--key", lab / "keys/bootstrap.key", "--listen", listen
    )
    wait_for(lambda: peer.events("ready"), "the bootstrap peer")
    for machine, role in ((ann, "client"), (host, "host")):
        token = ann.run("invite", role, "--folder", lab).strip()
        machine.run("join", token, "--config", tmp_path / f"{role}.toml")
    said = ann.run("whitelist", "publish", "--folder", lab)
    assert "has whitelist 1" in said
    host.start("serve", tmp_path / "tiny", "--config", tmp_path / "host.toml")
    wait_for(lambda: host.events("ready"), "the host")
    (policy,) = host.events("policy")
    assert policy["policy"] == "whitelist 1 of swarm 'lab'"
    assert "Models: tiny (" in "\n".join(policy["rules"])

    with pytest.MonkeyPatch.context() as patch:
        for name in ("GLASSHIVE_DATA", "GLASSHIVE_CACHE"):
            patch.setenv(name, ann.env[name])
        with glasshive.connect(hive) as swarm:
            model = swarm.model("tiny")
            with model.trace(PROMPT):
                hidden = torch.relu(model.model.layers[1].output).save()
            assert hidden.shape == (1, 7, 32)

            # Relu goes, while the host runs.
            ann.run("whitelist", "bump", "--folder", lab, "--remove-op", "relu")
            key = lab / "keys/owner.key"
            ann.run("whitelist", "sign", "--folder", lab, "--key", key, "--yes")
            assert "has whitelist 2" in ann.run("whitelist", "publish", "--folder", lab)
            wait_for(lambda: len(host.events("policy")) == 2, "the host's new policy")
            # By the client itself, where its own copy is already the new one.
            refused = "'relu' is not allowed here by whitelist 2"
            with pytest.raises((PeerFailed, NotAllowed), match=refused):
                with model.trace(PROMPT):
                    torch.relu(model.model.layers[1].output).save()
