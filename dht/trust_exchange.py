"""How roots and whitelists travel: neighbours tell their versions, and the lower takes the higher.

One stream of `TRUST_PROTOCOL` brings both sides up to date, whoever opened it::

    A -> B   TrustVersions
    B -> A   TrustVersions, what A lacks (TrustRoot ..., TrustWhitelist), TrustEnd
    A -> B   what B lacks, TrustEnd
    B -> A   TrustVersions, as they are now;  A closes

Rules:

1. A neighbour is trusted with nothing. What it sends is verified by the TrustStore, whole, before
   any of it is kept: signatures, thresholds, versions, expiry, swarm.
2. Frames, documents and their number are bounded before they are read, and the whole exchange has
   one deadline. Few that strangers begin run at a time.
3. Roots come one by one in the order of their versions, from the one that was asked for on.
4. A neighbour hears why its documents were refused, and nothing of this machine's.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from glasshive.dht.deadline import within
from glasshive.dht.errors import MalformedMessage
from glasshive.dht.framing import FrameLimits, Stream
from glasshive.dht.messages import (
    TRUST_PROTOCOL,
    TrustEnd,
    TrustRoot,
    TrustVersions,
    TrustWhitelist,
    decode,
    encode,
)
from glasshive.dht.transport import PeerAddress, Transport
from glasshive.security.errors import BadTrustStore, BadWhitelist, TrustRefused
from glasshive.security.trust_root import MAX_DOCUMENT_BYTES
from glasshive.security.trust_store import MAX_ROOTS, TrustStore
from glasshive.security.whitelist import MAX_BODY_BYTES

__all__ = ["exchange_trust", "serve_trust", "versions_of"]

logger = logging.getLogger(__name__)

EXCHANGE_SECONDS: Final = 10.0
MAX_ANSWERS: Final = 4  # exchanges that others began, at a time

_LIMITS: Final = FrameLimits(
    header_bytes=256,
    body_bytes=MAX_DOCUMENT_BYTES + MAX_BODY_BYTES,
    header_depth=2,
    header_elements=8,
)


@dataclass(frozen=True, slots=True)
class _Documents:
    """What a neighbour sent, not verified yet."""

    roots: tuple[bytes, ...] = ()
    whitelist: tuple[bytes, bytes] | None = None


def versions_of(store: TrustStore) -> TrustVersions:
    """The versions in force here; whitelist 0 if the current root's keys stand for none."""
    held = store.whitelist
    return TrustVersions(store.root.version, 0 if held is None else held.whitelist.version)


async def exchange_trust(
    transport: Transport,
    peer: PeerAddress,
    store: TrustStore,
    deadline_seconds: float = EXCHANGE_SECONDS,
) -> TrustVersions:
    """Bring `store` and the peer up to date with each other; returns the peer's versions after.

    Raises TrustRefused or BadWhitelist for documents that can't be accepted here (nothing that
    fails is kept), BadTrustStore, MalformedMessage, StreamRefused if the peer refused ours and said
    why, and what a stream raises.
    """
    return await within(
        deadline_seconds,
        _exchange(transport, peer, store, deadline_seconds),
        f"exchanging whitelists with {peer.peer_id}",
    )


async def _exchange(
    transport: Transport, peer: PeerAddress, store: TrustStore, deadline_seconds: float
) -> TrustVersions:
    stream = await transport.open_stream(peer, TRUST_PROTOCOL, deadline_seconds)
    stream.limits = _LIMITS
    try:
        mine = versions_of(store)
        await stream.send(encode(mine), b"", deadline_seconds)
        frame = await stream.receive(deadline_seconds)
        theirs = decode(frame.header, TrustVersions)
        documents = await _receive(stream, mine, theirs, deadline_seconds)
        await asyncio.to_thread(store.accept, documents.roots, documents.whitelist, after=mine.root)
        await _send(stream, store, theirs, deadline_seconds)
        frame = await stream.receive(deadline_seconds)
        return decode(frame.header, TrustVersions)
    finally:
        stream.reset()


