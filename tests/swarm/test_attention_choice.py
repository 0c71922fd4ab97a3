"""A model that is served with two attention backends: one is chosen, and a route keeps to it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from glasshive.client.errors import NoRoute
from glasshive.client.swarm import Swarm
from glasshive.dht.loop_thread import LoopThread
from glasshive.dht.memory_transport import MemoryNetwork
from glasshive.dht.transport import PeerAddress
from glasshive.graph.plan import Span
from glasshive.peer.checkpoint import Attention
from glasshive.peer.served_model import load_served_model
from glasshive.peer.serving import Serving
from glasshive.security.keys import Identity


async def serve(
    network: MemoryNetwork, folder: Path, span: Span, attention: Attention
) -> PeerAddress:
    served = load_served_model(
        folder, "tiny", span, dtype=torch.float32, device="cpu", attention=attention
    )
    identity = Identity.generate()
    transport = network.transport(identity)
    await Serving(transport, identity, served).start()
    return PeerAddress(transport.peer_id, transport.addresses)


def test_the_backend_is_chosen_and_kept(tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    network = MemoryNetwork()
    with LoopThread() as loop:
        # One peer would do for sdpa; eager takes two, which a shorter route must not replace.
        peers = [
            loop.run(serve(network, tmp_path, span, attention), 60)
            for span, attention in (
                (Span(0, 2), "sdpa"),
                (Span(0, 1), "eager"),
                (Span(1, 2), "eager"),
            )
        ]
        identity = Identity.generate()
        client = network.transport(identity, dht=False)
        swarm = Swarm(loop, client, identity, peers, tmp_path / "cache")
        with pytest.raises(NoRoute, match=r"served with attention eager and sdpa; choose with att"):
            swarm.model("tiny")
        with pytest.raises(NoRoute, match="not served with dtype bfloat16; it is with float32"):
            swarm.model("tiny", dtype="bfloat16", attention="sdpa")
        for attention, hops in (("sdpa", 1), ("eager", 2)):
            model = swarm.model("tiny", attention=attention)
            with model.trace([[3, 4, 5]]) as tracer:
                model.lm_head.output.save()
            assert tracer.result is not None
            assert (tracer.result.attention, len(tracer.result.hops)) == (attention, hops)
