"""What stands at a site of a pass: an invoke's rows of it, to read and to write.

- A read is a view of those rows. A write touches those rows only: `set` gives the model a new
  tensor, `inplace` copies into the one that it has (torch hooks do the same).
- Weights are never written: an in-place edit of memory that belongs to the model is refused.
"""

from __future__ import annotations

import functools
from typing import Any, TypeAlias, final

from torch import Tensor, nn

from glasshive.graph.errors import NotASite, ShapeMismatch
from glasshive.graph.graph import Read, Skip, Write
from glasshive.graph.kernels import to_torch_dtype
from glasshive.graph.order import Pass, Passes
from glasshive.graph.outline import Leaf, Outline
from glasshive.graph.tensor_trees import leaf_of, with_leaf

__all__ = ["Replaced", "SiteValues"]

Replaced: TypeAlias = dict[tuple[int | str, ...], Tensor]
"""The memory of leaves that were set, by their paths, at one event."""


@final
class SiteValues:
    """The values at the sites of `module` in its `passes`."""

    def __init__(self, module: nn.Module, outline: Outline, passes: Passes) -> None:
        self._module = module
        self._outline = outline
        self._passes = passes

    def read(self, node: Read, tree: Any) -> Tensor:
        """The invoke's rows of a tensor in `tree`, which a module takes or gives; a view."""
        return self.rows(node, leaf_of(tree, self._path(node)))

    def write(self, node: Write, value: Tensor, tree: Any, replaced: Replaced) -> Any:
        """`tree` with one write applied. Raises ShapeMismatch and NotASite.

        `replaced` is that of all writes at this event.
        """
        path = self._path(node)
        whole = leaf_of(tree, path)
        rows = self.rows(node, whole)
        if tuple(value.shape) != tuple(rows.shape) or value.dtype != rows.dtype:
            raise ShapeMismatch(
                f"a value of shape {list(value.shape)}, {value.dtype}, is written to {node.site}, "
                f"which has shape {list(rows.shape)} and {rows.dtype}"
            )
        if node.mode == "inplace":
            memory = replaced.get(path, whole)
            self._check_memory(node, memory)
            self.rows(node, memory).copy_(value)
        elif path not in replaced:
            # A copy with the same strides, so that the kernels after it are the same ones.
            replaced[path] = whole
            whole = whole.clone()
            tree = with_leaf(tree, path, whole)
        if path in replaced:
            self.rows(node, whole).copy_(value)
        return tree

    def rows(self, node: Read | Write, whole: Tensor) -> Tensor:
        """The view of the invoke's rows in the tensor at a site."""
        one = self._pass(node)
        leaf = self.leaf(node)
        expected = one.spec(leaf).shape
        if tuple(whole.shape) != expected:
            raise NotASite(
                f"{node.site} has shape {list(whole.shape)} here, wanted {list(expected)}; this "
                "model's rows cannot be told apart for this input"
            )
        if leaf.batch_axis is None:
            if isinstance(node, Write) and len(one.invokes) > 1:
                raise NotASite(f"{node.site} is one tensor for all rows, which no invoke can edit")
            return whole
        first, last = self._passes.rows(node.invoke)
        return whole.narrow(leaf.batch_axis, first, last - first)

    def leaf(self, node: Read | Write | Skip) -> Leaf:
        """What the outline says of the tensor there."""
        kind = self._pass(node).kind
        if isinstance(node, Skip):
            (leaf,) = self._outline.leaves(node.module, "output", kind)
            return leaf
        return self._outline.leaf(node.site, kind)

    def check_fits(self, node: Skip, value: Tensor) -> None:
        """Raise ShapeMismatch unless `value` is what the skipped module would give."""
        first, last = self._passes.rows(node.invoke)
        wanted = self._pass(node).spec(self.leaf(node), last - first)
        if (tuple(value.shape), value.dtype) != (wanted.shape, to_torch_dtype(wanted.dtype)):
            raise ShapeMismatch(
                f"a value of shape {list(value.shape)}, {value.dtype}, is given for "
                f"{node.module}.output, which has shape {list(wanted.shape)} and "
                f"{wanted.dtype.value}"
            )

    def _pass(self, node: Read | Write | Skip) -> Pass:
        return self._passes.passes[self._passes.at(node)]

    def _path(self, node: Read | Write) -> tuple[int | str, ...]:
        path = node.site.leaf
        if node.site.io == "output":
            return path
        return ("args", *path) if isinstance(path[0], int) else ("kwargs", *path)

    def _check_memory(self, node: Write, memory: Tensor) -> None:
        """Raise NotASite for memory that an edit in place must not change."""
        if memory.untyped_storage().data_ptr() in self._own_memory:
            raise NotASite(f"{node.site} is a part of the model's weights, which are read-only")
        if any(
            size > 1 and not step for size, step in zip(memory.shape, memory.stride(), strict=True)
        ):
            raise NotASite(
                f"several elements of {node.site} are one place in memory, so it cannot be edited "
                "in place; assign a changed copy"
            )

    @functools.cached_property
    def _own_memory(self) -> frozenset[int]:
        """Where the model's weights and buffers lie."""
        return frozenset(
            tensor.untyped_storage().data_ptr()
            for source in (self._module.parameters, self._module.buffers)
            for tensor in source()
        )