async def serve_trust(
    transport: Transport,
    store: TrustStore,
    on_news: Callable[[], None] = lambda: None,
    deadline_seconds: float = EXCHANGE_SECONDS,
) -> None:
    """From now on `transport` answers exchanges; `on_news` is called when one changed the store."""
    turns = asyncio.Semaphore(MAX_ANSWERS)

    async def answer(stream: Stream) -> None:
        stream.limits = _LIMITS
        before = versions_of(store)
        frame = await stream.receive(deadline_seconds)
        theirs = decode(frame.header, TrustVersions)
        await _send(stream, store, theirs, deadline_seconds, first=before)
        documents = await _receive(stream, before, theirs, deadline_seconds)
        try:
            await asyncio.to_thread(
                store.accept, documents.roots, documents.whitelist, after=before.root
            )
        except (TrustRefused, BadWhitelist) as error:
            logger.warning("trust_refused peer=%s: %s", stream.peer_id, error)
            await stream.refuse(f"these documents are refused: {error}")
            return
        except BadTrustStore as error:
            logger.error("trust_not_kept: %s", error)
            await stream.refuse("documents can't be kept here now; try another peer")
            return
        finally:
            if versions_of(store) != before:
                on_news()
        await stream.send(encode(versions_of(store)), b"", deadline_seconds)

    async def handle(stream: Stream) -> None:
        if turns.locked():
            await stream.refuse(f"busy: {MAX_ANSWERS} exchanges run here; try again soon")
            return
        async with turns:
            what = f"exchanging whitelists with {stream.peer_id}"
            await within(deadline_seconds, answer(stream), what)

    await transport.serve(TRUST_PROTOCOL, handle)


async def _send(
    stream: Stream,
    store: TrustStore,
    theirs: TrustVersions,
    deadline_seconds: float,
    *,
    first: TrustVersions | None = None,
) -> None:
    """Send what a side of these versions lacks; before it `first`, if that is given."""
    if first is not None:
        await stream.send(encode(first), b"", deadline_seconds)
    mine = versions_of(store)
    for version, document in enumerate(store.roots_after(theirs.root), theirs.root + 1):
        await stream.send(encode(TrustRoot(version)), document, deadline_seconds)
    held = store.whitelist
    # Under a new root the same whitelist may have been signed anew.
    if held is not None and (mine.whitelist, mine.root) > (theirs.whitelist, theirs.root):
        message = TrustWhitelist(held.whitelist.version, len(held.document))
        await stream.send(encode(message), held.document + held.body, deadline_seconds)
    await stream.send(encode(TrustEnd()), b"", deadline_seconds)


async def _receive(
    stream: Stream, mine: TrustVersions, theirs: TrustVersions, deadline_seconds: float
) -> _Documents:
    """What the other side sends to one that has the versions `mine`. Raises MalformedMessage."""
    roots: list[bytes] = []
    whitelist: tuple[bytes, bytes] | None = None
    most = min(max(theirs.root - mine.root, 0), MAX_ROOTS)
    while True:
        frame = await stream.receive(deadline_seconds)
        message = decode(frame.header, TrustRoot, TrustWhitelist, TrustEnd)
        if isinstance(message, TrustEnd):
            return _Documents(tuple(roots), whitelist)
        if whitelist is not None:
            raise MalformedMessage("a document after the whitelist, which comes last")
        if isinstance(message, TrustRoot):
            wanted = mine.root + len(roots) + 1
            if message.version != wanted or len(roots) >= most:
                raise MalformedMessage(
                    f"got root {message.version} of {stream.peer_id}, which told {theirs.root}; "
                    f"root {wanted} would be the next here"
                )
            if len(frame.body) > MAX_DOCUMENT_BYTES:
                raise MalformedMessage(
                    f"a root of {len(frame.body)} bytes; {MAX_DOCUMENT_BYTES} are allowed"
                )
            roots.append(bytes(frame.body))
            continue
        cut = message.document_bytes
        document, body = bytes(frame.body[:cut]), bytes(frame.body[cut:])
        if not 0 < len(document) <= MAX_DOCUMENT_BYTES or not 0 < len(body) <= MAX_BODY_BYTES:
            raise MalformedMessage(
                f"a whitelist of {len(document)} and {len(body)} bytes; its document has 1 to "
                f"{MAX_DOCUMENT_BYTES} and its body 1 to {MAX_BODY_BYTES}"
            )
        whitelist = document, body
