"""A TCP proxy on this machine that does to connections what bad networks do, for tests and benches.

    with FaultProxy(("127.0.0.1", 4001)) as proxy:
        connect_to("127.0.0.1", proxy.port)
        proxy.upstream.faults = Faults(latency_seconds=0.05)  # towards the target
        proxy.downstream.faults = Faults(black_hole=True)  # back from it
        proxy.reset()

Rules:

1. Without faults every byte, end of stream and reset is passed on, in order, and nothing is added.
2. What is set holds at once: for connections that exist, for new ones, and for what is on its way.
3. What is on its way is bounded, for each connection and direction: who sends more waits, as for a
   TCP window.
4. No fault loses a byte from the middle of a stream, as TCP sends again what a network lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, final

from glasshive.dht.errors import ListenRefused
from glasshive.dht.loop_thread import LoopThread

__all__ = ["Direction", "FaultProxy", "Faults", "keep_port"]

LOCALHOST: Final = "127.0.0.1"
WINDOW_BYTES: Final = 8 << 20
CHUNK_BYTES: Final = 64 << 10
SLICE_SECONDS: Final = 0.02
CONNECT_DEADLINE_SECONDS: Final = 10.0
CALL_DEADLINE_SECONDS: Final = 10.0
_AT_ONCE: Final = struct.pack("ii", 1, 0)


@dataclass(frozen=True, slots=True)
class Faults:
    """What is wrong with one direction of a proxy; by default nothing.

    Each byte is on its way for `latency_seconds`, however many others are. All connections share
    `bandwidth_bytes_per_second`. A `black_hole` delivers nothing while it lasts, neither bytes nor
    ends nor resets; what it took comes after it. Of each connection every byte whose number is a
    multiple of `corrupt_every_bytes` is delivered as another one; 0: none is.
    """

    latency_seconds: float = 0.0
    bandwidth_bytes_per_second: float = math.inf
    black_hole: bool = False
    corrupt_every_bytes: int = 0

    def __post_init__(self) -> None:
        if not (
            0 <= self.latency_seconds < math.inf
            and self.bandwidth_bytes_per_second > 0
            and self.corrupt_every_bytes >= 0
        ):
            raise ValueError(
                f"got {self}, wanted a finite latency of 0 or more, a bandwidth above 0 and bytes "
                "of 0 or more; black_hole=True stops everything"
            )


@final
class Direction:
    """One direction of a proxy, with all of its connections.

    Counts since the start: bytes that were `taken_bytes` from senders, `delivered_bytes` to
    receivers, and `corrupted_bytes` among these.
    """

    def __init__(self, thread: LoopThread) -> None:
        """Use `FaultProxy`."""
        self.taken_bytes = 0
        self.delivered_bytes = 0
        self.corrupted_bytes = 0
        self._thread = thread
        self._faults = Faults()
        self._changed = asyncio.Event()
        self._link = asyncio.Lock()
        self._link_free_at = 0.0
        self._lanes: set[_Lane] = set()

    @property
    def faults(self) -> Faults:
        """What is wrong now; may be set from any thread."""
        return self._faults

    @faults.setter
    def faults(self, faults: Faults) -> None:
        async def change() -> None:
            self._faults = faults
            self._changed.set()
            self._changed = asyncio.Event()

        self._thread.run(change(), CALL_DEADLINE_SECONDS)

    def half_close(self) -> None:
        """Every receiver sees the end of its stream; what comes for it later is dropped."""

        async def end() -> None:
            for lane in self._lanes:
                lane.end()

        self._thread.run(end(), CALL_DEADLINE_SECONDS)

    async def _arrive(self, taken_at: float) -> None:
        """Returns when what was taken at that time has arrived."""
        await self._until(lambda faults: taken_at + faults.latency_seconds)

    async def _cross(self, data: memoryview, ready_at: float) -> memoryview:
        """The first part of `data`, once it has crossed the link, which carries one at a time."""
        async with self._link:
            # Where the loop woke up late, the next part begins when this one ought to have ended.
            started_at = max(self._link_free_at, ready_at)
            most_bytes = max(1.0, self._faults.bandwidth_bytes_per_second * SLICE_SECONDS)
            part = data[: int(min(len(data), most_bytes))]

            def crossed_at(faults: Faults) -> float:
                return started_at + len(part) / faults.bandwidth_bytes_per_second

            await self._until(crossed_at)
            self._link_free_at = crossed_at(self._faults)
            return part

    async def _until(self, due: Callable[[Faults], float]) -> None:
        """Returns at the time that `due` gives for the faults of then, outside a black hole."""
        now = asyncio.get_running_loop().time
        while self._faults.black_hole or due(self._faults) > now():
            ends_at = None if self._faults.black_hole else due(self._faults)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(ends_at):
                    await self._changed.wait()


class _ConnectionOver(Exception):
    """Nothing will come any more, in either direction."""


@final
class _Lane:
    """One direction of one connection, from its source to its sink, through a bounded queue."""

    opposite: _Lane

    def __init__(
        self,
        direction: Direction,
        source: socket.socket,
        sink: socket.socket,
        window_bytes: int,
        randomness: random.Random,
    ) -> None:
        self._direction = direction
        self._source = source
        self._sink = sink
        self._window_bytes = window_bytes
        self._randomness = randomness
        # Bytes, b"" for the end of the stream, None for a reset; each with when it was taken.
        self._queue: asyncio.Queue[tuple[float, bytes | None]] = asyncio.Queue()
        self._queued_bytes = 0
        self._room = asyncio.Event()
        self._room.set()
        self._position = 0
        self._sink_ended = False
        self._source_ended = False

    async def take(self) -> None:
        """Takes from the source, as long as there is room, until it ends."""
        loop = asyncio.get_running_loop()
        data: bytes | None = b" "
        while data:
            await self._room.wait()
            try:
                data = await loop.sock_recv(self._source, CHUNK_BYTES)
            except OSError:
                data = None
            self._put(data)

    def _put(self, data: bytes | None) -> None:
        self._queue.put_nowait((asyncio.get_running_loop().time(), data))
        self._count(len(data or b""))
        self._direction.taken_bytes += len(data or b"")

    def _count(self, n_bytes: int) -> None:
        self._queued_bytes += n_bytes
        if self._queued_bytes < self._window_bytes:
            self._room.set()
        else:
            self._room.clear()

    async def deliver(self) -> None:
        """Gives the sink what was taken, when it is due. Ends with _ConnectionOver only."""
        while True:
            taken_at, data = await self._queue.get()
            await self._direction._arrive(taken_at)
            if data is None:
                _close_with_reset(self._source, self._sink)
                raise _ConnectionOver
            if data:
                await self._send(memoryview(data))
                self._count(-len(data))
                continue
            self.end()
            self._source_ended = True
            if self.opposite._source_ended:
                raise _ConnectionOver

    async def _send(self, data: memoryview) -> None:
        loop = asyncio.get_running_loop()
        ready_at = loop.time()
        while data and not self._sink_ended:
            part = await self._direction._cross(data, ready_at)
            data = data[len(part) :]
            try:
                await loop.sock_sendall(self._sink, self._corrupted(part))
                self._direction.delivered_bytes += len(part)
            except OSError:
                if not self._sink_ended:  # it is gone, which the source hears by the other lane
                    self._sink_ended = True
                    self.opposite._put(None)

    def _corrupted(self, part: memoryview) -> memoryview | bytearray:
        """The part as it is delivered, and the next one's position."""
        every = self._direction.faults.corrupt_every_bytes
        first, self._position = -self._position - 1, self._position + len(part)
        if not every or first % every >= len(part):
            return part
        spoiled = bytearray(part)
        for i in range(first % every, len(part), every):
            spoiled[i] ^= self._randomness.randrange(1, 256)
            self._direction.corrupted_bytes += 1
        return spoiled

    def end(self) -> None:
        """The sink sees the end of the stream."""
        self._sink_ended = True
        with contextlib.suppress(OSError):  # it is gone
            self._sink.shutdown(socket.SHUT_WR)

    def __enter__(self) -> None:
        self._direction._lanes.add(self)

    def __exit__(self, *_: object) -> None:
        self._direction._lanes.discard(self)


