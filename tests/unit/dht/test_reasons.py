"""What the network daemon says of a failed connection, in our words; and addresses as typed."""

from __future__ import annotations

import pytest

from glasshive.dht.errors import BadAddress
from glasshive.dht.reasons import why_unreachable
from glasshive.dht.transport import PeerAddress, check_address

ID = "12D3KooWK99VoVxNE7XzyBwXEzW7xhK7Gpv85r9F3V3fyKSUKPH5"
OTHER = "12D3KooWDWB1xsio8JwsQFho8Hv9tQxScRkLyJLbWW3PjLR2JBdv"
COPY = "copy the line that `glasshive bootstrap` printed"
DIALS = f"Connect failed. msg=failed to dial: failed to dial {ID}: "


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (
            f"{ID} can't be reached for glasshive/directory/1 ({DIALS}all dials failed * "
            "[/ip4/127.0.0.1/tcp/1] dial tcp4 127.0.0.1:1: connect: connection refused); tried "
            f"/ip4/127.0.0.1/tcp/1/p2p/{ID}; try another peer",
            "nothing listens there (connection refused)",
        ),
        (f"{DIALS}no good addresses", "its address leads nowhere (host name?)"),
        (
            f"{DIALS}all dials failed * [/ip4/127.0.0.1/tcp/31330] failed to negotiate security "
            f"protocol: peer id mismatch: expected {ID}, but remote key matches {OTHER}",
            f"another peer answers there, {OTHER}",
        ),
        (
            f"{DIALS}all dials failed * failed to negotiate security protocol: peer id mi...",
            "another peer answers there than the one of this id",
        ),
        (f"{DIALS}context deadline exceeded", "no answer in time"),
        (f"{DIALS}dial backoff", "it did not answer when it was asked some seconds ago"),
        (
            f"{DIALS}failed to negotiate security protocol: message did not have trailing newline",
            "what listens there is no peer of a swarm",
        ),
        ("  something\\n new ", "something\\n new"),
        ("x" * 500, "x" * 160 + "..."),
    ],
)
def test_what_the_daemon_says_in_few_words(said: str, words: str) -> None:
    assert why_unreachable(said) == words


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("localhost:31330", "/dns4/localhost/tcp/31330/p2p/12D3KooW..."),
        ("127.0.0.1:4001", "/ip4/127.0.0.1/tcp/4001/p2p/12D3KooW..."),
        ("hive.example.org", "/dns4/hive.example.org/tcp/31330/p2p/12D3KooW..."),
        ("https://hive.example.org/", "/dns4/hive.example.org/tcp/31330/p2p/12D3KooW..."),
        ("/ip4/127.0.0.1", "/ip4/192.0.2.7/tcp/31330/p2p/12D3KooW..."),
        ("ADDRESS", "/ip4/192.0.2.7/tcp/31330/p2p/12D3KooW..."),
    ],
)
def test_an_address_as_people_type_it_is_shown_as_a_multiaddr(typed: str, meant: str) -> None:
    with pytest.raises(BadAddress) as caught:
        PeerAddress.parse(typed)
    assert str(caught.value) == f"got {typed!r}, wanted a multiaddr such as {meant}; {COPY}"


def test_an_address_without_a_peer_id_says_where_there_is_one() -> None:
    with pytest.raises(BadAddress) as caught:
        PeerAddress.parse("/ip4/127.0.0.1/tcp/31330")
    assert str(caught.value) == (
        "got '/ip4/127.0.0.1/tcp/31330', wanted a multiaddr that ends in /p2p/ and a peer id; "
        f"{COPY}"
    )


def test_a_place_to_listen_at_is_shown_without_a_peer_id() -> None:
    with pytest.raises(BadAddress) as caught:
        check_address("/ip4/127.0.0.1")
    assert str(caught.value) == (
        "got '/ip4/127.0.0.1', wanted a multiaddr such as /ip4/192.0.2.7/tcp/31330"
    )


def test_ports_up_to_the_last_one() -> None:
    check_address(f"/ip4/127.0.0.1/tcp/65535/p2p/{ID}")
    with pytest.raises(BadAddress) as caught:
        check_address("/ip4/0.0.0.0/tcp/99999")
    assert str(caught.value) == (
        "got '/ip4/0.0.0.0/tcp/99999', whose port 99999 is out of range; ports go up to 65535"
    )
