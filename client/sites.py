"""What the body of a trace has read and written, site by site: the rules that keep it honest.

1. Across sites, event order; at one site, program order. A site is read once; later looks give the
   same object, or the one that was assigned since.
2. An edit is refused if something that depends on it was read before (`LateEdit`), and if its value
   depends on something later in the same invoke (`ImpossibleOrder`): both at the user's line.
3. At the end each site has at most one in-place write (what happened to the memory that was read)
   and one assignment (what the model sees instead), in this order.
4. A tensor stands at one site: where it was read, or where it was assigned last. An edit of it is
   an edit there; the site where it stood before keeps what it had, as it would in a hook, which has
   run by then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from glasshive.client.constants import Constants
from glasshive.client.functional import Alias, Cell, View
from glasshive.client.misfits import array_hint
from glasshive.client.recorder import Recorder
from glasshive.client.source_lines import Mark, at_line, mark, resolve, warn_here
from glasshive.client.traced import TracedTensor
from glasshive.graph.errors import (
    GraphError,
    ImpossibleOrder,
    LateEdit,
    NotASite,
    NotYet,
    RowTaken,
    ShapeMismatch,
)
from glasshive.graph.graph import IO, NodeId, Read, Ref, Site, Skip, Write
from glasshive.graph.kernels import from_torch_dtype, to_torch_dtype
from glasshive.graph.order import NEVER, InvokeShape, Moment, merge_reads
from glasshive.graph.outline import Leaf, Outline
from glasshive.graph.tensors import TensorSpec


@dataclass
class _Seen:
    """One site of one invoke: what was read there first, and what stands there now.

    `shown` is whether the user got what was assigned from here again.
    """

    site: Site
    invoke: int
    moment: Moment
    spec: TensorSpec
    memory: Cell | None = None
    current: TracedTensor | None = None
    assigned_at: Mark = None
    skipped: tuple[TracedTensor, Mark] | None = None
    shown: bool = False


class Sites:
    """The reads and writes of one trace."""

    def __init__(self, outline: Outline, constants: Constants, title: str = "a trace") -> None:
        self.outline = outline
        self.recorder = Recorder(merge=_merge, constants=constants, title=title)
        self.invokes: list[InvokeShape] = []
        self._seen: dict[tuple[int, Site], _Seen] = {}
        self._reads: dict[int, list[tuple[Moment, Site, Mark]]] = {}
        self._latest_read: dict[int, Moment] = {}
        # What later reads depend on besides their own moment: reads of other invokes.
        self._edits: dict[int, list[tuple[Moment, Mapping[int, Moment]]]] = {}
        self._standing: dict[Cell, tuple[_Seen, Moment]] = {}  # with the one at which edits count
        self._skipped: dict[tuple[int, int], list[str]] = {}  # by invoke and step
        # An edit that was refused after it was recorded: the trace can't run, even if it is caught.
        self.broken: GraphError | None = None
        self._warned_of_row = False

    def read(self, site: Site, invoke: int) -> TracedTensor:
        """What stands at a site now. Raises UnknownModule or NotASite."""
        seen = self._find(site, invoke)
        if seen.current is None:
            # The model carries every earlier edit of the invoke here, and what that depends on.
            edits = self._edits.get(invoke, ())
            earlier = [info for moment, info in edits if moment < seen.moment]
            info = merge_reads([{invoke: seen.moment}, *earlier])
            node = self.recorder.add(Read(site, invoke), info)
            seen.memory = self.recorder.new_cell(node, seen.spec)
            seen.current = self.recorder.tensor_of(seen.memory)
            self._stand(seen.memory, seen, seen.moment)
            if self.outline.is_block(site.module) and (site.io, site.leaf) == ("output", ()):
                seen.memory.on_view = self._warn_of_row
            self._reads.setdefault(invoke, []).append((seen.moment, site, mark()))
            self._latest_read[invoke] = max(seen.moment, self._latest_read.get(invoke, NEVER))
        else:
            seen.shown = True
        return seen.current

    def assign(self, site: Site, invoke: int, value: object) -> None:
        """Give the model `value` at a site. Raises what the rules above say, or ShapeMismatch."""
        seen = self._find(site, invoke)
        if value is seen.current:
            return  # `site.output += v` assigns back what it edited in place
        traced = self._give(seen, seen.moment, value)
        seen.assigned_at = mark()
        seen.current = traced

    def skip(self, module: str, invoke: int, value: object, step: int = 0) -> None:
        """Have the model not run a module: its output is `value`, which may use its input.

        Raises NotASite for a module that gives more than one tensor or that holds blocks, or whose
        cache later steps need, and what `assign` raises.
        """
        self.outline.event(Site(module, "output"))
        outputs = self.leaves(module, "output", invoke, step)
        if len(outputs) != 1 or self.outline.holds_blocks(module):
            raise NotASite(
                f"{at_line()}{module} cannot be skipped: it gives {len(outputs)} tensors, or "
                "holds the blocks themselves; skip a block, or a module inside one"
            )
        if self.invokes[invoke].new_tokens and self.outline.fills_cache(module):
            raise NotASite(
                f"{at_line()}{module} cannot be skipped in a generation: later steps need what it "
                "keeps in the cache; skip a module inside it that keeps nothing (an mlp), or "
                "assign its .output"
            )
        for other in self._seen.values():
            is_here = (other.invoke, other.site.step) == (invoke, step)
            if is_here and other.site.module.startswith(f"{module}."):
                raise NotASite(
                    f"{at_line()}{module} is skipped, but {other.site} inside it is used above, "
                    "and never runs now; use it in another invoke"
                )
        seen = self._find(Site(module, "output", outputs[0].path, step), invoke)
        traced = self._give(seen, (step, self.outline.event(Site(module, "input"))), value)
        seen.current = traced
        seen.skipped = (traced, mark())
        self._skipped.setdefault((invoke, step), []).append(module)

    def leaves(self, module: str, io: IO, invoke: int, step: int = 0) -> tuple[Leaf, ...]:
        """The tensors that a module takes or gives in a step of an invoke. Raises UnknownModule."""
        return self.outline.leaves(module, io, self.invokes[invoke].kind(step))

    def _leaf(self, site: Site, invoke: int) -> Leaf:
        return self.outline.leaf(site, self.invokes[invoke].kind(site.step))

    def writes(self) -> list[tuple[Write | Skip, Mark, bool]]:
        """What the model is given, in the order of events.

        Each with the user's line of it, and whether the user holds an object that shows the edit.
        """
        found: list[tuple[Write | Skip, Mark, bool]] = []
        for seen in sorted(self._seen.values(), key=lambda one: (one.invoke, one.moment)):
            if seen.skipped is not None:
                value, where = seen.skipped
                skip = Skip(
                    seen.site.module, seen.invoke, Ref(value._alias.value()), seen.site.step
                )
                found.append((skip, where, seen.shown))
            if seen.memory is not None and seen.memory.marks:
                write = Write(seen.site, seen.invoke, Ref(seen.memory.vid), "inplace")
                found.append((write, seen.memory.marks[-1], True))
            if seen.assigned_at is not None and seen.current is not None:
                write = Write(seen.site, seen.invoke, Ref(seen.current._alias.value()), "set")
                found.append((write, seen.assigned_at, seen.shown))
        return found

    def standing(self, site: Site, invoke: int) -> NodeId | None:
        """The value that stands at a site now; None if nothing was read or written there."""
        seen = self._seen.get((invoke, site))
        return None if seen is None or seen.current is None else seen.current._alias.value()

    def _warn_of_row(self, view: View) -> None:
        if view.name != "select" or view.args[:1] != (0,) or self._warned_of_row:
            return
        self._warned_of_row = True
        text = (
            "an index on axis 0 of a block's output takes one row of the batch: blocks return a "
            "tensor in transformers 5, not a tuple; leave out the [0] if you mean the hidden states"
        )
        warn_here(text, RowTaken)

    def _give(self, seen: _Seen, moment: Moment, value: object) -> TracedTensor:
        """Make `value` what stands at a site, if the rules allow it at this moment."""
        self._check_writable(seen)
        traced = self._as_traced(value, seen)
        self._check_order(seen, moment, traced._alias.value())
        self._check_late(seen, moment)
        old = None if seen.current is None else seen.current._alias.cell
        if old is not None and old is not seen.memory and old is not traced._alias.cell:
            del self._standing[old]
            old.site = old.on_mutate = old.after_mutate = None
        self._stand(traced._alias.cell, seen, moment)
        return traced

    def _stand(self, cell: Cell, seen: _Seen, moment: Moment) -> None:
        """From now on an edit of this memory is an edit at `seen`."""
        before, _ = self._standing.get(cell, (seen, moment))
        if before is not seen:
            self._keep(before, cell)
        self._standing[cell] = seen, moment
        cell.site = seen.site
        cell.on_mutate = self._before_edit
        cell.after_mutate = self._after_edit

    def _keep(self, seen: _Seen, cell: Cell) -> None:
        """Let a site keep what it has in memory of its own, because `cell` goes elsewhere."""
        copy = Cell(self.recorder, cell.vid, cell.layout)
        copy.marks = None if cell.marks is None else list(cell.marks)
        self._stand(copy, seen, self._standing[cell][1])
        if seen.memory is cell:
            seen.memory = copy
        if seen.current is not None and seen.current._alias.cell is cell:
            seen.current = TracedTensor.wrap(_same_view(seen.current._alias, copy))
        if seen.skipped is not None and seen.skipped[0]._alias.cell is cell:
            tensor, where = seen.skipped
            seen.skipped = TracedTensor.wrap(_same_view(tensor._alias, copy)), where

    def _before_edit(self, cell: Cell) -> None:
        seen, _ = self._standing[cell]
        self._check_writable(seen)
        if cell is seen.memory and self._leaf(seen.site, seen.invoke).beside:
            raise NotYet(
                f"{at_line()}{seen.site} is one tensor that every block receives beside the hidden "
                "states, and each peer has its own, so one peer cannot edit it in place for all; "
                "assign a changed copy, which is of this module alone"
            )

    def _after_edit(self, cell: Cell, value: NodeId) -> None:
        # Only now, when the value is known, can the error say which of the two rules is broken.
        seen, moment = self._standing[cell]
        try:
            self._check_order(seen, moment, value)
            self._check_late(seen, moment)
        except GraphError as error:
            self.broken = error
            raise

    def _find(self, site: Site, invoke: int) -> _Seen:
        key = (invoke, site)
        seen = self._seen.get(key)
        if seen is None:
            moment = site.step, self.outline.event(site)
            for skipped in self._skipped.get((invoke, site.step), ()):
                if site.module.startswith(f"{skipped}."):
                    raise NotASite(
                        f"{at_line()}{site} is inside {skipped}, which this invoke skips, so it "
                        "never runs; read it in another invoke"
                    )
            leaf = self._leaf(site, invoke)
            spec = self.invokes[invoke].spec(leaf, site.step)
            seen = self._seen[key] = _Seen(site, invoke, moment, spec)
        return seen

    def _check_writable(self, seen: _Seen) -> None:
        if self._leaf(seen.site, seen.invoke).bypasses:
            raise NotYet(
                f"{at_line()}{seen.site} reaches every block beside the hidden states (each peer "
                "computes it for itself), so one peer cannot edit it for all; edit what the blocks "
                "make of it instead"
            )

    def _check_late(self, seen: _Seen, moment: Moment) -> None:
        if self._latest_read.get(seen.invoke, NEVER) <= moment:
            return
        for later, site, where in self._reads.get(seen.invoke, ()):
            if later > moment:
                read_at = f" at {line}" if (line := resolve(where)) else ""
                at = self._at_step(seen.invoke, seen.site.step)
                later_at = self._at_step(seen.invoke, site.step)
                raise LateEdit(
                    f"{at_line()}late edit: {seen.site}{at} runs before {site}{later_at}, which "
                    f"was read already{read_at} and depends on it; move this edit above "
                    "that read, or read it in a second invoke"
                )

    def _at_step(self, invoke: int, step: int) -> str:
        """Words for a step, where there are any."""
        return f" at step {step}" if self.invokes[invoke].new_tokens else ""

    def _check_order(self, seen: _Seen, moment: Moment, value: NodeId) -> None:
        behind: Mapping[int, Moment] = self.recorder.value_info[value]
        latest = behind.get(seen.invoke, NEVER)
        if latest > moment:
            at = self._at_step(seen.invoke, seen.site.step)
            later_at = self._at_step(seen.invoke, latest[0])
            raise ImpossibleOrder(
                f"{at_line()}impossible edit: {seen.site}{at} runs before "
                f"{self._site_at(latest[1])}{later_at}, which the new value depends on; take "
                "that value in one invoke and write it in another"
            )
        others = {invoke: read for invoke, read in behind.items() if invoke != seen.invoke}
        if others:
            self._edits.setdefault(seen.invoke, []).append((moment, others))

    def _site_at(self, event: int) -> str:
        for info in self.outline.modules.values():
            if info.input_event == event:
                return f"{info.path}.input"
            if info.output_event == event:
                return f"{info.path}.output"
        return f"event {event}"

    def _as_traced(self, value: object, seen: _Seen) -> TracedTensor:
        if isinstance(value, int | float | bool):
            full = self.recorder.add_op("full", (seen.spec.shape, value, seen.spec.dtype))
            return self.recorder.traced(full, seen.spec)
        at = self._at_step(seen.invoke, seen.site.step)
        if not isinstance(value, Tensor):
            raise ShapeMismatch(
                f"{at_line()}a {type(value).__name__} is assigned to {seen.site}{at}; a tensor "
                f"of {seen.spec} is wanted{array_hint(value)}"
            )
        got = TensorSpec(from_torch_dtype(value.dtype), tuple(value.shape))
        if got != seen.spec:
            hint = (
                f"; call .to({to_torch_dtype(seen.spec.dtype)})"
                if got.shape == seen.spec.shape
                else ""
            )
            raise ShapeMismatch(
                f"{at_line()}a tensor of {got} is assigned to {seen.site}{at}, which is "
                f"{seen.spec}{hint}"
            )
        if isinstance(value, TracedTensor):
            self.recorder.check_own(value)
            return value
        return self.recorder.traced(self.recorder.const(value), got)


def _same_view(alias: Alias, cell: Cell) -> Alias:
    """The alias that sees `cell` as `alias` sees its own."""
    if alias.parent is None or alias.view is None:
        return cell.root
    return _same_view(alias.parent, cell).through(alias.view)


def _merge(inputs: Sequence[Mapping[int, Moment]]) -> dict[int, Moment]:
    return merge_reads(inputs)
