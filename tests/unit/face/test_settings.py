"""Settings from flags, environment and file, in this order."""

from __future__ import annotations

from pathlib import Path

import pytest

from glasshive.security.envelope import PUBLIC_SWARM
from glasshive.settings import ConfigError, config_path, data_dir, load_settings

ADDRESS = "/ip4/127.0.0.1/tcp/31330/p2p/12D3KooWA"


@pytest.fixture(autouse=True)
def _own_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("CONFIG", "SWARM", "BOOTSTRAPS", "KEY", "HOST_KEY"):
        monkeypatch.delenv(f"GLASSHIVE_{name}", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("HOME", str(tmp_path))


def write(place: Path, text: str) -> Path:
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(text)
    return place


def test_without_anything_the_defaults_hold() -> None:
    settings = load_settings()
    assert (settings.swarm, settings.bootstraps) == (PUBLIC_SWARM, ())
    assert settings.client_key_path == data_dir() / "client.key"
    assert settings.host_key_path == data_dir() / "host.key"


def test_the_default_file_is_read_if_it_is_there() -> None:
    write(config_path(), f'swarm = "lab"\nbootstraps = ["{ADDRESS}"]\n')
    settings = load_settings()
    assert (settings.swarm, settings.bootstraps) == ("lab", (ADDRESS,))


def test_flags_win_over_the_environment_and_that_over_the_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = write(tmp_path / "hive.toml", 'swarm = "file"\nbootstraps = ["/file"]\nkey = "k"\n')
    assert load_settings(file).swarm == "file"
    monkeypatch.setenv("GLASSHIVE_SWARM", "environment")
    monkeypatch.setenv("GLASSHIVE_BOOTSTRAPS", "/one, /two")
    settings = load_settings(file)
    assert (settings.swarm, settings.bootstraps) == ("environment", ("/one", "/two"))
    settings = load_settings(file, swarm="flag", bootstraps=["/three"])
    assert (settings.swarm, settings.bootstraps) == ("flag", ("/three",))
    assert load_settings(file, swarm=None, bootstraps=()).swarm == "environment"


def test_keys_in_a_file_are_relative_to_it(tmp_path: Path) -> None:
    file = write(tmp_path / "lab" / "hive.toml", 'key = "me.key"\nhost_key = "/elsewhere/host"\n')
    settings = load_settings(file)
    assert settings.client_key_path == tmp_path / "lab" / "me.key"
    assert settings.host_key_path == Path("/elsewhere/host")


def test_the_environment_names_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = write(tmp_path / "other.toml", 'swarm = "other"\n')
    monkeypatch.setenv("GLASSHIVE_CONFIG", str(file))
    assert load_settings().swarm == "other"


def test_a_named_file_that_is_not_there_says_what_to_write(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config file .*/none.toml; write .*bootstraps = "):
        load_settings(tmp_path / "none.toml")


def test_memory_is_a_size(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert load_settings().memory is None
    file = write(tmp_path / "hive.toml", 'memory = "8GiB"\n')
    assert load_settings(file).memory == 8 << 30
    monkeypatch.setenv("GLASSHIVE_MEMORY", "500MB")
    assert load_settings(file).memory == 500_000_000
    assert load_settings(file, memory="67108864").memory == 64 << 20
    with pytest.raises(ConfigError, match="memory of GLASSHIVE_MEMORY or a flag: wanted a size"):
        load_settings(memory="-1")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("swarm = ", "can't be read: not TOML: "),
        (
            "swarm = 3\n",
            r"setting swarm in .*hive\.toml: wanted the swarm's name in quotes.* got 3$",
        ),
        (
            'bootstrap = ["/a"]\n',
            r"no setting 'bootstrap' \(it is in .*hive\.toml\); the settings are swarm, "
            r"bootstraps, key, host_key, root, issuers, policy, audit, memory, listen, announce; "
            r"did you mean bootstraps\?",
        ),
        (
            "bootstraps = [1]\n",
            r"setting bootstraps in .*: wanted a list of addresses.* got \[1\]$",
        ),
        (
            'memory = "much"\n',
            r"setting memory in .*: wanted a size of at least 64 MiB .*8GiB.* got 'much'$",
        ),
        ("memory = 0\n", r"setting memory in .*: wanted a size of at least 64 MiB .* got 0$"),
        ('memory = "8"\n', r"setting memory in .*8 alone is 8 bytes.* got '8'$"),
        ("key = 3\n", "setting key in .*: wanted a path in quotes"),
        ('swarm = "\udcff"', "can't be read: 'utf-8' codec can't decode"),
        (f"swarm = {'9' * 5000}", "can't be read: a number has too many digits"),
        (f"swarm = 0x{'f' * 5000}", "can't be read: a number has too many digits"),
        (f"key = [[0x{'f' * 5000}]]", "can't be read: a number has too many digits"),
    ],
)
def test_what_can_not_be_used_is_named(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "hive.toml"
    file.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ConfigError, match=said):
        load_settings(file)


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="larger than"):
        load_settings(write(tmp_path / "hive.toml", "#" * (1 << 21)))
