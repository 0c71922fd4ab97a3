"""A model as the researcher sees it: its module tree, its tokenizer, `trace` and `generate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import nn

from glasshive.client.constants import Constants
from glasshive.client.experiment import Experiment, TraceOptions, peer_ids
from glasshive.client.generation import Generation
from glasshive.client.modules import Module
from glasshive.client.prompts import Prompt, Tokens, tokenize
from glasshive.client.provenance import Provenance
from glasshive.client.tracer import Tracer, refuse_options
from glasshive.graph.calls import Calls
from glasshive.graph.outline import Outline
from glasshive.security.keys import PeerId


class Runner(Protocol):
    """What runs a model's experiments: a swarm, reached over some transport."""

    def run(self, experiment: Experiment, options: TraceOptions) -> Provenance:
        """Run it and fill what was saved."""

    def estimate(self, experiment: Experiment, options: TraceOptions) -> Mapping[str, Any]:
        """What it would take."""

    def describe(self) -> str:
        """Who serves what, for people."""


class Model(Module):
    """A language model that others host. Weights never come here.

    `config`, `generation_config` and `tokenizer` are transformers' own; `model_id` is the
    manifest's hash.
    """

    def __init__(
        self,
        *,
        name: str,
        model_id: str,
        config: Any,
        generation_config: Any,
        tokenizer: Any,
        twin: nn.Module,
        outline: Outline,
        runner: Runner,
    ) -> None:
        super().__init__(self, "")
        self.__dict__.update(
            name=name,
            model_id=model_id,
            config=config,
            generation_config=generation_config,
            tokenizer=tokenizer,
            twin=twin,
            outline=outline,
            calls=Calls(twin, outline),
            constants=Constants(),
            _runner=runner,
        )

    # For type checkers: these are written past Module.__setattr__.
    name: str
    model_id: str
    config: Any
    generation_config: Any
    tokenizer: Any
    twin: nn.Module
    outline: Outline
    calls: Calls
    constants: Constants
    _runner: Runner

    @property
    def dtype(self) -> torch.dtype:
        """The number format of the weights on the peers."""
        return next(self.twin.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """The CPU: where saved values are, and where traced ones say they are."""
        return torch.device("cpu")

    def trace(
        self,
        prompt: Prompt | None = None,
        *,
        batching: Literal["shared", "alone"] = "shared",
        pass_rows: int | None = None,
        deadline: float = 300.0,
        retries: int = 4,
        route: Sequence[PeerId] | None = None,
        avoid: frozenset[PeerId] | set[PeerId] = frozenset(),
        across_hardware: bool = False,
        progress: bool | Literal["plain"] | None = None,
        **others: object,
    ) -> Tracer:
        """Record the body of a `with` block, and run it on the swarm when the block ends.

        With a `prompt` the block is about this prompt; without one, `tracer.invoke(prompt)` blocks
        inside it each are about theirs. Invokes of equal length share forward passes of at most
        `pass_rows` rows; `batching="alone"` gives every invoke its own. `deadline` is in seconds;
        `retries` is how often a trace that lost a peer is run again on another route, of the same
        hardware and torch as the first one unless `across_hardware`; `route` are the peers that may
        see it, all but those of `avoid` if it is not given. Raises TraceError for any other option.
        """
        if others:
            refuse_options(others)
        options = _options(
            *(batching, pass_rows, deadline, retries, route, avoid, across_hardware, progress)
        )
        return Tracer(self, prompt, options)

    def generate(
        self,
        prompt: Prompt | None = None,
        *,
        max_new_tokens: int | None = None,
        seed: int | None = None,
        streamer: Any = None,
        batching: Literal["shared", "alone"] = "shared",
        pass_rows: int | None = None,
        deadline: float = 300.0,
        retries: int = 4,
        route: Sequence[PeerId] | None = None,
        avoid: frozenset[PeerId] | set[PeerId] = frozenset(),
        across_hardware: bool = False,
        progress: bool | Literal["plain"] | None = None,
        **choice: object,
    ) -> Generation:
        """Record the body of a `with` block, and generate tokens with its edits when it ends.

        Inside the block `for step in tracer.iter[:]:` is about every step; outside of such a loop
        sites are those of step 0, which is the prompt's forward pass. `max_new_tokens` tokens are
        generated for each row at most; an invoke may say another number. `choice` are the names of
        transformers' GenerationConfig, such as `do_sample`, `temperature`, `top_k`, `top_p`,
        `repetition_penalty`, `eos_token_id`; what is not given is as the model's own
        `generation_config` has it. With `prefill_chunk_size` a prompt is run in chunks of so many
        tokens: a peer computes one while the peer before it computes the next, and a pass takes
        less memory. Step 0 is then the last chunk, with its tokens only, and sums are rounded as in
        transformers' `generate` with that option. Chance follows from `seed`, or from torch's
        default generator. `streamer` gets tokens as they come, as transformers' own streamers do.
        Of `retries` peers that are lost each is replaced by another that serves the same blocks and
        goes on where it was, while the others wait; where there is none, all is run again. The
        other options are those of `trace`. Raises TraceError for any other option, and
        UnsupportedModel if the model can't generate over spans, or not in chunks.
        """
        options = _options(
            *(batching, pass_rows, deadline, retries, route, avoid, across_hardware, progress)
        )
        return Generation(self, prompt, options, max_new_tokens, seed, streamer, choice)

    def tokenize(self, prompt: Prompt) -> Tokens:
        """The token ids of a prompt, checked against the model. Raises BadPrompt."""
        return tokenize(
            prompt,
            self.tokenizer,
            vocabulary_tokens=self.outline.vocabulary_tokens,
            max_tokens=self.outline.max_positions_tokens,
        )

    def run(self, experiment: Experiment, options: TraceOptions) -> Provenance:
        """Run a finished experiment; what it saves is filled in."""
        return self._runner.run(experiment, options)

    def estimate(self, experiment: Experiment, options: TraceOptions) -> Mapping[str, Any]:
        """What a finished experiment would take."""
        return self._runner.estimate(experiment, options)

    def __repr__(self) -> str:
        return f"{self.twin!r}\n{self._runner.describe()}"


def _options(
    batching: Literal["shared", "alone"],
    pass_rows: int | None,
    deadline: float,
    retries: int,
    route: Sequence[PeerId] | None,
    avoid: frozenset[PeerId] | set[PeerId],
    across_hardware: bool,
    progress: bool | Literal["plain"] | None,
) -> TraceOptions:
    return TraceOptions(
        batching=batching,
        deadline_seconds=deadline,
        retries=retries,
        route=None if route is None else peer_ids(route, "route"),
        avoid=peer_ids(avoid, "avoid"),
        across_hardware=across_hardware,
        show_progress=progress,
        **({} if pass_rows is None else {"pass_rows": pass_rows}),
    )
