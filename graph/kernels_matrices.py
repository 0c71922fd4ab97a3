"""Kernels of matrices, and of Fourier transforms."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from glasshive.graph.kernels_checks import check

_FFT_NORMS: Final = {"none": 0, "root": 1, "full": 2}
_aten = torch.ops.aten


def _addr(c: Tensor, a: Tensor, b: Tensor, beta: Any, alpha: Any) -> Tensor:
    check(c.dtype == a.dtype == b.dtype, "the three must have one dtype")
    return torch.addr(c, a, b, beta=beta, alpha=alpha)


def _fft_dims(a: Tensor, dims: Sequence[int], dtype: torch.dtype) -> list[int]:
    """`dims` counted from the front. The kernels below trust their arguments, so all is checked."""
    check(a.dtype is dtype, f"{dtype} is wanted")
    check(bool(dims) and all(-a.dim() <= d < a.dim() for d in dims), "dims are not those of a")
    wrapped = [d % a.dim() for d in dims]
    check(len(set(wrapped)) == len(wrapped), "a dim stands there twice")
    check(a.numel() > 0, "a transform of no elements")
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
    check(last_size > 0 and last_size // 2 + 1 == half, f"last_size does not go with {half}")
    return _aten._fft_c2r.default(a, wrapped, _FFT_NORMS[norm], last_size)


MATRICES: Final[Mapping[str, Callable[..., Any]]] = {
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
    # Without the vectors LAPACK runs another algorithm, which rounds differently.
    "linalg_eigvalsh": torch.linalg.eigvalsh,
    "linalg_svdvals": torch.linalg.svdvals,
    "linalg_svd": lambda a, full: tuple(torch.linalg.svd(a, full)),
}


FOURIER: Final[Mapping[str, Callable[..., Any]]] = {
    "fft_r2c": _fft_r2c,
    "fft_c2c": _fft_c2c,
    "fft_c2r": _fft_c2r,
}
