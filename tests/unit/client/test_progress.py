"""The lines on the terminal while a job runs: where it is, who does what, and whom it has lost."""

from __future__ import annotations

import io
import sys
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import rich.console
import rich.live
from rich.console import Console
from waits import wait_for

from glasshive.client import progress, status_text
from glasshive.client.hop import HopReport
from glasshive.client.progress import JobDisplay, text_of, token_saves
from glasshive.client.provenance import Replaced
from glasshive.client.relay import Relayed
from glasshive.client.status_text import is_terminal, waiting_for
from glasshive.dht.messages import AT_WORK
from glasshive.dht.transport import PeerAddress
from glasshive.graph.graph import Graph
from glasshive.graph.plan import Part, Span, Stage
from glasshive.security.keys import PeerId

TRAFFIC = "999 B out, 1.5 MB in, unaudited"


def hop(index: int, state: Any, passes: int, **said: Any) -> HopReport:
    """A peer of two blocks, which has so many passes."""
    stages = tuple(Stage(i, (), forward=True) for i in range(passes))
    part = Part(index, Span(2 * index, 2 * index + 2), Graph({}), stages, {})
    return HopReport(PeerAddress(PeerId(f"12D3KooWnumber{index}")), part, state=state, **said)


def job(
    states: list[Any],
    *,
    state: str = "running",
    generation: bool = False,
    stands_in: tuple[int, ...] = (),
    relayed: tuple[tuple[str, str], ...] = (),
    tokens: tuple[int, int] = (0, 0),
    **said: Any,
) -> Any:
    """So many hops; of the tokens of a generation so many have come of so many."""
    passes = tokens[1] if generation else 1
    names = [f"t0.{step}" for step in range(tokens[1])]
    return SimpleNamespace(
        state=state,
        hops=[
            hop(i, one, passes, stands_in=i in stands_in, **said) for i, one in enumerate(states)
        ],
        plan=SimpleNamespace(passes=SimpleNamespace(are_generation=generation)),
        replaced=[
            Replaced("2:4", PeerId("12D3KooWlost-one"), PeerId("12D3KooWnumber1"), 1.0, "cpu")
            for _ in stands_in
        ],
        relayed=tuple(Relayed(*blocks, 7) for blocks in relayed),
        expected=dict.fromkeys(["s0", *names]),
        saves=dict.fromkeys(["s0", *names[: tokens[0]]]),
        sent_bytes=999,
        received_bytes=1_500_000,
        clock=lambda: 3.0,
        began_at=0.0,
    )


def lines_of(made: Any, seconds: float = 1.25) -> list[str]:
    return text_of(made, seconds, token_saves(made)).splitlines()


@pytest.mark.parametrize(
    ("states", "done", "rows"),
    [
        (
            ["preparing"] * 2,
            0,
            ["  0:2  Wnumber0    preparing", "  2:4  Wnumber1    preparing"],
        ),
        (["running"] * 2, 0, ["  0:2*  Wnumber0    at work", "  2:4   Wnumber1    at work"]),
        (
            ["done", "running"],
            1,
            [
                "  0:2+  Wnumber0    computed 0.25 s, waited 1.50 s",
                "  2:4*  Wnumber1    at work",
            ],
        ),
    ],
)
def test_the_hop_at_work_has_a_mark(states: list[str], done: int, rows: list[str]) -> None:
    made = job(states, compute_seconds=0.25, wait_seconds=1.5)
    assert lines_of(made) == ["running  1.2 s", *rows, f"  {done} of 2 done, {TRAFFIC}"]


def test_in_a_generation_all_are_at_work_and_who_stands_in_is_marked() -> None:
    states = ["running", "preparing", "running"]
    made = job(states, generation=True, stands_in=(1,), tokens=(11, 64))
    made.hops[0].stages_done, made.hops[0].waits_for = 12, 2
    made.hops[2].stages_done, made.hops[2].waits_for = 11, AT_WORK
    assert lines_of(made) == [
        "running  1.2 s  11 of 64 steps",
        "  0:2*  Wnumber0  12 of 64 passes  waits for blocks 4:6",
        "  2:4~  Wnumber1  0 of 64 passes   preparing",
        "  4:6*  Wnumber2  11 of 64 passes  at work",
        "  lost-one was lost and Wnumber1 took over 2:4",
        f"  0 of 3 done, 1 replaced, {TRAFFIC}",
    ]


