"""T8: tensors whose headers lie: no number format, no sizes, or not the bytes that they say.

Seen failing, each alone: with the look at each size and at the product taken out of `check_spec`,
and the comparison with the shortest writing out of `decode_header`; with the comparison of lengths
taken out of `check_elements` and of `receive_bytes`; with that of what was announced taken out of
`Host._take_consts` and `Host._take_inputs`, that of the vocabulary out of the latter, and that of
the hash out of `_constant`. The rank is bounded twice: it failed with both bounds taken out.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import msgpack
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tenants import BLOCK, IDS, SAVED, Tenants, heard, name_of

from glasshive.dht.messages import (
    Accepted,
    Constant,
    Failed,
    Input,
    More,
    Need,
    Run,
    decode,
    encode,
)
from glasshive.graph.dtypes import DType
from glasshive.graph.errors import BadTensor
from glasshive.graph.graph import Const, Node, NodeId, Read, Ref, Save
from glasshive.graph.kernels import tensor_to_bytes
from glasshive.graph.tensors import TensorSpec, check_elements, decode_header
from glasshive.peer.served_model import ServedModel

SHAPES = st.lists(st.integers(0, 40), max_size=5).map(tuple)
SPECS = st.builds(TensorSpec, st.sampled_from(DType), SHAPES)

HEADERS: list[object] = [
    None,
    7,
    "float32",
    [],
    ["float32"],
    ["float32", [2], 0],
    ["float32", 2],
    ["float32", "2"],
    ["float32", [-1]],
    ["float32", [2.0]],
    ["float32", [True]],
    ["float32", [None]],
    ["float32", ["2"]],
    ["float32", [[2]]],
    ["float32", [1] * 17],
    ["float32", [2**40]],
    ["float32", [2**63 - 1, 2]],
    ["float32", [2**64 - 1]],
    ["float32", [0, 2**62, 2**62]],
    ["complex128", [2]],
    ["Float32", [2]],
    ["torch.float32", [2]],
    ["float32\0", [2]],
    [b"float32", [2]],
    [1, [2]],
    [None, [2]],
    {"float32": [2]},
    ["float32", {}],
    ["float32", msgpack.ExtType(1, b"")],
]


@pytest.mark.parametrize("header", HEADERS, ids=repr)
def test_bad_headers_are_refused(header: object) -> None:
    with pytest.raises(BadTensor):
        decode_header(msgpack.packb(header))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x92",
        b"\xc1",
        b"\x92\xa7float32\x91\x02\x00",  # something after it
        b"\x92\xa7float32\x91\xcc\x02",  # 2 in two bytes
        b"\x92\xd9\x07float32\x91\x02",
        b"\xdc\x00\x02\xa7float32\x91\x02",
        b"\x92\xa7\xff\xfe\xfd\xfc\xfb\xfa\xf9\x91\x02",
        b"\x91" * 2000,
        bytearray(b"\x92\xa7float32\x91\x02"),
        "float32",
    ],
    ids=repr,
)
def test_bytes_that_are_no_header_are_refused(data: bytes) -> None:
    with pytest.raises(BadTensor):
        decode_header(data)


@given(SPECS, st.integers(-3, 3))
def test_elements_are_exactly_as_long_as_the_header_says(spec: TensorSpec, off: int) -> None:
    wanted = math.prod(spec.shape) * spec.dtype.itemsize
    length = max(0, wanted + off)
    if length == wanted:
        check_elements(spec, bytes(length))
        check_elements(spec, memoryview(bytes(length)))
    else:
        with pytest.raises(BadTensor, match=f"{wanted} are wanted"):
            check_elements(spec, bytes(length))


def test_length_is_counted_in_bytes_whatever_the_view() -> None:
    doubles = memoryview(bytes(16)).cast("d")
    check_elements(TensorSpec(DType.FLOAT32, (4,)), doubles)  # type: ignore[arg-type]


# At a host --------------------------------------------------------------------------------------

VALUES = torch.tensor([1.0, 2.0, 3.0, 4.0])
BYTES = bytes(tensor_to_bytes(VALUES))
NODES: list[Node] = [
    Read(BLOCK, 0),
    Const(name_of(VALUES), DType.FLOAT32, (4,)),
    Save(Ref(NodeId(1)), "s"),
]


def frame(dtype: str, shape: list[int], body: bytes) -> list[tuple[Any, bytes]]:
    return [(encode(Constant(dtype, shape)), body)]


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("frames", "said"),
    [
        (frame("float32", [2, 2], BYTES), "a constant of float32[2, 2]; float32[4] was announced"),
        (frame("int32", [4], BYTES), "a constant of int32[4]; float32[4] was announced"),
        (frame("float16", [8], BYTES), "a constant of float16[8]; float32[4] was announced"),
        (frame("float32", [2**62], BYTES), "Constant.shape is no Shape"),
        (frame("float32", [2**40], BYTES), "a tensor's header says more than the"),
        (frame("float32", [2**40, 2**40], BYTES), "a tensor's header says more than the"),
        (frame("float32", [1] * 17, BYTES), "hape"),
        (frame("float32", [-4], BYTES), "Constant.shape is no Shape"),
        (frame("complex128", [4], BYTES), "complex128"),
        (frame("object", [4], BYTES), "object"),
        (frame("float32", [4], BYTES + b"x"), "17 bytes of a tensor so far; 16 are wanted"),
        (frame("float32", [4], b""), "0 bytes of a tensor so far; 16 are wanted"),
        (
            [*frame("float32", [4], BYTES[:8]), (encode(More()), BYTES[8:] + b"x")],
            "17 bytes of a tensor so far; 16 are wanted",
        ),
        (frame("float32", [4], bytes(16)), "hash"),
    ],
)
async def test_a_constant_that_is_not_what_it_says_is_refused(
    served: ServedModel, frames: list[tuple[Any, bytes]], said: str
) -> None:
    async with Tenants(served) as tenants:
        client = tenants.client()
        stream = await tenants.open(client)
        await stream.send(*tenants.prepare(client, NODES))
        decode((await heard(stream)).header, Need)
        for one in frames:
            await stream.send(*one)
        told = decode((await heard(stream)).header, Accepted, Failed)
        assert isinstance(told, Failed)
        assert said in told.text
        saved = await tenants.run(client, NODES, [VALUES])  # nothing of it was kept
        assert isinstance(saved, dict)
        assert torch.equal(saved["s"], VALUES)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("dtype", "shape", "ids"),
    [
        ("int64", [3, 1], IDS),
        ("int64", [1, 4], torch.zeros(1, 4, dtype=torch.int64)),
        ("int32", [1, 3], IDS.int()),
        ("float32", [1, 3], IDS.float()),
        ("int64", [1, 3], torch.tensor([[1, 2, 64]])),
        ("int64", [1, 3], torch.tensor([[1, -1, 2]])),
    ],
)
async def test_an_input_that_is_not_what_the_plan_says_is_refused(
    served: ServedModel, dtype: str, shape: list[int], ids: torch.Tensor
) -> None:
    async with Tenants(served) as tenants:
        client = tenants.client()
        stream, answer = await tenants.ask(client)
        assert isinstance(answer, Accepted)
        message = Input(0, "input_ids", dtype, shape)
        await stream.send(encode(message), tensor_to_bytes(ids))
        with contextlib.suppress(ConnectionError):
            await stream.send(encode(Run(0)))
        told = await tenants.saves(stream)
        assert isinstance(told, Failed)
        assert told.code == "WrongInput"
        assert isinstance(await tenants.run(client, SAVED), dict)
