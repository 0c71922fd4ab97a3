"""The process of a host without a network: what it says, and what it leaves behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from signers import NOW, WHITELIST
from trust_documents import root_now, whitelist_now

from glasshive import host_process, host_words
from glasshive.dht.directory import find_records
from glasshive.dht.memory_transport import MemoryNetwork, MemoryTransport
from glasshive.graph.ops import OPS
from glasshive.host_process import (
    Life,
    ServeOptions,
    _apply,
    _bootstrap,
    _host,
    _Process,
)
from glasshive.host_words import say_moved, say_starting
from glasshive.peer.errors import NoSuchDevice
from glasshive.peer.served_model import ServedModel
from glasshive.peer.serving import Serving
from glasshive.security.errors import NotAllowed
from glasshive.security.keys import Identity
from glasshive.security.manifest import ModelId
from glasshive.security.policy import Policy
from glasshive.settings import Settings
from glasshive.swarm_trust import open_store

SWARM = "lab"
BOOTSTRAP = "/ip4/127.0.0.1/tcp/31330/p2p/" + Identity.generate().peer_id


class Home:
    """The transports of a host and of someone who looks for it."""

    def __init__(self, key: Path) -> None:
        network = MemoryNetwork()
        self.transport: MemoryTransport = network.transport(Identity.load_or_create(key))
        self.other: MemoryTransport = network.transport(Identity.generate())


@pytest.fixture
def home(tmp_path: Path, served: ServedModel, monkeypatch: pytest.MonkeyPatch) -> Home:
    home = Home(tmp_path / "host.key")

    @contextlib.asynccontextmanager
    async def transport(self: _Process) -> AsyncIterator[MemoryTransport]:
        yield home.transport

    monkeypatch.setattr(_Process, "transport", transport)
    monkeypatch.setattr(host_process, "_hash", lambda *arguments: (Path(), served.manifest))
    monkeypatch.setattr(host_process, "_load", lambda *arguments: served)
    return home


@pytest.fixture
def descriptor() -> Iterator[int]:
    reading, writing = os.pipe()
    yield writing
    os.close(reading)
    os.close(writing)


def policy(version: int, model_id: str) -> Policy:
    """That of a whitelist with this model alone."""
    allowed = replace(WHITELIST, version=version, models={ModelId(model_id): "a model"})
    return Policy.effective(allowed, NOW)


class Keeper:
    """A keeper whose second bootstrap peer answers with `late`, when that is waited for."""

    def __init__(self, policy: Policy, late: Policy | None = None) -> None:
        self.policy = policy
        self._late = late

    async def start(self) -> Policy:
        return self.policy

    async def policy_for(self, model_id: ModelId, name: str) -> Policy:
        if self._late and not self.policy.allows_model(model_id):
            self.policy = self._late
        self.policy.check_model(model_id, name)
        return self.policy

    async def close(self) -> None:
        pass


def options(served: ServedModel, device: str = "cpu") -> ServeOptions:
    return ServeOptions(str(served.folder), None, "auto", device, "sdpa", "tiny")


def process(
    key: Path,
    descriptor: int,
    bootstraps: tuple[str, ...] = (),
    *,
    key_in_use: str | None = None,
    memory: str | None = None,
) -> _Process:
    settings = Settings.model_validate({"bootstraps": bootstraps, "memory": memory})
    listen = "/ip4/127.0.0.1/tcp/0"
    return _Process(Life(settings, key, listen, "pretty", descriptor, key_in_use=key_in_use))


@pytest.mark.asyncio
async def test_a_record_is_withdrawn_when_the_start_is_cancelled(
    home: Home,
    served: ServedModel,
    descriptor: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stored = asyncio.Event()
    store_many = home.transport.store_many

    async def slow(*args: Any) -> Any:
        done = await store_many(*args)
        if not stored.is_set():
            stored.set()
            await asyncio.Event().wait()  # the answer of some peer of the DHT
        return done

    monkeypatch.setattr(home.transport, "store_many", slow)
    running = asyncio.create_task(
        _host(process(tmp_path / "host.key", descriptor), options(served))
    )
    async with asyncio.timeout(20):
        await stored.wait()
    assert len(await find_records(home.other, None)) == 1
    running.cancel()
    await asyncio.wait({running})
    assert await find_records(home.other, None) == []


@pytest.mark.asyncio
@pytest.mark.parametrize("bootstraps", [(), (BOOTSTRAP,)])
async def test_a_host_without_a_bootstrap_says_so_first_and_then_how_it_is_found(
    home: Home,
    served: ServedModel,
    descriptor: int,
    tmp_path: Path,
    bootstraps: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Failed: who had forgotten --bootstrap heard of it after the model was loaded."""
    before: list[str] = []

    def load(*args: object) -> ServedModel:
        before.append(capfd.readouterr().err)
        return served

    monkeypatch.setattr(host_process, "_load", load)
    one = process(tmp_path / "host.key", descriptor, bootstraps)
    one.stop.set()
    await _host(one, options(served))
    said = capfd.readouterr().err
    assert "ready; Ctrl-C withdraws the record and stops" in said
    starting = "starting: loading torch and transformers, then all blocks of tiny; Ctrl-C stops\n"
    assert before[0] == starting + (
        ""
        if bootstraps
        else "no bootstrap peer is given, so this host begins a swarm of its own, with nobody else "
        "in it; to join one that is there, stop this with Ctrl-C and add\n"
        "  --bootstrap ADDRESS\n"
        "where ADDRESS is what its `glasshive bootstrap` or `glasshive serve` printed\n"
    )
    assert ("find the swarm that this host began by\n" in said) == (not bootstraps)
    assert (f"  --bootstrap {home.transport.addresses[0]}\n" in said) == (not bootstraps)


