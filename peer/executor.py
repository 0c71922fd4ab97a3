"""Runs one peer's part of a trace: its stages, each on the hosted blocks, with the nodes as hooks.

- A node's bucket is the latest event among its inputs of the same stage. What needs only imports
  runs before the forward; nothing waits inside it.
- Hooks are put only on the modules that the part names, and taken off after each stage.
- A read is a copy of the invoke's rows; a write touches those rows only. `set` gives
  the model a new tensor, `inplace` copies into the one that it has (torch hooks do the same).
- Weights are never written: an in-place edit of memory that belongs to the model is refused.
- What the model may take for an index is looked at before an accelerator sees it.
- A stage that is cancelled or takes too long ends at the next node or block, not in a kernel.
- A step of a generation runs with the cache that its prompt's pass has begun, which may be a chunk
  of the prompt; the last span chooses the next tokens, and what is read or written of them comes
  after everything else of the pass.
- Everything here runs on the one torch thread of a peer, and knows no network.
"""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from glasshive.graph.errors import GraphError, NotASite, OverBudget, ShapeMismatch
from glasshive.graph.graph import (
    Call,
    Const,
    NodeId,
    Op,
    Param,
    Read,
    Save,
    Site,
    Skip,
    Write,
    is_effect,
    refs,
)
from glasshive.graph.kernels import run_op, to_torch_dtype
from glasshive.graph.kernels_checks import GuardedOps
from glasshive.graph.memory import is_out_of_memory
from glasshive.graph.order import Passes, event_of
from glasshive.graph.outline import GENERATOR, Leaf, Outline
from glasshive.graph.plan import HIDDEN, TOKENS, Part, Stage
from glasshive.graph.run import Interpreter
from glasshive.graph.tensor_trees import leaf_of, with_leaf
from glasshive.peer.borrowing import borrowing
from glasshive.peer.bypass import Bypass, Removable
from glasshive.peer.device import wait_for
from glasshive.peer.errors import NotEnoughMemory, TraceEnded
from glasshive.peer.generation import Generation, PassInputs
from glasshive.peer.memory_order import copy_in_order
from glasshive.peer.sampler import Sampler
from glasshive.peer.site_values import Replaced, SiteValues
from glasshive.peer.span_model import SpanModel, StopForward

_START = -1
_CHOSEN = Site(GENERATOR, "output")
_FAILURES = (
    *(RuntimeError, ValueError, TypeError, IndexError, NotImplementedError, OverflowError),
)

Bucket: TypeAlias = list[NodeId]
Aside: TypeAlias = Callable[[], contextlib.AbstractContextManager[None]]
GiveWay: TypeAlias = Callable[[Aside], None]


class Outbox(Protocol):
    """Where results go. Called on the torch thread; must not block."""

    def saved(self, name: str, value: Tensor) -> None:
        """A value for the client."""

    def exported(self, stage: Stage, value: NodeId, receiver: int, tensor: Tensor) -> None:
        """A value, HIDDEN or TOKENS, for another peer of the route."""


def _no_choice(error: Exception, node: NodeId | None) -> GraphError:
    reason = str(error).split("\n", 1)[0]
    return GraphError(
        f"no token can be chosen: {reason:.200}; save the logits of an earlier step to see whether "
        "they are numbers, and look at how tokens are to be chosen",
        node=node,
    )


