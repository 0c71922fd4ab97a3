"""What a streamer is given of a generation that is run again."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from glasshive.client.cancellation import Cancellation
from glasshive.client.errors import TokensDiffer
from glasshive.client.experiment import Chosen
from glasshive.client.generation import _Streaming

STOP = 9


class Streamer:
    def __init__(self) -> None:
        self.given: list[list[int]] = []

    def put(self, tokens: torch.Tensor) -> None:
        self.given.append(tokens.flatten().tolist())


@pytest.fixture
def streamer() -> Streamer:
    return Streamer()


@pytest.fixture
def chosen(streamer: Streamer) -> Chosen:
    """Of a generation of up to six tokens behind a prompt of two."""
    prompt: Any = SimpleNamespace(input_ids=torch.tensor([[1, 2]]))
    tell = _Streaming(streamer, [prompt], Cancellation())
    return Chosen({(0, step): str(step) for step in range(6)}, [STOP], tell)


def saves(*tokens: int) -> dict[str, torch.Tensor]:
    return {str(step): torch.tensor([one]) for step, one in enumerate(tokens)}


def test_the_same_tokens_are_told_once(chosen: Chosen, streamer: Streamer) -> None:
    for tokens in ((3, 4), (3,), (3, 4, 5), (3, 4, 5, STOP)):
        chosen.hear(saves(*tokens))
    assert streamer.given == [[1, 2], [3], [4], [5], [STOP]]


def test_each_step_is_looked_at_once(
    chosen: Chosen, streamer: Streamer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not each time that is listened, as there may be thousands."""
    looks: list[torch.Tensor] = []
    isin = torch.isin
    monkeypatch.setattr(torch, "isin", lambda *args: looks.append(args[0]) or isin(*args))
    came = saves(3, 4, 5, 6)
    for n in (1, 1, 2, 4, 4):
        chosen.hear(dict(list(came.items())[:n]))
        assert not chosen.has_ended(0)
    assert [one.item() for one in looks] == [3, 4, 5, 6]
    assert streamer.given == [[1, 2], [3], [4], [5], [6]]
    chosen.hear(saves(3, 4, 5, 6, STOP))  # by another run
    assert chosen.has_ended(0)
    assert len(looks) == 4 + 5


def test_what_had_come_stays_until_a_new_run_has_come_as_far(chosen: Chosen) -> None:
    """A generation that is cancelled meanwhile tells of no fewer than its user saw."""
    chosen.hear(saves(3, 4))
    chosen.hear(saves(3))
    assert chosen.tokens(0).tolist() == [[3, 4]]
    chosen.hear_all(saves(3))
    assert chosen.tokens(0).tolist() == [[3]]


def test_what_is_kept_is_told_nobody(chosen: Chosen, streamer: Streamer) -> None:
    chosen.hear(saves(3, 4))
    chosen.keep(saves(3, 4, 5))
    assert chosen.tokens(0).tolist() == [[3, 4, 5]]
    chosen.keep(saves(3))  # of a run that had not come as far
    assert chosen.tokens(0).tolist() == [[3, 4, 5]]
    assert streamer.given == [[1, 2], [3], [4]]


def test_other_tokens_are_not_told_behind_those_that_were(
    chosen: Chosen, streamer: Streamer
) -> None:
    """Seen to show `3 4 6`, which no peer has generated."""
    chosen.hear(saves(3, 4))
    chosen.hear(saves(3))
    with pytest.raises(TokensDiffer, match=r"step 1 gave \[5\] when .* had been given \[4\]; on"):
        chosen.hear(saves(3, 5, 6))
    assert streamer.given == [[1, 2], [3], [4]]
