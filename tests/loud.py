"""Processes that write down everything that they would at their lowest level of logging."""

from __future__ import annotations

from pathlib import Path

import pytest

_LOUD = """
import logging
stock = logging.Logger.setLevel

def loud(self, level):
    stock(self, logging.DEBUG if self.name.startswith({whose!r}) else level)

logging.Logger.setLevel = loud
"""


def be_loud(patch: pytest.MonkeyPatch, folder: Path, whose: str = "") -> None:
    """Have all Python processes that are started while `patch` lasts be loud.

    Their loggers whose names begin with `whose`. `folder` is an empty one.
    """
    (folder / "sitecustomize.py").write_text(_LOUD.format(whose=whose))
    patch.setenv("PYTHONPATH", str(folder))
