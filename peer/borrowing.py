"""Which reads of the model's memory need no copy of their own.

A read need not be copied if all that uses it runs at the same event, before the model goes on: a
slice of the logits then costs a slice. What is left of it afterwards is copied.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from glasshive.graph.graph import Node, NodeId, Op, Read, Write, refs
from glasshive.graph.ops import OPS


def borrowing(
    nodes: Mapping[NodeId, Node],
    bucket: Sequence[NodeId],
    users: Mapping[NodeId, set[NodeId]],
    kept: Collection[NodeId],
) -> tuple[set[NodeId], set[NodeId]]:
    """Reads and views of a bucket that may share the model's memory, and views to be copied.

    `users` are the nodes that use each value, `kept` the values that are used elsewhere.
    """
    inside = set(bucket)
    borrowed: set[NodeId] = set()
    settled: set[NodeId] = set()
    edited = False
    for node_id in bucket:
        node = nodes[node_id]
        if isinstance(node, Write):
            edited = True
        elif edited:
            return set(), set()  # something is computed after an edit: copy everything
    for node_id in bucket:
        node = nodes[node_id]
        shares = isinstance(node, Read) or (
            isinstance(node, Op)
            and OPS[node.name].cost in ("view", "cast")
            and any(ref in borrowed for ref in refs(node))
        )
        if not shares:
            continue
        if users[node_id] <= inside and node_id not in kept:
            borrowed.add(node_id)
        elif isinstance(node, Op):
            settled.add(node_id)
    return borrowed, settled
