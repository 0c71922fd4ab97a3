"""What a peer's executor refuses although it passed every check before: graphs made by hand."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from stage_runner import CuttingRunner
from tiny_models import HIDDEN, IDS
from torch import nn

from glasshive.client.experiment import Experiment
from glasshive.graph.dtypes import DType
from glasshive.graph.errors import BadGraph, GraphError, NotASite, ShapeMismatch
from glasshive.graph.graph import Graph, Node, NodeId, Op, Read, Ref, Save, Site, Skip, Write
from glasshive.graph.order import InvokeShape, Passes, assign_passes
from glasshive.graph.plan import Span, Stage
from glasshive.peer.executor import Executor


@pytest.fixture
def runner(tiny_folder: Callable[[str], Path]) -> CuttingRunner:
    return CuttingRunner(tiny_folder("llama"), [])


def experiment(runner: CuttingRunner, rows: int, *nodes: Node) -> Experiment:
    """A real trace's experiment whose graph and passes are replaced; it saves the logits."""
    taken: list[Experiment] = []
    runner.run = lambda one, options: taken.append(one)  # type: ignore[method-assign,assignment,func-returns-value]
    model = runner.model()
    with model.trace([IDS] * rows):
        model.lm_head.output.save()
    end = len(nodes)
    logits: list[Node] = [Read(Site("lm_head", "output"), 0), Save(Ref(NodeId(end)), "logits")]
    graph = Graph({NodeId(i): node for i, node in enumerate([*nodes, *logits])})
    passes = assign_passes(graph, runner.outline, [InvokeShape(rows, len(IDS))])
    return dataclasses.replace(taken[0], graph=graph, passes=passes)


def double(site: Site, mode: Any) -> list[Node]:
    return [
        Read(site, 0),
        Op("mul", (Ref(NodeId(0)), 2.0)),
        Write(site, 0, Ref(NodeId(1)), mode),
    ]


NORM = Site("model.norm", "output")


