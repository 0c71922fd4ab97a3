"""A graph as bytes: msgpack arrays under a version number, and nothing else of msgpack.

    graph  = [1, [import id, ...], [node, ...]]           ids ascend; nodes name earlier ids only
           | [1, [import id, ...], folded]                 as repeats.py folds nodes that repeat
    node   = [id, kind, field, ...]                       the fields of the dataclass in graph.py
    site   = module, io, leaf, step                       four fields of a read or write
    arg    = int | float | bool | null | word             a word is one of an op's choices
           | [0, id] | [1, arg, ...] | [2, dtype]         a ref, a list, a dtype

- Nothing is allocated for a message that is too long; every count, size and depth has a cap.
- Nodes are made one after the other, so that a message costs no more than its first wrong node.
- No maps, no extension types, and no hook but the one that refuses a map.
- What decodes from an unfolded list also encodes to the same bytes, so one graph has one digest.
- Decoding raises BadGraph, UnknownOp or NotYet, whatever the bytes are.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, NoReturn

import msgpack

from glasshive.graph.dtypes import DType
from glasshive.graph.errors import BadGraph, BadTensor, NotYet, UnknownOp
from glasshive.graph.graph import (
    Arg,
    Call,
    Const,
    Graph,
    LeafPath,
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
from glasshive.graph.msgpack_scan import scan
from glasshive.graph.ops import INT_MAX, INT_MIN, OpSpec, check_args, find_op
from glasshive.graph.repeats import fold, unfold
from glasshive.graph.tensors import MAX_RANK, check_spec

VERSION: Final = 1

_READ, _WRITE, _SKIP, _OP, _CALL, _PARAM, _CONST, _SAVE = range(1, 9)
_LATER: Final[Mapping[object, str]] = {
    9: "cond",
    10: "backward",
    11: "grad",
    12: "set_grad",
    13: "log",
}
_EFFECTS: Final = (_WRITE, _SKIP, _SAVE)
_REF, _LIST, _DTYPE = range(3)
_NODE_FIELDS: Final = 9  # of a write, which has the most
_NODE_DEPTH: Final = 3  # of a node without lists in its arguments
_SHORT_BYTES: Final = 1024
_NOT_SHORTEST: Final = "a graph's bytes are not its shortest encoding"


@dataclass(frozen=True, slots=True)
class GraphLimits:
    """The caps on one graph. A message beyond any of them is refused."""

    graph_bytes: int = 2**20
    nodes: int = 20_000
    imports: int = 4_096
    node_args: int = 64
    list_items: int = 4_096
    nesting: int = 8
    node_elements: int = 16_384
    text_chars: int = 256
    leaf_parts: int = 8
    invokes: int = 65_536
    steps: int = 65_536
    saves: int = 4_096
    const_bytes: int = 2**32


DEFAULT_LIMITS: Final = GraphLimits()


def graph_digest(graph: Graph) -> bytes:
    """SHA-256 of the encoded graph. Equal for equal graphs, and only for them."""
    return hashlib.sha256(b"glasshive graph\0" + encode_graph(graph)).digest()


# Encoding --------------------------------------------------------------------------------------


def encode_graph(graph: Graph, *, folded: bool = False) -> bytes:
    """The graph's only encoding, or that with its repeats folded.

    Raises BadGraph for values that no message can hold. What is merely wrong, as a ref to a later
    node, is found by whoever decodes it.
    """
    nodes = [[node_id, *_fields(node)] for node_id, node in graph.nodes.items()]
    return _pack([VERSION, sorted(graph.imports), fold(nodes) if folded else nodes])


def encode_args_key(node: Node) -> bytes:
    """Bytes that are equal for two nodes exactly when they compute alike: 1 is not 1.0 or True."""
    return _pack(_fields(node))


def _pack(parts: object) -> bytes:
    try:
        return bytes(msgpack.packb(parts))
    except (ValueError, TypeError, OverflowError) as error:
        raise BadGraph(f"a graph holds what no message can: {error!s:.80}") from None


def _fields(node: Node) -> list[object]:
    if isinstance(node, Op):
        return [_OP, node.name, [_pack_arg(arg) for arg in node.args]]
    if isinstance(node, Read):
        return [_READ, *_site_fields(node.site), node.invoke]
    if isinstance(node, Write):
        return [_WRITE, *_site_fields(node.site), node.invoke, node.value.node, node.mode]
    if isinstance(node, Skip):
        return [_SKIP, node.module, node.invoke, node.value.node, node.step]
    if isinstance(node, Call):
        return [_CALL, node.module, [_pack_arg(arg) for arg in node.args]]
    if isinstance(node, Param):
        return [_PARAM, node.module, node.name]
    if isinstance(node, Const):
        return [_CONST, node.digest, node.dtype.value, node.shape]
    return [_SAVE, node.value.node, node.name]


def _site_fields(site: Site) -> tuple[object, ...]:
    return site.module, site.io, site.leaf, site.step


def _pack_arg(arg: Arg) -> object:
    if isinstance(arg, Ref):
        return [_REF, arg.node]
    if isinstance(arg, tuple):
        return [_LIST, *map(_pack_arg, arg)]
    if isinstance(arg, DType):
        return [_DTYPE, arg.value]
    return arg


# Decoding --------------------------------------------------------------------------------------


def decode_graph(data: bytes, limits: GraphLimits = DEFAULT_LIMITS) -> Graph:
    """The graph in `data`, checked in everything that needs no model.

    Refs name earlier nodes or imports and never an effect, op names and arguments are in the
    table, save names and written sites are unique. Raises BadGraph, UnknownOp or NotYet; the
    error's `node` is the id to blame, if the bytes came that far.
    """
    if type(data) is not bytes:
        raise BadGraph(f"a graph is bytes, not {type(data).__name__}")
    if len(data) > limits.graph_bytes:
        raise BadGraph(f"a graph has {len(data)} bytes, but {limits.graph_bytes} are allowed")
    try:
        # Whether all of it is there, before anything is made for what it claims to hold.
        whole = msgpack.Unpacker(max_buffer_size=max(len(data), 1))  # 0 would be the largest
        whole.feed(data)
        whole.skip()
        values = _Values(data, limits)
        if values.enter() != 3:
            raise BadGraph("a graph is a version, imports and nodes")
        version = values.take()
        if type(version) is not int or version != VERSION:
            raise BadGraph(f"a graph of version {_short(version)}, but {VERSION} is wanted")
        return _Decoder(limits).graph(values)
    except (ValueError, RecursionError, msgpack.UnpackException) as error:
        raise BadGraph(f"bytes that are no graph: {type(error).__name__}") from None


class _Values:
    """The values of a message one after the other: none is made behind one that is wrong.

    What is there at all was found out before (`skip`). So a value holds no more than its bytes
    say, and only a long one can hold much: it is looked through before it is made.
    """

    def __init__(self, data: bytes, limits: GraphLimits) -> None:
        self._data = data
        self._depth = limits.nesting + _NODE_DEPTH
        self._elements = limits.node_elements
        self._ends = msgpack.Unpacker(max_buffer_size=len(data))
        self._makes = msgpack.Unpacker(
            max_buffer_size=len(data),
            use_list=False,  # an empty tuple costs no memory, an empty list 56 bytes
            object_pairs_hook=_refuse_map,
            ext_hook=_refuse_ext,
            max_array_len=_longest(limits),
            max_str_len=4 * limits.text_chars,
            max_bin_len=32,
            max_map_len=0,
            max_ext_len=0,
        )
        self._ends.feed(data)
        self._makes.feed(data)
        self._packer = msgpack.Packer()

    def enter(self) -> int:
        """Go into what comes next, which has to be an array; the number of its items."""
        start = self._ends.tell()
        try:
            count: int = self._ends.read_array_header()
        except ValueError:
            raise BadGraph("a graph, its imports and its nodes are lists") from None
        if self._data[start : self._ends.tell()] != self._packer.pack_array_header(count):
            raise BadGraph(_NOT_SHORTEST)
        self._makes.read_array_header()
        return count

    def take(self) -> Any:
        """The next value."""
        start = self._ends.tell()
        self._ends.skip()
        end = self._ends.tell()
        if end - start > _SHORT_BYTES:
            try:
                scan(memoryview(self._data)[start:end], self._depth, self._elements)
            except ValueError as error:
                raise BadGraph(f"a node of {end - start} bytes: {error}") from None
        value = self._makes.unpack()
        # The decoder takes each field as it is or refuses it, so this is what it encodes to.
        if self._packer.pack(value) != self._data[start:end]:
            raise BadGraph(_NOT_SHORTEST)
        return value

    def end(self) -> None:
        """Raise BadGraph if more follows."""
        if self._ends.tell() != len(self._data):
            raise BadGraph("bytes behind a graph")


def _longest(limits: GraphLimits) -> int:
    """The items of the longest list in any message; what each list may hold is checked later."""
    return max(
        _NODE_FIELDS, MAX_RANK, limits.nodes, limits.imports, limits.node_args,
        limits.leaf_parts, limits.list_items + 1,
    )  # fmt: skip


def _refuse_map(_pairs: object) -> NoReturn:
    raise BadGraph("a graph holds no maps")


def _refuse_ext(_code: int, _data: bytes) -> NoReturn:
    raise BadGraph("a graph holds no extension types")


def _short(value: object) -> str:
    if type(value) is int:
        return str(value)
    if type(value) is str:
        return repr(value[:40])
    return f"a {type(value).__name__}"


_MODULE: Final = re.compile(r"(?:[A-Za-z0-9_]+(?:\.[A-Za-z0-9_]+)*)?")
_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class _Decoder:
    """One pass over the nodes of one message, in order."""

    def __init__(self, limits: GraphLimits) -> None:
        self._limits = limits
        self._nodes: dict[NodeId, Node] = {}
        self._current = -1
        self._known: dict[int, Ref] = {}  # what may be named, by ids less than the current
        self._groups: dict[int, OpSpec] = {}  # nodes of several outputs, which only `pick` may name
        self._imports: frozenset[NodeId] = frozenset()
        self._saves: set[str] = set()
        self._written: dict[tuple[Site, int], str] = {}  # the mode

    def graph(self, values: _Values) -> Graph:
        limits = self._limits
        count = values.enter()
        if count > limits.imports:
            raise BadGraph(f"a graph has {count} imports, but {limits.imports} are allowed")
        last = -1
        for _ in range(count):
            last = self._next_id(values.take(), last)
            self._known[last] = Ref(NodeId(last))
        self._imports = frozenset(map(NodeId, self._known))
        count = values.enter()
        if count > limits.nodes:
            raise BadGraph(f"a graph has {count} nodes, but {limits.nodes} are allowed")
        last = -1
        written = (values.take() for _ in range(count))
        for fields in unfold(written, limits.nodes, limits.graph_bytes):
            last = self._node(fields, last)
        values.end()
        return Graph(MappingProxyType(self._nodes), self._imports)

    def _next_id(self, node_id: object, last: int) -> int:
        if type(node_id) is not int or not last < node_id <= INT_MAX:
            raise BadGraph(f"id {_short(node_id)} after id {last}; ids must ascend from 0")
        return node_id

    def _node(self, fields: object, last: int) -> int:
        if type(fields) is not tuple or len(fields) < 2:
            raise BadGraph("a node is an id, a kind and its fields")
        number = self._next_id(fields[0], last)
        kind = fields[1]
        self._current = number
        try:
            if number in self._known:
                raise BadGraph("a node has the id of an import")
            if type(kind) is not int or kind not in _DECODERS:
                raise _unknown_kind(kind)
            count, decode = _DECODERS[kind]
            if len(fields) != count + 2:
                raise BadGraph(f"a node of kind {kind} has {count} fields, not {len(fields) - 2}")
            node = decode(self, *fields[2:])
        except BadTensor as error:
            raise BadGraph(f"node {number}: {error}", node=number) from None
        except (BadGraph, UnknownOp, NotYet) as error:
            raise type(error)(f"node {number}: {error}", node=number) from None
        self._nodes[NodeId(number)] = node
        if kind not in _EFFECTS and number not in self._groups:
            self._known[number] = Ref(NodeId(number))
        return number

    # One method for each kind, with the fields as parameters

    def read(self, module: object, io: object, leaf: object, step: object, invoke: object) -> Read:
        return Read(self._site(module, io, leaf, step), self._invoke(invoke))

    def write(
        self, module: object, io: object, leaf: object, step: object, invoke: object,
        value: object, mode: object,
    ) -> Write:  # fmt: skip
        site = self._site(module, io, leaf, step)
        if mode != "set" and mode != "inplace":
            raise BadGraph(f"a write is set or inplace, not {_short(mode)}")
        write = Write(site, self._invoke(invoke), self._ref(value), mode)
        # An edit in place, and then what is assigned instead; each of them in its final version.
        earlier = self._written.get((site, write.invoke))
        if earlier is not None and (earlier, mode) != ("inplace", "set"):
            raise BadGraph(f"{site!s:.120} is written twice in invoke {write.invoke}")
        self._written[site, write.invoke] = mode
        return write

    def skip(self, module: object, invoke: object, value: object, step: object) -> Skip:
        return Skip(self._module(module), self._invoke(invoke), self._ref(value), self._step(step))

    def op(self, name: object, args: object) -> Op:
        if type(name) is not str:
            raise BadGraph(f"an op's name is a word, not {_short(name)}")
        spec = find_op(name)
        op = Op(spec.name, self._args(args, allow_groups=spec.name == "pick"))
        check_args(spec, op.args)
        if spec.name == "pick":
            self._check_pick(op.args)
        if spec.outputs > 1:
            self._groups[self._current] = spec
        return op

    def call(self, module: object, args: object) -> Call:
        return Call(self._module(module), self._args(args))

    def param(self, module: object, name: object) -> Param:
        return Param(self._module(module), self._name(name))

    def const(self, digest: object, dtype: object, shape: object) -> Const:
        if type(digest) is not bytes or len(digest) != 32:
            raise BadGraph("a constant is named by 32 bytes")
        spec = check_spec(dtype, shape, self._limits.const_bytes)
        return Const(digest, spec.dtype, spec.shape)

    def save(self, value: object, name: object) -> Save:
        text = self._text(name, "a save's name")
        if not text or not text.isprintable():
            raise BadGraph("a save's name is empty or holds what cannot be printed")
        if text in self._saves:
            raise BadGraph(f"two saves are called {_short(text)}")
        if len(self._saves) >= self._limits.saves:
            raise BadGraph(f"a graph saves more than the {self._limits.saves} values allowed")
        self._saves.add(text)
        return Save(self._ref(value), text)

    # Fields

    def _site(self, module: object, io: object, leaf: object, step: object) -> Site:
        if io != "input" and io != "output":
            raise BadGraph(f"a site is an input or an output, not {_short(io)}")
        return Site(self._module(module), io, self._leaf(leaf), self._step(step))

    def _leaf(self, leaf: object) -> LeafPath:
        if type(leaf) is not tuple or len(leaf) > self._limits.leaf_parts:
            raise BadGraph(f"a leaf is a list of at most {self._limits.leaf_parts} parts")
        for part in leaf:
            if type(part) is int:
                self._number(part, 256, "a leaf's place")
            else:
                self._name(part)
        return leaf

    def _text(self, value: object, what: str) -> str:
        if type(value) is not str or len(value) > self._limits.text_chars:
            raise BadGraph(
                f"{what} is text of at most {self._limits.text_chars} characters, "
                f"not {_short(value)}"
            )
        return value

    def _module(self, value: object) -> str:
        text = self._text(value, "a module's path")
        if not _MODULE.fullmatch(text):
            raise BadGraph(f"{_short(text)} is no module's path; names with dots are wanted")
        return text

    def _name(self, value: object) -> str:
        text = self._text(value, "a name")
        if not _NAME.fullmatch(text):
            raise BadGraph(f"{_short(text)} is no name; letters, digits and _ are wanted")
        return text

    def _number(self, value: object, limit: int, what: str) -> int:
        if type(value) is not int or not 0 <= value < limit:
            raise BadGraph(f"{what} is {_short(value)}; an int from 0 to {limit - 1} is wanted")
        return value

    def _invoke(self, value: object) -> int:
        return self._number(value, self._limits.invokes, "an invoke")

    def _step(self, value: object) -> int:
        return self._number(value, self._limits.steps, "a step")

    def _ref(self, value: object, allow_groups: bool = False) -> Ref:
        found = self._known.get(value) if type(value) is int else None
        if found is not None and found.node < self._current:
            return found
        if type(value) is not int or value not in self._groups:
            raise BadGraph(f"a ref to {_short(value)}, which is no value of an earlier node")
        if not allow_groups:
            raise BadGraph(
                f"a ref to node {value}, which has several outputs; pick takes one of them"
            )
        return Ref(NodeId(value))

    def _args(self, args: object, *, allow_groups: bool = False) -> tuple[Arg, ...]:
        if type(args) is not tuple or len(args) > self._limits.node_args:
            raise BadGraph(f"arguments are a list of at most {self._limits.node_args}")
        return self._each(args, 1, allow_groups)

    def _each(self, args: tuple[object, ...], depth: int, allow_groups: bool) -> tuple[Arg, ...]:
        found: list[Arg] = []
        for arg in args:
            if type(arg) is tuple:
                found.append(self._tagged(arg, depth, allow_groups))
            elif type(arg) is int:
                if not INT_MIN <= arg <= INT_MAX:
                    raise BadGraph("an int beyond 64 bits")
                found.append(arg)
            elif arg is None or type(arg) is float or type(arg) is bool:
                found.append(arg)
            elif type(arg) is str:
                found.append(self._text(arg, "a word"))
            else:
                raise BadGraph(f"an argument is {_short(arg)}")
        return tuple(found)

    def _tagged(self, items: tuple[object, ...], depth: int, allow_groups: bool) -> Arg:
        if depth > self._limits.nesting or not items:
            raise BadGraph(f"arguments are nested deeper than {self._limits.nesting}, or untagged")
        tag = items[0]
        if type(tag) is not int or not _REF <= tag <= _DTYPE:
            raise BadGraph(f"an argument's tag is {_short(tag)}")
        if tag == _LIST:
            if len(items) > self._limits.list_items + 1:
                raise BadGraph(f"a list has more than the {self._limits.list_items} items allowed")
            return self._each(items[1:], depth + 1, allow_groups)
        if len(items) != 2:
            raise BadGraph("a ref or a dtype has one part")
        if tag == _REF:
            return self._ref(items[1], allow_groups)
        return DType.from_name(items[1])

    def _check_pick(self, args: tuple[Arg, ...]) -> None:
        group, index = args
        spec = self._groups.get(group.node) if isinstance(group, Ref) else None
        if spec is None:
            raise BadGraph("pick takes a part of a node with several outputs in the same graph")
        self._number(index, spec.outputs, f"the part of {spec.name}")


def _unknown_kind(kind: object) -> BadGraph | NotYet:
    if type(kind) is int and kind in _LATER:
        return NotYet(f"{_LATER[kind]} nodes are not run by this release")
    return BadGraph(f"a node's kind is {_short(kind)}")


_DECODERS: Final[Mapping[int, tuple[int, Callable[..., Node]]]] = {
    _READ: (5, _Decoder.read),
    _WRITE: (7, _Decoder.write),
    _SKIP: (4, _Decoder.skip),
    _OP: (2, _Decoder.op),
    _CALL: (2, _Decoder.call),
    _PARAM: (2, _Decoder.param),
    _CONST: (3, _Decoder.const),
    _SAVE: (2, _Decoder.save),
}
