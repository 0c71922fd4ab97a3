"""A swarm in one process on virtual time: real clients, hosts and directories, and bad luck.

The clients are `Swarm`, `Model` and the runner, job and streams behind them; the peers are `Host`,
its edges, its announcer and its directory, on the real torch model. Only these are not real: the
network (weather.py), the time and the threads (virtual_time.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final
from unittest.mock import patch

import torch
from experiments import EXPERIMENTS, N_BLOCKS, Saves, plain
from history import History, Operation
from torch import Tensor
from transformers import AutoConfig, GenerationConfig
from virtual_time import Pool, UserLoop, VirtualLoop, by_user
from weather import Air, Weather

from glasshive.client import cancellation, job, known_records, peer_stream, router, runner, swarm
from glasshive.client.bans import Bans
from glasshive.client.model import Model
from glasshive.client.round_trips import RoundTrips
from glasshive.client.router import Router
from glasshive.client.runner import ModelRunner
from glasshive.client.saved import SavedTensor
from glasshive.client.swarm import Swarm
from glasshive.client.warm_routes import WarmRoutes
from glasshive.dht.announcer import Announcer
from glasshive.dht.directory import serve_directory
from glasshive.dht.records import PeerRecord
from glasshive.dht.transport import PeerAddress
from glasshive.graph.budget import Pace
from glasshive.graph.dtypes import DType
from glasshive.graph.errors import GlasshiveError
from glasshive.graph.plan import Span
from glasshive.peer import accounts, checks, torch_thread
from glasshive.peer.blueprint import Blueprint
from glasshive.peer.host import Host
from glasshive.peer.host_limits import HostLimits
from glasshive.peer.pace import HostPace
from glasshive.peer.seen_requests import SeenRequests
from glasshive.peer.served_model import ServedModel, load_served_model, make_manifest
from glasshive.security.keys import Identity, PeerId

__all__ = ["Plan", "Tiny", "plan_of", "simulate"]

LAYOUTS: Final = (((0, 3), (3, 6)), ((0, 2), (2, 4), (4, 6)), ((0, 1), (1, 5), (5, 6)))
SETTLE_SECONDS: Final = 90.0
"""In which every record is announced anew, and what was lost is seen to be there."""
TROUBLE_SECONDS: Final = 40.0
NAME: Final = "tiny"
GENERATIONS: Final = ("generate", "stops", "draws")
FREED_SECONDS: Final = 1.0
LONGEST_WORK: Final = 20  # times the average; what has begun to compute can't be interrupted
_LIMITS: Final = HostLimits(memory_bytes=64 << 20)


class Tiny:
    """The spans of one small model, each loaded once, for all peers of all simulations."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = AutoConfig.from_pretrained(folder)
        self.blueprint = Blueprint.of(folder, torch.float32, "sdpa")
        self.manifest = make_manifest(folder, NAME)
        self._spans: dict[Span, ServedModel] = {}

    def served(self, span: Span) -> ServedModel:
        """The model of a span, at a pace that was not measured."""
        if span not in self._spans:
            pace = Pace(dict.fromkeys(DType, 1e9), 1e9, 1e9)
            self._spans[span] = load_served_model(
                *(self.folder, NAME, span),
                dtype=torch.float32,
                device="cpu",
                manifest=self.manifest,
                blueprint=self.blueprint,
                pace=HostPace(1e4, self.config.hidden_size, pace, 1e-4),
            )
        return self._spans[span]


@dataclass(frozen=True)
class Plan:
    """What a seed stands for."""

    n_peers: int
    layouts: tuple[tuple[tuple[int, int], ...], ...]
    n_clients: int
    n_operations: int  # of each client, in bad luck; then one more
    weather: Weather
    trouble_seconds: float  # between two troubles, on average
    work_seconds: float  # of a stage, on average
    last: str | None = None  # the last operation, which must be ok; None: any
    cancels: float = 0.0  # how likely it is that an operation is cancelled while it runs


