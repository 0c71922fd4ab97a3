"""Whether a peer is there at its addresses, seen before the network daemon dials them.

libp2p leaves an address alone for 5 s after a dial that failed, and longer after several, whoever
asks again, and p2pd has no setting for that: whoever came a moment too early would miss a peer that
was away for two. A plain connection leaves no such mark. That something takes it says little, as a
forwarded port does while its peer is away; but a peer then sends the greeting with which all of
libp2p begins over TCP (https://github.com/multiformats/multistream-select).

Names are left to the daemon: it asks the addresses of one side by side, and of the family that is
meant.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from collections.abc import Sequence
from typing import Final

from glasshive.dht.outcome import forget_outcome

__all__ = ["check_listening", "greet"]

GREETING_SECONDS: Final = 5.0
"""So long after it took the connection a peer may take to greet. libp2p gives all of a dial as long
in the same network, and 15 s beyond."""
_GREETING: Final = b"\x13/multistream/1.0.0\n"
_BARE_TCP: Final = re.compile(r"/ip[46]/([^/]+)/tcp/([0-9]+)(?:/p2p/[^/]+)?")


async def check_listening(addresses: Sequence[str]) -> None:
    """Returns once a peer greets at one of these multiaddrs, or if one isn't IP and bare TCP.

    Raises OSError if none does. The caller has the deadline.
    """
    places = [place for one in addresses if (place := _BARE_TCP.fullmatch(one))]
    if not places or len(places) < len(addresses):
        return
    tries = [asyncio.ensure_future(greet(one[1], int(one[2]))) for one in places]
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
    # Who was reached, and was no peer, says more than a port that is closed.
    raise OSError(_words(min(refusals, key=lambda one: bool(one.errno))))


async def greet(host: str, port: int) -> None:
    """Returns once a peer has greeted there; raises OSError."""
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(_GREETING)  # either side may wait for the other's
        async with asyncio.timeout(GREETING_SECONDS):
            said = await reader.readexactly(len(_GREETING))
    except TimeoutError:
        raise OSError("no answer in time") from None
    except (asyncio.IncompleteReadError, ConnectionError):
        said = b""
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
    if said != _GREETING:
        raise OSError("what listens there is no peer of a swarm")


def _words(error: OSError) -> str:
    """asyncio says which call failed, and not why."""
    errno = error.errno or 0  # negative: of a name
    return os.strerror(errno) if errno > 0 else str(error)
