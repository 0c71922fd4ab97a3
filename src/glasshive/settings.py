"""Settings: flags win over environment variables, these over the file `hive.toml`.

    swarm = "public"                                     # bound into every signature
    bootstraps = ["/ip4/127.0.0.1/tcp/31330/p2p/12D3KooW..."]
    key = "client.key"                                   # a researcher's; relative to this file
    host_key = "host.key"                                # a host's
    root = "root.json"                                   # who may sign the swarm's whitelist
    issuers = ["12D3KooW..."]                            # who makes members: the swarm is private
    policy = "policy.toml"                               # what a host lends less of than that
    audit = true                                         # a host keeps an audit log
    memory = "8GiB"                                      # the most that traces take on a host
    listen = "/ip4/0.0.0.0/tcp/31331"                    # where a host listens; needs a root
    announce = ["/ip4/203.0.113.7/tcp/31331"]            # where others find it, behind a router

The file is the one that is given, else the one that GLASSHIVE_CONFIG names, else `hive.toml` in the
user's configuration folder. Each name is also an environment variable (GLASSHIVE_SWARM,
GLASSHIVE_BOOTSTRAPS with commas between the addresses, GLASSHIVE_KEY, GLASSHIVE_HOST_KEY,
GLASSHIVE_ROOT, GLASSHIVE_ISSUERS, GLASSHIVE_POLICY, GLASSHIVE_AUDIT, GLASSHIVE_MEMORY,
GLASSHIVE_LISTEN, GLASSHIVE_ANNOUNCE). A bootstrap peer doesn't take the last two: it listens where
`bootstraps` names it, unless its flags say otherwise.

The file's `announce` leads to the file's `listen`: who listens elsewhere, by a flag or variable,
isn't announced there.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Annotated, Any

import platformdirs
from pydantic import ByteSize, Field, ValidationError, field_validator
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from glasshive.graph.errors import GlasshiveError
from glasshive.security.envelope import PUBLIC_SWARM
from glasshive.security.errors import BadPeerId
from glasshive.security.keys import PeerId, public_key_of
from glasshive.security.whitelist import read_toml

CONFIG_VARIABLE = "GLASSHIVE_CONFIG"
DATA_VARIABLE = "GLASSHIVE_DATA"
MAX_CONFIG_BYTES = 1 << 20


_WANTED = {
    "swarm": 'the swarm\'s name in quotes, such as swarm = "lab"',
    "bootstraps": 'a list of addresses, such as ["/ip4/127.0.0.1/tcp/31330/p2p/12D3KooW..."]',
    "key": 'a path in quotes, such as "client.key"',
    "host_key": 'a path in quotes, such as "host.key"',
    "root": 'a path in quotes, such as "root.json"',
    "issuers": 'a list of peer ids, such as ["12D3KooW..."]',
    "policy": 'a path in quotes, such as "policy.toml"',
    "audit": "true or false, without quotes",
    "memory": 'a size of at least 64 MiB in quotes, such as "8GiB" (8 alone is 8 bytes)',
    "listen": 'an address of this machine in quotes, such as "/ip4/0.0.0.0/tcp/31331"',
    "announce": 'a list of addresses, such as ["/ip4/203.0.113.7/tcp/31331"]',
}


class ConfigError(GlasshiveError):
    """Settings that are missing or can't be used; the text says which and what to write."""


