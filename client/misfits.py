"""What torch refuses on real tensors and not on the meta device, refused at the user's line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import torch

from glasshive.client.errors import Misfit, NotInTable, PlainDestination
from glasshive.client.recipe import Bound, Operand
from glasshive.client.source_lines import here
from glasshive.graph.one_dtype import ONE_DTYPE

_WIDE: Final = (torch.int64, torch.int32)
_INDICES: Final[Mapping[str, tuple[str, tuple[torch.dtype, ...]]]] = {
    "index": ("indices", (*_WIDE, torch.uint8, torch.bool)),
    "index_put": ("indices", (*_WIDE, torch.uint8, torch.bool)),
    "index_select": ("index", _WIDE),
    "index_add": ("index", _WIDE),
    "index_copy": ("index", (torch.int64,)),
    "index_fill": ("index", (torch.int64,)),
    "put": ("index", (torch.int64,)),
    "take": ("index", (torch.int64,)),
}


def array_hint(*values: object) -> str:
    """What to do with a NumPy array that stands where a tensor is wanted; empty if none does."""
    is_array = any(isinstance(value, np.ndarray) for value in values)
    return "; torch.from_numpy(array) makes a tensor of a NumPy array" if is_array else ""


def check_dtypes(name: str, bound: Bound) -> None:
    """Raise Misfit if dtypes differ that must be one, or an index is of a wrong dtype."""
    packet = name.partition(".")[0]
    packet = packet.rstrip("_") if packet not in ONE_DTYPE else packet
    same = [bound[key] for key in ONE_DTYPE.get(packet, ()) if isinstance(bound[key], Operand)]
    if len({operand.layout.dtype for operand in same}) > 1:
        shapes = " and ".join(map(str, same))
        raise Misfit(
            f"{packet} takes tensors of one dtype, but got {shapes}; convert one with .to(h.dtype)",
            line=here(),
        )
    argument, allowed = _INDICES.get(packet, ("", ()))
    given = bound.get(argument)
    for index in given if isinstance(given, list) else [given]:
        if isinstance(index, Operand) and index.layout.dtype not in allowed:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
            raise Misfit(
                f"{packet} takes an index of dtype {names}, but got {index}; convert it "
                "with .long()",
                line=here(),
            )


def check_destination(destination: Any) -> None:
    if isinstance(destination, list):
        raise NotInTable("an op that writes a list of tensors cannot be traced", line=here())
    if not destination.traced:
        raise PlainDestination(
            f"a traced value is written into a plain tensor, {destination.layout}, which exists "
            "already and cannot follow; make the destination from a traced value, as in "
            "h.new_zeros(shape), or join the pieces with torch.stack or torch.cat",
            line=here(),
        )