@pytest.mark.parametrize(
    ("state", "said", "row"),
    [
        ("running", {"heard_at": 0.5}, "2:4*  Wnumber1  17 of 60 passes  at work"),
        ("running", {"heard_at": -5.0}, "2:4*  Wnumber1  17 of 60 passes  silent for 8 s"),
        (
            "preparing",
            {"became": "lost", "gone_at": 2.5},
            "2:4   Wnumber1  17 of 60 passes  lost; looking for another",
        ),
        (
            "preparing",
            {"became": "lost", "gone_at": -9.0},
            "2:4   Wnumber1  17 of 60 passes  lost; waiting 12 of 25 s for it or another",
        ),
        (
            "preparing",
            {"became": "lost", "gone_at": -40.0},
            "2:4   Wnumber1  17 of 60 passes  lost; waiting 25 of 25 s for it or another",
        ),
        (
            "preparing",
            {"became": "failed"},  # for good
            "2:4   Wnumber1  17 of 60 passes  failed; looking for another",
        ),
    ],
)
def test_trouble_with_a_peer_is_said_in_its_row(state: str, said: Any, row: str) -> None:
    """The clock is at 3 s. Seen to say `at work`, and `preparing` of who was dead."""
    made = job(["running"] * 2, generation=True, tokens=(17, 60))
    for name, value in {"state": state, "stages_done": 17, "stands_in": True, **said}.items():
        setattr(made.hops[1], name, value)
    if state == "running":
        made.hops[1].stands_in = False
    assert lines_of(made)[2] == f"  {row}"
    assert max(map(len, lines_of(made))) <= 80


def test_who_came_back_is_told_from_who_was_replaced() -> None:
    made = job(["running"] * 2, generation=True, tokens=(3, 60))
    made.replaced = [Replaced("2:4", *[made.hops[1].peer.peer_id] * 2, 1.0, "cpu")]
    assert lines_of(made)[-2] == "  Wnumber1 was lost and came back to 2:4"


def test_who_speaks_by_way_of_this_client_is_said() -> None:
    pairs = (("0:2", "2:4"), ("0:2", "4:6"))
    said = lines_of(job(["running"] * 3, relayed=pairs))
    assert said[-3:-1] == ["  0:2 and 2:4 through you", "  0:2 and 4:6 through you"]


@pytest.mark.parametrize(
    ("came", "said"),
    [(64, "64 of 64 steps"), (12, "ended at step 11 of 64 with a stop token")],
)
def test_in_the_end_it_says_where_time_went_and_at_which_step_it_ended(
    came: int, said: str
) -> None:
    made = job(
        ["done"] * 2,
        state="done",
        generation=True,
        tokens=(came, 64),
        compute_seconds=0.25,
        wait_seconds=1.5,
    )
    assert lines_of(made) == [
        f"done  1.2 s  {said}",
        "  0:2+  Wnumber0    computed 0.25 s, waited 1.50 s",
        "  2:4+  Wnumber1    computed 0.25 s, waited 1.50 s",
        f"  2 of 2 done, {TRAFFIC}",
    ]


def test_a_token_that_was_written_comes_before_its_step() -> None:
    made = job(["done"], state="done", generation=True, tokens=(12, 64))
    made.saves["t0.40"] = None
    assert lines_of(made)[0] == "done  1.2 s  ended at step 11 of 64 with a stop token"
    made.expected["t1.0"] = None
    assert lines_of(made)[0] == "done  1.2 s  12 of 65 steps, ended early with stop tokens"


def test_a_long_route_is_cut() -> None:
    said = lines_of(job(["running"] * 40))
    assert len(said) == 15
    assert said[-2] == "  and 28 more"


class Screen(Console):
    """A terminal of 80 columns, whose text is kept."""

    def __init__(self, **options: Any) -> None:
        super().__init__(file=io.StringIO(), width=80, force_terminal=True, **options)
        made.append(self)


made: list[Screen] = []


@pytest.mark.parametrize("fails", [False, True])
def test_the_last_state_stays_unless_it_failed(fails: bool, monkeypatch: Any) -> None:
    monkeypatch.setattr(rich.console, "Console", Screen)
    made.clear()
    one = job(["running"] * 2, generation=True, tokens=(3, 64))
    try:
        with JobDisplay(True) as display:
            display.update(one)
            if fails:
                raise KeyError
            one.state = "done"
            for each in one.hops:
                each.state, each.compute_seconds = "done", 0.5
    except KeyError:
        assert fails
    (screen,) = made
    text = screen.file.getvalue()
    assert ("ended at step 2 of 64 with a stop token" in text) is not fails
    assert ("computed 0.50 s, waited 0.00 s" in text) is not fails
    assert max(map(len, lines_of(one))) < 80
    if not fails:
        assert text.rstrip().splitlines()[-2] == (
            "  2:4+  Wnumber1    computed 0.50 s, waited 0.00 s"
        )


