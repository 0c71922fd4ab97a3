"""What a traced tensor is inside its block, and the text of every refusal."""

from __future__ import annotations

import copy
import io
import math
import operator
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from glasshive.client.errors import (
    AmbientState,
    DataDependent,
    Misfit,
    NotInTable,
    NotSaved,
    OutOfSight,
    PlainDestination,
    TraceError,
)
from glasshive.client.recorder import Recorder, active_recorder, recording
from glasshive.client.traced import TracedTensor
from glasshive.graph.errors import NotYet, ShapeMismatch, UnknownOp
from glasshive.graph.graph import Const, Op, Site
from glasshive.graph.kernels import spec_of

PLAIN = torch.zeros(2, 5, 8)
Start = Callable[..., Any]


@pytest.fixture
def traced(session: Start, h: Tensor) -> TracedTensor:
    tensor: TracedTensor = session(h).traced[0]
    return tensor


def ops_of(recorder: Recorder) -> list[str]:
    return [node.name for node in recorder.nodes.values() if isinstance(node, Op)]


# What it looks like ------------------------------------------------------------------------------


def test_it_is_a_tensor_on_the_cpu(traced: TracedTensor) -> None:
    assert isinstance(traced, torch.Tensor)
    assert isinstance(traced, torch.FloatTensor)
    assert traced.shape == (2, 5, 8)
    assert traced.device == torch.device("cpu")
    assert len(traced) == 2
    assert traced in [traced]
    assert {traced: 1}[traced] == 1
    assert repr(traced) == str(traced) == f"{traced}" == "<traced tensor float32[2, 5, 8]>"


def test_devices_do_not_exist(traced: TracedTensor) -> None:
    assert traced.cuda() is traced
    assert traced.cpu() is traced
    assert traced.to("cuda:3") is traced
    assert traced.to(traced.device, non_blocking=True) is traced
    assert traced.to(device="meta") is traced
    assert traced.to("cuda", torch.float16).dtype == torch.float16
    assert traced.to(torch.zeros(1, dtype=torch.float64)).dtype == torch.float64
    assert traced.to(torch.float32, False, True) is not traced
    assert traced.type("torch.cuda.HalfTensor").dtype == torch.float16
    assert traced.type() == "torch.FloatTensor"
    assert torch.zeros(8, device=traced.device).device.type == "cpu"


def test_a_module_of_the_users_moves_beside_it(traced: TracedTensor) -> None:
    module = nn.Linear(8, 3).to(traced.device).to(traced.dtype)
    assert module(traced).shape == (2, 5, 3)


# What it refuses ---------------------------------------------------------------------------------

