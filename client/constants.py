"""The user's own tensors that meet traced values: snapshots, named by content.

A snapshot is taken when the tensor is used, so that a later change of the tensor is another
constant. A tensor that was seen before is compared with its snapshot, not trusted to be unchanged:
memory shared with NumPy, or written through `.data`, changes without a sign.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import torch

from glasshive.client.errors import NotInTable, OutOfSight
from glasshive.client.source_lines import here
from glasshive.graph.errors import BadTensor
from glasshive.graph.kernels import spec_of, tensor_to_bytes
from glasshive.graph.tensors import TensorSpec, digest

_Key: TypeAlias = "tuple[Any, ...]"
KEPT_BYTES: Final = 1 << 30


@dataclass(frozen=True, slots=True)
class Constant:
    """A snapshot: a contiguous CPU tensor that nobody else holds."""

    digest: bytes
    spec: TensorSpec
    tensor: torch.Tensor


class Constants:
    """Snapshots by the tensor that they were taken of. At most `kept_bytes` are remembered.

    One may serve several traces, so that the weights of a probe are hashed once.
    """

    def __init__(self, kept_bytes: int = KEPT_BYTES) -> None:
        self._kept_bytes = kept_bytes
        self._held_bytes = 0
        # The tensor is held with its snapshot, so that no other can take its address.
        self._by_tensor: dict[_Key, tuple[torch.Tensor, Constant]] = {}

    def take(self, tensor: torch.Tensor) -> Constant:
        """The snapshot of `tensor` as it is now.

        Raises OutOfSight for a tensor without plain data, NotInTable for a dtype that no graph
        holds.
        """
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise OutOfSight(
                f"a {tensor.layout} tensor cannot go into a graph; use .to_dense()", line=here()
            )
        if tensor.device.type == "meta":
            raise OutOfSight("a tensor on the meta device has no numbers to send", line=here())
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)
        known = self._by_tensor.get(key)
        if known is not None and _same_bytes(known[1].tensor, tensor):
            return known[1]
        constant = _snapshot(tensor)
        self._keep(key, tensor, constant)
        return constant

    def _keep(self, key: _Key, tensor: torch.Tensor, constant: Constant) -> None:
        before = self._by_tensor.pop(key, None)
        if before is not None:
            self._held_bytes -= before[1].spec.nbytes
        size_bytes = constant.spec.nbytes
        if size_bytes > self._kept_bytes:
            return
        while self._held_bytes + size_bytes > self._kept_bytes:
            _, oldest = self._by_tensor.pop(next(iter(self._by_tensor)))
            self._held_bytes -= oldest.spec.nbytes
        self._held_bytes += size_bytes
        self._by_tensor[key] = tensor.detach(), constant


def _same_bytes(snapshot: torch.Tensor, tensor: torch.Tensor) -> bool:
    now = tensor.detach()
    if now.is_conj() or now.is_neg():
        return False
    if now.device.type != "cpu":
        now = now.cpu()
    # Compared as integers: nan is unequal to itself, and 0.0 equals -0.0.
    kind = _INTEGERS.get(now.dtype)
    if kind is None:
        return torch.equal(torch.view_as_real(snapshot).view(torch.int32), _real_bits(now))
    return torch.equal(snapshot.view(kind), now.view(kind))


def _real_bits(value: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(value).view(torch.int32)


_INTEGERS: Final = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.int64: torch.int64,
    torch.int32: torch.int32,
    torch.int16: torch.int16,
    torch.int8: torch.int8,
    torch.uint8: torch.uint8,
    torch.bool: torch.bool,
}


def _snapshot(tensor: torch.Tensor) -> Constant:
    try:
        spec = spec_of(tensor)
    except BadTensor as error:
        raise NotInTable(str(error), line=here()) from None
    plain = tensor.detach().resolve_conj().resolve_neg()
    copied = torch.empty(plain.shape, dtype=plain.dtype)
    copied.copy_(plain)
    return Constant(digest(spec, tensor_to_bytes(copied)), spec, copied)
