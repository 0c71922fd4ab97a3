"""Calls whose lowering depends on the numbers in the user's own tensors.

A recipe depends on layouts only, so these calls are rewritten first: a plain 0-dim tensor becomes a
number, a plain mask the indices of what is true; and plain indices are checked against the size of
their axis, since on a peer they would fail far from the user's line.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeAlias

import torch

from glasshive.client.errors import DataDependent, Misfit
from glasshive.client.source_lines import here
from glasshive.client.values_only import without_vectors

Args: TypeAlias = "Sequence[Any]"
Kwargs: TypeAlias = "Mapping[str, Any]"
Call: TypeAlias = "tuple[Any, Args, Kwargs]"
IsTraced: TypeAlias = "Callable[[Any], bool]"
_aten: Final = torch.ops.aten


def _number(value: Any, is_traced: IsTraced) -> Any:
    """A plain 0-dim tensor as a number; anything else as None."""
    if (
        isinstance(value, torch.Tensor)
        and not is_traced(value)
        and value.dim() == 0
        and not value.dtype.is_complex
        and value.device.type != "meta"
    ):
        return value.item()
    return None


def _fill_with(func: Any, args: Args, kwargs: Kwargs, is_traced: IsTraced) -> Call:
    """`copy_` or `fill_` of a plain number is `fill_.Scalar`."""
    destination, source = args[0], args[1] if len(args) > 1 else kwargs.get("value")
    number = _number(source, is_traced)
    if number is None:
        return func, args, kwargs
    if not destination.dtype.is_floating_point and (number != number or number in _INFINITIES):
        return func, args, kwargs  # no int is that number: torch decides what it becomes
    return _aten.fill_.Scalar, (destination, number), {}


_INFINITIES: Final = (float("inf"), float("-inf"))


def _masked_fill_with(func: Any, args: Args, kwargs: Kwargs, is_traced: IsTraced) -> Call:
    number = _number(args[2], is_traced)
    if number is None:
        return func, args, kwargs
    packet = _aten.masked_fill if func is _aten.masked_fill.Tensor else _aten.masked_fill_
    return packet.Scalar, (args[0], args[1], number), {}


def _tolerances(func: Any, args: Args, kwargs: Kwargs, is_traced: IsTraced) -> Call:
    atol, rtol = _number(kwargs.get("atol"), is_traced), _number(kwargs.get("rtol"), is_traced)
    for name, number in (("atol", atol), ("rtol", rtol)):
        if number is None and kwargs.get(name) is not None:
            return func, args, kwargs
    rest = {name: value for name, value in kwargs.items() if name == "hermitian"}
    return _aten.linalg_pinv.atol_rtol_float, args, {"atol": atol, "rtol": rtol, **rest}


def _indices(func: Any, args: Args, kwargs: Kwargs, is_traced: IsTraced) -> Call:
    """Plain masks become the indices of what is true; plain indices are checked."""
    whole, indices, *rest = args
    flat: list[Any] = []
    for index in indices:
        plain = isinstance(index, torch.Tensor) and not is_traced(index)
        dim = len(flat)
        if index is not None and index.dtype in (torch.bool, torch.uint8):
            if plain:
                flat.extend(_of_mask(whole, dim, index))
                continue
            if func is _aten.index.Tensor or func is _aten._unsafe_index.Tensor:
                raise DataDependent(
                    "indexing by a traced mask has as many elements as are true, which is not "
                    "known before the model runs; use torch.where(mask, h, 0), h * mask, or "
                    "h.masked_fill",
                    line=here(),
                )
        if plain and index.numel() and dim < whole.dim():
            _check_bounds(whole, dim, index)
        flat.append(index)
    return func, (whole, flat, *rest), kwargs


def _of_mask(whole: torch.Tensor, dim: int, mask: torch.Tensor) -> Sequence[torch.Tensor]:
    axes = list(whole.shape[dim : dim + mask.dim()])
    if list(mask.shape) != axes:
        raise Misfit(
            f"a mask of shape {list(mask.shape)} does not fit the axes {axes} that it indexes",
            line=here(),
        )
    return mask.nonzero().unbind(1) if mask.dim() else (mask,)


def _along(func: Any, args: Args, kwargs: Kwargs, is_traced: IsTraced) -> Call:
    """Plain indices along one axis are checked, where torch itself would look at them."""
    whole, dim, index = args[:3]
    plain = isinstance(index, torch.Tensor) and not is_traced(index)
    if plain and index.numel() and whole.numel() and whole.dim():
        from_end = func in (_aten.index_fill.int_Scalar, _aten.index_fill_.int_Scalar)
        _check_bounds(whole, dim % whole.dim(), index, from_end)
    return func, args, kwargs


def _check_bounds(
    whole: torch.Tensor, dim: int, index: torch.Tensor, from_end: bool = True
) -> None:
    low, high, size = int(index.min()), int(index.max()), whole.shape[dim]
    lowest = -size if from_end else 0
    if low < lowest or high >= size:
        raise Misfit(
            f"index {low if low < lowest else high} is out of bounds for axis {dim} of size {size}",
            line=here(),
        )


NORMALISE: Final[Mapping[Any, Callable[[Any, Args, Kwargs, IsTraced], Call]]] = {
    _aten.copy_.default: _fill_with,
    _aten.fill_.Tensor: _fill_with,
    _aten.masked_fill.Tensor: _masked_fill_with,
    _aten.masked_fill_.Tensor: _masked_fill_with,
    _aten.linalg_pinv.atol_rtol_tensor: _tolerances,
    _aten._linalg_svd.default: without_vectors,
    _aten._linalg_eigh.default: without_vectors,
    _aten.index.Tensor: _indices,
    _aten.index_put.default: _indices,
    _aten.index_put_.default: _indices,
    _aten._unsafe_index.Tensor: _indices,
    _aten.index_select.default: _along,
    _aten.index_add.default: _along,
    _aten.index_add_.default: _along,
    _aten.index_copy.default: _along,
    _aten.index_copy_.default: _along,
    _aten.index_fill.int_Scalar: _along,
    _aten.index_fill_.int_Scalar: _along,
    _aten.gather.default: _along,
    _aten.scatter.src: _along,
    _aten.scatter.value: _along,
    _aten.scatter_.src: _along,
    _aten.scatter_.value: _along,
    _aten.scatter_add.default: _along,
    _aten.scatter_add_.default: _along,
}
