"""Where a peer listens, what it announces, and where it goes because another one's record says so.

Rules:

1. Only a peer that keeps to a signed whitelist listens or is announced where other machines reach
   it.
2. Records hold the addresses of single machines, and no names: what a name leads to is decided by
   whoever runs its zone, at the moment in which it is dialled.
3. A peer announces the addresses of the widest kind that it has: global, else private, else
   loopback.
4. A host that is sent to another one by a record dials the kinds that it announces itself, and in a
   public swarm global ones. Else a stranger's record could point a host on the internet at machines
   inside its own network, and a member's one the hosts of an institution at the internet.
5. What is no plain TCP or QUIC address of one machine is of no kind. Nor is IPv6 in which an IPv4
   address may hide, and to which a gateway would lead on.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Sequence
from typing import Final, Literal, TypeAlias

from glasshive.dht.errors import BadAddress, ListenRefused
from glasshive.dht.transport import check_address

__all__ = [
    "LOOPBACK",
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
LOOPBACK: Final = "/ip4/127.0.0.1/tcp/0"
_NOT_WHITELISTED: Final = (
    "other machines could reach this one, and no signed whitelist says what they may run here; "
    "name the swarm's hive.toml with --config (who runs the swarm has it, and `glasshive swarm "
    f"init` makes a swarm of your own), or listen at {LOOPBACK}, and let other machines in by "
    "`ssh -L PORT:127.0.0.1:PORT`"
)

Kind: TypeAlias = Literal["global", "private", "loopback"]
_KINDS: Final[tuple[Kind, ...]] = ("global", "private", "loopback")

_Host: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
_FORM: Final = re.compile(
    r"/(?:ip4|ip6)/[^/]+/(?:tcp/[0-9]+|udp/[0-9]+/quic(?:-v1)?)(?:/p2p/[0-9A-Za-z]+)?"
)
_GLOBAL_IPV6: Final = ipaddress.IPv6Network("2000::/3")
_PRIVATE_IPV6: Final = ipaddress.IPv6Network("fc00::/7")
_GATEWAYS_IPV6: Final = (
    ipaddress.IPv6Network("2001::/23"),  # Teredo, and other protocols' own
    ipaddress.IPv6Network("2002::/16"),  # 6to4
)


def check_places(listen: Sequence[str], announce: Sequence[str], *, whitelisted: bool) -> None:
    """Returns if a peer may listen and be announced there; raises BadAddress or ListenRefused.

    `whitelisted`: a signed whitelist bounds what others can run here. Without one only this
    machine's own programs may come.
    """
    for address in listen:
        check_address(address)
        host = _host(address) if _FORM.fullmatch(address) else None
        if host is None or not (host.is_unspecified or _kind_of(host)):
            raise ListenRefused(
                f"can't listen at {address}: wanted /ip4/ or /ip6/ with an address of this machine "
                "at which others find it, and /tcp/PORT or /udp/PORT/quic-v1 with nothing more; "
                f"use one such as {LOOPBACK}, and say with --announce where others find it"
            )
        if not (whitelisted or host.is_loopback):
            raise ListenRefused(f"can't listen at {address}: {_NOT_WHITELISTED}")
    for address in announce:
        check_announced(address)
        if "/p2p/" in address:
            raise BadAddress(
                f"got --announce {address}, wanted it without the peer's id: leave out /p2p/ and "
                "what follows"
            )
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
    """`listen` with the ports that were taken in place of 0. `visible` are what came of them.

    Raises ListenRefused if nothing came of one.
    """
    return tuple(one if _port(one) else _with_port(one, visible) for one in listen)


def _with_port(address: str, visible: Sequence[str]) -> str:
    wanted, [kind, written, protocol, _, *rest] = _host(address), address.split("/")[1:]
    for one in visible:
        host = _host(one)
        if host is None or wanted is None or one.split("/")[3] != protocol:
            continue
        if host == wanted or (wanted.is_unspecified and host.version == wanted.version):
            return "/".join(["", kind, written, protocol, str(_port(one)), *rest])
    raise ListenRefused(
        f"can't listen at {address}: of all addresses of this machine it came to "
        f"{', '.join(visible) or 'none'}; use one such as {LOOPBACK}, or name a port"
    )


def dialable(
    addresses: Iterable[str], own: Iterable[str], *, members_only: bool
) -> tuple[str, ...]:
    """Those addresses of another peer's record that a host with these `own` ones dials.

    `members_only`: in a private swarm, which contacts no public host if it has none.
    """
    kinds = set(map(_kind, own)) - {None}
    if not members_only:
        kinds.add("global")
    return tuple(one for one in addresses if _kind(one) in kinds)


def is_beyond(address: str) -> bool:
    """Whether other machines reach a peer at this address."""
    return _kind(address) != "loopback"


def origin_of(address: str) -> str:
    """Where a peer at this multiaddr comes from, as far as addresses cost something.

    That is its IPv4 address, or the /48 of its IPv6 address: a household or rented machine chooses
    from a /64 at least, many from a /56 or /48. Empty for this machine itself, where everybody
    comes from who uses a tunnel, and for what has no IP address.
    """
    host = _host(address)
    if host is None or host.is_loopback:
        return ""
    if isinstance(host, ipaddress.IPv6Address):
        return str(ipaddress.ip_network((host, 48), strict=False))
    return str(host)


def _host(address: str) -> _Host | None:
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
    """None where no single machine is, and for what no record may hold."""
    host = _host(address)
    if host is None or not _FORM.fullmatch(address) or not _port(address):
        return None
    return _kind_of(host)


def _kind_of(host: _Host) -> Kind | None:
    if host.is_loopback:
        return "loopback"
    if isinstance(host, ipaddress.IPv6Address):
        if host in _PRIVATE_IPV6:
            return "private"
        hidden = any(host in one for one in _GATEWAYS_IPV6)
        return "global" if host in _GLOBAL_IPV6 and not hidden else None
    if host.is_unspecified or host.is_multicast or host.is_link_local:
        return None
    return "global" if host.is_global else "private"
