"""Kernels of layers of networks, and of losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from glasshive.graph.kernels_checks import check

_REDUCTIONS: Final = {"none": 0, "mean": 1, "sum": 2}
_aten = torch.ops.aten


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None,
    grouped: bool,
) -> Tensor:  # fmt: skip
    check(q.dim() == k.dim() == v.dim() >= 3, "the three must have one rank of 3 or more")
    check(q.shape[:-3] == k.shape[:-3] == v.shape[:-3], "the three must have one batch")
    check(q.numel() > 0 and k.numel() > 0 and v.numel() > 0, "an attention over no elements")
    check(q.shape[-1] == k.shape[-1] and k.shape[-2] == v.shape[-2], "sizes do not match")
    heads, kept = q.shape[-3], k.shape[-3]
    check(kept == v.shape[-3] and heads % kept == 0, "heads do not match")
    check(grouped or heads == kept, "fewer heads of keys than of queries, and not grouped")
    return F.scaled_dot_product_attention(
        q, k, v, mask, 0.0, causal, scale=scale, enable_gqa=grouped
    )


def _layer_norm(
    a: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    return torch.native_layer_norm(a, shape, weight, bias, eps)[0]


def _group_norm(
    a: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    check(groups > 0, "groups must be 1 or more")
    return torch.group_norm(a, groups, weight, bias, eps)


def _batch_norm(
    a: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> Tensor:
    return torch.batch_norm(a, weight, bias, mean, var, False, 0.0, eps, False)


def _convolution(
    a: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], transposed: bool, output_padding: Sequence[int], groups: int,
) -> Tensor:  # fmt: skip
    outer = output_padding or (0,) * len(stride)
    return torch.convolution(a, weight, bias, stride, padding, dilation, transposed, outer, groups)


def _alike(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both at one shape. Some losses write into a result of the wrong shape or dtype otherwise."""
    check(a.dtype == b.dtype, "the two must have one dtype")
    shape: torch.Size = torch.broadcast_shapes(a.shape, b.shape)  # type: ignore[no-untyped-call]
    return a.expand(shape), b.expand(shape)


def _binary_cross_entropy(a: Tensor, target: Tensor, weight: Tensor | None, reduction: str) -> Any:
    check(a.shape == target.shape and a.dtype == target.dtype, "the two must be alike")
    if weight is not None:
        check(weight.dtype == a.dtype, "the weights must have the dtype of the rest")
        weight = weight.expand(a.shape)
    return _aten.binary_cross_entropy.default(a, target, weight, _REDUCTIONS[reduction])


def _nll_loss(
    a: Tensor, target: Tensor, weight: Tensor | None, reduction: str, ignore_index: int
) -> Tensor:
    return F.nll_loss(a, target, weight, ignore_index=ignore_index, reduction=reduction)


LAYERS: Final[Mapping[str, Callable[..., Any]]] = {
    "sdpa": _sdpa,
    "layer_norm": _layer_norm,
    "rms_norm": torch.rms_norm,
    "group_norm": _group_norm,
    "batch_norm": _batch_norm,
    "convolution": _convolution,
}


LOSSES: Final[Mapping[str, Callable[..., Any]]] = {
    "mse_loss": lambda a, b, r: _aten.mse_loss(*_alike(a, b), _REDUCTIONS[r]),
    "soft_margin_loss": lambda a, b, r: _aten.soft_margin_loss(*_alike(a, b), _REDUCTIONS[r]),
    "huber_loss": lambda a, b, r, d: _aten.huber_loss(*_alike(a, b), _REDUCTIONS[r], d),
    "smooth_l1_loss": lambda a, b, r, d: _aten.smooth_l1_loss(*_alike(a, b), _REDUCTIONS[r], d),
    "nll_loss": _nll_loss,
    "binary_cross_entropy": _binary_cross_entropy,
    "binary_cross_entropy_with_logits": lambda a, b, weight, positive, r: (
        _aten.binary_cross_entropy_with_logits.default(a, b, weight, positive, _REDUCTIONS[r])
    ),
}
