"""Every op of the table against plain torch, and its predicted shape against the real one.

Each example spells the torch call by hand; the kernels' own table is never consulted for it.
"""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from glasshive.graph import kernels
from glasshive.graph.dtypes import DType
from glasshive.graph.errors import BadTensor, ShapeMismatch, UnknownOp
from glasshive.graph.graph import Arg, NodeId, Ref
from glasshive.graph.kernels import (
    KERNELS,
    from_torch_dtype,
    infer,
    run_op,
    spec_of,
    tensor_from_bytes,
    tensor_to_bytes,
    to_torch_dtype,
)
from glasshive.graph.ops import OPS, check_args
from glasshive.graph.tensors import TensorSpec

torch.manual_seed(0)
X = torch.randn(3, 4)
Y = torch.randn(3, 4)
P = torch.rand(3, 4) * 0.8 + 0.1  # inside (0, 1)
BIG = P + 1.5
I = torch.randint(-9, 9, (3, 4))  # noqa: E741
J = torch.randint(1, 6, (3, 4))
M = X > 0
M2 = Y > 0
Z = torch.complex(X, Y)
HALF = X.to(torch.bfloat16)
V = torch.randn(4)
W = torch.randn(4)
A = torch.randn(2, 3, 5)
B = torch.randn(2, 5, 4)
C = torch.randn(2, 3, 4)
S = torch.randn(4, 4) + 4 * torch.eye(4)
SPD = S @ S.T
SORTED = torch.tensor([-1.0, 0.0, 1.0])
ROWS = torch.tensor([2, 0])
PLACES = torch.tensor([[0, 1, 2, 0], [2, 0, 1, 1], [1, 1, 0, 2]])
Q = torch.randn(2, 4, 5, 8)
K = torch.randn(2, 4, 5, 8)
U = torch.randn(2, 4, 5, 8)
K2 = torch.randn(2, 2, 5, 8)
U2 = torch.randn(2, 2, 5, 8)
IMAGE = torch.randn(2, 4, 9)
FILTER = torch.randn(6, 2, 3)
LABELS = torch.tensor([1, 3, 0])
NAN = torch.tensor([[1.0, math.nan], [math.inf, -math.inf]])
F32, F16, BF16, I64, BOOL = DType.FLOAT32, DType.FLOAT16, DType.BFLOAT16, DType.INT64, DType.BOOL


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@dataclass(frozen=True)
class Example:
    """An op, its arguments with tensors in place of refs, and the torch call that it must equal."""

    name: str
    args: tuple[Any, ...]
    torch_call: Callable[[], Any]


def examples() -> Iterator[Example]:
    for name, *rest in _examples():
        yield Example(name, tuple(rest[:-1]), rest[-1])


