"""The processes that a supervisor keeps running: a host with a span of a model, and a bootstrap."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NoReturn

import structlog

from glasshive.dht import hivemind_setup
from glasshive.dht.directory import serve_directory
from glasshive.dht.errors import DeadlineExceeded, PeerUnreachable, SwarmError
from glasshive.dht.hivemind_transport import HivemindTransport
from glasshive.dht.loop_thread import new_loop
from glasshive.dht.member_gate import MemberGate
from glasshive.dht.transport import PeerAddress
from glasshive.graph.errors import GlasshiveError
from glasshive.host_accounts import open_accounts
from glasshive.host_words import (
    say_alone,
    say_audit_log,
    say_memory,
    say_moved,
    say_policy,
    say_reach,
    say_ready,
    say_starting,
    say_whitelist,
    say_withdrawn,
)
from glasshive.joining import join
from glasshive.member_keeper import keep_member
from glasshive.models import ModelUnavailableError, find_model
from glasshive.new_member import renew_ended
from glasshive.peer.supervisor import BEAT_SECONDS, Reporter, stdin_ended, wait_for_turn
from glasshive.security.host_policy import HostRules
from glasshive.security.keys import Identity
from glasshive.security.manifest import Manifest
from glasshive.security.membership import Act
from glasshive.security.policy import Policy
from glasshive.security.trust_store import TrustStore
from glasshive.settings import Settings, data_dir
from glasshive.swarm_members import open_book, open_gate
from glasshive.swarm_trust import host_rules, open_store, own_rules
from glasshive.terminal import LogFormat, byte_bar, console, print_error
from glasshive.trust_keeper import TrustKeeper

if TYPE_CHECKING:
    import torch

    from glasshive.peer.blueprint import Blueprint
    from glasshive.peer.pace import HostPace
    from glasshive.peer.served_model import ServedModel
    from glasshive.peer.serving import Serving

log = structlog.get_logger(__name__)

# Torch gives Python's lock away in every op, and asks for it again. While the loop is busy with
# what comes in, it would wait 5 ms each time, which makes of a flood's few CPU seconds many.
SWITCH_SECONDS = 0.0002
_REFRESH_SECONDS = 10.0
_REBUILD_TRIES = 5


@dataclass(frozen=True, slots=True)
class Life:
    """What every supervised process needs."""

    settings: Settings
    key: Path
    listen: str
    log_format: LogFormat
    report_descriptor: int
    announce: tuple[str, ...] = ()  # where others find it, if not at its own addresses
    key_in_use: str | None = None  # another process's, in whose place `key` was taken
    config: Path | None = None  # where a bootstrap peer's settings were read


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """What a host serves. `blocks` None: the whole model; dtype and device may be "auto"."""

    model: str
    blocks: tuple[int, int] | None
    dtype: str
    device: str
    attention: Literal["eager", "sdpa", "flash"]
    name: str | None


@dataclass(frozen=True, slots=True)
class Inherited:
    """What a host that takes another's place has before it begins, as far as it could be had."""

    listen: str
    blueprint: Blueprint | None
    pace: HostPace | None


def run_host(life: Life, options: ServeOptions, inherited: Inherited | None = None) -> NoReturn:
    """Be a host until told to stop, and end the process: 0 after a clean stop, 1 after an error."""
    sys.setswitchinterval(SWITCH_SECONDS)
    _run(life, lambda process: _host(process, options, inherited))


def stand_by(options: ServeOptions) -> Inherited:
    """As a spare process: do what takes seconds and needs no weights, and wait for the turn.

    Ends the process if its supervisor has gone.
    """
    importlib.import_module("glasshive.peer.serving")
    from glasshive.peer.blueprint import Blueprint
    from glasshive.peer.pace import HostPace

    hivemind_setup.prepare()
    blueprint = None
    # What is wrong with the model is told when it is this process' turn.
    with contextlib.suppress(GlasshiveError, ModelUnavailableError), _thread_that_ends() as thread:
        folder, dtype = find_model(options.model), _number_format(options)
        blueprint = thread.submit(Blueprint.of, folder, dtype, options.attention).result()
    turn = wait_for_turn()
    if turn is None:
        sys.exit(0)
    return Inherited(turn.address, blueprint, HostPace.from_json(turn.pace) if turn.pace else None)


