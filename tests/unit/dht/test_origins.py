"""Where a peer comes from, by its address."""

from __future__ import annotations

import pytest

from glasshive.dht.addresses import origin_of


@pytest.mark.parametrize(
    ("address", "origin"),
    [
        ("/ip4/203.0.113.7/tcp/4001", "203.0.113.7"),
        ("/ip4/203.0.113.7/udp/4001/quic-v1/p2p/12D3KooWA", "203.0.113.7"),
        ("/ip6/2001:db8:1:2:3:4:5:6/tcp/4001", "2001:db8:1::/48"),
        ("/ip6/2001:db8:1:ffff::1/tcp/9", "2001:db8:1::/48"),  # the same household
        ("/ip6/::ffff:203.0.113.7/tcp/4001", "203.0.113.7"),
        ("/ip4/127.0.0.1/tcp/4001", ""),
        ("/ip6/::1/tcp/4001", ""),
        ("/ip6/::ffff:127.0.0.1/tcp/4001", ""),
        ("/dns4/example.org/tcp/4001", ""),
        ("/p2p-circuit", ""),
        ("/ip4/nonsense/tcp/1", ""),
        ("", ""),
    ],
)
def test_an_address_is_an_origin_or_none(address: str, origin: str) -> None:
    assert origin_of(address) == origin
