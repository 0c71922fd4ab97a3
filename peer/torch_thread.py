"""The one thread of a peer that computes. Kernels release the interpreter's lock, loops don't wait.

Work of different tenants interleaves stage by stage, in the order in which stages become ready. A
kernel can't be interrupted from within, so the thread says when its work ought to have ended: the
supervisor ends a process whose work is overdue.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor


class TorchThread:
    """Runs functions one after the other on a thread of its own."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="torch")
        self._due_at: float | None = None

    @property
    def overdue_seconds(self) -> float:
        """How long ago the work that runs now ought to have ended; 0 or less if it is in time."""
        due_at = self._due_at
        return 0.0 if due_at is None else self._clock() - due_at

    async def run(self, work: Callable[[], None], limit_seconds: float) -> None:
        """Run `work` and return when it is done; its exception is raised here.

        Work that ends later than `limit_seconds` after it began is overdue. A cancelled caller
        stops waiting at once; work that has begun runs on to its end.
        """

        def timed() -> None:
            self._due_at = self._clock() + limit_seconds
            try:
                work()
            finally:
                self._due_at = None

        await asyncio.get_running_loop().run_in_executor(self._pool, timed)

    def close(self) -> None:
        """Take no more work, and forget what has not begun."""
        self._pool.shutdown(wait=False, cancel_futures=True)
