"""What torch's computing functions become in the op table.

Most are one op under another name, one line in `_ROWS`. The rest are the rules below, and at the
end what is refused, and why. Views, copies, new tensors and indexing are in canonical_shapes.py.
"""

from __future__ import annotations

import math
from typing import Final

import torch

from glasshive.client.errors import DataDependent, NotInTable, OutOfSight
from glasshive.client.lowering import REFUSED, Build, Results, row, rule
from glasshive.client.recipe import Bound, Operand
from glasshive.client.source_lines import here
from glasshive.graph.codec import GraphLimits
from glasshive.graph.graph import Ref

_UNARY: Final = (
    "abs neg reciprocal relu frac sgn positive ceil floor trunc sign isnan isinf isfinite isposinf "
    "isneginf signbit logical_not bitwise_not acos acosh angle asin asinh atan atanh cos cosh "
    "digamma erf erfc erfinv exp exp2 expm1 hardsigmoid hardswish i0 lgamma log log10 log1p log2 "
    "mish rsqrt selu sigmoid silu sin sinc sinh sqrt tan tanh"
)

_ROWS: Final = """
round.default                                   = round(self)
round.decimals                                  = round(self, decimals)
special_logit.default logit.default             = logit(self, eps)
nan_to_num.default                              = nan_to_num(self, nan, posinf, neginf)
gelu.default                                    = gelu(self, approximate)
elu.default                                     = elu(self, alpha, scale, input_scale)
celu.default                                    = celu(self, alpha)
leaky_relu.default                              = leaky_relu(self, negative_slope)
hardtanh.default                                = hardtanh(self, min_val, max_val)
hardshrink.default                              = hardshrink(self, lambd)
softshrink.default                              = softshrink(self, lambd)
threshold.default                               = threshold(self, threshold, value)
softplus.default                                = softplus(self, beta, threshold)
glu.default                                     = glu(self, dim)
polar.default                                   = polar(abs, angle)
complex.default                                 = complex(real, imag)
conj_physical.default _conj_physical.default    = conj(self)
add.Tensor add.Scalar                           = add(self, other, alpha)
sub.Tensor sub.Scalar                           = sub(self, other, alpha)
rsub.Tensor rsub.Scalar                         = rsub(self, other, alpha)
mul.Tensor mul.Scalar                           = mul(self, other)
div.Tensor div.Scalar                           = div(self, other)
remainder.Tensor remainder.Scalar               = remainder(self, other)
remainder.Scalar_Tensor                         = remainder(self, other)
fmod.Tensor fmod.Scalar                         = fmod(self, other)
pow.Tensor_Tensor pow.Tensor_Scalar pow.Scalar  = pow(self, exponent)
xlogy.Tensor xlogy.Scalar_Self xlogy.Scalar_Other = xlogy(self, other)
copysign.Tensor copysign.Scalar                 = copysign(self, other)
maximum.default                                 = maximum(self, other)
minimum.default                                 = minimum(self, other)
fmax.default                                    = fmax(self, other)
fmin.default                                    = fmin(self, other)
atan2.default                                   = atan2(self, other)
gcd.default                                     = gcd(self, other)
lcm.default                                     = lcm(self, other)
hypot.default                                   = hypot(self, other)
logaddexp.default                               = logaddexp(self, other)
logaddexp2.default                              = logaddexp2(self, other)
heaviside.default                               = heaviside(self, values)
eq.Tensor eq.Scalar                             = eq(self, other)
ne.Tensor ne.Scalar                             = ne(self, other)
lt.Tensor lt.Scalar                             = lt(self, other)
le.Tensor le.Scalar                             = le(self, other)
gt.Tensor gt.Scalar                             = gt(self, other)
ge.Tensor ge.Scalar                             = ge(self, other)
logical_and.default                             = logical_and(self, other)
logical_or.default                              = logical_or(self, other)
logical_xor.default                             = logical_xor(self, other)
bitwise_and.Tensor bitwise_and.Scalar bitwise_and.Scalar_Tensor = bitwise_and(self, other)
bitwise_or.Tensor bitwise_or.Scalar bitwise_or.Scalar_Tensor    = bitwise_or(self, other)
bitwise_xor.Tensor bitwise_xor.Scalar bitwise_xor.Scalar_Tensor = bitwise_xor(self, other)
bitwise_left_shift.Tensor bitwise_left_shift.Tensor_Scalar bitwise_left_shift.Scalar_Tensor \
= bitwise_left_shift(self, other)
bitwise_right_shift.Tensor bitwise_right_shift.Tensor_Scalar bitwise_right_shift.Scalar_Tensor \
= bitwise_right_shift(self, other)
__lshift__.Tensor __lshift__.Scalar             = bitwise_left_shift(self, other)
__rshift__.Tensor __rshift__.Scalar             = bitwise_right_shift(self, other)
lerp.Tensor lerp.Scalar                         = lerp(self, end, weight)
addcmul.default                                 = addcmul(self, tensor1, tensor2, value)
addcdiv.default                                 = addcdiv(self, tensor1, tensor2, value)
clamp.default clamp.Tensor                      = clamp(self, min, max)
clamp_min.default clamp_min.Tensor              = clamp(self, min, None)
clamp_max.default clamp_max.Tensor              = clamp(self, None, max)
where.self                                      = where(condition, self, other)
masked_fill.Tensor masked_fill.Scalar           = masked_fill(self, mask, value)
masked_scatter.default                          = masked_scatter(self, mask, source)
prod.default                                    = prod(self, None, False, dtype)
prod.dim_int                                    = prod(self, dim, keepdim, dtype)
all.default                                     = all(self)
any.default                                     = any(self)
all.dim                                         = all(self, dim, keepdim)
any.dim                                         = any(self, dim, keepdim)
all.dims                                        = all(self, dim, keepdim)
any.dims                                        = any(self, dim, keepdim)
amax.default                                    = amax(self, dim, keepdim)
amin.default                                    = amin(self, dim, keepdim)
logsumexp.default                               = logsumexp(self, dim, keepdim)
max.default                                     = max(self)
min.default                                     = min(self)
median.default                                  = median(self)
nanmedian.default                               = nanmedian(self)
argmax.default                                  = argmax(self, dim, keepdim)
argmin.default                                  = argmin(self, dim, keepdim)
max.dim                                         = max_dim(self, dim, keepdim)
min.dim                                         = min_dim(self, dim, keepdim)
median.dim                                      = median_dim(self, dim, keepdim)
nanmedian.dim                                   = nanmedian_dim(self, dim, keepdim)
mode.default                                    = mode(self, dim, keepdim)
aminmax.default                                 = aminmax(self, dim, keepdim)
linalg_vector_norm.default                      = vector_norm(self, ord, dim, keepdim, dtype)
count_nonzero.default                           = count_nonzero(self, dim)
count_nonzero.dim_IntList                       = count_nonzero(self, dim)
trace.default                                   = trace(self)
histc.default                                   = histc(self, bins, min, max)
cumsum.default                                  = cumsum(self, dim, dtype)
cumprod.default                                 = cumprod(self, dim, dtype)
logcumsumexp.default                            = logcumsumexp(self, dim)
cummax.default                                  = cummax(self, dim)
cummin.default                                  = cummin(self, dim)
sort.default                                    = sort(self, dim, descending)
topk.default                                    = topk(self, k, dim, largest, sorted)
kthvalue.default                                = kthvalue(self, k, dim, keepdim)
renorm.default                                  = renorm(self, p, dim, maxnorm)
index_select.default                            = index_select(self, dim, index)
index_add.default                               = index_add(self, dim, index, source, alpha)
index_copy.default                              = index_copy(self, dim, index, source)
index_fill.int_Scalar index_fill.int_Tensor     = index_fill(self, dim, index, value)
gather.default                                  = gather(self, dim, index)
scatter.src                                     = scatter(self, dim, index, src)
scatter.value                                   = scatter(self, dim, index, value)
scatter_add.default                             = scatter_add(self, dim, index, src)
scatter_reduce.two                    = scatter_reduce(self, dim, index, src, reduce, include_self)
take.default                                    = take(self, index)
put.default                                     = put(self, index, source, accumulate)
embedding.default                               = embedding(weight, indices)
isin.Tensor_Tensor                              = isin(elements, test_elements, invert)
isin.Tensor_Scalar                              = isin(elements, test_element, invert)
isin.Scalar_Tensor                              = isin(element, test_elements, invert)
mm.default                                      = mm(self, mat2)
bmm.default                                     = bmm(self, mat2)
mv.default                                      = mv(self, vec)
dot.default                                     = dot(self, tensor)
addmm.default                                   = addmm(self, mat1, mat2, beta, alpha)
addmv.default                                   = addmv(self, mat, vec, beta, alpha)
baddbmm.default                                 = baddbmm(self, batch1, batch2, beta, alpha)
addr.default                                    = addr(self, vec1, vec2, beta, alpha)
linalg_cross.default                            = linalg_cross(self, other, dim)
linalg_inv_ex.default                           = linalg_inv(A)
_linalg_det.default                             = linalg_det(A)
_linalg_slogdet.default                         = linalg_slogdet(A)
_linalg_solve_ex.default                        = linalg_solve(A, B, left)
linalg_solve_triangular.default = linalg_solve_triangular(self, B, upper, left, unitriangular)
linalg_cholesky_ex.default                      = linalg_cholesky(self, upper)
linalg_qr.default                               = linalg_qr(A, mode)
linalg_pinv.atol_rtol_float                     = linalg_pinv(self, atol, rtol, hermitian)
repeat.default                                  = repeat(self, repeats)
flip.default                                    = flip(self, dims)
roll.default                                    = roll(self, shifts, dims)
tril.default                                    = tril(self, diagonal)
triu.default                                    = triu(self, diagonal)
diag_embed.default                              = diag_embed(self, offset, dim1, dim2)
constant_pad_nd.default                         = constant_pad_nd(self, pad, value)
select_scatter.default                          = select_scatter(self, src, dim, index)
diagonal_scatter.default                        = diagonal_scatter(self, src, offset, dim1, dim2)
multinomial.default                             = multinomial(self, num_samples, replacement)
native_layer_norm.default       = layer_norm(input, normalized_shape, weight, bias, eps)
rms_norm.default _fused_rms_norm.default        = rms_norm(input, normalized_shape, weight, eps)
native_group_norm.default                       = group_norm(input, group, weight, bias, eps)
convolution.default = convolution(input, weight, bias, stride, padding, dilation, transposed, \
output_padding, groups)
mse_loss.default                                = mse_loss(self, target, reduction)
soft_margin_loss.default                        = soft_margin_loss(self, target, reduction)
huber_loss.default                              = huber_loss(self, target, reduction, delta)
smooth_l1_loss.default                          = smooth_l1_loss(self, target, reduction, beta)
nll_loss_forward.default nll_loss2d_forward.default \
= nll_loss(self, target, weight, reduction, ignore_index)
binary_cross_entropy.default          = binary_cross_entropy(self, target, weight, reduction)
binary_cross_entropy_with_logits.default \
= binary_cross_entropy_with_logits(self, target, weight, pos_weight, reduction)
log_sigmoid_forward.default                     = log_sigmoid(self)
_fft_r2c.default                                = fft_r2c(self, dim, normalization, onesided)
_fft_c2c.default                                = fft_c2c(self, dim, normalization, forward)
_fft_c2r.default                                = fft_c2r(self, dim, normalization, last_dim_size)
"""


