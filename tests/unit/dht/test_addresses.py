"""Where a peer listens, what it announces, and which addresses of others it dials."""

from __future__ import annotations

import pytest

from glasshive.dht.addresses import (
    announced,
    check_announced,
    check_places,
    dialable,
    is_beyond,
    listening_at,
)
from glasshive.dht.errors import BadAddress, ListenRefused

LOOPBACK, LAN, WAN = (f"/ip4/{host}/tcp/4001" for host in ("127.0.0.1", "10.1.2.3", "8.8.4.4"))
LOOPBACK6, LAN6, WAN6 = (f"/ip6/{host}/tcp/4001" for host in ("::1", "fd00::3", "2600::3"))
NO_PLACE = "wanted /ip4/ or /ip6/ with an address of this machine at which others find it, and"
ANYWHERE, ANYWHERE6 = "/ip4/0.0.0.0/tcp/4001", "/ip6/::/tcp/4001"


@pytest.mark.parametrize("address", [LOOPBACK, LOOPBACK6, "/ip4/127.8.8.8/tcp/0"])
def test_this_machine_may_always_come(address: str) -> None:
    check_places([address], [], whitelisted=False)


@pytest.mark.parametrize(
    "address", [LAN, WAN, ANYWHERE, LAN6, ANYWHERE6, "/ip6/::ffff:8.8.4.4/tcp/1"]
)
def test_other_machines_take_a_signed_whitelist(address: str) -> None:
    with pytest.raises(ListenRefused) as caught:
        check_places([address], [], whitelisted=False)
    assert str(caught.value) == (
        f"can't listen at {address}: other machines could reach this one, and no signed whitelist "
        "says what they may run here; name the swarm's hive.toml with --config (who runs the swarm "
        "has it, and `glasshive swarm init` makes a swarm of your own), or listen at "
        "/ip4/127.0.0.1/tcp/0, and let other machines in by `ssh -L PORT:127.0.0.1:PORT`"
    )
    check_places([address], [], whitelisted=True)


def test_nor_is_one_announced_without_it() -> None:
    with pytest.raises(ListenRefused, match=f"can't announce {WAN}: other machines could reach"):
        check_places([LOOPBACK], [WAN], whitelisted=False)
    check_places([LOOPBACK], ["/ip4/127.0.0.1/tcp/5"], whitelisted=False)
    check_places([ANYWHERE], [WAN, WAN6], whitelisted=True)


@pytest.mark.parametrize(
    ("listen", "announce", "text"),
    [
        (ANYWHERE, ["/dns4/host.example.org/tcp/1"], "wanted the IP address and port of one"),
        (ANYWHERE, [ANYWHERE], "wanted the IP address and port of one machine"),
        (ANYWHERE, ["/ip4/8.8.4.4/tcp/0"], "wanted the IP address and port of one machine"),
        (ANYWHERE, ["/ip4/224.0.0.1/tcp/1"], "wanted the IP address and port of one machine"),
        (ANYWHERE, ["/ip6/fe80::1/tcp/1"], "wanted the IP address and port of one machine"),
        (ANYWHERE, ["8.8.4.4:1"], "wanted a multiaddr such as /ip4/8.8.4.4/tcp/1"),
        (ANYWHERE, [WAN] * 5, "got 5 addresses to announce, at most 4"),
        ("/ip4/0.0.0.0/tcp/0", [WAN], "with --listen /ip4/0.0.0.0/tcp/0, wanted a port of its own"),
        (ANYWHERE, [WAN + "/p2p/12D3KooWA"], "wanted it without the peer's id: leave out /p2p/"),
        ("/dns4/localhost/tcp/1", [], NO_PLACE),
        ("/ip4/127.0.0.999/tcp/1", [], NO_PLACE),
        ("/ip6/127.0.0.1/tcp/1", [], NO_PLACE),
        # Of what it would come to, nothing may stand in a record.
        ("/ip4/169.254.1.1/tcp/5", [], NO_PLACE),
        ("/ip6/fe80::1/tcp/5", [], NO_PLACE),
        ("/ip4/224.0.0.1/tcp/0", [], NO_PLACE),
        ("/ip4/0.0.0.0/tcp/5/ws", [], NO_PLACE),
        ("/ip4/0.0.0.0/udp/5", [], NO_PLACE),
    ],
)
def test_what_leads_nowhere_is_refused(listen: str, announce: list[str], text: str) -> None:
    with pytest.raises(BadAddress, match=text.replace("(", r"\(")):
        check_places([listen], announce, whitelisted=True)


@pytest.mark.parametrize("end", ["tcp/1", "udp/1/quic", "udp/1/quic-v1", "tcp/1/p2p/12D3KooWA"])
def test_records_hold_plain_addresses(end: str) -> None:
    check_announced(f"/ip4/8.8.4.4/{end}")
    check_announced(f"/ip6/2600::3/{end}")


@pytest.mark.parametrize(
    "end",
    [
        "tcp/1/dns4/localhost/tcp/22",
        "tcp/1/p2p/12D3KooWA/p2p-circuit",
        "tcp/1/p2p/12D3KooWA/p2p/12D3KooWB",
        "tcp/1/p2p-circuit",
        "tcp/1/ws",
        "udp/1",
        "udp/1/quic/webtransport",
        "tcp/1/quic",
    ],
)
def test_nothing_hides_behind_an_address(end: str) -> None:
    address = f"/ip4/8.8.4.4/{end}"
    with pytest.raises(BadAddress, match="wanted the IP address and port of one machine"):
        check_announced(address)
    assert dialable([address], [WAN], members_only=False) == ()


