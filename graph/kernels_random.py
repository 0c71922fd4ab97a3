"""Kernels that draw random numbers.

They are drawn on the CPU from the node's own seed and then moved, so that every peer draws the same
ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor

from glasshive.graph.kernels_checks import check


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _fresh(a: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Memory to draw into, row by row whatever the strides of `a`. Never given out undrawn."""
    return torch.empty(a.shape, dtype=dtype or a.dtype)


def _rand_like(a: Tensor, dtype: torch.dtype | None, seed: int) -> Tensor:
    return _fresh(a, dtype).uniform_(generator=_generator(seed)).to(a.device)


def _randn_like(a: Tensor, dtype: torch.dtype | None, seed: int) -> Tensor:
    return _fresh(a, dtype).normal_(generator=_generator(seed)).to(a.device)


def _randint_like(a: Tensor, low: int, high: int, dtype: torch.dtype | None, seed: int) -> Tensor:
    return _fresh(a, dtype).random_(low, high, generator=_generator(seed)).to(a.device)


def _bernoulli(a: Tensor, p: float | None, seed: int) -> Tensor:
    if p is None:
        return torch.bernoulli(a.cpu().contiguous(), generator=_generator(seed)).to(a.device)
    return _fresh(a, None).bernoulli_(p, generator=_generator(seed)).to(a.device)


def _multinomial(a: Tensor, samples: int, replacement: bool, seed: int) -> Tensor:
    weights = a.cpu().contiguous()
    return torch.multinomial(weights, samples, replacement, generator=_generator(seed)).to(a.device)


def _normal(a: Tensor, mean: float, std: float, seed: int) -> Tensor:
    return _fresh(a, None).normal_(mean, std, generator=_generator(seed)).to(a.device)


def _uniform(a: Tensor, low: float, high: float, seed: int) -> Tensor:
    return _fresh(a, None).uniform_(low, high, generator=_generator(seed)).to(a.device)


def _exponential(a: Tensor, rate: float, seed: int) -> Tensor:
    return _fresh(a, None).exponential_(rate, generator=_generator(seed)).to(a.device)


def _dropout(a: Tensor, p: float, seed: int) -> Tensor:
    check(0.0 <= p < 1.0, "p must be in 0..1, without 1")
    kept = _fresh(a, None).bernoulli_(1.0 - p, generator=_generator(seed)).div_(1.0 - p)
    return a * kept.to(a.device)


def _shape_drawn(a: Tensor, *args: Any) -> Tensor:
    dtype = next((arg for arg in args if isinstance(arg, torch.dtype)), None)
    return torch.empty(a.shape, dtype=dtype or a.dtype, device="meta")


def _shape_multinomial(a: Tensor, samples: int, replacement: bool, seed: int) -> Tensor:
    return torch.multinomial(a, samples, replacement)


DRAWS: Final[Mapping[str, Callable[..., Any]]] = {
    "rand_like": _rand_like,
    "randn_like": _randn_like,
    "randint_like": _randint_like,
    "bernoulli": _bernoulli,
    "multinomial": _multinomial,
    "normal": _normal,
    "uniform": _uniform,
    "exponential": _exponential,
    "dropout": _dropout,
}


# Their shapes, where torch's meta device would have to draw.
SHAPES_OF_DRAWS: Final[Mapping[str, Callable[..., Any]]] = {
    "rand_like": _shape_drawn,
    "randn_like": _shape_drawn,
    "randint_like": _shape_drawn,
    "bernoulli": _shape_drawn,
    "normal": _shape_drawn,
    "uniform": _shape_drawn,
    "exponential": _shape_drawn,
    "dropout": _shape_drawn,
    "multinomial": _shape_multinomial,
}
