"""What the ops compute: one torch function for each name in ops.py, run and inferred here.

- The functions stand by family in kernels_shapes.py, kernels_random.py, kernels_elementwise.py,
  kernels_reductions.py, kernels_indices.py, kernels_matrices.py and kernels_layers.py, under the
  headings of ops.py.
- A kernel takes the arguments of the op's signature in order, with tensors in place of refs and
  torch's dtypes in place of ours.
- No kernel mutates its arguments or gives uninitialised memory. A result may share memory with an
  argument where ops.py says `view` or `cast`.
- What an op refuses becomes ShapeMismatch, in one sentence.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor

from glasshive.graph.dtypes import DType
from glasshive.graph.errors import BadTensor, ShapeMismatch
from glasshive.graph.kernels_checks import ends_process, guard
from glasshive.graph.kernels_elementwise import OF_ONE, OF_SEVERAL
from glasshive.graph.kernels_indices import BY_INDEX, SHAPES_OF_SEARCHES
from glasshive.graph.kernels_layers import LAYERS, LOSSES
from glasshive.graph.kernels_matrices import FOURIER, MATRICES
from glasshive.graph.kernels_random import DRAWS, SHAPES_OF_DRAWS
from glasshive.graph.kernels_reductions import ALONG_A_DIMENSION, REDUCTIONS
from glasshive.graph.kernels_shapes import (
    MAKERS,
    NEW_TENSORS,
    SHAPES_OF_JOINS,
    VIEWS_AND_COPIES,
)
from glasshive.graph.memory import is_out_of_memory
from glasshive.graph.ops import OPS, find_op
from glasshive.graph.shape_keys import shape_key
from glasshive.graph.tensors import MAX_RANK, Bytes, SpecArg, Specs, TensorSpec, check_elements

Kernel: TypeAlias = Callable[..., Any]

KERNELS: Final[Mapping[str, Kernel]] = MappingProxyType(
    {
        **VIEWS_AND_COPIES,
        **NEW_TENSORS,
        **DRAWS,
        **OF_ONE,
        **OF_SEVERAL,
        **REDUCTIONS,
        **ALONG_A_DIMENSION,
        **BY_INDEX,
        **MATRICES,
        **FOURIER,
        **LAYERS,
        **LOSSES,
    }
)
# The shapes of results that torch's meta device cannot give, or not soon.
_SHAPES: Final[Mapping[str, Kernel]] = {
    **SHAPES_OF_DRAWS,
    **SHAPES_OF_SEARCHES,
    **SHAPES_OF_JOINS,
}
_WITH_DTYPES: Final = frozenset(
    name for name, op in OPS.items() if any(param.kind == "dtype" for param in op.params)
)

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


def run_op(
    name: str, args: Sequence[Any], device: torch.device | str = "cpu", guarded: bool | None = None
) -> Any:
    """The op's result: a tensor, or a tuple of them for an op of several outputs.

    `args` are those of a checked node, with tensors in place of refs. `device` is where an op that
    takes no tensor makes one. `guarded` refuses bad indices before torch sees them, as on every
    device where they would end the process. Raises ShapeMismatch if torch refuses, and what says
    that memory ran out as it is.
    """
    kernel = KERNELS[name]
    if OPS[name].guarded and (ends_process(device) if guarded is None else guarded):
        kernel = guard(kernel)
    if name in _WITH_DTYPES:
        args = [_TORCH_DTYPES[arg] if isinstance(arg, DType) else arg for arg in args]
    try:
        return kernel(*args, device=device) if name in MAKERS else kernel(*args)
    except _REFUSALS as error:
        if is_out_of_memory(error):  # that is no fault of its arguments
            raise
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
    if isinstance(arg, torch.dtype):
        return str(arg).removeprefix("torch.")
    return arg.value if isinstance(arg, DType) else "null" if arg is None else str(arg)[:24]


# Shapes ----------------------------------------------------------------------------------------

_INFERRED_MAX: Final = 65_536
_inferred: dict[Hashable, Specs] = {}
_inferred_lock = threading.Lock()


def infer(name: str, args: tuple[SpecArg, ...]) -> Specs:
    """The dtype and shape of the op's result, found by running it on torch's meta device.

    `args` are those of a checked node, with specs in place of refs. Nothing is computed or
    allocated. Raises ShapeMismatch if torch refuses, and if the shape would depend on data. Known
    answers are kept.
    """
    key = shape_key(find_op(name).name, args)
    found = _inferred.get(key)
    if found is None:
        found = _infer(name, args)
        with _inferred_lock:
            while len(_inferred) >= _INFERRED_MAX:
                del _inferred[next(iter(_inferred))]
            _inferred[key] = found
    return found


def _infer(name: str, args: tuple[SpecArg, ...]) -> Specs:
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
            made: dict[TensorSpec, Tensor] = {}  # one for all arguments that are alike
            metas = [_to_meta(arg, made) for arg in args]
            if rule is not None:
                result = rule(*metas)
            else:
                result = (
                    KERNELS[name](*metas, device="meta")
                    if name in MAKERS
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


def _to_meta(arg: SpecArg, made: dict[TensorSpec, Tensor]) -> Any:
    if isinstance(arg, TensorSpec):
        if arg not in made:
            made[arg] = torch.empty(arg.shape, dtype=_TORCH_DTYPES[arg.dtype], device="meta")
        return made[arg]
    if isinstance(arg, tuple):
        return tuple(_to_meta(item, made) for item in arg)
    return _TORCH_DTYPES[arg] if isinstance(arg, DType) else arg


def spec_of(tensor: Tensor) -> TensorSpec:
    """The dtype and shape of `tensor`. Raises BadTensor for a dtype outside the closed list."""
    if tensor.dim() > MAX_RANK:
        raise BadTensor(f"a tensor of {tensor.dim()} dimensions; at most {MAX_RANK} can be named")
    return TensorSpec(from_torch_dtype(tensor.dtype), tuple(tensor.shape))


# Bytes -----------------------------------------------------------------------------------------


def tensor_from_bytes(spec: TensorSpec, elements: Bytes) -> Tensor:
    """A CPU tensor with a copy of `elements`, in memory of its own. Raises BadTensor."""
    check_elements(spec, elements)
    dtype = _TORCH_DTYPES[spec.dtype]
    if not spec.nbytes:
        return torch.empty(spec.shape, dtype=dtype)
    # Shared for a moment: the copy lies where torch would put it, and its kernels round by that.
    writable = elements if type(elements) is bytearray else bytearray(elements)
    if spec.dtype is DType.BOOL and bool((torch.frombuffer(writable, dtype=torch.uint8) > 1).any()):
        raise BadTensor(f"{spec} holds bytes other than 0 and 1")
    return torch.frombuffer(writable, dtype=dtype).view(spec.shape).clone()


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
