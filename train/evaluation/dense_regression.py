"""Dense regression probe: a number of every pixel, such as a depth, from the tokens of a grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from ...errors import ConfigError
from .base import Array, Features, Measurement
from .cells import cell_means
from .grid_probe import GridProbe, over_images, pixel_scores
from .intervals import PooledR2
from .ridge import AffineMap, RidgeSums
from .truths import ValueMaps


@dataclass(frozen=True)
class DenseRegression(GridProbe[ValueMaps]):
    """R^2 of a linear map from each token to the mean of its cell, over pixels.

    `Dense` for numbers: a token's target is the mean of the known pixels of its cell, and it weighs
    as much as its known share; features are standardised; the L2 strength s (``alpha = s`` times
    the total weight) is chosen by R^2 on held-out training images, and the probe is then fitted on
    all of them. Predictions are resized bilinearly from the grid to the maps, so that models with
    different grids are judged on the same pixels. R^2 is that of all known pixels of the test
    images together: 1 for exact predictions, 0 for the mean of those pixels, negative for worse.
    """

    truth: ClassVar[type[ValueMaps]] = ValueMaps
    named: ClassVar[str] = "dense_regression"

    def check(self, truth: ValueMaps) -> None:
        for side, values in (("training", truth.train), ("test", truth.test)):
            if not np.nanmax(values) > np.nanmin(values):
                raise ConfigError(
                    f"task {truth.name}: all pixels of the {side} maps have one value, so there is "
                    "nothing to predict"
                )
        self.split(len(truth.train))

    def measure(self, features: Features, truth: ValueMaps) -> list[Measurement]:
        self.check(truth)
        assert features.grid is not None
        grid = features.grid
        fit, held = self.split(len(truth.train))
        # Sums of squares do not cancel where numbers are far from zero and close to each other.
        centre = float(np.nanmean(truth.train))
        train, test = truth.train - centre, truth.test - centre
        part = _ridge(features.train, grid, train, fit)

        def r2(probe: AffineMap) -> float:
            found, _ = _judge(probe, features.train, grid, train, held)
            return float(found(np.ones((1, len(held))))[0])

        strength, validation = self.chosen(part, r2)
        probe = _ridge(features.train, grid, train).solve(strength)
        statistic, absolute = _judge(probe, features.test, grid, test)
        count = statistic.count.sum()
        return [
            Measurement(
                metric="R2",
                statistic=statistic,
                validation=validation,
                chosen={"strength": strength},
                details={
                    "rmse": float(np.sqrt(statistic.residual.sum() / count)),
                    "mae": float(absolute / count),
                },
            )
        ]


def _ridge(
    tokens: Array,
    grid: tuple[int, int],
    maps: NDArray[np.float64],
    images: NDArray[np.int64] | None = None,
) -> RidgeSums:
    """Of the tokens of some images, or of all."""
    sums = RidgeSums(tokens.shape[-1], 1)
    for part in over_images(tokens, maps[0].size, images):
        known = np.isfinite(maps[part])
        means, weight = cell_means(np.where(known, maps[part], 0.0)[..., None], known, grid)
        sums.add(
            tokens[part].reshape(-1, tokens.shape[-1]), means.reshape(-1, 1), weight.reshape(-1)
        )
    return sums


def _judge(
    probe: AffineMap,
    tokens: Array,
    grid: tuple[int, int],
    maps: NDArray[np.float64],
    images: NDArray[np.int64] | None = None,
) -> tuple[PooledR2, float]:
    """Sums over the known pixels of each image, and the sum of all absolute errors."""
    sums, absolute = [], 0.0
    for part in over_images(tokens, maps[0].size, images):
        truth = maps[part]
        said = pixel_scores(probe, tokens[part], grid, truth.shape[1:])[:, 0]
        known = np.isfinite(truth)
        error = np.where(known, said - truth, 0.0)
        values = np.where(known, truth, 0.0)
        absolute += float(np.abs(error).sum())
        axes = (1, 2)
        sums.append(
            np.stack(
                [(error**2).sum(axes), values.sum(axes), (values**2).sum(axes), known.sum(axes)]
            )
        )
    return PooledR2(*np.concatenate(sums, axis=1)), absolute
