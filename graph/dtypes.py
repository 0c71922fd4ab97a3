"""The closed list of number formats that may stand in a graph or travel on the wire."""

from __future__ import annotations

import enum

from glasshive.graph.errors import BadTensor


class DType(enum.Enum):
    """A number format. The value is the name on the wire; `itemsize` is bytes per element."""

    FLOAT64 = "float64"
    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    INT64 = "int64"
    INT32 = "int32"
    INT16 = "int16"
    INT8 = "int8"
    UINT8 = "uint8"
    BOOL = "bool"
    COMPLEX64 = "complex64"

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return _ITEMSIZE[self]

    @classmethod
    def from_name(cls, name: object) -> DType:
        """The format called `name`. Raises BadTensor for any other word or type."""
        found = _BY_NAME.get(name) if isinstance(name, str) else None
        if found is None:
            known = ", ".join(_BY_NAME)
            raise BadTensor(f"unknown dtype {name!r:.40}; one of {known} is wanted")
        return found


_BY_NAME = {member.value: member for member in DType}
_ITEMSIZE = {
    DType.FLOAT64: 8,
    DType.FLOAT32: 4,
    DType.FLOAT16: 2,
    DType.BFLOAT16: 2,
    DType.INT64: 8,
    DType.INT32: 4,
    DType.INT16: 2,
    DType.INT8: 1,
    DType.UINT8: 1,
    DType.BOOL: 1,
    DType.COMPLEX64: 8,
}
