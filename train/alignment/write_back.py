"""Model tokens that live inside the backbone: they read its stages and are read back by them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..stages import Stage
from .grids import GridPool
from .heads import dense_projector
from .token_layers import Inter, TokenLayer, reads


class WriteBack(nn.Module):
    """The interaction of all model tokens with a backbone, at several of its stages.

    With z [B, S * M, d] the model tokens of all spaces, starting from their learnt values, and h_l
    [B, P + N_l, C_l] the tokens of stage l (P class and register tokens, then the map's), at each
    stage in turn:

        X_l = W_l LN pool(h_l) + pos_l                              [B, N', d], of the map alone
        z   <- z + CrossAttention_l(LN z, X_l)                      the intra-space read
        z   <- z + gamma * SelfAttention(LN z), MLPs as in `TokenLayer`
        h_l <- h_l + O_l Attention_l(Q_l LN h_l, LN z)              O_l from zero

    The map is pooled to at most `pool` x `pool` tokens for the read; the write reaches every token
    of the stage, class and register tokens included, so that a ViT's class token profits where it
    is the descriptor. Tokens of different spaces differ by their start and their share of the
    losses; the read has one set of weights a stage. As O starts at zero, the student starts as the
    plain backbone.

    It runs at inference too: its parameters and time belong to the student.

    Args:
        width: d.
        stages: all depths of the student.
        chosen: numbers of those that are visited, rising.
        heads, mlp_ratio, inter, gamma, intra: as in `TokenLayer`; beside the intra-space read
            "cross" is "self" here, where all tokens look at the one map anyway. With neither, the
            tokens are learnt constants that the backbone reads, and X_l is not made.
        pool: most rows and columns of the map that is read.
    """

    def __init__(
        self,
        width: int,
        stages: Sequence[Stage],
        chosen: Sequence[int],
        *,
        heads: int,
        mlp_ratio: float,
        inter: Inter,
        gamma: float | None,
        intra: bool = True,
        pool: int,
    ) -> None:
        super().__init__()
        self.stages = tuple(chosen)
        exchange: Inter = "self" if intra and inter == "cross" else inter
        modules = (width, heads, mlp_ratio, exchange, gamma, intra, pool)
        self.sites = nn.ModuleDict(
            {str(number): _Site(stages[number], *modules) for number in chosen}
        )

    def visit(self, stage: int, carried: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Read and write one stage; see `Interaction`."""
        site: nn.Module = self.sites[str(stage)]
        carried, update = site(carried, tokens)
        return carried, update


class _Site(nn.Module):
    undecayed = ("positions",)

    def __init__(
        self,
        stage: Stage,
        width: int,
        heads: int,
        mlp_ratio: float,
        inter: Inter,
        gamma: float | None,
        intra: bool,
        pool: int,
    ) -> None:
        super().__init__()
        self.prefix, self.heads = stage.prefix, heads
        self.pool: GridPool | None = None
        self.input: nn.Module | None = None
        self.positions: nn.Parameter | None = None
        if reads(intra, inter):
            rows, columns = (min(side, pool) for side in stage.grid)
            self.pool = GridPool(stage.grid, (rows, columns))
            self.input = dense_projector(stage.dim, width)
            self.positions = nn.Parameter(torch.empty(rows * columns, width))
            nn.init.trunc_normal_(self.positions, std=0.02)
        self.layer = TokenLayer(1, width, heads, mlp_ratio, inter, gamma, intra)
        self.query = dense_projector(stage.dim, width)
        self.norm = nn.LayerNorm(width)
        self.key_value = nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, stage.dim)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, carried: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """z [B, S * M, d] and h [B, P + N, C] to z and the update of h."""
        seen = self._seen(tokens[:, self.prefix :])
        carried = self.layer(carried.unsqueeze(1), seen).squeeze(1)
        q, (k, v) = self.query(tokens), self.key_value(self.norm(carried)).chunk(2, dim=-1)
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))
        read = functional.scaled_dot_product_attention(q, k, v)
        return carried, self.output(read.transpose(1, 2).flatten(2))

    def _seen(self, image: Tensor) -> Tensor | None:
        """X [B, 1, N', d] of the map's tokens [B, N, C]; None where nothing is read."""
        if self.input is None or self.pool is None or self.positions is None:
            return None
        seen: Tensor = self.input(self.pool(image)) + self.positions
        return seen.unsqueeze(1)