def _examples() -> Iterator[tuple[Any, ...]]:
    yield "pick", (X, Y), 1, lambda: Y
    # Shapes and views
    yield "reshape", X, (2, 6), lambda: X.view(2, 6)
    yield "reshape", X.T, (-1,), lambda: X.T.flatten()
    yield "expand", V, (3, 4), lambda: V.expand(3, 4)
    yield "permute", A, (2, 0, 1), lambda: A.movedim(2, 0)
    yield "slice", X, 1, 1, 4, 2, lambda: X[:, 1:4:2]
    yield "select", X, 0, -1, lambda: X[-1]
    yield "diagonal", A, 1, -2, -1, lambda: torch.stack([a.diag(1) for a in A])
    yield "unfold", V, 0, 2, 1, lambda: torch.stack([V[0:2], V[1:3], V[2:4]])
    yield "view_as_real", Z, lambda: torch.stack([X, Y], -1)
    yield "view_as_complex", torch.stack([X, Y], -1), lambda: Z
    yield "detach", X, lambda: X
    yield "clone", X, lambda: X
    yield "to", X, F16, lambda: X.half()
    yield "to", X, F32, lambda: X
    yield "select_scatter", X, V, 0, 1, lambda: torch.stack([X[0], V, X[2]])
    yield "slice_scatter", X, Y[:, :2], 1, 0, 2, 1, lambda: torch.cat([Y[:, :2], X[:, 2:]], 1)
    yield "diagonal_scatter", S, V, 0, 0, 1, lambda: S - S.diag().diag() + V.diag()
    yield "cat", (X, Y), 1, lambda: torch.hstack([X, Y])
    yield "cat", (X, HALF), 0, lambda: torch.vstack([X, HALF.float()])
    yield "stack", (X, Y), 0, lambda: torch.cat([X[None], Y[None]])
    yield "repeat", V, (2, 3), lambda: torch.tile(V, (2, 3))
    yield "flip", X, (1,), lambda: X.fliplr()
    yield "roll", V, (1,), (0,), lambda: torch.cat([V[-1:], V[:-1]])
    yield "tril", X, 1, lambda: X.tril(1)
    yield "triu", X, -1, lambda: X.triu(-1)
    yield "diag_embed", V, 0, -2, -1, lambda: V.diag()
    yield "constant_pad_nd", X, (1, 2), 7.0, lambda: F.pad(X, (1, 2), value=7.0)
    # New tensors
    yield "full", (2, 3), 1.5, F32, lambda: torch.tensor([[1.5] * 3] * 2)
    yield "full", (), True, BOOL, lambda: torch.tensor(True)
    yield "full_like", X, 2, I64, lambda: torch.tensor([[2] * 4] * 3)
    yield "zeros_like", X, None, lambda: torch.zeros(3, 4)
    yield "ones_like", I, F16, lambda: torch.ones(3, 4, dtype=torch.float16)
    yield "arange", 1, 6, 2, I64, lambda: torch.tensor([1, 3, 5])
    yield "linspace", 0.0, 1.0, 5, F32, lambda: torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    yield "eye", 2, 3, F32, lambda: torch.tensor([[1.0, 0, 0], [0, 1, 0]])
    yield "one_hot", PLACES, 4, lambda: F.one_hot(PLACES, 4)
    # Random numbers
    yield "rand_like", X, None, 5, lambda: torch.rand(3, 4, generator=seeded(5))
    yield "rand_like", X.T, None, 5, lambda: torch.rand(4, 3, generator=seeded(5))
    yield "randn_like", X, F32, 2**63 - 1, lambda: torch.randn(3, 4, generator=seeded(2**63 - 1))
    yield "randint_like", X, 2, 9, I64, 1, lambda: torch.randint(2, 9, (3, 4), generator=seeded(1))
    yield "bernoulli", P, None, 3, lambda: torch.bernoulli(P, generator=seeded(3))
    yield "bernoulli", X, 0.3, 3, lambda: torch.empty(3, 4).bernoulli_(0.3, generator=seeded(3))
    yield "multinomial", P, 3, False, 4, lambda: P.multinomial(3, generator=seeded(4))
    yield "normal", X, 1.0, 2.0, 6, lambda: torch.empty(3, 4).normal_(1, 2, generator=seeded(6))
    yield "uniform", X, -1.0, 1.0, 6, lambda: torch.empty(3, 4).uniform_(-1, 1, generator=seeded(6))
    yield "exponential", X, 2.0, 8, lambda: torch.empty(3, 4).exponential_(2.0, generator=seeded(8))
    yield (
        "dropout",
        X,
        0.25,
        9,
        lambda: X * (torch.empty(3, 4).bernoulli_(0.75, generator=seeded(9)) / 0.75),
    )
    # One tensor, element by element
    for name, a in (
        *((name, X) for name in _UNARY_REAL.split()),
        *((name, P) for name in _UNARY_UNIT.split()),
        *((name, NAN) for name in _UNARY_NAN.split()),
    ):
        yield name, a, lambda name=name, a=a: _unary(name, a)
    yield "acosh", BIG, lambda: BIG.acosh()
    yield "angle", Z, lambda: Z.angle()
    yield "abs", Z, lambda: Z.abs()
    yield "real", Z, lambda: X
    yield "real", X, lambda: X
    yield "imag", Z, lambda: Y
    yield "conj", Z, lambda: torch.complex(X, -Y)
    yield "sgn", Z, lambda: Z.sgn()
    yield "bitwise_not", I, lambda: ~I
    yield "logical_not", I, lambda: I == 0
    yield "exp", HALF, lambda: HALF.exp()
    yield "round", X, 0, lambda: X.round()
    yield "round", X, 2, lambda: X.round(decimals=2)
    yield "logit", P, None, lambda: P.logit()
    yield "logit", X, 0.1, lambda: X.logit(0.1)
    yield "nan_to_num", NAN, 0.5, None, -2.0, lambda: NAN.nan_to_num(0.5, None, -2.0)
    yield "gelu", X, "none", lambda: torch.nn.GELU()(X)
    yield "gelu", X, "tanh", lambda: torch.nn.GELU("tanh")(X)
    yield "elu", X, 1.5, 1, 1, lambda: F.elu(X, 1.5)
    yield "celu", X, 1.5, lambda: F.celu(X, 1.5)
    yield "leaky_relu", X, 0.2, lambda: torch.nn.LeakyReLU(0.2)(X)
    yield "hardtanh", X, -0.5, 0.5, lambda: X.clamp(-0.5, 0.5)
    yield "hardshrink", X, 0.5, lambda: X.hardshrink(0.5)
    yield "softshrink", X, 0.5, lambda: torch.nn.Softshrink(0.5)(X)
    yield "threshold", X, 0.1, 3.0, lambda: torch.nn.Threshold(0.1, 3.0)(X)
    yield "softplus", X, 2, 20, lambda: torch.nn.Softplus(2, 20)(X)
    yield "glu", X, -1, lambda: torch.nn.GLU(-1)(X)
    yield "complex", X, Y, lambda: X + 1j * Y
    yield "polar", P, X, lambda: torch.polar(P, X)
    # Two or three tensors, element by element
    yield "add", X, Y, 2, lambda: X + 2 * Y
    yield "add", I, 1.5, 1, lambda: I + 1.5
    yield "add", X, torch.tensor(2.0, dtype=torch.float64), 1, lambda: X + 2.0
    yield "sub", X, V, 1, lambda: X - V
    yield "rsub", X, 3, 1, lambda: 3 - X
    yield "mul", X, HALF, lambda: X * HALF
    yield "div", I, J, "none", lambda: I / J
    yield "div", I, J, "trunc", lambda: (I / J).trunc().long()
    yield "div", I, J, "floor", lambda: I // J
    yield "pow", X, 2, lambda: X**2
    yield "pow", 2, X, lambda: 2**X
    yield "pow", P, Y, lambda: P**Y
    yield "xlogy", X, P, lambda: X.xlogy(P)
    yield "remainder", I, 3, lambda: I % 3
    yield "remainder", 7, J, lambda: 7 % J
    yield "fmod", X, P, lambda: X.fmod(P)
    yield "copysign", P, X, lambda: P.copysign(X)
    yield "maximum", X, Y, lambda: torch.where(X > Y, X, Y)
    yield "minimum", X, Y, lambda: torch.where(X < Y, X, Y)
    yield "fmax", X, Y, lambda: X.fmax(Y)
    yield "fmin", X, Y, lambda: X.fmin(Y)
    yield "atan2", X, Y, lambda: X.atan2(Y)
    yield "hypot", X, Y, lambda: X.hypot(Y)
    yield "logaddexp", X, Y, lambda: X.logaddexp(Y)
    yield "logaddexp2", X, Y, lambda: X.logaddexp2(Y)
    yield "heaviside", X, P, lambda: X.heaviside(P)
    yield "gcd", I, J, lambda: I.gcd(J)
    yield "lcm", I, J, lambda: I.lcm(J)
    yield "eq", I, 2, lambda: I == 2
    yield "ne", I, J, lambda: I != J
    yield "lt", X, Y, lambda: X < Y
    yield "le", X, 0.0, lambda: X <= 0
    yield "gt", X, Y, lambda: X > Y
    yield "ge", X, False, lambda: X >= 0
    yield "logical_and", M, M2, lambda: M & M2
    yield "logical_or", M, M2, lambda: M | M2
    yield "logical_xor", M, M2, lambda: M ^ M2
    yield "bitwise_and", I, 5, lambda: I & 5
    yield "bitwise_or", 5, I, lambda: I | 5
    yield "bitwise_xor", M, M2, lambda: M != M2
    yield "bitwise_left_shift", J, 2, lambda: J << 2
    yield "bitwise_right_shift", J, 1, lambda: J >> 1
    yield "lerp", X, Y, 0.25, lambda: X.lerp(Y, 0.25)
    yield "lerp", X, Y, P, lambda: X.lerp(Y, P)
    yield "addcmul", X, Y, P, 2, lambda: X.addcmul(Y, P, value=2)
    yield "addcdiv", X, Y, P, 2, lambda: X.addcdiv(Y, P, value=2)
    yield "clamp", X, -0.5, None, lambda: X.clamp_min(-0.5)
    yield "clamp", X, Y, Y + 1, lambda: torch.minimum(torch.maximum(X, Y), Y + 1)
    yield (
        "where",
        M,
        X,
        Y,
        lambda: torch.stack([(X if m else Y).flatten()[i] for i, m in enumerate(M.flatten())]).view(
            3, 4
        ),
    )
    yield "where", M, 1, 2.5, lambda: torch.where(M, 1, 2.5)
    yield "masked_fill", X, M, 9, lambda: torch.where(M, 9.0, X)
    yield "masked_fill", X, M, torch.tensor(9.0), lambda: torch.where(M, 9.0, X)
    yield "masked_scatter", X, M, Y, lambda: X.masked_scatter(M, Y)
    yield "prelu", X, V, lambda: torch.where(X > 0, X, V * X)
    # Reductions
    yield "sum", X, None, False, None, lambda: X.sum()
    yield "sum", HALF, (1,), True, F32, lambda: HALF.float().sum(1, keepdim=True)
    yield "mean", A, (0, 2), False, None, lambda: A.mean((0, 2))
    yield "nansum", NAN, (1,), False, None, lambda: NAN.nansum(1)
    yield "prod", X, 1, True, None, lambda: X.prod(1, keepdim=True)
    yield "prod", X, None, False, None, lambda: X.prod()
    yield "all", M, (1,), False, lambda: M.all(1)
    yield "all", M, None, False, lambda: M.all()
    yield "any", A > 1, (0, 1), True, lambda: (A > 1).any(0, keepdim=True).any(1, keepdim=True)
    yield "amax", A, (0, 2), False, lambda: A.amax((0, 2))
    yield "amax", A, (), False, lambda: A.amax()
    yield "amin", A, (1,), True, lambda: A.amin(1, keepdim=True)
    yield "logsumexp", X, (1,), False, lambda: X.logsumexp(1)
    yield "max", X, lambda: X.max()
    yield "min", X, lambda: X.min()
    yield "median", X, lambda: X.median()
    yield "nanmedian", NAN, lambda: NAN.nanmedian()
    yield "argmax", X, 1, False, lambda: X.argmax(1)
    yield "argmax", X, None, False, lambda: X.argmax()
    yield "argmin", X, 0, True, lambda: X.argmin(0, keepdim=True)
    yield "max_dim", X, 1, False, lambda: X.max(1)
    yield "min_dim", X, 0, True, lambda: X.min(0, keepdim=True)
    yield "median_dim", X, 1, False, lambda: X.median(1)
    yield "nanmedian_dim", NAN, 1, False, lambda: NAN.nanmedian(1)
    yield "mode", I, 1, False, lambda: I.mode(1)
    yield "aminmax", X, 1, False, lambda: X.aminmax(dim=1)
    yield "aminmax", X, None, False, lambda: X.aminmax()
    yield "var", X, (1,), 0, False, lambda: X.var(1, correction=0)
    yield "std", X, None, 1, False, lambda: X.std()
    yield "var_mean", X, (0,), 1, True, lambda: (X.var(0, keepdim=True), X.mean(0, keepdim=True))
    yield "std_mean", X, None, 1, False, lambda: torch.std_mean(X)
    yield "vector_norm", X, 2, (1,), False, None, lambda: X.norm(dim=1)
    yield "vector_norm", X, math.inf, None, False, None, lambda: X.abs().max()
    yield "count_nonzero", I, (1,), lambda: (I != 0).sum(1)
    yield "count_nonzero", I, None, lambda: (I != 0).sum()
    yield "trace", S, lambda: S.trace()
    yield "histc", X, 5, -2.0, 2.0, lambda: X.histc(5, -2, 2)
    # Along a dimension
    yield "softmax", X, -1, lambda: torch.nn.Softmax(-1)(X)
    yield "log_softmax", X, 0, lambda: torch.nn.LogSoftmax(0)(X)
    yield "cumsum", X, 1, None, lambda: X.cumsum(1)
    yield "cumsum", M, 1, None, lambda: M.cumsum(1)
    yield "cumprod", X, 0, None, lambda: X.cumprod(0)
    yield "logcumsumexp", X, 1, lambda: X.logcumsumexp(1)
    yield "cummax", X, 1, lambda: X.cummax(1)
    yield "cummin", X, 0, lambda: X.cummin(0)
    yield "sort", X, 1, True, False, lambda: X.sort(1, descending=True)
    yield "sort", I, -1, False, True, lambda: I.sort(dim=-1, stable=True)
    yield "topk", X, 2, -1, True, True, lambda: X.topk(2)
    yield "kthvalue", X, 2, 1, True, lambda: X.kthvalue(2, 1, True)
    yield "renorm", X, 2, 0, 1.0, lambda: X.renorm(2, 0, 1.0)
    # Picking and placing by index
    yield "index", X, (ROWS, None), lambda: X[ROWS]
    yield "index", X, (None, ROWS), lambda: X[:, ROWS]
    yield "index", A, (ROWS % 2, None, ROWS), lambda: A[ROWS % 2, :, ROWS]
    yield "index_put", X, (ROWS,), V, False, lambda: _put(X, ROWS, V)
    yield "index_put", X, (M,), torch.tensor(3.0), False, lambda: torch.where(M, 3.0, X)
    yield (
        "index_put",
        X,
        (None, ROWS),
        torch.tensor(1.0),
        True,
        lambda: X.index_add(1, ROWS, torch.ones(3, 2)),
    )
    yield "index_select", X, 1, ROWS, lambda: X[:, ROWS]
    yield "index_add", X, 0, ROWS, Y[:2], 2, lambda: X.index_add(0, ROWS, Y[:2], alpha=2)
    yield "index_copy", X, 0, ROWS, Y[:2], lambda: _put(X, ROWS, Y[:2])
    yield "index_fill", X, 0, ROWS, 3, lambda: _put(X, ROWS, torch.tensor(3.0))
    yield "index_fill", X, 0, ROWS, torch.tensor(3.0), lambda: _put(X, ROWS, torch.tensor(3.0))
    yield "gather", X, 0, PLACES, lambda: X.gather(0, PLACES)
    yield "scatter", X, 0, PLACES, Y, lambda: X.scatter(0, PLACES, Y)
    yield "scatter", X, 0, PLACES, 2.0, lambda: X.scatter(0, PLACES, 2.0)
    yield "scatter_add", X, 0, PLACES, Y, lambda: X.scatter_add(0, PLACES, Y)
    yield (
        "scatter_reduce",
        X,
        0,
        PLACES,
        Y,
        "amax",
        False,
        lambda: X.scatter_reduce(0, PLACES, Y, "amax", include_self=False),
    )
    yield "take", X, PLACES, lambda: X.flatten()[PLACES]
    yield (
        "put",
        X,
        PLACES,
        Y,
        True,
        lambda: X.flatten().index_add(0, PLACES.flatten(), Y.flatten()).view(3, 4),
    )
    yield "embedding", X, PLACES, lambda: F.embedding(PLACES, X)
    yield "isin", I, J, True, lambda: ~(I[..., None] == J.flatten()).any(-1)
    yield "isin", I, 3, False, lambda: I == 3
    yield "searchsorted", SORTED, X, True, lambda: (X[..., None] >= SORTED).sum(-1)
    yield "searchsorted", SORTED, 0.5, False, lambda: torch.tensor(2)
    yield "bucketize", X, SORTED, False, lambda: (X[..., None] > SORTED).sum(-1)
    # Matrices
    yield "mm", X, S, lambda: X @ S
    yield "bmm", A, B, lambda: A @ B
    yield "mv", X, V, lambda: X @ V
    yield "dot", V, W, lambda: V @ W
    yield "addmm", X, X, S, 2, 0.5, lambda: X.addmm(X, S, beta=2, alpha=0.5)
    yield "addmv", X[:, 0], X, V, 1, 1, lambda: X[:, 0].addmv(X, V)
    yield "baddbmm", C, A, B, 1, 1, lambda: C.baddbmm(A, B)
    yield "addr", S, V, W, 1, 1, lambda: S.addr(V, W)
    yield "cdist", X, Y, 2.0, lambda: torch.cdist(X, Y)
    yield "cdist", X, Y, 1.0, lambda: (X[:, None] - Y[None]).abs().sum(-1)
    yield "linalg_cross", A[..., :3], A[..., 2:], -1, lambda: A[..., :3].cross(A[..., 2:], dim=-1)
    yield "linalg_inv", S, lambda: S.inverse()
    yield "linalg_det", S, lambda: S.det()
    yield "linalg_pinv", X, None, None, False, lambda: torch.linalg.pinv(X)
    yield (
        "linalg_pinv",
        SPD,
        0.1,
        0.2,
        True,
        lambda: torch.linalg.pinv(SPD, atol=0.1, rtol=0.2, hermitian=True),
    )
    yield "linalg_solve", S, S.T, True, lambda: torch.linalg.solve(S, S.T)
    yield (
        "linalg_solve_triangular",
        S.triu(),
        S,
        True,
        True,
        False,
        lambda: torch.linalg.solve_triangular(S.triu(), S, upper=True),
    )
    yield "linalg_cholesky", SPD, False, lambda: torch.linalg.cholesky(SPD)
    yield "linalg_slogdet", S, lambda: S.slogdet()
    yield "linalg_qr", X, "reduced", lambda: torch.linalg.qr(X)
    yield "linalg_qr", X, "r", lambda: torch.linalg.qr(X, "r")
    yield "linalg_eigh", SPD, "L", lambda: torch.linalg.eigh(SPD)
    yield "linalg_eigvalsh", SPD, "U", lambda: torch.linalg.eigvalsh(SPD, "U")
    yield "linalg_svd", X, False, lambda: torch.linalg.svd(X, full_matrices=False)
    yield "linalg_svdvals", X, lambda: torch.linalg.svdvals(X)
    # Layers
    yield (
        "sdpa",
        Q,
        K,
        U,
        None,
        True,
        None,
        False,
        lambda: F.scaled_dot_product_attention(Q, K, U, is_causal=True),
    )
    yield (
        "sdpa",
        Q,
        K2,
        U2,
        torch.ones(5, 5).tril() > 0,
        False,
        0.3,
        True,
        lambda: F.scaled_dot_product_attention(
            Q, K2, U2, torch.ones(5, 5).tril() > 0, scale=0.3, enable_gqa=True
        ),
    )
    yield "layer_norm", X, (4,), V, W, 1e-5, lambda: F.layer_norm(X, (4,), V, W)
    yield "layer_norm", HALF, (4,), None, None, 1e-5, lambda: F.layer_norm(HALF, (4,))
    yield "rms_norm", X, (4,), V, None, lambda: torch.nn.functional.rms_norm(X, (4,), V)
    yield "rms_norm", X, (4,), V, 1e-6, lambda: F.rms_norm(X, (4,), V, 1e-6)
    yield "group_norm", IMAGE, 2, V, W, 1e-5, lambda: F.group_norm(IMAGE, 2, V, W)
    yield "batch_norm", X, V, W, V, W.abs(), 1e-5, lambda: F.batch_norm(X, V, W.abs(), V, W)
    yield (
        "convolution",
        IMAGE,
        FILTER,
        None,
        (2,),
        (1,),
        (1,),
        False,
        (),
        2,
        lambda: F.conv1d(IMAGE, FILTER, None, 2, 1, 1, 2),
    )
    yield (
        "convolution",
        IMAGE,
        FILTER[:4],
        None,
        (2,),
        (0,),
        (1,),
        True,
        (1,),
        1,
        lambda: F.conv_transpose1d(IMAGE, FILTER[:4], None, 2, 0, 1),
    )
    # Losses
    yield "mse_loss", X, Y, "mean", lambda: torch.nn.MSELoss()(X, Y)
    yield (
        "soft_margin_loss",
        X,
        Y.sign(),
        "sum",
        lambda: F.soft_margin_loss(X, Y.sign(), reduction="sum"),
    )
    yield "huber_loss", X, Y, "none", 0.5, lambda: F.huber_loss(X, Y, reduction="none", delta=0.5)
    yield "smooth_l1_loss", X, Y, "mean", 0.5, lambda: F.smooth_l1_loss(X, Y, beta=0.5)
    yield (
        "nll_loss",
        X.log_softmax(1),
        LABELS,
        None,
        "mean",
        -100,
        lambda: F.cross_entropy(X, LABELS),
    )
    yield (
        "nll_loss",
        X,
        LABELS,
        P[0],
        "none",
        1,
        lambda: F.nll_loss(X, LABELS, P[0], ignore_index=1, reduction="none"),
    )
    yield (
        "binary_cross_entropy",
        P,
        M.float(),
        None,
        "mean",
        lambda: torch.nn.BCELoss()(P, M.float()),
    )
    yield (
        "binary_cross_entropy_with_logits",
        X,
        M.float(),
        None,
        V.abs(),
        "sum",
        lambda: torch.nn.BCEWithLogitsLoss(pos_weight=V.abs(), reduction="sum")(X, M.float()),
    )
    # Fourier transforms
    yield "fft_r2c", X, (1,), "none", True, lambda: torch.fft.rfft(X)
    yield "fft_r2c", X, (0, 1), "none", False, lambda: torch.fft.fft2(X)
    yield "fft_c2c", Z, (1,), "full", False, lambda: torch.fft.ifft(Z)
    yield "fft_c2c", Z, (0,), "root", True, lambda: torch.fft.fft(Z, dim=0, norm="ortho")
    yield "fft_c2r", Z, (-1,), "full", 6, lambda: torch.fft.irfft(Z, 6)


