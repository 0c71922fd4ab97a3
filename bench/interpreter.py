"""What a peer adds to torch: per node of the interpreter, and per node of admission, warm and cold.

Bar: <= 5 microseconds a node over the torch call.
"""

from __future__ import annotations

import functools

import torch
from harness import interleaved, report

from glasshive.graph import kernels
from glasshive.graph.budget import Budget, Surroundings, admit
from glasshive.graph.dtypes import DType
from glasshive.graph.graph import Graph, Node, NodeId, Op, Ref, Save
from glasshive.graph.run import Interpreter
from glasshive.graph.tensors import TensorSpec

NODES = 300


def chain() -> Graph:
    """`h * 1.5`, 300 times over."""
    nodes: dict[NodeId, Node] = {
        NodeId(i): Op("mul", (Ref(NodeId(i - 1)), 1.5)) for i in range(1, NODES + 1)
    }
    nodes[NodeId(NODES + 1)] = Save(Ref(NodeId(NODES)), "s0")
    return Graph(nodes, frozenset({NodeId(0)}))


def refuse(*args: object) -> TensorSpec:
    """This graph asks the model for nothing."""
    raise LookupError


def main() -> None:
    """Print the figures."""
    graph = chain()
    h = torch.randn(12, 576)
    run_op = functools.partial(kernels.run_op, device="cpu")
    budget = Budget(1 << 40, 1 << 60, 1 << 40)
    specs = {NodeId(0): TensorSpec(DType.FLOAT32, (12, 576))}
    surroundings = Surroundings(refuse, refuse, refuse, kernels.infer)

    def interpreted() -> None:
        values = Interpreter(graph, run_op)
        values.put(NodeId(0), h)
        for node_id, node in graph.nodes.items():
            if isinstance(node, Op):
                values.put(node_id, values.run(node_id, node))

    def torch_calls() -> None:
        value = h
        for _ in range(NODES):
            value = torch.mul(value, 1.5)

    def admitted() -> None:
        admit(graph, surroundings, budget, imports=specs)

    def admitted_cold() -> None:
        kernels._inferred.clear()
        for size in range(20):  # 20 shapes nobody has asked for
            kernels.infer("mul", (TensorSpec(DType.FLOAT32, (size + 1, 577)), 1.5))

    found = interleaved(
        {
            "300 nodes interpreted": interpreted,
            "300 torch calls": torch_calls,
            "300 nodes admitted, warm": admitted,
            "20 nodes inferred, cold": admitted_cold,
        },
        repeats=50,
        warm_up=5,
    )
    over_us = (
        1e6 * (found["300 nodes interpreted"].median - found["300 torch calls"].median) / NODES
    )
    admit_us = 1e6 * found["300 nodes admitted, warm"].median / NODES
    cold_us = 1e6 * found["20 nodes inferred, cold"].median / 20
    rows = [[name, 1e3 * one.median, 1e3 * one.least] for name, one in found.items()]
    report(
        "interpreter",
        ["arm", "median ms", "least ms"],
        [
            *rows,
            ["interpreter over torch, us a node", over_us, ""],
            ["admission warm, us a node", admit_us, ""],
            ["inference cold, us a node", cold_us, ""],
        ],
        {"over_us": over_us, "admission_warm_us": admit_us, "inference_cold_us": cold_us},
    )


if __name__ == "__main__":
    main()
