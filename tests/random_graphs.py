"""Graphs of the whole op table, as they could come from anybody, and what runs them."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from glasshive.graph.dtypes import DType
from glasshive.graph.errors import ShapeMismatch
from glasshive.graph.graph import Arg, Const, Graph, Node, NodeId, Op, Ref, Save
from glasshive.graph.kernels import infer, run_op
from glasshive.graph.ops import OPS, OpSpec, Parameter
from glasshive.graph.run import Interpreter
from glasshive.graph.tensors import Specs, TensorSpec

_SIDE = 48
LEAVES = [
    torch.randn(_SIDE, _SIDE),
    torch.randn(4, _SIDE, _SIDE),
    torch.randn(_SIDE),
    torch.randn(_SIDE, _SIDE).to(torch.bfloat16),
    torch.randint(0, _SIDE, (_SIDE,)),
    torch.randint(0, _SIDE, (_SIDE, _SIDE)),
    torch.randn(_SIDE, _SIDE) > 0,
    torch.randn(2, 4, _SIDE, 16),
    torch.randn(_SIDE, _SIDE) @ torch.randn(_SIDE, _SIDE).T + 9 * torch.eye(_SIDE),
    torch.complex(torch.randn(_SIDE, _SIDE), torch.randn(_SIDE, _SIDE)),
]
_MOST_BYTES = 2**22


def _random_arg(param: Parameter, values: list[NodeId], rng: random.Random) -> Arg:
    if param.optional and rng.random() < 0.5:
        return None
    value = Ref(rng.choice(values))
    kinds: dict[str, Callable[[], Arg]] = {
        "value": lambda: value,
        "operand": lambda: rng.choice([value, value, 2, 1.5, True]),
        "values": lambda: tuple(Ref(rng.choice(values)) for _ in range(rng.randint(1, 3))),
        "optional_values": lambda: rng.choice([(value,), (None, value), (value, value)]),
        "scalar": lambda: rng.choice([1, 2, 0.5, True]),
        "int": lambda: rng.choice([0, 0, 1, 1, -1, 2, 3, _SIDE]),
        "ints": lambda: rng.choice(
            [(), (0,), (1,), (0, 1), (-1,), (1, 0), (2, 0, 1), (_SIDE,), (3, _SIDE, _SIDE), (4, 5)]
        ),
        "float": lambda: rng.choice([0.5, 1.0, 2.0]),
        "bool": lambda: rng.random() < 0.5,
        "dtype": lambda: rng.choice(list(DType)),
        "choice": lambda: rng.choice(param.choices),
        "seed": lambda: 7,
    }
    return kinds[param.kind]()


def random_args(
    spec: OpSpec, values: Mapping[NodeId, TensorSpec], rng: random.Random
) -> tuple[tuple[Arg, ...], Specs] | None:
    """Arguments among `values`, and what comes of them; None if admission would not take them."""
    args = tuple(_random_arg(param, list(values), rng) for param in spec.params)
    if any(param.kind == "operand" for param in spec.params) and not any(
        isinstance(arg, Ref) for arg in args
    ):
        return None

    def resolve(arg: Any) -> Any:
        if isinstance(arg, tuple):
            return tuple(map(resolve, arg))
        return values[arg.node] if isinstance(arg, Ref) else arg

    try:
        result = infer(spec.name, resolve(args))
    except ShapeMismatch:
        return None
    parts = result if isinstance(result, tuple) else (result,)
    return None if sum(part.nbytes for part in parts) > _MOST_BYTES else (args, result)


def random_graph(rng: random.Random) -> tuple[Graph, dict[NodeId, Tensor]]:
    """A graph of some 20 ops that admission takes, and the values of its reads."""
    nodes: dict[NodeId, Node] = {}
    specs: dict[NodeId, Any] = {}
    values: dict[NodeId, Tensor] = {}
    for leaf in LEAVES:
        node_id = NodeId(len(nodes))
        name = node_id.to_bytes(32, "big")
        nodes[node_id] = Const(name, DType(str(leaf.dtype)[6:]), tuple(leaf.shape))
        specs[node_id] = TensorSpec(DType(str(leaf.dtype)[6:]), tuple(leaf.shape))
        values[node_id] = leaf
    names = [name for name in OPS if name != "pick"]
    for _ in range(400):
        if len(nodes) >= len(LEAVES) + 20:
            break
        spec = OPS[rng.choice(names)]
        usable = [i for i, s in specs.items() if isinstance(s, TensorSpec)]
        found = random_args(spec, {i: specs[i] for i in usable}, rng)
        if found is None:
            continue
        args, result = found
        parts = result if isinstance(result, tuple) else (result,)
        node_id = NodeId(len(nodes))
        nodes[node_id] = Op(spec.name, args)
        specs[node_id] = result
        if spec.outputs > 1:
            index = rng.randrange(spec.outputs)
            picked = NodeId(len(nodes))
            nodes[picked] = Op("pick", (Ref(node_id), index))
            specs[picked] = parts[index]
    for number, node_id in enumerate(rng.sample(usable, 3)):
        nodes[NodeId(len(nodes))] = Save(Ref(node_id), f"s{number}")
    return Graph(nodes), values


def run_graph(graph: Graph, values: Mapping[NodeId, Tensor]) -> list[Tensor]:
    """Run reads and ops in order; what the interpreter keeps is what is saved."""
    interpreter = Interpreter(graph, run_op)
    saved: list[Tensor] = []
    with contextlib.suppress(ShapeMismatch):  # an index out of range; the bill holds up to there
        for node_id, node in graph.nodes.items():
            if isinstance(node, Op):
                interpreter.put(node_id, interpreter.run(node_id, node))
            elif isinstance(node, Save):
                saved.append(interpreter.take(node.value.node))
            else:
                interpreter.put(node_id, values[node_id].clone())
    return saved
