"""The form that materialises the decoded tokens and calls PyTorch's own attention on them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .absorbed import compute_dtype


def attend(
    query: Tensor,
    tokens: Tensor,
    weight: Tensor | None,
    norm_eps: float | None,
    *,
    need_lse: bool = True,
) -> tuple[Tensor, Tensor]:
    """Output [B, R, D] and logsumexp [B, R] (or zeros) by ordinary autograd operations."""
    x = decode(tokens, weight, norm_eps, _operand_dtype(query, tokens))
    q = query.to(x.dtype)
    attended = None if weight is None else (~(weight < 0)).unsqueeze(1)
    y = functional.scaled_dot_product_attention(q, x, x, attn_mask=attended, scale=1.0)
    if attended is not None:
        y = torch.where(attended.any(-1, keepdim=True), y, torch.zeros_like(y))
    if not need_lse:
        return y.to(query.dtype), y.new_zeros(y.shape[:2])
    scores = torch.matmul(q, x.transpose(1, 2)).to(compute_dtype(query, tokens))
    return y.to(query.dtype), masked_logsumexp(scores, attended)


def masked_logsumexp(scores: Tensor, attended: Tensor | None) -> Tensor:
    """logsumexp over the last dimension; -inf with zero gradient where nothing is attended."""
    if attended is None:
        return torch.logsumexp(scores, dim=-1)
    some = attended.any(-1, keepdim=True)
    # logsumexp of a row of -inf has a NaN gradient, so such a row is computed on zeros.
    safe = torch.where(some, scores.masked_fill(~attended, -torch.inf), torch.zeros_like(scores))
    lse = torch.logsumexp(safe, dim=-1)
    return torch.where(some.squeeze(-1), lse, torch.full_like(lse, -torch.inf))


def decode(
    tokens: Tensor, weight: Tensor | None, norm_eps: float | None, dtype: torch.dtype
) -> Tensor:
    """The tokens [B, N, D] as floats: scaled by the weight's positive part, then normalised."""
    x = tokens.to(dtype)
    if tokens.dtype == torch.int8 and weight is not None:
        x = x * weight.clamp_min(0).unsqueeze(-1).to(dtype)
    return x if norm_eps is None else functional.layer_norm(x, x.shape[-1:], eps=norm_eps)


def _operand_dtype(query: Tensor, tokens: Tensor) -> torch.dtype:
    return tokens.dtype if tokens.is_floating_point() else query.dtype
