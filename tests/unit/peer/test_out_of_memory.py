"""Memory that runs out while a host loads is told as that, wherever it does."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from one_host import SITE, news, one_host, part_of, tiny_served
from transformers import LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, core_model_loading

from glasshive.dht.messages import Failed, Saved, decode, is_a
from glasshive.graph import kernels
from glasshive.graph.dtypes import DType
from glasshive.graph.graph import Node, NodeId, Op, Read, Ref, Save
from glasshive.graph.memory import is_out_of_memory
from glasshive.graph.plan import Span
from glasshive.peer import blueprint, checkpoint, self_test, served_model
from glasshive.peer.checkpoint import Checkpoint
from glasshive.peer.errors import NotEnoughMemory, WrongWeights
from glasshive.peer.served_model import load_served_model
from glasshive.peer.span_model import SpanModel

SaveTinyLlama = Callable[..., Path]


def of_torch(*_: Any, **__: Any) -> Any:
    return torch.empty(1 << 50)


def of_python(*_: Any, **__: Any) -> Any:
    return bytearray(1 << 60)


def of_a_device(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


class Unreadable:
    """An open file of weights, none of which can be read for lack of memory."""

    def __init__(self, path: Path, **_: Any) -> None:
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            self.keys = list(file.keys()).copy  # names, as of the file

    def get_slice(self, name: str) -> Unreadable:
        return self

    def __getitem__(self, index: object) -> Any:
        return of_torch()


PLACES: dict[str, tuple[object, str, Callable[..., Any]]] = {
    "a tiny copy": (self_test, "_logits", of_torch),
    "the self-test": (self_test, "_compare", of_python),
    "opening": (checkpoint, "safe_open", of_python),
    "reading": (checkpoint, "safe_open", Unreadable),
    "converting": (core_model_loading, "_materialize_copy", of_torch),
    "moving": (LlamaForCausalLM, "to", of_a_device),
    "the twin": (blueprint, "build_twin", of_python),
    "the pace": (served_model, "measure_pace", of_torch),
}


@pytest.mark.parametrize("place", PLACES)
def test_memory_that_runs_out_is_said_with_what_is_needed(
    place: str, save_tiny_llama: SaveTinyLlama, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny_llama()
    owner, name, fails = PLACES[place]
    if "self" not in place and "copy" not in place:  # it loads, too
        monkeypatch.setattr(blueprint, "self_test", lambda *_: None)
    monkeypatch.setattr(self_test, "_passed", set())
    monkeypatch.setattr(owner, name, fails)
    with pytest.raises(NotEnoughMemory) as told:
        load_served_model(
            folder, "tiny", Span(1, 3), dtype=torch.float32, device="cpu", attention="sdpa"
        )
    assert str(told.value) == (
        "memory ran out on cpu while blocks 1:3 of 'tiny' were loaded: their weights take 7.4e-05 "
        "GB in float32, and running them takes more; serve fewer blocks with --blocks, or in a "
        "smaller number format with --dtype, or end what else takes memory"
    )
    assert is_out_of_memory(told.value.__cause__ or told.value)


@pytest.mark.parametrize("lacking", [True, False])
def test_memory_that_runs_out_where_experts_are_joined_is_no_wrong_weight(
    lacking: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There the loader keeps the error's text only, and says that something went wrong."""
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
    )
    MixtralForCausalLM(config).save_pretrained(tmp_path)

    def stack(*_: Any, **__: Any) -> Any:
        return of_torch() if lacking else torch.zeros(1).reshape(7)

    monkeypatch.setattr(torch, "stack", stack)
    with pytest.raises((MemoryError, WrongWeights)) as told:
        Checkpoint(tmp_path).load_span(0, 2)
    assert is_out_of_memory(told.value) is lacking


@pytest.mark.asyncio
@pytest.mark.parametrize("place", ["an op", "an op of a hook", "the forward pass"])
async def test_memory_that_runs_out_in_a_pass_is_no_fault_of_the_graph(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen to blame a line of the user's, where another host would have run it."""
    name = "neg" if place == "an op of a hook" else "exp"
    kernel = kernels.KERNELS[name]

    def lacks(tensor: torch.Tensor) -> Any:
        return kernel(tensor) if tensor.is_meta else of_torch()

    served = tiny_served(tmp_path)
    if place == "the forward pass":
        monkeypatch.setattr(SpanModel, "run", of_a_device)
    else:
        monkeypatch.setattr(kernels, "KERNELS", {**kernels.KERNELS, name: lacks})
    async with one_host(served) as swarm:
        nodes: list[Node] = [
            *(Read(SITE, 0), Op("neg", (Ref(NodeId(0)),)), Save(Ref(NodeId(1)), "s")),
            *(Op("full", ((1,), 0.5, DType.FLOAT32)), Op("exp", (Ref(NodeId(3)),))),
            Save(Ref(NodeId(4)), "other"),
        ]
        stream = await swarm.running(part_of(nodes, swarm.served))
        while is_a((frame := await news(stream)).header, Saved):
            pass
        failed = decode(frame.header, Failed)
    assert failed == Failed(
        "NotEnoughMemory",
        -1,
        "memory ran out on cpu while blocks 0:2 ran, with what else takes memory there; run fewer "
        "or shorter prompts at a time, or leave this peer out with avoid=",
    )


@pytest.mark.parametrize(
    ("error", "lacking"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8"), True),
        (RuntimeError("unable to mmap 8 bytes from file <x>: Cannot allocate memory (12)"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"), True),
        (OSError(errno.ENOENT, "No such file or directory"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_says_that_memory_ran_out(error: Exception, lacking: bool) -> None:
    assert is_out_of_memory(error) is lacking