def _thread_that_ends() -> ThreadPoolExecutor:
    """For work with torch before there is a torch thread.

    The OpenMP threads of a second one that lives keep those of the torch thread from spinning
    between kernels, for a tenth of the time of a pass.
    """
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="load")


def run_bootstrap(life: Life) -> NoReturn:
    """Be a bootstrap peer until told to stop, and end the process, as `run_host` does."""
    _run(life, _bootstrap)


class _Process:
    """This process: its beats, the wish that it stop, its transport."""

    def __init__(self, life: Life) -> None:
        self.life = life
        self.reporter = Reporter(life.report_descriptor)
        self.stop = asyncio.Event()
        self.overdue_seconds: Callable[[], float] = lambda: 0.0
        self.gate: MemberGate | None = None  # of the transport, if the swarm is private

    async def beat(self) -> None:
        while True:
            self.reporter.beat(self.overdue_seconds())
            await asyncio.sleep(BEAT_SECONDS)

    @contextlib.asynccontextmanager
    async def transport(self, *, may_be_alone: bool = False) -> AsyncIterator[HivemindTransport]:
        """The transport, once a bootstrap peer has answered, as a member if the swarm is private.

        Raises BadAddress and NotAMember at once.
        One that `may_be_alone` doesn't wait: two bootstraps that list each other would for ever,
        and the one that starts later joins the earlier.
        """
        life = self.life
        identity = Identity.load_or_create(life.key)
        book = open_book(life.settings, life.key, identity)
        await renew_ended(life.settings, identity)
        self.gate = gate = open_gate(life.settings, identity, Act.SERVE, life.key)
        own = f"/p2p/{identity.peer_id}"  # a config that all peers of a swarm share may list it
        others = [one for one in life.settings.bootstraps if not one.endswith(own)]

        def create(bootstraps: Sequence[str] = others) -> Awaitable[HivemindTransport]:
            return HivemindTransport.create(
                identity,
                listen=[life.listen],
                announce=life.announce,
                whitelisted=life.settings.root is not None,
                bootstraps=bootstraps,
                swarm=life.settings.swarm,
                gate=gate,
            )

        peers = [PeerAddress.parse(one) for one in others]
        if may_be_alone and peers:
            try:
                transport = await create()
            except (PeerUnreachable, DeadlineExceeded):
                log.warning("starting_alone", unreachable=others)
                transport = await create(())
        else:
            transport = await join(create, peers, self._say_waiting)
        try:
            async with keep_member(life.settings, transport, gate, identity, book):
                yield transport
        finally:
            await transport.close()

    def keeper(
        self, transport: HivemindTransport, store: TrustStore, own: HostRules | None = None
    ) -> TrustKeeper:
        """What will keep `store` current, with the bootstrap peers as neighbours."""
        bootstraps = [PeerAddress.parse(one) for one in self.life.settings.bootstraps]
        return TrustKeeper(transport, store, bootstraps, own=own)

    def say_key(self) -> None:
        """Whose peer this process is, if that is not what one would expect."""
        life = self.life
        if life.key_in_use is None:
            return
        if life.log_format == "json":
            log.info("key_in_use", in_use=life.key_in_use, key=str(life.key))
        else:
            console.print(
                f"{life.key_in_use} is in use; this process is the peer of {life.key}",
                markup=False,
            )

    def _say_waiting(self, why: str, seconds: float) -> None:
        if self.life.log_format == "json":
            log.warning("waiting_for_bootstrap", why=why, again_in_seconds=seconds)
        else:
            console.print(
                f"no bootstrap peer answers: {why}; next try in {seconds:g} s (Ctrl-C stops)",
                markup=False,
            )

    async def serve(
        self,
        transport: HivemindTransport,
        refresh: Callable[[bool], None] = lambda lost: None,
        pace: HostPace | None = None,
    ) -> None:
        """Until told to stop, with a new network daemon whenever the old one has died."""
        self.reporter.ready(transport.listening[0], pace.to_json() if pace else "")
        while True:
            events = [asyncio.create_task(event.wait()) for event in (self.stop, transport.lost)]
            try:
                await asyncio.wait(
                    events, timeout=_REFRESH_SECONDS, return_when=asyncio.FIRST_COMPLETED
                )
            finally:
                for task in events:
                    task.cancel()
            if self.stop.is_set():
                return
            lost = transport.lost.is_set()
            if lost:
                await self._rebuild(transport)
            refresh(lost)

    async def _rebuild(self, transport: HivemindTransport) -> None:
        log.warning("network_daemon_lost")
        for attempt in range(_REBUILD_TRIES):
            try:
                await transport.rebuild()
            except SwarmError as error:
                log.warning("network_daemon_rebuild_failed", error=str(error))
                if attempt + 1 == _REBUILD_TRIES:
                    raise
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(2.0**attempt):
                        await self.stop.wait()
                    return
            else:
                log.info("network_daemon_rebuilt", addresses=transport.addresses)
                return


