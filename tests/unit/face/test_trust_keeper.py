"""The keeper: host and bootstrap stay at the newest whitelist, as long as their clock allows."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from signers import (
    ANN,
    CAT,
    DAN,
    DAY,
    EVE,
    FIRST,
    NOW,
    ROOT,
    SWARM,
    TINY,
    WHITELIST,
    root_document,
)
from signers import signed_whitelist as signed
from structlog.testing import capture_logs

from glasshive import good_answer, trust_keeper
from glasshive.dht import trust_exchange
from glasshive.dht.announcer import Announcer
from glasshive.dht.errors import ShutOut, StreamRefused
from glasshive.dht.framing import Stream
from glasshive.dht.memory_transport import MemoryNetwork
from glasshive.dht.messages import TRUST_PROTOCOL
from glasshive.dht.records import ModelId, PeerRecord
from glasshive.dht.transport import PeerAddress
from glasshive.dht.trust_exchange import exchange_trust, serve_trust
from glasshive.security.errors import BadTrustStore, NotAllowed
from glasshive.security.host_policy import HostRules
from glasshive.security.keys import Identity
from glasshive.security.policy import Policy
from glasshive.security.trust_root import next_root
from glasshive.security.trust_store import TrustStore
from glasshive.settings import ConfigError, Settings
from glasshive.swarm_trust import host_rules, open_store, own_rules
from glasshive.trust_keeper import TrustKeeper

SECOND = root_document(version=2, whitelist_keys=(DAN, EVE), before=ROOT)
SECOND_ROOT = next_root(ROOT, SECOND)


class Swarm:
    """Peers on one network, with one clock."""

    def __init__(self, folder: Path) -> None:
        self.now = float(NOW)
        self.network = MemoryNetwork(clock=lambda: self.now)
        self.folder = folder
        self.keepers: list[TrustKeeper] = []
        self.identities: list[Identity] = []

    def store(self, name: str) -> TrustStore:
        return TrustStore(self.folder / name, swarm=SWARM, root=FIRST, clock=lambda: self.now)

    def keeper(
        self, store: TrustStore, *bootstraps: PeerAddress, period: float = 600.0, **options: Any
    ) -> tuple[TrustKeeper, PeerAddress]:
        identity = Identity.generate()
        transport = self.network.transport(identity)
        made = TrustKeeper(
            transport, store, bootstraps, clock=lambda: self.now, period_seconds=period, **options
        )
        self.keepers.append(made)
        self.identities.append(identity)
        return made, PeerAddress(transport.peer_id, transport.addresses)


@pytest_asyncio.fixture
async def swarm(tmp_path: Path) -> AsyncIterator[Swarm]:
    made = Swarm(tmp_path)
    yield made
    for keeper in made.keepers:
        await keeper.close()
        await keeper._transport.close()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 (what it waits for has no event)
            await asyncio.sleep(0.001)


@pytest.mark.asyncio
async def test_a_host_begins_with_what_its_bootstrap_has(swarm: Swarm) -> None:
    kept = swarm.store("bootstrap")
    kept.accept_whitelist(*signed())
    bootstrap, place = swarm.keeper(kept)
    assert (await bootstrap.start()).version == 7
    host, _ = swarm.keeper(swarm.store("host"), place)
    policy = await host.start()
    assert policy == host.policy
    assert (policy.version, policy.floor_reason) == (7, "")
    assert len(policy.signers) == 2
    assert set(policy.signers) <= set(ROOT.whitelist_keys)
    assert swarm.store("host").highest_version == 7  # and keeps it for its next start


class Slow:
    """A bootstrap peer that has the whitelist `version`, but is frozen up to `thaw`.

    `asked` is set when it is, `left` when whoever asked has ended that.
    """

    def __init__(self, swarm: Swarm, version: int, **changes: Any) -> None:
        self.store = swarm.store(f"slow-{version}")
        self.store.accept_whitelist(*signed(version, **changes))
        keeper, self.place = swarm.keeper(self.store)
        self._transport = keeper._transport
        self._thawed = asyncio.Event()
        self.asked, self.left = asyncio.Event(), asyncio.Event()

    async def serve(self) -> PeerAddress:
        await serve_trust(self._transport, self.store)
        answer = self._transport._handlers[TRUST_PROTOCOL]  # type: ignore[attr-defined]

        async def frozen(stream: Stream) -> None:
            self.asked.set()
            try:
                await self._thawed.wait()
                await answer(stream)
            finally:
                self.left.set()

        await self._transport.serve(TRUST_PROTOCOL, frozen)
        return self.place

    def thaw(self) -> None:
        self._thawed.set()


async def quick_bootstrap(swarm: Swarm, store: TrustStore | None = None) -> PeerAddress:
    """One that answers at once, with whitelist 7 if not with what `store` has."""
    if store is None:
        store = swarm.store("quick")
        store.accept_whitelist(*signed())
    keeper, place = swarm.keeper(store)
    await keeper.start()
    return place


START_SECONDS = trust_exchange.EXCHANGE_SECONDS / 2  # too few to wait for who is frozen


@pytest.mark.asyncio
async def test_a_frozen_bootstrap_keeps_nobody_waiting_nor_news_back(swarm: Swarm) -> None:
    """It had 10 s of every start. The other, which has an older whitelist, may be hostile."""
    slow = Slow(swarm, 8)
    told: list[Policy] = []
    places = [await slow.serve(), await quick_bootstrap(swarm)]
    host, _ = swarm.keeper(swarm.store("host"), *places, on_policy=told.append)
    async with asyncio.timeout(START_SECONDS):
        assert (await host.start()).version == 7
    assert not slow.left.is_set()
    slow.thaw()
    await until(lambda: told)  # without a period between
    assert [one.version for one in told] == [8]


NEW = ModelId("ef" * 32)  # to what whitelist 7 has


@pytest.mark.asyncio
@pytest.mark.parametrize("is_allowed", [True, False])
async def test_a_model_is_refused_only_when_all_bootstraps_have_answered(
    swarm: Swarm, monkeypatch: pytest.MonkeyPatch, is_allowed: bool
) -> None:
    """The first to answer was behind, and its whitelist refused what the newest one allows."""
    monkeypatch.setattr(good_answer, "MOMENT_SECONDS", 0.0)
    slow = Slow(swarm, 8, models={NEW: "new"} if is_allowed else {TINY: "tiny"})
    host, _ = swarm.keeper(swarm.store("host"), await quick_bootstrap(swarm), await slow.serve())
    assert (await host.start()).version == 7
    asking = asyncio.create_task(host.policy_for(NEW, "new"))
    async with asyncio.timeout(START_SECONDS):
        assert (await host.policy_for(TINY, "tiny")).version == 7  # nobody is waited for
        await slow.asked.wait()
    for _ in range(50):
        await asyncio.sleep(0)
    assert not asking.done()
    slow.thaw()
    if is_allowed:
        assert (await asking).version == 8
    else:
        with pytest.raises(NotAllowed, match=r"'new' .* is not allowed by whitelist 8"):
            await asking


@pytest.mark.asyncio
async def test_a_model_is_asked_for_in_what_has_just_come(swarm: Swarm) -> None:
    store = swarm.store("host")
    store.accept_whitelist(*signed())
    host, _ = swarm.keeper(store)
    assert (await host.start()).version == 7
    store.accept_whitelist(*signed(8, models={NEW: "new"}))
    assert (await host.policy_for(NEW, "new")).version == 8


@pytest.mark.asyncio
async def test_the_other_bootstraps_have_a_moment(
    swarm: Swarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(good_answer, "MOMENT_SECONDS", 20.0)
    slow = Slow(swarm, 8)
    store = swarm.store("host")
    host, _ = swarm.keeper(store, await quick_bootstrap(swarm), await slow.serve())
    starting = asyncio.create_task(host.start())
    await until(lambda: store.highest_version == 7)
    slow.thaw()
    assert (await starting).version == 8


@pytest.mark.asyncio
async def test_a_bad_answer_is_not_enough_to_begin_with(
    swarm: Swarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(good_answer, "MOMENT_SECONDS", 0.0)
    liars = swarm.store("liar")
    liars.accept_whitelist(*signed(6, expires_seconds=NOW + DAY))
    liar = await quick_bootstrap(swarm, liars)
    swarm.now = NOW + DAY  # what the liar has is out of date
    slow = Slow(swarm, 7)
    host, _ = swarm.keeper(swarm.store("host"), liar, await slow.serve())
    starting = asyncio.create_task(host.start())
    await until(lambda: host._said)
    for _ in range(50):
        await asyncio.sleep(0)
    assert "expired" in host._said[liar.peer_id]
    assert not starting.done()
    slow.thaw()
    assert (await starting).version == 7


@pytest.mark.asyncio
@pytest.mark.parametrize("given_up", [False, True], ids=["closed", "given-up"])
async def test_no_frozen_bootstrap_is_asked_on_for_who_has_left(
    swarm: Swarm, monkeypatch: pytest.MonkeyPatch, given_up: bool
) -> None:
    monkeypatch.setattr(good_answer, "MOMENT_SECONDS", 20.0 if given_up else 0.0)
    slow, quick = Slow(swarm, 8), await quick_bootstrap(swarm)
    place, before = await slow.serve(), asyncio.all_tasks()
    store = swarm.store("host")
    host, _ = swarm.keeper(store, quick, place)
    starting = asyncio.create_task(host.start())
    await until(lambda: store.highest_version == 7 and slow.asked.is_set())
    if given_up:
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
    else:
        await starting
        await host.close()
    left = asyncio.all_tasks() - before
    assert [one for one in left if "TrustKeeper." in repr(one)] == []


@pytest.mark.asyncio
async def test_what_one_learns_all_learn_and_are_told_of(swarm: Swarm) -> None:
    kept = swarm.store("bootstrap")
    kept.accept_whitelist(*signed())
    bootstrap, place = swarm.keeper(kept)
    await bootstrap.start()
    told: list[Policy] = []
    host, host_place = swarm.keeper(swarm.store("host"), place, on_policy=told.append)
    await host.start()
    assert told == []
    # A neighbour brings news to the host, and it goes on to the bootstrap without a period between.
    neighbour = swarm.store("neighbour")
    neighbour.accept_roots([SECOND])
    neighbour.accept_whitelist(*signed(8, root=SECOND_ROOT, signed_by=(DAN, EVE), ops={"add": 1}))
    other, _ = swarm.keeper(neighbour, host_place)
    await other.start()
    await until(lambda: told and kept.whitelist and kept.whitelist.whitelist.version == 8)
    assert [one.version for one in told] == [8]
    assert told[0].ops == {"add"}
    await until(lambda: bootstrap.policy.version == 8)
    assert kept.root.version == 2


@pytest.mark.asyncio
async def test_a_neighbour_that_was_away_is_told_at_once_of_news(swarm: Swarm) -> None:
    ahead = swarm.store("ahead")
    ahead.accept_whitelist(*signed(8))
    leader, place = swarm.keeper(ahead)
    await leader.start()
    behind = swarm.store("behind")
    busy, busy_place = swarm.keeper(behind)

    async def handle(stream: Stream) -> None:
        await serve_trust(busy._transport, behind)  # from the next time on
        await stream.refuse("busy")

    await busy._transport.serve(TRUST_PROTOCOL, handle)
    between, _ = swarm.keeper(swarm.store("between"), busy_place, place)
    await between.start()
    await until(lambda: behind.highest_version == 8)


@pytest.mark.asyncio
async def test_hosts_that_announce_a_newer_version_are_asked(swarm: Swarm) -> None:
    ahead = swarm.store("ahead")
    ahead.accept_whitelist(*signed(8))
    leader, place = swarm.keeper(ahead)
    await leader.start()
    record = PeerRecord(
        model=ModelId("ab" * 32),
        model_name="tiny",
        start=0,
        end=2,
        n_blocks=2,
        dtype="float32",
        backend="cpu",
        attention="eager",
        throughput_tokens_per_second=1.0,
        addresses=place.addresses,
        whitelist_version=8,
        load=0.0,
        software_version="0",
        peer_id=place.peer_id,
        expires_at_seconds=swarm.now,
    )
    async with Announcer(leader._transport, swarm.identities[0], record):
        lonely, _ = swarm.keeper(swarm.store("lonely"), period=0.01)
        assert (await lonely.start()).floor_reason == "there is no whitelist"
        await until(lambda: lonely.policy.version == 8)


@pytest.mark.asyncio
async def test_the_clock_ends_a_whitelist_and_then_a_root(swarm: Swarm) -> None:
    kept = swarm.store("host")
    kept.accept_whitelist(*signed())
    told: list[Policy] = []
    host, _ = swarm.keeper(kept, on_policy=told.append, period=0.01)
    assert (await host.start()).ends_seconds == WHITELIST.expires_seconds
    swarm.now = WHITELIST.expires_seconds
    await until(lambda: told)
    assert told[0].floor_reason == "the whitelist expired at 2027-02-13 08:00 UTC"
    assert told[0].writable == ()
    swarm.now = ROOT.expires_seconds
    await until(lambda: len(told) == 2)
    assert told[1].floor_reason.startswith("the root expired at ")


@pytest.mark.asyncio
async def test_time_is_up_to_the_moment_whatever_neighbours_do(swarm: Swarm) -> None:
    kept = swarm.store("host")
    kept.accept_whitelist(*signed())
    neighbour, place = swarm.keeper(swarm.store("neighbour"))
    await neighbour.start()
    told: list[Policy] = []
    host, _ = swarm.keeper(kept, place, on_policy=told.append)  # of 600 s between rounds
    ended = asyncio.Event()

    async def silent(stream: Stream) -> None:
        try:
            while True:
                await stream.receive(60)
        finally:
            ended.set()

    swarm.now = WHITELIST.expires_seconds - 0.05
    await host.start()
    await neighbour._transport.serve(TRUST_PROTOCOL, silent)
    swarm.now = WHITELIST.expires_seconds
    await until(lambda: told)
    assert not ended.is_set()


async def hanging(host: TrustKeeper, neighbour: TrustKeeper) -> asyncio.Event:
    """Have the neighbour answer nothing from now on, once the host waits for it.

    The event that is returned is set when the host gives up.
    """
    asked, ended = asyncio.Event(), asyncio.Event()

    async def silent(stream: Stream) -> None:
        try:
            await stream.receive(60)
            asked.set()
            await stream.receive(60)
        finally:
            ended.set()

    await neighbour._transport.serve(TRUST_PROTOCOL, silent)
    async with asyncio.timeout(20):
        await asked.wait()
    return ended


@pytest.mark.asyncio
async def test_time_is_up_to_the_moment_within_a_round(swarm: Swarm) -> None:
    """Failed with the time looked at between the rounds only."""
    kept = swarm.store("host")
    kept.accept_whitelist(*signed())
    neighbour, place = swarm.keeper(swarm.store("neighbour"))
    await neighbour.start()
    told: list[Policy] = []
    host, _ = swarm.keeper(kept, place, on_policy=told.append, period=0.01)
    swarm.now = WHITELIST.expires_seconds - 0.05
    await host.start()
    ended = await hanging(host, neighbour)
    swarm.now = WHITELIST.expires_seconds
    await until(lambda: told)
    assert not ended.is_set()
    assert "expired" in told[0].floor_reason


@pytest.mark.asyncio
async def test_news_within_a_round_count_at_once(swarm: Swarm) -> None:
    """Failed with the store looked at between the rounds only."""
    neighbour, place = swarm.keeper(swarm.store("neighbour"))
    await neighbour.start()
    told: list[Policy] = []
    host, host_place = swarm.keeper(swarm.store("host"), place, on_policy=told.append, period=0.01)
    await host.start()
    ended = await hanging(host, neighbour)
    ahead = swarm.store("ahead")
    ahead.accept_whitelist(*signed(8))
    leader, _ = swarm.keeper(ahead, host_place)
    await leader.start()
    await until(lambda: told)
    assert not ended.is_set()
    assert told[0].version == 8


@pytest.mark.asyncio
async def test_who_could_not_take_a_policy_is_told_again(swarm: Swarm) -> None:
    """Failed with the policy taken as told before it was."""
    kept = swarm.store("host")
    tries: list[Policy] = []

    def take(policy: Policy) -> None:
        tries.append(policy)
        if len(tries) < 3:
            raise RuntimeError("a bug")

    host, _ = swarm.keeper(kept, on_policy=take, period=0.01)
    await host.start()
    with capture_logs() as logs:
        kept.accept_whitelist(*signed())
        await until(lambda: host.policy.version == 7)
    assert [one.version for one in tries] == [7, 7, 7]
    assert [one["event"] for one in logs] == ["policy_not_applied"] * 2 + ["policy_changed"]


@pytest.mark.asyncio
async def test_rules_are_made_when_what_they_are_of_has_changed(
    swarm: Swarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Failed with the rules made in each round."""
    made: list[Policy] = []

    def counted(*args: Any) -> Policy:
        made.append(host_rules(*args))
        return made[-1]

    monkeypatch.setattr(trust_keeper, "host_rules", counted)
    kept = swarm.store("host")
    kept.accept_whitelist(*signed())
    refreshed = 0

    class Counting(TrustStore):
        def refresh(self) -> None:
            nonlocal refreshed
            refreshed += 1
            super().refresh()

    store = Counting(swarm.folder / "host", swarm=SWARM, root=FIRST, clock=lambda: swarm.now)
    host, _ = swarm.keeper(store, period=0.001)
    await host.start()
    await until(lambda: refreshed > 20)
    assert len(made) == 1
    swarm.now = WHITELIST.expires_seconds
    await until(lambda: len(made) == 2)
    swarm.now = NOW  # a clock that was set wrong for a while
    await until(lambda: len(made) == 3)
    assert made[2] == made[0]