def _register_rows() -> None:
    for name in _UNARY.split():
        row(f"{name}.default = {name}(self)")
    for line in _ROWS.replace("\\\n", "").strip().splitlines():
        row(line)


_register_rows()


# Arithmetic ------------------------------------------------------------------------------------


@rule("div.Tensor_mode", "div.Scalar_mode")
def _div(build: Build, bound: Bound) -> Results:
    return build.op("div", bound["self"], bound["other"], bound["rounding_mode"] or "none")


@rule("floor_divide.default", "floor_divide.Scalar")
def _floor_divide(build: Build, bound: Bound) -> Results:
    return build.op("div", bound["self"], bound["other"], "floor")


@rule("rad2deg.default")
def _rad2deg(build: Build, bound: Bound) -> Results:
    return build.op("mul", bound["self"], 180.0 / math.pi)


@rule("deg2rad.default")
def _deg2rad(build: Build, bound: Bound) -> Results:
    return build.op("mul", bound["self"], math.pi / 180.0)


@rule("dist.default")
def _dist(build: Build, bound: Bound) -> Results:
    apart = build.op("sub", bound["self"], bound["other"])
    return build.op("vector_norm", apart, bound["p"])


@rule("_prelu_kernel.default")
def _prelu(build: Build, bound: Bound) -> Results:
    scaled = build.op("mul", bound["weight"], bound["self"])
    return build.op("where", build.op("gt", bound["self"], 0), bound["self"], scaled)


