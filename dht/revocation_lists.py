"""How members of a private swarm hear who was thrown out: they ask each other for signed lists.

One stream of `MEMBERS_PROTOCOL`::

    A -> B   AskRevocations, with the digests of the lists that A has
    B -> A   RevocationLists: those that A lacks;  A closes

A list is signed by an issuer and checked by whoever takes it, so any member may pass it on.
"""

from __future__ import annotations

import hashlib
import logging
from typing import Final

from glasshive.dht.deadline import within
from glasshive.dht.errors import MalformedMessage
from glasshive.dht.framing import FrameLimits, Stream
from glasshive.dht.member_gate import MemberGate
from glasshive.dht.messages import (
    MEMBERS_PROTOCOL,
    AskRevocations,
    RevocationLists,
    decode,
    encode,
)
from glasshive.dht.transport import PeerAddress, Transport
from glasshive.security.errors import MembershipFileError, SecurityError, StaleRevocations
from glasshive.security.membership import MAX_LIST_BYTES, MAX_LISTS

__all__ = ["fetch_revocations", "serve_revocations"]

logger = logging.getLogger(__name__)

EXCHANGE_SECONDS: Final = 10.0

_QUESTION: Final = FrameLimits(
    header_bytes=64 + 40 * MAX_LISTS,
    body_bytes=0,
    header_depth=2,
    header_elements=2 + MAX_LISTS,
)
_ANSWER: Final = FrameLimits(
    header_bytes=64 + 10 * MAX_LISTS,
    body_bytes=MAX_LISTS * MAX_LIST_BYTES,
    header_depth=2,
    header_elements=2 + MAX_LISTS,
)


async def serve_revocations(transport: Transport, gate: MemberGate) -> None:
    """From now on `transport` tells members of the lists that are in force here."""

    async def handle(stream: Stream) -> None:
        stream.limits = _QUESTION
        frame = await stream.receive(EXCHANGE_SECONDS)
        known = decode(frame.header, AskRevocations).known
        lacking = [one for one in gate.membership.lists if _digest(one) not in known]
        stream.limits = _ANSWER
        sizes = [len(one) for one in lacking]
        await stream.send(encode(RevocationLists(sizes)), b"".join(lacking), EXCHANGE_SECONDS)

    await transport.serve(MEMBERS_PROTOCOL, handle)


async def fetch_revocations(
    transport: Transport, member: PeerAddress, gate: MemberGate, deadline_seconds: float
) -> bool:
    """Put in force what `member` knows of and this peer doesn't; whether there was any.

    A list that can't be accepted is left out, with a line in the log. Raises MalformedMessage and
    what a stream raises.
    """

    async def ask() -> list[bytes]:
        stream = await transport.open_stream(member, MEMBERS_PROTOCOL, deadline_seconds)
        try:
            stream.limits = _QUESTION
            known = [_digest(one) for one in gate.membership.lists]
            await stream.send(encode(AskRevocations(known)), b"", deadline_seconds)
            stream.limits = _ANSWER
            frame = await stream.receive(deadline_seconds)
            sizes = decode(frame.header, RevocationLists).sizes_bytes
            return _cut(bytes(frame.body), sizes)
        finally:
            await stream.close()

    found = await within(deadline_seconds, ask(), f"asking {member.peer_id} for revocations")
    learned = False
    for one in found:
        try:
            learned |= gate.learn(one)
        except StaleRevocations:
            continue  # the member lacks what is known here, and asks for it in its turn
        except MembershipFileError as error:
            logger.error("revocations_not_kept: %s", error)  # in force; the keeper tries again
            learned = True
        except SecurityError as error:
            logger.warning("revocations_refused peer=%s: %s", member.peer_id, error)
    return learned


def _cut(body: bytes, sizes: list[int]) -> list[bytes]:
    if len(sizes) > MAX_LISTS or sum(sizes) != len(body):
        raise MalformedMessage(f"{len(sizes)} lists of {sum(sizes)} bytes in a body of {len(body)}")
    lists = []
    for size in sizes:
        lists.append(body[:size])
        body = body[size:]
    return lists


def _digest(signed: bytes) -> bytes:
    return hashlib.sha256(signed).digest()
