"""Sessions of every end, after which peers hold what they held before: nothing.

Sessions are done, interrupted, cancelled, left by a client whose connection is closed, or by one
whose process is killed, in soak also in the middle of a failover. What a host has open and how much
memory it takes is read from outside; how many traces, bytes promised to them and tasks it has, it
writes down itself whenever a trace has ended. In soak it is also given as many as it allows.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
import soak
import torch
from lingering import HELD_BYTES, NEW, WORK, Then, interrupt, linger
from loud import be_loud
from steady_clients import Question, two_of_each
from waits import wait_for

import glasshive
from glasshive.client.errors import PeerBusy, TraceCancelled
from glasshive.graph.errors import GlasshiveError
from glasshive.peer.host_limits import HostLimits
from glasshive.testing import LocalPeer, LocalSwarm

pytestmark = pytest.mark.timeout(soak.count(400, 7200))

ROUNDS = soak.count(1, 17)  # of 18 sessions each, or 20 in soak
MOST_AT_ONCE = HostLimits().generations_per_client
# What small blocks need. Of a round's nine sessions that end early five are the first host's.
SPARE_BYTES = 2.5 * HELD_BYTES
SETTLED = 1 << 20  # bytes that come and go
STEADY_SECONDS = soak.count(1, 2)
SPARE_TASKS = 2  # of the host's own, which come and go
FREED_SECONDS = 1.0  # in which all peers of a trace are free when it is cancelled
TRIES = soak.count(3, 30)  # each of them


@pytest.fixture(scope="module")
def hive(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalSwarm]:
    """Each half of the blocks by two hosts."""
    with pytest.MonkeyPatch.context() as patch:
        be_loud(patch, tmp_path_factory.mktemp("loud"), "glasshive")
        # Of the hosts: large blocks go back to the system when they are free, as the allocator
        # does by itself until it has learnt sizes. What is left is what is held.
        patch.setenv("MALLOC_MMAP_THRESHOLD_", str(1 << 20))
        cache = tmp_path_factory.mktemp("cache")
        with two_of_each(folder, [(0, 3), (3, 6)], cache) as running:
            yield running


def connected(hive: LocalSwarm) -> glasshive.Swarm:
    """A connection that sees every host."""
    swarm = glasshive.connect(hive.config)
    addresses = {host.address for host in hive.hosts}
    wait_for(
        lambda: addresses <= {one.addresses[0] for one in swarm.records(hive.model_name)},
        "every host is announced",
    )
    return swarm


def routes(hive: LocalSwarm) -> list[list[str]]:
    """Two, of all hosts."""
    ids = [host.peer_id for host in hive.hosts]
    return [ids[:2], ids[2:]]


def fill(model: Any, route: list[str]) -> None:
    """Have the peers run as many generations as they allow, and end them.

    A trace that a peer still held would be one too many: its client would hear that it is busy.
    """
    is_over = threading.Event()
    said: list[BaseException] = []

    def run(streamer: Then) -> None:
        try:
            linger(model, streamer, route=route, retries=0)
        except BaseException as error:
            said.append(error)

    def wait(tracer: Any) -> None:
        is_over.wait()
        interrupt(tracer)

    streamers = [Then(wait) for _ in range(MOST_AT_ONCE)]
    threads = [threading.Thread(target=run, args=(one,), daemon=True) for one in streamers]
    for thread in threads:
        thread.start()
    try:
        wait_for(lambda: said or all(one.has_begun.is_set() for one in streamers), "all run")
        assert not said
        with pytest.raises(PeerBusy):
            peek(model, route)
    finally:
        is_over.set()
    for thread in threads:
        wait_for(lambda thread=thread: not thread.is_alive(), "the interrupt was seen")
    assert {type(one) for one in said} == {KeyboardInterrupt}
    wait_for(lambda: is_free(model, route), "room for another trace")


def peek(model: Any, route: list[str]) -> None:
    with model.trace(torch.tensor([[1, 2]]), route=route, retries=0, deadline=2):
        model.lm_head.output.save()


def is_free(model: Any, route: list[str]) -> bool:
    try:
        peek(model, route)
    except PeerBusy:
        return False
    return True


class Child:
    """A client that is a process of its own: it lingers as often at once as it is told."""

    def __init__(self, hive: LocalSwarm, folder: Path) -> None:
        script = folder / "child.py"
        script.write_text(
            textwrap.dedent(
                f"""
                import signal, sys, threading
                # Python ignores interrupts where whoever started it does.
                signal.signal(signal.SIGINT, signal.default_int_handler)
                sys.path.insert(0, {str(Path(__file__).parents[1])!r})
                import glasshive
                from lingering import Then, linger

                with glasshive.connect({str(hive.config)!r}) as swarm:
                    model = swarm.model({hive.model_name!r})
                    print("ready", flush=True)
                    for line in sys.stdin:
                        count, new, work, *route = line.split()
                        def run():
                            says = Then(lambda tracer: print("runs", flush=True))
                            linger(model, says, new=int(new), work=int(work), route=route)
                        for _ in range(int(count) - 1):
                            threading.Thread(target=run, daemon=True).start()
                        try:
                            run()
                        except KeyboardInterrupt:
                            print("interrupted", flush=True)
                """
            )
        )
        self.process = subprocess.Popen(
            [sys.executable, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        self._lines.extend(iter(self.process.stdout.readline, ""))  # type: ignore[union-attr]

    def says(self, what: str, times: int = 1) -> None:
        """Returns when it has said this so often."""

        def said() -> bool:
            assert self.process.poll() is None, self._lines
            return sum(line.strip() == what for line in self._lines) >= times

        wait_for(said, f"a client says {what!r}; it said {self._lines}")

    def linger(self, count: int, route: list[str], new: int = NEW, work: int = WORK) -> None:
        """Tell it to; returns when tokens of each have come."""
        before = sum(line.strip() == "runs" for line in self._lines)
        self.process.stdin.write(f"{count} {new} {work} {' '.join(route)}\n")  # type: ignore[union-attr]
        self.process.stdin.flush()  # type: ignore[union-attr]
        self.says("runs", before + count)

    def kill(self) -> None:
        """With the network daemon, as if its machine had lost power."""
        with_daemon = [self.process, *psutil.Process(self.process.pid).children(recursive=True)]
        for one in with_daemon:
            one.kill()
        self.close()

    def close(self) -> None:
        """Be sure that it is gone."""
        self.process.kill()
        self.process.wait()
        self._reader.join()
        for pipe in (self.process.stdin, self.process.stdout):
            pipe.close()  # type: ignore[union-attr]


def says_held(host: LocalPeer) -> dict[str, Any]:
    """What a host wrote down that it held when the last of its traces so far had ended.

    Nothing before the first has.
    """
    return next((one for one in reversed(host.events) if one["event"] == "trace_freed"), {})


class Holdings:
    """What hosts hold, by themselves and seen from outside, against what they held before."""

    def __init__(self, hive: LocalSwarm, model: Any) -> None:
        self._hive = hive
        self._tasks: dict[LocalPeer, int] = {}
        wait_for(lambda: not self._still_promised(model), "nothing is promised")
        for host in hive.hosts:
            self._tasks[host] = says_held(host)["tasks"]
        # What was cancelled a moment ago goes once its node is done: the least of what is seen.
        self._before: dict[int, tuple[str, int, int]] = {}
        self._fell_at = time.monotonic()
        wait_for(lambda: self._has_settled(hive), "what peers hold is steady")
        self._spare_fds = len(hive.hosts)  # a daemon may dial each other one

    def _has_settled(self, hive: LocalSwarm) -> bool:
        for host in hive.hosts:
            for pid in host.pids():
                fds, memory_bytes = _held_by(pid)
                _, least_fds, least_bytes = self._before.get(pid, ("", fds, memory_bytes + SETTLED))
                if fds < least_fds or memory_bytes <= least_bytes - SETTLED:
                    self._fell_at = time.monotonic()
                    least = min(fds, least_fds), min(memory_bytes, least_bytes)
                    self._before[pid] = host.name, *least
        return time.monotonic() > self._fell_at + STEADY_SECONDS

    def __str__(self) -> str:
        return f"as before; since then {self.report()}"

    def _still_promised(self, model: Any) -> list[str]:
        """Which hosts have places or memory that somebody has, behind one more trace of ours."""
        for route in routes(self._hive):
            peek(model, route)
        return [
            f"{host.name}: {held}"
            for host in self._hive.hosts
            for held in [says_held(host)]
            if not held or held["traces"] or held["promised_bytes"]
        ]

    def more(self, model: Any) -> list[str]:
        """What those that still run hold beyond that."""
        found = self._still_promised(model)
        for host, tasks in self._tasks.items():
            if (now := says_held(host)["tasks"]) > tasks + SPARE_TASKS:
                found.append(f"{host.name}: {now} tasks, {tasks} before")
        for pid, (name, fds, memory_bytes) in self._before.items():
            if not psutil.pid_exists(pid):
                continue
            process = psutil.Process(pid)
            now_fds, now_bytes = _held_by(pid)
            spare_fds = self._spare_fds if process.name() == "p2pd" else 0
            if now_fds > fds + spare_fds or now_bytes > memory_bytes + SPARE_BYTES:
                found.append(
                    f"{process.name()} of {name}: {now_fds} files, {fds} before; "
                    f"{now_bytes >> 20} MiB, {memory_bytes >> 20} before"
                )
        return found

    def report(self) -> list[str]:
        """The change in tasks, and for each process in open files and in MiB."""
        tasks = [
            f"{host.name}: {says_held(host)['tasks'] - before:+} tasks"
            for host, before in self._tasks.items()
        ]
        return tasks + [
            f"{psutil.Process(pid).name()} of {name}: {now[0] - fds:+} files, "
            f"{(now[1] - memory_bytes) / 2**20:+.0f} MiB"
            for pid, (name, fds, memory_bytes) in self._before.items()
            if psutil.pid_exists(pid)
            for now in [_held_by(pid)]
        ]


def _held_by(pid: int) -> tuple[int, int]:
    """Open files, and resident bytes."""
    process = psutil.Process(pid)
    return process.num_fds(), process.memory_info().rss


def events(host: LocalPeer, name: str) -> int:
    return sum(one["event"] == name for one in host.events)


def done(model: Any, asked: list[Question], count: int) -> None:
    """Sessions that come to their end."""
    for i in range(count):
        question = asked[i % len(asked)]
        got, _ = question.ask(model, lambda: None)
        assert all(map(torch.equal, got, question.wanted)), question.name


def interrupted(model: Any, route: list[str]) -> None:
    """A session that its user has enough of."""
    with pytest.raises(KeyboardInterrupt):
        linger(model, Then(interrupt), route=route)


def interrupted_by_ctrl_c(hive: LocalSwarm, child: Child) -> float:
    """A session of a client that goes on; in how many seconds its peers had ended it.

    Nothing but the interrupt ends it there: it would have run for a minute.
    """
    peers = hive.hosts[:2]

    def ends() -> list[list[int]]:
        return [[events(host, name) for name in ("client_left", "trace_failed")] for host in peers]

    child.linger(1, [host.peer_id for host in peers], new=100, work=2400)
    before, done_before = ends(), [events(host, "trace_done") for host in peers]
    began = time.monotonic()
    child.process.send_signal(signal.SIGINT)
    wait_for(
        lambda: all(now != then for now, then in zip(ends(), before, strict=True)),
        "both peers left the trace",
    )
    seconds = time.monotonic() - began
    child.says("interrupted")
    assert [events(host, "trace_done") for host in peers] == done_before
    assert seconds < 15, "of a minute"
    assert child.process.poll() is None
    return seconds


def cancelled(model: Any, route: list[str]) -> None:
    """A session that another thread ends."""
    then = Then()

    def cancel() -> None:
        then.has_begun.wait()
        then.tracer.cancel()

    other = threading.Thread(target=cancel, daemon=True)
    other.start()
    with pytest.raises(TraceCancelled):
        linger(model, then, route=route)


def cut_off(hive: LocalSwarm, route: list[str]) -> None:
    """A session of a client whose connection is closed in the middle."""
    with connected(hive) as swarm:
        model = swarm.model(hive.model_name)
        with pytest.raises(GlasshiveError):
            linger(model, Then(lambda tracer: swarm.close()), route=route)


def orphaned(child: Child, route: list[str]) -> None:
    """Two sessions of a client that is no more."""
    child.linger(2, route)
    child.kill()


def orphaned_in_failover(hive: LocalSwarm, child: Child) -> None:
    """Two of one that is gone just as another peer has taken a lost one's part."""
    first, *lasts = hive.hosts[0], hive.hosts[1], hive.hosts[3]
    before = {host: events(host, "trace_accepted") for host in lasts}
    child.linger(2, [host.peer_id for host in (first, *lasts)])
    victim = max(lasts, key=lambda host: events(host, "trace_accepted") - before[host])
    other = lasts[victim is lasts[0]]
    taken = events(other, "trace_accepted")
    victim.kill()
    wait_for(lambda: events(other, "trace_accepted") > taken, "another has taken the part")
    child.kill()
    victim.restart()


