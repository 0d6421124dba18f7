"""The absorbed form in plain PyTorch: the body for CPU and the fallback where Triton is missing.

Symbols, for one sample: x_n raw token (code or float), mean_n its mean over D with LayerNorm and 0
without, a_n its gain (the int8 scale and the LayerNorm's reciprocal deviation), q_r query row.

    t_rn = q_r . (x_n - mean_n)      s_rn = a_n t_rn       p = softmax_n(s)
    y_r  = sum_n p_rn a_n (x_n - mean_n)

    u_rn = dy_r . (x_n - mean_n)     ds_rn = p_rn (a_n u_rn - dy_r . y_r + dlse_r)
    dq_r = sum_n ds_rn a_n (x_n - mean_n)
    dx_n = a_n (g_n - mean_D g_n) - a_n^3 (x_n - mean_n) (sum_r ds_rn t_rn + p_rn u_rn) / D,
           g_n = sum_r ds_rn q_r + p_rn dy_r; without LayerNorm the mean and last terms vanish

A negative gain marks a token that must not be attended.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Decoded tokens of one step stay within this many bytes, so that they are still in the cache of a
# CPU core when the second product reads them.
_STEP_BYTES = 8 << 20


def compute_dtype(query: Tensor, tokens: Tensor) -> torch.dtype:
    """float64 where either side is float64, float32 otherwise."""
    return torch.float64 if torch.float64 in (query.dtype, tokens.dtype) else torch.float32


def forward(
    query: Tensor, tokens: Tensor, weight: Tensor | None, norm_eps: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Output [B, R, D], logsumexp [B, R], with LayerNorm the gain and token mean [B, N], and p.

    p [B, R, N] is kept for the backward pass: it is R / D of the tokens' size and saves a product.
    """
    batch, rows, dim = query.shape
    dtype = compute_dtype(query, tokens)
    output = torch.empty((batch, rows, dim), dtype=query.dtype, device=query.device)
    lse = torch.empty((batch, rows), dtype=dtype, device=query.device)
    kept = (batch, tokens.shape[1]) if norm_eps is not None else (0,)
    gain_kept = torch.empty(kept, dtype=dtype, device=query.device)
    mean_kept = torch.empty(kept, dtype=dtype, device=query.device)
    p_kept = torch.empty((batch, rows, tokens.shape[1]), dtype=dtype, device=query.device)
    for step, x in _decoded(tokens, dtype):
        q = query[step].to(dtype)
        gain, mean = None if weight is None else weight[step].to(dtype), None
        if norm_eps is not None:
            gain, mean = layer_norm_gain(x, gain, norm_eps)
            gain_kept[step], mean_kept[step] = gain, mean
        p = torch.bmm(q, x.transpose(1, 2), out=p_kept[step])
        if mean is not None:
            p -= q.sum(-1, keepdim=True) * mean.unsqueeze(1)
        if gain is not None:
            p.mul_(gain.unsqueeze(1)).masked_fill_((gain < 0).unsqueeze(1), -torch.inf)
        lse[step] = _softmax_(p)
        if gain is not None:
            p = p * gain.clamp_min(0).unsqueeze(1)
        _weighted_sum(p, x, mean, out=output[step])
    return output, lse, gain_kept, mean_kept, p_kept


