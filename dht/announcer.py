"""Keeps a peer's record in the DHT: announces it, again and again, and withdraws it at the end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Mapping
from dataclasses import replace
from types import TracebackType
from typing import Final, final

from glasshive.dht.deadline import within
from glasshive.dht.errors import SwarmError, TransportError
from glasshive.dht.records import MAX_LIFETIME_SECONDS, PeerRecord, keys_of
from glasshive.dht.transport import Transport
from glasshive.security.keys import Identity

__all__ = ["Announcer", "announce", "withdraw"]

logger = logging.getLogger(__name__)

WITHDRAW_DEADLINE_SECONDS: Final = 7.0
"""A store takes up to 6 s where some peers say nothing. Less than a process is given to stop."""
LEAST_PAUSE: Final = 0.1
"""Of the time between two announcements, that stays at least where the DHT is slow to take them."""


async def announce(
    transport: Transport, identity: Identity, record: PeerRecord
) -> Mapping[str, bool]:
    """Signs `record` and stores it under all of its keys; for each, whether the DHT took it."""
    value = record.sign(identity, swarm=transport.swarm)
    return await transport.store_many(
        keys_of(record), identity.peer_id, value, record.expires_at_seconds
    )


async def withdraw(
    transport: Transport, identity: Identity, record: PeerRecord
) -> Mapping[str, bool]:
    """Replaces `record`, the last one announced, by one that says that the peer has left.

    It expires a second later than what it replaces: the DHT keeps whichever expires last.
    """
    gone = replace(record, withdrawn=True).renewed(record.expires_at_seconds + 1)
    return await announce(transport, identity, gone)


@final
class Announcer:
    """Announces a record at once and then each third of its lifetime, until `close`.

    That is from the beginning of one to that of the next: those who wait for a peer to come back
    count on it.

    The expiry of the record that is given doesn't matter. A failed try, whatever was raised, is
    logged, kept in `error` and followed by the next; after the transport was lost and rebuilt, it
    goes on by itself. An async context manager.
    """

    def __init__(
        self,
        transport: Transport,
        identity: Identity,
        record: PeerRecord,
        lifetime_seconds: float = MAX_LIFETIME_SECONDS,
    ) -> None:
        self.error: Exception | None = None
        self._transport = transport
        self._identity = identity
        self._record = record
        self._lifetime_seconds = lifetime_seconds
        self._last: PeerRecord | None = None
        self._changed = asyncio.Event()
        self._began_at = 0.0  # the last announcement, by the loop's clock
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Announces once, raising what fails, and goes on in a task of its own."""
        await self._announce()
        self._task = asyncio.create_task(self._go_on())

    def update(self, record: PeerRecord) -> None:
        """Announces this from now on, the first time at once; a withdrawn one, too.

        For another span or model close this announcer and start a new one: the keys that the new
        record doesn't share would keep the old one until it expires.
        """
        self._record = record
        self._changed.set()

    async def close(self) -> None:
        """Stops, and withdraws what was announced. Never raises for the network's sake."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
            self._task = None
        last, self._last = self._last, None
        if last is not None:
            with contextlib.suppress(SwarmError):
                await within(
                    WITHDRAW_DEADLINE_SECONDS,
                    withdraw(self._transport, self._identity, last),
                    "withdrawing the record",
                )

    async def _announce(self) -> None:
        self._began_at = asyncio.get_running_loop().time()
        expires_at_seconds = self._transport.now() + self._lifetime_seconds
        if self._last is not None:
            # The DHT keeps whichever expires last, also when an update follows at once.
            expires_at_seconds = max(expires_at_seconds, self._last.expires_at_seconds + 0.001)
        record = self._record.renewed(expires_at_seconds)
        self._last = record
        stored = await announce(self._transport, self._identity, record)
        if not any(stored.values()):
            raise TransportError("no peer of the DHT took the record; it is tried again")

    async def _go_on(self) -> None:
        period_seconds = self._lifetime_seconds / 3
        while True:
            took_seconds = asyncio.get_running_loop().time() - self._began_at
            pause_seconds = max(period_seconds - took_seconds, LEAST_PAUSE * period_seconds)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_seconds):
                    await self._changed.wait()
            self._changed.clear()  # here: what changes while this is announced is announced next
            try:
                await self._announce()
                self.error = None
            except SwarmError as error:
                logger.warning("announce_failed: %s: %s", type(error).__name__, error)
                self.error = error
            except Exception as error:
                # A bug: a host that is not announced any more is nobody's, and can't tell.
                logger.exception("announce_failed")
                self.error = error

    async def __aenter__(self) -> Announcer:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()
