"""Kernels that reduce a tensor, or run along one of its dimensions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor

from glasshive.graph.kernels_checks import check

_aten = torch.ops.aten


def _prod(a: Tensor, dim: int | None, keepdim: bool, dtype: torch.dtype | None) -> Tensor:
    if dim is None:
        check(not keepdim, "keepdim needs a dim")
        return torch.prod(a, dtype=dtype)
    return torch.prod(a, dim, keepdim, dtype=dtype)


REDUCTIONS: Final[Mapping[str, Callable[..., Any]]] = {
    "sum": lambda a, d, k, t: torch.sum(a, d, k, dtype=t),
    "mean": lambda a, d, k, t: torch.mean(a, d, k, dtype=t),
    "nansum": lambda a, d, k, t: torch.nansum(a, d or None, k, dtype=t),
    "prod": _prod,
    "all": _aten.all.dims,
    "any": _aten.any.dims,
    "amax": torch.amax,
    "amin": torch.amin,
    "logsumexp": torch.logsumexp,
    "max": torch.max,
    "min": torch.min,
    "median": torch.median,
    "nanmedian": torch.nanmedian,
    "argmax": torch.argmax,
    "argmin": torch.argmin,
    "max_dim": lambda a, dim, keepdim: tuple(torch.max(a, dim, keepdim)),
    "min_dim": lambda a, dim, keepdim: tuple(torch.min(a, dim, keepdim)),
    "median_dim": lambda a, dim, keepdim: tuple(torch.median(a, dim, keepdim)),
    "nanmedian_dim": lambda a, dim, keepdim: tuple(torch.nanmedian(a, dim, keepdim)),
    "mode": lambda a, dim, keepdim: tuple(torch.mode(a, dim, keepdim)),
    "aminmax": lambda a, dim, keepdim: tuple(torch.aminmax(a, dim=dim, keepdim=keepdim)),
    "var": lambda a, d, c, k: torch.var(a, d, correction=c, keepdim=k),
    "std": lambda a, d, c, k: torch.std(a, d, correction=c, keepdim=k),
    "var_mean": lambda a, d, c, k: tuple(torch.var_mean(a, d, correction=c, keepdim=k)),
    "std_mean": lambda a, d, c, k: tuple(torch.std_mean(a, d, correction=c, keepdim=k)),
    "vector_norm": lambda a, order, d, k, t: torch.linalg.vector_norm(a, order, d, k, dtype=t),
    "count_nonzero": torch.count_nonzero,
    "trace": torch.trace,
    "histc": lambda a, bins, low, high: torch.histc(a, bins, low, high),
}


ALONG_A_DIMENSION: Final[Mapping[str, Callable[..., Any]]] = {
    "softmax": torch.softmax,
    "log_softmax": torch.log_softmax,
    "cumsum": lambda a, dim, t: torch.cumsum(a, dim, dtype=t),
    "cumprod": lambda a, dim, t: torch.cumprod(a, dim, dtype=t),
    "logcumsumexp": torch.logcumsumexp,
    "cummax": lambda a, dim: tuple(torch.cummax(a, dim)),
    "cummin": lambda a, dim: tuple(torch.cummin(a, dim)),
    "sort": lambda a, dim, descending, stable: tuple(
        torch.sort(a, dim=dim, descending=descending, stable=stable)
    ),
    "topk": lambda a, k, dim, largest, in_order: tuple(torch.topk(a, k, dim, largest, in_order)),
    "kthvalue": lambda a, k, dim, keepdim: tuple(torch.kthvalue(a, k, dim, keepdim)),
    "renorm": torch.renorm,
}
