"""The order in which a tensor's axes lie in memory, which copies and carried values keep.

Kernels round by layout: a product with a transposed matrix differs in its last bits from one with
the same numbers lying row by row. So that a cut changes nothing, a value that lies transposed at
the sender lies so at the receiver, too. Gaps in memory (a slice of something larger) are left out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from glasshive.dht.errors import MalformedMessage
from glasshive.graph.kernels import tensor_from_bytes
from glasshive.graph.tensors import TensorSpec


def memory_order(tensor: Tensor) -> tuple[int, ...]:
    """The axes from the outermost in memory to the innermost.

    `tensor.permute(order)` lies row by row, gaps aside. A tensor that repeats elements is to lie
    row by row itself.
    """
    axes = range(tensor.dim())
    steps = tensor.stride()
    if tensor.is_contiguous() or any(
        not step and size > 1 for step, size in zip(steps, tensor.shape, strict=True)
    ):
        return tuple(axes)
    # Axes of size 1 have steps that mean nothing; they stay among their neighbours.
    moving = sorted((i for i in axes if tensor.shape[i] > 1), key=lambda i: -steps[i])
    rest = iter(moving)
    return tuple(next(rest) if tensor.shape[i] > 1 else i for i in axes)


def copy_in_order(tensor: Tensor) -> Tensor:
    """A copy whose axes lie in memory as those of `tensor` do, without gaps."""
    if tensor.is_contiguous():
        return tensor.clone(memory_format=torch.contiguous_format)
    order = memory_order(tensor)
    return _back(tensor.permute(order).clone(memory_format=torch.contiguous_format), order)


def tensor_in_order(spec: TensorSpec, order: Sequence[int], data: bytes | bytearray) -> Tensor:
    """The tensor of `spec` whose bytes, with its axes in `order`, are `data`.

    Raises MalformedMessage for an order that is no permutation of the axes.
    """
    axes = list(range(len(spec.shape)))
    if list(order) == axes:
        return tensor_from_bytes(spec, data)
    if sorted(order) != axes:
        raise MalformedMessage(f"{list(order)[:16]} is no order of {len(spec.shape)} axes")
    lying = TensorSpec(spec.dtype, tuple(spec.shape[i] for i in order))
    return _back(tensor_from_bytes(lying, data), order)


def _back(lying: Tensor, order: Sequence[int]) -> Tensor:
    """The tensor whose axes in `order` are those of `lying`."""
    return lying.permute([list(order).index(axis) for axis in range(len(order))])
