"""Hosts at addresses that other machines reach, in a network of their own without a way out.

Each test runs in a process of a new network namespace, in which the loopback device has further
addresses. Where this system allows no such namespace, it is skipped.
"""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

NAMESPACE = (
    "ip link set lo up && ip addr add 10.9.8.7/24 dev lo && ip addr add 10.9.8.8/24 dev lo && "
    'exec "$@"'
)


def inside(script: str, *arguments: str, seconds: float = 120) -> Any:
    """What the script says in its last line, as JSON."""
    alone = ["unshare", "-rn", "sh", "-c", NAMESPACE, "sh"]
    try:
        allowed = subprocess.run([*alone, "true"], capture_output=True, timeout=20).returncode == 0
    except FileNotFoundError:
        allowed = False
    if not allowed:
        pytest.skip("this system allows no network namespace with addresses of its own")
    done = subprocess.run(
        [*alone, sys.executable, "-c", textwrap.dedent(script), *arguments],
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


PLACES = """
import asyncio, json, sys
from glasshive.dht.hivemind_transport import HivemindTransport
from glasshive.dht.transport import PeerAddress
from glasshive.security.keys import Identity

async def echo(stream):
    await stream.send((await stream.receive(10)).header)
    await stream.receive(10)

async def main():
    client = await HivemindTransport.create(Identity.generate(), listen=(), dht="none")
    found = []
    for listen, announce in json.loads(sys.argv[1]):
        host = await HivemindTransport.create(
            Identity.generate(), listen=[listen], announce=announce, whitelisted=True
        )
        await host.serve("echo/1", echo)
        answers = []
        for address in () if announce else host.addresses:
            stream = await client.open_stream(PeerAddress(host.peer_id, (address,)), "echo/1", 10)
            await stream.send(7)
            answers.append((await stream.receive(10)).header)
            await stream.close()
        before = [host.addresses, host.listening]
        host._daemon.p2p._child.kill()
        await host.lost.wait()
        await host.rebuild()
        bare = [one.partition("/p2p/")[0] for one in host.addresses]
        found.append([bare, host.listening, answers, before == [host.addresses, host.listening]])
        await host.close()
    await client.close()
    print(json.dumps(found))

asyncio.run(main())
"""


def test_a_wildcard_stands_for_the_machine_s_own_addresses() -> None:
    anywhere, wan = "/ip4/0.0.0.0/tcp/0", "/ip4/203.0.113.7/tcp/4001"
    places = [[anywhere, []], ["/ip4/10.9.8.8/tcp/0", []], ["/ip4/0.0.0.0/tcp/31331", [wan]]]
    one, two, three = inside(PLACES, json.dumps(places))
    (port,) = {address.split("/")[4] for address in one[0]}
    assert sorted(one[0]) == [f"/ip4/10.9.8.{i}/tcp/{port}" for i in (7, 8)]
    assert one[1:] == [[f"/ip4/0.0.0.0/tcp/{port}"], [7, 7], True]
    assert two[0] == two[1] == [f"/ip4/10.9.8.8/tcp/{two[0][0].split('/')[4]}"]
    assert two[2:] == [[7], True]
    # What others are told is what was said, and where it listens is known all the same.
    assert three[:2] == [[wan], ["/ip4/0.0.0.0/tcp/31331"]]
    assert three[3]


SERVED = """
import json, os, subprocess, sys
from pathlib import Path
import torch
from transformers import LlamaConfig, LlamaForCausalLM
import glasshive
from glasshive.testing import LocalPeer

place = Path(sys.argv[1])
os.environ["GLASSHIVE_CACHE"] = str(place / "cache")
os.environ["GLASSHIVE_DATA"] = str(place / "data")
os.environ["HOME"] = str(place)
model = place / "tiny"
torch.manual_seed(0)
LlamaForCausalLM(LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
)).save_pretrained(model)
(place / "words").write_text("a passphrase of some length")
(place / "words").chmod(0o600)

def glass(*arguments):
    command = [sys.executable, "-m", "glasshive.cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout

lab = str(place / "lab")
where = ["--listen", "/ip4/0.0.0.0/tcp/31330", "--announce", "/ip4/10.9.8.7/tcp/31330"]
glass("swarm", "init", lab, "--public", "--holder", "ann", "--root-threshold", "1",
      "--whitelist-threshold", "1", "--passphrase-file", str(place / "words"), *where)
hive = f"{lab}/hive.toml"
common = ["--config", hive, "--log-format", "json", "--until-stdin-ends"]
env = dict(os.environ)
peers = [LocalPeer("bootstrap", ["bootstrap", "--key", f"{lab}/keys/bootstrap.key", *common,
                                 *where], place / "bootstrap.log", env)]
for i, (blocks, own) in enumerate((("0:1", "0.0.0.0"), ("1:2", "10.9.8.8"))):
    peers.append(LocalPeer(f"host{i}", [
        "serve", str(model), "--blocks", blocks, "--no-spare", "--device", "cpu",
        "--key", str(place / f"host{i}.key"), "--listen", f"/ip4/{own}/tcp/0", *common,
    ], place / f"host{i}.log", env))
try:
    peers[0].start(); peers[0].wait_ready()
    glass("whitelist", "publish", "--folder", lab)
    for one in peers[1:]:
        one.start()
    for one in peers[1:]:
        one.wait_ready()
    with glasshive.connect(hive) as swarm:
        tiny = swarm.model("tiny")
        with tiny.trace(torch.tensor([[3, 14, 15]])):
            saved = tiny.lm_head.output.save()
    said = [[[one["event"], one["addresses"]] for one in peer.events if one.get("event") in
             ("reachable", "ready") and "addresses" in one] for peer in peers]
    print(json.dumps([list(saved.shape), said, [one.address for one in peers]]))
finally:
    for one in peers:
        one.kill()
"""


def test_a_swarm_over_addresses_that_are_not_loopback(tmp_path: Path) -> None:
    shape, said, addresses = inside(SERVED, str(tmp_path), seconds=300)
    assert shape == [1, 3, 64]
    assert addresses[0].startswith("/ip4/10.9.8.7/tcp/31330/p2p/")
    assert addresses[2].startswith("/ip4/10.9.8.8/tcp/")
    for one, address in zip(said, addresses, strict=True):
        ((event, reached),) = one  # said once, and of all that others are told
        assert event == "reachable"
        assert address in reached
        assert not any("127.0.0.1" in place for place in reached)
