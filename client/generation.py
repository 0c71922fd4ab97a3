"""`with model.generate(prompt, max_new_tokens=20) as tracer:`: a trace of several forward passes.

Step 0 is the forward pass of the prompt, and each later one that of the token before it, so that n
new tokens take n steps. The body says what happens at each: `for step in tracer.iter[:]:` is about
every step of the current invoke, and Python's own `if` about some of them.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from glasshive.client.cancellation import Cancellation
from glasshive.client.errors import TokensDiffer, TraceCancelled, TraceError
from glasshive.client.experiment import Chosen, Experiment, TraceOptions, finish
from glasshive.client.functional import DeadCell, intern_layout
from glasshive.client.prompts import Prompt, Tokens
from glasshive.client.provenance import Provenance
from glasshive.client.saved import fill_with, saved
from glasshive.client.source_lines import at_line, here, warn_here
from glasshive.client.status_text import is_terminal
from glasshive.client.token_choice import choice_of
from glasshive.client.traced import TracedTensor
from glasshive.client.tracer import Tracer
from glasshive.graph.errors import GlasshiveError, StepNeverRan, UnsupportedModel
from glasshive.graph.order import InvokeShape, before_last_chunk
from glasshive.graph.outline import GENERATOR
from glasshive.graph.plan_codec import MAX_PASSES

if TYPE_CHECKING:
    from glasshive.client.model import Model


_MOST_ROWS_SAID = 8
_TOKENS_OF = ("that of the prompt", "which has one token, the last: the prompt's are at step 0")


class Steps:
    """Steps to go through: `iter[:]`, `iter[a:b]`, `iter[i]` or `iter[[i, j]]`, in a `for` loop.

    Inside the loop sites are those of the step that it gives. Negative numbers count from the end.
    """

    def __init__(self, tracer: Generation, wanted: int | slice | Sequence[int] = slice(None)):
        self._tracer = tracer
        self._wanted = wanted

    def __getitem__(self, wanted: int | slice | Sequence[int]) -> Steps:
        return Steps(self._tracer, wanted)

    def __iter__(self) -> Iterator[int]:
        chosen, n_steps, wanted = self._chosen(), self._tracer.n_steps, self._wanted
        if not chosen and isinstance(wanted, slice) and (wanted.start or 0) >= n_steps:
            warn_here(
                f"tracer.iter[{wanted.start}:...] begins behind the {n_steps} steps of this "
                "invoke, so this loop reads and edits nothing"
            )
        for step in chosen:
            with self._tracer.at(step):
                yield step

    def __len__(self) -> int:
        return len(self._chosen())

    def _chosen(self) -> list[int]:
        n_steps = self._tracer.n_steps
        wanted = self._wanted
        if isinstance(wanted, slice):
            return list(range(n_steps))[wanted]
        several: Sequence[Any] = wanted if isinstance(wanted, list | tuple | range) else [wanted]
        for one in several:
            if type(one) is not int:
                raise TraceError(
                    f"tracer.iter[{wanted!r:.40}]: a step's number, a list of them or a slice is "
                    "wanted, as in tracer.iter[2], tracer.iter[[0, 3]] or tracer.iter[1:]",
                    line=here(),
                )
            if not -n_steps <= one < n_steps:
                raise _no_step(one, n_steps)
        return [one % n_steps for one in several]

    def __enter__(self) -> NoReturn:
        raise TraceError(
            "`with tracer.iter[...]` would run its body once, for all steps; here the body runs "
            "for each of them: write `for step in tracer.iter[...]:`",
            line=here(),
        )

    def __exit__(self, *error: object) -> None:
        """There is no way in."""


class Generation(Tracer):
    """One generation: what `model.generate(...)` gives.

    After the block, `output_ids` has all tokens, and what was saved at each step holds its tensor.
    After an error, a cancel or Ctrl-C in its run, that holds for what had come by then.
    """

    KIND = "a generation"

    def __init__(
        self,
        model: Model,
        prompt: Prompt | None,
        options: TraceOptions,
        max_new_tokens: int | None,
        seed: int | None,
        streamer: Any,
        choice: Mapping[str, object],
    ) -> None:
        if streamer is not None and options.show_progress is None and is_terminal(sys.stdout):
            # It writes there, a few words at a time, which lines that move would break.
            options = replace(options, show_progress="plain")
        super().__init__(model, prompt, options)
        steps = model.outline.steps()  # raises UnsupportedModel
        self._choice = choice_of(
            model.generation_config, choice, seed, model.outline.vocabulary_tokens
        )
        if self._choice.chunk_tokens and not steps.in_chunks:
            raise UnsupportedModel(
                f"{at_line()}prefill_chunk_size={self._choice.chunk_tokens}: transformers' "
                "generate can't run a prompt of such a model in chunks; leave it out"
                + ("" if "prefill_chunk_size" in choice else ", with prefill_chunk_size=None")
            )
        self._max_new_tokens = max_new_tokens
        if streamer is not None and not (hasattr(streamer, "put") and hasattr(streamer, "end")):
            raise TraceError(
                f"streamer={streamer!r:.40}; what has put(tokens) and end() is wanted, such as "
                "transformers.TextStreamer(model.tokenizer)",
                line=here(),
            )
        self._asked_tokens: int | None = None
        self._streamer = streamer
        self._streaming: _Streaming | None = None
        self._step = 0
        self._said_step = False  # whether the body has said of which step it speaks
        self._advanced: dict[str, int] = {}
        self._results: dict[int, TracedTensor] = {}
        self._chosen: Chosen | None = None

    # The body -------------------------------------------------------------------------------

    def invoke(self, prompt: Prompt | None = None, *, max_new_tokens: int | None = None) -> Any:
        """One more prompt, or batch of prompts, with its own number of new tokens if it says one.

        As `Tracer.invoke`.
        """
        self._asked_tokens = max_new_tokens
        return super().invoke(prompt)

    @property
    def n_steps(self) -> int:
        """The number of steps of the current invoke, one for each new token."""
        return self.sites.invokes[self._here()].n_steps

    @property
    def iter(self) -> Steps:
        """The steps of the current invoke, to be indexed: `for step in tracer.iter[1:]:`."""
        self._require_open("tracer.iter")
        return Steps(self)

    def all(self) -> Steps:
        """Every step of the current invoke: `for step in tracer.all():`."""
        return self.iter[:]

    def next(self, steps: int = 1) -> Generation:
        """From now on sites are those of a later step, until the loop or the invoke ends."""
        self._require_open("tracer.next()")
        self._require_step(self._step + steps)
        self._said_step = True
        self._step += steps
        self._advanced.clear()
        return self

    def at(self, step: int) -> _AtStep:
        """A context in which sites are those of that step."""
        return _AtStep(self, step)

    def step_of(self, module: str) -> int:
        """The step at which sites of a module are now. Raises TraceError if there is none such."""
        if module == GENERATOR and not self._said_step:
            _warn_of_one_token()
        step = self._step + self._advanced.get(module, 0)
        self._require_step(step)
        self._tell_step(step)
        return step

    def advance(self, module: str, steps: int) -> None:
        """Go on to a later step for one module."""
        self._said_step = True
        self._advanced[module] = self._advanced.get(module, 0) + steps

    def _tell_step(self, step: int | None) -> None:
        """Have errors of what the body computes say at which step it is; None: it can't be told."""
        self.sites.recorder.at_step = (
            "" if step is None else f"; at step {step} of the generation, {_TOKENS_OF[step > 0]}"
        )

    def _require_step(self, step: int) -> None:
        if not 0 <= step < self.n_steps:
            raise _no_step(step, self.n_steps)

    def _shape(self, tokens: Tokens) -> InvokeShape:
        asked: Any = self._max_new_tokens if self._asked_tokens is None else self._asked_tokens
        self._asked_tokens = None
        if asked is None:
            asked = self._choice.new_tokens(tokens.input_ids.shape[1])
        self._step = 0
        self._tell_step(None)
        self._advanced.clear()
        if type(asked) is not int or not 1 <= asked <= MAX_PASSES:
            raise TraceError(
                f"max_new_tokens={asked!r:.40}, where the number of new tokens is wanted, from 1 "
                f"to {MAX_PASSES}"
                + (
                    "; the model's own generation_config has no max_new_tokens or max_length"
                    if asked is None
                    else ""
                ),
                line=here(),
            )
        longest, seq = self.model.outline.max_positions_tokens, tokens.input_ids.shape[1]
        if longest is not None and seq + asked > longest:
            raise TraceError(
                f"{seq} tokens and {asked} new ones; the model takes at most {longest} in all; "
                "shorten the prompt, or ask for fewer with max_new_tokens=",
                line=here(),
            )
        chunk = self._choice.chunk_tokens
        passes = asked + (before_last_chunk(seq, chunk) // chunk if chunk else 0)
        if passes > MAX_PASSES:
            raise TraceError(
                f"{asked} new tokens behind a prompt of {seq} in chunks of {chunk} take {passes} "
                f"passes, and a generation has at most {MAX_PASSES}; take a larger "
                "prefill_chunk_size=",
                line=here(),
            )
        return replace(tokens.shape, new_tokens=asked, chunk_tokens=chunk)

    @property
    def result(self) -> Any:
        """In the block, all tokens of the current invoke, int64 `[batch, prompt + new]`, to save.

        What is saved of it holds the tokens up to the last that was made, as `output_ids`. After
        the block, which peers ran what (a Provenance).
        """
        recorder = self.sites.recorder
        if not recorder.is_open:
            return super().result
        invoke = self._here()
        if invoke not in self._results:
            batch, seq = self.tokens[invoke].input_ids.shape
            layout = intern_layout(torch.int64, (batch, seq + self.n_steps))
            reason = (
                "in the block tracer.result is all tokens, as in NNsight, which are there after "
                "it, when it is known how many: save it; the token of one step is "
                "model.generator.output; which peers ran what, tracer.result says after the block"
            )
            self._results[invoke] = TracedTensor.wrap(DeadCell(recorder, layout, reason).root)
        return self._results[invoke]

    def _here(self) -> int:
        if self._invoke is None:
            raise TraceError(
                "no prompt: a site belongs to an invoke; write `with model.generate(prompt):`, or "
                "`with tracer.invoke(prompt):` inside the block, and loops over steps inside that",
                line=here(),
            )
        return super()._here()

    # The end --------------------------------------------------------------------------------

    def _finish(self) -> Experiment:
        if not self.tokens:
            raise TraceError(
                "a generation without a prompt; write `with model.generate(prompt):`, or "
                "`with tracer.invoke(prompt):` inside the block",
                line=here(),
            )
        if self._streamer is not None:
            self._streaming = _Streaming(self._streamer, self.tokens, self._cancellation)
        return finish(
            self.sites,
            self.tokens,
            self.model.calls,
            self.options,
            self._cancellation,
            sampling=self._choice.sampling,
            tell=self._streaming,
            left_out=list(self._results.values()),
        )

    def _run(self, experiment: Experiment) -> Provenance:
        try:
            try:
                result = super()._run(experiment)
            finally:  # what had come is there, however it ends
                self._chosen = experiment.chosen
        except BaseException as error:
            self._keep_done(experiment, error)
            raise
        self._fill_results()
        if self._streamer is not None:
            with _blaming_streamer(at_line()):
                self._streamer.end()
        return result

    def _keep_done(self, experiment: Experiment, error: BaseException) -> None:
        """What is saved of the steps that were done has its value, unless that may be wrong.

        `error`, with which the generation ended, says how many there are.
        """
        made = sum(self._made(invoke).shape[1] for invoke in self._invokes())
        wanted = sum(one.n_steps for one in self.sites.invokes)
        said = f"tracer.new_tokens has {made} of {wanted} steps"
        if isinstance(error, TraceCancelled):
            error.args = (f"{error}; {said}",)
        try:
            if self._streaming is not None and self._chosen is not None:
                self._streaming.check(self._chosen)
            experiment.fill_done(type(error).__name__)
        except (StepNeverRan, TokensDiffer) as wrong:
            if type(wrong) is not type(error):
                error.add_note(f"nothing that was saved is there: {wrong}")
            return
        if made:
            self._fill_results()
            if isinstance(error, GlasshiveError) and not isinstance(error, TraceCancelled):
                error.add_note(f"{said}, and what had come of what was saved at them is there")

    def _fill_results(self) -> None:
        for invoke, tensor in self._results.items():
            if self.sites.recorder.was_saved(tensor):
                fill_with(tensor, self._ids(invoke))

    @property
    def output_ids(self) -> Any:
        """All tokens, int64 `[batch, prompt + new]`, as transformers' `generate` gives them.

        For a generation with invokes a list, one for each. Raises TraceError before the end.
        """
        ids = [saved(self._ids(invoke)) for invoke in self._invokes()]
        return ids if self._prompt is None else ids[0]

    @property
    def new_tokens(self) -> Any:
        """The tokens that were made, int64 `[batch, new]`; a list for a generation with invokes.

        Of one that ended with an error, or by Ctrl-C, those that had come, as in `output_ids` and
        `text`; and of what was saved at these steps what had come.
        """
        ids = [saved(self._made(invoke)) for invoke in self._invokes()]
        return ids if self._prompt is None else ids[0]

    @property
    def text(self) -> list[str]:
        """The new tokens as text, one for each row of every invoke, special tokens left out."""
        rows = [row for invoke in self._invokes() for row in self._made(invoke).tolist()]
        tokenizer = self.model.tokenizer
        if tokenizer is None:
            raise TraceError("this model has no tokenizer here; take output_ids", line=here())
        texts: list[str] = tokenizer.batch_decode(rows, skip_special_tokens=True)
        return texts

    @property
    def ended_at(self) -> list[Any]:
        """The step at which each row came to a stop token; None for a row that came to none.

        For a generation with invokes a list of such lists, one for each. Raises TraceError before
        the end.
        """
        ends = [self._ends(invoke) for invoke in self._invokes()]
        return ends if self._prompt is None else ends[0]

    def __repr__(self) -> str:
        if self._chosen is None:
            return f"<{self.title}: it runs when its `with` block ends>"
        return f"<{self.title}: {'; '.join(map(self._said, self._invokes()))}>"

    def _said(self, invoke: int) -> str:
        """How many tokens an invoke has, and at which step it or its rows ended."""
        made, n_steps = self._made(invoke).shape[1], self.sites.invokes[invoke].n_steps
        ends = self._ends(invoke)
        if made < n_steps and None not in ends:
            said = f"ended at step {made - 1} of {n_steps} with a stop token"
        else:
            said = f"{made}{f' of {n_steps}' if made < n_steps else ''} new tokens"
        if len(set(ends)) > 1:
            listed = ["-" if end is None else str(end) for end in ends[:_MOST_ROWS_SAID]]
            more = ", ..." if len(ends) > _MOST_ROWS_SAID else ""
            said += f" (its rows with one at steps {', '.join(listed)}{more})"
        return said

    def _ends(self, invoke: int) -> list[int | None]:
        stops = torch.tensor(self._choice.sampling.eos_token_id, dtype=torch.int64)
        is_stop = torch.isin(self._made(invoke), stops)
        return [int(row.nonzero()[0]) if bool(row.any()) else None for row in is_stop]

    def _invokes(self) -> range:
        """All invokes, once their tokens are there. Raises TraceError before."""
        if self._chosen is None:
            raise TraceError(
                "the tokens of a generation are there once its block has ended; where there is "
                "nothing to read or edit, write `with model.generate(prompt, max_new_tokens=...) "
                "as tracer: pass`",
                line=here(),
            )
        return range(len(self.tokens))

    def _made(self, invoke: int) -> Tensor:
        chosen = self._chosen
        if chosen is None or not chosen.steps(invoke):  # cancelled before the first came
            return torch.empty((len(self.tokens[invoke].input_ids), 0), dtype=torch.int64)
        return chosen.tokens(invoke)

    def _ids(self, invoke: int) -> Tensor:
        return torch.cat([self.tokens[invoke].input_ids, self._made(invoke)], 1)


def _warn_of_one_token() -> None:
    text = (
        "model.generator.output outside of a loop over steps is the token of step 0 alone; all "
        "tokens are tracer.result.save(), or tracer.output_ids after the block"
    )
    warn_here(text)


def _no_step(step: int, n_steps: int) -> TraceError:
    return TraceError(
        f"step {step} of a generation of {n_steps} new tokens, whose steps are 0 to {n_steps - 1}; "
        "ask for more with max_new_tokens=",
        line=here(),
    )


class _AtStep:
    """Inside it, sites of a generation are those of one step."""

    def __init__(self, tracer: Generation, step: int) -> None:
        self._tracer = tracer
        self._step = step
        self._before = 0

    def __enter__(self) -> None:
        self._before = self._tracer._step
        self._tracer._said_step = True
        self._tracer._step = self._step
        self._tracer._tell_step(self._step)
        self._tracer._advanced.clear()

    def __exit__(self, *error: object) -> None:
        self._tracer._step = self._before
        self._tracer._tell_step(None)
        self._tracer._advanced.clear()


@contextlib.contextmanager
def _blaming_streamer(at: str) -> Iterator[None]:
    """An error inside it has a note that it is the streamer's; `at` is the line, as `at_line`."""
    try:
        yield
    except Exception as error:
        error.add_note(f"{at}the streamer of this generation raised it")
        raise


class _Streaming:
    """Gives tokens to a streamer of transformers' kind as they come: prompts first, then steps."""

    def __init__(self, streamer: Any, tokens: Sequence[Tokens], cancellation: Cancellation) -> None:
        if len(tokens) != 1:
            raise TraceError(
                f"streamer= in a generation of {len(tokens)} invokes; a streamer takes one",
                line=here(),
            )
        self._streamer = streamer
        self._cancellation = cancellation
        self._at = at_line()
        self._prompt = tokens[0].input_ids
        self._has_begun = False
        self._told: list[Tensor] = []

    def __call__(self, chosen: Chosen) -> None:
        """Tell what is new. A generation that is run again makes the same tokens once more.

        Raises TokensDiffer if it doesn't, and TraceCancelled, also where the streamer has just
        cancelled it.
        """
        if not self._has_begun:
            with _blaming_streamer(self._at):
                self._streamer.put(self._prompt)
            self._has_begun = True
        self.check(chosen)
        for tokens in chosen.steps(0)[len(self._told) :]:
            self._cancellation.check()
            with _blaming_streamer(self._at):
                self._streamer.put(tokens)
            self._told.append(tokens)

    def check(self, chosen: Chosen) -> None:
        """Raise TokensDiffer if others have come than were told."""
        for step, (told, came) in enumerate(zip(self._told, chosen.steps(0), strict=False)):
            if told is not came and not torch.equal(told, came):
                raise TokensDiffer(
                    f"step {step} gave {came.tolist()!s:.80} when the generation was run again, "
                    f"and the streamer had been given {told.tolist()!s:.80}; on other hardware, or "
                    "at a peer that computes wrongly, other tokens may be chosen: generate anew, "
                    "with across_hardware=False, which runs it again on the same hardware only"
                )
