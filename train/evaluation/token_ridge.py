"""Ridge regression from the tokens of a grid to what the cells of a map hold."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .base import Array


@dataclass(frozen=True)
class TokenProbe:
    """Outputs of tokens: (x - mean) / scale @ weight + bias, with mean and scale in both."""

    weight: NDArray[np.float64]
    bias: NDArray[np.float64]

    def scores(self, tokens: Array) -> NDArray[np.float32]:
        """[..., K] to [..., T]."""
        found: NDArray[np.float32] = tokens @ self.weight.astype(np.float32) + self.bias.astype(
            np.float32
        )
        return found


class TokenRidge:
    """Weighted ridge regression of all tokens, gathered once and solved for any strength.

    float64 sums over images, so that no copy of the tokens is made.

    Args:
        tokens: float32 [n, N, K].
        cells: images as a slice with the targets [b, N, T] of their tokens and how much each weighs
            [b, N], for all images once.
        outputs: T.
    """

    def __init__(
        self,
        tokens: Array,
        cells: Iterable[tuple[slice, NDArray[np.float64], NDArray[np.float64]]],
        outputs: int,
    ) -> None:
        width = tokens.shape[-1]
        self.total = 0.0
        first, second = np.zeros(width), np.zeros((width, width))
        cross, target = np.zeros((width, outputs)), np.zeros(outputs)
        for part, targets, weight in cells:
            x = tokens[part].reshape(-1, width).astype(np.float64)
            y, w = targets.reshape(-1, outputs), weight.reshape(-1)
            weighted = x * w[:, None]
            self.total += float(w.sum())
            first += weighted.sum(0)
            second += weighted.T @ x
            cross += weighted.T @ y
            target += w @ y
        mean, self.target = first / self.total, target / self.total
        covariance = second / self.total - np.outer(mean, mean)
        deviation = np.sqrt(np.maximum(np.diag(covariance), 0.0))
        scale = np.where(deviation > 1e-12 * (1 + np.abs(mean)), deviation, 1.0)
        self.mean, self.scale = mean, scale
        self.covariance = covariance / np.outer(scale, scale)
        self.cross = (cross / self.total - np.outer(mean, self.target)) / scale[:, None]

    def solve(self, strength: float) -> TokenProbe:
        """Least squares with the L2 penalty `strength` against the mean squared error."""
        penalised = self.covariance + strength * np.eye(len(self.mean))
        weight = np.linalg.solve(penalised, self.cross) / self.scale[:, None]
        return TokenProbe(weight, self.target - self.mean @ weight)


def cell_means(
    values: NDArray[np.float64], known: NDArray[np.bool_], grid: tuple[int, int]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Means over the known pixels of each cell of a grid, and the known share of the cell.

    A cell is the area that belongs to a token where the grid covers the whole map; pixels on a
    border between cells count for each by their area.

    Args:
        values: [b, H, W, T]; 0 where not known.
        known: bool [b, H, W].

    Returns:
        float64 [b, rows * columns, T], 0 in cells without known pixels, and float64
        [b, rows * columns] from 0 to 1.
    """
    rows, columns = (_areas(edge, cells) for edge, cells in zip(known.shape[1:], grid, strict=True))
    sums = np.einsum("rh,bhwk,cw->brck", rows, values, columns, optimize=True)
    weight = np.einsum("rh,bhw,cw->brc", rows, known.astype(np.float64), columns, optimize=True)
    weight = weight[..., None]
    means = np.divide(sums, weight, out=np.zeros_like(sums), where=weight > 0)
    return means.reshape(len(values), -1, values.shape[-1]), weight.reshape(len(values), -1)


def _areas(edge: int, cells: int) -> NDArray[np.float64]:
    """[cells, edge]: the share of each cell's length that each pixel takes; rows sum to one."""
    pixel, cell = np.arange(edge) / edge, np.arange(cells)[:, None] / cells
    low, high = np.maximum(pixel, cell), np.minimum(pixel + 1 / edge, cell + 1 / cells)
    return np.maximum(high - low, 0.0) * cells
