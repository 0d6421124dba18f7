"""How sure a figure is: percentile bootstrap over test images, paired differences, seeds.

A *statistic* here is a function of how often each test image counts: weights float64 [B, m], one
row a resample, to values float64 [B]. All ones gives the figure itself, counts of a resample with
replacement give the bootstrap's (Efron 1979), and the same counts given to two models pair them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ...errors import ConfigError

Statistic = Callable[[NDArray[np.float64]], NDArray[np.float64]]
"""Weights [B, m] of the test images to values [B]; NaN where a resample leaves it undefined."""

_CHUNK = 4_000_000  # counts that are held at once
_ROUNDING = 1e-12
"""Share of a sum of squares about the mean that rounding alone may leave of it."""


@dataclass(frozen=True)
class Interval:
    """A value and the interval around it."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Bootstrap:
    """Percentile bootstrap over test images.

    Attributes:
        resamples: how many; 0 gives no intervals.
        level: coverage, such as 0.95.
        seed: of the resamples. Equal seeds and equally many images give equal resamples, whichever
            model is asked, so intervals of differences are paired.

    Raises:
        ConfigError: a value is out of its range.
    """

    resamples: int = 1000
    level: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        if self.resamples < 0 or not 0 < self.level < 1:
            raise ConfigError(
                f"intervals: resamples={self.resamples} must be at least 0 and level={self.level} "
                "between 0 and 1"
            )

    def interval(self, statistic: Statistic, images: int) -> Interval:
        """The value of a statistic over `images` test images, and its percentile interval.

        Resamples in which the statistic is undefined are left out. NaN bounds where there are no
        resamples.
        """
        value = float(statistic(np.ones((1, images)))[0])
        return Interval(value, *self.bounds(self.resampled(statistic, images)))

    def resampled(self, statistic: Statistic, images: int) -> NDArray[np.float64]:
        """The statistic on every resample, float64 [resamples]; NaN where it is undefined."""
        parts = [
            statistic(counts.astype(np.float64))
            for counts in _counts(self.seed, self.resamples, images)
        ]
        return np.concatenate(parts) if parts else np.zeros(0)

    def bounds(self, values: NDArray[np.float64]) -> tuple[float, float]:
        """Percentiles of resampled values: the interval's ends; NaN where there are none."""
        values = values[np.isfinite(values)]
        if not len(values):
            return math.nan, math.nan
        tail = (1 - self.level) / 2
        low, high = np.quantile(values, [tail, 1 - tail])
        return float(low), float(high)

    def difference(self, ours: Statistic, theirs: Statistic, images: int) -> Interval:
        """Ours minus theirs on the same test images, with the interval of the paired resamples."""
        return self.interval(lambda weights: ours(weights) - theirs(weights), images)


@lru_cache(maxsize=2)
def _counts(seed: int, resamples: int, images: int) -> tuple[NDArray[np.uint16], ...]:
    """How often each image counts in each resample, in parts of [b, images]: drawn once, since all
    scores of one number of images share them."""
    random = np.random.default_rng(seed)
    most = max(1, _CHUNK // images)
    parts = []
    for start in range(0, resamples, most):
        rows = min(most, resamples - start)
        drawn = random.integers(images, size=(rows, images))
        drawn += images * np.arange(rows)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=rows * images)
        parts.append(counts.reshape(rows, images).astype(np.uint16))
    return tuple(parts)


def over_seeds(values: Sequence[float], level: float = 0.95) -> Interval:
    """Mean over runs that differ in their seed alone, and Student's t interval of that mean.

    For paired runs give the differences. With few seeds the t interval is the wide, honest one; a
    bootstrap over three numbers is not. NaN bounds for a single run.

    Raises:
        ValueError: there are no values, or they have more than one axis.
    """
    from scipy import stats

    found = np.asarray(values, dtype=np.float64)
    if found.ndim != 1 or not len(found):
        raise ValueError(f"expected at least one value, got an array of shape {found.shape}")
    mean = float(found.mean())
    if len(found) == 1:
        return Interval(mean, math.nan, math.nan)
    reach = float(
        stats.t.ppf((1 + level) / 2, len(found) - 1) * found.std(ddof=1) / math.sqrt(len(found))
    )
    return Interval(mean, mean - reach, mean + reach)


@dataclass(frozen=True, eq=False)
class MeanOf:
    """The weighted mean of one figure an image.

    Attributes:
        values: float64 [m]; 1 for right and 0 for wrong, a precision, ...
    """

    values: NDArray[np.float64]

    def __call__(self, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        return (weights @ self.values) / weights.sum(1)


@dataclass(frozen=True, eq=False)
class R2:
    """Coefficient of determination, averaged over targets: 1 - sum (y - p)^2 / sum (y - mean y)^2.

    Undefined where some target is the same for all images that count, as a rare one is in many
    resamples.

    Attributes:
        truth, predicted: float64 [m, T].
    """

    truth: NDArray[np.float64]
    predicted: NDArray[np.float64]

    def __call__(self, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        total = weights.sum(1, keepdims=True)
        centred = self.truth - self.truth.mean(0)  # so that the difference below does not cancel
        residual = weights @ (self.truth - self.predicted) ** 2
        spread = _spread(weights @ centred**2, (weights @ centred) ** 2 / total)
        found: NDArray[np.float64] = (1 - residual / spread).mean(1)
        return found


@dataclass(frozen=True, eq=False)
class PooledR2:
    """Coefficient of determination of all pixels of all images together.

    Undefined where all of them have one value.

    Attributes:
        residual: float64 [m], sum of (y - p)^2 over the pixels of an image.
        first, second: float64 [m], sums of y and of y^2; of y around about its mean, since their
            difference is taken.
        count: float64 [m], pixels.
    """

    residual: NDArray[np.float64]
    first: NDArray[np.float64]
    second: NDArray[np.float64]
    count: NDArray[np.float64]

    def __call__(self, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        shared = (weights @ self.first) ** 2 / (weights @ self.count)
        spread = _spread(weights @ self.second, shared)
        found: NDArray[np.float64] = 1 - (weights @ self.residual) / spread
        return found


def _spread(second: NDArray[np.float64], shared: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sums of squares about the mean, from those about another point; NaN where they are none."""
    found = second - shared
    return np.where(found > _ROUNDING * second, found, np.nan)


@dataclass(frozen=True, eq=False)
class MeanIoU:
    """Intersection over union, pooled over pixels, averaged over the classes that occur.

    Attributes:
        intersection, union: float64 [m, C], pixels an image and a class.
    """

    intersection: NDArray[np.float64]
    union: NDArray[np.float64]

    def __call__(self, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        shared, joined = weights @ self.intersection, weights @ self.union
        with np.errstate(invalid="ignore"):
            found: NDArray[np.float64] = np.nanmean(
                np.where(joined > 0, shared / joined, np.nan), axis=1
            )
        return found
