"""What the ops compute: one torch function for each name in ops.py.

- A kernel takes the arguments of the op's signature in order, with tensors in place of refs.
- No kernel mutates its arguments or gives uninitialised memory. A result may share memory with an
  argument where ops.py says `view` or `cast`.
- Random numbers are drawn on the CPU from the node's own seed and then moved, so that every peer
  draws the same ones.
- On an accelerator a bad index stops the whole process, so indices are checked first there; on the
  CPU torch checks them itself.
- What an op refuses becomes ShapeMismatch, in one sentence.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, TypeAlias

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from glasshive.graph.dtypes import DType
from glasshive.graph.errors import BadTensor, ShapeMismatch
from glasshive.graph.ops import find_op
from glasshive.graph.tensors import MAX_RANK, Bytes, SpecArg, Specs, TensorSpec, check_elements

Kernel: TypeAlias = Callable[..., Any]

_aten = torch.ops.aten

_TORCH_DTYPES: Final = {
    DType.FLOAT64: torch.float64,
    DType.FLOAT32: torch.float32,
    DType.FLOAT16: torch.float16,
    DType.BFLOAT16: torch.bfloat16,
    DType.INT64: torch.int64,
    DType.INT32: torch.int32,
    DType.INT16: torch.int16,
    DType.INT8: torch.int8,
    DType.UINT8: torch.uint8,
    DType.BOOL: torch.bool,
    DType.COMPLEX64: torch.complex64,
}
_OUR_DTYPES: Final = {theirs: ours for ours, theirs in _TORCH_DTYPES.items()}


def to_torch_dtype(dtype: DType) -> torch.dtype:
    """Torch's name for `dtype`."""
    return _TORCH_DTYPES[dtype]


def from_torch_dtype(dtype: torch.dtype) -> DType:
    """Our name for `dtype`. Raises BadTensor for a format outside the closed list."""
    found = _OUR_DTYPES.get(dtype)
    if found is None:
        known = ", ".join(member.value for member in DType)
        raise BadTensor(f"{dtype} cannot stand in a graph; one of {known} can")
    return found


# Running ---------------------------------------------------------------------------------------


def run_op(name: str, args: Sequence[Any], device: torch.device | str = "cpu") -> Any:
    """The op's result: a tensor, or a tuple of them for an op of several outputs.

    `args` are those of a checked node, with tensors in place of refs. `device` is where an op that
    takes no tensor makes one. Raises ShapeMismatch if torch refuses.
    """
    kernel = KERNELS[name]
    try:
        return kernel(*args, device=device) if name in _MAKERS else kernel(*args)
    except torch.OutOfMemoryError:
        raise
    except _REFUSALS as error:
        raise ShapeMismatch(_refusal(name, [_seen(arg) for arg in args], error)) from None


_REFUSALS: Final = (RuntimeError, TypeError, ValueError, IndexError, OverflowError, ArithmeticError)


def _refusal(name: str, seen: Sequence[str], error: Exception) -> str:
    reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    return f"{name}({', '.join(seen):.200}) is refused: {reason:.200}"


def _seen(arg: object) -> str:
    if isinstance(arg, Tensor):
        return f"{str(arg.dtype).removeprefix('torch.')}{list(arg.shape)}"
    if isinstance(arg, tuple | list):
        return f"[{', '.join(_seen(item) for item in arg[:8])}{', ...' if len(arg) > 8 else ''}]"
    return arg.value if isinstance(arg, DType) else "null" if arg is None else str(arg)[:24]


# Shapes ----------------------------------------------------------------------------------------

_INFERRED_MAX: Final = 65_536
_inferred: dict[tuple[Any, ...], Specs] = {}
_inferred_lock = threading.Lock()


def infer(name: str, args: tuple[SpecArg, ...]) -> Specs:
    """The dtype and shape of the op's result, found by running it on torch's meta device.

    `args` are those of a checked node, with specs in place of refs. Nothing is computed or
    allocated. Raises ShapeMismatch if torch refuses, and if the shape would depend on data. Known
    answers are kept, under a key that tells 1 from 1.0 from True.
    """
    key = (name, *map(_key, args))
    found = _inferred.get(key)
    if found is None:
        found = _infer(name, args)
        with _inferred_lock:
            while len(_inferred) >= _INFERRED_MAX:
                del _inferred[next(iter(_inferred))]
            _inferred[key] = found
    return found


def _key(arg: SpecArg) -> object:
    kind = type(arg)
    if kind is tuple:
        return tuple(map(_key, arg))  # type: ignore[arg-type]
    return arg if kind is TensorSpec else (kind, arg)