@pytest.mark.asyncio
async def test_a_new_root_that_drops_the_whitelist_gives_nothing(swarm: Swarm) -> None:
    """Failed with the bare floor under a root whose keys signed no whitelist."""
    narrow = {"readable": ("model.norm",), "ops": {"mul": 1}}
    kept = swarm.store("host")
    kept.accept_whitelist(*signed(**narrow))  # by Cat and Dan
    told: list[Policy] = []
    host, _ = swarm.keeper(kept, on_policy=told.append, period=0.01)
    before = await host.start()
    kept.accept_roots([SECOND])
    await until(lambda: told)
    again, _ = swarm.keeper(swarm.store("host"))
    for here in (told[0], await again.start()):
        assert here.floor_reason == (
            "too few keys of root 2 signed whitelist 7, the last that was taken here"
        )
        assert here.ops == {"mul"}
        assert here.readable == ("model.norm",)
        assert here.writable == ()
        assert here.models == before.models == WHITELIST.models
        assert here.revoked_peers == WHITELIST.revoked_peers
        assert here.revoked_clients == WHITELIST.revoked_clients
        assert here.revoked_versions == WHITELIST.revoked_versions
        assert here.version == 0  # none is in force


@pytest.mark.asyncio
async def test_a_bootstrap_has_a_place_whoever_else_asks(
    swarm: Swarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trust_exchange, "MAX_STRANGERS", 0)
    kept = swarm.store("bootstrap")
    bootstrap, place = swarm.keeper(kept)
    stranger, _ = swarm.keeper(swarm.store("stranger"))
    host, host_place = swarm.keeper(swarm.store("host"), place)
    await host.start()
    kept.accept_whitelist(*signed())
    await exchange_trust(bootstrap._transport, host_place, kept)
    await until(lambda: host.policy.version == 7)
    with pytest.raises(StreamRefused, match="busy"):
        await exchange_trust(stranger._transport, host_place, swarm.store("stranger"))


