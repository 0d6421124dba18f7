"""The alignment losses in Triton: one program a token, codes decoded in registers."""

# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import autotune
from .triton_tiles import round_to_bfloat16


@triton.jit
def load_target(
    tokens, scale, gain, row, column, inside, dim,
    HAS_SCALE: tl.constexpr, HAS_GAIN: tl.constexpr,
):  # fmt: skip
    z = tl.load(tokens + row * dim + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_SCALE:
        z = z * tl.load(scale + row).to(tl.float32)
    if HAS_GAIN:
        z = z * tl.load(gain + column, mask=inside, other=0.0).to(tl.float32)
    return z


@triton.jit
def loss_forward(
    prediction, tokens, scale, gain, cosine, smooth, statistics, rows, dim, beta,
    HAS_SCALE: tl.constexpr, HAS_GAIN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BD)
    inside = column < dim
    p = tl.load(prediction + row * dim + column, mask=inside, other=0.0).to(tl.float32)
    z = load_target(tokens, scale, gain, row, column, inside, dim, HAS_SCALE, HAS_GAIN)
    inner = tl.sum(p * z, axis=0)
    predicted = tl.sum(p * p, axis=0)
    stored = tl.sum(z * z, axis=0)
    gap = tl.abs(p - z)
    huber = tl.where(gap < beta, 0.5 * gap * gap / beta, gap - 0.5 * beta)
    # The norms' epsilon of 1e-8, squared.
    norms = tl.rsqrt(tl.maximum(predicted, 1e-16)) * tl.rsqrt(tl.maximum(stored, 1e-16))
    tl.store(cosine + row, 1.0 - inner * norms)
    tl.store(smooth + row, tl.sum(huber, axis=0) / dim)
    tl.store(statistics + row, inner)
    tl.store(statistics + rows + row, predicted)
    tl.store(statistics + 2 * rows + row, stored)


@triton.jit
def loss_backward(
    prediction, tokens, scale, gain, along_prediction, along_target, smooth_factor, gradient,
    dim, beta, HAS_SCALE: tl.constexpr, HAS_GAIN: tl.constexpr, EMULATE: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BD)
    inside = column < dim
    p = tl.load(prediction + row * dim + column, mask=inside, other=0.0).to(tl.float32)
    z = load_target(tokens, scale, gain, row, column, inside, dim, HAS_SCALE, HAS_GAIN)
    slope = tl.minimum(tl.maximum((p - z) / beta, -1.0), 1.0)
    total = slope * tl.load(smooth_factor + row)
    total += p * tl.load(along_prediction + row) + z * tl.load(along_target + row)
    if EMULATE:
        total = round_to_bfloat16(total)
    tl.store(gradient + row * dim + column, total.to(gradient.dtype.element_ty), mask=inside)


def forward(
    prediction: Tensor, tokens: Tensor, scale: Tensor | None, gain: Tensor | None, beta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses [B, N] and statistics [3, B, N], float32."""
    prediction, tokens, scale, gain = _contiguous(prediction, tokens, scale, gain)
    batch, count, dim = prediction.shape
    options = {"dtype": torch.float32, "device": prediction.device}
    cosine, smooth = torch.empty(batch, count, **options), torch.empty(batch, count, **options)
    statistics = torch.empty(3, batch, count, **options)
    if batch * count:
        loss_forward[(batch * count,)](
            prediction, tokens, scale, gain, cosine, smooth, statistics, batch * count, dim, beta,
            HAS_SCALE=scale is not None, HAS_GAIN=gain is not None, **_shape(dim),
        )  # fmt: skip
    return cosine, smooth, statistics


def backward(
    prediction: Tensor,
    tokens: Tensor,
    scale: Tensor | None,
    gain: Tensor | None,
    along_prediction: Tensor,
    along_target: Tensor,
    smooth_factor: Tensor,
    beta: float,
) -> Tensor:
    """The gradient of the prediction [B, N, D]."""
    prediction, tokens, scale, gain = _contiguous(prediction, tokens, scale, gain)
    batch, count, dim = prediction.shape
    gradient = torch.empty_like(prediction)
    if batch * count:
        loss_backward[(batch * count,)](
            prediction, tokens, scale, gain, along_prediction.contiguous(),
            along_target.contiguous(), smooth_factor.contiguous(), gradient, dim, beta,
            HAS_SCALE=scale is not None, HAS_GAIN=gain is not None,
            EMULATE=autotune.INTERPRETED and prediction.dtype == torch.bfloat16, **_shape(dim),
        )  # fmt: skip
    return gradient


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def _shape(dim: int) -> dict[str, int]:
    """One token a program: at least 8 channels a thread, so that codes are read as whole words."""
    block = triton.next_power_of_2(dim)
    return {"BD": block, "num_warps": max(1, min(8, block // 512))}