@rule("_softmax.default", "_log_softmax.default")
def _softmax(build: Build, bound: Bound) -> Results:
    value = bound["self"].ref
    if bound["half_to_float"]:
        value = build.op("to", value, torch.float32)
    return build.op(build.name.partition(".")[0].strip("_"), value, bound["dim"])


@rule("_safe_softmax.default")
def _safe_softmax(build: Build, bound: Bound) -> Results:
    value = build.cast(bound["self"].ref, bound["self"].layout.dtype, build.layout.dtype)
    soft = build.op("softmax", value, bound["dim"])
    nothing = build.op("all", build.op("eq", bound["self"], -math.inf), bound["dim"], True)
    return build.op("masked_fill", soft, nothing, 0.0)


# Reductions ------------------------------------------------------------------------------------


@rule("sum.default", "mean.default", "nansum.default", "sum.dim_IntList", "mean.dim")
def _sum(build: Build, bound: Bound) -> Results:
    name = build.name.partition(".")[0]
    dims = bound.get("dim") or None
    return build.op(name, bound["self"], dims, bound.get("keepdim", False), bound["dtype"])


@rule("var.correction", "std.correction", "var_mean.correction", "std_mean.correction")
def _var(build: Build, bound: Bound) -> Results:
    name = build.name.partition(".")[0]
    correction = 1 if bound["correction"] is None else bound["correction"]
    args = (bound["self"], bound["dim"] or None, correction, bound["keepdim"])
    return build.outputs(name, *args) if name.endswith("_mean") else build.op(name, *args)


