"""From what torch dispatches to nodes of the op table.

Recording one call of torch has two halves. *Lowering* depends only on the function, the layouts of
its tensors and its other arguments: it gives a `Recipe`, which is kept. *Replaying* a recipe
(traced.py) adds its steps to a graph. So each kind of call is lowered once, which costs some
hundred microseconds, and replayed in a few.

- The call is run on torch's meta device with the same strides. What torch refuses there is refused
  at the user's line, and the strides of the result say whether it shares memory.
- An in-place call or one with `out=` is lowered as the functional call of the same arguments, and a
  cast; its result is written to the destination.
- What each torch function becomes is in canonical.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, TypeAlias, cast

import torch

from glasshive.client.errors import (
    Misfit,
    NotInTable,
    TraceError,
)
from glasshive.client.functional import Layout, layout_of
from glasshive.client.misfits import check_destination, check_dtypes
from glasshive.client.recipe import Bound, Dead, Fresh, Given, Operand, Out, Recipe, Shared, Step
from glasshive.client.source_lines import here
from glasshive.graph.dtypes import DType
from glasshive.graph.errors import BadTensor, UnknownOp
from glasshive.graph.graph import Arg, NodeId, Ref
from glasshive.graph.kernels import from_torch_dtype
from glasshive.graph.ops import OPS, OpSpec, Parameter, nearest

Results: TypeAlias = "Ref | Out | Sequence[Ref | Out | None] | None"
Rule: TypeAlias = "Callable[[Build, Bound], Results]"


@dataclass(slots=True)
class Build:
    """A recipe in the making. `metas` are the results of the call on the meta device."""

    name: str
    metas: tuple[torch.Tensor, ...]
    destination: Layout | None = None
    steps: list[Step] = field(default_factory=list)

    @property
    def layout(self) -> Layout:
        """The layout of the first result, or of the destination of an in-place call."""
        return self.destination or layout_of(self.metas[0])

    def op(self, name: str, *args: Any, **kwargs: Any) -> Ref:
        """Add a step; its value. Arguments are brought to the kinds of the op's signature."""
        spec = OPS[name]
        given = [*args, *(_MISSING for _ in spec.params[len(args) :])]
        names = [param.name for param in spec.params]
        for key, value in kwargs.items():
            given[names.index(key)] = value
        seed = None
        full: list[Arg] = []
        for position, (param, value) in enumerate(zip(spec.params, given, strict=True)):
            if param.kind == "seed":
                seed = position
                full.append(0)
            else:
                full.append(self._argument(spec, param, value))
        return self._add(name, tuple(full), seed)

    def outputs(self, name: str, *args: Any, **kwargs: Any) -> list[Ref]:
        """Add a step of several outputs; the value of each."""
        group = self.op(name, *args, **kwargs)
        return [self.op("pick", group, index) for index in range(OPS[name].outputs)]

    def full(self, layout: Layout, value: bool | int | float) -> Ref:
        """A tensor of this dtype and shape with one value everywhere."""
        return self.op("full", layout.shape, as_kind(value, layout.dtype), layout.dtype)

    def cast(self, value: Ref, have: torch.dtype, want: torch.dtype) -> Ref:
        """The value in another dtype; itself if it has that one."""
        return value if have == want else self.op("to", value, want)

    def fit(self, value: Ref, have: Layout, want: Layout) -> Ref:
        """The value in the dtype of `want` and expanded to its shape."""
        value = self.cast(value, have.dtype, want.dtype)
        if have.shape != want.shape:
            value = self.op("expand", value, want.shape)
        return value

    def _add(self, name: str, args: tuple[Arg, ...], seed: int | None) -> Ref:
        refs = tuple(i for i, arg in enumerate(args) if isinstance(arg, Ref | tuple) and _has(arg))
        nested = any(isinstance(args[i], tuple) for i in refs)
        self.steps.append(Step(name, args, refs, nested, seed))
        return Ref(NodeId(len(self.steps) - 1))

    def _argument(self, spec: OpSpec, param: Parameter, value: Any) -> Arg:
        if value is _MISSING:
            if not isinstance(param.default, _ARG_TYPES):
                raise UnknownOp(f"{spec.signature} got no {param.name}")
            return param.default
        converted = self._convert(param, value)
        if not param.accepts(converted):
            hint = "; make a tensor of it, torch.tensor(1j)" if type(value) is complex else ""
            raise UnknownOp(
                f"{spec.signature} got {value!r:.60} for {param.name}; {param.wanted} is wanted"
                + hint
            )
        return converted

    def _convert(self, param: Parameter, value: Any) -> Arg:
        kind = param.kind
        if isinstance(value, Operand):
            return value.ref
        if isinstance(value, Ref) or value is None:
            return value
        if type(value) is complex:
            # Only where torch itself takes the number for a tensor, and in the one complex dtype.
            if self.metas and self.layout.dtype is torch.complex64 and param.kind == "operand":
                parts = (self.op("full", (), part, torch.float32) for part in _parts(value))
                return self.op("complex", *parts)
            return value  # type: ignore[return-value]  # refused by the caller
        if kind == "value":  # a number where torch takes a tensor
            return self.op("full", (), value, _NUMBER_DTYPES[type(value)])
        if kind in ("values", "optional_values", "ints"):
            items = value if isinstance(value, list | tuple) else (value,)
            return tuple(item.ref if isinstance(item, Operand) else item for item in items)
        if kind == "dtype":
            return from_torch_dtype(value) if isinstance(value, torch.dtype) else value
        if kind == "float":
            return float(value)
        if kind == "choice" and isinstance(value, int):
            return param.choices[value]
        return value  # type: ignore[no-any-return]


