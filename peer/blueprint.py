"""What a host knows of a model before it reads a weight."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from glasshive.graph.outline import Outline
from glasshive.graph.twin import build_twin, outline_of
from glasshive.peer.checkpoint import HF_ATTENTION, Attention, Checkpoint
from glasshive.peer.self_test import self_test


@dataclass(frozen=True, slots=True)
class Blueprint:
    """A model whose type splits exactly, for one number format and kind of attention."""

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
        return cls(twin, outline_of(twin, checkpoint.config))
