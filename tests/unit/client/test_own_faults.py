"""A peer that fails by its own fault is no reason to end a trace that another one would run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from played_swarm import BLOCKS, Experiment, Swarm, every_block, no_return, runner_of

from glasshive.client import known_records, left_out
from glasshive.client.errors import PeerError, PeerFailed, PeerLost
from glasshive.client.experiment import TraceOptions
from glasshive.client.route import Route
from glasshive.dht.records import PeerRecord
from glasshive.graph.plan import Span
from glasshive.security.keys import PeerId

__all__ = ["every_block", "no_return"]  # fixtures of every test

CODES = ["HostFailed", "NotEnoughMemory", "NotServed"]


def failed(code: str, peer: PeerId) -> PeerFailed:
    return PeerFailed("its log says what", code=code, node=None, peer=peer, span=Span(0, BLOCKS))


@pytest.fixture
def swarm() -> Swarm:
    return Swarm()


@pytest.fixture
def model(swarm: Swarm) -> Any:
    return runner_of(swarm)


@pytest.fixture
def run(model: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[PeerId]]:
    """Runs a trace of which each try ends with what `outcome` says of its peer.

    Gives the peers that were tried, and the error with which it ended.
    """

    def run(outcome: Callable[[PeerId], PeerError | None], **options: Any) -> Any:
        tried: list[PeerId] = []

        def once(experiment: object, options: object, route: Route, *rest: object) -> str:
            tried.append(route.records[0].peer_id)
            if (error := outcome(tried[-1])) is not None:
                raise error
            return "done"

        monkeypatch.setattr(model, "_run_once", once)
        try:
            model.run(Experiment(), TraceOptions(**options))
        except PeerError as error:
            return tried, error
        return tried, None

    return run


@pytest.mark.parametrize("code", CODES)
def test_another_peer_runs_what_one_has_failed_in(
    code: str, run: Any, model: Any, swarm: Swarm
) -> None:
    """Seen to end with what the first one said."""
    first, second, _ = (one.peer_id for one in swarm.known)
    tried, error = run(lambda peer: failed(code, peer) if peer == first else None)
    assert (tried, error) == ([first, second], None)
    assert [one.peer_id for one in swarm.known if one.peer_id in model.router.bans] == [first]
    tried, _ = run(lambda peer: None)
    assert tried == [second]


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("retries", [0, 1])
def test_what_every_host_fails_in_is_run_no_more_often_than_retries_say(
    retries: int, code: str, run: Any
) -> None:
    tried, error = run(lambda peer: failed(code, peer), retries=retries)
    assert len(set(tried)) == len(tried) == retries + 1
    text = str(error)
    assert text.startswith(f"{code} at peer {tried[-1]} (blocks 0:4): its log says what; ")
    assert f"tried, as retries={retries} says" in text
    became = "refused" if code == "NotServed" else "failed"
    assert (f"; before that: {tried[0][-8:]} {became}; " in text) == bool(retries)


def test_what_is_wrong_with_the_graph_ends_it_at_once(run: Any, model: Any, swarm: Swarm) -> None:
    tried, error = run(lambda peer: failed("ShapeMismatch", peer))
    assert len(tried) == 1
    assert str(error).startswith("ShapeMismatch at peer ")
    assert not any(one.peer_id in model.router.bans for one in swarm.known)


@pytest.mark.parametrize("code", ["HostFailed", "NotEnoughMemory"])
def test_nobody_waits_for_a_peer_that_has_failed(
    code: str, run: Any, swarm: Swarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It announces itself all the while, which says nothing."""
    monkeypatch.setattr(left_out, "RETURN_SECONDS", 2.0)
    del swarm.known[1:]
    tried, error = run(lambda peer: failed(code, peer))
    assert len(tried) == 1
    assert str(error).endswith(
        f"; left out: 0:4 by {tried[0][-8:]} (failed)); start the missing part with `glasshive "
        "serve tiny --blocks 0:4 --dtype float32 --attention sdpa --config hive.toml`; run the "
        "trace again when another peer serves its blocks, and tell its owner"
    )


def test_nobody_waits_for_a_peer_with_which_there_is_no_route_either(
    swarm: Swarm, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the only other one of those blocks has failed. Seen to wait, up to the deadline."""
    monkeypatch.setattr(left_out, "RETURN_SECONDS", 1e9)
    monkeypatch.setattr(left_out, "SOON_SECONDS", 0.0)
    first, second, _ = swarm.known = [swarm._record(*one) for one in ((0, 2), (2, 4), (2, 4))]
    said = iter([PeerLost("gone", peer=second.peer_id), failed("HostFailed", first.peer_id)])

    def once(experiment: object, options: object, route: Route, left: float, tries: Any) -> None:
        tries.has_run = True
        raise next(said)

    monkeypatch.setattr(model, "_run_once", once)
    with pytest.raises(PeerFailed, match="no other route: nobody else serves blocks 0:2") as caught:
        model.run(Experiment(), TraceOptions(deadline_seconds=20, show_progress=False))
    assert f"left out: 0:2 by {first.peer_id[-8:]} (failed)" in str(caught.value)
    assert "waited" not in str(caught.value)


def test_a_host_that_was_started_with_other_blocks_is_waited_for(
    run: Any, swarm: Swarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until its new record is known, which may be of blocks that the trace needs as well."""
    monkeypatch.setattr(left_out, "RETURN_SECONDS", 20.0)
    monkeypatch.setattr(left_out, "SOON_SECONDS", 0.0)
    monkeypatch.setattr(known_records, "ASK_AGAIN_SECONDS", 0.01)
    del swarm.known[1:]
    (before,) = swarm.known
    after = replace(before, expires_at_seconds=before.expires_at_seconds + 30)
    said = iter([failed("NotServed", before.peer_id), None])
    asked: list[object] = []

    def answer(*given: object) -> list[PeerRecord]:
        asked.append(given)
        return [after if len(asked) > 3 else before]

    monkeypatch.setattr(swarm, "records", answer)
    assert run(lambda peer: next(said)) == ([before.peer_id] * 2, None)


def test_a_refusal_of_the_graph_by_limits_says_more(run: Any, swarm: Swarm) -> None:
    del swarm.known[2:]
    said = iter(["OverBudget", "HostFailed"])
    tried, error = run(lambda peer: failed(next(said), peer))
    assert len(tried) == 2
    assert error.code == "OverBudget"


def test_a_loss_after_a_failure_tells_of_both(run: Any, swarm: Swarm) -> None:
    first, *_ = (one.peer_id for one in swarm.known)
    _, error = run(
        lambda peer: failed("HostFailed", peer) if peer == first else PeerLost("gone", peer=peer),
        retries=1,
    )
    assert isinstance(error, PeerLost)
    assert f"; before that: {first[-8:]} failed; " in str(error)