_NUMBER_DTYPES: Final = {bool: torch.bool, int: torch.int64, float: torch.float32}


def _parts(number: complex) -> tuple[float, float]:
    return number.real, number.imag


class _Missing:
    pass


_MISSING: Final = _Missing()
_ARG_TYPES: Final = (Ref, DType, int, float, bool, str, type(None), tuple)


def _has(arg: Arg) -> bool:
    return isinstance(arg, Ref) or (isinstance(arg, tuple) and any(_has(item) for item in arg))


def as_kind(value: bool | int | float, dtype: torch.dtype) -> bool | int | float:
    """The number as `dtype` would hold it: a float cut to an int, anything to a bool."""
    if dtype == torch.bool:
        return bool(value)
    if dtype.is_floating_point or dtype.is_complex:
        return float(value)
    return int(value)


# Rules -----------------------------------------------------------------------------------------

RULES: dict[str, Rule] = {}  # functional calls, by packet and overload: "add.Tensor"
EDITS: dict[str, Rule] = {}  # in-place calls that have no functional twin
REFUSED: dict[str, tuple[type[TraceError], str]] = {}  # packet -> why, and the way out


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register how these overloads are lowered."""

    def register(function: Rule) -> Rule:
        for name in names:
            if name in RULES:
                raise ValueError(f"two rules for {name}")
            RULES[name] = function
        return function

    return register


def edit(*names: str) -> Callable[[Rule], Rule]:
    """Register what these in-place overloads write: a value of the destination's layout."""

    def register(function: Rule) -> Rule:
        for name in names:
            EDITS[name] = function
        return function

    return register


# Arguments that say how or where, never what.
_IGNORED: Final = frozenset(
    [
        "device",
        "layout",
        "pin_memory",
        "memory_format",
        "non_blocking",
        "sparse_grad",
        "assume_unique",
        "padding_idx",
        "scale_grad_by_freq",
        "sparse",
        "check_errors",
        "driver",
        "implicit",
        "N",
        "C",
        "HxW",
    ]
)


