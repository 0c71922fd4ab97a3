"""A generation outlives its peers: what others go on with is bit-equal to what was never disturbed.

Hosts in this process; tests/swarm/test_generation.py has the same with processes that are killed,
and test_relay.py peers that can't reach each other.
"""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
from generation_oracle import generate_hooked
from replicas import Replicas, load
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from waits import wait_for

from glasshive.client import left_out, runner, step_watch
from glasshive.client.errors import PeerFailed, PeerLost
from glasshive.client.job import Job
from glasshive.client.step_watch import StepLimits
from glasshive.graph.errors import OverBudget, ShapeMismatch
from glasshive.graph.plan import Stage
from glasshive.peer import client_stream
from glasshive.peer.errors import Busy
from glasshive.peer.executor import Executor
from glasshive.peer.served_model import ServedModel
from glasshive.security.keys import PeerId

NEW = 16
PROMPT = torch.tensor([[3, 14, 15, 92, 65, 35, 89, 79, 32, 38]])
CUTS = (2, 4)


@pytest.fixture(scope="module")
def get_served(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """A plain model and the spans of it, by kind; each is made once."""
    made: dict[str, tuple[Any, list[ServedModel]]] = {}

    def get(kind: str) -> tuple[Any, list[ServedModel]]:
        if kind not in made:
            attention = "eager" if "mamba" in kind else "sdpa"
            torch.manual_seed(0)
            config = CONFIG_MAPPING[kind](**{**architectures.TINY[kind], "eos_token_id": None})
            whole = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
            folder: Path = tmp_path_factory.mktemp(kind)
            whole.eval().requires_grad_(False).save_pretrained(folder)
            plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention)
            made[kind] = plain.eval().requires_grad_(False), load(folder, attention, CUTS)
        return made[kind]

    return get


@pytest.fixture
def make(
    get_served: Callable[[str], Any],
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Callable[[str], tuple[Any, Replicas]]]:
    """A plain model, and two hosts for each span of it."""
    running: list[Replicas] = []

    def start(kind: str) -> tuple[Any, Replicas]:
        plain, served = get_served(kind)
        running.append(Replicas(served, tmp_path_factory.mktemp("cache"), monkeypatch))
        return plain, running[-1]

    yield start
    for one in running:
        one.__exit__()


@pytest.fixture
def llama(make: Callable[[str], tuple[Any, Replicas]]) -> tuple[Any, Replicas]:
    return make("llama")


def blocks_of(model: Any) -> Any:
    here = model
    for name in model.outline.blocks_path.split("."):
        here = getattr(here, name)
    return here


def steered(model: Any, **options: Any) -> tuple[Any, list[Any], list[Any]]:
    """A generation with an edit on the first span and reads on both others, at each step."""
    blocks, states, logits = blocks_of(model), [], []
    options = {"eos_token_id": [], "deadline": 60, **options}
    with model.generate(PROMPT, max_new_tokens=NEW, **options) as tracer:
        for _ in tracer.iter[:]:
            blocks[1].output[:, -1] += 1.5
            states.append(blocks[3].output.save())
            logits.append(model.lm_head.output[:, -1].save())
    return tracer, states, logits


