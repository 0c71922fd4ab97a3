"""A kernel that never ends, in a real host process under a real supervisor, and what comes after.

The kernel is a sleep in place of an op, which nothing in the process interrupts either. The host's
deadline is shortened, so that it is not waited for.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llama import save_llama

import glasshive
from glasshive.client.errors import PeerLost
from glasshive.graph.errors import GlasshiveError

SUPERVISOR = """
import asyncio, sys
from glasshive.peer.supervisor import Supervisor
from glasshive.terminal import set_up_logging
set_up_logging("json")
host, folder, key = sys.argv[1:]
def command(report, listen=None):
    return [
        sys.executable, "-c", host, "serve", folder, "--key", key, "--log-format", "json",
        "--report-descriptor", str(report), "--listen", listen or "/ip4/127.0.0.1/tcp/0",
    ]
def waiting(report):
    return [*command(report), "--stand-by"]
sys.exit(asyncio.run(Supervisor(command, spare=waiting).run(until_stdin_ends=True)))
"""

HOST = """
import sys, time
from glasshive.cli import main
from glasshive.peer import executor, host_limits, supervisor
wait_for_turn = supervisor.wait_for_turn
def stand_by():
    print("standing by", flush=True)
    return wait_for_turn()
supervisor.wait_for_turn = stand_by
run_op = executor.run_op
def runs_on(name, *args, **how):
    if name == "sinh":
        time.sleep(3600)
    return run_op(name, *args, **how)
executor.run_op = runs_on
host_limits.HostLimits.runaway_seconds = lambda self, estimated_seconds: 0.5
main()
"""

PROMPT = torch.tensor([[3, 14, 15, 9]])


class Served:
    """A host of a tiny model, alone in its swarm."""

    def __init__(self, folder: Path) -> None:
        model = save_llama(folder / "tiny", 6)
        self._out = folder / "out"
        arguments = [HOST, str(model), str(folder / "host.key")]
        with self._out.open("wb") as out:
            self._process = subprocess.Popen(
                [sys.executable, "-c", SUPERVISOR, *arguments],
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=out,
            )

    @property
    def text(self) -> str:
        return self._out.read_text()

    def events(self, name: str) -> list[dict[str, Any]]:
        lines = [line for line in self.text.splitlines() if line.startswith("{")]
        return [one for one in map(json.loads, lines) if one.get("event") == name]

    def wait_for(self, condition: Callable[[], object]) -> None:
        ends_at = time.monotonic() + 60
        while not condition():
            if time.monotonic() > ends_at:
                pytest.fail(f"not in time; it wrote:\n{self.text}")
            time.sleep(0.02)

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()  # which stops the host process, too
        self._process.wait(30)


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Served]]:
    monkeypatch.setenv("GLASSHIVE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("GLASSHIVE_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("GLASSHIVE_CONFIG", str(tmp_path / "none.toml"))
    (tmp_path / "none.toml").write_text('swarm = "runaway"\n')
    made: list[Served] = []

    def start() -> Served:
        made.append(Served(tmp_path))
        return made[-1]

    yield start
    for one in made:
        one.end()


def test_a_pass_that_never_ends_is_killed_and_the_next_request_served(
    serve: Callable[[], Served], tmp_path: Path
) -> None:
    served = serve()
    served.wait_for(lambda: served.events("ready") and "standing by" in served.text)
    (ready,) = served.events("ready")
    config = tmp_path / "hive.toml"
    config.write_text(
        f'swarm = "runaway"\nbootstraps = ["{ready["address"]}"]\nkey = "client.key"\n'
    )
    with glasshive.connect(config) as swarm:
        model = swarm.model("tiny")

        def good() -> torch.Tensor:
            with model.trace(PROMPT):
                saved = model.model.layers[3].output.save()
            return saved + 0

        before = good()
        with pytest.raises(PeerLost):
            with model.trace(PROMPT, retries=0):
                model.model.layers[3].output.sinh().save()
        after: list[torch.Tensor] = []

        def again() -> bool:
            try:
                after.append(good())
            except GlasshiveError:
                return False
            return True

        served.wait_for(again)
        served_at = time.time()
    assert torch.equal(after[0], before)
    (killed,) = served.events("host_process_killed")
    assert "s past its deadline" in killed["why"]
    _, second = served.events("ready")
    # Printed, not asserted.
    ready_seconds = at(second) - at(killed)
    served_seconds = served_at - at(killed)
    print(f"ready {ready_seconds:.2f} s, this client {served_seconds:.2f} s after")


def at(event: dict[str, Any]) -> float:
    return datetime.fromisoformat(event["timestamp"]).timestamp()
