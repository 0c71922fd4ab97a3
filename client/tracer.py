"""`with model.trace(prompt) as tracer:`: the body is recorded, and run when the block ends."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import fields, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, Self

from glasshive.client.cancellation import Cancellation
from glasshive.client.errors import TraceError
from glasshive.client.experiment import Experiment, TraceOptions, finish
from glasshive.client.profile import Profile
from glasshive.client.prompts import Prompt, Tokens
from glasshive.client.provenance import Provenance
from glasshive.client.recorder import recording
from glasshive.client.saved import SavedTensor, saved
from glasshive.client.sites import Sites
from glasshive.client.source_lines import at_line, has_users_code, here
from glasshive.client.token_choice import HABITS
from glasshive.client.traced import TracedTensor
from glasshive.graph.errors import GlasshiveError, NotYet
from glasshive.graph.graph import IO, Site
from glasshive.graph.order import InvokeShape
from glasshive.graph.outline import GENERATOR, Leaf

if TYPE_CHECKING:
    from glasshive.client.model import Model

log = logging.getLogger(__name__)

_current: ContextVar[Tracer | None] = ContextVar("glasshive_tracer", default=None)


class _Stop(BaseException):
    """Ends the body of a trace. Not an `Exception`: no user code may catch it."""


# What NNsight's `trace` takes besides, and why it is not needed here.
_HABITS = {
    **HABITS,
    "max_new_tokens": "a trace is one forward pass; model.generate(...) makes new tokens",
}


def refuse_options(others: Mapping[str, object]) -> NoReturn:
    """Raise TraceError for options that `Model.trace` does not have."""
    name = next(iter(others))
    known = [option.name for option in fields(TraceOptions)]
    names = ", ".join(_OPTION_NAMES.get(one, one) for one in known)
    why = _HABITS.get(name)
    raise TraceError(
        f"trace({name}={others[name]!r:.40}) is no option here: "
        + (f"{why}; leave it out" if why else f"there are {names}"),
        line=here(),
    )


# What NNsight's tracers have besides: when it comes, and what to write until then.
_LATER = {
    "log": "log lines come with gradients and cond; save the value, and print it after the block",
    "cond": "conditions come with gradients; torch.where(condition, a, b) chooses between values",
    "cache": "it comes later; save what you need, as in "
    "[layer.output.save() for layer in model.model.layers]",
    "apply": "no function travels to a peer; call yours on the traced values themselves, as in "
    "f(layer.output)",
}


def _pass_barrier() -> None:
    pass


_OPTION_NAMES = {"deadline_seconds": "deadline", "show_progress": "progress"}


def current_tracer() -> Tracer | None:
    """The tracer whose body runs now."""
    return _current.get()


class Tracer:
    """One trace: what `model.trace(...)` gives.

    After the block, what was saved holds its tensor, and `result` says where it came from.
    """

    KIND: ClassVar = "a trace"

    def __init__(self, model: Model, prompt: Prompt | None, options: TraceOptions) -> None:
        self.model = model
        self.options = options
        self.title = f"{self.KIND} of {model.name}"
        self._cancellation = Cancellation(self.title)
        self.sites = Sites(model.outline, model.constants, self.title)
        self.tokens: list[Tokens] = []
        self.notes: set[str] = set()  # what the body was given that is None, for an error's text
        self._result: Provenance | None = None
        self._prompt = prompt
        self._invoke: int | None = None
        self._was_entered = False
        self._stack = contextlib.ExitStack()

    # The body -------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        if self._was_entered:
            raise TraceError(
                "this tracer has had its block; write `with model.trace(...)` again", line=here()
            )
        self._was_entered = True
        self._stack.enter_context(recording(self.sites.recorder))
        token = _current.set(self)
        self._stack.callback(_current.reset, token)
        try:
            if self._prompt is not None:
                self._invoke = self._add_invoke(self._prompt)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        handled = sys.exception()
        try:
            return self._end(error)
        except (KeyboardInterrupt, GlasshiveError) as failure:
            # Where in here it was raised, and after what, says nothing to the user, whose own line
            # does: its text has what they need of it. Nor does where they interrupted it.
            is_interrupt = isinstance(failure, KeyboardInterrupt)
            if log.isEnabledFor(logging.DEBUG) or (
                not is_interrupt and has_users_code(failure, handled)
            ):
                raise
            failure.__cause__ = failure.__traceback__ = None
            failure.__context__ = None if isinstance(handled, _Stop) else handled
            failure.__suppress_context__ = failure.__context__ is None
            raise failure

    def _end(self, error: BaseException | None) -> bool:
        """Run what the body recorded, if that ended well; whether the block ends well then."""
        experiment: Experiment | None = None
        recorder = self.sites.recorder
        if error is not None and not isinstance(error, _Stop):
            recorder.ended_with = type(error).__name__
        if isinstance(error, AttributeError | TypeError) and "NoneType" in str(error):
            for note in sorted(self.notes):
                error.add_note(note)
        if type(error) is TypeError and "numpy" in str(error).lower():
            # Torch and NumPy refuse an array beside a traced value before anything here is asked.
            error.add_note("torch.from_numpy(array) makes a tensor of a NumPy array")
        try:
            if error is None or isinstance(error, _Stop):
                with recorder.keeping_error():
                    self._cancellation.check()
                    experiment = self._finish()
        finally:
            self._stack.close()
            if experiment is None:
                self._cancellation.end()
        if experiment is None:
            return False  # nothing is sent
        self._result = self._run(experiment)
        return True

    def _run(self, experiment: Experiment) -> Provenance:
        with self.sites.recorder.keeping_error(), self._cancellation.running():
            return self.model.run(experiment, self.options)

    @contextlib.contextmanager
    def invoke(self, prompt: Prompt | None = None) -> Iterator[Tracer]:
        """One more prompt of the trace, or batch of prompts; its sites are read and edited inside.

        Values of one invoke may be used in another, in any order; `tracer.stop()` ends the body.
        Raises TraceError without a prompt: every invoke has rows of its own.
        """
        self._require_open("tracer.invoke(...)")
        if prompt is None:
            raise TraceError(
                "tracer.invoke() without a prompt, which in NNsight is about the rows of all "
                "invokes; here each invoke has its own: give one invoke all prompts as a list, or "
                "read in every invoke and join the values with torch.cat(...) in the last",
                line=here(),
            )
        if self._prompt is not None:
            raise TraceError(
                "tracer.invoke(...) in a trace that was given a prompt itself; write "
                "`with model.trace() as tracer:` and give every prompt to an invoke",
                line=here(),
            )
        if self._invoke is not None:
            raise TraceError(
                "an invoke inside another; end the `with` block of the first one before: its "
                "values can be used in the next",
                line=here(),
            )
        self._invoke = self._add_invoke(prompt)
        try:
            yield self
        finally:
            self._invoke = None

    def stop(self) -> None:
        """End the body here. What was recorded is run; the blocks after the last read are not."""
        self._require_open("tracer.stop()")
        raise _Stop

    def cancel(self) -> bool:
        """Cancel the trace, from any thread: its block ends with TraceCancelled.

        Returns at once. False if it had ended before, and then nothing happens; True otherwise,
        also when it is called again. What runs of the trace is ended at every peer, and nothing is
        sent any more; before the end of the block, nothing ever is.
        """
        return self._cancellation.cancel()

    def barrier(self, n_participants: int = 0) -> Callable[[], None]:
        """A function that does nothing, for code written for NNsight.

        Invokes need no barriers here: what one reads and another writes says which runs first.
        """
        self._require_open("tracer.barrier(...)")
        return _pass_barrier

    if not TYPE_CHECKING:  # a type checker shall know these for the mistakes that they are

        def __getattr__(self, name: str) -> NoReturn:
            if name in ("iter", "all", "next"):
                raise TraceError(
                    f"tracer.{name} in a trace, which is one forward pass; steps are those of "
                    "`with model.generate(prompt, max_new_tokens=...) as tracer:`",
                    line=here(),
                )
            later = _LATER.get(name)
            if later is not None:
                raise NotYet(f"{at_line()}tracer.{name} is not in this release: {later}")
            raise AttributeError(f"{at_line()}a tracer has no {name!r}; docs/api.md has all names")

    def _add_invoke(self, prompt: Prompt) -> int:
        tokens = self.model.tokenize(prompt)
        self.tokens.append(tokens)
        self.sites.invokes.append(self._shape(tokens))
        return len(self.tokens) - 1

    def _shape(self, tokens: Tokens) -> InvokeShape:
        """Rows, tokens and new tokens of the invoke that is added."""
        return tokens.shape

    # What the body can ask --------------------------------------------------------------------

    # Copies: the model gets the prompt as it was given. Saved values, so that `.save()` works.

    @property
    def input_ids(self) -> SavedTensor:
        """The token ids of the current invoke, int64 `[batch, seq]`, padded on the left."""
        return saved(self.tokens[self._here()].input_ids.clone())

    @property
    def attention_mask(self) -> SavedTensor:
        """1 for a token and 0 for padding, int64 `[batch, seq]`, of the current invoke."""
        return saved(self.tokens[self._here()].mask.clone())

    @property
    def lengths(self) -> SavedTensor:
        """The number of tokens of every row of the current invoke, int64 `[batch]`."""
        return saved(self.tokens[self._here()].mask.sum(-1))

    def estimate(self) -> Mapping[str, Any]:
        """What the trace as it stands would take, before anything is sent.

        A mapping: `route` (the peers), `hops`, `passes`, `rows`, `sent_bytes`, `hop_bytes`,
        `saved_bytes`, `peak_bytes`, `flops`, `compute_seconds`: the peers' time for the forward
        passes at the speeds that they announce, and `expected_seconds`: that with load, round trips
        as far as they were measured, and the bytes over an assumed network of 100 Mbit/s.
        """
        self._require_open("tracer.estimate()")
        return self.model.estimate(self._finish(), self.options)

    @property
    def result(self) -> Provenance:
        """Which peers ran what, and the bytes that travelled. Raises TraceError before the end."""
        if self._result is None:
            raise TraceError(
                "tracer.result says where the values of a trace are from, once its block has ended "
                "without an error; what the model gives is model.output",
                line=here(),
            )
        return self._result

    def profile(self) -> Profile:
        """Where the time went, peer by peer. Raises TraceError before the end of the block."""
        if self._result is None:
            raise TraceError(
                "tracer.profile() says where the time of a trace went, once its block has ended "
                "without an error; before, tracer.estimate() says what it would take",
                line=here(),
            )
        return self._result.profile

    def _require_open(self, call: str) -> None:
        if _current.get() is not self:
            raise TraceError(
                f"{call} outside its `with model.trace(...)` block; call it inside", line=here()
            )

    def _finish(self) -> Experiment:
        if not self.tokens:
            raise TraceError(
                "a trace without a prompt; write `with model.trace(prompt):`, or "
                "`with tracer.invoke(prompt):` inside the block",
                line=here(),
            )
        return finish(self.sites, self.tokens, self.model.calls, self.options, self._cancellation)

    # For modules ------------------------------------------------------------------------------

    def read(self, site: Site) -> TracedTensor:
        """What stands at a site of the current invoke and step."""
        return self.sites.read(self._at_step(site), self._here())

    def leaves(self, module: str, io: IO) -> tuple[Leaf, ...]:
        """The tensors that a module takes or gives in the current invoke and step."""
        return self.sites.leaves(module, io, self._here(), self.step_of(module))

    def assign(self, site: Site, value: object) -> None:
        """Put a value at a site of the current invoke and step."""
        self.sites.assign(self._at_step(site), self._here(), value)

    def skip(self, module: str, value: object) -> None:
        """Have the current invoke not run a module at the current step."""
        self.sites.skip(module, self._here(), value, self.step_of(module))

    def step_of(self, module: str) -> int:
        """The step at which sites of a module are now; 0 in a trace.

        Raises TraceError for what only generations have.
        """
        if module == GENERATOR:
            raise TraceError(
                "model.generator chooses tokens, and a trace makes none; write "
                "`with model.generate(prompt, max_new_tokens=...)`",
                line=here(),
            )
        return 0

    def advance(self, module: str, steps: int) -> None:
        """Go on to a later step for one module. Raises TraceError: a trace has one."""
        raise TraceError(
            f"{module or 'model'}.next() in a trace, which is one forward pass; write `with "
            "model.generate(prompt, max_new_tokens=...)`",
            line=here(),
        )

    def _at_step(self, site: Site) -> Site:
        step = self.step_of(site.module)
        return replace(site, step=step) if step else site

    def _here(self) -> int:
        if self._invoke is None:
            raise TraceError(
                "no prompt: a site belongs to an invoke; write `with model.trace(prompt):`, or "
                "`with tracer.invoke(prompt):` inside the trace",
                line=here(),
            )
        return self._invoke
