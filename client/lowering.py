"""From what torch dispatches to nodes of the op table.

Recording one call of torch has two halves. *Lowering* depends only on the function, the layouts of
its tensors and its other arguments: it gives a `Plan`, which is kept. *Replaying* a plan
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
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

import torch

from glasshive.client.errors import (
    Misfit,
    NotInTable,
    PlainDestination,
    TraceError,
)
from glasshive.client.functional import Layout, View, layout_of
from glasshive.client.source_lines import here
from glasshive.graph.dtypes import DType
from glasshive.graph.errors import BadTensor, UnknownOp
from glasshive.graph.graph import Arg, NodeId, Ref
from glasshive.graph.kernels import from_torch_dtype
from glasshive.graph.ops import OPS, OpSpec, Parameter, nearest

# In a plan, a ref of 0 or more is the result of that step; below, it is an operand: -1 the first.


@dataclass(frozen=True, slots=True)
class Operand:
    """A tensor argument of the call that is lowered."""

    index: int
    layout: Layout
    traced: bool

    @property
    def ref(self) -> Ref:
        """How a step names it."""
        return Ref(NodeId(-1 - self.index))


@dataclass(frozen=True, slots=True)
class Step:
    """One node to add. `refs` are the arguments to replace; `seed` is the one to draw."""

    op: str
    args: tuple[Arg, ...]
    refs: tuple[int, ...]
    nested: bool
    seed: int | None


@dataclass(frozen=True, slots=True)
class Fresh:
    """A result with memory of its own."""

    source: NodeId
    layout: Layout


@dataclass(frozen=True, slots=True)
class Shared:
    """A result that shares the memory of an operand, through a chain of views."""

    operand: int
    views: tuple[View, ...]
    layout: Layout


@dataclass(frozen=True, slots=True)
class Given:
    """A result that is the operand itself, as in-place calls return it."""

    operand: int


@dataclass(frozen=True, slots=True)
class Dead:
    """A result that glasshive does not give; reading it raises."""

    reason: str
    layout: Layout


Out: TypeAlias = "Fresh | Shared | Given | Dead"


@dataclass(frozen=True, slots=True)
class Plan:
    """What a call of torch becomes.

    `needs` are the operands whose values the steps use. `writes` says which operands get which
    values. `form` is how the results are handed back.
    """

    needs: tuple[int, ...]
    steps: tuple[Step, ...]
    writes: tuple[tuple[int, NodeId], ...]
    outs: tuple[Out, ...]
    form: type | None
    is_copy: bool = False


Bound: TypeAlias = "dict[str, Any]"
Results: TypeAlias = "Ref | Out | Sequence[Ref | Out | None] | None"
Rule: TypeAlias = "Callable[[Build, Bound], Results]"


@dataclass(slots=True)
class Build:
    """A plan in the making. `metas` are the results of the call on the meta device."""

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
            raise UnknownOp(
                f"{spec.signature} got {value!r:.60} for {param.name}; {param.wanted} is wanted"
            )
        return converted

    def _convert(self, param: Parameter, value: Any) -> Arg:
        kind = param.kind
        if isinstance(value, Operand):
            return value.ref
        if isinstance(value, Ref) or value is None:
            return value
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
) -> Plan:
    """The plan of a call. `is_traced` tells traced tensors from plain ones.

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
) -> Plan:
    operands: list[Operand] = []
    metas: list[torch.Tensor] = []

    def enter(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            layout = layout_of(value)
            operand = Operand(len(operands), layout, is_traced(value))
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
    _check_dtypes(name, bound)
    if bound.get("generator") is not None:
        raise NotInTable(
            "generator= cannot travel; call torch.manual_seed before the trace instead: every "
            "random op carries a seed that is drawn from torch's default generator",
            line=here(),
        )
    written = [arg.name for arg in func._schema.arguments if _is_written(arg)]
    for key in written:
        _check_destination(bound[key])
    if not written:
        lowering = RULES.get(name)
        if lowering is None:
            raise _unknown(name)
        results = _run_meta(name, operands, func, [meta(a) for a in entered], named, meta)
        build = Build(name, results)
        outs = _outs(build, lowering(build, bound))
        return _plan(build, outs, (), _form(func))
    return _lower_edit(func, name, bound, written, operands, meta)


def _lower_edit(
    func: Any,
    name: str,
    bound: Bound,
    written: Sequence[str],
    operands: Sequence[Operand],
    meta: Callable[[Any], Any],
) -> Plan:
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
    return _plan(build, outs, tuple(writes), _form(func), is_copy=name in _COPIES)


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


def _check_destination(destination: Any) -> None:
    if isinstance(destination, list):
        raise NotInTable("an op that writes a list of tensors cannot be traced", line=here())
    if not destination.traced:
        raise PlainDestination(
            f"a traced value is written into a plain tensor, {destination.layout}, which exists "
            "already and cannot follow; make the destination from a traced value, as in "
            "h.new_zeros(shape), or join the pieces with torch.stack or torch.cat",
            line=here(),
        )


# What torch checks on the CPU and not on the meta device.
_ALIKE: Final[Mapping[str, tuple[str, ...]]] = {
    "mm": ("self", "mat2"),
    "bmm": ("self", "mat2"),
    "mv": ("self", "vec"),
    "dot": ("self", "tensor"),
    "vdot": ("self", "other"),
    "addmm": ("self", "mat1", "mat2"),
    "addmv": ("self", "mat", "vec"),
    "baddbmm": ("self", "batch1", "batch2"),
    "_cdist_forward": ("x1", "x2"),
    "_euclidean_dist": ("x1", "x2"),
    "linalg_cross": ("self", "other"),
    "convolution": ("input", "weight", "bias"),
    "native_layer_norm": ("weight", "bias"),
    "binary_cross_entropy": ("self", "target", "weight"),
    "huber_loss": ("self", "target"),
    "heaviside": ("self", "values"),
    "index_add": ("self", "source"),
    "index_copy": ("self", "source"),
    "index_put": ("self", "values"),
    "put": ("self", "source"),
    "masked_scatter": ("self", "source"),
}
_WIDE: Final = (torch.int64, torch.int32)
_INDICES: Final[Mapping[str, tuple[str, tuple[torch.dtype, ...]]]] = {
    "index": ("indices", (*_WIDE, torch.uint8, torch.bool)),
    "index_put": ("indices", (*_WIDE, torch.uint8, torch.bool)),
    "index_select": ("index", _WIDE),
    "index_add": ("index", _WIDE),
    "index_copy": ("index", (torch.int64,)),
    "index_fill": ("index", (torch.int64,)),
    "put": ("index", (torch.int64,)),
    "take": ("index", (torch.int64,)),
}


def _check_dtypes(name: str, bound: Bound) -> None:
    """Raise Misfit if dtypes differ that must be one, or an index is of a wrong dtype."""
    packet = name.partition(".")[0]
    packet = packet.rstrip("_") if packet not in _ALIKE else packet
    same = [bound[key] for key in _ALIKE.get(packet, ()) if isinstance(bound[key], Operand)]
    if len({operand.layout.dtype for operand in same}) > 1:
        shapes = " and ".join(str(operand.layout) for operand in same)
        raise Misfit(
            f"{packet} takes tensors of one dtype, but got {shapes}; convert one with .to(h.dtype)",
            line=here(),
        )
    argument, allowed = _INDICES.get(packet, ("", ()))
    given = bound.get(argument)
    for index in given if isinstance(given, list) else [given]:
        if isinstance(index, Operand) and index.layout.dtype not in allowed:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
            raise Misfit(
                f"{packet} takes an index of dtype {names}, but got {index.layout}; convert it "
                "with .long()",
                line=here(),
            )


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
        shapes = ", ".join(str(operand.layout) for operand in operands)
        reason = str(error).strip().split("\n", 1)[0]
        raise Misfit(f"{name.partition('.')[0]}({shapes}): {reason}", line=here()) from None
    if isinstance(result, torch.Tensor):
        return (result,)
    if isinstance(result, list | tuple):
        return tuple(result)
    return ()


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


def _plan(
    build: Build,
    outs: tuple[Out, ...],
    writes: tuple[tuple[int, NodeId], ...],
    form: type | None,
    is_copy: bool = False,
) -> Plan:
    used = {ref for step in build.steps for ref in _all_refs(step.args)}
    used |= {out.source for out in outs if isinstance(out, Fresh)}
    used |= {value for _, value in writes}
    needs = tuple(sorted(-1 - node for node in used if node < 0))
    return Plan(needs, tuple(build.steps), writes, outs, form, is_copy)


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
    packet = getattr(torch.ops.aten, packet_name if is_out else packet_name.rstrip("_"), None)
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
