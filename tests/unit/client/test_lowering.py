"""What calls of torch become: few nodes, only of the table, and views instead of copies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from glasshive.client.lowering import EDITS, REFUSED, RULES
from glasshive.client.recorder import Recorder
from glasshive.client.traced import TracedTensor
from glasshive.graph.codec import GraphLimits
from glasshive.graph.dtypes import DType
from glasshive.graph.graph import Op, Ref

Start = Callable[..., Any]


@pytest.fixture
def record(session: Start, h: Tensor) -> Callable[[Callable[[Tensor], Any]], list[Op]]:
    """The ops that a function on `h` records."""
    opened = session(h)

    def run(function: Callable[[Tensor], Any]) -> list[Op]:
        before = len(opened.recorder.nodes)
        result = function(opened.traced[0])
        for value in result if isinstance(result, tuple | list) else [result]:
            opened.recorder.value(value)
        nodes = list(opened.recorder.nodes.values())[before:]
        return [node for node in nodes if isinstance(node, Op)]

    return run


FEW: dict[str, tuple[Callable[[Tensor], Any], list[str]]] = {
    "view": (lambda h: h.view(10, 8), ["reshape"]),
    "unsqueeze": (lambda h: h[:, None], ["reshape"]),
    "full slice": (lambda h: h[:, :], []),
    "identity permute": (lambda h: h.permute(0, 1, 2), []),
    "transpose": (lambda h: h.transpose(1, 2), ["permute"]),
    "mT": (lambda h: h.mT, ["permute"]),
    "clone": (lambda h: h.clone(), []),
    "contiguous": (lambda h: h.mT.contiguous(), ["permute"]),
    "to the same dtype": (lambda h: h.to(torch.float32, copy=True), []),
    "half": (lambda h: h.half(), ["to"]),
    "split": (lambda h: h.split([3, 5], -1), ["slice", "slice"]),
    "chunk": (lambda h: h.chunk(5, 1)[0], ["slice"]),
    "unbind": (lambda h: h.unbind(0), ["select", "select"]),
    "zeros_like": (lambda h: torch.zeros_like(h), ["full"]),
    "empty_like": (lambda h: torch.empty_like(h), ["full"]),
    "new_empty": (lambda h: h.new_empty(3), ["full"]),
    "matmul": (lambda h: h @ h.mT, ["permute", "bmm"]),
    "sdpa": (
        lambda h: nn.functional.scaled_dot_product_attention(h[:, None], h[:, None], h[:, None]),
        ["reshape", "sdpa"],
    ),
    "layer norm": (lambda h: nn.functional.layer_norm(h, (8,)), ["layer_norm"]),
    "argmax": (lambda h: h.argmax(-1), ["argmax"]),
    "topk": (lambda h: h.topk(2), ["topk", "pick", "pick"]),
    "floor division": (lambda h: h // 2, ["div"]),
    "maximum of one axis": (lambda h: h.max(-1), ["max_dim", "pick", "pick"]),
    "sum of no axes": (lambda h: h.sum([]), ["sum"]),
    "expand in front": (lambda h: h[0].expand(1, 5, 8), ["select", "reshape"]),
}


@pytest.mark.parametrize("name", FEW)
def test_few_nodes(name: str, record: Any) -> None:
    function, names = FEW[name]
    assert [op.name for op in record(function)] == names


def ops_of(recorder: Recorder) -> list[Op]:
    return [node for node in recorder.nodes.values() if isinstance(node, Op)]


def test_a_list_longer_than_a_graph_holds_is_joined_in_pieces(check: Any) -> None:
    most = GraphLimits().list_items
    plain = torch.ones(1, 8, dtype=torch.int64)
    for function in (
        lambda h: torch.cat([h[0, :1]] * (most + 1)),
        lambda h: torch.cat([h[0, :1].half(), plain, *[h[0, :1]] * most], -1),
        lambda h: torch.stack([h[0, 0]] * (2 * most + 1), 1),
    ):
        recorded = ops_of(check(function, torch.randn(2, 5, 8)))
        joins = [op for op in recorded if op.name in ("cat", "stack")]
        assert len(joins) > 1
        assert max(len(op.args[0]) for op in joins) <= most


VALUES_ONLY: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "svdvals": (lambda h: torch.linalg.svdvals(h), "linalg_svdvals"),
    "spectral norm": (lambda h: torch.linalg.matrix_norm(h, 2), "linalg_svdvals"),
    "nuclear norm": (lambda h: torch.linalg.norm(h[0], "nuc"), "linalg_svdvals"),
    "old norm": (lambda h: h[0].norm("nuc"), "linalg_svdvals"),
    "condition": (lambda h: torch.linalg.cond(h), "linalg_svdvals"),
    "svd without vectors": (lambda h: torch.svd(h, compute_uv=False)[1], "linalg_svdvals"),
    "svd": (lambda h: torch.linalg.svd(h, full_matrices=False)[1], "linalg_svd"),
    "old svd": (lambda h: torch.svd(h)[1], "linalg_svd"),
    "eigvalsh": (lambda h: torch.linalg.eigvalsh(h @ h.mT), "linalg_eigvalsh"),
    "eigh": (lambda h: torch.linalg.eigh(h @ h.mT)[0], "linalg_eigh"),
}


@pytest.mark.parametrize("name", VALUES_ONLY)
def test_a_decomposition_without_vectors_is_its_own(name: str, check: Any) -> None:
    """Torch itself rounds the values differently with vectors and without."""
    function, op = VALUES_ONLY[name]
    recorded = ops_of(check(function, torch.randn(3, 24, 24)))
    assert {one.name for one in recorded if one.name.startswith("linalg_")} == {op}


EDITED: dict[str, tuple[Callable[[Tensor], Any], list[str]]] = {
    "add in place": (lambda h: h.add_(1), ["add"]),
    "zero": (lambda h: h.zero_(), ["full"]),
    "assign everything": (lambda h: h.copy_(h.clone()), []),
    "assign a row": (lambda h: assign(h, 0, 0.0), ["full", "select_scatter"]),
    "accumulate": (lambda h: accumulate(h), ["select", "add", "select_scatter"]),
    "two views": (
        lambda h: h.mT[:, 2].neg_(),
        ["permute", "select", "neg", "select_scatter", "permute"],
    ),
    "other dtype": (lambda h: h.copy_(h.double()), ["to", "to"]),
    "reshaped": (lambda h: h.view(-1).neg_(), ["reshape", "neg", "reshape"]),
}


def assign(h: Tensor, index: Any, value: Any) -> Tensor:
    h[index] = value
    return h


def accumulate(h: Tensor) -> Tensor:
    h[:, -1] += 1
    return h


@pytest.mark.parametrize("name", EDITED)
def test_few_nodes_for_edits(name: str, record: Any) -> None:
    function, names = EDITED[name]
    assert [op.name for op in record(function)] == names


def test_slices_are_resolved(record: Any) -> None:
    (op,) = record(lambda h: h[:, -3:-1])
    assert op.args[1:] == (1, 2, 4, 1)
    (op,) = record(lambda h: h[:, -2])
    assert op.args[1:] == (1, 3)


def test_no_device_travels(record: Any) -> None:
    (op,) = record(lambda h: h.new_zeros((2,), device="cpu", dtype=torch.int64))
    assert op.args == ((2,), 0, DType.INT64)


def test_random_ops_depend_on_nothing(record: Any) -> None:
    blank, drawn = record(lambda h: torch.randn_like(h))
    assert (blank.name, drawn.name) == ("full", "randn_like")
    assert not any(isinstance(arg, Ref) for arg in blank.args)


def test_a_plain_mask_becomes_indices(record: Any) -> None:
    mask = torch.tensor([True, False, True, False, False])
    (op,) = record(lambda h: h[:, mask])
    assert op.name == "index"


def test_several_results_are_computed_before_the_first_is_written(
    session: Start, h: Tensor
) -> None:
    opened = session(h)
    (traced,) = opened.traced
    indices = torch.zeros_like(traced, dtype=torch.int64)
    torch.sort(traced, dim=-1, out=(traced, indices))
    ids = opened.recorder.value(traced), opened.recorder.value(indices)
    values = opened.run()
    want = h.sort(-1)
    assert torch.equal(values[ids[0]], want.values)
    assert torch.equal(values[ids[1]], want.indices)


def test_the_result_of_an_edit_is_the_tensor_itself(session: Start, h: Tensor) -> None:
    (traced,) = session(h).traced
    row = traced[0]
    assert row.add_(1) is row
    before = traced
    traced += 1
    assert traced is before
    assert torch.neg(traced, out=traced) is traced


def test_the_tables_do_not_overlap() -> None:
    assert not set(RULES) & set(EDITS)
    assert not {name.partition(".")[0] for name in RULES} & set(REFUSED)
    assert all(name.partition(".")[0].endswith("_") for name in EDITS)


def test_it_is_a_traced_tensor_again(session: Start, h: Tensor) -> None:
    (traced,) = session(h).traced
    assert type(traced.sum()) is TracedTensor
    assert isinstance(nn.Parameter(traced), nn.Parameter)
