"""Who sees a prompt is said at the first connection to a swarm of strangers, and once."""

from __future__ import annotations

from pathlib import Path

import pytest

import glasshive
from glasshive.privacy_notice import tell_once


def test_it_is_said_once_for_each_swarm(tmp_path: Path) -> None:
    said: list[str] = []
    for swarm in ("public", "public", "other", "public", "local-1-2"):
        tell_once(swarm, tmp_path / "data", said.append)
    assert len(said) == 2
    assert "a peer of the swarm 'public'. A peer that computes for you sees the activat" in said[0]
    assert "the first one your tokens" in said[0]
    assert "Use a private swarm" in said[0]


def test_where_nothing_can_be_kept_it_is_said_again(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("no folder")
    said: list[str] = []
    assert all(tell_once("public", tmp_path / "data", said.append) for _ in range(2))
    assert len(said) == 2


def test_connecting_says_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GLASSHIVE_DATA", str(tmp_path))
    address = "/ip4/127.0.0.1/tcp/9/p2p/12D3KooWRndVhVZPCiQwHBBBdg769GyrPUW13zxwqQyf9r3ANaba"
    for wanted in (1, 0):
        with glasshive.connect(address):
            pass
        assert capfd.readouterr().err.count("You are told this once.") == wanted
