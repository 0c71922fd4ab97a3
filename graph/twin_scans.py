"""Runs of a model's twin: which modules run, in which order, and the axes of their tensors.

A run has no data. What it finds is read off by running the twin twice, at two sizes: an axis whose
size followed the batch, the sequence or what is in the cache is typed so.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from glasshive.graph.errors import (
    GlasshiveError,
    UnsupportedModel,
)
from glasshive.graph.graph import IO, LeafPath
from glasshive.graph.kernels import from_torch_dtype
from glasshive.graph.memory import is_out_of_memory
from glasshive.graph.outline import Axis, Leaf, PassKind
from glasshive.graph.tensor_trees import tensor_leaves

# (batch, tokens of the prompt) of the two runs. A step behind a prompt has one more token.
_SIZES: Final = ((2, 7), (3, 11))
_AXES: Final[Mapping[tuple[int, int], Axis]] = {(2, 3): "batch", (7, 11): "seq"}
_STEP_AXES: Final[Mapping[tuple[int, int], Axis]] = {(2, 3): "batch", (8, 12): "total"}

LAST_LOGITS: Final = "logits_to_keep"
"""The argument by which `generate` asks for the logits of the last tokens only."""
GENERATE_CACHE: Final = "past_key_values"
"""The argument in which `generate` looks for the cache of a prompt in chunks."""
_CACHE_KEYWORDS: Final = (GENERATE_CACHE, "cache_params")

ONE_RUN: Final = threading.RLock()
"""Held while modules of any twin run: what is put on them for a run would see another thread's."""

_Tensors: TypeAlias = dict[LeafPath, torch.Tensor]
# A module's output, or one of the inputs of a module that holds the blocks.
_Source: TypeAlias = tuple[str, LeafPath | None]


