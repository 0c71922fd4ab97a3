"""In-place edits, made pure.

- A *cell* stands for a piece of memory. It has one newest value (a node); an edit gives it another.
- An *alias* is a cell seen through a chain of views. A view records nothing until it is read; a
  read applies the chain to the newest value, once for each value.
- An edit through an alias computes the new part, and folds it back along the chain into a new value
  of the whole cell. So every other alias sees it, as shared memory would show it.
- Strides are kept at the client only, for one purpose: whether `reshape` shares memory or copies
  depends on them. They never reach a graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias

import torch

from glasshive.client.errors import OutOfSight
from glasshive.client.source_lines import Mark, SourceLine, here, mark, resolve
from glasshive.graph.graph import Arg, NodeId, Ref, Site
from glasshive.graph.kernels import from_torch_dtype
from glasshive.graph.tensors import TensorSpec

if TYPE_CHECKING:
    from glasshive.client.recorder import Recorder


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """The dtype, shape and strides of a tensor. Equal layouts are one object: compare with `is`."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}[{', '.join(map(str, self.shape))}]"

    @property
    def spec(self) -> TensorSpec:
        """Without the strides. Raises BadTensor for a dtype that no graph holds."""
        return TensorSpec(from_torch_dtype(self.dtype), self.shape)

    @property
    def is_dense(self) -> bool:
        """Whether its elements fill one stretch of memory, each place once."""
        expected = 1
        for stride, size in sorted(zip(self.strides, self.shape, strict=True)):
            if size == 1:
                continue
            if stride != expected:
                return False
            expected *= size
        return True


_LAYOUTS_MAX: Final = 65_536
_layouts: dict[tuple[torch.dtype, tuple[int, ...], tuple[int, ...]], Layout] = {}


def layout_of(tensor: torch.Tensor) -> Layout:
    """The layout of a tensor that has memory, or of a meta tensor."""
    key = (tensor.dtype, tuple(tensor.shape), tensor.stride())
    return _layouts.get(key) or intern_layout(*key)


def intern_layout(
    dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[int, ...] | None = None
) -> Layout:
    """The one layout with these parts; row by row if no strides are given."""
    if strides is None:
        strides = contiguous_strides(shape)
    key = (dtype, shape, strides)
    found = _layouts.get(key)
    if found is None:
        if len(_layouts) >= _LAYOUTS_MAX:
            _layouts.clear()
        found = _layouts.setdefault(key, Layout(dtype, shape, strides))
    return found


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a tensor that lies row by row."""
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


@dataclass(frozen=True, slots=True)
class View:
    """One view: an op of the table whose result shares memory, with its arguments after the first.

    `offset` is how many elements further into the memory its first element lies.
    """

    name: str
    args: tuple[Arg, ...]
    layout: Layout
    offset: int = 0


CellHook: TypeAlias = "Callable[[Cell], None]"
EditHook: TypeAlias = "Callable[[Cell, NodeId], None]"


class Cell:
    """A piece of memory with one newest value.

    `vid` is the node of the newest value, `version` counts the edits, `marks` say where each was
    made. `site` is where it stands in the model, if it does. `on_mutate` runs before an edit and
    may raise; `after_mutate` runs after it with the new value.
    """

    __slots__ = (
        "after_mutate",
        "marks",
        "on_mutate",
        "on_view",
        "recorder",
        "root",
        "site",
        "version",
        "vid",
    )

    def __init__(
        self,
        recorder: Recorder,
        vid: NodeId,
        layout: Layout,
        on_mutate: CellHook | None = None,
        after_mutate: EditHook | None = None,
    ) -> None:
        self.recorder = recorder
        self.vid = vid
        self.version = 0
        self.site: Site | None = None
        self.marks: list[Mark] | None = None
        self.on_mutate = on_mutate
        self.after_mutate = after_mutate
        self.on_view: Callable[[View], None] | None = None  # told of each new view of the whole
        self.root = Alias(self, None, None, layout, 0)

    @property
    def layout(self) -> Layout:
        """The layout of the whole."""
        return self.root.layout

    @property
    def lines(self) -> tuple[SourceLine, ...]:
        """Where in the user's code each edit was made."""
        return tuple(line for place in self.marks or () if (line := resolve(place)) is not None)


class DeadCell(Cell):
    """The memory of a result that glasshive does not give: reading it raises."""

    __slots__ = ("reason",)

    def __init__(self, recorder: Recorder, layout: Layout, reason: str) -> None:
        self.reason = reason
        super().__init__(recorder, NodeId(-1), layout)

    @property
    def vid(self) -> NodeId:
        """Raises OutOfSight."""
        raise OutOfSight(self.reason, line=here())

    @vid.setter
    def vid(self, value: NodeId) -> None:
        pass  # the base class sets one


