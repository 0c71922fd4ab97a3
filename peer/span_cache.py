"""The keys, values and states that a span keeps between the steps of a generation."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from glasshive.graph.steps import cache_layer_bytes


class _Counter(DynamicLayer):  # type: ignore[no-untyped-call]
    """An attention layer's length without its keys: for blocks that another peer hosts."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.cumulative_length = 0

    def get_seq_length(self) -> int:
        return self.cumulative_length


class SpanCache(DynamicCache):
    """The keys, values and states of the blocks `[start, end)`, for one sequence batch.

    Hugging Face reads lengths and mask sizes from entry 0 (or from the first of a kind), which is
    empty on later spans. Therefore every entry that is not hosted here is the first hosted one of
    the same kind; where the span has none of that kind, an entry that only counts stands there.
    Cutting and reordering touch the hosted entries only, each once.
    """

    def __init__(self, config: PreTrainedConfig, start: int, end: int) -> None:
        super().__init__(config=config)
        self.hosted: list[Any] = self.layers[start:end]
        self._counters: list[Any] = []
        of_kind: dict[tuple[object, ...], Any] = {}
        for layer in self.hosted:
            of_kind.setdefault(_kind(layer), layer)
        for index, layer in enumerate(self.layers):
            if not start <= index < end:
                kind = _kind(layer)
                if kind not in of_kind:
                    of_kind[kind] = self._counter_for(layer)
                self.layers[index] = of_kind[kind]
        self.length_tokens = 0

    def _counter_for(self, layer: Any) -> Any:
        if not isinstance(layer, CacheLayerMixin):
            return layer  # holds no length: nobody asks it for one
        counter = layer if isinstance(layer, DynamicSlidingWindowLayer) else _Counter()
        self._counters.append(counter)
        return counter

    def advance(self, tokens: int) -> None:
        """Count `tokens` that went through the span in one pass."""
        self.length_tokens += tokens
        for counter in self._counters:
            counter.cumulative_length += tokens

    def held_bytes(self) -> int:
        """The bytes that the hosted entries hold now."""
        return sum(map(cache_layer_bytes, self.hosted))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the rows `beam_idx` (int64, 1-D), in that order."""
        for layer in self.hosted:
            layer.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        for layer in self.hosted:
            layer.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices` (int64, 1-D)."""
        for layer in self.hosted:
            layer.batch_select_indices(indices)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens (Hugging Face counts them negatively)."""
        for layer in self.hosted:
            layer.crop(tokens_to_remove)
        self.advance(-abs(tokens_to_remove))

    def reset(self) -> None:
        """Forget every token."""
        for layer in self.hosted:
            layer.reset()
        self.advance(-self.length_tokens)


def _kind(layer: Any) -> tuple[object, ...]:
    return type(layer), getattr(layer, "sliding_window", None)
