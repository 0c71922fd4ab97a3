"""A whole swarm on this machine, for tests and demonstrations.

    from glasshive.testing import LocalSwarm

    with LocalSwarm("path/to/model", spans=[(0, 10), (10, 20), (20, 30)]) as hive:
        with glasshive.connect(hive.config) as swarm:
            model = swarm.model(hive.model_name)
            ...
            hive.hosts[1].kill()

A bootstrap and the hosts are real processes on loopback, started as `glasshive bootstrap` and
`glasshive serve` start them. They end with the `with`, and also when this process dies.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import psutil  # type: ignore[import-untyped]

from glasshive.fault_proxy import FaultProxy, keep_port
from glasshive.graph.errors import GlasshiveError
from glasshive.privacy_notice import LOCAL_PREFIX
from glasshive.security.invite_book import InviteBook
from glasshive.security.keys import Identity, PeerId
from glasshive.security.membership import Role
from glasshive.settings import DATA_VARIABLE, Settings, load_settings
from glasshive.swarm_members import book_path, member_files
from glasshive.swarm_trust import open_store

_LOCALHOST = "127.0.0.1"
_POLL_SECONDS = 0.02
_TAIL_LINES = 30


class SwarmNotReady(GlasshiveError):
    """A process of a local swarm that ended or was not ready in time, with the end of its log."""


@dataclass(frozen=True, slots=True)
class LocalTrust:
    """Who may sign in a local swarm, and what they signed.

    `swarm` is the name that they signed for, `root` the first root's document. `whitelist`
    (document, body) is known to the bootstrap from its start; `policy` is the text of the file that
    each host has of its own. A `private` swarm has its bootstrap as issuer; its hosts and the key
    of `config` are members, and `LocalSwarm.enrol` makes others.
    """

    swarm: str
    root: bytes
    whitelist: tuple[bytes, bytes] | None = None
    policy: str | None = None
    private: bool = False


class LocalPeer:
    """One process of a local swarm, with the processes that belong to it."""

    def __init__(
        self,
        name: str,
        arguments: Sequence[str],
        log: Path,
        env: dict[str, str],
        *,
        keeps_address: bool = False,
        proxy: FaultProxy | None = None,
    ) -> None:
        self.name = name
        self._proxy = proxy
        self._keeps_address = keeps_address
        self._arguments = list(arguments)
        self._log = log
        self._env = env
        self._log_start = 0
        self._process: subprocess.Popen[bytes] | None = None

    def __repr__(self) -> str:
        return f"<LocalPeer {self.name} {'running' if self.running else 'ended'}>"

    @property
    def log(self) -> str:
        """Everything that its processes have written, restarts included: a JSON object a line."""
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    @property
    def events(self) -> list[dict[str, Any]]:
        """Its log lines as data; lines that are not JSON are left out."""
        return _events(self.log)

    @property
    def running(self) -> bool:
        """Whether the process is there, frozen ones included."""
        return self._process is not None and self._process.poll() is None

    @property
    def exit_code(self) -> int | None:
        """The exit code of the last process, negative for a signal; None while it runs."""
        return None if self._process is None else self._process.poll()

    @property
    def address(self) -> str:
        """The address under which it announced itself last; "" before it was ready."""
        return str(self._ready().get("address", ""))

    @property
    def peer_id(self) -> str:
        """Its peer id; "" before it was ready."""
        return self.address.rpartition("/p2p/")[2]

    @property
    def proxy(self) -> FaultProxy:
        """What others reach it through. Raises SwarmNotReady in a swarm without `faults`."""
        if self._proxy is None:
            raise SwarmNotReady(
                f"{self.name} has no proxy; LocalSwarm(..., faults=True) gives each host one"
            )
        return self._proxy

    def pids(self) -> list[int]:
        """Its processes: supervisor, host process, network daemon."""
        if self._process is None or self._process.poll() is not None:
            return []
        with contextlib.suppress(psutil.NoSuchProcess):
            top = psutil.Process(self._process.pid)
            return [top.pid, *(child.pid for child in top.children(recursive=True))]
        return []

    def start(self) -> None:
        """Start it; `wait_ready` waits for it."""
        if self.running:
            raise SwarmNotReady(f"{self.name} is running already")
        self._reap(0)
        again = []
        if self._keeps_address and self.address:
            again = ["--listen", self.address.rpartition("/p2p/")[0]]
        self._log_start = len(self.log)
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(  # noqa: S603 (our own command line, no shell)
                [sys.executable, "-m", "glasshive.cli", *self._arguments, *again],
                stdin=subprocess.PIPE,  # its end tells the process that this one is gone
                stdout=log,
                stderr=log,
                env=self._env,
                start_new_session=True,
            )

    def wait_ready(self, deadline_seconds: float = 90.0) -> None:
        """Returns when it has announced itself. Raises SwarmNotReady."""

        def ready() -> bool:
            if not self.running:
                self._reap(0)
                raise SwarmNotReady(self._trouble(f"ended with {self.exit_code}"))
            return bool(self._ready())

        if not _wait(ready, deadline_seconds):
            raise SwarmNotReady(self._trouble(f"was not ready in {deadline_seconds:g} s"))

    def kill(self) -> None:
        """End all of its processes at once, as if its machine had lost power."""
        self.freeze()  # or one would see another's end, and withdraw the record
        for pid in self.pids():
            _signal(pid, signal.SIGKILL)
        self._reap(10.0)

    def kill_host_process(self) -> None:
        """End only the process that computes; its supervisor starts another."""
        for pid in self.pids()[1:]:
            _signal(pid, signal.SIGKILL)

    def kill_daemon(self) -> None:
        """End only its network daemon; the process that it belongs to starts another."""
        _signal(self.pids()[2], signal.SIGKILL)

    def stop(self, deadline_seconds: float = 20.0) -> int:
        """Ask it to stop, as Ctrl-C does, and return its exit code.

        Raises SwarmNotReady if it has not ended by the deadline.
        """
        if self._process is None:
            raise SwarmNotReady(f"{self.name} was never started")
        _signal(self._process.pid, signal.SIGINT)
        if not self._reap(deadline_seconds):
            raise SwarmNotReady(self._trouble(f"did not stop in {deadline_seconds:g} s"))
        return self._process.returncode

    def restart(self, deadline_seconds: float = 90.0) -> None:
        """Start it again, with the same key, after `kill` or `stop`; returns when it is ready."""
        self.start()
        self.wait_ready(deadline_seconds)

    def freeze(self) -> None:
        """Stop all of its processes in mid-step, without ending them, until `thaw`."""
        for pid in self.pids():
            _signal(pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """Let the processes go on."""
        for pid in reversed(self.pids()):
            _signal(pid, signal.SIGCONT)

    def _reap(self, deadline_seconds: float) -> bool:
        if self._process is None:
            return True
        try:
            self._process.wait(deadline_seconds)
        except subprocess.TimeoutExpired:
            return False
        if self._process.stdin is not None:
            self._process.stdin.close()
        return True

    def _ready(self) -> dict[str, Any]:
        since = self.log[self._log_start :]
        return next((one for one in reversed(_events(since)) if one.get("event") == "ready"), {})

    def _trouble(self, what: str) -> str:
        tail = "\n".join(self.log.splitlines()[-_TAIL_LINES:]) or "(nothing)"
        return f"{self.name} {what}; its log ends with:\n{tail}"


class LocalSwarm:
    """A bootstrap and hosts of one model, as processes on loopback; a context manager.

    `spans[i]` is served by `hosts[i]`; with `replicas=2` again by `hosts[len(spans) + i]`, and so
    on. Hosts compute with `threads` threads each, else with as many as torch takes by itself:
    results are equal to the bit only at equal numbers of threads. With `trust` they keep to a
    whitelist, and each peer has a data folder of its own, as on a machine of its own. With `faults`
    clients and other hosts reach each host by its `proxy` only. Two hosts use one connection for
    both, which goes through the proxy of the one that was dialled.
    """

    def __init__(
        self,
        path: str | Path,
        spans: Sequence[tuple[int, int]],
        *,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        attention: Literal["sdpa", "eager", "flash"] = "sdpa",
        device: Literal["auto", "cpu", "cuda", "mps"] = "cpu",
        replicas: int = 1,
        threads: int | None = None,
        name: str | None = None,
        trust: LocalTrust | None = None,
        faults: bool = False,
        start_seconds: float = 120.0,
    ) -> None:
        if not spans or replicas < 1:
            raise SwarmNotReady("a swarm without hosts; give spans=[(first, end), ...]")
        self.model_name = name or Path(path).name
        self.hosts: list[LocalPeer] = []
        self._path = str(path)
        self._spans = list(spans) * replicas
        self._start_seconds = start_seconds
        self._threads = threads
        self._trust = trust
        self._faults = faults
        self._at_end = contextlib.ExitStack()
        self._book: InviteBook | None = None
        self._options = [
            *("--dtype", dtype, "--attention", attention, "--device", device),
            *("--name", self.model_name),
            "--no-spare",  # the processes of a whole swarm would all be there twice
        ]
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._env: dict[str, str] = {}
        self._numbers = itertools.count()
        self.bootstrap: LocalPeer
        self.config: Path

    def __enter__(self) -> LocalSwarm:
        self._folder = tempfile.TemporaryDirectory(prefix="glasshive-swarm-")
        folder = Path(self._folder.name)
        try:
            self._start(folder)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def add_host(self, span: tuple[int, int], path: str | Path | None = None) -> LocalPeer:
        """Start one more host, of another model's folder if `path` is given; it may not be ready.

        It announces the model under this swarm's name for it, as all of the hosts do.
        """
        blocks = ["--blocks", f"{span[0]}:{span[1]}", "--bootstrap", self.bootstrap.address]
        folder = str(path or self._path)
        number = next(self._numbers)
        name, port, proxy = f"host{number}", 0, None
        if self._faults:
            # A peer that is announced elsewhere can't choose its own.
            port = self._at_end.enter_context(keep_port()).getsockname()[1]
            proxy = self._at_end.enter_context(FaultProxy((_LOCALHOST, port), seed=number))
            blocks += ["--announce", _multiaddr(proxy.port)]
        host = self._peer(name, "serve", folder, *blocks, *self._options, port=port, proxy=proxy)
        if self._book is not None:
            place = self.config.parent
            self.enrol(place / f"{name}.key", Role.HOST, _data_of(place, name))
        self.hosts.append(host)
        host.start()
        return host

    def enrol(self, key: Path, role: Role, data: Path | None = None) -> PeerId:
        """Make the peer of this key a member of a private swarm, without an invite; returns its id.

        Its certificate is kept under `data`, without it in this user's data folder.
        """
        files = member_files(load_settings(self.config), data=data)
        if self._book is None or files is None:
            raise SwarmNotReady(
                "this swarm is not private; LocalTrust(..., private=True) makes one"
            )
        peer_id = Identity.load_or_create(key).peer_id
        files.keep_certificate(peer_id, self._book.enrol(peer_id, role, time.time()))
        return peer_id

    def revoke(self, *peers: PeerId) -> None:
        """Throw members of a private swarm out, as `glasshive revoke` does."""
        if self._book is None:
            raise SwarmNotReady(
                "this swarm is not private; LocalTrust(..., private=True) makes one"
            )
        self._book.revoke(time.time(), peers=peers)

    def close(self) -> None:
        """End every process, at once, and remove the keys and logs. May be called again."""
        peers = [*self.hosts, *([self.bootstrap] if hasattr(self, "bootstrap") else [])]
        with _signals_wait():
            for peer in peers:
                for pid in peer.pids():
                    _signal(pid, signal.SIGKILL)
            for peer in peers:
                peer.kill()
            self._at_end.close()
            if self._folder is not None:
                self._folder.cleanup()
                self._folder = None

    def _start(self, folder: Path) -> None:
        env = dict(os.environ)
        if self._threads is not None:
            env["OMP_NUM_THREADS"] = str(self._threads)
        for variable in [one for one in env if one.startswith("GLASSHIVE_")]:
            if variable != "GLASSHIVE_CACHE":
                del env[variable]  # the user's own swarm
        env["GLASSHIVE_CONFIG"] = str(folder / "host.toml")
        swarm = f"{LOCAL_PREFIX}{os.getpid()}-{time.time_ns() % 10**9}"
        lines = []
        if self._trust is not None:
            swarm = self._trust.swarm
            lines = _write_trust(folder, self._trust)
            if self._trust.private:
                issuer = Identity.load_or_create(folder / "bootstrap.key")
                lines.append(f'issuers = ["{issuer.peer_id}"]')
                self._book = InviteBook(book_path(folder / "bootstrap.key"), issuer, swarm)
        (folder / "host.toml").write_text("\n".join([f"swarm = {json.dumps(swarm)}", *lines, ""]))
        self._env = env
        deadline = time.monotonic() + self._start_seconds
        self.bootstrap = self._peer("bootstrap", "bootstrap")
        self.bootstrap.start()
        self.bootstrap.wait_ready(self._start_seconds)
        self.config = folder / "hive.toml"
        self.config.write_text(
            f"swarm = {json.dumps(swarm)}\n"
            f'bootstraps = ["{self.bootstrap.address}"]\nkey = "client.key"\n'
            + "".join(f"{line}\n" for line in lines if line.startswith(("root =", "issuers =")))
        )
        if self._book is not None:
            self.enrol(folder / "client.key", Role.CLIENT)
        for span in self._spans:
            self.add_host(span)
        for host in self.hosts:
            host.wait_ready(max(deadline - time.monotonic(), 0.1))

    def _peer(
        self, name: str, *arguments: str, port: int = 0, proxy: FaultProxy | None = None
    ) -> LocalPeer:
        if self._folder is None:
            raise SwarmNotReady("the swarm was closed, or never entered")
        folder = Path(self._folder.name)
        common = ["--log-format", "json", "--until-stdin-ends", "--listen", _multiaddr(port)]
        full = [*arguments, "--key", str(folder / f"{name}.key"), *common]
        log = folder / f"{name}.log"
        env = self._env | {DATA_VARIABLE: str(_data_of(folder, name))}
        # Others know the bootstrap by its address, also after a restart.
        keeps_address = name == "bootstrap"
        return LocalPeer(name, full, log, env, keeps_address=keeps_address, proxy=proxy)


def _data_of(folder: Path, name: str) -> Path:
    """The data folder of the peer of this name."""
    return folder / f"data-{name}"


def _write_trust(folder: Path, trust: LocalTrust) -> list[str]:
    """The lines of the peers' config; what these need is written into `folder`."""
    root = folder / "root.json"
    root.write_bytes(trust.root)
    store = open_store(Settings(swarm=trust.swarm, root=root), data=_data_of(folder, "bootstrap"))
    if store is not None and trust.whitelist is not None:
        store.accept_whitelist(*trust.whitelist)
    lines = [f'root = "{root.name}"']
    if trust.policy is not None:
        (folder / "policy.toml").write_text(trust.policy)
        lines.append('policy = "policy.toml"')
    return lines


def _multiaddr(port: int) -> str:
    return f"/ip4/{_LOCALHOST}/tcp/{port}"


def _events(text: str) -> list[dict[str, Any]]:
    found = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            event = json.loads(line)
            if isinstance(event, dict):
                found.append(event)
    return found


def _wait(condition: Callable[[], bool], deadline_seconds: float) -> bool:
    """Whether the condition came true by the deadline."""
    ends_at = time.monotonic() + deadline_seconds
    while not condition():
        if time.monotonic() > ends_at:
            return False
        time.sleep(_POLL_SECONDS)
    return True


@contextlib.contextmanager
def _signals_wait() -> Iterator[None]:
    """What would interrupt the main thread in it (a second Ctrl-C) does so behind it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    # A handler that was not set from Python is None and stays.
    ours = {one: signal.getsignal(one) for one in numbers if signal.getsignal(one) is not None}
    for one in ours:
        signal.signal(one, lambda number, frame: arrived.append(number))
    try:
        yield
    finally:
        for one, handler in ours.items():
            signal.signal(one, handler)
        if arrived:
            signal.raise_signal(arrived[0])


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