def plan_of(seed: int) -> Plan:
    """Every 20th seed has 50 peers, every 10th no trouble at all."""
    rng = random.Random(f"plan {seed}")
    layouts = tuple(rng.sample(LAYOUTS, rng.choice((1, 1, 2))))
    n_spans = sum(map(len, layouts))
    fair = Weather(latency_seconds=rng.choice((0.002, 0.02, 0.1)), skew_seconds=4.0)
    foul = replace(
        fair,
        slow=rng.choice((0.0, 0.01)),
        breaks=rng.choice((0.0, 0.005, 0.02)),
        stores_late=rng.choice((0.0, 0.2)),
        stores_twice=rng.choice((0.0, 0.2)),
        stale=rng.choice((0.0, 0.2)),
        unseen=rng.choice((0.0, 0.1)),
    )
    calm = seed % 10 == 9
    return Plan(
        n_peers=50 if seed % 20 == 10 else rng.randint(2 * n_spans, 4 * n_spans),
        layouts=layouts,
        n_clients=rng.randint(1, 3),
        n_operations=rng.randint(1, 2),
        weather=fair if calm else foul,
        trouble_seconds=1e9 if calm else rng.choice((0.7, 2.0, 4.0, 8.0)),
        work_seconds=rng.choice((0.02, 0.2, 0.5)),
        cancels=random.Random(f"cancels of {seed}").choice((0.0, 0.0, 0.4)),
    )


class Peer:
    """A host with its announcer and its directory, which may die and come again."""

    def __init__(self, air: Air, identity: Identity, served: ServedModel) -> None:
        self.identity = identity
        self.peer_id = identity.peer_id
        self.served = served
        self._air = air
        self._seen = SeenRequests()
        self.is_up = False
        self.hosts: list[Host] = []

    async def start(self) -> None:
        """Serve and announce from now on."""
        self.transport = self._air.transport(self.identity, dht=True)
        clock = asyncio.get_running_loop().time
        self.host = Host(
            *(self.transport, self.identity, self.served),
            limits=_LIMITS,
            seen=self._seen,
            clock=clock,
        )
        self.hosts.append(self.host)
        await self.host.start()
        await serve_directory(self.transport)
        self.announcer = Announcer(self.transport, self.identity, self._record())
        self.announcing = asyncio.create_task(self._announce())
        self.is_up = True

    async def _announce(self) -> None:
        while True:
            try:
                return await self.announcer.start()
            except Exception:
                await asyncio.sleep(1)

    def _record(self) -> PeerRecord:
        span = self.served.span
        return PeerRecord(
            model=self.served.manifest.model_id,
            model_name=NAME,
            start=span.start,
            end=span.end,
            n_blocks=N_BLOCKS,
            dtype="float32",
            backend="cpu",
            attention="sdpa",
            throughput_tokens_per_second=1.0,
            addresses=self.transport.addresses,
            whitelist_version=0,
            load=0.0,
            software_version="1",
            peer_id=self.peer_id,
            expires_at_seconds=self.transport.now() + 60,
        )

    async def leave(self) -> None:
        """As a host that its user stops: it says so in the DHT."""
        self.is_up = False
        self.announcing.cancel()
        await self.announcer.close()
        self.host.close()
        await self.transport.close()

    async def die(self) -> None:
        """As by SIGKILL: its streams are reset, and it says nothing more."""
        self.is_up = False
        self._air.network.kill(self.peer_id)
        await self.leave()

    def holds(self) -> list[str]:
        """What it still has of traces."""
        found = []
        for host in self.hosts:
            if host._traces or host._slots or host._memory.promised_bytes:
                found.append(
                    f"{self.peer_id} holds {len(host._traces)} traces, {len(host._slots)} slots, "
                    f"{host._memory.promised_bytes} bytes"
                )
        return found


