"""What the model's own modules give for values of given specs, found on the twin.

A call in a trace is one module, given tensors by position. The client asks here while it records,
and the peer before it runs anything, so both refuse the same calls: what the module itself refuses,
and what torch refuses of real tensors but not of meta ones.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from glasshive.graph.budget import Cost, SpecArg, Surroundings
from glasshive.graph.dtypes import DType
from glasshive.graph.errors import BadGraph, NotASite, ShapeMismatch, UnknownModule
from glasshive.graph.graph import Call, Param, Read
from glasshive.graph.kernels import from_torch_dtype, infer, spec_of, to_torch_dtype
from glasshive.graph.one_dtype import ONE_DTYPE
from glasshive.graph.order import Passes, spec_of_read
from glasshive.graph.outline import Outline
from glasshive.graph.tensors import TensorSpec
from glasshive.graph.twin_scans import ONE_RUN


class Calls:
    """What the model's own modules give for values of given specs, found on the twin."""

    _KEPT = 4096

    def __init__(self, twin: nn.Module, outline: Outline) -> None:
        self._modules = dict(twin.named_modules())
        self._outline = outline
        self._known: dict[tuple[str, tuple[TensorSpec, ...]], tuple[TensorSpec, int]] = {}

    def spec(self, path: str, args: tuple[TensorSpec, ...]) -> TensorSpec:
        """The spec of `module(*args)`. Raises what `run` raises."""
        return self.run(path, args)[0]

    def run(self, path: str, args: tuple[TensorSpec, ...]) -> tuple[TensorSpec, int]:
        """The spec of `module(*args)`, and the bytes of all that is made on the way to it.

        Nothing is freed in that count, so it is at least what the call takes at its worst moment.
        Raises UnknownModule, NotASite for a module that holds blocks or gives no single tensor, and
        ShapeMismatch if the module refuses the arguments, naming what to convert or what it lacks.
        """
        key = (path, args)
        found = self._known.get(key)
        if found is None:
            found = self._run(path, args)
            if len(self._known) >= self._KEPT:
                self._known.clear()
            self._known[key] = found
        return found

    def flops(self, path: str, result: TensorSpec) -> int:
        """About what a call costs: two for every weight and row of the result."""
        weights: int = sum(tensor.numel() for tensor in self._modules[path].parameters())
        rows = result.numel // max(result.shape[-1], 1) if result.shape else 1
        return 2 * max(weights, 1) * max(rows, 1)

    def _run(self, path: str, args: tuple[TensorSpec, ...]) -> tuple[TensorSpec, int]:
        module = self._modules.get(path)
        if module is None:
            raise UnknownModule(f"the model has no module {path!r:.120}")
        if self._outline.holds_blocks(path):
            raise NotASite(
                f"{path or 'the model'} holds the blocks, which lie on several peers, so it cannot "
                "be called; call the parts that you need"
            )
        tensors = [
            torch.empty(spec.shape, dtype=to_torch_dtype(spec.dtype), device="meta")
            for spec in args
        ]
        call = f"{path}({', '.join(map(str, args))})"
        watch = _Watch()
        names = tuple(inspect.signature(module.forward).parameters)
        wanted = self._wanted(path, names, args)
        others = [(a.dtype, b) for a, b in zip(args, wanted, strict=True) if a.dtype != b]
        convert = "".join(
            f"; {to.value} is wanted: call .to({to_torch_dtype(to)}) on the value"
            for _, to in others[:1]
        )
        for got, to in others:
            if _is_float(got) != _is_float(to):
                raise ShapeMismatch(f"{call} is refused: it takes no {got.value}{convert}")
        try:
            inspect.signature(module.forward).bind(*tensors)
            with ONE_RUN, torch.no_grad(), watch:
                result = module(*tensors)
        except _MixedDtypes as error:
            raise ShapeMismatch(f"{call} is refused: {error}{convert}") from None
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
            reason = str(error).split("\n", 1)[0]
            lacks = self._lacks(path, names, len(args))
            if lacks and not isinstance(error, RuntimeError | IndexError):
                raise ShapeMismatch(
                    f"{call} is refused: it lacks {' and '.join(lacks)}, which the model makes for "
                    "it in a forward pass and a call in a trace cannot give; call a part of it "
                    "that takes one tensor (a norm, an mlp), or have the model run it on your "
                    "value: assign its .input and read its .output"
                ) from None
            raise ShapeMismatch(f"{call} is refused: {reason:.200}") from None
        if not isinstance(result, torch.Tensor):
            raise NotASite(
                f"{path}(...) gives a {type(result).__name__}; only modules that give one tensor "
                "can be called in a trace; call a part of it, or assign its .input and read its "
                ".output"
            )
        if any(_shares(result, tensor) for tensor in tensors):
            raise NotASite(
                f"{path}(...) gives back its argument's own memory (it does nothing here, as a "
                "dropout in evaluation mode); use the value itself"
            )
        return spec_of(result), watch.made_bytes

    def _wanted(
        self, path: str, names: tuple[str, ...], args: tuple[TensorSpec, ...]
    ) -> list[DType]:
        """The dtypes that the model gives the module where `args` are given.

        Where that isn't known it is the dtype of the module's weights, or as given.
        """
        known = {
            leaf.path[0]: leaf.dtype
            for leaf in self._outline.module(path).inputs
            if len(leaf.path) == 1
        }
        weights = (p.dtype for p in self._modules[path].parameters() if p.is_floating_point())
        usual = next(map(from_torch_dtype, weights), None)
        found = []
        for index, spec in enumerate(args):
            dtype = known.get(index, known.get(names[index]) if index < len(names) else None)
            if dtype is None and usual is not None and _is_float(spec.dtype):
                dtype = usual
            found.append(spec.dtype if dtype is None else dtype)
        return found

    def _lacks(self, path: str, names: tuple[str, ...], count: int) -> list[str]:
        """What the model gives the module besides the first `count` tensors, by name."""
        lacking: dict[str, None] = {}
        for leaf in self._outline.module(path).inputs:
            first = leaf.path[0]
            name = names[first] if isinstance(first, int) and first < len(names) else str(first)
            if name not in names[:count] or len(leaf.path) > 1:  # a tuple stands in no call
                lacking[name] = None
        return list(lacking)


