"""What a peer's `Failed` becomes at the client: whom it blames, and text that is only text."""

from __future__ import annotations

from glasshive.client.errors import PeerBusy, PeerFailed, PeerLost
from glasshive.client.job import HopReport, _failure
from glasshive.dht.messages import Failed
from glasshive.dht.transport import PeerAddress
from glasshive.graph.graph import Graph
from glasshive.graph.plan import Part, Span
from glasshive.security.keys import Identity

ONE, TWO = (PeerAddress(Identity.generate().peer_id) for _ in range(2))
HOP = HopReport(ONE, Part(0, Span(0, 2), Graph({}), (), {}))


def test_a_lost_neighbour_is_the_one_to_avoid() -> None:
    said = Failed("NeighbourLost", -1, f"peer {TWO.peer_id} (part 1) was lost: gone")
    error = _failure(HOP, said, [ONE, TWO])
    assert isinstance(error, PeerLost)
    assert error.peer == TWO.peer_id


def test_a_busy_peer_is_avoided_itself() -> None:
    error = _failure(HOP, Failed("Busy", -1, "16 traces are running here"), [ONE, TWO])
    assert isinstance(error, PeerBusy)
    assert error.peer == ONE.peer_id


def test_a_peer_s_text_cannot_steer_the_terminal() -> None:
    error = _failure(HOP, Failed("\x1b[2J", 7, "\x1b]0;owned\x07 no"), [ONE, TWO])
    assert isinstance(error, PeerFailed)
    assert error.node == 7
    assert (error.code + str(error)).isprintable()
