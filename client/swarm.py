"""A connection to a swarm: finds models, and runs experiments over the peers that serve them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol, TypeVar

from glasshive.client.cancellation import Cancellation
from glasshive.client.coverage import NOT_QUANTISED, kinds_text
from glasshive.client.errors import NoRoute
from glasshive.client.files import (
    fetch_model_files,
    read_config,
    read_generation_config,
    read_tokenizer,
)
from glasshive.client.in_flight import InFlight
from glasshive.client.job import Job
from glasshive.client.model import Model
from glasshive.client.round_trips import RoundTrips
from glasshive.client.router import Router
from glasshive.client.runner import ModelRunner
from glasshive.client.status_text import waiting_for
from glasshive.client.warm_routes import WarmRoutes
from glasshive.dht.deadline import within
from glasshive.dht.directory import ask_directory
from glasshive.dht.errors import SwarmError, TransportClosed, TransportLost
from glasshive.dht.loop_thread import LoopThread
from glasshive.dht.outcome import forget_outcome
from glasshive.dht.records import PeerRecord
from glasshive.dht.transport import PeerAddress, Transport
from glasshive.dht.trust_exchange import EXCHANGE_SECONDS
from glasshive.graph.dtypes import DType
from glasshive.graph.kernels import to_torch_dtype
from glasshive.graph.twin import build_twin, outline_of
from glasshive.security.keys import Identity, PeerId
from glasshive.security.manifest import ModelId
from glasshive.security.policy import Policy

T = TypeVar("T")

_DIRECTORY_SECONDS: Final = 20.0
_FILES_SECONDS: Final = 120.0
_POLICY_SECONDS: Final = EXCHANGE_SECONDS + 5  # for who answers late with the newest one
_CLOSE_SECONDS: Final = 30.0


class Where(NamedTuple):
    """The arguments that say which swarm, such as `--bootstrap ADDRESS`.

    `own` for a command of this user on this machine, `hosts` for `glasshive serve` on any.
    """

    own: tuple[str, ...]
    hosts: tuple[str, ...]


SOMEWHERE: Final = Where(own=("--bootstrap", "ADDRESS"), hosts=("--bootstrap", "ADDRESS"))


class PolicyKeeper(Protocol):
    """Knows what the swarm's signers allow, and learns of what they change."""

    @property
    def policy(self) -> Policy:
        """The policy in force."""

    async def policy_for(self, model_id: ModelId, name: str) -> Policy:
        """That which allows a model, on the loop. Raises NotAllowed."""