@rule("norm.Scalar", "norm.ScalarOpt_dim", "norm.ScalarOpt_dtype", "norm.ScalarOpt_dim_dtype")
def _norm(build: Build, bound: Bound) -> Results:
    order = 2.0 if bound["p"] is None else bound["p"]
    dims, keepdim = bound.get("dim") or None, bound.get("keepdim", False)
    return build.op("vector_norm", bound["self"], order, dims, keepdim, bound.get("dtype"))


@rule("sort.stable")
def _stable_sort(build: Build, bound: Bound) -> Results:
    args = (bound["self"], bound["dim"], bound["descending"], bool(bound["stable"]))
    return build.outputs("sort", *args)


@rule("argsort.default", "argsort.stable")
def _argsort(build: Build, bound: Bound) -> Results:
    stable = bool(bound.get("stable", False))
    return build.outputs("sort", bound["self"], bound["dim"], bound["descending"], stable)[1]


@rule("searchsorted.Tensor", "searchsorted.Scalar")
def _searchsorted(build: Build, bound: Bound) -> Results:
    ordered = bound["sorted_sequence"]
    if bound["sorter"] is not None:
        ordered = build.op("gather", ordered, -1, bound["sorter"])
    right = bound["right"] or bound["side"] == "right"
    found = build.op("searchsorted", ordered, bound["self"], right)
    return build.cast(found, torch.int64, build.layout.dtype)


@rule("bucketize.Tensor", "bucketize.Scalar")
def _bucketize(build: Build, bound: Bound) -> Results:
    found = build.op("bucketize", bound["self"], bound["boundaries"], bound["right"])
    return build.cast(found, torch.int64, build.layout.dtype)


# Joins -----------------------------------------------------------------------------------------


@rule("cat.default")
def _cat(build: Build, bound: Bound) -> Results:
    parts: list[Operand | Ref] = list(bound["tensors"])
    if len(parts) > _LIST_ITEMS:
        # Cast first: a list in pieces could reach the common dtype by another way.
        want = build.layout.dtype
        parts = [build.cast(part.ref, part.layout.dtype, want) for part in bound["tensors"]]
    return _joined(build, "cat", parts, bound["dim"])


@rule("stack.default")
def _stack(build: Build, bound: Bound) -> Results:
    parts: list[Operand | Ref] = list(bound["tensors"])
    return _joined(build, "stack", parts, bound["dim"])


def _joined(build: Build, op: str, parts: list[Operand | Ref], dim: int) -> Ref:
    """`parts` joined by `op`; more than a list of a graph may hold are joined piece by piece."""
    while len(parts) > _LIST_ITEMS:
        pieces = [parts[at : at + _LIST_ITEMS] for at in range(0, len(parts), _LIST_ITEMS)]
        parts = [build.op(op, piece, dim) for piece in pieces]
        op = "cat"
    return build.op(op, parts, dim)


_LIST_ITEMS: Final = GraphLimits().list_items


# Matrices --------------------------------------------------------------------------------------


@rule("vdot.default")
def _vdot(build: Build, bound: Bound) -> Results:
    if bound["self"].layout.dtype.is_complex:
        return build.op("dot", build.op("conj", bound["self"]), bound["other"])
    return build.op("dot", bound["self"], bound["other"])