def _infer(name: str, args: tuple[SpecArg, ...]) -> Specs:
    find_op(name)
    if name == "pick":
        group, index = args
        if (
            not isinstance(group, tuple)
            or not isinstance(index, int)
            or not 0 <= index < len(group)
        ):
            raise ShapeMismatch(f"pick takes part {index} of what is no group with such a part")
        return group[index]  # type: ignore[return-value]
    _refuse_shapes_from_data(name, args)
    try:
        with torch.no_grad():
            rule = _SHAPES.get(name)
            metas = [_to_meta(arg) for arg in args]
            if rule is not None:
                result = rule(*metas)
            else:
                result = (
                    KERNELS[name](*metas, device="meta")
                    if name in _MAKERS
                    else KERNELS[name](*metas)
                )
        if isinstance(result, tuple):
            return tuple(spec_of(part) for part in result)
        return spec_of(result)
    except Exception as error:  # meta kernels are Python in part and raise whatever they meet
        raise ShapeMismatch(_refusal(name, [_spec_seen(arg) for arg in args], error)) from None


def _refuse_shapes_from_data(name: str, args: tuple[SpecArg, ...]) -> None:
    """A mask as an index picks as many elements as are true, which nobody knows beforehand."""
    if name in ("index", "take", "index_select"):
        indices = args[1] if name == "index" else args[-1:]
        for index in indices if isinstance(indices, tuple) else ():
            if isinstance(index, TensorSpec) and index.dtype in (DType.BOOL, DType.UINT8):
                raise ShapeMismatch(
                    f"{name} with a {index} mask has as many elements as are true, which is not "
                    "known beforehand; use where or masked_fill"
                )


def _spec_seen(arg: SpecArg) -> str:
    if isinstance(arg, TensorSpec):
        return str(arg)
    if isinstance(arg, tuple):
        return f"[{', '.join(_spec_seen(a) for a in arg[:8])}{', ...' if len(arg) > 8 else ''}]"
    return _seen(arg)


def _to_meta(arg: SpecArg) -> Any:
    if isinstance(arg, TensorSpec):
        return torch.empty(arg.shape, dtype=_TORCH_DTYPES[arg.dtype], device="meta")
    if isinstance(arg, tuple):
        return tuple(_to_meta(item) for item in arg)
    return arg


def spec_of(tensor: Tensor) -> TensorSpec:
    """The dtype and shape of `tensor`. Raises BadTensor for a dtype outside the closed list."""
    if tensor.dim() > MAX_RANK:
        raise BadTensor(f"a tensor of {tensor.dim()} dimensions; at most {MAX_RANK} can be named")
    return TensorSpec(from_torch_dtype(tensor.dtype), tuple(tensor.shape))


# Bytes -----------------------------------------------------------------------------------------


def tensor_from_bytes(spec: TensorSpec, elements: Bytes) -> Tensor:
    """A CPU tensor with a copy of `elements`, in memory of its own. Raises BadTensor."""
    check_elements(spec, elements)
    tensor = torch.empty(spec.shape, dtype=_TORCH_DTYPES[spec.dtype])
    if spec.nbytes:
        raw = tensor.view(-1).view(torch.uint8)
        _memory(raw)[:] = memoryview(elements).cast("B")
        if spec.dtype is DType.BOOL and bool((raw > 1).any()):
            raise BadTensor(f"{spec} holds bytes other than 0 and 1")
    return tensor


def tensor_to_bytes(tensor: Tensor) -> memoryview:
    """The elements of `tensor` as bytes, row by row.

    The memory of a contiguous CPU tensor is shared, not copied: don't change the tensor meanwhile.
    Raises BadTensor for a dtype outside the closed list.
    """
    from_torch_dtype(tensor.dtype)
    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    if not plain.numel():
        return memoryview(b"")
    return _memory(plain.view(-1).view(torch.uint8))


def _memory(raw: Tensor) -> memoryview:
    array: Any = raw.numpy()
    return memoryview(array)


# Kernels: indices that are checked ---------------------------------------------------------------


def _check(good: bool, reason: str) -> None:
    if not good:
        raise ValueError(reason)


def _within(index: Tensor, size: int, low: int = 0) -> Tensor:
    """`index`, known to lie in low..size-1 on devices that do not check it."""
    if index.device.type not in ("cpu", "meta") and index.dtype is not torch.bool and index.numel():
        lowest, highest = torch.aminmax(index)
        _check(bool((lowest >= low) & (highest < size)), f"an index is not in {low}..{size - 1}")
    return index


def _size(a: Tensor, dim: int) -> int:
    return a.shape[dim] if a.dim() else 1