def oracle(
    plain: Any, blocks_path: str, **choice: Any
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The same by transformers' `generate` and hooks, from the last chunk of a prompt on."""
    earlier = (PROMPT.shape[1] - 1) // choice.get("prefill_chunk_size", PROMPT.shape[1])

    def steer(step: int, output: Tensor) -> None:
        if step >= earlier:
            output[:, -1] += 1.5

    block = f"{blocks_path}.3"
    ids, found = generate_hooked(
        plain,
        PROMPT,
        NEW,
        reads=[block, "lm_head"],
        edits={f"{blocks_path}.1": steer},
        eos_token_id=None,
        **choice,
    )
    return ids, found[block][earlier:], [one[:, -1] for one in found["lm_head"][earlier:]]


def check(
    plain: Any, hive: Replicas, found: tuple[Any, list[Any], list[Any]], **choice: Any
) -> None:
    tracer, states, logits = found
    ids, wanted_states, wanted_logits = oracle(plain, hive.model.outline.blocks_path, **choice)
    assert torch.equal(tracer.output_ids, ids)
    assert len(states) == len(logits) == NEW
    assert all(map(torch.equal, states, wanted_states))
    assert all(map(torch.equal, logits, wanted_logits))


OLD_SECONDS = 100.0  # by which every record has expired


@pytest.mark.parametrize(
    ("lost", "at"),
    [
        *itertools.product([(0,), (1,), (2,)], [0, NEW // 2, NEW - 2]),
        *itertools.product([(0, 1), (1, 2), (0, 2), (0, 1, 2)], [NEW // 2]),
    ],
    ids=str,
)
def test_others_go_on_where_the_lost_ones_were(
    lost: tuple[int, ...], at: int, llama: tuple[Any, Replicas]
) -> None:
    plain, hive = llama
    undisturbed, *_ = steered(hive.model)
    hive.after(1, at, hive.kill(*lost))
    found = steered(hive.model)
    check(plain, hive, found)
    result = found[0].result
    assert result.retried == 0
    assert sorted(one.blocks for one in result.replaced) == [f"{2 * i}:{2 * i + 2}" for i in lost]
    for one in result.replaced:
        assert one.by in [hop.peer for hop in result.hops]
        assert one.lost not in [hop.peer for hop in result.hops]
    # What had come was not sent again.
    assert result.received_bytes == undisturbed.result.received_bytes


@pytest.mark.parametrize("lost", [(0, 1), (0, 1, 2)], ids=str)
def test_lost_ones_whose_records_are_old_are_replaced_together(
    lost: tuple[int, ...], llama: tuple[Any, Replicas]
) -> None:
    """As of hosts that were stopped, and of which the directory says nothing any more.

    All three send in a circle. Seen to wait, each for a record of another lost one.
    """
    plain, hive = llama
    steered(hive.model)

    def lose() -> None:
        hive.pass_time(OLD_SECONDS)
        hive.kill(*lost)()

    hive.after(1, NEW // 2, lose)
    found = steered(hive.model)
    check(plain, hive, found)
    result = found[0].result
    assert result.retried == 0
    assert result.relayed == ()
    assert sorted(one.blocks for one in result.replaced) == [f"{2 * i}:{2 * i + 2}" for i in lost]


@pytest.mark.parametrize(("kind", "lost"), [("gemma3_text", 0), ("mixtral", 1), ("mamba2", 2)])
def test_every_kind_of_cache_is_made_again(
    kind: str, lost: int, make: Callable[[str], tuple[Any, Replicas]]
) -> None:
    plain, hive = make(kind)
    hive.after(1, NEW // 2, hive.kill(lost))
    found = steered(hive.model)
    check(plain, hive, found)
    assert len(found[0].result.replaced) == 1


@pytest.mark.parametrize("lost", [(0,), (1,), (2,), (0, 1, 2)], ids=str)
def test_a_prompt_in_chunks_of_which_some_have_come(
    lost: tuple[int, ...], llama: tuple[Any, Replicas]
) -> None:
    """Lost when two of three chunks before the last have left the middle peer."""
    plain, hive = llama
    choice = {"prefill_chunk_size": 3}
    hive.after(1, 2, hive.kill(*lost))
    found = steered(hive.model, **choice)
    check(plain, hive, found, **choice)
    result = found[0].result
    assert result.retried == 0
    assert sorted(one.blocks for one in result.replaced) == [f"{2 * i}:{2 * i + 2}" for i in lost]
    assert min(hive.again) <= 2  # streams were opened again before the chunks had come


@pytest.mark.parametrize("seed", range(5))
def test_losses_that_follow_each_other(seed: int, llama: tuple[Any, Replicas]) -> None:
    """Among them that of who had just taken another's place, as long as there is one more."""
    plain, hive = llama
    for served in hive.served * 2:
        hive.add(served)
    rng = random.Random(seed)
    for at in sorted(rng.sample(range(NEW - 2), 3)):
        hive.after(rng.randrange(3), at, hive.kill(rng.randrange(3)))
    found = steered(hive.model)
    check(plain, hive, found)
    assert 1 <= len(found[0].result.replaced) + found[0].result.retried <= 3


@pytest.mark.parametrize("seed", range(5))
def test_a_thread_that_hangs_is_a_peer_that_is_lost(
    seed: int, llama: tuple[Any, Replicas], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its loop lives and says so. Seen failing without `Job._get_going`: it waits for ever."""
    plain, hive = llama
    monkeypatch.setattr(client_stream, "ALIVE_SECONDS", 0.05)
    monkeypatch.setattr(step_watch, "_MOST_BETWEEN_SECONDS", 0.1)
    monkeypatch.setattr(runner, "Job", partial(Job, step_limits=StepLimits(least_seconds=1.0)))
    rng = random.Random(seed)
    part, at = rng.randrange(3), rng.randrange(NEW)
    run, test_ends, hung = Executor.run, threading.Event(), []

    def hang(executor: Executor, stage: Stage, *inputs: Any) -> None:
        if executor._part.index == part and stage.pass_index == at and not hung:
            hung.append(hive.jobs[-1].peers[part].peer_id)
            test_ends.wait(120)
        run(executor, stage, *inputs)

    monkeypatch.setattr(Executor, "run", hang)
    try:
        found = steered(hive.model)
    finally:
        test_ends.set()
    check(plain, hive, found)
    assert [one.lost for one in found[0].result.replaced] == hung
    assert len(hung) == 1


def failing(monkeypatch: pytest.MonkeyPatch, hive: Replicas, error: Exception) -> list[PeerId]:
    """The second part's first host, once it has failed so in the middle of a generation."""
    run, failed = Executor._run, []

    def fail(executor: Executor, stage: Stage, *inputs: Any) -> None:
        if executor._part.index == 1 and stage.pass_index == NEW // 2 and not failed:
            failed.append(hive.jobs[-1].peers[1].peer_id)
            raise error
        run(executor, stage, *inputs)

    monkeypatch.setattr(Executor, "_run", fail)
    return failed


@pytest.mark.parametrize("lacks_memory", [False, True])
def test_a_host_that_fails_is_replaced_as_a_lost_one(
    lacks_memory: bool, llama: tuple[Any, Replicas], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen to end the generation."""
    plain, hive = llama
    error = torch.OutOfMemoryError("CUDA out of memory") if lacks_memory else KeyError("a bug")
    failed = failing(monkeypatch, hive, error)
    found = steered(hive.model)
    check(plain, hive, found)
    assert [one.lost for one in found[0].result.replaced] == failed
    assert found[0].result.retried == 0
    steered(hive.model)
    assert failed[0] not in [peer.peer_id for peer in hive.jobs[-1].peers]


def test_a_graph_that_fails_ends_the_generation(
    llama: tuple[Any, Replicas], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, hive = llama
    failing(monkeypatch, hive, ShapeMismatch("no such row"))
    with pytest.raises(PeerFailed, match=r"ShapeMismatch at peer .*: no such row\n"):
        steered(hive.model)
    assert len(hive.jobs) == 1
    assert hive.jobs[-1].moves == 0


@pytest.mark.parametrize(
    ("one", "other", "part"), [(0, 1, 0), (0, 1, 2), (1, 2, 1), (0, 2, 0), (0, 2, 2)]
)
def test_streams_that_break_are_opened_again(
    one: int, other: int, part: int, llama: tuple[Any, Replicas]
) -> None:
    """Both peers live: nobody is replaced, and nothing is run or sent twice."""
    plain, hive = llama
    hive.after(part, NEW // 2, hive.cut(one, other))
    found = steered(hive.model)
    check(plain, hive, found)
    assert found[0].result.replaced == ()
    assert found[0].result.retried == 0
    assert max(hive.again) >= NEW // 2 - 1


@pytest.mark.parametrize("lost", [0, 2])
def test_chance_is_the_same_at_another_peer(lost: int, llama: tuple[Any, Replicas]) -> None:
    _, hive = llama
    options = {"do_sample": True, "temperature": 1.3, "top_k": 40, "seed": 7}
    wanted = steered(hive.model, **options)
    hive.after(1, NEW // 2, hive.kill(lost))
    found = steered(hive.model, **options)
    assert torch.equal(found[0].output_ids, wanted[0].output_ids)
    assert all(map(torch.equal, found[2], wanted[2]))
    assert len(found[0].result.replaced) == 1


@pytest.mark.parametrize(("lost", "at"), [(1, 2), (0, 4), (0, 5), (1, 5), (2, 5)])
def test_an_end_is_an_end_at_another_peer(lost: int, at: int, llama: tuple[Any, Replicas]) -> None:
    """A stop token ends it early; who stands in meets that in what it is sent again."""
    plain, hive = llama
    choice = {"repetition_penalty": 2.0}  # left alone, a tiny model says the same again and again
    ids, wanted, _ = oracle(plain, hive.model.outline.blocks_path, **choice)
    tokens = ids[0, PROMPT.shape[1] :].tolist()
    assert tokens[5] not in tokens[:5]
    hive.after(1, at, hive.kill(lost))
    blocks, states = blocks_of(hive.model), []
    with hive.model.generate(
        PROMPT, max_new_tokens=NEW, eos_token_id=[tokens[5]], deadline=60, **choice
    ) as tracer:
        for _ in tracer.iter[:]:
            blocks[1].output[:, -1] += 1.5
            states.append(blocks[3].output.save())
    assert torch.equal(tracer.output_ids, ids[:, : PROMPT.shape[1] + 6])
    assert all(map(torch.equal, states[:6], wanted))
    # Whoever had done its part by then is replaced as well: it keeps nothing any more.
    assert tracer.result.replaced or tracer.result.retried


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_values_of_other_steps_and_invokes(lost: int, llama: tuple[Any, Replicas]) -> None:
    """Unequal lengths, and values carried from a late block to earlier ones of later steps."""
    _, hive = llama
    blocks = blocks_of(hive.model)

    def run() -> tuple[Any, list[Any]]:
        saved = []
        with hive.model.generate(eos_token_id=[]) as tracer:
            with tracer.invoke(PROMPT, max_new_tokens=6):
                for step in tracer.iter[:]:
                    late = blocks[5].output[:, -1]
                    if step == 2:
                        kept = late
                    saved.append(late.save())
            with tracer.invoke([[5, 6, 7], [8, 9, 10]], max_new_tokens=9):
                for step in tracer.iter[:]:
                    if step >= 4:
                        blocks[0].output[:, -1] += kept
                    saved.append(blocks[4].output.save())
        return tracer, saved

    wanted = run()
    hive.after(1, 9, hive.kill(lost))
    found = run()
    assert len(found[0].result.replaced) == 1
    assert len(found[1]) == len(wanted[1]) == 15
    assert all(map(torch.equal, found[1], wanted[1]))


def test_padded_prompts(llama: tuple[Any, Replicas]) -> None:
    _, hive = llama
    prompt = [[3, 14, 15, 9], [2, 7]]

    def run() -> tuple[Any, list[Any]]:
        with hive.model.generate(prompt, max_new_tokens=NEW, eos_token_id=[]) as tracer:
            saved = [blocks_of(hive.model)[4].output.save() for _ in tracer.iter[:]]
        return tracer, saved

    wanted = run()
    hive.after(1, NEW // 2, hive.kill(0, 1))
    found = run()
    assert len(found[0].result.replaced) == 2
    assert torch.equal(found[0].output_ids, wanted[0].output_ids)
    assert all(map(torch.equal, found[1], wanted[1]))


def test_without_retries_a_lost_peer_ends_it(llama: tuple[Any, Replicas]) -> None:
    _, hive = llama
    hive.after(1, NEW // 2, hive.kill(1))
    with pytest.raises(PeerLost, match=r"\(blocks 2:4\).*1 route was tried, as retries=0 says"):
        steered(hive.model, retries=0)
    assert not any(one.part.outlives_peers for one in hive.jobs[-1].hops)
    assert len(hive.jobs) == 1


def test_where_nobody_serves_the_same_blocks_all_is_run_again(
    llama: tuple[Any, Replicas], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(left_out, "RETURN_SECONDS", 0.0)
    _, hive = llama
    steered(hive.model)  # so that a route is known
    used = [peer.peer_id for peer in hive.jobs[-1].peers]
    for host in hive.hosts:
        if host.record.start == 2 and host.record.peer_id != used[1]:
            hive.network.kill(host.record.peer_id)
    hive.after(1, NEW // 2, hive.kill(1))
    with pytest.raises(
        PeerLost, match=r"\(blocks 2:4\).*no other route: nobody else serves blocks 2:4"
    ):
        steered(hive.model)


@pytest.mark.parametrize("is_busy", [False, True])
def test_why_nobody_stood_in_is_told(
    is_busy: bool, llama: tuple[Any, Replicas], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By who was asked, beside the loss that it was asked for."""
    monkeypatch.setattr(left_out, "RETURN_SECONDS", 0.0)
    _, hive = llama
    steered(hive.model)  # so that a route is known
    used = hive.jobs[-1].peers[1].peer_id
    (other,) = [one for one in hive.hosts if one.record.start == 2 and one.record.peer_id != used]

    async def refuse(*args: object) -> None:
        raise (Busy if is_busy else OverBudget)("the cellar is full")

    monkeypatch.setattr(other.host, "_prepare", refuse)
    hive.after(1, NEW // 2, hive.kill(1))
    text = (
        rf"{used} \(blocks 2:4\) was lost while it ran its part: .*; {other.record.peer_id}, asked "
        r"to stand in, refused: .*the cellar is full; no other route: nobody else serves blocks 2:4"
    )
    with pytest.raises(PeerLost, match=text) as caught:
        steered(hive.model)
    assert caught.value.peer == used


def with_one_of_other_hardware(hive: Replicas) -> None:
    """The second part has, besides the one that runs it, only one host of another kind."""
    other = hive.add(hive.served[1], backend="abacus torch-9.9")

    def is_listed() -> bool:
        return other.peer_id in {one.peer_id for one in hive.swarm.records("tiny")}

    wait_for(is_listed, "the directory, which keeps an answer for a second, lists the new host")
    steered(hive.model)
    used = [peer.peer_id for peer in hive.jobs[-1].peers]
    for host in hive.hosts:
        if host.record.start == 2 and host.record.peer_id not in (used[1], other.peer_id):
            hive.network.kill(host.record.peer_id)
    hive.after(1, NEW // 2, hive.kill(1))


def test_other_hardware_only_if_it_is_allowed(
    llama: tuple[Any, Replicas], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(left_out, "RETURN_SECONDS", 0.0)
    plain, hive = llama
    with_one_of_other_hardware(hive)
    text = r"no other route on cpu torch-[\d.]+, as before.*one on abacus torch-9\.9: allow it with"
    with pytest.raises(PeerLost, match=text):
        steered(hive.model)
    found = steered(hive.model, across_hardware=True)
    check(plain, hive, found)  # as it is the same hardware under another name
    assert [hop.backend for hop in found[0].result.hops][1] == "abacus torch-9.9"
    assert " and abacus torch-9.9; " in repr(found[0].result)
    assert found[0].result.other_hardware == ()  # nothing had run elsewhere


def test_what_ran_again_on_other_hardware_is_said(
    llama: tuple[Any, Replicas], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(left_out, "RETURN_SECONDS", 0.0)
    plain, hive = llama
    with_one_of_other_hardware(hive)
    found = steered(hive.model, across_hardware=True)
    check(plain, hive, found)
    assert found[0].result.other_hardware == ("2:4",)
    assert found[0].result.retried == 1
