"""The outline of a model: its modules, the order in which they run, and what may be read there.

The model's forward pass is a total order of *events*. A module that is called exactly once has two:
its input, just before it runs, and its output, just after. Events carry a *block*: -1 before
block 0 (embeddings), the block's index inside it, `n_blocks` after the last (norm and head).

A padded pass has the same modules in the same order, but other tensors: a mask where there was
none, and position tables that have a row for each prompt instead of one for all. So has a step of a
generation, which has one new token and a cache of those before it. So a module's tensors are known
for each kind of pass.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, Literal, TypeAlias

from glasshive.graph.dtypes import DType
from glasshive.graph.errors import NotASite, UnknownModule, UnsupportedModel
from glasshive.graph.graph import IO, LeafPath, Site
from glasshive.graph.tensors import TensorSpec

Axis: TypeAlias = int | Literal["batch", "seq", "total"]

GENERATOR: Final = "generator"
"""Where the tokens of a generation are chosen: the last site of a pass, as if it were a module."""


class PassKind(StrEnum):
    """What decides which tensors a pass has. The values are words for messages.

    As in transformers' `generate`, the prompt of a generation has the logits of its last token
    only, and a step has one token, and a cache of those before it. The last chunk of a prompt has
    some tokens, and a cache, too.
    """

    PLAIN = "in a batch without padding"
    PADDED = "in a batch with padding"
    PROMPT = "in the prompt of a generation"
    PADDED_PROMPT = "in the padded prompt of a generation"
    CHUNK = "in the last chunk of a prompt"
    PADDED_CHUNK = "in the last chunk of a padded prompt"
    STEP = "in a step after the prompt"
    PADDED_STEP = "in a step after a padded prompt"

    @staticmethod
    def of_trace(padded: bool) -> PassKind:
        """The kind of a pass of a trace."""
        return PassKind.PADDED if padded else PassKind.PLAIN

    @staticmethod
    def of_step(padded: bool, seq: int, past: int) -> PassKind:
        """The kind of a pass of a generation: so many tokens, and so many before them."""
        if not past:
            return PassKind.PADDED_PROMPT if padded else PassKind.PROMPT
        if seq == 1:  # also where it is the last one of a prompt
            return PassKind.PADDED_STEP if padded else PassKind.STEP
        return PassKind.PADDED_CHUNK if padded else PassKind.CHUNK


@dataclass(frozen=True, slots=True)
class Leaf:
    """One tensor among a module's inputs or outputs, with the meaning of each of its axes.

    `batch` are the rows, `seq` the tokens of the pass, `total` these and all before them.
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

    def shape(self, batch: int, seq: int, past: int = 0) -> tuple[int, ...]:
        """The leaf's shape for `batch` rows of `seq` tokens, `past` tokens being in the cache."""
        sizes = {"batch": batch, "seq": seq, "total": past + seq}
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


@dataclass(frozen=True, slots=True)
class Steps:
    """What the passes of a generation have that those of a trace have not.

    `leaves` are the tensors that each module takes or gives in them, `cached` the modules that are
    given the cache. `cache_bytes` is, for each block, what a row keeps however long it is, and what
    each token adds at most. `masked`: whether the mask of a padded prompt goes on in its steps.
    `in_chunks`: whether transformers can run a prompt of such a model chunk by chunk.
    """

    leaves: Mapping[tuple[str, IO, PassKind], tuple[Leaf, ...]]
    cached: frozenset[str]
    cache_bytes: tuple[tuple[int, int], ...]
    masked: bool
    in_chunks: bool


def _no_steps() -> Steps:
    raise UnsupportedModel("this outline has traces only")


@dataclass(frozen=True, slots=True)
class Outline:
    """A model's modules by path, and the block of every event.

    `steps` finds what a generation needs to know, or raises UnsupportedModel: only generations ask.
    """

    modules: Mapping[str, ModuleInfo]
    blocks_path: str
    n_blocks: int
    block_of_event: tuple[int, ...]
    vocabulary_tokens: int
    max_positions_tokens: int | None
    steps: Callable[[], Steps] = field(default=_no_steps, compare=False, repr=False)

    @property
    def n_events(self) -> int:
        """The number of events in one forward pass, without the choice of a token behind it."""
        return len(self.block_of_event) - (GENERATOR in self.modules)

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
        if event is None and info.path == GENERATOR:
            raise NotASite(
                "generator is where tokens are chosen: it has an output, the chosen ones, and "
                "nothing else; what they are chosen by are the logits of the model's head"
            )
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

    def leaves(self, module: str, io: IO, kind: PassKind) -> tuple[Leaf, ...]:
        """The tensors that a module takes or gives in a pass of that kind.

        Raises UnknownModule, and UnsupportedModel for a step if the model can't be generated with.
        """
        info = self.module(module)
        if kind is PassKind.PLAIN:
            return info.inputs if io == "input" else info.outputs
        if kind is PassKind.PADDED:
            return info.padded_inputs if io == "input" else info.padded_outputs
        return self.steps().leaves.get((module, io, kind), ())

    def leaf(self, site: Site, kind: PassKind) -> Leaf:
        """The tensor at `site` in a pass of that kind.

        Raises UnknownModule, or NotASite with the names of the tensors that are there.
        """
        self.event(site)
        leaves = self.leaves(site.module, site.io, kind)
        for leaf in leaves:
            if leaf.path == site.leaf:
                return leaf
        info = self.modules[site.module]
        others = (
            (PassKind.PLAIN, info.inputs if site.io == "input" else info.outputs),
            (PassKind.PADDED, info.padded_inputs if site.io == "input" else info.padded_outputs),
        )
        is_elsewhere = any(
            leaf.path == site.leaf for other, there in others if other is not kind for leaf in there
        )
        of_trace = kind in (PassKind.PLAIN, PassKind.PADDED)
        where = kind.value if is_elsewhere or not of_trace else "here"
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

    @property
    def last_block_event(self) -> int | None:
        """The event behind which no block runs any more: the output of the last one."""
        return self.modules[f"{self.blocks_path}.{self.n_blocks - 1}"].output_event

    def block(self, event: int) -> int:
        """The block in which `event` happens: -1 before block 0, `n_blocks` after the last."""
        return self.block_of_event[event]

    def is_block(self, path: str) -> bool:
        """Whether a module is one of the blocks."""
        return path.rpartition(".")[0] == self.blocks_path

    def holds_blocks(self, path: str) -> bool:
        """Whether a module contains the blocks, and so lies on several peers."""
        return not path or self.blocks_path == path or self.blocks_path.startswith(f"{path}.")

    def are_tokens(self, ids: Iterable[int]) -> bool:
        """Whether all of them are in the vocabulary."""
        return all(0 <= one < self.vocabulary_tokens for one in ids)

    def fills_cache(self, path: str) -> bool:
        """Whether a module, or one inside it, keeps something for later steps."""
        return any(one == path or one.startswith(f"{path}.") for one in self.steps().cached)

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