def _run(life: Life, work: Callable[[_Process], Awaitable[None]]) -> NoReturn:
    code = 0
    try:
        with asyncio.Runner(loop_factory=new_loop) as runner:
            runner.run(_until_stopped(life, work))
    except (GlasshiveError, ModelUnavailableError) as error:
        code = 1
        if life.log_format == "json":
            log.error("failed", error=str(error), kind=type(error).__name__)
        else:
            print_error(error)
    sys.stdout.flush()
    sys.stderr.flush()
    # A plain exit would wait for threads, and a kernel that runs can't be interrupted.
    os._exit(code)


async def _until_stopped(life: Life, work: Callable[[_Process], Awaitable[None]]) -> None:
    process = _Process(life)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, process.stop.set)
    working = asyncio.ensure_future(work(process))
    stop = asyncio.create_task(process.stop.wait())
    beat = asyncio.create_task(process.beat())
    orphaned = asyncio.create_task(stdin_ended())
    orphaned.add_done_callback(lambda _: process.stop.set())
    try:
        await asyncio.wait({working, stop}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done() and not process.reporter.is_ready:
            working.cancel()  # it still starts, and has nothing to withdraw
        with contextlib.suppress(asyncio.CancelledError):
            await working
    finally:
        for task in (beat, orphaned, stop):
            task.cancel()


async def _bootstrap(process: _Process) -> None:
    store = open_store(process.life.settings)
    process.say_key()
    async with contextlib.AsyncExitStack() as ends:
        transport = await ends.enter_async_context(process.transport(may_be_alone=True))
        await serve_directory(transport)
        if store is not None:
            await ends.enter_async_context(process.keeper(transport, store))
            say_whitelist(process.life, store)
        say_reach(process.life, transport)
        say_moved(process.life, transport)
        address = transport.addresses[0]
        if process.life.log_format == "json":
            log.info("ready", address=address, swarm=transport.swarm)
        else:
            if process.life.settings.issuers:
                how = (
                    "--config hive.toml\nonce they have an invite (`glasshive invite`) and joined."
                )
            elif store is None:
                how = "--bootstrap ADDRESS\nwhere ADDRESS is the line below."
            else:
                # With the address alone a host would have no root, and be of the public swarm.
                how = (
                    "--config hive.toml\nwhere hive.toml is this swarm's: it names the root and "
                    "the address below."
                )
            console.print(
                f"bootstrap peer of the swarm [bold]{transport.swarm}[/]; others join with\n"
                f"  glasshive serve MODEL {how} Ctrl-C stops it."
            )
            print(address, flush=True)
        await process.serve(transport)
        log.info("stopped")


async def _host(
    process: _Process, options: ServeOptions, inherited: Inherited | None = None
) -> None:
    settings = process.life.settings
    say_starting(process.life, options, has_libraries=inherited is not None)
    # Before anybody is waited for.
    _check(options)
    store, own = open_store(settings), own_rules(settings)
    process.say_key()
    say_alone(process.life)
    async with contextlib.AsyncExitStack() as last, contextlib.AsyncExitStack() as ends:
        transport = await ends.enter_async_context(process.transport())
        identity = Identity.load_or_create(process.life.key)
        accounts = open_accounts(settings, identity, process.gate)
        # When the transport has ended every trace.
        last.push_async_callback(asyncio.to_thread, accounts.close)
        keeper = None
        if store is not None:
            keeper = process.keeper(transport, store, own)
            await keeper.start()
            ends.push_async_callback(keeper.close)

        async def policy_for(manifest: Manifest) -> Policy:
            model_id = manifest.model_id
            if keeper is not None:
                return await keeper.policy_for(model_id, manifest.name)
            policy = host_rules(None, own, time.time())
            policy.check_model(model_id, manifest.name)
            return policy

        show = process.life.log_format == "pretty"
        thread = _thread_that_ends()
        in_thread = partial(asyncio.get_running_loop().run_in_executor, thread)
        try:
            folder, manifest = await in_thread(_hash, options, show)
            await policy_for(manifest)
            served = await in_thread(_load, options, folder, manifest, show, inherited)
        finally:
            thread.shutdown(wait=False)
        from glasshive.peer.host_limits import HostLimits
        from glasshive.peer.seen_requests import SeenRequests
        from glasshive.peer.serving import Serving

        seen = SeenRequests(data_dir() / "seen" / identity.peer_id, now=transport.now())
        policy = await policy_for(served.manifest)  # a newer one since may be without this model
        serving = Serving(
            *(transport, identity, served),
            limits=HostLimits(memory_bytes=settings.memory),
            policy=policy,
            seen=seen,
            accounts=accounts,
        )
        if keeper is not None:
            keeper.on_policy = lambda new: _apply(process, serving, new)
        say_policy(process.life, serving.host.policy)
        say_audit_log(process.life, accounts)
        say_memory(process.life, serving.host.memory_bytes)
        process.overdue_seconds = lambda: serving.host.overdue_seconds
        try:
            say_reach(process.life, transport)
            await serving.start()
            say_ready(process.life, serving)
            await process.serve(
                transport, lambda lost: serving.refresh(again=lost), pace=served.pace
            )
        finally:
            await serving.close()
            log.info("stopped")


def _check(options: ServeOptions) -> None:
    """Raises NoSuchDevice, ModelNotFoundError or BadSpan for what can't be served."""
    from glasshive.manifest_cache import model_name
    from glasshive.peer.checkpoint import Checkpoint
    from glasshive.peer.device import find_device
    from glasshive.peer.span_model import check_span

    find_device(options.device)
    folder = find_model(options.model)
    if options.blocks:
        name = options.name or model_name(options.model, folder)
        check_span(*options.blocks, Checkpoint(folder).n_blocks, name)


def _number_format(options: ServeOptions) -> torch.dtype:
    from glasshive.graph.dtypes import DType
    from glasshive.graph.kernels import to_torch_dtype
    from glasshive.peer.device import find_device

    if options.dtype != "auto":
        return to_torch_dtype(DType.from_name(options.dtype))
    on_gpu = find_device(options.device).type == "cuda"
    return to_torch_dtype(DType.BFLOAT16 if on_gpu else DType.FLOAT32)


def _hash(options: ServeOptions, show: bool) -> tuple[Path, Manifest]:
    from glasshive.manifest_cache import known_manifest, model_name

    folder = find_model(options.model)
    name = options.name or model_name(options.model, folder)
    with byte_bar(f"hashing {name}", show=show) as on_hashing:
        return folder, known_manifest(folder, name, on_hashing)


def _load(
    options: ServeOptions,
    folder: Path,
    manifest: Manifest,
    show: bool,
    inherited: Inherited | None,
) -> ServedModel:
    from glasshive.graph.plan import Span
    from glasshive.peer.served_model import load_served_model

    with byte_bar(f"loading {manifest.name}", show=show) as on_loading:
        return load_served_model(
            folder,
            manifest.name,
            Span(*options.blocks) if options.blocks else None,
            dtype=_number_format(options),
            device=options.device,
            attention=options.attention,
            manifest=manifest,
            blueprint=inherited.blueprint if inherited else None,
            pace=inherited.pace if inherited else None,
            on_loading=on_loading,
        )


def _apply(process: _Process, serving: Serving, policy: Policy) -> None:
    """Have the host keep to a policy that came while it runs, and say so."""
    was_withdrawn = serving.record.withdrawn
    serving.apply(policy)
    say_policy(process.life, serving.host.policy)
    if serving.record.withdrawn != was_withdrawn:
        say_withdrawn(process.life, serving.record, policy)