@pytest.mark.parametrize("log_format", ["pretty", "json"])
@pytest.mark.parametrize("has_libraries", [False, True])
def test_a_start_says_what_it_loads(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    log_format: Literal["pretty", "json"],
    has_libraries: bool,
) -> None:
    """It said nothing for 15 s. A spare process that takes over has the libraries."""
    events: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(
        host_words, "log", SimpleNamespace(info=lambda event, **what: events.append((event, what)))
    )
    life = Life(Settings(), tmp_path / "key", "/ip4/127.0.0.1/tcp/0", log_format, -1)
    what = ServeOptions("a/folder", (0, 10), "auto", "cpu", "sdpa", None)
    say_starting(life, what, has_libraries=has_libraries)
    said = capfd.readouterr().err
    if log_format == "json":
        assert (said, events) == ("", [("starting", {"model": "a/folder", "blocks": "0:10"})])
    else:
        libraries = "" if has_libraries else "torch and transformers, then "
        assert said == f"starting: loading {libraries}blocks 0:10 of a/folder; Ctrl-C stops\n"


@pytest.mark.asyncio
async def test_the_thread_that_loads_ends_when_it_has(
    home: Home,
    served: ServedModel,
    descriptor: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It left OpenMP threads behind, with which those of the torch thread never spin."""
    loading: list[threading.Thread] = []
    ended: list[bool] = []

    async def serve(*args: object, **more: object) -> None:
        await asyncio.to_thread(loading[0].join, 5)
        ended.append(not loading[0].is_alive())

    def load(*args: object) -> ServedModel:
        loading.append(threading.current_thread())
        return served

    monkeypatch.setattr(host_process, "_load", load)
    one = process(tmp_path / "host.key", descriptor)
    monkeypatch.setattr(one, "serve", serve)
    await _host(one, options(served))
    assert ended == [True]


@pytest.mark.asyncio
async def test_a_host_without_a_root_says_what_others_can_run(
    home: Home,
    served: ServedModel,
    descriptor: int,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Failed with only a root or an own file having it said: the widest policy was not."""
    one = process(tmp_path / "host.key", descriptor)
    one.stop.set()
    await _host(one, options(served))
    said = capfd.readouterr().err
    assert "Policy: this release (no root is configured), signed by nobody.\n" in said
    assert f"Others can run all {len(OPS)} ops of this release, and no other code.\n" in said
    assert said.index("Others can write every module.") < said.index("ready;")


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("memory", "says"),
    [
        ("64MiB", "traces take at most 64.0MiB of memory, all together\n"),
        ("1PiB", "traces take at most 300.0MiB of memory, all together, since no more is free\n"),
        (None, "traces take at most 225.0MiB of memory, all together\n"),
    ],
)
async def test_a_host_lends_the_memory_that_its_owner_says(
    home: Home,
    served: ServedModel,
    descriptor: int,
    tmp_path: Path,
    memory: str | None,
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("glasshive.peer.device_memory.free_bytes", lambda: 300 << 20)
    one = process(tmp_path / "host.key", descriptor, memory=memory)
    one.stop.set()
    await _host(one, options(served))
    assert says in capfd.readouterr().err


@pytest.mark.asyncio
@pytest.mark.parametrize("has_root", [False, True])
async def test_a_bootstrap_says_how_others_join_its_swarm(
    descriptor: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    has_root: bool,
) -> None:
    """Failed, with a root, with an address alone: such a host would be of the public swarm."""
    monkeypatch.setenv("GLASSHIVE_DATA", str(tmp_path))
    key = tmp_path / "bootstrap.key"
    transport = MemoryNetwork().transport(Identity.load_or_create(key))

    @contextlib.asynccontextmanager
    async def given(self: _Process, *, may_be_alone: bool) -> AsyncIterator[MemoryTransport]:
        yield transport

    monkeypatch.setattr(_Process, "transport", given)
    root = tmp_path / "root.json"
    root.write_bytes(root_now())
    named = (f"/ip4/127.0.0.1/tcp/31330/p2p/{transport.peer_id}",)
    settings = Settings(root=root if has_root else None, bootstraps=named)
    one = _Process(Life(settings, key, "/ip4/127.0.0.1/tcp/0", "pretty", descriptor))
    one.stop.set()
    await _bootstrap(one)
    out, said = capfd.readouterr()
    assert f"{transport.addresses[0]}\n" in out
    assert f"names this peer at {named[0]}, and it doesn't listen at that port" in said
    assert ("glasshive serve MODEL --bootstrap ADDRESS\n" in said) == (not has_root)
    assert ("glasshive serve MODEL --config hive.toml\n" in said) == has_root


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize("log_format", ["pretty", "json"])
@pytest.mark.parametrize("port", [31330, 31340])
def test_a_bootstrap_says_that_its_config_names_another_port(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    private: bool,
    log_format: Literal["pretty", "json"],
    port: int,
) -> None:
    """Failed without a word, and `join` with "nothing listens there"."""
    identity, other = Identity.generate(), "/ip4/127.0.0.1/tcp/4/p2p/12D3KooW"
    at = f"/ip4/127.0.0.1/tcp/{port}"
    where = SimpleNamespace(
        peer_id=identity.peer_id, addresses=(f"{at}/p2p/{identity.peer_id}",), listening=(at,)
    )
    named = f"/ip4/127.0.0.1/tcp/31330/p2p/{identity.peer_id}"
    settings = Settings(bootstraps=(other, named), issuers=(identity.peer_id,) if private else ())
    config = tmp_path / "hive.toml"
    life = Life(settings, tmp_path / "key", at, log_format, -1, config=config)
    events: list[dict[str, Any]] = []
    monkeypatch.setattr(
        host_words, "log", SimpleNamespace(warning=lambda event, **what: events.append(what))
    )
    say_moved(life, where)  # type: ignore[arg-type]
    said = capfd.readouterr().err
    if port == 31330:
        assert said == ""
    elif log_format == "json":
        (event,) = events
        assert event == {"config": str(config), "named": [named], "address": where.addresses[0]}
    else:
        assert said == (
            f"{config} names this peer at {named}, and it doesn't listen at that port: who looks "
            "for it there won't find it. In that file, and in its copies, write\n"
            f'  bootstraps = ["{other}", "{at}/p2p/{identity.peer_id}"]\n'
            "or start this peer at the port that is named"
            + ("; invites made before hold the old address, so make them anew" * private)
            + "\n"
        )


@pytest.mark.asyncio
@pytest.mark.parametrize("published", [False, True])
async def test_a_bootstrap_says_which_whitelist_it_has(
    descriptor: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    published: bool,
) -> None:
    """Failed with "policy=floor of this release (no whitelist is known here yet)"."""
    monkeypatch.setenv("GLASSHIVE_DATA", str(tmp_path))
    transport = MemoryNetwork().transport(Identity.generate())

    @contextlib.asynccontextmanager
    async def given(self: _Process, *, may_be_alone: bool) -> AsyncIterator[MemoryTransport]:
        yield transport

    monkeypatch.setattr(_Process, "transport", given)
    root = tmp_path / "root.json"
    root.write_bytes(root_now())
    settings = Settings(swarm=SWARM, root=root)
    if published:
        store = open_store(settings)
        assert store is not None
        assert store.accept_whitelist(*whitelist_now(1, store.root, swarm=SWARM))
    life = Life(settings, tmp_path / "bootstrap.key", "/ip4/127.0.0.1/tcp/0", "pretty", descriptor)
    one = _Process(life)
    one.stop.set()
    await _bootstrap(one)
    said = capfd.readouterr().err
    assert said.startswith(
        "hosts get whitelist 1 of the swarm from here\n"
        if published
        else "no whitelist of the swarm was published yet, so its hosts allow reads and little "
        "else; who signs for it runs\n"
        "  glasshive whitelist publish --folder FOLDER\n"
    )


@pytest.mark.asyncio
async def test_a_device_that_is_not_there_is_said_at_once(
    served: ServedModel,
    descriptor: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Also before anything that is said of a key."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    one = process(tmp_path / "host-2.key", descriptor, key_in_use="host.key")
    with pytest.raises(NoSuchDevice):  # without a transport, and nobody is waited for
        await _host(one, options(served, "cuda"))
    assert "in use" not in capfd.readouterr().err


@pytest.mark.asyncio
async def test_which_key_was_taken_is_said(
    home: Home,
    served: ServedModel,
    descriptor: int,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    key = tmp_path / "host.key"
    one = process(key, descriptor, (BOOTSTRAP,), key_in_use="busy.key")
    one.stop.set()
    await _host(one, options(served))
    said = capfd.readouterr().err
    assert said.splitlines()[1] == f"busy.key is in use; this process is the peer of {key}"


@pytest.mark.asyncio
async def test_a_host_whose_model_is_allowed_no_more_withdraws_until_it_is_again(
    home: Home,
    served: ServedModel,
    descriptor: int,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Failed: it warned once and announced on, and clients came to be refused."""

    async def announced(times: int) -> None:
        async with asyncio.timeout(20):
            while len(await find_records(home.other, None)) != times:  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    own = served.manifest.model_id
    one = process(tmp_path / "host.key", descriptor)
    identity = Identity.load_or_create(one.life.key)
    async with Serving(home.transport, identity, served, policy=policy(1, own)) as serving:
        await announced(1)
        _apply(one, serving, policy(2, "ab" * 32))
        await announced(0)
        said = capfd.readouterr().err.replace("\n", " ")
        assert f"tiny ({own}) may not be served any more by whitelist 2 of swarm 'public'" in said
        assert "the record is withdrawn and no trace is taken; it is announced again as" in said
        _apply(one, serving, policy(3, "ab" * 32))
        serving.refresh(again=True)  # as when the network daemon was started again
        await announced(0)
        assert "may not be served" not in capfd.readouterr().err
        _apply(one, serving, policy(4, own))
        await announced(1)
        assert "tiny may be served again by whitelist 4 of" in capfd.readouterr().err


@pytest.mark.asyncio
async def test_a_model_that_leaves_the_whitelist_while_it_loads_is_not_announced(
    home: Home,
    served: ServedModel,
    descriptor: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keeper = Keeper(policy(1, served.manifest.model_id))

    def load(*args: object) -> ServedModel:
        keeper.policy = policy(2, "ab" * 32)
        return served

    monkeypatch.setattr(host_process, "_load", load)
    one = process(tmp_path / "host.key", descriptor)
    monkeypatch.setattr("glasshive.host_process.open_store", lambda settings: object())
    monkeypatch.setattr(one, "keeper", lambda *_: keeper)
    with pytest.raises(NotAllowed, match="is not allowed by whitelist 2"):
        await asyncio.wait_for(_host(one, options(served)), 60)
    assert await find_records(home.other, None) == []


@pytest.mark.asyncio
async def test_a_model_that_is_not_allowed_is_not_loaded(
    home: Home,
    served: ServedModel,
    descriptor: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded: list[object] = []
    monkeypatch.setattr(host_process, "_load", lambda *arguments: loaded.append(arguments))
    one = process(tmp_path / "host.key", descriptor)
    monkeypatch.setattr("glasshive.host_process.open_store", lambda settings: object())
    monkeypatch.setattr(one, "keeper", lambda *_: Keeper(policy(1, "ab" * 32)))
    with pytest.raises(NotAllowed, match="is not allowed by whitelist 1"):
        await asyncio.wait_for(_host(one, options(served)), 60)
    assert loaded == []


@pytest.mark.asyncio
async def test_a_model_that_a_late_bootstrap_allows_is_served(
    home: Home,
    served: ServedModel,
    descriptor: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The whitelist of the one that had answered counted, though it was behind."""
    keeper = Keeper(policy(1, "ab" * 32), policy(2, served.manifest.model_id))
    one = process(tmp_path / "host.key", descriptor)
    one.stop.set()
    monkeypatch.setattr("glasshive.host_process.open_store", lambda settings: object())
    monkeypatch.setattr(one, "keeper", lambda *_: keeper)
    await asyncio.wait_for(_host(one, options(served)), 60)
    said = capfd.readouterr().err.replace("\n", " ")
    assert "Policy: whitelist 2 " in said
