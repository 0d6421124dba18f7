"""How token grids of different size meet: fixed linear maps of one grid's tokens to another's."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...errors import DataError
from .spaces import Grid


class _GridMatrix(nn.Module):
    """Tokens of one grid on another, by a fixed matrix [N_to, N_from]; None where they are one."""

    matrix: Tensor | None

    def __init__(self, source: Grid, target: Grid, resize: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.source, self.target = source, target
        matrix = None
        if source != target:
            matrix = resize(_basis(source)).flatten(1).t().contiguous()
        self.register_buffer("matrix", matrix, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, N_from, D] float to [B, N_to, D].

        Raises:
            DataError: the tokens are not those of the source grid.
        """
        _check(tokens, self.source)
        return tokens if self.matrix is None else torch.matmul(self.matrix.to(tokens.dtype), tokens)


class GridResample(_GridMatrix):
    """Tokens of one grid on another, by one fixed matrix [N_to, N_from].

    Bilinear with half-pixel centres and edges held; where the grid shrinks the triangle widens by
    the ratio, so that every source token counts (antialiasing). Rows sum to one: constants stay,
    and resampling commutes with any linear projection. As a matrix it runs everywhere and its
    gradient is deterministic on CUDA, which the interpolation kernels' is not.
    """

    def __init__(self, source: Grid, target: Grid) -> None:
        super().__init__(
            source,
            target,
            lambda basis: functional.interpolate(basis, target, mode="bilinear", antialias=True),
        )


class GridPool(_GridMatrix):
    """Means over the windows of a smaller grid, as `torch.nn.AdaptiveAvgPool2d` takes them.

    A matrix too, so that it can be exported for sizes that do not divide.

    Args:
        source: grid of the tokens.
        target: the smaller grid (windows overlap where it has more rows or columns).
    """

    def __init__(self, source: Grid, target: Grid) -> None:
        super().__init__(
            source, target, lambda basis: functional.adaptive_avg_pool2d(basis, target)
        )


def _basis(grid: Grid) -> Tensor:
    count = grid[0] * grid[1]
    return torch.eye(count, device="cpu").view(count, 1, *grid)


def _check(tokens: Tensor, grid: Grid) -> None:
    if tokens.shape[-2] != grid[0] * grid[1]:
        raise DataError(
            f"{tokens.shape[-2]} tokens are not a grid of {grid[0]} x {grid[1]}: images or store "
            "have another size than the alignment was built for"
        )
