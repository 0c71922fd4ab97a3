"""T11: weights and configurations that are not what their model's id says.

Seen failing, each alone: with the weights left out of `manifest_paths`, the flipped bits; with the
comparison of hashes taken out of `Manifest.check_file` and of ids out of `decode_manifest`, the
client's files; with the look at `len(manifests)` taken out of `resolve`, the two manifests; with
`Policy.allows_model` that is always true, the host whose weights changed; with the comparison of
hashes taken out of `FileServer._read`, the file that changed; with that of shapes taken out of the
loader, and that of names out of `_file_of_tensor`, the configurations and the index; with
weights that stay mapped from their file, what changes in place (the shortened file ends the
process).
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import peer_records
import pytest
import torch
from one_host import tiny_served
from signers import WHITELIST
from soak import SEED, count
from tenants import SAVED, Tenants

from glasshive.client.errors import BadModelFiles, NoRoute
from glasshive.client.files import fetch_model_files
from glasshive.client.route import choose_route
from glasshive.dht.announcer import announce
from glasshive.dht.directory import ask_directory, serve_directory
from glasshive.dht.errors import AmbiguousModel, StreamRefused
from glasshive.dht.memory_transport import MemoryNetwork
from glasshive.dht.messages import FILES_PROTOCOL, AskFile, File, decode, encode
from glasshive.dht.records import PeerRecord
from glasshive.dht.tensor_frames import receive_bytes
from glasshive.dht.transport import PeerAddress, Transport
from glasshive.manifest_cache import known_manifest
from glasshive.peer.checkpoint import Checkpoint
from glasshive.peer.errors import HostError
from glasshive.peer.file_server import FileServer
from glasshive.peer.served_model import ServedModel, make_manifest
from glasshive.security.errors import BadManifest, NotAllowed
from glasshive.security.keys import Identity, PeerId
from glasshive.security.manifest import Manifest, ManifestFile, ModelId
from glasshive.security.policy import Policy

FLIPS = count(20, 1_000)


@pytest.fixture
def folder(served: ServedModel, tmp_path: Path) -> Path:
    """A copy of the served model's folder, to be tampered with."""
    return Path(shutil.copytree(served.folder, tmp_path / "tiny"))


