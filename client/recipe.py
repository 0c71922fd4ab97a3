"""What one kind of call of torch becomes, as data: lowering writes a recipe, replaying reads it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

from glasshive.client.functional import Layout, View
from glasshive.graph.graph import Arg, NodeId, Ref

Bound: TypeAlias = "dict[str, Any]"  # the call's arguments by name, with operands for tensors

# In a recipe, a ref of 0 or more is the result of that step; below, it is an operand: -1 the first.


@dataclass(frozen=True, slots=True)
class Operand:
    """A tensor argument of the call that is lowered. Its text is for messages."""

    index: int
    layout: Layout
    traced: bool
    text: str

    def __str__(self) -> str:
        return self.text

    @property
    def ref(self) -> Ref:
        """How a step names it."""
        return Ref(NodeId(-1 - self.index))


@dataclass(frozen=True, slots=True)
class Step:
    """One node to add. `refs` are the arguments to replace; `seed` is the one to draw."""

    op: str
    args: tuple[Arg, ...]
    refs: tuple[int, ...]
    nested: bool
    seed: int | None


@dataclass(frozen=True, slots=True)
class Fresh:
    """A result with memory of its own."""

    source: NodeId
    layout: Layout


@dataclass(frozen=True, slots=True)
class Shared:
    """A result that shares the memory of an operand, through a chain of views."""

    operand: int
    views: tuple[View, ...]
    layout: Layout


@dataclass(frozen=True, slots=True)
class Given:
    """A result that is the operand itself, as in-place calls return it."""

    operand: int


@dataclass(frozen=True, slots=True)
class Dead:
    """A result that glasshive does not give; reading it raises."""

    reason: str
    layout: Layout


Out: TypeAlias = "Fresh | Shared | Given | Dead"


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a call of torch becomes.

    `needs` are the operands whose values the steps use. `writes` says which operands get which
    values. `form` is how the results are handed back. With `reshapes`, the first operand itself
    becomes the one result.
    """

    needs: tuple[int, ...]
    steps: tuple[Step, ...]
    writes: tuple[tuple[int, NodeId], ...]
    outs: tuple[Out, ...]
    form: type | None
    is_copy: bool = False
    reshapes: bool = False
