"""What a generation gives on one machine: transformers' own `generate`, with torch hooks by step.

This is an oracle: nothing of glasshive is imported.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

Edit = Callable[[int, Tensor], Tensor | None]  # of the step and the module's (first) output


def generate_hooked(
    model: Any,
    input_ids: Tensor,
    new_tokens: int,
    *,
    reads: Sequence[str] = (),
    edits: Mapping[str, Edit] | None = None,
    attention_mask: Tensor | None = None,
    **choice: Any,
) -> tuple[Tensor, dict[str, list[Tensor]]]:
    """All tokens, int64 `[batch, prompt + new]`, and what each module of `reads` gave at each step.

    An edit may change the output in place, or give another. Reads see it.
    """
    found: dict[str, list[Tensor]] = {path: [] for path in reads}

    def hook(path: str) -> Callable[[nn.Module, Any, Any], Any]:
        step = -1

        def run(module: nn.Module, args: Any, output: Any) -> Any:
            nonlocal step
            step += 1
            first = output[0] if isinstance(output, tuple) else output
            edited = None if edits is None or path not in edits else edits[path](step, first)
            now = first if edited is None else edited
            if path in found:
                found[path].append(now.detach().clone())
            if edited is None:
                return None
            return (edited, *output[1:]) if isinstance(output, tuple) else edited

        return run

    with ExitStack() as hooks, torch.no_grad():
        for path in dict.fromkeys((*reads, *(edits or {}))):
            handle = model.get_submodule(path).register_forward_hook(hook(path))
            hooks.callback(handle.remove)
        ids: Tensor = model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids) if attention_mask is None else attention_mask,
            max_new_tokens=new_tokens,
            **{"do_sample": False, **choice},
        )
    return ids, found


@torch.no_grad()
def drawn(plain: Any, rows: Tensor, new: int, processors: Any, seed: int) -> Tensor:
    """Each row and step with a generator of its own, over whole passes without a cache."""
    ids = rows
    for step in range(new):
        scores = processors(ids, plain(ids).logits[:, -1].float())
        chosen = []
        for row, chances in enumerate(torch.softmax(scores, -1)):
            told = hashlib.sha256(f"{seed} 0 {row} {step}".encode()).digest()[:8]
            generator = torch.Generator().manual_seed(int.from_bytes(told, "big") >> 1)
            chosen.append(torch.multinomial(chances, 1, generator=generator))
        ids = torch.cat([ids, torch.stack(chosen)], 1)
    return ids