class Alias:
    """A cell seen through a chain of views. Its first element lies at `offset` in the cell."""

    __slots__ = ("_children", "_node", "_seen", "cell", "layout", "offset", "parent", "view")

    def __init__(
        self, cell: Cell, parent: Alias | None, view: View | None, layout: Layout, offset: int
    ) -> None:
        self.cell = cell
        self.parent = parent
        self.view = view
        self.layout = layout
        self.offset = offset
        self._seen: NodeId | None = None  # the value of the cell for which `_node` was computed
        self._node: NodeId | None = None
        self._children: dict[View, Alias] | None = None

    def __str__(self) -> str:
        site = self.cell.site
        return str(self.layout) if site is None else f"{self.layout} of {site}"

    def through(self, view: View) -> Alias:
        """The alias one view further. The same view gives the same alias."""
        if self._children is None:
            self._children = {}
        found = self._children.get(view)
        if found is None:
            found = Alias(self.cell, self, view, view.layout, self.offset + view.offset)
            self._children[view] = found
            if self.parent is None and self.cell.on_view is not None:
                self.cell.on_view(view)
        return found

    def value(self) -> NodeId:
        """The node of what is seen through this alias now."""
        cell = self.cell
        newest = cell.vid
        if self.parent is None or self.view is None:
            return newest
        if self._node is None or self._seen != newest:
            base = self.parent.value()
            self._node = cell.recorder.add_op(self.view.name, (Ref(base), *self.view.args))
            self._seen = newest
        return self._node

    def prepare_edit(self) -> None:
        """Return if an in-place edit through this alias may be made now.

        Raises OutOfSight if several of its elements are one place, and what the cell's `on_mutate`
        raises.
        """
        alias: Alias = self
        while alias.parent is not None and alias.view is not None:
            if alias.view.name in ("expand", "unfold"):
                raise OutOfSight(
                    f"an in-place edit of a view made by {alias.view.name}(): several of its "
                    "elements are one place in memory; call .clone() on it first, or edit the "
                    "tensor that it was made from",
                    line=here(),
                )
            alias = alias.parent
        if self.cell.on_mutate is not None:
            self.cell.on_mutate(self.cell)

    def edit(self, value: NodeId) -> None:
        """Make `value` what is seen through this alias: a new value of the whole cell."""
        alias = self
        folded = value
        while alias.parent is not None and alias.view is not None:
            folded = _put_back(alias.cell.recorder, alias.view, alias.parent, folded)
            alias = alias.parent
        cell = self.cell
        cell.vid = folded
        if self.parent is not None:
            self._node = value
            self._seen = folded
        cell.version += 1
        if cell.marks is None:
            cell.marks = []
        cell.marks.append(mark())
        if cell.after_mutate is not None:
            cell.after_mutate(cell, folded)

    def overlaps_partly(self, other: Alias) -> bool:
        """Whether the two share memory, but not place for place, as far as torch itself checks."""
        if self is other or self.cell is not other.cell:
            return False
        mine, theirs = self.layout, other.layout
        if 0 in mine.shape or 0 in theirs.shape or not (mine.is_dense and theirs.is_dense):
            return False
        start, stop = self.offset, self.offset + _numel(mine)
        other_start, other_stop = other.offset, other.offset + _numel(theirs)
        if (start, stop) == (other_start, other_stop):
            return mine.strides != theirs.strides
        return start < other_stop and other_start < stop


def _numel(layout: Layout) -> int:
    count = 1
    for size in layout.shape:
        count *= size
    return count


_SCATTERS: Final = {
    "select": "select_scatter",
    "slice": "slice_scatter",
    "diagonal": "diagonal_scatter",
}
_INVERSES: Final = {
    "detach": "detach",
    "conj": "conj",
    "neg": "neg",
    "view_as_real": "view_as_complex",
    "view_as_complex": "view_as_real",
}


def _put_back(recorder: Recorder, view: View, parent: Alias, value: NodeId) -> NodeId:
    """The value of `parent` in which what is seen through `view` is `value`."""
    name = view.name
    if name in _SCATTERS:
        return recorder.add_op(_SCATTERS[name], (Ref(parent.value()), Ref(value), *view.args))
    if name == "reshape":
        return recorder.add_op("reshape", (Ref(value), parent.layout.shape))
    if name == "permute":
        (dims,) = view.args
        order = dims if isinstance(dims, tuple) else ()
        back = tuple(order.index(axis) for axis in range(len(order)))
        return recorder.add_op("permute", (Ref(value), back))
    return recorder.add_op(_INVERSES[name], (Ref(value),))
