"""Recording on traced inputs, and a plain interpreter for what was recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch

from glasshive.client.recorder import Recorder, recording
from glasshive.client.traced import TracedTensor
from glasshive.graph.graph import Arg, Const, NodeId, Op, Read, Ref, Site
from glasshive.graph.kernels import infer, run_op, spec_of
from glasshive.graph.ops import OPS, check_args


class Session:
    """A recorder whose sites are the given tensors."""

    def __init__(self, recorder: Recorder, inputs: tuple[torch.Tensor, ...]) -> None:
        self.recorder = recorder
        self.inputs = inputs
        self.nodes = []
        self.traced = []
        for index, tensor in enumerate(inputs):
            node = recorder.add(Read(Site(f"m{index}", "output"), 0))
            self.nodes.append(node)
            self.traced.append(recorder.traced(node, spec_of(tensor)))

    def run(self) -> dict[NodeId, Any]:
        """The value of every node, by torch; every node is checked against the op table."""
        return interpret(self.recorder, dict(zip(self.nodes, self.inputs, strict=True)))


def interpret(recorder: Recorder, reads: Mapping[NodeId, torch.Tensor]) -> dict[NodeId, Any]:
    values: dict[NodeId, Any] = {}
    specs: dict[NodeId, Any] = {}

    def fill(args: tuple[Arg, ...], known: Mapping[NodeId, Any]) -> tuple[Any, ...]:
        return tuple(
            known[a.node] if isinstance(a, Ref) else fill(a, known) if isinstance(a, tuple) else a
            for a in args
        )

    for node_id, node in recorder.nodes.items():
        if isinstance(node, Read):
            values[node_id] = reads[node_id].clone(memory_format=torch.contiguous_format)
        elif isinstance(node, Const):
            values[node_id] = recorder.consts[node.digest][1]
        elif isinstance(node, Op):
            check_args(OPS[node.name], node.args)
            specs[node_id] = infer(node.name, fill(node.args, specs))
            values[node_id] = run_op(node.name, fill(node.args, values))
            if isinstance(values[node_id], torch.Tensor):
                assert spec_of(values[node_id]) == specs[node_id], node
            continue
        specs[node_id] = spec_of(values[node_id])
    return values


def leaves(result: Any) -> list[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        return [result]
    if isinstance(result, dict):
        return [leaf for value in result.values() for leaf in leaves(value)]
    if isinstance(result, list | tuple):
        return [leaf for value in result for leaf in leaves(value)]
    return []


def same(got: torch.Tensor, want: torch.Tensor) -> bool:
    """Equal in dtype, shape and every number; nan equals nan."""
    if got.dtype != want.dtype or got.shape != want.shape:
        return False
    if got.is_complex():
        return torch.equal(torch.view_as_real(got), torch.view_as_real(want.resolve_conj()))
    return torch.equal(got, want) or bool(((got == want) | ((got != got) & (want != want))).all())


def check(function: Callable[..., Any], *inputs: torch.Tensor, exact: bool = True) -> Recorder:
    """Record `function` on traced inputs, interpret, and compare with torch on plain ones.

    Its result and the inputs as it leaves them are compared. Without `exact`, only dtypes and
    shapes are.
    """
    plain = [tensor.clone() for tensor in inputs]
    torch.backends.mha.set_fastpath_enabled(False)  # rounds differently, and cannot be recorded
    with torch.no_grad():
        want = [*leaves(function(*plain)), *plain]
    torch.backends.mha.set_fastpath_enabled(True)
    recorder = Recorder()
    with recording(recorder):
        session = Session(recorder, inputs)
        got = [*leaves(function(*session.traced)), *session.traced]
        assert len(got) == len(want)
        for traced, expected in zip(got, want, strict=True):
            assert traced.shape == expected.shape
            assert traced.dtype == expected.dtype
        ids = [recorder.value(tensor) for tensor in got]
        recorded = [isinstance(tensor, TracedTensor) for tensor in got]
    values = session.run()
    for index, (node, expected) in enumerate(zip(ids, want, strict=True)):
        value = values[node]
        if exact or not recorded[index]:
            assert same(value, expected), f"result {index}: {value} is not {expected}"
        else:
            assert (value.shape, value.dtype) == (expected.shape, expected.dtype)
    return recorder


@pytest.fixture(name="check")
def _check() -> Callable[..., Recorder]:
    return check


@pytest.fixture
def make_session() -> type[Session]:
    """The class of sessions, for tests that open many."""
    return Session


@pytest.fixture
def session() -> Iterator[Callable[..., Session]]:
    """Open a recorder on given inputs; it is closed when the test ends."""
    opened = []

    def start(*inputs: torch.Tensor) -> Session:
        recorder = Recorder()
        context = recording(recorder)
        context.__enter__()
        opened.append(context)
        return Session(recorder, inputs)

    yield start
    for context in opened:
        context.__exit__(None, None, None)


@pytest.fixture
def h() -> torch.Tensor:
    """Activations of 2 rows, 5 tokens, 8 features."""
    return torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(3))
