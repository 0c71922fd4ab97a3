"""The same experiments in this process: `glasshive.local(path, cuts=(10, 20))`.

Every span is a real host over the memory transport: the same graph, split, protocol and executor as
on a swarm, with no network and no other process.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from glasshive.client.model import Model
from glasshive.client.swarm import Swarm
from glasshive.dht.loop_thread import LoopThread
from glasshive.dht.memory_transport import MemoryNetwork
from glasshive.dht.transport import PeerAddress
from glasshive.graph.plan import Span
from glasshive.models import cache_dir, find_model
from glasshive.peer.checkpoint import Attention, Checkpoint
from glasshive.peer.device import find_device
from glasshive.peer.errors import BadSpan
from glasshive.peer.host_limits import HostLimits
from glasshive.peer.served_model import ServedModel, load_served_model, make_manifest
from glasshive.peer.serving import Serving
from glasshive.security.keys import Identity

_START_SECONDS = 120.0


def local(
    path: str | Path,
    *,
    cuts: Sequence[int] = (),
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    attention: Attention = "sdpa",
    limits: HostLimits | None = None,
) -> Model:
    """The model at `path` (a folder, or a name that `find_model` knows), to be traced right here.

    `cuts=(10, 20)` makes three spans joined by the memory transport; without cuts there is one. All
    of it ends with the model. Raises BadSpan for cuts that are not ascending blocks of the model,
    NoSuchDevice, and what loading raises.
    """
    device = find_device(device)
    folder = find_model(path)
    n_blocks = Checkpoint(folder).n_blocks
    bounds = [0, *_checked(cuts, n_blocks, folder.name), n_blocks]
    manifest = make_manifest(folder, folder.name)
    served = [
        load_served_model(
            folder,
            folder.name,
            Span(start, end),
            dtype=dtype,
            device=device,
            attention=attention,
            manifest=manifest,
        )
        for start, end in itertools.pairwise(bounds)
    ]
    loop = LoopThread("glasshive-local")
    network = MemoryNetwork()
    peers = loop.run(_serve_all(network, served, limits), _START_SECONDS)
    identity = Identity.generate()
    client = network.transport(identity, dht=False)
    swarm = Swarm(loop, client, identity, peers, cache_dir() / "files")
    model = swarm.model(manifest.model_id)
    weakref.finalize(model, loop.close)
    return model


def _checked(cuts: object, n_blocks: int, name: str) -> Sequence[int]:
    """`cuts`, known to be ascending blocks inside the model. Raises BadSpan."""
    if isinstance(cuts, str) or not isinstance(cuts, Iterable):
        raise BadSpan(f"cuts={cuts!r:.40}, but a list is wanted: cuts=(10,) for one cut")
    blocks = tuple(cuts)
    if not all(type(one) is int for one in blocks):
        raise BadSpan(f"cuts={blocks!r:.80}, but numbers of blocks are wanted, as in cuts=(10, 20)")
    if any(not 0 < one < n_blocks for one in blocks):
        raise BadSpan(
            f"cuts={blocks!r:.80}, but {name} has {n_blocks} blocks, so a cut lies in "
            f"1..{n_blocks - 1}: it is the first block of the next span"
        )
    if any(first >= second for first, second in itertools.pairwise(blocks)):
        raise BadSpan(
            f"cuts={blocks!r:.80} do not ascend; write cuts={tuple(sorted(set(blocks)))!r:.80}"
        )
    return blocks


async def _serve_all(
    network: MemoryNetwork, served: Sequence[ServedModel], limits: HostLimits | None
) -> list[PeerAddress]:
    peers = []
    for one in served:
        identity = Identity.generate()
        transport = network.transport(identity)
        await Serving(transport, identity, one, limits=limits).start()
        peers.append(PeerAddress(transport.peer_id, transport.addresses))
    return peers