class Executor:
    """One trace on one peer. `consts` are the user's tensors by digest.

    No node begins later than `stage_seconds` by `clock` after its stage. Before each, and each
    block, `on_step` is called, and `give_way`, which may run other traces' stages on the same model
    inside the context that it is given: what they take is not this stage's time.
    """

    def __init__(
        self,
        model: SpanModel,
        outline: Outline,
        part: Part,
        passes: Passes,
        consts: Mapping[bytes, Tensor],
        outbox: Outbox,
        *,
        stage_seconds: float = math.inf,
        on_step: Callable[[], None] = lambda: None,
        give_way: GiveWay = lambda aside: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._model = model
        self._outline = outline
        self._part = part
        self._passes = passes
        self._consts = consts
        self._outbox = outbox
        self._stage_seconds = stage_seconds
        self._on_step = on_step
        self._give_way = give_way
        self._clock = clock
        self._ends_at = math.inf
        self._values = Interpreter(
            part.graph,
            functools.partial(run_op, device=model.device, guarded=model.guarded),
            extra_uses=(v for s in part.stages for v, _ in s.exports if v not in (HIDDEN, TOKENS)),
        )
        self._users: dict[NodeId, set[NodeId]] = {node_id: set() for node_id in part.graph.nodes}
        self._kept = {value for stage in part.stages for value, _ in stage.exports}
        for node_id, node in part.graph.nodes.items():
            for ref in refs(node):
                if is_effect(node):
                    self._kept.add(ref)
                elif ref in self._users:
                    self._users[ref].add(node_id)
        self._sites = SiteValues(model.module, outline, passes)
        self._skipped: dict[tuple[str, int], Tensor] = {}
        self._generations: dict[int, Generation] = {}  # by the pass of the prompt
        self.ended: set[int] = set()
        """The generations of which no more steps come, by the pass of the prompt."""
        self._last_write: NodeId | None = None
        self._is_off = False  # its hooks: a module runs on the side, or another trace's stage
        self._cancelled = False

    def cancel(self) -> None:
        """End the run at the next node, or module that the part names. From any thread."""
        self._cancelled = True

    def forget(self) -> None:
        """Let go of every tensor; no stage is run any more. Not while one is."""
        for held in (self._values, self._skipped, self._generations):
            held.clear()
        self._consts = {}

    def put(self, value: NodeId, tensor: Tensor) -> None:
        """Give in a value that another peer computed, from any device."""
        self._values.put(value, tensor.to(self._model.device))

    def leave_out(self, nodes: Iterable[NodeId], exports: Iterable[tuple[NodeId, int]]) -> None:
        """Nodes and exports of a stage never come: forget what only they use. Between stages."""
        for node_id in nodes:
            for ref in refs(self._part.graph.nodes[node_id]):
                self._values.give_up(ref)
        for value, _ in exports:
            if value >= 0:
                self._values.give_up(value)

    def end(self, group: int) -> None:
        """No more steps of that generation come: forget what it keeps. Between stages."""
        self.ended.add(group)
        self._generations.pop(group, None)

    def run(
        self,
        stage: Stage,
        inputs: PassInputs,
        hidden: Tensor | None,
        tokens: Tensor | None = None,
    ) -> None:
        """Run one stage and wait until the device has done it.

        `inputs`, `hidden` (`[batch, seq, hidden]`, where the stage imports it) and `tokens` (int64
        `[batch]`, where it does) may be on any device. The stages of a generation run in order;
        `inputs` are those of the whole prompt, at its first pass.

        Raises GraphError naming the node that failed, or before which the stage had to end, and
        NotEnoughMemory, wherever that ran out: the graph was found to fit, and is not to blame.
        """
        try:
            self._run(stage, inputs, hidden, tokens)
        except Exception as error:
            if not is_out_of_memory(error.__cause__ or error):
                raise
            raise NotEnoughMemory(
                f"memory ran out on {self._model.device} while blocks {self._part.span} ran, with "
                "what else takes memory there; run fewer or shorter prompts at a time, or leave "
                "this peer out with avoid="
            ) from error

    def _run(
        self, stage: Stage, inputs: PassInputs, hidden: Tensor | None, tokens: Tensor | None
    ) -> None:
        self._ends_at = self._clock() + self._stage_seconds
        self._go_on()
        device = self._model.device
        inputs = self._inputs(stage, inputs, None if tokens is None else tokens.to(device))
        hidden = None if hidden is None else hidden.to(device)
        try:
            with torch.no_grad():
                for value, invoke in stage.from_hidden:
                    if hidden is None:
                        raise NotASite("rows of hidden states that did not arrive", node=value)
                    first, last = self._passes.rows(invoke)
                    self._values.put(value, hidden[first:last].clone())
                buckets = self._buckets(stage)
                self._run_bucket(buckets.pop(_START, []))
                self._export(stage, buckets, None)
                if stage.forward:
                    self._forward(stage, buckets, inputs, hidden)
        finally:
            # So that what a stage takes is seen, also of one that failed, and late work is overdue.
            wait_for(device)

    def _inputs(self, stage: Stage, inputs: PassInputs, tokens: Tensor | None) -> PassInputs:
        """What enters the pass. Begins a generation with its prompt."""
        if not stage.forward or (one := self._passes.passes[stage.pass_index]).group < 0:
            return inputs.on(self._model.device)
        if not one.past:
            self._generations.clear()  # a part may leave out the last steps of the one before
            try:
                begun = Generation.begin(
                    self._model,
                    inputs.on(self._model.device),
                    one,
                    self._part.sampling,
                    self._passes.new_tokens(stage.pass_index),
                )
            except _FAILURES as error:
                raise _no_choice(error, None) from error
            self._generations[one.group] = begun
        begun = self._generations[one.group]
        if one.step <= 0:
            return begun.prompt.of_chunk(one.past, one.seq)
        if tokens is None and begun.sampler is not None:
            tokens = begun.sampler.tokens  # chosen here
        return begun.prompt.of_step(one.step, tokens, masked=self._outline.steps().masked)

    def _buckets(self, stage: Stage) -> dict[int, Bucket]:
        when: dict[NodeId, int] = {}
        buckets: dict[int, Bucket] = {}
        for node_id in stage.nodes:
            node = self._part.graph.nodes[node_id]
            if isinstance(node, Read | Write | Skip):
                event = event_of(node, self._outline)
            else:
                event = max((when.get(ref, _START) for ref in refs(node)), default=_START)
            when[node_id] = event
            buckets.setdefault(event, []).append(node_id)
        return buckets

    def _forward(
        self, stage: Stage, buckets: dict[int, Bucket], inputs: PassInputs, hidden: Tensor | None
    ) -> None:
        is_edited = any(map(self._reaches_indices, stage.nodes))
        one = self._passes.passes[stage.pass_index]
        generation = self._generations.get(one.group)
        chosen = self._outline.event(_CHOSEN) if generation is not None else None
        at_choice = buckets.pop(chosen, []) if chosen is not None else []
        with contextlib.ExitStack() as hooks:
            for handle in self._hooks(stage, buckets):
                hooks.callback(handle.remove)
            try:
                output = self._model.run(
                    input_ids=inputs.input_ids if self._model.is_first else None,
                    hidden=hidden,
                    attention_mask=inputs.attention_mask,
                    position_ids=inputs.position_ids,
                    cache=None if generation is None else generation.cache,
                    last_only=generation is not None,
                    is_edited=is_edited,
                    before_block=self._go_on,
                )
            except _FAILURES as error:
                reason = str(error).split("\n", 1)[0]
                written = "" if self._last_write is None else " after what was written here"
                raise GraphError(
                    f"the model's forward pass failed{written}: {reason:.200}",
                    node=self._last_write,
                ) from error
        for value, receiver in stage.exports:
            if value == HIDDEN:
                if output is None:
                    raise NotASite("the forward ended before the hidden states left the span")
                self._outbox.exported(stage, HIDDEN, receiver, output)
        if generation is not None:
            if generation.sampler is not None and output is not None and one.step >= 0:
                self._choose(stage, generation.sampler, at_choice, output)
            if not self._passes.goes_on(stage.pass_index):
                self._generations.pop(one.group, None)

    def _choose(self, stage: Stage, sampler: Sampler, bucket: Bucket, logits: Tensor) -> None:
        """Choose the next tokens, let the graph see and change them, and send them on."""
        try:
            chosen = sampler.choose(logits)
        except _FAILURES as error:
            raise _no_choice(error, self._last_write) from error
        tokens = self._run_bucket(bucket, chosen)
        event = self._outline.event(_CHOSEN)
        self._export(stage, {event: bucket}, event)
        try:
            sampler.take(tokens)
        except GraphError as error:
            error.node = self._last_write
            raise
        if sampler.has_ended:
            self.end(self._passes.passes[stage.pass_index].group)
            return
        for value, receiver in stage.exports:
            if value == TOKENS:
                self._outbox.exported(stage, TOKENS, receiver, tokens)

    def _hooks(self, stage: Stage, buckets: dict[int, Bucket]) -> Iterator[Removable]:
        """What is put on the modules for this stage, each as soon as it is there."""
        for module, event, bucket, io in self._hooked(stage, buckets):
            if io == "input":
                hook = self._input_hook(stage, event, bucket)
                yield module.register_forward_pre_hook(hook, with_kwargs=True)
            else:
                after = self._output_hook(stage, event, bucket)
                yield module.register_forward_hook(after, prepend=True)
        yield from self._skip_modules(stage)  # last, so that they come before the others

    def _reaches_indices(self, node_id: NodeId) -> bool:
        """Whether the model may take for an index what this node gives it, as an embedding does.

        Before the blocks a module may even make positions of a mask of floats; later, only numbers
        that are integers already.
        """
        node = self._part.graph.nodes[node_id]
        if not isinstance(node, Write | Skip):
            return False
        if self._outline.block(event_of(node, self._outline)) < 0:
            return True
        return not to_torch_dtype(self._sites.leaf(node).dtype).is_floating_point

    @contextlib.contextmanager
    def _aside(self) -> Iterator[None]:
        """Inside it, stages of other traces may run on the same modules."""
        wait_for(self._model.device)  # what it still works on is this stage's time, not theirs
        began = self._clock()
        self._is_off = True
        try:
            with self._model.paused():
                yield
        finally:
            self._is_off = False
            self._ends_at += self._clock() - began
        self._check_cancelled()

    def _go_on(self) -> None:
        """Return if the stage may go on."""
        self._check_cancelled()
        if self._clock() > self._ends_at:
            raise OverBudget(
                f"the part was ended before this was done: it has taken {self._stage_seconds:.3g} "
                "s, far more than this peer had reckoned with; split the work over several traces"
            )
        self._on_step()
        if not self._model.is_looking:  # others would be looked at as well
            self._give_way(self._aside)

    def _check_cancelled(self) -> None:
        if self._cancelled:
            raise TraceEnded("the trace was cancelled")

    def _skip_modules(self, stage: Stage) -> Iterator[Removable]:
        """Have skipped modules give what the graph says instead of what they compute."""
        skipped: dict[str, set[int]] = {}
        for node_id in stage.nodes:
            node = self._part.graph.nodes[node_id]
            if isinstance(node, Skip):
                skipped.setdefault(node.module, set()).add(node.invoke)
        one = self._passes.passes[max(stage.pass_index, 0)]
        for path, invokes in skipped.items():
            (leaf,) = self._outline.leaves(path, "output", one.kind)
            module = self._model.at(path)
            if invokes == set(one.invokes) and leaf.path == () and leaf.batch_axis is not None:
                give = functools.partial(self._skipped_output, path, one.invokes, leaf.batch_axis)
                yield Bypass(module, give, lambda: self._is_off)
            else:  # other rows need it, or its output holds more than the value: it runs
                give = functools.partial(self._put_skipped, path, sorted(invokes), leaf, one.step)
                yield module.register_forward_hook(give, prepend=True)

    def _skipped_output(self, path: str, invokes: tuple[int, ...], axis: int) -> Tensor:
        return torch.cat([self._skipped.pop((path, invoke)) for invoke in invokes], axis)

    def _put_skipped(
        self,
        path: str,
        invokes: list[int],
        leaf: Leaf,
        step: int,
        module: nn.Module,
        args: Any,
        output: Any,
    ) -> Any:
        if self._is_off:
            return None
        whole = leaf_of(output, leaf.path).clone()
        for invoke in invokes:
            site = Site(path, "output", leaf.path, step)
            rows = self._sites.rows(Read(site, invoke), whole)
            rows.copy_(self._skipped.pop((path, invoke)))
        return with_leaf(output, leaf.path, whole)

    def _hooked(
        self, stage: Stage, buckets: dict[int, Bucket]
    ) -> Iterator[tuple[nn.Module, int, Bucket, str]]:
        wanted = dict(buckets)
        if stage.stop_event is not None:
            wanted.setdefault(stage.stop_event, [])
        for event, bucket in wanted.items():
            for path, io in self._sites_at.get(event, ()):
                yield self._model.at(path), event, bucket, io

    @functools.cached_property
    def _sites_at(self) -> Mapping[int, Sequence[tuple[str, str]]]:
        """Paths of modules, and "input" or "output", by the event at which these are there."""
        found: dict[int, list[tuple[str, str]]] = {}
        for path, info in self._outline.modules.items():
            for event, io in ((info.input_event, "input"), (info.output_event, "output")):
                if event is not None:
                    found.setdefault(event, []).append((path, io))
        return found

    def _input_hook(self, stage: Stage, event: int, bucket: Bucket) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            if self._is_off:
                return None
            tree = self._at_event(stage, event, bucket, {"args": args, "kwargs": kwargs})
            return (tree["args"], tree["kwargs"])

        return hook

    def _output_hook(self, stage: Stage, event: int, bucket: Bucket) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            return None if self._is_off else self._at_event(stage, event, bucket, output)

        return hook

    def _at_event(self, stage: Stage, event: int, bucket: Bucket, tree: Any) -> Any:
        tree = self._run_bucket(bucket, tree)
        self._export(stage, {event: bucket}, event)
        if event == stage.stop_event:
            raise StopForward
        return tree

    def _export(self, stage: Stage, buckets: Mapping[int, Bucket], event: int | None) -> None:
        """Send on what is there now: at `event`, or (None) before the forward."""
        made = set(buckets.get(event, ())) if event is not None else None
        later = {i for bucket in buckets.values() for i in bucket} if event is None else set()
        for value, receiver in stage.exports:
            if value in (HIDDEN, TOKENS):
                continue
            if (made is not None and value in made) or (made is None and value not in later):
                tensor = self._values.take(value)
                self._outbox.exported(stage, value, receiver, tensor)

    def _run_bucket(self, bucket: Bucket, tree: Any = None) -> Any:
        """Run nodes in order; returns `tree` with the writes applied to it."""
        if not bucket:
            return tree
        replaced: Replaced = {}
        borrowed, settled = borrowing(self._part.graph.nodes, bucket, self._users, self._kept)
        for node_id in bucket:
            node = self._part.graph.nodes[node_id]
            try:
                self._go_on()
                if isinstance(node, Op):
                    value = self._values.run(node_id, node)
                    if node_id in settled:
                        value = copy_in_order(value)
                    self._values.put(node_id, value)
                elif isinstance(node, Read):
                    rows = self._sites.read(node, tree)
                    if node_id not in borrowed:
                        rows = copy_in_order(rows)
                    self._values.put(node_id, rows)
                elif isinstance(node, Write):
                    self._last_write = node_id
                    value = self._values.take(node.value.node)
                    tree = self._sites.write(node, value, tree, replaced)
                elif isinstance(node, Skip):
                    value = self._values.take(node.value.node)
                    self._sites.check_fits(node, value)
                    self._skipped[node.module, node.invoke] = value
                elif isinstance(node, Const):
                    self._values.put(node_id, self._consts[node.digest])
                elif isinstance(node, Call):
                    self._values.put(node_id, self._call(node))
                elif isinstance(node, Param):
                    self._values.put(node_id, self._param(node))
                elif isinstance(node, Save):
                    self._outbox.saved(node.name, self._values.take(node.value.node))
            except GraphError as error:
                if error.node is None:
                    error.node = node_id
                raise
        return tree

    def _call(self, node: Call) -> Tensor:
        module = self._model.at(node.module)
        # Copies: a module may give its argument back, or change it in place.
        args = [copy_in_order(arg) for arg in self._values.arguments(node.args)]
        self._is_off = True
        try:
            guard = GuardedOps() if self._model.guarded else contextlib.nullcontext()
            with self._model.paused(), guard:
                result = module(*args)
        except _FAILURES as error:
            reason = str(error).split("\n", 1)[0]
            raise ShapeMismatch(f"{node.module}(...): {reason}") from error
        finally:
            self._is_off = False
        if not isinstance(result, Tensor):
            raise NotASite(
                f"{node.module}(...) gives a {type(result).__name__}; only modules that give one "
                "tensor can be called"
            )
        return result

    def _param(self, node: Param) -> Tensor:
        module = self._model.at(node.module)
        found = dict(module.named_parameters(recurse=False)) | dict(
            module.named_buffers(recurse=False)
        )
        if node.name not in found:
            raise NotASite(f"{node.module} has no parameter {node.name!r}")
        return found[node.name].detach()