def test_without_it_nothing_is_shown(monkeypatch: Any) -> None:
    monkeypatch.setattr(rich.console, "Console", Screen)
    made.clear()
    with JobDisplay(False) as display:
        display.update(job(["running"] * 2))
    assert not made


def test_what_is_printed_meanwhile_goes_where_it_was_meant_to(
    monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """A streamer's tokens were missing in `python generate.py > tokens.txt`."""
    monkeypatch.setattr(rich.console, "Console", Screen)
    made.clear()
    with JobDisplay(True) as display:
        display.update(job(["running"] * 2))
        print("The cat", end="", flush=True)
    assert capsys.readouterr().out == "The cat"
    (screen,) = made
    assert "running" in screen.file.getvalue()
    assert "The cat" not in screen.file.getvalue()


@pytest.mark.parametrize("is_terminal", [False, True])
def test_beside_a_streamer_a_line_says_each_time_what_holds_the_job_up(
    is_terminal: bool, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """No lines that move, and none of what is over at once, as when this process stood still."""
    monkeypatch.setattr(rich.console, "Console", Screen)
    monkeypatch.setattr("sys.stderr.isatty", lambda: is_terminal, raising=False)
    made.clear()
    one = job(["running"] * 3, generation=True, tokens=(3, 64))
    frozen, lost, busy = one.hops
    now = 0.0
    one.clock = lambda: now
    with JobDisplay("plain") as display:
        for tick in range(2000):
            now = tick / 20
            frozen.heard_at = 20.0 if 20 < now < 31 else now
            is_lost = 10 < now < 25 or 60 < now < 64.5
            lost.became, lost.gone_at = ("lost", 10.0 if now < 60 else 60.0) if is_lost else ("", 0)
            busy.heard_at = 50.0 if now == 90.0 else now
            display.update(one)
    assert not made
    told = [f"peer {each.peer.peer_id} (blocks {each.part.span}): " for each in (lost, frozen)]
    waits = f"{told[0]}lost; waiting up to 25 s for it or another\n"
    silent = f"{told[1]}silent; after 12 s it counts as lost\n"
    assert capsys.readouterr().err.split("\nglasshive: ")[1:] == (
        [waits, silent, waits] if is_terminal else []
    )


def test_of_several_waits_a_line_says_it_once(
    monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each has a display of its own."""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    said: set[str] = set()
    for seconds in (0.0, 2.9, 5.6, 8.0):
        with JobDisplay("plain", said) as display:
            for _ in range(2):
                display.say("waiting for a place at Wnumber1", seconds)
    assert capsys.readouterr().err == "\nglasshive: waiting for a place at Wnumber1\n"


class Tee:
    """What users put in the place of a stream, to have a copy."""

    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        pass


def test_what_is_printed_to_is_a_terminal_or_is_not() -> None:
    closed = io.StringIO()
    closed.close()
    tee: Any = Tee()
    assert [is_terminal(one) for one in (None, tee, closed, io.StringIO())] == [False] * 4


@pytest.mark.parametrize("moment", ["starts", "ends"])
def test_an_interrupt_leaves_no_display_on(moment: str, monkeypatch: Any) -> None:
    """What is printed later went to a display that nobody sees, on a terminal without cursor."""
    monkeypatch.setattr(rich.console, "Console", Screen)
    made.clear()
    before = sys.stdout, sys.stderr

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    def shows_and_is_interrupted() -> None:
        with JobDisplay(True) as display:
            if moment == "starts":
                monkeypatch.setattr(rich.live.Live, "refresh", interrupt)
            display.update(job(["running"] * 2))
            monkeypatch.setattr(progress, "text_of", interrupt)

    with pytest.raises(KeyboardInterrupt):
        shows_and_is_interrupted()
    assert (sys.stdout, sys.stderr) == before
    (screen,) = made
    assert "\x1b[?25h" in screen.file.getvalue().rpartition("\x1b[?25l")[2]


def test_what_is_waited_for_is_said_after_a_while_on_a_terminal_only(monkeypatch: Any) -> None:
    def timers() -> list[threading.Thread]:
        now = set(threading.enumerate()) - others
        return [one for one in now if isinstance(one, threading.Timer)]

    others = set(threading.enumerate())
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    with waiting_for("finding a place"):
        assert not timers()
    monkeypatch.setattr(screen, "isatty", lambda: True)
    with pytest.raises(KeyError), waiting_for("connecting"):
        raise KeyError
    wait_for(lambda: not timers(), "nobody is left who would say it")
    assert not screen.getvalue()
    monkeypatch.setattr(status_text, "SAY_AFTER_SECONDS", 0.0)
    with waiting_for("connecting"):
        wait_for(lambda: screen.getvalue() == "glasshive: connecting ...\n", "it is said")
