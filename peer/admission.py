"""Whether a part may run here: every shape inferred again, every byte and FLOP counted before.

First the policy is asked: which ops, which modules, how many nodes and constants. One admission
belongs to one policy; `under` makes the next.

The seconds of a part, its passes through the model included, follow from the host's measured pace.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from copy import copy
from dataclasses import replace

from torch import nn

from glasshive.graph.budget import Bill, Budget, admit
from glasshive.graph.calls import Calls, surroundings
from glasshive.graph.errors import OverBudget
from glasshive.graph.order import Passes
from glasshive.graph.outline import Outline
from glasshive.graph.plan import HIDDEN, Part
from glasshive.graph.tensors import SpecArg, Specs
from glasshive.peer.pace import HostPace
from glasshive.security.policy import Policy

_KEPT_VERDICTS = 256
# Of each token of the vocabulary while one is chosen: logits and chances, sorted and summed.
_CHANCES_BYTES = 48
_GRAM_BYTES = 48


class Admission:
    """Admits parts of traces of one model. `budget` is what one of them may take at `pace`.

    A bill is kept by the hash of the part's bytes, which hold the graph, the sizes of the passes
    and the shapes of what comes in; model, dtype, budget and policy are the same for all.
    """

    def __init__(
        self,
        outline: Outline,
        twin: nn.Module,
        budget: Budget,
        pace: HostPace,
        policy: Policy | None = None,
    ) -> None:
        self.policy = Policy.of_release() if policy is None else policy
        self._outline = outline
        self._calls = Calls(twin, outline)
        self._budget = replace(budget, pace=pace.graph)
        self._pace = pace
        self._known: OrderedDict[bytes, Bill] = OrderedDict()

    def under(self, policy: Policy, budget: Budget) -> Admission:
        """The same under another policy and budget. No bill of this one counts there."""
        other = copy(self)
        other.policy = policy
        other._budget = replace(budget, pace=self._pace.graph)
        other._known = OrderedDict()
        return other

    def admit(
        self,
        part: Part,
        passes: Passes,
        data: bytes | bytearray,
        go_on: Callable[[], None] = lambda: None,
    ) -> Bill:
        """The bill of a part that was decoded from `data`; nothing is run.

        Raises NotAllowed, OverBudget or ShapeMismatch with the node, and what `go_on` raises: it is
        called before each op, so that a check which nobody waits for any more can be ended.
        """
        key = hashlib.sha256(data).digest()
        bill = self._known.get(key)
        if bill is None:
            bill = self._known[key] = self._count(part, passes, go_on)
            if len(self._known) > _KEPT_VERDICTS:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        return bill

    def _count(self, part: Part, passes: Passes, go_on: Callable[[], None]) -> Bill:
        self.policy.check_graph(part.graph)
        forwards = [passes.passes[stage.pass_index] for stage in part.stages if stage.forward]
        seconds = sum(self._pace.forward_seconds(one.batch, one.seq, one.past) for one in forwards)
        if seconds > self._budget.seconds:
            tokens = sum(one.batch * one.seq for one in forwards)
            raise OverBudget(
                f"{tokens} tokens in {len(forwards)} passes take about {seconds:.3g} s of this "
                f"peer's time, but {self._budget.seconds:.3g} s are allowed"
                f"{self._budget.by('seconds')}; trace fewer or shorter prompts at a time"
            )
        waiting_bytes = self._waiting_bytes(part, passes) + self._generation_bytes(part, passes)
        if waiting_bytes > self._budget.peak_bytes:
            also = " with their caches" if passes.are_generation else ""
            raise OverBudget(
                f"tokens and hidden states of {len(forwards)} passes{also} take {waiting_bytes} "
                f"bytes while they wait here, but {self._budget.peak_bytes} are allowed"
                f"{self._budget.by('peak_bytes')}; trace fewer or shorter prompts at a time"
            )
        model = surroundings(self._outline, self._calls, passes)

        def infer(name: str, args: tuple[SpecArg, ...]) -> Specs:
            go_on()
            return model.infer(name, args)

        bill = admit(
            part.graph,
            replace(model, infer=infer),
            replace(self._budget, seconds=self._budget.seconds - seconds),
            imports=part.specs,
            order=[node for stage in part.stages for node in stage.nodes],
            keep={v for stage in part.stages for v, _ in stage.exports if v >= 0},
            resident_bytes=waiting_bytes,
        )
        return replace(bill, seconds=bill.seconds + seconds)

    def _generation_bytes(self, part: Part, passes: Passes) -> int:
        """What the steps of a generation keep here at most, one prompt's after the other.

        The caches at their full length, of which one block's is there twice while it grows; and
        where tokens are chosen, all of them, and some copies of the chances of each.
        """
        most_bytes = 0
        for index, one in enumerate(passes.passes):
            if one.group < 0 or passes.goes_on(index):
                continue  # no cache, or not yet at its full length
            tokens = one.past + one.seq
            blocks = [
                one.batch * (kept + each * tokens)
                for kept, each in self._outline.steps().cache_bytes[part.span.start : part.span.end]
            ]
            now_bytes = sum(blocks) + max(blocks)
            if part.sampling is not None:
                chances_bytes = _CHANCES_BYTES * self._outline.vocabulary_tokens
                # transformers keeps the n-grams of each row in lists and tuples of Python.
                asked = part.sampling
                grams = asked.no_repeat_ngram_size + asked.encoder_no_repeat_ngram_size
                grams_bytes = _GRAM_BYTES * grams * tokens
                compared_bytes = sum(map(len, asked.bad_words_ids)) + sum(
                    len(sequence) for sequence, _ in asked.sequence_bias
                )
                now_bytes += one.batch * (
                    2 * 8 * tokens + chances_bytes + grams_bytes + compared_bytes
                )
            most_bytes = max(most_bytes, now_bytes)
        return most_bytes

    def _waiting_bytes(self, part: Part, passes: Passes) -> int:
        """What the passes take at most besides the graph: tokens, and hidden states that wait.

        Those that come in may all have arrived before the first stage, and of those that leave none
        may have been taken when the last one ends.
        """
        stages = [stage for stage in part.stages if stage.forward]
        inputs_bytes = 0
        waiting_bytes = 0  # before a stage: what it and later ones import, what earlier ones export
        for stage in stages:
            one = passes.passes[stage.pass_index]
            # Token ids, also where the next ones are chosen; mask and positions.
            tensors = (part.span.start == 0 or part.sampling is not None) + 2 * one.padded
            inputs_bytes += tensors * one.batch * one.seq * 8
            if any(value == HIDDEN for value, _ in stage.imports):
                waiting_bytes += self._outline.hidden_spec(one.batch, one.seq).nbytes
        most_bytes = waiting_bytes
        for stage in stages:
            one = passes.passes[stage.pass_index]
            hidden_bytes = self._outline.hidden_spec(one.batch, one.seq).nbytes
            if any(value == HIDDEN for value, _ in stage.exports):
                waiting_bytes += hidden_bytes
            most_bytes = max(most_bytes, waiting_bytes)
            if any(value == HIDDEN for value, _ in stage.imports):
                waiting_bytes -= hidden_bytes
        return inputs_bytes + most_bytes
