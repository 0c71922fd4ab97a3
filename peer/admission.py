"""Whether a part may run here: every shape inferred again, every byte and FLOP counted before."""

from __future__ import annotations

from torch import nn

from glasshive.graph.budget import Bill, Budget, admit
from glasshive.graph.order import Passes
from glasshive.graph.outline import Outline
from glasshive.graph.plan import HIDDEN, Part
from glasshive.graph.twin import Calls, surroundings


class Admission:
    """Admits parts of traces of one model. `budget` is what one of them may take."""

    def __init__(self, outline: Outline, twin: nn.Module, budget: Budget) -> None:
        self._outline = outline
        self._calls = Calls(twin, outline)
        self._budget = budget

    def admit(self, part: Part, passes: Passes) -> Bill:
        """The bill of a part; nothing is run. Raises OverBudget or ShapeMismatch with the node."""
        return admit(
            part.graph,
            surroundings(self._outline, self._calls, passes),
            self._budget,
            imports=part.specs,
            order=[node for stage in part.stages for node in stage.nodes],
            keep={v for stage in part.stages for v, _ in stage.exports if v != HIDDEN},
        )
