"""Files for clients: few at a time, each within a deadline, and never on the loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from glasshive.dht.errors import StreamClosed, StreamRefused
from glasshive.dht.framing import Stream
from glasshive.dht.memory_transport import MemoryNetwork, MemoryTransport
from glasshive.dht.messages import FILES_PROTOCOL, SLICE_BYTES, AskFile, File, decode, encode
from glasshive.dht.tensor_frames import receive_bytes
from glasshive.dht.transport import PeerAddress
from glasshive.peer.file_server import MAX_ANSWERS, FileServer
from glasshive.peer.served_model import make_manifest
from glasshive.security.errors import NotAllowed
from glasshive.security.keys import Identity, PeerId
from glasshive.security.manifest import Manifest

LARGE = bytes(range(256)) * (3 * SLICE_BYTES // 256) + b"end"


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    """That of a folder with a large tokenizer and a small configuration."""
    (tmp_path / "tokenizer.json").write_bytes(LARGE)
    (tmp_path / "config.json").write_bytes(b"{}")
    return make_manifest(tmp_path, "tiny")


class Peers:
    """A server of files, and its client."""

    def __init__(self, folder: Path, manifest: Manifest, **options: float) -> None:
        network = MemoryNetwork()
        self.home: MemoryTransport = network.transport(Identity.generate())
        self.client: MemoryTransport = network.transport(Identity.generate(), dht=False)
        self.manifest = manifest
        self.revoked: set[PeerId] = set()
        options = {"patience_seconds": 5.0, **options}
        self.server = FileServer(folder, manifest, check_client=self.check, **options)

    def check(self, client: PeerId) -> None:
        if client in self.revoked:
            raise NotAllowed(f"the client {client} may not use this host by whitelist 2")

    async def __aenter__(self) -> Peers:
        await self.home.serve(FILES_PROTOCOL, self.server.answer)
        return self

    async def __aexit__(self, *_: object) -> None:
        for transport in (self.client, self.home):
            await transport.close()

    async def asked(self, name: str) -> Stream:
        address = PeerAddress(self.home.peer_id, self.home.addresses)
        stream = await self.client.open_stream(address, FILES_PROTOCOL, 5)
        await stream.send(encode(AskFile(self.manifest.model_id, name)))
        return stream


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 (it comes true in another task)
            await asyncio.sleep(0.001)


async def taken(stream: Stream) -> bytes:
    frame = await stream.receive(5)
    size_bytes = decode(frame.header, File).size_bytes
    return bytes(await receive_bytes(stream, frame, size_bytes, 5))


@pytest.mark.asyncio
async def test_the_ninth_is_told_that_the_peer_is_busy(tmp_path: Path, manifest: Manifest) -> None:
    async with Peers(tmp_path, manifest, patience_seconds=0.2) as peers:
        slow = [await peers.asked("tokenizer.json") for _ in range(MAX_ANSWERS)]
        await until(peers.server._turns.locked)
        with pytest.raises(StreamRefused, match="8 files are on their way; ask another peer"):
            await taken(await peers.asked("config.json"))
        assert [await taken(stream) for stream in slow] == [LARGE] * MAX_ANSWERS


@pytest.mark.asyncio
async def test_the_ninth_has_its_turn_when_one_is_done(tmp_path: Path, manifest: Manifest) -> None:
    async with Peers(tmp_path, manifest) as peers:
        slow = [await peers.asked("tokenizer.json") for _ in range(MAX_ANSWERS)]
        await until(peers.server._turns.locked)
        ninth = await peers.asked("config.json")
        assert await taken(slow[0]) == LARGE
        assert await taken(ninth) == b"{}"


@pytest.mark.asyncio
async def test_a_client_that_reads_nothing_holds_its_turn_for_a_while_only(
    tmp_path: Path, manifest: Manifest
) -> None:
    async with Peers(tmp_path, manifest, answer_seconds=0.2) as peers:
        slow = [await peers.asked("tokenizer.json") for _ in range(MAX_ANSWERS)]
        await until(peers.server._turns.locked)
        assert await taken(await peers.asked("config.json")) == b"{}"
        await until(lambda: len(peers.home._tasks) <= 1)  # that of the last question
        for stream in slow:
            with pytest.raises(StreamClosed):
                await taken(stream)


@pytest.mark.asyncio
async def test_a_file_is_hashed_beside_the_loop(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    where: list[threading.Thread] = []
    read = FileServer._read

    def noted(self: FileServer, ask: AskFile) -> Any:
        where.append(threading.current_thread())
        return read(self, ask)

    monkeypatch.setattr(FileServer, "_read", noted)
    async with Peers(tmp_path, manifest) as peers:
        assert await taken(await peers.asked("config.json")) == b"{}"
    assert where != []
    assert threading.main_thread() not in where


@pytest.mark.asyncio
async def test_a_file_that_is_gone_is_refused(tmp_path: Path, manifest: Manifest) -> None:
    (tmp_path / "config.json").unlink()
    async with Peers(tmp_path, manifest) as peers:
        with pytest.raises(StreamRefused, match="no such file of this model"):
            await taken(await peers.asked("config.json"))


@pytest.mark.asyncio
async def test_who_is_revoked_gets_no_file(tmp_path: Path, manifest: Manifest) -> None:
    async with Peers(tmp_path, manifest) as peers:
        stream = await peers.asked("config.json")
        assert await taken(stream) == b"{}"
        peers.revoked.add(peers.client.peer_id)
        await stream.send(encode(AskFile(manifest.model_id, "config.json")))  # on the stream it has
        with pytest.raises(StreamRefused, match=r"may not use this host by whitelist 2"):
            await taken(stream)
        with pytest.raises(StreamRefused, match=r"may not use this host by whitelist 2"):
            await taken(await peers.asked("config.json"))
