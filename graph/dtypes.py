"""The closed list of number formats that may stand in a graph or travel on the wire."""

from __future__ import annotations

import enum

from glasshive.graph.errors import BadTensor


class DType(enum.Enum):
    """A number format. The value is the name on the wire; `itemsize` is bytes per element."""

    FLOAT64 = "float64", 8
    FLOAT32 = "float32", 4
    FLOAT16 = "float16", 2
    BFLOAT16 = "bfloat16", 2
    INT64 = "int64", 8
    INT32 = "int32", 4
    INT16 = "int16", 2
    INT8 = "int8", 1
    UINT8 = "uint8", 1
    BOOL = "bool", 1
    COMPLEX64 = "complex64", 8

    itemsize: int

    def __new__(cls, name: str, itemsize: int) -> DType:
        member = object.__new__(cls)
        member._value_ = name
        member.itemsize = itemsize
        return member

    __hash__ = object.__hash__  # Enum's is Python code, and admission asks for many

    @classmethod
    def from_name(cls, name: object) -> DType:
        """The format called `name`. Raises BadTensor for any other word or type."""
        found = _BY_NAME.get(name) if isinstance(name, str) else None
        if found is None:
            known = ", ".join(_BY_NAME)
            raise BadTensor(f"unknown dtype {name!r:.40}; one of {known} is wanted")
        return found


_BY_NAME = {member.value: member for member in DType}