@pytest.mark.asyncio
@pytest.mark.parametrize(("kind", "warnings"), [(StreamRefused, 1), (ShutOut, 0)])
async def test_who_is_shut_out_hears_it_elsewhere(
    swarm: Swarm,
    monkeypatch: pytest.MonkeyPatch,
    kind: type[StreamRefused],
    warnings: int,
) -> None:
    async def refuse(*args: object) -> None:
        raise kind("refused the stream: its reason")

    monkeypatch.setattr(trust_keeper, "exchange_trust", refuse)
    _, place = swarm.keeper(swarm.store("bootstrap"))
    host, _ = swarm.keeper(swarm.store("host"), place)
    with capture_logs() as logs:
        await host.start()
        await until(lambda: host._said)
    assert [one["event"] for one in logs].count("trust_exchange_failed") == warnings


@pytest.mark.asyncio
async def test_a_bootstrap_with_two_addresses_is_asked_once(swarm: Swarm) -> None:
    bootstrap, place = swarm.keeper(swarm.store("bootstrap"))
    await bootstrap.start()
    other = PeerAddress(place.peer_id, ("/ip4/127.0.0.1/tcp/9/p2p/" + place.peer_id,))
    host, _ = swarm.keeper(swarm.store("host"), place, other)
    with capture_logs() as logs:
        await host.start()
    assert logs == []


