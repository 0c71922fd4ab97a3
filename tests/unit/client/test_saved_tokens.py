"""The saves of the tokens of a generation, of which there may be a thousand steps."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from glasshive.client.experiment import _save_tokens
from glasshive.graph.graph import Node, NodeId, Read, Site
from glasshive.graph.outline import GENERATOR


class Walked(dict[NodeId, Node]):
    """Nodes, and how often somebody has walked through them."""

    walks = 0

    def __iter__(self) -> Iterator[NodeId]:
        self.walks += 1
        return super().__iter__()


def test_tokens_that_nobody_looked_at_get_free_ids_without_a_search_for_each() -> None:
    """Seen to look through all nodes at each step."""
    looked_at = NodeId(7)
    sites: Any = SimpleNamespace(
        invokes=[SimpleNamespace(n_steps=3), SimpleNamespace(n_steps=2)],
        standing=lambda site, invoke: looked_at if (site.step, invoke) == (1, 0) else None,
    )
    nodes = Walked({NodeId(i): Read(Site("model", "output"), 0) for i in (2, looked_at, 5)})
    names, values = _save_tokens(sites, nodes)
    assert nodes.walks == 1
    found = {moment: values[name].node for moment, name in names.items()}
    assert found == {(0, 0): 8, (0, 1): 7, (0, 2): 9, (1, 0): 10, (1, 1): 11}
    assert nodes[NodeId(10)] == Read(Site(GENERATOR, "output", (), 0), 1)