def row(line: str) -> None:
    """Register overloads that are one op: `add.Tensor add.Scalar = add(self, other, alpha)`."""
    names, _, call = line.partition("=")
    op, _, rest = call.strip().rstrip(")").partition("(")
    if op not in OPS:
        raise ValueError(f"{op!r} is not in the op table")
    tokens = [token.strip() for token in rest.split(",")] if rest else []
    several = OPS[op].outputs > 1

    def lower_row(build: Build, bound: Bound) -> Results:
        left = dict(bound)
        args = [_LITERALS[token] if token in _LITERALS else left.pop(token) for token in tokens]
        refuse_left_over(build, left)
        return build.outputs(op, *args) if several else build.op(op, *args)

    rule(*names.split())(lower_row)


_LITERALS: Final[Mapping[str, Any]] = {"None": None, "True": True, "False": False, "()": ()}


def refuse_left_over(build: Build, left: Bound) -> None:
    """Raise NotInTable if an argument that the op has no place for says anything."""
    for name, value in left.items():
        if name not in _IGNORED and value is not None and value is not False and value != []:
            raise NotInTable(
                f"{build.name} with {name}={value!r:.60} cannot be traced", line=here()
            )


# Lowering --------------------------------------------------------------------------------------


def lower(
    func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], is_traced: Callable[[Any], bool]
) -> Recipe:
    """The recipe of a call. `is_traced` tells traced tensors from plain ones.

    Raises TraceError (Misfit, NotInTable, DataDependent, ...) at the user's line.
    """
    packet, _, overload = func.name().removeprefix("aten::").partition(".")
    name = f"{packet}.{overload or 'default'}"
    if not func.name().startswith("aten::"):
        raise NotInTable(
            f"{func.name()} is an op of another library, which peers do not have; use torch's own "
            "functions, or save its input and call it after the block",
            line=here(),
        )
    refused = REFUSED.get(packet) or REFUSED.get(name)
    if refused is not None:
        raise refused[0](refused[1], line=here())
    try:
        return _lower(func, name, args, kwargs, is_traced)
    except BadTensor as error:
        raise NotInTable(f"{packet}: {error}", line=here()) from None
    except TraceError:
        raise
    except UnknownOp as error:
        raise NotInTable(str(error), line=here()) from None


