"""What a part takes besides its graph: tokens, and the hidden states that wait for their pass."""

from __future__ import annotations

import pytest

from glasshive.graph.budget import Budget
from glasshive.graph.errors import OverBudget
from glasshive.graph.graph import Graph
from glasshive.graph.order import Pass, Passes, steps_of
from glasshive.graph.plan import HIDDEN, Part, Span, Stage
from glasshive.peer.admission import Admission
from glasshive.peer.served_model import ServedModel

ROWS, SEQ, PASSES = 8, 16, 5
HIDDEN_BYTES = ROWS * SEQ * 32 * 4
TOKENS_BYTES = ROWS * SEQ * 8


def peak_bytes(
    served: ServedModel,
    *,
    comes: bool,
    leaves: bool,
    padded: bool = False,
    budget_bytes: int = 1 << 30,
) -> int:
    """The bill of a part without nodes, in the middle of a route or at one of its ends."""
    passes = Passes(tuple(Pass((i,), SEQ, padded, ((0, ROWS),)) for i in range(PASSES)))
    stages = tuple(
        Stage(
            i,
            (),
            imports=((HIDDEN, 0),) if comes else (),
            exports=((HIDDEN, 2),) if leaves else (),
            forward=True,
        )
        for i in range(PASSES)
    )
    budget = Budget(budget_bytes, 10**13, 1 << 30)
    part = Part(1, Span(1 if comes else 0, 2), Graph({}), stages, {})
    admission = Admission(served.outline, served.twin, budget, served.pace)
    return admission.admit(part, passes, repr((comes, leaves, padded)).encode()).peak_bytes


def test_hidden_states_that_wait_are_billed(served: ServedModel) -> None:
    tokens_bytes = PASSES * TOKENS_BYTES
    assert peak_bytes(served, comes=False, leaves=False) == tokens_bytes
    # All may have come before the first pass begins; none may have left when the last one ends.
    assert peak_bytes(served, comes=True, leaves=False) == PASSES * HIDDEN_BYTES
    assert peak_bytes(served, comes=False, leaves=True) == PASSES * HIDDEN_BYTES + tokens_bytes
    assert peak_bytes(served, comes=True, leaves=True) == (PASSES + 1) * HIDDEN_BYTES
    padded_bytes = (PASSES + 1) * HIDDEN_BYTES + 2 * tokens_bytes
    assert peak_bytes(served, comes=True, leaves=True, padded=True) == padded_bytes


def generation_bytes(served: ServedModel, chunk_tokens: int) -> int:
    """The bill of a middle part that generates two tokens behind a prompt."""
    tokens = 24 * SEQ
    prompt = Pass((0,), tokens, False, ((0, ROWS),))
    passes = Passes(tuple(steps_of(prompt, 2, 0, chunk_tokens)))
    stages = tuple(
        Stage(i, (), imports=((HIDDEN, 0),), exports=((HIDDEN, 2),), forward=True)
        for i in range(len(passes.passes))
    )
    part = Part(1, Span(1, 2), Graph({}), stages, {})
    budget = Budget(1 << 30, 10**13, 1 << 30)
    admission = Admission(served.outline, served.twin, budget, served.pace)
    return admission.admit(part, passes, repr(chunk_tokens).encode()).peak_bytes


def test_a_prompt_in_chunks_takes_less_while_they_wait(served: ServedModel) -> None:
    """What leaves is a chunk's; all that comes may be there, and caches have their full length."""
    whole = generation_bytes(served, 0)
    of_prompt, of_token = 24 * HIDDEN_BYTES, HIDDEN_BYTES // SEQ
    assert whole == 2 * of_prompt + of_token + caches_bytes(served, 24 * SEQ + 1)
    for chunks in (2, 3, 24):
        bill = generation_bytes(served, 24 * SEQ // chunks)
        assert bill == whole - of_prompt + of_prompt // chunks


def caches_bytes(served: ServedModel, tokens: int) -> int:
    """Of a block, and once more while it grows: keys and values."""
    return 2 * ROWS * tokens * 2 * 32 * 4


def test_a_chunk_holds_less_between_two_blocks(served: ServedModel) -> None:
    """What is left of a pass while other traces run: its mask, states and logits are a chunk's."""
    whole = served.model.pass_bytes(ROWS, 24 * SEQ)
    chunk = served.model.pass_bytes(ROWS, SEQ, 23 * SEQ)
    assert chunk < whole // 4
    assert chunk > served.model.pass_bytes(ROWS, SEQ)


def test_more_of_them_than_the_budget_is_refused(served: ServedModel) -> None:
    with pytest.raises(OverBudget) as caught:
        peak_bytes(served, comes=True, leaves=False, budget_bytes=5 * HIDDEN_BYTES - 1)
    assert str(caught.value) == (
        f"tokens and hidden states of 5 passes take {5 * HIDDEN_BYTES} bytes while they wait here, "
        f"but {5 * HIDDEN_BYTES - 1} are allowed; trace fewer or shorter prompts at a time"
    )
