"""Ends and starts as users meet them: signals to the demo, a host whose bootstrap is away."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from waits import wait_for

from glasshive.testing import LocalSwarm

DEADLINE_SECONDS = 120.0
BLOCKS = 30  # as many as the demo's model has

# The demo on a tiny model; with "connected" it stays where a client is connected.
DEMO = """
import sys, time
from pathlib import Path
import glasshive.demo
from glasshive import cli

folder, stage, mark = sys.argv[1:]
glasshive.demo._fetch = lambda console: Path(folder)

def stay(console, records):
    Path(mark).touch()
    while True:
        time.sleep(0.02)

if stage == "connected":
    glasshive.demo._print_peers = stay
sys.argv = ["glasshive", "demo", "--cuts", ""]
cli.main()
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=BLOCKS,
        num_attention_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("stage", "signals"),
    [
        ("starting", [signal.SIGHUP]),
        ("connected", [signal.SIGINT, signal.SIGINT, signal.SIGTERM]),
    ],
    ids=lambda value: value if isinstance(value, str) else "+".join(one.name for one in value),
)
def test_a_demo_that_is_ended_leaves_nothing(
    tiny: Path, tmp_path: Path, stage: str, signals: list[signal.Signals]
) -> None:
    mark, temporary = tmp_path / "mark", tmp_path / "tmp"
    temporary.mkdir()
    demo = subprocess.Popen(
        [sys.executable, "-c", DEMO, str(tiny), stage, str(mark)],
        env={**os.environ, "TMPDIR": str(temporary), "GLASSHIVE_CACHE": str(tmp_path / "cache")},
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    children: list[psutil.Process] = []

    def started() -> bool:
        assert demo.poll() is None, "the demo ended by itself"
        children[:] = psutil.Process(demo.pid).children(recursive=True)
        # Bootstrap and host are a supervisor, a process and a network daemon each.
        return mark.exists() if stage == "connected" else len(children) > 3

    try:
        wait_for(started, stage)
        assert list(temporary.glob("glasshive-swarm-*"))
        for number in signals:
            demo.send_signal(number)
        assert demo.wait(DEADLINE_SECONDS) == 128 + signals[0]
        wait_for(lambda: not any(_runs(one) for one in children), "every process has ended")
        assert not list(temporary.glob("glasshive-swarm-*"))
    finally:
        if demo.poll() is None:
            demo.kill()
            demo.wait()


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def test_a_host_waits_for_its_bootstrap(tiny: Path) -> None:
    with LocalSwarm(tiny, [(0, BLOCKS)]) as hive:
        (host,) = hive.hosts
        hive.bootstrap.kill()
        host.stop()
        before = len(host.events)
        host.start()

        def waits() -> list[dict[str, object]]:
            events = host.events[before:]
            return [one for one in events if one.get("event") == "waiting_for_bootstrap"]

        wait_for(lambda: len(waits()) > 1, "it says a second time that it waits")
        assert host.running
        first, second, *_ = waits()
        assert first["why"] == f"{hive.bootstrap.address}: nothing listens there"
        assert (first["again_in_seconds"], second["again_in_seconds"]) == (1.0, 2.0)
        hive.bootstrap.restart()
        host.wait_ready()
