"""What the body of a trace has read and written, site by site: the rules that keep it honest.

1. Across sites, event order; at one site, program order. A site is read once; later looks give the
   same object, or the one that was assigned since.
2. An edit is refused if something that depends on it was read before (`LateEdit`), and if its value
   depends on something later in the same invoke (`ImpossibleOrder`): both at the user's line.
3. At the end each site has at most one in-place write (what happened to the memory that was read)
   and one assignment (what the model sees instead), in this order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glasshive.client.constants import Constants
from glasshive.client.functional import Cell
from glasshive.client.recorder import Recorder
from glasshive.client.source_lines import Mark, here, mark, resolve
from glasshive.client.traced import TracedTensor
from glasshive.graph.errors import ImpossibleOrder, LateEdit, NotASite, NotYet, ShapeMismatch
from glasshive.graph.graph import NodeId, Read, Ref, Site, Skip, Write
from glasshive.graph.kernels import from_torch_dtype, to_torch_dtype
from glasshive.graph.order import InvokeShape, merge_reads
from glasshive.graph.outline import Outline
from glasshive.graph.tensors import TensorSpec


@dataclass
class _Seen:
    """One site of one invoke: what was read there first, and what stands there now."""

    site: Site
    invoke: int
    event: int
    spec: TensorSpec
    memory: Cell | None = None
    current: TracedTensor | None = None
    assigned_at: Mark = None
    skipped: tuple[TracedTensor, Mark] | None = None


class Sites:
    """The reads and writes of one trace."""

    def __init__(self, outline: Outline, constants: Constants) -> None:
        self.outline = outline
        self.recorder = Recorder(merge=_merge, constants=constants)
        self.invokes: list[InvokeShape] = []
        self._seen: dict[tuple[int, Site], _Seen] = {}
        self._reads: dict[int, list[tuple[int, Site, Mark]]] = {}
        self._edits: dict[int, list[tuple[int, Mapping[int, int]]]] = {}
        self._skipped: dict[int, list[str]] = {}

    def read(self, site: Site, invoke: int) -> TracedTensor:
        """What stands at a site now. Raises UnknownModule or NotASite."""
        seen = self._find(site, invoke)
        if seen.current is None:
            # The model carries every earlier edit of the invoke here, and what that depends on.
            earlier = [info for event, info in self._edits.get(invoke, ()) if event < seen.event]
            info = merge_reads([{invoke: seen.event}, *earlier])
            node = self.recorder.add(Read(site, invoke), info)
            seen.memory = self.recorder.new_cell(
                node,
                seen.spec,
                on_mutate=lambda cell: self._check_late(seen),
                after_mutate=lambda cell, value: self._check_order(seen, value),
            )
            seen.current = self.recorder.tensor_of(seen.memory)
            self._reads.setdefault(invoke, []).append((seen.event, site, mark()))
        return seen.current

    def assign(self, site: Site, invoke: int, value: object) -> None:
        """Give the model `value` at a site. Raises what the rules above say, or ShapeMismatch."""
        seen = self._find(site, invoke)
        if value is seen.current:
            return  # `site.output += v` assigns back what it edited in place
        self._check_writable(seen)
        self._check_late(seen)
        traced = self._as_traced(value, seen)
        self._check_order(seen, traced._alias.value())
        seen.current = traced
        seen.assigned_at = mark()
        self._watch(traced._alias.cell, seen)

    def skip(self, module: str, invoke: int, value: object) -> None:
        """Have the model not run a module: its output is `value`, which may use its input.

        Raises NotASite for a module that gives more than one tensor or that holds blocks, and what
        `assign` raises.
        """
        info = self.outline.module(module)
        self.outline.event(Site(module, "output"))
        if len(info.outputs) != 1 or self.outline.holds_blocks(module):
            raise NotASite(
                f"{_line()}{module} cannot be skipped: it gives {len(info.outputs)} tensors, or "
                "holds the blocks themselves; skip a block, or a module inside one"
            )
        seen = self._find(Site(module, "output", info.outputs[0].path), invoke)
        entrance = dataclasses.replace(seen, event=info.input_event or 0)
        self._check_writable(seen)
        self._check_late(entrance)
        traced = self._as_traced(value, seen)
        self._check_order(entrance, traced._alias.value())
        seen.current = traced
        seen.skipped = (traced, mark())
        self._skipped.setdefault(invoke, []).append(module)

    def writes(self) -> list[tuple[Write | Skip, Mark]]:
        """What the model is given, in the order of events, each with the user's line of it."""
        found: list[tuple[Write | Skip, Mark]] = []
        for seen in sorted(self._seen.values(), key=lambda one: (one.invoke, one.event)):
            if seen.skipped is not None:
                value, where = seen.skipped
                skip = Skip(seen.site.module, seen.invoke, Ref(value._alias.value()))
                found.append((skip, where))
            if seen.memory is not None and seen.memory.marks:
                write = Write(seen.site, seen.invoke, Ref(seen.memory.vid), "inplace")
                found.append((write, seen.memory.marks[-1]))
            if seen.assigned_at is not None and seen.current is not None:
                write = Write(seen.site, seen.invoke, Ref(seen.current._alias.value()), "set")
                found.append((write, seen.assigned_at))
        return found

    def _watch(self, cell: Cell, seen: _Seen) -> None:
        """Hold later in-place edits of an assigned tensor to the rules of the site it stands at."""
        before, after = cell.on_mutate, cell.after_mutate

        def stands_here() -> bool:
            return seen.current is not None and seen.current._alias.cell is cell

        def on_mutate(edited: Cell) -> None:
            if before is not None:
                before(edited)
            if stands_here():
                self._check_late(seen)

        def after_mutate(edited: Cell, value: NodeId) -> None:
            if after is not None:
                after(edited, value)
            if stands_here():
                self._check_order(seen, value)

        cell.on_mutate, cell.after_mutate = on_mutate, after_mutate

    def _find(self, site: Site, invoke: int) -> _Seen:
        key = (invoke, site)
        seen = self._seen.get(key)
        if seen is None:
            event = self.outline.event(site)
            for skipped in self._skipped.get(invoke, ()):
                if site.module.startswith(f"{skipped}."):
                    raise NotASite(
                        f"{_line()}{site} is inside {skipped}, which this invoke skips, so it "
                        "never runs; read it in another invoke"
                    )
            leaf = self.outline.leaf(site)
            shape = self.invokes[invoke]
            spec = TensorSpec(leaf.dtype, leaf.shape(shape.batch, shape.seq))
            seen = self._seen[key] = _Seen(site, invoke, event, spec)
        return seen

    def _check_writable(self, seen: _Seen) -> None:
        info = self.outline.modules[seen.site.module]
        if info.bypasses and seen.site.io == "output":
            raise NotYet(
                f"{_line()}{seen.site} reaches every block beside the hidden states (each peer "
                "computes it for itself), so one peer cannot edit it for all; edit what the blocks "
                "make of it instead"
            )
        if self.outline.leaf(seen.site).batch_axis is None:
            raise NotASite(
                f"{_line()}{seen.site} is one tensor for all rows, so no invoke can edit it alone"
            )

    def _check_late(self, seen: _Seen) -> None:
        self._check_writable(seen)
        for event, site, where in self._reads.get(seen.invoke, ()):
            if event > seen.event:
                read_at = f" at {line}" if (line := resolve(where)) else ""
                raise LateEdit(
                    f"{_line()}late edit: {seen.site} runs before {site}, which was read already"
                    f"{read_at} and depends on it; move this edit above "
                    "that read, or read it in a second invoke"
                )

    def _check_order(self, seen: _Seen, value: NodeId) -> None:
        behind: Mapping[int, int] = self.recorder.value_info[value]
        latest = behind.get(seen.invoke, -1)
        if latest > seen.event:
            raise ImpossibleOrder(
                f"{_line()}impossible edit: {seen.site} runs before {self._site_at(latest)}, which "
                "the new value depends on; take that value in one invoke and write it in another"
            )
        self._edits.setdefault(seen.invoke, []).append((seen.event, behind))

    def _site_at(self, event: int) -> str:
        for info in self.outline.modules.values():
            if info.input_event == event:
                return f"{info.path}.input"
            if info.output_event == event:
                return f"{info.path}.output"
        return f"event {event}"

    def _as_traced(self, value: object, seen: _Seen) -> TracedTensor:
        if isinstance(value, int | float | bool):
            value = torch.full(seen.spec.shape, value, dtype=to_torch_dtype(seen.spec.dtype))
        if not isinstance(value, Tensor):
            raise ShapeMismatch(
                f"{_line()}a {type(value).__name__} is assigned to {seen.site}; a tensor of "
                f"{seen.spec} is wanted"
            )
        got = TensorSpec(from_torch_dtype(value.dtype), tuple(value.shape))
        if got != seen.spec:
            hint = (
                f"; call .to({to_torch_dtype(seen.spec.dtype)})"
                if got.shape == seen.spec.shape
                else ""
            )
            raise ShapeMismatch(
                f"{_line()}a tensor of {got} is assigned to {seen.site}, which is {seen.spec}{hint}"
            )
        if isinstance(value, TracedTensor):
            self.recorder.check_own(value)
            return value
        return self.recorder.traced(self.recorder.const(value), got)


def _merge(inputs: Sequence[Mapping[int, int]]) -> dict[int, int]:
    return merge_reads(inputs)


def _line() -> str:
    line = here()
    return f"{line}: " if line else ""
