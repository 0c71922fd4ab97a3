"""A part as bytes: what goes out comes back; anything else is refused with our error."""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace
from typing import Any

import msgpack
import pytest
from hostile import attack, fuzzed, like
from hypothesis import given
from hypothesis import strategies as st

from glasshive.graph.codec import GraphLimits
from glasshive.graph.dtypes import DType
from glasshive.graph.errors import BadGraph, GraphError
from glasshive.graph.graph import Graph, Node, NodeId, Op, Read, Ref, Save, Site, Write
from glasshive.graph.order import Pass, Passes, steps_of
from glasshive.graph.outline import Outline
from glasshive.graph.plan import HIDDEN, TOKENS, Part, Span, Stage, check_part
from glasshive.graph.plan_codec import decode_part, encode_part
from glasshive.graph.sampling import Sampling
from glasshive.graph.tensors import TensorSpec

LIMITS = GraphLimits()
PASSES = Passes((Pass((0, 2), 5, False, ((0, 1), (1, 3))), Pass((1,), 7, True, ((0, 2),))))


def sample() -> Part:
    """The middle part of a plan: an import, a read, a sum, a write and a save."""
    nodes = {
        NodeId(3): Read(Site("blocks.1.mlp", "output"), 0),
        NodeId(4): Op("add", (Ref(NodeId(3)), Ref(NodeId(1)), 1)),
        NodeId(7): Write(Site("blocks.1", "output"), 0, Ref(NodeId(4)), "set"),
        NodeId(8): Save(Ref(NodeId(4)), "s0"),
    }
    stage = Stage(
        pass_index=0,
        nodes=(NodeId(3), NodeId(4), NodeId(7), NodeId(8)),
        imports=((HIDDEN, 0), (NodeId(1), 0)),
        exports=((HIDDEN, 2), (NodeId(4), 2)),
        forward=True,
    )
    specs = {NodeId(1): TensorSpec(DType.FLOAT32, (1, 5, 4))}
    return Part(1, Span(1, 2), Graph(nodes, frozenset({NodeId(1)})), (stage,), specs)


def steps(new_tokens: int, chunk_tokens: int = 0) -> tuple[Part, Passes]:
    """The middle part of a generation: a sum at each step, which the last part gets, and a save."""
    prompt = Pass((0,), 5, False, ((0, 1),))
    passes = Passes(tuple(steps_of(prompt, new_tokens, 0, chunk_tokens)))
    nodes: dict[NodeId, Node] = {}
    before = passes.of(0)
    stages = [
        Stage(index, (), ((HIDDEN, 0),), ((HIDDEN, 2),), forward=True) for index in range(before)
    ]
    for step in range(new_tokens):
        own = tuple(NodeId(3 * step + i) for i in range(3))
        nodes[own[0]] = Read(Site("blocks.1.mlp", "output", (), step), 0)
        nodes[own[1]] = Op("add", (Ref(own[0]), 1.5, 1))
        nodes[own[2]] = Save(Ref(own[1]), f"s{step}")
        exports = ((HIDDEN, 2), (own[1], 2))
        stages.append(Stage(before + step, own, ((HIDDEN, 0),), exports, forward=True))
    return Part(1, Span(1, 2), Graph(nodes), tuple(stages), {}), passes


@pytest.mark.parametrize(
    ("part", "passes"),
    [(sample(), PASSES), steps(1), steps(40), steps(3, 2), steps(9, 1), steps(2, 4)],
)
def test_a_part_survives(outline: Outline, part: Part, passes: Passes) -> None:
    again, passes_again = decode_part(encode_part(part, passes), LIMITS)
    assert again == part
    assert passes_again == passes
    check_part(again, passes, outline)


