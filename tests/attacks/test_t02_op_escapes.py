"""T2: ways out of the op table, and arguments that would take the process with them.

A graph can name only what stands in the table, with only the arguments of its signature; and no
argument of the right kind, however odd, may end the peer's process.

Seen failing, each alone: with names that `find_op` takes without their last `_`, the names of
torch; with `add_` or `empty_like` in the table, the words that no op may have; with the look at
what is left of the keywords taken out of `OpSpec.complete`, the undeclared arguments; with the
count taken out of `check_args`, one argument more (`complete` counts before, which alone changes
nothing); with `Parameter.accepts` not asked, devices as words, and with dtypes of any name, those
as dtypes; with `zeros_like` or `full` that give memory as it comes, the memory of the freed. Of
what ended torch's process: `div` and `lcm` of torch itself end this one, and so does `sdpa` with
all of its checks of shapes taken out (one alone is backed by the others); with the dims, the
double dims or the last size not looked at in `graph/kernels_matrices.py`, that transform's; with
the shapes not looked at in `_binary_cross_entropy`, its own. Not seen failing: the transforms of no
elements or of another dtype, which torch refuses by itself; with `rand_like` that gives undrawn
memory, the memory of the freed; and the fuzzer, whose 12,000 calls came upon none of `div`, `lcm`,
`sdpa`, dims and shapes so changed.
"""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import msgpack
import pytest
import torch
from soak import count
from torch import Tensor

from glasshive.graph.codec import decode_graph
from glasshive.graph.dtypes import DType
from glasshive.graph.errors import BadGraph, GraphError, ShapeMismatch, UnknownOp
from glasshive.graph.graph import NodeId, Ref
from glasshive.graph.kernels import infer, run_op, spec_of, to_torch_dtype
from glasshive.graph.ops import OPS, Parameter, find_op

BANNED = (
    "empty resize set_ storage stride as_strided data_ptr from_file save load item tolist numpy "
    "cuda cpu device pin share apply map_ backward requires_grad generator manual_seed nonzero "
    "unique bincount masked_select print eval exec compile import call"
)
READ = [0, 1, "m", "output", [], 0, 0]
FUZZED_CALLS = count(12_000, 2_000_000)


def message(name: object, *args: object) -> bytes:
    return bytes(msgpack.packb([1, [], [READ, [1, 4, name, list(args)]]]))


def torch_names() -> set[str]:
    names = set(dir(torch)) | set(dir(Tensor)) | set(dir(torch.ops.aten)) | set(dir(torch.linalg))
    names |= {str(schema.name).split("::")[-1] for schema in torch._C._jit_get_all_schemas()}
    return names | {"__class__", "__reduce__", "eval", "exec", "os.system", "torch.load", "", "\0"}


def test_every_torch_name_outside_the_table_is_refused() -> None:
    names = torch_names()
    assert len(names) > 2000
    for name in sorted(names - set(OPS)):
        with pytest.raises(UnknownOp):
            decode_graph(message(name, [0, 0]))
        with pytest.raises(UnknownOp):
            find_op(name)


def test_no_op_mutates_or_is_private_or_reaches_memory_files_or_devices() -> None:
    banned = BANNED.split()
    for name in OPS:
        assert not name.endswith("_")
        assert not name.startswith("_")
        assert not any(word == name or name.startswith(word + "_") for word in banned), name


def undeclared() -> list[tuple[str, str]]:
    """Every argument that a torch overload of an op's name has and our signature has not."""
    found: set[tuple[str, str]] = set()
    for schema in torch._C._jit_get_all_schemas():
        name = str(schema.name).split("::")[-1]
        if name in OPS:
            ours = {param.name for param in OPS[name].params}
            found |= {(name, arg.name) for arg in schema.arguments if arg.name not in ours}
    return sorted(found | {(name, "out") for name in OPS})


def test_every_undeclared_torch_argument_is_refused() -> None:
    pairs = undeclared()
    assert len({name for name, argument in pairs if argument == "out"}) == len(OPS)
    for name, argument in pairs:
        given = [Ref(NodeId(0))] * len(OPS[name].params)
        with pytest.raises(UnknownOp, match=f" got {argument}, which it has not$"):
            OPS[name].complete(given, {argument: Ref(NodeId(0))})


