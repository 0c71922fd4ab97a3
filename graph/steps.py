"""What the passes of a generation have: found by running a model's twin with a cache.

The twin runs a prompt as `generate` does, then one more token, at two sizes: an axis is then of the
rows, of all tokens so far, or fixed. Where it can't be run so, the model is traced but not
generated with.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from glasshive.graph.dtypes import DType
from glasshive.graph.errors import UnsupportedModel
from glasshive.graph.graph import IO
from glasshive.graph.outline import GENERATOR, Axis, Leaf, PassKind, Steps
from glasshive.graph.twin_scans import GENERATE_CACHE, Scans, accepts, cache_keyword

_GENERATED = frozenset(PassKind) - {PassKind.PLAIN, PassKind.PADDED}
_TOKENS = (8, 12)  # in the caches behind the step, of 2 and 3 rows
_ROWS = (2, 3)


def scan_steps(
    twin: nn.Module, path: str, n_blocks: int, order: Sequence[tuple[str, str]]
) -> Steps:
    """The passes of a generation with the model whose modules run in that order.

    Raises UnsupportedModel if it takes no cache, or runs other modules in a step.
    """

    def both(prompt_kind: PassKind, step_kind: PassKind) -> dict[PassKind, Scans]:
        prompt = Scans(twin, path, n_blocks, prompt_kind)
        step = Scans(twin, path, n_blocks, step_kind, prompt)
        for scans in (prompt, step):
            if scans.first.order != order:
                raise UnsupportedModel(
                    f"{type(twin).__name__} runs other modules in a step of a generation than in a "
                    "trace, so a site's steps can't be told; use model.trace(...)"
                )
        return {prompt_kind: prompt, step_kind: step}

    plain = both(PassKind.PROMPT, PassKind.STEP)
    padded: dict[PassKind, Scans] | None = None
    if "attention_mask" in accepts(twin):
        try:
            padded = both(PassKind.PADDED_PROMPT, PassKind.PADDED_STEP)
        except UnsupportedModel:
            padded = None
    masked = padded is not None and not _is_spread(plain, padded)
    leaves: dict[tuple[str, IO, PassKind], tuple[Leaf, ...]] = {}
    sides: tuple[IO, IO] = ("input", "output")
    for kind, scans in plain.items():
        padded_kind = PassKind.PADDED_STEP if kind is PassKind.STEP else PassKind.PADDED_PROMPT
        once = (name for name in scans.first.events if scans.first.calls[name] == 1)
        for name, io in ((name, io) for name in once for io in sides):
            found = leaves[name, io, kind] = scans.leaves(name, io)
            # Where the twin can't be run padded, what has rows without padding.
            leaves[name, io, padded_kind] = (
                tuple(leaf for leaf in found if leaf.batch_axis is not None)
                if padded is None or (kind is PassKind.STEP and not masked)
                else padded[padded_kind].leaves(name, io)
            )
    _add_chunks(leaves)
    for one in _GENERATED:
        leaves[GENERATOR, "output", one] = (Leaf((), DType.INT64, ("batch",)),)
    last = plain[PassKind.STEP]
    return Steps(
        leaves=leaves,
        cached=frozenset(last.first.cached),
        cache_bytes=tuple(
            _row_bytes(last.first.cache, last.second.cache, index) for index in range(n_blocks)
        ),
        masked=masked,
        in_chunks=cache_keyword(twin) == GENERATE_CACHE,
    )


def _add_chunks(leaves: dict[tuple[str, IO, PassKind], tuple[Leaf, ...]]) -> None:
    """Add what there is in the last chunk of a prompt: what the prompt and the steps agree on.

    An axis of tokens of the prompt is one of all tokens so far if it is in a step, and one of the
    present tokens if a step has one there. What stands in only one of the two, such as a mask that
    a kernel needs for one and not the other, is left out.
    """
    for (name, io, kind), prompt in list(leaves.items()):
        if kind not in (PassKind.PROMPT, PassKind.PADDED_PROMPT):
            continue
        padded = kind is PassKind.PADDED_PROMPT
        step = leaves[name, io, PassKind.PADDED_STEP if padded else PassKind.STEP]
        others = {leaf.path: leaf for leaf in step}
        leaves[name, io, PassKind.PADDED_CHUNK if padded else PassKind.CHUNK] = tuple(
            replace(leaf, axes=axes, bypasses=leaf.bypasses or other.bypasses)
            for leaf in prompt
            if (other := others.get(leaf.path)) is not None
            and (axes := _chunk_axes(leaf.axes, other.axes)) is not None
        )


def _chunk_axes(prompt: tuple[Axis, ...], step: tuple[Axis, ...]) -> tuple[Axis, ...] | None:
    """The axes of a tensor in the last chunk of a prompt; None where they can't be told."""
    if len(prompt) != len(step):
        return None
    axes: list[Axis] = []
    for whole, one in zip(prompt, step, strict=True):
        if whole == "seq" and one == "total":
            axes.append("total")
        elif whole == one or (whole == "seq" and one == 1):
            axes.append(whole)
        else:
            return None
    return tuple(axes)


def _is_spread(plain: Mapping[PassKind, Scans], padded: Mapping[PassKind, Scans]) -> bool:
    """Whether the mask of all tokens so far makes many of the one token of a step.

    Mamba multiplies what comes in with it, and `generate` gives it the prompt's mask only.
    """
    one, other = plain[PassKind.STEP], padded[PassKind.PADDED_STEP]
    for name in one.first.events:
        if one.first.calls[name] != 1:
            continue
        axes = {leaf.path: leaf.axes for leaf in one.leaves(name, "output")}
        for leaf in other.leaves(name, "output"):
            if "total" in leaf.axes and "total" not in axes.get(leaf.path, ("total",)):
                return True
    return False


def cache_layer_bytes(layer: Any) -> int:
    """The bytes of keys, values and states that one entry of a transformers cache holds now."""
    states: list[object] = [getattr(layer, "keys", None), getattr(layer, "values", None)]
    states += getattr(layer, "conv_states", {}).values()
    states += getattr(layer, "recurrent_states", {}).values()
    return sum(state.nbytes for state in states if isinstance(state, Tensor))


def _row_bytes(one: Any, other: Any, index: int) -> tuple[int, int]:
    """What a row keeps in one block whatever its length, and what each of its tokens adds."""
    if index >= len(one.layers):
        return 0, 0
    first, second = (
        cache_layer_bytes(cache.layers[index]) / rows
        for cache, rows in zip((one, other), _ROWS, strict=True)
    )
    per_token = (second - first) / (_TOKENS[1] - _TOKENS[0])
    return max(math.ceil(first - per_token * _TOKENS[0]), 0), max(math.ceil(per_token), 0)
