"""Whether anything listens at a peer's addresses, seen before the network daemon dials them.

libp2p leaves an address alone for 5 s after it has refused, whoever asks again, and p2pd has no
setting for that: whoever came a moment too early would miss a host that was away for two. A plain
connection that is closed at once leaves no such mark.

Names are left to the daemon: it asks the addresses of one side by side, and of the family that is
meant.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Sequence

from glasshive.dht.outcome import forget_outcome

__all__ = ["check_listening"]


async def check_listening(addresses: Sequence[str]) -> None:
    """Returns once one of these multiaddrs takes a TCP connection, or if one isn't IP and TCP.

    Raises OSError if none does. The caller has the deadline.
    """
    places = [one.split("/")[1:5] for one in addresses]
    if not all(kind.startswith("ip") and protocol == "tcp" for kind, _, protocol, _ in places):
        return
    tries = [asyncio.ensure_future(_try(host, int(port))) for _, host, _, port in places]
    refusals: list[OSError] = []
    try:
        for one in asyncio.as_completed(tries):
            try:
                await one
            except OSError as error:
                refusals.append(error)
            else:
                return
    finally:
        for task in tries:
            task.cancel()
            task.add_done_callback(forget_outcome)
    if refusals:
        raise OSError(_words(refusals[0]))


async def _try(host: str, port: int) -> None:
    _, writer = await asyncio.open_connection(host, port)
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


def _words(error: OSError) -> str:
    """asyncio says which call failed, and not why."""
    return os.strerror(error.errno) if error.errno else str(error)
