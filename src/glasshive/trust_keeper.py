"""Keeps a host or bootstrap peer at the newest whitelist of its swarm, for as long as it runs.

Every few seconds it exchanges versions with some neighbours: the bootstrap peers, hosts that
announce a newer whitelist than the one here, and a few others. What came from one is told to
the others at once. When the whitelist changes, whoever runs traces here is told the new policy,
without a restart; when it expires at that moment, whatever the neighbours do.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, Final, final

import structlog

from glasshive.dht.addresses import dialable
from glasshive.dht.errors import RecordRefused, ShutOut, SwarmError
from glasshive.dht.records import MODELS_KEY, PeerRecord
from glasshive.dht.transport import PeerAddress, Transport
from glasshive.dht.trust_exchange import (
    EXCHANGE_SECONDS,
    exchange_trust,
    serve_trust,
    versions_of,
)
from glasshive.good_answer import good_answer
from glasshive.security.errors import BadPolicy, BadTrustStore, SecurityError
from glasshive.security.host_policy import HostRules
from glasshive.security.keys import PeerId
from glasshive.security.manifest import ModelId
from glasshive.security.policy import Policy
from glasshive.security.trust_store import TrustStore
from glasshive.swarm_trust import host_rules, rules_state

# Of the standard library underneath: in a client's own script it is for that to say what is shown.
log = structlog.wrap_logger(logging.getLogger(__name__))

PERIOD_SECONDS: Final = 10.0
CLOSE_SECONDS: Final = 5.0
MAX_ASKED: Final = 4  # hosts in a round, besides the bootstrap peers


@final
class TrustKeeper:
    """Keeps `store` current over `transport`. An async context manager.

    `on_policy` is called on the loop with each new policy after the one that `start` returned, and
    again after a period if it raised. `clock` gives Unix seconds.
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
        self._bootstraps = _each_once(one for one in bootstraps if one.peer_id != transport.peer_id)
        self._own = own
        self._clock = clock
        self._period_seconds = period_seconds
        self._rng = rng or random.Random()  # noqa: S311 (whom to ask next is no secret)
        self._news = asyncio.Event()
        self._look = asyncio.Event()  # at the store: what the policy is made of may be other
        self._tasks: set[asyncio.Task[Any]] = set()
        self._answers: list[asyncio.Task[bool]] = []  # of those who were asked at the start
        self._said: dict[PeerId, str] = {}  # what each neighbour's last failure was
        self._policy = Policy.floor()
        self._made_of: tuple[int, int, str] | None = None

    @property
    def policy(self) -> Policy:
        """The policy in force."""
        return self._policy

    async def start(self) -> Policy:
        """The policy in force, once the bootstrap peers were asked; goes on in tasks of its own.

        It doesn't wait for those that are silent while another has answered well. What they say
        later counts as soon as they do. Raises BadTrustStore.
        """
        known = [one.peer_id for one in self._bootstraps]
        await serve_trust(self._transport, self._store, self._on_news, known=known)
        self._answers = [asyncio.create_task(self._exchange(one)) for one in self._bootstraps]
        asking = asyncio.create_task(self._keep_asking())
        self._tasks = {*self._answers, asking}
        try:
            await good_answer(self._answers)
            self._store.refresh()
            now = self._clock()
            self._made_of = rules_state(self._store, now)
            self._policy = host_rules(self._store, self._own, now)
            self._say_wider()
        except BaseException:
            await self.close()
            raise
        self._tasks.add(asyncio.create_task(self._keep_applied()))
        return self._policy

    async def policy_for(self, model_id: ModelId, name: str) -> Policy:
        """The policy in force, which allows this model. Raises NotAllowed.

        That is said only when all bootstrap peers that were asked at the start have answered: who
        answered first may be behind, and the newest whitelist still on its way.
        """
        if not self._policy.allows_model(model_id):
            if self._answers:
                await asyncio.wait(self._answers, timeout=EXCHANGE_SECONDS)
            self._apply()
        self._policy.check_model(model_id, name)
        return self._policy

    async def close(self) -> None:
        """Stop. Never raises; may be called again."""
        tasks, self._tasks = self._tasks, set()
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=CLOSE_SECONDS)

    async def _keep_asking(self) -> None:
        """Round after round; the first is over when those who were asked at the start answered."""
        try:
            await asyncio.gather(*self._answers)
        except Exception:
            log.exception("trust_round_failed")
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._period_seconds):
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
        self._look.set()
        await self._ask([*self._bootstraps, *await self._hosts()])

    async def _keep_applied(self) -> None:
        """Apply what is new at once, and when a policy ends what counts then.

        Beside the rounds: these wait for neighbours that may be slow.
        """
        while True:
            ends = self._policy.ends_seconds
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(None if ends is None else ends - self._clock()):
                    await self._look.wait()
            self._look.clear()
            try:
                self._apply()
            except Exception:
                log.exception("policy_not_applied")
                await asyncio.sleep(self._period_seconds)
                self._look.set()

    def _on_news(self) -> None:
        self._look.set()  # it counts at once
        self._news.set()  # and the others are told

    def _apply(self) -> None:
        """Tell of the policy that the store stands for now, if it is another."""
        now = self._clock()
        made_of = rules_state(self._store, now)
        if made_of == self._made_of:
            return
        policy = host_rules(self._store, self._own, now)
        self.on_policy(policy)
        self._made_of, self._policy = made_of, policy  # not before: who failed is told again
        log.info(
            "policy_changed",
            policy=policy.who,
            root_version=self._store.root.version,
            whitelist_version=policy.version,
        )
        self._say_wider()

    def _say_wider(self) -> None:
        """Warn of what the host's own file names in vain, if a whitelist is in force."""
        held = self._store.whitelist
        if self._own is None or held is None or self._policy.floor_reason:
            return
        try:
            self._own.check_narrows(Policy.effective(held.whitelist, self._clock()))
        except BadPolicy as error:
            log.warning("own_policy_is_wider", error=str(error))

    async def _ask(self, neighbours: Sequence[PeerAddress]) -> None:
        """Exchange with all of them, side by side; what fails is logged once for each."""
        await asyncio.gather(*(self._exchange(one) for one in neighbours))

    async def _exchange(self, neighbour: PeerAddress) -> bool:
        """Whether that went well."""
        before = versions_of(self._store)
        said = ""
        try:
            await exchange_trust(self._transport, neighbour, self._store)
        except (SwarmError, SecurityError) as error:
            said = str(error)
            # Who isn't let in hears it from what keeps it a member.
            if self._said.get(neighbour.peer_id) != said and not isinstance(error, ShutOut):
                log.warning("trust_exchange_failed", peer=neighbour.peer_id, error=said)
        self._said[neighbour.peer_id] = said
        while len(self._said) > 256:
            del self._said[next(iter(self._said))]
        if versions_of(self._store) != before:
            self._on_news()
        return not said

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
            own, members_only = self._transport.addresses, self._transport.members_only
            addresses = dialable(record.addresses, own, members_only=members_only)
            if addresses:  # anybody can announce any
                kind = newer if record.whitelist_version > ours else others
                kind.append(PeerAddress(record.peer_id, addresses))
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


def _each_once(neighbours: Iterable[PeerAddress]) -> list[PeerAddress]:
    """One address for each peer, with all that are listed: it answers one exchange at a time."""
    found: dict[PeerId, tuple[str, ...]] = {}
    for one in neighbours:
        found[one.peer_id] = found.get(one.peer_id, ()) + one.addresses
    return [PeerAddress(peer_id, addresses) for peer_id, addresses in found.items()]
