"""Arguments that torch wants in one dtype: it checks them on real tensors, and not on meta ones.

So whoever finds shapes on the meta device checks them too. By torch's names, as the dispatcher
has them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

ONE_DTYPE: Final[Mapping[str, tuple[str, ...]]] = {
    "mm": ("self", "mat2"),
    "bmm": ("self", "mat2"),
    "mv": ("self", "vec"),
    "dot": ("self", "tensor"),
    "vdot": ("self", "other"),
    "addmm": ("self", "mat1", "mat2"),
    "addmv": ("self", "mat", "vec"),
    "baddbmm": ("self", "batch1", "batch2"),
    "_cdist_forward": ("x1", "x2"),
    "_euclidean_dist": ("x1", "x2"),
    "linalg_cross": ("self", "other"),
    "convolution": ("input", "weight", "bias"),
    "native_layer_norm": ("weight", "bias"),
    "binary_cross_entropy": ("self", "target", "weight"),
    "huber_loss": ("self", "target"),
    "heaviside": ("self", "values"),
    "index_add": ("self", "source"),
    "index_copy": ("self", "source"),
    "index_put": ("self", "values"),
    "put": ("self", "source"),
    "masked_scatter": ("self", "source"),
}
