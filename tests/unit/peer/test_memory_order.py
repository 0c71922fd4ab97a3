"""The order of a tensor's axes in memory survives a copy and the wire."""

from __future__ import annotations

import contextlib
import itertools

import msgpack
import pytest
import torch
from hostile import attack, fuzzed, like
from hypothesis import given
from torch import Tensor

from glasshive.dht.errors import MalformedMessage
from glasshive.dht.messages import Value, decode
from glasshive.dht.messages import spec_of as announced_spec
from glasshive.graph.errors import BadTensor
from glasshive.graph.kernels import spec_of, tensor_to_bytes
from glasshive.peer.memory_order import copy_in_order, memory_order, tensor_in_order
from glasshive.security.errors import MalformedData
from glasshive.security.plain import decode_plain

BASE = torch.arange(2 * 3 * 4 * 5, dtype=torch.float32).view(2, 3, 4, 5)


def sent(tensor: Tensor) -> Tensor:
    order = memory_order(tensor)
    return tensor_in_order(spec_of(tensor), order, tensor_to_bytes(tensor.permute(order)))


@pytest.mark.parametrize("axes", list(itertools.permutations(range(4))))
def test_every_transposition_lies_as_it_lay(axes: tuple[int, ...]) -> None:
    tensor = BASE.permute(axes)
    for copy in (sent(tensor), copy_in_order(tensor)):
        assert torch.equal(copy, tensor)
        assert copy.stride() == tensor.stride()
        assert copy.data_ptr() != tensor.data_ptr()


@pytest.mark.parametrize(
    "tensor",
    [
        BASE[:, 1:, ::2],
        BASE[:, 1:, ::2].transpose(1, 3),
        BASE[:, :1].transpose(1, 2),
        BASE[:1].transpose(0, 3),
        BASE.flatten()[3],
        BASE[:0],
        BASE[0, 0].t()[1:3],
    ],
    ids=lambda tensor: str(tuple(tensor.shape)),
)
def test_slices_keep_the_order_and_lose_the_gaps(tensor: Tensor) -> None:
    for copy in (sent(tensor), copy_in_order(tensor)):
        assert torch.equal(copy, tensor)
        wide = [i for i in range(tensor.dim()) if tensor.shape[i] > 1]
        before = sorted(wide, key=lambda i: -tensor.stride(i))
        assert before == sorted(wide, key=lambda i: -copy.stride(i))
        assert copy.untyped_storage().nbytes() == copy.nbytes or copy.numel() == 0


def test_what_repeats_elements_lies_row_by_row() -> None:
    for tensor in (BASE[:, :1].expand(2, 3, 4, 5), torch.ones(3, 1).expand(3, 4).t()):
        for copy in (sent(tensor), copy_in_order(tensor)):
            assert torch.equal(copy, tensor)
            assert copy.is_contiguous()


def test_contiguous_tensors_lie_in_the_order_of_their_axes() -> None:
    assert memory_order(BASE) == (0, 1, 2, 3)
    assert memory_order(torch.tensor(3.0)) == ()
    assert memory_order(torch.ones(1, 1, 7)) == (0, 1, 2)


@pytest.mark.parametrize("order", [[], [0, 1], [0, 1, 1], [0, 1, 3], [-1, 0, 1], [0, 1, 2, 3]])
def test_what_is_no_order_is_refused(order: list[int]) -> None:
    tensor = torch.ones(2, 3, 4)
    with pytest.raises(MalformedMessage, match="is no order of 3 axes"):
        tensor_in_order(spec_of(tensor), order, tensor_to_bytes(tensor))


VALUES: list[bytes] = [
    msgpack.packb(["float32", [2, 3], [1, 0], bytes(range(24))]),
    msgpack.packb(["bool", [1, 0, 2], [0, 2, 1], b""]),
    msgpack.packb(["bool", [], [], b"\1"]),
]


def carried(data: bytes) -> None:
    """What a peer does with a value's message and its bytes, which never end the process."""
    try:
        *header, elements = decode_plain(data, max_bytes=1000)
        message = decode([21, 0, 0, *header], Value)
    except (MalformedData, TypeError, ValueError):
        raise MalformedMessage("no message") from None
    spec = announced_spec(message.dtype, message.shape)
    if spec.nbytes > 1 << 16 or type(elements) is not bytes:
        raise MalformedMessage("not on the plan")
    tensor = tensor_in_order(spec, message.order, elements)
    assert spec_of(tensor) == spec


def test_damaged_values_are_a_tensor_or_refused() -> None:
    attack(carried, VALUES, (MalformedMessage, BadTensor))


@fuzzed
@given(like(*VALUES))
def test_any_value_is_a_tensor_or_refused(data: bytes) -> None:
    with contextlib.suppress(MalformedMessage, BadTensor):
        carried(data)
