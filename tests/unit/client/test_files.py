"""A model's files as a hostile peer may give them: read, or refused with our error."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hostile import PEER, Link, Mutator, at_once, attack, fuzzed, like, no_deadlines
from hypothesis import given
from soak import SEED, count
from virtual_time import VirtualLoop

from glasshive.client import files
from glasshive.client.errors import BadModelFiles
from glasshive.client.files import fetch_model_files, read_config, read_tokenizer
from glasshive.dht.framing import Stream
from glasshive.dht.memory_transport import MemoryNetwork
from glasshive.dht.messages import (
    FILES_PROTOCOL,
    SILENCE_SECONDS,
    SLICE_BYTES,
    AskFile,
    File,
    More,
    decode,
    encode,
)
from glasshive.dht.transport import PeerAddress, Transport
from glasshive.security.keys import Identity
from glasshive.security.manifest import Manifest, ManifestFile
from glasshive.security.plain import encode_plain

SIZES = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 64}
HEADS = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
ROTARY = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}
CONFIGS: list[dict[str, Any]] = [
    {"model_type": "llama", **SIZES, **HEADS, "rope_parameters": ROTARY, "id2label": {"0": "a"}},
    {"model_type": "gpt2", "n_embd": 32, "n_head": 4, "n_layer": 2, "vocab_size": 64},
    {
        "model_type": "gemma3",
        "text_config": {
            **SIZES,
            **HEADS,
            "sliding_window": 4,
            "layer_types": ["full_attention"] * 2,
        },
        "vision_config": {"num_hidden_layers": 1},
    },
    {"model_type": "qwen3_moe", **SIZES, **HEADS, "mlp_only_layers": [1], "dtype": "bfloat16"},
]
BYTES = {"add_prefix_space": False, "trim_offsets": True, "use_regex": True}
TOKENIZER: dict[str, Any] = {
    "version": "1.0",
    "truncation": {"direction": "Right", "max_length": 9, "strategy": "LongestFirst", "stride": 0},
    "padding": None,
    "added_tokens": [
        {"id": 0, "content": "<s>", "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}
    ],
    "normalizer": {"type": "Replace", "pattern": {"Regex": " +"}, "content": "_"},
    "pre_tokenizer": {"type": "ByteLevel", **BYTES},
    "post_processor": None,
    "decoder": {"type": "ByteLevel", **BYTES},
    "model": {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
        "vocab": {"<s>": 0, "a": 1, "b": 2, "ab": 3}, "merges": [["a", "b"]],
    },
}  # fmt: skip
SETTINGS: dict[str, Any] = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<s>",
    "model_max_length": 64,
    "added_tokens_decoder": {"0": {"content": "<s>", "special": True}},
}


def text_of(tree: object) -> str:
    return json.dumps(tree, default=str)


def reads_config(folder: Path) -> Callable[[bytes], None]:
    """Reads a config.json of these bytes."""

    def read(data: bytes) -> None:
        (folder / "config.json").write_bytes(data)
        config = read_config(folder)
        assert 0 < config.get_text_config().num_hidden_layers <= 1024

    return read


def test_a_damaged_config_is_read_or_refused(tmp_path: Path) -> None:
    """Slow: transformers makes a configuration in each try that is JSON."""
    read = reads_config(tmp_path)
    texts = [text_of(config).encode() for config in CONFIGS]
    for text in texts:
        read(text)
    mutator = Mutator(texts, SEED, trees=False)
    for number in range(count(2_000, 200_000)):
        data = mutator.next()
        if number % 2:
            data = text_of(mutator.changed(CONFIGS[number // 2 % len(CONFIGS)])).encode()
        try:
            read(data)
        except BadModelFiles:
            continue
        except BaseException as error:
            error.add_note(f"try {number} of seed {SEED}: {data!r}")
            raise


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"num_labels": 1 << 22}, "'num_labels' is 4194304 in config.json; at most 1024"),
        ({"num_hidden_layers": 1 << 22}, "'num_hidden_layers' is 4194304"),
        ({"text_config": {"num_hidden_layers": 1 << 22}}, "'num_hidden_layers' is 4194304"),
        ({"vocab_size": 10**400}, r"'vocab_size' is 100000000000000000000000 in config\.json"),
        ({"num_attention_heads": 0}, "is refused: integer division"),
        ({"num_hidden_layers": True}, "is refused"),
        ({"rope_parameters": 5}, "is refused"),
        ({"model_type": "no such"}, "the model's type is 'no such'"),
    ],
)
def test_what_would_take_memory_or_the_process_is_named(
    tmp_path: Path, change: dict[str, Any], text: str
) -> None:
    with pytest.raises(BadModelFiles, match=text):
        reads_config(tmp_path)(text_of(CONFIGS[0] | change).encode())


@pytest.mark.parametrize("nesting", [900, 100_000])
def test_a_config_nested_deep_is_refused(tmp_path: Path, nesting: int) -> None:
    data = b'{"model_type": "llama", "a": ' + b"[" * nesting + b"]" * nesting + b"}"
    with pytest.raises(BadModelFiles):
        reads_config(tmp_path)(data)


def test_a_damaged_tokenizer_is_read_or_refused(tmp_path: Path) -> None:
    """Slow: a tokenizer is made in each try."""
    (tmp_path / "config.json").write_text(text_of(CONFIGS[0]))
    mutator = Mutator([text_of(TOKENIZER).encode()], SEED, trees=False)
    files = {"tokenizer.json": TOKENIZER, "tokenizer_config.json": SETTINGS}

    def write(name: str, data: bytes) -> None:
        (tmp_path / name).write_bytes(data)

    for name, tree in files.items():
        write(name, text_of(tree).encode())
    assert read_tokenizer(tmp_path)("ab")["input_ids"] == [3]
    for number in range(count(200, 20_000)):
        name = ("tokenizer.json", "tokenizer_config.json")[number % 2]
        data = text_of(mutator.changed(files[name])).encode()
        write(name, mutator.next() if number % 8 == 0 else data)
        try:
            read_tokenizer(tmp_path)
        except BadModelFiles:
            continue
        except BaseException as error:
            error.add_note(f"{name}: {data.decode()}")
            raise
        finally:
            write(name, text_of(files[name]).encode())


class OneStream:
    """As much of a transport as fetching needs: every stream gives `data`."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    async def open_stream(self, *_: object) -> Stream:
        return Link(self._data).stream()


