"""A peer's part of a plan as bytes: msgpack arrays under a version number (see codec.py).

`[version, index, [start, end], stages, passes, specs, sampling, outlives peers, graph]`, where a
stage is `[pass, nodes, imports, exports, from_hidden, forward, stop event or -1]`, passes `[seq,
padded, new tokens, chunk tokens, [[invoke, first row, last row], ...]]` for a prompt and the steps
behind it (0 new tokens: a trace; 0 chunk tokens: a whole prompt), a spec `[value, dtype, shape]`
and sampling a list of its fields, or empty.
The stages, specs and nodes of a generation are folded (repeats.py): equal steps are sent once.
Whether the part makes sense is `check_part`'s business (plan.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import msgpack

from glasshive.graph.codec import GraphLimits, decode_graph, encode_graph
from glasshive.graph.errors import BadGraph
from glasshive.graph.graph import NodeId
from glasshive.graph.msgpack_scan import scan
from glasshive.graph.order import Pass, Passes, before_last_chunk, steps_of
from glasshive.graph.plan import Part, Span, Stage
from glasshive.graph.repeats import fold, unfold
from glasshive.graph.sampling import MAX_ELEMENTS, Sampling
from glasshive.graph.tensors import MAX_RANK, TensorSpec, check_spec

VERSION: Final = 6
MAX_PASSES: Final = 4096
MAX_ROWS: Final = 16_384
MAX_TOKENS: Final = 1 << 24
MAX_NAME_CHARS: Final = 16  # only names of dtypes are text here
_FRAME_SLACK: Final = 4  # a part lists each node at most about four times besides the graph
_NODE_ELEMENTS: Final = 16  # what these lists hold of a node, in all
_ELEMENT_BYTES: Final = 9  # at most, of a number
_DEPTH: Final = 4  # the stages, a stage, its imports, a pair


def encode_part(part: Part, passes: Passes) -> bytes:
    """The bytes of one peer's part, with the passes of the whole trace."""
    folded = passes.are_generation
    stages: list[Any] = [
        [
            stage.pass_index,
            list(stage.nodes),
            [list(pair) for pair in stage.imports],
            [list(pair) for pair in stage.exports],
            [list(pair) for pair in stage.from_hidden],
            stage.forward,
            -1 if stage.stop_event is None else stage.stop_event,
        ]
        for stage in part.stages
    ]
    rows = [
        [
            one.past + one.seq,
            one.padded,
            passes.new_tokens(index),
            passes.chunk_tokens(index),
            [[i, first, last] for i, (first, last) in zip(one.invokes, one.rows, strict=True)],
        ]
        for index, one in enumerate(passes.passes)
        if not one.step
    ]
    span = [part.span.start, part.span.end]
    specs: list[Any] = [[i, spec.dtype.value, list(spec.shape)] for i, spec in part.specs.items()]
    if folded:
        stages, specs = fold(stages), fold(specs)
    sampling = [] if part.sampling is None else part.sampling.to_plain()
    packed: bytes = msgpack.packb(
        [
            *(VERSION, part.index, span, stages, rows, specs, sampling),
            *(part.outlives_peers, encode_graph(part.graph, folded=folded)),
        ],
        use_bin_type=True,
    )
    return packed


def decode_part(data: bytes | bytearray, limits: GraphLimits) -> tuple[Part, Passes]:
    """The part in `data` and the passes of its trace. Raises BadGraph, UnknownOp or NotYet only."""
    if len(data) > _FRAME_SLACK * limits.graph_bytes:
        raise BadGraph(
            f"a part of {len(data)} bytes; at most {_FRAME_SLACK * limits.graph_bytes} are allowed"
        )
    version, index, span, stages, rows, specs, sampling, outlives, graph = _fields(data)
    if type(number := _made(version, 1, limits)) is not int or number != VERSION:
        raise BadGraph("a part of another version; update glasshive on the older side")
    if not isinstance(outlives_peers := _made(outlives, 1, limits), bool):
        raise BadGraph("a part that does not say whether it outlives its peers")
    packed = _made(graph, 1, limits)
    if not isinstance(packed, bytes):
        raise BadGraph("a part without a graph")
    start, end = _array(_made(span, 3, limits), 2, "a span")
    # The graph comes first: how many nodes it has says how much the lists about them may hold.
    decoded = decode_graph(packed, limits)
    about_nodes = _NODE_ELEMENTS * (len(decoded) + len(decoded.imports)) + 8 * MAX_PASSES

    def listed(field: bytes | bytearray, most: int, what: str) -> Iterator[Any]:
        folded = _list(_made(field, about_nodes, limits), most, what)
        return unfold(folded, most, _ELEMENT_BYTES * about_nodes)

    part = Part(
        _integer(_made(index, 1, limits), 0, MAX_ROWS),
        Span(_integer(start, 0, MAX_ROWS), _integer(end, 1, MAX_ROWS)),
        decoded,
        tuple(_stage(one, limits) for one in listed(stages, MAX_PASSES, "stages")),
        dict(map(_spec, listed(specs, limits.nodes, "specs"))),
        _sampling(_made(sampling, MAX_ELEMENTS, limits)),
        outlives_peers,
    )
    return part, _passes(_made(rows, 4 * MAX_ROWS + 6 * MAX_PASSES, limits))


def _fields(data: bytes | bytearray) -> list[bytes | bytearray]:
    """The bytes of each field of a part, of which nothing is made yet."""
    whole = msgpack.Unpacker(max_buffer_size=max(len(data), 1))  # 0 would be the largest
    whole.feed(data)
    fields = []
    try:
        if whole.read_array_header() != 9:
            raise BadGraph("a part: a list of 9 is wanted")
        for _ in range(9):
            start = whole.tell()
            whole.skip()
            fields.append(data[start : whole.tell()])
    except (ValueError, RecursionError, msgpack.UnpackException) as error:
        raise _no_part(error) from error
    if whole.tell() != len(data):
        raise BadGraph("bytes behind a part")
    return fields


