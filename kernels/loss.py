"""Alignment losses of a prediction with stored tokens that never decode the tokens as a whole."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.library import custom_op, register_autograd, register_fake
from torch.nn import functional

from .availability import FLOATS, refuse_forward_mode, why_not_triton

# Bytes of decoded tokens that the PyTorch body holds at once: about the caches of two cores. With
# less, the calls cost more than the memory does.
_STEP_BYTES = 2 << 20
# As in torch.nn.functional.cosine_similarity.
_NORM_EPS = 1e-8


class AlignmentLoss(NamedTuple):
    """Two losses: scalars, or [B, N] with reduction "none"."""

    cosine: Tensor
    smooth_l1: Tensor


def alignment_loss(
    prediction: Tensor,
    tokens: Tensor,
    scale: Tensor | None = None,
    *,
    gain: Tensor | None = None,
    mask: Tensor | None = None,
    beta: float = 1.0,
    reduction: Literal["mean", "none"] = "mean",
    implementation: Literal["auto", "triton", "torch"] = "auto",
) -> AlignmentLoss:
    """Cosine distance and smooth-L1 distance of predicted and stored tokens, in one pass.

    With z the decoded token (``scale * tokens * gain``) and p its prediction, per token::

        cosine = 1 - p . z / (max(|p|, eps) max(|z|, eps))      smooth_l1 = mean_D h(p - z)
        h(e) = e^2 / (2 beta) where |e| < beta, |e| - beta / 2 elsewhere

    as `torch.nn.functional.cosine_similarity` and `smooth_l1_loss` have it. Codes are decoded in
    registers (Triton, on CUDA) or a cache-sized chunk at a time (PyTorch), so that no float copy of
    the targets exists; the same holds for the backward pass, which reads both again. Under
    `torch.compile` the PyTorch form is traced as ordinary operations instead, which the compiler
    fuses into loops of the same kind, and faster ones on a CPU.

    Args:
        prediction: [B, N, D] float16, bfloat16, float32 or float64; gets the gradient.
        tokens: [B, N, D], int8 codes or one of those dtypes; a constant.
        scale: [B, N] float, needed with int8 codes and only there; a constant.
        gain: [D] float, positive: of each dimension; 1 where not given. A constant.
        mask: [B, N] bool, True where a token counts. The mean is over the tokens that count, and 0
            where none does; with reduction "none" the others are 0. They and their scales must be
            finite all the same, or their gradient is not.
        beta: where smooth-L1 turns from a parabola into a line; positive.
        reduction: "mean" over tokens, or "none" for one value a token.
        implementation: "triton" needs CUDA and D up to 8192; "auto" takes it where it can.

    Returns:
        `AlignmentLoss` in float32 (float64 for a float64 prediction).

    Raises:
        TypeError: an argument has a dtype that is not listed above.
        ValueError: shapes or devices do not match, an option has a value that cannot be used, or a
            derivative in forward mode was asked for.
    """
    _check(prediction, tokens, scale, gain, mask, beta, reduction, implementation)
    refuse_forward_mode(prediction)
    use_triton = implementation != "torch" and (tokens.is_cuda or implementation == "triton")
    if use_triton:
        reason = why_not_triton(prediction[:, :1], tokens, max_dim=8192)
        if reason and implementation == "triton":
            raise ValueError(f'implementation="triton" {reason}')
        use_triton = reason is None
    scale = None if scale is None else scale.detach()
    gain = None if gain is None else gain.detach()
    if torch.compiler.is_compiling() and not use_triton:
        losses = _traced(prediction, tokens.detach(), scale, gain, float(beta))
    else:
        losses, _ = torch.ops.preceptor.alignment_loss(
            prediction, tokens, scale, gain, float(beta), use_triton
        )
    # Both at once: where a device is fast, calls on tensors as small as these are what takes time.
    if mask is not None:
        losses = torch.where(mask, losses, 0.0)
    if reduction == "none":
        return AlignmentLoss(*losses.unbind())
    count = max(losses[0].numel(), 1) if mask is None else mask.sum().clamp_min(1)
    return AlignmentLoss(*(losses.sum((1, 2)) / count).unbind())


def _check(
    prediction: Tensor,
    tokens: Tensor,
    scale: Tensor | None,
    gain: Tensor | None,
    mask: Tensor | None,
    beta: float,
    reduction: str,
    implementation: str,
) -> None:
    floats = "float16, bfloat16, float32 or float64"
    if prediction.dtype not in FLOATS:
        raise TypeError(f"prediction must be {floats}, got {prediction.dtype}")
    if tokens.dtype not in (*FLOATS, torch.int8):
        raise TypeError(f"tokens must be int8 codes, {floats}, got {tokens.dtype}")
    if prediction.dim() != 3 or prediction.shape != tokens.shape:
        raise ValueError(
            f"prediction and tokens must have one shape [B, N, D], got {tuple(prediction.shape)} "
            f"and {tuple(tokens.shape)}"
        )
    if (tokens.dtype == torch.int8) != (scale is not None):
        raise ValueError("scale [B, N] must be given with int8 tokens and only with them")
    each, dimensions = tokens.shape[:2], tokens.shape[2:]
    for name, value, shape in (
        ("scale", scale, each),
        ("mask", mask, each),
        ("gain", gain, dimensions),
    ):
        if value is not None and value.shape != shape:
            raise ValueError(f"{name} must have the shape {tuple(shape)}, got {tuple(value.shape)}")
    for name, value in (("scale", scale), ("gain", gain)):
        if value is not None and not value.is_floating_point():
            raise TypeError(f"{name} must have a float dtype, got {value.dtype}")
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"mask must have the bool dtype, got {mask.dtype}")
    for name, value in (
        ("prediction", prediction),
        ("scale", scale),
        ("gain", gain),
        ("mask", mask),
    ):
        if value is not None and value.device != tokens.device:
            raise ValueError(
                f"{name} must be on the device of tokens, {tokens.device}, got {value.device}"
            )
    if not beta > 0:
        raise ValueError(f"beta must be positive, got {beta}")
    if reduction not in ("mean", "none"):
        raise ValueError(f'reduction must be "mean" or "none", got {reduction!r}')
    if implementation not in ("auto", "triton", "torch"):
        raise ValueError(
            f'implementation must be "auto", "triton" or "torch", got {implementation!r}'
        )


def _accumulate_dtype(prediction: Tensor) -> torch.dtype:
    return torch.float64 if prediction.dtype == torch.float64 else torch.float32


@custom_op("preceptor::alignment_loss", mutates_args=())
def _forward(
    prediction: Tensor,
    tokens: Tensor,
    scale: Tensor | None,
    gain: Tensor | None,
    beta: float,
    triton: bool,
) -> tuple[Tensor, Tensor]:
    """Losses [2, B, N] (cosine, smooth-L1) and what the backward needs, the statistics [3, B, N]
    (p . z, |p|^2, |z|^2)."""
    if triton:
        from . import triton_loss

        with torch.cuda.device_of(tokens):
            return triton_loss.forward(prediction, tokens, scale, gain, beta)
    dtype = _accumulate_dtype(prediction)
    options: dict[str, Any] = {"dtype": dtype, "device": prediction.device}
    batch, count = prediction.shape[:2]
    losses = torch.empty(2, batch * count, **options)
    statistics = torch.empty(3, batch * count, **options)
    inner, predicted, stored = statistics
    for step, p, z, spare in _chunks(prediction, tokens, scale, gain, dtype):
        torch.ops.aten.smooth_l1_loss.out(p, z, 0, beta, out=spare)
        torch.mean(spare, -1, out=losses[1][step])
        torch.sum(torch.mul(p, z, out=spare), -1, out=inner[step])
        torch.linalg.vector_norm(p, dim=-1, out=predicted[step])
        torch.linalg.vector_norm(z, dim=-1, out=stored[step])
    statistics[1:].square_()
    losses[0] = 1 - inner * _inverse_norm(predicted) * _inverse_norm(stored)
    return losses.view(2, batch, count), statistics.view(3, batch, count)


@register_fake("preceptor::alignment_loss")
def _forward_fake(prediction: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    batch, count, _ = prediction.shape
    dtype = _accumulate_dtype(prediction)
    return (
        prediction.new_empty((2, batch, count), dtype=dtype),
        prediction.new_empty((3, batch, count), dtype=dtype),
    )


@custom_op("preceptor::alignment_loss_backward", mutates_args=())
def _backward(
    prediction: Tensor,
    tokens: Tensor,
    scale: Tensor | None,
    gain: Tensor | None,
    statistics: Tensor,
    grad_losses: Tensor,
    beta: float,
    triton: bool,
) -> Tensor:
    """``a p + b z + c clamp((p - z) / beta, -1, 1)`` of each token, by its statistics, with

    ``b = -g_cosine / (|p| |z|)``, ``a = g_cosine p . z / (|p|^3 |z|)`` and ``c = g_smooth / D``.
    """
    if triton:
        from . import triton_loss

        with torch.cuda.device_of(tokens):
            return triton_loss.backward(
                prediction, tokens, scale, gain, statistics, grad_losses, beta
            )
    grad_cosine, grad_smooth = grad_losses
    inner, predicted, stored = statistics
    inverse_p, inverse_z = _inverse_norm(predicted), _inverse_norm(stored)
    # Below the epsilon the norm of p is a constant: only the numerator depends on p.
    long_enough = predicted > _NORM_EPS**2
    along_prediction = torch.where(long_enough, grad_cosine * inner * inverse_p**3 * inverse_z, 0.0)
    along_target = -grad_cosine * inverse_p * inverse_z
    smooth_factor = grad_smooth / prediction.shape[-1]
    dtype = _accumulate_dtype(prediction)
    gradient = torch.empty(prediction.shape, dtype=prediction.dtype, device=prediction.device)
    rows = gradient.view(-1, prediction.shape[-1])
    by_p, by_z = along_prediction.reshape(-1, 1), along_target.reshape(-1, 1)
    by_slope = smooth_factor.reshape(-1, 1) / beta
    for step, p, z, spare in _chunks(prediction, tokens, scale, gain, dtype):
        total = rows[step] if rows.dtype == dtype else spare
        torch.sub(p, z, out=total).clamp_(-beta, beta).mul_(by_slope[step])
        total.addcmul_(p, by_p[step]).addcmul_(z, by_z[step])
        if rows.dtype != dtype:
            rows[step] = total
    return gradient


@register_fake("preceptor::alignment_loss_backward")
def _backward_fake(prediction: Tensor, *rest: Any) -> Tensor:
    return torch.empty(prediction.shape, dtype=prediction.dtype, device=prediction.device)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    prediction, tokens, scale, gain, ctx.beta, ctx.triton = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # zeros for the statistics would be made in every step
    ctx.save_for_backward(prediction, tokens, scale, gain, output[1])


def _differentiate(
    ctx: Any, grad_losses: Tensor | None, unused: Tensor | None
) -> tuple[Tensor | None, ...]:
    if grad_losses is None:
        return (None,) * 6
    gradient = torch.ops.preceptor.alignment_loss_backward(
        *ctx.saved_tensors, grad_losses, ctx.beta, ctx.triton
    )
    return gradient, None, None, None, None, None


register_autograd("preceptor::alignment_loss", _differentiate, setup_context=_save_for_backward)


def _inverse_norm(squared: Tensor) -> Tensor:
    return squared.clamp_min(_NORM_EPS**2).rsqrt()


def _chunks(
    prediction: Tensor,
    tokens: Tensor,
    scale: Tensor | None,
    gain: Tensor | None,
    dtype: torch.dtype,
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Rows of the prediction and of the decoded tokens, some at a time, and a spare block.

    All blocks lie in the same memory from chunk to chunk: fresh memory would be paid for in page
    faults, which cost as much as the arithmetic.
    """
    dim = prediction.shape[-1]
    predicted, stored = prediction.reshape(-1, dim), tokens.reshape(-1, dim)
    factor = None if scale is None else scale.reshape(-1, 1).to(dtype)
    gain = None if gain is None else gain.to(dtype)
    as_stored = tokens.dtype == dtype and gain is None
    rows = len(predicted)
    most = min(rows, max(1, _STEP_BYTES // max(1, dim * dtype.itemsize)))
    blocks = torch.empty(3, most, dim, dtype=dtype, device=prediction.device)
    for start in range(0, rows, max(1, most)):
        step = slice(start, min(start + most, rows))
        p, z, spare = blocks[:, : step.stop - start]
        p = predicted[step] if prediction.dtype == dtype else p.copy_(predicted[step])
        z = stored[step] if as_stored else z.copy_(stored[step])
        if factor is not None:
            z = z.mul_(factor[step])
        if gain is not None:
            z = z.mul_(gain)
        yield step, p, z, spare


def _traced(
    prediction: Tensor, tokens: Tensor, scale: Tensor | None, gain: Tensor | None, beta: float
) -> Tensor:
    """Losses [2, B, N] by operations that autograd and a compiler see."""
    dtype = _accumulate_dtype(prediction)
    p, z = prediction.to(dtype), tokens.to(dtype)
    if scale is not None:
        z = z * scale.to(dtype).unsqueeze(-1)
    if gain is not None:
        z = z * gain.to(dtype)
    norms = _inverse_norm((p * p).sum(-1)) * _inverse_norm((z * z).sum(-1))
    smooth = functional.smooth_l1_loss(p, z, reduction="none", beta=beta).mean(-1)
    return torch.stack((1 - (p * z).sum(-1) * norms, smooth))
