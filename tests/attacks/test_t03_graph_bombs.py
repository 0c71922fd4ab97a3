"""T3: graphs of too many or too deep things, and graphs that name what comes later.

Each limit is met exactly: what reaches it is read, one more is refused. Seen failing, each alone:
with each comparison with a limit taken out of `graph/codec.py`, the test of that limit; with the
comparison of lengths taken out of `decode_graph` and `decode_part`, the tests of long messages;
with `value >= self._current` and the look into `_known` taken out of `_ref`, the random graphs (a
circle was taken); with `scan` taken out of `graph/plan_codec.py`, those of parts; with that of
`graph/codec.py`, arrays in a node; with the host's own `GraphLimits` in the place of the policy's,
the test over a host.
"""

from __future__ import annotations

import graphlib
import random
import sys
import tracemalloc
from dataclasses import replace

import msgpack
import pytest
from soak import SEED, count
from tenants import LAST, SAVED, Tenants

from glasshive.dht.messages import Failed
from glasshive.graph.codec import DEFAULT_LIMITS, GraphLimits, decode_graph, encode_graph
from glasshive.graph.dtypes import DType
from glasshive.graph.errors import BadGraph
from glasshive.graph.graph import (
    Arg,
    Call,
    Const,
    Graph,
    Node,
    NodeId,
    Op,
    Param,
    Read,
    Ref,
    Save,
    Site,
)
from glasshive.graph.plan_codec import VERSION, decode_part
from glasshive.peer.host_limits import HostLimits
from glasshive.peer.served_model import ServedModel

GRAPHS = count(5_000, 200_000)

LIMITS = GraphLimits(
    graph_bytes=4000, nodes=5, imports=2, node_args=6, list_items=4, nesting=3, text_chars=10,
    leaf_parts=2, invokes=3, steps=4, saves=2, const_bytes=100,
)  # fmt: skip
READ = Read(Site("m", "output"), 0)


def ref(node_id: int) -> Ref:
    return Ref(NodeId(node_id))


def graph_of(*nodes: Node, imports: tuple[int, ...] = (), start: int = 0) -> Graph:
    return Graph(
        {NodeId(start + i): node for i, node in enumerate(nodes)}, frozenset(map(NodeId, imports))
    )


def at_limit(over: int) -> dict[str, tuple[Graph, str]]:
    """A graph for each of LIMITS that reaches it, or goes `over` it, and what is said of that."""
    deep: Arg = 1
    for _ in range(LIMITS.nesting + over):
        deep = (deep,)
    return {
        "nodes": (graph_of(*[READ] * (5 + over)), "a graph has 6 nodes, but 5 are allowed"),
        "imports": (
            graph_of(READ, imports=tuple(range(2 + over)), start=9),
            "a graph has 3 imports, but 2 are allowed",
        ),
        "node_args": (graph_of(Call("m", (1,) * (6 + over))), "arguments are a list of at most 6"),
        "list_items": (
            graph_of(Call("m", ((1,) * (4 + over),))),
            "a list has more than the 4 items allowed",
        ),
        "nesting": (graph_of(Call("m", (deep,))), "arguments are nested deeper than 3"),
        "text_chars": (
            graph_of(Param("m" * (10 + over), "w")),
            "a module's path is text of at most 10 characters",
        ),
        "leaf_parts": (
            graph_of(Read(Site("m", "input", (0,) * (2 + over)), 0)),
            "a leaf is a list of at most 2 parts",
        ),
        "invokes": (graph_of(Read(Site("m", "input"), 2 + over)), "an invoke is 3"),
        "steps": (graph_of(Read(Site("m", "input", (), 3 + over), 0)), "a step is 4"),
        "saves": (
            graph_of(READ, *(Save(ref(0), f"{i}") for i in range(2 + over))),
            "a graph saves more than the 2 values allowed",
        ),
        "const_bytes": (
            graph_of(Const(bytes(32), DType.INT8, (100 + over,))),
            "more than the 100 bytes that are allowed",
        ),
    }


@pytest.mark.parametrize("name", list(at_limit(0)))
def test_caps_hold_exactly(name: str) -> None:
    decode_graph(encode_graph(at_limit(0)[name][0]), LIMITS)
    graph, text = at_limit(1)[name]
    with pytest.raises(BadGraph, match=text):
        decode_graph(encode_graph(graph), LIMITS)


def test_a_long_message_is_refused_unread() -> None:
    data = encode_graph(graph_of(READ, Save(ref(0), "s")))
    decode_graph(data, replace(DEFAULT_LIMITS, graph_bytes=len(data)))
    with pytest.raises(BadGraph, match=f"{len(data)} bytes, but {len(data) - 1} are allowed"):
        decode_graph(data, replace(DEFAULT_LIMITS, graph_bytes=len(data) - 1))
    with pytest.raises(BadGraph, match="are allowed"):
        decode_graph(b"\xc1" * (DEFAULT_LIMITS.graph_bytes + 1))


