"""Traces over real host processes, and what happens when these are killed, frozen or stopped.

The hosts cost seconds to start, so tests share them: a test that ends one starts it again.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llama import save_llama
from transformers import LlamaForCausalLM
from waits import wait_for

import glasshive
from glasshive import testing
from glasshive.client import job, known_records, left_out
from glasshive.client.errors import PeerLost, TraceTimeout
from glasshive.dht.errors import AmbiguousModel, UnknownModel
from glasshive.dht.messages import TRACE_PROTOCOL, Failed, Prepare, decode, encode
from glasshive.dht.transport import PeerAddress
from glasshive.graph.plan_codec import encode_part
from glasshive.security.keys import Identity
from glasshive.security.requests import TraceRequest
from glasshive.testing import LocalPeer, LocalSwarm, SwarmNotReady

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:path is deprecated:DeprecationWarning"),
]

PROMPT = torch.tensor([[3, 14, 15, 9, 26, 5, 35]])
HEAVY = 300  # matrix products: some seconds
NAME = "tiny-llama"
SPANS = [(0, 2), (2, 4), (4, 6), (2, 4)]


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache folder of the tests' own."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLASSHIVE_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def llama(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("models") / NAME, 6)


@pytest.fixture(scope="session")
def hive(llama: Path) -> Iterator[LocalSwarm]:
    """Blocks 0:2, 2:4 and 4:6 by a host each, and 2:4 by a fourth."""
    with LocalSwarm(llama, SPANS) as running:
        yield running


@pytest.fixture(scope="session")
def swarm(hive: LocalSwarm) -> Iterator[glasshive.Swarm]:
    with glasshive.connect(hive.config) as connected:
        yield connected


@pytest.fixture
def model(swarm: glasshive.Swarm, hive: LocalSwarm) -> glasshive.Model:
    """The model as a client sees it, with every host there."""
    listed(swarm, hive.hosts[: len(SPANS)])
    return swarm.model(NAME)


def listed(swarm: glasshive.Swarm, hosts: list[LocalPeer]) -> None:
    """Returns when the directory lists exactly these hosts, where they listen now."""
    wanted = {host.address for host in hosts}

    def same() -> bool:
        try:
            # Asked in each way, as a trace does in the last: a bootstrap keeps each answer for a
            # second.
            answers = [swarm.records(), swarm.records(NAME)]
            answers += [swarm.records(one) for one in {one.model for one in answers[1]}]
        except (AmbiguousModel, UnknownModel):
            return False
        return all({one.addresses[0] for one in records} == wanted for records in answers)

    wait_for(same, f"the directory lists {hosts}")


def oracle(folder: Path) -> list[torch.Tensor]:
    """Plain Hugging Face with hooks: every block's output and the logits, with the same edit."""
    model = LlamaForCausalLM.from_pretrained(folder)
    seen: list[torch.Tensor] = []

    def keep(module: Any, args: Any, output: torch.Tensor) -> None:
        seen.append(output.detach().clone())

    def zero(module: Any, args: Any, output: torch.Tensor) -> None:
        output[:, -1] = 0

    for block in model.model.layers:
        block.register_forward_hook(keep)
    model.model.layers[3].mlp.register_forward_hook(zero)
    with torch.no_grad():
        logits = model(PROMPT).logits
    return [*seen, logits]


def run(model: glasshive.Model, **options: Any) -> list[torch.Tensor]:
    """The same on the swarm."""
    with model.trace(PROMPT, **options):
        saved = [block.output.save() for block in model.model.layers[:3]]
        model.model.layers[3].mlp.output[:, -1] = 0
        saved += [block.output.save() for block in model.model.layers[3:]]
        saved.append(model.lm_head.output.save())
    return saved


def run_heavy(model: glasshive.Model, **options: Any) -> torch.Tensor:
    """Seconds of work at block 2, in one run of nodes, for which the last span waits."""
    matrix = torch.eye(700)
    with model.trace(PROMPT, **options):
        value = matrix * model.model.layers[2].output[0, 0, 0]
        for _ in range(HEAVY):
            value = value @ matrix
        saved = (value[0, 0] + model.model.layers[5].output[0, 0, 0]).save()
    return saved


def equal(got: list[torch.Tensor], wanted: list[torch.Tensor]) -> bool:
    return len(got) == len(wanted) and all(map(torch.equal, got, wanted))


def accepted(host: LocalPeer) -> int:
    return sum(one["event"] == "trace_accepted" for one in host.events)


