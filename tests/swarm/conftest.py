"""A tiny model, and what steady clients ask of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from steady_clients import N_BLOCKS, Question, questions
from tiny_llama import save_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That of a random Llama of six blocks."""
    return save_llama(tmp_path_factory.mktemp("models") / "tiny-llama", N_BLOCKS)


@pytest.fixture(scope="module")
def asked(folder: Path) -> list[Question]:
    """What can be asked of it, with the answers."""
    return questions(folder)