def ctrl_c(tracer: Any) -> None:
    """What a terminal does to the process; its main thread is that of the trace."""
    assert threading.current_thread() is not threading.main_thread()
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


def seconds_until_free(hive: LocalSwarm, model: Any, end: Callable[[Any], object]) -> float:
    """From when another thread ends a generation until both of its peers hold nothing of it.

    By the hosts' own words, and the clock that all here have.
    """
    peers, then = hive.hosts[:2], Then()
    ended_at: list[float] = []

    def end_it() -> None:
        then.has_begun.wait()
        ended_at.append(time.time())
        end(then.tracer)

    other = threading.Thread(target=end_it, daemon=True)
    other.start()
    with pytest.raises((KeyboardInterrupt, TraceCancelled)):
        linger(model, then, new=100, route=[host.peer_id for host in peers])
    other.join()

    def freed_at(host: LocalPeer) -> float:
        """When it said that it holds nothing any more; 0.0 if it has not."""
        held = says_held(host)
        if not held or held["traces"] or held["promised_bytes"]:
            return 0.0
        at = datetime.fromisoformat(held["timestamp"]).timestamp()
        return at if at > ended_at[0] else 0.0

    wait_for(lambda: all(map(freed_at, peers)), "both peers are free")
    return max(map(freed_at, peers)) - ended_at[0]