class User:
    """A client, on a thread of its own that takes turns with the loop."""

    def __init__(
        self, number: int, air: Air, tiny: Tiny, identity: Identity, bootstraps: Sequence[Peer]
    ) -> None:
        self.number = number
        self.transport = air.transport(identity, dht=False)
        self.swarm: Any = Swarm(
            *(UserLoop(), self.transport, identity),
            [PeerAddress(one.peer_id, one.transport.addresses) for one in bootstraps],
            tiny.folder,
        )
        model_id = tiny.manifest.model_id
        self._model = Model(
            name=NAME,
            model_id=model_id,
            config=tiny.config,
            generation_config=GenerationConfig.from_model_config(tiny.config),
            tokenizer=None,
            twin=tiny.blueprint.twin,
            outline=tiny.blueprint.outline,
            runner=ModelRunner(
                self.swarm,
                Router(
                    *(self.swarm, model_id, NAME, "float32", "sdpa", N_BLOCKS),
                    chance=random.Random(f"routes {identity.peer_id}").random,
                ),
            ),
        )

    async def run(
        self, operation: Operation, *, cancel_after_seconds: float | None = None, **options: Any
    ) -> None:
        """Run the experiment to its end or until then, and fill in how it ended."""
        saves: Saves = {}
        tracers: list[Any] = []
        experiment = partial(EXPERIMENTS[operation.name], self._model, saves, tracers.append)
        work = partial(experiment, deadline=operation.deadline_seconds)
        loop = asyncio.get_running_loop()

        def cancel() -> None:
            if operation.ended_at is None and tracers[0].cancel():
                operation.cancelled_at = loop.time()

        if cancel_after_seconds is not None:
            loop.call_later(cancel_after_seconds, cancel)
        try:
            result = await by_user(partial(work, progress=False, **options))
            operation.retried, operation.replaced = result.retried, len(result.replaced)
            operation.relayed = len(result.relayed)
            operation.saves = plain(saves)
        except Exception as error:
            operation.error = error
            filled = {name: one for name, one in saves.items() if isinstance(one, SavedTensor)}
            operation.saves = plain(filled)
        operation.ended_at = loop.time()


