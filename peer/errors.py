"""What can go wrong on a host.

GlasshiveError
└── HostError                      anything that a host refuses or cannot do
    ├── BadCheckpoint              a folder that holds no model in the Hugging Face layout
    │   ├── WrongWeights           weight files that are cut off, unreadable or of another model
    │   └── MissingTensor          weights that the span needs and no file holds
    ├── BadSpan                    a span that this model does not have
    ├── UnsupportedAttention       an attention backend that the model or this machine lacks
    ├── NotEnoughMemory            memory ran out while a span was loaded, or ran
    ├── NoSuchDevice               a device that torch does not have on this machine
    ├── ModelTypeRefused           an architecture that does not split exactly, or is unknown
    ├── NotServed                  a model, dtype or span that this host doesn't serve
    ├── WrongInput                 tensors that this span cannot run on
    ├── Busy                       what the host allows at a time is running, or waits there
    ├── QuotaExceeded              a member's quota doesn't leave what its trace takes
    ├── NeighbourBusy              another peer of the plan that takes no more streams now
    ├── NeighbourLost              another peer of the plan that cannot be reached, or is gone
    ├── BadNeighbour               another peer of the plan that breaks the protocol
    ├── HostFailed                 an error inside the host, which only its own log explains
    └── TraceEnded                 a trace that was cancelled, or whose deadline passed
"""

from __future__ import annotations

from glasshive.graph.errors import GlasshiveError


class HostError(GlasshiveError):
    """Anything that a host refuses or cannot do."""


class BadCheckpoint(HostError):
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


class BadSpan(HostError):
    """A span that this model does not have."""


class UnsupportedAttention(HostError):
    """An attention backend that the model or this machine lacks."""


class NoSuchDevice(HostError):
    """A device that torch does not have on this machine."""


class NotEnoughMemory(HostError):
    """Memory ran out while a span was loaded, or ran; the text says what takes less."""


class ModelTypeRefused(HostError):
    """An architecture that does not split exactly, or that this release does not know."""


class NotServed(HostError):
    """A model, dtype or span that this host doesn't serve, or not any more."""


class WrongInput(HostError):
    """Tensors that this span cannot run on."""


class Busy(HostError):
    """As much as the host allows at a time is under way; another peer, or later, may do."""


class QuotaExceeded(HostError):
    """A member's quota on this host doesn't leave what its trace takes; the text says which."""


class NeighbourBusy(HostError):
    """Another peer of the plan that takes no more streams now; the text has its id."""


class NeighbourLost(HostError):
    """Another peer of the plan that cannot be reached, or is gone; the text has its id."""


class BadNeighbour(HostError):
    """Another peer of the plan that breaks the protocol; the text has its id."""


class HostFailed(HostError):
    """An error inside the host, which only its own log explains."""


class TraceEnded(HostError):
    """A trace that was cancelled by its client, or whose deadline passed."""
