"""From the custom op to the Triton launches: what Triton can take, and with which buffers."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

MAX_DIM = 2048
MAX_ROWS = 128


def why_not_triton(query: Tensor, tokens: Tensor) -> str | None:
    """The end of a sentence that says why Triton cannot run these tensors; None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "needs the package triton, which is not installed"
    if torch.float64 in (query.dtype, tokens.dtype):
        return 'has no float64; pass float32 or use implementation="absorbed"'
    if tokens.shape[2] > MAX_DIM:
        return f"takes tokens of width D up to {MAX_DIM}, got {tokens.shape[2]}"
    if query.shape[1] > MAX_ROWS:
        return f"takes up to {MAX_ROWS} query rows, got {query.shape[1]}"
    return "is not built yet"


def forward(
    query: Tensor, tokens: Tensor, weight: Tensor | None, norm_eps: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    raise NotImplementedError


def backward(
    grad_output: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    tokens: Tensor,
    gain: Tensor | None,
    mean: Tensor | None,
    output: Tensor,
    lse: Tensor,
    tokens_need_grad: bool,
) -> tuple[Tensor, Tensor]:
    raise NotImplementedError
