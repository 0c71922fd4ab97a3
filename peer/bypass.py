"""Has a module of the model not run: somebody else says what it gives, until that is taken off."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn


class Removable(Protocol):
    """Something put on a module for one stage."""

    def remove(self) -> None:
        """Take it off."""


class Bypass:
    """Has a module give something without running, until it is removed."""

    def __init__(
        self, module: nn.Module, give: Callable[..., Tensor], is_off: Callable[[], bool]
    ) -> None:
        self._module = module
        self._before = module.__dict__.get("forward")  # another trace's, which has given way
        run = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            return run(*args, **kwargs) if is_off() else give()

        module.forward = forward

    def remove(self) -> None:
        """Let the module run again."""
        if self._before is None:
            del self._module.forward
        else:
            self._module.forward = self._before
