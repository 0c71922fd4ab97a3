"""A swarm as a runner of one model sees it: who serves what, and no network."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
from peer_records import record_of

from glasshive.client import known_records, left_out, router, runner
from glasshive.client import swarm as client_swarm
from glasshive.client.bans import Bans
from glasshive.client.cancellation import Cancellation
from glasshive.client.demand import Demand
from glasshive.client.in_flight import InFlight
from glasshive.client.round_trips import RoundTrips
from glasshive.client.router import Router
from glasshive.client.runner import ModelRunner
from glasshive.client.warm_routes import WarmRoutes
from glasshive.dht.errors import UnknownModel
from glasshive.dht.memory_transport import MemoryNetwork, MemoryTransport
from glasshive.dht.records import PeerRecord
from glasshive.security.keys import Identity
from glasshive.security.manifest import ModelId
from glasshive.security.policy import Policy

BLOCKS = 4

T = TypeVar("T")


class Experiment:
    """As much of one as choosing a route needs: it takes every block."""

    graph = outline = chosen = None

    def __init__(self) -> None:
        self.cancellation = Cancellation()

    def line_of(self, node: object) -> None:
        return None


class Swarm:
    """Knows three peers that serve everything, and notes how long it was given to say so."""

    where = client_swarm.Where(
        own=("--config", "/home/me/hive.toml"), hosts=("--config", "hive.toml")
    )
    policy: Policy | None = None
    revoked = client_swarm.Swarm.revoked

    def __init__(self) -> None:
        self.transport: MemoryTransport = MemoryNetwork().transport(Identity.generate())
        self.given_seconds: list[float] = []
        self.round_trips = RoundTrips()
        self.in_flight = InFlight()
        self.warm = WarmRoutes(lambda coroutine: coroutine.close())  # type: ignore[arg-type, func-returns-value]
        self.measured: list[list[PeerRecord]] = []
        self.known = [self._record() for _ in range(3)]

    def look_up(self, model: str, within_seconds: float, *rest: object) -> list[PeerRecord]:
        return self.records(model, within_seconds)

    def records(self, model: str, within_seconds: float) -> list[PeerRecord]:
        self.given_seconds.append(within_seconds)
        if not self.known:
            raise UnknownModel(f"no peer announces {model}")
        return self.known

    async def ask_records(self, model: str, seconds: float) -> list[PeerRecord]:
        return self.records(model, seconds)

    def run(self, coroutine: Coroutine[Any, Any, T], *rest: object) -> T:
        return asyncio.run(coroutine)

    def measure(self, records: list[PeerRecord], *rest: object) -> None:
        self.measured.append(records)

    def _record(self, start: int = 0, end: int = BLOCKS) -> PeerRecord:
        return record_of(
            *(Identity.generate(), ModelId("ab" * 32)),
            start=start,
            end=end,
            attention="sdpa",
            addresses=("/ip4/127.0.0.1/tcp/1",),
            expires_at_seconds=self.transport.now() + 60.0,
        )


def runner_of(swarm: Swarm, bans: Bans | None = None) -> ModelRunner:
    its_router = Router(
        swarm,  # type: ignore[arg-type]
        *("ab" * 32, "tiny", "float32", "sdpa", BLOCKS, bans),
        chance=lambda: 0.0,
        liking=lambda peer: 0.0,
    )
    return ModelRunner(swarm, its_router)  # type: ignore[arg-type]


def set_clock(monkeypatch: pytest.MonkeyPatch, clock: list[float]) -> None:
    """Have it be `clock[0]` where runners look."""
    for module in (router, runner, known_records):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock[0]))


@pytest.fixture(autouse=True)
def no_return(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for a lost peer but where a test says so."""
    monkeypatch.setattr(left_out, "RETURN_SECONDS", 0.0)


@pytest.fixture(autouse=True)
def every_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """An experiment takes every block, and a pass of one token."""
    for module in (router, runner):
        monkeypatch.setattr(module, "needed_blocks", lambda graph, outline: range(BLOCKS))
        monkeypatch.setattr(module, "demand_of", lambda experiment: Demand())
