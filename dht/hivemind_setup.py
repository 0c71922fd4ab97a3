"""What hivemind gets of ours before anything of it runs in this process."""

from __future__ import annotations

import threading
from typing import Final

from glasshive.dht import daemon_control, hardening, member_calls, serializer

__all__ = ["prepare"]

_PREPARING: Final = threading.Lock()


def prepare() -> None:
    """Import hivemind and put our bounds into it, once for all threads.

    Its packages import each other in a circle, which fails if two threads are in it at a time.
    """
    with _PREPARING:
        serializer.install()
        hardening.patch_storage()
        member_calls.patch_calls()
        daemon_control.detach_daemons()
        daemon_control.forget_ended_calls()
