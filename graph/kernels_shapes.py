"""Kernels of views, copies and joins of tensors, and of new tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from glasshive.graph.kernels_checks import check

_aten = torch.ops.aten


def _slice(a: Tensor, dim: int, start: int, stop: int, step: int) -> Any:
    return _aten.slice.Tensor(a, dim, start, stop, step)


def _full(shape: Sequence[int], value: Any, dtype: torch.dtype, *, device: Any) -> Tensor:
    return torch.full(shape, value, dtype=dtype, device=device)


def _arange(start: Any, stop: Any, step: Any, dtype: torch.dtype, *, device: Any) -> Tensor:
    check(all(abs(v) <= 2**53 for v in (start, stop, step)), "numbers must be within 2**53")
    return torch.arange(start, stop, step, dtype=dtype, device=device)


def _linspace(start: Any, stop: Any, steps: int, dtype: torch.dtype, *, device: Any) -> Tensor:
    return torch.linspace(start, stop, steps, dtype=dtype, device=device)


def _eye(n: int, m: int, dtype: torch.dtype, *, device: Any) -> Tensor:
    return torch.eye(n, m, dtype=dtype, device=device)


def _one_hot(a: Tensor, classes: int) -> Tensor:
    check(classes > 0, "classes must be 1 or more")
    check(a.dtype is torch.int64, "indices must be int64")
    zeros = torch.zeros((*a.shape, classes), dtype=torch.int64, device=a.device)
    return zeros.scatter_(-1, a.unsqueeze(-1), 1)


def _shape_joined(tensors: Sequence[Tensor], dim: int) -> Any:
    """As torch.cat: torch's own rule is Python code that looks at each of thousands in turn."""
    joined = []
    for tensor, times in Counter(tensors).items():
        sizes = list(tensor.shape)
        if times > 1 and -tensor.dim() <= dim < tensor.dim():
            sizes[dim] *= times
        joined.append(tensor.new_empty(sizes))
    return torch.cat(joined, dim)


def _shape_stacked(tensors: Sequence[Tensor], dim: int) -> Any:
    stacked = torch.stack(list(Counter(tensors)), dim)
    sizes = list(stacked.shape)
    sizes[dim] = len(tensors)
    return stacked.new_empty(sizes)


VIEWS_AND_COPIES: Final[Mapping[str, Callable[..., Any]]] = {
    "pick": lambda group, index: group[index],
    "reshape": torch.reshape,
    "expand": lambda a, shape: a.expand(shape),
    "permute": torch.permute,
    "slice": _slice,
    "select": torch.select,
    "diagonal": torch.diagonal,
    "unfold": lambda a, dim, size, step: a.unfold(dim, size, step),
    "view_as_real": torch.view_as_real,
    "view_as_complex": torch.view_as_complex,
    "detach": torch.detach,
    "clone": torch.clone,
    "to": lambda a, dtype: a.to(dtype),
    "select_scatter": torch.select_scatter,
    "slice_scatter": torch.slice_scatter,
    "diagonal_scatter": torch.diagonal_scatter,
    "cat": torch.cat,
    "stack": torch.stack,
    "repeat": lambda a, repeats: a.repeat(repeats),
    "flip": torch.flip,
    "roll": torch.roll,
    "tril": torch.tril,
    "triu": torch.triu,
    "diag_embed": torch.diag_embed,
    "constant_pad_nd": torch.constant_pad_nd,
}

# Each has arguments that are alike as one tensor.
SHAPES_OF_JOINS: Final[Mapping[str, Callable[..., Any]]] = {
    "cat": _shape_joined,
    "stack": _shape_stacked,
}

# These take no tensor, so they are told the device.
MAKERS: Final = frozenset({"full", "arange", "linspace", "eye"})

NEW_TENSORS: Final[Mapping[str, Callable[..., Any]]] = {
    "full": _full,
    "full_like": lambda a, value, dtype: torch.full_like(a, value, dtype=dtype),
    "zeros_like": lambda a, dtype: torch.zeros_like(a, dtype=dtype),
    "ones_like": lambda a, dtype: torch.ones_like(a, dtype=dtype),
    "arange": _arange,
    "linspace": _linspace,
    "eye": _eye,
    "one_hot": _one_hot,
}