@pytest.mark.asyncio
async def test_a_store_that_is_damaged_does_not_stop_the_clock(swarm: Swarm) -> None:
    kept = swarm.store("host")
    kept.accept_whitelist(*signed())
    told: list[Policy] = []
    host, _ = swarm.keeper(kept, on_policy=told.append, period=0.01)
    await host.start()
    (swarm.folder / "host" / "trust").write_bytes(b"nonsense")
    swarm.now = WHITELIST.expires_seconds
    await until(lambda: told)
    assert "expired" in told[0].floor_reason


@pytest.mark.asyncio
async def test_what_another_process_of_this_machine_took_counts(swarm: Swarm) -> None:
    host, _ = swarm.keeper(swarm.store("shared"), period=0.01)
    assert (await host.start()).version == 0
    swarm.store("shared").accept_whitelist(*signed())
    await until(lambda: host.policy.version == 7)


@pytest.mark.asyncio
async def test_a_bootstrap_that_is_away_or_lies_leaves_what_is_kept(swarm: Swarm) -> None:
    liar = swarm.store("liar")
    liar.accept_whitelist(*signed(8))
    swarm.now = WHITELIST.expires_seconds  # what the liar has is out of date by the host's clock
    _, liars_place = swarm.keeper(liar)
    await swarm.keepers[0].start()
    gone = PeerAddress(Identity.generate().peer_id, ("/ip4/127.0.0.1/tcp/1",))
    host, _ = swarm.keeper(swarm.store("host"), gone, liars_place, period=0.01)
    with capture_logs() as logs:
        policy = await host.start()
        await until(lambda: host._said)
        for _ in range(50):  # some rounds: the same trouble is told once
            await asyncio.sleep(0.001)
    assert policy.floor_reason == "there is no whitelist"
    said = [one["error"] for one in logs if one["event"] == "trust_exchange_failed"]
    assert len(said) == 2
    assert any("can't be reached" in one for one in said)
    assert any("whitelist 8 expired at" in one for one in said)


