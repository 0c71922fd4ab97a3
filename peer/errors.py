"""What can go wrong on a host.

GlasshiveError
└── PeerError                      anything that a host refuses or cannot do
    ├── BadCheckpoint              a folder that holds no model in the Hugging Face layout
    │   ├── WrongWeights           weight files that are cut off, unreadable or of another model
    │   └── MissingTensor          weights that the span needs and no file holds
    ├── BadSpan                    a span that this model does not have
    ├── UnsupportedAttention       an attention backend that the model or this machine lacks
    ├── ModelTypeRefused           an architecture that does not split exactly, or is unknown
    ├── WrongInput                 tensors that this span cannot run on
    ├── Busy                       as many traces as the host allows are running
    ├── HostFailed                 an error inside the host, which only its own log explains
    └── TraceEnded                 a trace that was cancelled, or whose deadline passed
"""

from __future__ import annotations

from glasshive.graph.errors import GlasshiveError


class PeerError(GlasshiveError):
    """Anything that a host refuses or cannot do."""


class BadCheckpoint(PeerError):
    """A folder that holds no model in the Hugging Face layout, or one that is not served."""


class WrongWeights(BadCheckpoint):
    """Weight files that are cut off, unreadable or of another model."""


class MissingTensor(BadCheckpoint):
    """Weights that the span needs and no file of the checkpoint holds.

    `names` are their names in the model.
    """

    def __init__(self, message: str, *, names: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.names = names


class BadSpan(PeerError):
    """A span that this model does not have."""


class UnsupportedAttention(PeerError):
    """An attention backend that the model or this machine lacks."""


class ModelTypeRefused(PeerError):
    """An architecture that does not split exactly, or that this release does not know."""


class WrongInput(PeerError):
    """Tensors that this span cannot run on."""


class Busy(PeerError):
    """As many traces as the host allows are running; another peer, or later, may do."""


class HostFailed(PeerError):
    """An error inside the host, which only its own log explains."""


class TraceEnded(PeerError):
    """A trace that was cancelled by its client, or whose deadline passed."""
