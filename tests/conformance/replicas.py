"""Hosts for each span of a tiny model, in this process, and who is lost when, or comes back.

`Replicas.after(part, values, do)` has something happen once a part has sent so many values to other
parts: at the same point of a generation, however quick the machine is.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from glasshive.client.job import Job
from glasshive.client.swarm import Swarm
from glasshive.dht.framing import Stream
from glasshive.dht.loop_thread import LoopThread
from glasshive.dht.memory_transport import MemoryNetwork
from glasshive.dht.transport import PeerAddress
from glasshive.graph.plan import Span
from glasshive.peer.outgoing_edge import OutgoingEdge, Sendable
from glasshive.peer.seen_requests import SeenRequests
from glasshive.peer.served_model import ServedModel, load_served_model, make_manifest
from glasshive.peer.serving import Serving
from glasshive.security.keys import Identity, PeerId


def load(folder: Path, attention: Any, cuts: Sequence[int]) -> list[ServedModel]:
    """The spans of a model, each of which several hosts may serve."""
    manifest = make_manifest(folder, "tiny")
    return [
        load_served_model(
            folder,
            "tiny",
            Span(start, end),
            dtype=torch.float32,
            device="cpu",
            attention=attention,
            manifest=manifest,
        )
        for start, end in itertools.pairwise((0, *cuts, 6))
    ]


@dataclass
class Replicas:
    """Hosts of these spans; `model` is traced over them. A context manager."""

    served: list[ServedModel]
    cache: Path
    patch: pytest.MonkeyPatch
    copies: int = 2
    jobs: list[Job] = field(default_factory=list)
    again: list[int] = field(default_factory=list)  # of each new stream, how much had come
    _rules: list[tuple[int, int, Callable[[], None]]] = field(default_factory=list)
    _sent: dict[int, int] = field(default_factory=dict)
    _served: dict[PeerId, ServedModel] = field(default_factory=dict)
    _returning: list[asyncio.Future[None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.loop = LoopThread("replicas")
        self.network = MemoryNetwork()
        self.hosts: list[Serving] = []
        self._watch()
        peers = [self.add(one) for one in self.served * self.copies]
        identity = Identity.generate()
        self.client = self.network.transport(identity, dht=False)
        self.swarm = Swarm(self.loop, self.client, identity, peers, self.cache)
        self.model: Any = self.swarm.model("tiny")

    def __enter__(self) -> Replicas:
        return self

    def __exit__(self, *error: object) -> None:
        for host in self.hosts:
            host.host.close()
        self.loop.close()

    def add(self, served: ServedModel, **says: Any) -> PeerAddress:
        """One more host, which may say something else of itself: these fields of its record."""

        async def start() -> PeerAddress:
            serving = await self._start(served, Identity.generate(), SeenRequests(), **says)
            return PeerAddress(serving.record.peer_id, serving.record.addresses)

        return self.loop.run(start(), 60)

    async def _start(
        self, served: ServedModel, identity: Identity, seen: SeenRequests, **says: Any
    ) -> Serving:
        transport = self.network.transport(identity)
        serving = Serving(transport, identity, served, seen=seen)
        for name, value in says.items():
            object.__setattr__(serving.record, name, value)
        await serving.start()
        self.hosts.append(serving)
        self._served[identity.peer_id] = served
        return serving

    def after(self, part: int, values: int, do: Callable[[], None]) -> None:
        """Do this, once, on the loop, before that part sends one more value than so many."""
        self._rules.append((part, values, do))

    def kill(self, *parts: int) -> Callable[[], None]:
        """What loses the peers that run these parts then."""

        def do() -> None:
            for part in parts:
                self.network.kill(self.jobs[-1].peers[part].peer_id)

        return do

    def lose_daemon(self, *parts: int) -> Callable[[], None]:
        """What loses the network daemons of the peers of these parts, which they start anew."""

        async def rebuild(serving: Serving) -> None:
            await serving._transport.rebuild()
            serving.refresh(again=True)

        return lambda: self._lose(parts, rebuild)

    def restart(self, *parts: int) -> Callable[[], None]:
        """What kills the processes of these parts' peers, which start again at other addresses."""

        async def start(serving: Serving) -> None:
            self.hosts.remove(serving)
            serving.host.close()
            await serving._announcer.close()
            host = serving.host
            await self._start(self._served[serving.record.peer_id], host._identity, host._seen)

        return lambda: self._lose(parts, start)

    def _lose(
        self, parts: Sequence[int], come_back: Callable[[Serving], Coroutine[Any, Any, None]]
    ) -> None:
        """Lose these parts' peers; each comes back when the client has seen that it is gone."""
        job = self.jobs[-1]

        async def lose(serving: Serving) -> None:
            peer = serving.record.peer_id
            self.network.kill(peer)
            began = job.clock()
            async with asyncio.timeout(30):
                while job._left_out.gone_seconds(peer) > job.clock() - began:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            await asyncio.sleep(0.01)  # a record's time is in whole milliseconds
            await come_back(serving)

        for part in parts:
            peer = job.peers[part].peer_id
            serving = next(one for one in self.hosts if one.record.peer_id == peer)
            self._returning.append(asyncio.ensure_future(lose(serving)))

    def pass_time(self, seconds: float) -> None:
        """All clocks go on by so much at once, and all hosts announce themselves anew.

        Of deadlines nothing passes.
        """
        clock = self.network.clock
        self.network.clock = lambda: clock() + seconds
        for host in self.hosts:
            host.refresh(again=True)

    def cut(self, one: int, other: int) -> Callable[[], None]:
        """What ends all streams between the peers of two parts; both may open new ones."""

        def do() -> None:
            ends = [self.jobs[-1].peers[part].peer_id for part in (one, other)]
            self.network.cut(ends[0], ends[1])
            self.network.heal(ends[0], ends[1])

        return do

    def part(self, one: int, other: int) -> Callable[[], None]:
        """What has the peers of two parts never reach each other again."""

        def do() -> None:
            self.network.cut(*(self.jobs[-1].peers[index].peer_id for index in (one, other)))

        return do

    def _watch(self) -> None:
        send, run, opened = OutgoingEdge._send, Job.run, OutgoingEdge._open

        async def sending(edge: OutgoingEdge, stream: Stream, value: Sendable) -> None:
            part = edge._request.part_index
            count = self._sent[part] = self._sent.get(part, -1) + 1
            for rule in [one for one in self._rules if one[0] == part and one[1] <= count]:
                self._rules.remove(rule)
                rule[2]()
            await send(edge, stream, value)

        async def running(job: Job) -> Any:
            self.jobs.append(job)
            self._sent.clear()
            return await run(job)

        async def opening(edge: OutgoingEdge, stream: Stream) -> int:
            came = await opened(edge, stream)
            if edge._again:
                self.again.append(came)
            return came

        self.patch.setattr(OutgoingEdge, "_send", sending)
        self.patch.setattr(Job, "run", running)
        self.patch.setattr(OutgoingEdge, "_open", opening)
