"""Similarity of representations: linear centred kernel alignment with each teacher space."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from .base import Array, Features, Measurement, Protocol
from .truths import Spaces

GRAM = 4096
"""Most images of which intervals are computed: they need the images' Gram matrices."""


@dataclass(frozen=True)
class CKA(Protocol[Spaces]):
    """Linear CKA (Kornblith et al. 2019, arXiv:1905.00414, section 3) on all test images at once.

    With X [m, K] and Y [m, D] centred over the images,

        CKA(X, Y) = |Y^T X|_F^2 / (|X^T X|_F |Y^T Y|_F) ,

    which is invariant to rotation and to one scale of either side, is 1 for equal representations,
    and is not invariant to the scale of single dimensions: teachers are taken in their own units. A
    space on a grid is represented by the mean of its tokens. For few images and wide features the
    figure is biased upwards, for all models alike. It says how alike two representations are, not
    which is better. One figure a space; nothing is learnt. Intervals are given up to `GRAM` images;
    resamples repeat images, so they lie a little high.
    """

    truth: ClassVar[type[Spaces]] = Spaces

    def measure(self, features: Features, truth: Spaces) -> list[Measurement]:
        x = features.test
        return [
            Measurement(
                metric="CKA",
                statistic=Alignment(x, space) if len(x) <= GRAM else Whole(linear_cka(x, space)),
                variant=name,
            )
            for name, space in truth.test.items()
        ]


def linear_cka(x: Array, y: Array) -> float:
    """Linear CKA of x [m, K] and y [m, D], in float64. 0 where either is constant."""
    a, b = (np.asarray(part, np.float64) - part.mean(0, dtype=np.float64) for part in (x, y))
    return _ratio(((b.T @ a) ** 2).sum(), _gram_norm(a), _gram_norm(b))


@dataclass(frozen=True, eq=False)
class Whole:
    """A figure of all images once each, undefined for any other weights; it holds no features."""

    value: float

    def __call__(self, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.where((weights == 1).all(1), self.value, np.nan)


@dataclass(frozen=True, eq=False)
class Alignment:
    """`linear_cka` as a statistic of the images' weights.

    Scores keep their statistics, so it holds the features and not the Gram matrices, which it
    computes for every part of the resamples.
    """

    x: Array = field(repr=False)
    y: Array = field(repr=False)

    def __call__(self, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        if (weights == 1).all():
            return np.full(len(weights), linear_cka(self.x, self.y))
        # Centred by the unweighted mean: the statistic does not depend on it, rounding does.
        centred = (part - part.mean(0, dtype=np.float64) for part in (self.x, self.y))
        k, l = (part @ part.T for part in centred)
        cross, first, second = (_weighted_hsic(a, b, weights) for a, b in ((k, l), (k, k), (l, l)))
        with np.errstate(invalid="ignore", divide="ignore"):
            found: NDArray[np.float64] = cross / np.sqrt(first * second)
        return found


def _weighted_hsic(
    k: NDArray[np.float64], l: NDArray[np.float64], weights: NDArray[np.float64]
) -> NDArray[np.float64]:
    """tr(K H L H) where image i occurs weights[:, i] times; H centres by the weighted mean."""
    total = weights.sum(1)
    kw, lw = weights @ k, weights @ l
    plain = ((weights @ (k * l)) * weights).sum(1)
    mixed = (kw * lw * weights).sum(1)
    return plain - 2 * mixed / total + (kw * weights).sum(1) * (lw * weights).sum(1) / total**2


def _gram_norm(centred: NDArray[np.float64]) -> float:
    rows, columns = centred.shape
    product = centred @ centred.T if rows < columns else centred.T @ centred
    return float(np.sqrt((product**2).sum()))


def _ratio(cross: float, first: float, second: float) -> float:
    return float(cross / (first * second)) if first * second > 0 else 0.0
