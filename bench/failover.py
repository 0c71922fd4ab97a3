"""How soon a generation goes on after one of its peers was killed, against running it all again.

Real host processes on loopback with one thread each: three spans, two hosts of each. The middle
peer of three is killed (SIGKILL to all of its processes) when 16, 128 and 1,024 tokens have come.
Every step edits in the middle peer and saves what that makes of it. Two arms, in turn:

- failover: from the kill to the first token that needed the peer that stands in: until the client
  sees the loss, until the other has accepted the part, and until it has run all steps again. Of the
  two tokens after the kill one may have been on its way; it is the one that was waited for longest.
- undisturbed: what the first must equal to the bit, tokens and saves, and what a step takes.

Running it all again would take, once the loss is seen, what it had taken until then: from the
beginning of the job that was disturbed to the kill, and one step.

Each repeat has a graph of its own, which no peer has checked before: a stand-in is given a part
that it doesn't know. Every host has been there for some time, as it reads off what generations need
when it has nothing else to do. Bar: a generation goes on within 5 s. Exits with 1 if any result is
wrong.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from arrivals import SMALL_BLOCKS, Arrivals, save_small_model, watched
from harness import report
from trace_overhead import tokens

import glasshive
from glasshive.client.job import Job
from glasshive.dht.records import PeerRecord
from glasshive.models import find_model
from glasshive.peer.host import SWEEP_SECONDS
from glasshive.testing import LocalPeer, LocalSwarm

MADE = (16, 128, 1024)
MORE = 8  # tokens behind the kill
PROMPT = tokens(1, 8) % 2048
DEADLINE_SECONDS = 590.0
LISTED_SECONDS = 60.0  # for a host to be there again
SETTLED_SECONDS = SWEEP_SECONDS + 5


class Killed(NamedTuple):
    """A generation whose peer was killed: seconds since then, and what the stand-in computed."""

    seen: float
    accepted: float
    resumed: float
    computed: float  # until that token
    took: float  # from the beginning to the kill
    result: list[torch.Tensor]


class Undisturbed(NamedTuple):
    """A generation that nothing happened to, in seconds."""

    step: float
    result: list[torch.Tensor]


class Killer:
    """Kills the middle peer of a job once `made` tokens have come, from a thread of its own."""

    def __init__(self, hive: LocalSwarm, made: int) -> None:
        self.host = hive.hosts[0]
        self.at = 0.0
        self._hive = hive
        self._made = made
        self._due = threading.Event()
        self._thread = threading.Thread(target=self._kill, daemon=True)

    def on_job(self, job: Job) -> None:
        """Look who has the middle part."""
        self.host = next(one for one in self._hive.hosts if one.peer_id == job.peers[1].peer_id)
        self._thread.start()

    def on_token(self, arrivals: Arrivals) -> None:
        """Have it killed if it is time."""
        if len(arrivals.tokens) == self._made:
            self._due.set()

    def wait(self) -> None:
        """Returns when it is dead."""
        self._thread.join()

    def _kill(self) -> None:
        self._due.wait()
        self.at = time.monotonic()
        self.host.kill()


class Generations:
    """The generations of one number of tokens on one swarm."""

    def __init__(self, hive: LocalSwarm, swarm: Any, model: Any, blocks: int, made: int) -> None:
        self._hive = hive
        self._swarm = swarm
        self._model = model
        self._middle = model.model.layers[blocks // 2]
        self._made = made

    def undisturbed(self, repeat: int) -> Undisturbed:
        """With nothing else."""
        with watched(self._swarm) as jobs:
            _, result = self._run(repeat)
        (arrivals,) = jobs
        came = arrivals.tokens
        return Undisturbed(
            (came[-1] - came[0]) / (len(came) - 1),
            result,
        )

    def failover(self, repeat: int) -> Killed:
        """With a peer that is killed and replaced, and afterwards started again."""
        killer = Killer(self._hive, self._made)
        with watched(self._swarm, killer.on_job, killer.on_token) as jobs:
            provenance, result = self._run(repeat)
        killer.wait()
        self._start_again(killer.host)
        if len(jobs) != 1 or len(provenance.replaced) != 1:
            raise SystemExit(f"it was run again {len(jobs) - 1} times: {provenance.replaced}")
        (arrivals,), (replaced,) = jobs, provenance.replaced
        came, made = arrivals.tokens, self._made
        waits = {came[at] - max(came[at - 1], killer.at): came[at] for at in (made, made + 1)}
        accepted = arrivals.accepted[0]
        return Killed(
            accepted - replaced.seconds - killer.at,
            accepted - killer.at,
            waits[max(waits)] - killer.at,
            provenance.hops[1].compute_seconds * made / (made + MORE),
            killer.at - arrivals.job.began_at,
            result,
        )

    def _run(self, repeat: int) -> tuple[Any, list[torch.Tensor]]:
        with self._model.generate(
            PROMPT,
            max_new_tokens=self._made + MORE,
            eos_token_id=[],
            do_sample=True,
            seed=0,
            deadline=DEADLINE_SECONDS,
            progress=False,
        ) as tracer:
            saved = []
            for _ in tracer.iter[:]:
                self._middle.mlp.output[:, -1] *= 0.5 + (repeat + 1) / 64
                saved.append(self._middle.output[:, -1].save())
        return tracer.result, [tracer.output_ids.value, *(one.value for one in saved)]

    def _start_again(self, host: LocalPeer) -> None:
        """Returns when clients are told of it, don't take it for lost, and it has settled."""
        listed_until = max(one.expires_at_seconds for one in self._records_of(host))
        host.restart()
        ends_at = time.monotonic() + LISTED_SECONDS
        while all(one.expires_at_seconds <= listed_until for one in self._records_of(host)):
            if time.monotonic() > ends_at:
                raise SystemExit(f"{host.name} was started again, and is not listed")
            time.sleep(0.2)
        time.sleep(SETTLED_SECONDS)

    def _records_of(self, host: LocalPeer) -> list[PeerRecord]:
        return [one for one in self._swarm.records() if one.peer_id == host.peer_id]