# The host's own file ----------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_an_own_file_that_is_too_wide_is_warned_of_in_service_and_at_the_start(
    swarm: Swarm,
) -> None:
    """A supervisor starts a host again, whatever was taken out of the whitelist since."""
    own = HostRules.from_text('ops = ["add", "sort"]')
    kept = swarm.store("host")
    host, _ = swarm.keeper(kept, own=own, period=0.01)
    assert (await host.start()).ops == {"add"}  # of the floor
    with capture_logs() as logs:
        kept.accept_whitelist(*signed(ops={"add": 1}))
        await until(lambda: host.policy.version == 7)
    assert host.policy.ops == {"add"}
    await host.close()
    again, _ = swarm.keeper(kept, own=own)
    with capture_logs() as more:
        assert (await again.start()).ops == {"add"}
    for part in (logs, more):
        (said,) = [one["error"] for one in part if one["event"] == "own_policy_is_wider"]
        assert "allows the op 'sort', which whitelist 7 of swarm 'public' does not" in said


def test_rules_without_a_root_are_those_of_the_release() -> None:
    own = HostRules.from_text('deny_ops = ["add"]')
    assert host_rules(None, None, NOW) == Policy.of_release()
    assert host_rules(None, own, NOW) == Policy.of_release(own)


# Settings ---------------------------------------------------------------------------------------


