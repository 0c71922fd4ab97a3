"""Decompositions of which only the values are asked for: `svdvals`, `eigvalsh` and what uses them.

Without vectors LAPACK runs another algorithm, which rounds differently. Torch asks for the vectors
too where it sees a traced tensor, so what it dispatches does not tell `svdvals(a)` from
`svd(a).S`. Only the function that the user called does, which torch_calls.py sees.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, Final

import torch

_asked: ContextVar[bool] = ContextVar("glasshive_values_only", default=False)

_LINALG: Final = torch.linalg
_FUNCTIONS: Final = frozenset(
    {
        _LINALG.svdvals,
        _LINALG.eigvalsh,
        _LINALG.matrix_norm,
        _LINALG.norm,
        _LINALG.cond,
        _LINALG.matrix_rank,
        torch.norm,
        torch.nuclear_norm,
        torch.Tensor.norm,
    }
)
_SVD: Final = frozenset({torch.svd, torch.Tensor.svd})


def is_values_only(func: object, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether this call of torch asks for the values of a decomposition alone."""
    if func in _SVD:
        return not kwargs.get("compute_uv", args[2] if len(args) > 2 else True)
    return func in _FUNCTIONS


@contextlib.contextmanager
def values_only() -> Iterator[None]:
    """While it is open, what torch dispatches decomposes without vectors."""
    token = _asked.set(True)
    try:
        yield
    finally:
        _asked.reset(token)


def without_vectors(
    func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], is_traced: Callable[[Any], bool]
) -> tuple[Any, Sequence[Any], Mapping[str, Any]]:
    """The dispatched `_linalg_svd` or `_linalg_eigh` as it would be on a plain tensor."""
    if not _asked.get():
        return func, args, kwargs
    names = [arg.name for arg in func._schema.arguments]
    named = {**dict(zip(names, args, strict=False)), **kwargs}
    named["compute_uv" if "compute_uv" in names else "compute_v"] = False
    return func, (named.pop("A"),), named
