"""What an experiment would take on a route, before anything is sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from glasshive.client.demand import forward_seconds
from glasshive.client.experiment import Experiment
from glasshive.client.route import Route
from glasshive.dht.records import PeerRecord
from glasshive.graph.graph import NodeId
from glasshive.graph.order import Passes
from glasshive.graph.plan import HIDDEN, TOKENS, Plan, Stage

__all__ = ["estimate_of", "stage_seconds"]

# No machine is thought to run the ops of a graph more slowly than this.
_FLOPS_PER_SECOND: Final = 1e9


def estimate_of(experiment: Experiment, plan: Plan, route: Route) -> Mapping[str, Any]:
    """What `Tracer.estimate` says: peers, passes, bytes, operations and seconds."""
    return {
        "route": [f"{one.start}:{one.end} {one.peer_id}" for one in route.records],
        "hops": len(plan.parts),
        "passes": len(plan.passes.passes),
        "rows": sum(one.batch for one in plan.passes.passes),
        "compute_seconds": _compute_seconds(plan, route),
        "expected_seconds": route.expected_seconds,
        "hop_bytes": sum(_edge_bytes(experiment, plan)),
        "saved_bytes": experiment.bill.saved_bytes,
        "peak_bytes": experiment.bill.peak_bytes,
        "flops": experiment.bill.flops,
        "sent_bytes": sum(tensor.nbytes for tensor in experiment.consts.values()),
    }


def _edge_bytes(experiment: Experiment, plan: Plan) -> list[int]:
    sizes = []
    for edge in plan.edges():
        one = plan.passes.passes[max(edge.pass_index, 0)]
        if edge.value == HIDDEN:
            sizes.append(experiment.outline.hidden_spec(one.batch, one.seq).nbytes)
        elif edge.value == TOKENS:
            sizes.append(8 * one.batch)
        else:
            sizes.append(experiment.specs[edge.value].nbytes)
    return sizes


def _compute_seconds(plan: Plan, route: Route) -> float:
    """The peers' time for the forward passes, at the speeds that they announce."""
    seconds = 0.0
    for part in plan.parts:
        passes = [plan.passes.passes[one.pass_index] for one in part.stages if one.forward]
        record = route.records[part.index]
        seconds += sum(forward_seconds(record, one.batch * one.seq) for one in passes)
    return seconds


def stage_seconds(
    hosts: Sequence[PeerRecord],
    passes: Passes,
    node_flops: Mapping[NodeId, int],
    part: int,
    stage: Stage,
) -> float:
    """About how long a stage takes at most, at the announced speed: its nodes, and its pass."""
    flops = sum(node_flops.get(one, 0) for one in stage.nodes)
    seconds = flops / _FLOPS_PER_SECOND
    if stage.forward:
        one = passes.passes[stage.pass_index]
        seconds += forward_seconds(hosts[part], one.batch * one.seq)
    return seconds