def backward(
    grad_output: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    tokens: Tensor,
    gain: Tensor | None,
    mean: Tensor | None,
    probabilities: Tensor,
    tokens_need_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of the query [B, R, D] and, where asked for, of the tokens [B, N, D]."""
    dtype = compute_dtype(query, tokens)
    grad_query = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    grad_tokens = torch.empty(
        tokens.shape if tokens_need_grad else (0,),
        dtype=tokens.dtype if tokens_need_grad else query.dtype,
        device=query.device,
    )
    for step, x in _decoded(tokens, dtype):
        q, dy = query[step].to(dtype), grad_output[step].to(dtype)
        a = None if gain is None else gain[step].to(dtype)
        centre = None if mean is None else mean[step].to(dtype)
        p = probabilities[step]
        factor = None if a is None else a.clamp_min(0).unsqueeze(1)
        u = _products(dy, x, centre)
        gain_u = u if factor is None else factor * u
        # dy . y, but from these very p and u: ds then sums to zero however large the tokens' mean.
        delta = (p * gain_u).sum(-1) - grad_lse[step]
        weighted = (gain_u - delta.unsqueeze(-1)).mul_(p)
        if factor is not None:
            weighted.mul_(factor)
        _weighted_sum(weighted, x, centre, out=grad_query[step])
        if tokens_need_grad:
            value = p if factor is None else p * factor
            dx = torch.bmm(weighted.transpose(1, 2), q)
            dx.baddbmm_(value.transpose(1, 2), dy)
            if factor is not None and centre is not None:
                t = _products(q, x, centre)
                along = (weighted * t + value * u).sum(1) * factor.squeeze(1) ** 2 / x.shape[-1]
                dx = dx - dx.mean(-1, keepdim=True)
                dx = dx - along.unsqueeze(-1) * (x - centre.unsqueeze(-1))
            grad_tokens[step] = dx
    return grad_query, grad_tokens


def layer_norm_gain(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """Gain and mean [B, N] of LayerNorm over ``c x`` with c the positive part of the weight.

    The weight's sign stays: negative gains mark tokens that are not attended.
    """
    variance, mean = torch.var_mean(x, dim=-1, unbiased=False)
    if weight is None:
        return torch.rsqrt(variance + eps), mean
    gain = weight * torch.rsqrt(weight.square() * variance + eps)
    return torch.where(weight < 0, torch.full_like(gain, -1.0), gain), mean


def _decoded(tokens: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Slices of the batch with their tokens as ``dtype``, all in the same memory.

    The whole batch where nothing has to be decoded, as many samples as a cache holds otherwise.
    """
    batch, count, dim = tokens.shape
    if tokens.dtype == dtype or batch == 0:
        yield slice(0, batch), tokens
        return
    most = min(batch, max(1, _STEP_BYTES // max(1, count * dim * dtype.itemsize)))
    # Fresh memory for every slice would be paid for in page faults.
    block = torch.empty((most, count, dim), dtype=dtype, device=tokens.device)
    for start in range(0, batch, most):
        step = slice(start, min(start + most, batch))
        yield step, block[: step.stop - start].copy_(tokens[step])


def _softmax_(scores: Tensor) -> Tensor:
    """Softmax over the last dimension in place; returns the logsumexp.

    A row of -inf becomes zeros, and its logsumexp is -inf.
    """
    if scores.shape[-1] == 0:
        return torch.logsumexp(scores, dim=-1)
    top = scores.amax(-1, keepdim=True)
    # A finite shift: -inf minus -inf is NaN.
    top = top.clamp_min_(torch.finfo(top.dtype).min)
    total = scores.sub_(top).exp_().sum(-1, keepdim=True)
    lse = (top + total.log()).squeeze(-1)
    scores.div_(total.masked_fill_(total == 0, 1.0))
    return lse


def _weighted_sum(weights: Tensor, x: Tensor, mean: Tensor | None, out: Tensor) -> None:
    """``out`` = weights @ (x - mean), written in place where the dtypes allow it."""
    if mean is None and out.dtype == x.dtype:
        torch.bmm(weights, x, out=out)
        return
    total = torch.bmm(weights, x)
    if mean is not None:
        total -= torch.bmm(weights, mean.unsqueeze(-1))
    out.copy_(total)


def _products(rows: Tensor, x: Tensor, mean: Tensor | None) -> Tensor:
    product = torch.bmm(rows, x.transpose(1, 2))
    if mean is not None:
        product = product - rows.sum(-1, keepdim=True) * mean.unsqueeze(1)
    return product
