"""Runs plans in process, without network: the stages of every peer, in an order that can run.

What travels between peers goes through bytes, as on the wire, and every part goes through its
codec, the checks of a host and admission. `CuttingRunner` is the runner of a model whose every
trace is run over each set of cuts; the results must be equal.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glasshive.client.experiment import Experiment, TraceOptions
from glasshive.client.files import read_generation_config
from glasshive.client.model import Model
from glasshive.graph.budget import Pace
from glasshive.graph.codec import DEFAULT_LIMITS
from glasshive.graph.errors import NotYet
from glasshive.graph.kernels import spec_of, tensor_from_bytes, tensor_to_bytes
from glasshive.graph.order import slots
from glasshive.graph.plan import HIDDEN, TOKENS, Plan, Span, Stage, check_part
from glasshive.graph.plan_codec import decode_part, encode_part
from glasshive.graph.split import split
from glasshive.graph.twin import build_twin, outline_of
from glasshive.peer.admission import Admission
from glasshive.peer.checkpoint import Checkpoint
from glasshive.peer.executor import Executor
from glasshive.peer.generation import PassInputs
from glasshive.peer.host_limits import HostLimits
from glasshive.peer.memory_order import memory_order, tensor_in_order
from glasshive.peer.pace import HostPace
from glasshive.peer.span_model import SpanModel

Saves = dict[str, Tensor]
FAST = HostPace(tokens_per_second=1e9, hidden_size=32, graph=Pace())


@dataclass
class _Mail:
    """An outbox that delivers at once."""

    sender: int
    saves: Saves
    values: dict[tuple[int, int, int], Tensor]

    def saved(self, name: str, value: Tensor) -> None:
        assert name not in self.saves
        self.saves[name] = tensor_from_bytes(spec_of(value), tensor_to_bytes(value))

    def exported(self, stage: Stage, value: int, receiver: int, tensor: Tensor) -> None:
        at = stage.pass_index if value in (HIDDEN, TOKENS) else -1
        assert (receiver, value, at) not in self.values
        order = memory_order(tensor)
        data = tensor_to_bytes(tensor.permute(order))
        self.values[receiver, value, at] = tensor_in_order(spec_of(tensor), order, data)


@dataclass
class CuttingRunner:
    """Runs experiments uncut, and then over every set of cuts, which must give the same bytes."""

    folder: Path
    cut_sets: Sequence[tuple[int, ...]] | None = None  # None: every one there is
    refused: int = 0  # cuts at which a value would have to travel backwards
    runs: int = 0
    spans: dict[Span, SpanModel] = field(default_factory=dict)

    def __post_init__(self) -> None:
        checkpoint = Checkpoint(self.folder)
        self.n_blocks = checkpoint.n_blocks
        self.config = checkpoint.config
        self.twin = build_twin(self.config, torch.float32)
        self.outline = outline_of(self.twin, self.config)
        self.admission = Admission(self.outline, self.twin, HostLimits().budget, FAST)
        self._checkpoint = checkpoint

    def model(self) -> Model:
        """A model whose traces run here."""
        return Model(
            name="tiny",
            model_id="0" * 64,
            config=self.config,
            generation_config=read_generation_config(self.folder, self.config),
            tokenizer=None,
            twin=self.twin,
            outline=self.outline,
            runner=self,
        )

    def run(self, experiment: Experiment, options: TraceOptions) -> Any:
        """Fill the saves with what the uncut model gives; compare every cut with it."""
        whole = self.run_over(experiment, ())
        cut_sets = all_cuts(self.n_blocks) if self.cut_sets is None else self.cut_sets
        for cuts in cut_sets:
            try:
                saves = self.run_over(experiment, cuts)
            except NotYet:
                self.refused += 1
                continue
            self.runs += 1
            assert saves.keys() == whole.keys()
            for name, value in saves.items():
                assert same(value, whole[name]), f"{name} differs at cuts {cuts}"
        experiment.fill(whole)
        return None

    def estimate(self, experiment: Experiment, options: TraceOptions) -> Mapping[str, Any]:
        return {}

    def describe(self) -> str:
        return "served by a test"

    def run_over(self, experiment: Experiment, cuts: tuple[int, ...]) -> Saves:
        """The saves of one run over the spans between these cuts."""
        bounds = [0, *cuts, self.n_blocks]
        route = [Span(start, end) for start, end in itertools.pairwise(bounds)]
        passes = experiment.passes
        plan = split(
            experiment.graph, self.outline, passes, route, experiment.specs, experiment.sampling
        )
        assert {i for i in experiment.graph.nodes} <= {i for p in plan.parts for i in p.graph.nodes}
        saves: Saves = {}
        values: dict[tuple[int, int, int], Tensor] = {}
        executors: dict[int, Executor] = {}
        for part in plan.parts:
            data = encode_part(part, passes)
            decoded, decoded_passes = decode_part(data, DEFAULT_LIMITS)
            assert (decoded, decoded_passes) == (part, passes)
            check_part(part, passes, self.outline)
            slots(part.graph, self.outline, passes)
            self.admission.admit(part, passes, data)
            mail = _Mail(part.index, saves, values)
            model = self._span(part.span)
            consts = experiment.consts
            executors[part.index] = Executor(model, self.outline, part, passes, consts, mail)
        ended: set[int] = set()
        for stage, index in in_order(plan):
            group = passes.passes[stage.pass_index].group if stage.forward else -1
            if group in ended:
                executors[index].end(group)
                continue
            executor, hidden, tokens = executors[index], None, None
            for value, _ in stage.imports:
                made_in = {HIDDEN: stage.pass_index, TOKENS: stage.pass_index - 1}.get(value, -1)
                tensor = values.pop((index, value, made_in))
                if value == HIDDEN:
                    hidden = tensor
                elif value == TOKENS:
                    tokens = tensor
                else:
                    executor.put(value, tensor)
            has_ids = route[index].start == 0 or executor._part.sampling is not None
            executor.run(stage, _inputs(experiment, stage, has_ids=has_ids), hidden, tokens)
            ended |= executor.ended
        assert not values, f"sent and never taken: {list(values)}"
        for executor in executors.values():
            assert len(executor._values) == 0, "values are held after the run"
        return saves

    def _span(self, span: Span) -> SpanModel:
        if span not in self.spans:
            self.spans[span] = self._checkpoint.load_span(
                span.start, span.end, torch.float32, "cpu", "sdpa"
            )
        return self.spans[span]


def in_order(plan: Plan) -> list[tuple[Stage, int]]:
    """All stages with their parts, so that each comes after those whose values it imports."""
    both = [(stage, part.index) for part in plan.parts for stage in part.stages]
    return sorted(both, key=lambda one: (one[0].pass_index, one[1]))


def _inputs(experiment: Experiment, stage: Stage, *, has_ids: bool) -> PassInputs:
    if not stage.forward or experiment.passes.passes[stage.pass_index].step:
        return PassInputs()
    one = experiment.inputs[stage.pass_index]
    ids = one.input_ids if has_ids else None
    return PassInputs(ids, one.attention_mask, one.position_ids)


def all_cuts(n_blocks: int) -> list[tuple[int, ...]]:
    """Every way to cut, but the one without cuts."""
    places = range(1, n_blocks)
    return [cuts for count in range(1, n_blocks) for cuts in itertools.combinations(places, count)]


def same(one: Tensor, two: Tensor) -> bool:
    """Equal in every bit that counts: dtype, shape, numbers; nan equals nan."""
    if one.dtype != two.dtype or one.shape != two.shape:
        return False
    return torch.equal(one, two) or bool(((one == two) | ((one != one) & (two != two))).all())
