"""Ops on specs that have one key have one answer: torch's own, asked for each of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from glasshive.graph import kernels
from glasshive.graph.dtypes import DType
from glasshive.graph.errors import ShapeMismatch
from glasshive.graph.ops import OPS, REQUIRED, OpSpec, Parameter
from glasshive.graph.shape_keys import shape_key
from glasshive.graph.tensors import SpecArg, Specs, TensorSpec

HUGE_OR_NONE = (1e300, -1e300, 1e-320, float("inf"), float("nan"))
FLOATS = (0.0, -0.0, 1.0, 1.5, -1.0, 300.0, 70_000.0, *HUGE_OR_NONE)
INTS = (0, 1, -1, 2, 255, 256, -129, 2**31, 2**40, 2**63 - 1, -(2**63))
BOOLS = (False, True)
WITH_OPERANDS = [op for op in OPS.values() if any(p.kind == "operand" for p in op.params)]


def example(op: OpSpec, param: Parameter, dtype: DType) -> SpecArg:
    if param.name in ("mask", "condition"):
        return TensorSpec(DType.BOOL, (3, 4))
    if param.name == "index":
        return TensorSpec(DType.INT64, (2,) if op.name == "index_fill" else (3, 4))
    if param.name == "boundaries":
        return TensorSpec(dtype, (4,))
    if param.kind in ("value", "operand"):
        return TensorSpec(dtype, (3, 4))
    if param.default is not REQUIRED:
        return param.default  # type: ignore[return-value]
    assert param.kind == "int"
    return 0


def calls(op: OpSpec, numbers: tuple[SpecArg, ...]) -> Iterator[tuple[SpecArg, ...]]:
    """With each of `numbers` where a tensor could stand, beside tensors of each format."""
    for dtype in DType:
        args = tuple(example(op, param, dtype) for param in op.params)
        for place, param in enumerate(op.params):
            if param.kind == "operand":
                for number in numbers:
                    yield (*args[:place], number, *args[place + 1 :])
                    if op.params[-1].name == "alpha":
                        yield (*args[:place], number, *args[place + 1 : -1], 2)


def answer(name: str, args: tuple[SpecArg, ...], monkeypatch: pytest.MonkeyPatch) -> Specs | None:
    monkeypatch.setattr(kernels, "_inferred", {})
    try:
        return kernels.infer(name, args)
    except ShapeMismatch:
        return None


@pytest.mark.parametrize("numbers", [FLOATS, INTS, BOOLS], ids=["floats", "ints", "bools"])
@pytest.mark.parametrize("op", WITH_OPERANDS, ids=lambda op: op.name)
def test_equal_keys_have_equal_answers(
    op: OpSpec, numbers: tuple[SpecArg, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers: dict[object, set[Specs | None]] = {}
    for args in calls(op, numbers):
        found = answers.setdefault(shape_key(op.name, args), set())
        found.add(answer(op.name, args, monkeypatch))
    assert {len(found) for found in answers.values()} == {1}


def test_factors_share_a_key_and_what_gives_shapes_does_not() -> None:
    x = TensorSpec(DType.FLOAT32, (4, 8))
    assert shape_key("mul", (x, 1.0)) == shape_key("mul", (x, 2.0))
    assert len({shape_key("mul", (x, one)) for one in (1, 1.0, True, x)}) == 4
    assert shape_key("select", (x, 0, 1)) != shape_key("select", (x, 0, True))
    assert shape_key("reshape", (x, (32,))) != shape_key("reshape", (x, (2, 16)))
    # Torch refuses to fill ints with an infinity.
    assert shape_key("masked_fill", (x, x, 1.0)) != shape_key("masked_fill", (x, x, 2.0))