def measure(
    name: str, folder: Path, blocks: int, made: list[int], repeats: int | None
) -> list[dict[str, Any]]:
    """A row for each number of tokens made."""
    third = blocks // 3
    spans = [(0, third), (third, 2 * third), (2 * third, blocks)]
    rows = []
    with (
        LocalSwarm(folder, spans, replicas=2, threads=1) as hive,
        glasshive.connect(hive.config) as swarm,
    ):
        model = swarm.model(hive.model_name)
        time.sleep(SETTLED_SECONDS)
        for n_made in made:
            several = Generations(hive, swarm, model, blocks, n_made)
            killed, plain = [], []
            for repeat in range(repeats or (5 if n_made < 1000 else 2)):
                killed.append(several.failover(repeat))
                plain.append(several.undisturbed(repeat))
            rows.append(_row(name, n_made, killed, plain))
            print(rows[-1], file=sys.stderr, flush=True)  # the next may take long
    return rows


def _row(name: str, made: int, killed: list[Killed], plain: list[Undisturbed]) -> dict[str, Any]:
    pairs = list(zip(killed, plain, strict=True))
    equal = all(
        len(one.result) == len(two.result) and all(map(torch.equal, one.result, two.result))
        for one, two in pairs
    )
    again = [one.seen + one.took + two.step for one, two in pairs]
    return {
        "model": name,
        "made": made,
        "step_ms": 1e3 * median(one.step for one in plain),
        "seen_ms": 1e3 * median(one.seen for one in killed),
        "accepted_ms": 1e3 * median(one.accepted - one.seen for one in killed),
        "replay_ms": 1e3 * median(one.resumed - one.accepted for one in killed),
        "computed_ms": 1e3 * median(one.computed for one in killed),
        "resumed_s": median(one.resumed for one in killed),
        "most_s": max(one.resumed for one in killed),
        "again_s": median(again),
        "ratio": median(one.resumed / each for one, each in zip(killed, again, strict=True)),
        "result": "bit-equal" if equal else "WRONG",
    }


def main() -> int:
    """Print the figures."""
    parser = argparse.ArgumentParser(description="Time to go on after a peer was killed.")
    parser.add_argument("--made", type=int, nargs="+", default=list(MADE))
    parser.add_argument("--only", choices=["small", "SmolLM2"])
    parser.add_argument("--repeats", type=int)
    asked = parser.parse_args()
    rows: list[dict[str, Any]] = []
    if asked.only != "SmolLM2":
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "few-numbers"
            save_small_model(str(folder))
            rows += measure("few numbers", folder, SMALL_BLOCKS, asked.made, asked.repeats)
    if asked.only != "small":
        folder = find_model("SmolLM2-135M-Instruct")
        rows += measure("SmolLM2-135M", folder, 30, asked.made, asked.repeats)
    columns = list(rows[0])
    report("failover", columns, [[row[name] for name in columns] for row in rows], {"rows": rows})
    return int(any(row["result"] != "bit-equal" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
