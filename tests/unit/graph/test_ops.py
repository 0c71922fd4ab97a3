"""The table's rules: strict kinds, full argument lists, helpful refusals."""

from __future__ import annotations

import subprocess
import sys

import pytest

from glasshive.graph.dtypes import DType
from glasshive.graph.errors import UnknownOp
from glasshive.graph.graph import Arg, NodeId, Ref
from glasshive.graph.ops import OPS, Parameter, check_args, find_op, nearest

A = Ref(NodeId(0))
B = Ref(NodeId(1))

GOOD: dict[str, list[Arg]] = {
    "value": [A],
    "operand": [A, 1, 1.0, True, -(2**63)],
    "values": [(A,), (A, B)],
    "optional_values": [(A,), (None, A)],
    "scalar": [1, 1.5, False, 2**63 - 1, float("nan"), float("-inf")],
    "int": [0, -1, 2**63 - 1],
    "ints": [(), (1, -2)],
    "float": [1.0, float("inf")],
    "bool": [True, False],
    "dtype": [DType.BFLOAT16],
    "choice": ["mean"],
    "seed": [0, 2**63 - 1],
}
BAD: dict[str, list[object]] = {
    "value": [1, (A,), "0", 0.0],
    "operand": [(A,), "a", 2**63, DType.BOOL],
    "values": [(), A, (A, None), (1,), [A]],
    "optional_values": [(), (None,), (None, 1), A],
    "scalar": [A, "1", 2**63, 1j, (1,)],
    "int": [True, 1.0, 2**63, -(2**63) - 1, "1", A],
    "ints": [1, (1, True), (1.0,), (2**63,), [1], (A,), ((1,),)],
    "float": [1, True, "nan", A],
    "bool": [0, 1, 1.0, "True", A],
    "dtype": ["float32", 1, A],
    "choice": ["median", 1, True, A, b"mean"],
    "seed": [-1, 1.0, True, 2**63],
}


def parameter(kind: str, *, optional: bool = False) -> Parameter:
    choices = ("mean", "sum") if kind == "choice" else ()
    return Parameter("x", kind, optional, choices)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", GOOD)
def test_a_kind_takes_its_own_and_nothing_like_it(kind: str) -> None:
    for arg in GOOD[kind]:
        assert parameter(kind).accepts(arg), arg
    for bad in BAD[kind]:
        assert not parameter(kind).accepts(bad), bad  # type: ignore[arg-type]
    assert not parameter(kind).accepts(None)
    assert parameter(kind, optional=True).accepts(None)


def test_every_kind_is_used_and_tested() -> None:
    used = {param.kind for spec in OPS.values() for param in spec.params}
    assert used == set(GOOD) == set(BAD)


def test_every_default_fits_its_parameter() -> None:
    for spec in OPS.values():
        for param in spec.params:
            if repr(param.default) != "required":
                assert param.accepts(param.default), (spec.name, param)  # type: ignore[arg-type]
            assert (param.kind == "choice") == bool(param.choices)


def test_random_ops_and_no_others_carry_a_seed() -> None:
    for spec in OPS.values():
        seeds = [param for param in spec.params if param.kind == "seed"]
        assert len(seeds) == (1 if spec.random else 0), spec.name


def test_the_table_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        OPS["eval"] = OPS["add"]  # type: ignore[index]
    with pytest.raises(AttributeError):
        OPS["add"].name = "eval"  # type: ignore[misc]


def test_defaults_are_filled_in_for_the_recorder() -> None:
    assert OPS["topk"].complete((A, 5)) == (A, 5, -1, True, True)
    assert OPS["topk"].complete((A, 5), {"largest": False}) == (A, 5, -1, False, True)
    assert OPS["sum"].complete((A,)) == (A, None, False, None)
    assert OPS["randn_like"].complete((A,), {"seed": 3}) == (A, None, 3)


@pytest.mark.parametrize(
    ("args", "kwargs", "text"),
    [
        ((A,), {}, "got no k"),
        ((A, 5, -1, True, True, True), {}, "got 6 arguments"),
        ((A, 5), {"out": A}, "got out, which it has not"),
        ((A, 5.0), {}, "got the float 5.0 for k; an int of 64 bits is wanted"),
    ],
)
def test_what_does_not_fit_is_named(
    args: tuple[Arg, ...], kwargs: dict[str, Arg], text: str
) -> None:
    with pytest.raises(UnknownOp) as caught:
        OPS["topk"].complete(args, kwargs)
    assert str(caught.value).startswith("topk(a, k, dim, largest, sorted) ")
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("name", "args", "text"),
    [
        ("add", (A, B), "got 2 arguments, but 3 are wanted"),
        ("pow", (2, 3.0), "got numbers only"),
        (
            "mean",
            (A, True, False, None),
            "for dims; a list of at most 32 ints of 64 bits, or null is wanted",
        ),
        ("gelu", (A, "sigmoid"), "got the word 'sigmoid' for approximate; none or tanh is wanted"),
        ("to", (A, None), "got null for dtype; a dtype is wanted"),
        ("cat", ((A, 1), 0), "got a list of 2 for tensors"),
        ("neg", (DType.BOOL,), "got dtype bool for a; a value of the graph is wanted"),
        ("select", (A, 0, 2**70), "got the int beyond 64 bits for index"),
    ],
)
def test_refusals_say_what_was_got_and_wanted(name: str, args: tuple[Arg, ...], text: str) -> None:
    with pytest.raises(UnknownOp) as caught:
        check_args(OPS[name], args)
    assert text in str(caught.value)


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(UnknownOp, match="no op 'soft_max' in the table; did you mean softmax"):
        find_op("soft_max")
    assert nearest("layernorm")[0] == "layer_norm"
    assert nearest("x" * 10_000) == ()


def test_long_names_and_words_are_cut() -> None:
    with pytest.raises(UnknownOp) as caught:
        find_op("y" * 10_000)
    assert len(str(caught.value)) < 300
    with pytest.raises(UnknownOp) as caught:
        check_args(OPS["gelu"], (A, "y" * 10_000))
    assert len(str(caught.value)) < 300


def test_the_table_needs_no_tensor_library() -> None:
    code = "import sys, glasshive.graph.ops as o; sys.exit('torch' in sys.modules or not o.OPS)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
