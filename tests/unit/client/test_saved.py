"""A saved value: traced until its block ends, then a tensor in all but type."""

from __future__ import annotations

import copy
import io
import pickle  # noqa: TID251  (the user's own, of a plain tensor)
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from glasshive.client.errors import ClientError, NotSaved
from glasshive.client.recorder import Recorder, recording
from glasshive.client.saved import SavedTensor, fill
from glasshive.graph.kernels import spec_of

VALUE = torch.arange(6.0).view(2, 3)


def saved_of(value: Tensor) -> Any:
    """A saved tensor that came back with `value`."""
    recorder = Recorder()
    with recording(recorder):
        traced = recorder.traced(recorder.const(value), spec_of(value)).save()
    fill(traced, value.clone())
    return traced


@pytest.fixture
def v() -> Any:
    return saved_of(VALUE)


def test_inside_the_block_it_still_records() -> None:
    recorder = Recorder()
    with recording(recorder):
        traced = recorder.traced(recorder.const(VALUE), spec_of(VALUE))
        assert traced.save() is traced
        assert traced.save() is traced
        assert list(recorder.saves.values()) == [traced]
        doubled = traced * 2
        traced[0] = 0  # seen by the save, as eager would
        assert recorder.value(recorder.saves["s0"]) != recorder.value(doubled)
    with pytest.raises(NotSaved, match="has not brought results back"):
        traced + 1


def test_it_is_a_tensor(v: Any) -> None:
    assert isinstance(v, torch.Tensor)
    assert isinstance(v, SavedTensor)
    assert v.save() is v
    assert (v.shape, v.dtype, v.device, len(v), v.ndim) == (
        (2, 3),
        torch.float32,
        VALUE.device,
        2,
        2,
    )
    assert repr(v) == repr(VALUE)
    assert str(v) == f"{v}" == str(VALUE)


GIVES_TENSORS: dict[str, Callable[[Any], Tensor]] = {
    "add": lambda v: v + 1,
    "radd": lambda v: 1 + v,
    "plain on the left": lambda v: torch.ones(3) + v,
    "plain on the right": lambda v: v + torch.ones(3),
    "matmul": lambda v: v @ v.T,
    "function": torch.sin,
    "list": lambda v: torch.stack([v, v, VALUE]),
    "index": lambda v: v[0],
    "index by saved": lambda v: VALUE[saved_of(torch.tensor(1))],
    "slice by saved": lambda v: VALUE[: saved_of(torch.tensor(1))],
    "iterate": lambda v: list(v)[1],
    "unpack": lambda v: (lambda a, b: b)(*v),
    "module": lambda v: nn.Softmax(-1)(v),
    "einsum": lambda v: torch.einsum("ij,ij->i", v, v),
    "keyword": lambda v: torch.add(input=v, other=v),
    "to": lambda v: v.to(torch.float64),
    "T": lambda v: v.T,
    "data": lambda v: v.data,
    "new_zeros": lambda v: v.new_zeros(3),
    "clone": lambda v: v.clone(),
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda v: pickle.loads(pickle.dumps(v)),
    "torch.save": lambda v: torch.load(save_to_buffer(v)),
    "dlpack": torch.from_dlpack,
    "vmap": lambda v: torch.vmap(lambda x: x * 2)(v),
    "grad": lambda v: torch.func.grad(lambda x: (x**2).sum())(v),
    "numpy scalar": lambda v: np.float32(2) * v,
    "collate": lambda v: torch.utils.data.default_collate([v, v]),
    "dataset": lambda v: torch.utils.data.TensorDataset(v)[0][0],
    "where": lambda v: torch.where(v > 2, v, 0.0),
    "into a buffer": lambda v: torch.zeros(2, 3).copy_(v),
    "mask": lambda v: v[v > 2],
    "unique": lambda v: v.unique(),
}


def save_to_buffer(value: Any) -> io.BytesIO:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return buffer


@pytest.mark.parametrize("name", GIVES_TENSORS)
def test_what_it_gives_is_plain_and_equal(name: str, v: Any) -> None:
    got, want = GIVES_TENSORS[name](v), GIVES_TENSORS[name](VALUE.clone())
    assert type(got) is torch.Tensor
    assert got.dtype == want.dtype
    assert torch.equal(got, want)


def test_python_sees_the_numbers() -> None:
    i = saved_of(torch.tensor(2))
    assert (int(i), float(i), bool(i), i.item(), i.tolist()) == (2, 2.0, True, 2, 2)
    assert list(range(i)) == [0, 1]
    assert "abc"[i] == "c"
    assert f"{i:03d}" == "002"
    assert f"{saved_of(torch.tensor(0.5)):.2f}" == "0.50"
    assert torch.tensor([i, i]).tolist() == [2, 2]
    assert 2 in saved_of(torch.tensor([1, 2]))
    assert {i: 1}[i] == 1


def test_numpy_sees_the_numbers(v: Any) -> None:
    want = VALUE.numpy()
    assert np.array_equal(v.numpy(), want)
    assert np.array_equal(np.asarray(v), want)
    assert np.array_equal(np.asarray(v, dtype=float), want)
    assert np.array_equal(np.stack([v, v]), np.stack([want, want]))
    assert np.array_equal(np.array([v[0], v[1]]), want)
    assert float(np.mean(v)) == 2.5
    assert np.array_equal(np.mean(v, axis=0), want.mean(0))
    assert v.mean(-1).tolist() == [1.0, 4.0]
    assert v.mean().item() == 2.5
    assert v.tolist() == want.tolist()


def test_safetensors_sees_the_numbers(v: Any) -> None:
    loaded = safetensors.torch.load(safetensors.torch.save({"v": v}))
    assert torch.equal(loaded["v"], VALUE)


def test_torch_compares_it(v: Any) -> None:
    assert torch.equal(v, VALUE)
    assert torch.allclose(VALUE, v)
    torch.testing.assert_close(v, VALUE)


def test_edits_stay(v: Any) -> None:
    v[0] = 9
    v.add_(1)
    assert v.tolist() == [[10, 10, 10], [4, 5, 6]]


def test_it_trains_a_probe(v: Any) -> None:
    probe = nn.Linear(3, 1)
    nn.functional.mse_loss(probe(v), torch.zeros(2, 1)).backward()
    assert probe.weight.grad is not None
    assert v.requires_grad_() is v
    (v**2).sum().backward()
    assert torch.equal(v.grad, 2 * VALUE)


def test_it_becomes_a_parameter(v: Any) -> None:
    parameter = nn.Parameter(v)
    assert isinstance(parameter, nn.Parameter)
    optimiser = torch.optim.SGD([parameter], lr=1.0)
    (parameter * 3).sum().backward()
    optimiser.step()
    assert torch.equal(parameter + 0, VALUE - 3)


def test_it_is_a_constant_of_the_next_trace(v: Any) -> None:
    recorder = Recorder()
    with recording(recorder):
        traced = recorder.traced(recorder.const(VALUE), spec_of(VALUE))
        total = traced + v
        also = v * traced
        traced[:] = v
        assert total.shape == also.shape == (2, 3)
    assert len(recorder.consts) == 1


def test_a_value_of_another_shape_is_refused() -> None:
    recorder = Recorder()
    with recording(recorder):
        traced = recorder.traced(recorder.const(VALUE), spec_of(VALUE)).save()
    with pytest.raises(ClientError, match=r"float64\[2, 3\], but float32\[2, 3\] was traced"):
        fill(traced, VALUE.double())


def test_filling_forgets_the_recorder(v: Any) -> None:
    assert not hasattr(v, "_alias")
