"""T17, T18: what a host tells a client when something fails, and what stands in its log.

No path, host name or traceback goes to a client, and no token id or number of a tensor into the
log. Seen failing with the error's text in the log, and with the text of an unexpected one sent.
"""

from __future__ import annotations

import logging
import os
import random
import re
import socket
from pathlib import Path

import pytest
import torch
from soak import SEED, SOAK, count
from tenants import IDS, Tenants, name_of

import glasshive
from glasshive.dht.messages import Failed
from glasshive.graph.dtypes import DType
from glasshive.graph.graph import Arg, Const, Node, NodeId, Op, Read, Ref, Save, Site, Write
from glasshive.graph.ops import OPS, Parameter
from glasshive.peer.served_model import ServedModel

ROUNDS = count(1, 100)
SENTINEL = 31_337
VALUES = torch.full((4,), float(SENTINEL))
INDICES = torch.full((4,), SENTINEL)
LEAKS = re.compile(
    r"Traceback|File \"|line \d+, in|\.py\b|site-packages|0x[0-9a-f]{6,}|"
    + "|".join(
        re.escape(one)
        for one in {
            str(Path.home()),
            os.getcwd(),
            str(Path(glasshive.__file__).parent),
            socket.gethostname(),
            "/tmp",
        }
        if len(one) > 3
    )
)


def argument(param: Parameter, rng: random.Random) -> Arg:
    """One that is of the kind, and likely wrong. The sentinels are nodes 1 and 2."""
    value = Ref(NodeId(rng.choice([0, 1, 2, 2])))
    match param.kind:
        case "value" | "operand":
            return value
        case "values" | "optional_values":
            return (value, Ref(NodeId(0)))
        case "ints":
            return tuple(rng.choice([0, 1, -7, 31]) for _ in range(rng.randint(0, 3)))
        case "choice":
            return rng.choice(param.choices)
        case "dtype":
            return rng.choice(list(DType))
        case "bool":
            return rng.random() < 0.5
        case "float":
            return 1.5
        case _:
            return rng.choice([0, 1, 5, 31])


def nodes_of(name: str, rng: random.Random) -> list[Node]:
    args = tuple(argument(param, rng) for param in OPS[name].params)
    return [
        Read(Site("model.layers.0", "output"), 0),
        Const(name_of(VALUES), DType.FLOAT32, (4,)),
        Const(name_of(INDICES), DType.INT64, (4,)),
        Op(name, args),
        *([Op("pick", (Ref(NodeId(3)), 0))] if OPS[name].outputs > 1 else []),
        Save(Ref(NodeId(4 if OPS[name].outputs > 1 else 3)), "s"),
    ]


@pytest.mark.asyncio
@pytest.mark.timeout(0 if SOAK else 600)
async def test_a_failure_says_nothing_of_the_machine_and_the_log_nothing_of_the_data(
    served: ServedModel, caplog: pytest.LogCaptureFixture
) -> None:
    rng = random.Random(SEED)
    failed = 0
    with caplog.at_level(logging.DEBUG):
        async with Tenants(served) as tenants:
            client = tenants.client()
            for name in sorted(set(OPS) - {"pick"}) * ROUNDS:
                told = await tenants.run(client, nodes_of(name, rng), (VALUES, INDICES))
                if isinstance(told, Failed):
                    failed += 1
                    assert not LEAKS.search(told.text), told.text
            wrong = IDS.clone()
            wrong[0, 0] = SENTINEL  # no token of this vocabulary
            told = await tenants.run(client, ids=wrong)
            assert isinstance(told, Failed)
            assert not LEAKS.search(told.text)
            bad_shape = [
                Const(name_of(VALUES), DType.FLOAT32, (4,)),
                Write(Site("model.layers.0", "output"), 0, Ref(NodeId(0)), "set"),
            ]
            told = await tenants.run(client, bad_shape, (VALUES,))
            assert isinstance(told, Failed)
            assert not LEAKS.search(told.text)
    assert failed > 30, "many of them are wrong in some way"
    # As it would be written, with all that is given beside the text.
    written = "\n".join(f"{one.getMessage()} {vars(one)}" for one in caplog.records)
    assert "trace_failed" in written
    assert not re.search(rf"(?<!\d){SENTINEL}(?!\d)", written)  # digits of a time are others


def test_this_test_can_fail() -> None:
    for text in ('File "/x/y.py", line 3, in f', "at 0x7f00aa00", f"in {Path.home()}/model"):
        assert LEAKS.search(text)
