"""The tensor that a user holds inside a trace.

A `TracedTensor` is a `torch.Tensor` without data: it has a dtype and a shape, says that it lies on
the CPU (any other device makes dataless constants or ends the process), and hands every call that
torch dispatches to `_record`. So `isinstance`, einops, `torch.nn.functional` and modules of the
user's own work on it as on any tensor.

After its trace it is either filled, and then a plain tensor in all but name (saved.py), or it was
not saved, and any use says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NoReturn, cast

import torch
from torch.utils._mode_utils import no_dispatch

import glasshive.client.canonical_shapes  # noqa: F401  (its import registers the rules)
from glasshive.client.canonical import number_text
from glasshive.client.errors import (
    AmbientState,
    DataDependent,
    Misfit,
    NotSaved,
    OutOfSight,
    TraceError,
)
from glasshive.client.functional import Alias, Cell, DeadCell, Layout, layout_of
from glasshive.client.lowering import lower
from glasshive.client.plain_numbers import NORMALISE
from glasshive.client.recipe import Fresh, Given, Out, Recipe, Shared
from glasshive.client.source_lines import at_line, here
from glasshive.graph.errors import NotYet
from glasshive.graph.graph import Arg, NodeId, Ref

if TYPE_CHECKING:
    from glasshive.client.recorder import Recorder

_RECIPES_MAX: Final = 16_384
_recipes: dict[tuple[Any, ...], Recipe] = {}


def _needs_number(use: str) -> Any:
    """A method that refuses, because `use` would need a number."""

    def refuse(self: TracedTensor, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse(self, DataDependent, number_text(use))

    return refuse


class TracedTensor(torch.Tensor):
    """A value of the graph, seen through an alias of a cell."""

    _alias: Alias

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def wrap(alias: Alias) -> TracedTensor:
        """A traced tensor that shows what `alias` sees."""
        tensor: TracedTensor = make_wrapper(TracedTensor, alias.layout)
        tensor._alias = alias
        return tensor

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _record(func, args, kwargs)

    # What the user asks of a value --------------------------------------------------------------

    def save(self) -> TracedTensor:
        """Bring this value back: after the block it is a tensor. Returns itself."""
        recorder = _open_recorder(self)
        return recorder.save(self)

    def __repr__(self) -> str:  # type: ignore[override]
        state = "traced" if self._alias.cell.recorder.is_open else "not saved"
        return f"<{state} tensor {self._alias.layout}>"

    def __str__(self) -> str:
        return repr(self)

    def __format__(self, spec: str) -> str:
        if not spec:
            return repr(self)
        _refuse(self, DataDependent, number_text(f"the format {spec!r:.20}"))

    # Devices do not exist in a trace ------------------------------------------------------------

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Convert to a dtype. A device is ignored: the peer that computes decides."""
        kept = []
        copy = kwargs.pop("copy", False)
        dtype = kwargs.pop("dtype", None)
        other = kwargs.pop("other", None)
        kwargs.pop("device", None)
        kwargs.pop("non_blocking", None)
        for position, arg in enumerate(args):
            if isinstance(arg, torch.dtype):
                dtype = arg
            elif isinstance(arg, torch.Tensor):
                other = arg
            elif isinstance(arg, bool):
                kept.append((position, arg))
        if len(kept) > 1:  # non_blocking, copy
            copy = kept[1][1]
        if other is not None:
            dtype = other.dtype
        if dtype is None and not copy and "memory_format" not in kwargs:
            _open_recorder(self)
            return self
        return super().to(self.dtype if dtype is None else dtype, copy=copy, **kwargs)

    def cpu(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Itself: the peer that computes decides on the device."""
        return self.to()

    def cuda(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Itself: the peer that computes decides on the device."""
        return self.to()

    def type(self, dtype: Any = None, non_blocking: bool = False, **kwargs: Any) -> Any:
        """The name of the tensor's type, or the value converted to `dtype`."""
        if dtype is None:
            return super().type()
        if isinstance(dtype, str):
            named = _TYPE_NAMES.get(dtype.rpartition(".")[2])
            if named is None:
                raise Misfit(f"type({dtype!r:.40}): no such tensor type", line=here())
            dtype = named
        elif not isinstance(dtype, torch.dtype):
            dtype = dtype.dtype
        return self.to(dtype)

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> NoReturn:
            alias = self.__dict__.get("_alias")
            dead = alias is not None and isinstance(alias.cell, DeadCell)
            raise AttributeError(
                f"{at_line() if dead else ''}a traced tensor has no attribute {name!r}"
                + (f": {alias.cell.reason}" if dead else ""),
                name=name,
                obj=self,
            )

    # Copies -------------------------------------------------------------------------------------

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        copied = self.clone()
        memo[id(self)] = copied
        return copied

    def __copy__(self) -> torch.Tensor:
        return self.detach()

    # Numbers, which do not exist yet ------------------------------------------------------------

    item = _needs_number(".item()")
    tolist = _needs_number(".tolist()")
    __bool__ = _needs_number("`if`, `and`, `not` or bool()")
    __int__ = _needs_number("int()")
    __float__ = _needs_number("float()")
    __complex__ = _needs_number("complex()")
    __index__ = _needs_number("a Python index, a slice, a size or range()")
    __contains__ = _needs_number("`in`")

    # Memory, which does not exist at all ----------------------------------------------------------

    def _no_memory(self, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse(
            self,
            OutOfSight,
            "a traced value has no memory here, so NumPy, pickle, storage and other libraries "
            "cannot see it; use torch functions, or save it and use it after the block; a NumPy "
            "array beside it becomes a tensor with torch.from_numpy(array)",
        )

    numpy = __array__ = __array_wrap__ = __reduce_ex__ = __reduce__ = __dlpack__ = _no_memory
    data_ptr = untyped_storage = storage = _typed_storage = storage_type = _no_memory
    share_memory_ = pin_memory = __dlpack_device__ = is_set_to = _no_memory
    __getstate__ = __setstate__ = new = _no_memory

    def _no_python(self, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse(
            self,
            OutOfSight,
            "apply_ and map_ run Python on every number, which exists only when the model runs; "
            "use torch functions",
        )

    apply_ = map_ = map2_ = _no_python

    def _no_gradient(self, *args: Any, **kwargs: Any) -> NoReturn:
        _open_recorder(self)
        raise NotYet(
            f"{at_line()}gradients through a traced model are not in this release; save the "
            "activations and differentiate what comes after them outside the block"
        )

    backward = register_hook = retain_grad = register_post_accumulate_grad_hook = _no_gradient

    # Properties that torch answers in C -----------------------------------------------------------

    @property
    def data(self) -> torch.Tensor:
        """The same value through the same memory."""
        return self.detach()

    @data.setter
    def data(self, value: object) -> NoReturn:
        _refuse(self, OutOfSight, "assigning to .data cannot be traced; use h.copy_(value)")

    @property
    def grad(self) -> Any:
        """Raises NotYet."""
        self._no_gradient()

    @grad.setter
    def grad(self, value: object) -> NoReturn:
        self._no_gradient()


def make_wrapper(kind: type[torch.Tensor], layout: Layout) -> Any:
    """A tensor of a subclass, without data, that says it lies on the CPU."""
    return _make(kind, layout.shape, strides=layout.strides, dtype=layout.dtype, device=_CPU)


_make: Callable[..., Any] = torch.Tensor._make_wrapper_subclass
_CPU: Final = torch.device("cpu")
_TYPE_NAMES: Final = {
    "DoubleTensor": torch.float64,
    "FloatTensor": torch.float32,
    "HalfTensor": torch.float16,
    "BFloat16Tensor": torch.bfloat16,
    "LongTensor": torch.int64,
    "IntTensor": torch.int32,
    "ShortTensor": torch.int16,
    "CharTensor": torch.int8,
    "ByteTensor": torch.uint8,
    "BoolTensor": torch.bool,
}


def _open_recorder(tensor: TracedTensor) -> Recorder:
    recorder = tensor._alias.cell.recorder
    if not recorder.is_open:
        raise NotSaved(not_saved_text(tensor))
    return recorder


def _refuse(tensor: TracedTensor, kind: type[TraceError], text: str) -> NoReturn:
    _open_recorder(tensor)
    raise kind(text, line=here())


def not_saved_text(tensor: TracedTensor) -> str:
    """Why a traced tensor that is used after its trace has no value."""
    alias = tensor._alias
    recorder = alias.cell.recorder
    for name, why in recorder.never_came.items():
        if recorder.saves[name] is tensor:
            return f"{at_line()}the saved value {alias.layout} never came: {why}"
    if recorder.was_saved(tensor):
        how = f"ended with {recorder.ended_with} and " if recorder.ended_with else ""
        return (
            f"{at_line()}the saved value {alias.layout} has no value, because its trace {how}"
            "has not brought results back"
        )
    made = None if isinstance(alias.cell, DeadCell) else recorder.line_of(alias.cell.vid)
    where = f", made at {made} in {recorder.title}," if made is not None else ""
    return (
        f"{at_line()}the value {alias.layout}{where} was not saved, so it did not come back; "
        "call .save() on it inside the trace"
    )


_aten: Final = torch.ops.aten
# What autocast for the CPU computes in a shorter dtype.
_LOWERED: Final = frozenset(
    {
        _aten.mm.default,
        _aten.bmm.default,
        _aten.addmm.default,
        _aten.baddbmm.default,
        _aten.convolution.default,
        _aten._scaled_dot_product_flash_attention_for_cpu.default,
    }
)


# Recording ---------------------------------------------------------------------------------------


def _record(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> Any:
    """Add one call of torch to the graph. Returns what torch would."""
    normalise = NORMALISE.get(func)
    if normalise is not None:
        func, args, kwargs = normalise(func, args, kwargs or {}, _is_traced)
    key: list[Any] = [func]
    tensors: list[Any] = []
    _flatten(args, key, tensors)
    if kwargs:
        for name, value in kwargs.items():
            key.append(name)
            _flatten((value,), key, tensors)
    recorder = _recorder_of(tensors)
    if recorder is None:
        return func(*args, **(kwargs or {}))
    if torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        _refuse_mode()
    if func in _LOWERED and _autocast_nesting():
        _check_autocast(func, tensors)
    cache_key = tuple(key)
    recipe = _recipes.get(cache_key)
    if recipe is None:
        recipe = lower(func, args, kwargs or {}, _is_traced)
        while len(_recipes) >= _RECIPES_MAX:
            del _recipes[next(iter(_recipes))]
        _recipes[cache_key] = recipe
    if recipe.writes:
        return _replay_edit(recorder, recipe, tensors)
    if recipe.reshapes:
        return _replay_reshape(recorder, recipe, func, args, kwargs or {})
    values = _replay(recorder, recipe, tensors) if recipe.steps or recipe.needs else ()
    form = recipe.form
    if form is torch.Tensor:
        return _result(recorder, recipe.outs[0], values, tensors)
    results = [_result(recorder, out, values, tensors) for out in recipe.outs]
    return None if form is None else form(results)


def _is_traced(value: object) -> bool:
    return isinstance(value, TracedTensor)


def _flatten(args: Sequence[Any], key: list[Any], tensors: list[Any]) -> None:
    """Append what the call's recipe depends on, and its tensors in order.

    Numbers go with their type: in Python 1 == 1.0 == True.
    """
    for arg in args:
        kind = type(arg)
        if kind is TracedTensor:
            key.append(arg._alias.layout)
            tensors.append(arg)
        elif kind is int or kind is bool:
            key.append(kind)
            key.append(arg)
        elif kind is float:
            key.append(kind)
            key.append(arg if arg * 0.0 == 0.0 and arg else repr(arg))  # -0.0 == 0.0, nan != nan
        elif kind is list or kind is tuple:
            key.append("[")
            _flatten(arg, key, tensors)
            key.append("]")
        elif isinstance(arg, torch.Tensor):
            key.append("plain")
            key.append(layout_of(arg))
            tensors.append(arg)
        else:
            key.append(arg)


def _recorder_of(tensors: Sequence[Any]) -> Recorder | None:
    """The open recorder of the traced tensors; None if there are none.

    Raises NotSaved for one whose trace is over, TraceError if they belong to two traces.
    """
    recorder: Recorder | None = None
    for tensor in tensors:
        if isinstance(tensor, TracedTensor):
            owner = tensor._alias.cell.recorder
            if owner is recorder:
                continue
            if not owner.is_open:
                raise NotSaved(not_saved_text(tensor))
            if recorder is not None:
                refuse_two_traces(recorder, owner)
            recorder = owner
    return recorder


def refuse_two_traces(one: Recorder, other: Recorder) -> NoReturn:
    """Raise TraceError, because values of two traces that are both open were used together."""
    traces = one.title if one.title == other.title else f"{one.title} and {other.title}"
    raise TraceError(
        f"values of two traces meet here ({traces}), but a graph is of one model and one trace; "
        "save the value in its own trace, and use it in the other when that block has ended",
        line=here(),
    )


def _refuse_mode() -> NoReturn:
    if torch.is_inference_mode_enabled():
        raise AmbientState(
            "torch.inference_mode() is open inside the trace, which hides what torch computes; "
            "leave it out: recording needs no gradients anyway",
            line=here(),
        )
    raise AmbientState(
        "gradients are switched on inside the trace (torch.enable_grad(), or another thread), but "
        "a graph records values only; leave it out",
        line=here(),
    )


def _autocast_nesting() -> int:
    """How many `torch.autocast` are open."""
    torch.autocast_increment_nesting()
    return torch.autocast_decrement_nesting()


def _check_autocast(func: Any, tensors: Sequence[Any]) -> None:
    """Raise AmbientState if an open autocast did nothing to a product of float32 tensors.

    Torch hides here for which device it is open. That for the CPU would have cast them; that for
    another device does nothing to traced values, which are on none.
    """
    if all(tensor.dtype == torch.float32 for tensor in tensors):
        raise AmbientState(
            f"torch.autocast is open inside the trace, but left {func.name()} in "
            "float32, because traced values are on no device; use torch.autocast('cpu'), or "
            "convert with .to(dtype)",
            line=here(),
        )


def _replay(recorder: Recorder, recipe: Recipe, tensors: Sequence[Any]) -> Sequence[NodeId]:
    """Add the steps of a recipe to the graph.

    The result holds the node of each step, then those of the operands from the last to the first,
    so that a recipe's negative numbers find theirs.
    """
    operands: list[NodeId | None] = [None] * len(tensors)
    for index in recipe.needs:
        tensor = tensors[index]
        if isinstance(tensor, TracedTensor):
            operands[-1 - index] = tensor._alias.value()
        else:
            operands[-1 - index] = recorder.const(tensor)
    values: list[Any] = []
    for step in recipe.steps:
        args = list(step.args)
        for position in step.refs:
            arg = args[position]
            if type(arg) is Ref:
                node = arg.node
                args[position] = Ref(values[node] if node >= 0 else operands[node])  # type: ignore[arg-type]
            else:
                args[position] = _replace(arg, values, operands)
        if step.seed is not None:
            args[step.seed] = recorder.draw_seed()
        values.append(recorder.add_op(step.op, tuple(args)))
    values.extend(operands)
    return values


def _replace(arg: Any, values: Sequence[Any], operands: Sequence[Any]) -> Arg:
    if type(arg) is Ref:
        return Ref(values[arg.node] if arg.node >= 0 else operands[arg.node])
    if type(arg) is tuple:
        return tuple(_replace(item, values, operands) for item in arg)
    return arg  # type: ignore[no-any-return]


def _result(
    recorder: Recorder, out: Out, values: Sequence[NodeId], tensors: Sequence[Any]
) -> torch.Tensor:
    if isinstance(out, Fresh):
        return TracedTensor.wrap(Cell(recorder, values[out.source], out.layout).root)
    if isinstance(out, Shared):
        alias: Alias = tensors[out.operand]._alias
        for view in out.views:
            alias = alias.through(view)
        return TracedTensor.wrap(alias)
    if isinstance(out, Given):
        given: torch.Tensor = tensors[out.operand]
        return given
    return TracedTensor.wrap(DeadCell(recorder, out.layout, out.reason).root)


def _replay_reshape(
    recorder: Recorder, recipe: Recipe, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> torch.Tensor:
    """Give a traced tensor another shape in place. One that stands in the model keeps its own."""
    tensor: TracedTensor = args[0]
    if tensor._alias.cell.site is not None:
        raise OutOfSight(
            f"an in-place change of the shape of {tensor._alias}, which the model uses; use the "
            f"form without the underscore, {func.name().removeprefix('aten::').rstrip('_')}(...)",
            line=here(),
        )
    shown = _result(recorder, recipe.outs[0], (), (tensor,))
    with no_dispatch():  # the shape that torch itself keeps of the tensor
        func(*args, **kwargs)
    tensor._alias = cast(TracedTensor, shown)._alias
    return tensor


def _replay_edit(recorder: Recorder, recipe: Recipe, tensors: Sequence[Any]) -> Any:
    """Compute what an in-place call writes, and write it."""
    for index, _ in recipe.writes:
        alias: Alias = tensors[index]._alias
        others = [
            t._alias for i, t in enumerate(tensors) if i != index and isinstance(t, TracedTensor)
        ]
        if recipe.is_copy:
            # `h[i] += v` ends in a copy of the part to itself.
            if any(other is alias for other in others):
                return tensors[index]
        elif any(alias.overlaps_partly(other) for other in others):
            raise OutOfSight(
                "the destination and another argument share some of their memory, which torch "
                "refuses; call .clone() on the argument first",
                line=here(),
            )
        alias.prepare_edit()
    values = _replay(recorder, recipe, tensors)  # all of them, before the first is written
    for index, value in recipe.writes:
        tensors[index]._alias.edit(values[value])
    results = [_result(recorder, out, (), tensors) for out in recipe.outs]
    if recipe.form is None:
        return None
    return results[0] if recipe.form is torch.Tensor else recipe.form(results)
