"""A model's twin: the Hugging Face module tree on the meta device, and the outline read off it.

The twin holds shapes and no weights. Client and peer each build their own from the configuration:
the client records against it, the peer checks against it (docs/adr/0003).

How the outline is found, for any architecture: the twin runs twice, at two pairs of (batch,
sequence) sizes. Hooks number the events; a module that was called once is a pair of sites; an axis
whose size followed the batch or the sequence is typed so, one that stayed is fixed, and a tensor
with any other axis is not offered as a site. Then it runs twice more with a padded batch, whose
mask and position tables have other axes; and with a cache, once something is to be generated.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from glasshive.graph.errors import UnsupportedModel
from glasshive.graph.graph import IO
from glasshive.graph.kernels import from_torch_dtype
from glasshive.graph.outline import GENERATOR, Leaf, ModuleInfo, Outline, PassKind, Steps
from glasshive.graph.steps import scan_steps
from glasshive.graph.twin_scans import ONE_RUN, Scans, accepts


def build_twin(config: Any, dtype: torch.dtype, attention: str = "sdpa") -> nn.Module:
    """The causal language model of `config` on the meta device, in evaluation mode.

    `config` is a transformers configuration. No code from outside transformers is ever used.
    Experts, if there are any, are batched: the grouped kernels run on no meta tensor.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config,
            dtype=dtype,
            attn_implementation=attention,
            experts_implementation="batched_mm",
            trust_remote_code=False,
        )
    model.requires_grad_(False)
    return model.eval()


def blocks_path(model: nn.Module, config: Any) -> tuple[str, int]:
    """The path of the list of decoder blocks, and its length.

    It is the largest `ModuleList` with as many members as the configuration has hidden layers.
    Raises UnsupportedModel if there is none.
    """
    wanted = int(config.get_text_config().num_hidden_layers)
    sizes = {
        path: sum(p.numel() for p in module.parameters())
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == wanted
    }
    if not sizes:
        raise UnsupportedModel(
            f"{type(model).__name__} has no list of {wanted} blocks, so it cannot be split by block"
        )
    return max(sizes, key=lambda path: sizes[path]), wanted


@dataclass(frozen=True, slots=True)
class _Kind:
    """What decides an outline; of two twins of one kind the first is scanned."""

    model: type[nn.Module]
    config_json: str
    dtype: torch.dtype
    attention: str
    twin: nn.Module = field(compare=False)
    config: Any = field(compare=False)


def outline_of(twin: nn.Module, config: Any) -> Outline:
    """What `scan` gives, and found once in this process for all twins of one kind."""
    dtype = next(twin.parameters()).dtype
    attention = str(getattr(twin.config, "_attn_implementation", None))
    return _outline(_Kind(type(twin), config_text(config), dtype, attention, twin, config))


def config_text(config: Any) -> str:
    """What a configuration says, equal for equal ones wherever they were read from."""
    plain = {key: value for key, value in config.to_dict().items() if key != "_name_or_path"}
    return json.dumps(plain, sort_keys=True, default=str)


@functools.lru_cache(maxsize=32)
def _outline(kind: _Kind) -> Outline:
    return scan(kind.twin, kind.config)


def scan(twin: nn.Module, config: Any) -> Outline:
    """The outline of `twin`. Raises UnsupportedModel if its forward pass needs real data."""
    path, n_blocks = blocks_path(twin, config)
    plain = Scans(twin, path, n_blocks, PassKind.PLAIN)
    padded = _padded_scans(twin, path, n_blocks, plain)
    first = plain.first
    modules: dict[str, ModuleInfo] = {}
    for name, module in twin.named_modules():
        calls = first.calls.get(name, 0)
        events = first.events.get(name)
        once = calls == 1 and events is not None
        modules[name] = ModuleInfo(
            path=name,
            kind=type(module).__name__,
            calls=calls,
            input_event=events[0] if once and events else None,
            output_event=events[1] if once and events else None,
            inputs=plain.leaves(name, "input") if once else (),
            outputs=plain.leaves(name, "output") if once else (),
            padded_inputs=padded(name, "input") if once else (),
            padded_outputs=padded(name, "output") if once else (),
            params={
                key: (from_torch_dtype(tensor.dtype), tuple(tensor.shape))
                for source in (module.named_parameters, module.named_buffers)
                for key, tensor in source(recurse=False)
            },
            output_parts=first.parts.get(name, 0),
            output_names=first.names.get(name, ()),
        )
    modules[GENERATOR] = ModuleInfo(
        path=GENERATOR,
        kind="the choice of tokens",
        calls=1,
        input_event=None,
        output_event=len(first.blocks),
        inputs=(),
        outputs=(),
        padded_inputs=(),
        padded_outputs=(),
        params={},
    )
    order = first.order  # all that is kept of these runs
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    return Outline(
        modules=modules,
        blocks_path=path,
        n_blocks=n_blocks,
        block_of_event=(*(-1 if block is None else block for block in first.blocks), n_blocks),
        vocabulary_tokens=int(text.vocab_size),
        max_positions_tokens=int(limit) if isinstance(limit, int) else None,
        steps=_once(lambda: scan_steps(twin, path, n_blocks, order)),
    )


def _once(find: Callable[[], Steps]) -> Callable[[], Steps]:
    """`find`, whose answer or refusal is kept."""

    @functools.cache
    def found() -> Steps | UnsupportedModel:
        try:
            return find()
        except UnsupportedModel as error:
            return error

    def steps() -> Steps:
        with ONE_RUN:  # whoever asks meanwhile waits for the answer
            answer = found()
        if isinstance(answer, UnsupportedModel):
            raise UnsupportedModel(str(answer))
        return answer

    return steps


def _padded_scans(
    twin: nn.Module, path: str, n_blocks: int, plain: Scans
) -> Callable[[str, IO], tuple[Leaf, ...]]:
    """What finds the tensors of a site in a padded batch.

    Where the twin can't be run padded, these are the tensors that have rows without padding, too.
    """
    try:
        if "attention_mask" not in accepts(twin):
            raise UnsupportedModel(f"{type(twin).__name__} takes no attention mask")
        padded = Scans(twin, path, n_blocks, PassKind.PADDED)
        if padded.first.order != plain.first.order:
            raise UnsupportedModel(f"{type(twin).__name__} runs other modules for a padded batch")
    except UnsupportedModel:
        return lambda name, io: tuple(
            leaf for leaf in plain.leaves(name, io) if leaf.batch_axis is not None
        )
    return padded.leaves
