"""Which models a connection takes, by the policy of its swarm."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from peer_records import record_of
from signers import NOW, TINY, WHITELIST

from glasshive.client.errors import NoRoute
from glasshive.client.swarm import Swarm
from glasshive.dht.loop_thread import LoopThread
from glasshive.dht.memory_transport import MemoryNetwork
from glasshive.security.errors import NotAllowed
from glasshive.security.keys import Identity
from glasshive.security.manifest import ModelId
from glasshive.security.policy import Policy

HOST = Identity.generate()
OLD = Policy.effective(replace(WHITELIST, models={}), NOW)
NEW = Policy.effective(replace(WHITELIST, version=8, revoked_peers=frozenset([HOST.peer_id])), NOW)


class Keeper:
    """A keeper whose second bootstrap peer answers with `late`, when that is waited for."""

    def __init__(self, late: Policy) -> None:
        self.policy = OLD
        self._late = late

    async def policy_for(self, model_id: ModelId, name: str) -> Policy:
        self.policy = self._late
        self.policy.check_model(model_id, name)
        return self.policy


@pytest.fixture
def loop() -> Iterator[LoopThread]:
    made = LoopThread()
    yield made
    made.close()


@pytest.mark.parametrize(
    ("late", "error", "says"),
    [
        (OLD, NotAllowed, "'tiny' .* is not allowed by whitelist 7"),
        # The model is allowed; what is said next shows which policy counts from there on.
        (NEW, NoRoute, "only by peers that are revoked by whitelist 8"),
    ],
    ids=["refused", "allowed"],
)
def test_a_model_is_looked_for_in_what_a_late_bootstrap_brings(
    loop: LoopThread,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    late: Policy,
    error: type[Exception],
    says: str,
) -> None:
    """The whitelist of the one that had answered counted, though it was behind."""
    identity = Identity.generate()
    transport = MemoryNetwork().transport(identity, dht=False)
    with Swarm(loop, transport, identity, [], tmp_path, Keeper(late)) as swarm:
        record = record_of(HOST, TINY, expires_at_seconds=NOW)
        monkeypatch.setattr(swarm, "records", lambda name: [record])
        with pytest.raises(error, match=says):
            swarm.model("tiny")
