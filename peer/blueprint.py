"""What a host knows of a model before it reads a weight."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from glasshive.graph.outline import Outline
from glasshive.graph.twin import build_twin, config_text, outline_of
from glasshive.peer.checkpoint import HF_ATTENTION, Attention, Checkpoint
from glasshive.peer.self_test import self_test


@dataclass(frozen=True, slots=True)
class Blueprint:
    """A model whose type splits exactly, for one number format and kind of attention."""

    of_what: tuple[str, torch.dtype, Attention]
    """The text of the configuration, and what else it was made for."""
    twin: nn.Module
    outline: Outline

    @classmethod
    def of(cls, folder: Path, dtype: torch.dtype, attention: Attention) -> Blueprint:
        """That of the model in `folder`, which takes seconds for one of many blocks.

        Raises what Checkpoint raises, ModelTypeRefused from the self-test, and UnsupportedModel.
        """
        checkpoint = Checkpoint(folder)
        self_test(checkpoint.config, attention)
        twin = build_twin(checkpoint.config, dtype, HF_ATTENTION[attention])
        of_what = config_text(checkpoint.config), dtype, attention
        return cls(of_what, twin, outline_of(twin, checkpoint.config))

    def is_of(self, checkpoint: Checkpoint, dtype: torch.dtype, attention: Attention) -> bool:
        """Whether it is of the model in this checkpoint, which may have changed meanwhile."""
        return self.of_what == (config_text(checkpoint.config), dtype, attention)