@dataclass
class _Taint(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows which modules' outputs each tensor was computed from.

    In a `padded` run it also answers what transformers asks of the mask, which has no values here:
    whether it is all ones. It is not.
    """

    padded: bool
    sources: dict[int, tuple[torch.Tensor, frozenset[_Source]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def of(self, tensor: torch.Tensor) -> frozenset[_Source]:
        found = self.sources.get(id(tensor))
        return found[1] if found else frozenset()

    def add(self, tensor: torch.Tensor, sources: frozenset[_Source]) -> None:
        # Keeping the tensor keeps its id from being used again; meta tensors weigh nothing.
        self.sources[id(tensor)] = (tensor, self.of(tensor) | sources)

    def __torch_dispatch__(  # type: ignore[no-untyped-def]
        self, func, types, args=(), kwargs=None
    ):
        if self.padded and func is torch.ops.aten._local_scalar_dense.default:
            (asked,) = args
            if asked.dtype is torch.bool:
                return False
        result = func(*args, **(kwargs or {}))
        sources: frozenset[_Source] = frozenset()
        for _, tensor in tensor_leaves((args, kwargs or {})):
            sources |= self.of(tensor)
        if sources:
            for _, tensor in tensor_leaves(result):
                self.add(tensor, sources)
        return result


class _Scan:
    """One run of the twin: events, blocks, leaves, and what reaches blocks by a side way."""

    def __init__(self, twin: nn.Module, path: str, n_blocks: int, kind: PassKind) -> None:
        self.twin = twin
        self.kind = kind
        self.padded = kind in (PassKind.PADDED, PassKind.PADDED_PROMPT, PassKind.PADDED_STEP)
        self.prefix = path + "."
        self.n_blocks = n_blocks
        self.blocks: list[int | None] = []
        self.order: list[tuple[str, str]] = []
        self.calls: dict[str, int] = {}
        self.events: dict[str, tuple[int, int]] = {}
        self.tensors: dict[tuple[str, IO], _Tensors] = {}
        self.parts: dict[str, int] = {}
        self.names: dict[str, tuple[str, ...]] = {}
        self.bypasses: set[_Source] = set()
        self._beside: dict[int, torch.Tensor] = {}  # by storage, which lives as long as its tensor
        self._open: dict[str, int] = {}
        self._block: int | None = -1
        self._taint = _Taint(self.padded)
        self.cached: set[str] = set()  # the modules that are given the cache
        self.cache: Any = None  # of a generation: as it is after the pass

    def run(self, batch: int, seq: int, cache: Any = None) -> _Scan:
        """Run a prompt of that size, or the token behind one of that size that left a cache."""
        if cache is None:
            arguments = self._inputs(batch, seq, seq)
        else:
            arguments = self._inputs(batch, 1, seq + 1)
            arguments[cache_keyword(self.twin)] = self.cache = cache
        is_generated = self.kind not in (PassKind.PLAIN, PassKind.PADDED)
        if is_generated and LAST_LOGITS in accepts(self.twin):
            arguments[LAST_LOGITS] = 1
        with ONE_RUN:
            output = self._watched(arguments)
        if is_generated and cache is None:
            self.cache = self._cache_in(output)
        # Events between two blocks belong to no span: whoever happens there is no site.
        for name, (start, end) in list(self.events.items()):
            if self.blocks[start] is None or self.blocks[end] is None:
                del self.events[name]
        return self

    def _watched(self, arguments: Mapping[str, Any]) -> Any:
        """The output of the twin, whose modules are watched meanwhile."""
        handles = []
        for name, module in self.twin.named_modules():
            handles.append(
                module.register_forward_pre_hook(self._before(name), with_kwargs=True, prepend=True)
            )
            handles.append(module.register_forward_hook(self._after(name), with_kwargs=False))
        try:
            return self._forward(arguments)
        finally:
            for handle in handles:
                handle.remove()

    def _inputs(self, batch: int, seq: int, total: int) -> dict[str, Any]:
        sizes = {"input_ids": seq}
        if self.padded:
            also = {"attention_mask": total, "position_ids": seq}
            sizes |= {name: size for name, size in also.items() if name in accepts(self.twin)}
        return {
            name: torch.zeros((batch, size), dtype=torch.int64, device="meta")
            for name, size in sizes.items()
        }

    def _forward(self, arguments: Mapping[str, Any]) -> Any:
        try:
            with torch.no_grad(), self._taint, _no_warnings(), _no_padding(self.twin):
                # With a cache in play transformers does not look for packed sequences.
                return self.twin(**arguments, use_cache=True)
        except GlasshiveError:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise UnsupportedModel(
                f"the forward pass of {type(self.twin).__name__} does not run without data: {error}"
            ) from error

    def _cache_in(self, output: Any) -> Any:
        """The cache that a prompt leaves."""
        found = output.get(cache_keyword(self.twin))
        if not is_cache(found):
            raise UnsupportedModel(
                f"{type(self.twin).__name__} gives no cache of transformers' general kind, without "
                "which nothing can be generated over spans; use model.trace(...)"
            )
        return found

    def _block_index(self, name: str) -> int | None:
        rest = name[len(self.prefix) :] if name.startswith(self.prefix) else ""
        return int(rest) if rest.isdigit() else None

    def _before(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            index = self._block_index(name)
            if index is not None:
                self._block = index
                for _, tensor in _side_inputs(args, kwargs):
                    self.bypasses |= self._taint.of(tensor)
                    self._beside[_storage(tensor)] = tensor
            self.calls[name] = self.calls.get(name, 0) + 1
            self._open[name] = self._event(name, "input")
            if any(map(is_cache, (*args, *kwargs.values()))):
                self.cached.add(name)
            taken = dict(input_leaves(args, kwargs))
            self.tensors[name, "input"] = taken
            if not name or self.prefix.startswith(f"{name}."):
                for path, tensor in taken.items():
                    self._taint.add(tensor, frozenset({(name, path)}))

        return hook

    def _after(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self.events[name] = (self._open[name], self._event(name, "output"))
            self.tensors[name, "output"] = dict(tensor_leaves(output))
            if type(output) is tuple:
                self.parts[name] = len(output)
            elif isinstance(output, dict):
                self.names[name] = tuple(map(str, output))
            index = self._block_index(name)
            if index is not None:
                self._block = None if index + 1 < self.n_blocks else self.n_blocks
            elif self._block == -1:
                for _, tensor in tensor_leaves(output):
                    self._taint.add(tensor, frozenset({(name, None)}))

        return hook

    def is_beside(self, tensor: torch.Tensor) -> bool:
        """Whether blocks receive this memory beside the hidden states."""
        return _storage(tensor) in self._beside

    def _event(self, name: str, io: str) -> int:
        self.order.append((name, io))
        self.blocks.append(self._block)
        return len(self.blocks) - 1


class Scans:
    """Two runs of the twin, of different sizes: what its modules take and give.

    Those of a step come behind two of its prompt. Raises UnsupportedModel if the order of the
    modules depends on the size, or if the twin can't be run so.
    """

    def __init__(
        self,
        twin: nn.Module,
        path: str,
        n_blocks: int,
        kind: PassKind,
        prompt: Scans | None = None,
    ) -> None:
        small, large = _SIZES
        caches = (None, None) if prompt is None else (prompt.first.cache, prompt.second.cache)
        self.first: _Scan = _Scan(twin, path, n_blocks, kind).run(*small, caches[0])
        self.second: _Scan = _Scan(twin, path, n_blocks, kind).run(*large, caches[1])
        self._named = _AXES if prompt is None else _STEP_AXES
        if self.first.order != self.second.order:
            raise UnsupportedModel(
                f"{type(twin).__name__} runs its modules in an order that depends on the input's "
                "size"
            )

    def leaves(self, name: str, io: IO) -> tuple[Leaf, ...]:
        """The tensors of one site whose axes can be typed."""
        first = self.first
        bypasses = first.bypasses | self.second.bypasses
        leaves = []
        for path, tensor in first.tensors[name, io].items():
            other = self.second.tensors[name, io].get(path)
            if other is None or other.dim() != tensor.dim():
                continue
            axes = _typed_axes(tuple(tensor.shape), tuple(other.shape), self._named)
            beside = first.is_beside(tensor)
            # Made of hidden states and without rows: it would show one invoke the others' rows.
            mixes_rows = first.blocks[first.events[name][0]] != -1 and not beside
            if axes is not None and ("batch" in axes or not mixes_rows):
                dtype = from_torch_dtype(tensor.dtype)
                side_way = (name, None) in bypasses or (io == "input" and (name, path) in bypasses)
                leaves.append(Leaf(path, dtype, axes, beside, side_way))
        return tuple(leaves)


def cache_keyword(twin: nn.Module) -> str:
    """The argument that takes the cache. Raises UnsupportedModel if there is none."""
    for keyword in _CACHE_KEYWORDS:
        if keyword in accepts(twin):
            return keyword
    raise UnsupportedModel(
        f"{type(twin).__name__} takes no cache, without which nothing can be generated over spans; "
        "use model.trace(...)"
    )


def is_cache(value: object) -> bool:
    """Whether it is a cache of transformers' general kind."""
    from transformers import Cache

    return isinstance(value, Cache)


def accepts(twin: nn.Module) -> frozenset[str]:
    """The names of the arguments that the model takes."""
    return frozenset(inspect.signature(twin.forward).parameters)


def _side_inputs(args: Any, kwargs: Any) -> Iterator[tuple[LeafPath, torch.Tensor]]:
    """What a block receives besides the hidden states, which come first."""
    for path, tensor in input_leaves(args, kwargs):
        if path not in ((0,), ("hidden_states",)):
            yield path, tensor


def input_leaves(args: Any, kwargs: Any) -> Iterator[tuple[LeafPath, torch.Tensor]]:
    """The tensors among a call's arguments: (0,) is the first positional, ("x",) a keyword."""
    yield from tensor_leaves(tuple(args))
    yield from tensor_leaves(dict(kwargs))


def _storage(tensor: torch.Tensor) -> int:
    """What tells apart the memory of meta tensors, which has no address."""
    return int(tensor.untyped_storage()._cdata)


def _typed_axes(
    one: tuple[int, ...], two: tuple[int, ...], named: Mapping[tuple[int, int], Axis]
) -> tuple[Axis, ...] | None:
    axes: list[Axis] = []
    for a, b in zip(one, two, strict=True):
        axis = a if a == b else named.get((a, b))
        if axis is None:
            return None
        axes.append(axis)
    # A tensor with two batch axes has no rows that could be told apart.
    return None if axes.count("batch") > 1 else tuple(axes)


@contextlib.contextmanager
def _no_padding(twin: nn.Module) -> Iterator[None]:
    """Keep transformers from looking for padding among tokens that have no values.

    `from_config` gave the twin a configuration of its own.
    """
    config: Any = twin.config
    kept, config.pad_token_id = config.pad_token_id, None
    try:
        yield
    finally:
        config.pad_token_id = kept


@contextlib.contextmanager
def _no_warnings() -> Iterator[None]:
    """Keep the warnings of a run without data from the user."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