@pytest.mark.parametrize(
    "host",
    [
        "64:ff9b::a00:5",  # NAT64 of 10.0.0.5
        "64:ff9b:1::a00:5",
        "2002:a00:5::1",  # 6to4 of it
        "2001:0:808:808::1",  # Teredo
        "::7f00:1",
        "::ffff:0:7f00:1",
        "fec0::1",
        "100::1",
        "4000::1",
        "ff02::1",
    ],
)
def test_ipv6_in_which_other_addresses_may_hide_leads_nowhere(host: str) -> None:
    address = f"/ip6/{host}/tcp/1"
    assert dialable([address], [LOOPBACK, LAN, WAN], members_only=False) == ()
    with pytest.raises(BadAddress, match="wanted the IP address and port of one machine"):
        check_announced(address)


def test_the_widest_kind_is_announced() -> None:
    link = "/ip6/fe80::1/tcp/4001"
    assert announced([LOOPBACK, LAN6, LAN, WAN6, WAN, link]) == (WAN, WAN6)
    assert announced([LOOPBACK, LAN6, LAN, link]) == (LAN, LAN6)
    assert announced([LOOPBACK6, LOOPBACK]) == (LOOPBACK, LOOPBACK6)
    assert announced([link]) == ()
    assert len(announced([f"/ip4/8.8.4.{i}/tcp/1" for i in range(1, 9)])) == 4


def test_a_port_that_was_taken_takes_the_place_of_0() -> None:
    visible = [LOOPBACK + "/p2p/x", "/ip6/::1/tcp/7/p2p/x", LAN + "/p2p/x"]
    assert listening_at(["/ip4/0.0.0.0/tcp/0"], visible) == (ANYWHERE,)
    assert listening_at(["/ip6/::/tcp/0", LAN], visible) == ("/ip6/::/tcp/7", LAN)
    assert listening_at(["/ip4/10.1.2.3/tcp/0"], visible) == (LAN,)
    assert listening_at([], []) == ()


@pytest.mark.parametrize(
    ("listen", "visible", "port"),
    [
        ("/ip6/0:0:0:0:0:0:0:1/tcp/0", "/ip6/::1/tcp/7/p2p/x", 7),
        ("/ip6/::ffff:127.0.0.1/tcp/0", "/ip4/127.0.0.1/tcp/8/p2p/x", 8),
        ("/ip6/FD00::3/tcp/0", "/ip6/fd00::3/tcp/9/p2p/x", 9),
        ("/ip4/10.1.2.3/udp/0/quic-v1", "/ip4/10.1.2.3/udp/5/quic-v1/p2p/x", 5),
    ],
)
def test_an_address_may_be_written_in_several_ways(listen: str, visible: str, port: int) -> None:
    others = ["/ip4/127.0.0.2/tcp/1/p2p/x", "/ip6/fd00::4/tcp/1/p2p/x"]
    (found,) = listening_at([listen], [*others, visible])
    before, given = listen.split("/"), found.split("/")
    assert given[4] == str(port)
    assert given[:4] + given[5:] == before[:4] + before[5:]


def test_what_came_to_nothing_is_refused() -> None:
    with pytest.raises(ListenRefused) as caught:
        listening_at(["/ip4/10.1.2.3/tcp/0"], [LOOPBACK, WAN6])
    assert str(caught.value) == (
        "can't listen at /ip4/10.1.2.3/tcp/0: of all addresses of this machine it came to "
        f"{LOOPBACK}, {WAN6}; use one such as /ip4/127.0.0.1/tcp/0, or name a port"
    )


@pytest.mark.parametrize(
    ("own", "dialled"),
    [
        ([WAN], [WAN, WAN6]),
        ([LAN], [LAN, WAN, LAN6, WAN6]),
        ([LOOPBACK], [LOOPBACK, WAN, LOOPBACK6, WAN6]),
        ([], [WAN, WAN6]),
    ],
)
def test_a_record_sends_nobody_into_networks_that_it_is_not_in(
    own: list[str], dialled: list[str]
) -> None:
    everywhere = [LOOPBACK, LAN, WAN, LOOPBACK6, LAN6, WAN6]
    nowhere = [ANYWHERE, ANYWHERE6, "/ip4/169.254.169.254/tcp/80", "/dns4/localhost/tcp/1"]
    assert list(dialable([*everywhere, *nowhere], own, members_only=False)) == dialled
    mapped = ["/ip6/::ffff:127.0.0.1/tcp/1"]
    assert bool(dialable(mapped, own, members_only=False)) == (LOOPBACK in own)


@pytest.mark.parametrize(
    ("own", "dialled"),
    [([WAN], [WAN, WAN6]), ([LAN], [LAN, LAN6]), ([LOOPBACK], [LOOPBACK, LOOPBACK6]), ([], [])],
)
def test_in_a_private_swarm_a_host_goes_where_it_is_itself(
    own: list[str], dialled: list[str]
) -> None:
    everywhere = [LOOPBACK, LAN, WAN, LOOPBACK6, LAN6, WAN6, "/ip6/64:ff9b::a00:5/tcp/1"]
    assert list(dialable(everywhere, own, members_only=True)) == dialled


def test_a_record_holds_addresses_and_no_names() -> None:
    check_announced(WAN)
    with pytest.raises(BadAddress, match=r"got /dns4/a\.org/tcp/1, wanted the IP address and port"):
        check_announced("/dns4/a.org/tcp/1")


def test_loopback_is_not_beyond_this_machine() -> None:
    assert [is_beyond(one) for one in (LOOPBACK, LAN, WAN)] == [False, True, True]