class InThread(threading.Thread):
    """A call whose result or exception is kept."""

    def __init__(self, call: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self.call = call
        self.result: Any = None
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self.result = self.call()
        except BaseException as error:
            self.error = error


def the_one_that_computes(
    hive: LocalSwarm, before: dict[str, int], error: Callable[[], object] = lambda: None
) -> LocalPeer:
    """The host of 2:4 that took the trace; waits until one has."""
    both = [hive.hosts[1], hive.hosts[3]]
    wait_for(lambda: error() or any(accepted(one) > before[one.name] for one in both), "accepted")
    assert error() is None
    return next(one for one in both if accepted(one) > before[one.name])


def test_a_trace_over_three_hosts_equals_plain_hugging_face(
    model: glasshive.Model, llama: Path
) -> None:
    assert equal(run(model), oracle(llama))


def test_status_lists_who_serves_what(model: glasshive.Model, hive: LocalSwarm) -> None:
    command = [sys.executable, "-m", "glasshive.cli", "status", "--config", str(hive.config)]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    (of_model,) = report["models"]
    assert (of_model["name"], of_model["n_blocks"]) == (NAME, 6)
    assert of_model["peers_per_block"] == [1, 1, 2, 2, 1, 1]
    assert of_model["missing_blocks"] == []
    assert {one["peer_id"]: (one["start"], one["end"]) for one in of_model["served_by"]} == {
        host.peer_id: span for host, span in zip(hive.hosts, SPANS, strict=False)
    }


def test_a_host_killed_in_a_trace_is_replaced(
    model: glasshive.Model, hive: LocalSwarm, swarm: glasshive.Swarm
) -> None:
    before = {one.name: accepted(one) for one in hive.hosts}
    trace = InThread(lambda: run_heavy(model))
    victim = the_one_that_computes(hive, before, lambda: trace.error)
    victim.kill()
    trace.join(120)
    assert trace.error is None
    assert trace.result.shape == ()
    other = hive.hosts[1] if victim is hive.hosts[3] else hive.hosts[3]
    assert accepted(other) == before[other.name] + 1
    victim.restart()
    listed(swarm, hive.hosts[: len(SPANS)])


def test_a_host_killed_without_a_replacement_is_named(
    model: glasshive.Model,
    hive: LocalSwarm,
    swarm: glasshive.Swarm,
    llama: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(left_out, "RETURN_SECONDS", 1.1)
    victim = hive.hosts[0]

    with monkeypatch.context() as patch:
        sent, send_signal = [], testing._signal
        patch.setattr(testing, "_signal", lambda *args: sent.append(args) or send_signal(*args))
        pids = victim.pids()
        victim.kill()
    # On a busy machine one of its processes saw another's end, and withdrew the record.
    first_kill = next(at for at, (_, which) in enumerate(sent) if which == signal.SIGKILL)
    assert {(pid, signal.SIGSTOP) for pid in pids} <= set(sent[:first_kill])
    began = time.monotonic()
    with pytest.raises(PeerLost, match=victim.peer_id) as caught:
        run(model, deadline=30)
    assert victim.peer_id in {one.peer_id for one in swarm.records()}
    text, own = str(caught.value), f"--config {hive.config} --bootstrap {hive.bootstrap.address}"
    assert re.search(
        rf"{victim.peer_id} \(blocks 0:2\) .*; waited 1 s for {victim.peer_id} to come back; no "
        rf"other route: nobody else serves blocks 0:2 .*; start the missing part with "
        rf"`glasshive serve {NAME} --blocks 0:2 --dtype float32 --attention ",
        text,
    )
    assert text.count(f"glasshive status {own}`") == text.count(own) == 1
    assert "--config hive.toml`" in text
    assert "again in a moment" not in text
    assert time.monotonic() - began < 20
    victim.restart()
    listed(swarm, hive.hosts[: len(SPANS)])
    assert equal(run(model), oracle(llama))


def test_a_trace_leaves_a_frozen_host(model: glasshive.Model, hive: LocalSwarm) -> None:
    before = {one.name: accepted(one) for one in hive.hosts}
    trace = InThread(lambda: run_heavy(model))
    victim = the_one_that_computes(hive, before, lambda: trace.error)
    other = hive.hosts[1] if victim is hive.hosts[3] else hive.hosts[3]
    victim.freeze()
    try:
        trace.join(120)
        assert trace.error is None
        assert trace.result.shape == ()
        assert accepted(other) == before[other.name] + 1
        # Until it announces itself anew, nobody asks the frozen one again.
        again = accepted(victim)
        run_heavy(model)
        assert accepted(victim) == again
        assert accepted(other) == before[other.name] + 2
    finally:
        victim.thaw()


def test_a_frozen_host_without_a_replacement_is_named(
    model: glasshive.Model, hive: LocalSwarm, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(left_out, "RETURN_SECONDS", 0.0)
    victim = hive.hosts[2]
    victim.freeze()
    try:
        # Every 30 s libp2p asks the other end of a connection whether it is there, and ends the
        # connection if no answer comes in 10 s: now and then that is earlier.
        text = rf"{victim.peer_id} .*(has been silent for 12 s|was lost while it)"
        with pytest.raises(PeerLost, match=text):
            run(model, deadline=60)
        text = rf"not done: .*{victim.peer_id}|{victim.peer_id} .*was lost while it"
        with pytest.raises((TraceTimeout, PeerLost), match=text):
            run(model, deadline=2)
    finally:
        victim.thaw()
    assert equal(run(model), oracle(llama))


def test_a_frozen_first_bootstrap_hinders_nobody(
    model: glasshive.Model,
    hive: LocalSwarm,
    swarm: glasshive.Swarm,
    llama: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second one, here a host, was asked only when the first had had all of the time."""
    monkeypatch.setattr(known_records, "FRESH_SECONDS", 0.0)  # each trace asks the directory
    wanted = oracle(llama)
    config = hive.config.parent / "two.toml"
    first, second = hive.bootstrap, hive.hosts[0]
    both = f'{first.address}", "{second.address}'
    config.write_text(hive.config.read_text().replace(first.address, both))
    victim: LocalPeer | None = None
    with glasshive.connect(config) as other:
        mine = other.model(NAME)
        assert equal(run(mine), wanted)
        first.freeze()
        try:

            def is_soon() -> bool:
                began = time.monotonic()
                assert equal(run(mine), wanted)
                return time.monotonic() - began < known_records.ASK_SECONDS

            # A host's own look-up takes 3 s until all that it asks leave the frozen one out.
            wait_for(is_soon, "a trace that waits for no silent bootstrap peer")
            before = {one.name: accepted(one) for one in hive.hosts}
            trace = InThread(lambda: run_heavy(mine, deadline=60))
            victim = the_one_that_computes(hive, before, lambda: trace.error)
            victim.kill()
            trace.join(60)
            assert trace.error is None
            assert trace.result.shape == ()
            with glasshive.connect(config) as new:
                assert equal(run(new.model(NAME)), wanted)
        finally:
            first.thaw()
            if victim is not None:
                victim.restart()
    listed(swarm, hive.hosts[: len(SPANS)])


def test_a_stopped_host_withdraws_its_record(
    model: glasshive.Model, hive: LocalSwarm, swarm: glasshive.Swarm
) -> None:
    host = hive.hosts[3]
    assert host.stop(deadline_seconds=5) == 0
    assert host.events[-1]["event"] == "stopped"
    listed(swarm, hive.hosts[:3])
    host.restart()
    listed(swarm, hive.hosts[: len(SPANS)])


def test_interrupting_a_client_frees_every_host(
    model: glasshive.Model, hive: LocalSwarm, llama: Path, tmp_path: Path
) -> None:
    script = tmp_path / "client.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import signal, sys
            # Python ignores interrupts where whoever started it does, as shells do for what runs
            # in the background.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            sys.path[:0] = {[str(one) for one in Path(__file__).parents[:2]]!r}
            import glasshive, test_local_swarm
            with glasshive.connect({str(hive.config)!r}) as swarm:
                model = swarm.model({NAME!r})
                try:
                    test_local_swarm.run_heavy(model)
                except KeyboardInterrupt:
                    print("interrupted", flush=True)
                print("again", len(test_local_swarm.run(model)), flush=True)
            """
        )
    )
    marks = {one.name: len(one.events) for one in hive.hosts}
    before = {one.name: accepted(one) for one in hive.hosts}
    # A terminal's Ctrl-C goes to the whole group, and so it does here.
    client = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, start_new_session=True
    )
    try:
        busy = the_one_that_computes(hive, before, client.poll)
        os.killpg(client.pid, signal.SIGINT)
        said, _ = client.communicate(timeout=120)
        lines = said.decode().splitlines()
        assert (lines, client.returncode) == (["interrupted", "again 7"], 0)
    finally:
        client.kill()
        client.wait()

    def ended(host: LocalPeer) -> bool:
        events = host.events[marks[host.name] :]
        return any(one["event"] in ("client_left", "trace_failed") for one in events)

    for host in (busy, hive.hosts[2]):
        wait_for(functools.partial(ended, host), f"{host} left the trace:\n{host.log}")
    assert equal(run(model), oracle(llama))


def test_a_model_in_use_has_what_its_next_trace_needs(
    model: glasshive.Model,
    swarm: glasshive.Swarm,
    llama: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known: Any = model._runner.router.records  # type: ignore[attr-defined]
    way = swarm.round_trips.of
    wait_for(
        lambda: known.are_fresh and all(way(one.peer_id) is not None for one in known.now),
        "the peers are known, and the ways to them",
    )

    def asks(*args: object) -> None:
        pytest.fail("a trace asked for what was to be ready")

    monkeypatch.setattr(swarm, "records", asks)
    monkeypatch.setattr(swarm, "measure", asks)
    assert equal(run(model), oracle(llama))


def test_a_host_process_that_dies_is_started_again_and_takes_no_request_twice(
    model: glasshive.Model,
    hive: LocalSwarm,
    swarm: glasshive.Swarm,
    llama: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    host = hive.hosts[0]
    parts: dict[bytes, bytes] = {}
    signed: dict[str, tuple[TraceRequest, bytes]] = {}
    sign = TraceRequest.sign

    def encoded(*args: Any) -> bytes:
        data = encode_part(*args)
        parts[hashlib.sha256(data).digest()] = data
        return data

    def noted(request: TraceRequest, identity: Identity, now: float) -> bytes:
        data = sign(request, identity, now)
        signed[request.host] = request, data
        return data

    async def again() -> Failed:
        peer = PeerAddress.parse(host.address)
        stream = await swarm.transport.open_stream(peer, TRACE_PROTOCOL, 10)
        request, data = signed[host.peer_id]
        await stream.send(encode(Prepare(data)), parts[request.part_sha256])
        failed = decode((await stream.receive(10)).header, Failed)
        await stream.close()
        return failed

    def ready() -> int:
        return sum(one["event"] == "ready" for one in host.events)

    with monkeypatch.context() as patched:
        patched.setattr(TraceRequest, "sign", noted)
        patched.setattr(job, "encode_part", encoded)
        run(model)
    assert swarm._loop.run(again(), 30).code == "Replayed"
    before, peer_id = ready(), host.peer_id
    host.kill_host_process()
    wait_for(lambda: ready() > before, "ready again")
    assert host.peer_id == peer_id
    assert swarm._loop.run(again(), 30).code == "Replayed"
    listed(swarm, hive.hosts[: len(SPANS)])
    assert equal(run(model), oracle(llama))


def test_a_network_daemon_that_dies_is_started_again(
    model: glasshive.Model, hive: LocalSwarm, swarm: glasshive.Swarm, llama: Path
) -> None:
    host = hive.hosts[0]
    mark = len(host.events)
    os.kill(host.pids()[2], signal.SIGKILL)
    wait_for(
        lambda: any(one["event"] == "network_daemon_rebuilt" for one in host.events[mark:]),
        f"rebuilt:\n{host.log}",
    )
    listed(swarm, hive.hosts[: len(SPANS)])
    assert equal(run(model), oracle(llama))


def test_two_models_of_one_name_are_told_apart(
    model: glasshive.Model, hive: LocalSwarm, swarm: glasshive.Swarm, tmp_path: Path
) -> None:
    other = hive.add_host((0, 6), save_llama(tmp_path / "other", 6, seed=1))
    try:
        other.wait_ready()
        wait_for(lambda: len(swarm.records()) == len(SPANS) + 1, "listed")
        with pytest.raises(AmbiguousModel, match=model.model_id):
            swarm.model(NAME)
        assert swarm.model(model.model_id).model_id == model.model_id
    finally:
        other.stop()
        hive.hosts.remove(other)
        listed(swarm, hive.hosts)


def test_a_model_that_nobody_serves(swarm: glasshive.Swarm) -> None:
    with pytest.raises(UnknownModel, match="glasshive serve nothing"):
        swarm.model("nothing")


def test_cut_off_weights_are_refused(hive: LocalSwarm, llama: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(llama, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4096])
    host = hive.add_host((0, 6), broken)
    try:
        why = r"ended with 1; (.*\n){2}.*no whole safetensors file"
        with pytest.raises(SwarmNotReady, match=why):
            host.wait_ready()
    finally:
        hive.hosts.remove(host)


def test_no_process_outlives_the_one_that_started_it(home: Path, tmp_path: Path) -> None:
    script = textwrap.dedent(
        f"""
        import os, signal
        from pathlib import Path
        from glasshive.testing import LocalPeer
        arguments = ["bootstrap", "--key", {str(tmp_path / "key")!r}, "--log-format", "json",
                     "--until-stdin-ends", "--listen", "/ip4/127.0.0.1/tcp/0"]
        peer = LocalPeer("bootstrap", arguments, Path({str(tmp_path / "log")!r}), dict(os.environ))
        peer.start()
        peer.wait_ready()
        print(*peer.pids(), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=60)
    assert done.returncode == -signal.SIGKILL
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 3
    wait_for(lambda: not any(map(_alive, pids)), f"{pids} have ended")


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
