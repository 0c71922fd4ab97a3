"""What attacks are made on."""

from __future__ import annotations

import pytest
from tenants import load_tiny

from glasshive.peer.served_model import ServedModel


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    """A Llama of 2 blocks (hidden size 32, vocabulary 64, rows of at most 24 tokens), whole."""
    return load_tiny(tmp_path_factory.mktemp("tiny"))