_UNARY_REAL = (
    "abs neg reciprocal relu frac sgn positive ceil floor trunc sign asinh atan cos cosh erf erfc "
    "exp exp2 expm1 hardsigmoid hardswish i0 log_sigmoid mish selu sigmoid silu sin sinc sinh tan "
    "tanh isfinite signbit"
)
_UNARY_UNIT = "acos angle asin atanh digamma erfinv lgamma log log10 log1p log2 rsqrt sqrt"
_UNARY_NAN = "isnan isinf isfinite isposinf isneginf signbit"


def _unary(name: str, a: Tensor) -> Tensor:
    modules = {
        "hardsigmoid": torch.nn.Hardsigmoid(),
        "hardswish": torch.nn.Hardswish(),
        "log_sigmoid": torch.nn.LogSigmoid(),
        "mish": torch.nn.Mish(),
        "selu": torch.nn.SELU(),
        "silu": torch.nn.SiLU(),
    }
    result: Tensor = modules[name](a) if name in modules else getattr(a, name)()
    return result


def _put(a: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    a = a.clone()
    a[rows] = values
    return a


EXAMPLES = list(examples())
IDS = [f"{number}-{example.name}" for number, example in enumerate(EXAMPLES)]


def as_graph_arg(arg: Any) -> Arg:
    if isinstance(arg, Tensor):
        return Ref(NodeId(0))
    if isinstance(arg, tuple):
        return tuple(as_graph_arg(item) for item in arg)
    return arg  # type: ignore[no-any-return]


def as_spec_arg(arg: Any) -> Any:
    if isinstance(arg, Tensor):
        return spec_of(arg)
    if isinstance(arg, tuple):
        return tuple(as_spec_arg(item) for item in arg)
    return arg


def parts(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def tensors_in(arg: Any) -> list[Tensor]:
    if isinstance(arg, Tensor):
        return [arg]
    return [t for item in arg for t in tensors_in(item)] if isinstance(arg, tuple) else []


def test_the_two_tables_have_the_same_names_and_every_op_an_example() -> None:
    assert set(OPS) == set(KERNELS) == {example.name for example in EXAMPLES}


@pytest.mark.parametrize("example", EXAMPLES, ids=IDS)
def test_equals_torch(example: Example) -> None:
    before = [t.clone() for t in tensors_in(example.args)]
    result = parts(run_op(example.name, example.args))
    wanted = parts(example.torch_call())
    assert len(result) == len(wanted)
    listed = [list(arg) if isinstance(arg, tuple) else arg for arg in example.args]
    again = parts(run_op(example.name, listed))  # the interpreter hands nested arguments as lists
    for got, want, same in zip(result, wanted, again, strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, same, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6, equal_nan=True)
    for tensor, was in zip(tensors_in(example.args), before, strict=True):
        assert torch.equal(tensor.nan_to_num(), was.nan_to_num()), "an argument was changed"


@pytest.mark.parametrize("example", EXAMPLES, ids=IDS)
def test_the_predicted_shape_is_the_real_one(example: Example) -> None:
    result = run_op(example.name, example.args)
    specs = infer(example.name, tuple(map(as_spec_arg, example.args)))
    if isinstance(result, Tensor):
        assert specs == spec_of(result)
        assert OPS[example.name].outputs == 1
    else:
        assert specs == tuple(map(spec_of, result))
        assert OPS[example.name].outputs == len(result)


@pytest.mark.parametrize("example", EXAMPLES, ids=IDS)
def test_the_arguments_fit_the_signature(example: Example) -> None:
    spec = OPS[example.name]
    if example.name != "pick":
        check_args(spec, tuple(map(as_graph_arg, example.args)))


@pytest.mark.parametrize("example", EXAMPLES, ids=IDS)
def test_shares_memory_only_where_the_table_says_so(example: Example) -> None:
    inputs = {t.untyped_storage().data_ptr() for t in tensors_in(example.args)}
    for part in parts(run_op(example.name, example.args)):
        if part.untyped_storage().data_ptr() in inputs and part.numel():
            assert OPS[example.name].cost in ("view", "cast")


# Ops that need care -----------------------------------------------------------------------------


def test_the_least_integer_divided_by_minus_one_wraps_as_c_does_not() -> None:
    for dtype in (torch.int64, torch.int32, torch.int16, torch.int8):
        least = torch.iinfo(dtype).min
        a = torch.tensor([least, 7, -7, 7], dtype=dtype)
        b = torch.tensor([-1, 2, 2, -1], dtype=dtype)
        wanted = torch.tensor([least, 3, -3, -7], dtype=dtype)
        assert torch.equal(run_op("div", (a, b, "trunc")), wanted)
        assert torch.equal(run_op("div", (a, -1, "trunc")), torch.neg(a))
        run_op("lcm", (a, b))


def test_rounding_quotients_keeps_torchs_dtypes() -> None:
    for b in (torch.tensor(2), torch.tensor(2, dtype=torch.int8), 2, 2.5):
        for dtype in (torch.int16, torch.int64, torch.uint8, torch.float32):
            a = torch.tensor([5, 9], dtype=dtype)
            got = run_op("div", (a, b, "trunc"))
            wanted = torch.div(a, b, rounding_mode="trunc")
            assert got.dtype == wanted.dtype
            assert torch.equal(got, wanted)


@pytest.mark.parametrize("name", ["rand_like", "randn_like"])
def test_random_numbers_come_from_the_seed_and_from_nothing_else(name: str) -> None:
    first = run_op(name, (X, None, 11))
    torch.manual_seed(123)
    state = torch.random.get_rng_state()
    assert torch.equal(run_op(name, (X, None, 11)), first)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not torch.equal(run_op(name, (X, None, 12)), first)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("index", (X, (torch.tensor([3]),))),
        ("index_select", (X, 0, torch.tensor([-1]))),
        ("gather", (X, 0, torch.full((3, 4), 3))),
        ("scatter", (X, 0, torch.full((3, 4), -1), Y)),
        ("embedding", (X, torch.tensor([3]))),
        ("take", (X, torch.tensor([12]))),
        ("put", (X, torch.tensor([12]), V[:1], False)),
        ("index_add", (X, 0, torch.tensor([3]), Y[:1], 1)),
        ("index_copy", (X, 0, torch.tensor([3]), Y[:1])),
        ("index_fill", (X, 0, torch.tensor([3]), 0)),
        ("index_put", (X, (torch.tensor([3]),), V, True)),
        ("scatter_add", (X, 0, torch.full((3, 4), 3), Y)),
        ("scatter_reduce", (X, 0, torch.full((3, 4), 3), Y, "sum", True)),
        ("one_hot", (torch.tensor([4]), 4)),
        ("nll_loss", (X, torch.tensor([0, 1, 4]), None, "mean", -100)),
        ("masked_scatter", (X, torch.ones(3, 4) > 0, V)),
        ("multinomial", (-P, 1, False, 0)),
        ("bernoulli", (P + 1, None, 0)),
        ("binary_cross_entropy", (P + 1, P, None, "mean")),
    ],
)
def test_bad_indices_and_bad_numbers_are_refused(name: str, args: tuple[Any, ...]) -> None:
    infer(name, tuple(map(as_spec_arg, args)))  # only the run can know
    with pytest.raises(ShapeMismatch):
        run_op(name, args)