# Bytes that are cheap to send ---------------------------------------------------------------------


def array(items: int) -> bytes:
    return b"\xdd" + items.to_bytes(4, "big")


def many(item: bytes, most: int) -> tuple[int, bytes]:
    """As many of these as a message may have, `most` if that is less."""
    items = min((DEFAULT_LIMITS.graph_bytes - 64) // len(item), most)
    return items, item * items


def byte_bombs() -> dict[str, bytes]:
    """Messages near a megabyte that no honest client sends."""
    found = {
        "a million empty maps": b"\x93\x01\x90" + array(2**20 - 64) + b"\x80" * (2**20 - 64),
        "a map with one key, again and again": b"\x93\x01\x90\xdf\x00\x04\x00\x00"
        + b"\xa1a\xc0" * (1 << 18),
        "arrays that claim what is not there": b"\x93\x01\x90" + b"\xdc\x4e\x20" * 300_000,
        "headers of more than there can be": b"\x93\x01\x90" + b"\xdd\xff\xff\xff\xff" * 200_000,
        "texts of more than there can be": b"\x93\x01\x90" + b"\xdb\xff\xff\xff\xff" * 200_000,
    }
    for depth in (1, 4, 50, 400, 1000):
        chain = b"\x91" * depth + b"\x90"
        items, chains = many(chain, DEFAULT_LIMITS.nodes)
        found[f"nodes that are arrays, {depth} deep"] = b"\x93\x01\x90" + array(items) + chains
        items, chains = many(chain, DEFAULT_LIMITS.list_items - 2)
        found[f"a node of arrays, {depth} deep"] = (
            b"\x93\x01\x90\x91" + array(items + 2) + b"\x00\x04" + chains
        )
    numbers = array(DEFAULT_LIMITS.list_items + 1) + b"\x01" * (DEFAULT_LIMITS.list_items + 1)
    lists = array(DEFAULT_LIMITS.node_args) + numbers * DEFAULT_LIMITS.node_args
    found["a call with lists of numbers"] = b"\x93\x01\x90\x91\x94\x00\x05\xa1m" + lists
    return found


@pytest.mark.parametrize("name", byte_bombs())
def test_bytes_make_no_more_than_they_say(name: str) -> None:
    """Beside three copies of the message no more than a megabyte is taken."""
    data = byte_bombs()[name]
    tracemalloc.start()
    with pytest.raises(BadGraph):
        decode_graph(data)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 3 * len(data) + (1 << 20)


def test_a_node_holds_a_bounded_number_of_values() -> None:
    lists = tuple((1,) * 4000 for _ in range(4))
    decode_graph(encode_graph(graph_of(Call("m", lists))))
    with pytest.raises(BadGraph, match=r"a node of \d+ bytes: more than 16384 elements"):
        decode_graph(encode_graph(graph_of(Call("m", (*lists, lists[0])))))


# Circles ----------------------------------------------------------------------------------------


def random_message(rng: random.Random) -> bytes:
    """A graph of sums whose refs name any node, also itself, later ones and none."""
    size = rng.randint(1, 12)
    ids = list(range(size))
    if rng.random() < 0.1:
        rng.shuffle(ids)

    def named(position: int) -> int:
        honest = position > 0 and rng.random() < 0.9
        return ids[rng.randrange(position)] if honest else rng.randint(-1, size)

    nodes: list[list[object]] = [[ids[0], 1, "m", "output", [], 0, 0]]
    for position in range(1, size):
        args = [[0, named(position)], [0, named(position)], 1]
        nodes.append([ids[position], 4, "add", args])
    return msgpack.packb([1, [], nodes])


def has_a_circle(message: bytes) -> bool:
    """By what the message itself says, and Python's own sorting."""
    edges = {
        fields[0]: [arg[1] for arg in fields[3] if isinstance(arg, list)]
        for fields in msgpack.unpackb(message)[2]
        if fields[1] == 4
    }
    try:
        graphlib.TopologicalSorter(edges).prepare()
    except graphlib.CycleError:
        return True
    return False


def test_of_random_graphs_none_with_a_circle_is_taken() -> None:
    rng = random.Random(SEED)
    taken = circles = 0
    for _ in range(GRAPHS):
        message = random_message(rng)
        circle = has_a_circle(message)
        circles += circle
        try:
            graph = decode_graph(message)
        except BadGraph:
            continue
        taken += 1
        assert not circle, message.hex()
        for node_id, node in graph.nodes.items():  # so it runs in the order in which it came
            if isinstance(node, Op):
                assert all(arg.node < node_id for arg in node.args if isinstance(arg, Ref))
    assert taken > GRAPHS / 10
    assert circles > GRAPHS / 100


def test_ids_ascend() -> None:
    for graph, text in (
        (Graph({NodeId(2): READ, NodeId(1): READ}), "id 1 after id 2"),
        (Graph({NodeId(-1): READ}), "ids must ascend from 0"),
        (graph_of(READ, imports=(0,)), "has the id of an import"),
        (Graph({NodeId(1): Op("neg", (ref(5),))}, frozenset({NodeId(5)})), "a ref to 5"),
    ):
        with pytest.raises(BadGraph, match=text):
            decode_graph(encode_graph(graph))


# Parts ------------------------------------------------------------------------------------------


EMPTY = b"\xdd\x00\x01\x00\x00" + b"\x90" * 65_536


def test_too_many_bytes_of_a_part_are_refused_unread() -> None:
    with pytest.raises(BadGraph, match="at most"):
        decode_part(b"\0" * (4 * DEFAULT_LIMITS.graph_bytes + 1), DEFAULT_LIMITS)


def test_a_part_of_empty_things_takes_little_memory() -> None:
    tracemalloc.start()
    with pytest.raises(BadGraph, match="a list of 9 is wanted"):
        decode_part(b"\x92" + 2 * EMPTY, DEFAULT_LIMITS)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 4 << 20


def test_a_part_s_lists_are_as_long_as_its_graph() -> None:
    """Sixteen values for each node, and 8 * 4,096 besides; refused before they are made."""
    graph = encode_graph(graph_of(READ))
    for stages, specs in ((b"\x91" + EMPTY, b"\x90"), (b"\x90", EMPTY)):
        with pytest.raises(BadGraph, match="no msgpack of ours: ValueError") as caught:
            decode_part(
                bytes([0x99, VERSION]) + b"\x00\x92\x00\x01" + stages + b"\x90" + specs
                + b"\x90\xc2\xc4" + bytes([len(graph)]) + graph,
                DEFAULT_LIMITS,
            )  # fmt: skip
        assert "more than 32784 elements" in str(caught.value.__cause__)


def folded(*entries: object) -> bytes:
    """A graph of these entries, in which a node may be a repeat."""
    return msgpack.packb([1, [], entries])


def test_repeats_beyond_the_limits_take_no_memory() -> None:
    """A few bytes can't stand for more nodes, or larger ones, than a graph may have in full."""
    reads = [[i, 1, "model.norm", "output", [], i, 0] for i in range(2)]
    wide = [[i, 4, "stack", [[1, *[[0, 0]] * 4000], 0]] for i in (1, 2)]
    for entries, text in (
        ([*reads, [1, 20_000]], "1 items 20000 times is more than is allowed"),
        ([*reads, [1, 10**12]], "is more than is allowed"),
        ([reads[0], *wide, [1, 1000]], "1 items 1000 times is more than is allowed"),
        ([*reads, [1, 3], [2, 9_000], [2, 9_000]], "2 items 9000 times is more"),
    ):
        data = folded(*entries)
        assert len(data) < 40_000
        tracemalloc.start()
        with pytest.raises(BadGraph, match=text):
            decode_graph(data)
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak_bytes < 40 << 20


def test_openings_of_long_arrays_take_no_memory() -> None:
    for data in (b"\xdc\xff\xff" * 1000, b"\xdd\x00\x00\x03\xe8" * 1000 + bytes(1000)):
        tracemalloc.start()
        with pytest.raises(BadGraph):
            decode_part(data, DEFAULT_LIMITS)
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak_bytes < 1 << 18


# At a host --------------------------------------------------------------------------------------


def chain(length: int) -> list[Node]:
    """So many nodes, each of which needs the one before it."""
    nodes: list[Node] = [Read(LAST, 0)]
    nodes += [Op("neg", (ref(i),)) for i in range(length - 2)]
    return [*nodes, Save(ref(length - 2), "s")]


@pytest.mark.asyncio
async def test_a_host_keeps_to_its_own_limits_and_serves_on(served: ServedModel) -> None:
    limits = HostLimits(graph=replace(DEFAULT_LIMITS, nodes=10))
    async with Tenants(served, limits) as tenants:
        client = tenants.client()
        assert isinstance(await tenants.run(client, chain(10)), dict)
        told = await tenants.run(client, chain(11))
        assert isinstance(told, Failed)
        assert (told.code, told.text) == ("BadGraph", "a graph has 11 nodes, but 10 are allowed")
        assert isinstance(await tenants.run(client, SAVED), dict)


@pytest.mark.asyncio
async def test_a_chain_as_long_as_a_graph_may_be_needs_no_stack(served: ServedModel) -> None:
    length = 10 * sys.getrecursionlimit()
    assert length < DEFAULT_LIMITS.nodes
    async with Tenants(served) as tenants:
        told = await tenants.run(tenants.client(), chain(length))
        assert isinstance(told, dict), told
