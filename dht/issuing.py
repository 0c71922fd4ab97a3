"""How one becomes a member of a private swarm, and stays one: a request, and a certificate.

One stream of `JOIN_PROTOCOL`, the only one that a stranger may open::

    joiner -> issuer   AskToJoin or AskToRenew, with a signed request
    issuer -> joiner   Granted, for who joins with the swarm's first root; or a refusal

Rules:

1. The request proves itself (`glasshive.security.invites`), and the certificate that answers it is
   of use to its sender alone: whose stream it came by doesn't matter.
2. Frames are bounded before they are read, few requests are judged at a time, and none waits long;
   who says nothing has few places of its own, and takes none of theirs.
3. The issuer's book is on the disk before the answer is given (`glasshive.security.invite_book`).
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from typing import Final

from glasshive.dht.deadline import within
from glasshive.dht.framing import Frame, FrameLimits, Stream
from glasshive.dht.messages import (
    JOIN_PROTOCOL,
    AskToJoin,
    AskToRenew,
    Granted,
    decode,
    encode,
)
from glasshive.dht.transport import PeerAddress, Transport
from glasshive.security.errors import BadInviteBook, SecurityError
from glasshive.security.invite_book import InviteBook
from glasshive.security.invites import MAX_REQUEST_BYTES
from glasshive.security.keys import PeerId
from glasshive.security.membership import MAX_CERTIFICATE_BYTES
from glasshive.security.trust_root import MAX_DOCUMENT_BYTES

__all__ = ["ask_to_join", "ask_to_renew", "serve_issuer"]

logger = logging.getLogger(__name__)

ANSWER_SECONDS: Final = 20.0  # the book is on a disk, and may be locked for a while
MAX_ASKING: Final = 16
REQUEST_SECONDS: Final = 5.0  # until the request is there
MAX_SILENT: Final = 256  # who hasn't said a word yet
MAX_SILENT_PER_PEER: Final = 2

_REQUEST: Final = FrameLimits(
    header_bytes=16, body_bytes=MAX_REQUEST_BYTES, header_depth=1, header_elements=1
)
_ANSWER: Final = FrameLimits(
    header_bytes=MAX_CERTIFICATE_BYTES + 16,
    body_bytes=MAX_DOCUMENT_BYTES,
    header_depth=1,
    header_elements=2,
)


async def serve_issuer(transport: Transport, book: InviteBook, root: bytes) -> None:
    """From now on `transport`, which is the issuer's, answers by its book.

    `root` is the document of the swarm's first root, which an invite names by its digest.
    """
    asking = 0
    silent: Counter[PeerId] = Counter()

    async def answer(stream: Stream, frame: Frame) -> None:
        message = decode(frame.header, AskToJoin, AskToRenew)
        joins = isinstance(message, AskToJoin)
        judge = book.join if joins else book.renew
        certificate = await asyncio.to_thread(judge, bytes(frame.body), transport.now())
        logger.info("%s peer=%s", "joined" if joins else "renewed", stream.peer_id)
        stream.limits = _ANSWER
        await stream.send(encode(Granted(certificate)), root if joins else b"", ANSWER_SECONDS)

    async def handle(stream: Stream) -> None:
        nonlocal asking
        stream.limits = _REQUEST
        peer = stream.peer_id
        if silent[peer] >= MAX_SILENT_PER_PEER or silent.total() >= MAX_SILENT:
            await stream.refuse("busy: others have a place here and say nothing; try again soon")
            return
        silent[peer] += 1
        try:
            frame = await stream.receive(REQUEST_SECONDS)
        finally:
            silent[peer] -= 1
            if not silent[peer]:
                del silent[peer]
        if asking >= MAX_ASKING:
            await stream.refuse(f"busy: {MAX_ASKING} others ask to join; try again soon")
            return
        asking += 1
        try:
            await within(ANSWER_SECONDS, answer(stream, frame), f"answering {peer}")
        except BadInviteBook as error:
            logger.error("invite_book: %s", error)
            await stream.refuse("the issuer can't use its book of members; its log says why")
        except SecurityError as error:
            logger.warning("join_refused peer=%s: %s", stream.peer_id, error)
            await stream.refuse(str(error))
        finally:
            asking -= 1

    await transport.serve(JOIN_PROTOCOL, handle)


async def ask_to_join(
    transport: Transport, issuer: PeerAddress, request: bytes, deadline_seconds: float
) -> tuple[bytes, bytes]:
    """The certificate and first root that the issuer gives for a request; neither is checked yet.

    Raises StreamRefused with the issuer's reason, MalformedMessage, and what a stream raises.
    """
    frame = await _asked(transport, issuer, AskToJoin(), request, deadline_seconds)
    return decode(frame.header, Granted).certificate, bytes(frame.body)


async def ask_to_renew(
    transport: Transport, issuer: PeerAddress, request: bytes, deadline_seconds: float
) -> bytes:
    """The new certificate, not checked yet. Raises as `ask_to_join`."""
    frame = await _asked(transport, issuer, AskToRenew(), request, deadline_seconds)
    return decode(frame.header, Granted).certificate


async def _asked(
    transport: Transport,
    issuer: PeerAddress,
    message: AskToJoin | AskToRenew,
    request: bytes,
    deadline_seconds: float,
) -> Frame:
    async def ask() -> Frame:
        stream = await transport.open_stream(issuer, JOIN_PROTOCOL, deadline_seconds)
        try:
            stream.limits = _REQUEST
            await stream.send(encode(message), request, deadline_seconds)
            stream.limits = _ANSWER
            return await stream.receive(deadline_seconds)
        finally:
            await stream.close()

    return await within(deadline_seconds, ask(), f"asking {issuer.peer_id} for a certificate")
