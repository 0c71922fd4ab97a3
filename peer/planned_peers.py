"""The other peers of a plan, as one host deals with them.

A host dials a peer of the plan only where that peer itself says that it is: at the addresses of its
own signed record, which comes with the client's request. The client names keys, not addresses, and
the transport then asks for proof of the key. So a client can send a host only to where the owner of
some key says that it listens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from glasshive.dht.addresses import dialable
from glasshive.dht.errors import RecordRefused
from glasshive.dht.records import PeerRecord
from glasshive.dht.transport import PeerAddress, Transport
from glasshive.graph.errors import BadGraph
from glasshive.graph.plan import Part
from glasshive.security.requests import PlannedPeer, TraceRequest

__all__ = ["check_peers", "find_peers"]


def check_peers(part: Part, peers: Sequence[PlannedPeer]) -> None:
    """Raise BadGraph unless the plan names a peer for every part that this one deals with."""
    others = {i for stage in part.stages for _, i in (*stage.imports, *stage.exports)}
    if not all(i < len(peers) for i in (*others, part.index)):
        raise BadGraph(f"the plan names {len(peers)} peers; part {max(others)} is asked for")


def find_peers(
    part: Part,
    request: TraceRequest,
    now: float,
    transport: Transport,
    go_on: Callable[[], None],
    known: Sequence[PeerAddress] = (),
) -> tuple[PeerAddress, ...]:
    """The plan's peers, those that `part` sends to with the addresses of their own records.

    Whom it reaches by way of the client needs none.
    Who is `known` at its place in the plan is where it was, where its record says nothing newer.
    Who is new there, beside others who are known, and names no address that a host with this
    `transport` dials (dht/addresses.py), gets none: the client may reach it.
    Raises RecordRefused for another one whose record names none, is missing, not its own, of
    another swarm or model, or expired. `go_on` is called between two of them.
    """
    receivers = part.receivers
    found = []
    for index, peer in enumerate(request.peers):
        before = known[index] if index < len(known) else None
        is_known = before is not None and before.peer_id == peer.peer_id
        addresses = before.addresses if before is not None and is_known else ()
        if index in receivers and index not in request.relayed:
            try:  # one that is known may have come back at another address
                addresses = _where(peer, request, now, transport) or addresses
                if not (addresses or known):
                    raise RecordRefused(_why_nowhere(peer, transport))
            except RecordRefused:
                if not is_known:
                    raise
            go_on()
        found.append(PeerAddress(peer.peer_id, addresses))
    return tuple(found)


def _where(
    peer: PlannedPeer, request: TraceRequest, now: float, transport: Transport
) -> tuple[str, ...]:
    if not peer.record:
        raise RecordRefused(
            f"this peer is to send to {peer.peer_id}, whose record is not in the request; peers "
            "are dialled only where their own records say"
        )
    record = PeerRecord.verify(peer.record, now, swarm=request.swarm)
    if record.peer_id != peer.peer_id:
        raise RecordRefused(f"the record of {peer.peer_id} in the plan is of {record.peer_id}")
    if record.model != request.model_id:
        raise RecordRefused(f"the record of {peer.peer_id} in the plan is of another model")
    return dialable(record.addresses, transport.addresses, members_only=transport.members_only)


def _why_nowhere(peer: PlannedPeer, transport: Transport) -> str:
    members_only = transport.members_only
    kinds = "public, private and loopback ones" if members_only else "loopback and private ones"
    return (
        f"the record of {peer.peer_id} in the plan names no address that this peer dials: "
        f"{kinds} only where it is at such an address itself; announce both hosts alike"
    )
