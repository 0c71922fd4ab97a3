"""How far a host's estimate of seconds is from what every op takes, in every number format.

A ratio of 10 means that an op takes ten times what its bill says: a client may then have ten times
the time of a host that it was allowed. Under 1 the host refuses work that it could do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import torch
from harness import report
from torch import Tensor

from glasshive.graph.budget import cost_of
from glasshive.graph.dtypes import DType
from glasshive.graph.errors import GraphError
from glasshive.graph.kernels import infer, run_op, spec_of, to_torch_dtype
from glasshive.graph.ops import OPS, REQUIRED, OpSpec
from glasshive.peer.pace import measure_graph_pace

DEVICE: Final = "cuda" if torch.cuda.is_available() else "cpu"
SIDE: Final = 512
# Where the work grows faster than the numbers.
SIDES: Final = {"cubic": 192, "sort": 384, "fourier": 384}
WORST_SHOWN: Final = 25

Args = tuple[Any, ...]


def numbers(dtype: torch.dtype, *shape: int) -> Tensor:
    """Numbers from 1 to 100, or from 0 to 1, that no op of the format refuses."""
    if dtype is torch.bool:
        return torch.rand(shape, device=DEVICE) > 0.5
    if dtype.is_floating_point or dtype.is_complex:
        return (torch.rand(shape, device=DEVICE) * 0.98 + 0.01).to(dtype)
    return torch.randint(1, 100, shape, device=DEVICE).to(dtype)


def places(below: int, *shape: int) -> Tensor:
    """Indices in no order."""
    return torch.randint(0, below, shape, device=DEVICE)


def special(name: str, dtype: torch.dtype, n: int) -> Iterator[Args]:
    """Arguments of the ops whose arguments the signature does not tell."""
    a, b = numbers(dtype, n, n), numbers(dtype, n, n)
    row, rows = numbers(dtype, n), places(n, n)
    images = numbers(dtype, 8, 16, n)
    heads = numbers(dtype, 2, 4, n, 64)
    whole: dict[str, Callable[[], Args]] = {
        "pick": lambda: ((a, b), 1),
        "view_as_complex": lambda: (numbers(dtype, n, n, 2),),
        "reshape": lambda: (a.T, (n * n,)),
        "expand": lambda: (row, (n, n)),
        "permute": lambda: (a, (1, 0)),
        "slice": lambda: (a, 0, 0, n, 2),
        "select": lambda: (a, 0, 1),
        "diagonal": lambda: (a, 0, 0, 1),
        "unfold": lambda: (a, 0, 16, 1),
        "select_scatter": lambda: (a, row, 0, 1),
        "slice_scatter": lambda: (a, b, 0, 0, n, 1),
        "diagonal_scatter": lambda: (a, row, 0, 0, 1),
        "cat": lambda: ((a, b), 1),
        "stack": lambda: ((a, b), 1),
        "repeat": lambda: (row, (n, 1)),
        "flip": lambda: (a, (0, 1)),
        "roll": lambda: (a, (1,) * 32, (0, 1) * 16),
        "diag_embed": lambda: (row, 0, -2, -1),
        "constant_pad_nd": lambda: (a, (1, 1, 1, 1), 0),
        "full": lambda: ((n, n), 1, from_torch(dtype)),
        "arange": lambda: (0, n * n, 1, from_torch(dtype)),
        "linspace": lambda: (0.0, 1.0, n * n, from_torch(dtype)),
        "eye": lambda: (n, n, from_torch(dtype)),
        "one_hot": lambda: (rows.to(dtype), n),
        "randint_like": lambda: (a, 0, 100, None, 1),
        "multinomial": lambda: (a, n, False, 1),
        "bernoulli": lambda: (a, None, 1),
        "where": lambda: (a > 0.5, a, b),
        "masked_fill": lambda: (a, a > 0.5, 1),
        "masked_scatter": lambda: (a, a > 0.5, b),
        "prelu": lambda: (a, row),
        "histc": lambda: (a, 100, 0, 0),
        "topk": lambda: (a, n // 2, -1, True, True),
        "kthvalue": lambda: (a, n // 2, -1, False),
        "renorm": lambda: (a, 2, 0, 1.0),
        "index": lambda: (a, (places(n, n, n), places(n, n, n))),
        "index_put": lambda: (a, (places(n, n, n), places(n, n, n)), b, True),
        "index_select": lambda: (a, 1, rows),
        "index_add": lambda: (a, 1, rows, b, 1),
        "index_copy": lambda: (a, 1, rows, b),
        "index_fill": lambda: (a, 1, rows, 1),
        "gather": lambda: (a, 0, places(n, n, n)),
        "scatter": lambda: (a, 0, places(n, n, n), b),
        "scatter_add": lambda: (a, 0, places(n, n, n), b),
        "take": lambda: (a, places(n * n, n, n)),
        "put": lambda: (a, places(n * n, n, n), b, True),
        "embedding": lambda: (a, places(n, n)),
        "isin": lambda: (row, row, False),
        "searchsorted": lambda: (row.sort().values, a, False),
        "bucketize": lambda: (a, row.sort().values, False),
        "gcd": lambda: fibonacci(dtype, n),
        "lcm": lambda: fibonacci(dtype, n),
        "mv": lambda: (a, row),
        "dot": lambda: (a.flatten(), b.flatten()),
        "bmm": lambda: (a[None], b[None]),
        "baddbmm": lambda: (a[None], a[None], b[None], 1, 1),
        "addmv": lambda: (row, a, row, 1, 1),
        "addr": lambda: (a, row, row, 1, 1),
        "linalg_cross": lambda: (numbers(dtype, n, n, 3), numbers(dtype, n, n, 3), -1),
        "linalg_pinv": lambda: (a, None, None, False),
        "linalg_solve": lambda: (a, b, True),
        "linalg_solve_triangular": lambda: (a + n * eye(dtype, n), b, True, True, False),
        "linalg_cholesky": lambda: (a + a.mT.conj() + 2 * n * eye(dtype, n), False),
        "sdpa": lambda: (heads, heads, heads, None, False, None, False),
        "layer_norm": lambda: (a, (n,), row, row, 1e-5),
        "rms_norm": lambda: (a, (n,), row, None),
        "group_norm": lambda: (images, 4, row[:16], row[:16], 1e-5),
        "batch_norm": lambda: (images, row[:16], row[:16], row[:16], row[:16], 1e-5),
        "convolution": lambda: (
            *(images, numbers(dtype, 16, 16, 5), None, (1,), (2,), (1,)),
            *(False, (0,), 1),
        ),
        "nll_loss": lambda: (a, places(n, n), row, "mean", -100),
        "fft_r2c": lambda: (a, (0, 1), "none", True),
        "fft_c2c": lambda: (a, (0, 1), "none", True),
        "fft_c2r": lambda: (a, (0, 1), "none", 2 * (n - 1)),
    }
    if name == "cdist":
        yield from ((a, b, p) for p in (0.0, 1.0, 2.0, 3.5))
    elif name == "scatter_reduce":
        yield from (
            (a, 0, places(n, n, n), b, how, True) for how in ("sum", "prod", "mean", "amax")
        )
    elif name == "vector_norm":
        yield from ((a, p, (1,), False, None) for p in (2, 3.5))
    elif name in whole:
        yield whole[name]()


def from_torch(dtype: torch.dtype) -> DType:
    """Our name for it."""
    return spec_of(torch.empty(0, dtype=dtype)).dtype


def fibonacci(dtype: torch.dtype, n: int) -> Args:
    """Two numbers that take Euclid the longest, in matrices."""
    a, b = 1, 1
    while a + b <= torch.iinfo(dtype).max:
        a, b = a + b, a
    return torch.full((n, n), a, device=DEVICE).to(dtype), torch.full((n, n), b).to(DEVICE, dtype)


def eye(dtype: torch.dtype, n: int) -> Tensor:
    """The identity."""
    return torch.eye(n, device=DEVICE).to(dtype)


def plain(op: OpSpec, dtype: torch.dtype, n: int) -> Args:
    """Arguments by kind alone: values are matrices, axes are the last."""
    args: list[Any] = []
    for param in op.params:
        if param.kind in ("value", "operand"):
            args.append(numbers(dtype, n, n))
        elif param.name == "dim":
            args.append(1)
        elif param.name == "dims":
            args.append((1,))
        elif param.optional:
            args.append(None)
        elif param.kind == "seed":
            args.append(1)
        elif param.name == "p":
            args.append(0.5)
        elif param.kind == "dtype":
            args.append(from_torch(dtype))
        else:
            args.append(1 if param.default is REQUIRED else param.default)
    return tuple(args)


def cases() -> Iterator[tuple[OpSpec, DType, Args]]:
    """Every op with every number format, some with several arguments."""
    for name, op in OPS.items():
        for dtype in DType:
            n = SIDES.get(op.cost, SIDE)
            try:
                given = list(special(name, to_torch_dtype(dtype), n))
                given = given or [plain(op, to_torch_dtype(dtype), n)]
            except (RuntimeError, TypeError):  # such arguments cannot be made of this format
                continue
            for args in given:
                yield op, dtype, args


def as_specs(arg: Any) -> Any:
    """Specs in place of tensors."""
    if isinstance(arg, tuple):
        return tuple(map(as_specs, arg))
    return spec_of(arg) if isinstance(arg, Tensor) else arg


def seconds_of(op: OpSpec, args: Args) -> float:
    """The shortest of three runs after a first."""
    took = []
    for _ in range(4):
        began = time.perf_counter()
        run_op(op.name, args, DEVICE)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        took.append(time.perf_counter() - began)
        if took[-1] > 0.5:
            break
    return min(took[1:] or took)


def main() -> None:
    """Print the figures."""
    began = time.perf_counter()
    pace = measure_graph_pace(torch.device(DEVICE))
    measuring_seconds = time.perf_counter() - began
    found: list[tuple[float, float, str, DType]] = []
    refused: dict[str, int] = {}
    ran: dict[str, int] = {}
    torch.manual_seed(0)
    for op, dtype, args in cases():
        if op.cost == "view":
            continue
        try:
            specs = as_specs(args)
            cost = cost_of(op.name, specs, infer(op.name, specs))
            estimate = pace.seconds(cost)
            seconds = seconds_of(op, args)
        except GraphError:
            refused[op.name] = refused.get(op.name, 0) + 1
            continue
        ran[op.name] = ran.get(op.name, 0) + 1
        found.append((seconds / estimate, seconds, op.name, dtype))
    never = [name for name in OPS if name not in ran and OPS[name].cost != "view"]
    if never:
        raise SystemExit(f"no arguments were right for {', '.join(never)}")
    found.sort(key=lambda one: one[0], reverse=True)
    ratios = [ratio for ratio, *_ in found]
    rows: list[list[Any]] = [
        [name, OPS[name].cost, dtype.value, 1e3 * seconds, ratio]
        for ratio, seconds, name, dtype in found[:WORST_SHOWN]
    ]
    report(
        "pace",
        ["op", "rule", "format", "ms", "seconds / estimate"],
        rows,
        figures(ratios, measuring_seconds),
    )


def figures(ratios: list[float], measuring_seconds: float) -> Mapping[str, Any]:
    """What the JSON line says: `ratios` are sorted, the worst first."""
    return {
        "cases": len(ratios),
        "measuring_seconds": round(measuring_seconds, 3),
        "worst": round(ratios[0], 1),
        "over_10": sum(ratio > 10 for ratio in ratios),
        "over_3": sum(ratio > 3 for ratio in ratios),
        "median": round(ratios[len(ratios) // 2], 3),
        "least": round(ratios[-1], 5),
    }


if __name__ == "__main__":
    main()
