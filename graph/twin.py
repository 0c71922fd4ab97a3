"""A model's twin: the Hugging Face module tree on the meta device, and the outline read off it.

The twin holds shapes and no weights. Client and peer each build their own from the configuration:
the client records against it, the peer checks against it (docs/adr/0003).

How the outline is found, for any architecture: the twin runs twice, at two pairs of (batch,
sequence) sizes. Hooks number the events; a module that was called once is a pair of sites; an axis
whose size followed the batch or the sequence is typed so, one that stayed is fixed, and a tensor
with any other axis is not offered as a site. Then it runs twice more with a padded batch, whose
mask and position tables have other axes.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from glasshive.graph.errors import (
    GlasshiveError,
    NotASite,
    UnsupportedModel,
)
from glasshive.graph.graph import IO, LeafPath
from glasshive.graph.kernels import from_torch_dtype
from glasshive.graph.memory import is_out_of_memory
from glasshive.graph.outline import Axis, Leaf, ModuleInfo, Outline

_SCANS = ((2, 7), (3, 11))
_Tensors: TypeAlias = dict[LeafPath, torch.Tensor]
# A module's output, or one of the inputs of a module that holds the blocks.
_Source: TypeAlias = tuple[str, LeafPath | None]


def build_twin(config: Any, dtype: torch.dtype, attention: str = "sdpa") -> nn.Module:
    """The causal language model of `config` on the meta device, in evaluation mode.

    `config` is a transformers configuration. No code from outside transformers is ever used.
    Experts, if there are any, are batched: the grouped kernels run on no meta tensor.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config,
            dtype=dtype,
            attn_implementation=attention,
            experts_implementation="batched_mm",
            trust_remote_code=False,
        )
    model.requires_grad_(False)
    return model.eval()


def blocks_path(model: nn.Module, config: Any) -> tuple[str, int]:
    """The path of the list of decoder blocks, and its length.

    It is the largest `ModuleList` with as many members as the configuration has hidden layers.
    Raises UnsupportedModel if there is none.
    """
    wanted = int(config.get_text_config().num_hidden_layers)
    sizes = {
        path: sum(p.numel() for p in module.parameters())
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == wanted
    }
    if not sizes:
        raise UnsupportedModel(
            f"{type(model).__name__} has no list of {wanted} blocks, so it cannot be split by block"
        )
    return max(sizes, key=lambda path: sizes[path]), wanted


@dataclass(frozen=True, slots=True)
class _Kind:
    """What decides an outline; of two twins of one kind the first is scanned."""

    model: type[nn.Module]
    config_json: str
    dtype: torch.dtype
    attention: str
    twin: nn.Module = field(compare=False)
    config: Any = field(compare=False)


def outline_of(twin: nn.Module, config: Any) -> Outline:
    """What `scan` gives, and found once in this process for all twins of one kind."""
    dtype = next(twin.parameters()).dtype
    attention = str(getattr(twin.config, "_attn_implementation", None))
    return _outline(_Kind(type(twin), config_text(config), dtype, attention, twin, config))


def config_text(config: Any) -> str:
    """What a configuration says, equal for equal ones wherever they were read from."""
    plain = {key: value for key, value in config.to_dict().items() if key != "_name_or_path"}
    return json.dumps(plain, sort_keys=True, default=str)


@functools.lru_cache(maxsize=32)
def _outline(kind: _Kind) -> Outline:
    return scan(kind.twin, kind.config)


def scan(twin: nn.Module, config: Any) -> Outline:
    """The outline of `twin`. Raises UnsupportedModel if its forward pass needs real data."""
    path, n_blocks = blocks_path(twin, config)
    plain = _Scans(twin, path, n_blocks, padded=False)
    padded = _padded_scans(twin, path, n_blocks, plain)
    first = plain.first
    modules: dict[str, ModuleInfo] = {}
    for name, module in twin.named_modules():
        calls = first.calls.get(name, 0)
        events = first.events.get(name)
        once = calls == 1 and events is not None
        modules[name] = ModuleInfo(
            path=name,
            kind=type(module).__name__,
            calls=calls,
            input_event=events[0] if once and events else None,
            output_event=events[1] if once and events else None,
            inputs=plain.leaves(name, "input") if once else (),
            outputs=plain.leaves(name, "output") if once else (),
            padded_inputs=padded(name, "input") if once else (),
            padded_outputs=padded(name, "output") if once else (),
            params={
                key: (from_torch_dtype(tensor.dtype), tuple(tensor.shape))
                for source in (module.named_parameters, module.named_buffers)
                for key, tensor in source(recurse=False)
            },
            output_parts=first.parts.get(name, 0),
            output_names=first.names.get(name, ()),
        )
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    return Outline(
        modules=modules,
        blocks_path=path,
        n_blocks=n_blocks,
        block_of_event=tuple(-1 if block is None else block for block in first.blocks),
        vocabulary_tokens=int(text.vocab_size),
        max_positions_tokens=int(limit) if isinstance(limit, int) else None,
    )


