"""The two modules that model tokens alternate between, shared by all that carries model tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from ..attention import CrossAttention, ProjectedTokens
from ..groups import GroupNorm, group_mlp
from .heads import dense_projector, descriptor_mlp

Inter = Literal["none", "self", "cross"]
INTER = ("none", "self", "cross")

Seen = Tensor | Sequence[ProjectedTokens]
"""What model tokens look at: [B, G, N, d], or one `ProjectedTokens` a group."""


class TokenLayer(nn.Module):
    """One intra-space module for each of G groups of model tokens, then one inter-space module.

    With model tokens m_g [B, M, d] and the visual tokens X_g [B, N, d] that group g looks at:

        intra-space   m_g <- m_g + CrossAttention_g(LN m_g, X_g)          own weights a group
                      m_g <- m_g + MLP_g(LN m_g)
        inter-space   m   <- m + gamma_1 * Exchange(LN m)                 all G * M tokens together
                      m   <- m + gamma_2 * MLP(LN m)

    Exchange is self-attention among all model tokens ("self"), or cross-attention of all of them to
    the visual tokens of all groups under one softmax ("cross": attention over each X_g merged by
    the logsumexp, with one set of weights). gamma [d] are learnt gates (LayerScale), or 1.

    Without `intra` the first two lines are left out: the tokens see X through "cross" alone, or not
    at all.

    Args:
        groups: G.
        width: d; a multiple of `heads`.
        mlp_ratio: hidden width of the MLPs over d; 0 leaves them out.
        inter: "none", "self" or "cross".
        gamma: where the gates start; None for none.
        intra: whether there is the intra-space module.
    """

    def __init__(
        self,
        groups: int,
        width: int,
        heads: int,
        mlp_ratio: float,
        inter: Inter,
        gamma: float | None,
        intra: bool = True,
    ) -> None:
        super().__init__()
        hidden = round(width * mlp_ratio)
        self.norm = GroupNorm(groups, width) if intra else None
        self.attention = CrossAttention(width, width, heads, groups=groups) if intra else None
        self.mlp = group_mlp(groups, width, hidden) if intra and hidden else None
        self.inter = None
        if inter != "none":
            self.inter = _Exchange(width, heads, hidden, inter, gamma)

    def forward(self, tokens: Tensor, seen: Seen | None) -> Tensor:
        """Model tokens [B, G, M, d] to the same; `seen` may be None where nothing is read."""
        if self.norm is not None and self.attention is not None:
            assert seen is not None
            tokens = tokens + self.attention(self.norm(tokens), seen)
        if self.mlp is not None:
            tokens = tokens + self.mlp(tokens)
        if self.inter is None:
            return tokens
        return self.inter(tokens.flatten(1, 2), seen).view_as(tokens)


class TokenReader(nn.Module):
    """L layers after the backbone, and what they see of the student: X_s = P_s LN S + pos_s."""

    undecayed = ("positions",)

    def __init__(
        self,
        student_dim: int,
        count: int,
        layers: int,
        streams: int,
        width: int,
        heads: int,
        mlp_ratio: float,
        inter: Inter,
        gamma: float | None,
        intra: bool,
    ) -> None:
        super().__init__()
        self.positions: nn.Parameter | None = None
        self.inputs = nn.ModuleList()
        if reads(intra, inter):
            self.positions = nn.Parameter(torch.empty(streams, count, width))
            nn.init.trunc_normal_(self.positions, std=0.02)
            self.inputs.extend(dense_projector(student_dim, width) for _ in range(streams))
        self.layers = nn.ModuleList(
            TokenLayer(streams, width, heads, mlp_ratio, inter, gamma, intra) for _ in range(layers)
        )

    def seen(self, student: Tensor) -> Tensor | None:
        """X_s of all spaces [B, S, N, d] from the student's tokens [B, N, C]; None where no layer
        reads them."""
        if self.positions is None:
            return None
        return torch.stack([project(student) for project in self.inputs], 1) + self.positions

    def forward(self, tokens: Tensor, seen: Seen | None) -> Tensor:
        """Model tokens [B, S, M, d] through all layers."""
        for layer in self.layers:
            tokens = layer(tokens, seen)
        return tokens


class _Exchange(nn.Module):
    def __init__(
        self, width: int, heads: int, hidden: int, inter: Inter, gamma: float | None
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention: nn.MultiheadAttention | CrossAttention
        if inter == "self":
            self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        else:
            self.attention = CrossAttention(width, width, heads)
        self.mlp = descriptor_mlp(width, hidden, width) if hidden else None
        self.gamma_attention = _gate(width, gamma)
        self.gamma_mlp = _gate(width, gamma) if hidden else None

    def forward(self, tokens: Tensor, seen: Seen | None) -> Tensor:
        normed = self.norm(tokens)
        if isinstance(self.attention, CrossAttention):
            assert seen is not None
            exchanged = self.attention.over_spaces(normed, seen)
        else:
            exchanged, _ = self.attention(normed, normed, normed, need_weights=False)
        tokens = tokens + _gated(exchanged, self.gamma_attention)
        if self.mlp is None:
            return tokens
        return tokens + _gated(self.mlp(tokens), self.gamma_mlp)


def reads(intra: bool, inter: Inter) -> bool:
    """Whether a `TokenLayer` looks at the visual tokens at all."""
    return intra or inter == "cross"


def check_tokens(
    layers: int,
    tokens: int,
    width: int,
    heads: int,
    inter: str,
    mlp_ratio: float,
    *,
    intra: bool = True,
    gamma: float | None = None,
    least_layers: int = 1,
) -> None:
    """Refuse what no layer can be built of.

    Raises:
        ConfigError: names the option.
    """
    if inter not in INTER:
        raise ConfigError(f"align.inter={inter}: valid are {', '.join(INTER)}")
    if not intra and inter == "none":
        raise ConfigError(
            "align.intra=false and align.inter=none leave the model tokens no module: at least one "
            "of them is needed"
        )
    if layers < least_layers or tokens < 1 or heads < 1 or width < 1 or width % heads:
        raise ConfigError(
            f"align: layers={layers} must be at least {least_layers}, tokens={tokens} at least 1 "
            f"and width={width} a multiple of heads={heads}"
        )
    if gamma is not None and not abs(gamma) < float("inf"):
        raise ConfigError(f"align.gamma={gamma}: a finite number, or null for no gates")
    if not 0 <= mlp_ratio < float("inf"):
        raise ConfigError(f"align.mlp_ratio={mlp_ratio}: at least 0; 0 leaves the MLPs out")


def _gate(width: int, gamma: float | None) -> nn.Parameter | None:
    return None if gamma is None else nn.Parameter(torch.full((width,), float(gamma)))


def _gated(update: Tensor, gamma: Tensor | None) -> Tensor:
    return update if gamma is None else gamma * update
