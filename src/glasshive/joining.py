"""Joining a swarm at a start: bootstrap peers may be away for a while, as this machine was.

After a power cut a host may be up before its bootstrap, so it waits, with growing pauses, and says
for whom. An address that no peer could have is not waited for.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from glasshive.dht.errors import DeadlineExceeded, PeerUnreachable, StreamBusy
from glasshive.dht.listening import greet
from glasshive.dht.transport import PeerAddress

T = TypeVar("T")

FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 60.0
PATIENCE_SECONDS = 3600.0
_PROBE_SECONDS = 2.0


async def join(
    create: Callable[[], Awaitable[T]],
    bootstraps: Sequence[PeerAddress],
    on_wait: Callable[[str, float], None],
    *,
    clock: Callable[[], float] = time.monotonic,
    pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> T:
    """What `create` returns; it is tried again for an hour while no bootstrap peer answers.

    `on_wait(why, seconds)` is told before each pause. Raises PeerUnreachable after that time, at
    once if there is no bootstrap to wait for, and what else `create` raises.
    """
    ends_at = clock() + PATIENCE_SECONDS
    pause_seconds = FIRST_PAUSE_SECONDS
    while True:
        try:
            return await create()
        except (PeerUnreachable, DeadlineExceeded, StreamBusy):
            if not bootstraps:
                raise
        why = "; ".join(await asyncio.gather(*(_why_silent(one) for one in bootstraps)))
        if clock() >= ends_at:
            raise PeerUnreachable(
                f"no bootstrap peer could be joined in {PATIENCE_SECONDS / 60:.0f} minutes: {why}; "
                "check that one of them runs, and its address"
            ) from None
        on_wait(why, pause_seconds)
        await pause(pause_seconds)
        pause_seconds = min(2 * pause_seconds, LONGEST_PAUSE_SECONDS)


async def _why_silent(bootstrap: PeerAddress) -> str:
    """What its address meets us with, in a few words."""
    address = bootstrap.addresses[0]
    _, _, host, _, port, *_ = address.split("/")
    try:
        async with asyncio.timeout(_PROBE_SECONDS):
            await greet(host, int(port))
        said = "a peer answers there, but can't be joined: is the id right?"
    except TimeoutError:
        said = "no answer"
    except socket.gaierror:
        said = "no such host name"
    except ConnectionRefusedError:
        said = "nothing listens there"
    except (OSError, UnicodeError) as error:
        said = getattr(error, "strerror", None) or str(error)
    return f"{address}: {said}"
