"""Headers and elements: exactly as long as they say, or refused."""

from __future__ import annotations

import contextlib
import hashlib

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


def test_a_digest_is_of_header_and_elements() -> None:
    spec = TensorSpec(DType.FLOAT32, (2,))
    header = b"\x92\xa7float32\x91\x02"
    assert digest(spec, b"abcdefgh") == hashlib.sha256(header + b"abcdefgh").digest()
    assert digest(TensorSpec(DType.INT32, (2,)), b"abcdefgh") != digest(spec, b"abcdefgh")
    assert digest(TensorSpec(DType.FLOAT32, (1, 2)), b"abcdefgh") != digest(spec, b"abcdefgh")
    with pytest.raises(BadTensor):
        digest(spec, b"abc")
