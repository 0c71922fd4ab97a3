"""The supervisor: a small process that starts a host process, watches it, and starts it again.

A kernel can't be interrupted and a library can hang, so the process that computes is not the one
that decides how long. Rules:

1. The host process is in a session of its own: a terminal's Ctrl-C reaches only the supervisor,
   which asks the host process to stop (SIGTERM), and so the record is withdrawn first.
2. The host process holds two pipes. Over one it reports; when the other, its standard input, ends,
   the supervisor is gone, and it stops by itself.
3. It is killed when no report has come for `heartbeat_seconds`, or when it reports a pass that has
   outrun its hard deadline by `overdue_seconds`.
4. When it ends uninvited it is started again, after a pause that doubles at each failure in a row.
   If the first one ends before it was ready it has said why: then the supervisor ends with its exit
   code. So it does after several in a row that were never ready, such as when their port is taken.
5. Once the host process is ready a spare one is started, which does all that takes seconds and
   needs no weights, and waits. It takes the place of the one that ends: a line ``go ADDRESS PACE``
   on its standard input, where ADDRESS is the one to listen at. A spare one that ends meanwhile is
   replaced.

Reports are lines: ``beat OVERDUE_SECONDS`` every second, ``ready ADDRESS PACE`` once. PACE is what
the process has measured; the supervisor doesn't read it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from asyncio.subprocess import Process
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

log = logging.getLogger(__name__)

BEAT_SECONDS: Final = 1.0
_MAX_LINE_BYTES: Final = 4096
# How OpenMP's threads wait for the next kernel: the GNU runtime's spin for 0.2 ms, longer than the
# Python between two kernels takes, then sleep; others' sleep at once. To sleep between all kernels
# costs a tenth of a pass, and threads that spin for longer take the cores from whatever runs here.
_WAITING_THREADS: Final = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "20000"}
_STOP_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True, slots=True)
class SupervisorLimits:
    """When the supervisor acts."""

    start_seconds: float = 120.0  # to the first report, imports included
    heartbeat_seconds: float = 30.0
    overdue_seconds: float = 1.0  # the deadline itself has all the patience there is
    stop_seconds: float = 15.0
    first_pause_seconds: float = 0.25
    longest_pause_seconds: float = 60.0
    steady_seconds: float = 60.0  # after so long in service, failures are counted from none
    spare_pause_seconds: float = 60.0  # at least, from the start of a spare one to the next one's
    useless_starts: int = 10  # in a row, none of which was ready: over 2 minutes


class Reporter:
    """The host process's end of the report pipe. Never blocks, and never fails for the pipe's sake.

    A report that finds the pipe full is left out: the supervisor is stopped, and wants the latest.
    """

    def __init__(self, descriptor: int) -> None:
        os.set_blocking(descriptor, False)
        os.set_inheritable(descriptor, False)
        self._descriptor = descriptor
        self.is_ready = False

    def beat(self, overdue_seconds: float) -> None:
        """The process is alive; its pass is this much over its deadline (0 or less: in time)."""
        self._write(f"beat {overdue_seconds:.3f}\n")

    def ready(self, address: str, pace: str = "") -> None:
        """The process serves, listening at `address` (a multiaddr without the peer id).

        `pace`, one line, is for the process that may come in its place.
        """
        self.is_ready = True
        self._write(f"ready {address} {pace}\n")

    def _write(self, line: str) -> None:
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            os.write(self._descriptor, line.encode())


@dataclass(frozen=True, slots=True)
class Turn:
    """What the process before this one had: where it listened, and its pace, empty if unsaid."""

    address: str
    pace: str


def wait_for_turn() -> Turn | None:
    """As a spare process: its turn, once that has come. None if whoever started it has gone."""
    line = sys.stdin.buffer.readline(_MAX_LINE_BYTES).decode().strip()
    word, _, rest = line.partition(" ")
    address, _, pace = rest.partition(" ")
    return Turn(address, pace) if word == "go" else None


async def stdin_ended() -> None:
    """Returns when standard input, a pipe, has ended: whoever held it is gone."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    transport, _ = await loop.connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin.buffer
    )
    try:
        while await reader.read(_MAX_LINE_BYTES):
            pass
    finally:
        transport.close()


