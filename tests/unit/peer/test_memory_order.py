"""The order of a tensor's axes in memory survives a copy and the wire."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from glasshive.dht.errors import MalformedMessage
from glasshive.graph.kernels import spec_of, tensor_to_bytes
from glasshive.peer.memory_order import copy_in_order, memory_order, tensor_in_order

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