def _many_within(a: Tensor, indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    dim = 0
    for index in indices:
        _check(index is None or index.dtype is not torch.uint8, "an index cannot be uint8")
        if index is not None and dim < a.dim():
            _within(index, a.shape[dim], -a.shape[dim])
        dim += index.dim() if index is not None and index.dtype is torch.bool else 1
    return list(indices)


def _index(a: Tensor, indices: Sequence[Tensor | None]) -> Any:
    return _aten.index.Tensor(a, _many_within(a, indices))


def _index_put(a: Tensor, indices: Sequence[Tensor | None], src: Tensor, accumulate: bool) -> Any:
    return _aten.index_put.default(a, _many_within(a, indices), src, accumulate)


def _index_select(a: Tensor, dim: int, index: Tensor) -> Tensor:
    return torch.index_select(a, dim, _within(index, _size(a, dim)))


def _index_add(a: Tensor, dim: int, index: Tensor, src: Tensor, alpha: float) -> Tensor:
    return torch.index_add(a, dim, _within(index, _size(a, dim)), src, alpha=alpha)


def _index_copy(a: Tensor, dim: int, index: Tensor, src: Tensor) -> Tensor:
    return torch.index_copy(a, dim, _within(index, _size(a, dim)), src)


def _index_fill(a: Tensor, dim: int, index: Tensor, value: Any) -> Tensor:
    return torch.index_fill(a, dim, _within(index, _size(a, dim), -_size(a, dim)), value)


def _gather(a: Tensor, dim: int, index: Tensor) -> Tensor:
    return torch.gather(a, dim, _within(index, _size(a, dim)))


def _scatter(a: Tensor, dim: int, index: Tensor, src: Any) -> Tensor:
    return torch.scatter(a, dim, _within(index, _size(a, dim)), src)


def _scatter_add(a: Tensor, dim: int, index: Tensor, src: Tensor) -> Tensor:
    return torch.scatter_add(a, dim, _within(index, _size(a, dim)), src)


def _scatter_reduce(
    a: Tensor, dim: int, index: Tensor, src: Tensor, reduce: str, include_self: bool
) -> Tensor:
    index = _within(index, _size(a, dim))
    return torch.scatter_reduce(a, dim, index, src, reduce, include_self=include_self)


def _take(a: Tensor, index: Tensor) -> Tensor:
    return torch.take(a, _within(index, a.numel(), -a.numel()))


def _put(a: Tensor, index: Tensor, src: Tensor, accumulate: bool) -> Tensor:
    return torch.put(a, _within(index, a.numel(), -a.numel()), src, accumulate)


def _embedding(weight: Tensor, indices: Tensor) -> Tensor:
    return torch.embedding(weight, _within(indices, weight.shape[0]))


def _one_hot(a: Tensor, classes: int) -> Tensor:
    _check(classes > 0, "classes must be 1 or more")
    _check(a.dtype is torch.int64, "indices must be int64")
    zeros = torch.zeros((*a.shape, classes), dtype=torch.int64, device=a.device)
    return zeros.scatter_(-1, _within(a, classes).unsqueeze(-1), 1)


def _masked_scatter(a: Tensor, mask: Tensor, src: Tensor) -> Tensor:
    if a.device.type not in ("cpu", "meta"):
        places = int(torch.where(mask, torch.ones_like(a, dtype=torch.int64), 0).sum())
        _check(places <= src.numel(), f"{places} places are masked, but {src.numel()} values given")
    return torch.masked_scatter(a, mask, src)


# Kernels: random numbers -------------------------------------------------------------------------


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _fresh(a: Tensor, dtype: DType | None) -> Tensor:
    """Memory to draw into, row by row whatever the strides of `a`. Never given out undrawn."""
    return torch.empty(a.shape, dtype=_dtype_or(a, dtype))


def _dtype_or(a: Tensor, dtype: DType | None) -> torch.dtype:
    return a.dtype if dtype is None else _TORCH_DTYPES[dtype]


def _rand_like(a: Tensor, dtype: DType | None, seed: int) -> Tensor:
    return _fresh(a, dtype).uniform_(generator=_generator(seed)).to(a.device)


def _randn_like(a: Tensor, dtype: DType | None, seed: int) -> Tensor:
    return _fresh(a, dtype).normal_(generator=_generator(seed)).to(a.device)


def _randint_like(a: Tensor, low: int, high: int, dtype: DType | None, seed: int) -> Tensor:
    return _fresh(a, dtype).random_(low, high, generator=_generator(seed)).to(a.device)


def _bernoulli(a: Tensor, p: float | None, seed: int) -> Tensor:
    if p is None:
        return torch.bernoulli(a.cpu().contiguous(), generator=_generator(seed)).to(a.device)
    return _fresh(a, None).bernoulli_(p, generator=_generator(seed)).to(a.device)


def _multinomial(a: Tensor, samples: int, replacement: bool, seed: int) -> Tensor:
    weights = a.cpu().contiguous()
    return torch.multinomial(weights, samples, replacement, generator=_generator(seed)).to(a.device)


def _normal(a: Tensor, mean: float, std: float, seed: int) -> Tensor:
    return _fresh(a, None).normal_(mean, std, generator=_generator(seed)).to(a.device)


def _uniform(a: Tensor, low: float, high: float, seed: int) -> Tensor:
    return _fresh(a, None).uniform_(low, high, generator=_generator(seed)).to(a.device)


def _exponential(a: Tensor, rate: float, seed: int) -> Tensor:
    return _fresh(a, None).exponential_(rate, generator=_generator(seed)).to(a.device)


def _dropout(a: Tensor, p: float, seed: int) -> Tensor:
    _check(0.0 <= p < 1.0, "p must be in 0..1, without 1")
    kept = _fresh(a, None).bernoulli_(1.0 - p, generator=_generator(seed)).div_(1.0 - p)
    return a * kept.to(a.device)


def _shape_drawn(a: Tensor, *args: Any) -> Tensor:
    dtype = next((arg for arg in args if isinstance(arg, DType)), None)
    return torch.empty(a.shape, dtype=_dtype_or(a, dtype), device="meta")


def _shape_searched(where: Any, a: Any, right: bool) -> Tensor:
    return torch.searchsorted(where, _as_meta(a), right=right)


def _shape_bucketed(a: Any, boundaries: Any, right: bool) -> Tensor:
    return torch.bucketize(_as_meta(a), boundaries, right=right)


def _as_meta(a: Any) -> Tensor:
    return a if isinstance(a, Tensor) else torch.empty((), device="meta")


def _shape_multinomial(a: Tensor, samples: int, replacement: bool, seed: int) -> Tensor:
    return torch.multinomial(a, samples, replacement)


# Kernels: new tensors ----------------------------------------------------------------------------


def _full(shape: Sequence[int], value: Any, dtype: DType, *, device: Any) -> Tensor:
    return torch.full(shape, value, dtype=_TORCH_DTYPES[dtype], device=device)


def _arange(start: Any, stop: Any, step: Any, dtype: DType, *, device: Any) -> Tensor:
    _check(all(abs(v) <= 2**53 for v in (start, stop, step)), "numbers must be within 2**53")
    return torch.arange(start, stop, step, dtype=_TORCH_DTYPES[dtype], device=device)


def _linspace(start: Any, stop: Any, steps: int, dtype: DType, *, device: Any) -> Tensor:
    return torch.linspace(start, stop, steps, dtype=_TORCH_DTYPES[dtype], device=device)


def _eye(n: int, m: int, dtype: DType, *, device: Any) -> Tensor:
    return torch.eye(n, m, dtype=_TORCH_DTYPES[dtype], device=device)


def _full_like(a: Tensor, value: Any, dtype: DType | None) -> Tensor:
    return torch.full_like(a, value, dtype=_dtype_or(a, dtype))


def _zeros_like(a: Tensor, dtype: DType | None) -> Tensor:
    return torch.zeros_like(a, dtype=_dtype_or(a, dtype))


def _ones_like(a: Tensor, dtype: DType | None) -> Tensor:
    return torch.ones_like(a, dtype=_dtype_or(a, dtype))


# Kernels: the rest -------------------------------------------------------------------------------


def _optional_dtype(dtype: DType | None) -> torch.dtype | None:
    return None if dtype is None else _TORCH_DTYPES[dtype]


def _slice(a: Tensor, dim: int, start: int, stop: int, step: int) -> Any:
    return _aten.slice.Tensor(a, dim, start, stop, step)


def _round(a: Tensor, decimals: int) -> Tensor:
    return torch.round(a, decimals=decimals) if decimals else torch.round(a)


def _prod(a: Tensor, dim: int | None, keepdim: bool, dtype: DType | None) -> Tensor:
    if dim is None:
        _check(not keepdim, "keepdim needs a dim")
        return torch.prod(a, dtype=_optional_dtype(dtype))
    return torch.prod(a, dim, keepdim, dtype=_optional_dtype(dtype))


def _pow(a: Any, b: Any) -> Tensor:
    _check(type(a) is not bool and type(b) is not bool, "a power of or by a bool")
    return torch.pow(a, b)


def _div(a: Tensor, b: Any, rounding: str) -> Tensor:
    if rounding == "trunc" and not (dtype := torch.result_type(a, b)).is_floating_point:
        # The least integer through -1 does not fit, and dividing so ends the process.
        divisor = torch.as_tensor(b, dtype=dtype, device=a.device)
        minus = divisor == -1
        quotient = torch.div(a, torch.where(minus, 1, divisor), rounding_mode="trunc")
        return torch.where(minus, torch.neg(quotient), quotient).to(dtype)
    return torch.div(a, b, rounding_mode=_ROUNDINGS[rounding])


def _lcm(a: Tensor, b: Tensor) -> Tensor:
    # torch.lcm of the least integer ends the process; a floor division does not.
    divisor = torch.gcd(a, b)
    parts = torch.div(a, torch.where(divisor == 0, 1, divisor), rounding_mode="floor")
    return torch.abs(torch.mul(parts, b))


def _addr(c: Tensor, a: Tensor, b: Tensor, beta: Any, alpha: Any) -> Tensor:
    _check(c.dtype == a.dtype == b.dtype, "the three must have one dtype")
    return torch.addr(c, a, b, beta=beta, alpha=alpha)


def _alike(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both at one shape. Some losses write into a result of the wrong shape or dtype otherwise."""
    _check(a.dtype == b.dtype, "the two must have one dtype")
    shape: torch.Size = torch.broadcast_shapes(a.shape, b.shape)  # type: ignore[no-untyped-call]
    return a.expand(shape), b.expand(shape)


def _isin(a: Tensor, test: Any, invert: bool) -> Tensor:
    return torch.isin(a, test, invert=invert)


def _binary_cross_entropy(a: Tensor, target: Tensor, weight: Tensor | None, reduction: str) -> Any:
    _check(a.shape == target.shape and a.dtype == target.dtype, "the two must be alike")
    if weight is not None:
        _check(weight.dtype == a.dtype, "the weights must have the dtype of the rest")
        weight = weight.expand(a.shape)
    if a.device.type not in ("cpu", "meta"):
        _check(bool(((a >= 0) & (a <= 1)).all()), "probabilities must be in 0..1")
    return _aten.binary_cross_entropy.default(a, target, weight, _REDUCTIONS[reduction])


def _nll_loss(
    a: Tensor, target: Tensor, weight: Tensor | None, reduction: str, ignore_index: int
) -> Tensor:
    if target.device.type not in ("cpu", "meta"):
        _within(torch.where(target == ignore_index, 0, target), _size(a, 1 if a.dim() > 1 else 0))
    return F.nll_loss(a, target, weight, ignore_index=ignore_index, reduction=reduction)


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None,
    grouped: bool,
) -> Tensor:  # fmt: skip
    _check(q.dim() == k.dim() == v.dim() >= 3, "the three must have one rank of 3 or more")
    _check(q.shape[:-3] == k.shape[:-3] == v.shape[:-3], "the three must have one batch")
    _check(q.numel() > 0 and k.numel() > 0 and v.numel() > 0, "an attention over no elements")
    _check(q.shape[-1] == k.shape[-1] and k.shape[-2] == v.shape[-2], "sizes do not match")
    heads, kept = q.shape[-3], k.shape[-3]
    _check(kept == v.shape[-3] and heads % kept == 0, "heads do not match")
    _check(grouped or heads == kept, "fewer heads of keys than of queries, and not grouped")
    return F.scaled_dot_product_attention(
        q, k, v, mask, 0.0, causal, scale=scale, enable_gqa=grouped
    )


def _layer_norm(
    a: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    return torch.native_layer_norm(a, shape, weight, bias, eps)[0]


def _group_norm(
    a: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    _check(groups > 0, "groups must be 1 or more")
    return torch.group_norm(a, groups, weight, bias, eps)


def _batch_norm(
    a: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> Tensor:
    return torch.batch_norm(a, weight, bias, mean, var, False, 0.0, eps, False)


def _convolution(
    a: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], transposed: bool, output_padding: Sequence[int], groups: int,
) -> Tensor:  # fmt: skip
    outer = output_padding or (0,) * len(stride)
    return torch.convolution(a, weight, bias, stride, padding, dilation, transposed, outer, groups)


def _fft_dims(a: Tensor, dims: Sequence[int], dtype: torch.dtype) -> list[int]:
    """`dims` counted from the front. The kernels below trust their arguments, so all is checked."""
    _check(a.dtype is dtype, f"{dtype} is wanted")
    _check(bool(dims) and all(-a.dim() <= d < a.dim() for d in dims), "dims are not those of a")
    wrapped = [d % a.dim() for d in dims]
    _check(len(set(wrapped)) == len(wrapped), "a dim stands there twice")
    _check(a.numel() > 0, "a transform of no elements")
    return wrapped


def _fft_r2c(a: Tensor, dims: Sequence[int], norm: str, onesided: bool) -> Any:
    wrapped = _fft_dims(a, dims, torch.float32)
    return _aten._fft_r2c.default(a, wrapped, _FFT_NORMS[norm], onesided)


def _fft_c2c(a: Tensor, dims: Sequence[int], norm: str, forward: bool) -> Any:
    wrapped = _fft_dims(a, dims, torch.complex64)
    return _aten._fft_c2c.default(a, wrapped, _FFT_NORMS[norm], forward)


def _fft_c2r(a: Tensor, dims: Sequence[int], norm: str, last_size: int) -> Any:
    wrapped = _fft_dims(a, dims, torch.complex64)
    half = a.shape[wrapped[-1]]
    _check(last_size > 0 and last_size // 2 + 1 == half, f"last_size does not go with {half}")
    return _aten._fft_c2r.default(a, wrapped, _FFT_NORMS[norm], last_size)


_REDUCTIONS: Final = {"none": 0, "mean": 1, "sum": 2}
_FFT_NORMS: Final = {"none": 0, "root": 1, "full": 2}
_ROUNDINGS: Final = {"none": None, "trunc": "trunc", "floor": "floor"}

_MAKERS: Final = frozenset({"full", "arange", "linspace", "eye"})

_SHAPES: Final[Mapping[str, Kernel]] = {
    "rand_like": _shape_drawn,
    "randn_like": _shape_drawn,
    "randint_like": _shape_drawn,
    "bernoulli": _shape_drawn,
    "normal": _shape_drawn,
    "uniform": _shape_drawn,
    "exponential": _shape_drawn,
    "dropout": _shape_drawn,
    "multinomial": _shape_multinomial,
    "searchsorted": _shape_searched,
    "bucketize": _shape_bucketed,
}

KERNELS: Final[Mapping[str, Kernel]] = MappingProxyType(
    {
        "pick": lambda group, index: group[index],
        # Shapes and views
        "reshape": torch.reshape,
        "expand": lambda a, shape: a.expand(shape),
        "permute": torch.permute,
        "slice": _slice,
        "select": torch.select,
        "diagonal": torch.diagonal,
        "unfold": lambda a, dim, size, step: a.unfold(dim, size, step),
        "view_as_real": torch.view_as_real,
        "view_as_complex": torch.view_as_complex,
        "detach": torch.detach,
        "clone": torch.clone,
        "to": lambda a, dtype: a.to(_TORCH_DTYPES[dtype]),
        "select_scatter": torch.select_scatter,
        "slice_scatter": torch.slice_scatter,
        "diagonal_scatter": torch.diagonal_scatter,
        "cat": torch.cat,
        "stack": torch.stack,
        "repeat": lambda a, repeats: a.repeat(repeats),
        "flip": torch.flip,
        "roll": torch.roll,
        "tril": torch.tril,
        "triu": torch.triu,
        "diag_embed": torch.diag_embed,
        "constant_pad_nd": torch.constant_pad_nd,
        # New tensors
        "full": _full,
        "full_like": _full_like,
        "zeros_like": _zeros_like,
        "ones_like": _ones_like,
        "arange": _arange,
        "linspace": _linspace,
        "eye": _eye,
        "one_hot": _one_hot,
        # Random numbers
        "rand_like": _rand_like,
        "randn_like": _randn_like,
        "randint_like": _randint_like,
        "bernoulli": _bernoulli,
        "multinomial": _multinomial,
        "normal": _normal,
        "uniform": _uniform,
        "exponential": _exponential,
        "dropout": _dropout,
        # One tensor, element by element
        "abs": torch.abs,
        "acos": torch.acos,
        "acosh": torch.acosh,
        "angle": torch.angle,
        "asin": torch.asin,
        "asinh": torch.asinh,
        "atan": torch.atan,
        "atanh": torch.atanh,
        "bitwise_not": torch.bitwise_not,
        "ceil": torch.ceil,
        "celu": torch.celu,
        "conj": torch.conj_physical,
        "cos": torch.cos,
        "cosh": torch.cosh,
        "digamma": torch.digamma,
        "elu": _aten.elu.default,
        "erf": torch.erf,
        "erfc": torch.erfc,
        "erfinv": torch.erfinv,
        "exp": torch.exp,
        "exp2": torch.exp2,
        "expm1": torch.expm1,
        "floor": torch.floor,
        "frac": torch.frac,
        "gelu": lambda a, approximate: F.gelu(a, approximate=approximate),
        "glu": F.glu,
        "hardshrink": F.hardshrink,
        "hardsigmoid": F.hardsigmoid,
        "hardswish": F.hardswish,
        "hardtanh": F.hardtanh,
        "i0": torch.i0,
        "imag": torch.imag,
        "isfinite": torch.isfinite,
        "isinf": torch.isinf,
        "isnan": torch.isnan,
        "isneginf": torch.isneginf,
        "isposinf": torch.isposinf,
        "leaky_relu": F.leaky_relu,
        "lgamma": torch.lgamma,
        "log": torch.log,
        "log10": torch.log10,
        "log1p": torch.log1p,
        "log2": torch.log2,
        "log_sigmoid": F.logsigmoid,
        "logical_not": torch.logical_not,
        "logit": torch.logit,
        "mish": F.mish,
        "nan_to_num": torch.nan_to_num,
        "neg": torch.neg,
        "positive": torch.positive,
        "real": torch.real,
        "reciprocal": torch.reciprocal,
        "relu": torch.relu,
        "round": _round,
        "rsqrt": torch.rsqrt,
        "selu": F.selu,
        "sgn": torch.sgn,
        "sigmoid": torch.sigmoid,
        "sign": torch.sign,
        "signbit": torch.signbit,
        "silu": F.silu,
        "sin": torch.sin,
        "sinc": torch.sinc,
        "sinh": torch.sinh,
        "softplus": F.softplus,
        "softshrink": F.softshrink,
        "sqrt": torch.sqrt,
        "tan": torch.tan,
        "tanh": torch.tanh,
        "threshold": F.threshold,
        "trunc": torch.trunc,
        "complex": torch.complex,
        "polar": torch.polar,
        # Two or three tensors, element by element
        "add": lambda a, b, alpha: torch.add(a, b, alpha=alpha),
        "sub": lambda a, b, alpha: torch.sub(a, b, alpha=alpha),
        "rsub": lambda a, b, alpha: torch.rsub(a, b, alpha=alpha),
        "mul": torch.mul,
        "div": _div,
        "pow": _pow,
        "xlogy": torch.xlogy,
        "remainder": torch.remainder,
        "fmod": torch.fmod,
        "copysign": torch.copysign,
        "maximum": torch.maximum,
        "minimum": torch.minimum,
        "fmax": torch.fmax,
        "fmin": torch.fmin,
        "atan2": torch.atan2,
        "hypot": torch.hypot,
        "logaddexp": torch.logaddexp,
        "logaddexp2": torch.logaddexp2,
        "heaviside": torch.heaviside,
        "gcd": torch.gcd,
        "lcm": _lcm,
        "eq": torch.eq,
        "ne": torch.ne,
        "lt": torch.lt,
        "le": torch.le,
        "gt": torch.gt,
        "ge": torch.ge,
        "logical_and": torch.logical_and,
        "logical_or": torch.logical_or,
        "logical_xor": torch.logical_xor,
        "bitwise_and": torch.bitwise_and,
        "bitwise_or": torch.bitwise_or,
        "bitwise_xor": torch.bitwise_xor,
        "bitwise_left_shift": torch.bitwise_left_shift,
        "bitwise_right_shift": torch.bitwise_right_shift,
        "lerp": torch.lerp,
        "addcmul": lambda a, b, c, scale: torch.addcmul(a, b, c, value=scale),
        "addcdiv": lambda a, b, c, scale: torch.addcdiv(a, b, c, value=scale),
        "clamp": torch.clamp,
        "where": torch.where,
        "masked_fill": torch.masked_fill,
        "masked_scatter": _masked_scatter,
        "prelu": torch.prelu,
        # Reductions
        "sum": lambda a, d, k, t: torch.sum(a, d, k, dtype=_optional_dtype(t)),
        "mean": lambda a, d, k, t: torch.mean(a, d, k, dtype=_optional_dtype(t)),
        "nansum": lambda a, d, k, t: torch.nansum(a, d or None, k, dtype=_optional_dtype(t)),
        "prod": _prod,
        "all": _aten.all.dims,
        "any": _aten.any.dims,
        "amax": torch.amax,
        "amin": torch.amin,
        "logsumexp": torch.logsumexp,
        "max": torch.max,
        "min": torch.min,
        "median": torch.median,
        "nanmedian": torch.nanmedian,
        "argmax": torch.argmax,
        "argmin": torch.argmin,
        "max_dim": lambda a, dim, keepdim: tuple(torch.max(a, dim, keepdim)),
        "min_dim": lambda a, dim, keepdim: tuple(torch.min(a, dim, keepdim)),
        "median_dim": lambda a, dim, keepdim: tuple(torch.median(a, dim, keepdim)),
        "nanmedian_dim": lambda a, dim, keepdim: tuple(torch.nanmedian(a, dim, keepdim)),
        "mode": lambda a, dim, keepdim: tuple(torch.mode(a, dim, keepdim)),
        "aminmax": lambda a, dim, keepdim: tuple(torch.aminmax(a, dim=dim, keepdim=keepdim)),
        "var": lambda a, d, c, k: torch.var(a, d, correction=c, keepdim=k),
        "std": lambda a, d, c, k: torch.std(a, d, correction=c, keepdim=k),
        "var_mean": lambda a, d, c, k: tuple(torch.var_mean(a, d, correction=c, keepdim=k)),
        "std_mean": lambda a, d, c, k: tuple(torch.std_mean(a, d, correction=c, keepdim=k)),
        "vector_norm": lambda a, order, d, k, t: torch.linalg.vector_norm(
            a, order, d, k, dtype=_optional_dtype(t)
        ),
        "count_nonzero": torch.count_nonzero,
        "trace": torch.trace,
        "histc": lambda a, bins, low, high: torch.histc(a, bins, low, high),
        # Along a dimension
        "softmax": torch.softmax,
        "log_softmax": torch.log_softmax,
        "cumsum": lambda a, dim, t: torch.cumsum(a, dim, dtype=_optional_dtype(t)),
        "cumprod": lambda a, dim, t: torch.cumprod(a, dim, dtype=_optional_dtype(t)),
        "logcumsumexp": torch.logcumsumexp,
        "cummax": lambda a, dim: tuple(torch.cummax(a, dim)),
        "cummin": lambda a, dim: tuple(torch.cummin(a, dim)),
        "sort": lambda a, dim, descending, stable: tuple(
            torch.sort(a, dim=dim, descending=descending, stable=stable)
        ),
        "topk": lambda a, k, dim, largest, in_order: tuple(
            torch.topk(a, k, dim, largest, in_order)
        ),
        "kthvalue": lambda a, k, dim, keepdim: tuple(torch.kthvalue(a, k, dim, keepdim)),
        "renorm": torch.renorm,
        # Picking and placing by index
        "index": _index,
        "index_put": _index_put,
        "index_select": _index_select,
        "index_add": _index_add,
        "index_copy": _index_copy,
        "index_fill": _index_fill,
        "gather": _gather,
        "scatter": _scatter,
        "scatter_add": _scatter_add,
        "scatter_reduce": _scatter_reduce,
        "take": _take,
        "put": _put,
        "embedding": _embedding,
        "isin": _isin,
        "searchsorted": lambda ordered, a, right: torch.searchsorted(ordered, a, right=right),
        "bucketize": lambda a, boundaries, right: torch.bucketize(a, boundaries, right=right),
        # Matrices
        "mm": torch.mm,
        "bmm": torch.bmm,
        "mv": torch.mv,
        "dot": torch.dot,
        "addmm": lambda c, a, b, beta, alpha: torch.addmm(c, a, b, beta=beta, alpha=alpha),
        "addmv": lambda c, a, b, beta, alpha: torch.addmv(c, a, b, beta=beta, alpha=alpha),
        "baddbmm": lambda c, a, b, beta, alpha: torch.baddbmm(c, a, b, beta=beta, alpha=alpha),
        "addr": _addr,
        "cdist": torch.cdist,
        "linalg_cross": lambda a, b, dim: torch.linalg.cross(a, b, dim=dim),
        "linalg_inv": torch.linalg.inv,
        "linalg_det": torch.linalg.det,
        "linalg_pinv": lambda a, atol, rtol, hermitian: torch.linalg.pinv(
            a, atol=atol, rtol=rtol, hermitian=hermitian
        ),
        "linalg_solve": lambda a, b, left: torch.linalg.solve(a, b, left=left),
        "linalg_solve_triangular": lambda a, b, upper, left, unit: torch.linalg.solve_triangular(
            a, b, upper=upper, left=left, unitriangular=unit
        ),
        "linalg_cholesky": lambda a, upper: torch.linalg.cholesky(a, upper=upper),
        "linalg_slogdet": lambda a: tuple(torch.linalg.slogdet(a)),
        "linalg_qr": lambda a, mode: tuple(torch.linalg.qr(a, mode)),
        "linalg_eigh": lambda a, uplo: tuple(torch.linalg.eigh(a, uplo)),
        "linalg_svd": lambda a, full: tuple(torch.linalg.svd(a, full)),
        # Layers
        "sdpa": _sdpa,
        "layer_norm": _layer_norm,
        "rms_norm": torch.rms_norm,
        "group_norm": _group_norm,
        "batch_norm": _batch_norm,
        "convolution": _convolution,
        # Losses
        "mse_loss": lambda a, b, r: _aten.mse_loss(*_alike(a, b), _REDUCTIONS[r]),
        "soft_margin_loss": lambda a, b, r: _aten.soft_margin_loss(*_alike(a, b), _REDUCTIONS[r]),
        "huber_loss": lambda a, b, r, d: _aten.huber_loss(*_alike(a, b), _REDUCTIONS[r], d),
        "smooth_l1_loss": lambda a, b, r, d: _aten.smooth_l1_loss(*_alike(a, b), _REDUCTIONS[r], d),
        "nll_loss": _nll_loss,
        "binary_cross_entropy": _binary_cross_entropy,
        "binary_cross_entropy_with_logits": lambda a, b, weight, positive, r: (
            _aten.binary_cross_entropy_with_logits.default(a, b, weight, positive, _REDUCTIONS[r])
        ),
        # Fourier transforms
        "fft_r2c": _fft_r2c,
        "fft_c2c": _fft_c2c,
        "fft_c2r": _fft_c2r,
    }
)