def test_equal_steps_are_sent_once() -> None:
    sizes = {n: len(encode_part(*steps(n))) for n in (4, 40, 400)}
    assert sizes[400] - sizes[40] < 20 > sizes[40] - sizes[4]
    part, passes = steps(40)
    nodes = {**part.graph.nodes, NodeId(61): Op("mul", (Ref(NodeId(60)), 1.5))}
    other = replace(part, graph=Graph(nodes))  # at one step, something else
    assert len(encode_part(other, passes)) < 3 * sizes[40]
    assert decode_part(encode_part(other, passes), LIMITS)[0] == other


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"imports": ((HIDDEN, 0),)}, "before a value that it needs"),
        ({"imports": ((HIDDEN, 2), (NodeId(1), 0))}, "hidden states from part 2 to part 1"),
        ({"imports": ((HIDDEN, 0), (NodeId(1), 0), (NodeId(1), 0))}, "or twice"),
        ({"exports": ((NodeId(99), 2),)}, "a value that is not there"),
        ({"nodes": (NodeId(3), NodeId(3))}, "names a node twice"),
        ({"nodes": (NodeId(3), NodeId(4), NodeId(8))}, "1 nodes stand in no stage"),
        ({"pass_index": 1}, "does not happen on span"),
        ({"forward": False}, "hidden states"),
        ({"stop_event": 999}, "stop at event 999"),
    ],
)
def test_a_part_that_no_plan_holds_is_refused(
    outline: Outline, change: dict[str, object], text: str
) -> None:
    part = sample()
    stage = replace(part.stages[0], **change)  # type: ignore[arg-type]
    with pytest.raises(BadGraph, match=text):
        check_part(replace(part, stages=(stage,)), PASSES, outline)


def test_a_part_for_another_span_is_refused(outline: Outline) -> None:
    with pytest.raises(BadGraph, match="does not happen on span 2:3"):
        check_part(replace(sample(), span=Span(2, 3)), PASSES, outline)


def last_in_chunks() -> tuple[Part, Passes]:
    """The last part of a generation of two tokens, whose prompt of five is in chunks of two."""
    passes = steps(2, 2)[1]
    end = {"stop_event": 8}
    stages = [
        Stage(0, (), ((HIDDEN, 0),), forward=True, **end),
        Stage(1, (), ((HIDDEN, 0),), forward=True, **end),
        Stage(2, (), ((HIDDEN, 0),), ((TOKENS, 0),), forward=True),
        Stage(3, (), ((HIDDEN, 0),), forward=True),
    ]
    return Part(1, Span(1, 3), Graph({}), tuple(stages), {}, Sampling()), passes


def test_chunks_may_end_behind_the_last_block(outline: Outline) -> None:
    part, passes = last_in_chunks()
    last = outline.last_block_event
    stages = tuple(
        replace(one, stop_event=last) if one.stop_event is not None else one for one in part.stages
    )
    check_part(replace(part, stages=stages), passes, outline)


@pytest.mark.parametrize(
    ("at", "change", "text"),
    [
        (0, {"stop_event": 3}, "a chunk of a prompt through all blocks"),
        (2, {"stop_event": 8}, "a step of a generation runs to its end"),
        (1, {"exports": ((TOKENS, 0),)}, "tokens leave a stage that chooses none for a next one"),
        (1, {"forward": False, "imports": ()}, "a chunk of a prompt through all blocks"),
        (1, None, "step 0 of pass 2 without the one before it"),
        (0, None, "step -1 of pass 2 without the one before it"),
    ],
)
def test_chunks_that_no_plan_holds_are_refused(
    outline: Outline, at: int, change: dict[str, object] | None, text: str
) -> None:
    part, passes = last_in_chunks()
    last = {8: outline.last_block_event}
    stages = []
    for index, one in enumerate(part.stages):
        if index == at:
            if change is None:
                continue
            one = replace(one, **change)  # type: ignore[arg-type]
        stages.append(replace(one, stop_event=last.get(one.stop_event, one.stop_event)))
    with pytest.raises(BadGraph, match=text):
        check_part(replace(part, stages=tuple(stages)), passes, outline)


@pytest.mark.parametrize(
    ("chunk", "new", "text"),
    [
        (5, 2, "5 where a whole number from 0 to 4 is wanted"),
        (-1, 2, "-1 where a whole number"),
        (2, 0, "chunks of a prompt that nothing is generated behind"),
        (1, 4093, "more than 4096 passes"),
    ],
)
def test_sizes_of_chunks_that_no_prompt_has(chunk: int, new: int, text: str) -> None:
    tree = msgpack.unpackb(encode_part(*steps(2, 2)))
    seq, padded, _, _, rows = tree[4][0]
    tree[4][0] = [seq, padded, new, chunk, rows]
    with pytest.raises(BadGraph, match=text):
        decode_part(msgpack.packb(tree), LIMITS)


def test_rows_must_follow_one_another() -> None:
    gap = Passes((Pass((0,), 5, False, ((1, 2),)),))
    with pytest.raises(BadGraph, match="overlap or leave a gap"):
        decode_part(encode_part(sample(), gap), LIMITS)
    twice = Passes((Pass((0, 0), 5, False, ((0, 1), (1, 2))),))
    with pytest.raises(BadGraph, match="stands in two passes"):
        decode_part(encode_part(sample(), twice), LIMITS)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        msgpack.packb([]),
        msgpack.packb([1] * 7),
        msgpack.packb({"a": 1}),
        b"\x97" * 99,
    ],
)
def test_other_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(BadGraph):
        decode_part(data, LIMITS)


