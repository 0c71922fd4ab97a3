"""The line on the terminal while a job runs: where it is, and whom it has lost."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from glasshive.client.hop import HopReport
from glasshive.client.progress import text_of
from glasshive.client.provenance import Replaced
from glasshive.client.relay import Relayed
from glasshive.dht.transport import PeerAddress
from glasshive.graph.graph import Graph
from glasshive.graph.plan import Part, Span
from glasshive.security.keys import PeerId


def job(
    states: list[Any],
    *,
    generation: bool = False,
    stands_in: tuple[int, ...] = (),
    relayed: tuple[tuple[str, str], ...] = (),
) -> Any:
    hops = [
        HopReport(
            PeerAddress(PeerId(str(i))),
            Part(i, Span(2 * i, 2 * i + 2), Graph({}), (), {}),
            state=state,
            stands_in=i in stands_in,
        )
        for i, state in enumerate(states)
    ]
    return SimpleNamespace(
        state="running",
        hops=hops,
        plan=SimpleNamespace(passes=SimpleNamespace(are_generation=generation)),
        replaced=[Replaced("2:4", PeerId("a"), PeerId("b"), 1.0, "cpu") for _ in stands_in],
        relayed=tuple(Relayed(*blocks, 7) for blocks in relayed),
        sent_bytes=999,
        received_bytes=1_500_000,
    )


@pytest.mark.parametrize(
    ("states", "wanted"),
    [
        (["preparing"] * 3, "blocks 0:2 > 2:4 > 4:6, 0 of 3 done"),
        (["running"] * 3, "blocks 0:2* > 2:4 > 4:6, 0 of 3 done"),
        (["done", "running", "running"], "blocks 0:2+ > 2:4* > 4:6, 1 of 3 done"),
        (["done", "done", "done"], "blocks 0:2+ > 2:4+ > 4:6+, 3 of 3 done"),
    ],
)
def test_the_hop_at_work_has_a_mark(states: list[str], wanted: str) -> None:
    assert text_of(job(states), 1.25) == (
        f"running  1.2 s  {wanted}  999 B out, 1.5 MB in  unaudited"
    )


def test_in_a_generation_all_are_at_work_and_who_stands_in_is_marked() -> None:
    states = ["running", "preparing", "running"]
    assert text_of(job(states, generation=True, stands_in=(1,)), 3.0) == (
        "running  3.0 s  blocks 0:2* > 2:4~ > 4:6*, 0 of 3 done, 1 replaced  "
        "999 B out, 1.5 MB in  unaudited"
    )


def test_who_speaks_by_way_of_this_client_is_said() -> None:
    states = ["running"] * 3
    pairs = (("0:2", "2:4"), ("0:2", "4:6"))
    assert text_of(job(states, generation=True, relayed=pairs), 3.0) == (
        "running  3.0 s  blocks 0:2* > 2:4* > 4:6*, 0 of 3 done, 0:2 and 2:4 through you, "
        "0:2 and 4:6 through you  999 B out, 1.5 MB in  unaudited"
    )
