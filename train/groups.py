"""The same small network for each of G groups, own weights a group, as one product."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class GroupLinear(nn.Module):
    """G linear maps in one product: [B, G, M, in] to [B, G, M, out], own weights a group.

    Initialised as `torch.nn.Linear` is.
    """

    undecayed = ("bias",)

    def __init__(self, groups: int, source: int, target: int, bias: bool = True) -> None:
        super().__init__()
        bound = source**-0.5
        self.weight = nn.Parameter(torch.empty(groups, target, source).uniform_(-bound, bound))
        self.bias = (
            nn.Parameter(torch.empty(groups, target).uniform_(-bound, bound)) if bias else None
        )

    def forward(self, x: Tensor) -> Tensor:
        batch, groups, count, _ = x.shape
        rows = x.transpose(0, 1).reshape(groups, batch * count, -1)
        weight = self.weight.transpose(1, 2)
        if self.bias is None:
            y = torch.bmm(rows, weight)
        else:
            y = torch.baddbmm(self.bias.unsqueeze(1), rows, weight)
        return y.unflatten(1, (batch, count)).transpose(0, 1)


class GroupNorm(nn.Module):
    """LayerNorm of [B, G, M, d] over d with own scale and shift a group."""

    undecayed = ("weight", "bias")

    def __init__(self, groups: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(groups, 1, width))
        self.bias = nn.Parameter(torch.zeros(groups, 1, width))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, x.shape[-1:]) * self.weight + self.bias


def group_mlp(groups: int, width: int, hidden: int) -> nn.Sequential:
    """LayerNorm, Linear, GELU, Linear on [B, G, M, width], own weights a group."""
    return nn.Sequential(
        GroupNorm(groups, width),
        GroupLinear(groups, width, hidden),
        nn.GELU(),
        GroupLinear(groups, hidden, width),
    )


def undecayed(module: nn.Module) -> set[str]:
    """Names of parameters that the parts of a module list under `undecayed`: learnt tokens and
    positions, and the biases and norms of groups, which optimisers do not know by their dimensions.
    """
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, part in module.named_modules()
        for name in getattr(part, "undecayed", ())
        if getattr(part, name) is not None
    }
