"""Parts of plans, changed at random: a peer refuses them or runs them, and stays as it was.

The bytes are valid msgpack and mostly sensible, so that they come past the codec: ids, kinds,
sites, arguments, stages and rows are changed, swapped, repeated and left out.
`GLASSHIVE_SOAK=1` tries 1,000,000 of them instead of 6,000; `GLASSHIVE_SEED` chooses the seed.
"""

from __future__ import annotations

import collections
import copy
import itertools
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import pytest
import torch
from random_traces import RandomTrace
from soak import SEED, SOAK, count
from stage_runner import CuttingRunner
from tiny_models import BLOCKS, load_plain
from tiny_models import HIDDEN as WIDTH
from torch import Tensor

from glasshive.client.experiment import Experiment
from glasshive.graph.codec import DEFAULT_LIMITS
from glasshive.graph.errors import BadGraph, GlasshiveError, GraphError, NotYet, UnseenWrite
from glasshive.graph.graph import Const
from glasshive.graph.kernels import spec_of, to_torch_dtype
from glasshive.graph.order import Passes, slots
from glasshive.graph.plan import HIDDEN, TOKENS, Part, Span, Stage, check_part
from glasshive.graph.plan_codec import decode_part, encode_part
from glasshive.graph.split import split
from glasshive.graph.tensors import TensorSpec
from glasshive.peer.executor import Executor
from glasshive.peer.generation import PassInputs

TRIES = count(6_000, 1_000_000)
MAX_TOKENS = 200  # what a test's patience allows
MAX_PASSES = 50
ODD: list[Any] = [
    *(0, 1, 2, 3, -1, 5, 6, 40, 255, 2**31, -(2**40), True, False, None, 1.5, float("inf")),
    *("", "a", "set", "inplace", "model.layers.0", "model.norm", "lm_head", "output", "input"),
    *("float32", "int64", [], [0], [[0, 1]], b"", b"x" * 32),
]


class Nowhere:
    """An outbox that throws everything away."""

    def saved(self, name: str, value: Tensor) -> None:
        pass

    def exported(self, stage: Stage, value: int, receiver: int, tensor: Tensor) -> None:
        pass


def sample_parts(runner: CuttingRunner) -> list[tuple[bytes, Experiment]]:
    """The parts of some random traces over three routes."""
    found: list[tuple[bytes, Experiment]] = []

    def keep(experiment: Experiment, options: object) -> None:
        for cuts in ((), (2,), (1, 4)):
            route = [Span(*ends) for ends in itertools.pairwise([0, *cuts, BLOCKS])]
            passes, specs = experiment.passes, experiment.specs
            graph, sampling = experiment.graph, experiment.sampling
            try:
                plan = split(graph, runner.outline, passes, route, specs, sampling)
            except NotYet:
                continue
            found.extend((encode_part(part, passes), experiment) for part in plan.parts)
        raise BadGraph("nothing is run here")

    runner.run = keep  # type: ignore[method-assign,assignment]
    model = runner.model()
    for seed in range(40):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UnseenWrite)
            with pytest.raises(GraphError):
                RandomTrace(model, seed).run()
    for padded in (False, True):
        prompts = [[1, 2, 3, 4], [5, 6] if padded else [5, 6, 7, 8]]
        with (
            pytest.raises(GraphError),
            model.generate(prompts, max_new_tokens=4, do_sample=True, eos_token_id=9) as tracer,
        ):
            for step in tracer.iter[:]:
                model.model.layers[3].output[:, -1] += step
                model.model.layers[2].mlp.skip(torch.zeros(2, 4 if step == 0 else 1, WIDTH))
                model.lm_head.output.save()
            for _ in tracer.iter[0]:
                model.generator.output[:] = 3
    return found


