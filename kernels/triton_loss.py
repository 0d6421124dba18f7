"""The alignment losses in Triton: one program a token, codes decoded in registers."""

# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import autotune
from .triton_tiles import round_to_bfloat16

# The epsilon of a norm, 1e-8 as in torch.nn.functional.cosine_similarity, squared.
NORM_EPS = tl.constexpr(1e-16)


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
    prediction, tokens, scale, gain, losses, statistics, rows, dim, beta,
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
    norms = tl.rsqrt(tl.maximum(predicted, NORM_EPS)) * tl.rsqrt(tl.maximum(stored, NORM_EPS))
    tl.store(losses + row, 1.0 - inner * norms)
    tl.store(losses + rows + row, tl.sum(huber, axis=0) / dim)
    tl.store(statistics + row, inner)
    tl.store(statistics + rows + row, predicted)
    tl.store(statistics + 2 * rows + row, stored)


@triton.jit
def loss_backward(
    prediction, tokens, scale, gain, statistics, grad_losses, gradient,
    rows, dim, grad_stride, grad_row_stride, beta,
    HAS_SCALE: tl.constexpr, HAS_GAIN: tl.constexpr, EMULATE: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BD)
    inside = column < dim
    p = tl.load(prediction + row * dim + column, mask=inside, other=0.0).to(tl.float32)
    z = load_target(tokens, scale, gain, row, column, inside, dim, HAS_SCALE, HAS_GAIN)
    inner = tl.load(statistics + row)
    predicted = tl.load(statistics + rows + row)
    stored = tl.load(statistics + 2 * rows + row)
    grad_cosine = tl.load(grad_losses + row * grad_row_stride)
    grad_smooth = tl.load(grad_losses + grad_stride + row * grad_row_stride)
    inverse_p = tl.rsqrt(tl.maximum(predicted, NORM_EPS))
    both = grad_cosine * inverse_p * tl.rsqrt(tl.maximum(stored, NORM_EPS))
    # Below the epsilon the norm of p is a constant: only the numerator depends on p.
    along_prediction = tl.where(predicted > NORM_EPS, both * inner * inverse_p * inverse_p, 0.0)
    slope = tl.minimum(tl.maximum((p - z) / beta, -1.0), 1.0)
    total = slope * (grad_smooth / dim) + p * along_prediction - z * both
    if EMULATE:
        total = round_to_bfloat16(total)
    tl.store(gradient + row * dim + column, total.to(gradient.dtype.element_ty), mask=inside)


def forward(
    prediction: Tensor, tokens: Tensor, scale: Tensor | None, gain: Tensor | None, beta: float
) -> tuple[Tensor, Tensor]:
    """Losses [2, B, N] and statistics [3, B, N], float32."""
    prediction, tokens, scale, gain = _contiguous(prediction, tokens, scale, gain)
    batch, count, dim = prediction.shape
    options = {"dtype": torch.float32, "device": prediction.device}
    losses = torch.empty(2, batch, count, **options)
    statistics = torch.empty(3, batch, count, **options)
    if batch * count:
        loss_forward[(batch * count,)](
            prediction, tokens, scale, gain, losses, statistics, batch * count, dim, beta,
            HAS_SCALE=scale is not None, HAS_GAIN=gain is not None, **_shape(dim),
        )  # fmt: skip
    return losses, statistics


def backward(
    prediction: Tensor,
    tokens: Tensor,
    scale: Tensor | None,
    gain: Tensor | None,
    statistics: Tensor,
    grad_losses: Tensor,
    beta: float,
) -> Tensor:
    """The gradient of the prediction [B, N, D], of the losses' [2, B, N]."""
    prediction, tokens, scale, gain = _contiguous(prediction, tokens, scale, gain)
    batch, count, dim = prediction.shape
    gradient = torch.empty_like(prediction)
    # As the mean hands it down, one number for all tokens, it is read where it lies.
    grad_losses = grad_losses.reshape(2, -1)
    if batch * count:
        loss_backward[(batch * count,)](
            prediction, tokens, scale, gain, statistics.contiguous(), grad_losses, gradient,
            batch * count, dim, grad_losses.stride(0), grad_losses.stride(1), beta,
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
