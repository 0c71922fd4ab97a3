"""A deadline for each step: whether peers do what they owe, by what they say of themselves.

`Alive` says that a peer is there, not that it does anything: the thread that computes may hang, or
the peer may hold back what it has made. So it also says how far it has come and for whom it waits.
Stages have one order, and a stage imports only from those before it. So somebody always owes the
next step: a peer that waits for no other, or one end of an edge of which the sender says that it
has made a value and the receiver that none has come. Who owes something and gets no further is
found here. Nothing that a peer says makes another one look idle.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from glasshive.client.hop import HopReport
from glasshive.dht.errors import MalformedMessage
from glasshive.dht.messages import ALIVE_SECONDS, AT_WORK, ITS_TURN, Alive
from glasshive.graph.plan import HIDDEN, TOKENS, Part, Stage

__all__ = ["STEP_LIMITS", "ExpectedSeconds", "StepLimits", "StepWatch"]

ExpectedSeconds: TypeAlias = Callable[[int, Stage], float]
"""About how long the peer of the part of this index takes for a stage of it."""

_NOBODY: Final = AT_WORK, ITS_TURN
# Between two signs of life no more is counted: it was this process that stood still.
_MOST_BETWEEN_SECONDS: Final = 2 * ALIVE_SECONDS


@dataclass(frozen=True, slots=True)
class StepLimits:
    """How long a peer may get no further.

    Where it computes, `factor` times what its stage is thought to take: a kernel can't say how far
    it is. Before it has accepted its part, `most_seconds`: its checks wait for their turn.
    """

    least_seconds: float = 15.0
    factor: float = 10.0
    most_seconds: float = 150.0


STEP_LIMITS: Final = StepLimits()


class StepWatch:
    """Of one peer's part: for how long it has owed something and got no further.

    What is heard is kept in `hop`, where the watches of other parts find it.
    """

    def __init__(
        self,
        hop: HopReport,
        hops: Sequence[HopReport],
        expected_seconds: ExpectedSeconds,
        limits: StepLimits,
        clock: Callable[[], float],
    ) -> None:
        self._hop = hop
        self._hops = hops
        self._expected_seconds = expected_seconds
        self._limits = limits
        self._clock = clock
        self._moves = 0
        hop.stages_done, hop.moves, hop.waits_for = 0, 0, AT_WORK
        self.at_odds_with: HopReport | None = None
        """Who says that it owes nothing to this one, which waits for it."""
        self.moved()

    def moved(self) -> None:
        """Something else than a sign of life came from the peer."""
        self._hop.heard_at = self._clock()
        self.idle_seconds = 0.0

    def hear(self, said: Alive) -> bool:
        """Whether the peer has got no further for too long, now that it says this.

        Raises MalformedMessage for what can't be.
        """
        hop = self._hop
        stages = hop.part.stages
        if said.stages > len(stages) or said.waits_for not in (*_NOBODY, *hop.neighbours):
            raise MalformedMessage(
                f"says that it has done {said.stages} of {len(stages)} stages and waits for part "
                f"{said.waits_for}"
            )
        now = self._clock()
        passed_seconds = min(now - hop.heard_at, _MOST_BETWEEN_SECONDS)
        hop.heard_at = now
        if said.stages > hop.stages_done:
            hop.advanced_at = now
        hop.stages_done, hop.moves, hop.waits_for = said.stages, said.moves, said.waits_for
        is_owing, self.at_odds_with = self._owes()
        moves = hop.moves
        if self.at_odds_with is not None and said.stages == len(stages):
            moves += self.at_odds_with.moves  # a last value that is on its way moves its receiver
        if moves != self._moves or not is_owing:
            self._moves, self.idle_seconds = moves, 0.0
        else:
            self.idle_seconds += passed_seconds
        return self.idle_seconds > self._patience_seconds()

    def _owes(self) -> tuple[bool, HopReport | None]:
        """Whether this peer keeps the others waiting, and who else may, if it is one of two."""
        hop = self._hop
        if hop.state != "running" or hop.waits_for < 0:
            return True, None
        other = next(one for one in self._hops if one.part.index == hop.waits_for)
        if other.state == "done":
            return True, other
        if other.state == "preparing":
            return False, None
        if hop.stages_done == len(hop.part.stages):
            # The last values are on their way, or it lacks the word that they have come.
            is_owing = other.stages_done == len(other.part.stages)
            return is_owing, other if is_owing else None
        made_in = _made_in(hop.part, hop.stages_done, other.part)
        if made_in is None:
            return True, None  # nothing that it could wait for comes from there
        is_owing = other.stages_done > made_in
        return is_owing, other if is_owing else None

    def _patience_seconds(self) -> float:
        hop, limits = self._hop, self._limits
        if hop.state == "preparing":
            return limits.most_seconds
        if hop.waits_for != AT_WORK or hop.stages_done == len(hop.part.stages):
            return limits.least_seconds
        stage = hop.part.stages[hop.stages_done]
        seconds = limits.factor * self._expected_seconds(hop.part.index, stage)
        return min(max(seconds, limits.least_seconds), limits.most_seconds)


def _made_in(receiver: Part, at: int, sender: Part) -> int | None:
    """The stage of `sender` after which all has been made that a stage of `receiver` needs of it.

    None if it needs nothing.
    """
    stage = receiver.stages[at]
    awaited = {
        (value, stage.pass_index - (value == TOKENS) if value in (HIDDEN, TOKENS) else None)
        for value, part in stage.imports
        if part == sender.index
    }
    found = None
    for index, one in enumerate(sender.stages):
        for value, to in one.exports:
            key = value, one.pass_index if value in (HIDDEN, TOKENS) else None
            if to == receiver.index and key in awaited:
                found = index
    return found