VOCABULARY = 11
CHOICE = Sampling(
    do_sample=True,
    temperature=0.5,
    suppress_tokens=(1, 2),
    bad_words_ids=((3, 4), (5,)),
    sequence_bias=(((6, 7), -1.5), ((8,), -math.inf)),
    exponential_decay_length_penalty=(3, 1.5),
    forced_eos_token_id=(9,),
    eos_token_id=(9, 10),
)


def choosing(sampling: Sampling) -> tuple[Part, Passes]:
    """The last part of a generation, which chooses its tokens so."""
    passes = steps(2)[1]
    stages = (
        Stage(0, (), ((HIDDEN, 0),), ((TOKENS, 0),), forward=True),
        Stage(1, (), ((HIDDEN, 0),), forward=True),
    )
    return Part(1, Span(1, 3), Graph({}), stages, {}, sampling), passes


def test_how_tokens_are_chosen_comes_as_it_was_sent() -> None:
    many = tuple(range(1024))
    full = Sampling(
        suppress_tokens=many,
        begin_suppress_tokens=many,
        bad_words_ids=tuple((i, 1, 2, 3) for i in many),
        sequence_bias=tuple(((i, 1, 2, 3), 0.5) for i in many),
        exponential_decay_length_penalty=(3, 1.5),
        forced_eos_token_id=many[:64],
        eos_token_id=many[:64],
    )
    for sampling in (CHOICE, full):
        sampling.check(1024)
        assert decode_part(encode_part(*choosing(sampling)), LIMITS)[0].sampling == sampling


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"suppress_tokens": (0,) * 1025}, "suppress_tokens=.* at most 1024 tokens' ids"),
        ({"suppress_tokens": (11,)}, "suppress_tokens=11 is not in the vocabulary of 11 tokens"),
        ({"forced_bos_token_id": -2}, "forced_bos_token_id=-2: a token's id is wanted"),
        ({"bad_words_ids": ((0,) * 64,) * 65}, "bad_words_ids=.* 4096 in all is wanted"),
        ({"bad_words_ids": ((),)}, "bad_words_ids=.* lists of 1 to 64 tokens' ids"),
        ({"bad_words_ids": ((9,),)}, "bad_words_ids=.* these are stop tokens"),
        ({"sequence_bias": (((1, 11), 1.0),)}, "sequence_bias=11 is not in the vocabulary"),
        ({"sequence_bias": (((1,), math.inf),)}, "sequence_bias=.* pairs"),
        ({"sequence_bias": (((1,), 1),)}, "sequence_bias=.* pairs"),
        ({"sequence_bias": ((1, 1.0),)}, "sequence_bias=.* pairs"),
        ({"exponential_decay_length_penalty": (1.0, 2.0)}, "a pair of after how many new tokens"),
        ({"eos_token_id": ()}, "exponential_decay_length_penalty without eos_token_id"),
        ({"renormalize_logits": 1}, "renormalize_logits=1: True or False is wanted"),
        ({"encoder_no_repeat_ngram_size": 65}, "a whole number from 0 to 64"),
    ],
    ids=str,
)
def test_choices_that_transformers_would_not_take_are_refused(
    change: dict[str, Any], text: str
) -> None:
    with pytest.raises(BadGraph, match=text):
        replace(CHOICE, **change).check(VOCABULARY)


PARTS = [
    *(encode_part(sample(), PASSES), encode_part(*steps(9)), encode_part(*steps(3, 2))),
    encode_part(*choosing(CHOICE)),
]


def test_damaged_parts_are_refused_or_checked(outline: Outline) -> None:
    def read(data: bytes) -> None:
        part, passes = decode_part(data, LIMITS)
        check_part(part, passes, outline)
        if part.sampling is not None:
            part.sampling.check(VOCABULARY)

    attack(read, PARTS, GraphError)


@fuzzed
@given(st.one_of(*map(like, PARTS)))
def test_any_bytes_are_a_part_or_refused(outline: Outline, data: bytes) -> None:
    with contextlib.suppress(GraphError):
        part, passes = decode_part(data, LIMITS)
        check_part(part, passes, outline)
        if part.sampling is not None:
            part.sampling.check(VOCABULARY)
