"""What a saved value is after its block: a tensor in all but type.

The object that the user holds changes its class from `TracedTensor` to `SavedTensor` and gets a
value. From then on every function, method and attribute of torch acts on that value and gives plain
tensors: NumPy, pickle, `torch.save`, indexing, autograd and printing follow. `isinstance(v,
torch.Tensor)` is promised; `type(v)` is not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from glasshive.client.errors import ClientError
from glasshive.client.functional import Layout, layout_of
from glasshive.client.traced import TracedTensor, make_wrapper


class SavedTensor(torch.Tensor):
    """A saved value that came back. `value` is the plain tensor."""

    _value: torch.Tensor

    @property
    def value(self) -> torch.Tensor:
        """The plain tensor."""
        return self._value

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = {} if kwargs is None else {name: _plain(arg) for name, arg in kwargs.items()}
        return func(*map(_plain, args), **named)

    # What reaches here went past __torch_function__: C++ that calls C++.
    __torch_dispatch__ = __torch_function__  # type: ignore[assignment]

    def save(self) -> SavedTensor:
        """Itself: it is saved already."""
        return self

    def detach(self) -> SavedTensor:
        """The value without its history, sharing its memory; `torch.nn.Parameter` asks for it."""
        return saved(self._value.detach())

    def requires_grad_(self, requires_grad: bool = True) -> SavedTensor:
        """Have autograd record what is done with the value. Returns itself."""
        self._value.requires_grad_(requires_grad)
        return self

    def mean(self, *args: Any, axis: Any = None, out: Any = None, **kwargs: Any) -> torch.Tensor:
        """As `torch.Tensor.mean`, and as `numpy.mean` calls it."""
        if axis is not None:
            kwargs["dim"] = axis
        if kwargs.get("dtype", 0) is None:
            del kwargs["dtype"]
        if out is not None:
            return torch.mean(self._value, *args, out=_plain(out), **kwargs)
        return self._value.mean(*args, **kwargs)


def saved(value: torch.Tensor) -> SavedTensor:
    """A saved value that is there already, sharing the memory of `value`."""
    wrapped: SavedTensor = make_wrapper(SavedTensor, layout_of(value))
    wrapped._value = value
    return wrapped


def _plain(arg: Any) -> Any:
    if isinstance(arg, SavedTensor):
        return arg._value
    kind = type(arg)
    if kind is tuple or kind is list:
        return kind([_plain(item) for item in arg])
    if kind is dict:
        return {key: _plain(item) for key, item in arg.items()}
    if kind is slice:
        return slice(_plain(arg.start), _plain(arg.stop), _plain(arg.step))
    return arg


def fill(tensor: TracedTensor, value: torch.Tensor) -> None:
    """Turn a traced tensor into a saved one with this value.

    Raises ClientError if dtype and shape are not those that were traced.
    """
    wanted: Layout = tensor._alias.layout
    if value.dtype != wanted.dtype or tuple(value.shape) != wanted.shape:
        raise ClientError(
            f"a saved value came back as {layout_of(value)}, but {wanted} was traced; the peers "
            "hold another model than the one that was scanned, or one of them is at fault"
        )
    fill_with(tensor, value)


def fill_with(tensor: TracedTensor, value: torch.Tensor) -> None:
    """Turn a traced tensor into a saved one with this value, whatever its shape."""
    held: Any = tensor
    held._value = value
    held.__class__ = SavedTensor  # now it is one, whatever interrupts
    del held._alias  # and with it the recorder and its constants
