"""The intervention graph: a list of nodes in static single assignment form.

- Node *i* names only values *j < i*, or values in `imports`, which another peer sends.
- No node mutates anything. The only effects are `Write`, `Skip` and `Save`.
- A graph holds no code, no attribute access, no callables, and no string that reaches `getattr`:
  op names are looked up in a closed table (ops.py), module paths in the model's outline.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal, NewType, TypeAlias

from glasshive.graph.dtypes import DType

NodeId = NewType("NodeId", int)
LeafPath: TypeAlias = tuple[int | str, ...]
IO: TypeAlias = Literal["input", "output"]
WriteMode: TypeAlias = Literal["set", "inplace"]


@dataclass(frozen=True, slots=True)
class Ref:
    """An argument that is the value of an earlier node."""

    node: NodeId


# The kinds are told apart by type and never compared across kinds: in Python 1 == 1.0 == True.
Arg: TypeAlias = "Ref | DType | int | float | bool | str | tuple[Arg, ...] | None"


@dataclass(frozen=True, slots=True)
class Site:
    """One tensor that goes into or comes out of a module.

    `leaf` is the way to the tensor: () for an output that is a tensor, (0,) for the first of a
    tuple; for an input (0,) is the first positional argument and ("attention_mask",) a keyword.
    `step` counts the forward passes of a generation; it is 0 in a trace.
    """

    module: str
    io: IO
    leaf: LeafPath = ()
    step: int = 0

    def __str__(self) -> str:
        leaf = "".join(f"[{part!r}]" for part in self.leaf)
        if self.io == "input" and self.leaf == (0,):
            leaf = ""
        return f"{self.module or 'the model'}.{self.io}{leaf}"


@dataclass(frozen=True, slots=True)
class Read:
    """The rows of one invoke at a site, as they are when the site's event happens."""

    site: Site
    invoke: int


@dataclass(frozen=True, slots=True)
class Write:
    """Give the rows of one invoke at a site a new value.

    `set` replaces the module's output or argument; `inplace` copies into the same memory, so
    that whatever else shares this memory sees it too, as an in-place edit in a torch hook does.
    """

    site: Site
    invoke: int
    value: Ref
    mode: WriteMode


@dataclass(frozen=True, slots=True)
class Skip:
    """Do not run a module for an invoke: its output is `value`."""

    module: str
    invoke: int
    value: Ref
    step: int = 0


@dataclass(frozen=True, slots=True)
class Op:
    """A pure op of the closed table, with every argument of its signature in order."""

    name: str
    args: tuple[Arg, ...]


@dataclass(frozen=True, slots=True)
class Call:
    """Apply one of the model's own modules to values, with the user's edits off."""

    module: str
    args: tuple[Arg, ...]


@dataclass(frozen=True, slots=True)
class Param:
    """A read-only copy of a parameter or buffer of the model."""

    module: str
    name: str


@dataclass(frozen=True, slots=True)
class Const:
    """A tensor of the user's own. `digest` is the SHA-256 of its header and bytes (tensors.py)."""

    digest: bytes
    dtype: DType
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Save:
    """Send a value to the client under a name."""

    value: Ref
    name: str


Node: TypeAlias = Read | Write | Skip | Op | Call | Param | Const | Save
# Tuples, as a union would be made anew at each look.
_WITH_ARGS: Final = (Op, Call)
_EFFECTS: Final = (Write, Skip, Save)


@dataclass(frozen=True, slots=True)
class Graph:
    """Nodes by ascending id. A part of a cut graph keeps the ids of the whole."""

    nodes: Mapping[NodeId, Node]
    imports: frozenset[NodeId] = field(default_factory=frozenset)

    def __len__(self) -> int:
        return len(self.nodes)


def refs(node: Node) -> list[NodeId]:
    """The ids of the values that `node` takes, in order, with repeats."""
    found: list[NodeId] = []
    if isinstance(node, _WITH_ARGS):
        _add_refs(node.args, found)
    elif isinstance(node, _EFFECTS):
        found.append(node.value.node)
    return found


def _add_refs(args: tuple[Arg, ...], found: list[NodeId]) -> None:
    for arg in args:
        if type(arg) is Ref:
            found.append(arg.node)
        elif type(arg) is tuple:
            _add_refs(arg, found)


def is_effect(node: Node) -> bool:
    """Whether `node` has no value of its own: nothing may name it."""
    return isinstance(node, _EFFECTS)
