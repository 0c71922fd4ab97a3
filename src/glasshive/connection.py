"""`glasshive.connect`: from a config file, or a bootstrap's address, to a `Swarm`."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from glasshive.settings import ConfigError, Settings, config_path, load_settings

if TYPE_CHECKING:
    from glasshive.client.swarm import Swarm

_START_SECONDS = 90.0
_KEEP_SECONDS = 30.0  # between two looks for a newer whitelist: clients are many
# What is meant as an address, well formed or not: a multiaddr, a URL, a host with a port.
_ADDRESS = re.compile(r"/(ip4|ip6|dns\w*)/|[a-z]+://|[\w.-]+:\d+$")


def connect(where: str | os.PathLike[str] | Sequence[str] | None = None) -> Swarm:
    """A connection to a swarm: a context manager, whose `model(name)` is traced.

    `where` is the path of a hive.toml; or the address of a bootstrap peer (or several), such as
    `/ip4/127.0.0.1/tcp/31330/p2p/12D3KooW...`; or nothing, for the default config. Nobody is asked
    for anything before the first call, but the bootstrap peers for the newest whitelist if the
    config names a root. The client's key is made at the first connection.

    Raises ConfigError, KeyFileError, BadTrustStore, and a TransportError if the network daemon
    can't be started.
    """
    return open_swarm(settings_of(where))


def settings_of(where: str | os.PathLike[str] | Sequence[str] | None) -> Settings:
    """The settings that `connect(where)` uses, with at least one bootstrap. Raises ConfigError."""
    if where is None:
        return with_bootstraps(load_settings(), None)
    if isinstance(where, str) and _ADDRESS.match(where) and not os.path.exists(where):
        where = (where,)
    if isinstance(where, str | os.PathLike):
        return with_bootstraps(load_settings(where), where)
    return with_bootstraps(load_settings(bootstraps=tuple(where)), None)


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


def open_swarm(settings: Settings) -> Swarm:
    """A connection with these settings. Raises what `connect` raises."""
    from glasshive.client.swarm import Swarm
    from glasshive.dht.hivemind_transport import HivemindTransport
    from glasshive.dht.loop_thread import LoopThread
    from glasshive.dht.transport import PeerAddress
    from glasshive.models import cache_dir
    from glasshive.security.keys import Identity
    from glasshive.swarm_trust import open_store
    from glasshive.trust_keeper import TrustKeeper

    store = open_store(settings)
    bootstraps = [PeerAddress.parse(address) for address in settings.bootstraps]
    identity = Identity.load_or_create(settings.client_key_path)
    loop = LoopThread("glasshive-client")

    async def start() -> tuple[HivemindTransport, TrustKeeper | None]:
        transport = await HivemindTransport.create(
            identity, listen=(), dht="none", swarm=settings.swarm
        )
        if store is None:
            return transport, None
        keeper = TrustKeeper(transport, store, bootstraps, period_seconds=_KEEP_SECONDS)
        try:
            await keeper.start()
        except BaseException:
            await transport.close()
            raise
        return transport, keeper

    try:
        transport, keeper = loop.run(start(), _START_SECONDS)
    except BaseException:
        loop.close()
        raise
    return Swarm(loop, transport, identity, bootstraps, cache_dir() / "files", keeper)
