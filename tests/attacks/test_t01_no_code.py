"""T1: whatever graph a client sends, running it opens, imports, starts and compiles nothing.

Python tells an audit hook of each such event, also of those that C code asks for through it. Seen
failing with a kernel that opens a file, one that imports a module, and one that calls `eval`; the
model's pass with an `open` in a hook of the executor.
"""

from __future__ import annotations

import random
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any, NoReturn

import pytest
from random_graphs import random_graph, run_graph
from soak import SEED, count
from tenants import BLOCK, LAST, Tenants

from glasshive.graph import kernels
from glasshive.graph.budget import Budget, Surroundings, admit
from glasshive.graph.codec import decode_graph, encode_graph
from glasshive.graph.dtypes import DType
from glasshive.graph.errors import BadGraph, GraphError
from glasshive.graph.graph import Const, Graph, Node, NodeId, Op, Read, Ref, Save, Write
from glasshive.graph.kernels import infer
from glasshive.graph.ops import OPS
from glasshive.peer.executor import Executor
from glasshive.peer.served_model import ServedModel

GRAPHS = count(600, 100_000)
PASSES = count(100, 10_000)
EVENTS = (
    "open",
    "import",
    "exec",
    "compile",
    "marshal.",
    "pickle.",
    "socket.",
    "subprocess.",
    "os.",
    "shutil.",
    "ctypes.",
    "code.__new__",
    "object.__getattr__",
    "sys._getframe",
)


class Watch:
    """Counts what the thread that watches does, while it watches. A hook can't be taken off."""

    def __init__(self) -> None:
        self.seen: Counter[str] = Counter()
        self._thread: int | None = None
        sys.addaudithook(self._hear)

    def __enter__(self) -> None:
        self._thread = threading.get_ident()

    def __exit__(self, *error: object) -> None:
        self._thread = None

    def _hear(self, event: str, args: tuple[object, ...]) -> None:
        if self._thread == threading.get_ident() and event.startswith(EVENTS):
            self.seen[event] += 1


WATCH = Watch()


BUDGET = Budget(peak_bytes=1 << 28, flops=1 << 32, saved_bytes=1 << 28)


def unknown(*_: object) -> NoReturn:
    raise BadGraph("there is no model here")


MODEL = Surroundings(read=unknown, call=unknown, param=unknown, infer=infer)


def as_sent(graph: Graph, rng: random.Random) -> Graph:
    """The graph as it comes over the wire, or damaged as a host would still admit it."""
    data = bytearray(encode_graph(graph))
    if rng.random() < 0.7:
        return decode_graph(bytes(data))
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    try:
        found = decode_graph(bytes(data))
        admit(found, MODEL, BUDGET)
    except GraphError:
        return graph
    return found if constants(found) == constants(graph) else graph


def constants(graph: Graph) -> dict[NodeId, Node]:
    return {node_id: node for node_id, node in graph.nodes.items() if isinstance(node, Const)}


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's opinions on what the graphs do
def test_no_graph_opens_imports_starts_or_compiles_anything() -> None:
    rng = random.Random(SEED)
    used: set[str] = set()
    # Torch imports some of its own Python at the first call of an op, whatever asks for it.
    for _ in range(300):
        graph, values = random_graph(rng)
        # Each time: a thread of another test may end its own filters in the midst of this one.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's opinions, each told once
            run_graph(as_sent(graph, rng), values)
    WATCH.seen.clear()
    for _ in range(GRAPHS):
        graph, values = random_graph(rng)
        with WATCH:
            run_graph(as_sent(graph, rng), values)
        used |= {node.name for node in graph.nodes.values() if isinstance(node, Op)}
    assert WATCH.seen == Counter()
    assert len(used) > 150


@pytest.mark.asyncio
async def test_nor_does_a_model_s_pass_around_it(
    served: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a host: reads and edits of both kinds, and any op of one tensor between them."""
    rng = random.Random(SEED)
    names = [name for name, op in OPS.items() if [p.kind for p in op.params] == ["value"]]
    stock = Executor.run

    def watched(*args: Any) -> None:
        with WATCH:
            stock(*args)

    async def passes(names: Sequence[str]) -> int:
        """How many of the traces, each with one of the ops, were served to their end."""
        done = 0
        for name in names:
            site = rng.choice([BLOCK, LAST])
            nodes = [
                Read(site, 0),
                Op(name, (Ref(NodeId(0)),)),
                Op("to", (Ref(NodeId(1)), DType.FLOAT32)),
                Write(site, 0, Ref(NodeId(2)), rng.choice(["set", "inplace"])),
                Save(Ref(NodeId(2)), "s"),
            ]
            done += isinstance(await tenants.run(client, nodes), dict)
        return done

    async with Tenants(served) as tenants:
        client = tenants.client()
        await passes(names)  # torch and transformers import at the first call
        monkeypatch.setattr(Executor, "run", watched)
        WATCH.seen.clear()
        assert await passes([rng.choice(names) for _ in range(PASSES)]) > PASSES // 2
    del WATCH.seen["object.__getattr__"]  # transformers looks at the parameters of its own blocks
    assert WATCH.seen == Counter()


@pytest.mark.parametrize(
    ("what", "event"),
    [
        ("open('/dev/null').close()", "open"),
        ("__import__('this_is_no_module')", "import"),
        ("eval('1')", "compile"),
        ("__import__('os').system('true')", "os.system"),
        ("__import__('socket').socket().close()", "socket.__new__"),
        ("__import__('subprocess').run(['true'])", "subprocess.Popen"),
    ],
)
def test_the_watch_sees_a_kernel_that_does(
    what: str, event: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = kernels.KERNELS["neg"]

    def kernel(*args: object) -> object:
        try:
            exec(what)
        except ImportError:
            pass
        return stock(*args)

    monkeypatch.setattr(kernels, "KERNELS", {**kernels.KERNELS, "neg": kernel})
    rng = random.Random(1)
    WATCH.seen.clear()
    while not WATCH.seen[event]:
        graph, values = random_graph(rng)
        if any(isinstance(node, Op) and node.name == "neg" for node in graph.nodes.values()):
            with WATCH:
                run_graph(graph, values)
