"""What torch's views, copies, new tensors, random numbers and indexing become in the op table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import torch

from glasshive.client.errors import DataDependent, NotInTable
from glasshive.client.functional import View, intern_layout, layout_of
from glasshive.client.lowering import RULES, Build, Results, Rule, edit, rule
from glasshive.client.recipe import Bound, Fresh, Operand, Shared
from glasshive.client.source_lines import here
from glasshive.graph.graph import Arg, Ref

# Views -----------------------------------------------------------------------------------------


def _view(build: Build, bound: Bound, name: str, *args: Arg, index: int = 0) -> Shared:
    meta = build.metas[index]
    view = View(name, args, layout_of(meta), int(meta.storage_offset()))
    return Shared(bound["self"].index, (view,), view.layout)


def _same(build: Build, bound: Bound) -> Shared:
    return Shared(bound["self"].index, (), bound["self"].layout)


@rule(
    "view.default",
    "_unsafe_view.default",
    "_reshape_alias.default",
    "unsqueeze.default",
    "squeeze.default",
    "squeeze.dim",
    "squeeze.dims",
)
def _reshape(build: Build, bound: Bound) -> Results:
    shape = layout_of(build.metas[0]).shape
    if shape == bound["self"].layout.shape:
        return _same(build, bound)
    return _view(build, bound, "reshape", shape)


@rule("alias.default", "lift_fresh.default", "lift.default", "view_as.default")
def _alias(build: Build, bound: Bound) -> Results:
    return _same(build, bound)


@rule("detach.default")
def _detach(build: Build, bound: Bound) -> Results:
    return _view(build, bound, "detach")


@rule("view_as_real.default", "view_as_complex.default")
def _complex_view(build: Build, bound: Bound) -> Results:
    return _view(build, bound, build.name.partition(".")[0])


@rule("_conj.default")
def _conj(build: Build, bound: Bound) -> Results:
    return _view(build, bound, "conj")


@rule("_neg_view.default")
def _neg(build: Build, bound: Bound) -> Results:
    return _view(build, bound, "neg")


@rule("permute.default")
def _permute(build: Build, bound: Bound) -> Results:
    rank = len(bound["self"].layout.shape)
    return _permuted(build, bound, [dim % rank for dim in bound["dims"]] if rank else [])


@rule("transpose.int", "t.default")
def _transpose(build: Build, bound: Bound) -> Results:
    rank = len(bound["self"].layout.shape)
    order = list(range(rank))
    if rank:
        first, second = bound.get("dim0", 0) % rank, bound.get("dim1", -1) % rank
        order[first], order[second] = order[second], order[first]
    return _permuted(build, bound, order)


def _permuted(build: Build, bound: Bound, order: list[int]) -> Shared:
    if order == sorted(order):
        return _same(build, bound)
    return _view(build, bound, "permute", tuple(order))


@rule("expand.default")
def _expand(build: Build, bound: Bound) -> Results:
    have, want = bound["self"].layout.shape, layout_of(build.metas[0]).shape
    if have == want:
        return _same(build, bound)
    if math.prod(have) == math.prod(want):  # only ones are put in front
        return _view(build, bound, "reshape", want)
    return _view(build, bound, "expand", want)


@rule("slice.Tensor")
def _slice(build: Build, bound: Bound) -> Results:
    shape = bound["self"].layout.shape
    dim = bound["dim"] % len(shape)
    start, stop, step = slice(bound["start"], bound["end"], bound["step"]).indices(shape[dim])
    if (start, step) == (0, 1) and stop == shape[dim]:
        return _same(build, bound)
    return _view(build, bound, "slice", dim, start, max(start, stop), step)


@rule("select.int")
def _select(build: Build, bound: Bound) -> Results:
    shape = bound["self"].layout.shape
    dim = bound["dim"] % len(shape)
    return _view(build, bound, "select", dim, bound["index"] % shape[dim])


@rule("diagonal.default")
def _diagonal(build: Build, bound: Bound) -> Results:
    rank = len(bound["self"].layout.shape)
    return _view(
        build, bound, "diagonal", bound["offset"], bound["dim1"] % rank, bound["dim2"] % rank
    )


@rule("unfold.default")
def _unfold(build: Build, bound: Bound) -> Results:
    rank = max(1, len(bound["self"].layout.shape))
    return _view(build, bound, "unfold", bound["dimension"] % rank, bound["size"], bound["step"])


@rule("split.Tensor", "split_with_sizes.default", "unbind.int")
def _parts(build: Build, bound: Bound) -> Results:
    whole = bound["self"].layout.shape
    dim = bound["dim"] % len(whole)
    parts: list[Shared] = []
    start = 0
    for index, meta in enumerate(build.metas):
        if build.name == "unbind.int":
            parts.append(_view(build, bound, "select", dim, index, index=index))
            continue
        stop = start + meta.shape[dim]
        if stop - start == whole[dim]:
            parts.append(_same(build, bound))
        else:
            parts.append(_view(build, bound, "slice", dim, start, stop, 1, index=index))
        start = stop
    return parts


_VIEWS: Final = (
    "view.default alias.default detach.default permute.default transpose.int t.default "
    "expand.default slice.Tensor select.int diagonal.default unfold.default unsqueeze.default "
    "squeeze.default squeeze.dim squeeze.dims"
)


def _register_view_copies() -> None:
    """`diagonal_copy` and its like: the view's value, in memory of its own."""
    for name in _VIEWS.split():
        packet, _, overload = name.partition(".")

        def copied(build: Build, bound: Bound, view_rule: Rule = RULES[name]) -> Results:
            shared = view_rule(build, bound)
            if not isinstance(shared, Shared) or not shared.views:
                return Fresh(bound["self"].ref.node, layout_of(build.metas[0]))
            (view,) = shared.views
            return build.op(view.name, bound["self"], *view.args)

        rule(f"{packet}_copy.{overload}")(copied)


