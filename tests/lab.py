"""A private swarm called lab in memory: its issuer, its members and their gates."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from joiners import DAY, ISSUER, NOW

from glasshive.dht.member_gate import MemberGate
from glasshive.dht.memory_transport import MemoryNetwork, MemoryTransport
from glasshive.dht.transport import PeerAddress, Transport
from glasshive.security.envelope import PUBLIC_SWARM
from glasshive.security.keys import Identity
from glasshive.security.membership import Certificate, Membership, Revocations, Role


@dataclass
class Clock:
    seconds: float = NOW

    def __call__(self) -> float:
        return self.seconds


def certificate_of(identity: Identity, role: Role, seconds: float = DAY, **changes: Any) -> bytes:
    """A certificate by ISSUER, from NOW on."""
    fields: dict[str, Any] = {
        "issuer": ISSUER.peer_id,
        "member": identity.peer_id,
        "role": role,
        "swarm": "lab",
        "serial": identity.peer_id[-16:].encode(),
        "invite": b"i" * 16,
        "expires_at_seconds": NOW + seconds,
    }
    return Certificate(**(fields | changes)).sign(ISSUER)


def gate_now(identity: Identity, role: Role) -> MemberGate:
    """That of a member of a private swarm whose clock is this machine's."""
    certificate = certificate_of(identity, role, time.time() - NOW + DAY, swarm=PUBLIC_SWARM)
    return MemberGate(Membership(PUBLIC_SWARM, [ISSUER.peer_id]), time.time, certificate)


def removal_of(*peers: Identity, version: int = 1) -> bytes:
    """A list by ISSUER that throws these out."""
    gone = frozenset(one.peer_id for one in peers)
    return Revocations(ISSUER.peer_id, "lab", version, peers=gone).sign(ISSUER)


def address_of(transport: Transport) -> PeerAddress:
    return PeerAddress(transport.peer_id, transport.addresses)


@dataclass
class Lab:
    clock: Clock = field(default_factory=Clock)

    def __post_init__(self) -> None:
        self.network = MemoryNetwork(swarm="lab", clock=self.clock)

    def gate(self, certificate: bytes) -> MemberGate:
        """A peer's own: what it learns no other knows."""
        return MemberGate(Membership("lab", [ISSUER.peer_id]), self.clock, certificate)

    def member(self, identity: Identity, role: Role) -> tuple[MemoryTransport, MemberGate]:
        gate = self.gate(certificate_of(identity, role))
        return self.network.transport(identity, gate=gate), gate

    def stranger(self, identity: Identity) -> MemoryTransport:
        """A peer that knows no rules."""
        return self.network.transport(identity)
