"""What torch does with a call before it dispatches, where traced tensors cannot see it.

- What it refuses there is refused at the user's line, with what was given.
- Which function was called decides how some decompositions round (values_only.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from glasshive.client.errors import Misfit
from glasshive.client.functional import layout_of
from glasshive.client.lowering import first_line
from glasshive.client.misfits import array_hint
from glasshive.client.source_lines import here
from glasshive.client.traced import TracedTensor
from glasshive.client.values_only import is_values_only, values_only

# What a body catches of torch's own, it catches here: `except IndexError` around an index works.
_MISFITS: dict[type[Exception], type[Misfit]] = {
    kind: type("Misfit", (Misfit, kind), {"__doc__": Misfit.__doc__})
    for kind in (IndexError, TypeError, ValueError, RuntimeError)
}

# What asks for gradients of values that have no history.
_GRADIENTS = frozenset({torch.autograd.grad, torch.autograd.backward})


class TorchCalls(TorchFunctionMode):
    """Watches every call of torch while a trace is recorded; it changes none."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """The result of the call. Raises Misfit for what torch refuses of a traced value."""
        named = kwargs or {}
        if func in _GRADIENTS and (found := _traced((*args, *named.values()))):
            found[0].backward()  # raises NotYet
        try:
            if is_values_only(func, args, named):
                with values_only():
                    return func(*args, **named)
            return func(*args, **named)
        except Misfit as error:
            found = _traced((*args, *named.values()))
            error.args = (f"{error}{_at_step(found)}",)
            raise
        except (IndexError, TypeError, ValueError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError) or not (
                found := _traced((*args, *named.values()))
            ):
                raise
            kind = next(one for one in _MISFITS if isinstance(error, one))
            text = _refusal(func, args, named, error) + _at_step(found)
            raise _MISFITS[kind](text, line=here()) from error


def _traced(args: Sequence[Any]) -> list[TracedTensor]:
    found: list[TracedTensor] = []
    for arg in args:
        if isinstance(arg, TracedTensor):
            found.append(arg)
        elif isinstance(arg, list | tuple):
            found.extend(_traced(arg))
    return found


def _at_step(found: Sequence[TracedTensor]) -> str:
    """Words for the step of a generation at which its values are combined."""
    return found[0]._alias.cell.recorder.at_step if found else ""


def _refusal(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], error: Exception) -> str:
    if func is torch.Tensor.__getitem__ and isinstance(args[0], TracedTensor):
        return _misindexed(args[0], args[1], error)
    if func is torch.Tensor.__setitem__ and isinstance(args[0], TracedTensor):
        return _misassigned(args[0], args[1], args[2], error)
    name = getattr(func, "__name__", str(func)).strip("_")
    given = ", ".join(str(tensor._alias) for tensor in _traced((*args, *kwargs.values())))
    return f"{name} of {given}: {first_line(error)}"


def _misindexed(tensor: TracedTensor, index: object, error: Exception) -> str:
    """Why `tensor[index]` has no meaning: torch's own reason, what was indexed, what to do."""
    what = tensor._alias
    if isinstance(error, ValueError):
        return f"{first_line(error)}, in {what}; turn it round with .flip(dim)"
    if isinstance(error, IndexError) and "are valid ind" not in str(error):
        return (
            f"{first_line(error)}, in {what}; indices count from 0 at the start of an axis, or "
            "from -1 at its end"
        )
    kinds = [type(one).__name__ for one in (index if isinstance(index, tuple) else (index,))]
    return (
        f"{what} is indexed by {' and '.join(kinds)} ({first_line(error)}); integers, slices of "
        "integers, ..., None, and tensors or lists of integers or bools can stand there"
    )


def _misassigned(tensor: TracedTensor, index: object, value: object, error: Exception) -> str:
    """Why `tensor[index] = value` has no meaning."""
    if isinstance(value, torch.Tensor):
        if isinstance(error, RuntimeError) and "size" in str(error):
            given = value._alias if isinstance(value, TracedTensor) else layout_of(value)
            return (
                f"{given} does not fit the part of {tensor._alias} that it is assigned to: "
                f"{first_line(error)}; print(h[...].shape) of that part, and give what broadcasts "
                "to it"
            )
    elif isinstance(error, TypeError) and "assign" in str(error):
        return (
            f"a {type(value).__name__} is assigned to a part of {tensor._alias}; a tensor or a "
            f"number is wanted{array_hint(value) or ', such as torch.tensor(value)'}"
        )
    return _misindexed(tensor, index, error)