def flipped(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def policy_of(*models: str) -> Policy:
    """One that allows these models alone."""
    now = int(time.time())
    named = {ModelId(one): "tiny" for one in models}
    changes: dict[str, Any] = {"issued_seconds": now - 60, "expires_seconds": now + 3600}
    return Policy.effective(replace(WHITELIST, models=named, **changes), now)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_one_flipped_bit_is_another_model(served: ServedModel, folder: Path, name: str) -> None:
    rng = random.Random(SEED)
    data = (folder / name).read_bytes()
    policy = policy_of(served.manifest.model_id)
    policy.check_model(ModelId(make_manifest(folder, "tiny").model_id), "tiny")
    for _ in range(FLIPS):
        tampered = flipped(data, rng)
        (folder / name).write_bytes(tampered)
        found = ModelId(make_manifest(folder, "tiny").model_id)
        assert found != served.manifest.model_id
        with pytest.raises(NotAllowed, match="the model 'tiny' with manifest"):
            policy.check_model(found, "tiny")  # what a host asks before it serves
        with pytest.raises(BadManifest, match="is not the file in the manifest"):
            served.manifest.check_file(name, tampered)


@pytest.mark.asyncio
@pytest.mark.parametrize("left_bytes", [None, 0], ids=["overwritten", "shortened"])
async def test_a_file_that_changes_in_place_changes_nothing_that_runs(
    folder: Path, left_bytes: int | None
) -> None:
    async with Tenants(tiny_served(folder)) as tenants:
        client = tenants.client()
        before = await tenants.run(client, SAVED)
        assert isinstance(before, dict)
        weights = folder / "model.safetensors"
        with weights.open("r+b") as file:
            if left_bytes is None:
                file.seek(weights.stat().st_size // 2)
                file.write(bytes(weights.stat().st_size // 2))
            else:
                file.truncate(left_bytes)
        after = await tenants.run(client, SAVED)
        assert isinstance(after, dict)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.asyncio
async def test_weights_that_change_on_disk_are_not_what_runs_or_starts(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that takes the place of another, as downloads and editors write them."""
    monkeypatch.setenv("GLASSHIVE_CACHE", str(tmp_path / "cache"))
    for name in os.listdir(folder):
        os.utime(folder / name, (1, 1))  # long there, so that their hashes are remembered
    served = tiny_served(folder)
    assert known_manifest(folder, "tiny").model_id == served.manifest.model_id
    async with Tenants(served) as tenants:
        client = tenants.client()
        before = await tenants.run(client, SAVED)
        assert isinstance(before, dict)
        weights = folder / "model.safetensors"
        draft = folder / "draft"
        draft.write_bytes(weights.read_bytes()[:-4096] + bytes(4096))
        draft.replace(weights)
        after = await tenants.run(client, SAVED)
        assert isinstance(after, dict)
        assert torch.equal(before["s"], after["s"])
    restarted = known_manifest(folder, "tiny").model_id
    assert restarted != served.manifest.model_id
    with pytest.raises(NotAllowed):
        policy_of(served.manifest.model_id).check_model(ModelId(restarted), "tiny")


# What a client is given -------------------------------------------------------------------------


def anybody(client: PeerId) -> None:
    """Every client gets files."""


class Liar(FileServer):
    """A host that sends what it likes under the model's id."""

    def __init__(self, manifest: Manifest, files: dict[str, bytes]) -> None:
        super().__init__(Path("/nowhere"), manifest, check_client=anybody, patience_seconds=5.0)
        self._files = files

    def _read(self, ask: AskFile) -> bytes | None:
        return self._files.get(ask.name)


def with_config(manifest: Manifest, data: bytes) -> Manifest:
    wrong = ManifestFile("config.json", len(data), hashlib.sha256(data).digest())
    files = [wrong if one.name == wrong.name else one for one in manifest.files]
    return Manifest(manifest.name, tuple(files))


@pytest.mark.asyncio
@pytest.mark.parametrize("lie", ["config", "manifest", "both", "longer"])
async def test_a_peer_that_sends_other_files_is_left_for_the_next(
    served: ServedModel, tmp_path: Path, lie: str
) -> None:
    config = (served.folder / "config.json").read_bytes()
    wrong = config.replace(b'"num_attention_heads": 2', b'"num_attention_heads": 4')
    assert wrong != config
    manifest, forged = served.manifest, with_config(served.manifest, wrong)
    others = {
        one: (served.folder / one).read_bytes()
        for one in ("generation_config.json",)
        if served.manifest.file(one)
    }
    sent = {
        "config": {"manifest": manifest.encode(), "config.json": wrong},
        "manifest": {"manifest": forged.encode(), "config.json": config},
        "both": {"manifest": forged.encode(), "config.json": wrong},
        "longer": {"manifest": manifest.encode(), "config.json": config + b" "},
    }[lie]
    network = MemoryNetwork()
    liar, honest = (network.transport(Identity.generate()) for _ in range(2))
    client = network.transport(Identity.generate(), dht=False)
    await liar.serve(FILES_PROTOCOL, Liar(manifest, others | sent).answer)
    server = FileServer(served.folder, manifest, check_client=anybody, patience_seconds=5.0)
    await honest.serve(FILES_PROTOCOL, server.answer)
    peers = [PeerAddress(one.peer_id, one.addresses) for one in (liar, honest)]
    with pytest.raises(BadModelFiles, match=f"no peer gave the files .*{liar.peer_id[-8:]}: "):
        await fetch_model_files(client, peers[:1], manifest.model_id, tmp_path, 5)
    assert os.listdir(tmp_path) == []
    got = await fetch_model_files(client, peers, manifest.model_id, tmp_path, 5)
    assert (got / "config.json").read_bytes() == config
    for transport in (client, liar, honest):
        await transport.close()


@pytest.mark.asyncio
async def test_a_file_that_changed_since_it_was_hashed_is_not_sent(
    served: ServedModel, folder: Path
) -> None:
    config = folder / "config.json"
    rng = random.Random(SEED)
    network = MemoryNetwork()
    home = network.transport(Identity.generate())
    client = network.transport(Identity.generate(), dht=False)
    server = FileServer(folder, served.manifest, check_client=anybody, patience_seconds=5.0)
    await home.serve(FILES_PROTOCOL, server.answer)

    async def fetched() -> bytes:
        address = PeerAddress(home.peer_id, home.addresses)
        stream = await client.open_stream(address, FILES_PROTOCOL, 5)
        await stream.send(encode(AskFile(served.manifest.model_id, "config.json")))
        frame = await stream.receive(5)
        size_bytes = decode(frame.header, File).size_bytes
        return bytes(await receive_bytes(stream, frame, size_bytes, 5))

    data = config.read_bytes()
    assert await fetched() == data
    for changed in (flipped(data, rng), data + b" ", b""):
        config.write_bytes(changed)
        with pytest.raises(StreamRefused, match="no such file of this model"):
            await fetched()
    for transport in (client, home):
        await transport.close()


# Two models of one name -------------------------------------------------------------------------

MODEL, OTHER = ModelId("ab" * 32), ModelId("cd" * 32)


def record_of(identity: Identity, transport: Transport, **changes: Any) -> PeerRecord:
    changes = {"expires_at_seconds": float(round(transport.now()) + 45)} | changes
    return peer_records.record_of(identity, MODEL, **changes)


@pytest.mark.asyncio
async def test_no_route_is_made_of_two_manifests_of_one_name() -> None:
    """The second half of the model is served under its name by a host with other weights."""
    alice, eve = Identity.generate(), Identity.generate()
    network = MemoryNetwork()
    first, second = network.transport(alice), network.transport(eve)
    client = network.transport(Identity.generate(), dht=False)
    await serve_directory(first)
    bootstrap = [PeerAddress(first.peer_id, first.addresses)]
    await announce(first, alice, record_of(alice, first))
    await announce(second, eve, record_of(eve, second, model=OTHER, start=2, end=4))
    with pytest.raises(AmbiguousModel, match="name the model by the hash that you mean") as caught:
        await ask_directory(client, bootstrap, "tiny", 5)
    assert MODEL in str(caught.value)
    assert OTHER in str(caught.value)
    for model in (MODEL, OTHER):
        found = await ask_directory(client, bootstrap, model, 5)
        assert {one.model for one in found} == {model}
        with pytest.raises(NoRoute, match="nobody serves blocks"):
            choose_route(found, range(4), 4)
    for transport in (client, second, first):
        await transport.close()


# Configurations that lie about the weights --------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_size": 64}, "has shape"),
        ({"intermediate_size": 48}, r"up_proj\.weight has shape \[64, 32\], wanted \[48, 32\]"),
        ({"vocab_size": 65}, "has shape"),
        ({"num_hidden_layers": 3}, r"model\.layers\.2\."),
        ({"num_key_value_heads": 1}, "has shape"),
        ({"attention_bias": True}, "bias"),
        ({"model_type": "gpt2"}, "28 tensors of the span 0:2 are missing: transformer.h.0"),
        ({"model_type": "mine", "auto_map": {"AutoModelForCausalLM": "mine.Model"}}, "auto_map"),
    ],
    ids=str,
)
def test_a_config_that_does_not_fit_its_weights_is_refused(
    folder: Path, change: dict[str, Any], said: str
) -> None:
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(HostError, match=said):
        checkpoint = Checkpoint(folder)
        checkpoint.load_span(0, checkpoint.n_blocks)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/model.safetensors", "model.bin"])
def test_an_index_that_points_elsewhere_is_refused(folder: Path, name: str) -> None:
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(HostError, match="only safetensors files in the folder itself are read"):
        Checkpoint(folder).load_span(0, 2)
