"""A request for what a host doesn't serve, such as one by a record of before its restart."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from askers import prepare_of
from one_host import CLIENT, SITE, news, one_host, part_of, tiny_served

from glasshive.dht.messages import Failed, decode
from glasshive.graph.graph import NodeId, Read, Ref, Save
from glasshive.graph.plan import Span


@pytest.mark.asyncio
@pytest.mark.parametrize("what", ["model", "dtype", "span"])
async def test_it_is_told_as_the_host_s_own_and_not_the_graph_s(what: str, tmp_path: Path) -> None:
    """By the name of the error a client knows that another host may run it."""
    async with one_host(tiny_served(tmp_path)) as swarm:
        part = part_of([Read(SITE, 0), Save(Ref(NodeId(0)), "s")], swarm.served)
        if what == "span":
            part = dataclasses.replace(part, span=Span(0, 1))
        request, data = swarm.request(part)
        if what == "model":
            request = dataclasses.replace(request, model_id="cd" * 32)
        if what == "dtype":
            request = dataclasses.replace(request, dtype="bfloat16")
        stream = await swarm.send(prepare_of(CLIENT, request), data)
        failed = decode((await news(stream)).header, Failed)
    assert (failed.code, failed.node) == ("NotServed", -1)
    texts = {
        "model": f"model 'cdcdcdcdcdcdcdcd'... is not served here; this peer serves "
        f"{swarm.served.manifest.model_id[:16]}... (tiny)",
        "dtype": "dtype 'bfloat16' is not served here; float32 is",
        "span": "span 0:1 is not hosted here; this peer hosts 0:2",
    }
    assert failed.text == texts[what]