@final
class FaultProxy:
    """Listens at `port` of this machine and connects each who comes to `target`; a context manager.

    `target` is a host and its port; a `port` of 0 takes a free one. `upstream` is the direction
    towards the target and `downstream` the one back. Which corrupted bytes become which follows
    from `seed` and the number of the connection. `window_bytes` is the bound of rule 3: with
    latency no connection is faster than `window_bytes / latency_seconds`, as in life.

    A connection is taken at once, without latency; one that the target refuses is then reset.
    Every call may come from any thread; after `close` they raise TransportClosed.
    """

    def __init__(
        self,
        target: tuple[str, int],
        *,
        port: int = 0,
        seed: int = 0,
        window_bytes: int = WINDOW_BYTES,
    ) -> None:
        """Raises ListenRefused if the port is taken."""
        self.connections = 0  # taken since the start
        self._target = target
        self._seed = seed
        self._window_bytes = window_bytes
        self._kept_port = keep_port(port)
        self.port = int(self._kept_port.getsockname()[1])
        self._thread = LoopThread("glasshive-faults")
        self.upstream = Direction(self._thread)
        self.downstream = Direction(self._thread)
        self._listening: asyncio.Task[None] | None = None
        self._open: dict[asyncio.Task[None], socket.socket] = {}
        self.refuses = False

    @property
    def open_connections(self) -> int:
        """How many there are now."""
        return len(self._open)

    @property
    def refuses(self) -> bool:
        """Whether new connections are refused, as where nobody listens; may be set."""
        return self._listening is None

    @refuses.setter
    def refuses(self, refuses: bool) -> None:
        change = self._stop_listening() if refuses else self._start_listening()
        self._thread.run(change, CALL_DEADLINE_SECONDS)

    def reset(self) -> None:
        """Every connection ends with a reset at both ends; what was on its way is lost."""
        self._thread.run(self._reset(), CALL_DEADLINE_SECONDS)

    def close(self) -> None:
        """Ends every connection with a reset, and the thread. May be called again."""
        self._thread.close()  # its tasks end as they do for `reset`
        self._kept_port.close()

    def __enter__(self) -> FaultProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def _start_listening(self) -> None:
        if self._listening is None:
            listener = keep_port(self.port)
            listener.listen()
            self._listening = asyncio.create_task(self._listen(listener))

    async def _stop_listening(self) -> None:
        task, self._listening = self._listening, None
        if task is not None:
            task.cancel()
            await asyncio.wait({task})

    async def _listen(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with listener:
            while True:
                near, _ = await loop.sock_accept(listener)
                self.connections += 1
                task = loop.create_task(self._carry(near, self.connections))
                self._open[task] = near
                task.add_done_callback(lambda ended: self._open.pop(ended).close())

    async def _reset(self) -> None:
        tasks = list(self._open)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _carry(self, near: socket.socket, number: int) -> None:
        """One connection, until it is over."""
        with socket.socket() as far:
            far.setblocking(False)
            for one in (near, far):
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            try:
                async with asyncio.timeout(CONNECT_DEADLINE_SECONDS):
                    await asyncio.get_running_loop().sock_connect(far, self._target)
                await self._carry_both_ways(near, far, number)
            except (OSError, asyncio.CancelledError) as error:
                _close_with_reset(near, far)
                if isinstance(error, asyncio.CancelledError):
                    raise

    async def _carry_both_ways(self, near: socket.socket, far: socket.socket, number: int) -> None:
        up, down = (
            _Lane(
                direction,
                source,
                sink,
                self._window_bytes,
                random.Random(f"{self._seed} {number} {sink is far}"),  # noqa: S311 (no secret)
            )
            for direction, source, sink in (
                (self.upstream, near, far),
                (self.downstream, far, near),
            )
        )
        up.opposite, down.opposite = down, up
        with up, down:
            try:
                async with asyncio.TaskGroup() as tasks:
                    for work in (up.take, up.deliver, down.take, down.deliver):
                        tasks.create_task(work())
            except* _ConnectionOver:
                pass


def keep_port(port: int = 0) -> socket.socket:
    """A socket that keeps a port of this machine (0: a free one) for others that share ports.

    It never listens. Who binds with SO_REUSEPORT, as network daemons do, can, at the same port, and
    nobody else is given it. Raises ListenRefused if somebody listens there.
    """
    if port:  # a listener that shares its port would share it with this one, too
        _bound_socket(port, socket.SO_REUSEADDR).close()
    return _bound_socket(port, socket.SO_REUSEADDR, socket.SO_REUSEPORT)


def _bound_socket(port: int, *options: int) -> socket.socket:
    bound = socket.socket()
    bound.setblocking(False)
    try:
        for option in options:
            bound.setsockopt(socket.SOL_SOCKET, option, 1)
        bound.bind((LOCALHOST, port))
    except OSError as error:
        bound.close()
        raise ListenRefused(
            f"can't listen at {LOCALHOST}:{port}: {error.strerror}; port=0 takes a free one"
        ) from None
    return bound


def _close_with_reset(*sockets: socket.socket) -> None:
    """Their close will tell the other side that the connection is lost."""
    for one in sockets:
        with contextlib.suppress(OSError):  # it is lost already
            one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
