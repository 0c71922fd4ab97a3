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
# What is meant as an address, well formed or not: a multiaddr, a URL, a host with a port.
_ADDRESS = re.compile(r"/(ip4|ip6|dns\w*)/|[a-z]+://|[\w.-]+:\d+$")


def connect(where: str | os.PathLike[str] | Sequence[str] | None = None) -> Swarm:
    """A connection to a swarm: a context manager, whose `model(name)` is traced.

    `where` is the path of a hive.toml; or the address of a bootstrap peer (or several), such as
    `/ip4/127.0.0.1/tcp/31330/p2p/12D3KooW...`; or nothing, for the default config. Nobody is asked
    for anything before the first call. The client's key is made at the first connection.

    Raises ConfigError, KeyFileError, and a TransportError if the network daemon can't be started.
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

    bootstraps = [PeerAddress.parse(address) for address in settings.bootstraps]
    identity = Identity.load_or_create(settings.client_key_path)
    loop = LoopThread("glasshive-client")
    try:
        transport = loop.run(
            HivemindTransport.create(identity, listen=(), dht="none", swarm=settings.swarm),
            _START_SECONDS,
        )
    except BaseException:
        loop.close()
        raise
    return Swarm(loop, transport, bootstraps, cache_dir() / "files")
