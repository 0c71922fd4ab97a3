"""What a graph does not need: nodes that say the same twice, and nodes that no root can see.

The roots are the saves, and what is written as a chosen token. A read depends on every write and
skip at earlier moments of its invoke, because the model itself carries them there, within a pass or
by its cache and the tokens that it chose; so a write is live if a live read comes later in the same
invoke, and dead otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable

from glasshive.graph.codec import encode_args_key
from glasshive.graph.errors import NoRoots
from glasshive.graph.graph import (
    Arg,
    Call,
    Graph,
    Node,
    NodeId,
    Op,
    Read,
    Ref,
    Save,
    Skip,
    Write,
    is_effect,
    refs,
)
from glasshive.graph.ops import OPS
from glasshive.graph.order import NEVER, Moment, moment_of
from glasshive.graph.outline import GENERATOR, Outline


def simplify(graph: Graph, outline: Outline) -> tuple[Graph, dict[NodeId, bool]]:
    """The graph without unseen and repeated nodes, and the writes and skips dropped as unseen.

    Each of those with whether a save sees at least the value that was to be written.
    Raises NoRoots if nothing is saved.
    """
    if not any(isinstance(node, Save) for node in graph.nodes.values()):
        raise NoRoots("nothing is saved, so nothing would come back; call .save() on a value")
    # In this order: a value that is live only as the twin of another's says nothing of its write.
    live, dropped = drop_unseen(graph, outline)
    return share_repeated(live), dropped


def share_repeated(graph: Graph) -> Graph:
    """The graph with one node for each value that several nodes compute alike.

    Reads of one site are shared only while no write to that site stands between them; since a
    client reads the newest version as a value, equal reads always see the same tensor. Random ops
    are never shared.
    """
    seen: dict[bytes, NodeId] = {}
    same: dict[NodeId, NodeId] = {}
    kept: dict[NodeId, Node] = {}
    for node_id, node in graph.nodes.items():
        renamed = _rename(node, same)
        if not is_effect(renamed) and not (isinstance(renamed, Op) and OPS[renamed.name].random):
            key = encode_args_key(renamed)
            twin = seen.setdefault(key, node_id)
            if twin != node_id:
                same[node_id] = twin
                continue
        kept[node_id] = renamed
    return Graph(kept, graph.imports)


def drop_unseen(graph: Graph, outline: Outline) -> tuple[Graph, dict[NodeId, bool]]:
    """The graph without what no save can see, and the writes and skips among that.

    Each of those with whether its value is seen nevertheless.
    """
    effects: dict[int, list[tuple[Moment, NodeId]]] = {}
    for node_id, node in graph.nodes.items():
        if isinstance(node, Write | Skip):
            effects.setdefault(node.invoke, []).append((moment_of(node, outline), node_id))
    live: set[NodeId] = set()
    seen_until: dict[int, Moment] = {}
    work: list[NodeId] = [i for i, node in graph.nodes.items() if _is_root(node)]
    while work:
        node_id = work.pop()
        if node_id in live or node_id in graph.imports:
            continue
        live.add(node_id)
        node = graph.nodes[node_id]
        work.extend(refs(node))
        if isinstance(node, Read):
            here = moment_of(node, outline)
            if here > seen_until.get(node.invoke, NEVER):
                seen_until[node.invoke] = here
                work.extend(i for moment, i in effects.get(node.invoke, ()) if moment < here)
    dropped = {
        i: node.value.node in live
        for i, node in graph.nodes.items()
        if isinstance(node, Write | Skip) and i not in live
    }
    return Graph({i: n for i, n in graph.nodes.items() if i in live}, graph.imports), dropped


def _is_root(node: Node) -> bool:
    """Whether a node is wanted for itself. A token that is written is checked by its peer."""
    return isinstance(node, Save) or (isinstance(node, Write) and node.site.module == GENERATOR)


def _rename(node: Node, same: dict[NodeId, NodeId]) -> Node:
    if not any(ref in same for ref in refs(node)):
        return node
    if isinstance(node, Op):
        return Op(node.name, _rename_args(node.args, same))
    if isinstance(node, Call):
        return Call(node.module, _rename_args(node.args, same))
    if isinstance(node, Write):
        return Write(node.site, node.invoke, _renamed(node.value, same), node.mode)
    if isinstance(node, Skip):
        return Skip(node.module, node.invoke, _renamed(node.value, same), node.step)
    if isinstance(node, Save):
        return Save(_renamed(node.value, same), node.name)
    return node


def _renamed(ref: Ref, same: dict[NodeId, NodeId]) -> Ref:
    return Ref(same.get(ref.node, ref.node))


def _rename_args(args: Iterable[Arg], same: dict[NodeId, NodeId]) -> tuple[Arg, ...]:
    renamed: list[Arg] = []
    for arg in args:
        if isinstance(arg, Ref):
            renamed.append(_renamed(arg, same))
        elif isinstance(arg, tuple):
            renamed.append(_rename_args(arg, same))
        else:
            renamed.append(arg)
    return tuple(renamed)