def _environment() -> dict[str, str]:
    """This process's own, with `_WAITING_THREADS` unless the user has said how threads wait."""
    chosen = any(name in os.environ for name in _WAITING_THREADS)
    return {**({} if chosen else _WAITING_THREADS), **os.environ}


def _killed(why: str) -> None:
    log.error("host_process_killed", extra={"why": why})


@dataclass(frozen=True, slots=True)
class _Started:
    """A process, and the end of the pipe from which its reports are read."""

    process: Process
    reading: int


class Supervisor:
    """Keeps one host process running until it is told to stop.

    `command(report_descriptor, listen)` is its command line; `listen` is the address that an
    earlier process listened at, or None. `spare(report_descriptor)` is that of a spare one, which
    calls `wait_for_turn`; None for no spare.
    """

    def __init__(
        self,
        command: Callable[[int, str | None], Sequence[str]],
        limits: SupervisorLimits | None = None,
        *,
        spare: Callable[[int], Sequence[str]] | None = None,
    ) -> None:
        self._command = command
        self._spare_command = spare
        self._spare: asyncio.Task[_Started | None] | None = None
        self._spare_began = 0.0  # by the loop's clock
        self._limits = limits or SupervisorLimits()
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._listen: str | None = None
        self._pace = ""
        self._was_ready = False  # any process of this supervisor
        self._is_ready = False  # the one that runs, or ran last

    async def run(self, *, until_stdin_ends: bool = False) -> int:
        """The exit code: 0 after a stop that was asked for, else what the host process said."""
        loop = asyncio.get_running_loop()
        for number in _STOP_SIGNALS:
            loop.add_signal_handler(number, self.stop)
        watch = asyncio.create_task(stdin_ended()) if until_stdin_ends else None
        if watch is not None:
            watch.add_done_callback(lambda _: self.stop())
        try:
            return await self._keep_running()
        finally:
            if self._spare is not None and (started := await self._spare) is not None:
                await self._discard(started)
            if watch is not None:
                watch.cancel()
            for number in _STOP_SIGNALS:
                loop.remove_signal_handler(number)

    def stop(self) -> None:
        """Stop the host process cleanly; asked a second time, at once."""
        if self._stop.is_set():
            self._hurry.set()
        self._stop.set()

    async def _keep_running(self) -> int:
        limits = self._limits
        failures = useless = 0
        while True:
            began = asyncio.get_running_loop().time()
            code = await self._run_once()
            if self._stop.is_set():
                return 0
            if not self._was_ready:
                return code if code > 0 else 1
            useless = 0 if self._is_ready else useless + 1
            if useless == limits.useless_starts:
                log.error(
                    "host_process_given_up",
                    extra={
                        "code": code,
                        "why": f"it was started {useless} times and was never ready; what it wrote "
                        f"last says why, such as that {self._listen} is in use by another process",
                    },
                )
                return code if code > 0 else 1
            if asyncio.get_running_loop().time() - began > limits.steady_seconds:
                failures = 0
            pause = min(limits.first_pause_seconds * 2**failures, limits.longest_pause_seconds)
            failures += 1
            log.warning("host_process_ended", extra={"code": code, "restart_in_seconds": pause})
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._stop.wait()
                return 0

    async def _run_once(self) -> int:
        """Start the process and see it to its end; its exit code, negative for a signal."""
        self._is_ready = False
        listen = self._listen
        started = await self._take_spare() or await self._start(
            lambda writing: self._command(writing, listen)
        )
        process = started.process
        log.debug("host_process_started", extra={"pid": process.pid})
        watch = asyncio.create_task(self._watch(process, started.reading))
        stop = asyncio.create_task(self._stop.wait())
        ended = asyncio.create_task(process.wait())
        try:
            await asyncio.wait({stop, ended}, return_when=asyncio.FIRST_COMPLETED)
            if not ended.done():
                await self._end(process, ended)
            return await ended
        finally:
            if process.returncode is None:
                process.kill()
            for task in (watch, stop, ended):
                task.cancel()
            await asyncio.wait({watch, stop, ended})

    async def _start(self, command: Callable[[int], Sequence[str]]) -> _Started:
        reading, writing = os.pipe()
        try:
            process = await asyncio.create_subprocess_exec(
                *command(writing),
                stdin=asyncio.subprocess.PIPE,
                pass_fds=(writing,),
                start_new_session=True,
                env=_environment(),
            )
        except BaseException:
            os.close(reading)
            raise
        finally:
            os.close(writing)
        return _Started(process, reading)

    def _begin_spare(self) -> None:
        self._spare_began = asyncio.get_running_loop().time()
        self._spare = asyncio.create_task(self._start_spare())

    def _spare_has_ended(self) -> bool:
        """Whether it is time for another one; what was left of the last is given up then."""
        if self._spare is None or not self._spare.done():
            return False
        since_seconds = asyncio.get_running_loop().time() - self._spare_began
        started = self._spare.result()
        if started is None or started.process.returncode is None:
            return False
        if since_seconds < self._limits.spare_pause_seconds:
            return False
        os.close(started.reading)
        log.warning("spare_process_ended", extra={"code": started.process.returncode})
        return True

    async def _start_spare(self) -> _Started | None:
        if self._spare_command is None:
            return None
        try:
            return await self._start(self._spare_command)
        except OSError as error:  # it is a convenience: the machine may have no room for it
            log.warning("spare_process_not_started", extra={"error": str(error)})
            return None

    async def _take_spare(self) -> _Started | None:
        """The spare process, told that it is its turn; None if there is none, or it has died."""
        started = None if self._spare is None else await self._spare
        self._spare = None
        if started is None:
            return None
        stdin = started.process.stdin
        if started.process.returncode is None and stdin is not None:
            with contextlib.suppress(ConnectionError):
                stdin.write(f"go {self._listen} {self._pace}\n".encode())
                await stdin.drain()
                return started
        await self._discard(started)
        return None

    async def _discard(self, started: _Started) -> None:
        """End a spare process, and read no report of it."""
        os.close(started.reading)
        if started.process.returncode is None:
            started.process.kill()
        await started.process.wait()

    async def _end(self, process: Process, ended: asyncio.Task[int]) -> None:
        """Ask it to stop; kill it when that takes too long or the user insists."""
        process.terminate()
        hurry = asyncio.create_task(self._hurry.wait())
        await asyncio.wait(
            {ended, hurry},
            timeout=self._limits.stop_seconds,
            return_when=asyncio.FIRST_COMPLETED,
        )
        hurry.cancel()
        if not ended.done():
            _killed("it did not stop when it was asked to")
            process.kill()

    async def _watch(self, process: Process, reading: int) -> None:
        """Read reports, and kill the process when they stay away or say that a pass is overdue."""
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(limit=_MAX_LINE_BYTES)
        transport, _ = await loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(reading, "rb", buffering=0)
        )
        wait_seconds = self._limits.start_seconds
        try:
            while True:
                line = await self._next_report(reader, wait_seconds)
                if line is None:
                    _killed(f"no sign of life for {wait_seconds:g} s")
                    process.kill()
                    return
                if not line:
                    return
                wait_seconds = self._limits.heartbeat_seconds
                word, _, rest = line.decode("ascii", "replace").strip().partition(" ")
                if word == "ready":
                    self._was_ready = self._is_ready = True
                    address, _, self._pace = rest.partition(" ")
                    self._listen = address or self._listen
                    if self._spare is None:
                        self._begin_spare()
                elif word == "beat" and self._spare_has_ended():
                    self._begin_spare()
                elif word == "beat" and float(rest) > self._limits.overdue_seconds:
                    _killed(f"a pass is {rest} s past its deadline")
                    self._pace = ""  # it may be why: let the next one measure anew
                    process.kill()
                    return
        finally:
            transport.close()

    async def _next_report(self, reader: asyncio.StreamReader, wait_seconds: float) -> bytes | None:
        """The next line, b"" at the end, None if there was none in time.

        Time in which this process itself did not run (a laptop that slept) doesn't count.
        """
        loop = asyncio.get_running_loop()
        line = asyncio.ensure_future(reader.readline())
        waited = 0.0
        try:
            while waited < wait_seconds:
                began = loop.time()
                done, _ = await asyncio.wait({line}, timeout=BEAT_SECONDS)
                if done:
                    return line.result()
                waited += min(loop.time() - began, 2 * BEAT_SECONDS)
            return None
        finally:
            line.cancel()
