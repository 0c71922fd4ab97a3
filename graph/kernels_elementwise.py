"""Kernels that go element by element over one tensor or several."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from glasshive.graph.kernels_checks import check

_ROUNDINGS: Final = {"none": None, "trunc": "trunc", "floor": "floor"}
_aten = torch.ops.aten


def _round(a: Tensor, decimals: int) -> Tensor:
    return torch.round(a, decimals=decimals) if decimals else torch.round(a)


def _pow(a: Any, b: Any) -> Tensor:
    check(type(a) is not bool and type(b) is not bool, "a power of or by a bool")
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


OF_ONE: Final[Mapping[str, Callable[..., Any]]] = {
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
}


OF_SEVERAL: Final[Mapping[str, Callable[..., Any]]] = {
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
    "masked_scatter": torch.masked_scatter,
    "prelu": torch.prelu,
}
