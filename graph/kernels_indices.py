"""Kernels that pick and place by index.

On an accelerator a bad index ends the whole process: ops.py marks those that take one as `guarded`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from glasshive.graph.kernels_checks import check

_aten = torch.ops.aten


def _not_uint8(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """`indices`, none of which is uint8: torch would take it for a mask."""
    good = all(index is None or index.dtype is not torch.uint8 for index in indices)
    check(good, "an index cannot be uint8")
    return list(indices)


def _index(a: Tensor, indices: Sequence[Tensor | None]) -> Any:
    return _aten.index.Tensor(a, _not_uint8(indices))


def _index_put(a: Tensor, indices: Sequence[Tensor | None], src: Tensor, accumulate: bool) -> Any:
    return _aten.index_put.default(a, _not_uint8(indices), src, accumulate)


def _isin(a: Tensor, test: Any, invert: bool) -> Tensor:
    return torch.isin(a, test, invert=invert)


def _as_meta(a: Any) -> Tensor:
    return a if isinstance(a, Tensor) else torch.empty((), device="meta")


def _shape_searched(where: Any, a: Any, right: bool) -> Tensor:
    return torch.searchsorted(where, _as_meta(a), right=right)


def _shape_bucketed(a: Any, boundaries: Any, right: bool) -> Tensor:
    return torch.bucketize(_as_meta(a), boundaries, right=right)


BY_INDEX: Final[Mapping[str, Callable[..., Any]]] = {
    "index": _index,
    "index_put": _index_put,
    "index_select": torch.index_select,
    "index_add": lambda a, dim, index, src, alpha: torch.index_add(a, dim, index, src, alpha=alpha),
    "index_copy": torch.index_copy,
    "index_fill": torch.index_fill,
    "gather": torch.gather,
    "scatter": torch.scatter,
    "scatter_add": torch.scatter_add,
    "scatter_reduce": lambda a, dim, index, src, reduce, include_self: torch.scatter_reduce(
        a, dim, index, src, reduce, include_self=include_self
    ),
    "take": torch.take,
    "put": torch.put,
    "embedding": torch.embedding,
    "isin": _isin,
    "searchsorted": lambda ordered, a, right: torch.searchsorted(ordered, a, right=right),
    "bucketize": lambda a, boundaries, right: torch.bucketize(a, boundaries, right=right),
}


# Their shapes, where what is searched for may be a number.
SHAPES_OF_SEARCHES: Final[Mapping[str, Callable[..., Any]]] = {
    "searchsorted": _shape_searched,
    "bucketize": _shape_bucketed,
}
