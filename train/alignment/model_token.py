"""Model token: learnable tokens read each space, exchange across spaces, and help to predict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...errors import ConfigError
from ..attention import CrossAttention
from ..students import StudentOutput
from .base import (
    Alignment,
    Grid,
    Predictions,
    SpaceTarget,
    dense_projector,
    descriptor_mlp,
    module_key,
)

INTER = ("none", "self")


class ModelToken(Alignment):
    """Gated, residual alignment through model tokens.

    Every space s (a dense space, or a teacher that has none) owns M model tokens m_s of width d,
    learnable and equal for all images at the start. With the student's tokens S [B, N, C] and
    descriptor p [B, P], and L layers of

        intra-space   X_s = P_s LN S + pos_s                              [B, N, d], once
                      m_s <- m_s + CrossAttention_s(LN m_s, X_s)          own weights a space
                      m_s <- m_s + MLP_s(LN m_s)
        inter-space   m   <- m + gamma_1 * SelfAttention(LN m)            all S * M tokens together
                      m   <- m + gamma_2 * MLP(LN m)                      gamma [d], from 0.1

    the predictions are

        d^_t = W2_t GELU(W1_t LN p) + W_t vec(LN m_t)                     W_t from zero
        x^_s = W_s LN S

    where m_t are the model tokens of all spaces of teacher t. At the start this is exactly
    `Regression` with the same projectors: the tokens earn their part. The intra-space attention
    runs on `kernels.cross_attention`, which never builds keys and values of the student's tokens.

    The reading of the model token is this project's own, after the abstract of "Unified
    Multi-Teacher Distillation Across Hybrid Neural Architectures": intra-space and inter-space
    modules in alternation. Its alternation is that of frame-wise and global attention in VGGT (Wang
    et al. 2025, arXiv:2503.11651); gates from a small constant are LayerScale (Touvron et al. 2021,
    arXiv:2103.17239).

    Args:
        layers: L, at least 1.
        tokens: M, model tokens a space.
        width: d; a multiple of `heads`.
        heads: attention heads, in both modules.
        mlp_ratio: hidden width of the modules' MLPs over d.
        inter: "self" for the exchange above, "none" to leave it out.
        gamma: where the gates of the inter-space module start.
        hidden: width of the descriptor projectors' hidden layer.
        **options: those of `Alignment`.
    """

    readouts: ClassVar[Mapping[str, str]] = {
        "pooled": "the backbone's own descriptor",
        "predictions": "the predicted descriptors of all teachers, side by side",
        "tokens": "the normalised model tokens of all spaces, side by side",
        "both": "pooled and tokens, each scaled to unit length, side by side",
    }

    def __init__(
        self,
        student_dim: int,
        student_grid: Grid,
        spaces: Mapping[str, SpaceTarget],
        *,
        layers: int = 2,
        tokens: int = 4,
        width: int = 128,
        heads: int = 4,
        mlp_ratio: float = 2.0,
        inter: Literal["none", "self"] = "self",
        gamma: float = 0.1,
        hidden: int = 512,
        **options: Any,
    ) -> None:
        super().__init__(student_dim, student_grid, spaces, **options)
        if inter not in INTER:
            raise ConfigError(f"align.inter={inter}: valid are {', '.join(INTER)}")
        if layers < 1 or tokens < 1 or heads < 1 or width % heads:
            raise ConfigError(
                f"align: layers={layers} and tokens={tokens} must be at least 1 and width={width} "
                f"a multiple of heads={heads}"
            )
        self.streams = _streams(spaces)
        teachers = [spaces[name].teacher for name in self.streams]
        count = student_grid[0] * student_grid[1]
        self.model_tokens = nn.Parameter(torch.empty(len(self.streams), tokens, width))
        self.positions = nn.Parameter(torch.empty(len(self.streams), count, width))
        nn.init.trunc_normal_(self.model_tokens, std=0.02)
        nn.init.trunc_normal_(self.positions, std=0.02)
        self.inputs = nn.ModuleList(dense_projector(student_dim, width) for _ in self.streams)
        self.layers = nn.ModuleList(
            _Layer(len(self.streams), width, heads, mlp_ratio, inter, gamma) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.heads = nn.ModuleDict()
        self.token_heads = nn.ModuleDict()
        self._streams_of: dict[str, list[int]] = {}
        for label, space in self.descriptors.items():
            key, dim = module_key(label), spaces[space].dim
            own = [i for i, teacher in enumerate(teachers) if teacher == spaces[space].teacher]
            self._streams_of[label] = own
            self.heads[key] = descriptor_mlp(self.pooled_dim, hidden, dim)
            read = nn.Linear(len(own) * tokens * width, dim, bias=False)
            nn.init.zeros_(read.weight)
            self.token_heads[key] = read
        self.projectors = nn.ModuleDict(
            {
                module_key(name): dense_projector(student_dim, spaces[name].dim)
                for name in (self.dense if self.dense_weight else ())
            }
        )

    def attend(self, output: StudentOutput) -> Tensor:
        """The model tokens after all layers, normalised: [B, S, M, d], S as in `streams`."""
        student = output.tokens
        seen = [
            project(student) + position
            for project, position in zip(self.inputs, self.positions, strict=True)
        ]
        tokens = self.model_tokens.unsqueeze(0).expand(student.shape[0], -1, -1, -1)
        for layer in self.layers:
            tokens = layer(tokens, seen)
        return self.norm(tokens)

    def predict(self, output: StudentOutput, *, dense: bool) -> Predictions:
        tokens = self.attend(output)
        descriptors = {}
        for label in self.descriptors:
            key, own = module_key(label), tokens[:, self._streams_of[label]]
            descriptors[label] = self.heads[key](output.pooled) + self.token_heads[key](
                own.flatten(1)
            )
        return Predictions(
            descriptors=descriptors,
            dense={
                name: self.projectors[module_key(name)](output.tokens)
                for name in (self.dense if dense else ())
            },
        )

    def _readout(self, output: StudentOutput, kind: str) -> Tensor:
        if kind == "pooled":
            return output.pooled
        if kind == "predictions":
            return torch.cat(list(self.predict(output, dense=False).descriptors.values()), dim=-1)
        tokens = self.attend(output).flatten(1)
        if kind == "tokens":
            return tokens
        return torch.cat(
            [functional.normalize(output.pooled, dim=-1), functional.normalize(tokens, dim=-1)], -1
        )

    def no_weight_decay(self) -> set[str]:
        return {"model_tokens", "positions"}


class _Layer(nn.Module):
    """One intra-space module a space, then one inter-space module for all."""

    def __init__(
        self, spaces: int, width: int, heads: int, mlp_ratio: float, inter: str, gamma: float
    ) -> None:
        super().__init__()
        self.intra = nn.ModuleList(_Intra(width, heads, mlp_ratio) for _ in range(spaces))
        self.inter = _Inter(width, heads, mlp_ratio, gamma) if inter == "self" else None

    def forward(self, tokens: Tensor, seen: list[Tensor]) -> Tensor:
        """Model tokens [B, S, M, d] and, per space, the student's tokens [B, N, d]."""
        tokens = torch.stack(
            [module(tokens[:, i], seen[i]) for i, module in enumerate(self.intra)], dim=1
        )
        if self.inter is None:
            return tokens
        return self.inter(tokens.flatten(1, 2)).view_as(tokens)


