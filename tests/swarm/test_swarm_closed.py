"""A connection that was closed says so, at every call, and may be closed again."""

from __future__ import annotations

from pathlib import Path

import pytest

from glasshive.client.swarm import Swarm
from glasshive.dht.errors import TransportClosed
from glasshive.dht.loop_thread import LoopThread
from glasshive.dht.memory_transport import MemoryNetwork
from glasshive.dht.transport import PeerAddress
from glasshive.security.keys import Identity


def test_a_closed_swarm(tmp_path: Path) -> None:
    network = MemoryNetwork()
    peer = PeerAddress(Identity.generate().peer_id, ("/ip4/127.0.0.1/tcp/1",))
    identity = Identity.generate()
    client = network.transport(identity, dht=False)
    swarm = Swarm(LoopThread(), client, identity, [peer], tmp_path)
    assert repr(swarm) == f"<Swarm {client.swarm!r} through 1 bootstrap peer>"
    swarm.close()
    swarm.close()
    assert repr(swarm).endswith("peer, closed>")
    for call in (swarm.records, lambda: swarm.model("tiny")):
        with pytest.raises(
            TransportClosed, match=r"was closed; connect again with glasshive.connect"
        ):
            call()
