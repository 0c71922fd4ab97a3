"""glasshive: look inside language models that are split over a swarm of volunteers' GPUs.

    import glasshive

    swarm = glasshive.connect("hive.toml")
    model = swarm.model("SmolLM2-135M-Instruct")
    with model.trace("The Eiffel Tower is in the city of"):
        h = model.model.layers[5].output.save()
    print(h.shape)

Names are imported when they are first used, so that `import glasshive` is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from glasshive.client.model import Model
    from glasshive.client.structures import save
    from glasshive.client.swarm import Swarm
    from glasshive.client.tracer import Tracer
    from glasshive.connection import connect
    from glasshive.graph.errors import GlasshiveError, RowTaken, UnseenWrite
    from glasshive.local_model import local

_HOME = {
    "GlasshiveError": "glasshive.graph.errors",
    "Model": "glasshive.client.model",
    "RowTaken": "glasshive.graph.errors",
    "Swarm": "glasshive.client.swarm",
    "Tracer": "glasshive.client.tracer",
    "UnseenWrite": "glasshive.graph.errors",
    "connect": "glasshive.connection",
    "local": "glasshive.local_model",
    "save": "glasshive.client.structures",
}

__all__ = [
    "GlasshiveError",
    "Model",
    "RowTaken",
    "Swarm",
    "Tracer",
    "UnseenWrite",
    "connect",
    "local",
    "save",
]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'glasshive' has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
