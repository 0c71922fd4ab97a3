"""Models that the conformance tests share: loaded once, in one to three spans."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_models import CUTS, DEVICE, Setting, load_plain, save_tiny
from torch import nn

import glasshive

GetSetting = Callable[..., Setting]


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of the tiny checkpoint of a kind, `llama` or `gpt2`."""
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(f"tiny-{kind}")
            save_tiny(kind, made[kind])
        return made[kind]

    return get


@pytest.fixture(scope="session")
def get_setting(tiny_folder: Callable[[str], Path]) -> GetSetting:
    """A tiny model by kind, cuts and attention backend; each is loaded once."""
    plain: dict[tuple[str, str], nn.Module] = {}
    made: dict[tuple[Any, ...], Setting] = {}

    def get(kind: str, cuts: tuple[int, ...] = (), attention: str = "sdpa") -> Setting:
        key = (kind, cuts, attention)
        if key not in made:
            folder = tiny_folder(kind)
            if (kind, attention) not in plain:
                plain[kind, attention] = load_plain(folder, attention)
            model = glasshive.local(folder, cuts=cuts, attention=attention, device=DEVICE)
            made[key] = Setting(kind, cuts, plain[kind, attention], model)
        return made[key]

    return get


@pytest.fixture(
    params=[(kind, cuts) for kind in ("llama", "gpt2") for cuts in CUTS],
    ids=lambda param: f"{param[0]}-{len(param[1]) + 1}",
)
def tiny(request: pytest.FixtureRequest, get_setting: GetSetting) -> Setting:
    """Each tiny model over 1, 2 and 3 spans."""
    return get_setting(*request.param)


@pytest.fixture(params=CUTS, ids=lambda cuts: f"{len(cuts) + 1}-spans")
def llama(request: pytest.FixtureRequest, get_setting: GetSetting) -> Setting:
    """The tiny Llama over 1, 2 and 3 spans."""
    return get_setting("llama", request.param)


@pytest.fixture
def one_llama(get_setting: GetSetting) -> Setting:
    """The tiny Llama over three spans."""
    return get_setting("llama", CUTS[-1])