FILE = b'{"model_type": "llama"}'
MANIFEST = Manifest("m", (ManifestFile("config.json", 23, hashlib.sha256(FILE).digest()),)).encode()


def answer(data: bytes) -> bytes:
    header = encode_plain(encode(File(len(data))))
    return len(header).to_bytes(4, "big") + len(data).to_bytes(4, "big") + header + data


def fetches(cache: Path) -> Callable[[bytes], None]:
    """Fetches the model that these bytes of a stream are of, if its manifest comes first."""

    def fetch(data: bytes) -> None:
        model_id = hashlib.sha256(data[11 : 11 + len(MANIFEST)]).hexdigest()
        transport = cast(Transport, OneStream(data))
        at_once(fetch_model_files(transport, [PeerAddress(PEER)], model_id, cache, 1))
        shutil.rmtree(cache / model_id)

    return fetch


def test_damaged_answers_are_files_or_refused(tmp_path: Path) -> None:
    """Slow: each try looks for files on disk, and those that succeed write them."""
    good = answer(MANIFEST) + answer(FILE)
    assert good[11:].startswith(MANIFEST)
    with no_deadlines():
        attack(
            fetches(tmp_path),
            [good],
            BadModelFiles,
            trees=False,
            tries=count(20_000, 1_000_000),
        )
    assert not list(tmp_path.iterdir())


@fuzzed
@given(like(MANIFEST))
def test_any_manifest_of_a_peer_is_one_or_refused(
    tmp_path_factory: pytest.TempPathFactory, manifest: bytes
) -> None:
    cache = tmp_path_factory.getbasetemp() / "fetched"
    with no_deadlines(), contextlib.suppress(BadModelFiles):
        fetches(cache)(answer(manifest) + answer(FILE))


SLICE_WAIT_SECONDS = 10.0
TOKENIZER_FILE = bytes(3 * SLICE_BYTES)
SLOW_FILES = {"config.json": FILE, "tokenizer.json": TOKENIZER_FILE}


class Host:
    """Gives the files of `SLOW_FILES`, each slice after a while, or says nothing, as if frozen.

    Or it has others to answer first, which takes `queue_seconds` from each time that it is asked.
    """

    def __init__(
        self, network: MemoryNetwork, *, is_frozen: bool, queue_seconds: float = 0.0
    ) -> None:
        self._transport = network.transport(Identity.generate())
        self._is_frozen = is_frozen
        self._queue_seconds = queue_seconds
        self.manifest = Manifest(
            "m",
            tuple(
                ManifestFile(name, len(data), hashlib.sha256(data).digest())
                for name, data in SLOW_FILES.items()
            ),
        )

    async def serve(self) -> PeerAddress:
        await self._transport.serve(FILES_PROTOCOL, self._answer)
        return PeerAddress(self._transport.peer_id, self._transport.addresses)

    async def _answer(self, stream: Stream) -> None:
        files = SLOW_FILES | {"manifest": self.manifest.encode()}
        for number in range(len(files)):
            asked = decode((await stream.receive(200)).header, AskFile)
            if self._is_frozen:
                await stream.receive(200)
            if number == 0:
                await asyncio.sleep(self._queue_seconds)  # virtual time
            data = files[asked.name]
            message: File | More = File(len(data))
            for offset in range(0, len(data), SLICE_BYTES):
                await asyncio.sleep(SLICE_WAIT_SECONDS)  # virtual time
                await stream.send(encode(message), data[offset : offset + SLICE_BYTES])
                message = More()


