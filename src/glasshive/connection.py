"""`glasshive.connect`: from a config file, or a bootstrap's address, to a `Swarm`."""

from __future__ import annotations

import atexit
import os
import re
import weakref
from collections.abc import Sequence
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from glasshive.client.status_text import waiting_for
from glasshive.security.envelope import PUBLIC_SWARM
from glasshive.security.membership import Act
from glasshive.settings import ConfigError, Settings, config_path, data_dir, load_settings

if TYPE_CHECKING:
    from glasshive.client.swarm import Swarm

_START_SECONDS = 90.0
_KEEP_SECONDS = 30.0  # between two looks for a newer whitelist: clients are many
_MEMBER_SECONDS = 10.0  # and for who was thrown out, which is one short question
_open_swarms: weakref.WeakSet[Swarm] = weakref.WeakSet()
# What is meant as an address, well formed or not: a multiaddr, a URL, a host with a port.
_ADDRESS = re.compile(r"/(ip4|ip6|dns\w*)/|[a-z]+://|[\w.-]+:\d+$")


def connect(where: str | os.PathLike[str] | Sequence[str] | None = None) -> Swarm:
    """A connection to a swarm: a context manager, whose `model(name)` is traced.

    `where` is the path of a hive.toml; or the address of a bootstrap peer (or several), such as
    `/ip4/127.0.0.1/tcp/31330/p2p/12D3KooW...`; or nothing, for the default config. Nobody is asked
    for anything before the first call, but the bootstrap peers for the newest whitelist if the
    config names a root. The client's key is made at the first connection. Who doesn't close it has
    it closed when Python ends.

    Raises ConfigError, KeyFileError, BadTrustStore, NotAMember of a private swarm without having
    joined it, and a TransportError if the network daemon can't be started.
    """
    config, bootstraps = config_and_bootstraps(where)
    settings = with_bootstraps(load_settings(config, bootstraps=bootstraps), config)
    return open_swarm(settings, config)


def config_and_bootstraps(
    where: str | os.PathLike[str] | Sequence[str] | None,
) -> tuple[str | os.PathLike[str] | None, tuple[str, ...]]:
    """Which config file, and which addresses, the argument of `connect` names."""
    if where is None:
        return None, ()
    if isinstance(where, str) and _ADDRESS.match(where) and not os.path.exists(where):
        return None, (where,)
    if isinstance(where, str | os.PathLike):
        return where, ()
    return None, tuple(where)


def swarm_arguments(settings: Settings, config: str | os.PathLike[str] | None) -> tuple[str, ...]:
    """The arguments with which a command of this user comes to the swarm of these settings.

    `config` is the file that was named, if one was. With the address alone it would be of the
    public swarm: whoever needs more gets the config file's path.
    """
    place = config_path(config)
    found = ["--config", str(place.absolute())] if _needs_config(settings, place) else []
    return (*found, *_by_address(settings))


def host_arguments(settings: Settings, config: str | os.PathLike[str] | None) -> tuple[str, ...]:
    """The arguments with which `glasshive serve` comes to the same swarm, on any machine.

    A host has a hive.toml of its own wherever the address alone is not enough.
    """
    if _needs_config(settings, config_path(config)):
        return ("--config", "hive.toml")
    return _by_address(settings)


def _needs_config(settings: Settings, place: Path) -> bool:
    return (settings.root is not None or settings.swarm != PUBLIC_SWARM) and place.is_file()


def _by_address(settings: Settings) -> tuple[str, ...]:
    return tuple(part for one in settings.bootstraps for part in ("--bootstrap", one))


def with_bootstraps(settings: Settings, config: str | os.PathLike[str] | None) -> Settings:
    """The same settings, read from `config`, if they name a bootstrap. Raises ConfigError."""
    if not settings.bootstraps:
        raise ConfigError(
            "no bootstrap peer is known, so no swarm can be found; give its address, or write it "
            f"into {config_path(config)}: "
            'bootstraps = ["/ip4/127.0.0.1/tcp/31330/p2p/12D3KooW..."] '
            "(`glasshive bootstrap` and `glasshive serve` print theirs)"
        )
    return settings


@waiting_for("connecting to the swarm")
def open_swarm(
    settings: Settings, config: str | os.PathLike[str] | None, act: Act = Act.TRACE
) -> Swarm:
    """A connection with these settings, read from `config`, for who comes to do `act`.

    Raises what `connect` raises.
    """
    from glasshive.client.swarm import Swarm, Where
    from glasshive.dht.hivemind_transport import HivemindTransport
    from glasshive.dht.loop_thread import LoopThread
    from glasshive.dht.transport import PeerAddress
    from glasshive.member_keeper import keep_member
    from glasshive.models import cache_dir
    from glasshive.new_member import renew_ended
    from glasshive.privacy_notice import tell_once
    from glasshive.security.keys import Identity
    from glasshive.swarm_members import open_gate
    from glasshive.swarm_trust import open_store
    from glasshive.trust_keeper import TrustKeeper

    if not settings.issuers:
        tell_once(settings.swarm, data_dir())
    store = open_store(settings)
    bootstraps = [PeerAddress.parse(address) for address in settings.bootstraps]
    identity = Identity.load_or_create(settings.client_key_path)
    loop = LoopThread("glasshive-client")

    async def start() -> tuple[HivemindTransport, TrustKeeper | None, AsyncExitStack]:
        await renew_ended(settings, identity)
        gate = open_gate(settings, identity, act, settings.client_key_path)
        async with AsyncExitStack() as ends:
            transport = await HivemindTransport.create(
                identity, listen=(), dht="none", swarm=settings.swarm, gate=gate
            )
            ends.push_async_callback(transport.close)
            await ends.enter_async_context(
                # What a client asks for next is refused as well, and that error says it.
                keep_member(
                    *(settings, transport, gate, identity),
                    period_seconds=_MEMBER_SECONDS,
                    warn_shut_out=False,
                )
            )
            keeper = None
            if store is not None:
                keeper = TrustKeeper(transport, store, bootstraps, period_seconds=_KEEP_SECONDS)
                await ends.enter_async_context(keeper)
            return transport, keeper, ends.pop_all()

    try:
        transport, keeper, ends = loop.run(start(), _START_SECONDS)
    except BaseException:
        loop.close()
        raise
    where = Where(swarm_arguments(settings, config), host_arguments(settings, config))
    files = cache_dir() / "files"
    swarm = Swarm(loop, transport, identity, bootstraps, files, keeper, where, ends.aclose)
    _open_swarms.add(swarm)
    atexit.unregister(_close_all)
    atexit.register(_close_all)  # the last to come is the first to run: its imports are still whole
    return swarm


def _close_all() -> None:
    """Have peers hear of the end at once; and a loop that still runs then may crash Python."""
    with ExitStack() as ends:  # each one, whatever the others raise
        for swarm in _open_swarms:
            ends.callback(swarm.close)


# A forked child has the loops of its parent's connections, but not the threads that run them.
os.register_at_fork(after_in_child=_open_swarms.clear)
