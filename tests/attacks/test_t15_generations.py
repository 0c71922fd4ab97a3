"""T15: a peer of a generation lies about tokens or ends, toward other peers and the client.

Three hosts in this process, one of which is hostile in one way. Never is there a wrong result, and
who lied is named. And a client's plan that would hold more than it was billed for.

Seen failing, each alone: with the look at tokens taken out of `HostedTrace._next_value`, the token
on an edge; with `Experiment.objection` empty, the one to the client; with `HostedTrace._check_end`
empty, the ends; with generations that `Executor._inputs` does not clear, the caches; with
`Executor.leave_out` empty, the values; with the rule for tokens taken out of `check_part`, the
stage without blocks, and with that for the shapes of `from_hidden`, the hidden states.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llama import save_llama
from torch import Tensor
from transformers import LlamaForCausalLM

import glasshive
from glasshive.client.errors import BadAnswer, PeerError
from glasshive.dht.framing import Stream
from glasshive.dht.messages import Dropped
from glasshive.graph.codec import DEFAULT_LIMITS
from glasshive.graph.errors import BadGraph
from glasshive.graph.graph import Graph, NodeId, Read, Ref, Save, Site
from glasshive.graph.order import Pass, Passes, steps_of
from glasshive.graph.plan import HIDDEN, TOKENS, Part, Span, Stage, check_part
from glasshive.graph.plan_codec import decode_part, encode_part
from glasshive.graph.sampling import Sampling
from glasshive.graph.tensors import TensorSpec
from glasshive.peer.admission import Admission
from glasshive.peer.executor import Executor
from glasshive.peer.generation import PassInputs
from glasshive.peer.host_limits import HostLimits
from glasshive.peer.hosted_trace import HostedTrace
from glasshive.peer.outgoing_edge import OutgoingEdge, Sendable
from glasshive.peer.served_model import ServedModel

PROMPT = torch.tensor([[3, 14, 15, 9, 26]])
NEW = 6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = save_llama(tmp_path_factory.mktemp("models") / "tiny", 6)
    return glasshive.local(folder, cuts=(2, 4))


@pytest.fixture(params=[0, 2], ids=["run once", "outliving its peers"])
def generate(request: pytest.FixtureRequest, model: Any) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with model.generate(
            PROMPT, max_new_tokens=NEW, eos_token_id=[], retries=request.param, deadline=20
        ) as tracer:
            for _ in tracer.iter[:]:
                model.model.layers[3].output.save()
        ids: Tensor = tracer.output_ids
        return ids

    return run


def culprit(error: PeerError, model: Any) -> str:
    """The blocks of the peer that is to blame."""
    lines = model._runner.describe().splitlines()
    return next(line for line in lines if error.peer in line).split()[1]


@pytest.mark.parametrize("token", [-1, 64, 2**40])
def test_a_token_outside_the_vocabulary_never_reaches_an_embedding(
    token: int, generate: Callable[[], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    exported = HostedTrace.exported

    def lie(self: HostedTrace, stage: Stage, value: NodeId, to: int, tensor: Tensor) -> None:
        exported(self, stage, value, to, torch.full_like(tensor, token) if value < -1 else tensor)

    monkeypatch.setattr(HostedTrace, "exported", lie)
    with pytest.raises(PeerError, match=r"part 2\) broke the protocol: tokens of pass 0 outside"):
        generate()


def test_a_token_outside_the_vocabulary_is_taken_by_no_client(
    model: Any, generate: Callable[[], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = HostedTrace.saved

    def lie(self: HostedTrace, name: str, value: Tensor) -> None:
        saved(self, name, torch.full_like(value, -7) if name.startswith("t") else value)

    monkeypatch.setattr(HostedTrace, "saved", lie)
    with pytest.raises(BadAnswer, match=r"t0\.0 holds a token outside the vocabulary") as caught:
        generate()
    assert caught.value.peer in str(caught.value)


@pytest.mark.parametrize(
    ("value", "index", "text"),
    [
        (HIDDEN, 1, r"part 1\) broke the protocol: hidden states of pass 2 are dropped too early"),
        # It would not say this of itself; whoever does, nobody takes the end.
        (TOKENS, 2, r"part 1\) broke the protocol: hidden states of pass 3 are dropped too early"),
    ],
    ids=["by a middle peer", "by the last"],
)
def test_an_end_that_no_token_says_is_no_result(
    value: NodeId,
    index: int,
    text: str,
    generate: Callable[[], Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    send = OutgoingEdge._send

    async def lie(self: OutgoingEdge, stream: Stream, item: Sendable) -> None:
        at = item.message.pass_index
        if self._request.part_index == index and item.message.value == value and at >= 2:
            item = Sendable(Dropped(value, at), memoryview(b""))
        await send(self, stream, item)

    monkeypatch.setattr(OutgoingEdge, "_send", lie)
    with pytest.raises(PeerError, match=text):
        generate()


def test_the_hosts_serve_on(
    model: Any, generate: Callable[[], Tensor], tmp_path_factory: pytest.TempPathFactory
) -> None:
    plain: Any = LlamaForCausalLM.from_pretrained(
        save_llama(tmp_path_factory.mktemp("again") / "tiny", 6), attn_implementation="sdpa"
    )
    wanted = plain.eval().generate(
        PROMPT,
        attention_mask=torch.ones_like(PROMPT),
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=None,
    )
    assert torch.equal(generate(), wanted)


# A client's plan ----------------------------------------------------------------------------------


class Nowhere:
    """Takes what a part makes, and keeps nothing."""

    def saved(self, name: str, value: Tensor) -> None:
        """Nothing."""

    def exported(self, stage: Stage, value: NodeId, receiver: int, tensor: Tensor) -> None:
        """Nothing."""


def prompts(count: int, new_tokens: int) -> Passes:
    """So many prompts of one length, each with passes of its own."""
    passes: list[Pass] = []
    for index in range(count):
        prompt = Pass((index,), 5, False, ((0, 1),))
        passes += steps_of(prompt, new_tokens, len(passes))
    return Passes(tuple(passes))


def executor_of(served: ServedModel, part: Part, passes: Passes) -> tuple[Executor, int]:
    """What runs a part that passed all checks, and the bytes that it was billed."""
    data = encode_part(part, passes)
    part, passes = decode_part(data, DEFAULT_LIMITS)
    check_part(part, passes, served.outline)
    admission = Admission(served.outline, served.twin, HostLimits().budget, served.pace)
    bill = admission.admit(part, passes, data)
    made = Executor(served.model, served.outline, part, passes, {}, Nowhere())
    return made, bill.peak_bytes


def test_caches_of_prompts_that_never_go_on_do_not_pile_up(served: ServedModel) -> None:
    passes = prompts(20, 2)
    stages = tuple(
        Stage(index, (), forward=True) for index, one in enumerate(passes.passes) if not one.step
    )
    part = Part(0, Span(0, 2), Graph({}), stages, {}, Sampling())
    executor, billed_bytes = executor_of(served, part, passes)
    for stage in stages:
        executor.run(stage, PassInputs(PROMPT), None)
    held = [one.cache.held_bytes() for one in executor._generations.values()]
    assert len(held) == 1
    assert sum(held) <= billed_bytes


def test_values_of_steps_that_never_come_are_forgotten(served: ServedModel) -> None:
    """Each prompt leaves a value for its step 1, and ends before."""
    passes = prompts(4, 2)
    site, nodes, stages = Site("model.layers.0", "output"), {}, []
    for index in range(4):
        value, late = NodeId(2 * index), NodeId(2 * index + 1)
        nodes |= {value: Read(site, index), late: Save(Ref(value), f"s{index}")}
        stages += [
            Stage(2 * index, (value,), forward=True),
            Stage(2 * index + 1, (late,), forward=True),
        ]
    part = Part(0, Span(0, 2), Graph(nodes), tuple(stages), {}, Sampling())
    executor, _ = executor_of(served, part, passes)
    for first, second in zip(stages[::2], stages[1::2], strict=True):
        executor.run(first, PassInputs(PROMPT), None)
        executor.end(first.pass_index)
        executor.leave_out(second.nodes, second.exports)
        assert len(executor._values) == 0


def test_tokens_come_to_no_stage_without_blocks(served: ServedModel) -> None:
    passes = prompts(1, 2)
    stage = Stage(-1, (), imports=((TOKENS, 1), (TOKENS, 1)))
    part = Part(0, Span(0, 1), Graph({}), (stage,), {})
    with pytest.raises(BadGraph, match="tokens come to a stage that runs no blocks"):
        check_part(part, passes, served.outline)


def test_what_is_taken_off_hidden_states_is_as_large_as_they_are(served: ServedModel) -> None:
    passes = prompts(1, 0)
    value = NodeId(0)
    stage = Stage(0, (NodeId(1),), imports=((HIDDEN, 0),), from_hidden=((value, 0),), forward=True)
    graph = Graph({NodeId(1): Save(Ref(value), "s")}, frozenset([value]))
    wanted = served.outline.hidden_spec(1, 5)
    for spec, is_good in ((wanted, True), (TensorSpec(wanted.dtype, (1,)), False)):
        part = Part(1, Span(1, 2), graph, (stage,), {value: spec})
        if is_good:
            check_part(part, passes, served.outline)
            continue
        with pytest.raises(BadGraph, match=r"not the invoke's float32\[1, 5, 32\] of the hidden"):
            check_part(part, passes, served.outline)