_register_view_copies()


# Copies ----------------------------------------------------------------------------------------


@rule("clone.default")
def _clone(build: Build, bound: Bound) -> Results:
    # A value never changes, so a copy of it is the value itself, in memory of its own.
    return Fresh(bound["self"].ref.node, layout_of(build.metas[0]))


@rule("_to_copy.default")
def _to_copy(build: Build, bound: Bound) -> Results:
    have, want = bound["self"].layout, layout_of(build.metas[0])
    return Fresh(build.cast(bound["self"].ref, have.dtype, want.dtype).node, want)


@rule("slice_scatter.default")
def _slice_scatter(build: Build, bound: Bound) -> Results:
    shape = bound["self"].layout.shape
    dim = bound["dim"] % len(shape)
    start, stop, step = slice(bound["start"], bound["end"], bound["step"]).indices(shape[dim])
    return build.op(
        "slice_scatter", bound["self"], bound["src"], dim, start, max(start, stop), step
    )


@rule("rot90.default")
def _rot90(build: Build, bound: Bound) -> Results:
    rank = len(bound["self"].layout.shape)
    first, second = (dim % rank for dim in bound["dims"])
    turns = bound["k"] % 4
    if turns == 0:
        return Fresh(bound["self"].ref.node, layout_of(build.metas[0]))
    if turns == 2:
        return build.op("flip", bound["self"], (first, second))
    order = list(range(rank))
    order[first], order[second] = second, first
    flipped = build.op("flip", bound["self"], second if turns == 1 else first)
    return build.op("permute", flipped, order)


@edit("copy_.default")
def _copy(build: Build, bound: Bound) -> Ref:
    source: Operand = bound["src"]
    return build.fit(source.ref, source.layout, build.layout)


@edit("fill_.Scalar", "fill_.Tensor")
def _fill(build: Build, bound: Bound) -> Ref:
    value, want = bound["value"], build.layout
    if not isinstance(value, Operand):
        return build.full(want, value)
    return build.fit(value.ref, value.layout, want)


@edit("zero_.default")
def _zero(build: Build, bound: Bound) -> Ref:
    return build.full(build.layout, 0)


# New tensors -----------------------------------------------------------------------------------


@rule(
    "zeros_like.default",
    "empty_like.default",  # never uninitialised memory: it may hold another user's data
    "new_zeros.default",
    "new_empty.default",
    "new_empty_strided.default",
)
def _zeros(build: Build, bound: Bound) -> Results:
    return build.full(build.layout, 0)


@rule("ones_like.default", "new_ones.default")
def _ones(build: Build, bound: Bound) -> Results:
    return build.full(build.layout, 1)


@rule("full_like.default", "new_full.default")
def _filled(build: Build, bound: Bound) -> Results:
    value = bound["fill_value"]
    if isinstance(value, Operand):
        return build.fit(value.ref, value.layout, build.layout)
    return build.full(build.layout, value)


# Random numbers --------------------------------------------------------------------------------
# Only the shape and dtype of the tensor matter, so a blank one stands for it: the draw depends on
# nothing.


def _drawn(build: Build, bound: Bound, op: str, *args: Any) -> Ref:
    return build.op(op, build.full(build.layout, 0), *args)


@rule("rand_like.default")
def _rand_like(build: Build, bound: Bound) -> Results:
    return _drawn(build, bound, "rand_like", None)


@rule("randn_like.default")
def _randn_like(build: Build, bound: Bound) -> Results:
    return _drawn(build, bound, "randn_like", None)


