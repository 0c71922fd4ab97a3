"""A graph in the making: the nodes, the user's line of each, and the constants.

`recording(recorder)` is the state in which the body of a trace runs: no inference mode, gradients
off, torch's fused encoder layer off, and the recorder in a context variable.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, Final

import torch

from glasshive.client.constants import Constants
from glasshive.client.errors import AmbientState, NotInTable, TraceError
from glasshive.client.functional import Cell, CellHook, EditHook, intern_layout
from glasshive.client.source_lines import Mark, SourceLine, here, mark, resolve
from glasshive.client.torch_calls import TorchCalls
from glasshive.client.traced import TracedTensor, refuse_two_traces
from glasshive.graph.errors import BadTensor
from glasshive.graph.graph import Arg, Const, Node, NodeId, Op, Ref, refs
from glasshive.graph.kernels import from_torch_dtype, to_torch_dtype
from glasshive.graph.tensors import TensorSpec

Merge = Callable[[Sequence[Any]], Any]

_active: ContextVar[Recorder | None] = ContextVar("glasshive_recorder", default=None)


class Recorder:
    """The nodes of one trace, in the order in which they were recorded.

    `merge` computes, for every value, what the caller wants to know of it from what is known of
    its inputs (`value_info`); without it nothing is kept. `is_open` is true inside `recording`.
    `title` is what messages call the trace.
    """

    def __init__(
        self,
        *,
        merge: Merge | None = None,
        constants: Constants | None = None,
        title: str = "a trace",
    ) -> None:
        self.title = title
        self.nodes: dict[NodeId, Node] = {}
        self.consts: dict[bytes, tuple[TensorSpec, torch.Tensor]] = {}
        self.value_info: dict[NodeId, Any] = {}
        self.is_open = False
        self.at_step = ""  # for an error's text: at which step of a generation the body is
        self.ended_with = ""  # the error with which the trace ended, if it did
        self.saves: dict[str, TracedTensor] = {}
        self.containers: list[Any] = []  # that were saved: also what they hold in the end
        self.never_came: dict[str, str] = {}  # why a save has no value, by name
        self._marks: dict[NodeId, Mark] = {}
        self._merge = merge
        self._constants = Constants() if constants is None else constants
        self._const_nodes: dict[bytes, NodeId] = {}
        self._permuted: dict[tuple[NodeId, tuple[int, ...]], NodeId] = {}
        self._next = 0

    # Nodes --------------------------------------------------------------------------------------

    def add(self, node: Node, info: Any = None) -> NodeId:
        """Add a node at the user's current line; its id.

        `info` is what is known of its value; without it, that of its inputs is merged.
        """
        node_id = NodeId(self._next)
        self._next += 1
        self.nodes[node_id] = node
        self._marks[node_id] = mark()
        if self._merge is not None:
            known = self.value_info
            if info is None:
                info = self._merge([known[ref] for ref in refs(node)])
            known[node_id] = info
        return node_id

    def add_op(self, name: str, args: tuple[Arg, ...]) -> NodeId:
        """Add an op of the table with all its arguments; its id. Nothing is checked here."""
        return self.add(Op(name, args))

    def const(self, tensor: torch.Tensor) -> NodeId:
        """The node of a tensor of the user's, as it is now.

        A tensor without dimensions becomes a `full` of its number, which needs no bytes; it keeps
        its lack of dimensions, on which torch's dtype rules depend.
        """
        if tensor.dim() == 0 and not tensor.dtype.is_complex and tensor.device.type != "meta":
            try:
                dtype = from_torch_dtype(tensor.dtype)
            except BadTensor as error:
                raise NotInTable(str(error), line=here()) from None
            return self.add_op("full", ((), tensor.detach().item(), dtype))
        strides = tensor.stride()
        order = tuple(sorted(range(len(strides)), key=lambda axis: -strides[axis]))
        base = tensor if tensor.is_contiguous() else tensor.permute(order)
        if base is tensor or not base.is_contiguous():
            return self._const_node(tensor)
        # A transposed weight: BLAS rounds differently by layout, so the peer gets the same view.
        back = tuple(order.index(axis) for axis in range(len(order)))
        whole = self._const_node(base)
        known = self._permuted.get((whole, back))
        if known is None:
            known = self._permuted[whole, back] = self.add_op("permute", (Ref(whole), back))
        return known

    def _const_node(self, tensor: torch.Tensor) -> NodeId:
        constant = self._constants.take(tensor)
        known = self._const_nodes.get(constant.digest)
        if known is None:
            spec = constant.spec
            self.consts[constant.digest] = spec, constant.tensor
            known = self.add(Const(constant.digest, spec.dtype, spec.shape))
            self._const_nodes[constant.digest] = known
        return known

    def mark_of(self, node_id: NodeId) -> Mark:
        """The mark of where in the user's code a node was recorded."""
        return self._marks.get(node_id)

    def line_of(self, node_id: NodeId) -> SourceLine | None:
        """Where in the user's code a node was recorded."""
        return resolve(self._marks.get(node_id))

    def draw_seed(self) -> int:
        """A seed from torch's default generator, so that `torch.manual_seed` repeats a run."""
        return int(torch.randint(2**63 - 1, (), device="cpu").item())

    # Values ---------------------------------------------------------------------------------------

    def new_cell(
        self,
        node_id: NodeId,
        spec: TensorSpec,
        on_mutate: CellHook | None = None,
        after_mutate: EditHook | None = None,
    ) -> Cell:
        """A cell whose first value is `node_id`.

        `on_mutate(cell)` runs before each in-place edit, through whatever alias, and may raise;
        `after_mutate(cell, value)` runs after it.
        """
        layout = intern_layout(to_torch_dtype(spec.dtype), spec.shape)
        return Cell(self, node_id, layout, on_mutate, after_mutate)

    def tensor_of(self, cell: Cell) -> TracedTensor:
        """A traced tensor that is the whole of `cell`, always at its newest value."""
        return TracedTensor.wrap(cell.root)

    def traced(self, node_id: NodeId, spec: TensorSpec) -> TracedTensor:
        """A traced tensor with a memory of its own, whose first value is `node_id`."""
        return self.tensor_of(self.new_cell(node_id, spec))

    def value(self, tensor: torch.Tensor) -> NodeId:
        """The node of what `tensor` holds now; a plain tensor becomes a constant.

        Raises TraceError for a value of another trace, and NotSaved if that is over.
        """
        if not isinstance(tensor, TracedTensor):
            return self.const(tensor)
        self.check_own(tensor)
        return tensor._alias.value()

    def check_own(self, tensor: TracedTensor) -> None:
        """Return if `tensor` belongs to this trace. Raises NotSaved or TraceError if not."""
        owner = tensor._alias.cell.recorder
        if owner is not self:
            owner_is_open = owner.is_open
            if not owner_is_open:
                tensor.to()  # raises NotSaved
            refuse_two_traces(owner, self)

    # The end --------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def keeping_error(self) -> Iterator[None]:
        """Inside it the trace ends: an error with which it does is kept, by name."""
        try:
            yield
        except BaseException as error:
            self.ended_with = type(error).__name__
            raise

    # Saves ----------------------------------------------------------------------------------------

    def save(self, tensor: TracedTensor) -> TracedTensor:
        """Register `tensor` to be brought back as it is when the block ends. Returns it."""
        if not self.was_saved(tensor):
            self.check_own(tensor)
            self.saves[f"s{len(self.saves)}"] = tensor
        return tensor

    def was_saved(self, tensor: TracedTensor) -> bool:
        """Whether this very object was registered with `save`."""
        return any(saved is tensor for saved in self.saves.values())