# Shapes -----------------------------------------------------------------------------------------


def spec(*shape: int, dtype: DType = F32) -> TensorSpec:
    return TensorSpec(dtype, shape)


@pytest.mark.parametrize(
    ("name", "args", "text"),
    [
        ("mm", (spec(2, 3), spec(2, 3)), "mm(float32[2, 3], float32[2, 3]) is refused: "),
        ("index", (spec(3), (spec(3, dtype=BOOL),)), "not known beforehand"),
        ("reshape", (spec(6), (4,)), "invalid for input of size 6"),
        ("reshape", (spec(1), (1,) * 17), "at most 16"),
        ("to", (spec(3), "float32"), "is refused"),
        ("fft_r2c", (spec(4, dtype=DType.FLOAT64), (0,), "none", True), "float32 is wanted"),
        ("pick", ((spec(1), spec(2)), 2), "no group"),
        ("pick", (spec(1), 0), "no group"),
    ],
)
def test_what_torch_refuses_is_one_sentence(name: str, args: Any, text: str) -> None:
    with pytest.raises(ShapeMismatch) as caught:
        infer(name, args)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(UnknownOp, match="did you mean softmax"):
        infer("softmaxx", (spec(3), 0))


def test_kept_answers_tell_1_from_1_0_from_true() -> None:
    ints = spec(3, dtype=I64)
    assert infer("mul", (ints, 1)) == ints
    assert infer("mul", (ints, 1.0)) == spec(3)
    assert infer("mul", (ints, True)) == ints
    bools = spec(3, dtype=BOOL)
    assert infer("mul", (bools, True)) == bools
    assert infer("mul", (bools, 1)) == ints
    # A size is no scalar, and a spec no tuple.
    assert infer("sum", (spec(2, 3), (0,), False, None)) == spec(3)
    with pytest.raises(ShapeMismatch):
        infer("sum", (spec(2, 3), (False,), False, None))


