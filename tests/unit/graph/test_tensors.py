"""Headers and elements: exactly as long as they say, or refused."""

from __future__ import annotations

import contextlib
import hashlib
import math

import msgpack
import pytest
from hostile import attack, fuzzed, like
from hypothesis import given
from hypothesis import strategies as st

from glasshive.graph.dtypes import DType
from glasshive.graph.errors import BadTensor
from glasshive.graph.tensors import (
    MAX_RANK,
    MAX_TENSOR_BYTES,
    TensorSpec,
    check_elements,
    check_spec,
    decode_header,
    digest,
    encode_header,
)

SHAPES = st.lists(st.integers(0, 40), max_size=5).map(tuple)
SPECS = st.builds(TensorSpec, st.sampled_from(DType), SHAPES)


@given(SPECS)
def test_headers_there_and_back(spec: TensorSpec) -> None:
    assert decode_header(encode_header(spec)) == spec


def test_sizes_are_those_of_the_dtypes() -> None:
    sizes = {dtype.value: TensorSpec(dtype, (3, 2)).nbytes for dtype in DType}
    assert sizes == {
        "float64": 48, "float32": 24, "float16": 12, "bfloat16": 12, "int64": 48, "int32": 24,
        "int16": 12, "int8": 6, "uint8": 6, "bool": 6, "complex64": 48,
    }  # fmt: skip
    assert TensorSpec(DType.FLOAT32, ()).numel == 1
    assert TensorSpec(DType.FLOAT32, (4, 0)).nbytes == 0
    assert str(TensorSpec(DType.BFLOAT16, (2, 5))) == "bfloat16[2, 5]"


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


GOOD = [encode_header(TensorSpec(DType.FLOAT32, (2, 300, 70_000))), b"\x92\xa4int8\x90"]


def read(data: bytes) -> None:
    assert encode_header(decode_header(data)) == data


def test_a_damaged_header_is_a_header_or_bad() -> None:
    assert attack(read, GOOD, BadTensor) > 1000


@fuzzed
@given(like(*GOOD))
def test_any_bytes_are_a_header_or_bad(data: bytes) -> None:
    with contextlib.suppress(BadTensor):
        read(data)


def test_the_caps_are_exact() -> None:
    assert check_spec("int8", (1,) * MAX_RANK).numel == 1
    assert check_spec("int8", (MAX_TENSOR_BYTES,)).nbytes == MAX_TENSOR_BYTES
    with pytest.raises(BadTensor, match="bytes that are allowed"):
        check_spec("int8", (MAX_TENSOR_BYTES + 1,))
    with pytest.raises(BadTensor, match="bytes that are allowed"):
        check_spec("float32", (26,), max_bytes=100)
    assert check_spec("float32", (25,), max_bytes=100).nbytes == 100


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


def test_a_digest_is_of_header_and_elements() -> None:
    spec = TensorSpec(DType.FLOAT32, (2,))
    header = b"\x92\xa7float32\x91\x02"
    assert digest(spec, b"abcdefgh") == hashlib.sha256(header + b"abcdefgh").digest()
    assert digest(TensorSpec(DType.INT32, (2,)), b"abcdefgh") != digest(spec, b"abcdefgh")
    assert digest(TensorSpec(DType.FLOAT32, (1, 2)), b"abcdefgh") != digest(spec, b"abcdefgh")
    with pytest.raises(BadTensor):
        digest(spec, b"abc")
