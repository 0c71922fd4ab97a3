"""Tensors as bytes: a header (dtype and shape) and the elements, little-endian, row by row.

The elements must be exactly as long as the header says, which is checked in Python's unbounded
integers before anyone allocates. Nothing here knows a tensor library.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Final, TypeAlias

import msgpack

from glasshive.graph.dtypes import DType
from glasshive.graph.errors import BadTensor

Bytes: TypeAlias = bytes | bytearray | memoryview

MAX_RANK: Final = 16
MAX_HEADER_BYTES: Final = 256
MAX_TENSOR_BYTES: Final = 2**40


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What is known of a tensor without its elements."""

    dtype: DType
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The bytes of the elements, however the tensor is stored."""
        return self.numel * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.dtype.value}[{', '.join(map(str, self.shape))}]"


# The result of an op: one tensor, or the group that an op of several outputs gives.
Specs: TypeAlias = "TensorSpec | tuple[TensorSpec, ...]"
# An argument of a node with the specs of values in place of the refs to them.
SpecArg: TypeAlias = "TensorSpec | DType | int | float | bool | str | tuple[SpecArg, ...] | None"


def check_spec(dtype: object, shape: object, max_bytes: int = MAX_TENSOR_BYTES) -> TensorSpec:
    """The spec with these parts, if they are a closed dtype's name and a tuple of sizes.

    Raises BadTensor. A shape with a zero in it is as large as if that were a one: no library has
    to multiply sizes that overflow.
    """
    known = DType.from_name(dtype)
    if type(shape) is not tuple or len(shape) > MAX_RANK:
        got = f"{len(shape)} sizes" if type(shape) is tuple else type(shape).__name__
        raise BadTensor(f"a shape is {got}, but a list of at most {MAX_RANK} sizes is wanted")
    if not all(type(size) is int and size >= 0 for size in shape):
        raise BadTensor("a shape holds something that is no size; ints of 0 or more are wanted")
    if math.prod(max(size, 1) for size in shape) * known.itemsize > max_bytes:
        raise BadTensor(f"a tensor's header says more than the {max_bytes} bytes that are allowed")
    return TensorSpec(known, shape)


def encode_header(spec: TensorSpec) -> bytes:
    """The header of a tensor: a msgpack array of the dtype's name and the sizes."""
    return bytes(msgpack.packb((spec.dtype.value, spec.shape)))


def decode_header(data: bytes, max_bytes: int = MAX_TENSOR_BYTES) -> TensorSpec:
    """The spec in a header. Raises BadTensor for anything that `encode_header` does not give."""
    if type(data) is not bytes or len(data) > MAX_HEADER_BYTES:
        raise BadTensor(f"a tensor's header is at most {MAX_HEADER_BYTES} bytes")
    try:
        parts = msgpack.unpackb(
            data,
            use_list=False,
            max_array_len=MAX_RANK,
            max_str_len=16,
            max_bin_len=0,
            max_map_len=0,
            max_ext_len=0,
        )
    except (ValueError, msgpack.UnpackException):
        raise BadTensor("a tensor's header is not what `encode_header` gives") from None
    if type(parts) is not tuple or len(parts) != 2:
        raise BadTensor("a tensor's header is a list of a dtype and a shape")
    spec = check_spec(parts[0], parts[1], max_bytes)
    if encode_header(spec) != data:
        raise BadTensor("a tensor's header is not written in the shortest way")
    return spec


def check_elements(spec: TensorSpec, elements: Bytes) -> None:
    """Return if `elements` are as long as `spec` says. Raises BadTensor if not."""
    got_bytes = memoryview(elements).nbytes
    if got_bytes != spec.nbytes:
        raise BadTensor(f"{spec} has {got_bytes} bytes of elements, but {spec.nbytes} are wanted")


def digest(spec: TensorSpec, elements: Bytes) -> bytes:
    """SHA-256 of header and elements: the name of a constant. Raises BadTensor."""
    check_elements(spec, elements)
    hasher = hashlib.sha256(encode_header(spec))
    hasher.update(elements)
    return hasher.digest()
