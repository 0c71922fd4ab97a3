"""Tensors in what a module takes or gives, nested in tuples, lists and mappings; ways to them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from glasshive.graph.errors import NotASite
from glasshive.graph.graph import LeafPath


def tensor_leaves(tree: Any, path: LeafPath = ()) -> Iterator[tuple[LeafPath, torch.Tensor]]:
    """The tensors in nested tuples, lists and mappings, each with the way to it."""
    if isinstance(tree, torch.Tensor):
        yield path, tree
    elif isinstance(tree, dict):
        for key, value in tree.items():
            if isinstance(key, str):
                yield from tensor_leaves(value, (*path, key))
    elif isinstance(tree, tuple | list):
        for index, value in enumerate(tree):
            yield from tensor_leaves(value, (*path, index))


def leaf_of(tree: Any, path: LeafPath) -> torch.Tensor:
    """The tensor at `path` in a module's output. Raises NotASite if there is none."""
    here = tree
    for part in path:
        try:
            here = here[part]
        except (KeyError, IndexError, TypeError):
            here = None
            break
    if not isinstance(here, torch.Tensor):
        raise NotASite(f"no tensor at {path!r} in a {type(tree).__name__}")
    return here


def with_leaf(tree: Any, path: LeafPath, value: torch.Tensor) -> Any:
    """`tree` with the tensor at `path` replaced; the rest is shared, `tree` itself is unchanged."""
    if not path:
        return value
    part, rest = path[0], path[1:]
    if isinstance(tree, dict):
        copy = tree.copy()
        copy[part] = with_leaf(tree[part], rest, value)
        return copy
    items = list(tree)
    index = int(part)
    items[index] = with_leaf(items[index], rest, value)
    return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
