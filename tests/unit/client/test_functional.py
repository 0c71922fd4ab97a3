"""In-place edits through any alias, against torch: random programs, and the rules one by one.

Programs run on whole numbers in float64, where no order of summing rounds, so equality is exact.
`GLASSHIVE_SOAK=1` runs twenty times as many.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from soak import count
from torch import Tensor

from glasshive.client.errors import OutOfSight
from glasshive.client.functional import Cell, intern_layout, layout_of
from glasshive.client.recorder import Recorder, recording
from glasshive.graph.errors import GlasshiveError, LateEdit
from glasshive.graph.graph import NodeId, Op
from glasshive.graph.kernels import spec_of

PROGRAMS = count(1_000, 20_000)
BATCHES = 10
MAX_NUMEL = 128
Step = Callable[[list[Tensor]], Any]


def some_index(rng: random.Random, shape: tuple[int, ...]) -> Any:
    """A basic index: ints, slices, None, an ellipsis."""
    index: list[Any] = []
    for size in shape[: rng.randint(0, len(shape))]:
        kind = rng.randrange(4)
        if kind == 0 and size:
            index.append(rng.randrange(-size, size))
        elif kind == 1:
            start = rng.randrange(size + 1)
            index.append(slice(start, rng.randint(start, size + 1), rng.choice([None, 1, 2])))
        else:
            index.append(slice(None))
    if rng.random() < 0.1:
        index.insert(rng.randint(0, len(index)), None)
    if rng.random() < 0.2:
        index.append(Ellipsis)
    return tuple(index)


def some_view(rng: random.Random, shape: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    rank = len(shape)
    kind = rng.randrange(13)
    if kind <= 2 or rank == 0:
        index = some_index(rng, shape)
        return lambda x: x[index]
    first, second = rng.randrange(rank), rng.randrange(-rank, rank)
    size = shape[first]
    if kind == 3:
        return lambda x: x.transpose(first, second)
    if kind == 4:
        order = rng.sample(range(rank), rank)
        return lambda x: x.permute(order)
    if kind == 5:
        return lambda x: x.reshape(-1)
    if kind == 6:
        return lambda x: x.view(shape[0], -1) if x.numel() else x
    if kind == 7:
        return lambda x: x.unsqueeze(second)
    if kind == 8:
        return lambda x: x.squeeze()
    if kind == 9 and rank >= 2 and size and first != second % rank:
        offset = rng.randint(-1, 1)
        return lambda x: x.diagonal(offset, first, second)
    if kind == 10 and size:
        pick = rng.randrange(size)
        return lambda x: x.unbind(first)[pick]
    if kind == 11 and size:
        width = rng.randint(1, size)
        return lambda x: x.split(width, first)[-1]
    if kind == 12 and rank < 4:
        return lambda x: x.expand(2, *shape)
    return lambda x: x.detach()


def some_value(rng: random.Random, a: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    rank = a.dim()
    dim = rng.randrange(rank) if rank else 0
    number = rng.randint(-3, 3)
    mask = torch.tensor([rng.random() < 0.5 for _ in range(a.numel())], dtype=torch.bool).reshape(
        a.shape
    )
    table: list[Callable[[Tensor, Tensor], Tensor]] = [
        lambda x, y: x + y,
        lambda x, y: x - number,
        lambda x, y: (x * y).remainder(101),
        lambda x, y: x.relu(),
        lambda x, y: x.clone(),
        lambda x, y: x.contiguous(),
        lambda x, y: torch.where(x > number, x, y),
        lambda x, y: torch.stack([x, x + 1]),
        lambda x, y: x.to(torch.int64),
        lambda x, y: x.double(),
        lambda x, y: x.masked_fill(mask, number),
        lambda x, y: torch.zeros_like(x) + number,
    ]
    if rank:
        table += [
            lambda x, y: x.sum(dim),
            lambda x, y: x.cumsum(dim),
            lambda x, y: x.flip(dim),
            lambda x, y: torch.cat([x, x], dim),
            lambda x, y: x.roll(1, dim),
            lambda x, y: x[mask],
            lambda x, y: x.sort(dim).values,
        ]
    return rng.choice(table)


def some_edit(rng: random.Random, a: Tensor) -> Callable[[Tensor, Tensor], Any]:
    number = rng.randint(-3, 3)
    index = some_index(rng, tuple(a.shape))
    dim = rng.randrange(a.dim()) if a.dim() else 0
    mask = torch.tensor([rng.random() < 0.5 for _ in range(a.numel())], dtype=torch.bool).reshape(
        a.shape
    )

    def assign(x: Tensor, y: Tensor) -> None:
        x[index] = y

    def assign_number(x: Tensor, y: Tensor) -> None:
        x[index] = number

    def accumulate(x: Tensor, y: Tensor) -> None:
        x[index] += number

    def accumulate_value(x: Tensor, y: Tensor) -> None:
        x[index] -= y

    def assign_mask(x: Tensor, y: Tensor) -> None:
        x[mask] = number

    def assign_traced_mask(x: Tensor, y: Tensor) -> None:
        if x.dim():
            x[x > number] = number

    def assign_rows(x: Tensor, y: Tensor) -> None:
        x[[0, -1]] = number

    def nested(x: Tensor, y: Tensor) -> None:
        x[index].reshape(-1).add_(1)

    def one_by_one(x: Tensor, y: Tensor) -> None:
        for row in x:
            row.add_(number)

    return rng.choice(
        [
            assign, assign, assign_number, assign_number, accumulate, accumulate_value,
            assign_mask, assign_traced_mask, assign_rows, nested, one_by_one,
            lambda x, y: x.add_(y),
            lambda x, y: x.sub_(y, alpha=2),
            lambda x, y: x.copy_(y),
            lambda x, y: x.zero_(),
            lambda x, y: x.fill_(number),
            lambda x, y: x.neg_(),
            lambda x, y: x.clamp_(min=number),
            lambda x, y: x.masked_fill_(mask, number),
            lambda x, y: x.masked_fill_(x > 0, number),
            # Torch cannot make up its mind about an index into nothing.
            lambda x, y: x.index_fill_(dim, torch.tensor([0]), number) if x.numel() else x,
            lambda x, y: x.mul_(2).remainder_(101),
            lambda x, y: torch.mul(x, number, out=x),
            lambda x, y: torch.neg(x, out=x),
        ]
    )  # fmt: skip


def shares_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def attempt(function: Callable[..., Any], *args: Any) -> tuple[Any, Exception | None]:
    try:
        return function(*args), None
    except (RuntimeError, IndexError, TypeError, ValueError, UserWarning, GlasshiveError) as error:
        return None, error


def same_place(a: Tensor, b: Tensor) -> bool:
    return (a.shape, a.stride(), a.storage_offset()) == (b.shape, b.stride(), b.storage_offset())


def is_expanded(tensor: Tensor) -> bool:
    alias = tensor._alias
    while alias is not None:
        if alias.view is not None and alias.view.name == "expand":
            return True
        alias = alias.parent
    return False


class Program:
    """A random program that runs on plain and on traced tensors, step by step."""

    def __init__(self, rng: random.Random, inputs: list[Tensor], traced: list[Tensor]) -> None:
        self.rng = rng
        self.plain = [tensor.clone() for tensor in inputs]
        self.traced = list(traced)
        self.constants = [torch.tensor([2.0, -1.0, 0.0, 3.0]).double(), torch.tensor(2)]

    def step(self) -> None:
        rng = self.rng
        chosen = rng.randrange(len(self.plain))
        a, kind = self.plain[chosen], rng.random()
        if kind < 0.4:
            view = some_view(rng, tuple(a.shape))
            self.both(lambda x, y: view(x), chosen, None, None)
            return
        if rng.random() < 0.2:
            b = also_b = rng.choice(self.constants)
        else:
            other = rng.randrange(len(self.plain))
            b, also_b = self.plain[other], self.traced[other]
        if kind < 0.6:
            self.both(some_value(rng, a), chosen, b, also_b)
            return
        if is_expanded(self.traced[chosen]):
            return  # torch refuses some edits of expanded memory and does others by halves
        if shares_memory(a, b) and (a is b or not same_place(a, b)):
            b, also_b = b.clone(), also_b.clone()  # torch leaves open what overlaps give
        self.both(some_edit(rng, a), chosen, b, also_b, edits=True)

    def both(
        self, function: Callable[..., Any], chosen: int, b: Any, also_b: Any, edits: bool = False
    ) -> None:
        want, refused = attempt(function, self.plain[chosen], b)
        got, also_refused = attempt(function, self.traced[chosen], also_b)
        assert (refused is None) == (also_refused is None), f"{refused!r}, but {also_refused!r}"
        if refused is None and not edits and want.numel() <= MAX_NUMEL and want.dim() <= 4:
            assert (got.shape, got.dtype) == (want.shape, want.dtype)
            self.plain.append(want)
            self.traced.append(got)


def run_program(seed: int, session: Any) -> None:
    rng = random.Random(seed)
    numbers = torch.Generator().manual_seed(seed)
    inputs = [
        torch.randint(-4, 5, shape, generator=numbers).double()
        for shape in ((2, 3, 4), (3, 4), (4,))
    ]
    recorder = Recorder()
    with recording(recorder):
        opened = session(recorder, inputs)
        program = Program(rng, inputs, opened.traced)
        for _ in range(rng.randint(6, 14)):
            program.step()
        ids = [recorder.value(tensor) for tensor in program.traced]
    values = opened.run()
    for index, (node, want) in enumerate(zip(ids, program.plain, strict=True)):
        got = values[node]
        assert got.dtype == want.dtype, f"seed {seed}, variable {index}"
        assert torch.equal(got, want), f"seed {seed}, variable {index}: {got} is not {want}"


@pytest.mark.parametrize("batch", range(BATCHES))
def test_random_programs_equal_torch(batch: int, make_session: Any) -> None:
    for seed in range(batch, PROGRAMS, BATCHES):
        run_program(seed, make_session)


# The rules one by one ---------------------------------------------------------------------------


class Watch:
    """A cell with hooks that write down what they see."""

    def __init__(self, recorder: Recorder, tensor: Tensor) -> None:
        self.seen: list[Any] = []
        self.refuse = False
        self.cell = recorder.new_cell(
            recorder.const(tensor), spec_of(tensor), self._before, self._after
        )
        self.tensor = recorder.tensor_of(self.cell)

    def _before(self, cell: Cell) -> None:
        if self.refuse:
            raise LateEdit("too late")
        self.seen.append(("before", cell.vid))

    def _after(self, cell: Cell, value: NodeId) -> None:
        assert cell.vid == value
        self.seen.append(("after", value))


@pytest.fixture
def watch(session: Any, h: Tensor) -> Watch:
    return Watch(session(h).recorder, h)


EDITS: dict[str, Callable[[Tensor], Any]] = {
    "method": lambda x: x.add_(1),
    "operator": lambda x: x.__iadd__(1),
    "assignment": lambda x: x.__setitem__((slice(None), 0), 1.0),
    "whole assignment": lambda x: x.__setitem__(slice(None), torch.zeros(8)),
    "through a view": lambda x: x.mT.view(2, 8, 5, 1)[0].neg_(),
    "through detach": lambda x: x.detach().zero_(),
    "through data": lambda x: x.data[0].zero_(),
    "by index": lambda x: x.__setitem__([0], 0.0),
    "out=": lambda x: torch.neg(x, out=x),
}


@pytest.mark.parametrize("name", EDITS)
def test_hooks_run_before_and_after_each_edit(name: str, watch: Watch) -> None:
    first = watch.cell.vid
    EDITS[name](watch.tensor)
    assert watch.seen == [("before", first), ("after", watch.cell.vid)]
    assert watch.cell.vid != first
    assert watch.cell.version == 1
    assert [line.file for line in watch.cell.lines] == [__file__]


@pytest.mark.parametrize("name", EDITS)
def test_a_hook_that_refuses_leaves_the_cell_as_it_was(name: str, watch: Watch) -> None:
    first = watch.cell.vid
    watch.refuse = True
    with pytest.raises(LateEdit):
        EDITS[name](watch.tensor)
    assert (watch.cell.vid, watch.cell.version) == (first, 0)


def test_an_augmented_assignment_is_one_edit(watch: Watch) -> None:
    watch.tensor[:, -1] += 1
    watch.tensor[:, 1:3, ::2] *= 2
    assert watch.cell.version == 2


def test_values_made_before_an_edit_stay(session: Any, h: Tensor) -> None:
    opened = session(h)
    (traced,) = opened.traced
    before, copied, shared = traced * 1, traced.clone(), traced[:, 0]
    traced.zero_()
    ids = [opened.recorder.value(x) for x in (before, copied, shared)]
    values = opened.run()
    assert torch.equal(values[ids[0]], h)
    assert torch.equal(values[ids[1]], h)
    assert not values[ids[2]].any()


def test_a_view_is_recorded_once_for_each_value(session: Any, h: Tensor) -> None:
    opened = session(h)
    (traced,) = opened.traced
    for _ in range(3):
        traced[:, 0] + 1
        traced[:, 0] * 2
    names = [n.name for n in opened.recorder.nodes.values() if isinstance(n, Op)]
    assert names.count("select") == 1
    traced[:, 0] = traced[:, 0] + 1
    traced[:, 0] + 1
    names = [n.name for n in opened.recorder.nodes.values() if isinstance(n, Op)]
    assert names.count("select") == 1  # what was assigned is what is seen


@pytest.mark.parametrize(
    "edit",
    [
        lambda x: x[:1].expand(4, 5, 8).add_(1),
        lambda x: x[:1].expand(4, 5, 8)[0].zero_(),
        lambda x: x.unfold(1, 3, 1).zero_(),
        lambda x: torch.broadcast_to(x[0, 0], (3, 8)).copy_(x[0, :3].clone()),
    ],
)
def test_overlapping_views_are_not_written(edit: Any, watch: Watch) -> None:
    with pytest.raises(OutOfSight, match=r"one place in memory; call \.clone\(\)"):
        edit(watch.tensor)
    assert watch.cell.version == 0


@pytest.mark.parametrize(
    ("shape", "strides", "dense"),
    [
        ((2, 3), (3, 1), True),
        ((3, 2), (1, 3), True),
        ((2, 3), (6, 1), False),
        ((2, 3), (0, 1), False),
        ((1, 3), (77, 1), True),
        ((), (), True),
    ],
)
def test_dense_layouts(shape: Any, strides: Any, dense: bool) -> None:
    assert intern_layout(torch.float32, shape, strides).is_dense is dense
    plain = torch.empty_strided(shape, strides)
    assert torch.ops.aten.is_non_overlapping_and_dense(plain) is dense


def test_equal_layouts_are_one_object() -> None:
    assert intern_layout(torch.float32, (2, 3)) is layout_of(torch.zeros(2, 3))
    assert intern_layout(torch.float32, (2, 3)) is not intern_layout(torch.float64, (2, 3))
