"""What an experiment gives on one machine: plain Hugging Face with torch hooks.

This is an oracle: nothing of glasshive is imported. An experiment is a list of reads and edits at
modules' inputs and outputs; `run_hooked` makes one forward pass and returns what was read.

A **leaf** says which tensor of an input or output is meant:

- None: the output itself, or the first argument of an input;
- an int: that element of a tuple output, or that positional argument;
- a str: that field of an output object, or that keyword argument;
- a tuple of those: the same, step by step.

At one site the edits come in the order given; a read sees all of them (`when="after"`, the default)
or none (`when="before"`). Modules that an edit or read calls for itself run without hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

InputOrOutput: TypeAlias = Literal["input", "output"]
Leaf: TypeAlias = "int | str | tuple[int | str, ...] | None"
LOGITS = "logits"


class Read(NamedTuple):
    """Keeps a clone of the leaf, or what `fn` makes of it, under `name` or (path, io, leaf)."""

    path: str
    io: InputOrOutput
    leaf: Leaf = None
    when: Literal["before", "after"] = "after"
    fn: Callable[[Tensor], Tensor] | None = None
    name: str | None = None

    @property
    def key(self) -> Any:
        return self.name if self.name is not None else (self.path, self.io, self.leaf)


class Edit(NamedTuple):
    """`inplace`: `fn` mutates the real tensor. `set`: what `fn` returns takes its place."""

    path: str
    io: InputOrOutput
    leaf: Leaf
    fn: Callable[[Tensor], Tensor | None]
    mode: Literal["inplace", "set"] = "inplace"


def run_hooked(
    model: nn.Module,
    input_ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    reads: Sequence[Read | tuple[Any, ...]] = (),
    edits: Sequence[Edit | tuple[Any, ...]] = (),
    seen: dict[Any, Tensor] | None = None,
) -> dict[Any, Tensor]:
    """One forward pass without gradients; returns the reads by key, and the logits as "logits".

    With a mask and no `position_ids`, the positions follow the mask. `seen` is the dict that is
    filled and returned: an edit's function may look there for what was read at earlier sites.
    """
    results = {} if seen is None else seen
    sites: dict[tuple[str, InputOrOutput], _Site] = {}
    for entry in edits:
        edit = Edit(*entry)
        sites.setdefault((edit.path, edit.io), _Site(results)).edits.append(edit)
    for entry in reads:
        read = Read(*entry)
        sites.setdefault((read.path, read.io), _Site(results)).reads.append(read)
    if attention_mask is not None and position_ids is None:
        position_ids = positions_of(attention_mask)
    device = next(model.parameters()).device
    busy = _Busy()
    with ExitStack() as stack, torch.no_grad(), _On(device):
        for (path, io), site in sites.items():
            module = model.get_submodule(path)
            handle = (
                module.register_forward_pre_hook(_pre_hook(site, busy), with_kwargs=True)
                if io == "input"
                else module.register_forward_hook(_post_hook(site, busy))
            )
            stack.callback(handle.remove)
        output = model(
            input_ids=input_ids.to(device),
            attention_mask=None if attention_mask is None else attention_mask.to(device),
            position_ids=None if position_ids is None else position_ids.to(device),
            use_cache=False,
        )
    missed = [key for key, site in sites.items() if not site.reached]
    if missed:
        raise LookupError(f"the forward pass never reached {missed}")
    results[LOGITS] = output.logits
    if device.type != "cpu":
        results.update({key: value.cpu() for key, value in results.items()})
    return results


def positions_of(attention_mask: Tensor) -> Tensor:
    """Position ids that count the real tokens of each row; padding gets 0."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def left_padded(rows: Sequence[Sequence[int]], pad_id: int = 0) -> tuple[Tensor, Tensor]:
    """(input_ids, attention_mask) of prompts of unequal length, padded on the left."""
    length = max(len(row) for row in rows)
    ids = torch.tensor([[pad_id] * (length - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


class _On(TorchFunctionMode):
    """Lets hooks written for the CPU run beside a model on another device: tensors join it."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        if len({one.device.type for one in tensors} - {"meta"}) > 1:
            args, kwargs = tree_map_only(Tensor, lambda one: one.to(self.device), (args, kwargs))
        return func(*args, **kwargs)


class _Busy:
    """Set while a hook's own function runs, so that modules it calls fire no hooks."""

    def __init__(self) -> None:
        self.now = False


class _Site:
    def __init__(self, results: dict[Any, Tensor]) -> None:
        self.results = results
        self.edits: list[Edit] = []
        self.reads: list[Read] = []
        self.reached = False

    def visit(self, structure: Any, default: Leaf) -> Any:
        """Reads and edits `structure`; returns it with replaced leaves put in."""
        self.reached = True
        self._read(structure, default, "before")
        for edit in self.edits:
            leaf = default if edit.leaf is None else edit.leaf
            replacement = edit.fn(_get(structure, leaf))
            if edit.mode == "set":
                if replacement is None:
                    raise TypeError(f"an edit of mode 'set' at {edit.path} returned nothing")
                structure = _put(structure, leaf, replacement.to(_get(structure, leaf).device))
        self._read(structure, default, "after")
        return structure

    def _read(self, structure: Any, default: Leaf, when: str) -> None:
        for read in self.reads:
            if read.when == when:
                tensor = _get(structure, default if read.leaf is None else read.leaf)
                value = tensor if read.fn is None else read.fn(tensor)
                self.results[read.key] = value.detach().clone()


def _pre_hook(site: _Site, busy: _Busy) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if busy.now:
            return None
        busy.now = True
        try:
            first: Leaf = 0 if args else next(iter(kwargs))
            # One mapping for both: ints are positional arguments, strings are keywords.
            inputs = site.visit({**dict(enumerate(args)), **kwargs}, first)
        finally:
            busy.now = False
        return (
            tuple(inputs[index] for index in range(len(args))),
            {name: inputs[name] for name in kwargs},
        )

    return hook


def _post_hook(site: _Site, busy: _Busy) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if busy.now:
            return None
        busy.now = True
        try:
            return site.visit(output, None)
        finally:
            busy.now = False

    return hook


def _steps(leaf: Leaf) -> tuple[int | str, ...]:
    if leaf is None:
        return ()
    return leaf if isinstance(leaf, tuple) else (leaf,)


def _get(structure: Any, leaf: Leaf) -> Tensor:
    for step in _steps(leaf):
        structure = structure[step]
    if not isinstance(structure, Tensor):
        raise TypeError(f"leaf {leaf!r} is a {type(structure).__name__}, wanted a tensor")
    return structure


def _put(structure: Any, leaf: Leaf, value: Tensor) -> Any:
    """`structure` with `value` at `leaf`: tuples and dicts are rebuilt, not changed."""
    steps = _steps(leaf)
    if not steps:
        return value
    first, rest = steps[0], steps[1:]
    inner = _put(structure[first], rest, value)
    if isinstance(structure, dict):
        return type(structure)({**structure, first: inner})
    if isinstance(structure, tuple) and isinstance(first, int):
        at = first % len(structure)
        return (*structure[:at], inner, *structure[at + 1 :])
    raise TypeError(f"leaf {leaf!r} lies in a {type(structure).__name__}, wanted a tuple or dict")
