"""What researchers write on activations, recorded and interpreted, against torch itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import einops
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

GENERATOR = torch.Generator().manual_seed(11)


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR)


V8 = rand(8)
W = rand(8, 6)
IDS = torch.tensor([[1, 0, 4, 2, 2], [3, 3, 0, 1, 4]])
MASK = torch.tensor([[True, True, False, True, False], [False, True, True, True, True]])
LABELS = torch.tensor([[1, 2, 7, 0, 3], [5, 5, 1, 6, 2]])


class SAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Parameter(rand(8, 16))
        self.decoder = nn.Parameter(rand(16, 8))
        self.bias = nn.Parameter(rand(16))
        self.threshold = nn.Parameter(rand(16).abs())

    def encode(self, x: Tensor) -> Tensor:
        pre = x @ self.encoder + self.bias
        return pre * (pre > self.threshold)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        acts = self.encode(x)
        return acts @ self.decoder, acts


class LoRA(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 2, bias=False)
        self.b = nn.Linear(2, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.5 * self.b(self.a(x))


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (x > 0).float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def frozen(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=GENERATOR))
    return module.eval()


SAE_MODULE = frozen(SAE())
LORA = frozen(LoRA())
MLP = frozen(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.5), nn.Linear(16, 8)))
MHA = frozen(nn.MultiheadAttention(8, 2, batch_first=True))
LAYER = frozen(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
NORMED = frozen(nn.Sequential(nn.LayerNorm(8), nn.RMSNorm(8), nn.Linear(8, 8), nn.Softplus()))
BATCHED = frozen(nn.BatchNorm1d(5))
GROUPED = frozen(nn.GroupNorm(1, 5))
CONV = frozen(nn.Conv1d(5, 3, 3, padding=1))


def assign(h: Tensor, index: Any, value: Any) -> Tensor:
    h[index] = value
    return h


def also(h: Tensor, *_: Any) -> Tensor:
    return h


def attention(h: Tensor, **kwargs: Any) -> Tensor:
    q = h.view(2, 5, 2, 4).transpose(1, 2)
    return F.scaled_dot_product_attention(q, q * 2, q + 1, **kwargs)


def grouped_attention(h: Tensor) -> Tensor:
    q = h.view(2, 5, 4, 2).transpose(1, 2)
    return F.scaled_dot_product_attention(q, q[:, :2], q[:, 2:], is_causal=True, enable_gqa=True)


def augmented(h: Tensor) -> list[Tensor]:
    n = (h * 4).long()
    n &= 3
    n |= 4
    n ^= 1
    n <<= 1
    n >>= 1
    n //= 2
    n %= 5
    n += 1
    n *= 2
    n -= 1
    n **= 2
    h /= 2
    h **= 2
    h %= 1.5
    h //= 0.3
    return [n, h]


def in_place_chain(h: Tensor) -> Tensor:
    row = h.transpose(1, 2)[:, 3]
    row += 1
    row[0].mul_(2)
    h[:, 1:3, ::2] -= 0.5
    return h.sum(-1)


def alias_pair(h: Tensor) -> list[Tensor]:
    first = h[:, 0]
    both = first.unsqueeze(1)
    both.zero_()
    return [first, both, h]


def heads(h: Tensor) -> Tensor:
    by_head = h.view(2, 5, 4, 2)
    by_head[:, :, 1] = 0
    return h


def heads_einops(h: Tensor) -> Tensor:
    by_head = einops.rearrange(h, "b s (n d) -> b n s d", n=4)
    scores = einops.einsum(by_head, by_head, "b n i d, b n j d -> b n i j")
    return einops.rearrange(scores.softmax(-1) @ by_head, "b n s d -> b s (n d)")


def reshape_copies(h: Tensor) -> list[Tensor]:
    flat = h.transpose(0, 1).reshape(10, 8)  # not a view: h must not change
    flat += 1
    shared = h.reshape(10, 8)  # a view: h must change
    shared += 2
    return [flat, h]


def loop_steer(h: Tensor) -> Tensor:
    for scale in (0.5, 1.0, -2.0):
        h = h + scale * V8
    return h


def by_rows(h: Tensor) -> Tensor:
    return torch.stack([row.mean(0) * index for index, row in enumerate(h)])


def buffer(h: Tensor) -> Tensor:
    out = h.new_zeros(3, 8)
    for index in range(3):
        out[index] = h[0, index]
    return out


def patched(h: Tensor) -> Tensor:
    clean, corrupted = h[0], h[1].clone()
    corrupted[2:4] = clean[2:4]
    return corrupted


def const_changes(h: Tensor) -> list[Tensor]:
    direction = V8.clone()
    first = h * direction
    direction.add_(1)
    second = h * direction
    direction.data[:] = 0
    return [first, second, h * direction]


def numpy_constant(h: Tensor) -> list[Tensor]:
    array = V8.clone().numpy()
    shared = torch.from_numpy(array)
    first = h * shared
    array[:] = 2
    return [first, h * shared]


def project_out(h: Tensor) -> Tensor:
    unit = V8 / V8.norm()
    return h - (h @ unit)[..., None] * unit


def out_argument(h: Tensor) -> list[Tensor]:
    destination = torch.empty_like(h)
    torch.add(h, 1, out=destination)
    torch.mul(h, h, out=h[:])
    return [destination, h]


def whole_assign(h: Tensor) -> Tensor:
    h[:] = V8
    return h


def swap_rows(h: Tensor) -> Tensor:
    h[[0, 1]] = h[[1, 0]]
    return h


def iterate(h: Tensor) -> list[Tensor]:
    return [a - b for a, b in zip(h[0], h[1], strict=True)]


def diag_edit(h: Tensor) -> Tensor:
    torch.diagonal(h, dim1=1, dim2=2).fill_(3)
    return h


def split_edit(h: Tensor) -> Tensor:
    left, right = h.split([3, 5], dim=-1)
    left.zero_()
    right.copy_(right.flip(-1))
    first, *_ = h.chunk(5, dim=1)
    first.neg_()
    h.unbind(0)[1].add_(1)
    return h


def masked_edit(h: Tensor) -> Tensor:
    h[h > 0.5] = 0
    return h


def data_edit(h: Tensor) -> Tensor:
    h.data[:, 0] = 7
    h.detach()[:, 1] = 8
    return h


def self_shift(h: Tensor) -> Tensor:
    h[:, 1:] = h[:, :-1].clone()
    return h


def topk_mask(h: Tensor) -> Tensor:
    values, indices = h.topk(3, dim=-1)
    return torch.zeros_like(h).scatter(-1, indices, values.relu())


def mean_ablate(h: Tensor) -> Tensor:
    h[:, 2, :] = h.mean(dim=(0, 1))
    return h


def cross_entropy(h: Tensor) -> list[Tensor]:
    flat, labels = h.reshape(-1, 8), LABELS.reshape(-1)
    return [
        F.cross_entropy(flat, labels),
        F.cross_entropy(flat, labels, reduction="none", label_smoothing=0.1),
        F.cross_entropy(h.transpose(1, 2), LABELS, ignore_index=2),
        -F.log_softmax(h, -1).gather(-1, LABELS[..., None])[..., 0],
    ]


def autocast(h: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return h @ W


def deep(h: Tensor) -> list[Tensor]:
    import copy

    twin = copy.deepcopy(h)
    twin += 1
    shallow = copy.copy(h)
    shallow *= 2
    return [twin, shallow, h]


def parameter(h: Tensor) -> Tensor:
    return nn.Parameter(h[0], requires_grad=False) * 2


def functional_zoo(h: Tensor) -> list[Tensor]:
    names = "relu gelu silu elu selu celu mish hardswish hardsigmoid softsign softplus tanhshrink "
    names += "logsigmoid leaky_relu hardtanh relu6 sigmoid tanh hardshrink softshrink glu"
    return [getattr(F, name)(h) for name in names.split()]


def unary_zoo(h: Tensor) -> list[Tensor]:
    names = "abs neg exp exp2 expm1 sin cos tan sinh cosh tanh asinh atan erf erfc sigmoid sign "
    names += "sgn ceil floor trunc round frac square isnan isinf isfinite isposinf isneginf "
    names += "signbit rad2deg deg2rad logical_not positive sinc i0 nan_to_num isreal"
    positive = "sqrt rsqrt log log2 log10 log1p reciprocal lgamma digamma"
    return [
        *(getattr(torch, name)(h) for name in names.split()),
        *(getattr(torch, name)(h.abs() + 0.1) for name in positive.split()),
        *(getattr(torch, name)(h.clamp(-0.9, 0.9)) for name in ["acos", "asin", "atanh", "erfinv"]),
        torch.acosh(h.abs() + 1),
        torch.logit(h.sigmoid(), 1e-6),
        h.round(decimals=1),
    ]


def binary_zoo(h: Tensor) -> list[Tensor]:
    a, b = h[0], h[1]
    names = "add sub mul div maximum minimum fmax fmin atan2 hypot logaddexp logaddexp2 "
    names += "eq ne lt le gt ge remainder fmod copysign true_divide floor_divide isclose "
    names += "logical_and logical_or logical_xor xlogy"
    return [getattr(torch, name)(a, b) for name in names.split()]


def integer_zoo(h: Tensor) -> list[Tensor]:
    n = (h * 4).to(torch.int64)
    m = n.abs() % 5
    return [
        n & m, n | m, n ^ m, ~n, n << 1, n >> 1, 3 & n, n // 2, n % 3, -n % 3, n / 2, n**2, 2**m,
        n == m, n.float(), n.bool(), n.to(torch.int8), n.half(), n.sum(), n.cumsum(1), n.max(),
        m.to(torch.uint8), n.clamp(min=0), n.abs(), torch.div(n, 3),
        torch.div(n, 3, rounding_mode="trunc"), n + 1.5, n * True, 7 - n, n.double(),
        n.argsort(-1),
    ]  # fmt: skip


def scalar_zoo(h: Tensor) -> list[Tensor]:
    return [
        h + 1, 1 + h, h - 2.5, 2.5 - h, h * True, h / 3, 3 / h, h // 2, h % 2, 2 % (h.abs() + 1),
        h**2, h**0.5, 2**h, h**-1, -h, +h, abs(h), h > 0, h >= 0.1, h == 0, h != 0, h < 0.5,
        h + torch.tensor(2.0), h * torch.tensor(2, dtype=torch.int64), h.add(1, alpha=3),
        h + torch.tensor(2.0, dtype=torch.float64), h.half() + torch.tensor(1.0), h * -0.0,
        h * 0.0, torch.rsub(h, h, alpha=2), h.sub(h, alpha=0.5), h * float("inf"),
    ]  # fmt: skip


def reduce_zoo(h: Tensor) -> list[Any]:
    return [
        h.sum(), h.sum(-1), h.sum((0, 2), keepdim=True), h.mean(), h.mean(1), h.prod(), h.prod(1),
        h.std(), h.std(-1), h.var(dim=1, unbiased=False), torch.var_mean(h, -1), h.max(), h.min(),
        h.max(-1), h.min(1, keepdim=True), h.amax(-1), h.amin((0, 1)), h.argmax(), h.argmax(-1),
        h.argmin(0, keepdim=True), h.median(), h.median(-1), h.mode(-1), h.logsumexp(-1),
        h.norm(), h.norm(dim=-1), h.norm(p=1, dim=-1), torch.linalg.norm(h, dim=-1),
        torch.linalg.vector_norm(h, 3, dim=(1, 2)), h.cumsum(1), h.cumprod(-1), h.cummax(1),
        h.cummin(-1), h.logcumsumexp(1), (h > 0).all(), (h > 0).any(-1), (h > 0).all((0, 1)),
        (h > 0).sum(), (h > 0).float().mean(), h.count_nonzero(), h.count_nonzero(-1), h.nansum(),
        h.kthvalue(2), h.nanmedian(), torch.aminmax(h, dim=-1), h.sum(dtype=torch.float64),
        h.diff(dim=1), torch.std_mean(h), torch.trace(h[0]), h.nanmean(), h.any(),
        torch.dist(h[0], h[1]), h.sum([]), h.renorm(2, 0, 1.0),
    ]  # fmt: skip


def sort_zoo(h: Tensor) -> list[Any]:
    return [
        h.sort(), h.sort(1, descending=True), h.argsort(-1), h.topk(2),
        h.topk(2, 1, largest=False), torch.sort(h, stable=True, dim=-1), h.msort(),
        torch.argsort(h, stable=True), torch.searchsorted(h.sort().values, h),
        torch.bucketize(h, torch.tensor([-1.0, 0.0, 1.0])),
        torch.searchsorted(torch.tensor([-1.0, 0.0, 1.0]), h, right=True, out_int32=True),
        torch.isin(LABELS, (h[0] * 3).long()), torch.isin((h * 3).long(), LABELS),
        torch.bucketize(0.5, h[0, 0].sort().values), torch.histc(h, 4, -2, 2),
    ]  # fmt: skip


def shape_zoo(h: Tensor) -> list[Any]:
    return [
        h.view(10, 8), h.view(2, -1), h.reshape(5, 16), h.flatten(), h.flatten(1),
        h.unflatten(2, (2, 4)), h.unsqueeze(0), h[None].squeeze(0), h.squeeze(),
        h.permute(2, 0, 1), h.transpose(0, -1), h[0].T, h.mT, h[0].t(), h.movedim(0, -1),
        h.swapaxes(0, 1), h.expand(3, 2, 5, 8), h.expand_as(h), h.repeat(1, 2, 1), h.tile(2),
        h.repeat_interleave(2, dim=1), h.roll(1, 1), h.roll((1, 2), (0, 1)), h.flip(0),
        h.flip((1, 2)), h.fliplr(), h.narrow(1, 1, 2), h.select(1, -1), h.chunk(2, -1),
        h.split(2, 1), h.tensor_split(3, 2), h.unbind(1), torch.cat([h, h], 1),
        torch.stack([h, h], -1), torch.vstack([h, h]), torch.hstack((h, h)), h.unfold(1, 2, 1),
        h.unfold(1, 2, 2), h.diagonal(dim1=1, dim2=2), torch.diag_embed(h), h.tril(), h.triu(1),
        torch.broadcast_to(h[:, :1], (2, 5, 8)), h[0].diag(), h.view_as(h), h.contiguous(),
        h.clone(), F.pad(h, (1, 2)), F.pad(h, (0, 0, 1, 1), value=9.0), torch.atleast_3d(h[0]),
        torch.meshgrid(h[0, 0], h[0, 1], indexing="ij"), 
        h.take_along_dim(LABELS[..., None], -1), h.ravel(), h.adjoint(),
        torch.cartesian_prod(h[0, 0], h[0, 1]), h.to(torch.float64), h.type(torch.float16),
        h.float(), h.bfloat16(), h.type("torch.DoubleTensor"), h.to(V8),
        h.to("cpu", torch.float64), h.cpu(), h.to(torch.float32, copy=True), h[:0],
    ]  # fmt: skip


def new_zoo(h: Tensor) -> list[Tensor]:
    return [
        torch.zeros_like(h), torch.ones_like(h), torch.full_like(h, 2),
        torch.empty_like(h).fill_(4),
        h.new_zeros(3), h.new_ones(2, 2), h.new_full((2,), 7),
        h.new_tensor([1.0, 2.0]) + h[0, 0, :2], torch.zeros_like(h, dtype=torch.int64),
        torch.arange(5) + h[..., 0], h.new_empty(2).fill_(3), torch.zeros(8, device=h.device) + h,
        torch.eye(5, dtype=h.dtype) @ h, torch.full_like(h, True),
    ]  # fmt: skip


def index_zoo(h: Tensor) -> list[Tensor]:
    index = torch.tensor([0, 2, 2])
    return [
        h[0], h[-1], h[:, 0], h[..., -1], h[:, ::2], h[:, 1:-1, 2:6:3], h[None], h[:, None],
        h[0, 1, 2], h[:, index], h[:, [0, 1]], h[torch.arange(2), torch.tensor([1, 3])], h[MASK],
        h[:, MASK[0]], h[[1, 0]], h[torch.arange(2)[:, None], IDS], h[:, index, :2],
        h[[0], :, [1]], h.index_select(1, index), h.gather(1, IDS[..., None]), h.take(IDS),
        h[..., index], h[:, torch.tensor(2)], h[True], h[MASK, 0], h[(h[:, 0].argmax(-1) % 2)],
        h[:, h[0, 0].argsort()[:3] % 5], h[slice(0, 1)], h[:, -1:], torch.where(h > 0, h, 0),
        torch.where(MASK[..., None], h, V8), torch.where(h > 0, 1.0, h),
        h.masked_fill(MASK[..., None], 0.5), h.masked_fill(h > 0, V8[0]), h.where(h > 0, -h),
        h.masked_scatter(MASK[..., None], V8.repeat(10)), h.scatter(1, IDS[..., None], 1.5),
        h.scatter(1, IDS[..., None], h * 2), h.scatter_add(1, IDS[..., None], h),
        h.scatter_reduce(1, IDS[..., None].expand(2, 5, 8), h, "amax"),
        h.index_add(1, index, h[:, :3]), h.index_copy(1, torch.tensor([0, 4]), h[:, 1:3]),
        h.index_fill(1, index, 3.0),
        h.index_put((torch.tensor([0, 1]), torch.tensor([2, 3])), V8), h.put(IDS, h[:, :, 0]),
        F.embedding(IDS, h[0]), F.one_hot((h[0, 0].abs() * 2).long(), 12),
        h.slice_scatter(h[:, :2], 1, 3), h.select_scatter(h[:, 0], 1, 2),
        h.diagonal_scatter(torch.zeros(2, 5), dim1=1, dim2=2),
        h.scatter(1, IDS[..., None], 2.0, reduce="multiply"),
    ]  # fmt: skip


def matrix_zoo(h: Tensor) -> list[Any]:
    square = h[0, :5, :5]
    definite = square @ square.T + 5 * torch.eye(5)
    return [
        h @ W, h @ h.mT, h.matmul(V8), V8 @ h.mT, torch.bmm(h, h.mT), torch.mm(h[0], W),
        torch.mv(h[0], V8), torch.dot(h[0, 0], V8), torch.einsum("bsd,dk->bsk", h, W),
        torch.einsum("bsd,btd->bst", h, h), torch.einsum("bsd,d->bs", h, V8),
        torch.outer(V8, h[0, 0]), torch.addmm(rand(1), h[0], W) * 0,
        torch.baddbmm(torch.ones(2, 5, 5), h, h.mT, beta=0.5), torch.inner(h, V8),
        torch.kron(h[0], square), F.linear(h, W.T), F.linear(h, W.T, V8[:6]),
        F.cosine_similarity(h[0], h[1], dim=-1), torch.cdist(h, h), torch.cdist(h, h, p=1),
        torch.linalg.inv(definite), torch.linalg.det(definite), torch.linalg.slogdet(definite),
        torch.linalg.solve(definite, h[0]), torch.linalg.cholesky(definite),
        torch.linalg.qr(square), torch.linalg.eigh(definite)[0], torch.linalg.svd(square)[1],
        torch.linalg.pinv(square), torch.linalg.matrix_norm(square),
        torch.linalg.svdvals(square), torch.linalg.eigvalsh(definite),
        torch.linalg.eigvalsh(definite, "U"), torch.svd(square, compute_uv=False)[1],
        torch.linalg.matrix_norm(square, 2), torch.linalg.matrix_norm(square, "nuc"),
        torch.linalg.cond(square), torch.linalg.matrix_rank(square),
        torch.linalg.cross(h[0, :, :3], h[1, :, :3]),
        torch.linalg.solve_triangular(definite, h[0], upper=True), torch.tensordot(h, W, dims=1),
        torch.vdot(V8, h[0, 0]), torch.addmv(V8[:5], h[0], V8), torch.trapezoid(h),
        torch.corrcoef(h[0]), torch.cov(h[0]), torch.addr(torch.zeros(5, 8), h[0, :, 0], V8),
        torch.linalg.multi_dot([h[0], W, W.T]), torch.matrix_power(square, 3),
        F.normalize(h, dim=-1), torch.addcmul(h, h, h, value=0.1),
        torch.addcdiv(h, h, h.abs() + 1), torch.lerp(h[0], h[1], 0.3),
        torch.lerp(h[0], h[1], h[1].sigmoid()), h.clamp(-1, 1), h.clamp(min=0), h.clamp(max=V8),
        h.clip(0), torch.clamp_min(h, 0.1), torch.clamp(h, h - 1, h * 2),
        torch.polar(h.abs(), h).abs(), h * 1j, 2j - h, (h * 1j) / (3 + 1j), h + (1 - 2j),
        h.quantile(0.3), h.quantile(torch.tensor([0.1, 0.5]), dim=-1),
        torch.nanquantile(h, 0.5, dim=0, keepdim=True), (h * 2).unsqueeze_(0),
        h.mul(2).transpose_(0, 1).add_(1), h[0].clone().t_(), h[:1].clone().squeeze_(),
    ]  # fmt: skip


def loss_zoo(h: Tensor) -> list[Tensor]:
    a, b = h[0], h[1]
    return [
        F.mse_loss(a, b), F.mse_loss(a, b, reduction="none"), F.l1_loss(a, b),
        F.smooth_l1_loss(a, b), F.huber_loss(a, b, delta=0.5),
        F.kl_div(a.log_softmax(-1), b.softmax(-1), reduction="batchmean"),
        F.kl_div(a.log_softmax(-1), b.log_softmax(-1), log_target=True, reduction="sum"),
        F.binary_cross_entropy(a.sigmoid(), b.sigmoid()),
        F.binary_cross_entropy_with_logits(a, b.sigmoid()),
        F.nll_loss(a.log_softmax(-1), LABELS[0]), F.soft_margin_loss(a, b.sign()),
        F.cosine_embedding_loss(a, b, torch.ones(5)), F.pairwise_distance(a, b),
        F.margin_ranking_loss(a, b, b.sign()), F.triplet_margin_loss(a, b, a * 2),
        F.hinge_embedding_loss(a, b.sign()), F.poisson_nll_loss(a, b.abs()),
    ]  # fmt: skip


def fourier(h: Tensor) -> list[Tensor]:
    spectrum = torch.fft.rfft(h)
    spectrum[..., 1] = 0
    return [
        torch.fft.fft(h).abs(),
        torch.fft.irfft(spectrum, n=8),
        torch.fft.fft2(h).real,
        spectrum.imag,
        torch.view_as_real(spectrum),
        torch.fft.ifft(torch.fft.fft(h)).real,
        spectrum.conj().angle(),
    ]


def rotary(h: Tensor) -> Tensor:
    angles = torch.arange(5)[:, None] * torch.tensor([1.0, 0.1, 0.01, 0.001])
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
    half = torch.cat((-h[..., 4:], h[..., :4]), dim=-1)
    return h * cos + half * sin


CORPUS: dict[str, Callable[[Tensor], Any]] = {
    "save nothing": lambda h: h,
    "steer": lambda h: h + 3.0 * V8,
    "steer in place": lambda h: h.add_(V8, alpha=2),
    "steer last token": lambda h: assign(h, (slice(None), -1), h[:, -1] + V8),
    "ablate": lambda h: assign(h, slice(None), 0),
    "ablate position": lambda h: assign(h, (slice(None), 2), 0.0),
    "ablate features": lambda h: assign(h, (..., [1, 5]), 0),
    "ablate by bool list": lambda h: assign(h, (..., V8 > 0), -1.0),
    "ablate by mask": lambda h: assign(h, MASK, 0),
    "ablate by mask, a vector": lambda h: assign(h, MASK, V8),
    "ablate by traced mask": lambda h: assign(h, h.sum(-1) > 0, 0),
    "ablate by traced mask, a vector": lambda h: assign(h, h.sum(-1) > 0, V8),
    "traced full mask": masked_edit,
    "mean ablate": mean_ablate,
    "whole assign": whole_assign,
    "swap rows": swap_rows,
    "project out": project_out,
    "patch": patched,
    "head ablation by view": heads,
    "heads by einops": heads_einops,
    "einops reduce": lambda h: einops.reduce(h, "b s d -> b d", "mean"),
    "einops repeat": lambda h: einops.repeat(h, "b s d -> b r s d", r=3),
    "in-place chain": in_place_chain,
    "aliases": alias_pair,
    "reshape copies or shares": reshape_copies,
    "iterate": iterate,
    "loop": loop_steer,
    "rows": by_rows,
    "own buffer": buffer,
    "constant changes": const_changes,
    "numpy constant": numpy_constant,
    "out=": out_argument,
    "diagonal edit": diag_edit,
    "split edit": split_edit,
    "data edit": data_edit,
    "shift": self_shift,
    "top-k mask": topk_mask,
    "SAE": lambda h: SAE_MODULE(h),
    "SAE splice": lambda h: assign(h, slice(None), SAE_MODULE(h)[0] + (h - SAE_MODULE(h)[0])),
    "SAE feature clamp": lambda h: assign(SAE_MODULE.encode(h), (..., 3), 5.0) @ SAE_MODULE.decoder,
    "LoRA": lambda h: LORA(h),
    "MLP": lambda h: MLP(h),
    "attention module": lambda h: MHA(h, h, h),
    "attention module, no weights": lambda h: MHA(h, h, h, need_weights=False)[0],
    "encoder layer": lambda h: LAYER(h),
    "norm modules": lambda h: NORMED(h),
    "batch norm, eval": lambda h: BATCHED(h),
    "group norm": lambda h: GROUPED(h),
    "conv": lambda h: CONV(h),
    "sdpa": attention,
    "sdpa causal": lambda h: attention(h, is_causal=True),
    "sdpa mask": lambda h: attention(h, attn_mask=torch.ones(5, 5).tril().bool()),
    "sdpa float mask": lambda h: attention(h, attn_mask=rand(5, 5) * 0, scale=0.3),
    "sdpa with fewer keys": grouped_attention,
    "augmented assignments": augmented,
    "rot90": lambda h: [torch.rot90(h, k, (1, 2)) for k in range(-1, 4)],
    "derivative by torch.func": lambda h: torch.func.grad(lambda x: (x**2).sum())(h),
    "eager attention": lambda h: (
        ((h @ h.mT) / 8**0.5 + torch.full((5, 5), -1e9).triu(1)).softmax(-1) @ h
    ),
    "rotary": rotary,
    "softmax": lambda h: [h.softmax(-1), F.softmax(h, 1), h.log_softmax(-1), F.softmin(h, -1)],
    "softmax dtype": lambda h: h.half().softmax(-1, dtype=torch.float32),
    "layer norm": lambda h: F.layer_norm(h, (8,), V8, V8),
    "rms norm by hand": lambda h: h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6) * V8,
    "rms norm": lambda h: F.rms_norm(h, (8,), V8),
    "prelu": lambda h: F.prelu(h, torch.tensor([0.2])),
    "threshold": lambda h: F.threshold(h, 0.1, 20),
    "cross entropy": cross_entropy,
    "entropy": lambda h: -(h.softmax(-1) * h.log_softmax(-1)).sum(-1),
    "logit difference": lambda h: h[:, -1, 3] - h[:, -1, 5],
    "activations": functional_zoo,
    "unary": unary_zoo,
    "binary": binary_zoo,
    "integers": integer_zoo,
    "scalars": scalar_zoo,
    "reductions": reduce_zoo,
    "sorting": sort_zoo,
    "shapes": shape_zoo,
    "new tensors": new_zoo,
    "indexing": index_zoo,
    "matrices": matrix_zoo,
    "losses": loss_zoo,
    "fourier": fourier,
    "autocast on the CPU": autocast,
    "copies": deep,
    "parameter of a traced value": parameter,
    "autograd function": lambda h: Straight.apply(h),
    "double and back": lambda h: (h.double() * 2).float(),
    "bfloat16": lambda h: (h.bfloat16() @ W.bfloat16()).softmax(-1),
    "len and shape": lambda h: h * len(h) + h.shape[1] + h.size(-1) + h.ndim + h.numel(),
    "checkpoint": lambda h: torch.utils.checkpoint.checkpoint(MLP, h, use_reentrant=False),
    "vmap": lambda h: torch.vmap(lambda x: x * 2)(h),
    "no_grad inside": lambda h: torch.no_grad()(lambda x: x + 1)(h),
    "inplace relu": lambda h: F.relu(h, inplace=True),
    "inplace clamp": lambda h: h[:, 0].clamp_(min=0),
    "inplace scatter": lambda h: h.scatter_(1, IDS[..., None], 2.0),
    "inplace index_add": lambda h: h.index_add_(1, torch.tensor([0, 0]), h[:, 3:].clone()),
    "inplace masked_fill": lambda h: h.masked_fill_(h > 0, 1),
    "inplace on half": lambda h: also(h.half().add_(h)),
    "inplace compare": lambda h: h.gt_(0),
    "inplace lerp": lambda h: h.lerp_(torch.zeros(8), 0.5),
    "inplace addcmul": lambda h: h.addcmul_(h.clone(), V8),
    "inplace pow": lambda h: h.abs_().pow_(0.5),
    "inplace exp": lambda h: h[0].exp_(),
    "inplace div": lambda h: h.div_(V8, rounding_mode="floor"),
    "inplace tril": lambda h: h.tril_(),
    "inplace copy of another dtype": lambda h: h.copy_(IDS[..., None]),
    "inplace index_put": lambda h: h.index_put_(
        (torch.tensor([0]),), torch.ones(1), accumulate=True
    ),
    "index_put of duplicates": lambda h: assign(h, (0, torch.tensor([1, 1])), rand(2, 8) * 0),
    "tuple index with None": lambda h: assign(h, (slice(None), None, 0), 1.0),
    "assign 0-dim traced": lambda h: assign(h, (slice(None), 0), h.max()),
    "assign 0-dim plain": lambda h: assign(h, (0, 0), torch.tensor(4)),
    "assign broadcast": lambda h: assign(h, slice(None), h[:, :1] * 2),
    "transposed edit": lambda h: h.mT.mul_(torch.arange(5.0)),
    "flat edit": lambda h: assign(h.view(-1), slice(3, 70, 7), 0),
    "named tuple fields": lambda h: [h.max(-1).values, h.sort(-1).indices, h.topk(2).values],
    "integer counts": lambda h: (h > 0).long().cumsum(-1)[..., -1],
    "complex edit": lambda h: also(torch.view_as_real(torch.complex(h, h)).mul_(2)),
}


@pytest.mark.parametrize("name", CORPUS)
def test_recorded_equals_eager(name: str, check: Callable[..., Any], h: Tensor) -> None:
    check(CORPUS[name], h)


RANDOM: dict[str, Callable[[Tensor], Any]] = {
    "rand_like": torch.rand_like,
    "randn_like": lambda h: torch.randn_like(h, dtype=torch.float64),
    "randint_like": lambda h: [torch.randint_like(h, 5), torch.randint_like(h, 2, 5)],
    "bernoulli": lambda h: [h.sigmoid().bernoulli(), torch.bernoulli(h, 0.3)],
    "bernoulli_": lambda h: [h.bernoulli_(0.5), torch.empty_like(h).bernoulli_(h.sigmoid())],
    "dropout": lambda h: F.dropout(h, 0.5),
    "dropout module": lambda h: nn.Dropout(0.1).train()(h),
    "multinomial": lambda h: h[:, 0].softmax(-1).multinomial(3),
    "normal_": lambda h: h.normal_(1.0, 2.0),
    "uniform_": lambda h: h[:, 0].uniform_(-1, 1),
    "exponential_": lambda h: h.exponential_(2.0),
    "random_": lambda h: h.random_(3, 7),
    "normal": lambda h: [
        torch.normal(h, 0.1),
        torch.normal(0.0, h.abs()),
        torch.normal(h, h.abs()),
    ],
    "gumbel": lambda h: F.gumbel_softmax(h, hard=True),
    "noise": lambda h: h + 0.1 * torch.randn_like(h),
    "attention with dropout": lambda h: attention(h, dropout_p=0.5),
}


@pytest.mark.parametrize("name", RANDOM)
def test_random_functions_keep_dtype_and_shape(
    name: str, check: Callable[..., Any], h: Tensor
) -> None:
    check(RANDOM[name], h, exact=False)
