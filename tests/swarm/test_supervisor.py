"""The supervisor over real processes that are small scripts: dying, hanging, overdue, stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from glasshive.peer.supervisor import Reporter

# Runs a supervisor over a script, with limits short enough for tests.
SUPERVISOR = """
import asyncio, sys
from glasshive.peer.supervisor import Supervisor, SupervisorLimits
from glasshive.terminal import set_up_logging
set_up_logging("json")
script, ending, spare = sys.argv[1:]
limits = SupervisorLimits(
    start_seconds=20, heartbeat_seconds=1.5, overdue_seconds=1, stop_seconds=2,
    first_pause_seconds=0.05, useless_starts=3, spare_pause_seconds=0.2,
)
def command(descriptor, listen):
    return [sys.executable, "-c", script, str(descriptor), listen or "-"]
def waiting(descriptor):
    return [sys.executable, "-c", spare, str(descriptor), "spare"]
one = Supervisor(command, limits, spare=waiting if spare else None)
sys.exit(asyncio.run(one.run(until_stdin_ends=ending == "yes")))
"""

# What every script of a host process begins with.
HOST = """
import asyncio, os, signal, sys, time
from glasshive.peer.supervisor import Reporter, stdin_ended, wait_for_turn
reporter = Reporter(int(sys.argv[1]))
print("started", os.getpid(), sys.argv[2], flush=True)
def serve(for_seconds=60.0, overdue=0.0):
    reporter.ready("/ip4/127.0.0.1/tcp/4001")
    ends_at = time.monotonic() + for_seconds
    while time.monotonic() < ends_at:
        reporter.beat(overdue)
        time.sleep(0.1)
"""


class Running:
    """A supervisor in a process of its own."""

    def __init__(
        self, script: str, folder: Path, *, until_stdin_ends: bool = False, spare: str = ""
    ) -> None:
        self.out = folder / "out"
        ending = "yes" if until_stdin_ends else "no"
        spare = HOST + textwrap.dedent(spare) if spare else ""
        with self.out.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-c", SUPERVISOR, HOST + textwrap.dedent(script), ending, spare],
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=out,
            )

    @property
    def text(self) -> str:
        return self.out.read_text()

    @property
    def started(self) -> list[list[str]]:
        """Process id and former address of each host process, in order."""
        lines = (line.split() for line in self.text.splitlines())
        return [words[1:] for words in lines if words[:1] == ["started"]]

    def wait_for(self, condition: Callable[[], object]) -> None:
        ends_at = time.monotonic() + 20
        while not condition():
            if time.monotonic() > ends_at:
                pytest.fail(f"not in time; it wrote:\n{self.text}")
            time.sleep(0.02)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdin is not None
        self.process.stdin.close()


DEAF = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("deaf", flush=True)
serve()
"""

Run = Callable[..., Running]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    made: list[Running] = []

    def start(script: str, **how: Any) -> Running:
        made.append(Running(script, tmp_path, **how))
        return made[-1]

    yield start
    for one in made:
        one.end()


def alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_process_that_dies_is_started_again_where_it_listened(run: Run) -> None:
    running = run("serve(0.2)\nos.kill(os.getpid(), signal.SIGKILL)")
    running.wait_for(lambda: len(running.started) >= 3)
    assert [one[1] for one in running.started[:3]] == ["-", *["/ip4/127.0.0.1/tcp/4001"] * 2]
    assert "host_process_ended" in running.text


