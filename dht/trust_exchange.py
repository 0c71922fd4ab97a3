"""How roots and whitelists travel: neighbours tell their versions, and the lower takes the higher.

One stream of `TRUST_PROTOCOL` brings both sides up to date, whoever opened it::

    A -> B   TrustVersions
    B -> A   TrustVersions, what A lacks (TrustRoot ..., TrustWhitelist), TrustEnd
    A -> B   what B lacks, TrustEnd, whether or not A could take what it got
    B -> A   TrustVersions, as they are now;  A closes

Rules:

1. A neighbour is trusted with nothing. What it sends is verified by the TrustStore, whole, before
   any of it is kept: signatures, thresholds, versions, expiry, swarm.
2. Frames, documents and their number are bounded before they are read, and the whole exchange has
   one deadline. A peer has one at a time that it began, and strangers have few in all; peers that
   are configured here always have a place.
3. Roots come one by one in the order of their versions, from the one that was asked for on. Nothing
   comes that is newer than what its sender told.
4. A neighbour hears why its documents were refused, and nothing of this machine's.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Final

from glasshive.dht.deadline import within
from glasshive.dht.errors import MalformedMessage, SwarmError
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
from glasshive.security.errors import BadTrustStore, BadWhitelist, SecurityError, TrustRefused
from glasshive.security.keys import PeerId
from glasshive.security.trust_root import MAX_DOCUMENT_BYTES
from glasshive.security.trust_store import MAX_ROOTS, TrustStore
from glasshive.security.whitelist import MAX_BODY_BYTES

__all__ = ["exchange_trust", "serve_trust", "versions_of"]

logger = logging.getLogger(__name__)

EXCHANGE_SECONDS: Final = 10.0
MAX_STRANGERS: Final = 16  # whose exchanges run at a time

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

    A peer with documents that can't be accepted here still gets ours: it may hold them only because
    it lacks a newer root. Nothing that fails is kept. For it TrustRefused, BadWhitelist or
    BadTrustStore is raised at the end, unless both sides have the same versions then. Raises
    MalformedMessage, StreamRefused if the peer refused ours and said why, and what a stream raises.
    """
    refused: list[SecurityError] = []
    try:
        after = await within(
            deadline_seconds,
            _exchange(transport, peer, store, deadline_seconds, refused),
            f"exchanging whitelists with {peer.peer_id}",
        )
    except SwarmError as error:
        if not refused:
            raise
        raise refused[0] from error
    if refused and after != versions_of(store):
        raise refused[0]
    return after


async def _exchange(
    transport: Transport,
    peer: PeerAddress,
    store: TrustStore,
    deadline_seconds: float,
    refused: list[SecurityError],
) -> TrustVersions:
    """The peer's versions after; why its documents were refused goes to `refused`."""
    stream = await transport.open_stream(peer, TRUST_PROTOCOL, deadline_seconds)
    stream.limits = _LIMITS
    try:
        mine = versions_of(store)
        await stream.send(encode(mine), b"", deadline_seconds)
        frame = await stream.receive(deadline_seconds)
        theirs = decode(frame.header, TrustVersions)
        documents = await _receive(stream, mine, theirs, deadline_seconds)
        try:
            await _accept(store, documents, mine)
        except (TrustRefused, BadWhitelist, BadTrustStore) as error:
            refused.append(error)
        await _send(stream, store, mine, theirs, deadline_seconds)
        frame = await stream.receive(deadline_seconds)
        return decode(frame.header, TrustVersions)
    finally:
        stream.reset()


async def serve_trust(
    transport: Transport,
    store: TrustStore,
    on_news: Callable[[], None] = lambda: None,
    deadline_seconds: float = EXCHANGE_SECONDS,
    known: Collection[PeerId] = (),
) -> None:
    """From now on `transport` answers exchanges; `on_news` is called when one changed the store.

    `known` are the peers that are no strangers.
    """
    running: set[PeerId] = set()

    async def answer(stream: Stream) -> str:
        """Take part in one exchange up to its last word; returns why that is a refusal, or ""."""
        frame = await stream.receive(deadline_seconds)
        theirs = decode(frame.header, TrustVersions)
        before = versions_of(store)
        await stream.send(encode(before), b"", deadline_seconds)
        await _send(stream, store, before, theirs, deadline_seconds)
        documents = await _receive(stream, before, theirs, deadline_seconds)
        try:
            await _accept(store, documents, before)
        except (TrustRefused, BadWhitelist) as error:
            logger.warning("trust_refused peer=%s: %s", stream.peer_id, error)
            return f"these documents are refused: {error}"
        except BadTrustStore as error:
            logger.error("trust_not_kept: %s", error)
            return "documents can't be kept here now; try another peer"
        finally:
            if versions_of(store) != before:
                on_news()
        return ""

    async def handle(stream: Stream) -> None:
        stream.limits = _LIMITS
        peer = stream.peer_id
        if peer in running:
            await stream.refuse("busy: another exchange with you runs here; try again soon")
            return
        if peer not in known and len(running.difference(known)) >= MAX_STRANGERS:
            await stream.refuse(f"busy: {MAX_STRANGERS} exchanges run here; try again soon")
            return
        running.add(peer)
        try:
            what = f"exchanging whitelists with {peer}"
            refusal = await within(deadline_seconds, answer(stream), what)
        finally:
            running.discard(peer)
        # Who hears the last word may begin anew at once.
        if refusal:
            await stream.refuse(refusal)
        else:
            await stream.send(encode(versions_of(store)), b"", deadline_seconds)

    await transport.serve(TRUST_PROTOCOL, handle)


async def _accept(store: TrustStore, documents: _Documents, told: TrustVersions) -> None:
    """Take what came to a side that told these versions. Raises what `TrustStore.accept` does."""
    if documents != _Documents():  # most exchanges bring none, and the store's file has a lock
        await asyncio.to_thread(store.accept, documents.roots, documents.whitelist, after=told.root)


async def _send(
    stream: Stream,
    store: TrustStore,
    told: TrustVersions,
    theirs: TrustVersions,
    deadline_seconds: float,
) -> None:
    """Send what a side of the versions `theirs` lacks of what it was told of.

    The store may have more by now, which that side would not expect.
    """
    lacking = store.roots_after(theirs.root)[: max(told.root - theirs.root, 0)]
    for version, document in enumerate(lacking, theirs.root + 1):
        await stream.send(encode(TrustRoot(version)), document, deadline_seconds)
    held = store.whitelist
    if (
        held is not None
        and held.whitelist.version == told.whitelist
        # Under a new root the same whitelist may have been signed anew.
        and (told.whitelist, told.root) > (theirs.whitelist, theirs.root)
    ):
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
