"""What is free: of the machine, and within the limits of this process's control groups."""

from __future__ import annotations

from pathlib import Path

import pytest

from glasshive.peer.free_memory import free_bytes

NO_LIMIT = 2**63 - 4096  # as version 1 says it


@pytest.fixture(autouse=True)
def _a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    class Free:
        available = 10_000

    monkeypatch.setattr("psutil.virtual_memory", Free)


class Groups:
    """A tree of control groups, and the file that says which of them are this process's."""

    def __init__(self, folder: Path) -> None:
        self.mount = folder / "cgroup"
        self.own = folder / "own"

    def v2(self, path: str, limit: int | str, used: int, idle: int = 0) -> None:
        self._write(path, "memory.max", limit, "memory.current", used, f"inactive_file {idle}")

    def v1(self, path: str, limit: int, used: int, idle: int = 0) -> None:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
        stat = f"inactive_file 1\ntotal_inactive_file {idle}"
        self._write(path, names[0], limit, names[1], used, stat)

    def _write(
        self, path: str, limit: str, value: int | str, usage: str, used: int, stat: str
    ) -> None:
        group = self.mount / path
        group.mkdir(parents=True, exist_ok=True)
        (group / limit).write_text(f"{value}\n")
        (group / usage).write_text(f"{used}\n")
        (group / "memory.stat").write_text(f"anon 7\n{stat}\nfile 9\n")

    def free(self, own: str) -> int:
        self.own.write_text(own)
        return free_bytes(self.own, self.mount)


@pytest.fixture
def groups(tmp_path: Path) -> Groups:
    return Groups(tmp_path)


def test_without_groups_the_machine_counts(tmp_path: Path, groups: Groups) -> None:
    assert free_bytes(tmp_path / "none", tmp_path / "none") == 10_000
    assert groups.free("0::/gone\n4:memory:/gone\n") == 10_000
    groups.v2("pod", "max", 9_999)
    assert groups.free("0::/pod\n") == 10_000
    groups.v1("memory/pod", NO_LIMIT, 9_999)
    assert groups.free("4:memory:/pod\n3:cpu:/\n") == 10_000


def test_the_tightest_group_on_the_way_counts(groups: Groups) -> None:
    groups.v2("pod/box", 6_000, 1_000)
    assert groups.free("0::/pod/box\n") == 5_000
    groups.v2("pod", 7_000, 3_000)
    assert groups.free("0::/pod/box\n") == 4_000
    groups.v2("pod/other", 1_000, 900)
    assert groups.free("0::/pod/box\n") == 4_000


def test_what_is_only_cached_is_free(groups: Groups) -> None:
    groups.v2("pod", 6_000, 5_900, idle=5_000)
    assert groups.free("0::/pod\n") == 5_100
    groups.v2("pod", 6_000, 7_000)
    assert groups.free("0::/pod\n") == 0


def test_a_container_s_own_group_is_the_root_that_it_sees(groups: Groups) -> None:
    groups.v2(".", 5_000, 2_000)
    assert groups.free("0::/\n") == 3_000
    groups.v1("memory", 4_000, 3_000, idle=500)
    assert groups.free("4:memory:/docker/what-is-not-here\n") == 1_500


def test_both_versions_beside_each_other(groups: Groups) -> None:
    groups.v1("memory/pod", 4_000, 1_000)
    groups.v2("unified/pod", 2_000, 1_000)
    assert groups.free("4:memory:/pod\n0::/pod\n") == 1_000
    groups.v1("cpu,memory/pod", 900, 100)
    assert groups.free("4:cpu,memory:/pod\n") == 800
