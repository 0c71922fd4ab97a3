"""The end of a connection, also where it can't be an orderly one."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from glasshive.client import swarm as client_swarm
from glasshive.client.swarm import Swarm
from glasshive.dht.errors import DeadlineExceeded
from glasshive.dht.loop_thread import LoopThread
from glasshive.dht.memory_transport import MemoryNetwork
from glasshive.security.keys import Identity


def test_a_connection_that_does_not_end_in_time_leaves_no_thread(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It ran on into the end of the interpreter, as the next `close` had nothing to do."""
    monkeypatch.setattr(client_swarm, "_CLOSE_SECONDS", 0.02)
    identity, loop = Identity.generate(), LoopThread()

    async def never() -> None:
        await asyncio.Event().wait()

    transport = MemoryNetwork().transport(identity)
    swarm = Swarm(loop, transport, identity, [], tmp_path, end=never)
    with pytest.raises(DeadlineExceeded):
        swarm.close()
    assert not loop._thread.is_alive()
    swarm.close()
