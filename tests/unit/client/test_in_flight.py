"""Whose peers are busy with this client's own traces."""

from __future__ import annotations

import threading

from peer_records import record_of

from glasshive.client.in_flight import InFlight
from glasshive.dht.records import ModelId, PeerRecord
from glasshive.security.keys import Identity


def record() -> PeerRecord:
    return record_of(Identity.generate(), ModelId("ab" * 32), expires_at_seconds=60.0)


def test_a_trace_counts_where_it_runs_now_and_no_longer_than_it_runs() -> None:
    first, second, spare = record(), record(), record()
    in_flight = InFlight()
    hosts = [first, second, second]  # with two parts on one peer
    with in_flight.on(hosts), in_flight.on([first]):
        assert in_flight.counts() == {first.peer_id: 2, second.peer_id: 1}
        hosts[0] = spare  # which took the first one's place
        assert in_flight.counts() == {spare.peer_id: 1, first.peer_id: 1, second.peer_id: 1}
    assert in_flight.counts() == {}
    try:
        with in_flight.on(hosts):
            raise ValueError
    except ValueError:
        assert in_flight.counts() == {}


def test_traces_of_many_threads() -> None:
    in_flight, one = InFlight(), record()
    others_run = threading.Barrier(8 + 1)
    seen: list[int] = []

    def trace() -> None:
        for _ in range(200):
            with in_flight.on([one]):
                seen.append(in_flight.counts()[one.peer_id])
        with in_flight.on([one]):
            others_run.wait(20)
            others_run.wait(20)

    threads = [threading.Thread(target=trace) for _ in range(8)]
    for thread in threads:
        thread.start()
    others_run.wait(20)
    assert in_flight.counts() == {one.peer_id: 8}
    others_run.wait(20)
    for thread in threads:
        thread.join(20)
    assert in_flight.counts() == {}
    assert 1 <= min(seen) <= max(seen) <= 8
