"""What a module takes or gives that is more than one tensor: tuples, and values with names.

In a trace they are views of sites, not containers: a part is edited in place, or the whole is
assigned to the site. Setting an item here would reach no model, so it is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NoReturn, TypeVar

import torch

from glasshive.client.errors import TraceError
from glasshive.client.recorder import active_recorder
from glasshive.client.source_lines import at_line, here
from glasshive.client.traced import TracedTensor

T = TypeVar("T")


class Parts(tuple[Any, ...]):
    """A module's output or inputs that are a tuple; what is no tensor in it is None.

    `name` is what messages call it; `on_none(index)` is called for each None that is handed out.
    """

    name: str = "this tuple"
    on_none: Callable[[int], None] | None = None

    def save(self) -> Parts:
        """Bring every tensor in it back. Returns itself."""
        save(self)
        return self

    def __getitem__(self, index: Any) -> Any:
        try:
            part = super().__getitem__(index)
        except IndexError:
            raise IndexError(
                f"{at_line()}{self.name} has {len(self)} parts; index {index} is outside"
            ) from None
        if part is None and self.on_none is not None:
            self.on_none(range(len(self))[index])
        return part

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))

    def __setitem__(self, index: object, value: object) -> NoReturn:
        _refuse_item(self.name, index)

    def __reduce__(self) -> Any:
        return tuple, (tuple(self),)


class NamedValues(dict[str, Any]):
    """Values with names, such as an output's `logits`: a dictionary, also by attribute.

    `fields` are the names of a Hugging Face output in order, those of no tensor among them: there
    `output[0]` is the first one, as there.
    """

    def __init__(
        self, values: Mapping[str, Any], fields: tuple[str, ...] = (), name: str = "this output"
    ) -> None:
        super().__init__(values)
        self.__dict__.update(_fields=fields, _name=name)

    def save(self) -> NamedValues:
        """Bring every tensor in it back. Returns itself."""
        save(self)
        return self

    def to_tuple(self) -> tuple[Any, ...]:
        """The values in order; what is no tensor is None."""
        return tuple(self.get(name) for name in self.__dict__["_fields"] or self)

    def __getitem__(self, key: Any) -> Any:
        fields: tuple[str, ...] = self.__dict__["_fields"]
        if isinstance(key, slice) and fields:
            return self.to_tuple()[key]
        if isinstance(key, int) and fields:
            try:
                key = fields[key]
            except IndexError:
                raise IndexError(at_line() + self._lack(key)) from None
        if key not in self:
            raise KeyError(at_line() + self._lack(key))
        return super().__getitem__(key)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name not in self:
            raise AttributeError(f"{at_line()}{self._lack(name)}")
        return self[name]

    def _lack(self, key: object) -> str:
        where, fields = self.__dict__["_name"], self.__dict__["_fields"]
        if key in fields:
            return f"{key} of {where} is no tensor (a cache, or lists), so it is in no trace"
        return f"{where} has no {key!r:.60}; it has {', '.join(self) or 'none'}"

    def __setitem__(self, key: str, value: object) -> None:
        if active_recorder() is not None:
            _refuse_item(self.__dict__["_name"], key)
        super().__setitem__(key, value)

    def __setattr__(self, name: str, value: object) -> None:
        self[name] = value

    def update(self, *args: Any, **kwargs: Any) -> None:
        """As of any dictionary; refused in a trace."""
        for name, value in dict(*args, **kwargs).items():
            self[name] = value

    def __ior__(self, other: Any) -> NamedValues:  # type: ignore[override,misc]
        self.update(other)
        return self

    def setdefault(self, key: str, default: Any = None) -> Any:
        """As of any dictionary; refused in a trace, as is all that changes it."""
        if key not in self:
            self[key] = default
        return self[key]

    def __delitem__(self, key: str) -> None:
        if active_recorder() is not None:
            _refuse_item(self.__dict__["_name"], key)
        super().__delitem__(key)

    def pop(self, key: str, *default: Any) -> Any:
        """Likewise."""
        if active_recorder() is not None:
            _refuse_item(self.__dict__["_name"], key)
        return super().pop(key, *default)

    def popitem(self) -> tuple[str, Any]:
        """Likewise."""
        key = next(reversed(self))
        return key, self.pop(key)

    def clear(self) -> None:
        """Likewise."""
        for key in list(self):
            del self[key]

    def __reduce__(self) -> Any:
        return dict, (dict(self),)


def _refuse_item(name: str, key: object) -> NoReturn:
    part = f"{name}[{key!r:.40}]"
    raise TraceError(
        f"{part} cannot be assigned by itself; edit it in place ({part}[:] = value), or assign a "
        f"whole one to {name}",
        line=here(),
    )


def save(value: T) -> T:
    """Bring back every traced value in `value`: itself, or in lists, tuples and dictionaries.

    Returns `value`. What is no traced value needs no saving, and stays what it is. In a trace, what
    a list, set or dictionary holds when the block ends is saved; values of steps that never came,
    because a generation ended before, are not in it any more, at the end of a list.
    """
    recorder = active_recorder()
    if recorder is not None and isinstance(value, list | dict | set):
        recorder.containers.append(value)
    save_parts(value)
    return value


def save_parts(value: object) -> None:
    """Save every traced value that is in `value` now, or that it is."""
    if isinstance(value, TracedTensor):
        value.save()
    elif isinstance(value, list | set | dict | tuple):
        for part in _parts(value):
            save_parts(part)


def drop(value: object, gone: Collection[int]) -> bool | None:
    """Take tensors of these ids out of sets and dictionaries, with what has no other tensor.

    Of lists only from the end: what stays has its place. Returns whether `value` is gone so; None
    if there is no tensor in it.
    """
    if isinstance(value, torch.Tensor):
        return id(value) in gone
    if not isinstance(value, list | set | dict | tuple):
        return None
    parts = [(part, drop(part, gone)) for part in _parts(value)]
    if isinstance(value, dict):
        for key in [key for key, (_, is_gone) in zip(value, parts, strict=True) if is_gone]:
            del value[key]
    elif isinstance(value, list):
        stays = len(parts)
        while stays and parts[stays - 1][1]:
            stays -= 1
        del value[stays:]
    elif isinstance(value, set):
        value -= {part for part, is_gone in parts if is_gone}
    said = [is_gone for _, is_gone in parts if is_gone is not None]
    return all(said) if said else None


def _parts(value: list[Any] | set[Any] | dict[Any, Any] | tuple[Any, ...]) -> list[Any]:
    if isinstance(value, tuple):
        return list(tuple.__iter__(value))  # Parts asks for those that are no tensor
    return list(value.values() if isinstance(value, dict) else value)