def settings(tmp_path: Path, **changes: Any) -> Settings:
    root = tmp_path / "root.json"
    with contextlib.suppress(FileExistsError):
        with root.open("xb") as file:
            file.write(FIRST)
    return Settings(**{"swarm": SWARM, "root": root, **changes})


def test_each_root_and_swarm_has_a_folder_that_lasts(tmp_path: Path) -> None:
    def opened(**changes: Any) -> TrustStore:
        found = open_store(settings(tmp_path, **changes), data=tmp_path, clock=lambda: NOW)
        assert found is not None
        return found

    opened().accept_whitelist(*signed())
    assert opened().highest_version == 7
    # Two signers may complete root 1 each: its copies have one folder.
    (tmp_path / "root.json").write_bytes(root_document(signed_by=(ANN, CAT)))
    assert opened().highest_version == 7
    assert opened(swarm="other").highest_version == 0
    assert open_store(Settings(swarm=SWARM)) is None


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "can't be read: No such file or directory; check `root` in hive.toml"),
        (None, "if hive.toml was handed to you, copy the folder trust beside hive.toml too"),
        (b"x" * 16385, "has more than 16384 bytes; is it another file?"),
        (b"{}", "; get it from who runs the swarm"),
    ],
)
def test_a_root_that_is_none_is_named(tmp_path: Path, content: bytes | None, says: str) -> None:
    place = tmp_path / "mine.json"
    if content is not None:
        place.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        open_store(settings(tmp_path, root=place), data=tmp_path)
    assert str(caught.value).startswith(f"the root {place}")
    assert says in str(caught.value)


def test_a_store_that_can_not_be_believed_is_named(tmp_path: Path) -> None:
    wanted = settings(tmp_path)
    store = open_store(wanted, data=tmp_path, clock=lambda: NOW + DAY)
    assert store is not None
    store.accept_whitelist(*signed())
    (file,) = (tmp_path / "trust").glob("*/trust")
    file.write_bytes(b"nonsense")
    with pytest.raises(BadTrustStore, match="is damaged or of another release"):
        open_store(wanted, data=tmp_path)


def test_own_rules_come_from_the_file_that_is_configured(tmp_path: Path) -> None:
    place = tmp_path / "policy.toml"
    place.write_text('deny_ops = ["add"]')
    assert own_rules(settings(tmp_path, policy=place)) == HostRules(denied_ops=frozenset(["add"]))
    assert own_rules(settings(tmp_path)) is None