class _Intra(nn.Module):
    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = CrossAttention(width, width, heads)
        self.mlp = _mlp(width, mlp_ratio)

    def forward(self, tokens: Tensor, seen: Tensor) -> Tensor:
        tokens = tokens + self.attention(self.norm(tokens), seen)
        return tokens + self.mlp(tokens)


class _Inter(nn.Module):
    def __init__(self, width: int, heads: int, mlp_ratio: float, gamma: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = _mlp(width, mlp_ratio)
        self.gamma_attention = nn.Parameter(torch.full((width,), float(gamma)))
        self.gamma_mlp = nn.Parameter(torch.full((width,), float(gamma)))

    def forward(self, tokens: Tensor) -> Tensor:
        normed = self.norm(tokens)
        exchanged, _ = self.attention(normed, normed, normed, need_weights=False)
        tokens = tokens + self.gamma_attention * exchanged
        return tokens + self.gamma_mlp * self.mlp(tokens)


def _mlp(width: int, ratio: float) -> nn.Sequential:
    hidden = round(width * ratio)
    return nn.Sequential(
        nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width)
    )


def _streams(spaces: Mapping[str, SpaceTarget]) -> list[str]:
    """The spaces that own model tokens: the dense ones, and global ones of teachers without."""
    with_grid = {space.teacher for space in spaces.values() if space.grid is not None}
    return [
        name
        for name, space in spaces.items()
        if space.grid is not None or space.teacher not in with_grid
    ]
