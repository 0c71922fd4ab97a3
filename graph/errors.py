"""What can be wrong with a graph, and the root of every error that glasshive raises.

GlasshiveError
└── GraphError                 an experiment that has no meaning, or that nobody may run
    ├── BadGraph               bytes or nodes that are no graph of ours
    │   └── BadTensor          a tensor's header and its bytes disagree
    ├── UnknownOp              an op outside the closed table, or arguments outside its signature
    ├── UnknownModule          a module path that the model does not have
    ├── NotASite               a module that has no single input and output
    ├── ShapeMismatch          a value that does not fit where it is written or used
    ├── ImpossibleOrder        a write whose value exists only later in the same forward pass
    ├── LateEdit               a write that would change a value which was read already
    ├── UnequalLengths         invokes that need each other and cannot share a forward pass
    ├── NoRoots                nothing is saved, so nothing would come back
    ├── NotYet                 a node kind that this release does not run
    ├── BadRoute               a route that lacks a needed block, or whose spans overlap
    ├── UnsupportedModel       a model that cannot be cut by block
    ├── OverBudget             more nodes, bytes or FLOPs than the peer allows
    └── StepNeverRan           a value of a step to which a generation did not come

UnseenWrite (a warning)        a write that nothing saved can see: it is dropped
RowTaken (a warning)           an index that takes one row of the batch off a block's output
"""

from __future__ import annotations


class GlasshiveError(Exception):
    """The root of every error that glasshive raises on purpose."""


class GraphError(GlasshiveError):
    """An experiment that has no meaning, or that nobody may run.

    `node` is the id of the node to blame, where there is one: the client turns it into the user's
    own line.
    """

    def __init__(self, message: str, *, node: int | None = None) -> None:
        super().__init__(message)
        self.node = node


class BadGraph(GraphError):
    """Bytes or nodes that are no graph of ours."""


class BadTensor(BadGraph):
    """A tensor's header and its bytes disagree."""


class UnknownOp(GraphError):
    """An op outside the closed table, or arguments outside its signature."""


class UnknownModule(GraphError):
    """A module path that the model does not have."""


class NotASite(GraphError):
    """A module that is not called exactly once per forward pass, or a leaf that is no tensor."""


class ShapeMismatch(GraphError):
    """A value that does not fit where it is written, or arguments that an op refuses."""


class ImpossibleOrder(GraphError):
    """A write whose value exists only later in the same forward pass."""


class LateEdit(GraphError):
    """A write that would change a value which was read already."""


class UnequalLengths(GraphError):
    """Invokes that need each other, so must share a pass, but differ in length."""


class StepNeverRan(GraphError):
    """A value of a step to which a generation did not come, because it ended before."""


class NoRoots(GraphError):
    """Nothing is saved, so nothing would come back."""


class NotYet(GraphError):
    """A node kind or a use that this release refuses and a later one brings."""


class BadRoute(GraphError):
    """A route that lacks a block which the graph needs, or whose spans overlap."""


class UnsupportedModel(GraphError):
    """A model that cannot be cut by block, or whose forward pass does not run without data."""


class OverBudget(GraphError):
    """More nodes, bytes or FLOPs than the peer allows."""


class RowTaken(UserWarning):
    """An index that takes one row of the batch off a block's output: blocks give no tuple here."""


class UnseenWrite(UserWarning):
    """A write that nothing saved can see: it is dropped."""
