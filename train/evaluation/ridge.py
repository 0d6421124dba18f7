"""Ridge regression that is gathered once, in parts of any size, and solved for any strength."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .base import Array, row_blocks

Rows = NDArray[np.int64]
"""Positions of rows."""


@dataclass(frozen=True)
class AffineMap:
    """Outputs of features: (x - mean) / scale @ weight + bias, with mean and scale in both."""

    weight: NDArray[np.float64]
    bias: NDArray[np.float64]

    def scores(self, x: Array) -> NDArray[np.float32]:
        """[..., K] to [..., T]."""
        found: NDArray[np.float32] = x @ self.weight.astype(np.float32) + self.bias.astype(
            np.float32
        )
        return found

    def values(self, x: Array, rows: Rows | None = None) -> NDArray[np.float64]:
        """[n, K], or some rows of it, to [n, T] in float64."""
        parts = taken(x, len(self.bias), rows)
        return np.concatenate([x[part] @ self.weight + self.bias for part in parts])


class RidgeSums:
    """The normal equations of weighted ridge regression, float64 sums over rows.

    They take 8 K (K + T) bytes, however many rows there are.

    Args:
        width: K, of a feature.
        outputs: T.
    """

    def __init__(self, width: int, outputs: int) -> None:
        self.total = 0.0
        self._first, self._second = np.zeros(width), np.zeros((width, width))
        self._cross, self._target = np.zeros((width, outputs)), np.zeros(outputs)

    def add(
        self, x: Array, targets: NDArray[np.float64], weight: NDArray[np.float64] | None = None
    ) -> None:
        """Take rows in.

        Args:
            x: [b, K]; some 16 b K bytes are held meanwhile.
            targets: [b, T]. Sums of products do not cancel where they are about zero.
            weight: [b]; one each without.
        """
        values = x.astype(np.float64)
        weighted = values if weight is None else values * weight[:, None]
        weight = np.ones(len(x)) if weight is None else weight
        self.total += float(weight.sum())
        self._first += weighted.sum(0)
        self._second += weighted.T @ values
        self._cross += weighted.T @ targets
        self._target += weight @ targets

    def solve(self, strength: float) -> AffineMap:
        """Least squares with the L2 penalty `strength` against the mean squared error.

        Of features that are standardised by the rows' weighted mean and deviation.
        """
        target = self._target / self.total
        mean, scale = standardisation(self.total, self._first, np.diag(self._second))
        covariance = self._second / self.total - np.outer(mean, mean)
        covariance /= np.outer(scale, scale)
        cross = (self._cross / self.total - np.outer(mean, target)) / scale[:, None]
        penalised = covariance + strength * np.eye(len(mean))
        weight = np.linalg.solve(penalised, cross) / scale[:, None]
        return AffineMap(weight, target - mean @ weight)


def taken(x: Array, outputs: int, rows: Rows | None = None) -> Sequence[slice | Rows]:
    """Blocks of rows that bound what is held at once.

    So features that are mapped from a file are not copied whole.

    Args:
        x: [n, K].
        outputs: numbers that are held for each row beside its features.
        rows: positions of some of the n; all of them without.
    """
    if rows is None:
        return row_blocks(len(x), x.shape[1] + outputs)
    return [rows[part] for part in row_blocks(len(rows), x.shape[1] + outputs)]


def standardisation(
    total: float, first: NDArray[np.float64], second: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and deviation of each dimension; 1 for the deviation of one that is constant.

    Args:
        total: sum of the rows' weights.
        first, second: [K], weighted sums of the values and of their squares.
    """
    mean = first / total
    deviation = np.sqrt(np.maximum(second / total - mean * mean, 0.0))
    return mean, np.where(deviation > 1e-12 * (1 + np.abs(mean)), deviation, 1.0)
