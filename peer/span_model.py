"""Run the blocks `[start, end)` of a Hugging Face decoder inside the model's own `forward`.

There is no table of architectures. The model keeps its class, its module paths and its original
block indices; what this span does not host is replaced by `Skipped`, and hooks do the rest:

- a forward pre-hook on block `start` puts the received hidden states in the place of whatever
  reached it (on the first span nothing is replaced: the model starts from `input_ids`);
- a forward hook on block `end - 1` takes that block's output and stops the model by raising
  `StopForward` (on the last span nothing is stopped: norm and head follow);
- a forward pre-hook on each block lets whoever runs the span in between two of them.

Masks, rotary tables, positions and cache therefore are all Hugging Face's own code. Whether a model
type really splits like this is what `self_test` finds out.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from glasshive.graph.errors import UnsupportedModel
from glasshive.graph.kernels_checks import GuardedOps, ends_process
from glasshive.graph.twin import blocks_path
from glasshive.graph.twin_scans import LAST_LOGITS
from glasshive.peer.errors import BadSpan, ModelTypeRefused, WrongInput
from glasshive.peer.span_cache import SpanCache


class StopForward(BaseException):
    """End the model's forward here. Not an `Exception`: no model code may catch it."""


class _Nothing:
    """What a block elsewhere returns: it indexes to itself, so tensor and tuple both pass."""

    def __getitem__(self, index: object) -> _Nothing:
        return self


class Skipped(nn.Module):
    """Stands where a module is hosted by another peer; has no parameters and computes nothing.

    The plain attributes of the module it replaces stay readable, because some models choose a mask
    by an attribute of the block (`attention_type`, `layer_type`).
    """

    def __init__(self, replaced: nn.Module) -> None:
        super().__init__()
        for name, value in vars(replaced).items():
            if not name.startswith("_") and isinstance(value, (bool, int, float, str)):
                setattr(self, name, value)

    def forward(self, *args: Any, **kwargs: Any) -> _Nothing:
        return _Nothing()


@dataclass(frozen=True, slots=True)
class Layout:
    """Where things are in a model: the path and number of its blocks, the width of its embedding,
    and the paths of embedding and head (`None` where the class does not name one)."""

    blocks_path: str
    n_blocks: int
    embedding_dim: int
    embedding_path: str
    head_path: str | None


def find_layout(model: nn.Module, config: PreTrainedConfig) -> Layout:
    """Where the blocks, the embedding and the head of `model` are.

    Raises `ModelTypeRefused` where there is no list of blocks, or no input embedding.
    """
    try:
        path, n_blocks = blocks_path(model, config)
    except UnsupportedModel as error:
        raise ModelTypeRefused(f"{error}; serve a decoder model") from None
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    embedding_path = _path_of(model, embedding)
    if embedding_path is None or not hasattr(embedding, "embedding_dim"):
        raise ModelTypeRefused(
            f"{type(model).__name__} names no input embedding, so later spans cannot be started; "
            "serve a decoder model"
        )
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    return Layout(
        blocks_path=path,
        n_blocks=n_blocks,
        embedding_dim=int(embedding.embedding_dim),
        embedding_path=embedding_path,
        head_path=_path_of(model, head),
    )


def prune(model: nn.Module, layout: Layout, start: int, end: int) -> None:
    """Replace by `Skipped` what the span `[start, end)` does not host, in place.

    The embedding stays on the first span, and on the last one of a tied model; the head on the
    last. All else outside the blocks (norm, position embeddings, rotary tables) stays: it is small.
    Raises `BadSpan` where the model has no such span.
    """
    check_span(start, end, layout.n_blocks, type(model).__name__)
    blocks = model.get_submodule(layout.blocks_path)
    if not isinstance(blocks, nn.ModuleList):
        raise ModelTypeRefused(
            f"{layout.blocks_path} of {type(model).__name__} is no list of blocks"
        )
    for index in range(layout.n_blocks):
        if not start <= index < end:
            blocks[index] = Skipped(blocks[index])
    first, last = start == 0, end == layout.n_blocks
    tied: dict[str, str] = model.all_tied_weights_keys  # type: ignore[assignment]
    head_is_tied = any(
        {target.rpartition(".")[0], source.rpartition(".")[0]}
        == {layout.head_path, layout.embedding_path}
        for target, source in tied.items()
    )
    if not first and not (last and head_is_tied):
        _replace(model, layout.embedding_path)
    if not last and layout.head_path is not None:
        _replace(model, layout.head_path)
    left = model.state_dict(keep_vars=True).keys()
    model.all_tied_weights_keys = {  # type: ignore[assignment]
        target: source for target, source in tied.items() if target in left and source in left
    }


