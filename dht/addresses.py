"""Where a peer listens, what it announces, and where it goes because another one's record says so.

Rules:

1. Only a peer that keeps to a signed whitelist listens or is announced where other machines reach
   it.
2. Records hold the addresses of single machines, and no names: what a name leads to is decided by
   whoever runs its zone, at the moment in which it is dialled.
3. A peer announces the addresses of the widest kind that it has: global, else private, else
   loopback.
4. A host that is sent to another one by a record dials global addresses; private ones and loopback
   only if it announces such itself. Else a stranger's record could point a host on the internet
   at machines inside its own network.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from typing import Final, Literal, TypeAlias

from glasshive.dht.errors import BadAddress, ListenRefused
from glasshive.dht.transport import check_address

__all__ = [
    "MAX_ADDRESSES",
    "announced",
    "check_announced",
    "check_places",
    "dialable",
    "is_beyond",
    "listening_at",
    "origin_of",
]

MAX_ADDRESSES: Final = 4
_LOOPBACK: Final = "/ip4/127.0.0.1/tcp/0"
_NOT_WHITELISTED: Final = (
    "other machines could reach this one, and no signed whitelist says what they may run here; "
    "name the swarm's hive.toml with --config (who runs the swarm has it, and `glasshive swarm "
    f"init` makes a swarm of your own), or listen at {_LOOPBACK}, and let other machines in by "
    "`ssh -L PORT:127.0.0.1:PORT`"
)

Kind: TypeAlias = Literal["global", "private", "loopback"]
_KINDS: Final[tuple[Kind, ...]] = ("global", "private", "loopback")


def check_places(listen: Sequence[str], announce: Sequence[str], *, whitelisted: bool) -> None:
    """Returns if a peer may listen and be announced there; raises BadAddress or ListenRefused.

    `whitelisted`: a signed whitelist bounds what others can run here. Without one only this
    machine's own programs may come.
    """
    for address in listen:
        check_address(address)
        host = _host(address)
        if host is None:
            raise ListenRefused(
                f"can't listen at {address}: it has no address of this machine; use one, such as "
                f"{_LOOPBACK}, and say with --announce where others find it"
            )
        if not (whitelisted or host.is_loopback):
            raise ListenRefused(f"can't listen at {address}: {_NOT_WHITELISTED}")
    for address in announce:
        check_announced(address)
        if not whitelisted and is_beyond(address):
            raise ListenRefused(f"can't announce {address}: {_NOT_WHITELISTED}")
    if len(announce) > MAX_ADDRESSES:
        raise BadAddress(f"got {len(announce)} addresses to announce, at most {MAX_ADDRESSES}")
    if announce and not all(_port(one) for one in listen):
        raise BadAddress(
            f"got --announce with --listen {listen[0]}, wanted a port of its own to listen at: the "
            "announced one leads to it"
        )


def check_announced(address: str) -> None:
    """Returns for an address that a record may hold; raises BadAddress."""
    check_address(address)
    if _kind(address) is None:
        raise BadAddress(
            f"got {address}, wanted the IP address and port of one machine, under which others "
            "reach it, such as /ip4/203.0.113.7/tcp/31331"
        )


def announced(visible: Iterable[str]) -> tuple[str, ...]:
    """Those of a machine's own addresses that its records hold: of the widest kind, IPv4 first."""
    of_kind: dict[Kind, list[str]] = {one: [] for one in _KINDS}
    for address in visible:
        if (kind := _kind(address)) is not None:
            of_kind[kind].append(address)
    found = next((of_kind[one] for one in _KINDS if of_kind[one]), [])
    return tuple(sorted(found, key=lambda one: not one.startswith("/ip4/"))[:MAX_ADDRESSES])


def listening_at(listen: Sequence[str], visible: Sequence[str]) -> tuple[str, ...]:
    """`listen` with the ports that were taken in place of 0. `visible` are what came of them."""
    found = []
    for address in listen:
        kind, host, protocol, port, *rest = address.split("/")[1:]
        if port == "0":
            port = next(
                parts[3]
                for parts in (one.split("/")[1:] for one in visible)
                if (parts[0], parts[2]) == (kind, protocol)
                and (parts[1] == host or ipaddress.ip_address(host).is_unspecified)
            )
        found.append("/".join(["", kind, host, protocol, port, *rest]))
    return tuple(found)


def dialable(addresses: Iterable[str], own: Iterable[str]) -> tuple[str, ...]:
    """Those addresses of another peer's record that a host with these `own` ones dials."""
    kinds = {"global", *map(_kind, own)}
    return tuple(one for one in addresses if (kind := _kind(one)) is not None and kind in kinds)


def is_beyond(address: str) -> bool:
    """Whether other machines reach a peer at this address."""
    return _kind(address) != "loopback"


def origin_of(address: str) -> str:
    """Where a peer at this multiaddr comes from, as far as addresses cost something.

    That is its IPv4 address, or the /64 of its IPv6 address, of which a household or machine has
    one. Empty for this machine itself, where everybody comes from who uses a tunnel, and for what
    has no IP address.
    """
    host = _host(address)
    if host is None or host.is_loopback:
        return ""
    if isinstance(host, ipaddress.IPv6Address):
        return str(ipaddress.ip_network((host, 64), strict=False))
    return str(host)


def _host(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The IP address in a multiaddr; None for a name, or for numbers that are none."""
    try:
        _, kind, host, *_ = address.split("/")
        found = ipaddress.ip_address(host)
    except ValueError:
        return None
    if f"ip{found.version}" != kind:
        return None
    return getattr(found, "ipv4_mapped", None) or found  # it leads to the same place


def _port(address: str) -> int:
    return int(address.split("/")[4])


def _kind(address: str) -> Kind | None:
    """None where no single machine is."""
    host = _host(address)
    if host is None or host.is_unspecified or host.is_multicast or host.is_link_local:
        return None
    if not _port(address):
        return None
    if host.is_loopback:
        return "loopback"
    return "global" if host.is_global else "private"