@pytest.fixture
def virtual() -> Iterator[VirtualLoop]:
    loop = VirtualLoop()
    asyncio.set_event_loop(loop)
    yield loop
    asyncio.set_event_loop(None)
    loop.close()


@pytest.mark.parametrize("n_frozen", [0, 1, 3])
def test_a_frozen_host_costs_a_silence_and_a_slow_one_is_left_alone(
    n_frozen: int, virtual: VirtualLoop, tmp_path: Path
) -> None:
    """The first one had all of the time, for each of its answers."""

    async def story() -> None:
        network = MemoryNetwork(clock=virtual.time)
        client = network.transport(Identity.generate(), dht=False)
        hosts = [Host(network, is_frozen=True) for _ in range(n_frozen)]
        # Another one follows, so that the slow one isn't waited for as the last one would be.
        hosts += [Host(network, is_frozen=False), Host(network, is_frozen=True)]
        peers = [await one.serve() for one in hosts]
        folder = await fetch_model_files(client, peers, hosts[0].manifest.model_id, tmp_path, 120)
        assert (folder / "tokenizer.json").read_bytes() == TOKENIZER_FILE
        n_slices = 1 + 1 + 3  # manifest, config, tokenizer
        assert virtual.time() == pytest.approx(
            n_frozen * SILENCE_SECONDS + n_slices * SLICE_WAIT_SECONDS, abs=1.0
        )

    virtual.run_until_complete(story())


def test_where_all_hosts_are_frozen_each_is_named_in_time(
    virtual: VirtualLoop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And asked until then: it may have others to answer first."""
    monkeypatch.setattr(files, "time", SimpleNamespace(monotonic=virtual.time))

    async def story() -> None:
        network = MemoryNetwork(clock=virtual.time)
        client = network.transport(Identity.generate(), dht=False)
        hosts = [Host(network, is_frozen=True) for _ in range(2)]
        peers = [await one.serve() for one in hosts]
        with pytest.raises(BadModelFiles) as caught:
            await fetch_model_files(client, peers, hosts[0].manifest.model_id, tmp_path, 120)
        assert all(one.peer_id[-8:] in str(caught.value) for one in peers)
        assert virtual.time() == pytest.approx(120, abs=0.1)
        with pytest.raises(BadModelFiles, match="10 s were over before others could be asked"):
            await fetch_model_files(client, peers, hosts[0].manifest.model_id, tmp_path, 10)

    virtual.run_until_complete(story())


@pytest.mark.parametrize("other_is_frozen", [True, False], ids=["beside-frozen", "beside-busy"])
def test_a_busy_host_is_waited_for_longer_when_it_is_asked_again(
    other_is_frozen: bool,
    virtual: VirtualLoop,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each round left each after the same silence, so that no place in a queue was ever kept."""
    monkeypatch.setattr(files, "time", SimpleNamespace(monotonic=virtual.time))
    queue_seconds = SILENCE_SECONDS + 1

    async def story() -> None:
        network = MemoryNetwork(clock=virtual.time)
        client = network.transport(Identity.generate(), dht=False)
        busy = Host(network, is_frozen=False, queue_seconds=queue_seconds)
        other = Host(network, is_frozen=other_is_frozen, queue_seconds=queue_seconds)
        peers = [await one.serve() for one in (busy, other)]
        await fetch_model_files(client, peers, busy.manifest.model_id, tmp_path, 120)
        assert virtual.time() == pytest.approx(2 * SILENCE_SECONDS + queue_seconds + 50, abs=1.0)

    virtual.run_until_complete(story())


def test_who_refuses_is_asked_once(
    virtual: VirtualLoop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "time", SimpleNamespace(monotonic=virtual.time))
    asked: list[str] = []

    async def refuse(stream: Stream) -> None:
        asked.append(decode((await stream.receive(200)).header, AskFile).name)
        await stream.refuse("no such file of this model")

    async def story() -> None:
        network = MemoryNetwork(clock=virtual.time)
        client = network.transport(Identity.generate(), dht=False)
        refusing = network.transport(Identity.generate())
        await refusing.serve(FILES_PROTOCOL, refuse)
        frozen = Host(network, is_frozen=True)
        peers = [PeerAddress(refusing.peer_id, refusing.addresses), await frozen.serve()]
        with pytest.raises(BadModelFiles, match=f"{peers[0].peer_id[-8:]}: .*no such file"):
            await fetch_model_files(client, peers, frozen.manifest.model_id, tmp_path, 60)
        assert asked == ["manifest"]
        assert virtual.time() == pytest.approx(60, abs=0.1)

    virtual.run_until_complete(story())
