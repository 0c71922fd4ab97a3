"""A whitelist changes while a swarm runs: every host keeps to it, none is started again."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from signers import CAT, DAN, EVE
from soak import count
from transformers import LlamaConfig, LlamaForCausalLM
from trust_documents import root_now, whitelist_now

import glasshive
from glasshive.client.errors import NoRoute, PeerFailed
from glasshive.dht.hivemind_transport import HivemindTransport
from glasshive.dht.messages import TrustVersions
from glasshive.dht.transport import PeerAddress
from glasshive.dht.trust_exchange import exchange_trust
from glasshive.security.errors import NotAllowed
from glasshive.security.keys import Identity
from glasshive.security.manifest import ModelId
from glasshive.security.trust_root import first_root, next_root
from glasshive.security.trust_store import TrustStore
from glasshive.testing import LocalPeer, LocalSwarm, LocalTrust

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:path is deprecated:DeprecationWarning"),
]

SWARM = "rollout"
PROMPT = torch.tensor([[3, 14, 15, 9, 26, 5, 35]])
# Two hosts, ten in `make soak`: copies of the two halves of the model.
REPLICAS = count(1, 5)
ROLLOUT_SECONDS = 60
FIRST = root_now()
ROOT = first_root(FIRST)


@pytest.fixture(scope="module")
def hive(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalSwarm]:
    """Hosts of two blocks each, under whitelist 1."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    folder = tmp_path_factory.mktemp("models") / "tiny"
    LlamaForCausalLM(config).save_pretrained(folder)
    trust = LocalTrust(
        SWARM,
        FIRST,
        whitelist_now(1, ROOT, swarm=SWARM),
        policy='deny_ops = ["linalg_svd"]\n[limits]\nbatch_rows = 4\n',
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLASSHIVE_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("GLASSHIVE_DATA", str(tmp_path_factory.mktemp("data")))
        with LocalSwarm(
            folder,
            [(0, 2), (2, 4)],
            trust=trust,
            threads=1,
            replicas=REPLICAS,
            start_seconds=120.0 * REPLICAS,
        ) as running:
            yield running


def run(model: glasshive.Model, *, relu: bool) -> torch.Tensor:
    with model.trace(PROMPT):
        hidden = model.model.layers[3].output
        saved = (torch.relu(hidden) if relu else hidden * 2).save()  # the line
    return saved


def without_root(hive: LocalSwarm, key: str = "client.key") -> Path:
    """The config of a client that knows no root, so that only hosts hold it to the whitelist."""
    lines = hive.config.read_text().replace("client.key", key).splitlines(keepends=True)
    config = hive.config.with_name(f"{key}.toml")
    config.write_text("".join(one for one in lines if not one.startswith("root =")))
    return config


def policies(host: LocalPeer) -> list[dict[str, Any]]:
    return [one for one in host.events if one.get("event") == "policy"]


def wait_for(condition: Callable[[], object], seconds: float, what: str) -> None:
    ends_at = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > ends_at:
            pytest.fail(f"not within {seconds:g} s: {what}")
        time.sleep(0.02)


async def publish(hive: LocalSwarm, store: TrustStore) -> TrustVersions:
    """Bring documents into the swarm, as any neighbour does."""
    transport = await HivemindTransport.create(
        Identity.generate(), listen=(), dht="none", swarm=SWARM
    )
    try:
        return await exchange_trust(transport, PeerAddress.parse(hive.bootstrap.address), store)
    finally:
        await transport.close()


@contextlib.contextmanager
def meanwhile(hive: LocalSwarm, wanted: torch.Tensor) -> Iterator[list[str]]:
    """What came of the traces of another user, who runs one after the other inside it."""
    ends, came = threading.Event(), list[str]()

    def work() -> None:
        with glasshive.connect(without_root(hive)) as swarm:
            model = swarm.model(hive.model_name)
            while not ends.is_set():
                try:
                    same = torch.equal(run(model, relu=False), wanted)
                    came.append("as before" if same else "another result")
                except Exception as error:
                    came.append(repr(error))

    user = threading.Thread(target=work, name="user")
    user.start()
    try:
        wait_for(lambda: came, 20, "the other user's first trace")
        yield came
    finally:
        ends.set()
        user.join(30)


def test_a_key_and_an_op_are_taken_away_in_service(
    hive: LocalSwarm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What a host says before it announces.
    for host in hive.hosts:
        events = [str(one.get("event")) for one in host.events]
        assert events.index("policy") < events.index("ready")
        (said,) = policies(host)
        assert said["policy"] == f"whitelist 1 of swarm {SWARM!r} with the host's own file"
        assert set(said["signers"]) <= set(ROOT.whitelist_keys)
        assert len(said["signers"]) == 2
        rules = "\n".join(said["rules"])
        assert "Others can't run 1 op of this release: linalg_svd; nor any other code." in rules
        assert "batch_rows 4," in rules
    pids = [host.pids() for host in hive.hosts]

    with glasshive.connect(without_root(hive)) as swarm:
        assert swarm.policy is None
        model = swarm.model(hive.model_name)
        before = run(model, relu=False)
        assert torch.equal(run(model, relu=True), torch.relu(before / 2))
        assert {one.whitelist_version for one in swarm.records(hive.model_name)} == {1}

        # Cat may not sign any more, and without her relu goes and so does a client.
        second = root_now(version=2, whitelist_keys=(DAN, EVE), before=ROOT)
        root = next_root(ROOT, second)
        gone = Identity.load_or_create(hive.config.parent / "gone.key")
        store = TrustStore(tmp_path, swarm=SWARM, root=FIRST, clock=time.time)
        store.accept_roots([second])
        store.accept_whitelist(
            *whitelist_now(
                2,
                root,
                swarm=SWARM,
                signed_by=(DAN, EVE),
                without=("relu",),
                revoked_clients=frozenset([gone.peer_id]),
            )
        )
        with meanwhile(hive, before) as traces:
            assert asyncio.run(publish(hive, store)) == TrustVersions(2, 2)

            def announced() -> set[int]:
                return {one.whitelist_version for one in swarm.records(hive.model_name)}

            def applied() -> list[int]:
                return [policies(host)[-1]["whitelist_version"] for host in hive.hosts]

            begun_at = time.monotonic()
            wait_for(lambda: set(applied()) == {2}, ROLLOUT_SECONDS, "every host is on whitelist 2")
            print(f"{len(hive.hosts)} hosts on it after {time.monotonic() - begun_at:.1f} s")
            wait_for(lambda: announced() == {2}, ROLLOUT_SECONDS, "every host announces it")
            assert len(swarm.records(hive.model_name)) == len(hive.hosts)
        assert len(traces) > 1
        assert set(traces) == {"as before"}
        with pytest.raises(PeerFailed) as caught:
            run(model, relu=True)
        text = str(caught.value)
        assert caught.value.code == "NotAllowed"
        assert "test_whitelist_rollout.py" in text.partition(":")[0]
        assert "# the line" in Path(__file__).read_text().splitlines()[line_of(text) - 1]
        assert f"the op 'relu' is not allowed here by whitelist 2 of swarm {SWARM!r}" in text
        assert torch.equal(run(model, relu=False), before)  # who doesn't use it sees nothing of it
    with glasshive.connect(without_root(hive, "gone.key")) as swarm:
        with pytest.raises(PeerFailed, match="may not use this host by whitelist 2 of swarm"):
            run(swarm.model(hive.model_name), relu=False)

    assert [host.pids() for host in hive.hosts] == pids
    # What Cat signs now counts nowhere.
    stale = TrustStore(tmp_path / "stale", swarm=SWARM, root=FIRST, clock=time.time)
    stale.accept_whitelist(*whitelist_now(3, ROOT, swarm=SWARM, signed_by=(CAT, DAN)))
    assert asyncio.run(publish(hive, stale)) == TrustVersions(2, 2)
    assert stale.whitelist is None
    assert all(policies(host)[-1]["whitelist_version"] == 2 for host in hive.hosts)

    # A client that knows the root asks for the whitelist, and keeps to it before it asks a host.
    with glasshive.connect(hive.config) as swarm:
        assert swarm.policy is not None
        assert swarm.policy.source == f"whitelist 2 of swarm {SWARM!r}"
        model = swarm.model(hive.model_name)
        assert torch.equal(run(model, relu=False), before)
        with pytest.raises(NotAllowed) as refused:
            run(model, relu=True)
        text = str(refused.value)
        assert "# the line" in Path(__file__).read_text().splitlines()[line_of(text) - 1]
        assert f"the op 'relu' is not allowed here by whitelist 2 of swarm {SWARM!r}" in text

    def next_whitelist(version: int, **changes: Any) -> None:
        signed = whitelist_now(version, root, swarm=SWARM, signed_by=(DAN, EVE), **changes)
        store.accept_whitelist(*signed)
        assert asyncio.run(publish(hive, store)) == TrustVersions(2, version)

    # The keys of the second half's hosts have been stolen: no client goes there any more.
    hosts = [one.peer_id for one in hive.hosts]
    left_out = rf"left out: (\d:\d by \w{{8}} \(revoked\)(, )?){{{REPLICAS}}}\)"
    next_whitelist(3, revoked_peers=frozenset(hosts[1::2]))
    with glasshive.connect(hive.config) as swarm:
        model = swarm.model(hive.model_name)
        with pytest.raises(NoRoute, match=left_out):
            run(model, relu=False)
        with model.trace(PROMPT):
            first = model.model.layers[1].output.save()
        assert first.shape == (1, 7, 32)
    next_whitelist(4, revoked_peers=frozenset(hosts))
    with glasshive.connect(hive.config) as swarm:
        with pytest.raises(NoRoute, match="only by peers that are revoked by whitelist 4 of swarm"):
            swarm.model(hive.model_name)
        known = swarm.records(hive.model_name)
    next_whitelist(5, models={ModelId("ab" * 32): "other"})
    with glasshive.connect(hive.config) as swarm:
        monkeypatch.setattr(swarm, "records", lambda name: known)  # of hosts that announce it on
        with pytest.raises(NotAllowed, match=r"by whitelist 5 of .*; allowed: other"):
            swarm.model(hive.model_name)
    # Its hosts withdraw it, within moments, and announce it again when it is back.
    for host in hive.hosts:
        wait_for(lambda: "model_not_allowed" in host.log, 20, "the host says why")  # noqa: B023
    with glasshive.connect(without_root(hive)) as swarm:

        def announced_peers() -> int:
            return len(swarm.records())

        wait_for(lambda: announced_peers() == 0, 20, "nobody announces the model")
        next_whitelist(6)
        wait_for(lambda: announced_peers() == 2, 20, "both announce it again")
        assert torch.equal(run(swarm.model(hive.model_name), relu=False), before)


def line_of(text: str) -> int:
    """The number of the line that a text begins with, as in `test.py:12: ...`."""
    return int(text.split(":")[1])
