"""What would end an accelerator's process is refused before torch sees it; torch's CPU is the
oracle of what is to be refused."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding

from glasshive.graph.errors import ShapeMismatch
from glasshive.graph.kernels import run_op
from glasshive.graph.kernels_checks import GuardedOps, ends_process
from glasshive.graph.ops import OPS

INTEGERS = (torch.int64, torch.int32)
# Guarded, but not because of an index.
NO_INDEX = {"masked_scatter", "binary_cross_entropy"}


def _kernel_tests() -> ModuleType:
    path = Path(__file__).with_name("test_kernels.py")
    spec = importlib.util.spec_from_file_location("glasshive_test_kernels", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclass looks for it
    spec.loader.exec_module(module)
    return module


EXAMPLES: list[Any] = [
    example
    for example in _kernel_tests().EXAMPLES  # every op of the table has one
    if example.name != "pick"
]


def with_one_number(args: Any, number: int) -> Iterator[Any]:
    """`args` with one element of one of its integer tensors replaced, for each of those tensors."""
    if isinstance(args, Tensor):
        if args.dtype in INTEGERS and args.numel():
            changed = args.clone()
            changed.view(-1)[args.numel() // 2] = number
            yield changed
    elif isinstance(args, tuple):
        for place, arg in enumerate(args):
            for changed in with_one_number(arg, number):
                yield (*args[:place], changed, *args[place + 1 :])


def refusal(name: str, args: Any, *, guarded: bool) -> str | None:
    """Why the op is refused, or None if it runs."""
    try:
        run_op(name, args, guarded=guarded)
    except ShapeMismatch as error:
        return str(error)
    return None


def test_every_op_that_a_bad_integer_can_stop_is_marked() -> None:
    stopped = {
        example.name
        for example in EXAMPLES
        for number in (10**6, -(10**6))
        for args in with_one_number(example.args, number)
        if refusal(example.name, args, guarded=False) is not None
    }
    marked = {name for name, op in OPS.items() if op.guarded}
    assert stopped == marked - NO_INDEX
    assert marked >= NO_INDEX


@pytest.mark.parametrize("name", sorted(n for n, op in OPS.items() if op.guarded) or ["none"])
def test_a_guard_refuses_what_torch_refuses_and_nothing_else(name: str) -> None:
    """Every small number in every integer argument, on both sides of both bounds."""
    refused = accepted = 0
    for example in EXAMPLES:
        if example.name != name:
            continue
        for number in range(-14, 15):
            for args in with_one_number(example.args, number):
                by_torch = refusal(name, args, guarded=False)
                by_us = refusal(name, args, guarded=True)
                assert (by_us is None) == (by_torch is None), (number, by_torch, by_us)
                if by_us is None:
                    accepted += 1
                    continue
                refused += 1
                assert f"is refused: index {number} is not in " in by_us
                assert by_us != by_torch
    assert (refused > 0 and accepted > 0) or name in NO_INDEX


def test_what_is_good_is_computed_alike() -> None:
    for example in EXAMPLES:
        if OPS[example.name].guarded:
            want = run_op(example.name, example.args, guarded=False)
            assert torch.equal(run_op(example.name, example.args, guarded=True), want)


def test_too_few_values_and_no_probabilities() -> None:
    mask = torch.tensor([True, True, True, False])
    args = (torch.zeros(4), mask, torch.ones(2))
    assert "3 places are masked, but 2 values given" in str(
        refusal("masked_scatter", args, guarded=True)
    )
    half = torch.full((2,), 0.5)
    for wrong in (1.5, -0.1, float("nan")):
        args = (torch.tensor([0.5, wrong]), half, None, "mean")
        text = refusal("binary_cross_entropy", args, guarded=True)
        assert "probabilities must be in 0..1" in str(text)
    assert refusal("binary_cross_entropy", (half, half, None, "mean"), guarded=True) is None


def test_indices_of_no_elements_and_masks_pass() -> None:
    a = torch.arange(12.0).reshape(3, 4)
    none = torch.zeros(0, dtype=torch.int64)
    assert run_op("index_select", (a, 0, none), guarded=True).shape == (0, 4)
    with GuardedOps():
        assert torch.equal(a[a > 5], torch.arange(6.0, 12.0))
        assert a[torch.tensor([True, False, True]), torch.tensor([0, -1])].tolist() == [0.0, 11.0]
        with pytest.raises(ValueError, match=r"index 4 is not in -4\.\.3"):
            a[torch.tensor([True, False, True]), torch.tensor([0, 4])]


def opt_positions(table: OPTLearnedPositionalEmbedding, bad: int) -> Tensor:
    return table(torch.ones(1, 2), position_ids=torch.tensor([[0, bad]]))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "run",
    [
        lambda bad: nn.Embedding(8, 4)(torch.tensor([[0, bad]])),
        lambda bad: nn.Embedding(8, 4, padding_idx=0)(torch.tensor([[0, bad]], dtype=torch.int32)),
        lambda bad: nn.Embedding(8, 4, max_norm=1.0)(torch.tensor([bad])),
        lambda bad: nn.EmbeddingBag(8, 4)(torch.tensor([[0, bad]])),
        lambda bad: torch.zeros(8, 4)[torch.tensor([bad])],
        lambda bad: torch.zeros(8, 4).gather(0, torch.tensor([[bad] * 4])),
        lambda bad: torch.zeros(8, 4).index_add_(0, torch.tensor([bad]), torch.ones(1, 4)),
        lambda bad: nn.functional.cross_entropy(torch.zeros(1, 8), torch.tensor([bad])),
        lambda bad: opt_positions(OPTLearnedPositionalEmbedding(6, 4), bad),  # two more inside
    ],
)
def test_a_module_of_the_models_is_guarded_whatever_it_is(run: Callable[[int], Any]) -> None:
    with torch.no_grad(), GuardedOps():
        run(2)
        with pytest.raises(ValueError, match=r"index (8|10) is not in -?\d\.\.\d"):
            run(8)


def test_where_a_guard_is_needed() -> None:
    assert not ends_process("cpu")
    assert not ends_process(torch.device("meta"))
    assert ends_process("cuda:1")
    assert ends_process("mps")
