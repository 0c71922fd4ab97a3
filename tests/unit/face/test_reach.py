"""What is said, asked and configured of where others reach a peer."""

from __future__ import annotations

import time
import tomllib
from pathlib import Path

import pytest
from askers import record_of
from lab import gate_now

from glasshive.dht.memory_transport import MemoryNetwork, MemoryTransport
from glasshive.dht.records import MODELS_KEY, PeerRecord
from glasshive.host_process import Life
from glasshive.host_words import say_reach
from glasshive.security.keys import Identity
from glasshive.security.membership import Role
from glasshive.settings import ConfigError, Settings, load_settings
from glasshive.swarm_commands import _check_bootstrap_place
from glasshive.trust_keeper import TrustKeeper

WAN = "/ip4/203.0.113.7/tcp/31331"


@pytest.mark.parametrize("members", [False, True])
def test_who_can_come_and_where_is_said(
    members: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    identity = Identity.generate()
    transport = MemoryNetwork().transport(identity)
    settings = Settings(issuers=(identity.peer_id,) if members else ())
    life = Life(settings, tmp_path / "key", WAN, "pretty", -1)
    say_reach(life, transport)
    assert capfd.readouterr().err == ""  # loopback: nobody comes
    transport.addresses = (f"{WAN}/p2p/{identity.peer_id}", *transport.addresses)
    say_reach(life, transport)
    assert capfd.readouterr().err == (
        f"other machines reach this one: {'members of this swarm' if members else 'strangers'} may "
        f"ask it for what is allowed, under\n  {WAN}/p2p/{identity.peer_id}\n"
    )


def test_a_host_s_places_are_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "hive.toml"
    file.write_text(f'listen = "/ip4/0.0.0.0/tcp/31331"\nannounce = ["{WAN}"]\n')
    assert load_settings(file).listen == "/ip4/0.0.0.0/tcp/31331"
    assert load_settings(file).announce == (WAN,)
    assert load_settings(file, announce=["/ip4/8.8.4.4/tcp/1"]).announce == ("/ip4/8.8.4.4/tcp/1",)
    monkeypatch.setenv("GLASSHIVE_ANNOUNCE", f"{WAN}, /ip6/2600::3/tcp/1")
    assert load_settings(file).announce == (WAN, "/ip6/2600::3/tcp/1")


def test_what_is_announced_goes_with_where_one_listens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second host with the same hive.toml listens elsewhere, and isn't found at the first one."""
    file = tmp_path / "hive.toml"
    first, second = "/ip4/0.0.0.0/tcp/31331", "/ip4/0.0.0.0/tcp/31332"
    file.write_text(f'listen = "{first}"\nannounce = ["{WAN}"]\n')
    assert load_settings(file, listen=first).announce == (WAN,)  # as after a restart
    assert load_settings(file, listen=second).announce == ()
    assert load_settings(file, listen=second, announce=[WAN]).announce == (WAN,)
    monkeypatch.setenv("GLASSHIVE_LISTEN", second)
    assert load_settings(file).announce == ()
    assert load_settings(file, listen=first).announce == (WAN,)
    monkeypatch.setenv("GLASSHIVE_ANNOUNCE", "/ip4/8.8.4.4/tcp/1")
    assert load_settings(file).announce == ("/ip4/8.8.4.4/tcp/1",)
    monkeypatch.delenv("GLASSHIVE_ANNOUNCE")
    file.write_text(f'announce = ["{WAN}"]\n')
    with pytest.raises(ConfigError) as caught:
        load_settings(file, listen=first)
    assert str(caught.value) == (
        f"the setting announce in {file}: it goes with the setting listen of that file, which has "
        'none; write listen = "/ip4/0.0.0.0/tcp/31331" beside it, or say --announce'
    )


def test_others_must_find_the_bootstrap_peer_of_a_new_swarm() -> None:
    from typer import BadParameter

    with pytest.raises(BadParameter, match=r"can't find the bootstrap peer by /ip4/0.0.0.0/tcp/1;"):
        _check_bootstrap_place("/ip4/0.0.0.0/tcp/1", [])
    with pytest.raises(BadParameter, match="others have to know the bootstrap peer's port"):
        _check_bootstrap_place("/ip4/0.0.0.0/tcp/0", [WAN])
    _check_bootstrap_place("/ip4/0.0.0.0/tcp/1", [WAN])
    _check_bootstrap_place("/ip4/10.1.2.3/tcp/1", [])


@pytest.mark.asyncio
@pytest.mark.parametrize("private", [False, True])
async def test_a_keeper_goes_where_a_host_would(private: bool) -> None:
    """Not to private addresses that a stranger's record names, from a machine with a public one,
    and in a private swarm with private addresses to no public one.
    """
    network = MemoryNetwork()
    me, lan, wan = (Identity.generate() for _ in range(3))
    gate = gate_now(me, Role.HOST) if private else None
    here: MemoryTransport = network.transport(me, gate=gate)
    here.addresses = ("/ip4/10.0.0.9/tcp/4001" if private else "/ip4/8.8.4.4/tcp/4001",)
    for identity, address in ((lan, "/ip4/10.0.0.1/tcp/80"), (wan, "/ip4/8.8.8.8/tcp/4001")):
        record = record_of(identity, [address], expires_at_seconds=round(time.time()) + 50.0)
        expiry = PeerRecord.verify(record, None).expires_at_seconds
        at = network.transport(identity)
        assert await at.store(MODELS_KEY, identity.peer_id, record, expiry)
    keeper = TrustKeeper(here, _Store(), [])  # type: ignore[arg-type]
    (found,) = await keeper._hosts()
    assert found.peer_id == (lan if private else wan).peer_id


class _Store:
    """A store without anything."""

    root = type("Root", (), {"version": 1})
    highest_version = 0
    whitelist = None
    kept = None


def test_the_hive_toml_of_a_new_swarm_says_where_the_bootstrap_is_found() -> None:
    from glasshive.new_swarm import NewSwarm, _hive_text

    whitelist = type("Whitelist", (), {"swarm": "lab"})
    peer = Identity.generate().peer_id
    for announce, place in (((), "/ip4/10.1.2.3/tcp/1"), ((WAN,), WAN)):
        new = NewSwarm(
            whitelist,  # type: ignore[arg-type]
            "/ip4/10.1.2.3/tcp/1",
            *((), 1, (), 1, {}),  # type: ignore[arg-type]
            announce=announce,
        )
        assert tomllib.loads(_hive_text(new, peer))["bootstraps"] == [f"{place}/p2p/{peer}"]