def check_span(start: int, end: int, n_blocks: int, name: str) -> None:
    """Raise `BadSpan` unless `[start, end)` is a span of a model of `n_blocks` blocks."""
    if end > n_blocks:
        raise BadSpan(
            f"got the span {start}:{end}, but {name} has only {n_blocks} blocks; "
            f"ask for first:end (end excluded) within 0:{n_blocks}"
        )
    if not 0 <= start < end:
        raise BadSpan(
            f"got the span {start}:{end}, which holds no block of {name}; "
            f"ask for a start below its end, within 0:{n_blocks}"
        )


def _path_of(model: nn.Module, wanted: nn.Module | None) -> str | None:
    if wanted is None:
        return None
    return next((path for path, module in model.named_modules() if module is wanted), None)


def _replace(model: nn.Module, path: str) -> None:
    parent_path, _, name = path.rpartition(".")
    parent = model.get_submodule(parent_path)
    setattr(parent, name, Skipped(model.get_submodule(path)))


class SpanModel:
    """The blocks `[start, end)` of a model, loaded and ready to run. For one thread at a time.

    `module` is the Hugging Face model with its own module paths; only parts of it are hosted, see
    `owns`. Parameters never require a gradient and the model is in evaluation mode, but `run` does
    not switch autograd off: a gradient reaches the received hidden states if they require one.

    `guarded` is whether indices must be looked at before torch sees them, because a bad one would
    end the process: so it is on every device but the CPU, unless the argument says otherwise.

    Hooks of others, on `module.get_submodule(path)`:
    - a pre-hook on block `start` sees the received hidden states (the injection comes first);
    - a forward hook on block `end - 1` must be registered with `prepend=True`, so that it runs
      before the capture, which ends the forward. What such a hook returns is what leaves the span;
    - a hook may raise `StopForward` itself; `run` then returns `None`.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        layout: Layout,
        start: int,
        end: int,
        dtype: torch.dtype,
        device: torch.device,
        guarded: bool | None = None,
    ) -> None:
        check_span(start, end, layout.n_blocks, type(module).__name__)
        self.module = module
        self.config: PreTrainedConfig = module.config  # type: ignore[assignment]
        self.start = start
        self.end = end
        self.n_blocks = layout.n_blocks
        self.blocks_path = layout.blocks_path
        self.hidden_size: int = self.config.get_text_config().hidden_size
        self.dtype = dtype
        self.device = device
        self.guarded = ends_process(device) if guarded is None else guarded
        self.is_first = start == 0
        self.is_last = end == layout.n_blocks
        self._layout = layout
        forward: Callable[..., Any] = module.forward
        self._accepts = frozenset(inspect.signature(forward).parameters)
        self._cache_keyword = next(
            (name for name in ("past_key_values", "cache_params") if name in self._accepts), None
        )
        self._received: Tensor | None = None
        self._captured: Tensor | None = None
        self._before_block: Callable[[], None] | None = None
        self._running = False
        self.is_looking: bool = False
        """Whether the pass that runs has the model's indices looked at, by a mode of torch."""
        self._longest_tokens = 0
        self._modules = dict(module.named_modules())
        if not self.is_first:
            self._modules[self.block_path(start)].register_forward_pre_hook(
                self._inject, with_kwargs=True
            )
        if not self.is_last:
            self._modules[self.block_path(end - 1)].register_forward_hook(self._capture)
        for index in range(start, end):
            self._modules[self.block_path(index)].register_forward_pre_hook(self._begin_block)
        self._true_here = self._probe()

    def block_path(self, index: int) -> str:
        """The module path of block `index`, such as `model.layers.3`."""
        return f"{self.blocks_path}.{index}"

    def at(self, path: str) -> nn.Module:
        """The module at `path`. Raises KeyError where there is none."""
        module: nn.Module = self._modules[path]
        return module

    def new_cache(self) -> SpanCache:
        """An empty cache for one batch of sequences, to be passed to every `run` of theirs.

        Raises `ModelTypeRefused` where the model takes no cache of the general kind.
        """
        if self._cache_keyword is None:
            raise ModelTypeRefused(
                f"{self.config.model_type} takes neither past_key_values nor cache_params, so it "
                "cannot generate over spans; run single forward passes"
            )
        return SpanCache(self.config, self.start, self.end)

    def run(
        self,
        *,
        input_ids: Tensor | None,
        hidden: Tensor | None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: SpanCache | None = None,
        last_only: bool = False,
        is_edited: bool = False,
        before_block: Callable[[], None] | None = None,
    ) -> Tensor | None:
        """Run the span once.

        `input_ids` (int64, `[batch, seq]`) on the first span, `hidden` (`[batch, seq, hidden]`) on
        the others. `attention_mask` is 2-D, `[batch, past + seq]`; `position_ids` is `[batch, seq]`
        and is dropped where the model takes none (it then counts from the mask). With neither, the
        result equals the plain `model(input_ids)`. `last_only` asks for the logits of the last
        token alone, as `generate` does, where the model knows how. `is_edited` says that a hook may
        change what the model takes for indices; on a guarded span they are then looked at, wherever
        they are used. `before_block` is called before each block; what it raises ends the pass.

        Returns the hidden states behind block `end - 1`, on the last span the logits
        (`[batch, seq, vocabulary]`), and `None` if a hook ended the forward by `StopForward`.
        Raises `WrongInput`, and what the model raises: on a guarded span ValueError for an index
        that is out of range.
        """
        if self._running:
            raise WrongInput("this span is running already; run one pass at a time")
        arguments, seq_tokens = self._arguments(
            input_ids, hidden, attention_mask, position_ids, cache
        )
        if last_only and LAST_LOGITS in self._accepts:
            arguments[LAST_LOGITS] = 1
        # The model's own positions are good for every length up to one that has run.
        tokens = seq_tokens + (0 if cache is None else cache.length_tokens)
        looks = self.guarded and (is_edited or tokens > self._longest_tokens)
        is_proof = not is_edited and attention_mask is None and position_ids is None
        self._received, self._captured, self._running = hidden, None, True
        self._before_block = before_block
        self.is_looking = looks
        try:
            with GuardedOps() if looks else nullcontext():
                output = self.module(**arguments)
            result: Tensor | None = output.logits
        except StopForward:
            result = self._captured
        finally:
            self._received, self._captured, self._running = None, None, False
            self._before_block = None
            self.is_looking = False
        if cache is not None:
            cache.advance(seq_tokens)
        if is_proof and result is not None:
            self._longest_tokens = max(self._longest_tokens, tokens)
        return result

    def pass_bytes(self, batch: int, seq: int, past: int = 0) -> int:
        """About what a pass of `[batch, seq]` tokens holds between two blocks, at most.

        Keys and values of the hosted blocks, also of the `past` tokens before, hidden states, a
        mask of all pairs, and logits.
        """
        total = past + seq
        held = total * self.hidden_size * 2 * (self.end - self.start)
        width = self.hidden_size * 4 + total
        if self.is_last:
            width += self.config.get_text_config().vocab_size
        return batch * (held + seq * width) * self.dtype.itemsize

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within this context the span's own hooks do nothing, and another pass may run whole.

        For what runs on the side, from inside a hook, while the span runs: calling a hosted module,
        or somebody else's pass between two blocks of this one.
        """
        before = self._received, self._captured, self._running, self._before_block
        self._received, self._captured, self._running, self._before_block = None, None, False, None
        try:
            yield
        finally:
            self._received, self._captured, self._running, self._before_block = before

    def owns(self, path: str, side: Literal["input", "output"] = "output") -> bool:
        """Whether the module at `path` runs here on the values that the whole model would give it.

        True for hosted blocks and all within; for the embedding and what else only sees tokens on
        the first span; for norm and head on the last one; on every span for what does not depend on
        the hidden states (rotary tables, position embeddings). `side` counts only for modules that
        contain the blocks, such as the model itself: their input is the first span's, their output
        the last one's. False for unknown paths.
        """
        module = self._modules.get(path)
        if module is None or isinstance(module, (Skipped, nn.ModuleList)):
            return False
        if path == "" or self.blocks_path.startswith(f"{path}."):
            return self.is_first if side == "input" else self.is_last
        if path.startswith(f"{self.blocks_path}."):
            index = int(path[len(self.blocks_path) + 1 :].split(".", 1)[0])
            return self.start <= index < self.end
        if path == self._layout.embedding_path:
            return self.is_first  # the last span of a tied model holds it too, and never calls it
        before_blocks = self._true_here.get(path)
        return self.is_last if before_blocks is None else before_blocks

    def _arguments(
        self,
        input_ids: Tensor | None,
        hidden: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: SpanCache | None,
    ) -> tuple[dict[str, Any], int]:
        # Without a cache of ours `use_cache` stays what the configuration says, as in a plain call:
        # in some models (CodeGen in bfloat16) it changes the rounding.
        arguments: dict[str, Any] = {}
        if self.is_first:
            if input_ids is None or hidden is not None or input_ids.dim() != 2:
                raise WrongInput(
                    f"the first span ({self.start}:{self.end}) takes input_ids of shape [batch, "
                    f"seq] and no hidden states, got {_shape(input_ids)} and {_shape(hidden)}"
                )
            batch, seq_tokens = input_ids.shape
            arguments["input_ids"] = input_ids
        else:
            if (
                hidden is None
                or input_ids is not None
                or hidden.dim() != 3
                or hidden.shape[2] != self.hidden_size
                or not hidden.is_floating_point()
            ):
                raise WrongInput(
                    f"span {self.start}:{self.end} takes hidden states of shape "
                    f"[batch, seq, {self.hidden_size}] and no input_ids, got {_shape(hidden)} and "
                    f"{_shape(input_ids)}; send what the span before it returned"
                )
            batch, seq_tokens = hidden.shape[:2]
            arguments["inputs_embeds"] = self._dummy(batch, seq_tokens)
        if batch < 1 or seq_tokens < 1:
            raise WrongInput(f"got {batch} rows of {seq_tokens} tokens; send at least one of each")
        past_tokens = 0 if cache is None else cache.length_tokens
        if attention_mask is not None:
            if "attention_mask" not in self._accepts:
                raise WrongInput(
                    f"{self.config.model_type} takes no attention mask; send prompts of one length"
                )
            if attention_mask.shape != (batch, past_tokens + seq_tokens):
                raise WrongInput(
                    f"the attention mask has shape {_shape(attention_mask)}, wanted "
                    f"[{batch}, {past_tokens + seq_tokens}] (past and new tokens)"
                )
            arguments["attention_mask"] = attention_mask
        if position_ids is not None:
            if position_ids.shape != (batch, seq_tokens):
                raise WrongInput(
                    f"position_ids have shape {_shape(position_ids)}, "
                    f"wanted [{batch}, {seq_tokens}]"
                )
            if "position_ids" in self._accepts:
                arguments["position_ids"] = position_ids
        if cache is not None:
            if self._cache_keyword is None or len(cache.hosted) != self.end - self.start:
                raise WrongInput("this cache is of another span; use the one of new_cache()")
            arguments |= {self._cache_keyword: cache, "use_cache": True}
        return arguments, seq_tokens

    def _dummy(self, batch: int, seq_tokens: int) -> Tensor:
        # Only its shape, dtype and device count: block `start` never sees what is made of it.
        return torch.zeros(
            batch, seq_tokens, self._layout.embedding_dim, dtype=self.dtype, device=self.device
        )

    def _inject(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not self._running:
            return None
        if args:
            return (self._received, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self._received}

    def _begin_block(self, block: nn.Module, args: Any) -> None:
        if self._before_block is not None:
            self._before_block()

    def _capture(self, block: nn.Module, args: Any, output: Any) -> None:
        if not self._running:
            return
        self._captured = output[0] if isinstance(output, tuple) else output
        raise StopForward

    def _probe(self) -> dict[str, bool]:
        """Which modules run before the blocks, and whether what they give here is the truth.

        On later spans the model starts from a dummy embedding. What changes with the dummy is not
        the truth; what doesn't (rotary tables, positions) is. Two tiny passes tell them apart.
        """
        tokens = 2
        if self.is_first:
            ids = torch.zeros(1, tokens, dtype=torch.int64, device=self.device)
            return dict.fromkeys(self._before_blocks({"input_ids": ids}), True)
        zeros = self._dummy(1, tokens)
        noise = torch.randn(zeros.shape, generator=torch.Generator().manual_seed(0)).to(zeros)
        seen = [self._before_blocks({"inputs_embeds": dummy}) for dummy in (zeros, noise)]
        return {
            path: len(given) == len(seen[1].get(path, ()))
            and all(torch.equal(one, two) for one, two in zip(given, seen[1][path], strict=True))
            for path, given in seen[0].items()
        }

    def _before_blocks(self, arguments: dict[str, Any]) -> dict[str, list[Tensor]]:
        """The tensors that every module outside the blocks returns before block `start` runs."""
        given: dict[str, list[Tensor]] = {}

        def stop(block: nn.Module, args: Any) -> None:
            raise StopForward

        def keep(path: str) -> Callable[[nn.Module, Any, Any], None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                given[path] = list(_tensors(output))

            return hook

        handles = [
            self._modules[self.block_path(self.start)].register_forward_pre_hook(stop, prepend=True)
        ]
        for path, module in self._modules.items():
            if not path.startswith(f"{self.blocks_path}."):
                handles.append(module.register_forward_hook(keep(path)))
        try:
            with torch.no_grad():
                self.module(**arguments, use_cache=False)
        except StopForward:
            return given
        finally:
            for handle in handles:
                handle.remove()
        raise ModelTypeRefused(
            f"{self.config.model_type} never called block {self.start}; it cannot be cut into spans"
        )


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value.detach().clone()
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for item in value:
            yield from _tensors(item)


def _shape(tensor: Tensor | None) -> str:
    return "none" if tensor is None else f"{list(tensor.shape)}"