@pytest.mark.parametrize("name", sorted(OPS))
def test_one_argument_more_is_refused(name: str) -> None:
    wanted = len(OPS[name].params)
    args: list[object] = [None] * (wanted + 1)
    with pytest.raises(UnknownOp, match=f" got {wanted + 1} arguments"):
        decode_graph(message(name, *args))
    with pytest.raises(UnknownOp, match=f" got {wanted + 1} arguments"):
        OPS[name].complete([Ref(NodeId(0))] * (wanted + 1))


@pytest.mark.parametrize(
    "arg",
    [
        "cuda:0",
        "out",
        {"out": [0, 0]},
        [2, "object"],
        [2, "cuda"],
        [2, "complex128"],
        [4, "f"],
        b"x",
    ],
    ids=repr,
)
def test_devices_objects_and_maps_are_no_arguments(arg: object) -> None:
    for name in ("zeros_like", "to", "full_like"):
        with pytest.raises((UnknownOp, BadGraph)):
            decode_graph(message(name, [0, 0], arg))


def test_no_kernel_gives_the_memory_of_the_freed() -> None:
    """Memory that was filled with NaN and let go never comes back in a result."""
    for name, args in {
        "zeros_like": (torch.ones(4096), None),
        "full": ((4096,), 1.0, spec_of(torch.ones(1)).dtype),
        "rand_like": (torch.ones(4096), None, 1),
        "dropout": (torch.ones(4096), 0.5, 1),
        "constant_pad_nd": (torch.ones(4), (0, 4092), 0.0),
        "linalg_qr": (torch.rand(64, 64), "r"),
    }.items():
        for _ in range(20):
            garbage = [torch.full((4096,), float("nan")) for _ in range(8)]
            del garbage
            result = run_op(name, args)
            for part in result if isinstance(result, tuple) else (result,):
                assert not part.isnan().any(), name


# Each of these ended the process of plain torch 2.13 on a CPU, by a signal.
LEAST = torch.tensor([torch.iinfo(torch.int64).min] * 9)
MINUS = torch.full((9,), -1)
SPECTRUM = torch.zeros(3, 4, dtype=torch.complex64)


@pytest.mark.parametrize(
    ("name", "args", "is_refused"),
    [
        ("div", (LEAST, MINUS, "trunc"), False),
        ("div", (LEAST, -1, "trunc"), False),
        ("div", (LEAST.int() * 0 - 2**31, -1, "trunc"), False),
        ("lcm", (LEAST, LEAST), False),
        ("lcm", (LEAST, MINUS), False),
        ("lcm", (LEAST, 5 * -MINUS), False),
        ("gcd", (LEAST, MINUS), False),
        ("remainder", (LEAST, -1), False),
        ("fmod", (LEAST, -1), False),
        ("fft_c2r", (SPECTRUM, (-2,), "full", 6), True),
        ("fft_c2r", (SPECTRUM, (7,), "full", 6), True),
        ("fft_c2r", (SPECTRUM, (), "full", 6), True),
        ("fft_c2c", (SPECTRUM, (0, 0), "none", True), True),
        ("fft_r2c", (SPECTRUM, (0,), "none", True), True),
        (
            "sdpa",
            (torch.zeros(2, 4, 5, 8), torch.zeros(2, 0, 5, 8), torch.zeros(2, 0, 5, 8), None,
             False, None, True),
            True,
        ),
        (
            "sdpa",
            (torch.zeros(2, 4, 5, 8), torch.zeros(4, 0, 4, 1), torch.zeros(2, 4, 5, 8), None, True,
             None, True),
            True,
        ),
        ("binary_cross_entropy", (torch.rand(()), torch.rand(3, 4), None, "none"), True),
    ],
)  # fmt: skip
def test_what_ended_torchs_process_is_computed_or_refused(
    name: str, args: tuple[object, ...], is_refused: bool
) -> None:
    specs = tuple(spec_of(arg) if isinstance(arg, Tensor) else arg for arg in args)
    if is_refused:
        with pytest.raises(ShapeMismatch):
            infer(name, specs)  # type: ignore[arg-type]
        with pytest.raises(ShapeMismatch):
            run_op(name, args)
    else:
        assert spec_of(run_op(name, args)) == infer(name, specs)  # type: ignore[arg-type]


