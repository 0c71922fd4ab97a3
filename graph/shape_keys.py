"""When two ops surely give the same shapes: the key under which an answer is kept.

The key tells 1 from 1.0 from True, which give other number formats. Which number stands where a
tensor could stand changes nothing: a graph of thousands of factors, each another one, costs one
answer.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Final

from glasshive.graph.ops import OPS
from glasshive.graph.tensors import SpecArg, TensorSpec

__all__ = ["shape_key"]


def shape_key(name: str, args: tuple[SpecArg, ...]) -> Hashable:
    """Equal for two calls of ops of the table only if their results have the same specs.

    `args` are those of a checked node, with specs in place of refs.
    """
    return name, *[key(arg) for key, arg in zip(_KEYS[name], args, strict=True)]


def _exactly(arg: SpecArg) -> object:
    kind = type(arg)
    if kind is tuple:
        return tuple(map(_exactly, arg))  # type: ignore[arg-type]
    return arg if kind is TensorSpec else (kind, arg)


def _by_kind(arg: SpecArg) -> object:
    return arg if isinstance(arg, TensorSpec) else type(arg)


def _by_kind_but_ints(arg: SpecArg) -> object:
    return (int, arg) if type(arg) is int else _by_kind(arg)


# Torch refuses to fill a tensor of ints with an infinity, and a product with `alpha` over 64 bits.
_OTHERWISE: Final[Mapping[str, Callable[[SpecArg], object]]] = {
    "masked_fill": _exactly,
    **dict.fromkeys(("add", "sub", "rsub"), _by_kind_but_ints),
}
_KEYS: Final[Mapping[str, tuple[Callable[[SpecArg], object], ...]]] = {
    name: tuple(
        _OTHERWISE.get(name, _by_kind) if param.kind == "operand" else _exactly
        for param in op.params
    )
    for name, op in OPS.items()
}