@dataclass
class Simulation:
    """One seed."""

    seed: int
    plan: Plan
    tiny: Tiny
    history: History = field(default_factory=History)

    def __post_init__(self) -> None:
        self._rng = random.Random(f"trouble {self.seed}")
        # Its own, so that the same befalls an operation whether or not another is cancelled.
        self._cancel_rng = random.Random(f"cancel {self.seed}")
        self._heals: dict[Callable[[], None], None] = {}

    async def run(self) -> None:
        """All of it; what was wrong is in the history's `faults`, but for the operations'."""
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(self._on_loop_error)
        weather = self.plan.weather
        self._air = Air(
            random.Random(f"air {self.seed}"),
            weather,
            lambda *what: self.history.hear(loop.time(), *what),
        )
        spans = [Span(*one) for layout in self.plan.layouts for one in layout]
        self.peers = [
            Peer(self._air, self._identity("peer", i), self.tiny.served(spans[i % len(spans)]))
            for i in range(self.plan.n_peers)
        ]
        for one in self.peers:
            await one.start()
        await asyncio.sleep(5)
        self.users = [
            User(i, self._air, self.tiny, self._identity("client", i), self._bootstraps())
            for i in range(self.plan.n_clients)
        ]
        async with asyncio.TaskGroup() as tasks:
            for user in self.users:
                tasks.create_task(self._use(user))
            tasks.create_task(self._have_trouble())
        await asyncio.sleep(SETTLE_SECONDS)
        user = self._rng.choice(self.users)
        last = self.plan.last or self._rng.choice(list(EXPERIMENTS))
        if self.plan.cancels:
            await self._cancel_in_calm()
        await self._operate(user, last, 60.0, must_be_ok=True)
        await asyncio.sleep(15)
        self.history.faults += [one for peer in self.peers for one in peer.holds()]
        for peer in self.peers:
            await peer.leave()
        for user in self.users:
            await by_user(user.swarm.close)
        await asyncio.sleep(SETTLE_SECONDS)
        left = asyncio.all_tasks() - {asyncio.current_task()}
        self.history.faults += [f"left over: {one.get_coro()!r}" for one in left]

    async def _cancel_in_calm(self) -> None:
        """Where nothing else runs, no host has anything left when its kernel has ended."""
        user, name = self._cancel_rng.choice(self.users), self._cancel_rng.choice(GENERATIONS)
        after_seconds = self._cancel_rng.uniform(0.1, 8 * self.plan.work_seconds)
        await self._operate(user, name, 60.0, False, cancel_after_seconds=after_seconds)
        await asyncio.sleep(FREED_SECONDS + LONGEST_WORK * self.plan.work_seconds)
        self.history.faults += [
            f"of a cancelled trace {one}" for p in self.peers for one in p.holds()
        ]

    def _cancel_after_seconds(self) -> float | None:
        """None if this operation is not to be cancelled."""
        if self._cancel_rng.random() >= self.plan.cancels:
            return None
        return self._cancel_rng.choice((0.3, 3.0, 10.0)) * self._cancel_rng.random()

    def _identity(self, kind: str, number: int) -> Identity:
        return Identity(random.Random(f"{kind} {number} of {self.seed}").randbytes(32))

    def _bootstraps(self) -> list[Peer]:
        return self._rng.sample(self.peers, min(4, len(self.peers)))

    def _on_loop_error(self, loop: Any, context: Mapping[str, Any]) -> None:
        self.history.faults.append(f"{context['message']}: {context.get('exception')!r}")

    async def _use(self, user: User) -> None:
        for _ in range(self.plan.n_operations):
            await asyncio.sleep(self._rng.uniform(0, 5))
            name = self._rng.choice(list(EXPERIMENTS))
            retries = self._rng.choice((0, 1, 4, 4, 4, 4))
            deadline_seconds = self._rng.choice((5.0, 60.0, 180.0, 180.0, 180.0))
            # In calm there is no reason to fail but the deadline.
            calm = self.plan.trouble_seconds > 1e6 and deadline_seconds > 20
            cancel_after_seconds = self._cancel_after_seconds()
            await self._operate(
                *(user, name, deadline_seconds, calm and cancel_after_seconds is None),
                retries=retries,
                cancel_after_seconds=cancel_after_seconds,
            )

    async def _operate(
        self,
        user: User,
        name: str,
        deadline_seconds: float,
        must_be_ok: bool,
        **options: Any,
    ) -> None:
        now = asyncio.get_running_loop().time()
        operation = Operation(user.number, name, now, deadline_seconds, must_be_ok)
        self.history.operations.append(operation)
        self._note("begins", operation.client, name, deadline_seconds, options)
        await user.run(operation, **options)
        self._note("ended", operation.client, operation.outcome, operation.error or "")

    def _note(self, *what: object) -> None:
        self.history.note(asyncio.get_running_loop().time(), *what)

    # Trouble --------------------------------------------------------------------------------

    async def _have_trouble(self) -> None:
        trouble = asyncio.create_task(self._make_trouble())
        await asyncio.wait({trouble}, timeout=TROUBLE_SECONDS)
        trouble.cancel()
        await asyncio.wait({trouble})
        await self._calm_down()

    async def _make_trouble(self) -> None:
        kinds = (
            *(self._kill, self._kill, self._vanish, self._leave, self._freeze, self._split),
            *(self._break, self._break, self._break),
        )
        async with asyncio.TaskGroup() as tasks:
            while True:
                await asyncio.sleep(self._rng.expovariate(1 / self.plan.trouble_seconds))
                tasks.create_task(self._rng.choice(kinds)())

    def _someone(self) -> Peer | None:
        """A peer to be struck, mostly one with work; half of all are left alone."""
        up = [one for one in self.peers if one.is_up]
        if len(up) <= len(self.peers) / 2:
            return None
        at_work = [one for one in up if one.host.load]
        return self._rng.choice(at_work if at_work and self._rng.random() < 0.7 else up)

    async def _kill(self) -> None:
        if (peer := self._someone()) is not None:
            self._note("kill", peer.peer_id)
            await peer.die()
            await self._come_back(peer)

    async def _vanish(self) -> None:
        """As by a cable that is pulled: nobody hears that it has gone."""
        if (peer := self._someone()) is not None:
            self._note("vanish", peer.peer_id)
            heal = self._cut_off([peer.peer_id])
            await peer.die()
            await asyncio.sleep(self._rng.uniform(1, 40))
            self._heal(heal)
            await self._come_back(peer)

    async def _leave(self) -> None:
        if (peer := self._someone()) is not None:
            self._note("leave", peer.peer_id)
            await peer.leave()
            await self._come_back(peer)

    async def _come_back(self, peer: Peer) -> None:
        await asyncio.sleep(self._rng.uniform(1, 30))
        self._note("back", peer.peer_id)
        await peer.start()

    async def _freeze(self) -> None:
        if (peer := self._someone()) is not None:
            self._note("freeze", peer.peer_id)
            await self._for_a_while(self._cut_off([peer.peer_id]))

    async def _split(self) -> None:
        """Two random groups of all, clients too, hear nothing of each other."""
        everyone = self._everyone()
        self._rng.shuffle(everyone)
        cut = self._rng.randint(1, len(everyone) - 1)
        self._note("split", cut)
        await self._for_a_while(self._part(everyone[:cut], everyone[cut:]))

    async def _break(self) -> None:
        """Streams between two peers that have some end."""
        at_work = [one for one in self.peers if one.is_up and one.host.load]
        one = self._rng.choice(at_work or self.peers).transport
        others = list(dict.fromkeys(stream.peer_id for stream in one._streams if not stream.closed))
        if others:
            other = self._rng.choice(others)
            self._note("break", one.peer_id, other)
            self._air.break_some(one.peer_id, other)

    def _everyone(self) -> list[PeerId]:
        return [one.transport.peer_id for one in [*self.peers, *self.users]]

    def _cut_off(self, some: Sequence[PeerId]) -> Callable[[], None]:
        return self._part(some, [one for one in self._everyone() if one not in some])

    def _part(self, some: Sequence[PeerId], others: Sequence[PeerId]) -> Callable[[], None]:
        heal = self._air.part(some, others)
        self._heals[heal] = None
        return heal

    def _heal(self, heal: Callable[[], None]) -> None:
        if heal in self._heals:
            del self._heals[heal]
            heal()

    async def _for_a_while(self, heal: Callable[[], None]) -> None:
        await asyncio.sleep(self._rng.choice((1, 3, 20)) * self._rng.uniform(0.5, 1.5))
        self._note("heals")
        self._heal(heal)

    async def _calm_down(self) -> None:
        """Everybody is there again, and known."""
        self._note("calm")
        for heal in list(self._heals):
            self._heal(heal)
        self._air.weather = Weather(skew_seconds=self.plan.weather.skew_seconds)
        for one in self.peers:
            if not one.is_up:
                await one.leave()  # it may have been about to
                await one.start()
        self.history.calm_at = asyncio.get_running_loop().time()


