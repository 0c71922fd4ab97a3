"""Keeps a host or bootstrap peer at the newest whitelist of its swarm, for as long as it runs.

Every few seconds it exchanges versions with some neighbours: the bootstrap peers, hosts that
announce a newer whitelist than the one here, and a few others. What came from one is told to
the others at once. When the whitelist changes or expires, whoever runs traces here is told the new
policy, without a restart.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Final, final

import structlog

from glasshive.dht.errors import RecordRefused, SwarmError
from glasshive.dht.records import MODELS_KEY, PeerRecord
from glasshive.dht.transport import PeerAddress, Transport
from glasshive.dht.trust_exchange import exchange_trust, serve_trust, versions_of
from glasshive.security.errors import BadPolicy, BadTrustStore, SecurityError
from glasshive.security.host_policy import HostRules
from glasshive.security.keys import PeerId
from glasshive.security.policy import Policy
from glasshive.security.trust_store import TrustStore
from glasshive.swarm_trust import host_rules

log = structlog.get_logger(__name__)

PERIOD_SECONDS: Final = 10.0
CLOSE_SECONDS: Final = 5.0
MAX_ASKED: Final = 4  # hosts in a round, besides the bootstrap peers


@final
class TrustKeeper:
    """Keeps `store` current over `transport`. An async context manager.

    `on_policy` is called on the loop with each new policy after the one that `start` returned.
    `clock` gives Unix seconds.
    """

    def __init__(
        self,
        transport: Transport,
        store: TrustStore,
        bootstraps: Sequence[PeerAddress],
        *,
        own: HostRules | None = None,
        on_policy: Callable[[Policy], None] = lambda policy: None,
        clock: Callable[[], float] = time.time,
        period_seconds: float = PERIOD_SECONDS,
        rng: random.Random | None = None,
    ) -> None:
        self.on_policy = on_policy
        self._transport = transport
        self._store = store
        self._bootstraps = [one for one in bootstraps if one.peer_id != transport.peer_id]
        self._own = own
        self._clock = clock
        self._period_seconds = period_seconds
        self._rng = rng or random.Random()  # noqa: S311 (whom to ask next is no secret)
        self._news = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._said: dict[PeerId, str] = {}  # what each neighbour's last failure was
        self._policy = Policy.floor()

    @property
    def policy(self) -> Policy:
        """The policy in force."""
        return self._policy

    async def start(self) -> Policy:
        """The policy in force, once the bootstrap peers were asked; goes on in a task of its own.

        Raises BadPolicy for a host's own file that is wider than the whitelist, and BadTrustStore.
        """
        await serve_trust(self._transport, self._store, self._news.set)
        await self._ask(self._bootstraps)
        self._store.refresh()
        self._policy = host_rules(self._store, self._own, self._clock(), strict=True)
        self._task = asyncio.create_task(self._go_on())
        return self._policy

    async def close(self) -> None:
        """Stop. Never raises; may be called again."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait({task}, timeout=CLOSE_SECONDS)

    async def _go_on(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._pause_seconds()):
                    await self._news.wait()
            self._news.clear()
            try:
                await self._round()
            except Exception:
                # For a bug of ours whoever runs traces here must not stay under an old policy.
                log.exception("trust_round_failed")

    async def _round(self) -> None:
        try:
            self._store.refresh()
        except BadTrustStore as error:
            log.error("trust_not_kept", error=str(error))
        self._apply()  # first: time may be up, whatever the neighbours do
        await self._ask([*self._bootstraps, *await self._hosts()])
        self._apply()

    def _pause_seconds(self) -> float:
        """Until the next round, or until the policy ends if that is sooner."""
        ends = self._policy.ends_seconds
        if ends is None:
            return self._period_seconds
        return max(min(self._period_seconds, ends - self._clock()), 0.0)

    def _apply(self) -> None:
        """Tell of the policy that the store stands for now, if it is another."""
        policy = host_rules(self._store, self._own, self._clock())
        if policy == self._policy:
            return
        self._policy = policy
        held = self._store.whitelist
        log.info(
            "policy_changed",
            policy=policy.who,
            root_version=self._store.root.version,
            whitelist_version=policy.version,
        )
        if self._own is not None and held is not None:
            try:
                self._own.check_narrows(Policy.effective(held.whitelist, self._clock()))
            except BadPolicy as error:
                log.warning("own_policy_is_wider", error=str(error))  # and counts for nothing there
        self.on_policy(policy)

    async def _ask(self, neighbours: Sequence[PeerAddress]) -> None:
        """Exchange with all of them, side by side; what fails is logged once for each."""
        await asyncio.gather(*(self._exchange(one) for one in neighbours))

    async def _exchange(self, neighbour: PeerAddress) -> None:
        before = versions_of(self._store)
        said = ""
        try:
            await exchange_trust(self._transport, neighbour, self._store)
        except (SwarmError, SecurityError) as error:
            said = str(error)
            if self._said.get(neighbour.peer_id) != said:
                log.warning("trust_exchange_failed", peer=neighbour.peer_id, error=said)
        self._said[neighbour.peer_id] = said
        while len(self._said) > 256:
            del self._said[next(iter(self._said))]
        if versions_of(self._store) != before:
            self._news.set()  # it counts at once, and the others are told

    async def _hosts(self) -> list[PeerAddress]:
        """Some hosts that the DHT knows, first those that announce a newer whitelist than ours."""
        try:
            found = (await self._transport.fetch([MODELS_KEY]))[MODELS_KEY]
        except SwarmError:
            return []
        known = {one.peer_id for one in self._bootstraps} | {self._transport.peer_id}
        newer: list[PeerAddress] = []
        others: list[PeerAddress] = []
        ours = versions_of(self._store).whitelist
        for data in found.values():
            try:
                record = PeerRecord.verify(data, None, swarm=self._transport.swarm)
            except RecordRefused:
                continue
            if record.withdrawn or record.peer_id in known:
                continue
            kind = newer if record.whitelist_version > ours else others
            kind.append(PeerAddress(record.peer_id, record.addresses))
        for kind in (newer, others):
            self._rng.shuffle(kind)
        half = MAX_ASKED // 2  # whoever claims a high version must not be all who is asked
        return [*newer[:half], *others, *newer[half:]][:MAX_ASKED]

    async def __aenter__(self) -> TrustKeeper:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()
