"""Exact streaming moments in float64: what standardisation, PHI-S and PCA need.

Sums are taken of values shifted by the calibrated mean, one set a shard; shards are merged in
their order with the pairwise update of Chan, Golub & LeVeque (1979), so the result depends
neither on interruptions nor on which process extracted which shard.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from .encoded import to_host
from .encodings.prediction import Prediction, fitted, neighbours
from .plan import SpaceSpec


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations of token vectors.

    Attributes:
        count: number of tokens.
        mean: float64 ``[D]``.
        scatter: float64 ``[D, D]``: sum of (x - mean)(x - mean)^T.
    """

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @property
    def covariance(self) -> np.ndarray:
        """Population covariance (divisor: count), float64 ``[D, D]``."""
        return self.scatter / max(self.count, 1)

    @property
    def possible(self) -> bool:
        """Whether all numbers are finite and no variance is below zero by more than rounding.

        What a dimension's sums were shifted by is not known here, so rounding is taken to be as
        large as the largest mean square makes it. Stores that were begun when `Accumulator` left
        such variances below zero can so be finished.
        """
        if not (np.isfinite(self.mean).all() and np.isfinite(self.scatter).all()):
            return False
        variances = np.diag(self.scatter)
        largest = float((variances + self.count * self.mean**2).max(initial=0))
        return self.count >= 0 and bool((variances >= -1e-9 * largest).all())

    def mean_square(self, centre: np.ndarray) -> np.ndarray:
        """Mean of (x - centre)^2, float64 ``[D]``; centre: float64 ``[D]``."""
        variance = np.maximum(np.diag(self.scatter), 0.0) / max(self.count, 1)
        found: np.ndarray = variance + (self.mean - centre) ** 2
        return found

    @classmethod
    def empty(cls, dim: int) -> Moments:
        """Of no tokens: zeros of the shapes above."""
        return cls(0, np.zeros(dim), np.zeros((dim, dim)))

    def merged(self, other: Moments) -> Moments:
        """The moments of both sets of tokens together."""
        if not self.count or not other.count:
            return other if other.count else self
        count = self.count + other.count
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        weight = self.count * other.count / count
        return Moments(
            count, mean, self.scatter + other.scatter + np.multiply.outer(delta, delta) * weight
        )

    def packed(self) -> np.ndarray:
        """float64 vector: count, mean, upper triangle of the scatter, row by row."""
        upper = self.scatter[np.triu_indices(len(self.mean))]
        return np.concatenate([[float(self.count)], self.mean, upper]).astype("<f8")

    @classmethod
    def unpacked(cls, vector: np.ndarray, dim: int) -> Moments:
        """The inverse of :meth:`packed`.

        Raises:
            ValueError: when the length does not fit ``dim``.
        """
        if vector.shape != (1 + dim + dim * (dim + 1) // 2,):
            raise ValueError(f"{vector.size} numbers are not the moments of {dim} dimensions")
        upper = np.zeros((dim, dim))
        upper[np.triu_indices(dim)] = vector[1 + dim :]
        scatter = upper + np.triu(upper, 1).T
        return cls(int(vector[0]), vector[1 : 1 + dim].copy(), scatter)


class Accumulator:
    """Sums over batches of tokens, on the device where the tokens are.

    Args:
        shift: float32 ``[D]`` near the mean, so that the sums lose no digits.

    Attributes:
        count: how many tokens were added.
    """

    def __init__(self, shift: torch.Tensor) -> None:
        self._shift = shift.double()
        self.count = 0
        self._sum = torch.zeros_like(self._shift)
        self._products = self._sum.new_zeros(len(shift), len(shift))

    def add(self, tokens: torch.Tensor) -> None:
        """Add tokens ``[..., D]`` of any float dtype."""
        if self._sum.device != tokens.device:
            self._shift = self._shift.to(tokens.device)
            self._sum = self._sum.to(tokens.device)
            self._products = self._products.to(tokens.device)
        shifted = tokens.reshape(-1, tokens.shape[-1]).double() - self._shift
        self.count += len(shifted)
        self._sum += shifted.sum(0)
        self._products.addmm_(shifted.T, shifted)

    def moments(self) -> Moments:
        """The moments of all tokens so far, on the CPU; waits for the device."""
        return self.sent()()

    def sent(self) -> Callable[[], Moments]:
        """The same on its way from the device: what is returned waits for it, on any thread."""
        count = self.count
        offset = self._sum / max(self.count, 1)
        scatter = self._products - torch.outer(offset, self._sum)
        # Of a dimension that does not move rounding can leave less than nothing.
        scatter.diagonal().clamp_(min=0)
        (mean, products), wait = to_host([self._shift + offset, scatter])

        def arrived() -> Moments:
            if wait is not None:
                wait()
            return Moments(count, mean.numpy(), products.numpy())

        return arrived


class CalibrationSums(Accumulator):
    """The sums of a sample that :func:`calibration` needs beside its moments.

    Args:
        shift: float32 ``[D]``: the mean of some of the tokens to come. Fourth powers forgive less
            than squares: a shift 1,000 spreads from the mean leaves the fourth moment no digit.
    """

    def __init__(self, shift: torch.Tensor) -> None:
        super().__init__(shift)
        # third powers, fourth powers, values that are exactly zero
        self._more = self._sum.new_zeros(3, len(shift))

    def add(self, tokens: torch.Tensor) -> None:
        super().add(tokens)
        flat = tokens.reshape(-1, tokens.shape[-1])
        shifted = flat.double() - self._shift
        square = shifted.square()
        more = ((square * shifted).sum(0), square.square().sum(0), (flat == 0).sum(0).double())
        self._more = self._more.to(flat.device) + torch.stack(more)

    @property
    def mostly_zero(self) -> np.ndarray:
        """bool ``[D]``: dimensions of which at least half of the values are exactly zero."""
        zeros = self._more[2].cpu().numpy()
        found: np.ndarray = 2 * zeros >= max(self.count, 1)
        return found

    def fourth_moment(self, centre: np.ndarray) -> np.ndarray:
        """Mean of (x - centre)^4, float64 ``[D]``.

        Args:
            centre: float64 ``[D]``.
        """
        first, second = self._sum.cpu().numpy(), torch.diagonal(self._products).cpu().numpy()
        third, fourth = self._more[:2].cpu().numpy()
        gap = self._shift.cpu().numpy() - centre
        # (y + gap)^4 summed over tokens, for y = x - shift
        total = fourth + gap * (4 * third + gap * (6 * second + gap * (4 * first)))
        found: np.ndarray = total / max(self.count, 1) + gap**4
        return found


def calibration(sums: CalibrationSums) -> tuple[np.ndarray, np.ndarray]:
    """The float32 centre m and deviation s that standardise a space, from a sample of its tokens.

    The centre is the mean; but zero for a dimension that is exactly zero in at least half of the
    tokens, as behind a rectifier: its zeros are then stored without an error, which is what an
    8-bit code with one scale a token owes to a token that is nearly empty.

        s = (mean (x - m)^4 / 3)^(1/4)

    is the standard deviation where x is Gaussian and m its mean. A dimension with rare large values
    has a larger s, so that such a value does not decide the one scale of its token alone, at the
    cost of all other values in it. Training has the standard deviation proper, by a gain from the
    store's exact statistics (``train.alignment.targets``).
    """
    moments = sums.moments()
    centre = np.where(sums.mostly_zero, 0.0, moments.mean)
    square = moments.mean_square(centre)
    # No fourth moment is less than the square of the second, but for rounding.
    fourth = np.maximum(sums.fourth_moment(centre), square**2)
    deviation = _or_typical((fourth / 3) ** 0.25, moments.mean)
    # denormal tokens have deviations that float32 rounds to nothing
    positive = np.maximum(deviation.astype(np.float32), np.float32(2.0**-149))
    return centre.astype(np.float32), positive


def _or_typical(deviation: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Deviations ``[D]``, and a typical one for those that are less than 1e-4 of it.

    What does not move in the sample may move in a later row. By a deviation of nearly nothing such
    a value would be the largest of its token by far, and with one scale a token all others be lost.
    Less than a float32 of the mean's size can tell is nothing. Where nothing moves at all they are
    the root mean square of the means, or 1.
    """
    deviation = np.where(deviation < 2.0**-23 * np.abs(mean), 0.0, deviation)
    typical = _typical(deviation)
    if typical == 0:
        magnitude = np.sqrt(np.mean(mean**2))
        return np.full_like(deviation, magnitude if magnitude > 0 else 1.0)
    return np.where(deviation < 1e-4 * typical, typical, deviation)


def floored(deviation: np.ndarray) -> np.ndarray:
    """Deviations ``[D]`` of which none is less than 1e-4 of a typical one.

    A dimension that hardly moves would be blown up to noise. Where nothing moves at all they are 1.
    """
    floor = 1e-4 * _typical(deviation)
    return np.maximum(deviation, floor) if floor > 0 else np.ones_like(deviation)


def _typical(deviation: np.ndarray) -> float:
    """The root mean square of deviations ``[D]``, but no more than 100 medians of those over zero.

    A few dimensions of a ViT can be some ten thousand times as large as all others, which by their
    root mean square alone would seem not to move.
    """
    moving = deviation[deviation > 0]
    if not len(moving):
        return 0.0
    return float(min(np.sqrt(np.mean(deviation**2)), 100 * np.median(moving)))


SAMPLE_ROWS = 32
"""So many rows show how alike neighbouring tokens are."""


def prediction_weights(
    space: SpaceSpec, moments: Moments, mean: np.ndarray, std: np.ndarray, tokens: torch.Tensor
) -> np.ndarray:
    """Weights that predict codes of a space from each other, from a sample of its tokens.

    Args:
        moments: of the sample, in the teacher's units.
        mean, std: float32 ``[D]``: the calibration that standardises it.
        tokens: ``[b, N, D]`` of SAMPLE_ROWS of its rows or fewer, in the teacher's units.

    Returns:
        int8 ``[D, D]``, see :class:`encodings.prediction.Prediction`; a dimension whose centre is
        zero, as :func:`calibration` has it for a rectified one, is not predicted.
    """
    scale, rectified = std.astype(np.float64), mean == 0
    covariance = moments.covariance / np.outer(scale, scale)
    weights = fitted(covariance, moments.count, rectified)
    if space.grid is not None:
        z = (tokens.detach().cpu().float().numpy() - mean) / std
        codes = space.how.encode(z)["codes"]
        left = Prediction(weights, None).residuals(codes)
        np.fill_diagonal(weights, neighbours(left, space.grid, rectified))
    return weights