def mutate(tree: list[Any], choose: random.Random) -> None:
    """Change a tree of lists in a few places."""
    paths: list[list[int]] = []

    def walk(part: Any, path: list[int]) -> None:
        if isinstance(part, list):
            for index, inner in enumerate(part):
                paths.append([*path, index])
                walk(inner, paths[-1])

    def at(path: list[int]) -> Any:
        part: Any = tree
        for index in path:
            part = part[index] if isinstance(part, list) and index < len(part) else None
        return part

    walk(tree, [])
    for _ in range(choose.choice([1, 1, 1, 2, 3])):
        path = choose.choice(paths)
        around, index = at(path[:-1]), path[-1]
        if not isinstance(around, list) or index >= len(around):
            continue  # gone by an earlier change
        kind = choose.randrange(6)
        if kind == 0:
            around[index] = copy.deepcopy(choose.choice(ODD))
        elif kind == 1 and type(around[index]) is int:
            around[index] += choose.choice([-1, 1, 2, -3])
        elif kind == 2:
            del around[index]
        elif kind == 3:
            around.insert(index, copy.deepcopy(around[index]))
        elif kind == 4:
            other = choose.randrange(len(around))
            around[index], around[other] = around[other], around[index]
        else:
            around[index] = copy.deepcopy(at(choose.choice(paths)))


def run_as_a_peer(
    runner: CuttingRunner, data: bytes, consts: dict[bytes, Tensor]
) -> tuple[Part, Passes]:
    """What a host does with a part, its neighbours' values being zeros."""
    part, passes = decode_part(data, DEFAULT_LIMITS)
    sizes = [one.batch * (one.past + one.seq) for one in passes.passes]
    if part.span.end > BLOCKS or max(sizes, default=0) > MAX_TOKENS or len(sizes) > MAX_PASSES:
        raise BadGraph("no host of this test takes it")
    check_part(part, passes, runner.outline)
    slots(part.graph, runner.outline, passes)
    runner.admission.admit(part, passes, data)
    for node in part.graph.nodes.values():
        held = consts.get(node.digest) if isinstance(node, Const) else None
        if isinstance(node, Const) and (
            held is None or spec_of(held) != TensorSpec(node.dtype, node.shape)
        ):
            raise BadGraph("a constant that nobody has")
    executor = Executor(runner._span(part.span), runner.outline, part, passes, consts, Nowhere())
    for stage in part.stages:
        hidden: Tensor | None = None
        tokens: Tensor | None = None
        inputs = PassInputs()
        if stage.forward:
            one = passes.passes[stage.pass_index]
            if one.group in executor.ended:
                continue
            if part.span.start == 0 or part.sampling is not None:
                inputs = PassInputs(torch.ones(one.batch, one.seq, dtype=torch.int64))
        for value, _ in stage.imports:
            if value == HIDDEN:
                hidden = torch.zeros(one.batch, one.seq, WIDTH)
            elif value == TOKENS:
                tokens = torch.ones(one.batch, dtype=torch.int64)
            else:
                spec = part.specs[value]
                executor.put(value, torch.zeros(spec.shape, dtype=to_torch_dtype(spec.dtype)))
        executor.run(stage, inputs, hidden, tokens)
    return part, passes


@pytest.mark.timeout(0 if SOAK else 120)
def test_a_changed_part_is_refused_or_run(tiny_folder: Callable[[str], Path]) -> None:
    runner = CuttingRunner(tiny_folder("llama"))
    samples = sample_parts(runner)
    choose = random.Random(SEED)
    ends: collections.Counter[str] = collections.Counter()
    for number in range(TRIES):
        data, experiment = choose.choice(samples)
        tree = msgpack.unpackb(data)
        if choose.random() < 0.6:
            graph = msgpack.unpackb(tree[8])
            mutate(graph, choose)
            tree[8] = msgpack.packb(graph)
        else:
            mutate(tree, choose)
        try:
            changed = msgpack.packb(tree)
        except OverflowError:
            continue
        try:
            run_as_a_peer(runner, changed, dict(experiment.consts))
            ends["ran"] += 1
        except GlasshiveError as error:
            ends[type(error).__name__] += 1
        except BaseException as error:
            error.add_note(f"try {number} of seed {SEED}")
            raise
    assert ends["ran"] > TRIES // 100, "too little comes past the checks"
    own = dict(load_plain(tiny_folder("llama")).named_parameters())
    for span in runner.spans.values():
        for name, weight in span.module.named_parameters():
            assert torch.equal(weight, own[name]), "a weight has changed"
        assert not [one for one in span.module.modules() if "forward" in vars(one)]
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in span.module.modules()]
        own_hooks = (not span.is_first) + (not span.is_last) + span.end - span.start
        assert sum(hooks) == own_hooks, "a hook was left"
