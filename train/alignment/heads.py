"""Small networks that alignments predict with."""

from __future__ import annotations

from torch import nn

from ...errors import ConfigError


def descriptor_mlp(source: int, hidden: int, target: int) -> nn.Sequential:
    """LayerNorm, Linear, GELU, Linear: [..., source] to [..., target].

    Raises:
        ConfigError: there is nothing between the two.
    """
    if hidden < 1:
        raise ConfigError(f"align.hidden={hidden}: at least 1")
    return nn.Sequential(
        nn.LayerNorm(source), nn.Linear(source, hidden), nn.GELU(), nn.Linear(hidden, target)
    )


def dense_projector(source: int, target: int) -> nn.Sequential:
    """LayerNorm and one Linear: [B, N, source] to [B, N, target]."""
    return nn.Sequential(nn.LayerNorm(source), nn.Linear(source, target))
