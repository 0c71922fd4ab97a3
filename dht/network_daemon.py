"""The network daemon of a transport: a go-libp2p process (p2pd), from its start to its end.

Rules:

1. The daemon reads the key from a file in a private folder, which is gone as soon as it is up.
2. hivemind's calls can hang for ever once the daemon has died, or the tasks that hivemind talks to
   it with. So every one of them races with a deadline and with their end, which is watched.
3. What was started is ended, also if it is frozen or half started; an end never raises.
"""

from __future__ import annotations

import asyncio
import logging
import os
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Final, Literal, TypeVar, final

from glasshive.dht import daemon_control
from glasshive.dht.errors import (
    DeadlineExceeded,
    TransportClosed,
    TransportError,
    TransportLost,
)
from glasshive.dht.outcome import forget_outcome
from glasshive.security.keys import Identity

__all__ = ["CONTROL_DEADLINE_SECONDS", "DhtMode", "NetworkDaemon"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

DhtMode = Literal["server", "client", "none"]
"""Whether the daemon finds peers by their ids, and for others, too; with "none" it doesn't."""
CONTROL_DEADLINE_SECONDS: Final = 10.0
SHUTDOWN_DEADLINE_SECONDS: Final = 3.0


@final
class NetworkDaemon:
    """The daemon of one identity; after its loss it can be started again.

    `p2p` is hivemind's handle of it, None while there is none. `lost` is set when it is lost, and
    `on_lost` called; who starts it again gets a new event. `closed`: it will not be started again.
    """

    def __init__(
        self, identity: Identity, startup_timeout_seconds: float, on_lost: Callable[[], None]
    ) -> None:
        self.p2p: Any = None
        self.lost = asyncio.Event()
        self.closed = False
        self._identity = identity
        self._startup_timeout_seconds = startup_timeout_seconds
        self._on_lost = on_lost
        self._watcher: asyncio.Task[None] | None = None
        self._gone: asyncio.Future[None] | None = None
        self._leftovers: set[asyncio.Future[Any]] = set()

    async def start(
        self,
        listen: Sequence[str],
        bootstraps: Sequence[str],
        *,
        announce: Sequence[str] = (),
        routing: DhtMode,
    ) -> tuple[str, ...]:
        """Starts it; the addresses that it tells others, none if it listens nowhere.

        They are those to `announce`, else this machine's own ones that it listens at. It connects
        to `bootstraps`, one of which must answer. Raises what hivemind raises,
        TransportLost and DeadlineExceeded.
        """
        made: list[Any] = []
        self._gone = asyncio.get_running_loop().create_future()
        with tempfile.TemporaryDirectory(prefix="glasshive-") as folder:  # mode 0700
            key_file = Path(folder) / "identity"
            descriptor = os.open(key_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(self._identity.libp2p_key_file_bytes())
            try:
                self.p2p = await self.call(
                    daemon_control.remembering(made).create(
                        initial_peers=list(bootstraps) or None,
                        host_maddrs=list(listen) or None,
                        no_listen=not listen,
                        announce_maddrs=list(announce) or None,
                        dht_mode=routing,
                        identity_path=str(key_file),
                        check_if_identity_free=False,
                        nat_port_map=False,
                        auto_nat=False,
                        use_relay=False,
                        use_auto_relay=False,
                        startup_timeout=self._startup_timeout_seconds,
                    ),
                    self._startup_timeout_seconds + CONTROL_DEADLINE_SECONDS,
                    "starting the network daemon",
                )
            except BaseException:
                for one in made:  # hivemind leaves alone what it started
                    await self._end(one)
                raise
        if self.p2p.peer_id.to_base58() != self._identity.peer_id:
            raise TransportLost("the network daemon came up under another identity")
        addresses: tuple[str, ...] = ()
        if listen:
            visible = await self.call(
                self.p2p.get_visible_maddrs(), CONTROL_DEADLINE_SECONDS, "asking for addresses"
            )
            addresses = tuple(str(address) for address in visible)
        self._watcher = asyncio.create_task(self._watch(self.p2p, self._gone))
        return addresses

    async def _watch(self, p2p: Any, gone: asyncio.Future[None]) -> None:
        """Notices that the daemon is lost, whoever waits for what.

        It is too when it lives, and hivemind has stopped to read or write its control connection.
        """
        died = asyncio.create_task(p2p._child.wait())
        control = p2p._client.control
        try:
            ended, _ = await asyncio.wait(
                {died, control._read_task, control._write_task},
                return_when=asyncio.FIRST_COMPLETED,
            )
        finally:
            died.cancel()
        failures = [one.exception() for one in ended if not one.cancelled()]
        logger.warning(
            "daemon_lost peer=%s code=%s errors=%r",
            self._identity.peer_id,
            p2p._child.returncode,
            [error for error in failures if error is not None],
        )
        self.lost.set()
        if not gone.done():
            gone.set_result(None)
        self._on_lost()

    def end_error(self) -> TransportError | None:
        """Why nothing can be asked of it any more; None if it can."""
        if self.closed:
            return TransportClosed("the transport was closed; make a new one")
        if self.lost.is_set():
            return TransportLost(
                "the network daemon of this process is lost and every stream with it; "
                "rebuild the transport and announce again"
            )
        return None

    async def call(self, awaitable: Awaitable[T], deadline_seconds: float, what: str) -> T:
        """The awaitable's result, or DeadlineExceeded, or TransportLost as soon as we know."""
        task = asyncio.ensure_future(awaitable)
        gone = self._gone
        try:
            waiting: set[asyncio.Future[Any]] = {task} if gone is None else {task, gone}
            await asyncio.wait(
                waiting, timeout=deadline_seconds, return_when=asyncio.FIRST_COMPLETED
            )
            ended = self.end_error()
            if ended is not None:
                raise ended
            if not task.done():
                raise DeadlineExceeded(
                    f"{what} took longer than {deadline_seconds:g} s; try again, or allow more time"
                )
            return task.result()
        finally:
            self.abandon(task)

    def abandon(self, task: asyncio.Future[Any]) -> None:
        """Cancels what still runs, and sees to it that nobody is told how it ended."""

        def ended(future: asyncio.Future[Any]) -> None:
            self._leftovers.discard(future)
            forget_outcome(future)

        if task.done():
            ended(task)
            return
        task.cancel()
        self._leftovers.add(task)
        task.add_done_callback(ended)

    def release(self) -> Any:
        """The handle of what runs, None if nothing does, for `end`. Its end is no loss any more."""
        p2p, watcher = self.p2p, self._watcher
        self.p2p = self._watcher = None
        if watcher is not None:
            watcher.cancel()
        return p2p

    async def end(self, p2p: Any) -> None:
        """Ends a daemon, dead or alive; never raises. `p2p` comes from `release`, or is None."""
        if p2p is not None:
            await self._end(p2p)
        if self._gone is not None and not self._gone.done():
            self._gone.cancel()

    async def _end(self, p2p: Any) -> None:
        await self.quietly(p2p.shutdown())
        if p2p._child is not None and p2p._child.returncode is None:
            p2p._child.kill()  # it is frozen: the polite signal waits with it
            await self.quietly(p2p._child.wait())
        # hivemind only asks them to end; a loop that closes now would complain of them.
        if tasks := daemon_control.tasks_of(p2p):
            for task in tasks:
                self.abandon(task)
            await asyncio.wait(tasks, timeout=SHUTDOWN_DEADLINE_SECONDS)

    async def quietly(self, awaitable: Awaitable[Any]) -> None:
        """Awaits it for a while; what it says no longer matters."""
        task = asyncio.ensure_future(awaitable)
        await asyncio.wait({task}, timeout=SHUTDOWN_DEADLINE_SECONDS)
        self.abandon(task)