def tensor_leaves(tree: Any, path: LeafPath = ()) -> Iterator[tuple[LeafPath, torch.Tensor]]:
    """The tensors in nested tuples, lists and mappings, each with the way to it."""
    if isinstance(tree, torch.Tensor):
        yield path, tree
    elif isinstance(tree, dict):
        for key, value in tree.items():
            if isinstance(key, str):
                yield from tensor_leaves(value, (*path, key))
    elif isinstance(tree, tuple | list):
        for index, value in enumerate(tree):
            yield from tensor_leaves(value, (*path, index))


def leaf_of(tree: Any, path: LeafPath) -> torch.Tensor:
    """The tensor at `path` in a module's output. Raises NotASite if there is none."""
    here = tree
    for part in path:
        try:
            here = here[part]
        except (KeyError, IndexError, TypeError):
            here = None
            break
    if not isinstance(here, torch.Tensor):
        raise NotASite(f"no tensor at {path!r} in a {type(tree).__name__}")
    return here


def with_leaf(tree: Any, path: LeafPath, value: torch.Tensor) -> Any:
    """`tree` with the tensor at `path` replaced; the rest is shared, `tree` itself is unchanged."""
    if not path:
        return value
    part, rest = path[0], path[1:]
    if isinstance(tree, dict):
        copy = tree.copy()
        copy[part] = with_leaf(tree[part], rest, value)
        return copy
    items = list(tree)
    index = int(part)
    items[index] = with_leaf(items[index], rest, value)
    return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)


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

    def __init__(self, twin: nn.Module, path: str, n_blocks: int, padded: bool) -> None:
        self.twin = twin
        self.padded = padded
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
        self._taint = _Taint(padded)

    def run(self, batch: int, seq: int) -> _Scan:
        handles = []
        for name, module in self.twin.named_modules():
            handles.append(
                module.register_forward_pre_hook(self._before(name), with_kwargs=True, prepend=True)
            )
            handles.append(module.register_forward_hook(self._after(name), with_kwargs=False))
        names = ["input_ids"]
        if self.padded:
            names += [n for n in ("attention_mask", "position_ids") if n in _accepts(self.twin)]
        given = {n: torch.zeros((batch, seq), dtype=torch.int64, device="meta") for n in names}
        try:
            with torch.no_grad(), self._taint, _no_warnings(), _no_padding(self.twin):
                # With a cache in play transformers does not look for packed sequences.
                self.twin(**given, use_cache=True)
        except GlasshiveError:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise UnsupportedModel(
                f"the forward pass of {type(self.twin).__name__} does not run without data: {error}"
            ) from error
        finally:
            for handle in handles:
                handle.remove()
        # Events between two blocks belong to no span: whoever happens there is no site.
        for name, (start, end) in list(self.events.items()):
            if self.blocks[start] is None or self.blocks[end] is None:
                del self.events[name]
        return self

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


class _Scans:
    """Two runs of the twin, of different sizes: what its modules take and give.

    Raises UnsupportedModel if the order of the modules depends on the size.
    """

    def __init__(self, twin: nn.Module, path: str, n_blocks: int, *, padded: bool) -> None:
        self.first, self.second = (
            _Scan(twin, path, n_blocks, padded).run(*sizes) for sizes in _SCANS
        )
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
            axes = _typed_axes(tuple(tensor.shape), tuple(other.shape))
            beside = first.is_beside(tensor)
            # Made of hidden states and without rows: it would show one invoke the others' rows.
            mixes_rows = first.blocks[first.events[name][0]] != -1 and not beside
            if axes is not None and ("batch" in axes or not mixes_rows):
                dtype = from_torch_dtype(tensor.dtype)
                side_way = (name, None) in bypasses or (io == "input" and (name, path) in bypasses)
                leaves.append(Leaf(path, dtype, axes, beside, side_way))
        return tuple(leaves)


def _padded_scans(
    twin: nn.Module, path: str, n_blocks: int, plain: _Scans
) -> Callable[[str, IO], tuple[Leaf, ...]]:
    """What finds the tensors of a site in a padded batch.

    Where the twin can't be run padded, these are the tensors that have rows without padding, too.
    """
    try:
        if "attention_mask" not in _accepts(twin):
            raise UnsupportedModel(f"{type(twin).__name__} takes no attention mask")
        padded = _Scans(twin, path, n_blocks, padded=True)
        if padded.first.order != plain.first.order:
            raise UnsupportedModel(f"{type(twin).__name__} runs other modules for a padded batch")
    except UnsupportedModel:
        return lambda name, io: tuple(
            leaf for leaf in plain.leaves(name, io) if leaf.batch_axis is not None
        )
    return padded.leaves


def _accepts(twin: nn.Module) -> frozenset[str]:
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


def _typed_axes(one: tuple[int, ...], two: tuple[int, ...]) -> tuple[Axis, ...] | None:
    axes: list[Axis] = []
    for a, b in zip(one, two, strict=True):
        if a == b:
            axes.append(a)
        elif (a, b) == (_SCANS[0][0], _SCANS[1][0]):
            axes.append("batch")
        elif (a, b) == (_SCANS[0][1], _SCANS[1][1]):
            axes.append("seq")
        else:
            return None
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