class _Ears(logging.Handler):
    """Hears what hosts say that went wrong, also where a client has it run elsewhere."""

    def __init__(self, history: History) -> None:
        super().__init__()
        self._history = history

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if record.levelno >= logging.ERROR:
            self._history.faults.append(f"logged: {record.getMessage()}: {error!r}")
        elif record.msg == "trace_failed":
            self._history.host_says(getattr(record, "error", ""))


def _heard_job(history: History, **fields: Any) -> job.Job:
    """A job whose end is in the history, also where the runner tries again."""
    made = job.Job(**fields)
    run = made.run

    async def heard() -> dict[str, Tensor]:
        try:
            return await run()
        except GlasshiveError as error:
            history.job_ended(error)
            raise

    made.run = heard  # type: ignore[method-assign]
    return made


@contextlib.contextmanager
def _virtual(loop: VirtualLoop, rng: random.Random, history: History) -> Iterator[None]:
    """What in the product takes the time, or a thread, or chance, without being given it."""
    clock = SimpleNamespace(monotonic=loop.time, perf_counter=loop.time, time=loop.time)
    with contextlib.ExitStack() as patched:
        for module in (router, runner, known_records, peer_stream, accounts, cancellation):
            patched.enter_context(patch.object(module, "time", clock))
        for module in (torch_thread, checks):
            patched.enter_context(patch.object(module, "ThreadPoolExecutor", Pool))
        patched.enter_context(
            patch.object(runner, "secrets", SimpleNamespace(token_bytes=rng.randbytes))
        )
        for module, kind in ((runner, job.Job), (router, Bans), (swarm, RoundTrips)):
            timed = partial(kind, clock=loop.time)
            patched.enter_context(patch.object(module, kind.__name__, timed))
        warm = partial(WarmRoutes, clock=loop.time, chance=rng.random)
        patched.enter_context(patch.object(swarm, "WarmRoutes", warm))
        yield


def simulate(
    seed: int,
    tiny: Tiny,
    oracle: Mapping[str, Mapping[str, Tensor | None]],
    plan: Plan | None = None,
) -> History:
    """What happens with this seed, and in `faults` what may not have."""
    plan = plan or plan_of(seed)
    work = random.Random(f"work {seed}")
    loop = VirtualLoop(lambda: work.expovariate(1 / plan.work_seconds))
    simulation = Simulation(seed, plan, tiny)
    history = simulation.history
    ears, log = _Ears(history), logging.getLogger("glasshive")
    level = log.level
    log.addHandler(ears)
    log.setLevel(logging.INFO)
    asyncio.set_event_loop(loop)
    try:
        with _virtual(loop, random.Random(f"ids {seed}"), history):
            loop.run_until_complete(simulation.run())
    finally:
        log.removeHandler(ears)
        log.setLevel(level)
        asyncio.set_event_loop(None)
        loop.close()
    for one in history.operations:
        history.faults += [
            f"{one}: {fault}" for fault in one.faults(oracle[one.name], history.calm_at)
        ]
    return history
