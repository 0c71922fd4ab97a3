"""Who is found to keep the others waiting, by what all peers say of themselves.

Seen failing, each alone: with `StepWatch._owes` always True, None, those who wait; with it False
for who waits, the edges; without `_MOST_BETWEEN_SECONDS`, the client that stood still; without
`made_in is None`, who has nothing to wait for; with a patience that is always the least, the long
stages.
"""

from __future__ import annotations

import random

import pytest

from glasshive.client.hop import HopReport
from glasshive.client.step_watch import StepLimits, StepWatch
from glasshive.dht.errors import MalformedMessage
from glasshive.dht.messages import ALIVE_SECONDS, AT_WORK, ITS_TURN, Alive
from glasshive.dht.transport import PeerAddress
from glasshive.graph.graph import Graph, NodeId
from glasshive.graph.plan import HIDDEN, TOKENS, Part, Span, Stage
from glasshive.security.keys import Identity

CARRIED = NodeId(3)
STEPS = 3


def parts() -> list[Part]:
    """Two peers and three steps; the second also sends a value of step 0 to step 2 of the first."""
    first, second = [], []
    for step in range(STEPS):
        tokens = ((TOKENS, 1),) if step else ()
        late = ((CARRIED, 1),) if step == 2 else ()
        first.append(Stage(step, (), (*tokens, *late), ((HIDDEN, 1),), forward=True))
        out = ((TOKENS, 0),) if step < STEPS - 1 else ()
        early = ((CARRIED, 0),) if step == 0 else ()
        second.append(Stage(step, (), ((HIDDEN, 0),), (*out, *early), forward=True))
    return [
        Part(i, Span(2 * i, 2 * i + 2), Graph({}), tuple(stages), {}, outlives_peers=True)
        for i, stages in enumerate((first, second))
    ]


class Swarm:
    """What two peers say to one client, on a clock that only moves when somebody speaks."""

    def __init__(self, stage_seconds: float = 0.0) -> None:
        self.now = 0.0
        self.hops = [
            HopReport(PeerAddress(Identity.generate().peer_id), part, state="running")
            for part in parts()
        ]
        self.watches = [
            StepWatch(
                *(hop, self.hops, lambda part, stage: stage_seconds, StepLimits()),
                clock=lambda: self.now,
            )
            for hop in self.hops
        ]

    def hear(self, *words: Alive, times: int = 1, every: float = ALIVE_SECONDS) -> list[bool]:
        """Whether each peer was found to be idle while they said this so often."""
        found = [False, False]
        for _ in range(times):
            self.now += every
            for i, word in enumerate(words):
                found[i] |= self.watches[i].hear(word)
        return found


def test_who_computes_and_gets_no_further_is_found() -> None:
    for waits_for in (AT_WORK, ITS_TURN):
        swarm = Swarm()
        words = Alive(1, 5, waits_for), Alive(1, 3, 0)
        assert swarm.hear(*words, times=8) == [False, False]  # the first word is news
        assert swarm.hear(*words) == [True, False]
        assert swarm.watches[0].at_odds_with is None
        assert swarm.watches[0].idle_seconds == 16
        assert swarm.hops[0].heard_at == swarm.now


def test_who_gets_further_is_waited_for_however_slow() -> None:
    swarm = Swarm()
    for moves in range(100):
        assert swarm.hear(Alive(1, moves), Alive(1, 3, 0), times=7) == [False, False]


def test_a_long_stage_has_its_time() -> None:
    for stage_seconds, patience_seconds in ((0.1, 15), (3, 30), (1000, 150)):
        swarm = Swarm(stage_seconds)
        swarm.hear(Alive(1, 1))
        while not swarm.hear(Alive(1, 1))[0]:
            assert swarm.watches[0].idle_seconds <= patience_seconds
        assert swarm.watches[0].idle_seconds <= patience_seconds + ALIVE_SECONDS


def test_who_waits_for_what_is_made_just_now_has_time_to_take_it() -> None:
    """However long it has waited; and each slice of a large value is a move."""
    swarm = Swarm(1000)
    assert swarm.hear(Alive(0, 1), Alive(0, 0, 0), times=40) == [False, False]
    made = Alive(1, 2, 1)
    assert swarm.hear(made, Alive(0, 0, 0), times=7)[1] is False
    for slices in range(1, 20):
        assert swarm.hear(made, Alive(0, slices, 0), times=7)[1] is False
    assert swarm.hear(made, Alive(0, 19, 0), times=2) == [False, True]
    assert swarm.watches[1].at_odds_with is swarm.hops[0]


def test_a_value_of_an_earlier_step_may_have_come_long_ago() -> None:
    """The first peer's last step waits for tokens of the one before, and for that of the first."""
    swarm = Swarm()
    assert swarm.hear(Alive(2, 5, 1), Alive(1, 5), times=8) == [False, False]
    assert swarm.hear(Alive(2, 5, 1), Alive(2, 6, 0), times=9) == [True, False]
    assert swarm.watches[0].at_odds_with is swarm.hops[1]


