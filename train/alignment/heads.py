"""Small networks that alignments predict with."""

from __future__ import annotations

from torch import nn


def descriptor_mlp(source: int, hidden: int, target: int) -> nn.Sequential:
    """LayerNorm, Linear, GELU, Linear: [..., source] to [..., target]."""
    return nn.Sequential(
        nn.LayerNorm(source), nn.Linear(source, hidden), nn.GELU(), nn.Linear(hidden, target)
    )


def dense_projector(source: int, target: int) -> nn.Sequential:
    """LayerNorm and one Linear: [B, N, source] to [B, N, target]."""
    return nn.Sequential(nn.LayerNorm(source), nn.Linear(source, target))