@rule("_cdist_forward.default")
def _cdist(build: Build, bound: Bound) -> Results:
    if bound["compute_mode"]:
        raise _no_compute_mode()
    return build.op("cdist", bound["x1"], bound["x2"], bound["p"])


@rule("_euclidean_dist.default")
def _euclidean_dist(build: Build, bound: Bound) -> Results:
    # What cdist does by itself for many rows; for few it was asked for, and rounds differently.
    if max(bound["x1"].layout.shape[-2], bound["x2"].layout.shape[-2]) <= _CDIST_ROWS:
        raise _no_compute_mode()
    return build.op("cdist", bound["x1"], bound["x2"], 2.0)


_CDIST_ROWS: Final = 25


def _no_compute_mode() -> NotInTable:
    return NotInTable("cdist with compute_mode= cannot be traced; leave it out", line=here())


@rule("_linalg_check_errors.default")
def _check_errors(build: Build, bound: Bound) -> Results:
    return None  # peers run the checked form of each decomposition


@rule("_linalg_eigh.default")
def _eigh(build: Build, bound: Bound) -> Results:
    if bound["compute_v"]:
        return build.outputs("linalg_eigh", bound["A"], bound["UPLO"])
    return [build.op("linalg_eigvalsh", bound["A"], bound["UPLO"]), None]


@rule("_linalg_svd.default")
def _svd(build: Build, bound: Bound) -> Results:
    if bound["compute_uv"]:
        return build.outputs("linalg_svd", bound["A"], bound["full_matrices"])
    return [None, build.op("linalg_svdvals", bound["A"]), None]


# Layers ----------------------------------------------------------------------------------------


@rule("_scaled_dot_product_flash_attention_for_cpu.default")
def _sdpa(build: Build, bound: Bound) -> Results:
    q, k, v = bound["query"], bound["key"], bound["value"]
    grouped = q.layout.shape[-3] != k.layout.shape[-3]
    mask, causal, scale = bound["attn_mask"], bound["is_causal"], bound["scale"]
    return build.op("sdpa", q, k, v, mask, causal, scale, grouped)


@rule(
    "native_batch_norm.default",
    "_native_batch_norm_legit_no_training.default",
    "cudnn_batch_norm.default",
)
def _batch_norm(build: Build, bound: Bound) -> Results:
    if bound.get("training") or bound["running_mean"] is None:
        raise NotInTable(
            "batch_norm with the statistics of the batch cannot be traced, because it would change "
            "the running ones; call .eval() on the module, or subtract the mean and divide by the "
            "std",
            line=here(),
        )
    weights = (bound["weight"], bound["bias"], bound["running_mean"], bound["running_var"])
    return build.op("batch_norm", bound["input"], *weights, bound["eps"])


# Refused ---------------------------------------------------------------------------------------


def _refuse(kind: type, packets: str, text: str) -> None:
    for packet in packets.split():
        REFUSED[packet] = (kind, text)


def number_text(use: str) -> str:
    """Why Python cannot have a number of a traced value here, and what to do; `use` is who asks."""
    return (
        f"{use} needs a number that exists only when the model runs; call .save() on the value and "
        "use it after the block or in a second trace, or stay with tensors: torch.where for a "
        "choice, gather or index_select for an index"
    )


_refuse(
    DataDependent,
    "_local_scalar_dense item is_nonzero",
    number_text("torch, for a size or an index,"),
)
_refuse(
    DataDependent,
    "equal allclose",
    "torch.equal and torch.allclose need the numbers, which exist only when the model runs; save "
    "both values and compare them after the block, or record (a == b).all().save()",
)
_refuse(
    DataDependent,
    "nonzero nonzero_numpy masked_select _unique _unique2 unique_dim unique_consecutive "
    "unique_dim_consecutive bincount argwhere repeat_interleave.Tensor",
    "the shape of this result depends on the numbers, which exist only when the model runs; use "
    "torch.where, masked_fill, topk or sort, or save the value and go on after the block",
)
_refuse(
    OutOfSight,
    "as_strided as_strided_ as_strided_scatter resize_ resize_as_ set_ view.dtype",
    "strides and storage do not exist in a graph; use reshape, slices, unfold or .to(dtype)",
)
_refuse(
    OutOfSight,
    "rename_ _resize_output_",
    "names of axes, and an out= of another shape, cannot be traced; leave them out",
)
_refuse(
    NotInTable,
    "_transformer_encoder_layer_fwd _native_multi_head_attention",
    "torch's fused encoder layer is in use; leave torch.backends.mha.set_fastpath_enabled(False) "
    "as it is inside a trace",
)