class Settings(BaseSettings):
    """How to reach a swarm, and as whom."""

    model_config = SettingsConfigDict(env_prefix="GLASSHIVE_", extra="forbid", frozen=True)

    swarm: str = PUBLIC_SWARM
    bootstraps: Annotated[tuple[str, ...], NoDecode] = ()
    key: Path | None = None
    host_key: Path | None = None
    root: Path | None = None
    issuers: Annotated[tuple[PeerId, ...], NoDecode] = ()
    policy: Path | None = None
    audit: bool | None = None
    # Less holds hardly a trace, and a host that refuses each is in everybody's way.
    memory: Annotated[ByteSize, Field(ge=64 << 20)] | None = None
    listen: str | None = None
    announce: Annotated[tuple[str, ...], NoDecode] = ()

    @field_validator("bootstraps", "issuers", "announce", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        if isinstance(value, str):
            return tuple(one.strip() for one in value.split(",") if one.strip())
        return value

    @field_validator("issuers", mode="after")
    @classmethod
    def _are_peers(cls, value: tuple[PeerId, ...]) -> tuple[PeerId, ...]:
        try:
            for one in value:
                public_key_of(one)
        except BadPeerId as error:
            raise ValueError(str(error)) from None
        return value

    @property
    def audited(self) -> bool:
        """Whether a host keeps an audit log: where `audit` says nothing, in private swarms."""
        return bool(self.issuers) if self.audit is None else self.audit

    @property
    def client_key_path(self) -> Path:
        """Where the client's key is kept."""
        return self.key or data_dir() / "client.key"

    @property
    def host_key_path(self) -> Path:
        """Where the host's key is kept."""
        return self.host_key or data_dir() / "host.key"


def load_settings(
    config: str | os.PathLike[str] | None = None, *, may_be_missing: bool = False, **flags: Any
) -> Settings:
    """The settings in force. Flags that are None or empty don't count.

    Raises ConfigError for a file that was named and is not there, unless it `may_be_missing`, and
    for anything in file, environment or flags that can't be used.
    """
    place = config_path(config)
    found: dict[str, Any] = {}
    if place.is_file():
        found = _read(place)
    elif not may_be_missing and (config is not None or os.environ.get(CONFIG_VARIABLE)):
        raise ConfigError(
            f"there is no config file {place}; write one with the lines "
            '`bootstraps = ["/ip4/.../tcp/.../p2p/12D3KooW..."]` and, for a swarm of your own, '
            '`swarm = "its name"`'
        )
    for name in ("key", "host_key", "root", "policy"):
        if isinstance(found.get(name), str):
            found[name] = place.parent / Path(found[name]).expanduser()

    class FromFile(Settings):
        """Settings whose last source is that file."""

        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return init_settings, env_settings, InitSettingsSource(settings_cls, found)

    wanted = {name: value for name, value in flags.items() if value not in (None, (), [])}
    _part_announce(found, place, wanted)
    try:
        return FromFile(**wanted)
    except ValidationError as error:
        raise ConfigError(_wrong(str(error.errors()[0]["loc"][0]), place, found)) from None


def _part_announce(found: dict[str, Any], place: Path, wanted: dict[str, Any]) -> None:
    """Takes `announce` out of what the file says if it isn't of the place where a host listens."""
    listen, announce = (
        wanted.get(name) or os.environ.get(f"GLASSHIVE_{name.upper()}")
        for name in ("listen", "announce")
    )
    if announce or not listen or "announce" not in found or listen == found.get("listen"):
        return
    if "listen" not in found:
        raise ConfigError(
            f"the setting announce in {place}: it goes with the setting listen of that file, which "
            f'has none; write listen = "{listen:.80}" beside it, or say --announce'
        )
    del found["announce"]


def _wrong(name: str, place: Path, found: dict[str, Any]) -> str:
    """What is wrong with a setting, and where it was found."""
    where = f"in {place}" if name in found else f"of GLASSHIVE_{name.upper()} or a flag"
    wanted = _WANTED.get(name)
    if wanted is not None:
        got = f", got {found[name]!r:.60}" if name in found else ""
        return f"the setting {name} {where}: wanted {wanted}{got}"
    known = ", ".join(_WANTED)
    near = difflib.get_close_matches(name, _WANTED, n=1)
    meant = f"; did you mean {near[0]}?" if near else ""
    return f"there is no setting {name!r:.60} (it is {where}); the settings are {known}{meant}"


def config_path(config: str | os.PathLike[str] | None = None) -> Path:
    """The file that settings are read from, whether or not it exists."""
    given = config or os.environ.get(CONFIG_VARIABLE)
    if given:
        return Path(given).expanduser()
    return platformdirs.user_config_path("glasshive", appauthor=False) / "hive.toml"


def data_dir() -> Path:
    """The folder of what must last: keys, known whitelists, which requests were taken."""
    given = os.environ.get(DATA_VARIABLE)
    if given:
        return Path(given).expanduser()
    return platformdirs.user_data_path("glasshive", appauthor=False)


def _read(place: Path) -> dict[str, Any]:
    try:
        if place.stat().st_size > MAX_CONFIG_BYTES:
            raise ConfigError(f"{place} is larger than {MAX_CONFIG_BYTES} bytes; is it a config?")
        text = place.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(place, error) from None
    return read_toml(text, lambda why: _unreadable(place, why))


def _unreadable(place: Path, why: object) -> ConfigError:
    return ConfigError(f"{place} can't be read: {why}; correct or remove it")
