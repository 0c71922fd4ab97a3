"""The interpreter: runs the pure nodes of a graph in order and forgets values after their last use.

It knows no tensor library: what computes one op is an argument (kernels.run_op).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from glasshive.graph.errors import BadGraph, GraphError
from glasshive.graph.graph import Arg, Graph, NodeId, Op, Ref, refs


class Interpreter:
    """The values of one graph while it runs.

    `extra_uses` are uses outside the graph's own nodes (values that are sent on); each must be
    taken with `take` once.
    """

    def __init__(
        self,
        graph: Graph,
        run_op: Callable[[str, Sequence[Any]], Any],
        *,
        extra_uses: Iterable[NodeId] = (),
    ) -> None:
        self._run_op = run_op
        self._values: dict[NodeId, Any] = {}
        self._uses: dict[NodeId, int] = {}
        for node in graph.nodes.values():
            for ref in refs(node):
                self._uses[ref] = self._uses.get(ref, 0) + 1
        for ref in extra_uses:
            self._uses[ref] = self._uses.get(ref, 0) + 1

    def __len__(self) -> int:
        """The number of values that are held now."""
        return len(self._values)

    def put(self, node_id: NodeId, value: Any) -> None:
        """Keep the value of a node, if anything uses it."""
        if self._uses.get(node_id, 0) > 0:
            self._values[node_id] = value

    def take(self, node_id: NodeId) -> Any:
        """A node's value, for one use. After the last use it is forgotten."""
        value = self._values.get(node_id)
        if value is None:
            raise BadGraph("a value is used that is not there", node=node_id)
        left = self._uses[node_id] - 1
        self._uses[node_id] = left
        if left == 0:
            del self._values[node_id]
        return value

    def give_up(self, node_id: NodeId) -> None:
        """One use of a value that never comes, as whatever would use it is never run."""
        left = self._uses[node_id] - 1
        self._uses[node_id] = left
        if left == 0:
            self._values.pop(node_id, None)

    def clear(self) -> None:
        """Forget every value; nothing is run any more."""
        self._values.clear()

    def run(self, node_id: NodeId, node: Op) -> Any:
        """The value of one op, not kept yet. An error of the kernel names the node."""
        try:
            return self._run_op(node.name, self.arguments(node.args))
        except GraphError as error:
            error.node = node_id
            raise

    def arguments(self, args: tuple[Arg, ...]) -> list[Any]:
        """`args` with every reference replaced by its value."""
        take = self.take
        return [
            take(arg.node)
            if type(arg) is Ref
            else self.arguments(arg)
            if type(arg) is tuple
            else arg
            for arg in args
        ]