def active_recorder() -> Recorder | None:
    """The recorder of the trace whose body runs now."""
    return _active.get()


@contextlib.contextmanager
def recording(recorder: Recorder) -> Iterator[Recorder]:
    """Open `recorder` for the body of a trace, and close it at the end.

    Raises AmbientState if torch's default dtype is not float32 or autocast is on for another
    device, and TraceError inside another trace.
    """
    if torch.get_default_dtype() != torch.float32:
        raise AmbientState(
            f"torch's default dtype is {torch.get_default_dtype()}, but peers compute with float32 "
            "as the default; call torch.set_default_dtype(torch.float32)",
            line=here(),
        )
    for device in ("cuda", "mps", "xpu"):
        if torch.is_autocast_enabled(device):
            raise AmbientState(
                f"a trace is opened inside torch.autocast({device!r}), but traced values are on no "
                "device; use torch.autocast('cpu'), or convert with .to(dtype)",
                line=here(),
            )
    opened = _active.get()
    if opened is not None:
        raise TraceError(
            f"{opened.title} is open already, so {recorder.title} cannot begin inside it; end its "
            "block first: what it saved can be used in the next one",
            line=here(),
        )
    token = _active.set(recorder)
    recorder.is_open = True
    try:
        with _fast_path.off(), torch.inference_mode(False), torch.no_grad(), TorchCalls():
            yield recorder
    finally:
        recorder.is_open = False
        _active.reset(token)


class _FastPath:
    """torch's fused encoder layer, a switch of the whole process: off while any thread records."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._was_on = True

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Have it off; the last one to leave puts it back as it was."""
        with self._lock:
            if not self._users:
                self._was_on = torch.backends.mha.get_fastpath_enabled()
                torch.backends.mha.set_fastpath_enabled(False)
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if not self._users:
                    torch.backends.mha.set_fastpath_enabled(self._was_on)


_fast_path: Final = _FastPath()


__all__ = ["Merge", "Recorder", "active_recorder", "recording"]
