"""What torch does not check itself on every device, checked before it is called.

A bad index on an accelerator ends the whole process, other tenants' traces included. Inside
`GuardedOps` every call of torch that would do so is refused first, whoever makes it: an op of the
graph (those that ops.py marks `guarded`), or a module's own embedding that was given a value from
the graph. On the CPU torch refuses by itself, and nothing of this is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# An index, and what it must lie in: from the first number to before the second.
_Bounded: TypeAlias = tuple[Tensor, int, int]

_aten = torch.ops.aten


def check(good: bool, reason: str) -> None:
    """Raise ValueError, which run_op and infer turn into ShapeMismatch, unless `good`."""
    if not good:
        raise ValueError(reason)


def ends_process(device: torch.device | str) -> bool:
    """Whether a bad index ends the process on this device, or reads memory beside the tensor."""
    return torch.device(device).type not in ("cpu", "meta")


class GuardedOps(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A context in which torch refuses what would end an accelerator's process, by a ValueError.

    Costs one synchronisation for each call of torch that takes indices.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(  # type: ignore[no-untyped-def]
        self, func, types, args=(), kwargs=None
    ):
        guard = _GUARDS.get(func.overloadpacket)
        if guard is not None:
            guard(*args)
        return func(*args, **(kwargs or {}))


def guard(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run`, inside `GuardedOps`."""

    def guarded(*args: Any, **kwargs: Any) -> Any:
        with GuardedOps():
            return run(*args, **kwargs)

    return guarded


def _refuse_outside(bounded: Iterable[_Bounded]) -> None:
    """One synchronisation for all of them; only what is refused costs more."""
    taken = [(index, low, high) for index, low, high in bounded if index.numel()]
    outside = [((index < low) | (index >= high)).any() for index, low, high in taken]
    # Side by side on one device: an index may lie on the CPU and pick from another device.
    if not outside or not bool(torch.stack([one.to(outside[-1].device) for one in outside]).any()):
        return
    for index, low, high in taken:
        wrong = index[(index < low) | (index >= high)]
        if wrong.numel():
            raise ValueError(f"index {int(wrong[0])} is not in {low}..{high - 1}")


def _along(a: Tensor, dim: int, index: Tensor, *rest: Any) -> None:
    _refuse_outside([(index, 0, _size(a, dim))])


def _along_from_both_ends(a: Tensor, dim: int, index: Tensor, *rest: Any) -> None:
    _refuse_outside([(index, -_size(a, dim), _size(a, dim))])


def _anywhere(a: Tensor, index: Tensor, *rest: Any) -> None:
    _refuse_outside([(index, -a.numel(), a.numel())])


def _several(a: Tensor, indices: Iterable[Tensor | None], *rest: Any) -> None:
    def bounded() -> Iterator[_Bounded]:
        dim = 0
        for index in indices:
            if index is not None and index.dtype in (torch.bool, torch.uint8):
                dim += index.dim()  # a mask: torch looks at its shape on every device
                continue
            if index is not None and dim < a.dim():
                yield index, -a.shape[dim], a.shape[dim]
            dim += 1

    _refuse_outside(bounded())


def _rows_of(weight: Tensor, index: Tensor, *rest: Any) -> None:
    _refuse_outside([(index, 0, weight.shape[0])])


def _classes_of(
    a: Tensor, target: Tensor, weight: Any, reduction: int, ignore_index: int, *rest: Any
) -> None:
    counted = torch.where(target == ignore_index, 0, target)
    _refuse_outside([(counted, 0, _size(a, 1 if a.dim() > 1 else 0))])


def _as_many_as_masked(a: Tensor, mask: Tensor, src: Tensor) -> None:
    places = int(torch.where(mask, torch.ones_like(a, dtype=torch.int64), 0).sum())
    check(places <= src.numel(), f"{places} places are masked, but {src.numel()} values given")


def _probabilities(a: Tensor, *rest: Any) -> None:
    check(bool(((a >= 0) & (a <= 1)).all()), "probabilities must be in 0..1")


def _size(a: Tensor, dim: int) -> int:
    """The size of a dimension; a tensor without dimensions counts as one of size 1."""
    return a.shape[dim] if a.dim() else 1


# By what torch calls them, in every overload, so that the models' own code is seen, too.
_GUARDS: Final[Mapping[Any, Callable[..., None]]] = {
    _aten.embedding: _rows_of,
    _aten.embedding_renorm_: _rows_of,
    _aten._embedding_bag: _rows_of,
    _aten._embedding_bag_forward_only: _rows_of,
    _aten.index: _several,
    _aten._unsafe_index: _several,
    _aten.index_put: _several,
    _aten.index_put_: _several,
    _aten._index_put_impl_: _several,
    _aten._unsafe_index_put: _several,
    _aten.index_select: _along,
    _aten.index_add: _along,
    _aten.index_add_: _along,
    _aten.index_copy: _along,
    _aten.index_copy_: _along,
    _aten.index_reduce: _along,
    _aten.index_reduce_: _along,
    _aten.index_fill: _along_from_both_ends,
    _aten.index_fill_: _along_from_both_ends,
    _aten.gather: _along,
    _aten.scatter: _along,
    _aten.scatter_: _along,
    _aten.scatter_add: _along,
    _aten.scatter_add_: _along,
    _aten.scatter_reduce: _along,
    _aten.scatter_reduce_: _along,
    _aten.take: _anywhere,
    _aten.put: _anywhere,
    _aten.put_: _anywhere,
    _aten.nll_loss_forward: _classes_of,
    _aten.nll_loss2d_forward: _classes_of,
    _aten.masked_scatter: _as_many_as_masked,
    _aten.masked_scatter_: _as_many_as_masked,
    _aten.binary_cross_entropy: _probabilities,
}
