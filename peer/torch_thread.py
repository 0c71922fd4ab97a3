"""The one thread of a peer that computes. Kernels release the interpreter's lock, loops don't wait.

Work of different tenants interleaves stage by stage, in the order in which stages become ready.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor


class TorchThread:
    """Runs functions one after the other on a thread of its own."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="torch")

    async def run(self, work: Callable[[], None]) -> None:
        """Run `work` and return when it is done; its exception is raised here.

        A cancelled caller stops waiting at once; work that has begun runs on to its end.
        """
        await asyncio.get_running_loop().run_in_executor(self._pool, work)

    def close(self) -> None:
        """Take no more work, and forget what has not begun."""
        self._pool.shutdown(wait=False, cancel_futures=True)
