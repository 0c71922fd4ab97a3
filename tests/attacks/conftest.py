"""A tiny model, served."""

from __future__ import annotations

import pytest
from one_host import tiny_served

from glasshive.peer.served_model import ServedModel


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    """See `tiny_served`, whole."""
    return tiny_served(tmp_path_factory.mktemp("tiny"))
