"""Graphs as bytes: there and back, one encoding each, and nothing but our errors from anything."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import msgpack
import pytest
from hostile import attack, fuzzed, like
from hypothesis import given, settings
from hypothesis import strategies as st
from soak import count

from glasshive.graph.codec import (
    DEFAULT_LIMITS,
    decode_graph,
    encode_args_key,
    encode_graph,
    graph_digest,
)
from glasshive.graph.dtypes import DType
from glasshive.graph.errors import BadGraph, NotYet, UnknownOp
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
    Skip,
    Write,
)
from glasshive.graph.ops import OPS, OpSpec, Parameter

ERRORS = (BadGraph, UnknownOp, NotYet)


def ref(node_id: int) -> Ref:
    return Ref(NodeId(node_id))


def graph_of(*nodes: Node, imports: tuple[int, ...] = (), start: int = 0) -> Graph:
    return Graph(
        {NodeId(start + i): node for i, node in enumerate(nodes)},
        frozenset(map(NodeId, imports)),
    )


READ = Read(Site("model.layers.3", "output"), 0)
EVERY_KIND = graph_of(
    READ,
    Const(bytes(range(32)), DType.FLOAT32, (4,)),
    Param("lm_head", "weight"),
    Op("add", (ref(1), ref(0), 1.5)),
    Op("topk", (ref(3), 5, -1, True, False)),
    Op("pick", (ref(4), 1)),
    Op("to", (ref(3), DType.BFLOAT16)),
    Op("index", (ref(0), (None, ref(5)))),
    Op("clamp", (ref(6), -math.inf, None)),
    Op("gelu", (ref(3), "tanh")),
    Call("lm_head", (ref(3), None, (ref(5), (1, 2.0, False)))),
    Write(Site("model.layers.5", "input", ("attention_mask",), 2), 1, ref(3), "inplace"),
    Write(Site("model.layers.5", "output", (0, "a")), 0, ref(3), "set"),
    Skip("model.layers.7", 0, ref(0), 3),
    Op("randn_like", (ref(0), None, 2**63 - 1)),
    Op("cat", ((ref(0), ref(14)), 0)),
    Save(ref(10), "logits"),
    Save(ref(15), "both, in Ελληνικά"),
)


def test_every_kind_there_and_back() -> None:
    back = decode_graph(encode_graph(EVERY_KIND))
    assert back == EVERY_KIND
    assert repr(back.nodes.items()) == repr(EVERY_KIND.nodes.items())  # 1 is not 1.0 or True


def test_imports_and_ids_with_gaps() -> None:
    graph = Graph(
        {NodeId(3): Op("neg", (ref(1),)), NodeId(2**62): Save(ref(3), "x")},
        frozenset({NodeId(1), NodeId(0)}),
    )
    assert decode_graph(encode_graph(graph)) == graph


@pytest.mark.parametrize("number", [math.inf, -math.inf, 0.0, -0.0, 5e-324, 1.7e308])
def test_odd_floats_survive(number: float) -> None:
    graph = graph_of(READ, Op("mul", (ref(0), number)))
    node = decode_graph(encode_graph(graph)).nodes[NodeId(1)]
    assert isinstance(node, Op)
    assert node.args[1] == number
    assert math.copysign(1, node.args[1]) == math.copysign(1, number)


def test_nan_survives() -> None:
    node = decode_graph(encode_graph(graph_of(READ, Op("mul", (ref(0), math.nan))))).nodes[
        NodeId(1)
    ]
    assert isinstance(node, Op)
    assert isinstance(node.args[1], float)
    assert math.isnan(node.args[1])


def test_ordinary_graphs_are_small() -> None:
    steer = graph_of(
        Read(Site("model.layers.10", "output"), 0),
        Const(bytes(32), DType.FLOAT32, (576,)),
        Op("add", (ref(0), ref(1), 1)),
        Write(Site("model.layers.10", "output"), 0, ref(2), "set"),
        Read(Site("lm_head", "output"), 0),
        Op("select", (ref(4), 1, -1)),
        Save(ref(5), "logits"),
    )
    assert len(encode_graph(steer)) < 250


# Any graph of the table ------------------------------------------------------------------------

INTS = st.one_of(st.integers(-3, 300), st.integers(-(2**63), 2**63 - 1))
SCALARS = st.one_of(INTS, st.floats(allow_nan=False), st.booleans())
WORDS = st.from_regex(r"[a-z_][a-z0-9_]{0,8}", fullmatch=True)


def arg_of(param: Parameter, values: list[int], draw: Callable[[Any], Any]) -> Arg:
    if param.optional and draw(st.booleans()):
        return None
    value = st.sampled_from(values).map(ref)
    kinds: dict[str, st.SearchStrategy[Any]] = {
        "value": value,
        "operand": value,
        "values": st.lists(value, min_size=1, max_size=3).map(tuple),
        "optional_values": st.lists(value, min_size=1, max_size=3).map(lambda v: (None, *v)),
        "scalar": SCALARS,
        "int": INTS,
        "ints": st.lists(INTS, max_size=4).map(tuple),
        "float": st.floats(allow_nan=False),
        "bool": st.booleans(),
        "dtype": st.sampled_from(DType),
        "choice": st.sampled_from(param.choices or ("",)),
        "seed": st.integers(0, 2**63 - 1),
    }
    arg: Arg = draw(kinds[param.kind])
    return arg


@st.composite
def graphs(draw: Callable[[Any], Any]) -> Graph:
    nodes: dict[NodeId, Node] = {}
    imports = draw(st.sets(st.integers(0, 5), max_size=3))
    values: list[int] = sorted(imports)
    groups: dict[int, OpSpec] = {}
    next_id = 6
    plain = [spec for spec in OPS.values() if spec.name != "pick"]
    for number in range(draw(st.integers(1, 12))):
        node_id = NodeId(next_id)
        next_id += draw(st.integers(1, 3))
        site = Site(
            ".".join(draw(st.lists(WORDS, max_size=3))),
            draw(st.sampled_from(["input", "output"])),
            tuple(draw(st.lists(st.one_of(st.integers(0, 255), WORDS), max_size=2))),
            number,
        )
        kind = draw(st.integers(0, 9)) if values else 0
        if kind == 0:
            nodes[node_id] = Read(site, draw(st.integers(0, 9)))
        elif kind == 1:
            mode = draw(st.sampled_from(["set", "inplace"]))
            nodes[node_id] = Write(site, 0, ref(draw(st.sampled_from(values))), mode)
            continue
        elif kind == 2:
            nodes[node_id] = Save(ref(draw(st.sampled_from(values))), f"save {number}")
            continue
        elif kind == 3:
            args = draw(st.lists(st.one_of(SCALARS, st.none()), max_size=3))
            nodes[node_id] = Call(site.module, (ref(values[-1]), tuple(args)))
        elif kind == 4 and groups:
            group = draw(st.sampled_from(sorted(groups)))
            part = draw(st.integers(0, groups[group].outputs - 1))
            nodes[node_id] = Op("pick", (ref(group), part))
        else:
            spec = draw(st.sampled_from(plain))
            args = tuple(arg_of(param, values, draw) for param in spec.params)
            nodes[node_id] = Op(spec.name, args)
            if spec.outputs > 1:
                groups[node_id] = spec
                continue
        values.append(node_id)
    return Graph(nodes, frozenset(map(NodeId, imports)))


@settings(max_examples=count(150, 10_000), deadline=None)
@given(graphs())
def test_any_graph_there_and_back(graph: Graph) -> None:
    data = encode_graph(graph)
    back = decode_graph(data)
    assert repr(dict(back.nodes)) == repr(dict(graph.nodes))
    assert back.imports == graph.imports
    assert encode_graph(back) == data
    assert graph_digest(back) == graph_digest(graph)


@settings(max_examples=count(60, 4_000), deadline=None)
@given(graphs(), graphs())
def test_digests_are_equal_for_equal_graphs_only(one: Graph, other: Graph) -> None:
    same = (repr(dict(one.nodes)), sorted(one.imports)) == (
        repr(dict(other.nodes)),
        sorted(other.imports),
    )
    assert (graph_digest(one) == graph_digest(other)) == same


# What is refused -------------------------------------------------------------------------------


def refused(graph: Graph, text: str, *, node: int | None = None, limits: Any = None) -> None:
    with pytest.raises(ERRORS) as caught:
        decode_graph(encode_graph(graph), limits or DEFAULT_LIMITS)
    assert text in str(caught.value)
    assert len(str(caught.value)) < 400
    if node is not None:
        assert caught.value.node == node


OUT = Site("model.layers.1", "output")


@pytest.mark.parametrize(
    ("nodes", "text", "node"),
    [
        ([Op("neg", (ref(0),))], "a ref to 0, which is no value of an earlier node", 0),
        ([READ, Op("neg", (ref(2),)), READ], "a ref to 2", 1),
        ([READ, Save(ref(0), "x"), Op("neg", (ref(1),))], "a ref to 1", 2),
        ([READ, Write(OUT, 0, ref(0), "set"), Save(ref(1), "x")], "a ref to 1", 2),
        ([READ, Skip("m", 0, ref(0)), Save(ref(1), "x")], "a ref to 1", 2),
        ([Op("system", ())], "there is no op 'system'", 0),
        ([READ, Op("add_", (ref(0), 1, 1))], "there is no op 'add_'", 1),
        ([READ, Op("add", (ref(0), 1))], "got 2 arguments, but 3 are wanted", 1),
        ([READ, Op("add", (ref(0), "1", 1))], "got the word '1' for b", 1),
        ([READ, Op("sum", (ref(0), (True,), False, None))], "for dims", 1),
        ([READ, Save(ref(0), "a"), Save(ref(0), "a")], "two saves are called 'a'", 2),
        ([READ, Save(ref(0), "")], "a save's name is empty", 1),
        ([READ, Save(ref(0), "a\n")], "what cannot be printed", 1),
        ([READ, Save(ref(0), "a\x1b[2J")], "what cannot be printed", 1),
        (
            [READ, Write(OUT, 0, ref(0), "set"), Write(OUT, 0, ref(0), "inplace")],
            "model.layers.1.output is written twice",
            2,
        ),
        ([READ, Write(OUT, 0, ref(0), "append")], "set or inplace, not 'append'", 1),  # type: ignore[arg-type]
        ([Read(Site("m", "weights"), 0)], "an input or an output, not 'weights'", 0),  # type: ignore[arg-type]
        ([Read(Site("m..n", "input"), 0)], "'m..n' is no module's path", 0),
        ([Read(Site("m.", "input"), 0)], "is no module's path", 0),
        ([Read(Site("m()", "input"), 0)], "is no module's path", 0),
        ([Read(Site("m\n", "input"), 0)], "is no module's path", 0),
        ([Read(Site("ſ", "input"), 0)], "is no module's path", 0),
        ([Read(Site("m", "input", ("a b",)), 0)], "'a b' is no name", 0),
        ([Read(Site("m", "input", (-1,)), 0)], "a leaf's place is -1", 0),
        ([Read(Site("m", "input", (True,)), 0)], "not a bool", 0),
        ([Read(Site("m", "input", (0,), -1), 0)], "a step is -1", 0),
        ([Read(OUT, -1)], "an invoke is -1", 0),
        ([Read(OUT, 65_536)], "an invoke is 65536", 0),
        ([Param("m", "a.b")], "'a.b' is no name", 0),
        ([Param("m", "")], "'' is no name", 0),
        ([Const(bytes(31), DType.INT8, (1,))], "32 bytes", 0),
        ([Const(bytes(32), DType.INT8, (-1,))], "0 or more", 0),
        ([Const(bytes(32), DType.INT8, (2**33,))], "bytes that are allowed", 0),
        ([Const(bytes(32), DType.INT8, (1,) * 17)], "at most 16", 0),
        ([READ, Op("topk", (ref(0), 1, 0, True, True)), Save(ref(1), "x")], "several outputs", 2),
        ([READ, Op("pick", (ref(0), 0))], "several outputs in the same graph", 1),
        (
            [READ, Op("sort", (ref(0), 0, True, True)), Op("pick", (ref(1), 2))],
            "the part of sort is 2; an int from 0 to 1",
            2,
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_nodes_that_make_no_sense_are_refused(nodes: list[Node], text: str, node: int) -> None:
    refused(graph_of(*nodes), text, node=node)


def test_ids_ascend() -> None:
    refused(Graph({NodeId(2): READ, NodeId(1): READ}), "id 1 after id 2")
    refused(Graph({NodeId(-1): READ}), "ids must ascend from 0")
    refused(graph_of(READ, imports=(0,)), "has the id of an import")
    later = Graph({NodeId(1): Op("neg", (ref(5),))}, frozenset({NodeId(5)}))
    refused(later, "a ref to 5")


def test_a_pick_of_an_imported_value_is_refused() -> None:
    refused(graph_of(Op("pick", (ref(0), 0)), imports=(0,), start=1), "in the same graph")


@pytest.mark.parametrize(
    ("kind", "name"), [(9, "cond"), (10, "backward"), (11, "grad"), (12, "set_grad"), (13, "log")]
)
def test_later_kinds_are_named(kind: int, name: str) -> None:
    with pytest.raises(NotYet, match=f"node 0: {name} nodes are not run by this release"):
        decode_graph(msgpack.packb([1, [], [[0, kind, 1]]]))


@pytest.mark.parametrize(
    "message",
    [
        None, 1, "graph", [], [1], [1, []], [1, [], [], 0], {}, [1, [], {}], [1, {}, []],
        [2, [], []], [True, [], []], [1.0, [], []], ["1", [], []],
        [1, None, []], [1, [], None], [1, [1, 1], []], [1, [-1], []], [1, [True], []],
        [1, [], [None]], [1, [], [[]]], [1, [], [[0]]], [1, [], [[0, 1]]], [1, [], [["0", 1]]],
        [1, [], [[0, "read", "m", "input", [], 0, 0]]], [1, [], [[0, 0]]], [1, [], [[0, 99]]],
        [1, [], [[0, True, "m", "input", [], 0, 0]]],
        [1, [], [[0, 1, b"m", "input", [], 0, 0]]], [1, [], [[0, 1, "m", "input", None, 0, 0]]],
        [1, [], [[0, 1, "m", "input", [], 0, True]]], [1, [], [[0, 1, "m", "input", [], 0.0, 0]]],
        [1, [], [[0, 4, 7, []]]], [1, [], [[0, 4, "neg", None]]], [1, [], [[0, 4, "neg", [[]]]]],
        [1, [], [[0, 5, "m", [[0, 0, 0]]]]], [1, [], [[0, 5, "m", [[3, 0]]]]],
        [1, [], [[0, 5, "m", [[True, 0]]]]], [1, [], [[0, 5, "m", [[2, "float8"]]]]],
        [1, [], [[0, 5, "m", [b"x"]]]], [1, [], [[0, 5, "m", [2**64 - 1]]]],
        [1, [], [[0, 5, "m", [msgpack.ExtType(5, b"")]]]],
        [1, [], [[0, 5, "m", [msgpack.Timestamp(0)]]]],
        [1, [], [[0, 5, "m", [{"a": 1}]]]],
    ],
    ids=repr,
)  # fmt: skip
def test_other_messages_are_refused(message: object) -> None:
    with pytest.raises(ERRORS):
        decode_graph(msgpack.packb(message))


@pytest.mark.parametrize(
    "data",
    [
        encode_graph(EVERY_KIND) + b"\0",
        encode_graph(EVERY_KIND)[:-1],
        b"\x93\xcc\x01\x90\x90",  # version 1 in two bytes
        b"\xdc\x00\x03\x01\x90\x90",  # three parts in a long array
        msgpack.packb([1, [], [[0, 5, "m", [1.5]]]], use_single_float=True),
        b"\x91" * 100_000,
        b"\xc1",
        b"",
        bytearray(b"\x93\x01\x90\x90"),
        "\x93\x01\x90\x90",
    ],
    ids=range(10),
)
def test_other_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(BadGraph):
        decode_graph(data)


def test_what_no_message_can_hold_is_refused_when_encoding() -> None:
    with pytest.raises(BadGraph, match="no message can"):
        encode_graph(graph_of(READ, Op("mul", (ref(0), 2**64))))
    with pytest.raises(BadGraph, match="no message can"):
        encode_graph(graph_of(READ, Op("mul", (ref(0), 1j))))  # type: ignore[arg-type]


# Keys ------------------------------------------------------------------------------------------


def test_keys_tell_kinds_apart() -> None:
    args: list[Arg] = [
        1,
        1.0,
        True,
        "1",
        None,
        (1,),
        (1.0,),
        (),
        ref(1),
        DType.INT8,
        0.0,
        -0.0,
        "int8",
    ]
    keys = {encode_args_key(Call("m", (arg,))) for arg in args}
    assert len(keys) == len(args)
    nodes: list[Node] = [
        READ,
        Read(OUT, 0),
        Read(OUT, 1),
        Param("m", "w"),
        Call("m", ()),
        Op("m", ()),
    ]
    assert len({encode_args_key(node) for node in nodes}) == len(nodes)
    assert encode_args_key(Op("neg", (ref(4),))) == encode_args_key(Op("neg", (ref(4),)))


# Hostile bytes ---------------------------------------------------------------------------------

SMALL = [
    encode_graph(graph_of(READ, Op("topk", (ref(0), 5, -1, True, False)), Op("pick", (ref(1), 1)))),
    encode_graph(graph_of(READ, Op("clamp", (ref(0), -math.inf, None)), Save(ref(1), "s"))),
    encode_graph(graph_of(Const(bytes(32), DType.INT8, (4, 2)), Op("to", (ref(0), DType.INT64)))),
    encode_graph(graph_of(Param("a", "w"), Write(Site("b", "input", (0, "x")), 1, ref(0), "set"))),
    encode_graph(graph_of(READ, Call("m", (ref(0), None, ((1, 2.0),))), Skip("m", 0, ref(1), 0))),
]


def read(data: bytes) -> None:
    assert encode_graph(decode_graph(data)) == data


def test_damaged_graphs_are_graphs_or_refused() -> None:
    assert attack(decode_graph, SMALL, ERRORS) > 1000


def test_a_damaged_graph_of_every_kind_is_one_or_refused() -> None:
    attack(read, [encode_graph(EVERY_KIND)], ERRORS, tries=count(10_000, 1_000_000))


@fuzzed
@given(like(*SMALL, encode_graph(EVERY_KIND)))
def test_any_bytes_are_a_graph_or_refused(data: bytes) -> None:
    with contextlib.suppress(*ERRORS):
        read(data)
