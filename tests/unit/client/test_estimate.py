"""How long a stage is thought to take, by which a peer that hangs is found."""

from __future__ import annotations

import pytest
from peer_records import record_of

from glasshive.client.demand import forward_seconds
from glasshive.client.estimate import stage_seconds
from glasshive.client.step_watch import STEP_LIMITS
from glasshive.dht.records import ModelId
from glasshive.graph.graph import NodeId
from glasshive.graph.order import Pass, Passes
from glasshive.graph.plan import Stage
from glasshive.security.keys import Identity

HOSTS = [
    record_of(Identity.generate(), ModelId("ab" * 32), expires_at_seconds=60.0) for _ in range(2)
]
STEPS = 64
PASSES = Passes(tuple(Pass((0,), 3, False, ((0, 2),)) for _ in range(STEPS)))


def test_a_stage_takes_what_its_own_nodes_and_its_pass_take() -> None:
    """Seen to take what the nodes of all steps do: a hung stage was found after 150 s, not 15."""
    node_flops = {NodeId(i): 10**9 for i in range(STEPS)}
    nodes = NodeId(7), NodeId(STEPS)  # and one that takes nothing
    seconds = stage_seconds(HOSTS, PASSES, node_flops, 1, Stage(7, nodes))
    assert seconds == pytest.approx(1.0)
    assert STEP_LIMITS.factor * seconds < STEP_LIMITS.least_seconds
    forward = stage_seconds(HOSTS, PASSES, node_flops, 1, Stage(7, nodes, forward=True))
    assert forward == pytest.approx(1.0 + forward_seconds(HOSTS[1], 6))