class Table(nn.Module):
    """A module that gives out its own weights, as old rotary tables did."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.ones(shape), requires_grad=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.table.expand(hidden.shape)


@pytest.fixture
def give_out(runner: CuttingRunner) -> Callable[[nn.Module], nn.Module]:
    """Puts a module in the place of the final norm, whose twin knows nothing of it."""

    def put(module: nn.Module) -> nn.Module:
        span: Any = runner._span(Span(0, 6))
        span.module.model.norm = span._modules["model.norm"] = module
        return module

    return put


def test_weights_are_never_written(
    runner: CuttingRunner, give_out: Callable[[nn.Module], nn.Module]
) -> None:
    table: Any = give_out(Table((1, 6, HIDDEN)))
    with pytest.raises(NotASite, match=r"model\.norm\.output is a part of the model's weights"):
        runner.run_over(experiment(runner, 1, *double(NORM, "inplace")), ())
    assert (table.table == 1).all()
    runner.run_over(experiment(runner, 1, *double(NORM, "set")), ())
    assert (table.table == 1).all()


def test_memory_that_stands_for_several_elements(
    runner: CuttingRunner, give_out: Callable[[nn.Module], nn.Module]
) -> None:
    class Repeats(nn.Module):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return hidden[:1].clone().expand(hidden.shape)

    give_out(Repeats())
    with pytest.raises(NotASite, match=r"several elements of model\.norm\.output are one place"):
        runner.run_over(experiment(runner, 2, *double(NORM, "inplace")), ())
    runner.run_over(experiment(runner, 2, *double(NORM, "set")), ())


def test_a_tensor_of_another_shape_than_the_twin_said(
    runner: CuttingRunner, give_out: Callable[[nn.Module], nn.Module]
) -> None:
    class Longer(nn.Module):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return torch.cat([hidden, hidden], 1)

    give_out(Longer())
    text = "model.norm.output has shape [1, 12, 32] here, wanted [1, 6, 32]"
    with pytest.raises(NotASite, match=re.escape(text)) as caught:
        runner.run_over(experiment(runner, 1, *double(NORM, "set")), ())
    assert caught.value.node == 0


def test_a_forward_that_fails_names_the_last_write(
    runner: CuttingRunner, give_out: Callable[[nn.Module], nn.Module]
) -> None:
    class Broken(nn.Module):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no kernel for this\nand a long story")

    give_out(Broken())
    nodes = double(Site("model.layers.2", "output"), "set")
    with pytest.raises(GraphError, match=r"forward pass failed .*: no kernel for this$") as caught:
        runner.run_over(experiment(runner, 1, *nodes), ())
    assert caught.value.node == 2


def test_a_tensor_without_rows_in_a_pass_of_several_invokes(runner: CuttingRunner) -> None:
    """The client gives such an invoke a pass of its own; a graph by hand need not."""
    table = Site("model.layers.1.self_attn", "input", ("position_embeddings", 0))
    made = experiment(runner, 2, *double(table, "set"))
    one = dataclasses.replace(made.passes.passes[0], invokes=(0, 1), rows=((0, 1), (1, 2)))
    made = dataclasses.replace(made, passes=Passes((one,)))
    with pytest.raises(NotASite, match="is one tensor for all rows"):
        runner.run_over(made, ())


def test_two_writes_of_one_kind(runner: CuttingRunner) -> None:
    value = Ref(NodeId(1))
    again = Write(NORM, 0, value, "set")
    with pytest.raises(BadGraph, match=r"model\.norm\.output is written twice in invoke 0"):
        runner.run_over(experiment(runner, 1, *double(NORM, "set"), again), ())
    runner.run_over(experiment(runner, 1, *double(NORM, "inplace"), again), ())
    first = dataclasses.replace(again, mode="inplace")
    with pytest.raises(BadGraph, match="written twice"):
        runner.run_over(experiment(runner, 1, *double(NORM, "set"), first), ())


def skip_by(module: str, shape: tuple[int, ...], dtype: DType = DType.FLOAT32) -> list[Node]:
    return [Op("full", (shape, 1, dtype)), Skip(module, 0, Ref(NodeId(0)))]


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("model", "model cannot be skipped: it gives 1 tensors, or holds the blocks"),
        ("model.rotary_emb", "model.rotary_emb cannot be skipped: it gives 2 tensors"),
    ],
)
def test_a_skip_of_what_gives_no_single_tensor(
    runner: CuttingRunner, module: str, text: str
) -> None:
    with pytest.raises(BadGraph, match=re.escape(text)) as caught:
        runner.run_over(experiment(runner, 1, *skip_by(module, (1, 6, HIDDEN))), ())
    assert caught.value.node == 1


@pytest.mark.parametrize(
    ("shape", "dtype"), [((1, 600, HIDDEN), DType.FLOAT32), ((1, 6, HIDDEN), DType.INT64)]
)
def test_a_skip_by_what_the_module_would_not_give(
    runner: CuttingRunner, shape: tuple[int, ...], dtype: DType
) -> None:
    """More tokens would make the blocks behind it do more than was admitted."""
    nodes = skip_by("model.layers.2", shape, dtype)
    with pytest.raises(ShapeMismatch, match=r"given for model\.layers\.2\.output, which") as caught:
        runner.run_over(experiment(runner, 1, *nodes), ())
    assert caught.value.node == 1


def test_no_hook_stays_behind_a_stage_that_could_not_begin(
    runner: CuttingRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would run in the traces of others."""
    made = experiment(runner, 1, *double(NORM, "set"))
    runner.run_over(made, ())
    span: Any = runner._span(Span(0, 6))

    def hooks() -> int:
        modules = span.module.modules()
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)

    before = hooks()

    def fail(executor: Executor, stage: Stage) -> NoReturn:
        assert hooks() > before  # those of the sites are on
        raise LookupError("no such module")

    monkeypatch.setattr(Executor, "_skip_modules", fail)
    with pytest.raises(LookupError):
        runner.run_over(made, ())
    assert hooks() == before