@pytest.mark.parametrize(("policy", "seen"), [(None, "20000 PASSIVE"), ("ACTIVE", "None ACTIVE")])
def test_openmp_s_threads_wait_awake_a_little_or_as_the_user_says(
    run: Run, monkeypatch: pytest.MonkeyPatch, policy: str | None, seen: str
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    if policy is not None:
        monkeypatch.setenv("OMP_WAIT_POLICY", policy)
    say = 'print(*map(os.environ.get, ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")), flush=True)'
    running = run(f"{say}\nserve()")
    running.wait_for(lambda: seen in running.text)


def test_a_process_without_a_heartbeat_is_killed(run: Run) -> None:
    running = run("serve(0.2)\ntime.sleep(60)")
    running.wait_for(lambda: len(running.started) == 2)
    assert "no sign of life for 1.5 s" in running.text
    assert not alive(running.started[0][0])


def test_a_process_that_ignores_signals_in_an_overdue_pass_is_killed(run: Run) -> None:
    running = run("signal.signal(signal.SIGTERM, signal.SIG_IGN)\nserve(60, overdue=1.5)")
    running.wait_for(lambda: len(running.started) == 2)
    assert "a pass is 1.500 s past its deadline" in running.text


def test_a_pass_that_is_a_little_late_is_left_alone(run: Run) -> None:
    running = run("serve(1.0, overdue=0.9)\nos._exit(3)")
    running.wait_for(lambda: len(running.started) == 2)
    assert "past its deadline" not in running.text


def test_one_that_ends_before_it_is_ready_is_not_started_again(run: Run) -> None:
    running = run("os._exit(7)")
    assert running.process.wait(20) == 7
    assert len(running.started) == 1


def test_one_that_is_never_ready_again_is_given_up(run: Run) -> None:
    running = run(
        """
        if sys.argv[2] == "-":
            serve(0.2)
            os._exit(3)
        print("the port is taken", flush=True)
        os._exit(7)
        """
    )
    assert running.process.wait(20) == 7
    assert len(running.started) == 1 + 3
    assert "it was started 3 times and was never ready" in running.text
    assert "/ip4/127.0.0.1/tcp/4001 is in use by another process" in running.text


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stop_lets_the_process_end_cleanly(run: Run, number: signal.Signals) -> None:
    running = run(
        """
        def stop(*_):
            print("withdrawn", flush=True)
            os._exit(0)
        signal.signal(signal.SIGTERM, stop)
        print("listening", flush=True)
        serve()
        """
    )
    running.wait_for(lambda: "listening" in running.text)
    running.process.send_signal(number)
    assert running.process.wait(20) == 0
    assert "withdrawn" in running.text


def test_one_that_does_not_stop_is_killed(run: Run) -> None:
    running = run(
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('deaf', flush=True)\nserve()"
    )
    running.wait_for(lambda: "deaf" in running.text)
    running.process.send_signal(signal.SIGINT)
    assert running.process.wait(20) == 0
    assert "did not stop" in running.text
    assert not alive(running.started[0][0])


def test_a_second_interrupt_does_not_wait(run: Run) -> None:
    running = run(
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('deaf', flush=True)\nserve()"
    )
    running.wait_for(lambda: "deaf" in running.text)
    began = time.monotonic()
    running.process.send_signal(signal.SIGINT)
    while running.process.poll() is None and time.monotonic() < began + 20:
        running.process.send_signal(signal.SIGINT)
        time.sleep(0.05)
    assert time.monotonic() - began < 1.9  # less than the two seconds that it may take
    assert not alive(running.started[0][0])


def test_the_end_of_standard_input_stops_both(run: Run) -> None:
    running = run("asyncio.run(stdin_ended())", until_stdin_ends=True)
    running.wait_for(lambda: running.started)
    assert running.process.stdin is not None
    running.process.stdin.close()
    assert running.process.wait(20) == 0
    running.wait_for(lambda: not alive(running.started[0][0]))


def test_a_process_ends_when_its_supervisor_is_killed(run: Run) -> None:
    running = run("asyncio.run(stdin_ended())")
    running.wait_for(lambda: running.started)
    running.process.kill()
    running.wait_for(lambda: not alive(running.started[0][0]))


# It waits for its turn, says where it is to listen, and serves for a while.
SPARE = """
turn = wait_for_turn()
print("turn of", os.getpid(), turn and (turn.address, turn.pace), flush=True)
serve(60 if turn else 0)
"""


def test_a_spare_process_takes_the_place_of_one_that_ends(run: Run) -> None:
    # It ends once the spare one, which has printed, is there.
    running = run(
        """
        out = open("/proc/self/fd/1").name
        reporter.ready("/ip4/127.0.0.1/tcp/4001", '{"a":1, "b":2}')
        while b"spare" not in open(out, "rb").read():
            reporter.beat(0)
            time.sleep(0.02)
        os._exit(3)
        """,
        spare=SPARE,
    )
    running.wait_for(lambda: "turn of" in running.text)
    (_, address), (spare, kind) = running.started[:2]
    assert (address, kind) == ("-", "spare")
    handed = ("/ip4/127.0.0.1/tcp/4001", '{"a":1, "b":2}')
    assert f"turn of {spare} {handed}" in running.text
    running.wait_for(lambda: len(running.started) == 3)  # there is another one for the next time
    assert running.started[2][1] == "spare"
    running.process.send_signal(signal.SIGINT)
    assert running.process.wait(20) == 0
    running.wait_for(lambda: not any(alive(pid) for pid, _ in running.started))


def test_a_pace_is_not_taken_over_from_a_pass_that_outran_it(run: Run) -> None:
    running = run(
        """
        out = open("/proc/self/fd/1").name
        reporter.ready("/ip4/127.0.0.1/tcp/4001", "fast")
        while b"spare" not in open(out, "rb").read():
            reporter.beat(0)
            time.sleep(0.02)
        while True:
            reporter.beat(1.5)
            time.sleep(0.02)
        """,
        spare=SPARE,
    )
    running.wait_for(lambda: "turn of" in running.text)
    assert f"turn of {running.started[1][0]} {('/ip4/127.0.0.1/tcp/4001', '')}" in running.text


def test_a_spare_process_that_has_died_is_replaced(run: Run) -> None:
    running = run("serve()", spare="os._exit(9)")
    running.wait_for(lambda: [kind for _, kind in running.started].count("spare") >= 3)
    assert "spare_process_ended" in running.text
    assert [kind for _, kind in running.started].count("-") == 1


def test_a_spare_process_that_has_died_is_not_waited_for(run: Run) -> None:
    running = run("serve(1.0)\nos._exit(3)", spare="os._exit(9)")

    def places() -> list[str]:
        return [kind for _, kind in running.started if kind != "spare"]

    running.wait_for(lambda: len(places()) >= 2)
    assert places()[:2] == ["-", "/ip4/127.0.0.1/tcp/4001"]


def test_a_spare_process_ends_when_its_supervisor_is_killed(run: Run) -> None:
    running = run("serve()\n", spare=SPARE)
    running.wait_for(lambda: len(running.started) == 2)
    running.process.kill()
    running.wait_for(lambda: not alive(running.started[1][0]))


def test_a_report_never_blocks() -> None:
    reading, writing = os.pipe()
    try:
        reporter = Reporter(writing)
        for _ in range(20_000):  # far more than a pipe holds
            reporter.beat(0.0)
        os.close(reading)
        reporter.beat(0.0)
        reporter.ready("/ip4/127.0.0.1/tcp/1")
        assert reporter.is_ready
    finally:
        os.close(writing)
