"""That a trace was cancelled, as all who work for it in whatever thread may ask."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, Final, final

from glasshive.client.errors import TraceCancelled

__all__ = ["Cancellation"]

_CANCELLED: Final = "cancelled"


@final
class Cancellation:
    """Whether one trace was cancelled, or ended before: which of the two came first, decides.

    Nothing here waits for a lock: a signal's handler may call `cancel` in the midst of the rest.
    """

    def __init__(self, what: str = "a trace") -> None:
        self._what = what
        self._first: dict[str, bool] = {}  # what came first; setting it is one step of Python's
        self._waits_for: Future[Any] | None = None
        self._began_at: float | None = None  # on the monotonic clock

    def cancel(self) -> bool:
        """Cancel the trace, at once and from any thread; False if it had ended before."""
        is_cancelled = self._first.setdefault(_CANCELLED, True)
        if is_cancelled and (future := self._waits_for) is not None:
            future.cancel()
        return is_cancelled

    def check(self) -> None:
        """Raise TraceCancelled if the trace was cancelled."""
        if self._first.get(_CANCELLED, False):
            raise self._error() from None

    def watch(self, future: Future[Any]) -> None:
        """From now on the trace waits for `future`, which is cancelled with it.

        Raises TraceCancelled if it was cancelled already.
        """
        self._waits_for = future  # before the look: `cancel` does both the other way round
        self.check()

    def end(self) -> bool:
        """From now on `cancel` has no effect; whether it had one before."""
        return self._first.setdefault(_CANCELLED, False)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside it the trace runs, to its end.

        Raises TraceCancelled if it was cancelled until then, whatever else it ended with.
        """
        self._began_at = time.monotonic()
        try:
            yield
        except Exception as error:
            if self.end() and not isinstance(error, TraceCancelled):
                raise self._error() from error
            raise
        except BaseException:
            self.end()
            raise
        if self.end():
            raise self._error()

    def _error(self) -> TraceCancelled:
        if self._began_at is None:
            how_far = "before its block had ended, and nothing was sent"
        else:
            seconds = time.monotonic() - self._began_at
            how_far = f"{seconds:.3g} s after it had begun to run, and its peers stop"
        return TraceCancelled(
            f"{self._what} was cancelled by tracer.cancel() {how_far}; write the block again to "
            "run it"
        )