def _lower(
    func: Any,
    name: str,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    is_traced: Callable[[Any], bool],
) -> Recipe:
    operands: list[Operand] = []
    metas: list[torch.Tensor] = []

    def enter(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            layout, traced = layout_of(value), is_traced(value)
            text = str(cast(Any, value)._alias if traced else layout)
            operand = Operand(len(operands), layout, traced, text)
            operands.append(operand)
            metas.append(
                torch.empty_strided(layout.shape, layout.strides, dtype=layout.dtype, device="meta")
            )
            return operand
        if isinstance(value, list | tuple):
            return [enter(item) for item in value]
        return value

    def meta(value: Any) -> Any:
        if isinstance(value, Operand):
            return metas[value.index]
        if isinstance(value, list):
            return [meta(item) for item in value]
        return torch.device("meta") if isinstance(value, torch.device) else value

    entered = [enter(arg) for arg in args]
    named = {key: enter(value) for key, value in kwargs.items()}
    bound = _bind(func, entered, named)
    check_dtypes(name, bound)
    if bound.get("generator") is not None:
        raise NotInTable(
            "generator= cannot travel; call torch.manual_seed before the trace instead: every "
            "random op carries a seed that is drawn from torch's default generator",
            line=here(),
        )
    if torch.Tag.inplace_view in func.tags:
        return _lower_reshape(func, bound, operands, meta)
    written = [arg.name for arg in func._schema.arguments if _is_written(arg)]
    for key in written:
        check_destination(bound[key])
    if not written:
        lowering = RULES.get(name)
        if lowering is None:
            raise _unknown(name)
        results = _run_meta(name, operands, func, [meta(a) for a in entered], named, meta)
        build = Build(name, results)
        outs = _outs(build, lowering(build, bound))
        return _recipe(build, outs, (), _form(func))
    return _lower_edit(func, name, bound, written, operands, meta)


def _lower_reshape(
    func: Any, bound: Bound, operands: Sequence[Operand], meta: Callable[[Any], Any]
) -> Recipe:
    """`unsqueeze_` and its like: the view that the tensor itself becomes."""
    twin = _twin(func, is_out=False)
    if twin is None or _short(twin) not in RULES:
        raise _unknown(_short(func))
    build = Build(_short(twin), _run_meta(_short(twin), operands, twin, *_call(twin, bound), meta))
    outs = _outs(build, RULES[_short(twin)](build, bound))
    return replace(_recipe(build, outs, (), torch.Tensor), reshapes=True)


def _lower_edit(
    func: Any,
    name: str,
    bound: Bound,
    written: Sequence[str],
    operands: Sequence[Operand],
    meta: Callable[[Any], Any],
) -> Recipe:
    destinations = [bound[key] for key in written]
    before = [(d.layout.shape, d.layout.dtype) for d in destinations]
    own = EDITS.get(name)
    is_out = all(arg.kwarg_only for arg in func._schema.arguments if _is_written(arg))
    twin = None if own is not None else _twin(func, is_out)
    if own is None and (twin is None or f"{_short(twin)}" not in RULES):
        raise _unknown(name)
    _run_meta(name, operands, func, *_call(func, bound), meta)
    for destination, (shape, dtype) in zip(destinations, before, strict=True):
        now = meta(destination)
        if tuple(now.shape) != shape or now.dtype != dtype:
            raise Misfit(
                f"{name.partition('.')[0]} would resize its destination from {list(shape)} to "
                f"{list(now.shape)}; give out= a tensor of the right shape",
                line=here(),
            )
    if own is not None:
        build = Build(name, (), destinations[0].layout)
        values = [own(build, bound)]
        layouts = [destinations[0].layout]
    else:
        rest = {k: v for k, v in bound.items() if not (is_out and k in written)}
        results = _run_meta(_short(twin), operands, twin, *_call(twin, rest), meta)
        build = Build(_short(twin), results)
        lowered = RULES[_short(twin)](build, rest)
        values = list(lowered) if isinstance(lowered, Sequence) else [lowered]
        layouts = [layout_of(result) for result in results]
    writes = []
    for destination, value, layout in zip(destinations, values, layouts, strict=False):
        if not isinstance(value, Ref | Fresh):
            raise _unknown(name)
        ref = value if isinstance(value, Ref) else Ref(value.source)
        fitted = build.fit(ref, layout, destination.layout)
        writes.append((destination.index, fitted.node))
    outs = tuple(Given(destination.index) for destination in destinations)
    return _recipe(build, outs, tuple(writes), _form(func), is_copy=name in _COPIES)


_COPIES: Final = frozenset({"copy_.default", "fill_.Tensor"})


def _call(func: Any, bound: Bound) -> tuple[list[Any], dict[str, Any]]:
    args = [bound[arg.name] for arg in func._schema.arguments if not arg.kwarg_only]
    return args, {a.name: bound[a.name] for a in func._schema.arguments if a.kwarg_only}


def _bind(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Bound:
    bound: Bound = {}
    for position, arg in enumerate(func._schema.arguments):
        if position < len(args):
            bound[arg.name] = args[position]
        elif arg.name in kwargs:
            bound[arg.name] = kwargs[arg.name]
        else:
            bound[arg.name] = arg.default_value
    return bound


def _is_written(arg: Any) -> bool:
    return arg.alias_info is not None and bool(arg.alias_info.is_write)


def _run_meta(
    name: str,
    operands: Sequence[Operand],
    func: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    meta: Callable[[Any], Any],
) -> tuple[torch.Tensor, ...]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = func(*map(meta, args), **{key: meta(value) for key, value in kwargs.items()})
    except NotImplementedError:
        raise NotInTable(
            f"the shape of {name.partition('.')[0]}'s result is not known without the numbers; "
            "save its input and call it after the block",
            line=here(),
        ) from None
    except (RuntimeError, IndexError, TypeError, ValueError) as error:
        shapes = ", ".join(map(str, operands))
        raise Misfit(
            f"{name.partition('.')[0]}({shapes}): {first_line(error)}; to compare shapes, "
            "print(h.shape) in the trace",
            line=here(),
        ) from None
    if isinstance(result, torch.Tensor):
        return (result,)
    if isinstance(result, list | tuple):
        return tuple(result)
    return ()


def first_line(error: Exception) -> str:
    """What torch says, in one line without a full stop at its end."""
    return str(error).strip().split("\n", 1)[0].rstrip(".")


def _form(func: Any) -> type | None:
    returns = func._schema.returns
    if not returns:
        return None
    if len(returns) > 1:
        return tuple
    return list if str(returns[0].type).startswith("List") else torch.Tensor


def _outs(build: Build, results: Results) -> tuple[Out, ...]:
    if results is None:
        listed: list[Ref | Out | None] = []
    elif isinstance(results, Ref | Fresh | Shared | Given | Dead):
        listed = [results]
    else:
        listed = list(results)
    outs: list[Out] = []
    for index, result in enumerate(listed):
        if isinstance(result, Ref):
            outs.append(Fresh(result.node, layout_of(build.metas[index])))
        elif result is not None:
            outs.append(result)
        else:
            outs.append(_dead(build, index))
    outs.extend(_dead(build, index) for index in range(len(outs), len(build.metas)))
    return tuple(outs)


def _dead(build: Build, index: int) -> Dead:
    packet = build.name.partition(".")[0]
    return Dead(
        f"result {index} of {packet} is torch's own working memory, which peers do not give; use "
        "the other results, or compute it from the input",
        layout_of(build.metas[index]),
    )


def _recipe(
    build: Build,
    outs: tuple[Out, ...],
    writes: tuple[tuple[int, NodeId], ...],
    form: type | None,
    is_copy: bool = False,
) -> Recipe:
    used = {ref for step in build.steps for ref in _all_refs(step.args)}
    used |= {out.source for out in outs if isinstance(out, Fresh)}
    used |= {value for _, value in writes}
    needs = tuple(sorted(-1 - node for node in used if node < 0))
    return Recipe(needs, tuple(build.steps), writes, outs, form, is_copy)


def _all_refs(args: Sequence[Arg]) -> list[NodeId]:
    found: list[NodeId] = []
    for arg in args:
        if isinstance(arg, Ref):
            found.append(arg.node)
        elif isinstance(arg, tuple):
            found.extend(_all_refs(arg))
    return found


def _short(func: Any) -> str:
    packet, _, overload = func.name().removeprefix("aten::").partition(".")
    return f"{packet}.{overload or 'default'}"


def _twin(func: Any, is_out: bool) -> Any:
    """The functional overload with the same arguments, or None."""
    packet_name = _short(func).partition(".")[0]
    if packet_name.startswith("__i"):  # __ilshift__ is __lshift__ in place
        packet_name = "__" + packet_name[3:]
    elif not is_out:
        packet_name = packet_name.rstrip("_")
    packet = getattr(torch.ops.aten, packet_name, None)
    if packet is None:
        return None
    wanted = [
        (arg.name, str(arg.type))
        for arg in func._schema.arguments
        if not (is_out and _is_written(arg))
    ]
    for overload in packet.overloads():
        candidate = getattr(packet, overload)
        arguments = candidate._schema.arguments
        if any(_is_written(arg) for arg in arguments):
            continue
        if [(arg.name, str(arg.type)) for arg in arguments] == wanted:
            return candidate
    return None


def _unknown(name: str) -> NotInTable:
    packet = name.partition(".")[0]
    near = nearest(packet.strip("_"))
    hint = f"; the nearest there are {', '.join(near)}" if near else ""
    return NotInTable(
        f"{packet} (aten.{name}) is not in the table of ops that peers run{hint}; save its input "
        "and call it "
        "after the block",
        line=here(),
    )