def _made(field: bytes | bytearray, elements: int, limits: GraphLimits) -> Any:
    """The value of a field that holds at most so many others."""
    try:
        scan(field, _DEPTH, elements)
        return msgpack.unpackb(
            field,
            use_list=False,  # an empty tuple costs no memory, an empty list 56 bytes
            raw=False,
            strict_map_key=True,
            max_str_len=MAX_NAME_CHARS,
            max_bin_len=limits.graph_bytes,
            max_array_len=max(limits.nodes, MAX_PASSES, MAX_ROWS),
            max_map_len=0,
            max_ext_len=0,
        )
    except (ValueError, TypeError, RecursionError, MemoryError, msgpack.UnpackException) as error:
        raise _no_part(error) from error


def _no_part(error: Exception) -> BadGraph:
    return BadGraph(f"a part that is no msgpack of ours: {type(error).__name__}")


def _spec(tree: Any) -> tuple[NodeId, TensorSpec]:
    value, dtype, shape = _array(tree, 3, "a spec")
    return _node(value), check_spec(dtype, _list(shape, MAX_RANK, "a shape"))


def _stage(tree: Any, limits: GraphLimits) -> Stage:
    at, nodes, imports, exports, from_hidden, forward, stop = _array(tree, 7, "a stage")
    if not isinstance(forward, bool):
        raise BadGraph("a stage that does not say whether its blocks run")
    stop_event = _integer(stop, -1, MAX_TOKENS)
    return Stage(
        pass_index=_integer(at, -1, MAX_PASSES),
        nodes=tuple(_node(one) for one in _list(nodes, limits.nodes, "nodes")),
        imports=_pairs(imports, limits),
        exports=_pairs(exports, limits),
        from_hidden=_pairs(from_hidden, limits),
        forward=forward,
        stop_event=None if stop_event < 0 else stop_event,
    )


def _sampling(tree: Any) -> Sampling | None:
    return Sampling.from_plain(tree) if _list(tree, 32, "how tokens are chosen") else None


def _passes(tree: Any) -> Passes:
    """All passes, of which each prompt brings the steps behind it."""
    passes: list[Pass] = []
    seen: set[int] = set()
    for one in _list(tree, MAX_PASSES, "passes"):
        prompt, new_tokens, chunk_tokens = _prompt(one)
        if not seen.isdisjoint(prompt.invokes) or len(set(prompt.invokes)) < len(prompt.invokes):
            raise BadGraph("an invoke stands in two passes")
        seen.update(prompt.invokes)
        if passes and (new_tokens > 0) != (passes[0].group >= 0):
            raise BadGraph("passes of a trace beside passes of a generation")
        chunks = before_last_chunk(prompt.seq, chunk_tokens) // max(chunk_tokens, 1)
        if len(passes) + chunks + max(new_tokens, 1) > MAX_PASSES:
            raise BadGraph(f"more than {MAX_PASSES} passes")
        passes += steps_of(prompt, new_tokens, len(passes), chunk_tokens)
    return Passes(tuple(passes))


def _prompt(tree: Any) -> tuple[Pass, int, int]:
    """The pass of a prompt, how many tokens are generated behind it, and how many are a chunk."""
    seq, padded, new_tokens, chunk_tokens, rows = _array(tree, 5, "a pass")
    if not isinstance(padded, bool):
        raise BadGraph("a pass that does not say whether it is padded")
    invokes: list[int] = []
    spans: list[tuple[int, int]] = []
    expected = 0
    for one in _list(rows, MAX_ROWS, "rows"):
        invoke, first, last = _array(one, 3, "rows")
        invokes.append(_integer(invoke, 0, MAX_ROWS))
        spans.append((_integer(first, 0, MAX_ROWS), _integer(last, 1, MAX_ROWS)))
        if spans[-1][0] != expected or spans[-1][1] <= expected:
            raise BadGraph("rows of a pass that overlap or leave a gap")
        expected = spans[-1][1]
    if not invokes:
        raise BadGraph("a pass without invokes")
    prompt = Pass(tuple(invokes), _integer(seq, 1, MAX_TOKENS), padded, tuple(spans))
    new_tokens = _integer(new_tokens, 0, MAX_PASSES)
    chunk_tokens = _integer(chunk_tokens, 0, prompt.seq - 1)
    if chunk_tokens and not new_tokens:
        raise BadGraph("chunks of a prompt that nothing is generated behind")
    return prompt, new_tokens, chunk_tokens


def _pairs(tree: Any, limits: GraphLimits) -> tuple[tuple[NodeId, int], ...]:
    pairs = []
    for one in _list(tree, limits.nodes, "pairs"):
        value, other = _array(one, 2, "a pair")
        pairs.append((_node(value), _integer(other, 0, MAX_ROWS)))
    return tuple(pairs)


def _node(value: Any) -> NodeId:
    return NodeId(_integer(value, -2, 1 << 31))


def _integer(value: Any, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        raise BadGraph(f"{value!r:.40} where a whole number from {low} to {high} is wanted")
    return value


def _list(value: Any, most: int, what: str) -> tuple[Any, ...]:
    if not isinstance(value, tuple) or len(value) > most:
        raise BadGraph(f"{what}: a list of at most {most} is wanted")
    return value


def _array(value: Any, length: int, what: str) -> tuple[Any, ...]:
    if not isinstance(value, tuple) or len(value) != length:
        raise BadGraph(f"{what}: a list of {length} is wanted")
    return value
