"""Random programs of edits that run twice: as a trace, and in torch hooks on the plain model.

A program is, for every invoke, a list of steps in the order of the model's events; so "what a hook
does" has one meaning. All invokes are rows of one batch. A step sees its site through `here`, which
is glasshive's module or a stand-in with the rows of a real tensor, and writes the same Python.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

HIDDEN = 32
PLACES = (
    ("", "input"),
    ("input_layernorm", "input"),
    ("input_layernorm", "output"),
    ("self_attn.o_proj", "input"),
    ("self_attn.o_proj", "output"),
    ("self_attn", "output"),
    ("post_attention_layernorm", "input"),
    ("mlp", "input"),
    ("mlp.down_proj", "input"),
    ("mlp", "output"),
    ("", "output"),
)
KINDS = range(14)
Env = dict[str, Any]


@dataclass(frozen=True)
class Step:
    """What one invoke does at one site. `work` reads `here.value` and may assign to it."""

    path: str
    io: str
    work: Callable[[Any, Env], None]


@dataclass
class Program:
    """The steps of every invoke in the order of events, and the names of what is saved."""

    prompts: list[list[list[int]]]
    steps: list[list[Step]]
    saved: list[str]


def make_program(seed: int, n_blocks: int, event_of: Callable[[str, str], int]) -> Program:
    """The program of a seed. `event_of(path, io)` orders the sites."""
    choose = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    sites = [("model.embed_tokens", "output"), ("model.norm", "input"), ("lm_head", "input")]
    for block in range(n_blocks):
        for part, io in PLACES:
            sites.append((f"model.layers.{block}{'.' if part else ''}{part}", io))
    sites.sort(key=lambda site: event_of(*site))
    prompts, steps = [], []
    known: list[tuple[str, int, tuple[int, ...]]] = []  # name, event, shape
    for invoke in range(choose.choice([1, 1, 2, 3])):
        batch = choose.choice([1, 1, 2])
        prompts.append([[choose.randrange(1, 64) for _ in range(6)] for _ in range(batch)])
        mine = []
        for index, (path, io) in enumerate(sorted(choose.sample(sites, 7), key=sites.index)):
            event = event_of(path, io)
            width = 48 if path.endswith("down_proj") else HIDDEN
            shape = (batch, 6, width)
            usable = [name for name, at, size in known if at <= event and size == shape]
            name = f"v{invoke}.{index}"
            work = _work(choose, generator, name, usable, shape)
            mine.append(Step(path, io, work))
            known.append((name, event, shape))
        steps.append(mine)
    names = [name for name, _, _ in known]
    return Program(prompts, steps, choose.sample(names, min(3, len(names))))


def _work(
    choose: random.Random,
    generator: torch.Generator,
    name: str,
    usable: list[str],
    shape: tuple[int, ...],
) -> Callable[[Any, Env], None]:
    """A few actions at one site; afterwards the environment knows its value as `name`."""
    actions = [
        _action(choose, generator, usable, shape) for _ in range(choose.choice([0, 1, 1, 2, 3]))
    ]
    keep_at = choose.randrange(len(actions) + 1)

    def work(here: Any, env: Env) -> None:
        for index, action in enumerate(actions):
            if index == keep_at:
                env[name] = here.value.clone()
            action(here, env)
        if keep_at == len(actions):
            env[name] = here.value.clone()

    return work


def _action(
    choose: random.Random, generator: torch.Generator, usable: list[str], shape: tuple[int, ...]
) -> Callable[[Any, Env], None]:
    noise = torch.randn(shape, generator=generator)
    row = torch.randn(shape[-1], generator=generator)
    source = choose.choice(usable) if usable and choose.random() < 0.8 else None
    one, two, width = choose.randrange(6), choose.randrange(6), shape[-1]
    feature = choose.randrange(width)
    kind = choose.choice(KINDS)

    def value(env: Env) -> Any:
        return noise if source is None else env[source]

    def act(here: Any, env: Env) -> None:
        if kind == 0:
            here.value[:, one] = value(env)[:, two]
        elif kind == 1:
            here.value[:] = value(env) * 0.5
        elif kind == 2:
            here.value += row
        elif kind == 3:
            here.value = here.value * 0.5 + value(env)
        elif kind == 4:
            here.value = torch.tanh(value(env)).flip(1)
        elif kind == 5:
            here.value.view(*shape[:2], 4, width // 4).transpose(1, 2)[:, 1, one:] = 0.25
        elif kind == 6:
            here.value.mT[:, feature] *= -1
        elif kind == 7:
            old = here.value
            here.value = old.clamp(-1, 1)
            old[:, two] = 0  # the memory that the model had, which other modules may share
        elif kind == 8:
            new = value(env) + here.value
            here.value = new
            new[:, one] = row
        elif kind == 9:
            here.value = here.value.view(shape[0], 6 * width).view(shape)
            here.value[..., feature] = 1
        elif kind == 10:
            scores = (here.value @ value(env).transpose(1, 2) / 32).softmax(-1)
            here.value[:, :3].add_((scores @ here.value)[:, 3:], alpha=0.5)
        elif kind == 11:
            here.value[:, [0, 3]] = here.value[:, [3, 0]].clone()
        elif kind == 12:
            here.value.masked_fill_(here.value > 1, 0.5)
        else:
            here.value[0].t()[feature].zero_()

    return act


# As a trace ------------------------------------------------------------------------------------


class _TracedPlace:
    """`value` at a site of a trace."""

    def __init__(self, module: Any, io: str) -> None:
        self._module = module
        self._io = io

    @property
    def value(self) -> Any:
        found = getattr(self._module, self._io)
        return found[0] if isinstance(found, tuple) else found

    @value.setter
    def value(self, new: Any) -> None:
        if self._module.path.endswith("self_attn"):
            new = (new, None)
        setattr(self._module, self._io, new)


def run_traced(program: Program, model: Any, at: Callable[[Any, str], Any]) -> Mapping[str, Tensor]:
    """What is saved, and the logits of every invoke as `logits0`, `logits1`, ..."""
    env: Env = {}
    out: dict[str, Any] = {}
    with model.trace() as tracer:
        for index, (prompt, steps) in enumerate(zip(program.prompts, program.steps, strict=True)):
            with tracer.invoke(prompt):
                for step in steps:
                    step.work(_TracedPlace(at(model, step.path), step.io), env)
                out[f"logits{index}"] = model.lm_head.output.save()
        out |= {name: env[name].save() for name in program.saved}
    return out


# In hooks --------------------------------------------------------------------------------------


@dataclass
class _RealPlace:
    """`value` at a site of the real model, for the rows of one invoke."""

    value: Tensor
    given: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.given = self.value


def run_hooked_program(program: Program, plain: nn.Module) -> Mapping[str, Tensor]:
    """The same in one forward pass of the plain model with torch hooks."""
    env: Env = {}
    starts = [0]
    for prompt in program.prompts:
        starts.append(starts[-1] + len(prompt))
    by_site: dict[tuple[str, str], list[tuple[int, Step]]] = {}
    for invoke, steps in enumerate(program.steps):
        for step in steps:
            by_site.setdefault((step.path, step.io), []).append((invoke, step))

    def visit(path: str, io: str, whole: Tensor) -> Tensor:
        places = []
        for invoke, step in by_site[path, io]:
            place = _RealPlace(whole[starts[invoke] : starts[invoke + 1]])
            step.work(place, env)
            places.append((invoke, place))
        replaced = [(i, place.value) for i, place in places if place.value is not place.given]
        if replaced:
            whole = whole.clone()
            for invoke, new in replaced:
                whole[starts[invoke] : starts[invoke + 1]] = new
        return whole

    def before(path: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            if args:
                return (visit(path, "input", args[0]), *args[1:]), kwargs
            first = next(iter(kwargs))
            return args, {**kwargs, first: visit(path, "input", kwargs[first])}

        return hook

    def after(path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (visit(path, "output", output[0]), *output[1:])
            return visit(path, "output", output)

        return hook

    handles = []
    for path, io in by_site:
        module = plain.get_submodule(path)
        if io == "input":
            handles.append(module.register_forward_pre_hook(before(path), with_kwargs=True))
        else:
            handles.append(module.register_forward_hook(after(path)))
    try:
        with torch.no_grad():
            ids = torch.tensor([row for prompt in program.prompts for row in prompt])
            logits = plain(input_ids=ids, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    out = {name: env[name] for name in program.saved}
    for index in range(len(program.prompts)):
        out[f"logits{index}"] = logits[starts[index] : starts[index + 1]]
    return out