def test_when_a_stage_was_said_to_be_done_is_known() -> None:
    """As opposed to a slice that came, and to a word that says the same again."""
    swarm = Swarm()
    swarm.hear(Alive(0, 0, AT_WORK), Alive(0, 0, 0))
    assert swarm.hops[0].advanced_at < 0
    swarm.hear(Alive(1, 1, AT_WORK), Alive(0, 1, 0))
    then = swarm.now
    swarm.hear(Alive(1, 2, AT_WORK), Alive(0, 2, 0), times=3)
    assert swarm.hops[0].advanced_at == then
    assert swarm.hops[1].advanced_at < 0


def test_who_has_nothing_to_wait_for_waits_for_nobody() -> None:
    """Such as one that names an honest peer in its own place."""
    swarm = Swarm()
    assert swarm.hear(Alive(0, 0, 1), Alive(0, 0, 0), times=10) == [True, False]
    assert swarm.watches[0].at_odds_with is None


def test_who_waits_for_one_that_is_replaced_is_waited_for() -> None:
    swarm = Swarm()
    swarm.hear(Alive(1, 1, 1), Alive(1, 1, 0))
    swarm.hops[0].state = "preparing"
    words = Alive(), Alive(0, 0, 0)
    assert swarm.hear(*words, times=40)[1] is False
    swarm.hops[0].state = "running"  # from the start
    assert swarm.hear(Alive(0, 3), Alive(0, 0, 0), times=5) == [False, False]


def test_a_peer_that_never_accepts_is_found() -> None:
    swarm = Swarm()
    swarm.hops[0].state = "preparing"
    assert swarm.hear(Alive(), times=75) == [False, False]
    assert swarm.hear(Alive()) == [True, False]


def test_the_last_word_is_awaited_too() -> None:
    """Both have done all their stages, and one doesn't say that the last value has come."""
    swarm = Swarm()
    words = Alive(3, 9, 1), Alive(3, 9, 0)
    assert swarm.hear(*words, times=10) == [True, True]
    assert swarm.watches[0].at_odds_with is swarm.hops[1]
    swarm = Swarm()
    for moves in range(20):  # a last value is on its way
        words = Alive(3, 9, 1), Alive(3, moves, 0)
        assert swarm.hear(*words, times=7) == [False, False]
    swarm.hops[1].state = "done"
    assert swarm.hear(Alive(3, 9, 1), times=10) == [True, False]


def test_a_client_that_stood_still_blames_nobody() -> None:
    swarm = Swarm()
    words = Alive(1, 5), Alive(1, 3, 0)
    swarm.hear(*words, times=5)
    assert swarm.hear(*words, every=3600) == [False, False]
    assert swarm.hear(*words, times=20, every=0) == [False, False]  # what came meanwhile


def test_what_else_comes_is_a_move() -> None:
    swarm = Swarm()
    for _ in range(20):  # slices of a save
        assert swarm.hear(Alive(1, 5), Alive(1, 3, 0), times=7) == [False, False]
        swarm.watches[0].moved()


@pytest.mark.parametrize("said", [Alive(4), Alive(1, 0, 0), Alive(1, 0, 2), Alive(1, 0, 2**40)])
def test_what_cannot_be_is_no_word(said: Alive) -> None:
    swarm = Swarm()
    with pytest.raises(MalformedMessage, match=r"says that it has done \d of 3 stages and waits"):
        swarm.hear(said)


@pytest.mark.parametrize("first", range(0, 200, 50))
def test_of_honest_peers_the_one_that_hangs_is_found_and_no_other(first: int) -> None:
    """Wherever it hangs, and however late its words and values are."""
    for seed in range(first, first + 50):
        hangs, found = watched(random.Random(seed))
        assert found == [hangs], f"seed {seed}"


def watched(rng: random.Random) -> tuple[int, list[int]]:
    """Who hangs, and who is found to be idle."""
    swarm = Swarm()
    hangs, at = rng.randrange(2), rng.randrange(STEPS)
    stages, moves = [0, 0], [0, 0]
    came: list[set[tuple[int, int]]] = [set(), set()]
    on_way: list[tuple[float, int, tuple[int, int]]] = []

    def waits(i: int) -> bool:
        stage = swarm.hops[i].part.stages[stages[i]]
        return any(
            (value, 0 if value == CARRIED else stage.pass_index - (value == TOKENS)) not in came[i]
            for value, _ in stage.imports
        )

    def work(i: int) -> None:
        if waits(i) or (i, stages[i]) == (hangs, at):
            return
        moves[i] += 1  # a block
        if rng.random() < 0.3:
            stage = swarm.hops[i].part.stages[stages[i]]
            stages[i] += 1
            for value, to in stage.exports:
                key = value, 0 if value == CARRIED else stage.pass_index
                on_way.append((swarm.now + rng.uniform(0, 12), to, key))

    found = [False, False]
    for _ in range(300):
        for one in [one for one in on_way if one[0] <= swarm.now]:
            on_way.remove(one)
            _, to, key = one
            came[to].add(key)
            moves[to] += 1
        swarm.now += ALIVE_SECONDS
        for i in rng.sample(range(2), 2):
            hop = swarm.hops[i]
            if stages[i] < STEPS:
                work(i)
            if stages[i] == STEPS:
                hop.state = "done"
            else:
                word = Alive(stages[i], moves[i], 1 - i if waits(i) else AT_WORK)
                found[i] |= swarm.watches[i].hear(word)
    return hangs, [i for i in range(2) if found[i]]
