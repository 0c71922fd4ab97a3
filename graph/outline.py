"""The outline of a model: its modules, the order in which they run, and what may be read there.

The model's forward pass is a total order of *events*. A module that is called exactly once has two:
its input, just before it runs, and its output, just after. Events carry a *block*: -1 before
block 0 (embeddings), the block's index inside it, `n_blocks` after the last (norm and head).

A padded pass has the same modules in the same order, but other tensors: a mask where there was
none, and position tables that have a row for each prompt instead of one for all. So a module's
tensors are known for both kinds of pass.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from glasshive.graph.dtypes import DType
from glasshive.graph.errors import NotASite, UnknownModule
from glasshive.graph.graph import IO, LeafPath, Site
from glasshive.graph.tensors import TensorSpec

Axis: TypeAlias = int | Literal["batch", "seq"]


@dataclass(frozen=True, slots=True)
class Leaf:
    """One tensor among a module's inputs or outputs, with the meaning of each of its axes.

    `beside`: it is, or shares memory with, what every block receives beside the hidden states.
    `bypasses`: what is made of it reaches blocks other than through the hidden states, so that
    every peer computes it for itself and none can edit it for all.
    """

    path: LeafPath
    dtype: DType
    axes: tuple[Axis, ...]
    beside: bool = False
    bypasses: bool = False

    @property
    def batch_axis(self) -> int | None:
        """The axis that holds the rows, or None if every row sees the same tensor."""
        return self.axes.index("batch") if "batch" in self.axes else None

    def shape(self, batch: int, seq: int) -> tuple[int, ...]:
        """The leaf's shape for `batch` rows of `seq` tokens."""
        sizes = {"batch": batch, "seq": seq}
        return tuple(axis if isinstance(axis, int) else sizes[axis] for axis in self.axes)


@dataclass(frozen=True, slots=True)
class ModuleInfo:
    """What the outline knows of one module. Event numbers are None for a module that is no site.

    `inputs` and `outputs` are its tensors in a pass without padding, the other two in a padded one.
    """

    path: str
    kind: str
    calls: int
    input_event: int | None
    output_event: int | None
    inputs: tuple[Leaf, ...]
    outputs: tuple[Leaf, ...]
    padded_inputs: tuple[Leaf, ...]
    padded_outputs: tuple[Leaf, ...]
    params: Mapping[str, tuple[DType, tuple[int, ...]]]
    output_parts: int = 0  # how long a tuple its output is; 0 for a tensor or a mapping
    output_names: tuple[str, ...] = ()  # of a mapping's values, in order, tensors or not

    def leaves(self, io: IO, padded: bool) -> tuple[Leaf, ...]:
        """The tensors that it takes or gives, in a padded pass or in one that is not."""
        if padded:
            return self.padded_inputs if io == "input" else self.padded_outputs
        return self.inputs if io == "input" else self.outputs


@dataclass(frozen=True, slots=True)
class Outline:
    """A model's modules by path, and the block of every event."""

    modules: Mapping[str, ModuleInfo]
    blocks_path: str
    n_blocks: int
    block_of_event: tuple[int, ...]
    vocabulary_tokens: int
    max_positions_tokens: int | None

    @property
    def n_events(self) -> int:
        """The number of events in one forward pass."""
        return len(self.block_of_event)

    def module(self, path: str) -> ModuleInfo:
        """The module at `path`. Raises UnknownModule with the nearest names."""
        found = self.modules.get(path)
        if found is None:
            near = difflib.get_close_matches(path, self.modules, n=3, cutoff=0.5)
            hint = f"; did you mean {' or '.join(near)}?" if near else "; print(model) shows them"
            raise UnknownModule(f"the model has no module {path!r:.120}{hint}")
        return found

    def event(self, site: Site) -> int:
        """When `site` happens in a forward pass. Raises UnknownModule or NotASite."""
        info = self.module(site.module)
        event = info.input_event if site.io == "input" else info.output_event
        if event is None:
            raise NotASite(
                f"{info.path!r} ({info.kind}) is called {info.calls} times in a forward pass, so "
                f"it has no single {site.io}; use a module that is called once, such as one "
                "inside or around it"
            )
        return event

    def has_run_all(self, stop_event: int | None) -> bool:
        """Whether every module has begun before that event; None is the end of a pass."""
        return stop_event is None or not any(
            one.input_event is not None and one.input_event >= stop_event
            for one in self.modules.values()
        )

    def leaf(self, site: Site, padded: bool) -> Leaf:
        """The tensor at `site`, in a padded pass or in one that is not.

        Raises UnknownModule, or NotASite with the names of the tensors that are there.
        """
        self.event(site)
        info = self.modules[site.module]
        leaves = info.leaves(site.io, padded)
        for leaf in leaves:
            if leaf.path == site.leaf:
                return leaf
        where = "here"
        if any(leaf.path == site.leaf for leaf in info.leaves(site.io, not padded)):
            where = f"in a batch {'with' if padded else 'without'} padding"
        names = ", ".join(str(Site(site.module, site.io, leaf.path)) for leaf in leaves) or "none"
        raise NotASite(
            f"{site} is not a tensor whose rows and tokens can be told apart {where}; tensors "
            f"{where}: {names}"
        )

    def param(self, module: str, name: str) -> TensorSpec:
        """What a parameter or buffer is. Raises UnknownModule, naming those that exist."""
        params = self.module(module).params
        found = params.get(name)
        if found is None:
            names = ", ".join(params) or "none"
            raise UnknownModule(f"{module!r} has no parameter {name!r:.60}; it has {names}")
        return TensorSpec(*found)

    def hidden_spec(self, batch: int, seq: int) -> TensorSpec:
        """What crosses a cut in one pass: the hidden states `[batch, seq, hidden]`."""
        leaf = self.modules[f"{self.blocks_path}.0"].outputs[0]
        return TensorSpec(leaf.dtype, leaf.shape(batch, seq))

    def block(self, event: int) -> int:
        """The block in which `event` happens: -1 before block 0, `n_blocks` after the last."""
        return self.block_of_event[event]

    def is_block(self, path: str) -> bool:
        """Whether a module is one of the blocks."""
        return path.rpartition(".")[0] == self.blocks_path

    def holds_blocks(self, path: str) -> bool:
        """Whether a module contains the blocks, and so lies on several peers."""
        return not path or self.blocks_path == path or self.blocks_path.startswith(f"{path}.")

    def owner_block(self, path: str) -> int:
        """The block on whose peer the module's weights lie: where a call or a parameter goes."""
        info = self.module(path)
        if info.output_event is not None:
            return self.block_of_event[info.output_event]
        prefix = self.blocks_path + "."
        if path.startswith(prefix):
            return int(path[len(prefix) :].split(".", 1)[0])
        raise NotASite(
            f"{path!r} ({info.kind}) is called {info.calls} times in a forward pass and lies in no "
            "block, so no single peer hosts it; name one of its parts"
        )