NUMBERS: dict[str, Callable[[TracedTensor], Any]] = {
    "bool": lambda h: bool(h[0, 0, 0] > 0),
    "if": lambda h: 1 if (h > 0).all() else 2,
    "int": lambda h: int(h.argmax()),
    "float": lambda h: float(h.sum()),
    "complex": lambda h: complex(h.sum()),
    "item": lambda h: h.sum().item(),
    "tolist": lambda h: h.tolist(),
    "range": lambda h: range(h.argmax()),
    "list index": lambda h: [1, 2][h.argmax()],
    "operator.index": lambda h: operator.index(h.argmax()),
    "math": lambda h: math.sqrt(h.sum()),
    "in": lambda h: 3.0 in h,
    "format": lambda h: f"{h.sum():.2f}",
    "as index": lambda h: h[:, h.argmax()],
    "as slice": lambda h: h[:, : h.argmax()],
    "index of a plain tensor": lambda h: PLAIN[h.argmax()],
    "sorted": lambda h: sorted([h.sum(), h.mean()]),
    "any": lambda h: any(h[0, 0]),
    "zeros": lambda h: torch.zeros(h.argmax()),
    "arange": lambda h: torch.arange(h.argmax()),
    "torch.tensor of a list": lambda h: torch.tensor([h.sum(), h.mean()]),
    "is_nonzero": lambda h: torch.is_nonzero(h.sum()),
    "one_hot without classes": lambda h: nn.functional.one_hot(h.argmax(-1)),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_do_not_exist_yet(name: str, traced: TracedTensor) -> None:
    text = (
        r"^test_traced\.py:\d+: .* needs a number that exists only when the model runs; call "
        r"\.save\(\) on the value and use it after the block or in a second trace, or .*"
        r"torch\.where"
    )
    with pytest.raises(DataDependent, match=text) as caught:
        NUMBERS[name](traced)
    assert caught.value.line.file == __file__


def test_who_needs_the_number_is_named(traced: TracedTensor) -> None:
    for function, text in (
        (lambda h: h.sum().item(), r": \.item\(\) needs"),
        (lambda h: float(h.sum()), r": float\(\) needs"),
        (lambda h: 1 if h.sum() > 0 else 2, r": `if`, `and`, `not` or bool\(\) needs"),
        (lambda h: f"{h.sum():.2f}", r": the format '\.2f' needs"),
        (lambda h: h[:, h.argmax()], ": torch, for a size or an index, needs"),
    ):
        with pytest.raises(DataDependent, match=text):
            function(traced)


SHAPES: dict[str, tuple[Callable[[TracedTensor], Any], str]] = {
    "nonzero": (lambda h: h.nonzero(), "depends on the numbers"),
    "nonzero tuple": (lambda h: torch.where(h > 0), "depends on the numbers"),
    "argwhere": (lambda h: torch.argwhere(h), "depends on the numbers"),
    "unique": (lambda h: h.unique(), "depends on the numbers"),
    "unique_consecutive": (lambda h: h.unique_consecutive(), "depends on the numbers"),
    "masked_select": (lambda h: h.masked_select(h > 0), "depends on the numbers"),
    "bincount": (lambda h: torch.bincount(h.argmax(-1)[0]), "depends on the numbers"),
    "mask index": (lambda h: h[h > 0], r"torch\.where\(mask, h, 0\)"),
    "mask index of a constant": (lambda h: PLAIN[h > 0], r"torch\.where\(mask, h, 0\)"),
    "mask assignment": (
        lambda h: operator.setitem(h, h > 0, torch.ones(7)),
        "as many values as are true",
    ),
    "equal": (lambda h: torch.equal(h, h), r"\(a == b\)\.all\(\)\.save\(\)"),
    "allclose": (lambda h: torch.allclose(h, PLAIN), r"\(a == b\)\.all\(\)\.save\(\)"),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_that_depend_on_numbers(name: str, traced: TracedTensor) -> None:
    function, text = SHAPES[name]
    with pytest.raises(DataDependent, match=text):
        function(traced)


MEMORY: dict[str, tuple[Callable[[TracedTensor], Any], str]] = {
    "numpy": (lambda h: h.numpy(), "no memory here"),
    "numpy force": (lambda h: h.numpy(force=True), "no memory here"),
    "asarray": (lambda h: np.asarray(h), "no memory here"),
    "array beside": (lambda h: h + np.ones(8), r"beside it .* torch\.from_numpy\(array\)"),
    "reduce_ex": (lambda h: h.__reduce_ex__(4), "no memory here"),
    "torch.save": (lambda h: torch.save(h, io.BytesIO()), "no memory here"),
    "data_ptr": (lambda h: h.data_ptr(), "no memory here"),
    "storage": (lambda h: h.untyped_storage(), "no memory here"),
    "dlpack": (lambda h: torch.from_dlpack(h), "no memory here"),
    "share_memory_": (lambda h: h.share_memory_(), "no memory here"),
    "pin_memory": (lambda h: h.pin_memory(), "no memory here"),
    "apply_": (lambda h: h.apply_(lambda x: x), "run Python on every number"),
    "map_": (lambda h: h.map_(h, lambda x, y: x), "run Python on every number"),
    "as_strided": (lambda h: h.as_strided((2,), (1,)), "strides and storage"),
    "resize_": (lambda h: h.resize_(3), "strides and storage"),
    "set_": (lambda h: h.set_(), "strides and storage"),
    "view dtype": (lambda h: h.view(torch.int32), "strides and storage"),
    "data =": (lambda h: setattr(h, "data", PLAIN), r"h\.copy_\(value\)"),
    "expanded": (lambda h: h[:1].expand(3, 5, 8).add_(1), r"expand\(\).*\.clone\(\)"),
    "unfolded": (lambda h: h.unfold(1, 2, 1).zero_(), r"unfold\(\).*\.clone\(\)"),
    "overlap": (lambda h: h.view(-1)[1:].add_(h.view(-1)[:-1]), "share some of their memory"),
    "sparse constant": (lambda h: h[0] + torch.eye(5, 8).to_sparse(), r"\.to_dense\(\)"),
    "meta constant": (lambda h: h + torch.zeros(8, device="meta"), "no numbers to send"),
    "working memory": (
        lambda h: torch.native_layer_norm(h, (8,), None, None, 1e-5)[1] + 1,
        "result 1 of native_layer_norm is torch's own working memory",
    ),
}


@pytest.mark.parametrize("name", MEMORY)
def test_memory_does_not_exist(name: str, traced: TracedTensor) -> None:
    function, text = MEMORY[name]
    with pytest.raises(OutOfSight, match=r"^test_traced\.py:\d+: .*" + text):
        function(traced)


def add_into_plain(h: TracedTensor) -> None:
    destination = torch.zeros(2, 5, 8)
    destination += h


PLAIN_DESTINATIONS: dict[str, Callable[[TracedTensor], Any]] = {
    "setitem": lambda h: operator.setitem(torch.zeros(3, 8), 0, h[0, 0]),
    "setitem by index": lambda h: operator.setitem(torch.zeros(3, 8), torch.tensor([0]), h[0, :1]),
    "iadd": add_into_plain,
    "copy_": lambda h: torch.zeros(2, 5, 8).copy_(h),
    "fill_": lambda h: torch.zeros(2).fill_(h.sum()),
    "index_add_": lambda h: torch.zeros(2, 5, 8).index_add_(0, torch.tensor([0, 1]), h),
    "out=": lambda h: torch.add(h, 1, out=torch.zeros(2, 5, 8)),
}


@pytest.mark.parametrize("name", PLAIN_DESTINATIONS)
def test_plain_destinations(name: str, traced: TracedTensor) -> None:
    with pytest.raises(PlainDestination, match=r"h\.new_zeros\(shape\).*torch\.stack"):
        PLAIN_DESTINATIONS[name](traced)


MISFITS: dict[str, tuple[Callable[[TracedTensor], Any], str]] = {
    "matmul": (lambda h: h[0] @ torch.zeros(3, 2), r"mm\(float32\[5, 8\], float32\[3, 2\]\)"),
    "add": (lambda h: h + torch.zeros(3), r"add\(float32\[2, 5, 8\], float32\[3\]\)"),
    "cat": (lambda h: torch.cat([h, PLAIN[:, :, :2]], 1), "Sizes of tensors must match"),
    "view": (lambda h: h.transpose(0, 1).view(-1), "view size is not compatible"),
    "reshape": (lambda h: h.reshape(7), "invalid for input of size 80"),
    "broadcast over self": (lambda h: h[0].add_(h), "doesn't match the broadcast shape"),
    "int += float": (lambda h: h.argmax(-1).add_(0.5), "add_"),
    "matmul of dtypes": (
        lambda h: h @ torch.zeros(8, 2, dtype=torch.float64),
        r"one dtype, but got float32\[10, 8\] and float64\[8, 2\]; convert one with",
    ),
    "linear of dtypes": (lambda h: nn.Linear(8, 2)(h.bfloat16()), "one dtype"),
    "index_put of dtypes": (
        lambda h: operator.setitem(h, torch.tensor([0]), torch.zeros(5, 8).double()),
        "one dtype",
    ),
    "float index": (lambda h: h.index_select(0, torch.zeros(1)), "index of dtype int64, int32"),
    "index out of bounds": (
        lambda h: h[:, [0, 5]],
        "index 5 is out of bounds for axis 1 of size 5",
    ),
    "gather out of bounds": (
        lambda h: h.gather(2, torch.full((2, 5, 1), 8)),
        "index 8 is out of bounds for axis 2 of size 8",
    ),
    "mask that does not fit": (
        lambda h: h[torch.ones(2, 4, dtype=torch.bool)],
        r"mask of shape \[2, 4\] does not fit the axes \[2, 5\]",
    ),
    "out= of another shape": (lambda h: torch.add(h, 1, out=h[0]), "resize its destination"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_arguments_that_torch_refuses(name: str, traced: TracedTensor) -> None:
    function, text = MISFITS[name]
    with pytest.raises(Misfit, match=r"^test_traced\.py:\d+: .*" + text) as caught:
        function(traced)
    assert isinstance(caught.value, ShapeMismatch)


@pytest.mark.parametrize(
    ("kind", "call"),
    [
        (IndexError, lambda h: h[:, 9]),
        (ValueError, lambda h: h[::-1]),
        (RuntimeError, lambda h: torch.einsum("ij,kl", h)),
    ],
    ids=["index", "step", "einsum"],
)
def test_a_body_catches_what_it_catches_of_torch(
    kind: type[Exception], call: Callable[[Any], Any], traced: TracedTensor
) -> None:
    with pytest.raises(kind):  # the oracle
        call(torch.zeros(traced.shape))
    with pytest.raises(kind) as caught:
        call(traced)
    assert isinstance(caught.value, Misfit)


ABSENT: dict[str, tuple[Callable[[TracedTensor], Any], str]] = {
    "max_pool1d": (lambda h: nn.functional.max_pool1d(h, 2), "max_pool2d_with_indices"),
    "lstsq": (lambda h: torch.linalg.lstsq(h, h), "not in the table of ops that peers run"),
    "LSTM": (lambda h: nn.LSTM(8, 4)(h), "not in the table of ops that peers run"),
    "generator": (lambda h: h.bernoulli(generator=torch.Generator()), r"torch\.manual_seed"),
    "generator of rand": (
        lambda h: torch.rand_like(h, generator=torch.Generator()),
        r"torch\.manual_seed",
    ),
    "batch norm in training": (lambda h: nn.BatchNorm1d(5)(h), r"\.eval\(\)"),
    "complex128": (lambda h: h + torch.zeros(8, dtype=torch.complex128), "complex128"),
    "uint16": (lambda h: h.to(torch.uint16), "uint16 cannot stand in a graph"),
    "uint16 number": (lambda h: h + torch.tensor(1, dtype=torch.uint16), "uint16"),
    "complex number": (
        lambda h: h.double() * 1j,
        r"got 1j for b; .* is wanted; make a tensor of it, torch\.tensor\(1j\)",
    ),
    "cdist by another way": (
        lambda h: torch.cdist(h, h, compute_mode="use_mm_for_euclid_dist"),
        "cdist with compute_mode= cannot be traced; leave it out",
    ),
    "another library": (lambda h: torch.ops.prims.sin(h), "an op of another library"),
    "to sparse": (lambda h: h.to_sparse(), "not in the table"),
}


@pytest.mark.parametrize("name", ABSENT)
def test_functions_outside_the_table(name: str, traced: TracedTensor) -> None:
    function, text = ABSENT[name]
    with pytest.raises(NotInTable, match=r"^test_traced\.py:\d+: .*" + text) as caught:
        function(traced)
    assert isinstance(caught.value, UnknownOp)


PARTS: dict[str, tuple[Callable[[TracedTensor], Any], str]] = {
    "past the end": (
        lambda h: h[:, 9],
        r"index 9 is out of bounds for dimension 1 with size 5, in float32\[2, 5, 8\]; indices "
        "count from 0 at the start of an axis, or from -1 at its end",
    ),
    "past the end, assigned": (
        lambda h: operator.setitem(h, (0, 9), 0),
        "index 9 is out of bounds",
    ),
    "too many": (lambda h: h[0, 0, 0, 0], r"too many indices .* in float32\[2, 5, 8\]"),
    "a word": (
        lambda h: operator.setitem(h, (..., "a"), 1),
        r"float32\[2, 5, 8\] is indexed by ellipsis and str \(.*\); integers, slices of integers, "
        r"\.\.\., None, and tensors or lists of integers or bools can stand there",
    ),
    "a float": (lambda h: h[:, 1.5], "is indexed by slice and float"),
    "a slice of words": (lambda h: h["a":"b"], "is indexed by slice"),
    "backwards": (lambda h: h[::-1], r"step must be greater than zero.*\.flip\(dim\)"),
    "another shape": (
        lambda h: operator.setitem(h, (0, 0), torch.ones(3)),
        r"float32\[3\] does not fit the part of float32\[2, 5, 8\] that it is assigned to: .* must "
        r"match the existing size \(3\).*give what broadcasts to it",
    ),
    "a list assigned": (
        lambda h: operator.setitem(h, 0, [1, 2]),
        r"a list is assigned to a part of float32\[2, 5, 8\]; a tensor or a number is wanted, such "
        r"as torch\.tensor\(value\)",
    ),
    "einsum": (
        lambda h: torch.einsum("bsd,de->bse", h, torch.ones(3, 3)),
        r"einsum of float32\[2, 5, 8\]: .*has size 3 for operand 1",
    ),
    "an array assigned": (
        lambda h: operator.setitem(h, 0, np.ones(8)),
        r"a ndarray is assigned to a part of float32\[2, 5, 8\]; a tensor or a number is wanted; "
        r"torch\.from_numpy\(array\) makes a tensor of a NumPy array$",
    ),
    "None assigned": (lambda h: operator.setitem(h, 0, None), "a NoneType is assigned to a part"),
}


@pytest.mark.parametrize("name", PARTS)
def test_parts_that_are_not_there(name: str, traced: TracedTensor) -> None:
    function, text = PARTS[name]
    with pytest.raises(Misfit, match=r"^test_traced\.py:\d+: .*" + text):
        function(traced)


def test_the_shape_of_what_stands_in_the_model_stays(traced: TracedTensor) -> None:
    traced._alias.cell.site = Site("m0", "output")
    text = (
        r"the shape of float32\[5, 8\] of m0\.output, which the model uses; .*unsqueeze\(\.\.\.\)"
    )
    with pytest.raises(OutOfSight, match=text):
        traced[0].unsqueeze_(0)


@pytest.mark.parametrize("name", ["backward", "grad", "register_hook", "retain_grad"])
def test_gradients_are_not_there_yet(name: str, traced: TracedTensor) -> None:
    with pytest.raises(NotYet, match=r"^test_traced\.py:\d+: gradients"):
        getattr(traced, name)()


# Ambient state -----------------------------------------------------------------------------------


def test_inference_mode_inside_is_an_error(traced: TracedTensor) -> None:
    with torch.inference_mode(), pytest.raises(AmbientState, match="inference_mode"):
        traced + 1


def test_enable_grad_inside_is_an_error(traced: TracedTensor) -> None:
    with torch.enable_grad(), pytest.raises(AmbientState, match="enable_grad"):
        traced + 1


def test_another_thread_is_an_error(traced: TracedTensor) -> None:
    seen: list[Exception] = []

    def add() -> None:
        try:
            traced + 1
        except AmbientState as error:
            seen.append(error)

    thread = threading.Thread(target=add)
    thread.start()
    thread.join(timeout=10)
    assert "another thread" in str(seen[0])


@pytest.mark.parametrize("function", [lambda h: h @ PLAIN.mT, lambda h: nn.Linear(8, 2)(h)])
@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_autocast_of_another_device_is_an_error(function: Any, traced: TracedTensor) -> None:
    with torch.autocast("cuda"), pytest.raises(AmbientState, match=r"torch\.autocast\('cpu'\)"):
        function(traced)
    with torch.autocast("cpu"):
        assert function(traced).dtype == torch.bfloat16


def test_a_trace_inside_autocast_of_another_device_is_an_error() -> None:
    torch.set_autocast_enabled("cuda", True)
    try:
        with pytest.raises(AmbientState, match=r"autocast\('cuda'\)"), recording(Recorder()):
            pass
    finally:
        torch.set_autocast_enabled("cuda", False)


def test_another_default_dtype_is_an_error() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        with pytest.raises(AmbientState, match="set_default_dtype"), recording(Recorder()):
            pass
    finally:
        torch.set_default_dtype(torch.float32)


def test_recording_leaves_inference_mode_and_gradients(h: Tensor) -> None:
    recorder = Recorder()
    with torch.inference_mode():
        made_inside = torch.ones(8)
        with recording(recorder):
            assert not torch.is_inference_mode_enabled()
            assert not torch.is_grad_enabled()
            assert not torch.backends.mha.get_fastpath_enabled()
            assert active_recorder() is recorder
            recorder.value(recorder.traced(recorder.const(h), spec_of(h)) * made_inside)
        assert torch.is_inference_mode_enabled()
    assert active_recorder() is None
    assert torch.is_grad_enabled()
    assert torch.backends.mha.get_fastpath_enabled()


def test_traces_do_not_nest_or_mix(session: Start, h: Tensor) -> None:
    first = session(h).traced[0]
    with pytest.raises(TraceError, match="a trace is open already"), recording(Recorder()):
        pass
    other = Recorder()
    other.is_open = True
    foreign = other.traced(other.const(h), spec_of(h))
    with pytest.raises(TraceError, match="values of two traces meet"):
        first + foreign
    with pytest.raises(TraceError, match="values of two traces meet"):
        first._alias.cell.recorder.value(foreign)


# Constants ---------------------------------------------------------------------------------------


def consts_of(recorder: Recorder) -> list[Const]:
    return [node for node in recorder.nodes.values() if isinstance(node, Const)]


def test_equal_constants_are_one(traced: TracedTensor) -> None:
    recorder = traced._alias.cell.recorder
    direction = torch.arange(8.0)
    traced + direction
    traced * direction.clone()
    assert len(consts_of(recorder)) == 1
    direction += 1
    traced + direction
    assert len(consts_of(recorder)) == 2


def test_constants_that_differ_only_in_bits_are_two(traced: TracedTensor) -> None:
    recorder = traced._alias.cell.recorder
    direction = torch.zeros(8)
    traced + direction
    direction.neg_()  # -0.0
    traced + direction
    direction[0] = math.nan
    traced + direction
    traced + direction
    assert len(consts_of(recorder)) == 3


def test_a_transposed_weight_is_one_constant_and_a_view(traced: TracedTensor) -> None:
    recorder = traced._alias.cell.recorder
    weight = torch.randn(3, 8)
    torch.nn.functional.linear(traced, weight)
    torch.nn.functional.linear(traced, weight)
    (constant,) = consts_of(recorder)
    assert constant.shape == (3, 8)
    assert ops_of(recorder).count("permute") == 1


def test_a_number_is_no_constant(traced: TracedTensor) -> None:
    recorder = traced._alias.cell.recorder
    traced * torch.tensor(2.0, dtype=torch.float64)
    assert not consts_of(recorder)
    (full,) = (n for n in recorder.nodes.values() if isinstance(n, Op) and n.name == "full")
    assert full.args[:2] == ((), 2.0)


def test_equal_numbers_of_other_types_are_told_apart(traced: TracedTensor) -> None:
    recorder = traced._alias.cell.recorder
    for number in (1, 1.0, True, 0.0, -0.0, math.nan):
        traced * number
    last = [n.args[1] for n in recorder.nodes.values() if isinstance(n, Op) and n.name == "mul"]
    assert [str(number) for number in last] == ["1", "1.0", "True", "0.0", "-0.0", "nan"]


# Random numbers ----------------------------------------------------------------------------------


def test_seeds_follow_torchs_own_generator(session: Start, h: Tensor) -> None:
    traced = session(h).traced[0]
    recorder = traced._alias.cell.recorder

    def seed() -> Any:
        traced.bernoulli()
        node = list(recorder.nodes.values())[-1]
        assert isinstance(node, Op)
        return node.args[-1]

    torch.manual_seed(5)
    first, second = seed(), seed()
    torch.manual_seed(5)
    assert (seed(), seed()) == (first, second)
    assert first != second


# Lines -------------------------------------------------------------------------------------------


def test_every_node_knows_the_users_line(traced: TracedTensor) -> None:
    recorder = traced._alias.cell.recorder
    module = nn.Sequential(nn.Linear(8, 8), nn.GELU())
    line = test_every_node_knows_the_users_line.__code__.co_firstlineno + 4
    module(traced)
    where = {str(recorder.line_of(node)) for node in list(recorder.nodes)[1:]}
    assert where == {f"test_traced.py:{line}"}


def test_values_know_what_they_depend_on(h: Tensor) -> None:
    recorder = Recorder(merge=lambda infos: frozenset().union(*infos))
    with recording(recorder):
        spec = spec_of(h)
        a = recorder.tensor_of(
            recorder.new_cell(recorder.add(Op("clone", ()), frozenset("a")), spec)
        )
        b = recorder.tensor_of(
            recorder.new_cell(recorder.add(Op("clone", ()), frozenset("b")), spec)
        )
        total = a + torch.ones(8)
        assert recorder.value_info[recorder.value(total)] == {"a"}
        total[:, 0] = b[:, 1]
        assert recorder.value_info[recorder.value(total)] == {"a", "b"}
        assert recorder.value_info[recorder.value(total[:, 0])] == {"b"}
        total[:] = b
        assert recorder.value_info[recorder.value(total)] == {"b"}
        assert recorder.value_info[recorder.value(torch.zeros_like(a))] == frozenset()


def test_copies_are_copies(traced: TracedTensor) -> None:
    twin, (first, second) = copy.deepcopy(traced), copy.deepcopy([traced, traced])
    assert first is second
    assert twin._alias.cell is not traced._alias.cell
    assert copy.copy(traced)._alias.cell is traced._alias.cell


# After the block ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "use",
    [
        lambda h: h + 1,
        lambda h: h[0],
        lambda h: h.numpy(),
        lambda h: h.item(),
        lambda h: bool(h),
        lambda h: h.to("cuda"),
        lambda h: h.save(),
        lambda h: torch.stack([torch.zeros(2, 5, 8), h]),
        lambda h: h.grad,
        lambda h: torch.zeros(2, 5, 8).copy_(h),
    ],
)
def test_an_unsaved_value_names_save(use: Callable[[Tensor], Any], h: Tensor) -> None:
    recorder = Recorder()
    with recording(recorder):
        traced = recorder.traced(recorder.const(h), spec_of(h))
    with pytest.raises(
        NotSaved,
        match=r"^test_traced\.py:\d+: the value float32\[2, 5, 8\], made at test_traced\.py:\d+ in "
        r"a trace, was not saved, .*call \.save\(\)",
    ):
        use(traced)
    assert repr(traced) == "<not saved tensor float32[2, 5, 8]>"
    assert traced.shape == (2, 5, 8)


def test_what_plain_tensors_raise_in_a_trace_stays_as_it_is(traced: TracedTensor) -> None:
    with pytest.raises(IndexError, match="index 9 is out of bounds"):
        PLAIN[9]
    with pytest.raises(RuntimeError, match="must match the existing size"):
        PLAIN.clone()[0] = torch.ones(3)
