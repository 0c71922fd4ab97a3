"""What a member of a private swarm may use of one host, as its issuer says: three optional numbers.

They travel in the member's certificate. Each host counts for itself: a member that uses three hosts
has its quota three times.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from glasshive.security.errors import BadEnvelope

__all__ = ["Quota"]

MAX_QUOTA: Final = (1 << 53) - 1


@dataclass(frozen=True, slots=True)
class Quota:
    """Traces at a time, and seconds of computing and saved bytes in a day; None is no quota.

    Making one with a number out of range raises BadEnvelope.
    """

    traces: int | None = None
    seconds_a_day: int | None = None
    saved_bytes_a_day: int | None = None

    def __post_init__(self) -> None:
        for name, value in zip(self.__slots__, self.numbers, strict=True):
            if value is not None and not (type(value) is int and 0 <= value <= MAX_QUOTA):
                raise BadEnvelope(
                    f"the quota {name} is not a whole number of 0 to {MAX_QUOTA}, nor none"
                )

    @property
    def numbers(self) -> tuple[int | None, int | None, int | None]:
        """The three in order, as they are signed and kept."""
        return self.traces, self.seconds_a_day, self.saved_bytes_a_day

    @property
    def by_day(self) -> bool:
        """Whether there is anything to count over a day."""
        return self.seconds_a_day is not None or self.saved_bytes_a_day is not None

    def describe(self) -> str:
        """For people: `4 traces at a time, 3,600 s a day`; `no limit` without any."""
        said = (
            (self.traces, "traces at a time"),
            (self.seconds_a_day, "s a day"),
            (self.saved_bytes_a_day, "saved bytes a day"),
        )
        return ", ".join(f"{n:,} {what}" for n, what in said if n is not None) or "no limit"


NO_QUOTA: Final = Quota()


def quota_of(numbers: list[object]) -> Quota:
    """The quota with these three numbers; raises BadEnvelope."""
    if len(numbers) != len(NO_QUOTA.numbers):
        raise BadEnvelope(f"a quota has {len(NO_QUOTA.numbers)} numbers")
    return Quota(*numbers)  # type: ignore[arg-type]