def test_the_kept_answers_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_INFERRED_MAX", 10)
    monkeypatch.setattr(kernels, "_inferred", {})
    for size in range(50):
        assert infer("abs", (spec(size),)) == spec(size)
    assert len(kernels._inferred) <= 10


def test_many_threads_may_infer_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_INFERRED_MAX", 20)
    monkeypatch.setattr(kernels, "_inferred", {})
    wrong: list[object] = []

    def work(offset: int) -> None:
        for size in range(200):
            size = (size * 7 + offset) % 40
            if infer("neg", (spec(size),)) != spec(size):
                wrong.append(size)

    threads = [threading.Thread(target=work, args=(offset,)) for offset in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert not wrong


def test_joins_of_few_shapes_are_inferred_as_torch_joins_them() -> None:
    rng = random.Random(0)
    shapes = [(2, 3), (2, 3), (2, 3), (0,), (2, 0), (5,), (2, 4), (), (2, 3, 1), (0, 3)]
    dtypes = [F32, F32, F32, I64, DType.BOOL, DType.BFLOAT16]
    joined = 0
    for _ in range(3_000):
        few = [spec(*rng.choice(shapes), dtype=rng.choice(dtypes)) for _ in range(2)]
        args = tuple(rng.choice(few) for _ in range(rng.randint(1, 5)))
        name, dim = rng.choice(["cat", "stack"]), rng.randint(-3, 3)
        tensors = tuple(torch.zeros(one.shape, dtype=to_torch_dtype(one.dtype)) for one in args)
        try:
            wanted = spec_of(run_op(name, (tensors, dim)))
        except ShapeMismatch:
            with pytest.raises(ShapeMismatch):
                infer(name, (args, dim))
        else:
            assert infer(name, (args, dim)) == wanted, (name, args, dim)
            joined += 1
    assert joined > 500


def test_terabytes_are_inferred_without_allocating() -> None:
    huge = spec(1, 2**40)
    assert infer("repeat", (huge, (64, 1))) == spec(64, 2**40)
    assert infer("full", ((2**40,), 0, F32)) == spec(2**40)
    assert infer("clone", (spec(2**40),)) == spec(2**40)
    assert infer("rand_like", (spec(2**40), None, 0)) == spec(2**40)


# Bytes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", list(DType), ids=lambda dtype: dtype.value)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3), (2, 0, 4)])
def test_bytes_and_back(dtype: DType, shape: tuple[int, ...]) -> None:
    torch_dtype = to_torch_dtype(dtype)
    assert from_torch_dtype(torch_dtype) is dtype
    tensor = (torch.randn(shape) * 3).to(torch_dtype)
    data = tensor_to_bytes(tensor)
    assert data.nbytes == spec_of(tensor).nbytes
    back = tensor_from_bytes(spec_of(tensor), bytes(data))
    assert back.dtype == torch_dtype
    assert torch.equal(back, tensor)


def test_bytes_are_copied_and_little_endian() -> None:
    data = bytearray(b"\x01\x00\x00\x00\xff\xff\xff\xff")
    tensor = tensor_from_bytes(TensorSpec(DType.INT32, (2,)), data)
    data[:] = bytes(8)
    assert tensor.tolist() == [1, -1]
    assert tensor.untyped_storage().nbytes() == 8


def test_odd_tensors_have_plain_bytes() -> None:
    for tensor in (X.T, X[:, 1:3], V.expand(3, 4), Z.conj(), Z.imag, torch._neg_view(X)):
        back = tensor_from_bytes(spec_of(tensor), bytes(tensor_to_bytes(tensor)))
        assert torch.equal(back, tensor)


def test_nan_and_infinities_survive() -> None:
    back = tensor_from_bytes(spec_of(NAN), bytes(tensor_to_bytes(NAN)))
    assert torch.equal(back.view(torch.int32), NAN.view(torch.int32))


@pytest.mark.parametrize("length", [0, 7, 9, 16])
def test_bytes_of_another_length_are_refused(length: int) -> None:
    with pytest.raises(BadTensor, match="8 are wanted"):
        tensor_from_bytes(TensorSpec(DType.INT32, (2,)), bytes(length))


def test_a_bool_is_0_or_1() -> None:
    with pytest.raises(BadTensor, match="0 and 1"):
        tensor_from_bytes(TensorSpec(DType.BOOL, (2,)), b"\x01\x02")


@pytest.mark.parametrize("dtype", [torch.complex128, torch.uint16, torch.float8_e4m3fn])
def test_formats_outside_the_list_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(BadTensor, match="cannot stand in a graph"):
        from_torch_dtype(dtype)
    with pytest.raises(BadTensor, match="cannot stand in a graph"):
        tensor_to_bytes(torch.zeros(2, dtype=dtype))