@pytest.mark.parametrize("end", [lambda tracer: tracer.cancel(), ctrl_c], ids=["cancel", "ctrl-c"])
def test_who_cancels_frees_every_peer_within_a_second(
    end: Callable[[Any], object],
    hive: LocalSwarm,
    record_property: Callable[[str, object], None],
) -> None:
    """Each time. A node that has begun to compute is waited for: here it takes some 0.1 s.

    Without the end the generation would go on for many seconds, which also is what it fails with
    where `Cancel` doesn't reach a peer.
    """
    seconds: list[float] = []
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with connected(hive) as swarm:
            model = swarm.model(hive.model_name)
            for _ in range(TRIES):
                seconds.append(seconds_until_free(hive, model, end))
    finally:
        signal.signal(signal.SIGINT, handler)
    print(seconds)
    record_property("seconds until every peer was free", seconds)
    assert max(seconds) < FREED_SECONDS, seconds


def test_sessions_leave_nothing_behind(
    hive: LocalSwarm,
    asked: list[Question],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    """Half of them end before they are done.

    Fails where a host keeps a trace whose client is gone (`Host._run` without its watch), the
    matrix of one (without `HostedTrace.forget`, as it refers to itself), or a task of one
    (`ClientStream.heard` without its last line).
    """
    with connected(hive) as swarm:
        model = swarm.model(hive.model_name)
        done(model, asked, len(asked))
        for route in routes(hive):  # as much as they ever hold
            fill(model, route)
        before = Holdings(hive, model)
        freed_seconds = []
        for _ in range(ROUNDS):
            children = [Child(hive, tmp_path) for _ in range(soak.count(1, 2))]
            try:
                done(model, asked, 9)
                for route in routes(hive):
                    interrupted(model, route)
                    cancelled(model, route)
                    cut_off(hive, route)
                for child in children:
                    child.says("ready")
                freed_seconds.append(interrupted_by_ctrl_c(hive, children[0]))
                orphaned(children[0], routes(hive)[1])
                if soak.SOAK:
                    orphaned_in_failover(hive, children[1])
            finally:
                for child in children:
                    child.close()
    with connected(hive) as swarm:  # which sees who was started again
        model = swarm.model(hive.model_name)
        wait_for(lambda: not before.more(model), before)
        told_of = [f"freed after {max(freed_seconds):.2f} s at most", *before.report()]
        print(*told_of, sep="\n")
        record_property("leaks", told_of)
        if soak.SOAK:
            for route in routes(hive):
                fill(model, route)