def test_no_argument_of_the_right_kind_ends_the_process() -> None:
    """Odd sizes, odd numbers and odd tensors for every op, in a process of their own."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-X", "faulthandler", __file__, str(FUZZED_CALLS)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=100 + FUZZED_CALLS / 1000,
    )
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-2000:]
    assert done.stdout.splitlines()[-1].startswith("ran ")


# The fuzzer's process ----------------------------------------------------------------------------

INTS = [
    -(2**63), -(2**31), -1000, -3, -2, -1, -1, 0, 0, 1, 1, 2, 2, 3, 4, 64, 1000, 2**31, 2**63 - 1
]  # fmt: skip
FLOATS = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, -1.0, 1e308, 5e-324, 0.5]


def odd_tensor(rng: random.Random) -> Tensor:
    dtype = to_torch_dtype(rng.choice([DType.FLOAT32, DType.INT64, *DType]))
    shape = [rng.choice([0, 1, 2, 3, 4, 4]) for _ in range(rng.choice([0, 1, 2, 2, 2, 3, 4]))]
    how = rng.random()
    if how < 0.35:
        made = torch.randint(-5, 6, shape).to(dtype)
    elif how < 0.7:
        made = torch.rand(shape).to(dtype)
    elif dtype.is_floating_point or dtype.is_complex or dtype == torch.bool:
        made = torch.full(shape, rng.choice(FLOATS), dtype=torch.float64).to(dtype)
    else:
        limits = torch.iinfo(dtype)
        odd = [limits.min, limits.min, limits.max, -1, -1] if limits.min else [0, limits.max]
        made = torch.full(shape, rng.choice(odd), dtype=dtype)
    return made.transpose(0, -1) if made.dim() > 1 and rng.random() < 0.3 else made


def odd_argument(param: Parameter, rng: random.Random) -> object:
    if param.optional and rng.random() < 0.5:
        return None
    kinds: dict[str, Callable[[], object]] = {
        "value": lambda: odd_tensor(rng),
        "operand": lambda: rng.choice([odd_tensor(rng), rng.choice(INTS), rng.choice(FLOATS)]),
        "values": lambda: tuple(odd_tensor(rng) for _ in range(rng.randint(1, 3))),
        "optional_values": lambda: (
            odd_tensor(rng),
            *(rng.choice([None, odd_tensor(rng)]) for _ in range(rng.randint(0, 3))),
        ),
        "scalar": lambda: rng.choice([*INTS, *FLOATS, True, False]),
        "int": lambda: rng.choice(INTS),
        "ints": lambda: tuple(rng.choice(INTS) for _ in range(rng.randint(0, 4))),
        "float": lambda: rng.choice(FLOATS),
        "bool": lambda: rng.random() < 0.5,
        "dtype": lambda: rng.choice(list(DType)),
        "choice": lambda: rng.choice(param.choices),
        "seed": lambda: rng.choice([0, 2**63 - 1]),
    }
    return kinds[param.kind]()


def specs_in(arg: object) -> Any:
    if isinstance(arg, tuple):
        return tuple(map(specs_in, arg))
    return spec_of(arg) if isinstance(arg, Tensor) else arg


def fuzz(calls: int) -> None:
    """Call ops with odd arguments. Says first which, so that the last line names the killer."""
    rng = random.Random(calls)
    torch.manual_seed(calls)
    names = sorted(set(OPS) - {"pick"})
    ran = 0
    for _ in range(calls):
        name = rng.choice(names)
        args = tuple(odd_argument(param, rng) for param in OPS[name].params)
        seen = specs_in(args)
        print(name, seen, flush=True)
        try:
            specs = infer(name, seen)
            if (
                sum(part.nbytes for part in (specs if isinstance(specs, tuple) else [specs]))
                > 2**20
            ):
                continue
            result = run_op(name, args)
        except GraphError:
            continue
        ran += 1
        if specs_in(result) != specs:
            raise SystemExit(f"{name}{seen}: predicted {specs}, came out as {specs_in(result)}")
    print("ran", ran)


if __name__ == "__main__":
    fuzz(int(sys.argv[1]))