class _MixedDtypes(Exception):
    """Tensors of two dtypes, where torch takes one."""


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses on the meta device what torch refuses of real tensors' dtypes only.

    Adds up the bytes of every tensor that an op makes.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.made_bytes = 0

    def __torch_dispatch__(  # type: ignore[no-untyped-def]
        self, func, types, args=(), kwargs=None
    ):
        name = func.overloadpacket.__name__
        if name in ONE_DTYPE:
            names = (argument.name for argument in func._schema.arguments)
            _check_dtypes(name, {**dict(zip(names, args, strict=False)), **(kwargs or {})})
        result = func(*args, **(kwargs or {}))
        taken = _tensors((args, kwargs))
        self.made_bytes += sum(
            made.untyped_storage().nbytes()
            for made in _tensors(result)
            if not any(_shares(made, one) for one in taken)
        )
        return result


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [one for one in tree_leaves(tree) if isinstance(one, torch.Tensor)]


def _check_dtypes(name: str, bound: dict[str, Any]) -> None:
    keys = ONE_DTYPE[name]
    if name == "native_layer_norm" and not _is_mixed_norm(bound):
        keys = ("input", *keys)
    found = [bound[key].dtype for key in keys if isinstance(bound.get(key), torch.Tensor)]
    if len(set(found)) > 1:
        kinds = " and ".join(from_torch_dtype(one).value for one in dict.fromkeys(found))
        raise _MixedDtypes(f"{name} takes tensors of one dtype, but got {kinds}")


def _is_mixed_norm(bound: dict[str, Any]) -> bool:
    """Whether it is what torch allows: weights of 32 bits on a value of 16."""
    weight = bound.get("weight")
    return (
        isinstance(weight, torch.Tensor)
        and weight.dtype == torch.float32
        and bound["input"].dtype in (torch.bfloat16, torch.float16)
    )


def _is_float(dtype: DType) -> bool:
    return to_torch_dtype(dtype).is_floating_point


def _shares(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two meta tensors, whose memory has no address, have the same."""
    return int(one.untyped_storage()._cdata) == int(other.untyped_storage()._cdata)


def surroundings(outline: Outline, calls: Calls, passes: Passes) -> Surroundings:
    """What admission must know of the model: sites, calls and parameters for these passes."""

    def read(node: Read) -> TensorSpec:
        return spec_of_read(node, outline, passes)

    def call(node: Call, args: tuple[SpecArg, ...]) -> tuple[TensorSpec, Cost]:
        tensors = tuple(arg for arg in args if isinstance(arg, TensorSpec))
        if len(tensors) != len(args):
            raise BadGraph(f"{node.module}(...) takes tensors only")
        spec, made_bytes = calls.run(node.module, tensors)
        copies_bytes = sum(tensor.nbytes for tensor in tensors)
        workspace_bytes = made_bytes + copies_bytes
        return spec, Cost(0, workspace_bytes, calls.flops(node.module, spec), spec.dtype)

    def param(node: Param) -> TensorSpec:
        return outline.param(node.module, node.name)

    return Surroundings(read, call, param, infer)