@rule("randint_like.default", "randint_like.low_dtype")
def _randint_like(build: Build, bound: Bound) -> Results:
    return _drawn(build, bound, "randint_like", bound.get("low", 0), bound["high"], None)


@rule("bernoulli.default")
def _bernoulli(build: Build, bound: Bound) -> Results:
    return build.op("bernoulli", bound["self"], None)


@rule("bernoulli.p")
def _bernoulli_p(build: Build, bound: Bound) -> Results:
    return _drawn(build, bound, "bernoulli", bound["p"])


@edit("bernoulli_.float")
def _bernoulli_in_place(build: Build, bound: Bound) -> Ref:
    return _drawn(build, bound, "bernoulli", bound["p"])


@edit("bernoulli_.Tensor")
def _bernoulli_from(build: Build, bound: Bound) -> Ref:
    odds: Operand = bound["p"]
    whole = build.fit(odds.ref, odds.layout, intern_layout(odds.layout.dtype, build.layout.shape))
    return build.cast(build.op("bernoulli", whole, None), odds.layout.dtype, build.layout.dtype)


@edit("normal_.default")
def _normal(build: Build, bound: Bound) -> Ref:
    return _drawn(build, bound, "normal", bound["mean"], bound["std"])


@edit("uniform_.default")
def _uniform(build: Build, bound: Bound) -> Ref:
    low = bound["from"]
    return _drawn(build, bound, "uniform", low, bound["to"])


@edit("exponential_.default")
def _exponential(build: Build, bound: Bound) -> Ref:
    return _drawn(build, bound, "exponential", bound["lambd"])


@edit("random_.from", "random_.to")
def _random(build: Build, bound: Bound) -> Ref:
    if bound["to"] is None:
        raise NotInTable("random_() without an upper bound cannot be traced; give it", line=here())
    return _drawn(build, bound, "randint_like", bound.get("from", 0), bound["to"], None)


@rule("normal.Tensor_float", "normal.float_Tensor", "normal.Tensor_Tensor")
def _normal_of(build: Build, bound: Bound) -> Results:
    drawn = _drawn(build, bound, "normal", 0.0, 1.0)
    scaled = build.op("mul", drawn, bound["std"])
    return build.op("add", scaled, bound["mean"])


@rule("native_dropout.default")
def _dropout(build: Build, bound: Bound) -> Results:
    if bound["train"] is False or bound["p"] == 0:
        return [Fresh(bound["input"].ref.node, layout_of(build.metas[0])), None]
    return [build.op("dropout", bound["input"], bound["p"]), None]


# Indexing --------------------------------------------------------------------------------------

_MASKS: Final = (torch.bool, torch.uint8)


@rule("index.Tensor", "_unsafe_index.Tensor")
def _index(build: Build, bound: Bound) -> Results:
    return build.op("index", bound["self"], bound["indices"])


@rule("index_put.default", "_unsafe_index_put.default")
def _index_put(build: Build, bound: Bound) -> Results:
    whole: Operand = bound["self"]
    indices: Sequence[Operand | None] = bound["indices"]
    values: Operand = bound["values"]
    if any(index is not None and index.layout.dtype in _MASKS for index in indices):
        return _masked_put(build, whole, indices, values, bound["accumulate"])
    return build.op("index_put", whole, indices, values, bound["accumulate"])


def _masked_put(
    build: Build,
    whole: Operand,
    indices: Sequence[Operand | None],
    values: Operand,
    accumulate: bool,
) -> Ref:
    """`h[mask] = v` where each masked place gets the same v, whatever their number."""
    (mask, *others) = indices
    if mask is not None and not any(others) and not accumulate:
        rank = len(mask.layout.shape)
        left = len(whole.layout.shape) - rank
        shape = values.layout.shape
        if len(shape) <= left or (len(shape) == left + 1 and shape[0] == 1):
            wide = build.op("reshape", mask, mask.layout.shape + (1,) * left)
            if mask.layout.dtype != torch.bool:
                wide = build.op("to", wide, torch.bool)
            value = values.ref if len(shape) <= left else build.op("reshape", values, shape[1:])
            return build.op("where", wide, value, whole)
    raise DataDependent(
        "assigning to a traced mask needs as many values as are true, which is not known before "
        "the model runs; assign one value, or use torch.where(mask, values, h)",
        line=here(),
    )


@rule("scatter.reduce", "scatter.value_reduce")
def _scatter_reduce(build: Build, bound: Bound) -> Results:
    reduce = {"add": "sum", "multiply": "prod"}[bound["reduce"]]
    source = bound.get("src")
    if source is None:
        shape = bound["index"].layout.shape
        source = build.full(intern_layout(build.layout.dtype, shape), bound["value"])
    return build.op("scatter_reduce", bound["self"], bound["dim"], bound["index"], source, reduce)
