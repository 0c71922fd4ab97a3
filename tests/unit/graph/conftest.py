"""A hand-made outline: three blocks of one module each, between an embedding and a head."""

from __future__ import annotations

import pytest

from glasshive.graph.dtypes import DType
from glasshive.graph.outline import Leaf, ModuleInfo, Outline


@pytest.fixture(scope="session")
def outline() -> Outline:
    """`embed`, `blocks.0` to `blocks.2` each with a `mlp` inside, `head`; hidden width 4."""
    events: list[int] = []
    modules: dict[str, ModuleInfo] = {}
    hidden = (Leaf((), DType.FLOAT32, ("batch", "seq", 4)),)
    taken = (Leaf((0,), DType.FLOAT32, ("batch", "seq", 4)),)

    def module(path: str, block: int, inner: str | None = None) -> None:
        start = len(events)
        events.append(block)
        if inner is not None:
            module(inner, block)
        events.append(block)
        weight = {"weight": (DType.FLOAT32, (4, 4))}
        sites = (taken, hidden, taken, hidden)
        modules[path] = ModuleInfo(path, "Linear", 1, start, len(events) - 1, *sites, weight)

    module("embed", -1)
    for block in range(3):
        module(f"blocks.{block}", block, f"blocks.{block}.mlp")
    module("head", 3)
    modules["blocks"] = ModuleInfo("blocks", "ModuleList", 0, None, None, (), (), (), (), {})
    return Outline(modules, "blocks", 3, tuple(events), 64, None)
