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
        ("/dns4/localhost/tcp/1", [], "it has no address of this machine; use one"),
        ("/ip4/127.0.0.999/tcp/1", [], "it has no address of this machine; use one"),
        ("/ip6/127.0.0.1/tcp/1", [], "it has no address of this machine; use one"),
    ],
)
def test_what_leads_nowhere_is_refused(listen: str, announce: list[str], text: str) -> None:
    with pytest.raises(BadAddress, match=text.replace("(", r"\(")):
        check_places([listen], announce, whitelisted=True)


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
    assert list(dialable([*everywhere, *nowhere], own)) == dialled
    assert ("/ip6/::ffff:127.0.0.1/tcp/1" in dialable(["/ip6/::ffff:127.0.0.1/tcp/1"], own)) == (
        LOOPBACK in own
    )


def test_a_record_holds_addresses_and_no_names() -> None:
    check_announced(WAN)
    with pytest.raises(BadAddress, match=r"got /dns4/a\.org/tcp/1, wanted the IP address and port"):
        check_announced("/dns4/a.org/tcp/1")


def test_loopback_is_not_beyond_this_machine() -> None:
    assert [is_beyond(one) for one in (LOOPBACK, LAN, WAN)] == [False, True, True]
