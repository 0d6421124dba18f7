"""Attention pool: the model token's capacity without its exchange, as a control."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .base import StudentShape
from .model_token import ModelToken
from .spaces import SpaceTarget


class AttentionPool(ModelToken):
    """M learnt queries pool the student's tokens for each space; nothing passes between spaces.

    With queries q_s [M, d] and X_s = P_s LN S + pos_s as in `ModelToken`, for each space s alone:

        m_s = q_s + CrossAttention_s(LN q_s, X_s)          m_s <- m_s + MLP_s(LN m_s)
        d^_t = W2_t GELU(W1_t LN p) + W_t vec(LN m_t)      x^_s = W_s LN S         W_t from zero

    One read, no alternation, no inter-space module, no gates: attention pooling (Lee et al. 2019,
    "Set Transformer", arXiv:1810.00825, section 3.2). What the alternation of `ModelToken` adds to
    a student must be seen beside this head of equal size: unless `mlp_ratio` is given, the MLPs are
    as wide as makes the number of parameters that of a model token with `layers` layers and the
    same tokens, width, heads and projectors, without its teacher-side stream, which leaves nothing
    in the student.

    Args:
        tokens: M, queries a space.
        width: d; a multiple of `heads`.
        heads: attention heads.
        mlp_ratio: hidden width of the MLPs over d; None: as wide as matches the model token.
        layers: of the model token that is matched.
        hidden: width of the descriptor projectors' hidden layer.
        **options: those of `Alignment`.
    """

    def __init__(
        self,
        student: StudentShape,
        spaces: Mapping[str, SpaceTarget],
        *,
        tokens: int = 4,
        width: int = 128,
        heads: int = 4,
        mlp_ratio: float | None = None,
        layers: int = 2,
        hidden: int = 512,
        **options: Any,
    ) -> None:
        same: dict[str, Any] = {
            "tokens": tokens,
            "width": width,
            "heads": heads,
            "hidden": hidden,
            "teacher_stream": 0.0,
        }
        plain: dict[str, Any] = {"inter": "none", "gamma": None, "layers": 1, **same}
        if mlp_ratio is None:
            shared = {key: options[key] for key in ("dense_weight",) if key in options}
            with torch.device("meta"):
                wanted = _size(ModelToken(student, spaces, layers=layers, **same, **shared))
                one, two = (
                    _size(ModelToken(student, spaces, mlp_ratio=h / width, **plain, **shared))
                    for h in (1, 2)
                )
            mlp_ratio = max(1, 1 + round((wanted - one) / (two - one))) / width
        super().__init__(student, spaces, mlp_ratio=mlp_ratio, **plain, **options)


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