class Swarm:
    """A swarm as a researcher uses it. A context manager; `close` ends it.

    `transport` and `keeper` live on `loop`, where `end` ends them and all that belongs to them (by
    default the transport alone). `identity` is the transport's, and signs what is asked of peers.
    `bootstraps` are peers whose directory is asked, and `where` the arguments with which commands
    come to the same swarm.
    """

    def __init__(
        self,
        loop: LoopThread,
        transport: Transport,
        identity: Identity,
        bootstraps: Sequence[PeerAddress],
        cache: Path,
        keeper: PolicyKeeper | None = None,
        where: Where = SOMEWHERE,
        end: Callable[[], Coroutine[Any, Any, None]] | None = None,
    ) -> None:
        self._loop = loop
        self._keeper = keeper
        self._transport = transport
        self.identity = identity
        self._bootstraps = tuple(bootstraps)
        self._cache = cache
        self._end = end or transport.close
        self._where = where
        self._closed = False
        self._rebuilding: asyncio.Task[None] | None = None
        self.round_trips = RoundTrips()  # of whatever model
        self.in_flight = InFlight()
        self.warm = WarmRoutes(loop.submit)

    def __repr__(self) -> str:
        peers = f"{len(self._bootstraps)} bootstrap peer{'s'[: len(self._bootstraps) != 1]}"
        closed = ", closed" if self._closed else ""
        return f"<Swarm {self._transport.swarm!r} through {peers}{closed}>"

    def __enter__(self) -> Swarm:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the connection; may be called again, also after a call that was interrupted."""
        try:
            if not self._closed:
                self._closed = True
                self._loop.run(self._close(), _CLOSE_SECONDS)
        finally:
            self._loop.close()

    async def _close(self) -> None:
        await self.warm.close()
        if self._rebuilding is not None:
            self._rebuilding.cancel()
            await asyncio.wait({self._rebuilding})
        await self._end()

    @property
    def policy(self) -> Policy | None:
        """What the swarm's signers allow now; None where no root is configured.

        `print(*swarm.policy.describe(), sep="\\n")` says it in words. A host may allow less.
        """
        return None if self._keeper is None else self._keeper.policy

    def revoked(self, records: Sequence[PeerRecord]) -> set[PeerId]:
        """Those of these peers that are not to be used by the swarm's policy."""
        policy = self.policy
        return {one.peer_id for one in records if policy and policy.is_revoked(one.peer_id, "peer")}

    def records(
        self, model: str | None = None, within_seconds: float = _DIRECTORY_SECONDS
    ) -> list[PeerRecord]:
        """Who serves a model (a name, or a manifest's hash; None: every model), checked.

        Waits for the directory as long as `within_seconds`, and never longer than 20 s.
        Raises what `ask_directory` raises: UnknownModel, AmbiguousModel, DirectoryUnavailable,
        ShutOut, DeadlineExceeded.
        """
        return self.look_up(model, within_seconds)

    def look_up(
        self, model: str | None, within_seconds: float, cancellation: Cancellation | None = None
    ) -> list[PeerRecord]:
        """`records`, for a trace that may be cancelled meanwhile."""
        seconds = min(within_seconds, _DIRECTORY_SECONDS)
        return self.run(self.ask_records(model, seconds), seconds + 5, cancellation)

    async def ask_records(self, model: str | None, seconds: float) -> list[PeerRecord]:
        """`records`, on the loop of the connection; a new network daemon takes of the time."""
        clock = asyncio.get_running_loop().time
        ends_at = clock() + seconds
        await self._alive(seconds)
        return await ask_directory(
            *(self._transport, self._bootstraps, model, ends_at - clock()), where=self._where.hosts
        )

    def measure(
        self,
        records: Sequence[PeerRecord],
        within_seconds: float,
        cancellation: Cancellation | None = None,
    ) -> None:
        """Ask these peers how far away they are; `round_trips` has it then.

        Raises SwarmError, and what `run` raises.
        """
        ask = self.ask_round_trips(records, within_seconds)
        self.run(ask, within_seconds + 5, cancellation)

    async def ask_round_trips(self, records: Sequence[PeerRecord], seconds: float) -> None:
        """`measure`, on the loop of the connection."""
        await self._alive(seconds)
        await self.round_trips.ask(self._transport, records, seconds)

    def run(
        self,
        coroutine: Coroutine[Any, Any, T],
        within_seconds: float,
        cancellation: Cancellation | None = None,
        on_tick: Callable[[], None] | None = None,
    ) -> T:
        """Its result, on the loop of the connection; from another thread, as `LoopThread.run`.

        Raises TraceCancelled, having cancelled it, once `cancellation` says so.
        """
        if self._closed:
            coroutine.close()
        self._check_open()
        watch = None if cancellation is None else cancellation.watch
        try:
            return self._loop.run(coroutine, within_seconds, on_tick, watch)
        except TransportClosed:
            if cancellation is not None:
                cancellation.check()
            raise

    @waiting_for("finding out about the model")
    def model(self, name: str, *, dtype: str | None = None, attention: str | None = None) -> Model:
        """The model called `name`, or with this manifest hash.

        `dtype` and `attention` choose among the number formats and attention backends that it is
        served in; they are needed only if several are, and a trace never mixes them. Configuration
        and tokenizer come from a peer the first time. Raises NotAllowed for a model outside the
        swarm's policy, NoRoute, BadModelFiles, and what `records` raises.
        """
        mine = self.records(name)
        if self._keeper is not None:
            policy = self._loop.run(
                self._keeper.policy_for(mine[0].model, mine[0].model_name), _POLICY_SECONDS
            )
            revoked = self.revoked(mine)
            if len(revoked) == len({one.peer_id for one in mine}):
                raise NoRoute(
                    f"{name} is served only by peers that are revoked by {policy.source}: "
                    f"{', '.join(sorted(revoked)):.300}"
                )
            mine = [one for one in mine if one.peer_id not in revoked]
        wanted_of = {"quantisation": NOT_QUANTISED, "dtype": dtype, "attention": attention}
        for what, wanted in wanted_of.items():
            served = sorted({str(getattr(one, what)) for one in mine})
            if wanted is None and len(served) > 1:
                raise NoRoute(
                    f"{name} is served with {what} {' and '.join(served)}; choose with {what}= "
                    f"({kinds_text(mine, mine[0].n_blocks)})"
                )
            chosen = served[0] if wanted is None else wanted
            if chosen not in served:
                raise NoRoute(
                    f"{name} is not served with {what} {chosen}; it is with {' and '.join(served)}"
                )
            mine = [one for one in mine if getattr(one, what) == chosen]
        model_id = mine[0].model
        peers = [PeerAddress(one.peer_id, one.addresses) for one in mine]
        folder = self._loop.run(
            fetch_model_files(self._transport, peers, model_id, self._cache, _FILES_SECONDS),
            _FILES_SECONDS + 5,
        )
        config = read_config(folder)
        twin = build_twin(config, to_torch_dtype(DType.from_name(mine[0].dtype)), mine[0].attention)
        router = Router(
            *(self, model_id, mine[0].model_name, mine[0].dtype, mine[0].attention),
            _blocks(config),
        )
        with self.warm.in_use(router.refresh, at_once=True):  # its first trace finds it ready
            return Model(
                name=mine[0].model_name,
                model_id=model_id,
                config=config,
                generation_config=read_generation_config(folder, config),
                tokenizer=read_tokenizer(folder),
                twin=twin,
                outline=outline_of(twin, config),
                runner=ModelRunner(self, router),
            )

    def run_job(
        self,
        job: Job,
        on_tick: Callable[[], None] | None = None,
        cancellation: Cancellation | None = None,
    ) -> None:
        """Run a job to its end, from the caller's thread.

        An interrupt of that, or `cancellation`, cancels it on every peer. The caller's thread calls
        `on_tick` twenty times a second meanwhile. Raises what `Job.run` and `run` raise.
        """

        async def run() -> None:
            try:
                await self._alive(job.left_seconds)
            except TransportClosed:
                raise
            except SwarmError as error:
                raise TransportLost(f"no new network daemon starts here: {error}") from error
            await job.run()

        self.run(run(), job.deadline_seconds + 10, cancellation, on_tick)

    async def _alive(self, within_seconds: float) -> None:
        """The connection is there: a network daemon that has died is started again.

        Raises DeadlineExceeded, and what starting it raises; then the next call tries again.
        """
        rebuilding = self._rebuilding
        if self._transport.lost.is_set() and (rebuilding is None or rebuilding.done()):
            # A task of its own: several traces wait for it, each for as long as it may.
            rebuilding = self._rebuilding = asyncio.create_task(self._transport.rebuild())
            rebuilding.add_done_callback(forget_outcome)
        if rebuilding is not None and not rebuilding.done():
            what = "starting a new network daemon (p2pd)"
            await within(within_seconds, asyncio.shield(rebuilding), what)

    def _check_open(self) -> None:
        if self._closed:
            raise TransportClosed(
                "this swarm was closed; connect again with glasshive.connect(...)"
            )

    @property
    def where(self) -> Where:
        """The arguments with which commands come to this swarm."""
        return self._where

    @property
    def transport(self) -> Transport:
        """The connection itself."""
        return self._transport


def _blocks(config: Any) -> int:
    """The number of blocks of a model of this configuration."""
    return int(config.get_text_config().num_hidden_layers)
